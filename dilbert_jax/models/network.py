"""What all systems share: three streams from a clip and its report, and the heads of the tasks.

A system is a `Network` with an encoder of its own, which makes the streams know of each other (`fuse`), and perhaps
pre-training tasks of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dilbert_jax.models.attention import LAYER_NORM_EPSILON, Dense, TransformerBlock, at_least_float32
from dilbert_jax.models.conv3d import VideoEncoder
from dilbert_jax.models.embeddings import (
    DescriptionEmbedding,
    EntityEmbedding,
    RegionEmbedding,
)
from dilbert_jax.models.heads import ClassHead, MatchHead, Pooler, Transform
from dilbert_jax.models.r3d import FRAME_MEAN, FRAME_STD, R3D18, TEMPORAL_STRIDE
from dilbert_jax.models.regions import pool_regions
from dilbert_jax.models.streams import max_valid, mean_by_type, mean_valid, video_overview
from dilbert_jax.sharding import BATCH, constrain, platform

Array = jax.Array
MDC_TARGETS = ("description", "entity")
VIDEO_ENCODERS = ("small", "r3d_18")
SMALLEST = 8  # patches along each side of a frame to initialise with: enough for four stages of a 3-D CNN
REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Architecture of one network; teacher and student share it (PAPER section 5).

    Attributes:
      name: the system, a key of `dilbert_jax.models.SYSTEMS`.
      vocab_size, num_*: sizes of the output spaces; they follow from the data set.
      hidden_size, num_layers, num_heads, ffn_size, dropout: fusion encoder (base: 768, 12, 12, 3072, 0.1).
      max_tokens: longest report in word pieces; max_steps: most description tokens.
      video: the 3-D CNN (D1): "small", shaped by channels, blocks and stem_patch (see `VideoEncoder`), or "r3d_18".
      region_bins: RoI bins per side.
      tnt_mode: how a fusion block adds what another stream says (see `TangledBlock`).
      temporal_position: description tokens carry their place in time (D3).
      mdc_target: what MDC classifies (D9): "description", the clip's classes at masked temporal steps, or "entity", the
        concept that each masked word piece belongs to.
      order: there is a head that tells shuffled description tokens from those in order (D9).
      remat: what the backward pass computes again instead of keeping it: "none", "dots" (all but the products with
        weights) or "full" (whole blocks).
      visual_words: branching of each level of VideoBERT's hierarchical k-means; their product is how many words there
        are.
      unroll: how many blocks the compiled loop over blocks holds; 0 = all on CPU without `remat`, one elsewhere.
      dtype: compute dtype name; parameters, softmax and losses stay float32.
    """

    vocab_size: int
    num_organs: int
    num_conditions: int
    num_findings: int
    num_classes: int
    num_region_classes: int
    num_entities: int = 0
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_size: int = 3072
    dropout: float = 0.1
    max_tokens: int = 128
    max_steps: int = 128
    video: str = "small"
    channels: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (1, 2, 2)
    stem_patch: tuple[int, int, int] = (2, 4, 4)
    region_bins: int = 2
    tnt_mode: str = "stack"
    temporal_position: bool = True
    mdc_target: str = "description"
    order: bool = False
    visual_words: tuple[int, ...] = (8, 8)
    remat: str = "none"
    unroll: int = 0
    dtype: str = "float32"
    name: str = "dilbert"


def frames_per_step(video: str, stem_patch: Sequence[int]) -> int:
    """How many frames a description token covers."""
    return TEMPORAL_STRIDE if video == "r3d_18" else stem_patch[0]


@flax.struct.dataclass
class Encoded:
    """What the fusion encoder knows of a clip and its report.

    Attributes:
      streams: hidden states per stream: entity [B, L, D], description [B, A, D], region [B, R, D].
      masks: valid positions per stream.
      pooled: one vector per stream [B, D].
      fused: pool_w * pool_a + pool_w * pool_r, [B, D]: what matching and the relational losses look at.
      overview: the 3-D CNN's own view of the clip, [B, 6 * C] (see `video_overview`).
      cross_weights: last block's attention of the description, entity [B, N, A, L] and region [B, N, A, R]; empty where
        the description does not look at them.
      embedded: hidden states per stream before the encoder.
      features: what the 3-D CNN says of each temporal step, [B, A, 2 * C], nothing blanked or shuffled.
      own: what the system's own tasks need to know of the encoder.
    """

    streams: dict[str, Array]
    masks: dict[str, Array]
    pooled: dict[str, Array]
    fused: Array
    overview: Array
    cross_weights: dict[str, Array]
    embedded: dict[str, Array]
    features: Array
    own: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class System:
    """A system to train: its network, and what else sets it apart.

    Attributes:
      network: the class.
      own_losses: the losses of its own pre-training tasks, each already with its weight relative to MLM's: (what
        `Network.own_tasks` says, batch) -> name -> scalar. None = the common tasks alone.
      distilled: there are a teacher and a stage of mutual learning.
      guided_masking: share of the examples whose masked words the knowledge graph chooses (D8), which is DILBERT's own
        idea. Applied by `dilbert_jax.reproduce` and configs/systems.py; elsewhere the configuration's
        `data.guided_masking` decides.
      prepare: what is learned from the training clips before the first step: (network, fresh parameters, batches, seed)
        -> parameters.
      ordered_steps: its own losses hold temporal steps against what the 3-D CNN says of them (`Encoded.features`);
        shuffled ones (`loss.order`) would meet another step's.
    """

    network: type[Network]
    own_losses: Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Array]] | None = None
    distilled: bool = False
    guided_masking: float = 0.0
    prepare: Callable[[Network, Any, Iterable[Mapping[str, Any]], int], Any] | None = None
    ordered_steps: bool = False


def normalize_frames(frames: Array, frame_mask: Array, dtype: Any = jnp.float32) -> Array:
    """Scales uint8 [B, T, H, W] to about zero mean and unit variance; padded frames become zero."""
    x = (frames.astype(dtype) / 255.0 - FRAME_MEAN) / FRAME_STD
    return jnp.where(frame_mask[:, :, None, None], x, 0.0)


class Network(nn.Module):
    """One network (teacher or student).

    A system is a subclass whose `setup` adds its blocks, and which has a `fuse`; `join`, `clip_views` and `own_tasks`
    are there to be replaced.
    """

    config: NetworkConfig
    placed_descriptions: ClassVar[bool] = (
        True  # description tokens know their place in time before the encoder
    )

    def setup(self) -> None:
        c = self.config
        dtype: Any = jnp.dtype(c.dtype)
        if c.mdc_target not in MDC_TARGETS:
            raise ValueError(f"MDC target is {c.mdc_target!r}; choose one of {', '.join(MDC_TARGETS)}")
        if c.video not in VIDEO_ENCODERS:
            raise ValueError(f"3-D CNN is {c.video!r}; choose one of {', '.join(VIDEO_ENCODERS)}")
        if c.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {c.remat!r}; choose one of {', '.join(REMAT_POLICIES)}")
        self.video: nn.Module
        if c.video == "r3d_18":
            self.video = R3D18(dtype=dtype)
        else:
            self.video = VideoEncoder(c.channels, c.blocks, c.stem_patch, dtype)
        self.entity_embedding = EntityEmbedding(c.vocab_size, c.hidden_size, c.max_tokens, c.dropout, dtype)
        self.description_embedding = DescriptionEmbedding(
            c.hidden_size, c.max_steps, c.dropout, dtype, c.temporal_position and self.placed_descriptions
        )
        self.region_embedding = RegionEmbedding(c.hidden_size, c.dropout, dtype)
        self.overview_norm = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=dtype)
        self.pool_entity = Pooler(c.hidden_size, dtype)
        self.pool_description = Pooler(c.hidden_size, dtype)
        self.pool_region = Pooler(c.hidden_size, dtype)
        self.mlm_transform = Transform(c.hidden_size, dtype)
        self.mlm_bias = self.param("mlm_bias", nn.initializers.zeros, (c.vocab_size,))
        self.mdc = ClassHead(c.hidden_size, c.num_classes, dtype)
        self.moc = ClassHead(c.hidden_size, c.num_region_classes, dtype)
        self.cmm = Dense(2, dtype=at_least_float32(dtype), kernel_init=nn.initializers.normal(0.02))
        if c.mdc_target == "entity":
            self.mdc_entity = ClassHead(c.hidden_size, c.num_entities, dtype)
        if c.order:
            self.order = ClassHead(c.hidden_size, 2, dtype)
        self.organ = ClassHead(c.hidden_size, c.num_organs, dtype)
        self.condition = ClassHead(c.hidden_size, c.num_conditions, dtype)
        self.findings = ClassHead(c.hidden_size, c.num_findings, dtype)
        self.match = MatchHead(c.hidden_size, dtype)

    @property
    def frames_per_step(self) -> int:
        """How many frames a description token covers."""
        return frames_per_step(self.config.video, self.config.stem_patch)

    def encode(
        self,
        frames: Array,
        frame_mask: Array,
        boxes: Array,
        box_frames: Array,
        region_mask: Array,
        token_ids: Array,
        token_types: Array,
        token_mask: Array,
        description_zeroed: Array | None = None,
        region_zeroed: Array | None = None,
        description_order: Array | None = None,
        deterministic: bool = True,
    ) -> Encoded:
        """Runs the three streams through the fusion encoder.

        Args:
          frames: uint8 [B, T, H, W]; frame_mask: bool [B, T], valid frames first.
          boxes: float [B, R, 4] (ymin, xmin, ymax, xmax) in [0, 1]; box_frames: int [B, R], their frames.
          region_mask: bool [B, R].
          token_ids, token_types: int [B, L]; token_mask: bool [B, L].
          description_zeroed: bool [B, A], description features to blank (masked description tokens).
          region_zeroed: bool [B, R], region features to blank.
          description_order: int [B, A], the temporal step whose features each description token shows; None = its own.
          deterministic: no dropout.
        """
        c = self.config
        wide = at_least_float32(jnp.dtype(c.dtype))
        patch = self.frames_per_step
        batch, num_frames = frame_mask.shape
        step_mask = frame_mask.reshape(batch, num_frames // patch, patch).any(-1)  # [B, A]
        # R3D-18 halves time thrice and needs to know the valid frames in between.
        video_mask = frame_mask if c.video == "r3d_18" else step_mask
        features = self.video(normalize_frames(frames, frame_mask, wide), video_mask)  # [B, A, H', W', C]
        features = constrain(features, BATCH)

        # The mean says what a step is like, the maximum keeps what shows in a small place.
        description = jnp.concatenate(
            [features.mean(axis=(2, 3)), features.max(axis=(2, 3))], -1
        )  # [B, A, 2 C]
        described, own = self.describe(
            description, frames, frame_mask, description_order, description_zeroed, deterministic
        )

        last_step = jnp.maximum(step_mask.sum(-1, keepdims=True) - 1, 0).astype(wide)
        # A step of the small CNN is centred on its patch of frames; R3D-18's step i on frame 8 i.
        centre = 0.0 if c.video == "r3d_18" else (patch - 1) / 2
        steps = jnp.clip((box_frames.astype(wide) - centre) / patch, 0.0, last_step)
        region = pool_regions(features, boxes, steps, c.region_bins)
        if region_zeroed is not None:
            region = jnp.where(region_zeroed[..., None], 0.0, region)
        times = box_frames / jnp.maximum(frame_mask.sum(-1, keepdims=True), 1)

        streams = {
            "entity": self.entity_embedding(token_ids, token_types, deterministic),
            "description": described,
            "region": self.region_embedding(region, boxes, times, deterministic),
        }
        streams = {name: constrain(x, BATCH) for name, x in streams.items()}
        # Both sides of the matching keep a view that has not met the other: the named entities as they stand in the
        # report, and the 3-D CNN's overview. What the blocks mix follows the report, also where it is the wrong one.
        named = mean_by_type(streams["entity"], token_types, token_mask)
        masks = {"entity": token_mask, "description": step_mask, "region": region_mask}
        embedded = streams
        streams, cross_weights, of_encoder = self.fuse(streams, masks, deterministic)
        own |= of_encoder
        overview = self.overview_norm(video_overview(features, step_mask))
        # [CLS] as in BERT, and the maximum: the few words that name organ and disease drown in a mean.
        words = [streams["entity"][:, 0], max_valid(streams["entity"], token_mask), named]
        # The description is the clip's overall appearance: its pooled vector sees the 3-D CNN's map directly too.
        appearance = jnp.concatenate([mean_valid(streams["description"], step_mask), overview], axis=-1)
        pooled = {
            "entity": self.pool_entity(jnp.concatenate(words, axis=-1)),
            "description": self.pool_description(appearance),
            "region": self.pool_region(mean_valid(streams["region"], region_mask)),
        }
        fused = self.join(pooled, own)
        return Encoded(streams, masks, pooled, fused, overview, cross_weights, embedded, description, own)

    def describe(
        self,
        features: Array,
        frames: Array,
        frame_mask: Array,
        order: Array | None,
        zeroed: Array | None,
        deterministic: bool,
    ) -> tuple[Array, dict[str, Array]]:
        """The description stream before the encoder.

        Args:
          features: [B, A, 2 * C], what the 3-D CNN says of each temporal step.
          frames, frame_mask: as in `encode`; order, zeroed: its description_order and description_zeroed.
          deterministic: no dropout.

        Returns:
          [B, A, D], and what the system's own tasks need to know (`Encoded.own`).
        """
        del frames, frame_mask
        if order is not None:
            features = jnp.take_along_axis(features, order[..., None], axis=1)
        if zeroed is not None:
            features = jnp.where(zeroed[..., None], 0.0, features)
        return self.description_embedding(features, deterministic), {}

    def fuse(
        self, streams: dict[str, Array], masks: dict[str, Array], deterministic: bool
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        """The encoder.

        Args:
          streams: per stream [B, S, D]; masks: per stream bool [B, S], True = valid.
          deterministic: no dropout.

        Returns:
          The streams' new hidden states, and `cross_weights` and `own` of `Encoded`.
        """
        raise NotImplementedError

    def join(self, pooled: dict[str, Array], own: dict[str, Array]) -> Array:
        """The fused vector [B, D] from what the streams say."""
        del own
        return pooled["entity"] * pooled["description"] + pooled["entity"] * pooled["region"]

    def own_tasks(
        self, encoded: Encoded, batch: Mapping[str, Array], deterministic: bool
    ) -> dict[str, Array]:
        """What the losses of the system's own pre-training tasks need (`System.own_losses`).

        Args:
          encoded: from `encode`.
          batch: the corrupted batch; at least the entries of `own_task_inputs`.
          deterministic: no dropout; what a task draws at random comes from the same key.
        """
        del encoded, batch, deterministic
        return {}

    def transformer(self, num_layers: int | None = None) -> list[nn.Module]:
        """Layers of BERT of the configuration's sizes, to be assigned in `setup`; None = as many as it says."""
        c = self.config
        count = c.num_layers if num_layers is None else num_layers
        fields = c.hidden_size, c.num_heads, c.ffn_size, c.dropout, jnp.dtype(c.dtype)
        return [TransformerBlock(*fields) for _ in range(count)]

    def run_blocks(
        self, layers: Sequence[nn.Module], hidden: Any, mask: Any, deterministic: bool
    ) -> tuple[Any, Any]:
        """Equal blocks one after the other: new hidden states, and the last block's attention maps.

        A block is (hidden, mask, deterministic) -> (hidden, attention maps). A loop over blocks compiles one of them
        however many there are, but must stack their parameters; XLA:CPU runs it slower than the blocks in a row, but
        only in a loop does it free what `remat` computes again. Both give the same numbers, dropout included.
        """
        c, count = self.config, len(layers)
        if self.is_initializing():
            for layer in layers:
                hidden, weights = layer(hidden, mask, deterministic)
            return hidden, weights
        block = layers[0].clone(parent=None)

        def run(hidden: Any, inputs: Any) -> tuple[Any, Any]:
            params, key = inputs
            rngs = None if key is None else {"dropout": key}
            out: Any = block.apply({"params": params}, hidden, mask, deterministic, rngs=rngs)
            return out

        in_a_row = platform() == "cpu" and c.remat == "none"  # where nothing else is asked for
        unroll = min(c.unroll or (count if in_a_row else 1), count)
        if c.remat != "none":
            policy = None if c.remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            # Outside of a loop XLA would find what is computed again to be the same as before, and keep it.
            run = jax.checkpoint(run, policy=policy, prevent_cse=unroll == count)
        params = [layer.variables["params"] for layer in layers]
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), count)
        if unroll < count:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            hidden, weights = jax.lax.scan(run, hidden, (stacked, keys), unroll=unroll)
            return hidden, jax.tree.map(lambda by_layer: by_layer[-1], weights)
        for i in range(count):
            hidden, weights = run(hidden, (params[i], None if keys is None else keys[i]))
        return hidden, weights

    def pretrain(self, encoded: Encoded, mlm_positions: Array) -> dict[str, Array]:
        """Logits of the four pre-training tasks (PAPER section 4).

        Args:
          encoded: from `encode`.
          mlm_positions: int [B, M], the report positions to decode (the vocabulary is wide, the masked few).

        Returns:
          `mlm` [B, M, V]; `mdc` [B, A, num_classes] (independent sigmoids), or [B, M, num_entities] (softmax) where MDC
          classifies entities; `moc` [B, R, num_region_classes]; `cmm` [B, 2] (class 1: report and clip belong
          together); `summary` [B, 2, num_classes] (what the pooled description and the pooled report each say of the
          classes, by the head of `mdc`); `order` [B, 2] (class 1: description tokens are shuffled), where there is such
          a head.
        """
        wide = at_least_float32(jnp.dtype(self.config.dtype))
        tokens = jnp.take_along_axis(encoded.streams["entity"], mlm_positions[..., None], axis=1)
        mlm = self.entity_embedding.attend(self.mlm_transform(tokens)).astype(wide) + self.mlm_bias
        by_entity = self.config.mdc_target == "entity"
        logits = {
            "mlm": mlm,
            "mdc": self.mdc_entity(tokens) if by_entity else self.mdc(encoded.streams["description"]),
            "moc": self.moc(encoded.streams["region"]),
            "cmm": self.cmm(encoded.fused.astype(wide)),
            "summary": self.mdc(jnp.stack([encoded.pooled["description"], encoded.pooled["entity"]], axis=1)),
        }
        if self.config.order:
            logits["order"] = self.order(
                mean_valid(encoded.streams["description"], encoded.masks["description"])
            )
        return logits

    def annotate(self, encoded: Encoded, entity_names: Array, entity_names_mask: Array) -> dict[str, Any]:
        """Logits of the annotation (PAPER section 6).

        Args:
          encoded: from `encode`; the entity stream holds no report here.
          entity_names: int [E, P], word pieces of the candidate entities' names.
          entity_names_mask: bool [E, P].

        Returns:
          `organ` [B, O], `condition` [B, C], `findings` [B, F] (independent sigmoids) and `match`, a dict
          with `frame` [B, E, A], `region` [B, E, R] and `clip` [B, E].
        """
        words = self.entity_embedding.word(entity_names)  # [E, P, D]
        names = mean_valid(words, entity_names_mask)
        clip = jnp.concatenate(self.clip_views(encoded), axis=-1)
        # Many blocks make the places of a clip alike: each keeps what it was before them.
        places = {s: encoded.streams[s] + encoded.embedded[s] for s in ("description", "region")}
        return {
            "organ": self.organ(clip),
            "condition": self.condition(clip),
            "findings": self.findings(clip),
            "match": self.match(
                names,
                places["description"],
                places["region"],
                encoded.masks["description"],
                encoded.masks["region"],
            ),
        }

    def clip_views(self, encoded: Encoded) -> list[Array]:
        """The vectors, each [B, any], that organ, condition and findings are classified from.

        The mean of a stream says what the clip is like, its maximum keeps what shows in one place only, and the
        overview spares fine-tuning the long way through the blocks.
        """
        views = [encoded.pooled["description"], encoded.pooled["region"], encoded.overview]
        return views + [max_valid(encoded.streams[s], encoded.masks[s]) for s in ("description", "region")]

    def __call__(
        self,
        frames: Array,
        frame_mask: Array,
        boxes: Array,
        box_frames: Array,
        region_mask: Array,
        token_ids: Array,
        token_types: Array,
        token_mask: Array,
        mlm_positions: Array,
        entity_names: Array,
        entity_names_mask: Array,
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """All heads once, without masking or dropout: touches every parameter, as `init` needs."""
        encoded = self.encode(
            frames, frame_mask, boxes, box_frames, region_mask, token_ids, token_types, token_mask
        )
        if self.is_initializing():
            self.own_tasks(encoded, own_task_inputs(encoded, mlm_positions), deterministic=True)
        return self.pretrain(encoded, mlm_positions), self.annotate(encoded, entity_names, entity_names_mask)


def init_params(network: Network, key: Array) -> Any:
    """Freshly initialised parameters of a network.

    Only shapes go in, of a clip of one temporal step: no parameter depends on the size or number of what a network sees
    beyond what its configuration says. Called as it is, JAX compiles what draws the numbers once for every shape of a
    parameter. Under `jax.jit` it is one program that holds them for every parameter: with many layers it compiles
    longer.
    """
    _, height, width = network.config.stem_patch
    side = max(SMALLEST, 2 ** (len(network.config.channels) - 1))  # every further stage halves it
    frames = (1, network.frames_per_step)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    arguments: dict[str, Any] = {
        "frames": jax.ShapeDtypeStruct((*frames, side * height, side * width), jnp.uint8),
        "frame_mask": jax.ShapeDtypeStruct(frames, jnp.bool_),
        "boxes": jax.ShapeDtypeStruct((1, 1, 4), jnp.float32),
        "box_frames": one,
        "region_mask": mask,
        "token_ids": one,
        "token_types": one,
        "token_mask": mask,
        "mlm_positions": one,
        "entity_names": one,
        "entity_names_mask": mask,
    }
    params = network.lazy_init(key, **arguments)["params"]
    return jax.tree.map(jnp.asarray, params)  # constants come as another kind of array


def own_task_inputs(encoded: Encoded, mlm_positions: Array) -> dict[str, Array]:
    """What of a batch a system's own tasks may read, here for a batch in which nothing is masked.

    Returns:
      `description_target`, `description_zeroed`: bool [B, A], masked temporal steps and those of them that are blank.
      `mlm_positions`: int [B, M]; `matched`: bool [B], report and clip belong together.
      `report`, `own_report`: int [B], the text that is shown and that of the clip's own report; equal numbers are equal
      texts, -1 is none.
    """
    steps = encoded.masks["description"]
    batch = steps.shape[0]
    return {
        "description_target": jnp.zeros_like(steps),
        "description_zeroed": jnp.zeros_like(steps),
        "mlm_positions": mlm_positions,
        "matched": jnp.ones(batch, bool),
        "report": jnp.arange(batch),
        "own_report": jnp.arange(batch),
    }
