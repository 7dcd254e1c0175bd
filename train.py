"""Trains DILBERT through all its stages and writes a results page.

    python train.py --config=configs/quickstart.py [--workdir=DIR] [--config.train.batch_size=16 ...]

Run the same command again to resume an interrupted run, or to be told that all is done.
"""

import pathlib
import sys
import time

from absl import app, flags
from ml_collections import config_flags

from dilbert_jax.console import log_to_console
from dilbert_jax.huge_pages import request_huge_pages

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default runs/<name of the experiment file>."
)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that train together (docs/scaling.md)."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; flags start with --")
    log_to_console()
    config = _CONFIG.value
    path = pathlib.Path(flags.FLAGS["config"].config_filename)  # type: ignore[attr-defined]
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / path.stem)

    from dilbert_jax import (
        run,
    )  # after the flags: a misspelt field is reported before anything heavy is imported

    started = time.monotonic()
    try:
        if _DISTRIBUTED.value:
            run.join_processes()
        report = run.train_and_report(config, workdir, command="python " + " ".join(sys.argv))
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to continue")
    except (ValueError, OSError, run.NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
    print(f"{time.monotonic() - started:.0f} s; results: {report}")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a misspelt or mistyped override is one line, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, TypeError, ValueError) as error:
        reason = str(error).replace("\\n", ". ").replace("\\'", "'").removeprefix("'").removesuffix("'")
        sys.exit(f"error: an override of --config names no field or has a value of another type: {reason}")
    except flags.Error as error:
        sys.exit(f"error: {error}; see --help")


if __name__ == "__main__":
    request_huge_pages()
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
