"""DILBERT: three streams, fused by tangled-transformer blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dilbert_jax.models.network import Network, System
from dilbert_jax.models.tangled import TangledBlock

Array = jax.Array


class Dilbert(Network):
    """The paper's network (PAPER section 3)."""

    def setup(self) -> None:
        super().setup()
        c = self.config
        fields = c.hidden_size, c.num_heads, c.ffn_size, c.dropout, jnp.dtype(c.dtype), c.tnt_mode
        self.layers = [TangledBlock(*fields) for _ in range(c.num_layers)]

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        return *self.run_blocks(self.layers, streams, masks, deterministic), {}


SYSTEM = System(Dilbert, distilled=True, guided_masking=0.5)
