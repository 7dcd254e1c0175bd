"""HERO: a single-stream transformer over report and clip, then one over the frames in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.losses import cross_entropy, hinge_loss, masked_mean
from dilbert_jax.models.attention import LAYER_NORM_EPSILON, Dense
from dilbert_jax.models.baselines.contrast import FrameHead, frame_contrast
from dilbert_jax.models.embeddings import Embedding, sinusoids
from dilbert_jax.models.network import Encoded, Network, System
from dilbert_jax.models.streams import looks_at, side_by_side
from dilbert_jax.models.tangled import STREAMS

Array = jax.Array
SHUFFLED = 0.15
MARGIN = 0.1


class Hero(Network):
    """Cross-modal transformer of `num_layers`, temporal transformer of half as many.

    The cross-modal one sees report, descriptions and regions side by side; what it says of a temporal step, plus a
    linear map of the step as it came in, goes through the temporal one. Only there do steps know their place in time:
    otherwise the order task would have nothing to find out. A report has no times: it is one sentence a clip.

    Own tasks, weighed to MLM as published (2 : 2 : 1 : 2): masked steps by contrast (1), the place of shuffled steps
    (0.5), the clip that a report belongs to (1). Start and end of a moment, a part of the last, need marked moments,
    which ultrasound sets do not have: left out.

    Source: Li et al., "HERO", EMNLP 2020, and its public code.
    """

    placed_descriptions: ClassVar[bool] = False

    def setup(self) -> None:
        super().setup()
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.segment = Embedding(len(STREAMS), c.hidden_size, dtype)
        self.cross = self.transformer()
        self.residual = Dense(c.hidden_size, dtype=dtype)
        self.place = Embedding(c.max_steps, c.hidden_size, dtype, initializer=sinusoids)
        self.place_norm = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=dtype)
        self.temporal = self.transformer(max(1, -(-c.num_layers // 2)))
        self.frame = FrameHead()
        self.order_of_frames = Dense(c.max_steps)
        self.query = Dense(1)
        self.query_map = Dense(c.hidden_size)

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        segments = self.segment.table()
        marked = {s: streams[s] + segments[i] for i, s in enumerate(STREAMS)}
        hidden, mask, places = side_by_side(marked, masks, STREAMS)
        hidden, weights = self.run_blocks(self.cross, hidden, mask, deterministic)
        out = {s: hidden[:, at] for s, at in places.items()}
        frames = out["description"] + self.residual(streams["description"])
        out["description"] = self._over_time(frames, masks["description"], deterministic)
        return out, looks_at(weights, places), {"frames": frames}

    def _over_time(self, frames: Array, mask: Array, deterministic: bool) -> Array:
        """The temporal transformer over steps [B, A, D] in the order they are given."""
        placed = self.place_norm(frames + self.place.table()[: frames.shape[1]])
        return self.run_blocks(self.temporal, placed, mask, deterministic)[0]

    def own_tasks(
        self, encoded: Encoded, batch: Mapping[str, Array], deterministic: bool
    ) -> dict[str, Array]:
        steps = encoded.masks["description"]
        order, moved = shuffle_some(self.make_rng("dropout"), steps)
        shuffled = jnp.take_along_axis(encoded.own["frames"], order[..., None], axis=1)
        in_time = self._over_time(shuffled, steps, deterministic)

        # A query must not see the clip, nor the clip the query.
        hidden, masks = encoded.embedded, encoded.masks
        nothing = {s: jnp.zeros_like(m) for s, m in masks.items()}
        text = self.fuse(hidden, nothing | {"entity": masks["entity"]}, deterministic)[0]["entity"]
        clip = self.fuse(hidden, masks | {"entity": nothing["entity"]}, deterministic)[0]["description"]
        attention = jnp.where(masks["entity"], self.query(text)[..., 0], -jnp.inf)
        query = jnp.einsum("bl,bld->bd", jax.nn.softmax(attention, axis=-1), text)
        similar = jnp.einsum("qd,bad->qba", _unit(self.query_map(query)), _unit(clip))
        similar = jnp.where(steps[None], similar, -1.0).max(-1)
        return {
            **self.frame(encoded.streams["description"], encoded.features),
            "steps": steps,
            "place": self.order_of_frames(in_time),  # [B, A, max_steps]
            "order": order,
            "moved": moved,
            "similar": similar,  # [B reports, B clips]
        }


def shuffle_some(key: Array, valid: Array) -> tuple[Array, Array]:
    """Moves 15 % of the valid steps, and at least two where there are, each to another's place.

    Args:
      key: random key; valid: bool [B, A].

    Returns:
      int [B, A], the step that each place shows, and bool [B, A], the places that show another's.
    """
    count = valid.sum(-1, keepdims=True)
    wanted = jnp.minimum(jnp.maximum(jnp.round(SHUFFLED * count).astype(jnp.int32), 2), count)
    drawn = jnp.where(valid, jax.random.uniform(key, valid.shape), 2.0)
    by_draw = jnp.argsort(drawn, axis=-1)  # the steps in the order drawn
    rank = jnp.argsort(by_draw, axis=-1)
    moved = (rank < wanted) & (wanted > 1)
    following = jnp.take_along_axis(by_draw, jnp.where(rank + 1 < wanted, rank + 1, 0), axis=-1)
    return jnp.where(moved, following, jnp.arange(valid.shape[1])), moved


def own_losses(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """Masked steps, order of frames, report to clip."""
    similar = outputs["similar"].astype(jnp.float32)
    report, clip = batch["report"], batch["own_report"]
    asked = (report == clip) & (report >= 0)
    # [reports, clips]: a negative neither belongs together nor happens to say the same.
    negative = (report[:, None] != clip[None, :]) & (report[:, None] >= 0) & (clip[None, :] >= 0)
    own = jnp.diagonal(similar)
    terms = [
        masked_mean(hinge_loss(own[:, None], similar, MARGIN), negative & asked[:, None]),
        masked_mean(hinge_loss(own[None, :], similar, MARGIN), negative & asked[None, :]),
    ]
    place = cross_entropy(outputs["place"], outputs["order"])
    return {
        "frame_contrast": frame_contrast(outputs, batch),
        "frame_order": 0.5 * masked_mean(place, outputs["moved"]),
        "report_to_clip": terms[0] + terms[1],
    }


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


SYSTEM = System(Hero, own_losses, ordered_steps=True)
