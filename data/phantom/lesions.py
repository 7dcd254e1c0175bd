"""Paints focal lesions by their descriptors: cysts, benign and malignant masses, stones."""

from __future__ import annotations

import dataclasses

import numpy as np

from dilbert_jax.data.phantom.canvas import Canvas
from dilbert_jax.data.phantom.plan import ECHO_DB, Lesion


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an organ can hold a lesion: an ellipse in the plane, in mm.

    Attributes:
      x, z: center.
      half_width, half_height: how far from there a lesion's center may lie.
      angle: radians, turns the ellipse.
      background: dB of the tissue around.
    """

    x: float
    z: float
    half_width: float
    half_height: float
    angle: float = 0.0
    background: float = 0.0

    def locate(self, place: tuple[float, float]) -> tuple[float, float]:
        """Maps two numbers in [0, 1] to a position (x, z) in mm, uniform over the ellipse."""
        reach, turn = np.sqrt(place[0]), 2 * np.pi * place[1]
        u, v = reach * np.cos(turn) * self.half_width, reach * np.sin(turn) * self.half_height
        c, s = np.cos(self.angle), np.sin(self.angle)
        return float(self.x + c * u - s * v), float(self.z + s * u + c * v)


def paint_lesion(canvas: Canvas, lesion: Lesion, site: Site, rng: np.random.Generator) -> None:
    """Paints a lesion and marks its region (``cyst``, ``stone`` or ``lesion``).

    Args:
      canvas: painted in place.
      lesion: what to paint.
      site: where.
      rng: draws the details that no descriptor fixes.
    """
    if lesion.kind == "stone":
        _paint_stone(canvas, lesion, site, rng)
        return
    x, z = site.locate(lesion.place)
    wide, tall = lesion.radius / np.sqrt(lesion.aspect), lesion.radius * np.sqrt(lesion.aspect)
    # Longer across the planes than within them: a section shows it in a good part of the sweep.
    inside = canvas.ellipsoid(
        (x, lesion.elevation, z), (wide, 1.35 * lesion.radius, tall), rng.uniform(-0.12, 0.12)
    )
    inside = _shape(canvas, inside, lesion, x, z, rng)
    edge = {"indistinct_margin": 0.55 * lesion.radius, "spiculated_margin": 0.16 * lesion.radius}.get(
        lesion.margin, 0.09 * lesion.radius
    )
    echo: np.ndarray | np.floating = np.float32(
        site.background + ECHO_DB[lesion.echogenicity] + rng.uniform(-1.5, 1.5)
    )
    if lesion.heterogeneous:
        echo = echo + 4.5 * canvas.texture
    if lesion.kind == "cyst" and lesion.echogenicity == "anechoic":
        # Reverberation of the near wall fogs the front of a cyst.
        front = np.clip(1 - (canvas.z - (z - tall)) / (0.7 * lesion.radius), 0, 1)
        echo = echo + front * np.float32(rng.uniform(6, 14))
    through = {"posterior_enhancement": -rng.uniform(6, 8.5), "posterior_shadowing": rng.uniform(13, 20)}.get(
        lesion.posterior, 0.0
    )
    canvas.paint(
        inside, np.asarray(echo), through / (1.6 * tall), edge, "cyst" if lesion.kind == "cyst" else "lesion"
    )
    canvas.cover("vessel", inside)
    if lesion.kind == "cyst":
        canvas.line(inside + 0.02 * lesion.radius, 0.07 * lesion.radius, site.background + 7)
    elif lesion.echogenicity == "isoechoic":
        canvas.line(inside, 0.16 * lesion.radius, site.background - 1)
        halo = np.exp(-((inside / np.float32(0.16 * lesion.radius)) ** 2))
        canvas.echo -= np.float32(12) * halo
    if lesion.calcified:
        _paint_calcification(canvas, inside, lesion, x, z, rng)


def _shape(
    canvas: Canvas, inside: np.ndarray, lesion: Lesion, x: float, z: float, rng: np.random.Generator
) -> np.ndarray:
    if lesion.shape != "irregular" and lesion.margin != "spiculated_margin":
        return inside
    angle = np.arctan2(canvas.z - np.float32(z), canvas.x - np.float32(x))
    phase = rng.uniform(0, 2 * np.pi, 3)
    if lesion.shape == "irregular":
        lobes = 0.13 * np.sin(2 * angle + phase[0]) + 0.10 * np.sin(3 * angle + phase[1])
        inside = inside + np.float32(lesion.radius) * (lobes + np.float32(0.07) * canvas.texture)
    if lesion.margin == "spiculated_margin":
        spikes = np.abs(np.sin((4 + int(rng.integers(3))) / 2 * angle + phase[2]))
        inside = inside + np.float32(0.5 * lesion.radius) * (np.exp(-((spikes / 0.22) ** 2)) - 0.12)
    return inside


def _paint_calcification(
    canvas: Canvas, inside: np.ndarray, lesion: Lesion, x: float, z: float, rng: np.random.Generator
) -> None:
    spot = max(0.10 * lesion.radius, 0.45)
    union = np.full_like(inside, -np.inf)
    for _ in range(int(rng.integers(3, 7))):
        turn, reach = rng.uniform(0, 2 * np.pi), 0.5 * lesion.radius * np.sqrt(rng.random())
        union = np.maximum(
            union,
            canvas.ellipsoid(
                (
                    x + reach * np.cos(turn),
                    lesion.elevation + rng.uniform(-0.5, 0.5) * lesion.radius,
                    z + reach * np.sin(turn),
                ),
                (1.3 * spot, 0.6 * lesion.radius, spot),
            ),
        )
    canvas.paint(union, 16.0, 1.2 / spot, 0.4 * spot)


def _paint_stone(canvas: Canvas, lesion: Lesion, site: Site, rng: np.random.Generator) -> None:
    x, z = site.locate(lesion.place)
    wide = lesion.radius
    inside = canvas.ellipsoid(
        (x, lesion.elevation, z), (wide, 1.2 * wide, 0.68 * wide), rng.uniform(-0.2, 0.2)
    )
    # Nearly all sound is reflected at the near surface: a bright crescent, then no echo at all.
    canvas.paint(inside, 17.0, 24.0 / wide, 0.15 * wide, "stone")
    canvas.echo -= np.where(inside > 0.42 * wide, np.float32(9), np.float32(0))


def paint_free_fluid(
    canvas: Canvas, x: float, wall: float, elevation: float, rng: np.random.Generator
) -> None:
    """Paints a crescent of anechoic fluid between the abdominal wall and the organ, in part of the sweep."""
    radii = (rng.uniform(24, 34), rng.uniform(7, 11), rng.uniform(6, 8.5))
    inside = canvas.ellipsoid((x, elevation, wall + 3), radii)
    canvas.paint(inside, -38.0, -0.35, 1.0)
    canvas.mark("free_fluid", np.minimum(inside, canvas.z - np.float32(wall)))
