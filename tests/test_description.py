"""The text of an annotation: what both heads support, and nothing that the graph or its own findings refute."""

import itertools

import pytest
from annotation_samples import CYST, FRAMES, make_annotation
from report_samples import GRAPH

from dilbert_jax.description import write_description


def test_the_text_says_what_both_heads_support_and_what_the_graph_allows(experiment):
    context = experiment.context
    annotation = make_annotation(context, FRAMES, CYST)
    text = annotation["description"]
    for concept, language in itertools.product(CYST, ("en", "zh")):
        name = GRAPH.name(concept, language)
        assert name.lower() in text[language].lower(), (concept, text)
    # Without the match of its entity a finding is not written.
    for entity in annotation["entities"]:
        if entity["id"] == "anechoic":
            entity["supported"] = False
    assert "anechoic" not in write_description(annotation, GRAPH)["en"].lower()
    # Nor is one that the organ cannot show.
    foreign = {"id": "air_bronchogram", "name": {}, "probability": 0.9, "threshold": 0.5, "present": True}
    assert not GRAPH.allows("liver", "air_bronchogram")
    before = write_description(annotation, GRAPH)
    annotation["findings"].append(foreign)
    assert write_description(annotation, GRAPH) == before


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


def test_the_text_denies_what_would_speak_for_another_condition():
    # Never seen in a breast, hence the least probable; posterior shadowing would suggest a malignant lesion.
    findings = {
        "mass": 0.9,
        "sliding": 0.01,
        "reduced_sliding": 0.01,
        "pulsation": 0.02,
        "posterior_shadowing": 0.3,
        "skin_thickening": 0.2,
    }
    text = write_description(breast_annotation(findings), GRAPH)
    assert text["en"] == (
        "Breast: a mass is seen. No skin thickening or posterior shadowing is seen. "
        "Appearance suggests a benign lesion."
    )
    # Two that exclude each other are not both denied: the sign of health is not what one looks for.
    lung = breast_annotation({"sliding": 0.1, "reduced_sliding": 0.2}) | {"organ": {"id": "lung"}}
    text = write_description(lung, GRAPH)
    assert text["en"] == "Lung: no reduced sliding is seen. Appearance suggests a benign lesion."
    # The graph knows of no finding that speaks for a condition of the heart.
    heart = breast_annotation({"pulsation": 0.1}) | {"organ": {"id": "heart"}}
    assert "No " not in write_description(heart, GRAPH)["en"]


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
def test_no_text_says_normal_beside_a_sign_of_disease(organ, finding, text):
    annotation = breast_annotation({finding: 0.9}) | {"organ": {"id": organ}, "condition": {"id": "normal"}}
    description = write_description(annotation, GRAPH)
    assert description["en"] == text
    assert ("正常" in description["zh"]) == ("Normal" in text)
    # A lesion is a place: it comes from matching, not from the findings.
    annotation = breast_annotation({}, [("lesion", "region")]) | {"condition": {"id": "normal"}}
    assert write_description(annotation, GRAPH)["en"] == "Breast: a lesion is seen."


@pytest.mark.parametrize("word", ["left", "right", "bilateral", "internal"])
def test_words_that_say_nothing_of_a_clip_are_not_written(word):
    text = write_description(breast_annotation({"mass": 0.9}, [(word, "descriptor")]), GRAPH)
    assert text["en"] == "Breast: a mass is seen. Appearance suggests a benign lesion."
    assert text["zh"] == "乳腺：可见一肿块。考虑良性病变。"
