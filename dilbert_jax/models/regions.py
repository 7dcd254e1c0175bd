"""Region features: average of the feature map inside boxes (RoI pooling with exact sub-cell overlap)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import at_least_float32

Array = jax.Array


def _overlap(low: Array, high: Array, cells: int) -> Array:
    """Share of the interval [low, high) that lies in each of `cells` equal cells of [0, 1]: [..., cells]."""
    edges = jnp.arange(cells + 1, dtype=low.dtype) / cells
    inside = jnp.minimum(high[..., None], edges[1:]) - jnp.maximum(low[..., None], edges[:-1])
    return jnp.maximum(inside, 0.0) / jnp.maximum(high - low, 1e-6)[..., None]


def pool_regions(features: Array, boxes: Array, steps: Array, bins: int = 2) -> Array:
    """Pools each box into bins x bins averages, weighting cells by their exact overlap with the bin.

    Args:
      features: [B, A, H, W, C] feature map.
      boxes: [B, R, 4] as (ymin, xmin, ymax, xmax) in [0, 1].
      steps: [B, R] the (fractional) temporal step each box lies at, within the valid steps; features are
        interpolated linearly between steps.
      bins: bins per side.

    Returns:
      [B, R, bins * bins * C].
    """
    num_steps, height, width, channels = features.shape[1:]
    wide = at_least_float32(features.dtype)
    ymin, xmin, ymax, xmax = jnp.moveaxis(boxes.astype(wide), -1, 0)  # each [B, R]
    cut = jnp.arange(bins + 1, dtype=wide) / bins
    ys = ymin[..., None] + (ymax - ymin)[..., None] * cut  # [B, R, bins + 1]
    xs = xmin[..., None] + (xmax - xmin)[..., None] * cut
    weight_y = _overlap(ys[..., :-1], ys[..., 1:], height)  # [B, R, bins, H]
    weight_x = _overlap(xs[..., :-1], xs[..., 1:], width)  # [B, R, bins, W]
    distance = jnp.abs(steps.astype(wide)[..., None] - jnp.arange(num_steps))
    weight_t = jnp.maximum(1.0 - distance, 0.0)  # [B, R, A]
    dtype = features.dtype
    # Time first: it leaves one map per region, so the large axis is contracted once.
    pooled = jnp.einsum("bra,bahwc->brhwc", weight_t.astype(dtype), features)
    pooled = jnp.einsum("bryh,brhwc->brywc", weight_y.astype(dtype), pooled)
    pooled = jnp.einsum("brxw,brywc->bryxc", weight_x.astype(dtype), pooled)
    return pooled.reshape(*pooled.shape[:2], bins * bins * channels)


def region_geometry(boxes: Array, times: Array) -> Array:
    """Geometry vector of each box (D2): (x1/W, y1/H, x2/W, y2/H, area ratio, t/T): [B, R, 6]."""
    ymin, xmin, ymax, xmax = jnp.moveaxis(boxes, -1, 0)
    area = jnp.maximum(ymax - ymin, 0.0) * jnp.maximum(xmax - xmin, 0.0)
    return jnp.stack([xmin, ymin, xmax, ymax, area, times], axis=-1)
