"""Annotates DICOM files, videos, images, or a folder of them with a trained run.

python -m dilbert_jax.annotate --workdir=runs/quickstart --input=clip.dcm --output=annotations
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dilbert_jax.annotation import Thresholds, build_visual, compose, describe_source, predict
from dilbert_jax.experiment import ModelContext, load_context
from dilbert_jax.media import Clip, MediaError, find_media, read_clip
from dilbert_jax.report import render_annotation, render_index
from dilbert_jax.run import use_compilation_cache
from dilbert_jax.training.loop import network_params
from dilbert_jax.training.step import NETWORKS

MAX_FRAMES = 128  # the paper's limit of serialized images a clip


class Annotator:
    """A trained network, loaded once; `annotate(clip)` compiles on its first call only."""

    def __init__(self, workdir: pathlib.Path, network: str = "student"):
        self.context: ModelContext = load_context(workdir)
        self.params, self.step = network_params(self.context, workdir, "finetune", network)
        self.network = network
        path = workdir / "thresholds.json"
        self.thresholds = Thresholds.load(path) if path.exists() else Thresholds({}, {})

    def annotate(self, clip: Clip, sha256: str = "") -> dict[str, Any]:
        """Returns the annotation dictionary of one clip (docs/annotation_schema.md)."""
        example, boxes = build_visual(self.context, clip.frames)
        prediction = predict(self.context, self.params, {name: v[None] for name, v in example.items()})
        model = {
            "network": self.network,
            "stage": "finetune",
            "step": self.step,
            "dataset": self.context.config.data.name,
        }
        return compose(
            self.context,
            {name: values[0] for name, values in prediction.items()},
            example,
            boxes,
            self.thresholds,
            source=describe_source(clip, sha256),
            model=model,
        )


def annotate_path(
    annotator: Annotator, path: pathlib.Path, output: pathlib.Path
) -> tuple[dict[str, Any], Clip]:
    """Reads, annotates and writes one file: annotation.json and annotation.html under `output`.

    Raises:
      MediaError: the file cannot be read as a clip.
    """
    clip = read_clip(path, max_frames=MAX_FRAMES)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    annotation = annotator.annotate(clip, sha256)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        in_source_frames(annotation, clip.frame_index), indent=1, ensure_ascii=False, allow_nan=False
    )
    (output / "annotation.json").write_text(text, encoding="utf-8")
    render_annotation(annotation, clip.frames, output / "annotation.html", source_frames=clip.frame_index)
    return annotation, clip


def in_source_frames(annotation: dict[str, Any], frame_index: Sequence[int]) -> dict[str, Any]:
    """Renumbers an annotation from kept frames to frames of the source (they differ in long clips)."""
    number = np.asarray(frame_index) if len(frame_index) else None
    if number is None:
        return annotation
    return {
        **annotation,
        "frame_index": [int(number[i]) for i in annotation["frame_index"]],
        "regions": [{**r, "frame": int(number[r["frame"]])} for r in annotation["regions"]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dilbert_jax.annotate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a run that train.py completed")
    parser.add_argument(
        "--input", required=True, type=pathlib.Path, help="a file, or a folder searched in depth"
    )
    parser.add_argument(
        "--output", required=True, type=pathlib.Path, help="folder for annotation.json and .html"
    )
    parser.add_argument("--network", default="student", choices=NETWORKS)
    args = parser.parse_args(argv)
    use_compilation_cache()
    try:
        files = find_media(args.input)
        if not files:
            raise FileNotFoundError(f"{args.input} holds no media file")
        annotator = Annotator(args.workdir, args.network)
    except (MediaError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    entries: list[dict[str, Any]] = []
    for path in tqdm(files, desc="annotating", unit="file", disable=len(files) == 1):
        started = time.monotonic()
        folder = pathlib.Path()
        if args.input.is_dir():
            folder = path.relative_to(
                args.input
            )  # a folder a file, suffix and all: a.png and a.dcm are two clips
        entry: dict[str, Any] = {
            "file": str(path.relative_to(args.input) if args.input.is_dir() else path.name)
        }
        try:
            annotation, clip = annotate_path(annotator, path, args.output / folder)
        except MediaError as error:
            entry["reason"] = error.reason
            tqdm.write(f"skipped {error}", file=sys.stderr)
        else:
            entry |= {
                "href": (folder / "annotation.html").as_posix(),
                "annotation": annotation,
                "frames": clip.frames[len(clip.frames) // 2 :][:1],  # the thumbnail
                "seconds": round(time.monotonic() - started, 3),
            }
        entries.append(entry)
    failed = sum("reason" in e for e in entries)
    if args.input.is_dir():
        args.output.mkdir(parents=True, exist_ok=True)
        render_index(entries, args.output / "index.html")
        summary = [{k: v for k, v in e.items() if k not in ("annotation", "frames")} for e in entries]
        (args.output / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    elif not failed:
        print(annotation["description"]["en"])
        print(annotation["description"]["zh"])
    print(f"{len(entries) - failed} of {len(entries)} annotated, {failed} failed; see {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
