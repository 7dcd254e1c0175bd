"""Augmentation of clips that leaves ultrasound what it is."""

from __future__ import annotations

import numpy as np

from dilbert_jax.boxes import area

SMALLEST_CROP = 0.9
LEAST_VISIBLE = 0.2
CACHED_PIXELS = 1 << 16  # augmented at a time


def augment(
    frames: np.ndarray, boxes: np.ndarray, sector: np.ndarray, rng: np.random.Generator, mirror: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ultrasound-safe augmentation, the same for all frames of a clip; speckle is neither smoothed nor made up.

    Gain, gamma and a gain over depth, as the sliders of time-gain compensation, change grey levels and keep black
    black. A crop inside the sector, at least 90 % of its sides, takes the sector's place by repeating pixels;
    where `mirror` allows, the clip is flipped half of the time; then it is shifted by at most 6 % of the canvas.
    Findings such as "enlarged" speak of size, so the zoom is kept mild: at most 11 %.

    Args:
      frames: uint8 [T, S, S]; what lies outside of the sector becomes black.
      boxes: [N, 4] in [0, 1].
      sector: [1, 4], the scan sector.
      rng: source of all choices.
      mirror: whether left and right may change sides.

    Returns:
      Frames, boxes and sector (float32), cut to what is seen; a box of which less than 20 % is seen is all zero.
    """
    size = frames.shape[1]
    low, high = np.rint(sector.reshape(2, 2) * size).astype(np.int64)
    extent = high - low
    scale = rng.uniform(SMALLEST_CROP, 1.0)
    start = rng.random(2) * (1.0 - scale) * extent
    rows, columns = (
        low[axis] + (start[axis] + (np.arange(extent[axis]) + 0.5) * scale).astype(np.int64)
        for axis in (0, 1)
    )
    flip = mirror and rng.random() < 0.5
    shift = rng.integers(-round(0.06 * size), round(0.06 * size) + 1, 2)

    # Corners in pixels go where the pixels go: from the crop to the sector's place, flipped, shifted.
    moved = (np.concatenate([boxes, sector]).reshape(-1, 2, 2) * size - low - start) / scale + low
    whole = area(moved[:, 1] - moved[:, 0])
    moved = np.clip(moved, low, high)
    if flip:
        columns = columns[::-1]
        low[1], high[1] = size - high[1], size - low[1]
        moved[..., 1] = size - moved[:, ::-1, 1]
    low, high = low + shift, high + shift
    moved = np.clip(moved + shift, 0, size)
    moved[area(moved[:, 1] - moved[:, 0]) < LEAST_VISIBLE * whole] = 0.0

    (top, left), (bottom, right) = np.clip((low, high), 0, size)
    rows, columns = rows[top - low[0] : bottom - low[0]], columns[left - low[1] : right - low[1]]
    tables = _gain_tables(len(rows), rng)
    offsets = (256 * np.arange(len(rows), dtype=np.uint16 if len(rows) <= 256 else np.int64))[:, None]
    out = np.zeros_like(frames)
    step = max(1, CACHED_PIXELS // size**2)
    for i in range(0, len(frames), step):
        seen = frames[i : i + step].take(rows, 1).take(columns, 2)
        out[i : i + step, top:bottom, left:right] = tables.take(seen + offsets)
    moved = (moved / size).reshape(-1, 4).astype(np.float32)
    return out, moved[:-1], moved[-1:]


def _gain_tables(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Grey level -> grey level for each row, uint8 [num_rows, 256]: gain and gamma, and a gain over depth."""
    gain, gamma = rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.25)
    sliders = rng.uniform(0.88, 1.12, 4)
    depth_gain = np.interp(np.linspace(0, 3, num_rows), np.arange(4), sliders)
    table = 255.0 * gain * (np.arange(256) / 255.0) ** gamma
    tables = np.multiply.outer(depth_gain, table, dtype=np.float32)
    tables += 0.5
    return np.minimum(tables, 255, out=tables).astype(np.uint8)
