"""The fusion encoder, forward and backward: share of the machine's own matmul peak, and time beside PyTorch.

    python -m benchmarks.transformer --preset base

The peak is the best rate of square matrix products of --side that JAX, NumPy or PyTorch reaches, measured in the same
rounds. The encoder's operations are those of its matrix products alone; softmax, normalization and activations add to
its time and not to its count. No dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, training_step
from dilbert_jax.config import MODEL_PRESETS
from dilbert_jax.flops import count_flops
from dilbert_jax.models import Dilbert
from dilbert_jax.random_inputs import random_model
from dilbert_jax.sharding import platform

LENGTHS = {"entity": 96, "description": 8, "region": 16}


def make_jax(
    preset: str, batch_size: int, dtype: str
) -> tuple[Callable[[], Any], int, dict[str, Any], dict[str, np.ndarray]]:
    """Forward and backward; its operations; the parameters of the blocks; the streams."""
    config = training_step.make_config(preset, batch_size, dtype)
    config.model.dropout = 0.0
    model = Dilbert(random_model(config))
    width, rng = config.model.hidden_size, np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal((batch_size, length, width), np.float32) for name, length in LENGTHS.items()
    }
    params = training_step.init_networks(config)["teacher"]
    blocks = {name: value for name, value in params.items() if name.startswith("layers_")}
    masks = {name: np.ones((batch_size, length), bool) for name, length in LENGTHS.items()}

    def total(blocks: Any, streams: Any) -> jax.Array:
        streams = {name: x.astype(dtype) for name, x in streams.items()}
        fused, *_ = model.apply({"params": params | blocks}, streams, masks, True, method=Dilbert.fuse)
        return sum(x.astype(jnp.float32).mean() for x in fused.values())

    gradient = jax.value_and_grad(total, argnums=(0, 1))
    arguments = jax.device_put((blocks, inputs))
    run = jax.jit(gradient).lower(*arguments).compile()
    flops = count_flops(gradient, *arguments)
    return lambda: jax.block_until_ready(run(*arguments)), flops, params, inputs


def make_torch(preset: str, batch_size: int, dtype: str, params: Any, inputs: Any) -> Callable[[], Any]:
    """The same in PyTorch."""
    import torch

    from dilbert_jax.parity import compare

    config = training_step.make_config(preset, batch_size, dtype)
    config.model.dropout = 0.0
    model = dataclasses.replace(random_model(config), dtype="float32")
    device = common.torch_device()
    network = compare.make_torch(params, model).to(device)
    streams = {name: torch.from_numpy(x).to(device).requires_grad_() for name, x in inputs.items()}
    masks = {name: torch.ones(x.shape[:2], dtype=torch.bool, device=device) for name, x in inputs.items()}

    def run() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            fused = dict(streams)
            for layer in network.layers:
                fused, _ = layer(fused, masks)
        sum(x.float().mean() for x in fused.values()).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def matmuls(side: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """One square matrix product in each library."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    x, y = (jnp.asarray(m, dtype) for m in (a, b))
    multiply = jax.jit(jnp.dot)
    runs: dict[str, Callable[[], Any]] = {"matmul, JAX": lambda: jax.block_until_ready(multiply(x, y))}
    if platform() == "cpu" and dtype == "float32":
        runs["matmul, NumPy"] = lambda: a @ b
    if common.has_torch():
        import torch

        device = common.torch_device()
        p, q = (torch.from_numpy(m).to(device, getattr(torch, dtype)) for m in (a, b))

        def run() -> None:
            p @ q
            if device == "cuda":
                torch.cuda.synchronize()

        runs["matmul, PyTorch"] = run
    return runs


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    side, batch_size, dtype = arguments.side, arguments.batch_size, arguments.dtype
    encoder, flops, params, inputs = make_jax(arguments.preset, batch_size, dtype)
    runs = {"encoder, JAX": encoder} | matmuls(side, dtype)
    if common.has_torch():
        runs["encoder, PyTorch eager"] = make_torch(arguments.preset, batch_size, dtype, params, inputs)
    seconds, _ = common.time_in_turn(runs, arguments.rounds)
    products = {name: 2 * side**3 / np.asarray(v) for name, v in seconds.items() if "matmul" in name}
    peak = max(products, key=lambda name: float(np.median(products[name])))
    for name, rates in products.items():
        yield common.Row(f"{name}, {side} x {side}", "Gflop/s", common.quartiles(rates, 1e-9))
    setting = f"{arguments.preset}, fusion encoder, batch {batch_size}"
    rates = flops / np.asarray(seconds["encoder, JAX"])
    yield common.Row(
        setting,
        "Gflop/s",
        common.quartiles(rates, 1e-9),
        f"peak ({peak})",
        common.quartiles(products[peak], 1e-9),
        common.quartiles(rates / products[peak]),
        ">= 0.6" if arguments.preset == "base" and platform() == "cpu" else "",
        {"flops": flops},
    )
    if "encoder, PyTorch eager" in seconds:
        yield common.compare(setting, seconds, "encoder, JAX", "encoder, PyTorch eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="base")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--side", type=int, default=2048, help="rows of the square matrices of the peak")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments)
