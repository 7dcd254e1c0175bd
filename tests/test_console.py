"""What commands show: this package's messages, and warnings of the libraries."""

import subprocess
import sys

PROGRAM = """
import logging
from dilbert_jax.console import log_to_console

log_to_console()
for name in ("dilbert_jax.training.loop", "__main__", "jax._src.xla_bridge", "matplotlib.font_manager", "absl"):
    logging.getLogger(name).info("message of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


def test_libraries_only_warn():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    assert [line for line in said if line.startswith("message")] == [
        "message of dilbert_jax.training.loop",
        "message of __main__",
    ]
    assert len([line for line in said if line.startswith("warning")]) == 5
