"""Evaluates a trained run and writes eval.json and report.html into it.

python eval.py --workdir=runs/quickstart [--split=test]
"""

import pathlib
import sys

from absl import app, flags

from dilbert_jax.console import log_to_console
from dilbert_jax.huge_pages import request_huge_pages

_WORKDIR = flags.DEFINE_string("workdir", None, "A run that train.py completed.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which studies.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; flags start with --")
    log_to_console()
    workdir = pathlib.Path(_WORKDIR.value)

    from dilbert_jax import run
    from dilbert_jax.config import load_config
    from dilbert_jax.evaluate import evaluate, summarize

    run.use_compilation_cache()
    try:
        if not (workdir / "config.json").exists():
            raise FileNotFoundError(
                f"{workdir / 'config.json'} is missing: {workdir} holds no run; train one first"
            )
        result = evaluate(
            load_config(workdir / "config.json"),
            workdir,
            split=_SPLIT.value,
            command="python " + " ".join(sys.argv),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summarize(result))
    print(f"results: {workdir / 'report.html'}")


if __name__ == "__main__":
    request_huge_pages()
    app.run(main)
