"""Multi-head attention and the feed-forward block of a post-LN transformer (BERT)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.sharding import BATCH, constrain, gathered_dot

Array = jax.Array
LAYER_NORM_EPSILON = 1e-12
Dense = functools.partial(nn.Dense, dot_general=gathered_dot("fsdp", None))
# Heads and the feed-forward layer are split over devices; the next layer brings the parts together.
TO_TENSOR, FROM_TENSOR = gathered_dot("fsdp", "tensor"), gathered_dot("tensor", "fsdp")


def bert_init(width: int) -> nn.initializers.Initializer:
    """How a matrix of a transformer of this width starts: as BERT's, in proportion to 1/sqrt(width).

    BERT draws with deviation 0.02 at width 768. Flax's default is about twice that, and deep networks then learn
    masked words late or never (docs/experiments.md).
    """
    return nn.initializers.normal(0.02 * (768 / width) ** 0.5)


def at_least_float32(dtype: Any) -> Any:
    """The type for softmax, logits and geometry: float32, or float64 where the network computes in it."""
    return jnp.promote_types(dtype, jnp.float32)


def attend(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, Array]:
    """Scaled dot-product attention.

    Args:
      query: [B, Q, N, K]; key, value: [B, S, N, K].
      mask: bool [B, S], True = valid key. A row without any valid key gets zeros.

    Returns:
      Context [B, Q, N, K] and attention weights [B, N, Q, S] (float32 at least).
    """
    dtype = at_least_float32(query.dtype)
    scores = jnp.einsum("bqnk,bsnk->bnqs", query, key).astype(dtype)
    scores = scores / jnp.sqrt(jnp.asarray(query.shape[-1], dtype))
    valid = mask[:, None, None, :]
    scores = jnp.where(valid, scores, jnp.finfo(dtype).min)
    weights = jnp.where(valid, jax.nn.softmax(scores, axis=-1), 0.0)
    context = jnp.einsum("bnqs,bsnk->bqnk", weights.astype(value.dtype), value)
    return constrain(context, BATCH, None, "tensor"), weights


class HeadsProjection(nn.Module):
    """Linear layer to N heads of width K: [B, S, D] -> [B, S, N, K]."""

    num_heads: int
    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden size {self.hidden_size} is not divisible by {self.num_heads} heads")
        y = nn.Dense(
            self.hidden_size,
            dtype=self.dtype,
            kernel_init=bert_init(x.shape[-1]),
            dot_general=TO_TENSOR,
            name="dense",
        )(x)
        y = y.reshape(*y.shape[:-1], self.num_heads, self.hidden_size // self.num_heads)
        return constrain(y, BATCH, None, "tensor")


class FeedForward(nn.Module):
    """Attention output, residual, LN, then Dense-GELU(erf)-Dense, residual, LN (post-LN, as in BERT)."""

    hidden_size: int
    ffn_size: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, residual: Array, context: Array, deterministic: bool) -> Array:
        """residual [B, S, D], context [B, S, N, K] -> [B, S, D]."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=bert_init(self.hidden_size))
        context = context.reshape(*context.shape[:-2], context.shape[-2] * context.shape[-1])
        y = dense(self.hidden_size, dot_general=FROM_TENSOR, name="attention_output")(context)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="attention_norm")(residual + y)
        y = dense(self.ffn_size, dot_general=TO_TENSOR, name="intermediate")(x)
        y = nn.gelu(constrain(y, BATCH, None, "tensor"), approximate=False)
        y = dense(self.hidden_size, dot_general=FROM_TENSOR, name="output")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return constrain(nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="output_norm")(x + y), BATCH)


class TransformerBlock(nn.Module):
    """One layer of BERT: self-attention and the feed-forward block.

    Attention weights have no dropout, unlike BERT's.
    """

    hidden_size: int
    num_heads: int
    ffn_size: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, deterministic: bool = True) -> tuple[Array, Array]:
        """x [B, S, D], mask bool [B, S] -> [B, S, D] and attention weights [B, N, S, S]."""
        query, key, value = (
            HeadsProjection(self.num_heads, self.hidden_size, self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        context, weights = attend(query, key, value, mask)
        block = FeedForward(self.hidden_size, self.ffn_size, self.dropout, self.dtype, name="ffn")
        return block(x, context, deterministic), weights
