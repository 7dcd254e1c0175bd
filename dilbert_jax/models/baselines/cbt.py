"""CBT: a transformer for the text, one for the video, and a small one across both, trained by contrast."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dilbert_jax.losses import masked_mean, noise_contrastive_loss
from dilbert_jax.models.attention import Dense
from dilbert_jax.models.baselines.contrast import FrameHead, frame_contrast
from dilbert_jax.models.network import Encoded, Network, System
from dilbert_jax.models.streams import looks_at, side_by_side

Array = jax.Array
NUM_NEGATIVES = 3  # other reports that a clip is held against


class Cbt(Network):
    """Two unimodal transformers and a cross-modal one.

    The text has `num_layers` layers, the video (descriptions and regions) half, the cross-modal transformer a sixth:
    the proportions of UniVL, whose code has the same contrastive loss. No code of CBT itself is public.

    Own tasks: masked temporal steps are told from every other valid step of the batch (weight 1), and the clip's own
    report from those of other clips by the cross-modal transformer (weight 1). The published text loss is MLM, a common
    task.

    Source: Sun et al., "Learning Video Representations using Contrastive Bidirectional Transformer", 2019.
    """

    def setup(self) -> None:
        super().setup()
        layers = self.config.num_layers
        self.text = self.transformer()
        self.visual = self.transformer(max(1, layers // 2))
        self.cross = self.transformer(max(1, layers // 6))
        self.frame = FrameHead()
        self.score = Dense(1, name="score")

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        seen, seen_mask, parts = side_by_side(streams, masks, ("description", "region"))
        seen, _ = self.run_blocks(self.visual, seen, seen_mask, deterministic)
        text, _ = self.run_blocks(self.text, streams["entity"], masks["entity"], deterministic)
        unimodal = {"entity": text, **{s: seen[:, at] for s, at in parts.items()}}
        hidden, mask, places = side_by_side(unimodal, masks, tuple(unimodal))
        hidden, weights = self.run_blocks(self.cross, hidden, mask, deterministic)
        out = {s: hidden[:, at] for s, at in places.items()}
        return out, looks_at(weights, places), unimodal

    def own_tasks(
        self, encoded: Encoded, batch: Mapping[str, Array], deterministic: bool
    ) -> dict[str, Array]:
        shifts = range(NUM_NEGATIVES + 1)  # the first is the clip's own report
        unimodal, masks = encoded.own, encoded.masks
        rolled = {s: jnp.concatenate([unimodal[s]] * len(shifts)) for s in ("description", "region")}
        rolled["entity"] = jnp.concatenate([jnp.roll(unimodal["entity"], -k, axis=0) for k in shifts])
        rolled_masks = {s: jnp.concatenate([masks[s]] * len(shifts)) for s in ("description", "region")}
        rolled_masks["entity"] = jnp.concatenate([jnp.roll(masks["entity"], -k, axis=0) for k in shifts])
        hidden, mask, _ = side_by_side(rolled, rolled_masks, ("entity", "description", "region"))
        hidden, _ = self.run_blocks(self.cross, hidden, mask, deterministic)
        scores = self.score(hidden[:, 0]).reshape(len(shifts), -1).T
        return {
            **self.frame(unimodal["description"], encoded.features),
            "steps": masks["description"],
            "scores": scores,  # [B, 1 + negatives]
        }


def own_losses(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """The contrast between temporal steps and the contrast between reports, weight 1 each."""
    scores, report = outputs["scores"], batch["report"]
    others = jnp.stack([jnp.roll(report, -k) for k in range(1, scores.shape[1])], axis=1)
    # A clip is no example for its own report's opposite, and says nothing beside another's.
    usable = (others != batch["own_report"][:, None]) & (others >= 0)
    asked = (report == batch["own_report"]) & (report >= 0) & usable.any(1)
    text_video = noise_contrastive_loss(scores[:, 0], scores[:, 1:], usable)
    return {
        "frame_contrast": frame_contrast(outputs, batch),
        "report_contrast": masked_mean(text_video, asked),
    }


SYSTEM = System(Cbt, own_losses, ordered_steps=True)
