"""The table of parameter names and layouts, Flax against PyTorch, and the conversion of whole networks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from dilbert_jax.models.network import NetworkConfig

# Flax module, PyTorch module, kind. {layer}, {stage}, {later} (a stage after the first), {block} count; {stream}
# is every stream, {crossed} one that the description looks at.
MODULES = (
    ("video/stem", "video.stem", "stem"),
    ("video/stage{later}_merge", "video.stages.{later}.merge", "merge"),
    ("video/stage{later}_norm/norm", "video.stages.{later}.norm", "norm"),
    ("video/stage{stage}_block{block}/conv", "video.stages.{stage}.blocks.{block}.conv", "conv"),
    ("video/stage{stage}_block{block}/norm/norm", "video.stages.{stage}.blocks.{block}.norm", "norm"),
    ("entity_embedding/word", "entity_embedding.word", "embedding"),
    ("entity_embedding/position", "entity_embedding.position", "embedding"),
    ("entity_embedding/token_type", "entity_embedding.token_type", "embedding"),
    ("entity_embedding/norm", "entity_embedding.norm", "norm"),
    ("description_embedding/feature", "description_embedding.feature", "linear"),
    ("description_embedding/position", "description_embedding.position", "parameter"),
    ("description_embedding/norm", "description_embedding.norm", "norm"),
    ("region_embedding/feature", "region_embedding.feature", "linear"),
    ("region_embedding/geometry", "region_embedding.geometry", "linear"),
    ("region_embedding/norm", "region_embedding.norm", "norm"),
    ("layers_{layer}/{stream}_query/dense", "layers.{layer}.query.{stream}", "linear"),
    ("layers_{layer}/{stream}_key/dense", "layers.{layer}.key.{stream}", "linear"),
    ("layers_{layer}/{stream}_value/dense", "layers.{layer}.value.{stream}", "linear"),
    ("layers_{layer}/cross_{crossed}_query/dense", "layers.{layer}.cross_query.{crossed}", "linear"),
    ("layers_{layer}/cross_{crossed}_key/dense", "layers.{layer}.cross_key.{crossed}", "linear"),
    ("layers_{layer}/cross_{crossed}_value/dense", "layers.{layer}.cross_value.{crossed}", "linear"),
    (
        "layers_{layer}/{stream}_ffn/attention_output",
        "layers.{layer}.feed_forward.{stream}.attention_output",
        "linear",
    ),
    (
        "layers_{layer}/{stream}_ffn/attention_norm",
        "layers.{layer}.feed_forward.{stream}.attention_norm",
        "norm",
    ),
    (
        "layers_{layer}/{stream}_ffn/intermediate",
        "layers.{layer}.feed_forward.{stream}.intermediate",
        "linear",
    ),
    ("layers_{layer}/{stream}_ffn/output", "layers.{layer}.feed_forward.{stream}.output", "linear"),
    ("layers_{layer}/{stream}_ffn/output_norm", "layers.{layer}.feed_forward.{stream}.output_norm", "norm"),
    ("overview_norm", "overview_norm", "norm"),
    ("pool_entity/dense", "pool_entity.dense", "linear"),
    ("pool_entity/norm", "pool_entity.norm", "norm"),
    ("pool_description/dense", "pool_description.dense", "linear"),
    ("pool_description/norm", "pool_description.norm", "norm"),
    ("pool_region/dense", "pool_region.dense", "linear"),
    ("pool_region/norm", "pool_region.norm", "norm"),
    ("mlm_transform/dense", "mlm_transform.dense", "linear"),
    ("mlm_transform/norm", "mlm_transform.norm", "norm"),
    ("mlm_bias", "mlm_bias", "parameter"),
    ("mdc/transform/dense", "mdc.transform.dense", "linear"),
    ("mdc/transform/norm", "mdc.transform.norm", "norm"),
    ("mdc/logits", "mdc.logits", "linear"),
    ("moc/transform/dense", "moc.transform.dense", "linear"),
    ("moc/transform/norm", "moc.transform.norm", "norm"),
    ("moc/logits", "moc.logits", "linear"),
    ("cmm", "cmm", "linear"),
    ("organ/transform/dense", "organ.transform.dense", "linear"),
    ("organ/transform/norm", "organ.transform.norm", "norm"),
    ("organ/logits", "organ.logits", "linear"),
    ("condition/transform/dense", "condition.transform.dense", "linear"),
    ("condition/transform/norm", "condition.transform.norm", "norm"),
    ("condition/logits", "condition.logits", "linear"),
    ("findings/transform/dense", "findings.transform.dense", "linear"),
    ("findings/transform/norm", "findings.transform.norm", "norm"),
    ("findings/logits", "findings.logits", "linear"),
    ("match/query_norm", "match.query_norm", "norm"),
    ("match/query", "match.query", "linear"),
    ("match/frame_key", "match.frame_key", "linear"),
    ("match/region_key", "match.region_key", "linear"),
    ("match/bias", "match.bias", "parameter"),
)
# Kind of module -> (Flax leaf, PyTorch leaf, layout) of each of its parameters.
LEAVES = {
    "linear": (("kernel", "weight", "transposed"), ("bias", "bias", "same")),
    "conv": (("kernel", "weight", "conv"), ("bias", "bias", "same")),
    "stem": (("kernel", "weight", "stem"), ("bias", "bias", "same")),
    "merge": (("kernel", "weight", "merge"), ("bias", "bias", "same")),
    "norm": (("scale", "weight", "same"), ("bias", "bias", "same")),
    "embedding": (("embedding", "weight", "same"),),
    "parameter": (("", "", "same"),),
}
# Layout -> what becomes of the axes, for readers.
LAYOUTS = {
    "same": "unchanged",
    "transposed": "[in, out] -> [out, in]",
    "conv": "[kT, kH, kW, C, O] -> [O, C, kT, kH, kW]",
    "stem": "[pT * pH * pW * C, O] -> [O, C, pT, pH, pW], p = stem_patch",
    "merge": "[1 * 2 * 2 * C, O] -> [O, C, 1, 2, 2]",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table: `flax` path (with /), `torch` name (with .), `layout` (a key of `LAYOUTS`)."""

    flax: str
    torch: str
    layout: str


def parameter_table(config: NetworkConfig) -> list[Parameter]:
    """Every parameter of a network.

    Args:
      config: the architecture: how many layers, stages and blocks, and which optional parts it has.

    Returns:
      Rows with unique names on both sides.
    """
    absent = [
        *(["description_embedding/position"] if not config.temporal_position else []),
        *(["layers_{layer}/cross_{crossed}_query/dense"] if config.tnt_mode != "stack" else []),
    ]
    sizes = {
        "mdc": config.num_classes,
        "moc": config.num_region_classes,
        "organ": config.num_organs,
        "condition": config.num_conditions,
        "findings": config.num_findings,
    }
    stages = range(len(config.channels))
    rows = []
    for flax, torch, kind in MODULES:
        if flax in absent or sizes.get(flax.split("/")[0]) == 0:
            continue
        ranges: dict[str, Any] = {
            "layer": range(config.num_layers),
            "later": stages[1:],
            "stream": ("entity", "description", "region"),
            "crossed": ("entity", "region"),
        }
        used = [name for name in ranges if f"{{{name}}}" in flax]
        choices = [dict(zip(used, c, strict=True)) for c in itertools.product(*(ranges[n] for n in used))]
        if "{block}" in flax:
            choices = [{"stage": s, "block": b} for s in stages for b in range(config.blocks[s])]
        for choice in choices:
            for flax_leaf, torch_leaf, layout in LEAVES[kind]:
                rows.append(
                    Parameter(
                        f"{flax.format(**choice)}/{flax_leaf}".rstrip("/"),
                        f"{torch.format(**choice)}.{torch_leaf}".rstrip("."),
                        layout,
                    )
                )
    return rows


def to_torch(params: Mapping[str, Any], config: NetworkConfig) -> dict[str, np.ndarray]:
    """Converts a network's Flax parameters.

    Args:
      params: nested dict of arrays.
      config: the network's architecture.

    Returns:
      Contiguous arrays by PyTorch name, in the dtype that they have.

    Raises:
      ValueError: leaves that the table does not know, that are missing, or that have other dimensions; all are listed.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    table = parameter_table(config)
    problems = _set_differences({row.flax for row in table}, set(leaves))
    for row in table:
        if row.flax in leaves:
            shape = np.shape(leaves[row.flax])
            try:
                _torch_shape(shape, row.layout, config)
            except ValueError:
                problems.append(f"{row.flax} has shape {shape}, which is not {LAYOUTS[row.layout]}")
    _raise_if_any(problems, "Flax parameters")
    return {row.torch: _forward(np.asarray(leaves[row.flax]), row.layout, config) for row in table}


def from_torch(
    tensors: Mapping[str, np.ndarray], config: NetworkConfig, like: Mapping[str, Any]
) -> dict[str, Any]:
    """Converts PyTorch tensors to a network's Flax parameters.

    Args:
      tensors: arrays by PyTorch name, such as a `state_dict`.
      config: the network's architecture.
      like: nested dict of the wanted leaves (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      Nested dict of arrays with the shapes and dtypes of `like`.

    Raises:
      ValueError: tensors that are unknown, missing, or of another shape or dtype; all are listed by name.
    """
    leaves = traverse_util.flatten_dict(like, sep="/")
    table = parameter_table(config)
    _raise_if_any(_set_differences({row.flax for row in table}, set(leaves)), "Flax parameters")
    problems = _set_differences({row.torch for row in table}, set(tensors))
    out = {}
    for row in table:
        if row.torch not in tensors:
            continue
        wanted, tensor = leaves[row.flax], np.asarray(tensors[row.torch])
        shape = _torch_shape(wanted.shape, row.layout, config)
        if tensor.shape != shape:
            problems.append(f"{row.torch} has shape {tensor.shape}, not {shape}")
        elif tensor.dtype != wanted.dtype:
            problems.append(f"{row.torch} is {tensor.dtype}, not {wanted.dtype}")
        else:
            out[row.flax] = _backward(tensor, row.layout, wanted.shape)
    _raise_if_any(problems, "tensors")
    return traverse_util.unflatten_dict(out, sep="/")


def _set_differences(wanted: set[str], found: set[str]) -> list[str]:
    return [f"{name} is missing" for name in sorted(wanted - found)] + [
        f"{name} is unknown" for name in sorted(found - wanted)
    ]


def _raise_if_any(problems: list[str], what: str) -> None:
    if problems:
        raise ValueError(f"the {what} do not fit the network: {'; '.join(problems)}")


def _split(shape: tuple[int, ...], layout: str, config: NetworkConfig) -> tuple[int, ...]:
    """A kernel's shape as [kT, kH, kW, C, O]."""
    if layout == "conv":
        taps, rows, columns, channels, features = shape
        return taps, rows, columns, channels, features
    patch = config.stem_patch if layout == "stem" else (1, 2, 2)
    inputs, features = shape
    channels, rest = divmod(inputs, int(np.prod(patch)))
    if rest:
        raise ValueError(f"{inputs} inputs are no patches of {patch}")
    return *patch, channels, features


def _torch_shape(shape: tuple[int, ...], layout: str, config: NetworkConfig) -> tuple[int, ...]:
    if layout == "same":
        return tuple(shape)
    if layout == "transposed":
        inputs, outputs = shape
        return outputs, inputs
    *kernel, channels, features = _split(shape, layout, config)
    return features, channels, *kernel


def _forward(leaf: np.ndarray, layout: str, config: NetworkConfig) -> np.ndarray:
    """Flax to PyTorch."""
    if layout == "transposed":
        leaf = leaf.T
    elif layout != "same":
        leaf = leaf.reshape(_split(leaf.shape, layout, config)).transpose(4, 3, 0, 1, 2)
    return np.ascontiguousarray(leaf).reshape(leaf.shape)  # a scalar would become [1]


def _backward(tensor: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch to Flax."""
    if layout == "transposed":
        tensor = tensor.T
    elif layout != "same":
        tensor = tensor.transpose(2, 3, 4, 1, 0)
    return np.ascontiguousarray(tensor).reshape(shape)
