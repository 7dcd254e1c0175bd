"""The phantom: image physics, exact labels and regions, agreeing reports, motion-only findings."""

import dataclasses
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import stats

from dilbert_jax.data.phantom import simulator, study
from dilbert_jax.data.phantom.canvas import Canvas
from dilbert_jax.data.phantom.lesions import Site, paint_lesion
from dilbert_jax.data.phantom.plan import CONDITIONS, ORGANS, Lesion, assign, study_count
from dilbert_jax.data.phantom.reports import write_report
from dilbert_jax.data.record import check
from dilbert_jax.knowledge import extract_entities, load_graph

LINEAR = simulator.Probe(radius=0.0, half_angle=0.0, width=80.0, flare=0.0, depth=80.0, focus=40.0)
QUIET = simulator.Settings(gain=0.0, dynamic_range=60.0, tgc_error=0.0, noise_floor=-90.0)


def default_indices():
    return [(p, s) for p in range(360) for s in range(study_count(p))]


@pytest.fixture(scope="module")
def records():
    indices = [(p, s) for p in range(42) for s in range(study_count(p))]
    return {index: study.generate_study(3, *index) for index in indices}


def blank_canvas(num_frames=1):
    x, z = simulator.Probe.sample_positions(LINEAR)
    shape = (num_frames, *x.shape)
    zero = np.zeros((num_frames, 1, 1), np.float32)
    return Canvas(
        np.broadcast_to(x, shape), zero, np.broadcast_to(z, shape), np.zeros(shape, np.float32), zero
    )


def envelope_of(canvas, seed=0):
    scatterers = simulator.scatter(canvas.x, canvas.y, canvas.z, LINEAR, np.random.default_rng(seed))
    return simulator.form_envelope(
        scatterers, canvas.echo, canvas.loss, LINEAR, QUIET, np.random.default_rng(seed + 1)
    )


def test_speckle_has_the_rayleigh_signal_to_noise_ratio():
    patches = [envelope_of(blank_canvas(), seed)[0, 20:90, 10:70] for seed in range(12)]
    ratios = [patch.mean() / patch.std() for patch in patches]
    assert np.mean(ratios) == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), abs=0.05)  # 1.913
    weak = blank_canvas()
    weak.echo -= 20
    ratio = np.mean(envelope_of(weak)[0, 20:90, 10:70] ** 2) / np.mean(patches[0] ** 2)
    assert ratio == pytest.approx(0.01, rel=1e-3)  # linear until compression


def test_point_spread_is_narrower_along_the_beam_and_widens_off_focus():
    def width(signal, axis):
        """Lag at which the autocorrelation of the complex envelope falls to one half, in mm."""
        step = {0: LINEAR.depth / simulator.NUM_SAMPLES, 1: LINEAR.width / simulator.NUM_BEAMS}[axis]
        signal = np.moveaxis(signal, axis + 1, -1)
        power = np.mean(np.abs(signal) ** 2)
        curve = [
            abs(np.mean(signal[..., lag:] * signal[..., : signal.shape[-1] - lag].conj())) / power
            for lag in range(8)
        ]
        return step * np.interp(-0.5, -np.asarray(curve), np.arange(8))

    rng = np.random.default_rng(0)
    shape = (8, simulator.NUM_SAMPLES, simulator.NUM_BEAMS)
    noise = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    field = simulator.blur(noise, LINEAR)
    focus, deep = field[:, 45:60], field[:, 89:]
    assert width(focus, 0) < 0.85 * width(focus, 1)
    assert width(deep, 1) > 1.3 * width(focus, 1)


def test_speckle_moves_with_the_tissue_and_changes_across_the_plane():
    base = blank_canvas(4)
    pitch = LINEAR.width / (simulator.NUM_BEAMS - 1)
    x = base.x - np.asarray([0, pitch, 0, 0], np.float32)[:, None, None]
    y = np.asarray([0, 0, 0.3, 12.0], np.float32)[:, None, None]
    moved = Canvas(x, y, base.z, base.texture, base.pulse)
    envelope = envelope_of(moved)[:, 30:70]

    def similarity(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    assert similarity(envelope[0][:, :-1], envelope[1][:, 1:]) > 0.85  # follows the shift by one beam
    assert similarity(envelope[0], envelope[2]) > 0.6  # a small step of the probe
    assert abs(similarity(envelope[0], envelope[3])) < 0.15  # another slice


@pytest.mark.parametrize(
    ("kind", "posterior", "low", "high"),
    [("stone", "posterior_shadowing", -60, -12), ("cyst", "posterior_enhancement", 3.5, 12)],
)
def test_shadow_is_darker_and_enhancement_brighter_than_beside(kind, posterior, low, high):
    lesion = Lesion(
        kind=kind,
        radius=8.0,
        aspect=0.95,
        echogenicity="hyperechoic" if kind == "stone" else "anechoic",
        shape="round",
        margin="circumscribed_margin",
        orientation="",
        posterior=posterior,
        heterogeneous=False,
        calcified=False,
        elevation=0.0,
        place=(0.0, 0.0),
    )
    canvas = blank_canvas()
    paint_lesion(canvas, lesion, Site(0.0, 35.0, 5.0, 5.0), np.random.default_rng(1))
    envelope = envelope_of(canvas)[0]
    x, z = canvas.x[0], canvas.z[0]
    behind = (np.abs(x) < 3) & (z > 48) & (z < 70)
    beside = (np.abs(x) > 15) & (z > 48) & (z < 70)
    difference = 10 * np.log10(np.mean(envelope[behind] ** 2) / np.mean(envelope[beside] ** 2))
    assert low < difference < high


def test_regions_are_the_boxes_of_the_displayed_masks():
    _, nearest, sector = LINEAR.display_map()
    canvas = blank_canvas(5)
    inside = canvas.disk(-10.0, 40.0, 12.0)
    canvas.mark("cyst", inside)
    canvas.mark("lesion", canvas.disk(0.0, 40.0, 0.5))  # too small to be boxed
    regions = study._measure_regions(canvas, nearest, sector)
    assert [(r.frame, r.label) for r in regions] == [(0, "cyst"), (4, "cyst")]
    pixel = LINEAR.spacing / LINEAR.extent[1]
    expected = np.asarray([28, 40 - 22, 52, 40 + 2]) / LINEAR.extent[1]  # 80 mm square, x = 0 in the middle
    np.testing.assert_allclose(regions[0].box, expected, atol=1.5 * pixel)


def test_a_study_is_a_pure_function_of_its_indices():
    indices = [(5, 1), (0, 0), (5, 0)]
    with ThreadPoolExecutor(3) as pool:
        first = list(pool.map(lambda i: study.generate_study(7, *i), indices))
    for index, record in zip(reversed(indices), reversed(first), strict=True):
        again = study.generate_study(7, *index)
        np.testing.assert_array_equal(again.frames, record.frames)
        again.frames = record.frames
        assert again == record
    other = study.generate_study(8, 0, 0)
    assert not np.array_equal(other.frames, first[1].frames)


@pytest.mark.parametrize("index", [(-1, 0), (0, 1), (2, 2), (0, -1)])
def test_unknown_indices_are_refused(index):
    with pytest.raises(ValueError, match=f"patient {index[0]}, study {index[1]}"):
        study.generate_study(0, *index)


def test_every_organ_meets_its_conditions_and_none_is_rare():
    pairs = Counter(assign(0, *index) for index in default_indices())
    assert set(pairs) == {(organ, condition) for organ in ORGANS for condition in CONDITIONS[organ]}
    total = sum(pairs.values())
    assert total == 480
    conditions = Counter()
    for (_, condition), count in pairs.items():
        conditions[condition] += count
    assert set(conditions) == {
        "normal",
        "cyst",
        "benign_lesion",
        "malignant_lesion",
        "stone",
        "diffuse_disease",
    }
    assert min(conditions.values()) >= 0.08 * total
    assert 0.25 < conditions["normal"] / total < 0.35


def test_patients_keep_one_language_and_both_languages_occur():
    languages = {}
    for patient, index in default_indices():
        languages.setdefault(patient, set()).add(study.plan_study(0, patient, index).language)
    assert all(len(found) == 1 for found in languages.values())
    chinese = np.mean([found == {"zh"} for found in languages.values()])
    assert 0.42 < chinese < 0.58


def test_records_are_valid_and_show_what_they_claim(records):
    graph = load_graph()
    box_of = {
        "cyst": "cyst",
        "stone": "stone",
        "benign_lesion": "lesion",
        "malignant_lesion": "lesion",
    }
    for (patient, _), record in records.items():
        check(record)
        assert record.frames.shape == (24, 96, 96)
        assert record.group_id == f"patient{patient:04d}"
        assert record.report_is_synthetic
        assert set(record.findings) <= set(graph.concepts)
        shown = {r.label for r in record.regions}
        assert shown <= set(graph.concepts)
        assert record.organ in shown
        assert set(box_of.values()) & shown == {box_of[c] for c in [record.condition] if c in box_of}
        assert ("free_fluid" in shown) == ("free_fluid" in record.findings)
        assert {r.frame % 4 for r in record.regions} == {0}
        assert not {"sliding", "reduced_sliding"} <= set(record.findings)


def test_anechoic_cysts_are_dark_inside_their_boxes(records):
    compared = 0
    for record in records.values():
        if "anechoic" not in record.findings:
            continue
        for region in record.regions:
            if region.label != "cyst":
                continue
            ymin, xmin, ymax, xmax = (round(edge * 96) for edge in region.box)
            if ymax - ymin < 8 or xmax - xmin < 8:
                continue
            frame = record.frames[region.frame].astype(float)
            height, width = (ymax - ymin) // 4, (xmax - xmin) // 4
            core = frame[ymin + height : ymax - height, xmin + width : xmax - width]
            assert core.mean() < 0.6 * np.median(frame[frame > 8])
            compared += 1
    assert compared >= 10


def test_some_findings_show_in_part_of_the_sweep_only(records):
    partial = 0
    for record in records.values():
        frames = {r.frame for r in record.regions if r.label in ("lesion", "cyst", "stone", "free_fluid")}
        partial += 0 < len(frames) < 6
    assert partial >= 15


def test_reports_agree_with_the_labels():
    graph = load_graph()
    labels = {finding for i in default_indices() for finding in study.plan_study(0, *i).findings}
    mentioned = stated = 0
    for patient, index in default_indices():
        plan = study.plan_study(0, patient, index)
        report = write_report(plan, np.random.default_rng([0, 16, patient, index]))
        entities = extract_entities(report, plan.language, graph)
        present = {e.concept for e in entities if e.status != "absent"}
        absent = {e.concept for e in entities if e.status == "absent"}
        where = f"patient {patient}, study {index}: {report}"
        assert plan.organ in present, where
        conditions = {c for c in present if graph.concepts[c].type == "condition"}
        assert conditions == {plan.condition}, where
        assert present & labels <= set(plan.findings), where
        assert not absent & ({plan.condition} | set(plan.findings)), where
        stated += len(plan.findings)
        mentioned += len(present & set(plan.findings))
    assert 0.02 < 1 - mentioned / stated < 0.12  # reports pass over a finding now and then


def test_report_wording_varies():
    reports = [
        write_report(study.plan_study(0, *i), np.random.default_rng([0, 16, *i])) for i in default_indices()
    ]
    assert len(set(reports)) > 0.97 * len(reports)
    assert any("possible" in r for r in reports) and any("考虑" in r for r in reports)
    assert any("no calcification" in r.lower() for r in reports) and any("未见" in r for r in reports)


def _pairs(flag, count):
    """Renders studies twice, the finding present and absent, all else equal."""
    out = []
    patient = 0
    while len(out) < count:
        plan = study.plan_study(0, patient, 0)
        if plan.organ in ("liver", "pancreas"):
            out.append(
                [
                    study.render(dataclasses.replace(plan, **{flag: value}), 0, patient, 0)[:2]
                    for value in (True, False)
                ]
            )
        patient += 1
    return out


def test_pulsation_shows_as_motion_only():
    widths = np.asarray(
        [
            [
                [r.box[3] - r.box[1] for r in regions if r.label == "vessel" and r.frame % 4 == 0]
                for _, regions in pair
            ]
            for pair in _pairs("pulsation", 20)
        ]
    )  # [pair, present / absent, frame]
    changes = widths.std(-1)
    assert np.mean(changes[:, 0] > changes[:, 1]) >= 0.95
    # One frame's width comes from the same distribution either way.
    assert stats.ks_2samp(widths[:, 0, 2], widths[:, 1, 2]).pvalue > 0.05


def _wall_and_organ_shifts(frames):
    """Lateral motion between successive frames, in pixels, of the abdominal wall and of the tissue below."""
    shifts = []
    for rows in (slice(6, 17), slice(30, 62)):
        band = frames[:, rows].astype(float)
        found = []
        for before, after in itertools.pairwise(band):
            scores = [
                np.corrcoef(before[:, 28:68].ravel(), after[:, 28 + k : 68 + k].ravel())[0, 1]
                for k in range(-6, 7)
            ]
            found.append(int(np.argmax(scores)) - 6)
        shifts.append(found)
    return np.asarray(shifts)


def test_sliding_shows_as_motion_only():
    pairs = _pairs("sliding", 16)
    relative = []
    for pair in pairs:
        shifts = [_wall_and_organ_shifts(frames) for frames, _ in pair]
        relative.append([np.mean(np.abs(wall - organ)) for wall, organ in shifts])
    relative = np.asarray(relative)
    assert np.mean(relative[:, 0] > relative[:, 1]) >= 0.9
    for statistic in (np.mean, np.std):
        values = np.asarray([[statistic(frames[10]) for frames, _ in pair] for pair in pairs])
        assert stats.ks_2samp(values[:, 0], values[:, 1]).pvalue > 0.05


def test_builder_prepares_and_splits_by_patient(tmp_path):
    from dilbert_jax.data.phantom.phantom_dataset_builder import Builder

    builder = Builder(data_dir=tmp_path, config="small", progress=False)
    builder.download_and_prepare()
    groups = {}
    for split in ("train", "validation", "test"):
        groups[split] = {example["group_id"] for example in builder.as_data_source(split=split)}
    assert sum(len(g) for g in groups.values()) == len(set.union(*groups.values())) == 63
    assert builder.preparation()["kept"] == 84
    assert builder.preparation()["skipped"] == 0
