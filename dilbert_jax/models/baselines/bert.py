"""BERT: one stream. What the clip shows enters as further embeddings, without a design for fusion."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import TransformerBlock
from dilbert_jax.models.embeddings import Embedding
from dilbert_jax.models.network import Network
from dilbert_jax.models.tangled import STREAMS

Array = jax.Array


class Bert(Network):
    """The "simple BERT" of Table IV: report, description and regions side by side, every token looks at all.

    A segment embedding tells the streams apart, as BERT's does its two sentences. Pre-training has the common tasks
    alone.

    Source: Devlin et al., "BERT", NAACL 2019; layers as Hugging Face's BertModel (post-LN, erf-GELU, epsilon 1e-12).
    """

    def setup(self) -> None:
        super().setup()
        self.segment = Embedding(len(STREAMS), self.config.hidden_size, jnp.dtype(self.config.dtype))

    def make_block(self, **fields: Any) -> TransformerBlock:
        c = self.config
        return TransformerBlock(
            c.hidden_size, c.num_heads, c.ffn_size, c.dropout, jnp.dtype(c.dtype), **fields
        )

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        segments = self.segment.table()
        hidden = jnp.concatenate([streams[s] + segments[i] for i, s in enumerate(STREAMS)], axis=1)
        mask = jnp.concatenate([masks[s] for s in STREAMS], axis=1)
        hidden, weights = self.run_blocks(hidden, mask, deterministic)
        ends, end = {}, 0
        for name in STREAMS:
            ends[name] = slice(end, end + streams[name].shape[1])
            end = ends[name].stop
        # What the description looks at is a part of the one attention map.
        looks = {s: weights[:, :, ends["description"], ends[s]] for s in ("entity", "region")}
        return {name: hidden[:, at] for name, at in ends.items()}, looks
