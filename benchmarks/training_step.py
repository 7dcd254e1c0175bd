"""Training steps: time and peak memory of the whole update in JAX and in PyTorch, eager and compiled.

    python -m benchmarks.training_step --presets small base

Both start from the same weights and see the same batch, with the preset's dropout and the same optimizer (AdamW with
clipped gradients). All have huge pages where the system gives them to who asks, but for "JAX, small pages". `mutual` is
the step of mutual learning: two trained and two frozen networks, all terms of equation (13). `pre-training` is one
network and the four tasks. Each contender has a process, and so the machine, for itself; their processes take turns.
The peak is that of the updates after the first: the resident size with framework, weights, optimizer and batch, or, on
a GPU, what the framework has allocated there. With --dtype bfloat16, JAX computes in bfloat16 and PyTorch under
autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import common
from dilbert_jax.config import default_config
from dilbert_jax.models import Dilbert
from dilbert_jax.random_inputs import init_network, random_batch, random_model
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

STAGES = ("pre-training", "mutual")
NUM_STEPS = 1000  # of the optimizer's schedule
# Frames, pixels a side, batch: the smaller presets as in the quickstart, the base preset as the paper's clips.
SHAPES = {"tiny": (12, 64, 16), "small": (12, 64, 16), "base": (16, 112, 4)}


def make_config(preset: str, batch_size: int | None, dtype: str) -> ml_collections.ConfigDict:
    """A preset with the inputs that it is meant for."""
    frames, size, default_batch = SHAPES[preset]
    config = default_config(preset)
    config.data.update(size=size, num_frames=frames, max_tokens=96, grid_scales=(1, 3), grid_steps=1)
    if preset != "base":
        config.model.stem_patch = (3, 4, 4)
    config.model.dtype = dtype
    config.train.batch_size = batch_size or default_batch
    return config


def init_networks(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Teacher and student with fresh weights, as NumPy arrays."""
    init = jax.jit(functools.partial(init_network, config))
    return {name: jax.device_get(init(jax.random.key(i))) for i, name in enumerate(objectives.NETWORKS)}


def make_jax(config: ml_collections.ConfigDict, stage: str, networks: Any, batch: Any) -> Callable[[], float]:
    """The update that training makes; the loss when it is done."""
    model, loss = Dilbert(random_model(config)), objectives.LossConfig(**config.loss)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), NUM_STEPS)
    if stage == "mutual":
        start, frozen = networks, jax.device_put(networks)
        objective: Any = functools.partial(objectives.mutual_objective, model, loss)
    else:
        start, frozen = {"teacher": networks["teacher"]}, {}

        def objective(params: Any, frozen: Any, batch: Any, rng: Any) -> Any:
            del frozen
            return objectives.pretraining_objective(model, loss, params, None, batch, rng)

    update = steps.make_step(objective, optimizer)
    state = steps.TrainState.create(jax.tree.map(jnp.array, start), optimizer)
    inputs, rng = jax.device_put(batch), jax.random.key(0)

    def run() -> float:
        nonlocal state
        state, metrics = update(state, frozen, inputs, rng)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def make_torch(
    config: ml_collections.ConfigDict, stage: str, networks: Any, batch: Any, compiled: bool
) -> Callable[[], float]:
    """The same update in PyTorch."""
    import torch

    from dilbert_jax.parity import compare, torch_losses
    from dilbert_jax.parity.torch_training import Training, to_tensors

    device = common.torch_device()
    model = dataclasses.replace(random_model(config), dtype="float32")
    loss = objectives.LossConfig(**config.loss)
    names = objectives.NETWORKS if stage == "mutual" else ("teacher",)
    trained = {name: compare.make_torch(networks[name], model).to(device).train() for name in names}
    frozen = {}
    if stage == "mutual":
        frozen = {n: compare.make_torch(networks[n], model).to(device).requires_grad_(False) for n in names}
    inputs = to_tensors(batch, device=device)

    def objective(inputs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            if stage == "mutual":
                return torch_losses.mutual_objective(trained, frozen, inputs, loss)
            return torch_losses.pretraining_objective(trained, None, inputs, loss)

    optimizer = OptimizerConfig(**config.optimizer)
    training = Training(trained, torch.compile(objective) if compiled else objective, optimizer, NUM_STEPS)

    def run() -> float:
        value = float(training.update(inputs)["loss"])
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    return run


def make(
    name: str, config: ml_collections.ConfigDict, stage: str, networks: Any, batch: Any
) -> Callable[[], float]:
    """The contender of this name: each call is one update and returns its loss."""
    if name.startswith("JAX"):
        return make_jax(config, stage, networks, batch)
    return make_torch(config, stage, networks, batch, compiled=name == "PyTorch compiled")


def measure_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process: seconds of every round, MiB at the peak, loss and seconds of the first update."""
    config = make_config(arguments.presets[0], arguments.batch_size, arguments.dtype)
    batch = random_batch(config, np.random.default_rng(0))
    run = make(arguments.one, config, arguments.stages[0], init_networks(config), batch)
    start = time.perf_counter()
    loss = run()
    first = time.perf_counter() - start
    framework = "jax" if arguments.one.startswith("JAX") else "torch"
    common.reset_peak(framework)  # without what compiling needed
    # PyTorch compiles a second time where the gradients of the first update stand: that round does not count.
    seconds, _ = common.time_in_turn({"": run}, arguments.rounds)
    return {"seconds": seconds[""], "peak_mib": common.peak_mib(framework), "loss": loss, "first_s": first}


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    huge = "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    names = (
        ["JAX"]
        + ["JAX" + common.SMALL_PAGES] * huge
        + ["PyTorch eager", "PyTorch compiled"] * common.has_torch()
    )
    if arguments.no_compile and "PyTorch compiled" in names:
        names.remove("PyTorch compiled")
    for preset, stage in itertools.product(arguments.presets, arguments.stages):
        options = ["--presets", preset, "--stages", stage, "--dtype", arguments.dtype]
        options += ["--rounds", str(arguments.rounds)]
        options += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as folder:  # a later turn need not compile again
            os.environ.update(JAX_COMPILATION_CACHE_DIR=folder, TORCHINDUCTOR_CACHE_DIR=folder)
            for _, name in itertools.product(range(arguments.turns), names):
                found[name].append(common.measure_in_process("training_step", name, options))
        seconds = {name: [s for turn in turns for s in turn["seconds"]] for name, turns in found.items()}
        peaks = {name: max(turn["peak_mib"] for turn in turns) for name, turns in found.items()}
        more = {
            "first_update_loss": {name: turns[0]["loss"] for name, turns in found.items()},
            "first_update_s": {name: turns[0]["first_s"] for name, turns in found.items()},
        }
        setting = f"{preset}, {stage}, batch {arguments.batch_size or SHAPES[preset][2]}"
        if not names[1:]:
            yield common.Row(setting, "ms", common.quartiles(seconds["JAX"], 1e3), more=more)
            yield common.compare_exactly(setting, "MiB", peaks["JAX"])
        for name in names[1:]:
            wanted = "<= 1.2" if name == "PyTorch eager" and preset in ("small", "base") else ""
            yield common.compare(setting, seconds, "JAX", name, wanted, **more)
            yield common.compare_exactly(setting, "MiB", peaks["JAX"], name, peaks[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--turns", type=int, default=3, help="processes of each contender, in turn")
    parser.add_argument("--batch-size", type=int, help="default: 16, for the base preset 4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes minutes"
    )


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments, rounds=5, measure_alone=measure_alone)
