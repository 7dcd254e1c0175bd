"""Groups of studies that a split must not separate: shared pixels, near-duplicates, shared patients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

HASH_SIDE = 16
# Of 256 bits. In the 165 BUSI images at hand every pair up to 58 was the same picture (other crop, size or
# annotation) and every pair from 78 on was not, judged by eye; unrelated pairs centre on 115.
NEAR_DUPLICATE_BITS = 64


def hash_image(frame: np.ndarray) -> np.ndarray:
    """Difference hash of a picture: is each cell of a 16 x 17 grid brighter than its left neighbour?

    Args:
      frame: uint8 [H, W].

    Returns:
      bool [256]; the Hamming distance of two hashes is small for scaled, cropped or annotated copies.
    """
    grid = Image.fromarray(frame).resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid).astype(np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def group_near_duplicates(hashes: np.ndarray, limit: int = NEAR_DUPLICATE_BITS) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of hashes bool [N, 256] that differ in at most ``limit`` bits."""
    bits = np.asarray(hashes, np.float32)
    distance = bits.sum(1)[:, None] + bits.sum(1)[None, :] - 2 * bits @ bits.T
    first, second = np.nonzero(np.triu(distance <= limit, k=1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def merge_groups(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Joins names linked by pairs, also through others.

    Args:
      names: all names.
      pairs: links between names.

    Returns:
      For each name its group: the smallest name that it is linked to.
    """
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return {name: root(name) for name in names}
