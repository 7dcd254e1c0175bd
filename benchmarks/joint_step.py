"""One mutual-learning step: everything in one jitted function beside separate jitted passes.

    python -m benchmarks.joint_step

`joint` is the step that training uses: two trainable and two frozen forward passes, both backward passes and both
updates in one program. `separate` is what one writes first: each network's logits and pooled vectors are computed by a
jitted forward pass and handed to the others as targets, then each network takes its own jitted gradient and update.
`stacked` is joint, but with the two trainable networks on a leading axis under vmap, and the frozen ones likewise. All
three compute the same update; the JSON has the largest difference between their parameters.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks import common
from dilbert_jax import losses
from dilbert_jax.config import default_config
from dilbert_jax.models import Dilbert
from dilbert_jax.random_inputs import init_network, random_batch, random_model
from dilbert_jax.relational import angle_loss, distance_loss
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

LOSS = objectives.LossConfig()
SIZES = {"quickstart": "small", "tiny": "tiny"}


def make_config(size: str) -> ml_collections.ConfigDict:
    """The quickstart's network (2 blocks, 128 hidden, clips of 12 frames of 64 x 64), or the tiny one, no dropout."""
    config = default_config(SIZES[size])
    config.data.update(
        size=64, num_frames=12, max_tokens=96, vocab_size=900, grid_scales=(1, 3), grid_steps=1
    )
    config.model.update(num_layers=2, stem_patch=(3, 4, 4), dropout=0.0)
    return config


def make_separate(model: Dilbert, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """One update by separate jitted passes: four forward passes for the targets, two gradients, two updates."""

    @jax.jit
    def targets(params, batch):
        logits, encoded = objectives.pretraining_forward(model, params, batch, None)
        return logits, objectives.relational_vector(encoded, LOSS.relational_layer)

    @jax.jit
    def gradient(params, peer, frozen, batch):
        masks = objectives.task_masks(batch, LOSS)

        def loss(params):
            logits, encoded = objectives.pretraining_forward(model, params, batch, None)
            vectors = objectives.relational_vector(encoded, LOSS.relational_layer)
            supervised = objectives.task_losses(logits, batch, masks, LOSS)
            relational = distance_loss(vectors, peer[1]) + LOSS.beta1 * angle_loss(vectors, peer[1])
            response = objectives.soften(logits, peer[0], masks, LOSS)
            return losses.distillation_loss(
                sum(supervised.values()),
                losses.mutual_loss(relational, response),
                objectives.soften(logits, frozen[0], masks, LOSS),
            )

        return jax.grad(loss)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(state, frozen, batch):
        said = {name: targets(state.params[name], batch) for name in objectives.NETWORKS}
        anchors = {name: targets(frozen[name], batch) for name in objectives.NETWORKS}
        params, opt_state = {}, {}
        for name, peer in (objectives.NETWORKS, objectives.NETWORKS[::-1]):
            g = gradient(state.params[name], said[peer], anchors[name], batch)
            params[name], opt_state[name] = update(state.params[name], state.opt_state[name], g)
        return steps.TrainState(state.step + 1, params, opt_state)

    return step


def make_joint(model: Dilbert, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The step that training uses."""
    update = steps.make_step(functools.partial(objectives.mutual_objective, model, LOSS), optimizer)

    def step(state, frozen, batch):
        return update(state, frozen, batch, jax.random.key(0))[0]

    return step


def make_stacked(model: Dilbert, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The joint step with the networks on a leading axis: one vmapped forward pass for each pair."""

    def stack(networks):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(networks[n] for n in objectives.NETWORKS))

    def forward(stacked, batch):
        return jax.vmap(lambda p: objectives.pretraining_forward(model, p, batch, None))(stacked)

    def objective(params, frozen, batch, rng):
        del rng
        masks = objectives.task_masks(batch, LOSS)
        logits, encoded = forward(stack(params), batch)
        anchors, _ = jax.lax.stop_gradient(forward(stack(frozen), batch))
        total: jax.Array = jnp.float32(0.0)
        for own, peer in ((0, 1), (1, 0)):
            mine, others = ({k: v[i] for k, v in logits.items()} for i in (own, peer))
            vectors = encoded.fused[own], encoded.fused[peer]
            supervised = objectives.task_losses(mine, batch, masks, LOSS)
            relational = distance_loss(*vectors) + LOSS.beta1 * angle_loss(*vectors)
            response = objectives.soften(mine, jax.lax.stop_gradient(others), masks, LOSS)
            own_anchor = {k: v[own] for k, v in anchors.items()}
            total += losses.distillation_loss(
                sum(supervised.values()),
                losses.mutual_loss(relational, response),
                objectives.soften(mine, own_anchor, masks, LOSS),
            )
        return total, {}

    update = steps.make_step(objective, optimizer)

    def step(state, frozen, batch):
        return update(state, frozen, batch, jax.random.key(0))[0]

    return step


MAKERS = {"separate": make_separate, "joint": make_joint, "stacked": make_stacked}


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    config = make_config(arguments.size)
    model = Dilbert(random_model(config))
    drawn = random_batch(config, np.random.default_rng(0), arguments.batch_size)
    batch = {name: jnp.asarray(value) for name, value in drawn.items()}
    init = jax.jit(functools.partial(init_network, config))
    networks = {name: init(jax.random.key(i)) for i, name in enumerate(objectives.NETWORKS)}
    frozen = {name: init(jax.random.key(i + 2)) for i, name in enumerate(objectives.NETWORKS)}
    optimizer = make_optimizer(OptimizerConfig("sgd", 0.01, warmup_fraction=0.0), 1000)
    updates = {name: make(model, optimizer) for name, make in MAKERS.items()}
    states = {name: steps.TrainState.create(jax.tree.map(jnp.array, networks), optimizer) for name in MAKERS}

    def run(name: str) -> None:
        states[name] = jax.block_until_ready(updates[name](states[name], frozen, batch))

    runs = {name: functools.partial(run, name) for name in MAKERS}
    seconds, first = common.time_in_turn(runs, arguments.rounds)

    def difference(name: str) -> float:
        pairs = zip(
            jax.tree.leaves(states[name].params), jax.tree.leaves(states["joint"].params), strict=True
        )
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    for beside in ("separate", "stacked"):
        yield common.compare(
            f"{arguments.size}, mutual, batch {arguments.batch_size}, joint",
            seconds,
            "joint",
            beside,
            first_call_s=first,
            largest_parameter_difference=difference(beside),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--batch-size", type=int, default=16)


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments, rounds=15)
