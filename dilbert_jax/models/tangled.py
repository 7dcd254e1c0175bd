"""The tangled-transformer (TNT) block: three streams, two cross attentions queried by the description."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import FeedForward, HeadsProjection, attend
from dilbert_jax.sharding import BATCH, constrain

Array = jax.Array
STREAMS = ("entity", "description", "region")


TNT_MODES = ("stack", "add_resized", "add_valid")


def resize_nearest(x: Array, length: int) -> Array:
    """Repeats or drops positions of x [B, S, ...] to `length`: position m of the result is floor(m S / length)."""
    return x[:, jnp.arange(length) * x.shape[1] // length]


def resize_valid(x: Array, x_mask: Array, mask: Array) -> Array:
    """The same for valid positions alone, so that padding changes nothing.

    Args:
      x: [B, S, ...]; x_mask: bool [B, S], valid positions first.
      mask: bool [B, length], the valid positions of the result.

    Returns:
      [B, length, ...]: the m-th of n valid positions is position floor(m S' / n) of x, S' of which are valid.
    """
    rank = jnp.cumsum(mask, axis=1) - 1
    index = rank * x_mask.sum(1, keepdims=True) // jnp.maximum(mask.sum(1, keepdims=True), 1)
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


class TangledBlock(nn.Module):
    """One fusion layer.

    The cross attentions of equations (1) and (2) fuse the entity and the region stream from the description
    stream's point of view; they reuse the key and value projections of the stream they look at:

        c_w = MultiHead(W_q1 h_a, W_k^w h_w, W_v^w h_w)        c_r = MultiHead(W_q2 h_a, W_k^r h_r, W_v^r h_r)

    Linear layers turn c_w and c_r into further keys and values, which are concatenated to a stream's own:
    the entity stream attends to [entity; c_r], the region stream to [region; c_w], and the description stream
    to [description; c_w; c_r]. Positions made from c_w and c_r are valid where the description token is. This is the
    mode `stack` (decision D4).

    The mode `add_resized` (decision D5) is that of the public ActBERT code: the description stream's own query serves
    both cross attentions, the new keys and values are resized to a stream's length and added to its own, and the
    description stream attends to itself alone. Resizing counts padded positions, as that code does; the mode
    `add_valid` differs from it in that it does not.
    """

    hidden_size: int
    num_heads: int
    ffn_size: int
    dropout: float = 0.1
    dtype: Any = jnp.float32
    mode: str = "stack"

    @nn.compact
    def __call__(
        self, hidden: dict[str, Array], masks: dict[str, Array], deterministic: bool = True
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Fuses the streams.

        Args:
          hidden: per stream [B, S, D] (S is L, A or R).
          masks: per stream bool [B, S], True = valid.
          deterministic: no dropout.

        Returns:
          The streams' new hidden states, and the two cross-attention maps (`entity` [B, N, A, L] and `region`
          [B, N, A, R]) that say which entity and which region each temporal step looks at.

        Raises:
          ValueError: an unknown mode.
        """
        if self.mode not in TNT_MODES:
            raise ValueError(f"TNT mode is {self.mode!r}; choose one of {', '.join(TNT_MODES)}")
        stack = self.mode == "stack"

        def project(name: str, x: Array) -> Array:
            return HeadsProjection(self.num_heads, self.hidden_size, self.dtype, name=name)(x)

        query = {s: project(f"{s}_query", hidden[s]) for s in STREAMS}
        key = {s: project(f"{s}_key", hidden[s]) for s in STREAMS}
        value = {s: project(f"{s}_value", hidden[s]) for s in STREAMS}

        cross_key, cross_value, cross_weights = {}, {}, {}
        for stream in ("entity", "region"):
            cross_query = (
                project(f"cross_{stream}_query", hidden["description"]) if stack else query["description"]
            )
            fused, cross_weights[stream] = attend(cross_query, key[stream], value[stream], masks[stream])
            fused = fused.reshape(*fused.shape[:-2], self.hidden_size)
            cross_key[stream] = project(f"cross_{stream}_key", fused)
            cross_value[stream] = project(f"cross_{stream}_value", fused)

        sources = {"entity": ("region",), "region": ("entity",), "description": ("entity", "region")}
        out = {}
        for stream in STREAMS:
            keys, values, mask = [key[stream]], [value[stream]], [masks[stream]]
            for other in sources[stream]:
                if stack:
                    keys.append(cross_key[other])
                    values.append(cross_value[other])
                    mask.append(masks["description"])
                elif stream != "description":
                    if self.mode == "add_valid":
                        resize = functools.partial(
                            resize_valid, x_mask=masks["description"], mask=masks[stream]
                        )
                    else:
                        resize = functools.partial(resize_nearest, length=key[stream].shape[1])
                    keys[0] += resize(cross_key[other])
                    values[0] += resize(cross_value[other])
            context, _ = attend(
                query[stream],
                constrain(jnp.concatenate(keys, axis=1), BATCH, None, "tensor"),
                constrain(jnp.concatenate(values, axis=1), BATCH, None, "tensor"),
                jnp.concatenate(mask, axis=1),
            )
            block = FeedForward(
                self.hidden_size, self.ffn_size, self.dropout, self.dtype, name=f"{stream}_ffn"
            )
            out[stream] = block(hidden[stream], context, deterministic)
        return out, cross_weights
