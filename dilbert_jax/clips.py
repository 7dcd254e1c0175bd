"""Clips at the model's resolution: resized once, kept on disk, memory-mapped by every later run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a frame of height x width lies on the square canvas: scaled to fit, centred, zero elsewhere."""

    top: float
    left: float
    height: float
    width: float

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Maps boxes [..., 4] from the frame's [0, 1] coordinates to the canvas's."""
        scale = np.asarray([self.height, self.width, self.height, self.width])
        return boxes * scale + np.asarray([self.top, self.left, self.top, self.left])

    def to_frame(self, boxes: np.ndarray) -> np.ndarray:
        """Inverse of `to_canvas`, clipped to the frame."""
        scale = np.asarray([self.height, self.width, self.height, self.width])
        return np.clip((boxes - np.asarray([self.top, self.left, self.top, self.left])) / scale, 0.0, 1.0)


def place_on_canvas(frames: np.ndarray, size: int) -> tuple[np.ndarray, Placement]:
    """Resizes uint8 [T, H, W] to [T, size, size] keeping the aspect ratio (anti-aliased bilinear)."""
    height, width = frames.shape[1:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas = np.zeros((len(frames), size, size), np.uint8)
    for out, frame in zip(canvas, frames, strict=True):
        resized = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BILINEAR)
        out[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas, Placement(top / size, left / size, new_height / size, new_width / size)


def find_sector(canvas: np.ndarray, threshold: int = 8) -> tuple[float, float, float, float]:
    """Box (ymin, xmin, ymax, xmax) in [0, 1] around the pixels that light up in any frame of [T, S, S]."""
    lit = canvas.max(axis=0) > threshold
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    if not len(rows):
        return (0.0, 0.0, 1.0, 1.0)
    size = canvas.shape[1]
    return (rows[0] / size, columns[0] / size, (rows[-1] + 1) / size, (columns[-1] + 1) / size)


def select_evenly(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` evenly spaced items out of `available` (all of them when there are fewer)."""
    if available <= wanted:
        return np.arange(available)
    return np.floor((np.arange(wanted) + 0.5) * available / wanted).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as training sees it: everything of `Record` but the pixels, boxes in canvas coordinates.

    `frame_index` holds the source frame number of each stored frame; `region_frames` index the stored frames.
    """

    study_id: str
    group_id: str
    split: str
    organ: str
    condition: str
    findings: tuple[str, ...]
    report: str
    language: str
    report_is_synthetic: bool
    frame_index: tuple[int, ...]
    region_frames: tuple[int, ...]
    region_boxes: tuple[tuple[float, float, float, float], ...]
    region_labels: tuple[str, ...]
    sector: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ClipStore:
    """Studies and their frames; `frames(i)` is uint8 [T_i, size, size]."""

    studies: tuple[Study, ...]
    pixels: np.ndarray
    offsets: np.ndarray

    def frames(self, index: int) -> np.ndarray:
        return self.pixels[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.studies)

    def __reduce__(self) -> tuple[Any, ...]:
        """Memory-mapped pixels are pickled as their path: a worker process maps the file itself."""
        if isinstance(self.pixels, np.memmap):
            return _map_clips, (self.studies, self.pixels.filename, self.offsets)
        return ClipStore, (self.studies, self.pixels, self.offsets)


def open_clip_store(
    examples: Iterable[tuple[str, dict[str, Any]]],
    decode: Callable[[bytes], np.ndarray],
    *,
    folder: pathlib.Path,
    fingerprint: str,
    size: int,
    stored_frames: int,
) -> ClipStore:
    """Opens the store for this data set and resolution, building it first when it is not there.

    Args:
      examples: (split, TFDS example with frames still encoded), in a fixed order; read only when building.
      decode: encoded frame -> uint8 [H, W].
      folder: where stores are kept, next to the prepared data set.
      fingerprint: identifies the prepared data.
      size: canvas side in pixels.
      stored_frames: most frames kept a clip, evenly spaced.
    """
    key = hashlib.sha256(f"{FORMAT}/{fingerprint}/{size}/{stored_frames}".encode()).hexdigest()[:16]
    target = folder / f"clips_{size}x{stored_frames}_{key}"
    if not (target / "studies.json").exists():
        _build(examples, decode, target, size, stored_frames)
    fields = json.loads((target / "studies.json").read_text(encoding="utf-8"))
    studies = tuple(_study_from_json(entry) for entry in fields)
    counts = [len(study.frame_index) for study in studies]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return _map_clips(studies, target / "pixels.npy", offsets)


def _map_clips(studies: tuple[Study, ...], file: pathlib.Path, offsets: np.ndarray) -> ClipStore:
    """The store whose pixels lie in a .npy file."""
    return ClipStore(studies, np.load(file, mmap_mode="r"), offsets)


def _build(
    examples: Iterable[tuple[str, dict[str, Any]]],
    decode: Callable[[bytes], np.ndarray],
    target: pathlib.Path,
    size: int,
    stored_frames: int,
) -> None:
    """Decodes and resizes every clip once; files appear under their names only when complete."""
    target.mkdir(parents=True, exist_ok=True)
    studies, pixels = [], []
    for split, example in examples:
        canvas, study = _convert(split, example, decode, size, stored_frames)
        pixels.append(canvas)
        studies.append(study)
    stacked = np.concatenate(pixels) if pixels else np.zeros((0, size, size), np.uint8)
    temporary = target / f"pixels.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.save(file, stacked)
    temporary.replace(target / "pixels.npy")
    temporary.write_text(
        json.dumps([dataclasses.asdict(s) for s in studies], ensure_ascii=False), encoding="utf-8"
    )
    temporary.replace(target / "studies.json")


def _convert(
    split: str, example: dict[str, Any], decode: Callable[[bytes], np.ndarray], size: int, stored_frames: int
) -> tuple[np.ndarray, Study]:
    """One TFDS example -> its canvas frames and its study."""
    encoded = example["frames"]
    kept = select_evenly(len(encoded), stored_frames)
    canvas, placement = place_on_canvas(np.stack([decode(encoded[i]) for i in kept]), size)
    frames, boxes, labels = [], [], []
    regions = example["regions"]
    # A box on a frame that is not kept moves to the nearest kept one when that is within half the spacing.
    reach = 0.5 * len(encoded) / len(kept) + 0.5
    for frame, box, label in zip(regions["frame"], regions["box"], regions["label"], strict=True):
        nearest = int(np.abs(kept - int(frame)).argmin())
        if abs(int(kept[nearest]) - int(frame)) <= reach:
            frames.append(nearest)
            boxes.append(tuple(placement.to_canvas(np.asarray(box, np.float64)).tolist()))
            labels.append(label.decode())
    ymin, xmin, ymax, xmax = map(float, find_sector(canvas))
    study = Study(
        study_id=example["study_id"].decode(),
        group_id=example["group_id"].decode(),
        split=split,
        organ=example["organ"].decode(),
        condition=example["condition"].decode(),
        findings=tuple(f.decode() for f in example["findings"]),
        report=example["report"].decode(),
        language=example["language"].decode(),
        report_is_synthetic=bool(example["report_is_synthetic"]),
        frame_index=tuple(int(i) for i in kept),
        region_frames=tuple(frames),
        region_boxes=tuple(boxes),
        region_labels=tuple(labels),
        sector=(ymin, xmin, ymax, xmax),
    )
    return canvas, study


def _study_from_json(entry: dict[str, Any]) -> Study:
    """JSON has lists where `Study` has tuples."""

    def freeze(value: Any) -> Any:
        return tuple(freeze(v) for v in value) if isinstance(value, list) else value

    return Study(**{name: freeze(value) for name, value in entry.items()})
