"""One update: gradients of an objective, the optimizer, and the state that a checkpoint holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dilbert_jax.sharding import on_one_cpu, replicated
from dilbert_jax.training.accumulation import Accumulation, Batch, Metrics, Objective, accumulate
from dilbert_jax.training.optimizer import Optimizer

Array = jax.Array
SMALL = 2**16  # elements of a parameter that need no loop of their own
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
    def create(
        cls, params: Mapping[str, Any], optimizer: optax.GradientTransformation | Optimizer
    ) -> TrainState:
        opt_state = {name: optimizer.init(p) for name, p in params.items()}
        return cls(step=jnp.zeros((), jnp.int32), params=dict(params), opt_state=opt_state)


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    accumulation: Accumulation | None = None,
    state_sharding: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Jits one update of all networks in the state.

    `objective(params, frozen, batch, rng)` sums the networks' losses; as none of them sends gradient into
    another, the gradient of the sum is each network's own. A step whose loss is not finite leaves the state
    as it was, so that the loop can stop with a good checkpoint. The state that goes in is given up.

    On one CPU device gradients and updates are two programs, and all networks of all stages share that of the update:
    with loops of its own for every parameter, a small network's takes as long to compile as its gradients. Elsewhere a
    step is one program.

    Args:
      objective: (params, frozen, batch, rng) -> (loss, metrics), with a `Part` as fifth argument where it accumulates.
      optimizer: applied to each network by itself.
      accumulation: micro-batches, or None for the batch at once.
      state_sharding: a sharding for each leaf of the state that comes out; None = the compiler's choice.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, rng: Array) -> tuple[TrainState, Metrics]:
        inputs = state.params, state.step, frozen, batch, rng
        gradients, metrics = _gradients(objective, accumulation, *inputs)
        if state_sharding is not None:
            # A device adds up and keeps the part of each gradient whose parameters it updates.
            gradients = jax.lax.with_sharding_constraint(gradients, state_sharding.params)
        norms = {name: optax.tree.norm(gradient) for name, gradient in gradients.items()}
        return _update_all(_update, optimizer, state, gradients, norms, metrics)

    if on_one_cpu():
        differentiate = compiled_gradients(objective, accumulation)

        def in_two(state: TrainState, frozen: Any, batch: Batch, rng: Array) -> tuple[TrainState, Metrics]:
            gradients, metrics = differentiate(state.params, state.step, frozen, batch, rng)
            norms = {name: _norm(gradient) for name, gradient in gradients.items()}
            return _update_all(_compiled_update, optimizer, state, gradients, norms, metrics)

        return in_two
    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = jax.tree.map(lambda s: replicated(s.mesh), state_sharding.step)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, everywhere))


@functools.lru_cache(maxsize=8)
def compiled_gradients(
    objective: Objective, accumulation: Accumulation | None
) -> Callable[..., tuple[Any, Metrics]]:
    """(params, step, frozen, batch, rng) -> gradients and metrics: one program, whoever asks for it."""
    return jax.jit(functools.partial(_gradients, objective, accumulation))


def _gradients(
    objective: Objective,
    accumulation: Accumulation | None,
    params: Any,
    step: Array,
    frozen: Any,
    batch: Batch,
    rng: Array,
) -> tuple[Any, Metrics]:
    arguments = params, frozen, batch, jax.random.fold_in(rng, step)
    if accumulation is None:
        (loss, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(*arguments)
    else:
        (loss, metrics), gradients = accumulate(objective, accumulation, *arguments)
    return gradients, metrics | {"loss": loss}


def _update_all(
    update: Callable[..., tuple[Any, Any]],
    optimizer: Optimizer,
    state: TrainState,
    gradients: Mapping[str, Any],
    norms: Mapping[str, Array],
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """The state after a step, and its metrics with the norm of each network's gradient."""
    finite, step = _count([metrics["loss"], *norms.values()], state.step)
    params, opt_state = {}, {}
    for name, gradient in gradients.items():
        params[name], opt_state[name] = update(
            optimizer, state.params[name], state.opt_state[name], gradient, norms[name], finite
        )
    return TrainState(step, params, opt_state), {
        **metrics,
        **{f"{name}/gradient_norm": norm for name, norm in norms.items()},
    }


@jax.jit
def _norm(gradient: Any) -> Array:
    """The norm over all parameters; small ones go into one vector, as each would be a loop to compile."""
    leaves = jax.tree.leaves(gradient)
    vectors = [leaf for leaf in leaves if leaf.size > SMALL]
    vectors.append(jnp.concatenate([leaf.ravel() for leaf in leaves if leaf.size <= SMALL] or [jnp.zeros(1)]))
    return jnp.sqrt(sum(jnp.sum(jnp.square(v)) for v in vectors))


@jax.jit
def _count(values: Sequence[Array], step: Array) -> tuple[Array, Array]:
    """Whether all values are finite, and how many steps there are if only then this one counts."""
    finite = jnp.isfinite(jnp.stack(values)).all()
    return finite, step + finite


def _update(
    optimizer: Optimizer, params: Any, opt_state: Any, gradient: Any, norm: Array, finite: Array
) -> tuple[Any, Any]:
    """One network's parameters and optimizer state after a step, the old ones where it does not count."""
    updates, new_state = optimizer.update(gradient, opt_state, params, norm)
    new = optax.apply_updates(params, updates), new_state
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))


_compiled_update = jax.jit(_update, donate_argnums=(1, 2))
