"""Examples: frames, regions, labels, and corruption without leaks."""

import dataclasses
import itertools

import numpy as np
import pytest
from numpy_reference import iou_of_two
from small_builder import GRAPH, SIZE, SPEC, assert_same, make_builder, make_study

from dilbert_jax.examples import (
    MASK_RATE,
    ExampleBuilder,
    choose_share,
    entity_statuses,
    lay_grid,
    names_a_side,
    pad_frames,
)


@pytest.fixture(scope="module")
def builder():
    return make_builder()


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


@pytest.mark.parametrize("any_mismatch", [False, True])
def test_no_clip_is_shown_the_report_of_another_split(any_mismatch):
    indices = {"train": np.arange(4), "validation": np.arange(4, 8), "test": np.arange(8, 12)}
    builder = make_builder(
        [make_study(i, report=f"Liver of {i} mm.", language="en") for i in range(12)],
        indices=indices,
        any_mismatch=any_mismatch,
    )
    for part in indices.values():
        own = {int(builder.pretraining(i, np.random.default_rng(0))["own_report"]) for i in part}
        shown = set()
        for index, seed in itertools.product(part, range(40)):
            example = builder.pretraining(index, np.random.default_rng(seed))
            shown |= set() if example["matched"] else {int(example["report"])}
        assert shown == own  # every one of its own split, none of another


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


def test_the_graph_chooses_the_masked_words_in_its_share_of_the_examples():
    def related_share(guided_masking, **arguments):
        """Share of the masked pieces that belong to a related entity."""
        builder = make_builder(guided_masking=guided_masking)
        texts = {tuple(r.token_ids.tolist()): i for i, r in enumerate(builder.reports)}
        related, total = 0, 0
        for index, seed in itertools.product((0, 1, 2), range(80)):
            example = builder.pretraining(index, np.random.default_rng(seed), **arguments)
            shown = example["token_ids"].copy()
            positions = example["mlm_positions"][example["mlm_mask"]]
            shown[positions] = example["mlm_targets"][example["mlm_mask"]]
            report = texts[tuple(shown.tolist())]
            belongs = np.isin(builder.reports[report].entity_index[positions], builder._related[report])
            related, total = related + belongs.sum(), total + len(positions)
        return related / total

    never, half, always = related_share(0.0), related_share(0.5), related_share(1.0)
    assert never + 0.2 < always
    assert abs(half - (never + always) / 2) < 0.1 * (always - never)
    assert related_share(0.0, guided=True) == always and related_share(0.5, guided=False) == never


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


def test_the_loss_is_validated_on_what_fine_tuning_asks(builder):
    again = [builder.annotation(0, np.random.default_rng(i), train=False, annotated=True) for i in range(2)]
    for name, value in again[0].items():
        np.testing.assert_array_equal(value, again[1][name], err_msg=name)  # nothing is drawn
    in_training = builder.annotation(0, np.random.default_rng(3), train=True)
    assert {k: v.shape for k, v in again[0].items()} == {k: v.shape for k, v in in_training.items()}
    assert (~again[0]["region_mask"] & (again[0]["region_labels"] >= 0)).sum() == SPEC.max_annotated_regions
