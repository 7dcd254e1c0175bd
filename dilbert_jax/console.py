"""What commands show on the console."""

import logging


def log_to_console() -> None:
    """Shows this package's messages as they are, and of the libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    for own in ("dilbert_jax", "__main__"):
        logging.getLogger(own).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(
        logging.WARNING
    )  # has a level of its own, and Orbax tells it every detail
