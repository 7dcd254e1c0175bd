"""DILBERT: three streams, fused by tangled-transformer blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dilbert_jax.models.network import Network
from dilbert_jax.models.tangled import TangledBlock

Array = jax.Array


class Dilbert(Network):
    """The paper's network (PAPER section 3)."""

    distilled: ClassVar[bool] = True

    def make_block(self, **fields: Any) -> TangledBlock:
        c = self.config
        return TangledBlock(
            c.hidden_size, c.num_heads, c.ffn_size, c.dropout, jnp.dtype(c.dtype), c.tnt_mode, **fields
        )

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        return self.run_blocks(streams, masks, deterministic)
