"""Video through PyAV: MP4, MOV, AVI, MPEG, Matroska."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from dilbert_jax.media.clip import (
    MAX_FRAME_PIXELS,
    MAX_FRAMES,
    Decoded,
    MediaError,
    check_size,
    luma,
    select_frames,
)

# Limited ("TV") range puts black at 16 and white at 235 [ITU-R BT.601].
_EXPAND_LIMITED = np.clip((np.arange(256) - 16) * (255 / 219), 0, 255).round().astype(np.uint8)
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_LUMA_FIRST = ("yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuv410p", "yuv440p", "nv12", "nv21")
_LUMA_FIRST_FULL = ("gray", "yuvj420p", "yuvj422p", "yuvj444p", "yuvj411p", "yuvj440p")
# The decoder itself must refuse a size that changes in mid-stream.
_CODEC_OPTIONS = {"max_pixels": str(MAX_FRAME_PIXELS)}


def decode_video(path: Path, container_format: str, max_frames: int | None) -> Decoded:
    """Decode the first video stream of a file.

    With `max_frames` the file is decoded twice, first to count: headers miscount, and only the selected
    frames are ever held.

    Args:
        path: the file.
        container_format: FFmpeg demuxer; forcing it keeps playlist formats, which open other files, out.
        max_frames: most frames to keep, evenly spaced; None for all.

    Returns:
        Grayscale frames, upright.

    Raises:
        MediaError: the file is broken, too large, holds no video, or its frame size changes.
    """
    try:
        if container_format == "matroska":
            _check_matroska_size(path)
        chosen = None
        if max_frames is not None:
            num_frames = sum(1 for _ in _iterate_frames(path, container_format))
            if num_frames:
                chosen = set(select_frames(num_frames, max_frames))
        frames: list[np.ndarray] = []
        frame_index = []
        fps = codec = None
        for number, (frame, fps, codec) in enumerate(_iterate_frames(path, container_format)):  # noqa: B007
            if chosen is None or number in chosen:
                frames.append(_to_gray(frame))
                frame_index.append(number)
                check_size(path, frame.height, frame.width, number + 1, len(frames))
    except MediaError:
        raise
    except av.FFmpegError as error:
        raise MediaError(
            path, f"cannot be decoded as video ({error.strerror or type(error).__name__})"
        ) from None
    except Exception as error:
        raise MediaError(path, f"cannot be decoded as video ({type(error).__name__})") from None
    if not frames:
        raise MediaError(path, "no video frame can be decoded")
    version = ".".join(str(n) for n in av.library_versions["libavcodec"])
    decoder = f"pyav {av.__version__} libavcodec {version} {codec}"
    return Decoded(np.stack(frames), decoder, tuple(frame_index), fps=fps if len(frames) > 1 else None)


def _check_matroska_size(path: Path) -> None:
    """Refuse a Matroska file that ends before it says; FFmpeg takes the cut for the end of the clip.

    A file is a header and a segment that holds all else, each an id of 4 bytes, a size and its content. The
    zero bits that a size starts with count its further bytes; all other bits set mean unknown [RFC 8794].
    """
    with path.open("rb") as file:
        start = file.read(4096)
    found, end = path.stat().st_size, 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        number = start[end + 4 : end + 13]
        length = 9 - number[0].bit_length() if number else 0
        unknown = (1 << 7 * length) - 1
        size = int.from_bytes(number[:length], "big") & unknown
        if start[end : end + 4] != name or size == unknown:
            return
        end += 4 + length + size
    if found < end:
        raise MediaError(path, f"is truncated: it says {end} bytes and has {found}")


# PyAV 19 keeps undecodable metadata by itself and no longer takes the argument.
_METADATA_OPTIONS: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)


def _iterate_frames(path: Path, container_format: str) -> Iterator[tuple[av.VideoFrame, float | None, str]]:
    """Decode frame by frame within the limits, with the frame rate and the codec's name."""
    with av.open(
        f"file:{path}",
        format=container_format,
        options={"protocol_whitelist": "file", **_CODEC_OPTIONS},
        **_METADATA_OPTIONS,
    ) as container:
        if not container.streams.video:
            raise MediaError(path, "holds no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise MediaError(path, "holds a video stream of a codec that FFmpeg does not know")
        check_size(path, context.height or 1, context.width or 1)
        context.options = _CODEC_OPTIONS
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.base_rate
        fps = float(rate) if rate else None
        size, number = None, 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise MediaError(path, f"is truncated or damaged after {number} decoded frames")
            for frame in packet.decode():
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise MediaError(
                        path,
                        f"frame {number} has {frame.height} x {frame.width} pixels and frame 0 has "
                        f"{size[0]} x {size[1]}; store frames of one size",
                    )
                number += 1
                if number > MAX_FRAMES:
                    raise MediaError(path, f"has more than {MAX_FRAMES} frames; split it into shorter clips")
                check_size(path, frame.height, frame.width, number, 1)
                yield frame, fps, context.name


def _to_gray(frame: av.VideoFrame) -> np.ndarray:
    """The luma of one frame as uint8 [H, W], full range; 8-bit luma planes are taken as they are stored."""
    name = frame.format.name
    if name in _LUMA_FIRST or name in _LUMA_FIRST_FULL:
        plane = frame.planes[0]
        rows = np.asarray(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        gray = rows[: frame.height, : frame.width]
        full = name in _LUMA_FIRST_FULL or frame.color_range == _FULL_RANGE
        gray = gray.copy() if full else _EXPAND_LIMITED[gray]
    else:
        gray = luma(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(gray, turns)) if turns else gray
