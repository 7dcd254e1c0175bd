"""What builders share when they read: the root folder, clips at storage size, paths kept inside."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dilbert_jax.media import Clip, MediaError, read_clip, read_stills

MAX_STORED_FRAMES = 128  # the method takes at most 128 serialized images a clip
MAX_STORED_SIDE = 640  # pixels; model input is far smaller, and 1080-pixel cines would take gigabytes


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip as it goes into a record.

    Attributes:
      frames: uint8 [T, H, W], at most MAX_STORED_FRAMES frames of at most MAX_STORED_SIDE pixels a side.
      fps: frames per second of the kept frames, or None.
      pixel_spacing_mm: (row, column) of the stored pixels, or None.
      decoder: what decoded the pixels.
      frame_index: source frame number of each kept frame.
      blanked: as in `Clip`.
    """

    frames: np.ndarray
    fps: float | None
    pixel_spacing_mm: tuple[float, float] | None
    decoder: str
    frame_index: tuple[int, ...]
    blanked: bool


def read_for_storage(paths: Sequence[Path]) -> StoredClip:
    """Reads one file, or several stills as one sequence, blanked outside the scan sector.

    Args:
      paths: one file of any kind, or stills of one size in order.

    Returns:
      The clip with at most 128 evenly spaced frames; its rate and spacing follow what was kept.

    Raises:
      MediaError: as ``read_clip`` and ``read_stills``.
    """
    if len(paths) == 1:
        clip = read_clip(paths[0], max_frames=MAX_STORED_FRAMES)
    else:
        if len(paths) > MAX_STORED_FRAMES:
            raise MediaError(paths[0].parent, f"lists {len(paths)} stills; the limit is {MAX_STORED_FRAMES}")
        clip = read_stills(paths)
    return fit_for_storage(clip)


def fit_for_storage(clip: Clip) -> StoredClip:
    """Scales a clip to storage size and adapts frame rate and pixel spacing to it."""
    index = clip.frame_index or tuple(range(len(clip.frames)))
    fps = clip.fps
    if fps is not None and len(index) > 1:
        fps *= (len(index) - 1) / (index[-1] - index[0])
    height, width = clip.frames.shape[1:]
    scale = min(1.0, MAX_STORED_SIDE / max(height, width))
    frames, spacing = clip.frames, clip.pixel_spacing_mm
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        frames = np.stack(
            [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in clip.frames]
        )
        if spacing is not None:
            spacing = (spacing[0] * height / size[1], spacing[1] * width / size[0])
    return StoredClip(frames, fps if len(index) > 1 else None, spacing, clip.decoder, index, clip.blanked)


def find_root(manual_dir: Path, candidates: Sequence[str], marker: Sequence[str]) -> Path | None:
    """The first of manual_dir/candidate that holds one of the marker entries, or None."""
    for candidate in candidates:
        root = manual_dir / candidate
        if any((root / name).exists() for name in marker):
            return root
    return None


def describe_folder(folder: Path, limit: int = 6) -> str:
    """Names in a folder, for the message about a wrong layout."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def resolve_inside(folder: Path, name: str) -> Path:
    """Joins a path from an index file to its folder.

    Args:
      folder: the data set's folder.
      name: relative path as the index states it.

    Returns:
      The path; it need not exist.

    Raises:
      ValueError: an absolute path, or one that leaves the folder (also through a link).
    """
    if not name or "\x00" in name or "\\" in name or PurePosixPath(name).is_absolute():
        raise ValueError(
            f"media path {name!r} must be relative to the data set's folder, with forward slashes"
        )
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"media path {name!r} leads outside the data set's folder")
    return folder / name


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
