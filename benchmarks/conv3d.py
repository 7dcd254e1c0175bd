"""Time of the stride-1 3-D convolution, forward and backward, beside what XLA and PyTorch make of it.

    python benchmarks/conv3d.py --repeats 15 --json conv3d.json

Three forms of the same convolution are timed in turn, in one process: XLA's own in 3-D, the sum over temporal taps with
the derived backward pass, and `dilbert_jax.models.conv3d.conv3d`; PyTorch's Conv3d as a fourth where it is installed.
The geometric means stand apart for this project's own shapes and for the larger ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilbert_jax.models import conv3d as layer

# B, T, H = W, C = O, kernel. Two of the quickstart, three of the base preset (clips 16x112x112, stem 2x4x4).
OWN_SHAPES = (
    (16, 4, 16, 48, (1, 3, 3)),
    (16, 4, 8, 96, (3, 3, 3)),
    (4, 8, 28, 64, (1, 3, 3)),
    (4, 8, 14, 128, (3, 3, 3)),
    (4, 8, 7, 256, (3, 3, 3)),
)
LARGE_SHAPES = (
    (4, 4, 14, 256, (3, 3, 3)),
    (4, 8, 28, 128, (3, 3, 3)),
    (4, 16, 56, 64, (1, 3, 3)),
    (4, 16, 56, 64, (3, 1, 1)),
    (4, 16, 56, 64, (3, 3, 3)),
)
SHAPES = OWN_SHAPES + LARGE_SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="measure the first so many")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with_torch = importlib.util.find_spec("torch") is not None
    names = ["xla_3d", "taps_derived", "ours"] + ["torch"] * with_torch
    others = [name for name in names if name != "ours"]
    heads = " ".join(f"{name:>13}" for name in names)
    print(f"{'B,T,H,C kernel':>28} {heads}   ms, median; ours / " + ", ".join(others))
    rows = []
    for shape in SHAPES[: arguments.shapes]:
        runs = _jax_forms(shape) | (_torch_form(shape) if with_torch else {})
        milliseconds = _time_in_turn(runs, arguments.repeats)
        rows.append({"shape": shape, "milliseconds": milliseconds})
        label = ",".join(map(str, shape[:4])) + " " + "x".join(map(str, shape[4]))
        ratios = " ".join(f"{milliseconds['ours'] / milliseconds[name]:5.2f}" for name in others)
        figures = " ".join(f"{milliseconds[name]:13.2f}" for name in names)
        print(f"{label:>28} {figures}   {ratios}", flush=True)
    for name in others:
        for group, part in (("own", rows[: len(OWN_SHAPES)]), ("larger", rows[len(OWN_SHAPES) :])):
            if part:
                ratio = [r["milliseconds"]["ours"] / r["milliseconds"][name] for r in part]
                print(f"ours / {name}, {group} shapes: geometric mean {statistics.geometric_mean(ratio):.2f}")
    if arguments.json:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
        versions["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(versions | {"rows": rows}, file, indent=2)


def _draw(shape: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, time_, size, channels, kernel = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, time_, size, size, channels), np.float32)
    w = 0.05 * rng.standard_normal((*kernel, channels, channels), np.float32)
    return x, w, rng.standard_normal(x.shape, np.float32)


def _jax_forms(shape: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    x, w, cotangent = map(jnp.asarray, _draw(shape))

    def xla_3d(x: jax.Array, w: jax.Array) -> jax.Array:
        padding = [((k - 1) // 2, (k - 1) // 2) for k in w.shape[:3]]
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        return lax.conv_general_dilated(x, w, (1, 1, 1), padding, dimension_numbers=numbers)

    def taps_derived(x: jax.Array, w: jax.Array) -> jax.Array:
        return layer._sum_over_taps(x, w, (1, 1, 1))

    def compile_form(convolve: Callable[..., jax.Array]) -> Callable[[], Any]:
        def both(x: jax.Array, w: jax.Array, c: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            y, pull_back = jax.vjp(convolve, x, w)
            return y, pull_back(c)

        run = jax.jit(both).lower(x, w, cotangent).compile()
        return lambda: jax.block_until_ready(run(x, w, cotangent))

    forms = {"xla_3d": xla_3d, "taps_derived": taps_derived, "ours": layer.conv3d}
    return {name: compile_form(form) for name, form in forms.items()}


def _torch_form(shape: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn import functional

    x, w, cotangent = _draw(shape)
    inputs = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    weight = torch.from_numpy(w.transpose(4, 3, 0, 1, 2).copy()).requires_grad_()
    gradient = torch.from_numpy(np.moveaxis(cotangent, -1, 1).copy())
    padding = tuple((k - 1) // 2 for k in shape[4])

    def run() -> None:
        inputs.grad = weight.grad = None
        functional.conv3d(inputs, weight, padding=padding).backward(gradient)

    return {"torch": run}


def _time_in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that all meet the same load."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
