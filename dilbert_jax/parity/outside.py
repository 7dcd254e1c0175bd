"""Outside weights for one part of a network: a Hugging Face BERT for the words, PyTorch's R3D-18 for the frames.

Both come as safetensors; a pickle (.bin, .pt, .pth) can run code when it is loaded and is refused.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# Flax path -> name in the file. {layer} counts blocks; the embeddings of positions and token types are cut to size.
BERT_MODULES = {
    "entity_embedding/norm": "embeddings.LayerNorm",
    "layers_{layer}/entity_query/dense": "encoder.layer.{layer}.attention.self.query",
    "layers_{layer}/entity_key/dense": "encoder.layer.{layer}.attention.self.key",
    "layers_{layer}/entity_value/dense": "encoder.layer.{layer}.attention.self.value",
    "layers_{layer}/entity_ffn/attention_output": "encoder.layer.{layer}.attention.output.dense",
    "layers_{layer}/entity_ffn/attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "layers_{layer}/entity_ffn/intermediate": "encoder.layer.{layer}.intermediate.dense",
    "layers_{layer}/entity_ffn/output": "encoder.layer.{layer}.output.dense",
    "layers_{layer}/entity_ffn/output_norm": "encoder.layer.{layer}.output.LayerNorm",
}
BERT_EMBEDDINGS = {
    "entity_embedding/word/embedding": "embeddings.word_embeddings.weight",
    "entity_embedding/position/embedding": "embeddings.position_embeddings.weight",
    "entity_embedding/token_type/embedding": "embeddings.token_type_embeddings.weight",
}
# The language-modelling head, which a file without its task heads does not have.
BERT_HEAD = {
    "mlm_transform/dense": "cls.predictions.transform.dense",
    "mlm_transform/norm": "cls.predictions.transform.LayerNorm",
    "mlm_bias": "cls.predictions.bias",
}
R3D_NORM = {
    "scale": "weight",
    "bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}


def with_bert(params: Mapping[str, Any], folder: pathlib.Path, num_heads: int) -> dict[str, Any]:
    """Starts the entity stream from a BERT.

    Word embeddings, positions (the first of BERT's), the entity stream of every block (from BERT's first blocks on)
    and, where the file has it, the language-modelling head. All entity types start from BERT's first token type, as
    BERT saw all words of one sentence.

    Args:
      params: parameters of a network.
      folder: holds config.json and model.safetensors; the run's vocabulary must be this folder's vocab.txt
        (`data.vocab_file`).
      num_heads: of the network; parameters do not show it.

    Returns:
      New parameters; what BERT does not have is as it was.

    Raises:
      ValueError: the folder is no such BERT, or names tensors that are missing or have other shapes, all of them.
    """
    described = _read_json(folder / "config.json")
    tensors = _read(folder / "model.safetensors")
    # BertForPreTraining puts "bert." before the encoder's names, BertModel does not.
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    if "model_type" in described and described["model_type"] != "bert":
        raise ValueError(
            f"{folder / 'config.json'}: field 'model_type' is {described['model_type']!r}, not 'bert'"
        )
    activation = described.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"{folder / 'config.json'}: field 'hidden_act' is {activation!r}; this network uses 'gelu'"
        )
    leaves = dict(traverse_util.flatten_dict(params, sep="/"))
    heads, problems = described.get("num_attention_heads", num_heads), []
    if heads != num_heads:
        problems.append(f"num_attention_heads is {heads}, model.num_heads is {num_heads}")
    num_layers = sum(path.endswith("/entity_query/dense/kernel") for path in leaves)
    names: dict[str, str] = {}
    for module, theirs in BERT_MODULES.items():
        for layer in range(num_layers) if "{layer}" in module else (0,):
            names |= _module(module.format(layer=layer), theirs.format(layer=layer), leaves)
    has_head = any(name.startswith("cls.predictions.transform") for name in tensors)
    for module, theirs in BERT_HEAD.items() if has_head else ():
        names |= _module(module, theirs, leaves)
    new = {path: (name, _layout(tensors[name], path)) for path, name in names.items() if name in tensors}
    problems += [f"{name} is missing" for name in names.values() if name not in tensors]
    for path, name in BERT_EMBEDDINGS.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
            continue
        table, wanted = tensors[name], leaves[path].shape
        if path.endswith("token_type/embedding"):
            table = np.repeat(table[:1], wanted[0], axis=0)
        elif "position" in path:
            table = table[: wanted[0]]
        new[path] = (name, table)
    return _overlay(leaves, new, problems, folder)


def with_r3d_18(params: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Starts the 3-D CNN from PyTorch's R3D-18.

    Args:
      params: parameters of a network with `model.video = "r3d_18"`.
      path: torchvision's `r3d_18` as safetensors; its classifier `fc` and `num_batches_tracked` are not used.

    Returns:
      New parameters; what is outside of the 3-D CNN is as it was.

    Raises:
      ValueError: the network has another 3-D CNN, or names tensors that are missing, unknown or have other shapes, all
        of them.
    """
    leaves = dict(traverse_util.flatten_dict(params, sep="/"))
    if "video/stem_conv/kernel" not in leaves:
        raise ValueError(
            f"{path}: R3D-18 fits model.video = 'r3d_18' alone; this network has another 3-D CNN"
        )
    tensors = _read(path)
    names = {p: _r3d_name(p.removeprefix("video/")) for p in leaves if p.startswith("video/")}
    unused = {n for n in tensors if n.startswith("fc.") or n.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in names.values() if name not in tensors]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - set(names.values()) - unused)]
    new = {p: (name, _layout(tensors[name], p)) for p, name in names.items() if name in tensors}
    return _overlay(leaves, new, problems, path)


def _r3d_name(path: str) -> str:
    """torchvision's name of a parameter: layer1_block0/conv2/kernel -> layer1.0.conv2.0.weight."""
    module, leaf = path.rsplit("/", 1)
    leaf = "weight" if leaf == "kernel" else R3D_NORM[leaf]
    if module.startswith("stem_"):
        return f"stem.{'0' if module == 'stem_conv' else '1'}.{leaf}"
    block, part = module.split("/")
    layer, number = block.split("_block")
    if part.startswith("downsample"):
        return f"{layer}.{number}.downsample.{'0' if part.endswith('conv') else '1'}.{leaf}"
    return f"{layer}.{number}.conv{part[-1]}.{'0' if part.startswith('conv') else '1'}.{leaf}"


def _module(ours: str, theirs: str, leaves: Iterable[str]) -> dict[str, str]:
    """Flax path -> name of every parameter of a module."""
    leaf = {"kernel": "weight", "bias": "bias", "scale": "weight"}
    found = [path for path in leaves if path.startswith(f"{ours}/")]
    # A parameter without a module of its own has its name in the table.
    return {path: f"{theirs}.{leaf[path.rsplit('/', 1)[1]]}" for path in found} or {ours: theirs}


def _layout(tensor: np.ndarray, path: str) -> np.ndarray:
    """PyTorch's layout to Flax's: [out, in] -> [in, out], [O, C, kT, kH, kW] -> [kT, kH, kW, C, O]."""
    if not path.endswith("kernel"):
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 4, 1, 0) if tensor.ndim == 5 else tensor


def _overlay(
    leaves: dict[str, Any],
    new: Mapping[str, tuple[str, np.ndarray]],
    problems: list[str],
    source: pathlib.Path,
) -> dict[str, Any]:
    for path, (name, value) in new.items():
        wanted = leaves[path].shape
        if value.shape != wanted:
            problems.append(f"{name} gives {value.shape}, the network's {path} is {wanted}")
    if problems:
        raise ValueError(f"{source} does not fit the network: {'; '.join(problems)}")
    for path, (_, value) in new.items():
        leaves[path] = np.asarray(value, leaves[path].dtype)
    return traverse_util.unflatten_dict(leaves, sep="/")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: weights are read from .safetensors alone, as a pickle can run code; convert the file with "
            "safetensors.torch.save_file where you trust it"
        )
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs safetensors: pip install 'dilbert-jax[torch]'") from error
    try:
        tensors: dict[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no readable safetensors file ({error})") from error
    return tensors


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no readable JSON ({error}); give the folder of a Hugging Face BERT"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with the fields of a BERT")
    return content
