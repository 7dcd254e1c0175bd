"""One update: gradients of an objective, the optimizer, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dilbert_jax.sharding import replicated
from dilbert_jax.training.accumulation import Accumulation, Batch, Metrics, Objective, accumulate

Array = jax.Array
HOST_ONLY = ("study", "frame_index")  # entries of a batch that never go to a device


def device_entries(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what only the host reads."""
    return {name: value for name, value in batch.items() if name not in HOST_ONLY}


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds: the trainable networks, their optimizers' states and the step counter."""

    step: Array
    params: dict[str, Any]
    opt_state: dict[str, Any]

    @classmethod
    def create(cls, params: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
        opt_state = {name: optimizer.init(p) for name, p in params.items()}
        return cls(step=jnp.zeros((), jnp.int32), params=dict(params), opt_state=opt_state)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulation: Accumulation | None = None,
    state_sharding: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Jits one update of all networks in the state.

    `objective(params, frozen, batch, rng)` sums the networks' losses; as none of them sends gradient into
    another, the gradient of the sum is each network's own. A step whose loss is not finite leaves the state
    as it was, so that the loop can stop with a good checkpoint.

    Args:
      objective: (params, frozen, batch, rng) -> (loss, metrics), with a `Part` as fifth argument where it accumulates.
      optimizer: applied to each network by itself.
      accumulation: micro-batches, or None for the batch at once.
      state_sharding: a sharding for each leaf of the state that comes out; None = the compiler's choice.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, rng: Array) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(rng, state.step)
        arguments = state.params, frozen, batch, rng
        if accumulation is None:
            (loss, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(*arguments)
        else:
            (loss, metrics), gradients = accumulate(objective, accumulation, *arguments)
        if state_sharding is not None:
            # A device adds up and keeps the part of each gradient whose parameters it updates.
            gradients = jax.lax.with_sharding_constraint(gradients, state_sharding.params)
        finite = jnp.isfinite(loss)
        params, opt_state = {}, {}
        for name, gradient in gradients.items():
            metrics[f"{name}/gradient_norm"] = optax.global_norm(gradient)
            finite &= jnp.isfinite(metrics[f"{name}/gradient_norm"])
            updates, opt_state[name] = optimizer.update(gradient, state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        new = TrainState(state.step + 1, params, opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new, metrics | {"loss": loss}

    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = jax.tree.map(lambda s: replicated(s.mesh), state_sharding.step)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, everywhere))
