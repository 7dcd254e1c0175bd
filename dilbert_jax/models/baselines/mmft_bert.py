"""MMFT-BERT: a BERT for each pair of modalities, whose [CLS] a fusion vector gathers."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.losses import binary_cross_entropy, cross_entropy, masked_mean
from dilbert_jax.models.attention import TransformerBlock
from dilbert_jax.models.heads import ClassHead
from dilbert_jax.models.network import Encoded, Network, System
from dilbert_jax.models.streams import looks_at, side_by_side

Array = jax.Array
# What each BERT reads: the question's place is the report's, the subtitles' that of the regions.
READERS = {"text": ("entity",), "visual": ("entity", "description"), "context": ("entity", "region")}


class MmftBert(Network):
    """Three BERTs of `num_layers` each: the report, report and descriptions, report and regions.

    A fusion vector, zero at the start, attends once to itself and to the three [CLS] (one transformer layer); matching
    and annotation read it beside what the streams say. The published system takes [CLS] from layer 9 of 12, whose last
    three layers are then idle: num_layers = 9 is its size. The word stream is the mean of the three BERTs'.

    It has no pre-training task of its own but a loss for each BERT: matching and the clip's classes, each from its own
    [CLS] alone, weight 1.

    Source: Khan et al., "MMFT-BERT", Findings of EMNLP 2020, and its public code.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.text = self.transformer()
        self.visual = self.transformer()
        self.context = self.transformer()
        self.fusion_vector = self.param("fusion_vector", nn.initializers.zeros, (c.hidden_size,))
        # The published feed-forward layer is 2048 wide at hidden size 768.
        width = max(1, 2048 * c.hidden_size // 768)
        self.fusion = TransformerBlock(c.hidden_size, c.num_heads, width, c.dropout, dtype)
        self.own_match = {name: ClassHead(c.hidden_size, 2, dtype) for name in READERS}
        self.own_classes = {name: ClassHead(c.hidden_size, c.num_classes, dtype) for name in READERS}

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        layers = {"text": self.text, "visual": self.visual, "context": self.context}
        words, cls, out, looks = [], {}, {}, {}
        for name, read in READERS.items():
            hidden, mask, places = side_by_side(streams, masks, read)
            hidden, weights = self.run_blocks(layers[name], hidden, mask, deterministic)
            words.append(hidden[:, places["entity"]])
            cls[name] = hidden[:, 0]
            if len(read) > 1:
                out[read[1]] = hidden[:, places[read[1]]]
            if "description" in read:
                looks = looks_at(weights, places)
        out["entity"] = sum(words) / len(words)
        vector = jnp.broadcast_to(self.fusion_vector.astype(words[0].dtype), cls["text"].shape)
        gathered = jnp.stack([vector, *cls.values()], axis=1)
        gathered, _ = self.fusion(gathered, jnp.ones(gathered.shape[:2], bool), deterministic)
        return out, looks, {**cls, "fusion": gathered[:, 0]}

    def join(self, pooled: dict[str, Array], own: dict[str, Array]) -> Array:
        return super().join(pooled, own) + own["fusion"]

    def clip_views(self, encoded: Encoded) -> list[Array]:
        return [*super().clip_views(encoded), encoded.own["fusion"]]

    def own_tasks(
        self, encoded: Encoded, batch: Mapping[str, Array], deterministic: bool
    ) -> dict[str, Array]:
        outputs = {}
        for name in READERS:
            outputs[f"{name}/match"] = self.own_match[name](encoded.own[name])
            outputs[f"{name}/classes"] = self.own_classes[name](encoded.own[name])
        return outputs


def own_losses(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """Matching and the clip's classes, from each BERT alone."""
    values = {}
    told = batch["classes_mask"] & batch["matched"]
    for name in READERS:
        match = cross_entropy(outputs[f"{name}/match"], batch["matched"].astype(jnp.int32))
        classes = binary_cross_entropy(outputs[f"{name}/classes"], batch["classes"])
        classes = classes.sum(-1) / max(classes.shape[-1], 1)
        values[name] = masked_mean(match, batch["cmm_mask"]) + masked_mean(classes, told)
    return values


SYSTEM = System(MmftBert, own_losses)
