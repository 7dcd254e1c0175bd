"""The clip, its error, and what every reader shares: limits, frame selection, luma and silence."""

import dataclasses
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAX_FRAME_PIXELS = 64 * 2**20  # one frame; a large ultrasound frame holds about 2 * 2**20
MAX_FRAMES = 20_000
MAX_CLIP_BYTES = 2 * 2**30  # grayscale frames kept in memory
MAX_DECODED_PIXELS = 2**35  # all frames of a file, kept or not: bounds the time a hostile file can take
MAX_FILE_BYTES = 2 * 2**30

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def printable(path: str | os.PathLike[str]) -> str:
    r"""A file's name as text that can be written anywhere.

    Args:
        path: the file; bytes of its name that are no UTF-8 are surrogates in Python, which UTF-8 cannot hold.

    Returns:
        The name, with `\udcd6` for the byte D6 where it is no UTF-8.
    """
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


class MediaError(Exception):
    """One media file that cannot be used.

    Args:
        path: the file.
        reason: what is wrong with it; never holds header text of the file, which may name a patient.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Clip:
    """Grayscale frames of one ultrasound file, without anything that names the patient.

    Attributes:
        frames: uint8 [T, H, W], ITU-R 601 luma; a still has T = 1.
        fps: frames per second of the source (before any selection), None for stills or if unknown.
        pixel_spacing_mm: (row, column) distance between pixel centres in mm, None if not calibrated.
        decoder: the libraries and versions that decoded the pixels.
        source: path of the file, as `printable`; of an image sequence the first file and the count of the others.
        region: (ymin, xmin, ymax, xmax) in [0, 1], bounding box of the pixels that were kept; the whole
            image if nothing was blanked.
        frame_index: source frame number of each kept frame, T entries.
        blanked: some pixels were set to 0; False where no sector stood out, or nobody asked.
    """

    frames: np.ndarray
    fps: float | None
    pixel_spacing_mm: tuple[float, float] | None
    decoder: str
    source: str
    region: tuple[float, float, float, float] = WHOLE_IMAGE
    frame_index: tuple[int, ...] = ()
    blanked: bool = False


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a reader hands on: a clip before de-identification; `regions` are pixel boxes (y0, x0, y1, x1)."""

    frames: np.ndarray
    decoder: str
    frame_index: tuple[int, ...]
    fps: float | None = None
    pixel_spacing_mm: tuple[float, float] | None = None
    regions: tuple[tuple[int, int, int, int], ...] = ()


def select_frames(num_frames: int, max_frames: int | None) -> list[int]:
    """Choose evenly spaced frames, the first and the last among them.

    Args:
        num_frames: frames of the source, at least 1.
        max_frames: most frames to keep, None for all; 1 keeps the first.

    Returns:
        Increasing frame numbers, min(num_frames, max_frames) of them.
    """
    if max_frames is None or num_frames <= max_frames:
        return list(range(num_frames))
    return [int(i) for i in np.linspace(0, num_frames - 1, max_frames).round()]


def check_size(path: Path, height: int, width: int, num_frames: int = 1, num_kept: int | None = None) -> None:
    """Refuse sizes that would cost unreasonable memory or time, before anything is allocated.

    Args:
        path: the file, for the message.
        height: rows of a frame.
        width: columns of a frame.
        num_frames: frames that must be decoded.
        num_kept: frames held in memory, None for all of them.

    Raises:
        MediaError: a side is not positive or a limit of this module is exceeded.
    """
    num_kept = num_frames if num_kept is None else num_kept
    if height < 1 or width < 1:
        raise MediaError(path, f"has an empty frame of {height} x {width} pixels")
    if height * width > MAX_FRAME_PIXELS:
        raise MediaError(
            path, f"has frames of {height} x {width} pixels; the limit is {MAX_FRAME_PIXELS} pixels"
        )
    if num_frames > MAX_FRAMES:
        raise MediaError(path, f"has more than {MAX_FRAMES} frames; split it into shorter clips")
    if height * width * num_frames > MAX_DECODED_PIXELS:
        raise MediaError(
            path, f"has {num_frames} frames of {height} x {width} pixels or more, too much to decode"
        )
    if height * width * num_kept > MAX_CLIP_BYTES:
        raise MediaError(
            path,
            f"needs {height * width * num_kept} bytes for {num_kept} frames; the limit is {MAX_CLIP_BYTES}: "
            "read fewer frames with max_frames",
        )


def luma(rgb: np.ndarray) -> np.ndarray:
    """Convert RGB to ITU-R 601 luma, Y = 0.299 R + 0.587 G + 0.114 B, in the fixed point that Pillow uses.

    Args:
        rgb: uint8 [..., 3].

    Returns:
        uint8 [...].
    """
    red, green, blue = (rgb[..., i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


_silence_lock = threading.Lock()
_silence_depth = 0
_silenced_warnings: warnings.catch_warnings | None = None
_silenced_levels: dict[str, int] = {}
_NOISY_LOGGERS = ("pydicom", "PIL", "libav", "openjpeg", "pylibjpeg")


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep library warnings and logs away; they may quote patient headers.

    Warning filters belong to the process, so threads share one nesting count.
    """
    global _silence_depth, _silenced_warnings
    with _silence_lock:
        if _silence_depth == 0:
            _silenced_warnings = warnings.catch_warnings()
            _silenced_warnings.__enter__()
            warnings.simplefilter("ignore")
            for name in _NOISY_LOGGERS:
                _silenced_levels[name] = logging.getLogger(name).level
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        _silence_depth += 1
    try:
        yield
    finally:
        with _silence_lock:
            _silence_depth -= 1
            if _silence_depth == 0:
                assert _silenced_warnings is not None
                _silenced_warnings.__exit__(None, None, None)
                for name in _NOISY_LOGGERS:
                    logging.getLogger(name).setLevel(_silenced_levels[name])
