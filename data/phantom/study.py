"""One study from its indices: plan, motion, image formation, report and measured regions."""

from __future__ import annotations

import numpy as np

from dilbert_jax.data.phantom import simulator
from dilbert_jax.data.phantom.anatomy import Body, draw_organ, draw_overlay
from dilbert_jax.data.phantom.canvas import REGION_STRIDE, Canvas, make_texture
from dilbert_jax.data.phantom.lesions import paint_free_fluid, paint_lesion
from dilbert_jax.data.phantom.plan import LINEAR_ORGANS, StudyPlan, assign, draw_plan, study_count
from dilbert_jax.data.phantom.reports import write_report
from dilbert_jax.data.record import Record, Region

NUM_FRAMES = 24
FRAMES_PER_SECOND = 10.0
MIN_AREA = {"calcification": 6, "vessel": 18}  # pixels; a smaller section is not boxed
DEFAULT_MIN_AREA = 25
DECODER = "phantom 1.0.0"


def name_study(patient_index: int, study_index: int) -> tuple[str, str]:
    """Returns study id and group id."""
    group = f"patient{patient_index:04d}"
    return f"{group}_study{study_index}", group


def plan_study(seed: int, patient_index: int, study_index: int) -> StudyPlan:
    """Decides a study without rendering it; same arguments as ``generate_study``."""
    if patient_index < 0 or not 0 <= study_index < study_count(patient_index):
        raise ValueError(
            f"patient {patient_index}, study {study_index}: expected patient >= 0 and study in "
            f"[0, {study_count(max(patient_index, 0))})"
        )
    organ, condition = assign(seed, patient_index, study_index)
    language = "zh" if np.random.default_rng([seed, 13, patient_index]).random() < 0.5 else "en"
    rng = np.random.default_rng([seed, 14, patient_index, study_index])
    return draw_plan(organ, condition, language, 9.0 if organ in LINEAR_ORGANS else 19.0, rng)


def generate_study(seed: int, patient_index: int, study_index: int) -> Record:
    """Generates one study; a pure function of its arguments.

    Args:
      seed: of the data set, >= 0.
      patient_index: >= 0; fixes the patient's body, language and organ.
      study_index: 0, or 1 for every third patient's second visit.

    Returns:
      A record of 24 frames of 96 x 96 pixels at 10 frames per second, with exact labels and regions.

    Raises:
      ValueError: no such patient or study.
    """
    plan = plan_study(seed, patient_index, study_index)
    frames, regions, probe = render(plan, seed, patient_index, study_index)
    study_id, group_id = name_study(patient_index, study_index)
    report_rng = np.random.default_rng([seed, 16, patient_index, study_index])
    return Record(
        study_id=study_id,
        group_id=group_id,
        frames=frames,
        organ=plan.organ,
        condition=plan.condition,
        report=write_report(plan, report_rng),
        language=plan.language,
        report_is_synthetic=True,
        source=f"generated:seed={seed},patient={patient_index},study={study_index}",
        decoder=DECODER,
        findings=plan.findings,
        regions=regions,
        fps=FRAMES_PER_SECOND,
        pixel_spacing_mm=(probe.spacing, probe.spacing),
    )


def render(
    plan: StudyPlan, seed: int, patient_index: int, study_index: int
) -> tuple[np.ndarray, tuple[Region, ...], simulator.Probe]:
    """Renders a planned study.

    Returns:
      Frames uint8 [T, H, W], measured regions, and the probe.
    """
    patient = np.random.default_rng([seed, 10, patient_index])
    rng = np.random.default_rng([seed, 15, patient_index, study_index])
    linear = plan.organ in LINEAR_ORGANS
    body = _draw_body(linear, patient, rng)
    probe = _draw_probe(plan.organ, rng)
    settings = simulator.Settings(
        gain=patient.uniform(-3.5, 3.5),
        dynamic_range=rng.uniform(54, 66),
        tgc_error=rng.uniform(-0.01, 0.03) * (120 / probe.depth),
        noise_floor=rng.uniform(-36, -29),
    )
    x, y, z, pulse = _move(plan, body, probe, rng)
    texture = make_texture(x, y, z, 0.042 * probe.depth, rng)
    canvas = Canvas(x, y, z, texture, pulse)
    site = draw_organ(canvas, plan, body, rng)
    for lesion in plan.lesions:
        paint_lesion(canvas, lesion, site, rng)
    if plan.free_fluid:
        reach = 19.0
        paint_free_fluid(
            canvas, rng.uniform(-22, 22), body.wall, rng.choice([-1, 1]) * rng.uniform(0.3, 0.6) * reach, rng
        )
    draw_overlay(canvas, plan, body, rng)
    scatterers = simulator.scatter(x, y, z, probe, rng)
    envelope = simulator.form_envelope(scatterers, canvas.echo, canvas.loss, probe, settings, rng)
    weights, nearest, sector = probe.display_map()
    frames = simulator.display(simulator.compress(envelope, settings), weights)
    return frames, _measure_regions(canvas, nearest, sector), probe


def _draw_body(linear: bool, patient: np.random.Generator, rng: np.random.Generator) -> Body:
    size, bright, wall, phase = (
        patient.uniform(0.9, 1.1),
        patient.uniform(-2, 2),
        patient.random(),
        patient.random(),
    )
    scale = 0.45 if linear else 1.0
    return Body(
        wall=float(10 + 6 * wall if linear else 15 + 7 * wall),
        size=float(size),
        bright=float(bright),
        shift=(float(rng.uniform(-7, 7) * scale), float(rng.uniform(-5, 5) * scale)),
        tilt=float(rng.uniform(-0.14, 0.14)),
        mirror=int(patient.choice([-1, 1])),
        beat=float(rng.uniform(0.2, 0.32)),
        phase=float(np.sin(2 * np.pi * phase)),
    )


def _draw_probe(organ: str, rng: np.random.Generator) -> simulator.Probe:
    if organ == "breast":
        depth = rng.uniform(36, 42)
        return simulator.Probe(0.0, 0.0, 40.0, 0.0 if rng.random() < 0.7 else 0.004, depth, 0.45 * depth)
    if organ == "thyroid":
        depth = rng.uniform(42, 48)
        return simulator.Probe(0.0, 0.0, 54.0, 0.0025, depth, 0.45 * depth)
    depth = rng.uniform(112, 132)
    return simulator.Probe(rng.uniform(48, 58), np.deg2rad(rng.uniform(29, 33)), 0.0, 0.0, depth, 0.5 * depth)


def _move(
    plan: StudyPlan, body: Body, probe: simulator.Probe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Material coordinates of every sample in every frame, and the heart beat.

    The probe sweeps through the tissue and trembles; breathing shifts the organ. Where layers slide, the
    abdominal wall stays behind; where they stick together, wall and organ move as one, and less.
    """
    linear = plan.organ in LINEAR_ORGANS
    scale = 0.4 if linear else 1.0
    time = np.arange(NUM_FRAMES) / FRAMES_PER_SECOND
    reach = 9.0 if linear else 19.0
    duration = time[-1]
    travel = np.linspace(-reach, reach, NUM_FRAMES)
    if rng.random() < 0.3:  # there and back again
        travel = reach * np.cos(2 * np.pi * time / duration)
    y = travel * rng.choice([-1, 1]) + rng.uniform(-1, 1) * scale
    steps = rng.normal(0, 0.28 * scale, (2, NUM_FRAMES))
    tremor = np.stack([np.convolve(step, [0.25, 0.5, 0.25], mode="same") for step in steps])
    breath = np.sin(2 * np.pi * (time / rng.uniform(1.7, 2.6) + rng.random()))
    heart = 2 * np.pi * (time * rng.uniform(0.95, 1.35) + rng.random())
    pulse = np.sin(heart + 0.35 * np.sin(heart))
    amplitude = rng.uniform(4.5, 7.0)
    if plan.sliding is None:
        wall_x, organ_x, organ_z = 0.0 * breath, 0.5 * breath, 0.25 * breath
    elif plan.sliding:
        wall_x, organ_x, organ_z = 0.04 * amplitude * breath, amplitude * breath, 0.25 * amplitude * breath
    else:
        wall_x = organ_x = 0.42 * amplitude * breath
        organ_z = 0.10 * amplitude * breath
    x0, z0 = probe.sample_positions()

    def per_frame(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32)[:, None, None]

    deep = np.clip((z0 - np.float32(body.wall)) / np.float32(0.8) + np.float32(0.5), 0, 1)[None]
    x = x0[None] + per_frame(tremor[0] - wall_x) - per_frame(organ_x - wall_x) * deep
    z = z0[None] + per_frame(tremor[1]) * deep - per_frame(organ_z) * deep
    return x, per_frame(y), z, per_frame(pulse)


def _measure_regions(canvas: Canvas, nearest: np.ndarray, sector: np.ndarray) -> tuple[Region, ...]:
    regions = []
    for label, masks in sorted(canvas.masks.items()):
        for mask in masks:
            for k, section in enumerate(mask):
                shown = simulator.show_mask(section, nearest, sector)
                if shown.sum() < MIN_AREA.get(label, DEFAULT_MIN_AREA):
                    continue
                rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
                height, width = sector.shape
                box = (
                    float(rows[0] / height),
                    float(columns[0] / width),
                    float((rows[-1] + 1) / height),
                    float((columns[-1] + 1) / width),
                )
                regions.append(Region(frame=k * REGION_STRIDE, box=box, label=label))
    return tuple(sorted(regions, key=lambda r: (r.frame, r.label, r.box)))
