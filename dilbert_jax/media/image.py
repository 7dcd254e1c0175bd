"""Stills and animations through Pillow: PNG, JPEG, BMP, TIFF and GIF."""

from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from dilbert_jax.media.clip import MAX_FRAMES, Decoded, MediaError, check_size, select_frames

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF")


def decode_image(path: Path, max_frames: int | None) -> Decoded:
    """Decode an image file; an animated GIF or PNG or a TIFF of several pages gives one frame each.

    Args:
        path: the file.
        max_frames: most frames to keep, evenly spaced; None for all.

    Returns:
        Grayscale frames; transparent pixels are composed over black.

    Raises:
        MediaError: the file is broken, too large, or its frames differ in size.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _decode(path, image, max_frames)
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(path, "declares more pixels than Pillow accepts; it is not read") from None
    except Exception as error:
        # Pillow's plugins raise whatever their parsing trips over, SyntaxError and struct.error included.
        raise MediaError(path, f"cannot be decoded as an image ({_describe(error)})") from None


def _decode(path: Path, image: Image.Image, max_frames: int | None) -> Decoded:
    check_size(path, image.height, image.width)
    num_frames = _count_frames(path, image)
    chosen = select_frames(num_frames, max_frames)
    check_size(path, image.height, image.width, num_frames, len(chosen))
    width, height = image.size
    orientation = image.getexif().get(0x0112, 1)
    frames, durations = [], []
    for number in range(num_frames):
        if num_frames > 1:
            image.seek(number)
        if image.size != (width, height):
            raise MediaError(
                path,
                f"frame {number} has {image.height} x {image.width} pixels, frame 0 {height} x {width}; "
                "store frames of one size",
            )
        if num_frames > 1:
            durations.append(float(image.info.get("duration") or 0))
        if number in chosen:
            upright = ImageOps.exif_transpose(image) if num_frames == 1 and orientation != 1 else image
            frames.append(_to_gray(upright))
    total = sum(durations)
    fps = 1000 * len(durations) / total if total > 0 else None
    decoder = f"pillow {PIL.__version__} {image.format}"
    return Decoded(np.stack(frames), decoder, tuple(chosen), fps=fps)


def _count_frames(path: Path, image: Image.Image) -> int:
    """Count frames by walking them, so that an endless file stops at the limit."""
    if not getattr(image, "is_animated", False):
        return 1
    count = 1
    while True:
        try:
            image.seek(count)
        except EOFError:
            break
        count += 1
        if count > MAX_FRAMES:
            raise MediaError(path, f"has more than {MAX_FRAMES} frames; split it into shorter clips")
    image.seek(0)
    return count


def _to_gray(image: Image.Image) -> np.ndarray:
    """One Pillow image of any mode as uint8 [H, W]."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
    if image.mode == "I":
        # Pillow widens 16-bit PNGs of some layouts to 32 bits; the values stay those of 16 bits.
        return (np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no display range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, rgba).convert("L")).copy()
    if image.mode == "P":
        image = image.convert("RGB")
    return np.asarray(image.convert("L")).copy()


def _describe(error: Exception) -> str:
    text = str(error).split("\n")[0].strip()
    # Pillow's "cannot identify" repeats the path, which the message already names.
    if isinstance(error, PIL.UnidentifiedImageError):
        return "damaged or not of the format that its first bytes announce"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
