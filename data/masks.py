"""Masks: reading them, boxes from them, and what can be measured of a lesion with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from dilbert_jax.media import MediaError

Box = tuple[float, float, float, float]


def read_mask_image(path: Path, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """Reads a mask picture of a known size; transparent pixels count as background.

    Args:
      path: PNG of any mode ("1", "L", "RGB", "RGBA", palette).
      size: (height, width) of the picture that it belongs to.
      mode: "L" or "RGB".

    Returns:
      uint8 [H, W] or [H, W, 3].

    Raises:
      MediaError: not a readable image, or of another size.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "BMP", "TIFF")) as image:
            if (image.height, image.width) != size:
                raise MediaError(
                    path,
                    f"mask of {image.height} x {image.width} pixels for an image of {size[0]} x {size[1]}",
                )
            opaque = image.convert("RGBA")
    except MediaError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing trips over
        raise MediaError(path, f"mask cannot be decoded ({type(error).__name__})") from None
    black = Image.new("RGBA", opaque.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, opaque).convert(mode))


def find_box(mask: np.ndarray) -> Box:
    """Bounding box (ymin, xmin, ymax, xmax) in [0, 1] of a bool mask [H, W] with at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("mask is empty; a box needs at least one pixel")
    height, width = mask.shape
    return (rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width)


def find_part_boxes(mask: np.ndarray, min_pixels: int) -> list[Box]:
    """Boxes of the connected parts of at least ``min_pixels``; thin seams between parts are opened first."""
    labels, count = ndimage.label(ndimage.binary_opening(mask, np.ones((3, 3), bool)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [find_box(labels == part) for part in range(1, count + 1) if sizes[part] >= min_pixels]


@dataclasses.dataclass(frozen=True)
class Lesion:
    """What its mask and the grey levels around it show of a lesion.

    Attributes:
      box: (ymin, xmin, ymax, xmax) in [0, 1].
      width_share: width over image width.
      descriptors: concept ids of shape, orientation, echogenicity and posterior features, only those that are
        clear; borderline values give none.
    """

    box: Box
    width_share: float
    descriptors: tuple[str, ...]


def measure_lesion(frame: np.ndarray, mask: np.ndarray) -> Lesion:
    """Measures a lesion in a B-mode image (rows are depth; square pixels are assumed).

    Shape from solidity (area over convex hull) and the axes of inertia; orientation from the box;
    echogenicity from the median inside over that of a ring around, lateral to the lesion; posterior features
    from the strip below it over the strips beside that.

    Args:
      frame: uint8 [H, W].
      mask: bool [H, W], not empty.

    Returns:
      The measurements.
    """
    box = find_box(mask)
    top, left, bottom, right = (
        round(side * scale) for side, scale in zip(box, (*mask.shape, *mask.shape), strict=True)
    )
    height, width = bottom - top, right - left
    descriptors: list[str] = []
    if mask.sum() >= 64:
        descriptors += _describe_shape(mask, height, width)
        descriptors += _describe_echogenicity(frame, mask, height, width)
        descriptors += _describe_posterior(frame, (top, left, bottom, right))
    return Lesion(box, width / mask.shape[1], tuple(descriptors))


def _describe_shape(mask: np.ndarray, height: int, width: int) -> list[str]:
    points = np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(np.float64)
    corners = np.concatenate([points + offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1))])
    try:
        solidity = mask.sum() / ConvexHull(corners).volume  # in two dimensions the volume is the area
    except QhullError:
        return []
    axes = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(mask).T.astype(np.float64))))
    elongation = axes[1] / max(axes[0], 1e-9)
    found = []
    if solidity >= 0.93:
        if elongation <= 1.15:
            found.append("round")
        elif elongation >= 1.25:
            found.append("oval")
    elif solidity <= 0.88:
        found.append("irregular")
    if width >= 1.15 * height:
        found.append("parallel_orientation")
    elif height >= 1.05 * width:
        found.append("taller_than_wide")
    return found


def _describe_echogenicity(frame: np.ndarray, mask: np.ndarray, height: int, width: int) -> list[str]:
    reach = max(3, round(0.25 * min(height, width)))
    inner = ndimage.binary_erosion(mask, iterations=max(1, reach // 6))
    ring = ndimage.binary_dilation(mask, iterations=reach) & ~ndimage.binary_dilation(mask, iterations=2)
    rows = np.flatnonzero(mask.any(1))
    ring[: rows[0]] = ring[rows[-1] + 1 :] = False  # above and below, depth and shadows change the level
    if inner.sum() < 32 or ring.sum() < 32:
        return []
    inside, around = float(np.median(frame[inner])), float(np.median(frame[ring]))
    if around < 12:
        return []  # nothing to compare with
    ratio = inside / around
    if ratio < 0.2 and inside < 16:
        return ["anechoic"]
    if ratio < 0.8:
        return ["hypoechoic"]
    if ratio > 1.25:
        return ["hyperechoic"]
    return ["isoechoic"] if 0.9 <= ratio <= 1.1 else []


def _describe_posterior(frame: np.ndarray, pixels: tuple[int, int, int, int]) -> list[str]:
    top, left, bottom, right = pixels
    depth, width = max(8, (bottom - top) // 2), right - left
    rows = slice(bottom + 2, bottom + 2 + depth)
    below = frame[rows, left + width // 5 : right - width // 5]
    sides = (frame[rows, max(0, left - width // 2) : left], frame[rows, right : right + width // 2])
    beside = np.concatenate([side.ravel() for side in sides])
    if below.size < 64 or beside.size < 64 or below.shape[0] < 8:
        return []
    under, reference = float(np.median(below)), float(np.median(beside))
    if reference < 12:
        return []
    if under >= 1.5 * reference:
        return ["posterior_enhancement"]
    return ["posterior_shadowing"] if under <= 0.5 * reference else []


def describe_place(box: Sequence[float]) -> str:
    """Where a box lies in the image, in words: thirds of the image, "upper left", "central", ..."""
    y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return f"{row} {column}".strip() or "central"
