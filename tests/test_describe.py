"""Descriptions and captions read well and give their concepts back when read by the entity extractor."""

import numpy as np
import pytest

from dilbert_jax.knowledge import caption, describe, extract_entities, load_graph
from dilbert_jax.knowledge.describe import HEADS
from dilbert_jax.knowledge.entities import is_location

LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module")
def graph():
    return load_graph()


def read(text, language, graph):
    return {(entity.concept, entity.status) for entity in extract_entities(text, language, graph)}


def test_malignant_breast_mass(graph):
    findings = ["mass", "hypoechoic", "irregular", "spiculated_margin", "posterior_shadowing"]
    arguments = ("breast", "malignant_lesion", findings)
    extra = {"graph": graph, "present": [("mass", ("left", "upper"))], "absent": ["calcification"]}
    assert describe(*arguments, language="en", **extra) == (
        "Breast: a hypoechoic, irregular mass with spiculated margin and posterior shadowing is seen in the "
        "left upper quadrant. No calcification is seen. Appearance suggests a malignant lesion."
    )
    assert describe(*arguments, language="zh", **extra) == (
        "乳腺：左侧上部可见一低回声肿块，形态不规则，边缘毛刺，后方回声衰减。未见钙化。考虑恶性病变。"
    )


def test_normal_thyroid(graph):
    arguments = ("thyroid", "normal", ["normal_size", "homogeneous"])
    assert describe(
        *arguments, language="en", graph=graph, absent=["nodule", "vascularity", "lymphadenopathy"]
    ) == (
        "Thyroid: the thyroid is homogeneous, with normal size. No nodule, vascularity or lymphadenopathy is "
        "seen. Normal appearance."
    )
    assert describe(*arguments, language="zh", graph=graph) == "甲状腺：大小正常，回声均匀。表现正常。"


def test_lung_descriptor_goes_to_its_finding(graph):
    text = describe(
        "lung", "covid19", ["b_lines", "pleural_irregularity", "confluent"], language="en", graph=graph
    )
    assert text == (
        "Lung: confluent B-lines are seen. Pleural irregularity is seen. Appearance suggests COVID-19."
    )


@pytest.mark.parametrize(
    "place, words", [("upper", "the upper quadrant"), ("outer", "the outer part"), ("nipple", "the nipple")]
)
def test_a_place_without_a_finding_reads_as_a_place(graph, place, words):
    text = describe("breast", "", [], present=[place], language="en", graph=graph)
    assert text == f"Breast: the view includes {words}."


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("head", [*HEADS, None])
def test_every_present_concept_comes_back(graph, language, head):
    for concept_id in graph.concepts:
        # "lesion" is the generic head: a more specific one replaces it.
        if (
            concept_id == "liver"
            or concept_id == head
            or (head and {concept_id, head} & {"lesion"} and concept_id in HEADS)
        ):
            continue
        given = [concept_id] if head is None else [concept_id, head]
        text = describe(
            "liver",
            "",
            given if concept_id != "normal" or head else ["normal"],
            language=language,
            graph=graph,
        )
        assert read(text, language, graph) == {("liver", "present"), *((c, "present") for c in given)}, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_absent_concept_and_condition_comes_back(graph, language):
    for concept in graph.concepts.values():
        if concept.id in ("liver", "cyst") or is_location(concept.id, graph):
            continue
        text = describe("liver", "", [], language=language, graph=graph, absent=["cyst", concept.id])
        expected = {("liver", "present"), ("cyst", "absent"), (concept.id, "absent")}
        assert read(text, language, graph) == expected, text
        if concept.type == "condition" and concept.id != "normal":
            text = describe("liver", concept.id, [], language=language, graph=graph)
            assert read(text, language, graph) == {("liver", "present"), (concept.id, "uncertain")}, text


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("organ", ["breast", "thyroid", "liver", "gallbladder", "kidney", "lung"])
def test_random_sets_of_allowed_concepts_come_back(graph, organ, language):
    rng = np.random.default_rng(7)
    pool = [
        c.id
        for c in graph.concepts.values()
        if c.type in ("finding", "descriptor") and graph.allows(organ, c.id) and not is_location(c.id, graph)
    ]
    conditions = [c for c in graph.conditions_of(organ) if c != "normal"]
    for _ in range(60):
        chosen = rng.permutation(pool)[:9].tolist()
        present, absent = chosen[:5], chosen[5:]
        condition = conditions[int(rng.integers(len(conditions)))]
        text = describe(organ, condition, present, language=language, graph=graph, absent=absent)
        expected = {(organ, "present"), (condition, "uncertain")}
        expected |= {(c, "present") for c in present} | {(c, "absent") for c in absent}
        assert read(text, language, graph) == expected, text


def test_places_are_kept_apart(graph):
    present = [("consolidation", ("left", "lower")), ("effusion", ("right",))]
    text = describe("lung", "", [], language="en", graph=graph, present=present)
    assert text == ("Lung: consolidation is seen in the left lower part. Effusion is seen in the right part.")


@pytest.mark.parametrize(
    ("present", "absent", "message"),
    [
        (["mass"], ["mass"], "'mass' is given as present and as absent"),
        ([], ["left"], "'left' in 'absent' is a position"),
        (["unicorn"], [], "'unicorn' is not in the knowledge graph"),
    ],
)
def test_impossible_requests_are_refused(graph, present, absent, message):
    with pytest.raises(ValueError, match=message):
        describe("breast", "", present, language="en", graph=graph, absent=absent)


MEASUREMENT = {
    "size_mm": (12.2, 8.1),
    "position": ("upper", "left"),
    "shape": "oval",
    "echogenicity": "hypoechoic",
    "posterior": "posterior_enhancement",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_state_labels_and_measurements_in_varying_words(graph, language):
    rng = np.random.default_rng(0)
    texts = [
        caption("breast", "benign_lesion", ["mass"], [MEASUREMENT], language=language, rng=rng)
        for _ in range(40)
    ]
    assert len(set(texts)) > 5
    for text in texts:
        found = read(text, language, graph)
        assert {c for c, s in found if s == "present"} == {
            "breast", "mass", "oval", "hypoechoic", "posterior_enhancement", "upper", "left",
        }  # fmt: skip
        assert {c for c, s in found if s != "present"} == {"benign_lesion"}
        assert "8.1" in text and "12" in text


def test_captions_are_deterministic():
    first, second = (
        caption("breast", "", [], [MEASUREMENT], language="en", rng=np.random.default_rng(4))
        for _ in range(2)
    )
    assert first == second


def test_caption_of_structures(graph):
    measured = [
        {"concept": "vessel", "count": 2, "position": "middle"},
        {"concept": "gallbladder", "size_fraction": 0.1},
    ]
    text = caption("liver", "", [], measured, language="en", rng=np.random.default_rng(0))
    assert "wo vessels are seen in the middle part of the image." in text
    assert "he gallbladder measuring about 10 % of the image is seen." in text
    text = caption("liver", "", [], measured, language="zh", rng=np.random.default_rng(0))
    assert "可见2个血管，位于图像中部。" in text and "可见胆囊，约占图像10%。" in text


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        ({"colour": "red"}, r"measurements\[0\]: unknown field 'colour'"),
        ({"count": 0}, "field 'count' is 0"),
        ({"size_mm": -1}, "field 'size_mm' is -1"),
        ({"size_fraction": 1.5}, "field 'size_fraction' is 1.5"),
        ({"shape": "square"}, "'square' is not in the knowledge graph"),
    ],
)
def test_bad_measurements_are_refused(measurement, message):
    with pytest.raises(ValueError, match=message):
        caption("breast", "", [], [measurement], language="en", rng=np.random.default_rng(0))


def test_an_organ_alone_says_that_nothing_else_is_known(graph):
    for language, expected in (
        ("en", "Abdomen: nothing further is described."),
        ("zh", "腹部：无其他描述。"),
    ):
        text = describe("abdomen", "", (), language=language, graph=graph)
        assert text == expected
        assert [e.concept for e in extract_entities(text, language, graph)] == ["abdomen"]
