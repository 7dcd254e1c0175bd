"""Pre-training heads (MLM, MDC, MOC, CMM), annotation heads and the entity match head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import LAYER_NORM_EPSILON, Dense, at_least_float32

Array = jax.Array


class Pooler(nn.Module):
    """LN(Linear(x)) of one vector per clip.

    BERT's tanh saturates here: what is common to all clips is large in the pooled streams, and the product of two
    such vectors, which matching looks at, then hardly differs between clips.
    """

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Dense(self.hidden_size, dtype=self.dtype, name="dense")(x)
        return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)


class Transform(nn.Module):
    """LN(GELU(Linear(x))): what BERT puts before its decoder."""

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.gelu(Dense(self.hidden_size, dtype=self.dtype, name="dense")(x), approximate=False)
        return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)


class ClassHead(nn.Module):
    """Transform, then logits over `num_classes`, float32 at least."""

    hidden_size: int
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = at_least_float32(self.dtype)
        if not self.num_classes:  # a data set without such labels
            return jnp.zeros((*x.shape[:-1], 0), dtype)
        x = Transform(self.hidden_size, self.dtype, name="transform")(x)
        return Dense(self.num_classes, dtype=dtype, name="logits")(x.astype(dtype))


class MatchHead(nn.Module):
    """Scores every candidate entity against every region and every temporal step of a clip.

    The query of an entity is a linear map of the mean word embedding of its name, so that what pre-training
    learned about the words carries over. A clip supports an entity as far as its best places do: the clip's
    logit is the log of the mean of exp over all valid places (a smooth maximum).
    """

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, names: Array, description: Array, region: Array, description_mask: Array, region_mask: Array
    ) -> dict[str, Array]:
        """Matches entities with places.

        Args:
          names: [E, D] mean word embedding of each candidate entity.
          description [B, A, D], region [B, R, D] with bool masks [B, A], [B, R].

        Returns:
          Logits, float32 at least: `frame` [B, E, A], `region` [B, E, R], `clip` [B, E].
        """
        query = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="query_norm")(
            names.astype(self.dtype)
        )
        query = Dense(self.hidden_size, dtype=self.dtype, name="query")(query)
        bias = self.param("bias", nn.initializers.constant(-2.0), ())
        dtype = at_least_float32(self.dtype)
        scale = 1.0 / jnp.sqrt(jnp.asarray(self.hidden_size, dtype))
        logits = {}
        for name, x in (("frame", description), ("region", region)):
            key = Dense(self.hidden_size, dtype=self.dtype, name=f"{name}_key")(x)
            logits[name] = jnp.einsum("ed,bsd->bes", query, key).astype(dtype) * scale + bias
        places = jnp.concatenate([logits["frame"], logits["region"]], axis=-1)
        mask = jnp.concatenate([description_mask, region_mask], axis=-1)[:, None, :]
        count = jnp.maximum(mask.sum(-1), 1).astype(dtype)
        logits["clip"] = jax.nn.logsumexp(places, axis=-1, where=mask) - jnp.log(count)
        return logits
