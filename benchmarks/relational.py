"""Time and memory of the angle loss, forward and backward, beside the usual PyTorch form if installed.

    python benchmarks/relational.py --samples 64 128 256 512 --json relational.json

Each figure comes from a fresh process: memory is the growth of the peak resident size over the state in which
the framework is loaded and the inputs exist.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--skip-torch", action="store_true", help="measure JAX alone")
    parser.add_argument("--one", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure = MEASUREMENTS[arguments.one]
        print(json.dumps(measure(arguments.samples[0], arguments.width, arguments.repeats)))
        return

    with_torch = importlib.util.find_spec("torch") is not None and not arguments.skip_torch
    rows = []
    print(
        f"{'N':>5} {'JAX s':>9} {'MiB':>7} {'compile s':>9}"
        + f" {'torch s':>9} {'MiB':>7} {'time':>7} {'memory':>7}" * with_torch
    )
    for number in arguments.samples:
        row = {"samples": number, "width": arguments.width, "cores": os.cpu_count()}
        row["jax"] = _run("jax", number, arguments)
        line = f"{number:5d} {row['jax']['seconds']:9.4f} {row['jax']['peak_mib']:7.0f}"
        line += f" {row['jax']['compile_seconds']:9.2f}"
        if with_torch:
            row["torch"] = _run("torch", number, arguments)
            row["time_ratio"] = row["torch"]["seconds"] / row["jax"]["seconds"]
            row["memory_ratio"] = row["torch"]["peak_mib"] / max(row["jax"]["peak_mib"], 1)
            row["loss_difference"] = abs(row["torch"]["loss"] - row["jax"]["loss"]) / abs(
                row["torch"]["loss"]
            )
            line += f" {row['torch']['seconds']:9.4f} {row['torch']['peak_mib']:7.0f}"
            line += f" {row['time_ratio']:6.1f}x {row['memory_ratio']:6.1f}x"
        rows.append(row)
        print(line, flush=True)
    if not with_torch:
        print("PyTorch was not measured (not installed, or --skip-torch).")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def _run(name, number, arguments):
    command = [sys.executable, __file__, "--one", name, "--samples", str(number)]
    command += ["--width", str(arguments.width), "--repeats", str(arguments.repeats)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _draw(number, width):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((number, width), np.float32), rng.standard_normal((number, width), np.float32)


def _peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _repeat(run, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_jax(number: int, width: int, repeats: int) -> dict[str, float]:
    """Measures `dilbert_jax.relational.angle_loss`.

    Args:
        number: samples N.
        width: D.
        repeats: timed runs, after one that compiles.

    Returns:
        Median seconds, peak memory (compilation included), seconds to compile, loss.
    """
    import jax

    from dilbert_jax.relational import angle_loss

    student, teacher = (jax.device_put(array) for array in _draw(number, width))
    jax.block_until_ready((student + 1, teacher))
    before = _peak_mib()
    start = time.perf_counter()
    run = jax.jit(jax.value_and_grad(angle_loss)).lower(student, teacher).compile()
    compile_seconds = time.perf_counter() - start
    loss, _ = jax.block_until_ready(run(student, teacher))
    seconds = _repeat(lambda: jax.block_until_ready(run(student, teacher)), repeats)
    return {
        "seconds": seconds,
        "peak_mib": _peak_mib() - before,
        "compile_seconds": compile_seconds,
        "loss": float(loss),
    }


def measure_torch(number: int, width: int, repeats: int) -> dict[str, float]:
    """Measures the usual PyTorch form: all N^2 edges, normalized, and their N products of N x N.

    Args:
        number: samples N.
        width: D.
        repeats: timed runs, after one to warm up; at most 3.

    Returns:
        Median seconds, peak memory, loss.
    """
    import torch
    from torch.nn import functional

    student, teacher = (torch.from_numpy(array) for array in _draw(number, width))
    student.requires_grad_()

    def cosines(vectors):
        edges = functional.normalize(vectors.unsqueeze(0) - vectors.unsqueeze(1), p=2, dim=2)
        return torch.bmm(edges, edges.transpose(1, 2)).view(-1)

    def run():
        student.grad = None
        with torch.no_grad():
            target = cosines(teacher)
        loss = functional.smooth_l1_loss(cosines(student), target)
        loss.backward()
        return loss

    before = _peak_mib()
    loss = float(run().detach())
    return {"seconds": _repeat(run, min(repeats, 3)), "peak_mib": _peak_mib() - before, "loss": loss}


MEASUREMENTS = {"jax": measure_jax, "torch": measure_torch}

if __name__ == "__main__":
    main()
