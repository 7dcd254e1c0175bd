"""The one record schema that every data set shares, and its TFDS features."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

LANGUAGES = ("en", "zh")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Region:
    """A labelled box in one frame.

    Attributes:
      frame: zero-based index into the record's frames.
      box: (ymin, xmin, ymax, xmax), each in [0, 1] of the stored frame.
      label: concept id of the organ, tissue or lesion inside (see ``dilbert_jax.knowledge``).
    """

    frame: int
    box: tuple[float, float, float, float]
    label: str


@dataclasses.dataclass
class Record:
    """One study: a clip, its report and its labels.

    Attributes:
      study_id: unique within the data set; carries no patient identity.
      group_id: what a split must never cut through: patient, subject or near-duplicate group.
      frames: uint8 [T, H, W] grayscale, T >= 1.
      fps: frames per second, or None when the source states none (stills, image series).
      pixel_spacing_mm: (row, column) millimetres per pixel, or None when uncalibrated.
      organ: concept id of the organ examined.
      condition: concept id of the health condition, or "" when the source states none.
      findings: concept ids of the findings present (multi-label).
      report: free text; may be empty.
      language: "en" or "zh".
      report_is_synthetic: True when the report was composed from labels and measured masks.
      regions: labelled boxes; empty when the source has none.
      official_split: the source's own split ("train", "validation", "test") or "".
      source: path of the media relative to the data set's folder (several joined by ";").
      decoder: what decoded the pixels, e.g. "pillow 11.0", "pyav 14.0 h264", "pydicom 3.0 pylibjpeg".
      kept_whole: no scan sector stood out, so that nothing was blanked and text burned in may be left. Not stored.
    """

    study_id: str
    group_id: str
    frames: np.ndarray
    organ: str
    condition: str
    report: str
    language: str
    report_is_synthetic: bool
    source: str
    decoder: str
    findings: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    fps: float | None = None
    pixel_spacing_mm: tuple[float, float] | None = None
    official_split: str = ""
    kept_whole: bool = False


@dataclasses.dataclass(frozen=True)
class StudyEntry:
    """What the index pass knows about a study before its media are decoded.

    Attributes:
      study_id, group_id, official_split: as in ``Record``.
      stratum: label that splits balance over, usually the condition.
      source: file named in messages about this study.
      read: decodes and measures; raises ``dilbert_jax.media.MediaError`` for a bad file.
    """

    study_id: str
    group_id: str
    stratum: str
    source: str
    read: Callable[[], Record]
    official_split: str = ""


FEATURES: dict[str, Any] = {
    "study_id": tfds.features.Text(),
    "group_id": tfds.features.Text(),
    "frames": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 1), encoding_format="png")),
    "fps": np.float32,  # NaN: none stated
    "pixel_spacing_mm": tfds.features.Tensor(shape=(2,), dtype=np.float32),  # NaN: uncalibrated
    "organ": tfds.features.Text(),
    "condition": tfds.features.Text(),
    "findings": tfds.features.Sequence(tfds.features.Text()),
    "report": tfds.features.Text(),
    "language": tfds.features.Text(),
    "report_is_synthetic": np.bool_,
    "regions": tfds.features.Sequence(
        {
            "frame": np.int32,
            "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "label": tfds.features.Text(),
        }
    ),
    "official_split": tfds.features.Text(),
    "source": tfds.features.Text(),
    "decoder": tfds.features.Text(),
}


def encode_png(frame: np.ndarray) -> bytes:
    """Encodes one uint8 [H, W] frame without loss (TFDS would import TensorFlow to do this)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Inverse of ``encode_png``: uint8 [H, W]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L"))


def to_example(record: Record) -> dict[str, Any]:
    """Turns a checked ``Record`` into what ``FEATURES`` encodes."""
    check(record)
    nan = float("nan")
    return {
        "study_id": record.study_id,
        "group_id": record.group_id,
        "frames": [io.BytesIO(encode_png(frame)) for frame in record.frames],
        "fps": np.float32(nan if record.fps is None else record.fps),
        "pixel_spacing_mm": np.asarray(record.pixel_spacing_mm or (nan, nan), np.float32),
        "organ": record.organ,
        "condition": record.condition,
        "findings": list(record.findings),
        "report": record.report,
        "language": record.language,
        "report_is_synthetic": record.report_is_synthetic,
        "regions": [
            {"frame": r.frame, "box": np.asarray(r.box, np.float32), "label": r.label} for r in record.regions
        ],
        "official_split": record.official_split,
        "source": record.source,
        "decoder": record.decoder,
    }


def check(record: Record) -> None:
    """Raises ``ValueError`` naming the study and the field that breaks the schema."""

    def fail(field: str, found: object, wanted: str) -> None:
        raise ValueError(f"study {record.study_id!r}: field {field!r} is {found!r}; {wanted}")

    frames = record.frames
    if frames.dtype != np.uint8 or frames.ndim != 3 or min(frames.shape) < 1:
        fail("frames", f"{frames.dtype} {frames.shape}", "expected uint8 [T, H, W] with no empty axis")
    if not record.group_id:
        fail("group_id", record.group_id, "splits are by group: every study needs one")
    if record.language not in LANGUAGES:
        fail("language", record.language, f"expected one of {LANGUAGES}")
    if record.official_split not in ("", *SPLITS):
        fail("official_split", record.official_split, f"expected '' or one of {SPLITS}")
    for region in record.regions:
        ymin, xmin, ymax, xmax = region.box
        if not (0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1):
            fail("regions.box", region.box, "expected (ymin, xmin, ymax, xmax) within [0, 1]")
        if not 0 <= region.frame < len(frames):
            fail("regions.frame", region.frame, f"the clip has {len(frames)} frames")


class EncodedFrames(tfds.decode.SkipDecoding):
    """Leaves the frames as PNG bytes: ``as_data_source(..., decoders={"frames": EncodedFrames()})``.

    A reader then decodes only the frames it samples. (``SkipDecoding`` itself does not cover sequences.)
    """

    def decode_batch_example_np(self, example: Any) -> Any:
        return example


def from_example(example: Mapping[str, Any], frame_indices: Sequence[int] | None = None) -> Record:
    """Turns an example of ``as_data_source`` back into a ``Record``.

    Args:
      example: with frames as PNG bytes (``EncodedFrames``) or decoded, uint8 [T, H, W, 1].
      frame_indices: frames to decode, in this order; all by default. Regions are renumbered to them, and
        those of other frames are dropped.

    Returns:
      The record; ``frames`` is uint8 [len(frame_indices), H, W].

    Raises:
      ValueError: a frame index outside the clip.
    """
    stored = example["frames"]
    indices = list(range(len(stored))) if frame_indices is None else [int(i) for i in frame_indices]
    if not indices or min(indices) < 0 or max(indices) >= len(stored):
        raise ValueError(f"frame indices {indices} asked of a clip of {len(stored)} frames")

    def decode(frame: Any) -> np.ndarray:
        return decode_png(frame) if isinstance(frame, bytes) else np.asarray(frame)[..., 0]

    regions = example["regions"]
    boxes = [
        (int(frame), tuple(float(v) for v in box), _text(label))
        for frame, box, label in zip(regions["frame"], regions["box"], regions["label"], strict=True)
    ]
    fps, spacing = float(example["fps"]), np.asarray(example["pixel_spacing_mm"], np.float64)
    return Record(
        study_id=_text(example["study_id"]),
        group_id=_text(example["group_id"]),
        frames=np.stack([decode(stored[i]) for i in indices]),
        organ=_text(example["organ"]),
        condition=_text(example["condition"]),
        report=_text(example["report"]),
        language=_text(example["language"]),
        report_is_synthetic=bool(example["report_is_synthetic"]),
        source=_text(example["source"]),
        decoder=_text(example["decoder"]),
        findings=tuple(_text(f) for f in example["findings"]),
        regions=tuple(
            Region(frame=new, box=box, label=label)  # type: ignore[arg-type]
            for new, old in enumerate(indices)
            for frame, box, label in boxes
            if frame == old
        ),
        fps=None if np.isnan(fps) else fps,
        pixel_spacing_mm=None if np.isnan(spacing).any() else (float(spacing[0]), float(spacing[1])),
        official_split=_text(example["official_split"]),
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
