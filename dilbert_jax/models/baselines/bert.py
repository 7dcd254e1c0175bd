"""BERT: one stream. What the clip shows enters as further embeddings, without a design for fusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dilbert_jax.models.embeddings import Embedding
from dilbert_jax.models.network import Network, System
from dilbert_jax.models.streams import looks_at, side_by_side
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
        self.layers = self.transformer()

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        segments = self.segment.table()
        streams = {s: streams[s] + segments[i] for i, s in enumerate(STREAMS)}
        hidden, mask, places = side_by_side(streams, masks, STREAMS)
        hidden, weights = self.run_blocks(self.layers, hidden, mask, deterministic)
        return {s: hidden[:, at] for s, at in places.items()}, looks_at(weights, places), {}


SYSTEM = System(Bert)
