"""A patient's tissue, painted at every sample that the probe sees.

Axis letters: T frames, N samples along a beam, L beams. All lengths are millimetres: x lateral, y elevation
(across the image plane), z depth below the probe's face. Coordinates are *material*: they follow the tissue.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

REGION_STRIDE = 4  # regions are measured in every fourth frame


@dataclasses.dataclass
class Canvas:
    """Acoustic properties painted layer by layer, later layers on top.

    Attributes:
      x, z: float32 [T, N, L], material position in mm.
      y: float32 [T, 1, 1], elevation of the image plane.
      texture: float32 [T, N, L], smooth random field of unit variance that moves with the tissue.
      pulse: float32 [T, 1, 1], heart beat, in [-1, 1].
      echo: float32 [T, N, L], scattering strength in dB relative to liver parenchyma.
      loss: float32 [T, N, L], attenuation in dB/mm beyond what the time gain compensation corrects.
      masks: per region label, the boolean masks [ceil(T / 4), N, L] drawn so far.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    texture: np.ndarray
    pulse: np.ndarray
    echo: np.ndarray = dataclasses.field(init=False)
    loss: np.ndarray = dataclasses.field(init=False)
    masks: dict[str, list[np.ndarray]] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.echo = np.zeros_like(self.x)
        self.loss = np.zeros_like(self.x)

    def ellipsoid(
        self, center: tuple[float, float, float], radii: tuple[float, float, float], angle: float = 0.0
    ) -> np.ndarray:
        """Distance inside an ellipsoid, in mm, positive within; ``angle`` (radians) turns it in the plane."""
        dx = self.x - np.float32(center[0])
        dz = self.z - np.float32(center[2])
        if angle:
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            dx, dz = c * dx + s * dz, c * dz - s * dx
        dy = (self.y - np.float32(center[1])) / np.float32(radii[1])
        rho = np.sqrt((dx / np.float32(radii[0])) ** 2 + (dz / np.float32(radii[2])) ** 2 + dy**2)
        return (1 - rho) * np.float32(min(radii[0], radii[2]))

    def disk(self, x: np.ndarray | float, z: np.ndarray | float, radius: np.ndarray | float) -> np.ndarray:
        """Distance inside a tube that crosses the image plane; arguments broadcast against [T, 1, 1]."""
        return np.asarray(radius, np.float32) - np.hypot(
            self.x - np.asarray(x, np.float32), self.z - np.asarray(z, np.float32)
        )

    def paint(
        self,
        inside: np.ndarray,
        echo: float | np.ndarray,
        loss: float = 0.0,
        edge: float = 1.0,
        label: str = "",
    ) -> None:
        """Covers ``inside > 0`` with a tissue of ``echo`` dB and ``loss`` dB/mm, soft over ``edge`` mm."""
        weight = np.clip(inside / np.float32(edge) + np.float32(0.5), 0, 1)
        self.echo += weight * (np.asarray(echo, np.float32) - self.echo)
        self.loss += weight * (np.float32(loss) - self.loss)
        if label:
            self.mark(label, inside)

    def line(self, distance: np.ndarray, width: float, echo: float, loss: float = 0.0) -> None:
        """Draws an interface of ``width`` mm where ``distance`` is zero."""
        weight = np.exp(-((distance / np.float32(width)) ** 2))
        self.echo += weight * np.maximum(np.float32(echo) - self.echo, 0)
        if loss:
            self.loss += weight * np.float32(loss)

    def mark(self, label: str, inside: np.ndarray) -> None:
        """Records where a labelled structure lies."""
        self.masks.setdefault(label, []).append(inside[::REGION_STRIDE] > 0)

    def cover(self, label: str, inside: np.ndarray) -> None:
        """Takes away from a label's masks what something painted later hides."""
        for mask in self.masks.get(label, []):
            mask &= ~(inside[::REGION_STRIDE] > 0)


def make_texture(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, scale: float, rng: np.random.Generator
) -> np.ndarray:
    """Samples a smooth periodic random volume at material positions.

    Args:
      x, y, z: positions in mm, broadcastable to [T, N, L].
      scale: correlation length in mm.
      rng: draws the volume.

    Returns:
      float32 [T, N, L] of about zero mean and unit variance.
    """
    size = 32
    volume = ndimage.gaussian_filter(
        rng.standard_normal((size // 2, size, size)).astype(np.float32), 1.0, mode="wrap"
    )
    volume /= volume.std()
    step = np.float32(scale)
    shape = np.broadcast_shapes(x.shape, y.shape, z.shape)
    slow = np.broadcast_to(y / (2 * step), shape)  # structures are longer across the plane than within it
    return ndimage.map_coordinates(
        volume, np.stack([slow, np.broadcast_to(z / step, shape), x / step]), order=1, mode="grid-wrap"
    )
