"""Peak memory of a training step, with everything that the process holds.

    python -m benchmarks.memory --presets small base

Each contender of `benchmarks.training_step` runs alone in a fresh process. The peak is that of three updates after the
first one, so that what compiling needed does not count; it is the process's resident size, with framework, weights,
optimizer and batch, or, on a GPU, what the framework has allocated there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks import common, training_step


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    names = [name for name in training_step.contenders() if name != "PyTorch compiled"]
    for preset, stage in itertools.product(arguments.presets, training_step.STAGES):
        found = {name: _run(name, preset, stage, arguments) for name in names}
        setting = f"{preset}, {stage}, batch {training_step.SHAPES[preset][2]}"
        for beside in names[1:] or [""]:
            yield common.compare_exactly(setting, "MiB", found["JAX"], beside, found.get(beside))


def _run(name: str, preset: str, stage: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", name, "--presets", preset]
    command += ["--stage", stage, "--dtype", arguments.dtype]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of_one(name: str, preset: str, stage: str, dtype: str) -> float:
    """MiB at the peak of one contender's updates, in this process."""
    framework = "jax" if name == "JAX" else "torch"
    run = training_step.prepare(preset, stage, [name], None, dtype)[name]
    run()
    common.reset_peak(framework)
    for _ in range(3):
        run()
    return common.peak_mib(framework)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = list(training_step.SHAPES)
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)


def main() -> None:
    if "--one" in sys.argv:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        arguments = parser.parse_args()
        print(peak_of_one(arguments.one, arguments.presets[0], arguments.stage, arguments.dtype))
    else:
        common.main(__doc__, measure, add_arguments, rounds=3)


if __name__ == "__main__":
    main()
