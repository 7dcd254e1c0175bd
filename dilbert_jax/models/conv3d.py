"""3-D convolution and the 3-D CNN that turns a cine clip into a space-time feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def conv3d(x: Array, kernel: Array, strides: Sequence[int] = (1, 1, 1)) -> Array:
    """Convolves in space and time with zero padding ("same" for odd kernels at stride 1).

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
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:3]]
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
    if tuple(strides) == (1, 1, 1):
        return _conv3d_stride_1(x, kernel)
    return _sum_over_taps(x, kernel, strides)


def _sum_over_taps(x: Array, kernel: Array, strides: Sequence[int]) -> Array:
    """`conv3d` as a sum of 2-D convolutions over the temporal taps, several times faster than 3-D on XLA:CPU."""
    padding = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:3]]
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


@jax.custom_vjp
def _conv3d_stride_1(x: Array, kernel: Array) -> Array:
    return _sum_over_taps(x, kernel, (1, 1, 1))


def _conv3d_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv3d_stride_1(x, kernel), (x, kernel)


def _conv3d_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """The input's gradient is a convolution with the kernel turned round; the kernel's is one matrix product a tap.

    XLA:CPU derives slower ones: 1.1 to 1.2 times the whole time at the quickstart's sizes (benchmarks/conv3d.py).
    """
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    input_gradient = _sum_over_taps(gradient, turned, (1, 1, 1))
    taps, rows, columns, channels, features = kernel.shape
    time, height, width = x.shape[1:4]
    half = (taps - 1) // 2, (rows - 1) // 2, (columns - 1) // 2
    x = jnp.pad(x, ((0, 0), (0, 0), (half[1], half[1]), (half[2], half[2]), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (half[0], half[0]), (0, 0), (0, 0), (0, 0)))
    # Input frame t meets the gradient of output frame t - tap + half: all temporal taps share one product.
    shifted = [gradient[:, 2 * half[0] - tap : 2 * half[0] - tap + time] for tap in range(taps)]
    by_frame = jnp.concatenate(shifted, axis=-1).reshape(-1, taps * features)
    products = [
        x[:, :, row : row + height, column : column + width].reshape(-1, channels).T @ by_frame
        for row in range(rows)
        for column in range(columns)
    ]
    kernel_gradient = jnp.stack(products).reshape(rows, columns, channels, taps, features)
    return input_gradient, kernel_gradient.transpose(3, 0, 1, 2, 4)


_conv3d_stride_1.defvjp(_conv3d_forward, _conv3d_backward)


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
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = conv3d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)
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
        x = nn.gelu(nn.Dense(self.channels[0], dtype=self.dtype, name="stem")(x))
        for stage, (width, depth) in enumerate(zip(self.channels, self.blocks, strict=True)):
            if stage:
                x = nn.Dense(width, dtype=self.dtype, name=f"stage{stage}_merge")(patchify(x, (1, 2, 2)))
                x = nn.gelu(GroupNorm(dtype=self.dtype, name=f"stage{stage}_norm")(x, valid))
            kernel_size = (3, 3, 3) if stage else (1, 3, 3)
            for block in range(depth):
                name = f"stage{stage}_block{block}"
                x = ResidualBlock3D(width, kernel_size, dtype=self.dtype, name=name)(x, valid)
        return jnp.where(valid, x, 0)
