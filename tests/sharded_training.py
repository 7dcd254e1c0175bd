"""Ten steps of mutual learning on each of several meshes; tests/test_sharding.py runs it with simulated devices.

python sharded_training.py OUTPUT.npz [--plain] DATA,FSDP,TENSOR[,MICRO_BATCHES] ...

With --plain there is a student and no teacher, without 3-D CNN and blocks: a quarter of what has to compile.
"""

import contextlib
import dataclasses
import functools
import sys

import jax
import numpy as np
from tiny import CONFIG, Plain, init_params, make_batch, no_compilation

from dilbert_jax.models import Dilbert, Network
from dilbert_jax.sharding import make_mesh, put, put_batch, shardings
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

NUM_STEPS, BATCH_SIZE = 10, 16
SMALL = dataclasses.replace(CONFIG, num_layers=1)  # compiling dominates
LOSS = objectives.LossConfig(summary=0.5, temperature=2.0, reduction="mean_valid")


def train(model: Network, names: tuple[str, ...], data: int, fsdp: int, tensor: int, micro_batches: int = 1):
    """Losses of every step, final parameters, and the largest share of a network that one device holds."""
    mesh = make_mesh(fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    optimizer = make_optimizer(OptimizerConfig("sgd", 0.05, warmup_fraction=0.0), NUM_STEPS)
    create = functools.partial(steps.TrainState.create, optimizer=optimizer)
    objective = functools.partial(objectives.mutual_objective, model, LOSS)
    accumulation = None
    if micro_batches > 1:
        accumulation = objectives.mutual_accumulation(model, LOSS, micro_batches, relate=True)
    networks = {name: jax.device_get(init_params(i, network=model)) for i, name in enumerate(names)}
    frozen = {name: jax.device_get(init_params(i + 2, network=model)) for i, name in enumerate(names)}
    placed = shardings(jax.eval_shape(create, networks), mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(create, out_shardings=placed)(networks)
        frozen = put(frozen, shardings(frozen, mesh))
        update = steps.make_step(objective, optimizer, accumulation, placed)
        for i in range(NUM_STEPS):
            with no_compilation() if i else contextlib.nullcontext():
                batch = put_batch(make_batch(i, BATCH_SIZE), mesh)
                state, metrics = update(state, frozen, batch, jax.random.key(0))
                losses.append({name: float(value) for name, value in metrics.items()})
    leaves = jax.tree.leaves(state.params)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return losses, jax.device_get(state.params), held


def main() -> None:
    output, *layouts = [argument for argument in sys.argv[1:] if argument != "--plain"]
    plain = "--plain" in sys.argv
    names = ("student",) if plain else objectives.NETWORKS
    model = Plain(SMALL) if plain else Dilbert(SMALL)
    results = {}
    for layout in layouts:
        losses, params, held = train(model, names, *map(int, layout.split(",")))
        for name in losses[0]:
            results[f"{layout}/loss/{name}"] = np.asarray([row[name] for row in losses])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            results[f"{layout}/params/{jax.tree_util.keystr(path)}"] = leaf
        results[f"{layout}/held"] = np.asarray(held)
    np.savez(output, **results)


if __name__ == "__main__":
    main()
