"""B-mode image formation: probe geometry, moving scatterers, point-spread function, log compression, display.

The image of a frame is the envelope of scatterers convolved with the probe's point-spread function,
``|h * (s a)|``: s is a field of complex Gaussian scatterers that is fixed to the tissue, a the square root of
the backscattered intensity after attenuation, h separable with an axial width set by the pulse and a lateral
width that grows away from the focus (Wagner et al., 1983; Jensen's linear model). Fully developed speckle,
hence a Rayleigh envelope with a signal-to-noise ratio of 1.91, follows without being imposed.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import sparse

NUM_SAMPLES = 104
NUM_BEAMS = 80
IMAGE_SIZE = 96
VOLUME = (16, 128, 128)  # scatterers in elevation, depth, lateral; powers of two so that wrapping is a mask


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where the beams run.

    Attributes:
      radius: mm, curvature of a convex array; 0 for a linear array.
      half_angle: radians, outermost beam of a convex array.
      width: mm, aperture of a linear array.
      flare: extra width of a linear array's image per mm of depth (trapezoid); 0 for a rectangle.
      depth: mm, deepest sample.
      focus: mm, depth of the narrowest beam.
    """

    radius: float
    half_angle: float
    width: float
    flare: float
    depth: float
    focus: float

    @property
    def extent(self) -> tuple[float, float, float]:
        """Image origin z0, height and width in mm (pixels are square)."""
        if self.radius:
            top = -self.radius * (1 - np.cos(self.half_angle))
            height = (self.depth - top) * 1.02
            return float(top - 0.01 * height), float(height), float(height)
        side = max(self.depth, self.width * (1 + self.flare * self.depth))
        return 0.0, float(side), float(side)

    @property
    def spacing(self) -> float:
        """Millimetres per pixel."""
        return self.extent[1] / IMAGE_SIZE

    def sample_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Lateral and depth position of every sample: two float32 [N, L] in mm."""
        depth = (np.arange(NUM_SAMPLES, dtype=np.float32)[:, None] + 0.5) * (self.depth / NUM_SAMPLES)
        across = np.linspace(-1, 1, NUM_BEAMS, dtype=np.float32)[None]
        if self.radius:
            angle = across * self.half_angle
            reach = self.radius + depth
            return (reach * np.sin(angle)).astype(np.float32), (reach * np.cos(angle) - self.radius).astype(
                np.float32
            )
        x = across * (self.width / 2) * (1 + self.flare * depth)
        return x.astype(np.float32), np.broadcast_to(depth, x.shape).astype(np.float32)

    def display_map(self) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
        """Scan conversion from samples to pixels.

        Returns:
          weights: sparse [H * W, N * L], bilinear; rows outside the sector are empty.
          nearest: int [H * W], nearest sample of each pixel.
          sector: bool [H, W], pixels that the probe sees.
        """
        top, height, width = self.extent
        grid = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
        z, x = np.meshgrid(top + grid * height, (grid - 0.5) * width, indexing="ij")
        if self.radius:
            reach = np.hypot(x, z + self.radius)
            sample = (reach - self.radius) / self.depth * NUM_SAMPLES - 0.5
            across = np.arctan2(x, z + self.radius) / self.half_angle
        else:
            sample = z / self.depth * NUM_SAMPLES - 0.5
            across = x / (self.width / 2 * (1 + self.flare * z))
        beam = (across + 1) / 2 * (NUM_BEAMS - 1)
        sector = (sample >= -0.5) & (sample <= NUM_SAMPLES - 0.5) & (beam >= 0) & (beam <= NUM_BEAMS - 1)
        sample, beam = np.clip(sample, 0, NUM_SAMPLES - 1), np.clip(beam, 0, NUM_BEAMS - 1)
        i = np.minimum(sample.astype(int), NUM_SAMPLES - 2)
        j = np.minimum(beam.astype(int), NUM_BEAMS - 2)
        u, v = sample - i, beam - j
        pixel = np.flatnonzero(sector)
        rows, columns, values = [], [], []
        for di, dj, weight in (
            (0, 0, (1 - u) * (1 - v)),
            (0, 1, (1 - u) * v),
            (1, 0, u * (1 - v)),
            (1, 1, u * v),
        ):
            rows.append(pixel)
            columns.append(((i + di) * NUM_BEAMS + j + dj).ravel()[pixel])
            values.append(weight.ravel()[pixel].astype(np.float32))
        weights = sparse.csr_matrix(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
            shape=(IMAGE_SIZE**2, NUM_SAMPLES * NUM_BEAMS),
        )
        nearest = (np.rint(sample).astype(int) * NUM_BEAMS + np.rint(beam).astype(int)).ravel()
        return weights, nearest, sector


@dataclasses.dataclass(frozen=True)
class Settings:
    """The operator's and the machine's settings.

    Attributes:
      gain: dB added to every echo.
      dynamic_range: dB from black to white.
      tgc_error: dB/mm by which the time gain compensation misses the patient's attenuation.
      noise_floor: dB of electronic noise at the surface; it grows with depth, amplified by the compensation.
    """

    gain: float
    dynamic_range: float
    tgc_error: float
    noise_floor: float


def scatter(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, probe: Probe, rng: np.random.Generator
) -> np.ndarray:
    """Reads a volume of complex Gaussian scatterers at material positions.

    Weights are the square roots of trilinear weights: the variance stays one wherever the tissue moves.

    Args:
      x, z: float32 [T, N, L] in mm.
      y: float32 [T, 1, 1] in mm.
      probe: sets the density of the scatterers relative to the beam.
      rng: draws the volume.

    Returns:
      complex64 [T, N, L] of unit variance.
    """
    flat = rng.standard_normal((2, *VOLUME), dtype=np.float32)
    volume = ((flat[0] + 1j * flat[1]) * np.float32(np.sqrt(0.5))).ravel()
    cell = 0.9 * probe.depth / NUM_SAMPLES
    lateral, axial = x / np.float32(1.4 * cell), z / np.float32(cell)
    elevation = y[:, 0, 0] / (0.021 * probe.depth)
    k = np.floor(elevation)
    kw = (elevation - k)[:, None, None].astype(np.float32)
    k = k.astype(np.int32)[:, None, None]
    i, j = np.floor(axial), np.floor(lateral)
    iw, jw = axial - i, lateral - j
    i, j = i.astype(np.int32), j.astype(np.int32)
    root = [[np.sqrt(1 - w), np.sqrt(w)] for w in (kw, iw, jw)]
    rows = [((i + d) & (VOLUME[1] - 1)) * VOLUME[2] for d in (0, 1)]
    columns = [(j + d) & (VOLUME[2] - 1) for d in (0, 1)]
    out = np.zeros(x.shape, np.complex64)
    for di in (0, 1):
        for dj in (0, 1):
            place = rows[di] + columns[dj]
            plane = np.zeros(x.shape, np.complex64)
            for dk in (0, 1):
                layer = ((k + dk) & (VOLUME[0] - 1)) * (VOLUME[1] * VOLUME[2])
                plane += root[0][dk] * volume.take(place + layer)
            out += plane * (root[1][di] * root[2][dj])
    return out


@functools.lru_cache(maxsize=64)
def point_spread(focus_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Axial [N, N] and per-depth lateral [N, L, L] convolution matrices of unit energy."""

    def kernel(size: int, sigma: np.ndarray) -> np.ndarray:
        offset = np.arange(size)[:, None] - np.arange(size)[None]
        weights = np.exp(-0.5 * (offset / sigma[..., None, None]) ** 2)
        return (weights / np.sqrt((weights**2).sum(-1, keepdims=True))).astype(np.float32)

    depth = (np.arange(NUM_SAMPLES) + 0.5) / NUM_SAMPLES
    lateral = 0.85 * np.sqrt(1 + ((depth - focus_fraction) / 0.38) ** 2)
    return kernel(NUM_SAMPLES, np.asarray(0.72)), kernel(NUM_BEAMS, lateral)


def blur(field: np.ndarray, probe: Probe) -> np.ndarray:
    """Convolves complex64 [T, N, L] with the probe's point-spread function."""
    axial, lateral = point_spread(round(probe.focus / probe.depth, 2))
    num_frames = field.shape[0]
    parts = np.stack([field.real, field.imag])  # [2, T, N, L]
    parts = np.matmul(axial, parts)
    by_depth = parts.transpose(2, 3, 0, 1).reshape(NUM_SAMPLES, NUM_BEAMS, 2 * num_frames)
    by_depth = np.matmul(lateral, by_depth).reshape(NUM_SAMPLES, NUM_BEAMS, 2, num_frames)
    real, imag = by_depth.transpose(2, 3, 0, 1)
    return real + 1j * imag


def form_envelope(
    scatterers: np.ndarray,
    echo: np.ndarray,
    loss: np.ndarray,
    probe: Probe,
    settings: Settings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Envelope of the received echoes before log compression.

    Args:
      scatterers: complex64 [T, N, L] of unit variance.
      echo: float32 [T, N, L], scattering strength in dB.
      loss: float32 [T, N, L], uncompensated attenuation in dB/mm (negative behind fluid: enhancement).
      probe, settings: as documented there.
      rng: draws the electronic noise, new in each frame.

    Returns:
      float32 [T, N, L], linear amplitude; liver parenchyma (0 dB) is of order 1.
    """
    step = probe.depth / NUM_SAMPLES
    path = (np.cumsum(loss, axis=1) - loss) * np.float32(step)
    depth = ((np.arange(NUM_SAMPLES, dtype=np.float32) + 0.5) * step)[None, :, None]
    level = echo - np.maximum(path, np.float32(-10)) - np.float32(settings.tgc_error) * depth
    amplitude = np.exp(level * np.float32(np.log(10) / 20))
    signal = blur(scatterers * amplitude, probe)
    noise = rng.standard_normal((2, *echo.shape), dtype=np.float32)
    rise = 14 * (depth / probe.depth) ** 2
    noise_level = np.exp((settings.noise_floor + rise) * np.float32(np.log(10) / 20)).astype(np.float32)
    signal += (noise[0] + 1j * noise[1]) * (noise_level * np.float32(np.sqrt(0.5)))
    return np.abs(signal)


def compress(envelope: np.ndarray, settings: Settings) -> np.ndarray:
    """Log-compresses an envelope to grey levels in [0, 255], float32 of the same shape."""
    decibel = 20 * np.log10(np.maximum(envelope, np.float32(1e-5))) + np.float32(settings.gain)
    grey = (decibel + np.float32(0.56 * settings.dynamic_range)) / np.float32(settings.dynamic_range)
    return np.clip(grey, 0, 1) * np.float32(255)


def display(grey: np.ndarray, weights: sparse.csr_matrix) -> np.ndarray:
    """Scan-converts grey levels float32 [T, N, L] to uint8 [T, H, W]; outside the sector black."""
    num_frames = grey.shape[0]
    pixels = weights @ grey.reshape(num_frames, -1).T
    return np.rint(pixels.T.reshape(num_frames, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)


def show_mask(mask: np.ndarray, nearest: np.ndarray, sector: np.ndarray) -> np.ndarray:
    """Scan-converts a mask bool [N, L] to bool [H, W]; arguments from ``Probe.display_map``."""
    return mask.ravel()[nearest].reshape(sector.shape) & sector
