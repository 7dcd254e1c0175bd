"""What commands show on the console."""

import logging


def log_to_console() -> None:
    """Shows this package's messages as they are, and of the libraries only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells every detail of every save
    logging.getLogger("jax").setLevel(logging.WARNING)  # JAX tells which accelerators it did not find
