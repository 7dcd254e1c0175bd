"""Label spaces: order, rare entities, unknown ids, the file."""

import json

import pytest

from dilbert_jax.knowledge import load_graph
from dilbert_jax.labels import LabelSpace, build_label_space

GRAPH = load_graph()


def build(min_count=1, **changes):
    fields = {
        "organs": ["kidney", "liver", "", "liver"],
        "conditions": ["stone", "", "cyst", "normal"],
        "findings": [("anechoic",), (), ("posterior_shadowing", "anechoic")],
        "regions": ["lesion", "vessel", "lesion"],
        "entities": [("cyst", "liver"), ("cyst", "cyst", "anechoic"), ("stone",)],
    } | changes
    return build_label_space(**fields, graph=GRAPH, min_count=min_count)


def test_ids_stand_in_the_order_of_the_graph_whatever_the_order_of_the_data():
    labels = build()
    rank = list(GRAPH.concepts).index
    for ids in (labels.organs, labels.conditions, labels.findings, labels.regions, labels.entities):
        assert list(ids) == sorted(set(ids), key=rank)
    assert set(labels.organs) == {"kidney", "liver"}
    assert set(labels.conditions) == {"stone", "cyst", "normal"}
    assert set(labels.findings) == {"anechoic", "posterior_shadowing"}
    reverse = build(
        organs=["liver", "kidney"],
        conditions=["normal", "cyst", "stone"],
        findings=[("posterior_shadowing",), ("anechoic",)],
        regions=["vessel", "lesion"],
    )
    assert reverse == labels


def test_organs_are_region_classes_too_and_classes_join_findings_conditions_and_organs():
    labels = build()
    assert set(labels.regions) == {"lesion", "vessel", "kidney", "liver"}
    assert labels.classes == labels.findings + labels.conditions + labels.organs


def test_rare_entities_are_no_candidates():
    assert set(build(min_count=1).entities) == {"cyst", "liver", "anechoic", "stone"}
    # Named twice within one study still is one study.
    assert build(min_count=2).entities == ("cyst",)
    assert build(min_count=3).entities == ()


@pytest.mark.parametrize("field", ["organs", "conditions", "findings", "regions", "entities"])
def test_an_id_that_the_graph_lacks_is_refused(field):
    values = ["flux_capacitor"] if field in ("organs", "conditions", "regions") else [("flux_capacitor",)]
    with pytest.raises(ValueError, match=r"flux_capacitor.*knowledge graph.*extension"):
        build(**{field: values})


def test_a_set_without_labels_has_empty_spaces():
    labels = build(organs=[""], conditions=[""], findings=[()], regions=[], entities=[])
    assert labels == LabelSpace((), (), (), (), ())
    assert labels.classes == ()


def test_findings_that_contradict_each_other_and_never_come_together_exclude_each_other(tmp_path):
    echo = [("anechoic",), ("hypoechoic",), ("hyperechoic", "posterior_shadowing")]
    pairs = {("anechoic", "hypoechoic"), ("anechoic", "hyperechoic"), ("hypoechoic", "hyperechoic")}
    labels = build(findings=echo, entities=echo)
    assert {tuple(sorted(p)) for p in labels.exclusive} == {tuple(sorted(p)) for p in pairs}
    labels.save(tmp_path / "labels.json")
    assert LabelSpace.load(tmp_path / "labels.json") == labels
    # Two lesions of a clip may differ, where training shows it; what other splits hold is not asked.
    both = ("anechoic", "hypoechoic")
    labels = build(findings=[*echo, both], entities=[*echo, (*both, "liver")])
    assert {frozenset(p) for p in labels.exclusive} == {frozenset(p) for p in pairs} - {frozenset(both)}
    assert len(build(findings=[*echo, both], entities=echo).exclusive) == 3


def test_a_file_of_an_earlier_version_excludes_nothing(tmp_path):
    labels = build()
    fields = {name: ids for name, ids in vars(labels).items() if name != "exclusive"}
    (tmp_path / "labels.json").write_text(json.dumps(fields), encoding="utf-8")
    assert LabelSpace.load(tmp_path / "labels.json") == labels and labels.exclusive == ()


def test_the_file_returns_the_same_space(tmp_path):
    labels = build()
    labels.save(tmp_path / "labels.json")
    assert LabelSpace.load(tmp_path / "labels.json") == labels
