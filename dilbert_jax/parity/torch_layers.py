"""The layers of DILBERT in PyTorch, and the functions between them.

Axis letters as in `dilbert_jax.models`, but PyTorch's layout: feature maps are [B, C, A, H, W].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dilbert_jax.parity import MISSING_EXTRA

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

LAYER_NORM_EPSILON = 1e-12
GROUP_NORM_EPSILON = 1e-6  # Flax's default
STREAMS = ("entity", "description", "region")
NUM_TOKEN_TYPES = 6


class MaskedGroupNorm(nn.Module):
    """Group normalization over the valid steps of a clip, eight groups of channels."""

    def __init__(self, num_channels: int, num_groups: int = 8) -> None:
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"{num_channels} channels are not divisible into {num_groups} groups")
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x [B, C, A, H, W]; valid bool [B, 1, A, 1, 1]."""
        groups = x.unflatten(1, (self.num_groups, -1))  # [B, G, C/G, A, H, W]
        weight = valid[:, None].to(x.dtype)
        axes = (2, 3, 4, 5)
        cells = groups.shape[2] * groups.shape[4] * groups.shape[5]
        count = (weight.sum(axes, keepdim=True) * cells).clamp(min=1)
        mean = (groups * weight).sum(axes, keepdim=True) / count
        centred = groups - mean
        variance = (centred.square() * weight).sum(axes, keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + GROUP_NORM_EPSILON)).flatten(1, 2)
        return normed * self.weight[:, None, None, None] + self.bias[:, None, None, None]


class ResidualBlock3D(nn.Module):
    """x + GELU(GroupNorm(convolution(x)))."""

    def __init__(self, channels: int, kernel_size: tuple[int, int, int]) -> None:
        super().__init__()
        taps, rows, columns = kernel_size
        padding = (taps // 2, rows // 2, columns // 2)
        self.conv = nn.Conv3d(channels, channels, kernel_size, padding=padding)
        self.norm = MaskedGroupNorm(channels)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.conv(x * valid), valid), approximate="tanh")


class Stage(nn.Module):
    """Residual blocks of one width; every stage but the first merges 2x2 cells before them."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, first: bool) -> None:
        super().__init__()
        self.first = first
        if not first:
            self.merge = nn.Conv3d(in_channels, channels, (1, 2, 2), stride=(1, 2, 2))
            self.norm = MaskedGroupNorm(channels)
        kernel_size = (1, 3, 3) if first else (3, 3, 3)
        self.blocks = nn.ModuleList(ResidualBlock3D(channels, kernel_size) for _ in range(num_blocks))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        if not self.first:
            x = F.gelu(self.norm(self.merge(x), valid), approximate="tanh")
        for block in self.blocks:
            x = block(x, valid)
        return x


class VideoEncoder(nn.Module):
    """The small 3-D CNN (decision D1)."""

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], stem_patch: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.cell = (stem_patch[0], *(p * 2 ** (len(channels) - 1) for p in stem_patch[1:]))
        self.stem = nn.Conv3d(1, channels[0], stem_patch, stride=stem_patch)
        self.stages = nn.ModuleList(
            Stage(channels[max(i - 1, 0)], width, blocks[i], first=i == 0) for i, width in enumerate(channels)
        )

    def forward(self, frames: Tensor, step_mask: Tensor) -> Tensor:
        """frames [B, T, H, W], step_mask bool [B, A] -> [B, C, A, H', W'], zero at padded steps."""
        if any(size % cell for size, cell in zip(frames.shape[1:], self.cell, strict=True)):
            raise ValueError(f"clip of {tuple(frames.shape[1:])} is not divisible by {self.cell}")
        valid = step_mask[:, None, :, None, None]
        x = F.gelu(self.stem(frames[:, None]), approximate="tanh")
        for stage in self.stages:
            x = stage(x, valid)
        return x * valid


def sinusoids(length: int, size: int) -> Tensor:
    """Where learned positions [L, D] start: sines and cosines of wavelengths from 2 pi to 2 pi L, deviation 0.03."""
    pairs = (size + 1) // 2
    angles = torch.arange(length)[:, None] * float(length) ** -(torch.arange(pairs) / pairs)
    return 0.03 * 2**0.5 * torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :size]


class EntityEmbedding(nn.Module):
    """Word + position + entity-type embedding of report tokens, LN, dropout."""

    def __init__(self, vocab_size: int, hidden_size: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_size)
        self.position = nn.Embedding(max_tokens, hidden_size)
        self.token_type = nn.Embedding(NUM_TOKEN_TYPES, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, token_ids: Tensor, token_types: Tensor) -> Tensor:
        """token_ids, token_types: int [B, L] -> [B, L, D]."""
        x = self.word(token_ids) + self.token_type(token_types) + self.position.weight[: token_ids.shape[1]]
        return self.dropout(self.norm(x))


class DescriptionEmbedding(nn.Module):
    """LN(Linear(feature) + temporal position) of the 3-D CNN's temporal steps (D3)."""

    def __init__(
        self, feature_size: int, hidden_size: int, max_steps: int, dropout: float, position: bool
    ) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.feature = nn.Linear(feature_size, hidden_size)
        self.position = nn.Parameter(torch.empty(max_steps, hidden_size)) if position else None
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, A, C] -> [B, A, D]."""
        steps = features.shape[1]
        if steps > self.max_steps:
            raise ValueError(
                f"{steps} description tokens, but the model holds positions for {self.max_steps}"
            )
        x = self.feature(features)
        if self.position is not None:
            x = x + self.position[:steps]
        return self.dropout(self.norm(x))


class RegionEmbedding(nn.Module):
    """LN(Linear(feature) + Linear(geometry)) of boxes (D2)."""

    def __init__(self, feature_size: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.feature = nn.Linear(feature_size, hidden_size)
        self.geometry = nn.Linear(6, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, boxes: Tensor, times: Tensor) -> Tensor:
        """features [B, R, F], boxes [B, R, 4], times [B, R] -> [B, R, D]."""
        x = self.feature(features) + self.geometry(region_geometry(boxes, times))
        return self.dropout(self.norm(x))


class FeedForward(nn.Module):
    """Attention output, residual, LN, then Linear-GELU(erf)-Linear, residual, LN."""

    def __init__(self, hidden_size: int, ffn_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.intermediate = nn.Linear(hidden_size, ffn_size)
        self.output = nn.Linear(ffn_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, residual: Tensor, context: Tensor) -> Tensor:
        """residual, context [B, S, D] -> [B, S, D]."""
        x = self.attention_norm(residual + self.dropout(self.attention_output(context)))
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class TangledBlock(nn.Module):
    """One fusion layer, equations (1) and (2); see `dilbert_jax.models.tangled.TangledBlock`."""

    def __init__(self, hidden_size: int, num_heads: int, ffn_size: int, dropout: float, mode: str) -> None:
        super().__init__()
        self.num_heads, self.stack = num_heads, mode == "stack"

        def linears(names: Sequence[str]) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(hidden_size, hidden_size) for name in names})

        self.query, self.key, self.value = linears(STREAMS), linears(STREAMS), linears(STREAMS)
        crossed = ("entity", "region")
        if self.stack:
            self.cross_query = linears(crossed)
        self.cross_key, self.cross_value = linears(crossed), linears(crossed)
        self.feed_forward = nn.ModuleDict({s: FeedForward(hidden_size, ffn_size, dropout) for s in STREAMS})

    def forward(
        self, hidden: Mapping[str, Tensor], masks: Mapping[str, Tensor], need_weights: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fuses the streams.

        Args:
          hidden: per stream [B, S, D].
          masks: per stream bool [B, S], True = valid.
          need_weights: return the two cross-attention maps too.

        Returns:
          The streams' new hidden states, and maps [B, N, A, S] (empty unless asked for).
        """

        def heads(linear: nn.Module, x: Tensor) -> Tensor:
            return linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, S, K]

        query = {s: heads(self.query[s], hidden[s]) for s in STREAMS}
        key = {s: heads(self.key[s], hidden[s]) for s in STREAMS}
        value = {s: heads(self.value[s], hidden[s]) for s in STREAMS}

        cross_key, cross_value, cross_weights = {}, {}, {}
        for stream in ("entity", "region"):
            cross_query = query["description"]
            if self.stack:
                cross_query = heads(self.cross_query[stream], hidden["description"])
            if need_weights:
                cross_weights[stream] = attention_weights(cross_query, key[stream], masks[stream])
            fused = attend(cross_query, key[stream], value[stream], masks[stream])
            cross_key[stream] = heads(self.cross_key[stream], fused)
            cross_value[stream] = heads(self.cross_value[stream], fused)

        sources = {"entity": ("region",), "region": ("entity",), "description": ("entity", "region")}
        out = {}
        for stream in STREAMS:
            keys, values, valid = key[stream], value[stream], masks[stream]
            for other in sources[stream]:
                if self.stack:
                    keys = torch.cat([keys, cross_key[other]], dim=2)
                    values = torch.cat([values, cross_value[other]], dim=2)
                    valid = torch.cat([valid, masks["description"]], dim=1)
                elif stream != "description":
                    keys = keys + resize_nearest(cross_key[other], keys.shape[2])
                    values = values + resize_nearest(cross_value[other], keys.shape[2])
            context = attend(query[stream], keys, values, valid)
            out[stream] = self.feed_forward[stream](hidden[stream], context)
        return out, cross_weights


class Pooler(nn.Module):
    """LN(Linear(x)) of one vector per clip."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x))


class Transform(nn.Module):
    """LN(GELU(Linear(x))): what BERT puts before its decoder."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class ClassHead(nn.Module):
    """Transform, then logits over `num_classes`; without classes there are no parameters."""

    def __init__(self, in_features: int, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        if num_classes:
            self.transform = Transform(in_features, hidden_size)
            self.logits = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if not self.num_classes:
            return x.new_zeros((*x.shape[:-1], 0))
        return self.logits(self.transform(x))


class MatchHead(nn.Module):
    """Scores every candidate entity against every region and every temporal step of a clip."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.frame_key = nn.Linear(hidden_size, hidden_size)
        self.region_key = nn.Linear(hidden_size, hidden_size)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self,
        names: Tensor,
        description: Tensor,
        region: Tensor,
        description_mask: Tensor,
        region_mask: Tensor,
    ) -> dict[str, Tensor]:
        """names [E, D], description [B, A, D], region [B, R, D], masks -> `frame`, `region`, `clip` [B, E, ...]."""
        query = self.query(self.query_norm(names))
        scale = query.shape[-1] ** -0.5
        frame = torch.einsum("ed,bsd->bes", query, self.frame_key(description)) * scale + self.bias
        by_region = torch.einsum("ed,bsd->bes", query, self.region_key(region)) * scale + self.bias
        mask = torch.cat([description_mask, region_mask], dim=-1)[:, None]
        places = torch.cat([frame, by_region], dim=-1).masked_fill(~mask, -torch.inf)
        count = mask.sum(-1).clamp(min=1).to(places.dtype)
        return {"frame": frame, "region": by_region, "clip": places.logsumexp(-1) - count.log()}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention; a row without any valid key gets zeros.

    Args:
      query: [B, N, Q, K]; key, value: [B, N, S, K].
      mask: bool [B, S], True = valid key.

    Returns:
      [B, Q, N * K].
    """
    some = mask.any(-1)[:, None, None, None]
    # What a row attends to without a valid key differs between PyTorch's kernels: give it all, then take nothing.
    allowed = mask[:, None, None, :] | ~some
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return (context * some).transpose(1, 2).flatten(2)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """The weights of `attend`, [B, N, Q, S], which the fused kernel does not give."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    valid = mask[:, None, None, :]
    scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~valid, 0.0)


def resize_nearest(x: Tensor, length: int) -> Tensor:
    """Position m of the result [B, N, length, K] is position floor(m S / length) of x [B, N, S, K]."""
    return x[:, :, torch.arange(length, device=x.device) * x.shape[2] // length]


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Share of the interval [low, high) that lies in each of `cells` equal cells of [0, 1]: [..., cells]."""
    edges = torch.arange(cells + 1, dtype=low.dtype, device=low.device) / cells
    inside = torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])
    return inside.clamp(min=0.0) / (high - low).clamp(min=1e-6)[..., None]


def pool_regions(features: Tensor, boxes: Tensor, steps: Tensor, bins: int = 2) -> Tensor:
    """Pools each box into bins x bins averages, weighting cells by their exact overlap with the bin.

    Args:
      features: [B, C, A, H, W].
      boxes: [B, R, 4] (ymin, xmin, ymax, xmax) in [0, 1].
      steps: [B, R], the (fractional) temporal step of each box.
      bins: bins per side.

    Returns:
      [B, R, bins * bins * C].
    """
    num_steps, height, width = features.shape[2:]
    ymin, xmin, ymax, xmax = boxes.unbind(-1)
    cut = torch.arange(bins + 1, dtype=boxes.dtype, device=boxes.device) / bins
    ys = ymin[..., None] + (ymax - ymin)[..., None] * cut  # [B, R, bins + 1]
    xs = xmin[..., None] + (xmax - xmin)[..., None] * cut
    weight_y = _overlap(ys[..., :-1], ys[..., 1:], height)  # [B, R, bins, H]
    weight_x = _overlap(xs[..., :-1], xs[..., 1:], width)  # [B, R, bins, W]
    distance = (steps[..., None] - torch.arange(num_steps, device=steps.device)).abs()
    weight_t = (1.0 - distance).clamp(min=0.0)  # [B, R, A]
    pooled = torch.einsum("bra,bcahw->brchw", weight_t, features)
    pooled = torch.einsum("bryh,brchw->brycw", weight_y, pooled)
    pooled = torch.einsum("brxw,brycw->bryxc", weight_x, pooled)
    return pooled.flatten(2)


def region_geometry(boxes: Tensor, times: Tensor) -> Tensor:
    """Geometry vector of each box (D2): (x1/W, y1/H, x2/W, y2/H, area ratio, t/T): [B, R, 6]."""
    ymin, xmin, ymax, xmax = boxes.unbind(-1)
    area = (ymax - ymin).clamp(min=0.0) * (xmax - xmin).clamp(min=0.0)
    return torch.stack([xmin, ymin, xmax, ymax, area, times], dim=-1)


def mean_valid(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the second to last axis of [..., S, D] where mask [..., S]; zero when nothing is valid."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(-2) / weight.sum(-2).clamp(min=1.0)


def mean_by_type(x: Tensor, token_types: Tensor, mask: Tensor) -> Tensor:
    """Means of x [B, L, D] over the valid tokens of each entity type, side by side; zero for none."""
    kinds = torch.arange(1, NUM_TOKEN_TYPES, device=x.device)[:, None]
    of_type = (token_types[:, None, :] == kinds) & mask[:, None, :]  # [B, types, L]
    return mean_valid(x[:, None], of_type).flatten(1)


def max_valid(x: Tensor, mask: Tensor) -> Tensor:
    """Maximum over the second to last axis of [..., S, D] where mask [..., S]; zero when nothing is valid."""
    largest = x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(-2)
    return largest.masked_fill(~mask.any(-1)[..., None], 0.0)


def summarize_map(features: Tensor, step_mask: Tensor) -> Tensor:
    """Mean and maximum over the whole map [B, C, A, H, W] and the means of its four quadrants: [B, 6 * C]."""
    height, width = features.shape[3:]
    steps = step_mask.sum(-1).clamp(min=1).to(features.dtype)[:, None, None, None]
    mean = features.sum(2) / steps  # [B, C, H, W]
    rows = slice(0, -(-height // 2)), slice(height // 2, height)
    columns = slice(0, -(-width // 2)), slice(width // 2, width)
    quadrants = [mean[:, :, r, c].mean((2, 3)) for r in rows for c in columns]
    valid = step_mask[:, None, :, None, None]
    largest = features.masked_fill(~valid, torch.finfo(features.dtype).min).amax((2, 3, 4))
    largest = largest.masked_fill(~step_mask.any(-1)[:, None], 0.0)
    return torch.cat([mean.mean((2, 3)), largest, *quadrants], dim=-1)
