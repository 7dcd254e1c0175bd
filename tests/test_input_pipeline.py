"""The input pipeline: frames, augmentation, regions, corruption without leaks, batches that resume."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import grain
import numpy as np
import pytest

from dilbert_jax.augmentation import LEAST_VISIBLE, SMALLEST_CROP, augment
from dilbert_jax.boxes import box_iou
from dilbert_jax.clips import ClipStore, Study
from dilbert_jax.input_pipeline import (
    MASK_RATE,
    ExampleBuilder,
    InputSpec,
    choose_share,
    entity_statuses,
    evaluation_batches,
    lay_grid,
    names_a_side,
    pad_frames,
    training_batches,
)
from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.labels import build_label_space

GRAPH = load_graph()
SIZE = 32
SPEC = InputSpec(
    num_frames=4, frames_per_step=2, grid_scales=(1, 2), grid_steps=2, max_annotated_regions=3, max_tokens=24
)
REPORTS = (
    ("Liver: anechoic cyst of 12 mm with posterior enhancement.", "en", "cyst", ("anechoic",)),
    ("肾脏内见强回声结石，大小9mm，后方声影。", "zh", "stone", ("posterior_shadowing",)),
    ("Liver of normal size, homogeneous echotexture. No mass.", "en", "normal", ()),
    ("", "en", "", ()),
)

BOXES = (
    (0.2, 0.2, 0.5, 0.6),
    (0.2, 0.25, 0.5, 0.65),
    (0.2, 0.3, 0.5, 0.7),
    (0.0, 0.0, 0.9, 1.0),
    (0.6, 0.6, 0.9, 0.9),
)


def make_study(index, **changes):
    report, language, condition, findings = REPORTS[index % 4]
    boxed = index % 2 == 0
    fields = {
        "study_id": f"s{index}",
        "group_id": f"g{index // 2}",
        "split": "train",
        "organ": "kidney" if "肾" in report else "liver",
        "condition": condition,
        "findings": findings,
        "report": report,
        "language": language,
        "report_is_synthetic": False,
        "frame_index": tuple(range(0, 2 * (6 if index % 3 else 3), 2)),
        "region_frames": (0, 1, 2, 2, 2) if boxed else (),
        "region_boxes": BOXES if boxed else (),
        "region_labels": ("lesion", "lesion", "lesion", "liver", "vessel") if boxed else (),
        "sector": (0.0, 0.0, 0.9, 1.0),
    }
    return Study(**(fields | changes))


def make_builder(studies=None, **spec):
    studies = studies or [make_study(i) for i in range(12)]
    counts = [len(s.frame_index) for s in studies]
    pixels = np.random.default_rng(0).integers(20, 255, (sum(counts), SIZE, SIZE)).astype(np.uint8)
    store = ClipStore(tuple(studies), pixels, np.concatenate([[0], np.cumsum(counts)]))
    statuses = [entity_statuses(s, GRAPH) for s in studies]
    labels = build_label_space(
        [s.organ for s in studies],
        [s.condition for s in studies],
        [s.findings for s in studies],
        [label for s in studies for label in s.region_labels],
        [[c for c, status in held.items() if status == "present"] for held in statuses],
        GRAPH,
        min_count=1,
    )
    tokenizer = ReportTokenizer.train([s.report for s in studies], 400)
    return ExampleBuilder(store, labels, dataclasses.replace(SPEC, **spec), tokenizer, GRAPH)


@pytest.fixture(scope="module")
def builder():
    return make_builder()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- boxes and augmentation -----------------------------------------------------------------------------


def iou_of_two(a, b):
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0.0) * max(width, 0.0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if total else 0.0


def test_overlap_equals_a_plain_loop(rng):
    low = rng.uniform(0, 0.7, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.3, (40, 2))], -1)
    boxes[3] = 0.0  # an empty slot
    a, b = boxes[:25], boxes[10:]
    expected = [[iou_of_two(x, y) for y in b] for x in a]
    np.testing.assert_allclose(box_iou(a, b), expected, atol=1e-12)
    assert box_iou(a, b)[15, 5] == pytest.approx(1.0)


def test_augmentation_moves_boxes_and_sector_with_the_pixels():
    """A bright block in a dim sector stays where its box says, to half a pixel: places fall between pixels."""
    flipped = moved = enlarged = cut = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        low, side, extent = np.asarray([[4, 3], [22, 26], [9, 6]])
        corner = low + rng.integers(0, side - extent + 1)
        frames = np.zeros((3, SIZE, SIZE), np.uint8)
        frames[:, 4:26, 3:29] = 60
        frames[:, corner[0] : corner[0] + 9, corner[1] : corner[1] + 6] = 200
        boxes = np.concatenate([corner, corner + extent])[None].astype(np.float32) / SIZE
        sector = np.asarray([[4, 3, 26, 29]], np.float32) / SIZE
        before = boxes.copy()
        out, new, new_sector = augment(frames, boxes, sector, rng, mirror=True)
        np.testing.assert_array_equal(boxes, before)
        np.testing.assert_array_equal(out[0], out[2])  # the same for all frames
        assert out.dtype == np.uint8 and new.dtype == new_sector.dtype == np.float32
        for lit, box, atol in ((out[1] > 0, new_sector[0], 1e-6), (out[1] > 110, new[0], 0.5 / SIZE + 1e-6)):
            rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
            painted = np.asarray([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / SIZE
            np.testing.assert_allclose(box, painted, atol=atol)
        height, width = (new[0, 2:] - new[0, :2]) * SIZE
        assert 0 < height <= 9 / SMALLEST_CROP + 1e-3 and 0 < width <= 6 / SMALLEST_CROP + 1e-3
        flipped += abs(new_sector[0, 1] - sector[0, 1]) > 0.06 + 1 / SIZE
        flipped += abs(new[0, 1] - before[0, 1]) > 0.2
        moved += new_sector[0, 0] != sector[0, 0]
        enlarged += height > 9.2
        cut += height < 8.8 or width < 5.8
    assert flipped > 50 and moved > 100 and enlarged > 50 and cut > 10


def test_a_sector_of_a_pixel_may_leave_the_canvas(rng):
    frames = np.full((2, SIZE, SIZE), 90, np.uint8)
    corner = np.asarray([[0.0, 0.0, 1 / SIZE, 1 / SIZE]])
    outcomes = {bool(augment(frames, corner, corner, rng, True)[0].any()) for _ in range(60)}
    assert outcomes == {True, False}


def test_a_box_that_is_all_but_cut_away_becomes_empty(rng):
    frames, sector = np.full((1, SIZE, SIZE), 90, np.uint8), np.asarray([[0.0, 0.0, 1.0, 1.0]])
    edge = np.asarray([[0.0, 0.3, 0.06, 0.6], [0.94, 0.3, 1.0, 0.6], [0.0, 0.0, 1.0, 1.0]])
    seen = np.stack([augment(frames, edge, sector, rng, False)[1] for _ in range(300)])
    size = np.prod(seen[..., 2:] - seen[..., :2], axis=-1)
    assert (size[:, :2] == 0).any(0).all() and not (size[:, 2] == 0).any()
    assert not ((size > 0) & (size < LEAST_VISIBLE * 0.06 * 0.3)).any()


def test_augmentation_repeats_pixels_and_mixes_none():
    """Rows and columns coded in the grey levels come out in order, each at most twice in a row."""
    code = np.arange(SIZE)[None, :] * 3 + 100
    frames = np.stack([np.broadcast_to(code.T, (SIZE, SIZE)), np.broadcast_to(code, (SIZE, SIZE))])
    whole, none = np.asarray([[0.0, 0.0, 1.0, 1.0]]), np.zeros((0, 4))
    for seed in range(30):
        out, _, sector = augment(frames.astype(np.uint8), none, whole, np.random.default_rng(seed), True)
        top, left, bottom, right = np.rint(sector[0] * SIZE).astype(int)
        by_row, by_column = out[:, top:bottom, left:right].astype(int)
        assert (by_row == by_row[:, :1]).all()  # one source row, one gain
        steps = np.diff(by_column, axis=1) * np.sign(by_column[0, -1] - by_column[0, 0])
        assert (steps >= 0).all()
        same = np.diff(by_column[np.argmin(by_column.max(1))]) == 0
        assert not (same[1:] & same[:-1]).any() and same.mean() < 0.15


def test_speckle_stays_as_coarse_and_as_strong(rng):
    """Fully developed speckle keeps its contrast and is not smoothed (bilinear zoom would correlate neighbours)."""
    frames = np.minimum(rng.rayleigh(40, (2, 64, 64)), 255).astype(np.uint8)
    whole, none = np.asarray([[0.0, 0.0, 1.0, 1.0]]), np.zeros((0, 4))
    for seed in range(20):
        out, _, sector = augment(frames, none, whole, np.random.default_rng(seed), True)
        top, left, bottom, right = np.rint(sector[0] * 64).astype(int)
        seen = out[:, top:bottom, left:right].astype(float)
        contrast = seen.std(axis=(0, 2)) / seen.mean(axis=(0, 2))  # of each depth; gamma changes it
        assert 0.75 * 0.52 < contrast.mean() < 1.3 * 0.52
        flat = seen - seen.mean(axis=(0, 2), keepdims=True)
        assert (flat[:, :, 1:] * flat[:, :, :-1]).mean() / flat.var() < 0.15


def test_the_gain_over_depth_is_smooth_and_the_same_along_a_row(rng):
    frames, whole = np.full((1, 64, 64), 120, np.uint8), np.asarray([[0.0, 0.0, 1.0, 1.0]])
    spread = []
    for _ in range(40):
        out, _, sector = augment(frames, np.zeros((0, 4)), whole, rng, True)
        top, left, bottom, right = np.rint(sector[0] * 64).astype(int)
        seen = out[0, top:bottom, left:right].astype(int)
        assert (seen == seen[:, :1]).all()
        assert np.abs(np.diff(seen[:, 0])).max() <= 4
        spread.append(np.ptp(seen[:, 0]) / seen.mean())
    assert np.median(spread) > 0.02 and max(spread) < 0.3


def test_augmentation_keeps_black_black_and_changes_the_gain(rng):
    frames = np.full((1, SIZE, SIZE), 100, np.uint8)
    levels = [
        augment(frames, np.zeros((0, 4)), np.asarray([[0, 0, 1, 1.0]]), rng, False)[0][0, 16, 16]
        for _ in range(50)
    ]
    assert min(levels) < 80 < 120 < max(levels)
    black, _, _ = augment(np.zeros_like(frames), np.zeros((0, 4)), np.asarray([[0, 0, 1, 1.0]]), rng, True)
    assert not black.any()


@pytest.mark.parametrize(
    ("report", "language", "side"),
    [
        ("Cyst in the left kidney.", "en", True),
        ("右肾见囊肿。", "zh", True),
        ("甲状腺左叶见结节。", "zh", True),
        ("Cyst in the right lobe of the liver.", "en", True),
        ("Liver cyst. " * 20 + "Left kidney normal.", "en", True),  # beyond the tokens that are kept
        ("Liver with a cyst.", "en", False),
        ("双侧肾脏未见异常。", "zh", False),
    ],
)
def test_reports_that_name_a_side_are_known(builder, report, language, side):
    encoded = builder.tokenizer.encode(report, language, GRAPH, SPEC.max_tokens)
    assert names_a_side(encoded) == side


def first_column_share(builder):
    """How often the clip, bright on its left half only, comes out bright on the left."""
    builder.store.pixels[:] = 0
    builder.store.pixels[:, :, : SIZE // 2] = 200
    sides = []
    for seed in range(40):
        frames = builder.annotation(0, np.random.default_rng(seed))["frames"][0]
        sides.append(frames[:, : SIZE // 2].sum() > frames[:, SIZE // 2 :].sum())
    return np.mean(sides)


@pytest.mark.parametrize(
    "changes",
    [
        {"report": "Cyst in the left kidney."},
        {"report": "甲状腺右叶见结节。", "language": "zh"},
        {"report": "", "findings": ("left",)},
    ],
)
def test_a_clip_is_not_mirrored_when_a_side_is_named(changes):
    assert first_column_share(make_builder([make_study(0, **changes), make_study(1)])) == 1.0


def test_other_clips_are_mirrored_half_of_the_time():
    assert 0.25 < first_column_share(make_builder([make_study(0), make_study(1)])) < 0.75


# --- grid, frames, choices ------------------------------------------------------------------------------


def test_the_grid_lies_inside_the_sector_and_covers_it():
    sector = (0.1, 0.2, 0.7, 0.9)
    boxes, frames = lay_grid(SPEC, sector, num_valid=4)
    assert boxes.shape == (SPEC.num_grid_regions, 4) and SPEC.num_grid_regions == 2 * (1 + 4)
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes[:, :2].min(0) == pytest.approx(sector[:2]) and boxes[:, 2:].max(0) == pytest.approx(
        sector[2:]
    )
    area = np.prod(boxes[:, 2:] - boxes[:, :2], -1).reshape(2, 5)
    np.testing.assert_allclose(area[:, 0], 0.6 * 0.7, rtol=1e-5)
    np.testing.assert_allclose(area[:, 1:].sum(1), 0.6 * 0.7, rtol=1e-5)
    assert frames.tolist() == [1] * 5 + [3] * 5
    assert lay_grid(SPEC, sector, num_valid=1)[1].max() == 0


def test_padding_is_marked():
    frames, mask = pad_frames(np.ones((3, 2, 2), np.uint8), 5)
    assert mask.tolist() == [True] * 3 + [False] * 2
    assert frames[:3].all() and not frames[3:].any()


def test_the_chosen_share_is_exact_in_expectation(rng):
    valid = np.asarray([True] * 5 + [False] * 3)
    chosen = np.stack([choose_share(valid, 0.15, rng) for _ in range(4000)])
    assert not chosen[:, 5:].any()
    assert set(chosen.sum(1)) == {0, 1}  # 0.75 rounds at random to its neighbours
    assert abs(chosen.sum(1).mean() - 0.75) < 0.03
    np.testing.assert_allclose(chosen.mean(0)[:5], 0.15, atol=0.03)
    assert choose_share(np.ones(20, bool), 0.15, rng).sum() == 3
    assert not choose_share(np.zeros(4, bool), 0.15, rng).any()


def test_short_clips_are_padded_and_long_ones_sampled_in_order(builder):
    short = builder.annotation(0, np.random.default_rng(0))
    assert short["frame_mask"].tolist() == [True] * 3 + [False]
    assert short["frame_index"].tolist() == [0, 2, 4, 4] and not short["frames"][3].any()
    starts = set()
    for seed in range(30):
        example = builder.annotation(1, np.random.default_rng(seed))
        assert example["frame_mask"].all()
        assert (np.diff(example["frame_index"]) > 0).all() and example["frame_index"].max() <= 10
        starts.add(tuple(example["frame_index"].tolist()))
    assert len(starts) > 2
    assert builder.annotation(1, np.random.default_rng(0), train=False)["frame_index"].tolist() == [
        0,
        4,
        6,
        10,
    ]


# --- what a pre-training example hides ------------------------------------------------------------------


def test_the_same_index_and_seed_give_the_same_example(builder):
    for index in range(4):
        for kind in (builder.pretraining, builder.annotation):
            first, again = kind(index, np.random.default_rng(5)), kind(index, np.random.default_rng(5))
            assert_same(first, again)
    other = builder.pretraining(0, np.random.default_rng(6))
    assert (other["frames"] != builder.pretraining(0, np.random.default_rng(5))["frames"]).any()


def test_no_visible_region_overlaps_a_zeroed_one(builder):
    zeroed_for_overlap = 0
    for index, seed in itertools.product(range(0, 12, 2), range(40)):
        example = builder.pretraining(index, np.random.default_rng(seed))
        target, zeroed = example["region_target"], example["region_zeroed"]
        boxes, mask = example["boxes"], example["region_mask"]
        assert not (target & ~(mask & (example["region_labels"] >= 0))).any()
        hidden = target & zeroed
        for visible in np.flatnonzero(mask & ~zeroed):
            for other in np.flatnonzero(hidden):
                assert iou_of_two(boxes[visible], boxes[other]) <= SPEC.leak_iou + 1e-6
        zeroed_for_overlap += (zeroed & ~target).sum()
        # Nothing is hidden without cause.
        for extra in np.flatnonzero(zeroed & ~target):
            assert (
                max(iou_of_two(boxes[extra], boxes[other]) for other in np.flatnonzero(hidden))
                > SPEC.leak_iou
            )
    assert zeroed_for_overlap > 50


def test_masked_shares_are_the_papers(builder):
    regions, zeroed, steps, hidden = 0, 0, 0, 0
    labelled = valid_steps = 0
    for index, seed in itertools.product(range(12), range(100)):
        e = builder.pretraining(index, np.random.default_rng((index, seed)))
        regions += e["region_target"].sum()
        zeroed += (e["region_target"] & e["region_zeroed"]).sum()
        labelled += (e["region_mask"] & (e["region_labels"] >= 0)).sum()
        steps += e["description_target"].sum()
        hidden += e["description_zeroed"].sum()
        valid_steps += e["frame_mask"].reshape(-1, 2).any(1).sum()
        assert not (e["description_zeroed"] & ~e["description_target"]).any()
        pieces = int(e["token_mask"].sum()) - 2
        assert e["mlm_mask"].sum() == (max(1, round(MASK_RATE * pieces)) if pieces else 0)
    assert abs(regions / labelled - 0.15) < 0.01
    assert abs(steps / valid_steps - 0.15) < 0.02
    assert zeroed / regions > 0.88 and 0.86 < hidden / steps < 0.94


def test_word_piece_targets_are_the_original_pieces(builder):
    texts = {tuple(r.token_ids.tolist()): i for i, r in enumerate(builder.reports)}
    for seed in range(60):
        e = builder.pretraining(0, np.random.default_rng(seed))
        restored = e["token_ids"].copy()
        positions = e["mlm_positions"][e["mlm_mask"]]
        assert len(set(positions.tolist())) == len(positions)
        restored[positions] = e["mlm_targets"][e["mlm_mask"]]
        report = texts[tuple(restored.tolist())]
        assert (builder.store.studies[report].report == builder.store.studies[0].report) == e["matched"]
        assert not e["token_types"][positions].any()


def test_half_of_the_reports_belong_to_another_patient_with_another_text(builder):
    by_ids = {
        tuple(r.token_ids.tolist()): s.report
        for r, s in zip(builder.reports, builder.store.studies, strict=True)
    }
    matched = []
    for index, seed in itertools.product(range(12), range(120)):
        partner = builder._mismatched(index, np.random.default_rng(seed))
        study, other = builder.store.studies[index], builder.store.studies[partner]
        assert other.group_id != study.group_id and other.report != study.report and other.report
    for index, seed in itertools.product((0, 1, 2, 4), range(150)):
        e = builder.pretraining(index, np.random.default_rng(seed))
        matched.append(bool(e["matched"]))
        restored = e["token_ids"].copy()
        restored[e["mlm_positions"][e["mlm_mask"]]] = e["mlm_targets"][e["mlm_mask"]]
        assert (by_ids[tuple(restored.tolist())] == builder.store.studies[index].report) == e["matched"]
    assert abs(np.mean(matched) - 0.5) < 0.06


def test_without_another_text_every_pair_matches():
    alike = [make_study(0, study_id=f"s{i}", group_id=f"g{i}") for i in range(3)]
    builder = make_builder(alike)
    assert all(builder.pretraining(0, np.random.default_rng(seed))["matched"] for seed in range(20))


def test_a_study_without_report_is_left_out_of_matching(builder):
    assert not builder.pretraining(3, np.random.default_rng(0))["cmm_mask"]
    assert builder.pretraining(0, np.random.default_rng(0))["cmm_mask"]


def test_a_shown_report_brings_the_classes_of_its_own_study(builder):
    own = {s.report: builder.targets(i)["classes"] for i, s in enumerate(builder.store.studies)}
    by_ids = {
        tuple(r.token_ids.tolist()): s.report
        for r, s in zip(builder.reports, builder.store.studies, strict=True)
    }
    seen = set()
    for seed in range(60):
        e = builder.pretraining(0, np.random.default_rng(seed))
        restored = e["token_ids"].copy()
        restored[e["mlm_positions"][e["mlm_mask"]]] = e["mlm_targets"][e["mlm_mask"]]
        report = by_ids[tuple(restored.tolist())]
        np.testing.assert_array_equal(e["report_classes"], own[report])
        np.testing.assert_array_equal(e["classes"], builder.targets(0)["classes"])
        seen.add(bool(e["matched"]))
    assert seen == {True, False}
    blank = make_builder(report_dropout=0.999).pretraining(0, np.random.default_rng(0))
    assert not blank["report_classes_mask"] and blank["classes_mask"]


# --- labels ---------------------------------------------------------------------------------------------


def test_unknown_labels_are_marked_unknown(builder):
    labels = builder.labels
    known, unknown = builder.targets(0), builder.targets(3)
    assert labels.conditions[known["condition"]] == "cyst" and unknown["condition"] == -1
    assert known["findings_mask"] and not unknown["findings_mask"] and not unknown["classes_mask"]
    assert [c for c, held in zip(labels.classes, known["classes"], strict=True) if held] == [
        "anechoic",
        "cyst",
        "liver",
    ]


def test_negated_entities_are_absent_and_uncertain_ones_are_not_counted():
    text = "Liver of normal size. No mass. Possible stone."
    builder = make_builder(
        [make_study(0), make_study(1), make_study(2, report=text), make_study(4, report="Liver mass.")]
    )
    statuses = entity_statuses(builder.store.studies[2], GRAPH)
    assert (
        statuses["mass"] == "absent" and statuses["stone"] == "uncertain" and statuses["liver"] == "present"
    )
    column = builder.labels.entities.index
    target = builder.targets(2)
    assert not target["entities"][column("mass")] and target["entities_mask"][column("mass")]
    assert not target["entities_mask"][column("stone")]
    # What the labels of a study state wins over its text.
    assert entity_statuses(make_study(2, report=text, findings=("mass",)), GRAPH)["mass"] == "present"


def test_a_grid_box_takes_the_label_of_the_box_it_overlaps_in_the_nearest_frame(builder):
    example = builder.pretraining(2, np.random.default_rng(0), train=False)
    labels = builder.labels.regions
    first_grid = SPEC.max_annotated_regions
    # Whole-sector boxes at the last frames overlap the "liver" box (0, 0, 0.9, 1) most.
    whole = np.flatnonzero(
        example["region_mask"] & (np.abs(example["boxes"] - [0.0, 0.0, 0.9, 1.0]).max(-1) < 1e-6)
    )
    names = {
        int(example["box_frames"][i]): labels[example["region_labels"][i]] for i in whole if i >= first_grid
    }
    assert names[3] == "liver"
    for i in range(first_grid, len(example["boxes"])):
        if example["region_mask"][i] and example["region_labels"][i] >= 0:
            assert labels[example["region_labels"][i]] in ("lesion", "liver", "vessel")
    # A clip without boxes lends its organ to every place in pre-training.
    example = builder.pretraining(1, np.random.default_rng(0), train=False)
    assert {labels[i] for i in example["region_labels"][example["region_mask"]]} == {"kidney"}


def test_pretraining_shows_annotated_boxes_and_keeps_to_the_limit(builder):
    example = builder.pretraining(0, np.random.default_rng(0), train=False)
    assert example["boxes"].shape == (SPEC.num_grid_regions + 3, 4)
    assert example["region_mask"].all()
    annotated = np.asarray(builder.store.studies[0].region_boxes, np.float32)
    for box in example["boxes"][:3]:
        assert (annotated == box).all(1).any()
    without = builder.pretraining(1, np.random.default_rng(0), train=False)
    assert without["region_mask"].sum() == SPEC.num_grid_regions


def test_annotation_examples_hold_no_report_and_show_no_annotated_box(builder):
    tokenizer = builder.tokenizer
    for index, train in itertools.product(range(6), (True, False)):
        example = builder.annotation(index, np.random.default_rng(index), train=train)
        assert example["token_ids"].tolist() == [tokenizer.cls_id, tokenizer.sep_id]
        assert example["token_types"].tolist() == [0, 0] and example["token_mask"].all()
        assert example["region_mask"].sum() == SPEC.num_grid_regions
        # The places in view are the grid's alone: they follow from the sector, whatever the annotation says.
        plain = dataclasses.replace(
            builder.store.studies[index],
            region_frames=(),
            region_boxes=(),
            region_labels=(),
            report="",
            findings=(),
        )
        studies = list(builder.store.studies)
        studies[index] = plain
        blind = ExampleBuilder(
            dataclasses.replace(builder.store, studies=tuple(studies)), builder.labels, SPEC, tokenizer, GRAPH
        ).annotation(index, np.random.default_rng(index), train=train)
        for name in ("frames", "frame_mask", "token_ids"):
            np.testing.assert_array_equal(example[name], blind[name], err_msg=name)
        for name in ("boxes", "box_frames"):
            grid, blind_grid = (e[name][e["region_mask"]] for e in (example, blind))
            np.testing.assert_array_equal(grid, blind_grid, err_msg=name)
        if index % 2:
            assert (example["region_labels"] == -1).all()


def test_fine_tuning_asks_what_annotated_boxes_show_and_evaluation_does_not(builder):
    study = builder.store.studies[0]
    example = builder.annotation(0, np.random.default_rng(3), train=True)
    asked = ~example["region_mask"] & (example["region_labels"] >= 0)
    assert asked.sum() == 3 == SPEC.max_annotated_regions
    labels = [builder.labels.regions[i] for i in example["region_labels"][asked]]
    assert set(labels) <= set(study.region_labels)
    assert example["boxes"].shape == (SPEC.num_grid_regions + 3, 4)
    assert builder.annotation(0, np.random.default_rng(3), train=False)["region_mask"].all()


# --- batches --------------------------------------------------------------------------------------------


def test_a_resumed_stream_equals_the_tail_of_the_uninterrupted_one(builder):
    indices = [0, 2, 3, 5, 7, 8, 11]
    whole = list(itertools.islice(training_batches(builder.pretraining, indices, 4, seed=3), 7))
    for start in (1, 4):
        tail = itertools.islice(
            training_batches(builder.pretraining, indices, 4, seed=3, start_step=start), 7 - start
        )
        for batch, expected in zip(tail, whole[start:], strict=True):
            assert_same(batch, expected)
    # Every epoch shows every study once, and no other.
    seen = np.concatenate([batch["study"] for batch in whole])
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == indices
    assert seen[:7].tolist() != seen[7:14].tolist()
    # A study looks different the next time.
    first, second = (np.flatnonzero(seen == 5)[k] for k in (0, 1))
    frames = np.concatenate([batch["frames"] for batch in whole])
    assert (frames[first] != frames[second]).any()
    other = next(training_batches(builder.pretraining, indices, 4, seed=4))
    assert other["study"].tolist() != whole[0]["study"].tolist()


def test_a_batch_may_exceed_the_number_of_studies(builder):
    batch = next(training_batches(builder.annotation, [4, 6], 5, seed=0))
    assert len(batch["frames"]) == 5 and set(batch["study"]) == {4, 6}


def test_one_group_is_the_plain_shuffled_stream(builder):
    """What runs of earlier versions saw: a resumed run must not change its order."""
    indices = np.asarray([0, 2, 3, 5, 7, 8, 11])
    plain = grain.MapDataset.source(indices).seed(3).shuffle().repeat()
    plain = plain.random_map(lambda index, rng: builder.pretraining(int(index), rng)).batch(4)
    for length_of in (None, lambda index: 9):
        batches = training_batches(builder.pretraining, indices, 4, seed=3, length_of=length_of)
        for i in range(5):
            assert_same(next(batches), plain[i])


BUCKETS = {"num_frames": 6, "frame_buckets": (2, 4)}


@pytest.fixture(scope="module")
def bucket_builder():
    """Clips of 1 to 9 frames, six in each of three lengths."""
    counts = [1, 2, 3, 4, 5, 9] * 3
    return make_builder([make_study(i, frame_index=tuple(range(n))) for i, n in enumerate(counts)], **BUCKETS)


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("start", [0, 3])
def test_parts_of_the_processes_make_up_the_batch_of_one(bucket_builder, buckets, start):
    builder = bucket_builder if buckets else make_builder()
    length_of = builder.padded_length if buckets else None

    def take(**part):
        return itertools.islice(
            training_batches(
                builder.pretraining, range(11), 8, 5, start_step=start, length_of=length_of, **part
            ),
            5,
        )

    expected = list(take())
    for count in (1, 2, 4, 8):
        parts = [take(process_index=i, process_count=count) for i in range(count)]
        for whole, *pieces in zip(expected, *parts, strict=True):
            assert all(len(piece["study"]) == 8 // count for piece in pieces)
            assert_same({name: np.concatenate([p[name] for p in pieces]) for name in whole}, whole)


@pytest.mark.parametrize("part", [(0, 3), (2, 2), (-1, 2)])
def test_a_batch_must_divide_among_the_processes(builder, part):
    index, count = part
    with pytest.raises(ValueError, match=f"process_index {index}, process_count {count}"):
        training_batches(builder.pretraining, [0, 1], 8, 0, process_index=index, process_count=count)
    with pytest.raises(ValueError, match="indices is empty"):
        training_batches(builder.pretraining, [], 8, 0)


def test_examples_are_padded_to_their_own_bucket_in_training_alone(bucket_builder):
    builder, spec = bucket_builder, bucket_builder.spec
    for index, study in enumerate(builder.store.studies):
        count = min(len(study.frame_index), 6)
        length = builder.padded_length(index)
        assert length == {1: 2, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}[count]
        example = builder.pretraining(index, np.random.default_rng(index))
        assert example["frames"].shape == (length, SIZE, SIZE)
        assert example["frame_mask"].tolist() == [True] * count + [False] * (length - count)
        assert len(example["frame_index"]) == length and not example["frames"][count:].any()
        steps = length // spec.frames_per_step
        for name in ("description_target", "description_zeroed"):
            assert example[name].shape == (steps,)
        assert example["box_frames"].max() < count
        assert builder.annotation(index, np.random.default_rng(0))["frames"].shape[0] == length
        for kind in (builder.pretraining, builder.annotation):
            assert len(kind(index, np.random.default_rng(0), train=False)["frames"]) == spec.num_frames
    shuffled = dataclasses.replace(spec, shuffle=True)
    other = ExampleBuilder(builder.store, builder.labels, shuffled, builder.tokenizer, GRAPH)
    assert len(other.pretraining(0, np.random.default_rng(0))["description_order"]) == 1


def test_lengths_take_turns_in_proportion_to_their_studies(bucket_builder):
    builder = bucket_builder
    indices = [i for i in range(18) if builder.padded_length(i) != 4 or i < 4]  # 6, 2 and 6 studies
    stream = training_batches(builder.pretraining, indices, 4, seed=1, length_of=builder.padded_length)
    whole = list(itertools.islice(stream, 42))
    lengths = [batch["frames"].shape[1] for batch in whole]
    assert [lengths.count(n) for n in (2, 4, 6)] == [18, 6, 18]
    assert {n: lengths[:7].count(n) for n in (2, 4, 6)} == {2: 3, 4: 1, 6: 3}
    for batch in whole:
        assert {builder.padded_length(i) for i in batch["study"]} == {batch["frames"].shape[1]}
    # All studies are seen equally often (42 batches of 4 clips of 14 studies), the small group across epochs.
    seen = np.concatenate([batch["study"] for batch in whole])
    assert {int(i): n for i, n in zip(*np.unique(seen, return_counts=True), strict=True)} == dict.fromkeys(
        indices, 12
    )
    for start in (1, 9):
        tail = training_batches(
            builder.pretraining, indices, 4, 1, start_step=start, length_of=builder.padded_length
        )
        for batch, expected in zip(itertools.islice(tail, 6), whole[start:], strict=False):
            assert_same(batch, expected)


# --- worker processes -----------------------------------------------------------------------------------


def on_disk(builder, folder):
    """The same builder with its pixels in a file, as `open_clip_store` maps them."""
    np.save(folder / "pixels.npy", builder.store.pixels)
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    store = dataclasses.replace(builder.store, pixels=pixels)
    return ExampleBuilder(store, builder.labels, builder.spec, builder.tokenizer, GRAPH)


def test_a_store_travels_without_its_pixels(tmp_path, builder, monkeypatch):
    many = dataclasses.replace(builder.store, pixels=np.repeat(builder.store.pixels, 20, axis=0))
    monkeypatch.chdir(tmp_path)
    np.save("pixels.npy", many.pixels)
    mapped = dataclasses.replace(many, pixels=np.load("pixels.npy", mmap_mode="r"))
    sent = pickle.dumps(mapped)
    assert len(sent) < 20_000 < mapped.pixels.nbytes
    monkeypatch.chdir("/")  # the path does not depend on where the worker starts
    again = pickle.loads(sent)
    assert isinstance(again.pixels, np.memmap) and again.studies == mapped.studies
    np.testing.assert_array_equal(again.frames(3), mapped.frames(3))
    with pytest.raises(ValueError, match="read-only"):
        again.pixels[0] = 0
    plain = pickle.loads(pickle.dumps(builder.store))
    np.testing.assert_array_equal(plain.pixels, builder.store.pixels)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_build_the_same_batches_in_the_same_order(tmp_path, bucket_builder, num_workers):
    builder = on_disk(bucket_builder, tmp_path)
    arguments = (builder.pretraining, range(18), 6, 2)
    options = {"start_step": 1, "length_of": builder.padded_length, "process_index": 1, "process_count": 2}
    batches = training_batches(*arguments, **options, num_workers=num_workers)
    for batch, expected in zip(
        itertools.islice(batches, 7), training_batches(*arguments, **options), strict=False
    ):
        assert_same(batch, expected)
        assert all(type(a) is np.ndarray and a.dtype == expected[n].dtype for n, a in batch.items())
    assert len(multiprocessing.active_children()) == num_workers
    if num_workers == 1:
        batches.close()
    else:  # dropped without a word
        del batches
        gc.collect()
    assert not multiprocessing.active_children()


def describe_worker(index, rng):
    import jax
    from jax._src import xla_bridge

    return {
        "process": np.asarray(os.getpid()),
        "backend": np.asarray(xla_bridge.backends_are_initialized()),
        "platform": np.asarray(jax.config.jax_platforms == "cpu"),
        "blocks": np.asarray(
            len({signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        ),
    }


def test_a_worker_leaves_the_accelerator_alone():
    batches = training_batches(describe_worker, range(3), 3, 0, num_workers=1)
    batch = next(batches)
    batches.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert set(batch["process"]) != {os.getpid()}
    assert not batch["backend"].any() and batch["platform"].all() and (batch["blocks"] == 2).all()


def fail(index, rng):
    raise OSError(f"study {index} is broken")


def test_a_worker_passes_its_error_on():
    batches = training_batches(fail, [4], 2, 0, num_workers=1)
    with pytest.raises(OSError, match="study 4 is broken"):
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


USER_OF_WORKERS = """
import signal

from test_input_pipeline import make_builder, training_batches

if __name__ == "__main__":
    # A shell that starts tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for batch in training_batches(make_builder().pretraining, range(12), 8, 0, num_workers=2):
        print("ready", flush=True)
"""


@pytest.mark.parametrize("end", ["interrupt", "terminate", "kill"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    """Ctrl-C reaches the whole group and must end it in order; a parent that dies cannot tell its workers."""
    (tmp_path / "user.py").write_text(USER_OF_WORKERS, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "user.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    if end == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT if end == "interrupt" else signal.SIGTERM)
    # The workers hold the pipe too: it ends with the last of them.
    _, errors = process.communicate(timeout=90)
    if end == "interrupt":
        assert errors.decode().count("Traceback") == 1 and b"KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT


def test_evaluation_covers_every_study_once(builder):
    indices = [1, 2, 5, 6, 9]
    seen = []
    for batch, real in evaluation_batches(builder.annotation, indices, 3, seed=0):
        assert len(real) == 3 and all(len(value) == 3 for value in batch.values())
        seen += batch["study"][real].tolist()
    assert seen == indices
    repeated = [
        (batch["study"][real], batch["mlm_positions"][real])
        for batch, real in evaluation_batches(builder.pretraining, indices, 3, seed=0, repeats=2)
    ]
    studies = np.concatenate([s for s, _ in repeated])
    assert studies.tolist() == indices * 2
    masks = np.concatenate([m for _, m in repeated])
    assert (masks[:5] != masks[5:]).any()
