"""Named entities: longest match, negation and uncertainty in English and Chinese."""

import csv
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dilbert_jax.data.phantom import reports
from dilbert_jax.data.phantom.plan import CONDITIONS, draw_plan
from dilbert_jax.knowledge import extract_entities, load_graph

P, U, A = "present", "uncertain", "absent"


@pytest.fixture(scope="module")
def graph():
    return load_graph()


def statuses(text, language, graph):
    return [(entity.concept, entity.status) for entity in extract_entities(text, language, graph)]


ENGLISH = [
    ("No mass, calcification or cyst is seen.", [("mass", A), ("calcification", A), ("cyst", A)]),
    ("No effusion, B-lines and a consolidation.", [("effusion", A), ("b_lines", P), ("consolidation", P)]),
    ("Few B lines, no consolidation, clear A-lines", [("b_lines", P), ("consolidation", A), ("a_lines", P)]),
    ("No stone but a small cyst is seen", [("stone", A), ("small_size", P), ("cyst", P)]),
    ("No evidence of hydronephrosis.", [("hydronephrosis", A)]),
    ("Negative for lymphadenopathy; nodule present.", [("lymphadenopathy", A), ("nodule", P)]),
    ("The bile ducts are not dilated.", [("bile_duct", P), ("duct_dilatation", A)]),
    ("Calcification: none. Mass.", [("calcification", A), ("mass", P)]),
    ("Free fluid, stones and effusion are absent.", [("free_fluid", A), ("stone", A), ("effusion", A)]),
    ("A mass is seen and calcification is not seen.", [("mass", P), ("calcification", A)]),
    ("Malignancy was ruled out.", [("malignant_lesion", A)]),
    ("Malignancy cannot be ruled out.", [("malignant_lesion", U)]),
    ("Consolidation cannot be excluded", [("consolidation", U)]),
    ("Possible effusion, no stone", [("effusion", U), ("stone", A)]),
    ("possibly no effusion", [("effusion", U)]),
    ("suspicious for carcinoma", [("malignant_lesion", U)]),
    ("Appearance suggests a cyst. A nodule is seen.", [("cyst", U), ("nodule", P)]),
    ("effusion? consolidation maybe, B-lines", [("effusion", U), ("consolidation", U), ("b_lines", P)]),
    ("No increase in the effusion.", [("effusion", P)]),
    ("Not only a mass but also a cyst", [("mass", P), ("cyst", P)]),
    ("No mass in the left enlarged breast", [("mass", A), ("left", P), ("enlarged", P), ("breast", P)]),
    ("The gallbladder is not seen.", [("gallbladder", A)]),
    ("The spleen and the kidney are not seen.", [("spleen", A), ("kidney", A)]),
    ("Calcification in the breast is not seen.", [("calcification", A), ("breast", P)]),
    ("No hypoechoic lesion", [("hypoechoic", A), ("lesion", A)]),
    ("B-line without reverberation (white lung)", [("b_lines", P), ("reverberation", A), ("white_lung", P)]),
    ("The nodule is avascular", [("nodule", P), ("vascularity", A)]),
    ("Loss of lung sliding", [("reduced_sliding", P)]),
    ("Free sliding of the liver, no reduced sliding", [("sliding", P), ("liver", P), ("reduced_sliding", A)]),
    ("Organ sliding is restricted.", [("reduced_sliding", P)]),
    ("The stone does not move with position", [("stone", P), ("positional_mobility", A)]),
    ("normal in size, not enlarged", [("normal_size", P), ("normal_size", P)]),
    ("no acoustic\nshadowing", [("posterior_shadowing", A)]),
    ("no mass\nCyst of the liver", [("mass", A), ("cyst", P), ("liver", P)]),
    ("a bacterial pneumonia is unlikely", [("bacterial_pneumonia", U)]),
    ("Massive cystitis of the renality", []),
    ("12.5 mm nodule. No 3.2 cm mass", [("nodule", P), ("mass", A)]),
    ("Fluid collection w/o hydronephrosis.", [("free_fluid", P), ("hydronephrosis", A)]),
    ("Unable to identify a mass in the liver.", [("mass", A), ("liver", P)]),
    ("Unable to visualize the gallbladder.", [("gallbladder", A)]),
    ("Unable to exclude a mass.", [("mass", U)]),
    ("Doppler fails to show a thrombus, a cyst is seen", [("thrombus", A), ("cyst", P)]),
    ("r/o cholecystitis", [("cholecystitis", U)]),
    ("Fever, rule out abscess.", [("abscess", U)]),
    ("CT rules out abscess.", [("abscess", A)]),
    ("Pneumothorax has resolved, effusion persists.", [("pneumothorax", A), ("effusion", P)]),
    ("The effusion is now completely resolved.", [("effusion", A)]),
    ("The effusion has not resolved.", [("effusion", P)]),
    ("Cholelithiasis and hepatomegaly.", [("stone", P), ("hepatomegaly", P)]),
    ("masses, calculi, cysts and lymph nodes", [("mass", P), ("stone", P), ("cyst", P), ("lymph_node", P)]),
]
CHINESE = [
    ("右叶见无回声结节", [("right_lobe", P), ("anechoic", P), ("nodule", P)]),
    (
        "未见钙化、结节及积液，可见血流信号",
        [("calcification", A), ("nodule", A), ("effusion", A), ("vascularity", P)],
    ),
    ("胆囊未见明显异常回声", [("gallbladder", P), ("abnormal_echo", A)]),
    (
        "胰管不宽，胆管不扩张",
        [("pancreatic_duct", P), ("duct_dilatation", A), ("bile_duct", P), ("duct_dilatation", A)],
    ),
    ("胆囊壁不厚", [("wall_thickening", A)]),
    ("肝内胆管未见扩张", [("bile_duct", P), ("duct_dilatation", A)]),
    ("回声欠均匀，脾回声均匀", [("heterogeneous", P), ("spleen", P), ("homogeneous", P)]),
    ("结节较前无明显变化", [("nodule", P)]),
    ("考虑恶性病变", [("malignant_lesion", U)]),
    (
        "右乳结节，恶性可能，囊肿不除外",
        [("right", P), ("breast", P), ("nodule", P), ("malignant_lesion", U), ("cyst", U)],
    ),
    ("低回声结节癌可能", [("hypoechoic", P), ("nodule", P), ("malignant_lesion", U)]),
    ("排除结石；肾积水？", [("stone", A), ("hydronephrosis", U)]),
    ("后方不伴声影", [("posterior_shadowing", A)]),
    ("胆囊未显示。脾肋下未及", [("gallbladder", A), ("spleen", P)]),
    ("下段因气体干扰未显示", [("lower", P), ("gas_interference", P)]),
    ("结节淋巴门结构消失", [("nodule", P), ("lymph_hilum", A)]),
    ("甲状腺右叶未探及", [("thyroid", P), ("right_lobe", A)]),
    ("胸腔积液未见", [("effusion", A)]),
    ("脾不大，未见积水", [("spleen", P), ("enlarged", A), ("hydronephrosis", A)]),
    ("未见肿大淋巴结", [("lymphadenopathy", A)]),
    ("随呼吸滑动减弱，余滑动良好", [("reduced_sliding", P), ("sliding", P)]),
    ("滑动征减弱；肝滑动受限", [("reduced_sliding", P), ("liver", P), ("reduced_sliding", P)]),
    ("滑动征存在，脏器间滑动可见", [("sliding", P), ("sliding", P)]),
    ("未见滑动。滑动征未见减弱", [("sliding", A), ("sliding", P)]),
    ("结石不随体位改变移动", [("stone", P), ("positional_mobility", A)]),
    ("结石随体位改变而移动", [("stone", P), ("positional_mobility", P)]),
    ("肿块不随呼吸移动", [("mass", P), ("respiratory_motion", A)]),
    ("声像不支持恶性", [("malignant_lesion", A)]),
    ("看不到结节，看不见钙化，未看到积液", [("nodule", A), ("calcification", A), ("effusion", A)]),
    ("胆囊看不到。未能探及脾", [("gallbladder", A), ("spleen", A)]),
    ("不考虑肝癌，考虑血管瘤", [("hepatocellular_carcinoma", A), ("hemangioma", U)]),
    ("未提示恶性征象", [("malignant_lesion", A)]),
    ("超声提示：胆囊结石", [("stone", P)]),
    ("超声提示胆囊结石，提示胆囊炎", [("stone", P), ("cholecystitis", U)]),
    ("超声提示恶性可能", [("malignant_lesion", U)]),
    ("脾大小正常，肝脏体积大小正常", [("spleen", P), ("normal_size", P), ("liver", P), ("normal_size", P)]),
    ("脾大，肝肿大", [("splenomegaly", P), ("hepatomegaly", P)]),
    ("纵横比>1，Ｂ线", [("taller_than_wide", P), ("b_lines", P)]),
]


@pytest.mark.parametrize(("text", "expected"), ENGLISH, ids=[text for text, _ in ENGLISH])
def test_english(graph, text, expected):
    assert statuses(text, "en", graph) == expected


@pytest.mark.parametrize(("text", "expected"), CHINESE, ids=[text for text, _ in CHINESE])
def test_chinese(graph, text, expected):
    assert statuses(text, "zh", graph) == expected


def test_offsets_point_into_the_original_text(graph):
    text = "  A  Hypo-echoic?  no; HYPOECHOIC\u2014B\u2013Lines"
    spans = [text[e.start : e.end] for e in extract_entities(text, "en", graph)]
    assert spans == ["HYPOECHOIC", "B\u2013Lines"]
    text = "Ｂ线，㎝ 结节"
    assert [text[e.start : e.end] for e in extract_entities(text, "zh", graph)] == ["Ｂ线", "结节"]


def test_longest_name_wins_without_overlap(graph):
    entities = extract_entities("intrahepatic bile ducts, posterior acoustic shadowing", "en", graph)
    assert [e.concept for e in entities] == ["bile_duct", "posterior_shadowing"]
    assert all(a.end <= b.start for a, b in itertools.pairwise(entities))


def test_every_name_is_found_as_its_own_concept(graph):
    for concept in graph.concepts.values():
        for language in ("en", "zh"):
            for name in concept.names[language]:
                assert statuses(name, language, graph) == [(concept.id, P)], name
            for name in concept.absent_names[language]:
                assert statuses(name, language, graph) == [(concept.id, A)], name


def test_empty_text_and_unknown_language(graph):
    assert extract_entities("", "zh", graph) == []
    with pytest.raises(ValueError, match="language is 'fr'"):
        extract_entities("masse", "fr", graph)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_phantom_reports_name_what_was_drawn_and_deny_what_was_not(graph, monkeypatch, language):
    monkeypatch.setattr(reports, "OMISSION", 0.0)
    rng = np.random.default_rng(1)
    told = {"sliding", "reduced_sliding", "pulsation", "free_fluid", "wall_thickening", "duct_dilatation"}
    told |= {"calcification", "posterior_enhancement", "posterior_shadowing", "heterogeneous"}
    told |= {"mass", "nodule"}
    drawn, denied = set(), set()
    for organ, conditions in CONDITIONS.items():
        for condition in conditions:
            for _ in range(25):
                plan = draw_plan(organ, condition, language, 15.0, rng)
                text = reports.write_report(plan, rng)
                found = statuses(text, language, graph)
                present = {concept for concept, status in found if status == P}
                named = {concept for concept, status in found if status != A}
                assert set(plan.findings) <= present, text
                assert present & told <= set(plan.findings), text
                assert {organ, condition} <= named, text
                drawn |= set(plan.findings)
                denied |= {concept for concept, status in found if status == A}
    assert told <= drawn
    assert {"mass", "nodule", "calcification", "free_fluid", "pulsation", "wall_thickening"} <= denied
    assert {"duct_dilatation", "stone"} <= denied


def _data_folder(name):
    root = os.environ.get("DILBERT_DATA_DIR")
    if not root:
        pytest.skip("DILBERT_DATA_DIR is not set")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.mark.real_data
def test_coverage_of_hospital_reports(graph):
    reports = [
        (organ, entry["finding"])
        for organ, file in (("thyroid", "Thyroid"), ("breast", "Mammary"), ("liver", "Liver"))
        for part in json.loads(
            (_data_folder("kmve") / f"Data/new_{file}2.json").read_text("utf-8-sig")
        ).values()
        for entry in part
    ]
    named, entities, inside = 0, 0, 0
    for organ, text in reports:
        found = extract_entities(text, "zh", graph)
        entities += len(found)
        named += any(e.concept == organ for e in found)
        inside += sum(e.end - e.start for e in found) / len(text)
        # In these reports the phrase always denies enlarged nodes.
        for entity in found:
            before = text[: entity.start]
            if entity.concept == "lymphadenopathy" and before.endswith(("未见明显", "未见")):
                assert entity.status == A
            if text[entity.start : entity.end] == "无回声" and not before.endswith(("未见", "未见明显")):
                assert entity.status == P
    assert named / len(reports) > 0.98
    assert entities / len(reports) > 18
    assert inside / len(reports) > 0.55


@pytest.mark.real_data
def test_doctors_comments_agree_with_their_own_labels(graph):
    path = _data_folder("pocus") / "data" / "dataset_metadata.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8-sig")))
    comments = [(row, row["Comments first medical doctor (MD1)"]) for row in rows]
    comments = [(row, text) for row, text in comments if text.strip()]
    assert sum(bool(extract_entities(text, "en", graph)) for _, text in comments) / len(comments) > 0.85
    columns = {"Effusion": "effusion", "Consolidations": "consolidation", "B-lines": "b_lines"}
    labelled = {A: [], P: []}
    for column, concept in columns.items():
        for row, text in comments:
            found = {e.status for e in extract_entities(text, "en", graph) if e.concept == concept}
            for status in (A, P):
                if found == {status}:
                    labelled[status].append(row[column].strip() == "1")
    # The labels are not drawn from this comment alone: agreement is high, not perfect.
    assert len(labelled[P]) > 50 and sum(labelled[P]) / len(labelled[P]) > 0.6
    assert len(labelled[A]) > 3 and sum(labelled[A]) / len(labelled[A]) < 0.4
