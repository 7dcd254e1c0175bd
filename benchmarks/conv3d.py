"""The stride-1 3-D convolution, forward and backward, beside what XLA and PyTorch make of it.

    python -m benchmarks.conv3d --rounds 15

`ours` is `dilbert_jax.models.conv3d.conv3d`; beside it XLA's own convolution in 3-D, the sum over temporal taps with
the derived backward pass, and PyTorch's Conv3d where it is installed. Settings are B, T, H = W, C = O and the kernel.
The geometric means stand apart for this project's own shapes and for the larger ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
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


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    for group, shapes in (("own shapes", OWN_SHAPES), ("larger shapes", LARGE_SHAPES)):
        rows: dict[str, list[common.Row]] = {}
        for shape in shapes:
            runs = _jax_forms(shape) | (_torch_form(shape) if common.has_torch() else {})
            seconds, _ = common.time_in_turn(runs, arguments.rounds)
            setting = ", ".join(map(str, shape[:4])) + ": " + " x ".join(map(str, shape[4]))
            for beside in list(runs)[1:]:
                rows.setdefault(beside, []).append(common.compare(setting, seconds, "ours", beside))
                yield rows[beside][-1]
        for beside, of_group in rows.items():
            mean = common.exactly(common.geometric_mean(of_group))
            wanted = "<= 0.95" if (group, beside) == ("larger shapes", "PyTorch") else ""
            yield common.Row(f"geometric mean, {group}", "", beside=beside, ratio=mean, wanted=wanted)


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

    forms = {"ours": layer.conv3d, "XLA in 3-D": xla_3d, "taps, derived": taps_derived}
    return {name: compile_form(form) for name, form in forms.items()}


def _torch_form(shape: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn import functional

    x, w, cotangent = _draw(shape)

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x.copy()).to(device)

    device = common.torch_device()
    inputs = tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    weight = tensor(w.transpose(4, 3, 0, 1, 2)).requires_grad_()
    gradient = tensor(np.moveaxis(cotangent, -1, 1))
    padding = tuple((k - 1) // 2 for k in shape[4])

    def run() -> None:
        inputs.grad = weight.grad = None
        functional.conv3d(inputs, weight, padding=padding).backward(gradient)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"PyTorch": run}


if __name__ == "__main__":
    common.main(__doc__, measure)
