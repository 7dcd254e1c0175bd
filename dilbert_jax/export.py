"""Writes a trained network as a StableHLO artifact that runs without this package (docs/export.md).

python -m dilbert_jax.export --workdir=runs/quickstart --output=exported
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export

import dilbert_jax
from dilbert_jax.annotation import NOTICE, annotation_probabilities, build_visual
from dilbert_jax.experiment import ModelContext, load_context
from dilbert_jax.thresholds import Thresholds
from dilbert_jax.training.objectives import NETWORKS, VISUAL
from dilbert_jax.training.stages import is_complete, network_params

SCHEMA = "dilbert-jax/export/1"
PLATFORMS = ("cpu", "cuda", "tpu")
NETWORK, WEIGHTS, DESCRIPTION = "network.jax_export", "weights.npz", "export.json"
FILES = (NETWORK, WEIGHTS, DESCRIPTION, f"{DESCRIPTION}.tmp")
SECTOR_THRESHOLD = 8  # `find_sector`'s

INPUTS = {
    "frames": "grey frames on the square canvas, those of the clip first, zero after them",
    "frame_mask": "true where `frames` holds a frame of the clip",
    "boxes": "regions as (ymin, xmin, ymax, xmax) in [0, 1] of the canvas: the grid in the scan sector",
    "box_frames": "the frame that each region lies in, counted in `frames`",
}
OUTPUTS = {
    "organ": "probabilities of `labels.organs`; they sum to 1",
    "condition": "probabilities of `labels.conditions`; they sum to 1",
    "findings": "probability of each of `labels.findings`; they do not exclude each other",
    "entities": "match of each of `labels.entities` with the clip, in [0, 1]",
    "frame_scores": "match of each entity with each temporal step, in [0, 1]",
    "region_scores": "match of each entity with each region, in [0, 1]",
    "region_logits": "the logits of `region_scores`; softmax over the entities of `labels.regions` labels a region",
}


def lower_network(context: ModelContext, platforms: Sequence[str] = PLATFORMS) -> jax_export.Exported:
    """Lowers the annotation of a batch, for any number of clips and of temporal steps.

    The weights are an argument. As constants they would be compiled in anew for every batch shape, and an artifact
    beyond 2 GB cannot be written at all.

    Args:
      context: of the run.
      platforms: a choice of `PLATFORMS`; none of them needs to be present.

    Returns:
      The function (weights by their path with "/", `INPUTS` by name) -> `OUTPUTS` by name.
    """
    spec = context.spec
    batch, num_frames = jax_export.symbolic_shape(
        f"b, {spec.frames_per_step}*a", constraints=[f"a <= {spec.num_steps}"]
    )
    example, _ = build_visual(context, np.zeros((1, 1, 1), np.uint8))
    constants = {name: example[name] for name in VISUAL if name not in INPUTS}
    inputs = {}
    for name in INPUTS:
        shape = example[name].shape
        if name in ("frames", "frame_mask"):
            shape = (num_frames, *shape[1:])
        inputs[name] = jax.ShapeDtypeStruct((batch, *shape), example[name].dtype)
    names = tuple(map(jnp.asarray, context.entity_names))

    def network(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        params = traverse_util.unflatten_dict(weights, sep="/")
        count = inputs["frames"].shape[0]
        same = {name: jnp.broadcast_to(value, (count, *value.shape)) for name, value in constants.items()}
        return annotation_probabilities(context.model, params, inputs | same, names)

    weights = traverse_util.flatten_dict(jax.eval_shape(context.init_params, jax.random.key(0)), sep="/")
    # The artifact names the source of every operation: the files, but not where they lie on this machine.
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, r".*[/\\]")
    try:
        return jax_export.export(jax.jit(network), platforms=platforms)(weights, inputs)
    finally:
        jax.config.update(option, before)


def export_run(
    workdir: pathlib.Path,
    output: pathlib.Path,
    network: str = "student",
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Exports one network of a finished run: network.jax_export, weights.npz and, when all is there, export.json.

    Args:
      workdir: a run that has finished its fine-tuning.
      output: a folder that is new, empty, or holds an earlier export of the same network, which is replaced.
      network: "teacher" or "student".
      platforms: where the artifact is to run, a choice of `PLATFORMS`.

    Returns:
      The content of export.json (docs/export.md).

    Raises:
      FileNotFoundError: the workdir holds no run, or none that has finished.
      ValueError: a platform or network that there is not, or an output folder in use.
    """
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms is {','.join(platforms)!r}; choose among {', '.join(PLATFORMS)}")
    context = load_context(workdir)
    # A training log without its end is a run that was interrupted; an imported network has no log.
    started = (workdir / "metrics.jsonl").exists() and not is_complete(workdir)
    if started or not (workdir / "checkpoints" / "finetune").is_dir():
        raise FileNotFoundError(
            f"{workdir} has not finished its finetune stage; continue it with train.py --workdir={workdir}"
        )
    files = ("config.json", "vocab.txt", "labels.json")
    fingerprint = hashlib.sha256(b"".join((workdir / name).read_bytes() for name in files)).hexdigest()
    run = {"fingerprint": fingerprint, "dataset": context.config.data.name, "network": network}
    _check_output(output, run)

    params, step = network_params(context, workdir, "finetune", network)
    exported = lower_network(context, platforms)
    path = workdir / "thresholds.json"
    thresholds = Thresholds.load(path) if path.exists() else Thresholds({}, {})
    description = _describe(context, exported, thresholds, {**run, "stage": "finetune", "step": step})

    artifact = exported.serialize()
    weights = traverse_util.flatten_dict(jax.device_get(params), sep="/")

    output.mkdir(parents=True, exist_ok=True)
    # While export.json is absent the folder holds no export: a kill leaves none that mixes two.
    (output / DESCRIPTION).unlink(missing_ok=True)
    (output / NETWORK).write_bytes(artifact)
    np.savez(output / WEIGHTS, **weights)
    temporary = output / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(output / DESCRIPTION)
    return description


def _check_output(output: pathlib.Path, run: dict[str, Any]) -> None:
    """Raises `ValueError` where writing would mix with, or replace, anything but the same network's export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder with --output")
    strangers = sorted(p.name for p in output.iterdir() if p.name not in FILES)
    if strangers:
        raise ValueError(
            f"{output} holds {strangers[0]}, no part of an export; name an empty or new --output"
        )
    path = output / DESCRIPTION
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["run"]
        same = all(found.get(name) == value for name, value in run.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read as an export's; name an empty or new --output") from None
    if not same:
        raise ValueError(
            f"{output} holds the export of another run or network ({found.get('network')} on "
            f"{found.get('dataset')}); name another --output, or delete this one"
        )


def _describe(
    context: ModelContext, exported: jax_export.Exported, thresholds: Thresholds, run: dict[str, Any]
) -> dict[str, Any]:
    """The content of export.json."""
    spec, data, labels, graph = context.spec, context.config.data, context.labels, context.graph

    def named(concepts: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"id": c, "name": {language: graph.name(c, language) for language in ("en", "zh")}}
            for c in concepts
        ]

    def signature(avals: dict[str, Any], meaning: dict[str, str]) -> dict[str, Any]:
        return {
            name: {
                "shape": [d if isinstance(d, int) else str(d) for d in avals[name].shape],
                "dtype": str(avals[name].dtype),
                "meaning": text,
            }
            for name, text in meaning.items()
        }

    (_, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    regions = named(labels.regions)
    for region in regions:
        known = region["id"] in labels.entities
        region["entity"] = labels.entities.index(region["id"]) if known else None
    return {
        "schema": SCHEMA,
        "notice": NOTICE,
        "run": run,
        "files": {"network": NETWORK, "weights": WEIGHTS},
        "platforms": list(exported.platforms),
        "dimensions": {"b": "clips, at least 1", "a": f"temporal steps, 1 to {spec.num_steps}"},
        "inputs": signature(inputs, INPUTS),
        "outputs": signature(outputs, OUTPUTS),
        "labels": {
            "organs": named(labels.organs),
            "conditions": named(labels.conditions),
            "findings": named(labels.findings),
            "entities": named(labels.entities),
            "regions": regions,
            "exclusive_findings": [list(pair) for pair in labels.exclusive],
        },
        "thresholds": {
            "findings": {c: thresholds.finding(c) for c in labels.findings},
            "entities": {c: thresholds.entity(c) for c in labels.entities},
        },
        "preprocessing": {
            "size": data.size,
            "stored_frames": data.stored_frames,
            "num_frames": spec.num_frames,
            "frame_lengths": sorted({*spec.frame_buckets, spec.num_frames}),
            "frames_per_step": spec.frames_per_step,
            "grid_scales": list(spec.grid_scales),
            "grid_steps": spec.grid_steps,
            "sector_threshold": SECTOR_THRESHOLD,
        },
        "versions": {
            "dilbert-jax": dilbert_jax.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
            "calling_convention": exported.calling_convention_version,
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dilbert_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a run that train.py completed")
    parser.add_argument(
        "--output", required=True, type=pathlib.Path, help="folder for the artifact: new, empty or an export"
    )
    parser.add_argument("--network", default="student", choices=NETWORKS)
    parser.add_argument(
        "--platforms", default=",".join(PLATFORMS), help="where it is to run (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    platforms = list(dict.fromkeys(p.strip() for p in args.platforms.split(",") if p.strip()))
    try:
        description = export_run(args.workdir, args.output, args.network, platforms)
    except (ImportError, ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # Orbax writes several lines
        return 2
    sizes = {name: (args.output / name).stat().st_size / 1e6 for name in (NETWORK, WEIGHTS)}
    print(
        f"{args.output}: {args.network} for {', '.join(description['platforms'])}; "
        + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
    )
    print(NOTICE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
