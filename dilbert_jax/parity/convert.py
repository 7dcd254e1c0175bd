"""Checkpoints of a run to safetensors files with PyTorch's names, and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilbert_jax.experiment import load_context
from dilbert_jax.models import NetworkConfig
from dilbert_jax.parity import MISSING_EXTRA
from dilbert_jax.parity.names import from_torch, to_torch
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.objectives import NETWORKS
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer
from dilbert_jax.training.stages import STAGES, network_names, network_params
from dilbert_jax.training.step import TrainState

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

FORMAT_VERSION = "1"
RUN_FILES = (
    "vocab.txt",
    "labels.json",
    "splits.json",
    "thresholds.json",
    "config.json",
)  # the last makes it a run
PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def export_network(workdir: pathlib.Path, stage: str, network: str, output: pathlib.Path) -> int:
    """Writes one network of a run to a safetensors file that `TorchDilbert.load_state_dict` takes.

    Args:
      workdir: a run that has completed `stage`, or a part of it.
      stage: one of `STAGES`; network: "teacher" or "student".
      output: a file name that ends in .safetensors.

    Returns:
      How many tensors the file holds.

    Raises:
      FileNotFoundError: the folder holds no run, or no checkpoint of that stage.
      ValueError: the stage has no such network, or the output has another ending.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: the file's name must end in .safetensors")
    context = load_context(workdir)
    params, step = _restore(context, workdir, stage, network)
    config = context.model.config
    tensors = to_torch(jax.device_get(params), config)
    metadata = {
        "format": "pt",  # what PyTorch's own tools look for
        "dilbert_jax_format": FORMAT_VERSION,
        "config": json.dumps(dataclasses.asdict(config)),
        "dataset": str(context.config.data.name),
        "stage": stage,
        "network": network,
        "step": str(step),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata=metadata)
    return len(tensors)


def import_network(
    path: pathlib.Path, like: pathlib.Path, workdir: pathlib.Path, stage: str, network: str
) -> int:
    """Makes a run whose `network` at the end of `stage` comes from a safetensors file.

    Configuration, vocabulary, label space and thresholds are copied from another run; so is the stage's other network
    where it has two. The optimizer starts afresh. `like` is only read.

    Args:
      path: a file by `export_network`, or a `state_dict` saved by `safetensors.torch.save_file`.
      like: the run whose network this one replaces, with a checkpoint of that stage.
      workdir: a folder that does not exist yet or is empty.
      stage, network: as in `export_network`.

    Returns:
      How many tensors were read.

    Raises:
      FileNotFoundError: no such file, run or checkpoint.
      ValueError: not a safetensors file, tensors or a configuration that do not fit, or a workdir in use.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"{workdir} is in use; name a new --workdir")
    tensors, metadata = read_tensors(path)
    context = load_context(like)
    config = context.model.config
    _check_metadata(path, metadata, config)
    networks = (stage,) if stage in NETWORKS else network_names(context.config)
    restored = {name: _restore(context, like, stage, name) for name in networks}
    if network not in restored:
        raise ValueError(f"stage {stage} of {like} holds no {network}, only {', '.join(networks)}")
    step = restored[network][1]
    try:
        imported = from_torch(tensors, config, restored[network][0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    params = {name: value for name, (value, _) in restored.items()} | {
        network: jax.tree.map(jnp.asarray, imported)
    }
    optimizer = make_optimizer(OptimizerConfig(**context.config.optimizer), 1)
    fresh = {name: optimizer.init(p) for name, p in params.items()}
    state = TrainState(jnp.asarray(step, jnp.int32), params, fresh)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = StageCheckpoints(workdir, stage)
    checkpoints.save(step, state)
    checkpoints.close()
    for name in RUN_FILES:
        if (like / name).exists():
            shutil.copyfile(like / name, workdir / name)
    return len(tensors)


def read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file.

    Args:
      path: its place.

    Returns:
      Arrays by name, and the file's metadata.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a pickle, which can run code when it is read and therefore never is, or not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file")
    with path.open("rb") as file:
        start = file.read(9)
    # PK: the zip archive that torch.save writes; 0x80: a bare pickle. The length of a safetensors header may begin with
    # either, but the header follows it.
    pickled = start[:2] == b"PK" or start[:1] == b"\x80"
    if path.suffix.lower() in PICKLE_ENDINGS or (pickled and start[8:] != b"{"):
        raise ValueError(
            f"{path}: a PyTorch pickle can run any code when it is loaded, so it is not read; where you trust it, "
            "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:
        # NumPy has no bfloat16, which safetensors reports as a missing attribute or type.
        raise ValueError(f"{path}: not a safetensors file of float32 tensors ({error})") from None


def _restore(context: Any, workdir: pathlib.Path, stage: str, network: str) -> tuple[Any, int]:
    """`network_params`, without the folder that a checkpoint manager makes where there is none."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; choose one of {', '.join(STAGES)}")
    if not (workdir / "checkpoints" / stage).is_dir():
        raise FileNotFoundError(f"{workdir} has no checkpoint of stage {stage}; train it first")
    return network_params(context, workdir, stage, network)


def _check_metadata(path: pathlib.Path, metadata: dict[str, str], config: NetworkConfig) -> None:
    """Raises `ValueError` where the file says that it holds another architecture; a bare state_dict says nothing."""
    version = metadata.get("dilbert_jax_format", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
    if "config" not in metadata:
        return
    theirs = json.loads(metadata["config"])
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    differences = [
        f"{name}: {theirs.get(name)!r} in the file, {ours.get(name)!r} in the run"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise ValueError(f"{path} holds a network of another architecture: {'; '.join(differences)}")
