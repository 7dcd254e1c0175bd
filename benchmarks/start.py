"""Start of `train.py` with the quickstart, until the first update of the networks is in the log.

    python -m benchmarks.start --rounds 3

`cold` compiles every program and `warm` finds them in the compilation cache; both find the phantom data prepared.
`nothing prepared` also draws the phantom data first. Each is a fresh process, stopped once the first line is in
metrics.jsonl.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from benchmarks import common

WANTED = {"nothing prepared": "", "cold": "<= 40", "warm": "<= 12"}


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    seconds: dict[str, list[float]] = {name: [] for name in WANTED}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            seconds["nothing prepared"].append(_first_step(root / "first", root / "data", root / "cache"))
            seconds["cold"].append(_first_step(root / "second", root / "data", root / "other"))
            seconds["warm"].append(_first_step(root / "third", root / "data", root / "other"))
    for name, values in seconds.items():
        yield common.Row(f"quickstart, {name}", "s", common.quartiles(values), wanted=WANTED[name])


def _first_step(workdir: pathlib.Path, data: pathlib.Path, cache: pathlib.Path) -> float:
    """Seconds from the start of the process to the first line of its log."""
    command = [
        sys.executable,
        str(common.ROOT / "train.py"),
        f"--config={common.ROOT / 'configs' / 'quickstart.py'}",
    ]
    command += [f"--workdir={workdir}", f"--config.data.data_dir={data}"]
    workdir.mkdir()
    log = workdir / "metrics.jsonl"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": ""}
    with (workdir / "output.txt").open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                text = (workdir / "output.txt").read_text(encoding="utf-8")
                raise RuntimeError(f"train.py stopped before its first step: {text[-2000:]}")
            time.sleep(0.02)
        taken = time.perf_counter() - start
        process.send_signal(signal.SIGKILL)
        process.wait()
    return taken


if __name__ == "__main__":
    common.main(__doc__, measure, rounds=3)
