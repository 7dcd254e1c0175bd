"""Annotation: thresholds against brute force, the clip as evaluation sees it, the dictionary and its text."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from annotation_samples import CYST, FRAMES, make_prediction, with_buckets

from dilbert_jax.annotation import (
    NOTICE,
    SCHEMA,
    Thresholds,
    build_visual,
    choose_threshold,
    compose,
    decide_findings,
    describe_source,
    predict,
    write_description,
)
from dilbert_jax.boxes import box_iou
from dilbert_jax.labels import LabelSpace
from dilbert_jax.media import Clip, read_clip

# --- thresholds -------------------------------------------------------------------------------------------


def f1_at(probabilities, targets, threshold):
    answers = probabilities >= threshold
    hits = (answers & targets).sum()
    return 2 * hits / (answers.sum() + targets.sum())


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_threshold_has_the_best_f1(seed):
    rng = np.random.default_rng(seed)
    targets = rng.random(30) < 0.4
    probabilities = np.clip(0.3 + 0.2 * targets + rng.normal(0, 0.15, 30), 0.11, 0.89)
    if seed % 2:  # many ties
        probabilities = np.round(probabilities, 1)
    chosen = choose_threshold(probabilities, targets)
    candidates = np.linspace(0.05, 0.95, 1801)
    best = max(f1_at(probabilities, targets, c) for c in candidates)
    assert f1_at(probabilities, targets, chosen) == pytest.approx(best, abs=1e-12)
    # It lies between two answers, on neither of them.
    assert not np.isclose(probabilities, chosen).any()


def test_too_few_or_only_positives_choose_nothing():
    probabilities = np.linspace(0.1, 0.9, 12)
    assert choose_threshold(probabilities, np.arange(12) < 4) is None
    assert choose_threshold(probabilities, np.arange(12) < 5) is not None
    assert choose_threshold(probabilities, np.ones(12, bool)) is None
    assert choose_threshold(probabilities, np.arange(12) >= 9, min_positives=3) == pytest.approx(
        (probabilities[8] + probabilities[9]) / 2
    )


def test_thresholds_stay_in_sensible_bounds():
    targets = np.arange(12) < 6
    assert choose_threshold(np.where(targets, 1e-3, 1e-4), targets) == 0.05
    assert choose_threshold(np.where(targets, 0.9999, 0.999), targets) == 0.95


def test_thresholds_return_from_their_file_and_have_a_default(tmp_path):
    thresholds = Thresholds({"anechoic": 0.3}, {"cyst": 0.7})
    thresholds.save(tmp_path / "thresholds.json")
    loaded = Thresholds.load(tmp_path / "thresholds.json")
    assert loaded == thresholds
    assert (loaded.finding("anechoic"), loaded.finding("cyst")) == (0.3, 0.5)
    assert (loaded.entity("cyst"), loaded.entity("anechoic")) == (0.7, 0.5)


# --- the clip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_file_gives_the_network_what_evaluation_gives_it(experiment, suffix):
    export = experiment.context.config.data.manual_dir
    compared = 0
    for index, study in enumerate(experiment.store.studies):
        path = pathlib.Path(export, f"{int(study.study_id[-2:])}.{suffix}")
        if not path.exists():
            continue
        clip = read_clip(path)
        visual, boxes = build_visual(experiment.context, clip.frames)
        expected = experiment.builder.annotation(index, np.random.default_rng(0), train=False)
        for name, value in visual.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=f"{study.study_id} {name}")
        assert boxes.min() >= 0 and boxes.max() <= 1
        compared += 1
    assert compared > 5


def test_regions_are_given_in_the_frames_own_coordinates(experiment):
    frames = np.full((5, 30, 60), 90, np.uint8)
    visual, boxes = build_visual(experiment.context, frames)
    assert visual["frames"].shape == (4, 32, 32) and visual["frame_mask"].all()
    np.testing.assert_allclose(boxes[0], [0, 0, 1, 1], atol=1e-6)
    # 30 x 60 becomes 16 x 32, centred.
    np.testing.assert_allclose(visual["boxes"][0], [0.25, 0, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(boxes[1], [0, 0, 0.5, 0.5], atol=1e-6)
    assert np.diag(box_iou(boxes, boxes)) == pytest.approx(1.0)


def test_a_clip_is_padded_to_its_own_bucket(experiment):
    context = with_buckets(experiment.context, 2)
    for num_frames, length in ((1, 2), (2, 2), (3, 4), (4, 4), (12, 4)):
        visual, _ = build_visual(context, np.resize(FRAMES, (num_frames, 30, 60)))
        assert len(visual["frames"]) == len(visual["frame_mask"]) == len(visual["frame_index"]) == length
        assert visual["frame_mask"].sum() == min(num_frames, length)


@pytest.mark.parametrize("shape", [(3, 30, 60, 3), (0, 30, 60), (30, 60)])
def test_frames_that_are_no_grey_clip_are_refused(experiment, shape):
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W\]"):
        build_visual(experiment.context, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        build_visual(experiment.context, FRAMES.astype(np.float32))


# --- the dictionary ---------------------------------------------------------------------------------------


def make_annotation(context, frames, concepts, thresholds=None):
    visual, boxes = build_visual(context, frames)
    prediction = make_prediction(context, concepts=concepts)
    thresholds = thresholds or Thresholds({}, {})
    return compose(context, prediction, visual, boxes, thresholds, source={"file": "a"}, model={"step": 1})


def test_an_annotation_ranks_and_decides(experiment):
    annotation = make_annotation(experiment.context, FRAMES, CYST)
    assert (annotation["schema"], annotation["notice"]) == (SCHEMA, NOTICE)
    assert annotation["organ"]["id"] == "liver" and annotation["condition"]["id"] == "cyst"
    assert annotation["organ"]["name"]["en"].lower() == "liver" and "肝" in annotation["organ"]["name"]["zh"]
    probabilities = [annotation["condition"]["probability"]]
    probabilities += [a["probability"] for a in annotation["condition"]["alternatives"]]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(
        1, abs=1e-3
    )
    assert {f["id"] for f in annotation["findings"] if f["present"]} == {"anechoic", "posterior_enhancement"}
    scores = [e["score"] for e in annotation["entities"]]
    assert scores == sorted(scores, reverse=True)
    assert {e["id"] for e in annotation["entities"] if e["supported"]} == set(CYST) & set(
        experiment.context.labels.entities
    )
    json.dumps(annotation, allow_nan=False)


def test_scores_have_one_entry_a_token_and_a_region(experiment):
    context = experiment.context
    annotation = make_annotation(context, FRAMES, CYST)
    assert len(annotation["regions"]) == context.spec.num_grid_regions
    assert len(annotation["frame_index"]) == context.spec.num_steps
    for entity in annotation["entities"]:
        assert len(entity["frame_scores"]) == len(annotation["frame_index"])
        assert len(entity["region_scores"]) == len(annotation["regions"])
    still = make_annotation(context, FRAMES[:1], CYST)
    assert still["frame_index"] == [0] and all(len(e["frame_scores"]) == 1 for e in still["entities"])
    assert {r["frame"] for r in still["regions"]} == {0}


def test_region_labels_are_the_most_matching_region_class(experiment):
    context = experiment.context
    annotation = make_annotation(context, FRAMES, CYST)
    prediction = make_prediction(context, concepts=CYST)
    classes = [r for r in context.labels.regions if r in context.labels.entities]
    assert len(classes) >= 2
    rows = prediction["region_logits"][[context.labels.entities.index(r) for r in classes]]
    for i, region in enumerate(annotation["regions"]):
        assert region["label"] == classes[rows[:, i].argmax()] and region["name"]["en"]
        assert 1 / len(classes) - 1e-4 <= region["probability"] <= 1


def test_thresholds_decide_what_is_present(experiment):
    strict = Thresholds({"anechoic": 0.9}, {"cyst": 0.9})
    annotation = make_annotation(experiment.context, FRAMES, CYST, strict)
    findings = {f["id"]: f for f in annotation["findings"]}
    assert findings["anechoic"]["threshold"] == 0.9 and not findings["anechoic"]["present"]
    assert findings["posterior_enhancement"]["present"]
    assert not {e["id"]: e for e in annotation["entities"]}["cyst"]["supported"]


def test_of_findings_that_exclude_each_other_the_most_probable_is_present():
    ids = ("a", "b", "c", "d")
    labels = LabelSpace((), (), ids, (), (), exclusive=(("a", "b"), ("c", "b")))
    probabilities = np.asarray(
        [
            [0.6, 0.7, 0.8, 0.1],  # c leaves no b, so that a stays
            [0.6, 0.9, 0.8, 0.9],
            [0.2, 0.3, 0.1, 0.9],
            [0.6, 0.6, 0.1, 0.1],  # the first of equals
        ]
    )
    decided = decide_findings(labels, Thresholds({"b": 0.25}, {}), probabilities)
    wanted = ["ac", "bd", "bd", "a"]
    assert ["".join(c for c, p in zip(ids, row, strict=True) if p) for row in decided] == wanted
    free = decide_findings(LabelSpace((), (), ids, (), ()), Thresholds({}, {}), probabilities)
    np.testing.assert_array_equal(free, probabilities >= 0.5)


def test_an_annotation_holds_no_contradiction(experiment):
    pair = experiment.context.labels.findings[:2]
    for exclusive in ((), (pair,)):
        labels = dataclasses.replace(experiment.context.labels, exclusive=exclusive)
        context = dataclasses.replace(experiment.context, labels=labels)
        findings = {f["id"]: f for f in make_annotation(context, FRAMES, pair)["findings"]}
        assert [findings[f]["probability"] for f in pair] == [0.8, 0.8]
        assert sum(findings[f]["present"] for f in pair) == 2 - len(exclusive)


def test_the_text_says_what_both_heads_support_and_what_the_graph_allows(experiment):
    context = experiment.context
    annotation = make_annotation(context, FRAMES, CYST)
    text = annotation["description"]
    for concept, language in itertools.product(CYST, ("en", "zh")):
        name = context.graph.name(concept, language)
        assert name.lower() in text[language].lower(), (concept, text)
    # Without the match of its entity a finding is not written.
    for entity in annotation["entities"]:
        if entity["id"] == "anechoic":
            entity["supported"] = False
    assert "anechoic" not in write_description(context, annotation)["en"].lower()
    # Nor is one that the organ cannot show.
    foreign = {"id": "air_bronchogram", "name": {}, "probability": 0.9, "threshold": 0.5, "present": True}
    assert not context.graph.allows("liver", "air_bronchogram")
    before = write_description(context, annotation)
    annotation["findings"].append(foreign)
    assert write_description(context, annotation) == before


def breast_annotation(findings, supported=()):
    """An annotation's head: name -> probability of findings (0.5 and more hold), entities matched in the clip."""
    context_free = {"threshold": 0.5, "name": {}}
    return {
        "organ": {"id": "breast"},
        "condition": {"id": "benign_lesion"},
        "findings": [
            {"id": f, "probability": p, "present": p >= 0.5, **context_free} for f, p in findings.items()
        ],
        "entities": [
            {"id": e, "type": kind, "score": 0.9, "supported": True, "name": {}} for e, kind in supported
        ],
    }


def test_the_text_denies_what_would_speak_for_another_condition(experiment):
    # Never seen in a breast, hence the least probable; posterior shadowing would suggest a malignant lesion.
    findings = {
        "mass": 0.9,
        "sliding": 0.01,
        "reduced_sliding": 0.01,
        "pulsation": 0.02,
        "posterior_shadowing": 0.3,
        "skin_thickening": 0.2,
    }
    text = write_description(experiment.context, breast_annotation(findings))
    assert text["en"] == (
        "Breast: a mass is seen. No skin thickening or posterior shadowing is seen. "
        "Appearance suggests a benign lesion."
    )
    # Two that exclude each other are not both denied: the sign of health is not what one looks for.
    lung = breast_annotation({"sliding": 0.1, "reduced_sliding": 0.2}) | {"organ": {"id": "lung"}}
    text = write_description(experiment.context, lung)
    assert text["en"] == "Lung: no reduced sliding is seen. Appearance suggests a benign lesion."
    # The graph knows of no finding that speaks for a condition of the heart.
    heart = breast_annotation({"pulsation": 0.1}) | {"organ": {"id": "heart"}}
    assert "No " not in write_description(experiment.context, heart)["en"]


@pytest.mark.parametrize(
    ("organ", "finding", "text"),
    [
        ("breast", "mass", "Breast: a mass is seen."),
        ("thyroid", "nodule", "Thyroid: a nodule is seen."),
        ("lung", "b_lines", "Lung: B-lines are seen."),
        ("lung", "reduced_sliding", "Lung: reduced sliding is seen."),
        # Signs of health, and what is seen in health as in disease.
        ("lung", "a_lines", "Lung: A-lines are seen. Normal appearance."),
        ("liver", "vascularity", "Liver: vascularity is seen. Normal appearance."),
    ],
)
def test_no_text_says_normal_beside_a_sign_of_disease(experiment, organ, finding, text):
    annotation = breast_annotation({finding: 0.9}) | {"organ": {"id": organ}, "condition": {"id": "normal"}}
    description = write_description(experiment.context, annotation)
    assert description["en"] == text
    assert ("正常" in description["zh"]) == ("Normal" in text)
    # A lesion is a place: it comes from matching, not from the findings.
    annotation = breast_annotation({}, [("lesion", "region")]) | {"condition": {"id": "normal"}}
    assert write_description(experiment.context, annotation)["en"] == "Breast: a lesion is seen."


@pytest.mark.parametrize("word", ["left", "right", "bilateral", "internal"])
def test_words_that_say_nothing_of_a_clip_are_not_written(experiment, word):
    text = write_description(experiment.context, breast_annotation({"mass": 0.9}, [(word, "descriptor")]))
    assert text["en"] == "Breast: a mass is seen. Appearance suggests a benign lesion."
    assert text["zh"] == "乳腺：可见一肿块。考虑良性病变。"


def test_the_source_is_named_without_its_folder():
    clip = Clip(
        frames=FRAMES[:3], fps=20.0, pixel_spacing_mm=(0.1, 0.2), decoder="d", source="/home/Doe John/a.dcm",
        frame_index=(0, 50, 99),
    )  # fmt: skip
    assert describe_source(clip, "ab") == {
        "file": "a.dcm", "sha256": "ab", "num_frames": 100, "height": 30, "width": 60, "fps": 20.0,
        "pixel_spacing_mm": [0.1, 0.2], "decoder": "d",
    }  # fmt: skip


def test_predictions_are_probabilities_that_padding_does_not_change(experiment, params):
    context = experiment.context
    visual, _ = build_visual(context, FRAMES[:2])
    batch = {name: np.stack([value] * 2) for name, value in visual.items()}
    batch["frames"] = batch["frames"].copy()
    batch["frames"][1, 2:] = 255  # padded frames
    output = predict(context, params, batch)
    for name in ("organ", "condition"):
        np.testing.assert_allclose(output[name].sum(-1), 1.0, rtol=1e-5)
    valid = slice(0, 1)
    for name, value in output.items():
        if name != "region_logits":
            assert value.min() >= 0 and value.max() <= 1
        first, second = (value[k][..., valid] if name == "frame_scores" else value[k] for k in (0, 1))
        np.testing.assert_allclose(first, second, rtol=2e-4, atol=2e-5, err_msg=name)
