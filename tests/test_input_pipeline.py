"""The input pipeline: frames, augmentation, regions, corruption without leaks, batches that resume."""

import dataclasses
import itertools

import numpy as np
import pytest

from dilbert_jax.clips import ClipStore, Study
from dilbert_jax.input_pipeline import (
    MASK_RATE,
    ExampleBuilder,
    InputSpec,
    augment,
    box_iou,
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
    flipped = moved = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        top, left = rng.integers(3, 16, 2)
        frames = np.zeros((3, SIZE, SIZE), np.uint8)
        frames[:, top : top + 9, left : left + 6] = 200
        boxes = np.asarray([[top, left, top + 9, left + 6]], np.float32) / SIZE
        before = boxes.copy()
        out, new, sector = augment(frames, boxes, boxes.copy(), rng, mirror=True)
        np.testing.assert_array_equal(boxes, before)
        rows, columns = np.flatnonzero(out[1].any(1)), np.flatnonzero(out[1].any(0))
        painted = np.asarray([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / SIZE
        np.testing.assert_allclose(new[0], painted, atol=1e-6)
        np.testing.assert_allclose(sector[0], painted, atol=1e-6)
        np.testing.assert_array_equal(out[0], out[2])  # the same for all frames
        flipped += abs(painted[1] - before[0, 1]) > 0.06 + 1 / SIZE
        moved += painted[0] != before[0, 0]
    assert flipped > 10 and moved > 20


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
