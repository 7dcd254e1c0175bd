"""DILBERT in PyTorch, as a PyTorch user would write it: the forward pass of `dilbert_jax.models`.

Axis letters as in `dilbert_jax.models`, but PyTorch's layout: feature maps are [B, C, A, H, W].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dilbert_jax.models.network import NetworkConfig
from dilbert_jax.parity import MISSING_EXTRA
from dilbert_jax.parity.torch_layers import (
    LAYER_NORM_EPSILON,
    NUM_TOKEN_TYPES,
    ClassHead,
    DescriptionEmbedding,
    EntityEmbedding,
    FeedForward,
    MatchHead,
    Pooler,
    RegionEmbedding,
    TangledBlock,
    Transform,
    VideoEncoder,
    max_valid,
    mean_by_type,
    mean_valid,
    pool_regions,
    sinusoids,
    summarize_map,
)

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

TRUNCATED_STD = 0.87962566  # of a normal distribution cut at two standard deviations


def check_supported(config: NetworkConfig) -> None:
    """Refuses what the PyTorch model does not have.

    Raises:
      ValueError: names every option and its value.
    """
    wanted = {
        "name": ("dilbert",),
        "video": ("small",),
        "mdc_target": ("description",),
        "order": (False,),
        "tnt_mode": ("stack", "add_resized"),
        "dtype": ("float32", "float64"),
    }
    refused = [
        f"{name}={getattr(config, name)!r} (it has {' or '.join(map(repr, values))})"
        for name, values in wanted.items()
        if getattr(config, name) not in values
    ]
    if refused:
        raise ValueError(f"the PyTorch model does not have {'; '.join(refused)}")
    if config.hidden_size % config.num_heads:
        raise ValueError(f"hidden size {config.hidden_size} is not divisible by {config.num_heads} heads")
    if len(config.blocks) != len(config.channels):
        raise ValueError(f"channels {config.channels} and blocks {config.blocks} need one entry a stage each")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the fusion encoder knows of a clip and its report.

    Attributes:
      streams: hidden states per stream: entity [B, L, D], description [B, A, D], region [B, R, D].
      masks: valid positions per stream.
      pooled: one vector per stream [B, D].
      fused: pool_w * pool_a + pool_w * pool_r, [B, D].
      overview: the 3-D CNN's own view of the clip, [B, 6 * C].
      embedded: hidden states per stream before the encoder.
      cross_weights: last block's cross attention, entity [B, N, A, L] and region [B, N, A, R]; empty unless asked for.
    """

    streams: dict[str, Tensor]
    masks: dict[str, Tensor]
    pooled: dict[str, Tensor]
    fused: Tensor
    overview: Tensor
    embedded: dict[str, Tensor]
    cross_weights: dict[str, Tensor]


class TorchDilbert(nn.Module):
    """One network (teacher or student).

    Attributes:
      config: the architecture, the one that `dilbert_jax.models.dilbert.Dilbert` takes.

    Raises:
      ValueError: an option that this model does not have.
    """

    def __init__(self, config: NetworkConfig) -> None:
        check_supported(config)
        super().__init__()
        c = self.config = config
        width, features = c.hidden_size, c.channels[-1]
        self.video = VideoEncoder(c.channels, c.blocks, c.stem_patch)
        self.entity_embedding = EntityEmbedding(c.vocab_size, width, c.max_tokens, c.dropout)
        self.description_embedding = DescriptionEmbedding(
            2 * features, width, c.max_steps, c.dropout, c.temporal_position
        )
        self.region_embedding = RegionEmbedding(c.region_bins**2 * features, width, c.dropout)
        self.layers = nn.ModuleList(
            TangledBlock(width, c.num_heads, c.ffn_size, c.dropout, c.tnt_mode) for _ in range(c.num_layers)
        )
        self.overview_norm = nn.LayerNorm(6 * features, eps=LAYER_NORM_EPSILON)
        self.pool_entity = Pooler((1 + NUM_TOKEN_TYPES) * width, width)
        self.pool_description = Pooler(width + 6 * features, width)
        self.pool_region = Pooler(width, width)
        self.mlm_transform = Transform(width, width)
        self.mlm_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.mdc = ClassHead(width, width, c.num_classes)
        self.moc = ClassHead(width, width, c.num_region_classes)
        self.cmm = nn.Linear(width, 2)
        clip = 4 * width + 6 * features
        self.organ = ClassHead(clip, width, c.num_organs)
        self.condition = ClassHead(clip, width, c.num_conditions)
        self.findings = ClassHead(clip, width, c.num_findings)
        self.match = MatchHead(width)
        self.reset_parameters()
        self.to(getattr(torch, c.dtype))

    def reset_parameters(self) -> None:
        """Draws weights as the JAX model does, and takes its positions."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Linear, nn.Conv3d)):
                fan_in = module.weight[0].numel()
                gain = 2.0 if isinstance(module, nn.Conv3d) and module.stride == (1, 1, 1) else 1.0
                std = (gain / fan_in) ** 0.5 / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks = (m for m in self.modules() if isinstance(m, (TangledBlock, FeedForward)))
        for linear in (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02 * (768 / self.config.hidden_size) ** 0.5)
        nn.init.normal_(self.cmm.weight, std=0.02)
        for positions in (self.entity_embedding.position.weight, self.description_embedding.position):
            if positions is not None:
                with torch.no_grad():
                    positions.copy_(sinusoids(*positions.shape))

    def encode(
        self,
        frames: Tensor,
        frame_mask: Tensor,
        boxes: Tensor,
        box_frames: Tensor,
        region_mask: Tensor,
        token_ids: Tensor,
        token_types: Tensor,
        token_mask: Tensor,
        description_zeroed: Tensor | None = None,
        region_zeroed: Tensor | None = None,
        need_weights: bool = False,
    ) -> Encoded:
        """Runs the three streams through the fusion encoder.

        Args:
          frames: uint8 [B, T, H, W]; frame_mask: bool [B, T], valid frames first.
          boxes: float [B, R, 4] (ymin, xmin, ymax, xmax) in [0, 1]; box_frames: int [B, R], their frames.
          region_mask: bool [B, R].
          token_ids, token_types: int [B, L]; token_mask: bool [B, L].
          description_zeroed: bool [B, A], description features to blank; region_zeroed: bool [B, R].
          need_weights: fill `Encoded.cross_weights`.

        Returns:
          The streams, their pooled vectors and the 3-D CNN's overview.
        """
        c, dtype = self.config, self.mlm_bias.dtype
        patch = c.stem_patch[0]
        step_mask = frame_mask.unflatten(1, (-1, patch)).any(-1)  # [B, A]
        pixels = (frames.to(dtype) / 255.0 - 0.2) / 0.2 * frame_mask[:, :, None, None]
        features = self.video(pixels, step_mask)  # [B, C, A, H', W']

        description = torch.cat([features.mean((3, 4)), features.amax((3, 4))], dim=1).transpose(1, 2)
        if description_zeroed is not None:
            description = description.masked_fill(description_zeroed[..., None], 0.0)

        boxes = boxes.to(dtype)
        last_step = (step_mask.sum(-1, keepdim=True) - 1).clamp(min=0).to(dtype)
        steps = torch.minimum(((box_frames.to(dtype) + 0.5) / patch - 0.5).clamp(min=0.0), last_step)
        region = pool_regions(features, boxes, steps, c.region_bins)
        if region_zeroed is not None:
            region = region.masked_fill(region_zeroed[..., None], 0.0)
        times = box_frames.to(dtype) / frame_mask.sum(-1, keepdim=True).clamp(min=1)

        streams = {
            "entity": self.entity_embedding(token_ids, token_types),
            "description": self.description_embedding(description),
            "region": self.region_embedding(region, boxes, times),
        }
        named = mean_by_type(streams["entity"], token_types, token_mask)
        masks = {"entity": token_mask, "description": step_mask, "region": region_mask}
        embedded = streams
        cross_weights: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            streams, cross_weights = layer(streams, masks, need_weights and i == c.num_layers - 1)
        overview = self.overview_norm(summarize_map(features, step_mask))
        words = [streams["entity"][:, 0], max_valid(streams["entity"], token_mask), named]
        appearance = torch.cat([mean_valid(streams["description"], step_mask), overview], dim=-1)
        pooled = {
            "entity": self.pool_entity(torch.cat(words, dim=-1)),
            "description": self.pool_description(appearance),
            "region": self.pool_region(mean_valid(streams["region"], region_mask)),
        }
        fused = pooled["entity"] * pooled["description"] + pooled["entity"] * pooled["region"]
        return Encoded(streams, masks, pooled, fused, overview, embedded, cross_weights)

    def encode_batch(
        self, batch: Mapping[str, Tensor], corrupted: bool = False, need_weights: bool = False
    ) -> Encoded:
        """`encode` of a batch of the input pipeline.

        Args:
          batch: tensors by name.
          corrupted: blank what `description_zeroed` and `region_zeroed` say, as pre-training does.
          need_weights: as in `encode`.

        Returns:
          As `encode`.
        """
        return self.encode(
            frames=batch["frames"],
            frame_mask=batch["frame_mask"],
            boxes=batch["boxes"],
            box_frames=batch["box_frames"],
            region_mask=batch["region_mask"],
            token_ids=batch["token_ids"],
            token_types=batch["token_types"],
            token_mask=batch["token_mask"],
            description_zeroed=batch["description_zeroed"] if corrupted else None,
            region_zeroed=batch["region_zeroed"] if corrupted else None,
            need_weights=need_weights,
        )

    def pretrain(self, encoded: Encoded, mlm_positions: Tensor) -> dict[str, Tensor]:
        """Logits of the pre-training tasks (PAPER section 4).

        Args:
          encoded: from `encode`.
          mlm_positions: int [B, M], the report positions to decode.

        Returns:
          `mlm` [B, M, V], `mdc` [B, A, num_classes], `moc` [B, R, num_region_classes], `cmm` [B, 2] and `summary`
          [B, 2, num_classes].
        """
        entity = encoded.streams["entity"]
        positions = mlm_positions.long()[..., None].expand(-1, -1, entity.shape[-1])
        tokens = self.mlm_transform(entity.gather(1, positions))
        both = torch.stack([encoded.pooled["description"], encoded.pooled["entity"]], dim=1)
        return {
            "mlm": F.linear(tokens, self.entity_embedding.word.weight, self.mlm_bias),
            "mdc": self.mdc(encoded.streams["description"]),
            "moc": self.moc(encoded.streams["region"]),
            "cmm": self.cmm(encoded.fused),
            "summary": self.mdc(both),
        }

    def annotate(self, encoded: Encoded, entity_names: Tensor, entity_names_mask: Tensor) -> dict[str, Any]:
        """Logits of the annotation (PAPER section 6).

        Args:
          encoded: from `encode`; the entity stream holds no report here.
          entity_names: int [E, P], word pieces of the candidate entities' names; entity_names_mask: bool [E, P].

        Returns:
          `organ` [B, O], `condition` [B, C], `findings` [B, F] and `match`, a dict with `frame` [B, E, A], `region`
          [B, E, R] and `clip` [B, E].
        """
        names = mean_valid(self.entity_embedding.word(entity_names), entity_names_mask)
        views = [encoded.pooled["description"], encoded.pooled["region"], encoded.overview]
        views += [max_valid(encoded.streams[s], encoded.masks[s]) for s in ("description", "region")]
        clip = torch.cat(views, dim=-1)
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
