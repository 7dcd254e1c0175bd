"""Boxes (ymin, xmin, ymax, xmax)."""

from __future__ import annotations

import numpy as np


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes a [N, 4] and b [M, 4]: [N, M]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter, area_a, area_b = (area(sides) for sides in (high - low, a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]))
    return inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9)


def area(sides: np.ndarray) -> np.ndarray:
    """Product of the two sides [..., 2]; a negative one counts as 0."""
    return np.maximum(sides[..., 0], 0.0) * np.maximum(sides[..., 1], 0.0)
