"""Figures: valid PNGs whose pixels depend on what they show, sorted curves, names that the fonts can draw."""

import io

import numpy as np
import pytest
import report_samples as samples
from matplotlib.colors import to_rgb
from PIL import Image

from dilbert_jax.evaluation import figures, match_figures


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def count(image: np.ndarray, colour: str) -> int:
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return int((np.abs(image - wanted).sum(-1) < 6).sum())


@pytest.fixture(scope="module")
def frames():
    return samples.make_frames(9)


@pytest.fixture
def annotation(frames):
    return samples.make_annotation(frames)


def test_curves_are_sorted_by_term_network_and_split():
    series = figures.collect_curves(samples.make_history(20), "mutual")
    assert list(series) == [
        "mlm",
        "mdc",
        "moc",
        "cmm",
        "soft_labels",
        "relational_distance",
        "relational_angle",
        "loss",
        "learning_rate",
    ]
    assert set(series["mlm"]) == {"teacher", "student"} and set(series["loss"]) == {""}
    assert [step for step, _ in series["mlm"]["student"]["train"]] == [5, 10, 15, 20]
    assert len(series["mlm"]["student"]["validation"]) == 1


def test_curves_draw_each_network_in_its_colour():
    history = samples.make_history(60)
    both = pixels(figures.training_curves(history, "mutual"))
    alone = pixels(figures.training_curves(history, "teacher"))
    assert count(both, figures.SYSTEM_COLOURS["student"]) > 300
    assert count(alone, figures.SYSTEM_COLOURS["teacher"]) > 300
    assert count(alone, figures.SYSTEM_COLOURS["student"]) == 0


def test_a_network_key_and_a_short_rate_are_understood():
    history = [{"stage": "a", "step": 1, "network": "student", "loss": 2.0, "lr": 0.1}]
    assert figures.collect_curves(history, "a") == {
        "loss": {"student": {"train": [(1.0, 2.0)]}},
        "learning_rate": {"student": {"train": [(1.0, 0.1)]}},
    }
    pixels(figures.training_curves(history, "a"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_spoils_no_other(bad):
    values = np.ones(200)
    values[100] = bad
    np.testing.assert_allclose(figures._running_mean(values), 1.0)
    history = [{"stage": "a", "step": s, "student/loss": v} for s, v in enumerate(values)]
    assert count(pixels(figures.training_curves(history, "a")), figures.SYSTEM_COLOURS["student"]) > 300


def test_a_stage_without_terms_is_refused():
    with pytest.raises(ValueError, match="no loss term of stage 'none'"):
        figures.training_curves(samples.make_history(20), "none")


def test_f1_bars_grow_with_f1():
    def bar(value):
        interval = {"value": value, "low": None, "high": None}
        report = {"per_class": [{"id": "liver", "support": 4, "f1": interval}]}
        return count(pixels(figures.class_f1_bars({"majority": report})), blend("majority"))

    def blend(system):
        return tuple(1 - 0.85 * (1 - c) for c in to_rgb(figures.SYSTEM_COLOURS[system]))

    assert bar(0.9) > 2.5 * bar(0.3) > 0


def test_f1_bars_need_a_class_with_support():
    report = {"per_class": [{"id": "liver", "support": 0, "f1": {"value": None, "low": None, "high": None}}]}
    with pytest.raises(ValueError, match="no class with support"):
        figures.class_f1_bars({"student": report})


def test_confusion_shades_the_diagonal_of_a_perfect_answer_only():
    darkest = "#003f63"
    perfect = pixels(figures.confusion_figure(np.diag([3, 4]), ["liver", "heart"]))
    spread = pixels(figures.confusion_figure(np.full((2, 2), 3), ["liver", "heart"]))
    assert count(perfect, darkest) > 1000 and count(spread, darkest) == 0
    with pytest.raises(ValueError, match="confusion has shape"):
        figures.confusion_figure(np.zeros((2, 3)), ["a", "b"])


def test_names_fall_back_to_english_without_a_chinese_font(monkeypatch):
    names = {"en": "liver", "zh": "肝脏"}
    monkeypatch.setattr(figures, "_drawable", lambda: frozenset(range(256)))
    assert figures.display_name("liver", names, "zh") == "liver"
    monkeypatch.setattr(figures, "_drawable", lambda: frozenset(map(ord, "肝脏")))
    assert figures.display_name("liver", names, "zh") == "肝脏"
    assert figures.display_name("portal_vein") == "portal vein"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_glyph_is_missing(recwarn, language, annotation, frames):
    match_figures.entity_region_figure(annotation, frames, language=language)
    names = {c: samples.names_of(c) for c in samples.CONDITIONS}
    figures.confusion_figure(np.eye(6, dtype=int), samples.CONDITIONS, names, language)
    assert not [w for w in recwarn if "missing" in str(w.message)]


def test_frame_graph_lines_are_as_wide_as_the_score(annotation, frames):
    colour = match_figures.ENTITY_COLOURS[0]

    def ink(score):
        for entity in annotation["entities"]:
            entity["frame_scores"] = [score] * len(annotation["frame_index"])
        image = pixels(match_figures.entity_frame_graph(annotation, frames, entities=["cyst"]))
        return int((image[..., 2] - image[..., 0] > 25).sum()), colour

    assert ink(0.9)[0] > 2 * ink(0.3)[0] > ink(0.0)[0]


@pytest.fixture
def boxes(monkeypatch):
    """Id and written score of every entity, in the order in which their boxes are drawn."""
    drawn = []

    def node(axis, centre, entity, score, *rest):
        drawn.append((entity["id"], score))

    monkeypatch.setattr(match_figures, "_node", node)
    return drawn


@pytest.mark.parametrize(
    "draw, drawn",
    [
        (match_figures.entity_frame_graph, "frame_scores"),
        (match_figures.entity_region_figure, "region_scores"),
    ],
)
def test_entities_are_drawn_that_match_what_is_drawn(annotation, frames, boxes, draw, drawn):
    other = {"frame_scores": "region_scores", "region_scores": "frame_scores"}[drawn]
    first, second, *rest = annotation["entities"]
    for entity in annotation["entities"]:
        entity[other] = [0.9] * len(entity[other])
        entity[drawn] = [0.0] * len(entity[drawn])
    first[drawn][0], second[drawn][0] = 0.4, 0.7
    draw(annotation, frames)
    assert rest and boxes == [(second["id"], 0.7), (first["id"], 0.4)]


def test_entities_are_ranked_and_labelled_by_the_drawn_frame_alone(annotation, frames, boxes):
    in_frame = [r["frame"] == annotation["regions"][0]["frame"] for r in annotation["regions"]]
    assert in_frame[0] and not in_frame[-1]
    for entity in annotation["entities"]:
        entity["region_scores"] = [0.0] * len(annotation["regions"])
    first, second, third, *_ = annotation["entities"]
    first["region_scores"][0], first["region_scores"][-1] = 0.3, 0.8  # higher in a frame that is not drawn
    second["region_scores"][0] = 0.9
    third["region_scores"][-1] = 0.7  # in that frame alone
    match_figures.entity_region_figure(annotation, frames)
    assert boxes == [(second["id"], 0.9), (first["id"], 0.3)]


def test_entities_are_ranked_and_labelled_by_the_drawn_frames_alone(annotation, frames, boxes):
    for entity in annotation["entities"]:
        entity["frame_scores"] = [0.0] * len(annotation["frame_index"])
    first, second, *_ = annotation["entities"]
    first["frame_scores"][0], second["frame_scores"][1] = 0.3, 0.8  # two frames are drawn: first and last
    match_figures.entity_frame_graph(annotation, frames, max_frames=2)
    assert boxes == [(first["id"], 0.3)]


def test_region_figure_takes_the_best_matched_frame(annotation, frames):
    for entity in annotation["entities"]:
        entity["region_scores"] = [0.1] * len(annotation["regions"])
    target = annotation["regions"][-1]["frame"]
    annotation["entities"][0]["region_scores"][-1] = 0.9
    chosen = match_figures.entity_region_figure(annotation, frames)
    assert chosen == match_figures.entity_region_figure(annotation, frames, frame=target)
    assert chosen != match_figures.entity_region_figure(
        annotation, frames, frame=annotation["regions"][0]["frame"]
    )


def test_numbers_of_regions_with_one_corner_stand_side_by_side(annotation, frames, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        match_figures, "_badge", lambda axis, corner, label, colour: drawn.append((corner, label))
    )
    for region in annotation["regions"]:
        region["box"], region["frame"] = [0.0, 0.0, 0.5, 0.5], annotation["regions"][0]["frame"]
    match_figures.entity_region_figure(annotation, frames)
    places = [corner for corner, _ in drawn[::2]]  # in the frame; each is drawn again on its crop
    assert len(places) > 2 and len(set(places)) == len(places)
    assert len({round(y, 6) for _, y in places}) == 1


def test_match_figures_name_what_does_not_fit(annotation, frames):
    with pytest.raises(ValueError, match="has no entity 'spleen'"):
        match_figures.entity_frame_graph(annotation, frames, entities=["spleen"])
    with pytest.raises(ValueError, match="names frame 8, but the clip passed has 5 frames"):
        match_figures.entity_frame_graph(annotation, frames[:5])
    with pytest.raises(ValueError, match="frame 1 has no region"):
        match_figures.entity_region_figure(annotation, frames, frame=1)
