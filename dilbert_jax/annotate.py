"""Annotates DICOM files, videos, images, or a folder of them with a trained run.

python -m dilbert_jax.annotate --workdir=runs/quickstart --input=clip.dcm --output=annotations
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dilbert_jax.annotation import annotate_clips
from dilbert_jax.experiment import ModelContext, load_context
from dilbert_jax.huge_pages import request_huge_pages
from dilbert_jax.media import Clip, MediaError, find_media, printable, read_clip
from dilbert_jax.report import PAGE_SIDE, render_annotation, render_index
from dilbert_jax.run import use_compilation_cache
from dilbert_jax.thresholds import Thresholds
from dilbert_jax.training.objectives import NETWORKS
from dilbert_jax.training.stages import network_params

MAX_FRAMES = 128  # the paper's limit of serialized images a clip
BATCH_SIZE = 8


class Annotator:
    """A trained network, loaded once; compiles on the first clip of a bucket and batch size only."""

    def __init__(self, workdir: pathlib.Path, network: str = "student"):
        self.context: ModelContext = load_context(workdir)
        self.params, self.step = network_params(self.context, workdir, "finetune", network)
        self.network = network
        path = workdir / "thresholds.json"
        self.thresholds = Thresholds.load(path) if path.exists() else Thresholds({}, {})

    def annotate(self, clip: Clip, sha256: str = "") -> dict[str, Any]:
        """Returns the annotation dictionary of one clip (docs/annotation_schema.md)."""
        return next(self.annotate_stream([(clip, sha256)], batch_size=1))

    def annotate_stream(
        self, clips: Iterable[tuple[Clip, str]], batch_size: int = BATCH_SIZE
    ) -> Iterator[dict[str, Any]]:
        """Annotates clips as they come, in batches; `annotate_clips` says when a batch runs.

        Args:
          clips: clips and the SHA-256 of their files ("" = unknown); may be endless.
          batch_size: clips a batch; a larger one keeps an accelerator busier and lets clips wait longer.

        Returns:
          An iterator over the annotation dictionaries, in the order of the clips.
        """
        model = {
            "network": self.network,
            "stage": "finetune",
            "step": self.step,
            "dataset": self.context.config.data.name,
        }
        return annotate_clips(
            self.context, self.params, clips, self.thresholds, model=model, batch_size=batch_size
        )


@dataclasses.dataclass(frozen=True)
class _Page:
    """What a file's pages need once its batch has run; the clip itself would fill the memory until then."""

    frames: np.ndarray
    frame_index: tuple[int, ...]
    started: float


def annotate_path(
    annotator: Annotator, path: pathlib.Path, output: pathlib.Path
) -> tuple[dict[str, Any], Clip]:
    """Reads, annotates and writes one file: annotation.json and annotation.html under `output`.

    Raises:
      MediaError: the file cannot be read as a clip.
    """
    clip, sha256, page = _read(path)
    annotation = annotator.annotate(clip, sha256)
    _write(annotation, page, output)
    return annotation, clip


def annotate_files(
    annotator: Annotator, outputs: Mapping[pathlib.Path, pathlib.Path], batch_size: int = BATCH_SIZE
) -> list[dict[str, Any]]:
    """Annotates files in batches, reading the next one meanwhile, and writes the pages of each.

    Args:
      annotator: the trained network.
      outputs: file -> folder for its annotation.json and annotation.html.
      batch_size: clips a batch; fewer files make a smaller one.

    Returns:
      For each file, in order, either `reason`, why it cannot be read (also one line on stderr), or `annotation`,
      `frames` (the middle one, [1, H, W]) and `seconds`: from opening the file to its written pages, with the wait
      for the rest of its batch.
    """
    entries: list[dict[str, Any]] = [{} for _ in outputs]
    pages: collections.deque[tuple[dict[str, Any], pathlib.Path, _Page]] = collections.deque()
    with tqdm(total=len(outputs), desc="annotating", unit="file", disable=len(outputs) == 1) as bar:

        def clips() -> Iterator[tuple[Clip, str]]:
            readings = _read_ahead(outputs)
            for entry, folder, reading in zip(entries, outputs.values(), readings, strict=True):
                try:
                    clip, sha256, page = reading.result()
                except MediaError as error:
                    entry["reason"] = error.reason
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                    bar.update()
                else:
                    pages.append((entry, folder, page))
                    yield clip, sha256

        for annotation in annotator.annotate_stream(clips(), min(batch_size, len(outputs))):
            entry, folder, page = pages.popleft()
            _write(annotation, page, folder)
            entry |= {
                "annotation": annotation,
                # A copy: a slice would keep all frames of all files in memory.
                "frames": page.frames[len(page.frames) // 2 :][:1].copy(),
                "seconds": round(time.monotonic() - page.started, 3),
            }
            bar.update()
    return entries


def _read_ahead(
    paths: Iterable[pathlib.Path],
) -> Iterator[concurrent.futures.Future[tuple[Clip, str, _Page]]]:
    """Reads every file in a thread, the next one while the caller is busy with one."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        readings: collections.deque[concurrent.futures.Future[tuple[Clip, str, _Page]]] = collections.deque()
        for path in paths:
            readings.append(pool.submit(_read, path))
            if len(readings) > 1:
                yield readings.popleft()
        yield from readings


def _read(path: pathlib.Path) -> tuple[Clip, str, _Page]:
    """One file's clip, its SHA-256, and what its pages need."""
    started = time.monotonic()
    clip = read_clip(path, max_frames=MAX_FRAMES)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return clip, sha256, _Page(shrink_for_page(clip.frames), clip.frame_index, started)


def shrink_for_page(frames: np.ndarray) -> np.ndarray:
    """Scales uint8 [T, H, W] down to the size at which annotation.html shows frames, if they are larger."""
    height, width = frames.shape[1:]
    scale = PAGE_SIDE / max(height, width)
    if scale >= 1:
        return frames
    size = max(1, round(width * scale)), max(1, round(height * scale))
    images = (Image.fromarray(f).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) for f in frames)
    return np.stack([np.asarray(image) for image in images])


def _write(annotation: dict[str, Any], page: _Page, output: pathlib.Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    in_source = in_source_frames(annotation, page.frame_index)
    text = json.dumps(in_source, indent=1, ensure_ascii=False, allow_nan=False)
    (output / "annotation.json").write_text(text, encoding="utf-8")
    render_annotation(annotation, page.frames, output / "annotation.html", source_frames=page.frame_index)


def _check_output(output: pathlib.Path, folders: Iterable[pathlib.Path]) -> None:
    """Refuses an output where a file lies in the place of a folder, as when it is the input itself."""
    for place in (place for folder in folders for place in (folder, *folder.parents)):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"--output {output}: {place} is a file; name another folder to write to")


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
        files, is_folder = find_media(args.input), args.input.is_dir()
        if not files:
            raise FileNotFoundError(f"{args.input} holds no media file")
        # A folder a file, suffix and all: a.png and a.dcm are two clips.
        folders = [path.relative_to(args.input) if is_folder else pathlib.Path() for path in files]
        outputs = {path: args.output / folder for path, folder in zip(files, folders, strict=True)}
        _check_output(args.output, outputs.values())
        annotator = Annotator(args.workdir, args.network)
    except (MediaError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    entries: list[dict[str, Any]] = []
    for path, folder, entry in zip(files, folders, annotate_files(annotator, outputs), strict=True):
        href = {} if "reason" in entry else {"href": (folder / "annotation.html").as_posix()}
        entries.append({"file": printable(folder if is_folder else path.name), **href, **entry})
    failed = sum("reason" in e for e in entries)
    if is_folder:
        args.output.mkdir(parents=True, exist_ok=True)
        render_index(entries, args.output / "index.html")
        summary = [
            {k: printable(v) if k == "href" else v for k, v in e.items() if k not in ("annotation", "frames")}
            for e in entries
        ]
        (args.output / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    elif not failed:
        description = entries[0]["annotation"]["description"]
        print(description["en"])
        print(description["zh"])
    print(
        f"{len(entries) - failed} of {len(entries)} annotated, {failed} failed; see {printable(args.output)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    request_huge_pages()
    sys.exit(main())
