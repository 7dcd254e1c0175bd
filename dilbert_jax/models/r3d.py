"""R3D-18, layer for layer torchvision's `r3d_18` without its classifier, and 3-D batch normalization as in PyTorch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dilbert_jax.models.conv3d import Conv3D

Array = jax.Array

# Of torchvision's R3D_18_Weights.KINETICS400_V1.
KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)
# What `normalize_frames` subtracts from and divides the grey values in [0, 1] by.
FRAME_MEAN = 0.2
FRAME_STD = 0.2

TEMPORAL_STRIDE = 8  # frames a step of R3D-18's feature map
LAYER_CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_LAYER = 2


def kinetics_channels(frames: Array) -> Array:
    """Turns grey frames of this project's normalization into the three channels that the Kinetics weights expect.

    Args:
      frames: [...], grey values v in [0, 1] as (v - FRAME_MEAN) / FRAME_STD (see `normalize_frames`).

    Returns:
      [..., 3]: (v - mean) / std of each channel. Padded frames come out as dark grey, not as zero.

    Source: normalization of torchvision.models.video.R3D_18_Weights.KINETICS400_V1.
    """
    grey = (frames * FRAME_STD + FRAME_MEAN)[..., None]
    return (grey - jnp.asarray(KINETICS_MEAN, grey.dtype)) / jnp.asarray(KINETICS_STD, grey.dtype)


class BatchNorm3D(nn.Module):
    """Batch normalization over [B, T, H, W] with PyTorch's conventions; parameters `scale` [C] and `bias` [C].

    Training normalizes with the biased variance of the batch and moves the running statistics by

        running = (1 - momentum) running + momentum batch

    where the batch's variance is the unbiased one (n - 1 in the denominator). Flax's layer counts momentum the other
    way round and stores the biased variance. Every position counts, padded ones too: for clips of different lengths,
    freeze it. Under `jit` on several devices the statistics are those of the global batch.

    Attributes:
      epsilon: added to the variance.
      momentum: weight of the newest batch.
      unbiased_running_variance: store the unbiased variance, as PyTorch does; False stores the biased one, as Flax.
      frozen: normalize with statistics that are parameters, `running_mean` and `running_var` [C], behind a
        stop_gradient: how imported weights serve in batches too small for statistics. Optimizers must leave leaves
        of these names alone, since weight decay needs no gradient. Not frozen: `mean` and `var` [C] live in the
        collection `batch_stats`.

    Source: torch.nn.BatchNorm3d; torchvision.ops.FrozenBatchNorm2d.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    unbiased_running_variance: bool = True
    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool = True) -> Array:
        """Normalizes each channel.

        Args:
          x: [B, T, H, W, C].
          use_running_average: normalize with the running statistics (evaluation); False: with the batch's, and
            update the running ones (`batch_stats` must be mutable).

        Returns:
          [B, T, H, W, C] of the layer's dtype; the arithmetic is float32 or wider.

        Raises:
          ValueError: x is not 5-D, a frozen layer is asked for batch statistics, or a batch of one value a channel.
        """
        if x.ndim != 5:
            raise ValueError(f"BatchNorm3D needs x [B,T,H,W,C]; got {x.shape}")
        if self.frozen and not use_running_average:
            raise ValueError(
                "a frozen BatchNorm3D has no batch statistics; call it with use_running_average=True"
            )
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        if self.frozen:
            mean = lax.stop_gradient(self.param("running_mean", nn.initializers.zeros, channels))
            variance = lax.stop_gradient(self.param("running_var", nn.initializers.ones, channels))
        else:
            mean, variance = self._statistics(x, use_running_average)
        y = (x - mean) * (scale * lax.rsqrt(variance + self.epsilon)) + bias
        return y.astype(self.dtype)

    def _statistics(self, x: Array, use_running_average: bool) -> tuple[Array, Array]:
        """Mean and variance to normalize with; in training, moves the running ones."""
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        running_variance = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if use_running_average:
            return running_mean.value, running_variance.value
        count = x.size // x.shape[-1]
        if count < 2:
            raise ValueError(f"batch statistics need more than one value a channel; got {x.shape}")
        mean, variance = x.mean((0, 1, 2, 3)), x.var((0, 1, 2, 3))
        if not self.is_initializing():
            stored = variance * (count / (count - 1)) if self.unbiased_running_variance else variance
            for running, batch in ((running_mean, mean), (running_variance, stored)):
                moved = (1.0 - self.momentum) * running.value + self.momentum * batch
                running.value = moved.astype(running.value.dtype)
        return mean, variance


class BasicBlock3D(nn.Module):
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))); where the shape changes, x goes through a 1x1x1 convolution and BN."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> Array:
        """x [B, T, H, W, C], zero at padded steps; valid bool [B, T', 1, 1, 1] says which steps of the result are."""
        strides = (self.stride,) * 3

        def norm(name: str, y: Array) -> Array:
            return BatchNorm3D(frozen=True, dtype=self.dtype, name=name)(y)

        def convolve(name: str, y: Array, size: int, strides: tuple[int, int, int]) -> Array:
            return Conv3D(self.features, (size,) * 3, strides, use_bias=False, dtype=self.dtype, name=name)(y)

        y = nn.relu(norm("norm1", convolve("conv1", x, 3, strides)))
        y = norm("norm2", convolve("conv2", jnp.where(valid, y, 0), 3, (1, 1, 1)))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm("downsample_norm", convolve("downsample_conv", x, 1, strides))
        return jnp.where(valid, nn.relu(x + y), 0)


class R3D18(nn.Module):
    """R3D-18 as torchvision builds it, without average pooling and `fc`; its Kinetics weights fit one to one.

    Batch normalization is frozen. Padded steps are zeroed before every convolution, which is what the convolution's
    own padding does at the end of a clip: frames appended to a clip change no valid output.

    Parameters are named after torchvision's: `stem_conv` (stem.0), `stem_norm` (stem.1), `layerN_blockM` (layerN.M)
    with `conv1`, `norm1` (conv1.0, conv1.1), `conv2`, `norm2`, `downsample_conv`, `downsample_norm`.

    Source: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018, the model
    R3D; torchvision.models.video.r3d_18.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: Array, frame_mask: Array) -> Array:
        """Computes the feature map.

        Args:
          frames: [B, T, H, W], grey, scaled by `normalize_frames`.
          frame_mask: bool [B, T], valid frames first.

        Returns:
          [B, A, H', W', 512] with A = ceil(T / 8), H' = ceil(H / 16), W' = ceil(W / 16); zero at padded steps. A step
          is valid where it covers a valid frame.

        Raises:
          ValueError: shapes that do not fit together.
        """
        if frames.ndim != 4 or frame_mask.shape != frames.shape[:2]:
            raise ValueError(
                f"R3D18 needs frames [B,T,H,W] and frame_mask [B,T]; got {frames.shape} and {frame_mask.shape}"
            )
        valid = frame_mask[:, :, None, None, None]
        x = jnp.where(valid, kinetics_channels(frames), 0)
        x = Conv3D(
            LAYER_CHANNELS[0], (3, 7, 7), (1, 2, 2), use_bias=False, dtype=self.dtype, name="stem_conv"
        )(x)
        x = nn.relu(BatchNorm3D(frozen=True, dtype=self.dtype, name="stem_norm")(x))
        x = jnp.where(valid, x, 0)
        for layer, features in enumerate(LAYER_CHANNELS, start=1):
            for block in range(BLOCKS_PER_LAYER):
                stride = 2 if layer > 1 and block == 0 else 1
                # Output step i is centred on input step i * stride: n valid steps become ceil(n / stride).
                valid = valid[:, ::stride]
                name = f"layer{layer}_block{block}"
                x = BasicBlock3D(features, stride, self.dtype, name=name)(x, valid)
        return x
