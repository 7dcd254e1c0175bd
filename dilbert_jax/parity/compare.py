"""Measures how far the JAX and the PyTorch implementation agree: outputs, gradients, losses over training steps.

Both start from the same weights and see the same batches, without dropout. The mutual stage is trained with SGD in
each framework on its own; nothing passes between them after the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dilbert_jax.models import Dilbert, NetworkConfig, init_params
from dilbert_jax.parity import MISSING_EXTRA, torch_losses, torch_model
from dilbert_jax.parity.agreement import Agreement
from dilbert_jax.parity.names import from_torch, to_torch
from dilbert_jax.parity.setting import Batch, Setting
from dilbert_jax.parity.torch_training import Training, to_tensors
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import make_optimizer, make_schedule

try:
    import torch
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error


def measure(setting: Setting, dtype: str, seed: int = 0) -> Agreement:
    """Runs both implementations and compares them.

    Args:
      setting: model, losses and batches.
      dtype: "float64" or "float32", of parameters and arithmetic in both.
      seed: of the initial weights.

    Returns:
      The differences.

    Raises:
      ValueError: an option that the PyTorch side does not have.
    """
    model_config = dataclasses.replace(setting.model, dtype=dtype, dropout=0.0)
    torch_model.check_supported(model_config)
    torch_losses.check_supported(setting.loss)
    starts = _initial_params(model_config, seed)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        outputs = compare_outputs(setting, model_config, starts["teacher"])
        start = {name: starts[name] for name in objectives.NETWORKS}
        other = {name: starts[f"other_{name}"] for name in objectives.NETWORKS}
        gradients = {
            objective: compare_gradients(setting, model_config, start, other, objective)
            for objective in ("pretraining", "mutual")
        }
        trajectory, parameters = compare_training(setting, model_config, start)
    return Agreement(dtype, outputs, gradients, trajectory, parameters)


def relative_difference(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value of `ours`; 0 where both are equal, NaN where one is NaN."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} in JAX, {theirs.shape} in PyTorch")
    if np.array_equal(ours, theirs):
        return 0.0
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def make_torch(params: Any, config: NetworkConfig) -> torch_model.TorchDilbert:
    """Builds the PyTorch network that holds the given Flax parameters, in evaluation mode (no dropout).

    Args:
      params: nested dict of arrays, of the network's dtype.
      config: its architecture.

    Returns:
      The network.

    Raises:
      ValueError: parameters of another architecture, or an option that PyTorch's model does not have.
    """
    network = torch_model.TorchDilbert(config)
    tensors = {name: torch.from_numpy(np.array(v)) for name, v in to_torch(params, config).items()}
    network.load_state_dict(tensors)
    return network.eval()


def forward_torch(
    network: torch_model.TorchDilbert, batch: Batch, annotation: Batch, names: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """All outputs of the PyTorch network.

    Args:
      network: in evaluation mode.
      batch: a pre-training batch, for the encoder and the pre-training heads.
      annotation: an annotation batch, for the annotation heads.
      names: word pieces of the candidate entities int [E, P] and their mask.

    Returns:
      Arrays by name, such as "hidden/entity" or "mlm".
    """
    dtype = network.mlm_bias.dtype
    tensors, clips = to_tensors(_numbers(batch), dtype), to_tensors(_numbers(annotation), dtype)
    pieces, mask = (torch.from_numpy(np.array(x)) for x in names)
    with torch.no_grad():
        encoded = network.encode_batch(tensors, corrupted=True, need_weights=True)
        logits = network.pretrain(encoded, tensors["mlm_positions"])
        alone = network.encode_batch(clips)
        annotated = network.annotate(alone, pieces, mask)
    return {name: value.numpy() for name, value in _flat_outputs(encoded, logits, annotated).items()}


def forward_jax(
    params: Any, config: NetworkConfig, batch: Batch, annotation: Batch, names: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """All outputs of the JAX network.

    Args:
      params: its parameters; config: its architecture.
      batch, annotation, names: as in `forward_torch`.

    Returns:
      Arrays by the names of `forward_torch`.
    """

    def run(
        module: Dilbert, tensors: Any, clips: Any, pieces: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array]:
        encoded = module.encode(
            **{name: tensors[name] for name in objectives.VISUAL},
            description_zeroed=tensors["description_zeroed"],
            region_zeroed=tensors["region_zeroed"],
        )
        logits = module.pretrain(encoded, tensors["mlm_positions"])
        alone = module.encode(**{name: clips[name] for name in objectives.VISUAL})
        return _flat_outputs(encoded, logits, module.annotate(alone, pieces, mask))

    arguments = (_on_device(batch, config.dtype), _on_device(annotation, config.dtype), *names)
    outputs = jax.jit(nn.apply(run, Dilbert(config)))({"params": params}, *arguments)
    return {name: np.asarray(value) for name, value in outputs.items()}


def compare_outputs(setting: Setting, config: NetworkConfig, params: Any) -> dict[str, float]:
    """Compares everything that one network puts out.

    Args:
      setting: its first batch and its annotation batch are used.
      config: architecture and dtype; float64 needs `jax.enable_x64`.
      params: nested dict of arrays of that dtype.

    Returns:
      Per output, the largest difference over the largest value.
    """
    inputs = (setting.batches[0], setting.annotation, setting.names)
    ours = forward_jax(params, config, *inputs)
    theirs = forward_torch(make_torch(params, config), *inputs)
    return {name: relative_difference(ours[name], theirs[name]) for name in ours if ours[name].size}


def compare_gradients(
    setting: Setting,
    config: NetworkConfig,
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    objective: str,
) -> dict[str, float]:
    """Compares the gradients of one objective on the first batch.

    Args:
      setting, config: as in `compare_outputs`.
      params: both networks by name.
      frozen: both snapshots by name.
      objective: "pretraining" (the student with the frozen teacher's soft labels) or "mutual" (both networks).

    Returns:
      Per layer, the norm of the difference over the norm of the gradient; the larger of both networks.
    """
    model, loss, batch, rng = Dilbert(config), setting.loss, setting.batches[0], jax.random.key(0)
    trained = dict(params) if objective == "mutual" else {"student": params["student"]}

    def total(p: Any, f: Any, b: Any) -> jax.Array:
        if objective == "mutual":
            return objectives.mutual_objective(model, loss, p, f, b, rng)[0]
        return objectives.pretraining_objective(model, loss, p, f["teacher"], b, rng)[0]

    ours = jax.jit(jax.grad(total))(trained, dict(frozen), _on_device(batch, config.dtype))
    networks = {name: make_torch(p, config) for name, p in trained.items()}
    snapshots = {name: make_torch(p, config) for name, p in frozen.items()}
    tensors = to_tensors(_numbers(batch), getattr(torch, config.dtype))
    if objective == "mutual":
        theirs, _ = torch_losses.mutual_objective(networks, snapshots, tensors, loss)
    else:
        theirs, _ = torch_losses.pretraining_objective(networks, snapshots["teacher"], tensors, loss)
    theirs.backward()
    found = [layer_differences(ours[name], network) for name, network in networks.items()]
    return {layer: float(np.max([f[layer] for f in found])) for layer in found[0]}


def compare_training(
    setting: Setting, config: NetworkConfig, start: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Trains the mutual stage in both frameworks from the same start; the start is the frozen snapshot too.

    Args:
      setting: one update for each of its batches.
      config: as in `compare_outputs`.
      start: both networks by name.

    Returns:
      Per loss term, values [2, steps] (JAX, PyTorch); and per network, the norm of the parameters' difference over
      that of what the steps changed, in the layer where it is largest.
    """
    model, loss, num_steps = Dilbert(config), setting.loss, len(setting.batches)

    def objective(p: Any, f: Any, b: Any, r: Any) -> Any:
        return objectives.mutual_objective(model, loss, p, f, b, r)

    optimizer = make_optimizer(setting.optimizer, num_steps)
    update = steps.make_step(objective, optimizer)
    state = steps.TrainState.create(jax.tree.map(jnp.array, dict(start)), optimizer)
    frozen = jax.tree.map(jnp.asarray, dict(start))
    # Optax computes the rate in float32 inside of a step: both frameworks get that one.
    schedule = jax.jit(make_schedule(setting.optimizer, num_steps))
    networks = {name: make_torch(p, config) for name, p in start.items()}
    snapshots = {name: make_torch(p, config).requires_grad_(False) for name, p in start.items()}
    theirs = Training(
        networks,
        lambda batch: torch_losses.mutual_objective(networks, snapshots, batch, loss),
        setting.optimizer,
        num_steps,
        rate=lambda step: float(schedule(jnp.int32(step))),
    )
    rows: list[tuple[dict[str, float], dict[str, float]]] = []
    for batch in setting.batches:
        state, metrics = update(state, frozen, _on_device(batch, config.dtype), jax.random.key(0))
        tensors = to_tensors(_numbers(batch), getattr(torch, config.dtype))
        found = theirs.update(tensors)
        rows.append(
            (
                {name: float(value) for name, value in metrics.items()},
                {name: float(value) for name, value in found.items()},
            )
        )
    if rows[0][0].keys() != rows[0][1].keys():
        raise ValueError(
            f"the objectives have other terms: {sorted(rows[0][0])} in JAX, {sorted(rows[0][1])} in PyTorch"
        )
    trajectory = {
        name: np.asarray([[ours[name] for ours, _ in rows], [other[name] for _, other in rows]])
        for name in rows[0][0]
    }
    parameters = {}
    for name, network in theirs.networks.items():
        end = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
        changes = [
            jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after, start[name])
            for after in (jax.device_get(state.params[name]), from_torch(end, config, start[name]))
        ]
        parameters[name] = float(np.max(list(_by_layer(*changes).values())))
    return trajectory, parameters


def layer_differences(ours: Any, network: torch_model.TorchDilbert) -> dict[str, float]:
    """Compares gradients layer by layer.

    Args:
      ours: nested dict of gradients in JAX.
      network: the PyTorch network after `backward`; a parameter without a gradient counts as zero.

    Returns:
      Per layer (a Flax module with parameters of its own): norm of the difference over the norm in JAX; 0 where both
      are zero. A bias alone may have no gradient but rounding (that of attention keys), hence layers.
    """
    theirs = {
        name: np.zeros(tuple(p.shape), str(p.dtype).removeprefix("torch."))
        if p.grad is None
        else p.grad.numpy()
        for name, p in network.named_parameters()
    }
    return _by_layer(ours, from_torch(theirs, network.config, ours))


def _by_layer(ours: Any, theirs: Any) -> dict[str, float]:
    """Per layer, norm of the difference over the norm of `ours`."""
    flat, other = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, theirs))
    squares: dict[str, np.ndarray] = {}
    for path, value in flat.items():
        a, b = np.asarray(value, np.float64), np.asarray(other[path], np.float64)
        pair = np.asarray([np.square(a - b).sum(), np.square(a).sum()])
        layer = path.rsplit("/", 1)[0]
        squares[layer] = squares.get(layer, np.zeros(2)) + pair
    return {
        layer: float(np.sqrt(d / n)) if n else float(np.inf if d else 0.0)
        for layer, (d, n) in squares.items()
    }


def _numbers(batch: Batch) -> dict[str, np.ndarray]:
    """The entries that the objectives may read."""
    return steps.device_entries(batch)


def _on_device(batch: Batch, dtype: str) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(value, dtype if np.issubdtype(value.dtype, np.floating) else None)
        for name, value in _numbers(batch).items()
    }


def _initial_params(config: NetworkConfig, seed: int) -> dict[str, Any]:
    """Four networks: the two that are trained, and two to stand for other snapshots in the gradient check."""
    network = Dilbert(dataclasses.replace(config, dtype="float32"))
    names = (*objectives.NETWORKS, *(f"other_{name}" for name in objectives.NETWORKS))
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(names))]
    return {
        name: jax.tree.map(lambda x: np.asarray(x, config.dtype), init_params(network, key))
        for name, key in zip(names, keys, strict=True)
    }


def _flat_outputs(encoded: Any, logits: Mapping[str, Any], annotated: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        "hidden": encoded.streams,
        "pooled": encoded.pooled,
        "cross_weights": encoded.cross_weights,
        "match": annotated["match"],
    }
    flat = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    flat |= {"fused": encoded.fused, "overview": encoded.overview, **logits}
    return flat | {name: annotated[name] for name in ("organ", "condition", "findings")}
