"""The angle loss over N samples, forward and backward, beside its usual form in PyTorch: time and memory.

    python -m benchmarks.relational --samples 64 128 256 512

Each figure comes from a fresh process: memory is the growth of the peak resident size over the state in which the
framework is loaded and the inputs exist; on a GPU it is the device's own peak. The usual form needs memory for N^3
cosines and N^2 x D edges: it runs up to --largest-usual samples. From there on, only ours does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import common

SAMPLES = (32, 64, 128, 256, 512, 1024, 2048)


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    for number in arguments.samples:
        setting, beside = f"N = {number}, D = {arguments.width}", "usual PyTorch"
        ours = _run("jax", number, arguments)
        seconds = common.quartiles(ours["seconds"], 1e3)
        if not common.has_torch() or number > arguments.largest_usual:
            yield common.Row(setting, "ms", seconds)
            yield common.compare_exactly(setting, "MiB", ours["peak_mib"])
            continue
        theirs = _run("torch", number, arguments)
        difference = abs(theirs["loss"] - ours["loss"]) / abs(theirs["loss"])
        others = common.quartiles(theirs["seconds"], 1e3)
        # Processes of their own have no rounds to pair: the ratio is that of the medians.
        ratio = common.exactly(seconds["median"] / others["median"])
        yield common.Row(setting, "ms", seconds, beside, others, ratio, more={"loss_difference": difference})
        yield common.compare_exactly(setting, "MiB", ours["peak_mib"], beside, theirs["peak_mib"])


def _run(name: str, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--samples", str(number), "--width", str(arguments.width), "--rounds", str(arguments.rounds)]
    return common.measure_in_process("relational", name, options)


def _draw(number, width):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((number, width), np.float32), rng.standard_normal((number, width), np.float32)


def _seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    return common.time_in_turn({"": run}, rounds)[0][""]


def measure_jax(number: int, width: int, rounds: int) -> dict[str, Any]:
    """Measures `dilbert_jax.relational.angle_loss`.

    Args:
      number: samples N.
      width: D.
      rounds: timed runs, after one that does not count.

    Returns:
      Seconds of each, MiB of memory at the peak, loss.
    """
    import jax

    from dilbert_jax.relational import angle_loss

    student, teacher = (jax.device_put(array) for array in _draw(number, width))
    jax.block_until_ready((student + 1, teacher))
    before = common.resident_mib("jax")
    run = jax.jit(jax.value_and_grad(angle_loss)).lower(student, teacher).compile()
    common.reset_peak("jax")  # without what compiling needed
    seconds = _seconds(lambda: jax.block_until_ready(run(student, teacher)), rounds)
    peak = common.peak_mib("jax") - before
    return {"seconds": seconds, "peak_mib": peak, "loss": float(run(student, teacher)[0])}


def measure_torch(number: int, width: int, rounds: int) -> dict[str, Any]:
    """Measures the usual PyTorch form: all N^2 edges, normalized, and their N products of N x N.

    Args:
      number: samples N.
      width: D.
      rounds: timed runs, after one that does not count; at most 3.

    Returns:
      As `measure_jax`.
    """
    import torch
    from torch.nn import functional

    device = common.torch_device()
    student, teacher = (torch.from_numpy(array).to(device) for array in _draw(number, width))
    student.requires_grad_()

    def cosines(vectors: Any) -> Any:
        edges = functional.normalize(vectors.unsqueeze(0) - vectors.unsqueeze(1), p=2, dim=2)
        return torch.bmm(edges, edges.transpose(1, 2)).view(-1)

    def run() -> float:
        student.grad = None
        with torch.no_grad():
            target = cosines(teacher)
        loss = functional.smooth_l1_loss(cosines(student), target)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    before = common.resident_mib("torch")
    common.reset_peak("torch")
    seconds = _seconds(run, min(rounds, 3))
    return {"seconds": seconds, "peak_mib": common.peak_mib("torch") - before, "loss": run()}


MEASUREMENTS = {"jax": measure_jax, "torch": measure_torch}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--largest-usual", type=int, default=512, help="N up to which the usual form runs")
    parser.add_argument("--width", type=int, default=768)


def measure_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    return MEASUREMENTS[arguments.one](arguments.samples[0], arguments.width, arguments.rounds)


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments, rounds=5, measure_alone=measure_alone)
