"""Reading any media file by what it holds, never by what it is called."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dilbert_jax.media.clip import (
    MAX_FILE_BYTES,
    Clip,
    Decoded,
    MediaError,
    check_size,
    printable,
    silence_libraries,
)
from dilbert_jax.media.dicom import decode_dicom
from dilbert_jax.media.image import decode_image
from dilbert_jax.media.sector import blank_outside
from dilbert_jax.media.video import decode_video

_IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*", b"GIF87a", b"GIF89a")
# Files so called are meant to be clips, recognised or not: an interrupted copy leaves such a file empty.
_MEDIA_SUFFIXES = {
    ".dcm", ".dicom", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg",
    ".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp", ".gif", ".tif", ".tiff",
}  # fmt: skip
_QUICKTIME_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def read_clip(path: str | Path, *, max_frames: int | None = None, blank_outside_sector: bool = True) -> Clip:
    """Read one DICOM, video or image file, recognised by its content.

    Args:
        path: the file.
        max_frames: keep at most this many frames, evenly spaced with the first and the last; None keeps all.
        blank_outside_sector: set pixels outside the calibrated regions of a DICOM to 0; without these, or where
            they cover the frame, outside the detected scan sector. Text burned in there may name the patient
            whatever the header says. Where no sector stands out nothing is blanked.

    Returns:
        The clip; a still image is a clip of one frame.

    Raises:
        MediaError: the file is missing, unreadable, of no known kind, broken, or over a limit.
        ValueError: max_frames is less than 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1 or None, found {max_frames}")
    path = Path(path)
    decoded = _decode(path, max_frames)
    return _finish(decoded, str(path), blank_outside_sector)


def read_stills(paths: Sequence[str | Path], *, blank_outside_sector: bool = True) -> Clip:
    """Read an image sequence, one frame a file, in the given order.

    Args:
        paths: files of one still each (image or single-frame DICOM), all of one size.
        blank_outside_sector: as in `read_clip`; the sector is found over the whole sequence.

    Returns:
        The clip, without frame rate; with pixel spacing if all files agree on it.

    Raises:
        MediaError: a file cannot be read, holds several frames, or differs in size from the first.
        ValueError: paths is empty.
    """
    if isinstance(paths, (str, Path)) or not paths:
        raise ValueError("paths must be a non-empty list of files; read a single file with read_clip")
    stills: list[Decoded] = []
    for path in map(Path, paths):
        # Two frames suffice to see that a file is no still.
        still = _decode(path, 2)
        if len(still.frames) != 1:
            raise MediaError(path, "holds several frames; an image sequence takes files of one frame each")
        height, width = still.frames.shape[1:]
        first = stills[0].frames.shape[1:] if stills else (height, width)
        if (height, width) != first:
            raise MediaError(
                path,
                f"has {height} x {width} pixels and the sequence starts with {first[0]} x {first[1]}; "
                "use images of one size",
            )
        stills.append(still)
        check_size(path, height, width, len(stills))
    spacing = stills[0].pixel_spacing_mm
    same_spacing = all(still.pixel_spacing_mm == spacing for still in stills)
    calibrated = all(still.regions for still in stills)
    regions = {region: None for still in stills for region in still.regions} if calibrated else {}
    joined = Decoded(
        frames=np.concatenate([still.frames for still in stills]),
        decoder="; ".join(dict.fromkeys(still.decoder for still in stills)),
        frame_index=tuple(range(len(stills))),
        pixel_spacing_mm=spacing if same_spacing else None,
        regions=tuple(regions),
    )
    source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} (+{len(paths) - 1} more)"
    return _finish(joined, source, blank_outside_sector)


def find_media(path: str | Path) -> list[Path]:
    """List the media files of a folder and its subfolders by their first bytes, or a single file as it is.

    Args:
        path: file or folder; hidden files, DICOMDIR indexes and linked folders are passed over.

    Returns:
        Paths in natural order (frame2 before frame10), the same on every machine. Files that only their suffix
        calls media, and files that cannot be opened, are among them, so that reading says what is wrong.

    Raises:
        MediaError: nothing exists at path.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MediaError(path, "no such file or folder")
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            candidate = Path(folder, name)
            if name.startswith(".") or name.upper() == "DICOMDIR":
                continue
            try:
                known = _recognise(candidate, _read_start(candidate))
            except MediaError:
                known = "unreadable"
            if known or candidate.suffix.lower() in _MEDIA_SUFFIXES:
                found.append(candidate)
    return sorted(found, key=_natural_order)


def _natural_order(path: Path) -> tuple[list[list[tuple[int, str]]], str]:
    """Numbers inside names count as numbers; the plain text settles equal ones."""
    parts = [
        [
            (int(piece), "") if piece.isdecimal() else (-1, piece)
            for piece in re.split(r"([0-9]+)", part)
            if piece
        ]
        for part in path.parts
    ]
    return parts, str(path)


def _decode(path: Path, max_frames: int | None) -> Decoded:
    start = _read_start(path)
    kind = _recognise(path, start)
    if kind is None:
        what = "is empty (0 bytes)" if not start else "is no DICOM, video or image file of a known kind"
        raise MediaError(path, what)
    try:
        with silence_libraries():
            if kind == "dicom":
                return decode_dicom(path, max_frames)
            if kind == "image":
                return decode_image(path, max_frames)
            return decode_video(path, kind, max_frames)
    except MemoryError:
        raise MediaError(path, "needs more memory than there is; read fewer frames with max_frames") from None


def _read_start(path: Path) -> bytes:
    """The first bytes of a regular file of acceptable size."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(path, "is a folder; name a file or list the folder with find_media")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(path, "is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise MediaError(path, f"has {status.st_size} bytes; the limit is {MAX_FILE_BYTES}")
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise MediaError(path, "no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise MediaError(path, f"cannot be opened ({reason or type(error).__name__})") from None


def _recognise(path: Path, start: bytes) -> str | None:
    """'dicom', 'image', the FFmpeg demuxer of a video, or None."""
    if start[128:132] == b"DICM":
        return "dicom"
    if start.startswith(_IMAGE_STARTS):
        return "image"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start[4:8] in _QUICKTIME_ATOMS:
        return "mov"
    if start[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    if start[:4] == b"\x00\x00\x01\xb3":
        return "mpegvideo"
    if start[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if start[:1] == b"\x47" and start[188:189] == b"\x47" and start[376:377] == b"\x47":
        return "mpegts"
    # DICOM without preamble starts with an element of group 0002 or 0008, element number below 0x0100.
    if len(start) >= 8 and start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00":
        return "dicom"
    return None


def _finish(decoded: Decoded, source: str, blank_outside_sector: bool) -> Clip:
    frames, region = decoded.frames, Clip.region
    if blank_outside_sector:
        frames, region = blank_outside(frames, decoded.regions)
    return Clip(
        frames=frames,
        fps=decoded.fps,
        pixel_spacing_mm=decoded.pixel_spacing_mm,
        decoder=decoded.decoder,
        source=printable(source),
        region=region,
        frame_index=decoded.frame_index,
        blanked=frames is not decoded.frames,
    )
