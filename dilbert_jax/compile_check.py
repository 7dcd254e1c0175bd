"""Compiles the step of mutual learning ahead of time for a TPU slice, on a computer without one.

python -m dilbert_jax.compile_check --config=configs/tpu_pod.py --topology=v5e:16x16 [--json=FILE]

Prints what the compiler says of the program: memory a chip, operations, what crosses between chips; and an estimate of
the time of a step. Needs the extra `tpu`. Exits with 1 where the program does not fit into a chip's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import sys
import time
from collections.abc import Sequence
from typing import Any

# Before JAX starts: it is to run on the CPU, and the TPU's library not to look for TPUs.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies

from dilbert_jax.config import check_config
from dilbert_jax.flops import count_flops
from dilbert_jax.hlo import COLLECTIVES, read_program
from dilbert_jax.models import make_network
from dilbert_jax.random_inputs import init_network, random_batch, random_model
from dilbert_jax.sharding import batch_sharding, check_batch, make_mesh, replicated, shardings
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, from the maker's data sheets (cloud.google.com/tpu/docs).

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes of HBM; bandwidth: of HBM, bytes a second.
      interconnect: bytes a second to all neighbours together.
      clock: cycles a second.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    clock: float


CHIPS = {
    "v4": Chip(275e12, 32e9, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32e9, 1640e9, 448e9, 1.75e9),
}


def lower_step(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Any:
    """Lowers the mutual-learning step of a configuration for devices that need not be here."""
    mesh = make_mesh(config.mesh.fsdp, config.mesh.tensor, devices)
    check_batch(mesh, config.train.batch_size, config.train.num_micro_batches)
    model, loss = make_network(random_model(config)), objectives.LossConfig(**config.loss)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer), 1000)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
        )

    networks = {name: _abstract_network(config) for name in objectives.NETWORKS}
    state = placed(jax.eval_shape(functools.partial(steps.TrainState.create, optimizer=optimizer), networks))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in _abstract_batch(config, config.train.batch_size).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    accumulation = None
    if config.train.num_micro_batches > 1:
        accumulation = objectives.mutual_accumulation(
            model, loss, config.train.num_micro_batches, config.train.relate_micro_batches
        )
    objective = functools.partial(objectives.mutual_objective, model, loss)
    with jax.set_mesh(mesh):
        update: Any = steps.make_step(
            objective, optimizer, accumulation, jax.tree.map(lambda x: x.sharding, state)
        )
        return update.lower(state, placed(networks), batch, key)


def model_flops(config: ml_collections.ConfigDict) -> float:
    """Model FLOPs of a step, a clip: forward and backward, without what rematerialization computes again."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"
    model, loss = make_network(random_model(plain)), objectives.LossConfig(**plain.loss)
    networks = {name: _abstract_network(plain) for name in objectives.NETWORKS}
    objective = functools.partial(objectives.mutual_objective, model, loss)
    gradient = jax.value_and_grad(objective, has_aux=True)
    clips = 2
    key = jax.eval_shape(lambda: jax.random.key(0))
    return count_flops(gradient, networks, networks, _abstract_batch(plain, clips), key) / clips


def _abstract_network(config: ml_collections.ConfigDict) -> Any:
    return jax.eval_shape(functools.partial(init_network, config), jax.random.key(0))


def _abstract_batch(config: ml_collections.ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    one = random_batch(config, np.random.default_rng(0), batch_size=1)
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in one.items()}


def describe(compiled: Any, chip: Chip, num_chips: int, clips: int, flops_a_clip: float) -> dict[str, Any]:
    """What the compiler says of the program, and what follows for a step on these chips.

    The time is that of the program's own instructions by the compiler's estimate, plus that of all exchanges by the
    chips' links, as if none of them ran beside the other: a cautious figure.
    """
    memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    exchanged = {
        kind: {
            "count": sum(c.count for c in program.collectives if c.kind == kind),
            "bytes": sum(c.bytes for c in program.collectives if c.kind == kind),
        }
        for kind in COLLECTIVES
    }
    compute = program.cycles / chip.clock
    exchange = sum(e["bytes"] for e in exchanged.values()) / chip.interconnect
    flops = flops_a_clip * clips / num_chips
    return {
        "memory_bytes": total,
        "state_bytes": held,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "chip_bytes": chip.memory,
        "fits": total <= chip.memory,
        "model_flops": flops,
        "bytes_accessed": float((compiled.cost_analysis() or {}).get("bytes accessed", 0.0)),
        "collectives": exchanged,
        "compute_seconds": compute,
        "collective_seconds": exchange,
        "collective_share": exchange / (compute + exchange),
        "step_seconds": compute + exchange,
        "clips_per_second": clips / (compute + exchange),
        "model_flops_utilisation": flops / chip.flops / (compute + exchange),
    }


def render(found: dict[str, Any]) -> str:
    """The figures as a few lines."""
    giga = 1e9
    lines = [
        f"memory a chip: {found['memory_bytes'] / giga:.2f} GB of {found['chip_bytes'] / giga:.0f} GB "
        f"({found['state_bytes'] / giga:.2f} networks, optimizer and batch, {found['temporary_bytes'] / giga:.2f} "
        f"temporary, {found['program_bytes'] / giga:.2f} program): {'fits' if found['fits'] else 'DOES NOT FIT'}",
        f"model FLOPs a chip and step: {found['model_flops']:.3g}; bytes accessed, loops counted once: "
        f"{found['bytes_accessed']:.3g}",
    ]
    lines += [
        f"{kind}: {e['count']} runs, {e['bytes'] / giga:.3f} GB sent by a chip"
        for kind, e in found["collectives"].items()
        if e["count"]
    ]
    lines += [
        f"estimated step: {1e3 * found['compute_seconds']:.1f} ms of instructions + "
        f"{1e3 * found['collective_seconds']:.1f} ms of exchange ({found['collective_share']:.1%}); "
        f"nothing overlapped; {found['clips_per_second']:.0f} clips/s",
        f"model-FLOPs utilisation at that estimate: {found['model_flops_utilisation']:.1%}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.compile_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--config", required=True, type=pathlib.Path, help="an experiment file")
    parser.add_argument("--topology", required=True, help="KIND:SHAPE, such as v5e:16x16 or v4:4x4x8")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    kind = arguments.topology.split(":")[0]
    try:
        if kind not in CHIPS:
            raise ValueError(
                f"--topology is {arguments.topology!r}; its kind must be one of {', '.join(CHIPS)}"
            )
        config = runpy.run_path(str(arguments.config))["get_config"]()
        check_config(config)
        devices = _devices(arguments.topology)
        print(
            f"{arguments.config}: {config.train.batch_size} clips a step on {len(devices)} {devices[0].device_kind}"
        )
        started = time.monotonic()
        lowered = lower_step(config, devices)
        print(f"traced in {time.monotonic() - started:.0f} s; compiling", flush=True)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            # XLA:TPU compiles no program that needs more memory than the chip has.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = re.search(r"Ran out of memory.*", str(error))
            print(f"memory a chip: DOES NOT FIT: {reason.group() if reason else str(error).splitlines()[0]}")
            return 1
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    found = describe(compiled, CHIPS[kind], len(devices), config.train.batch_size, model_flops(config))
    print(f"traced and compiled in {seconds:.0f} s\n{render(found)}")
    if arguments.json:
        facts = {
            "config": str(arguments.config),
            "topology": arguments.topology,
            "batch_size": config.train.batch_size,
            "mesh": config.mesh.to_dict(),
            "compile_seconds": round(seconds),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        }
        arguments.json.write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["fits"] else 1


def _devices(topology: str) -> list[Any]:
    """Stand-ins for the chips of a slice, from the TPU's library."""
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("the TPU compiler is missing: pip install 'dilbert-jax[tpu]'") from None
    # Hosts of v5e and v6e drive 2 x 2 chips of a plane, others 2 x 2 x 1 of a cube: the same here.
    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=(2, 2, 1), num_slices=1
    )
    return list(slice_.devices)


if __name__ == "__main__":
    sys.exit(main())
