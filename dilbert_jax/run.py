"""What the commands do: train all stages, evaluate, and keep the workdir in order."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import jax

from dilbert_jax.config import check_config
from dilbert_jax.evaluate import evaluate
from dilbert_jax.experiment import check_same_config, open_experiment
from dilbert_jax.training import loop, stages
from dilbert_jax.training.checkpoints import sync
from dilbert_jax.training.window import NonFiniteLossError

__all__ = ["NonFiniteLossError", "join_processes", "train_and_report", "use_compilation_cache"]
_log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's own cache folder: whoever can write there can run code here.

    Where JAX_COMPILATION_CACHE_DIR names a folder, JAX uses that one already.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = root / "dilbert_jax" / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: initialisation is made of many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def join_processes() -> None:
    """Makes this process one of several that train together; every one of them runs the same command.

    A cluster's environment (SLURM, Open MPI, Kubernetes, a TPU pod) says who takes part. Elsewhere these variables do:
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: neither does.
    """
    settings: dict[str, Any] = {}
    for name in ("num_processes", "process_id"):
        text = os.environ.get(f"JAX_{name.upper()}")
        if text is not None:
            if not text.isdigit():
                raise ValueError(f"JAX_{name.upper()} is {text!r}; it must be a whole number")
            settings[name] = int(text)
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:
        raise ValueError(
            f"--distributed: {error} Start it on a cluster that JAX knows, or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process (docs/scaling.md)"
        ) from None


@contextlib.contextmanager
def _alone_in(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a workdir, where the system can: two that train in one folder would mix their checkpoints.

    Raises:
      ValueError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{workdir} is in use by another process that trains there; wait for it, or name another --workdir"
                ) from None
        yield


def train_and_report(config: Any, workdir: pathlib.Path, command: str = "") -> pathlib.Path:
    """Trains what is not trained yet, evaluates, and returns the path of the results page.

    Raises:
      ValueError: a configuration that cannot work, a workdir of another run or in use, or unusable data.
      NonFiniteLossError: training diverged.
    """
    check_config(config)
    report = workdir / ("report.html" if config.train.evaluate_after else "metrics.jsonl")
    if stages.is_complete(workdir) and report.exists():
        check_same_config(config, workdir)
        _log.info("all stages of %s are complete", workdir)
        return report
    use_compilation_cache()
    started = time.monotonic()
    first = jax.process_index() == 0
    if not first:
        _log.setLevel(logging.WARNING)
        sync(
            "run opened"
        )  # by the first process; what it prepared is found, or prepared again on another disk
    with _alone_in(workdir) if first else contextlib.nullcontext():
        experiment = open_experiment(config, workdir)
        if first:
            sync("run opened")
        _log.info("%s", loop.describe_run(config, experiment))
        loop.train(experiment, workdir)
        if jax.process_count() > 1:
            # Evaluation is work for one process, which the others' accelerators need not wait for.
            if config.train.evaluate_after:
                _log.info("trained; evaluate on one machine: python eval.py --workdir=%s", workdir)
            report = workdir / "metrics.jsonl"
        elif config.train.evaluate_after:
            evaluate(config, workdir, command=command)
        if first:
            stages.mark_complete(workdir, time.monotonic() - started)
    return report
