"""Arithmetic on streams of tokens: side by side, means and maxima of valid places, the 3-D CNN's overview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dilbert_jax.models.embeddings import NUM_TOKEN_TYPES

Array = jax.Array


def side_by_side(
    streams: Mapping[str, Array], masks: Mapping[str, Array], names: Sequence[str]
) -> tuple[Array, Array, dict[str, slice]]:
    """Streams [B, S, D] as one [B, sum of S, D], its mask, and where each lies in it."""
    places, end = {}, 0
    for name in names:
        places[name] = slice(end, end + streams[name].shape[1])
        end = places[name].stop
    hidden = jnp.concatenate([streams[name] for name in names], axis=1)
    return hidden, jnp.concatenate([masks[name] for name in names], axis=1), places


def looks_at(weights: Array, places: Mapping[str, slice]) -> dict[str, Array]:
    """What the description looks at, out of the attention map [B, N, S, S] over streams side by side."""
    return {s: weights[:, :, places["description"], places[s]] for s in ("entity", "region") if s in places}


def mean_valid(x: Array, mask: Array) -> Array:
    """Mean over the second to last axis of [..., S, D] where mask [..., S]; zero when nothing is valid."""
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1.0)


def mean_by_type(x: Array, token_types: Array, mask: Array) -> Array:
    """Means of x [B, L, D] over the valid tokens of each entity type, side by side [B, types * D]; zero for none."""
    kinds = jnp.arange(1, NUM_TOKEN_TYPES)  # type 0 is outside of any entity
    of_type = (token_types[:, None, :] == kinds[:, None]) & mask[:, None, :]  # [B, types, L]
    return mean_valid(x[:, None], of_type).reshape(x.shape[0], -1)


def max_valid(x: Array, mask: Array) -> Array:
    """Maximum over the second to last axis of [..., S, D] where mask [..., S]; zero when nothing is valid."""
    largest = jnp.max(jnp.where(mask[..., None], x, jnp.finfo(x.dtype).min), axis=-2)
    return jnp.where(mask.any(-1)[..., None], largest, 0.0)


def video_overview(features: Array, step_mask: Array) -> Array:
    """Mean and maximum over the whole map, and the means of its four quadrants.

    Args:
      features: [B, A, H, W, C], zero at padded steps. Where H or W is odd, quadrants share the middle.
      step_mask: bool [B, A].

    Returns:
      [B, 6 * C].
    """
    height, width = features.shape[2:4]
    steps = jnp.maximum(step_mask.sum(-1), 1).astype(features.dtype)[:, None, None, None]
    mean = features.sum(axis=1) / steps  # [B, H, W, C]
    rows = slice(0, -(-height // 2)), slice(height // 2, height)
    columns = slice(0, -(-width // 2)), slice(width // 2, width)
    quadrants = [mean[:, r, c].mean(axis=(1, 2)) for r in rows for c in columns]
    floor = jnp.finfo(features.dtype).min
    largest = jnp.where(step_mask[:, :, None, None, None], features, floor).max(axis=(1, 2, 3))
    largest = jnp.where(step_mask.any(-1)[:, None], largest, 0.0)
    return jnp.concatenate([mean.mean(axis=(1, 2)), largest, *quadrants], axis=-1)
