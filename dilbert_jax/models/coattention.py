"""The co-attention block of ViLBERT: two streams, each of which attends to the other."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import FeedForward, HeadsProjection, attend

Array = jax.Array


class CoAttentionBlock(nn.Module):
    """One connection layer.

    Each stream x asks the other stream y, and keeps its own input as the residual:

        c_x = MultiHead(W_q^x h_x, W_k^y h_y, W_v^y h_y)
        a_x = LN(h_x + W_o^x c_x)        out_x = LN(a_x + FFN_x(a_x))

    The streams have hidden and feed-forward widths of their own; queries, keys and values share `inner_size`.
    Attention weights have no dropout.

    Attributes:
      hidden_sizes: widths of the two streams, in the order of `streams`.
      inner_size: width of all heads together.
      num_heads: heads; they divide inner_size.
      ffn_sizes: widths of the two feed-forward layers.
      dropout: after the attention output and after the feed-forward layer.
      dtype: compute dtype.
      streams: names of the two streams.

    Source: Lu et al., "ViLBERT", NeurIPS 2019, figure 2b; BertConnectionLayer of its public code, whose q_dense1 and
    q_dense2 are never used and have no counterpart here.
    """

    hidden_sizes: tuple[int, int]
    inner_size: int
    num_heads: int
    ffn_sizes: tuple[int, int]
    dropout: float = 0.1
    dtype: Any = jnp.float32
    streams: tuple[str, str] = ("region", "entity")

    @nn.compact
    def __call__(
        self, hidden: dict[str, Array], masks: dict[str, Array], deterministic: bool = True
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Lets the streams look at each other.

        Args:
          hidden: per stream [B, S, D]; S and D are the stream's own.
          masks: per stream bool [B, S], True = valid.
          deterministic: no dropout.

        Returns:
          The streams' new hidden states, and an attention map for each stream that is looked at: with the streams
          `region` and `entity`, `region` [B, N, L, R] says which region each token looks at, `entity` [B, N, R, L]
          which token each region looks at.

        Raises:
          ValueError: streams of other names, or of widths that are not `hidden_sizes`.
        """
        if set(hidden) != set(self.streams) or set(masks) != set(self.streams):
            raise ValueError(
                f"co-attention of {self.streams} got hidden states {sorted(hidden)}, masks {sorted(masks)}"
            )
        widths = tuple(hidden[s].shape[-1] for s in self.streams)
        if widths != tuple(self.hidden_sizes):
            raise ValueError(f"streams {self.streams} have widths {widths}, not {tuple(self.hidden_sizes)}")

        def project(name: str, x: Array) -> Array:
            return HeadsProjection(self.num_heads, self.inner_size, self.dtype, name=name)(x)

        key = {s: project(f"{s}_key", hidden[s]) for s in self.streams}
        value = {s: project(f"{s}_value", hidden[s]) for s in self.streams}
        out, cross_weights = {}, {}
        for stream, other, hidden_size, ffn_size in zip(
            self.streams, self.streams[::-1], self.hidden_sizes, self.ffn_sizes, strict=True
        ):
            query = project(f"{stream}_query", hidden[stream])
            context, cross_weights[other] = attend(query, key[other], value[other], masks[other])
            block = FeedForward(hidden_size, ffn_size, self.dropout, self.dtype, name=f"{stream}_ffn")
            out[stream] = block(hidden[stream], context, deterministic)
        return out, cross_weights
