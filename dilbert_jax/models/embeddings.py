"""Input embeddings of the three streams."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dilbert_jax.models.attention import LAYER_NORM_EPSILON, Dense
from dilbert_jax.models.regions import region_geometry
from dilbert_jax.sharding import Axes, gather

Array = jax.Array
NUM_TOKEN_TYPES = 6  # outside an entity, organ, region, finding, descriptor, condition


def sinusoids(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Where learned positions [L, D] start: sines and cosines of wavelengths from 2 pi to 2 pi L, deviation 0.03.

    The same distance is the same rotation everywhere, so that attention to a neighbour need not be learned for every
    position by itself, as from random vectors: words masked in reports are learned in fewer updates
    (docs/experiments.md, "How the cpu budget came about").

    Args:
      key: not used; every network starts from the same positions.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5, there fixed and up to 2 pi 10,000.
    """
    del key
    length, size = shape
    pairs = (size + 1) // 2
    angles = np.arange(length)[:, None] * float(length) ** -(np.arange(pairs) / pairs)
    table = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, -1)[:, :size]
    return jnp.asarray(0.03 * np.sqrt(2.0) * table, dtype)


class Embedding(nn.Module):
    """A table of vectors, parameter `embedding` [size, D]; devices that share it gather it before they look up."""

    size: int
    hidden_size: int
    dtype: Any = jnp.float32
    stored: tuple[Axes, ...] = (None, "fsdp")
    initializer: nn.initializers.Initializer = nn.initializers.normal(0.02)

    def setup(self) -> None:
        self.embedding = self.param("embedding", self.initializer, (self.size, self.hidden_size))

    def table(self) -> Array:
        """[size, D], whole on every device."""
        return gather(self.embedding.astype(self.dtype), self.stored, ())

    def __call__(self, index: Array) -> Array:
        """int [...] -> [..., D]."""
        return self.table()[index]

    def attend(self, x: Array) -> Array:
        """Scores x [..., D] against every vector: [..., size]."""
        return x.astype(self.dtype) @ self.table().T


class EntityEmbedding(nn.Module):
    """Word + position + entity-type embedding of report tokens, LN, dropout (BERT with entities marked)."""

    vocab_size: int
    hidden_size: int
    max_tokens: int
    dropout: float
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.word = Embedding(self.vocab_size, self.hidden_size, self.dtype, ("tensor", "fsdp"))
        self.position = Embedding(self.max_tokens, self.hidden_size, self.dtype, initializer=sinusoids)
        self.token_type = Embedding(NUM_TOKEN_TYPES, self.hidden_size, self.dtype)
        self.norm = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, token_ids: Array, token_types: Array, deterministic: bool = True) -> Array:
        """token_ids, token_types: int32 [B, L] -> [B, L, D]."""
        length = token_ids.shape[1]
        x = self.word(token_ids) + self.token_type(token_types) + self.position.table()[:length]
        return self.drop(self.norm(x), deterministic=deterministic)

    def attend(self, x: Array) -> Array:
        """Scores x [..., D] against every word embedding (the tied decoder of masked language modelling)."""
        return self.word.attend(x)


class DescriptionEmbedding(nn.Module):
    """LN(Linear(feature) + temporal position) of the 3-D CNN's temporal steps (D3); `position` False: without it."""

    hidden_size: int
    max_steps: int
    dropout: float
    dtype: Any = jnp.float32
    position: bool = True

    @nn.compact
    def __call__(self, features: Array, deterministic: bool = True) -> Array:
        """features: [B, A, C] -> [B, A, D]."""
        steps = features.shape[1]
        if steps > self.max_steps:
            raise ValueError(
                f"{steps} description tokens, but the model holds positions for {self.max_steps}"
            )
        x = Dense(self.hidden_size, dtype=self.dtype, name="feature")(features)
        if self.position:
            position = self.param("position", sinusoids, (self.max_steps, self.hidden_size))
            x = x + gather(position.astype(self.dtype), (None, "fsdp"), ())[:steps]
        x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        return nn.Dropout(self.dropout)(x, deterministic=deterministic)


class RegionEmbedding(nn.Module):
    """LN(Linear(feature) + Linear(geometry)) of boxes (D2)."""

    hidden_size: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, boxes: Array, times: Array, deterministic: bool = True) -> Array:
        """features [B, R, F], boxes [B, R, 4], times [B, R] -> [B, R, D]."""
        geometry = region_geometry(boxes, times).astype(self.dtype)
        x = Dense(self.hidden_size, dtype=self.dtype, name="feature")(features)
        x = x + Dense(self.hidden_size, dtype=self.dtype, name="geometry")(geometry)
        x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        return nn.Dropout(self.dropout)(x, deterministic=deterministic)
