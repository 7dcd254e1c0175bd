"""What the commands do: train all stages, evaluate, and keep the workdir in order."""

from __future__ import annotations

import logging
import os
import pathlib
import time
from typing import Any

import jax

from dilbert_jax.config import check_config
from dilbert_jax.evaluate import evaluate
from dilbert_jax.experiment import check_same_config, open_experiment
from dilbert_jax.training import loop
from dilbert_jax.training.loop import NonFiniteLossError

__all__ = ["NonFiniteLossError", "train_and_report", "use_compilation_cache"]
_log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's own cache folder: whoever can write there can run code here."""
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = root / "dilbert_jax" / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def train_and_report(config: Any, workdir: pathlib.Path, command: str = "") -> pathlib.Path:
    """Trains what is not trained yet, evaluates, and returns the path of the results page.

    Raises:
      ValueError: a configuration that cannot work, a workdir of another run, or unusable data.
      NonFiniteLossError: training diverged.
    """
    check_config(config)
    report = workdir / ("report.html" if config.train.evaluate_after else "metrics.jsonl")
    if loop.is_complete(workdir) and report.exists():
        check_same_config(config, workdir)
        _log.info("all stages of %s are complete", workdir)
        return report
    use_compilation_cache()
    started = time.monotonic()
    experiment = open_experiment(config, workdir)
    _log.info("%s", loop.describe_run(config, experiment))
    loop.train(experiment, workdir)
    if config.train.evaluate_after:
        evaluate(config, workdir, command=command)
    loop.mark_complete(workdir, time.monotonic() - started)
    return report
