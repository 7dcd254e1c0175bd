"""Gradients of a batch that goes through the networks in parts: exactly those of the batch at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dilbert_jax.sharding import BATCH, constrain

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Objective = Callable[..., tuple[Array, Metrics]]


@flax.struct.dataclass
class Part:
    """What a micro-batch must know of the whole batch in order to add exactly its share.

    Attributes:
      counts: how many valid positions each masked loss has in the whole batch.
      share: the micro-batch's share of the whole batch.
      gradients: per network [b, D], what the relational losses over the whole batch send into the vectors of this
        micro-batch; None = they are taken within micro-batches, which is another loss: it has fewer relations.
    """

    counts: dict[str, Array]
    share: float = flax.struct.field(pytree_node=False)
    gradients: dict[str, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """How a step adds up the gradients of micro-batches instead of seeing its batch at once.

    Attributes:
      num_micro_batches: into how many equal parts the batch goes; the objective takes a `Part` as its last argument.
      masks: batch -> masks of the objective's losses; masked means are over the valid positions of the whole batch.
      vectors: (params, batch, rng) -> per network [b, D]: one more forward pass over all micro-batches, so that
        `relations` relate all samples of the batch to each other. None = relational losses are taken within each
        micro-batch.
      relations: vectors of the whole batch -> (loss, metrics).
    """

    num_micro_batches: int
    masks: Callable[[Batch], dict[str, Array]]
    vectors: Callable[[Params, Batch, Array], dict[str, Array]] | None = None
    relations: Callable[[dict[str, Array]], tuple[Array, Metrics]] | None = None


def count_valid(masks: Mapping[str, Array]) -> dict[str, Array]:
    """How many valid positions each mask has."""
    return {name: mask.sum() for name, mask in masks.items()}


def accumulate(
    objective: Objective, how: Accumulation, params: Params, frozen: Any, batch: Batch, rng: Array
) -> tuple[tuple[Array, Metrics], Any]:
    """Loss, metrics and gradient of the whole batch, one micro-batch at a time.

    Sample i belongs to micro-batch i mod k: a batch that is split over devices gives micro-batches that are, too.
    """
    k = how.num_micro_batches

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, k, *x.shape[1:]), 1, 0)  # [k, B / k, ...]
        return constrain(x, None, BATCH)

    def join(x: Array) -> Array:
        return constrain(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), BATCH)

    micro = jax.tree.map(split, dict(batch))
    keys = jax.random.split(rng, k)
    counts = count_valid(how.masks(batch))
    known: tuple[Array, Metrics] = jnp.float32(0.0), {}
    gradients = None
    if how.vectors is not None and how.relations is not None:
        vectors = jax.lax.map(lambda inputs: how.vectors(params, *inputs), (micro, keys))
        whole = {name: join(v.astype(jnp.float32)) for name, v in vectors.items()}
        known, sent = jax.value_and_grad(how.relations, has_aux=True)(whole)
        gradients = jax.tree.map(split, sent)

    def of_part(inputs: Any) -> Any:
        batch, key, sent = inputs
        part = Part(counts, 1.0 / k, sent)
        return jax.value_and_grad(objective, has_aux=True)(params, frozen, batch, key, part)

    def add(total: Any, inputs: Any) -> Any:
        return jax.tree.map(jnp.add, total, of_part(inputs)), None

    inputs = (micro, keys, gradients)
    first = jax.tree.map(lambda x: x[0], inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first))
    ((loss, metrics), gradient), _ = jax.lax.scan(add, zeros, inputs)
    for name, value in known[1].items():
        metrics[name] = metrics.get(name, 0.0) + value
    return (loss + known[0], metrics), gradient
