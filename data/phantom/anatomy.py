"""Layouts of the seven organs as a standard view shows them, with each patient's own proportions.

Echo strengths are dB relative to liver parenchyma, losses dB/mm beyond the compensated attenuation. Every
layout returns the site where lesions or stones may lie.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dilbert_jax.data.phantom.canvas import Canvas
from dilbert_jax.data.phantom.lesions import Site
from dilbert_jax.data.phantom.plan import StudyPlan

FLUID = -40.0
BONE_LOSS = 1.6
GAS_LOSS = 1.0


@dataclasses.dataclass(frozen=True)
class Body:
    """What a patient brings to every study.

    Attributes:
      wall: mm, thickness of the abdominal wall (or of the layers above the gland).
      size: factor on organ sizes.
      bright: dB added to the organ's parenchyma.
      shift: mm, (x, z) by which the operator is off the standard view.
      tilt: radians, rotation of the organ.
      mirror: -1 or 1.
      beat: amplitude of a pulsating vessel's radius, as a fraction.
      phase: in [-1, 1], where in the beat a static vessel's radius is frozen.
    """

    wall: float
    size: float
    bright: float
    shift: tuple[float, float]
    tilt: float
    mirror: int
    beat: float
    phase: float


def draw_organ(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    """Paints the organ of ``plan`` and its surroundings.

    Args:
      canvas: painted in place.
      plan: organ, condition and findings.
      body: the patient.
      rng: draws the details.

    Returns:
      The site for the plan's lesions.
    """
    return _LAYOUTS[plan.organ](canvas, plan, body, rng)


def _ellipse_site(
    x: float, z: float, width: float, height: float, background: float, angle: float = 0.0
) -> Site:
    return Site(x, z, width, height, angle, background)


def _vessel(
    canvas: Canvas, plan: StudyPlan, body: Body, x: float, z: float, radius: float, wall_echo: float = 3.0
) -> None:
    """A vessel across the plane; its radius beats, or stays at one value of the same distribution."""
    beat = canvas.pulse if plan.pulsation else np.float32(body.phase)
    drift = canvas.y * np.float32(0.05 * body.mirror)
    inside = canvas.disk(x + drift, z, np.asarray(radius * (1 + body.beat * beat)))
    canvas.paint(inside, FLUID, -0.1, 0.8, "vessel")
    canvas.line(inside + 0.5, 0.9, wall_echo)


def _abdominal_wall(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    depth, x = canvas.z, canvas.x
    wall = body.wall
    canvas.paint(wall - depth, -6.0, 0.0, 1.5)
    septa = np.sin((x + 0.8 * depth + 3 * canvas.texture) * np.float32(2 * np.pi / rng.uniform(13, 19)))
    fat = (depth < 0.55 * wall) & (depth > 2)
    canvas.echo += np.where(fat, 10 * np.maximum(septa, 0) ** 6, 0)
    muscle = (depth >= 0.55 * wall) & (depth < wall)
    fibres = np.sin((x - 0.7 * depth) * np.float32(2 * np.pi / 9.0)) * np.sin(
        depth * np.float32(2 * np.pi / 3.4)
    )
    canvas.echo += np.where(muscle, 5 * fibres - 2, 0)
    canvas.line(depth - 1.2, 1.3, 9.0)
    canvas.line(depth - 0.55 * wall, 0.8, 7.0)
    canvas.line(depth - wall, 1.0, 10.0)
    # The skin-wall layers repeat once, weaker, below (reverberation).
    canvas.line(depth - 1.55 * wall, 1.2, -1.0)


def _diaphragm(canvas: Canvas, inside: np.ndarray) -> None:
    """Beyond ``inside`` lies air-filled lung: a bright line, then fading repetitions of it."""
    beyond = -inside
    ghosts = np.cos(beyond * np.float32(2 * np.pi / 14)) * 5
    canvas.paint(beyond, -13.0 + ghosts - np.float32(0.35) * np.maximum(beyond, 0), 0.1, 2.0)
    canvas.line(beyond, 1.5, 17.0)


def _draw_liver(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    diffuse = plan.condition == "diffuse_disease"
    bright = body.bright + (8.0 if diffuse else 0)
    size = body.size * (1.07 if diffuse else 1)
    x0, m = body.shift[0], body.mirror
    canvas.paint(np.ones_like(canvas.x), bright + 1.0 * canvas.texture, 0.1 if diffuse else 0.0)
    # Hepatic veins join towards the diaphragm; the portal branch has a bright wall.
    weak = 8.0 if diffuse else 0.0  # fat blurs the vessels
    for slope, offset, width in ((0.55, -26.0, 3.2), (-0.25, 4.0, 3.6), (-0.9, 30.0, 2.8)):
        offset, slope = offset + rng.uniform(-5, 5), slope + rng.uniform(-0.15, 0.15)
        line_x = x0 + m * (offset + slope * (canvas.z - 62) + rng.uniform(0.1, 0.4) * canvas.y)
        tube = np.float32(width * size) * (0.6 + canvas.z / 160) - np.abs(
            canvas.x - line_x + 2 * canvas.texture
        )
        tube = np.minimum(tube, 24 - np.abs(canvas.z - np.float32(74)))
        canvas.paint(tube, FLUID + 12 + weak, 0.0, 1.6)
    dome = canvas.ellipsoid((x0 + 8 * m, 0, 42), (84 * size, 130, 66 * size), body.tilt)
    _vessel(canvas, plan, body, x0 - 24 * m, 56 + body.shift[1], 7.4 * size, 7.0)
    canvas.mark("liver", np.minimum(dome, canvas.z - np.float32(body.wall)))
    _diaphragm(canvas, dome)
    return _ellipse_site(x0 + 19 * m, 56, 15, 14, bright)


def _draw_gallbladder(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    x0, m = body.shift[0], body.mirror
    canvas.paint(np.ones_like(canvas.x), body.bright + 1.0 * canvas.texture)
    angle = m * (0.45 + body.tilt)
    center_z = 50 + body.shift[1]
    length, width = 31 * body.size, 14.5 * body.size
    # Bowel gas lies below the liver's edge: dirty shadow.
    bowel = canvas.ellipsoid((x0 - 34 * m, 0, 102), (46, 90, 24)) + 2.5 * canvas.texture
    canvas.paint(bowel, -5 + 5 * canvas.texture, 0.3, 2.0)
    canvas.line(bowel, 1.8, 14.0)
    _vessel(canvas, plan, body, x0 + 28 * m, 88 + body.shift[1], 8.6 * body.size, 7.0)
    dx, dz = canvas.x - np.float32(x0), canvas.z - np.float32(center_z)
    along = np.float32(np.cos(angle)) * dx + np.float32(np.sin(angle)) * dz
    # A pear: one end narrower than the other.
    taper = 1 + np.float32(0.30 * m) * np.clip(along / np.float32(length), -1, 1)
    across = np.float32(np.cos(angle)) * dz - np.float32(np.sin(angle)) * dx
    slice_width = np.sqrt(np.maximum(1 - (canvas.y / np.float32(34)) ** 2, 0.15))
    rho = np.sqrt((along / length) ** 2 + (across / (width * taper * slice_width)) ** 2)
    lumen = (1 - rho) * np.float32(width)
    thick = 4.8 if plan.wall_thickening else 1.5
    canvas.paint(lumen + thick, -4.0 if plan.wall_thickening else 2.0, 0.0, 1.0)
    canvas.line(lumen + thick, 0.9, 9.0)
    front = np.clip(1 - lumen / np.float32(7), 0, 1) * (dz < 0)
    canvas.paint(lumen, FLUID + 13 * front, -0.30, 1.0)
    canvas.line(lumen + 0.3, 0.8, 8.0)
    canvas.mark("gallbladder", lumen + np.float32(thick))
    if plan.condition == "stone":  # stones sink to the dependent wall
        s = (plan.lesions[0].place[0] - 0.5) * 0.3
        return _ellipse_site(
            x0 + np.cos(angle) * s * length - np.sin(angle) * 0.48 * width,
            center_z + np.sin(angle) * s * length + np.cos(angle) * 0.48 * width,
            0.42 * length,
            0.8,
            0.0,
            angle,
        )
    wall_side = -0.55 if plan.condition == "benign_lesion" else 0.45
    return _ellipse_site(
        x0 - np.sin(angle) * wall_side * width,
        center_z + np.cos(angle) * wall_side * width,
        10,
        1.0,
        -3.0,
        angle,
    )


def _draw_pancreas(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    diffuse = plan.condition == "diffuse_disease"
    bright = body.bright + (8.0 if diffuse else -1.5)
    x0, z0, size, m = body.shift[0], 50 + body.shift[1], body.size, body.mirror
    canvas.paint(np.ones_like(canvas.x), 6.0 + 2.0 * canvas.texture)  # retroperitoneal fat
    canvas.paint(z0 - 14 + 2 * canvas.texture - canvas.z, body.bright - 1, 0.0, 2.0)  # left lobe of the liver
    stomach = canvas.ellipsoid((x0 + 30 * m, 0, z0 - 17), (25, 90, 6.5), 0.1 * m)
    canvas.paint(stomach, -12.0, 0.0, 1.2)
    canvas.line(stomach - 4.0, 1.3, 9.0)
    # The vertebral body: bright cortex, shadow behind.
    spine = canvas.ellipsoid((x0 - 4 * m, 0, z0 + 68), (23, 200, 21))
    canvas.paint(spine, -8.0, BONE_LOSS, 1.0)
    canvas.line(spine, 1.6, 18.0)
    canvas.mark("bone", np.minimum(spine, 6 - spine))
    # The gland arches over the splenic vein: head low, body high, tail down again.
    u = (canvas.x - np.float32(x0)) * np.float32(m / 46 / size)
    ridge = (
        z0 + 9 * u**2 + 3.5 * np.sin(2.6 * u + 1.1) + np.float32(np.tan(body.tilt)) * 30 * u + 0.15 * canvas.y
    )
    thickness = np.float32(9.0 * size * (1.12 if diffuse else 1.0)) * (1 - 0.18 * np.cos(4 * u))
    gland = thickness * np.sqrt(np.maximum(1.0 - u**2, 0)) - np.abs(canvas.z - ridge) - 2 * (np.abs(u) > 1)
    gland = gland + 0.8 * canvas.texture
    canvas.paint(gland, bright + (5.5 if diffuse else 1.5) * canvas.texture, 0.0, 1.5)
    vein = np.minimum(
        3.6 - np.abs(canvas.z - ridge - thickness - 3.2), 34 - np.abs(canvas.x - np.float32(x0 + 6 * m))
    )
    canvas.paint(vein, FLUID, 0.0, 1.0)
    duct = 2.9 if plan.duct_dilatation else 0.75
    canal = np.minimum(
        duct - np.abs(canvas.z - ridge - 0.5), 28 * np.float32(size) - np.abs(canvas.x - np.float32(x0))
    )
    canvas.paint(canal, FLUID if plan.duct_dilatation else bright - 7, 0.0, 1.0)
    if plan.duct_dilatation:
        canvas.line(canal, 0.7, bright + 5)
    canvas.mark("pancreas", gland)
    cava = canvas.ellipsoid((x0 - 25 * m, 0, z0 + 34), (10, 300, 6.5))
    canvas.paint(cava, FLUID + 3, -0.05, 1.0)
    _vessel(canvas, plan, body, x0 + 5 * m, z0 + 31, 7.8 * size, 8.0)
    return _ellipse_site(x0 - 14 * m, z0 + 2, 16, 2.5, bright)


def _draw_spleen(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    size = body.size * (1.34 if plan.condition == "diffuse_disease" else 0.92)
    x0, z0, m = body.shift[0], 44 + body.shift[1], body.mirror
    angle = m * (0.30 + body.tilt)
    bright = body.bright - 1.0
    canvas.paint(np.ones_like(canvas.x), 5.5 + 4.0 * canvas.texture, 0.03)  # perisplenic fat, bowel
    body_shape = canvas.ellipsoid((x0, 0, z0), (52 * size, 95, 25 * size), angle)
    # The hilum hollows the deep side: a crescent.
    hollow = canvas.ellipsoid((x0 + 6 * m, 0, z0 + 41 * size), (46 * size, 120, 25 * size), angle)
    spleen = np.minimum(body_shape, -hollow)
    kidney = canvas.ellipsoid((x0 + 34 * m, 0, z0 + 52), (24, 60, 16), -0.5 * m)
    canvas.paint(kidney, -6.0, 0.0, 1.5)
    canvas.paint(kidney - 9, 8.0, 0.0, 4.0)
    canvas.paint(spleen, bright + 0.6 * canvas.texture, 0.0, 1.2)
    canvas.line(spleen, 0.9, 9.0)
    canvas.mark("spleen", spleen)
    _vessel(canvas, plan, body, x0 - 6 * m, z0 + 28 * size, 8.0 * body.size, 5.0)
    # The diaphragm runs along the convex side on one flank, with lung beyond.
    dome = canvas.ellipsoid((x0 + 20 * m, 0, z0 + 22), (82, 140, 66), angle)
    flank = np.minimum(-dome, (np.float32(x0) - canvas.x) * m - 18)
    ghosts = 5 * np.cos(flank * np.float32(2 * np.pi / 11))
    canvas.paint(flank, -10 + ghosts, 0.25, 2.0)
    canvas.line(np.where((np.float32(x0) - canvas.x) * m > 14, dome, 99), 1.5, 17.0)
    return _ellipse_site(x0, z0 - 3, 26 * size, 5 * size, bright, angle)


def _draw_kidney(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    diffuse = plan.condition == "diffuse_disease"
    size = body.size
    x0, z0, m = body.shift[0], 59 + body.shift[1], body.mirror
    angle = m * (0.14 + body.tilt)
    cortex = body.bright + (6.5 if diffuse else -4.0)
    canvas.paint(np.ones_like(canvas.x), body.bright + 0.8 * canvas.texture)  # liver or spleen as window
    canvas.paint(canvas.z - z0 - 8 + 3 * canvas.texture, -3 + 3 * canvas.texture, 0.02, 4.0)  # psoas
    kidney = canvas.ellipsoid((x0, 0, z0), (50 * size, 52, 24.5 * size), angle)
    canvas.paint(kidney + 3.5, 8.0, 0.0, 2.0)  # perirenal fat
    canvas.paint(kidney, cortex + 0.7 * canvas.texture, 0.0, 1.2)
    if not diffuse:
        for k in range(7):
            turn = 2 * np.pi * k / 7 + 0.3
            u, v = 33 * size * np.cos(turn), 15.5 * size * np.sin(turn)
            c, s = np.cos(angle), np.sin(angle)
            pyramid = canvas.ellipsoid((x0 + c * u - s * v, 0, z0 + s * u + c * v), (5.5, 70, 4.8))
            canvas.paint(pyramid, cortex - 7.0, 0.0, 2.0)
    sinus = (
        canvas.ellipsoid((x0 + 1 * m, 0, z0 + 1), (27 * size, 40, 9.0 * size), angle) + 1.8 * canvas.texture
    )
    canvas.paint(sinus, 10.5 + 2 * canvas.texture, 0.0, 2.5, "renal_pelvis")
    canvas.mark("kidney", kidney)
    _vessel(canvas, plan, body, x0 + 22 * m, z0 + 37, 8.4 * size, 4.0)
    if plan.condition == "stone":
        return _ellipse_site(x0, z0 + 1, 17 * size, 3, 10.0, angle)
    side = -1 if plan.condition == "cyst" else 1
    return _ellipse_site(x0 + side * 26 * m * size, z0 - 12 * size, 9, 3, cortex, angle)


def _draw_breast(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    x, z = canvas.x, canvas.z
    top = (
        0.55 * body.wall
        + 0.9 * np.sin((x + body.shift[0]) * np.float32(2 * np.pi / 31))
        + 0.5 * canvas.texture
    )
    gland = 14.5 * body.size
    bottom = top + gland + 0.7 * np.sin((x - 7) * np.float32(2 * np.pi / 27))
    pectoral = bottom + 2.6
    chest = pectoral + 5.5
    canvas.paint(np.ones_like(x), -11.5 + 1.2 * canvas.texture, 0.0)  # fat lobules
    septa = np.abs(
        np.sin((x + 0.55 * z * body.mirror + 2.2 * canvas.texture) * np.float32(np.pi / rng.uniform(7, 10)))
    )
    canvas.echo += 17 * np.exp(-((septa / 0.13) ** 2))  # Cooper's ligaments
    density = rng.uniform(2.0, 5.0)
    stripes = np.sin((z + 0.25 * x * body.mirror + 1.5 * canvas.texture) * np.float32(2 * np.pi / 4.2))
    layer = np.minimum(z - top, bottom - z)
    canvas.paint(layer, body.bright + 4 + density * 0.7 * canvas.texture + 1.7 * stripes, 0.0, 1.0)
    canvas.mark("breast", np.minimum(z - 1.6, bottom - z))
    fibres = np.sin((z - 0.08 * x) * np.float32(2 * np.pi / 1.7))
    canvas.paint(z - pectoral, -11 + 4.5 * fibres, 0.0, 0.6)
    canvas.line(z - pectoral, 0.4, 6.0)
    canvas.line(z - chest, 0.5, 9.0)
    for center in (-15, 17):
        across = np.abs(x - np.float32(center + body.shift[0] * 1.5))
        rib = np.minimum(5.5 - across, z - chest - 1.2 + 0.03 * across**2)
        canvas.paint(rib, -6.0, 1.3, 0.6)
        canvas.line(np.where(across < 5.5, z - chest - 1.2 + 0.03 * across**2, 99), 0.55, 15.0)
    between = (
        np.minimum(
            np.abs(x - np.float32(-15 + body.shift[0] * 1.5)),
            np.abs(x - np.float32(17 + body.shift[0] * 1.5)),
        )
        > 6
    )
    pleura = np.where(between, z - chest - 4.2, np.float32(-99))
    canvas.paint(pleura, -10 + 5 * np.cos(pleura * np.float32(2 * np.pi / 4)), 0.5, 0.6)
    canvas.line(pleura, 0.5, 14.0)
    canvas.paint(1.7 - z, 9.0, 0.0, 0.5)
    canvas.line(z - 1.7, 0.3, -12.0)
    return _ellipse_site(body.shift[0] * 0.5, 0.55 * body.wall + 0.52 * gland, 11, 1.6, body.bright + 2)


def _draw_thyroid(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> Site:
    x, z = canvas.x, canvas.z
    diffuse = plan.condition == "diffuse_disease"
    size = body.size * (1.15 if diffuse else 1.0)
    x0, top = body.shift[0], 0.5 * body.wall + body.shift[1] * 0.4
    bright = body.bright + (-6.0 if diffuse else 3.0)
    canvas.paint(np.ones_like(x), -8 + 1.5 * canvas.texture)
    fibres = np.sin((z + 0.1 * np.abs(x)) * np.float32(2 * np.pi / 1.8))
    strap = top + 1.0 - 0.035 * np.abs(x - np.float32(x0))
    canvas.paint(strap + 1.2 - z, -10 + 3 * fibres, 0.0, 0.8)
    canvas.paint(z - top - 23, -11 + 5 * np.sin(z * np.float32(2 * np.pi / 2.6)), 0.0, 1.2)  # longus colli
    lobes = []
    for side in (-1, 1):
        lobe = canvas.ellipsoid((x0 + side * 14.5, 0, top + 11.5), (9.2 * size, 32, 9.6 * size), side * 0.25)
        lobes.append(lobe)
    isthmus = np.minimum(1.9 * np.float32(size) - np.abs(z - top - 4.6), 12 - np.abs(x - np.float32(x0)))
    gland = np.maximum(np.maximum(lobes[0], lobes[1]), isthmus)
    canvas.paint(gland, bright + (6.0 if diffuse else 0.8) * canvas.texture, 0.0, 0.8)
    canvas.line(gland, 0.45, 8.0)
    canvas.mark("thyroid", gland)
    ring = canvas.ellipsoid((x0, 0, top + 15.5), (8.2, 400, 9.0))
    beyond = np.maximum(ring, 0)
    ghosts = 6 * np.cos(beyond * np.float32(2 * np.pi / 3.1))
    canvas.paint(ring, -12 - 1.2 * beyond + ghosts, 1.0, 0.7)
    canvas.line(np.where(z < top + 15, ring, 99), 0.8, 15.0)
    for side in (-1, 1):
        _vessel(canvas, plan, body, x0 + side * 25.5 * body.size, top + 13.0, 4.3 * body.size, 5.0)
    canvas.paint(1.5 - z, 8.0, 0.0, 0.5)
    canvas.line(z - 0.45 * top, 0.4, 2.0)
    side = -1 if plan.side == "right" else 1  # the patient's right lies on the image's left
    return _ellipse_site(x0 + side * 14.5, top + 11.5, 2.5, 2.0, bright)


def draw_overlay(canvas: Canvas, plan: StudyPlan, body: Body, rng: np.random.Generator) -> None:
    """Paints what lies between the probe and the organ, on top of all else."""
    if plan.organ not in ("breast", "thyroid"):
        _abdominal_wall_over(canvas, body, rng)
    if plan.organ == "spleen":  # seen between two ribs; one takes some beams away
        rib = canvas.ellipsoid((42 * body.mirror, 0, 0.8 * body.wall), (5.5, 300, 3.2))
        canvas.paint(rib, 4.0, 2.2, 0.8, "bone")
        canvas.line(rib - 1.5, 1.0, 15.0)


def _abdominal_wall_over(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    below = canvas.z > body.wall + 1
    echo, loss = canvas.echo.copy(), canvas.loss.copy()
    _abdominal_wall(canvas, body, rng)
    ghost = np.exp(-(((canvas.z - np.float32(1.55 * body.wall)) / 1.2) ** 2))
    canvas.echo = np.where(below, np.maximum(echo, echo * (1 - ghost) + ghost * (-6)), canvas.echo)
    canvas.loss = np.where(below, loss, canvas.loss)


_LAYOUTS = {
    "liver": _draw_liver,
    "gallbladder": _draw_gallbladder,
    "pancreas": _draw_pancreas,
    "spleen": _draw_spleen,
    "kidney": _draw_kidney,
    "breast": _draw_breast,
    "thyroid": _draw_thyroid,
}
