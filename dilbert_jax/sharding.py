"""Where arrays live on many devices: a mesh of three axes, one rule table for parameters, and constraints.

The axis `data` splits the batch. So does `fsdp`, which also splits every parameter and its optimizer state, so that no
device holds all of a network. `tensor` splits attention heads and the feed-forward layer. Programs are written for the
whole batch and compiled by `jax.jit`; what crosses devices follows from these shardings.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# What the end of a parameter's path says of its dimensions; the first match counts.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value)/dense/kernel", ("fsdp", "tensor")),
    (r"(query|key|value)/dense/bias", ("tensor",)),
    (r"attention_output/kernel", ("tensor", "fsdp")),
    (r"intermediate/kernel", ("fsdp", "tensor")),
    (r"intermediate/bias", ("tensor",)),
    (r"ffn/output/kernel", ("tensor", "fsdp")),
    (r"embedding/word/embedding", ("tensor", "fsdp")),
    (r"embedding", (None, "fsdp")),
    (r"position", (None, "fsdp")),
    (r"conv\d?/kernel", (None, None, None, None, "fsdp")),
    (r"kernel", ("fsdp", None)),
)


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """Arranges devices on the axes `data`, `fsdp` and `tensor`.

    Args:
      fsdp, tensor: sizes of these axes; `data` takes what is left.
      devices: those to use; None = all of this run, in all its processes.

    Raises:
      ValueError: the number of devices is not divisible by fsdp * tensor.
    """
    devices = jax.devices() if devices is None else devices
    data, rest = divmod(len(devices), fsdp * tensor)
    if rest or not data:
        raise ValueError(
            f"mesh.fsdp = {fsdp} times mesh.tensor = {tensor} does not divide the {len(devices)} devices of this run"
        )
    # Auto: the compiler places what the rules do not. Devices in their order keep neighbours of a host together.
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """How `RULES` place a parameter, or an optimizer's copy of it.

    Args:
      path: keys joined by "/".
      shape: of the leaf.
      mesh_shape: size of each axis.
    """
    for pattern, axes in RULES:
        if re.search(rf"{pattern}$", path) and len(axes) == len(shape):
            return _dividing(axes, shape, mesh_shape)
    return PartitionSpec()


def _dividing(axes: Sequence[Axes], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The axes; a dimension that its axis does not divide stays whole.

    Nor is an axis of one device named: the compiler names none for what comes out of a step, and the program of the
    next would be another one than for what a checkpoint gives.
    """

    def splits(axis: Axes, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        devices = math.prod(mesh_shape[name] for name in names)
        return devices > 1 and size % devices == 0

    return PartitionSpec(*(a if splits(a, n) else None for a, n in zip(axes, shape, strict=False)))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf of parameters, optimizer states or a whole training state.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      mesh: of `make_mesh`.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples are split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(mesh: Mesh, batch_size: int, num_micro_batches: int) -> None:
    """Refuses micro-batches that do not divide among the devices: every device would compute all of each.

    Raises:
      ValueError: naming the fields.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (num_micro_batches * parts):
        raise ValueError(
            f"train.batch_size is {batch_size} and train.num_micro_batches {num_micro_batches}; the batch must be a "
            f"multiple of {num_micro_batches * parts}: {parts} devices (all {mesh.size} over mesh.tensor = "
            f"{mesh.shape['tensor']}) share every micro-batch"
        )


def local_part(mesh: Mesh, batch_size: int, num_micro_batches: int = 1) -> tuple[int, int]:
    """Which part of every batch this process feeds: (index, number of parts).

    Raises:
      ValueError: as `check_batch`, or this process's devices hold no part in one piece.
    """
    check_batch(mesh, batch_size, num_micro_batches)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({index[0].indices(batch_size)[:2] for index in slices if index})
    first, size = bounds[0][0], bounds[-1][1] - bounds[0][0]
    if size != len(bounds) * batch_size // parts or first % size:
        raise ValueError(
            f"mesh.tensor = {mesh.shape['tensor']} spreads over processes so that this one has no part of a batch in "
            "one piece; let it divide the devices of a process"
        )
    return first // size, batch_size // size


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
    """Copies arrays to where they belong: global ones, or NumPy ones that every process holds alike."""
    return jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=shardings)(tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's samples.

    Args:
      batch: [b, ...] each; the processes' samples in their order are the whole batch.
      mesh: of `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """Tells the compiler how to split an intermediate result; does nothing outside of a mesh.

    Args:
      x: [...].
      axes: mesh axes of the first dimensions, each for a dimension that it divides; the others stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _dividing(axes, x.shape, mesh.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(parameter: jax.Array, stored: tuple[Axes, ...], used: tuple[Axes, ...]) -> jax.Array:
    """Brings the parts of a parameter together before it is used; the sum of its gradients is shared out again.

    The derivative of a plain constraint would bring every device the whole gradient, of which it keeps its part.

    Args:
      parameter: of any shape.
      stored: mesh axes of its dimensions in `RULES`.
      used: those that it keeps, such as (None, "tensor").
    """
    return constrain(parameter, *used)


def _gather_forward(
    parameter: jax.Array, stored: tuple[Axes, ...], used: tuple[Axes, ...]
) -> tuple[jax.Array, None]:
    return constrain(parameter, *used), None


def _gather_backward(
    stored: tuple[Axes, ...], used: tuple[Axes, ...], residual: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (constrain(gradient, *stored),)


gather.defvjp(_gather_forward, _gather_backward)


def gathered_dot(*stored: Axes) -> Callable[..., jax.Array]:
    """A `dot_general` for Flax layers whose kernel devices share: it is gathered over `fsdp` before it is used.

    Args:
      stored: mesh axes of the kernel's dimensions in `RULES`, such as ("fsdp", "tensor").
    """
    used = tuple(None if axis == "fsdp" else axis for axis in stored)

    def dot(x: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        return jax.lax.dot_general(x, gather(kernel, stored, used), *arguments, **options)

    return dot


def platform() -> str:
    """The kind of device that programs are compiled for: that of the mesh that is set, else JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return str(getattr(device, "platform", None) or jax.default_backend())


def num_devices() -> int:
    """Devices of the mesh that is set; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def on_one_cpu() -> bool:
    """Whether programs are compiled for a single CPU device, where compiling takes longest beside running."""
    return platform() == "cpu" and num_devices() == 1
