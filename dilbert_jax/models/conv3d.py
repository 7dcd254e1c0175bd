"""3-D convolution and the 3-D CNN that turns a cine clip into a space-time feature map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilbert_jax.models.attention import Dense
from dilbert_jax.sharding import gather

Array = jax.Array


def conv3d(x: Array, kernel: Array, strides: Sequence[int] = (1, 1, 1)) -> Array:
    """Convolves in space and time with zero padding ("same" for odd kernels at stride 1).

    Differentiable in reverse mode only. The arithmetic on a CPU is float32 or wider.

    Args:
      x: [B, T, H, W, C].
      kernel: [kT, kH, kW, C, O]; odd sizes. Padding is (k - 1) / 2 on both sides of each axis, as in
        PyTorch's `padding=k//2`, also when the stride exceeds 1.
      strides: (temporal, vertical, horizontal).

    Returns:
      [B, T', H', W', O] with T' = ceil(T / stride), and so on.
    """
    if x.ndim != 5 or kernel.ndim != 5 or x.shape[-1] != kernel.shape[3]:
        raise ValueError(
            f"conv3d needs x [B,T,H,W,C] and kernel [kT,kH,kW,C,O]; got {x.shape} and {kernel.shape}"
        )
    if any(size % 2 == 0 for size in kernel.shape[:3]):
        raise ValueError(
            f"conv3d needs odd kernel sizes; got {kernel.shape[:3]} (a stem with stride = kernel: patchify)"
        )
    return _conv3d(x, kernel, tuple(strides))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3d(x: Array, kernel: Array, strides: tuple[int, ...]) -> Array:
    """The form is chosen when the program is lowered, for the platform it is lowered for."""
    on_cpu = _by_tile if strides == (1, 1, 1) else partial(_sum_over_taps, strides=strides)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=partial(_at_once, strides=strides))


def _conv3d_forward(x: Array, kernel: Array, strides: tuple[int, ...]) -> tuple[Array, tuple[Array, Array]]:
    return _conv3d(x, kernel, strides), (x, kernel)


def _conv3d_backward(
    strides: tuple[int, ...], saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def derived(form: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
        return lambda x, kernel, gradient: jax.vjp(partial(form, strides=strides), x, kernel)[1](gradient)

    if strides == (1, 1, 1):
        forms = {"cpu": _gradients_by_tile, "tpu": _gradients_by_tap}
    else:
        forms = {"cpu": derived(_sum_over_taps)}
    return lax.platform_dependent(*saved, gradient, default=derived(_at_once), **forms)


_conv3d.defvjp(_conv3d_forward, _conv3d_backward)


def _half(kernel: Array) -> list[tuple[int, int]]:
    """The padding of each axis."""
    return [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:3]]


def _at_once(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """`conv3d` as accelerators want it."""
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return lax.conv_general_dilated(x, kernel, strides, _half(kernel), dimension_numbers=numbers)


def _sum_over_taps(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """`conv3d` as a sum of 2-D convolutions over the temporal taps, several times faster than 3-D on XLA:CPU."""
    padding = _half(kernel)
    batch, _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    steps = (x.shape[1] - kernel.shape[0]) // strides[0] + 1
    out: Array | None = None
    for tap in range(kernel.shape[0]):
        frames = lax.slice_in_dim(x, tap, tap + (steps - 1) * strides[0] + 1, strides[0], axis=1)
        y = lax.conv_general_dilated(
            frames.reshape(batch * steps, height, width, channels),
            kernel[tap],
            strides[1:],
            padding[1:],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        out = y if out is None else out + y
    assert out is not None
    return out.reshape(batch, steps, *out.shape[1:])


def _temporal_transforms(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices A, B, G of a temporal convolution of a tile of frames: y = A ((G kernel) * (B x)), * point by point.

    Three taps: Winograd's F(2, 3), four products for two output frames instead of six. Others: the sum over the taps.

    Returns:
      A [outputs, points], B [points, outputs + taps - 1], G [points, taps].

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1.
    """
    if taps == 3:
        return (
            np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
            np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
            np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
        )
    return np.ones((1, taps)), np.eye(taps), np.eye(taps)


def _combine(weights: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    """One weighted sum of the arrays for each row of `weights`; zeros cost nothing."""
    sums = []
    for row in weights.tolist():
        terms = [array if w == 1 else w * array for w, array in zip(row, arrays, strict=True) if w]
        sums.append(sum(terms[1:], start=terms[0]))
    return sums


def _frames(x: Array, first: Array, count: int, dtype: Any) -> list[Array]:
    """`count` frames [B, H, W, C] from `first` on, zero outside the clip."""
    frames = []
    for at in (first + offset for offset in range(count)):
        frame = lax.dynamic_index_in_dim(x, at, axis=1, keepdims=False)
        frames.append(jnp.where((at >= 0) & (at < x.shape[1]), frame, 0).astype(dtype))
    return frames


def _by_tile(x: Array, kernel: Array) -> Array:
    """`conv3d` at stride 1 as 2-D convolutions, a few output frames at a time.

    On a CPU fresh memory costs as much as arithmetic. The loop needs the memory of a few frames, and the batch stays
    an axis, so that it can be sharded.
    """
    to_outputs, to_points, to_kernels = _temporal_transforms(kernel.shape[0])
    outputs, wide = len(to_outputs), jnp.promote_types(x.dtype, jnp.float32)
    before, *padding = _half(kernel)
    kernels = _combine(to_kernels, list(kernel.astype(wide)))
    batch, time, height, width, _ = x.shape
    tiles = -(-time // outputs)

    def convolve(tile: Array, out: Array) -> Array:
        points = _combine(to_points, _frames(x, tile * outputs - before[0], to_points.shape[1], wide))
        products = [
            lax.conv_general_dilated(f, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            for f, k in zip(points, kernels, strict=True)
        ]
        for output, y in enumerate(_combine(to_outputs, products)):
            out = lax.dynamic_update_index_in_dim(out, y.astype(x.dtype), tile * outputs + output, axis=1)
        return out

    # Overwritten whole. Zeros XLA would share between convolutions, and copy for each.
    unwritten = jnp.broadcast_to(kernel[0, 0, 0, 0], (batch, tiles * outputs, height, width, kernel.shape[4]))
    return lax.fori_loop(0, tiles, convolve, unwritten)[:, :time]


def _shift(
    x: Array, gradient: Array, shape: tuple[int, ...], padding: Sequence[tuple[int, int]]
) -> tuple[Array, Array]:
    """x [..., H, W, C] shifted by the kernel's columns and the gradient [..., H, W, O] by its rows, side by side.

    One product of the two over all positions has all rows and columns of the kernel, and neither is copied for each of
    its cells: [..., H, W, columns * C] and [..., H, W, rows * O].
    """
    rows, columns = shape
    (up, _), (left, _) = padding
    height, width = x.shape[-3:-1]
    whole = [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, (*whole, (0, 0), (left, left), (0, 0)))
    gradient = jnp.pad(gradient, (*whole, (up, up), (0, 0), (0, 0)))
    by_column = [x[..., column : column + width, :] for column in range(columns)]
    # Input row h meets the gradient of output row h - row + up.
    by_row = [gradient[..., 2 * up - row : 2 * up - row + height, :, :] for row in range(rows)]
    return jnp.concatenate(by_column, axis=-1), jnp.concatenate(by_row, axis=-1)


def _gradients_by_tap(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """The kernel's gradient as a product a temporal tap: by XLA:TPU's estimate far cheaper than a convolution."""
    taps, rows, columns, channels, features = kernel.shape
    before, *padding = _half(kernel)
    time = x.shape[1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    f, g = _shift(x, gradient, (rows, columns), padding)
    f = jnp.pad(f, ((0, 0), before, (0, 0), (0, 0), (0, 0)))
    products = [
        jnp.einsum("bthwi,bthwo->io", f[:, tap : tap + time], g, preferred_element_type=wide)
        for tap in range(taps)
    ]
    by_tap = jnp.stack(products).reshape(taps, columns, channels, rows, features)
    (x_gradient,) = jax.vjp(lambda x: _at_once(x, kernel, (1, 1, 1)), x)[1](gradient)
    return x_gradient, by_tap.transpose(0, 3, 1, 2, 4).astype(kernel.dtype)


def _gradients_by_tile(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """The input's gradient is a convolution with the kernel turned round; the kernel's is a matrix product a point."""
    taps, rows, columns, channels, features = kernel.shape
    to_outputs, to_points, to_kernels = _temporal_transforms(taps)
    outputs, wide = len(to_outputs), jnp.promote_types(x.dtype, jnp.float32)
    (before, _), *padding = _half(kernel)
    time = x.shape[1]

    def accumulate(tile: Array, totals: list[Array]) -> list[Array]:
        points = _combine(to_points, _frames(x, tile * outputs - before, to_points.shape[1], wide))
        gradients = _frames(gradient, tile * outputs, outputs, wide)
        products = []
        for f, g in zip(points, _combine(to_outputs.T, gradients), strict=True):
            f, g = _shift(f, g, (rows, columns), padding)
            products.append(f.reshape(-1, columns * channels).T @ g.reshape(-1, rows * features))
        return [total + product for total, product in zip(totals, products, strict=True)]

    zeros = jnp.zeros((columns * channels, rows * features), wide)
    totals = lax.fori_loop(0, -(-time // outputs), accumulate, [zeros] * len(to_points))
    by_tap = jnp.stack(_combine(to_kernels.T, totals)).reshape(taps, columns, channels, rows, features)
    kernel_gradient = by_tap.transpose(0, 3, 1, 2, 4).astype(kernel.dtype)
    turned = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    return _by_tile(gradient, turned), kernel_gradient


def patchify(x: Array, patch: Sequence[int]) -> Array:
    """Cuts [B, T, H, W, C] into non-overlapping blocks: [B, T/pT, H/pH, W/pW, pT * pH * pW * C]."""
    batch, time, height, width, channels = x.shape
    p_t, p_h, p_w = patch
    if time % p_t or height % p_h or width % p_w:
        raise ValueError(f"clip of {time}x{height}x{width} is not divisible by the stem patch {tuple(patch)}")
    x = x.reshape(batch, time // p_t, p_t, height // p_h, p_h, width // p_w, p_w, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(*x.shape[:4], -1)


class Conv3D(nn.Module):
    """3-D convolution layer; parameters `kernel` [kT, kH, kW, C, O] and `bias` [O]."""

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    strides: tuple[int, int, int] = (1, 1, 1)
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype)
        kernel = gather(kernel, (None, None, None, None, "fsdp"), ())
        y = conv3d(x.astype(self.dtype), kernel, self.strides)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class ResidualBlock3D(nn.Module):
    """x + GELU(GroupNorm(convolution(x))); normalizing over a whole clip keeps what is darker than its surroundings."""

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> Array:
        """x [B, A, H, W, C]; valid is bool [B, A, 1, 1, 1], False at padded steps."""
        y = Conv3D(self.features, self.kernel_size, dtype=self.dtype, name="conv")(jnp.where(valid, x, 0))
        return x + nn.gelu(GroupNorm(dtype=self.dtype, name="norm")(y, valid))


class GroupNorm(nn.Module):
    """Group normalization over the valid steps of a clip, eight groups of channels."""

    num_groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> Array:
        norm = nn.GroupNorm(num_groups=self.num_groups, dtype=self.dtype, name="norm")
        return norm(x, mask=jnp.broadcast_to(valid, x.shape))


class VideoEncoder(nn.Module):
    """Small 3-D CNN (decision D1): patch stem, then per stage residual blocks, with 2x2 patch merging between.

    Stem and merging are one matrix product each (fast on every backend). The first stage, where maps are large,
    convolves in space only; later stages in space and time. Padded steps are zeroed before every convolution and
    left out of every normalization: frames appended to a clip change no valid output.

    Attributes:
      channels: width of each stage; every stage after the first halves height and width. Multiples of 8.
      blocks: residual blocks of each stage.
      stem_patch: (frames, rows, columns) that one stem cell covers; time is never reduced after the stem.
    """

    channels: tuple[int, ...] = (48, 96)
    blocks: tuple[int, ...] = (1, 1)
    stem_patch: tuple[int, int, int] = (2, 4, 4)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: Array, step_mask: Array) -> Array:
        """Computes the feature map.

        Args:
          frames: [B, T, H, W], scaled to about unit variance, zero where padded.
          step_mask: bool [B, A], A = T / stem_patch[0]; True where a step covers a real frame.

        Returns:
          [B, A, H', W', C], zero at padded steps.
        """
        if len(self.blocks) != len(self.channels):
            raise ValueError(f"channels {self.channels} and blocks {self.blocks} need one entry a stage each")
        valid = step_mask[:, :, None, None, None]
        x = patchify(frames[..., None].astype(self.dtype), self.stem_patch)
        x = nn.gelu(Dense(self.channels[0], dtype=self.dtype, name="stem")(x))
        for stage, (width, depth) in enumerate(zip(self.channels, self.blocks, strict=True)):
            if stage:
                x = Dense(width, dtype=self.dtype, name=f"stage{stage}_merge")(patchify(x, (1, 2, 2)))
                x = nn.gelu(GroupNorm(dtype=self.dtype, name=f"stage{stage}_norm")(x, valid))
            kernel_size = (3, 3, 3) if stage else (1, 3, 3)
            for block in range(depth):
                name = f"stage{stage}_block{block}"
                x = ResidualBlock3D(width, kernel_size, dtype=self.dtype, name=name)(x, valid)
        return jnp.where(valid, x, 0)
