"""The knowledge graph: what the packaged file holds, what a user's file may do, what is refused."""

import json

import numpy as np
import pytest

from dilbert_jax.data.phantom.plan import CONDITIONS, draw_plan
from dilbert_jax.knowledge import CONCEPT_TYPES, RELATION_TYPES, load_graph
from dilbert_jax.knowledge.graph import SCHEMA, fold

ORGANS = ["breast", "thyroid", "liver", "gallbladder", "pancreas", "spleen", "kidney", "lung", "heart"]
NEEDED = {
    "region": "vessel portal_vein bile_duct bone adrenal_gland diaphragm pleura skin lymph_node lesion "
    "renal_pelvis abdomen",
    "condition": "normal cyst benign_lesion malignant_lesion stone diffuse_disease bacterial_pneumonia "
    "viral_pneumonia covid19 hydronephrosis lymphadenopathy",
    "finding": "nodule mass calcification posterior_enhancement posterior_shadowing vascularity "
    "free_fluid pulsation sliding reduced_sliding wall_thickening duct_dilatation effusion consolidation "
    "b_lines a_lines pleural_irregularity air_bronchogram",
    "descriptor": "anechoic hypoechoic isoechoic hyperechoic mixed_echogenicity homogeneous heterogeneous "
    "round oval irregular circumscribed_margin indistinct_margin spiculated_margin parallel_orientation "
    "taller_than_wide enlarged small_size normal_size left right upper lower solid cystic",
}


@pytest.fixture(scope="module")
def graph():
    return load_graph()


@pytest.fixture
def write(tmp_path):
    def write(concepts=(), relations=(), **fields):
        path = tmp_path / "extra.json"
        content = {"schema": SCHEMA, "concepts": list(concepts), "relations": list(relations), **fields}
        path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        return path

    return write


def test_ids_that_other_parts_rely_on(graph):
    for organ in ORGANS:
        assert graph.concepts[organ].type == "organ"
    for kind, ids in NEEDED.items():
        for concept_id in ids.split():
            assert graph.concepts[concept_id].type == kind, concept_id


def test_every_concept_is_named_in_both_languages_and_related(graph):
    for concept in graph.concepts.values():
        assert concept.type in CONCEPT_TYPES
        assert concept.names["en"] and concept.names["zh"]
        assert graph.neighbours(concept.id), f"{concept.id} has no relation"


def test_every_relation_type_occurs(graph):
    assert {relation.type for relation in graph.relations} == set(RELATION_TYPES)


@pytest.mark.parametrize(
    ("organ", "concept", "expected"),
    [
        ("lung", "b_lines", True),
        ("liver", "b_lines", False),
        ("breast", "spiculated_margin", True),
        ("liver", "spiculated_margin", False),
        ("liver", "portal_vein", True),
        ("breast", "portal_vein", False),
        ("liver", "nodule", True),
        ("lung", "hypoechoic", True),
        ("gallbladder", "stone", True),
        ("lung", "stone", False),
        ("kidney", "hydronephrosis", True),
        ("liver", "hydronephrosis", False),
        ("abdomen", "hydronephrosis", True),
        ("kidney", "kidney", True),
        ("kidney", "breast", False),
        ("kidney", "adrenal_gland", True),
        ("lung", "covid19", True),
        ("thyroid", "covid19", False),
        ("heart", "pulsation", True),
        ("gallbladder", "pulsation", True),
        ("breast", "sliding", True),
        ("thyroid", "reduced_sliding", True),
        ("heart", "sliding", False),
        ("gallbladder", "diffuse_disease", False),
        ("liver", "carotid_artery", False),
    ],
)
def test_allows(graph, organ, concept, expected):
    assert graph.allows(organ, concept) is expected


def test_allows_whatever_the_phantom_draws(graph):
    findings = {organ: {"calcification"} for organ in CONDITIONS}
    rng = np.random.default_rng(0)
    for organ, conditions in CONDITIONS.items():
        for condition in conditions:
            assert graph.allows(organ, condition), (organ, condition)
            for _ in range(150):
                findings[organ] |= set(draw_plan(organ, condition, "en", 15.0, rng).findings)
    assert {"sliding", "reduced_sliding", "pulsation", "hyperechoic"} <= findings["gallbladder"]
    for organ, concepts in findings.items():
        for concept in concepts:
            assert graph.allows(organ, concept), (organ, concept)


def test_every_concept_can_occur_in_some_organ(graph):
    for concept_id in graph.concepts:
        assert any(graph.allows(organ, concept_id) for organ in (*ORGANS, "abdomen")), concept_id


def test_conditions_of(graph):
    for organ in ORGANS:
        conditions = graph.conditions_of(organ)
        assert "normal" in conditions and len(conditions) > 2
    assert {"benign_lesion", "malignant_lesion"} <= set(graph.conditions_of("breast"))
    assert not {"stone", "covid19"} & set(graph.conditions_of("breast"))


def test_neighbours_filters_by_type(graph):
    found = graph.neighbours("b_lines", ("located_at",))
    assert [(r.source, r.type, r.target) for r in found] == [("b_lines", "located_at", "lung")]
    assert set(found) < set(graph.neighbours("b_lines"))


def test_name(graph):
    assert graph.name("thyroid", "zh") == "甲状腺"
    with pytest.raises(ValueError, match="no_such"):
        graph.name("no_such", "en")
    with pytest.raises(ValueError, match="language is 'de'"):
        graph.name("thyroid", "de")


def test_fold_ignores_case_hyphens_and_width():
    assert fold("B-Lines") == fold("b  lines") == fold("Ｂ‐lines")


def test_extension_adds_concepts_and_synonyms(write):
    path = write(
        [
            {"id": "uterus", "type": "organ", "en": ["uterus"], "zh": ["子宫"]},
            {"id": "nodule", "zh": ["小节"], "absent": {"en": ["nodule-free"]}},
        ],
        [{"source": "uterus", "type": "shows", "target": ["normal", "nodule"]}],
    )
    graph = load_graph(path)
    assert graph.allows("uterus", "nodule") and not graph.allows("uterus", "b_lines")
    assert graph.name("nodule", "zh") == "结节" and "小节" in graph.concepts["nodule"].names["zh"]
    assert graph.concepts["nodule"].absent_names["en"] == ("nodule-free",)
    assert "uterus" not in load_graph().concepts


@pytest.mark.parametrize(
    ("concepts", "relations", "message"),
    [
        ([{"id": "x", "type": "organ", "en": ["x"]}], [], r"concepts\[0\]: field 'zh' of 'x' has no name"),
        ([{"id": "x", "type": "thing", "en": ["x"], "zh": ["某"]}], [], "field 'type' of 'x' is 'thing'"),
        ([{"id": "Bad Id", "type": "organ", "en": ["x"], "zh": ["某"]}], [], "field 'id' is 'Bad Id'"),
        ([{"id": "nodule", "type": "organ"}], [], "already a 'finding'"),
        ([{"id": "nodule", "en": "lump"}], [], "field 'en' of 'nodule' is 'lump'"),
        ([{"id": "nodule", "en": ["Mass"]}], [], "'Mass', which already names 'mass'"),
        ([{"id": "mass", "absent": {"zh": ["肿块"]}}], [], "both|'absent' name; keep one"),
        ([{"id": "nodule", "names": []}], [], "unknown field 'names'"),
        (
            [],
            [{"source": "nodule", "type": "near", "target": "liver"}],
            r"relations\[0\]: field 'type' is 'near'",
        ),
        ([], [{"source": "nodule", "type": "shows", "target": "moon"}], "field 'target' names 'moon'"),
        ([], [{"source": [], "type": "shows", "target": "mass"}], "field 'source' is"),
        ([], [{"source": "mass", "type": "shows", "target": "mass"}], "related to itself"),
        ([], [{"source": "mass", "target": "liver"}], "expected an object with"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_field(write, concepts, relations, message):
    path = write(concepts, relations)
    with pytest.raises(ValueError, match=message) as error:
        load_graph(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_shapes_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match="field 'schema' is 'other'"):
        load_graph(write(schema="other"))
    with pytest.raises(ValueError, match="unknown field 'nodes'"):
        load_graph(write(nodes=[]))
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": ', "utf-8")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        load_graph(broken)
    with pytest.raises(ValueError, match="cannot be read"):
        load_graph(tmp_path / "missing.json")
