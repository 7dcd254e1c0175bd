"""ActBERT: the wiring that DILBERT starts from, without its masking by the knowledge graph and its distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dilbert_jax.models.network import Network, System
from dilbert_jax.models.tangled import TangledBlock

Array = jax.Array
REGION_LAYERS, ACTION_LAYERS, TANGLED_LAYERS = 2, 3, 2


class ActBert(Network):
    """A transformer for each stream, tangled by two blocks before the last two layers of the text's.

    `num_layers` counts the text's layers; regions have 2 and actions, whose place descriptions take, have 3, as
    published. All streams share one width. The grid's largest box, the whole sector, is the published "global mean"
    region. Matching looks at pool_w * pool_r + pool_a.

    Source: Zhu and Yang, "ActBERT", CVPR 2020; wiring and matching as in PaddleVideo's public code (D5), but that
    padding changes nothing here.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        if c.num_layers < TANGLED_LAYERS:
            raise ValueError(f"ActBERT needs at least {TANGLED_LAYERS} layers of text, not {c.num_layers}")
        fields = c.hidden_size, c.num_heads, c.ffn_size, c.dropout, jnp.dtype(c.dtype), "add_valid"
        self.tangled = [TangledBlock(*fields) for _ in range(TANGLED_LAYERS)]
        self.text = self.transformer()
        self.regions = self.transformer(REGION_LAYERS)
        self.actions = self.transformer(ACTION_LAYERS)

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        layers = {"entity": self.text, "region": self.regions, "description": self.actions}
        done = {"entity": self.config.num_layers - TANGLED_LAYERS, "region": 0, "description": 0}
        streams = dict(streams)

        def run(name: str, start: int, stop: int) -> None:
            if start < stop:
                blocks = layers[name][start:stop]
                streams[name], _ = self.run_blocks(blocks, streams[name], masks[name], deterministic)

        run("entity", 0, done["entity"])
        for block in self.tangled:
            mixed, looks = self.run_blocks([block], dict(streams), masks, deterministic)
            streams |= mixed
            for name in layers:
                run(name, done[name], done[name] + 1)
                done[name] += 1
        run("description", done["description"], ACTION_LAYERS)
        return streams, looks, {}

    def join(self, pooled: dict[str, Array], own: dict[str, Array]) -> Array:
        return pooled["entity"] * pooled["region"] + pooled["description"]


SYSTEM = System(ActBert)
