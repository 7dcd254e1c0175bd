"""Annotation: the clip as evaluation sees it, the dictionary and its scores."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from annotation_samples import CYST, FRAMES, make_annotation, make_prediction, with_buckets

from dilbert_jax.annotation import NOTICE, SCHEMA, build_visual, describe_source, predict
from dilbert_jax.boxes import box_iou
from dilbert_jax.media import Clip, read_clip
from dilbert_jax.thresholds import Thresholds


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


def test_an_annotation_holds_no_contradiction(experiment):
    pair = experiment.context.labels.findings[:2]
    for exclusive in ((), (pair,)):
        labels = dataclasses.replace(experiment.context.labels, exclusive=exclusive)
        context = dataclasses.replace(experiment.context, labels=labels)
        findings = {f["id"]: f for f in make_annotation(context, FRAMES, pair)["findings"]}
        assert [findings[f]["probability"] for f in pair] == [0.8, 0.8]
        assert sum(findings[f]["present"] for f in pair) == 2 - len(exclusive)


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
