"""3-D pooling with the arithmetic of PyTorch's MaxPool3d and AvgPool3d (floor mode)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

Array = jax.Array


def max_pool3d(
    x: Array, window: Sequence[int], strides: Sequence[int] | None = None, padding: Sequence[int] = (0, 0, 0)
) -> Array:
    """Takes the maximum of every window; padding never wins, also among negative values.

    Args:
      x: float [B, T, H, W, C].
      window: (temporal, vertical, horizontal) size.
      strides: steps between windows; the window itself when not given.
      padding: cells added on both sides of each axis, at most half the window.

    Returns:
      [B, T', H', W', C] with T' = floor((T + 2 padding - window) / stride) + 1, and so on.

    Raises:
      ValueError: shapes that do not fit, or padding of more than half a window.

    Source: torch.nn.MaxPool3d with ceil_mode=False.
    """
    return nn.max_pool(x, *_checked(x, window, strides, padding))


def average_pool3d(
    x: Array,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Sequence[int] = (0, 0, 0),
    count_include_pad: bool = True,
) -> Array:
    """Averages every window.

    Args:
      x: float [B, T, H, W, C].
      window, strides, padding: as in `max_pool3d`; padding holds zeros.
      count_include_pad: divide by the window's size everywhere; otherwise by its cells inside of x.

    Returns:
      [B, T', H', W', C], sizes as in `max_pool3d`.

    Raises:
      ValueError: shapes that do not fit, or padding of more than half a window.

    Source: torch.nn.AvgPool3d with ceil_mode=False.
    """
    y = nn.avg_pool(x, *_checked(x, window, strides, padding), count_include_pad=count_include_pad)
    return y.astype(x.dtype)  # Flax counts cells in float32, which would widen bfloat16


def _checked(
    x: Array, window: Sequence[int], strides: Sequence[int] | None, padding: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Window, strides and padding as Flax takes them."""
    strides = window if strides is None else strides
    if x.ndim != 5 or not len(window) == len(strides) == len(padding) == 3:
        raise ValueError(
            "3-D pooling needs x [B,T,H,W,C] and three numbers each of window, strides and padding; "
            f"got {x.shape}, {tuple(window)}, {tuple(strides)}, {tuple(padding)}"
        )
    for size, length, pad in zip(x.shape[1:4], window, padding, strict=True):
        if pad > length // 2 or size + 2 * pad < length:
            raise ValueError(
                f"pooling {x.shape} with window {tuple(window)} and padding {tuple(padding)}: the padding may be "
                "half a window at most, and a window must fit into the padded input"
            )
    return tuple(window), tuple(strides), tuple((pad, pad) for pad in padding)
