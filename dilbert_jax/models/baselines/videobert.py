"""VideoBERT: the clip becomes visual words, which one transformer reads like the report's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from dilbert_jax.losses import cross_entropy, masked_mean
from dilbert_jax.models.embeddings import Embedding, sinusoids
from dilbert_jax.models.heads import Transform
from dilbert_jax.models.network import Encoded, Network, System
from dilbert_jax.models.streams import looks_at, side_by_side
from dilbert_jax.models.tangled import STREAMS

Array = jax.Array
SIDE = 8  # a temporal step is described by so many rows and columns
MAX_CLIPS = 2000  # that visual words are learned from
REPLACED = 1 / 9  # of the hidden visual words show another: of all masked ones, 10 %, as 80 % show [MASK]


def describe_steps(frames: Array, frame_mask: Array, steps: int) -> Array:
    """What visual words are made from: a thumbnail of each temporal step's mean frame, zero mean, unit variance.

    Args:
      frames: uint8 [B, T, H, W]; frame_mask: bool [B, T], valid frames first.
      steps: A, which divides T.

    Returns:
      float32 [B, A, 64]; a step without contrast is all zero.
    """
    batch, num_frames = frame_mask.shape
    grouped = frames.reshape(batch, steps, num_frames // steps, *frames.shape[2:]).astype(jnp.float32)
    valid = frame_mask.reshape(batch, steps, -1, 1, 1)
    mean = jnp.where(valid, grouped, 0.0).sum(2) / jnp.maximum(valid.sum(2), 1)
    small = jax.image.resize(mean, (batch, steps, SIDE, SIDE), "linear").reshape(batch, steps, -1)
    small = small - small.mean(-1, keepdims=True)
    return small / jnp.maximum(small.std(-1, keepdims=True), 1.0)


class VisualWords(nn.Module):
    """Hierarchical k-means: a step goes to the nearest centre of each level, within that of the level above.

    The centres are parameters that no gradient and no decay reaches; `learn_visual_words` sets them.
    """

    branching: tuple[int, ...]

    @nn.compact
    def __call__(self, descriptors: Array) -> Array:
        """[..., F] -> int [...] in [0, product of branching)."""
        word = jnp.zeros(descriptors.shape[:-1], jnp.int32)
        groups = 1
        for level, width in enumerate(self.branching):
            shape = (groups, width, descriptors.shape[-1])
            centres = self.param(f"centres_{level}", nn.initializers.normal(1.0), shape)[word]
            nearest = ((descriptors[..., None, :] - centres) ** 2).sum(-1).argmin(-1)
            word, groups = word * width + nearest.astype(jnp.int32), groups * width
        return word


def learn_visual_words(
    descriptors: np.ndarray, branching: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Hierarchical k-means of descriptors [N, F]; the same for the same input.

    Returns:
      `centres_<level>` [groups, width, F] as `VisualWords` reads them. A group with fewer members than centres repeats
      them, so that some words stay unused.
    """
    groups, levels = [np.arange(len(descriptors))], {}
    for level, width in enumerate(branching):
        centres, deeper = [], []
        for members in groups:
            points = descriptors[members]
            found = min(width, len(np.unique(points, axis=0)))
            if not found:
                centres.append(np.zeros((width, descriptors.shape[1])))
                deeper += [members] * width
                continue
            means = KMeans(found, n_init=3, random_state=seed).fit(points)
            centres.append(means.cluster_centers_[np.arange(width) % found])
            nearest = ((points[:, None] - centres[-1][None]) ** 2).sum(-1).argmin(1)
            deeper += [members[nearest == i] for i in range(width)]
        levels[f"centres_{level}"] = np.asarray(centres, np.float32)
        groups = deeper
    return levels


class VideoBert(Network):
    """One stream: the report, [>], and the clip's visual words; regions, which it does not know, come last.

    A temporal step is its visual word's embedding, in the place of what the 3-D CNN says of it. Visual words are
    appended to the vocabulary. Published: 20,736 of them from a frozen S3D's features; here no extractor trained on
    other video stands ready, and thumbnails of the training clips take the features' place.

    Own tasks, each with the weight of MLM: masked visual words of the joint sequence, masked words of the report alone,
    and masked visual words of the clip alone. With MLM, which reads the joint sequence, they are the published three
    regimes. Matching reads [CLS] beside what the streams say.

    Source: Sun et al., "VideoBERT", ICCV 2019.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.visual_words = VisualWords(tuple(c.visual_words))
        self.num_words = int(np.prod(c.visual_words))
        # The last two are [>] and [MASK].
        self.visual_embedding = Embedding(self.num_words + 2, c.hidden_size, dtype)
        self.place = Embedding(c.max_steps, c.hidden_size, dtype, initializer=sinusoids)
        self.segment = Embedding(len(STREAMS), c.hidden_size, dtype)
        self.visual_transform = Transform(c.hidden_size, dtype)
        self.layers = self.transformer()

    def describe(
        self,
        features: Array,
        frames: Array,
        frame_mask: Array,
        order: Array | None,
        zeroed: Array | None,
        deterministic: bool,
    ) -> tuple[Array, dict[str, Array]]:
        words = self.visual_words(describe_steps(frames, frame_mask, features.shape[1]))
        if order is not None:
            words = jnp.take_along_axis(words, order, axis=1)
        vectors = self.visual_embedding(words)
        if zeroed is not None:
            hidden = jnp.broadcast_to(self.visual_embedding.table()[self.num_words + 1], vectors.shape)
            if not deterministic:
                replaced, drawn = jax.random.split(self.make_rng("dropout"))
                drawn = jax.random.randint(drawn, words.shape, 0, self.config.vocab_size + self.num_words)
                joint = jnp.concatenate([self.entity_embedding.word.table(), self.visual_embedding.table()])
                swap = jax.random.uniform(replaced, words.shape) < REPLACED
                hidden = jnp.where(swap[..., None], joint[drawn], hidden)
            vectors = jnp.where(zeroed[..., None], hidden, vectors)
        vectors = vectors + self.place.table()[: words.shape[1]]
        return self.entity_embedding.norm(vectors), {"visual_words": words}

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        segments = self.segment.table()
        streams = {s: streams[s] + segments[i] for i, s in enumerate(STREAMS)}
        arrow = jnp.broadcast_to(
            self.visual_embedding.table()[self.num_words], streams["entity"][:, :1].shape
        )
        streams, masks = streams | {"arrow": arrow}, masks | {"arrow": jnp.ones(arrow.shape[:2], bool)}
        hidden, mask, places = side_by_side(streams, masks, ("entity", "arrow", "description", "region"))
        hidden, weights = self.run_blocks(self.layers, hidden, mask, deterministic)
        return {s: hidden[:, places[s]] for s in STREAMS}, looks_at(weights, places), {"cls": hidden[:, 0]}

    def join(self, pooled: dict[str, Array], own: dict[str, Array]) -> Array:
        return super().join(pooled, own) + own["cls"]

    def own_tasks(
        self, encoded: Encoded, batch: Mapping[str, Array], deterministic: bool
    ) -> dict[str, Array]:
        def score(hidden: Array) -> Array:
            """[..., D] -> [..., joint vocabulary]."""
            hidden = self.visual_transform(hidden)
            visual = self.visual_embedding.attend(hidden)[..., : self.num_words]
            return jnp.concatenate([self.entity_embedding.attend(hidden), visual], axis=-1)

        hidden, masks = encoded.embedded, encoded.masks
        nothing = {s: jnp.zeros_like(m) for s, m in masks.items()}
        text = self.fuse(hidden, nothing | {"entity": masks["entity"]}, deterministic)[0]["entity"]
        clip = self.fuse(hidden, masks | {"entity": nothing["entity"]}, deterministic)[0]["description"]
        return {
            "joint": score(encoded.streams["description"]),
            "text": score(jnp.take_along_axis(text, batch["mlm_positions"][..., None], axis=1)),
            "clip": score(clip),
            "targets": encoded.own["visual_words"] + self.config.vocab_size,
            "steps": masks["description"],
        }


def own_losses(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """Masked visual words with and without the report, and masked words without the clip."""
    target = batch["description_target"] & outputs["steps"]
    clip = cross_entropy(outputs["clip"], outputs["targets"])
    joint = cross_entropy(outputs["joint"], outputs["targets"])
    text = cross_entropy(outputs["text"], batch["mlm_targets"])
    return {
        "visual_words": masked_mean(joint, target & batch["matched"][:, None]),
        "clip_alone": masked_mean(clip, target),
        "text_alone": masked_mean(text, batch["mlm_mask"]),
    }


def prepare(network: Network, params: Any, batches: Iterable[Mapping[str, np.ndarray]], seed: int) -> Any:
    """Learns the visual words from training clips and puts them into freshly initialised parameters."""
    found: list[np.ndarray] = []
    clips = 0
    describe = jax.jit(describe_steps, static_argnums=2)
    patch = network.frames_per_step
    for batch in batches:
        frames, mask = batch["frames"], batch["frame_mask"]
        steps = frames.shape[1] // patch
        valid = mask.reshape(len(mask), steps, -1).any(-1)
        found.append(np.asarray(describe(frames, mask, steps))[valid])
        clips += len(frames)
        if clips >= MAX_CLIPS:
            break
    centres = learn_visual_words(np.concatenate(found), network.config.visual_words, seed)
    return {**params, "visual_words": {name: jnp.asarray(value) for name, value in centres.items()}}


SYSTEM = System(VideoBert, own_losses, prepare=prepare)
