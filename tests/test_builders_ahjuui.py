"""The builder of hospital exports: each known trap, each kind of bad line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom.examples
import pytest
import source_folders
from preparing import make_builder, prepare

from dilbert_jax import datasets
from dilbert_jax.data.record import Region
from dilbert_jax.knowledge import load_graph


def test_export_studies_groups_and_privacy(tmp_path, source):
    source_folders.make_export(source)
    _builder, records, _ = prepare("ahjuui", tmp_path)
    assert len(records) == 8 and len({r.group_id for r in records.values()}) == 4
    assert [len(records[f"s{i}"].frames) for i in range(3)] == [1, 2, 1]
    assert records["s1"].regions[0].frame == 1 and records["s1"].regions[0].label == "lesion"
    assert records["s1"].condition == "nodule" and records["s0"].condition == "normal"
    stored = b"".join(p.read_bytes() for p in (tmp_path / "prepared").rglob("*") if p.is_file())
    assert b"Private" not in stored


def test_export_stated_labels_and_splits_come_first(tmp_path, source):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, study in enumerate(studies):
        study["split"] = ("train", "train", "validation", "test")[i // 2]
    studies[1] |= {"condition": "malignant_lesion", "findings": ["spiculated_margin"]}
    del studies[3]["organ"]
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    _, records, splits = prepare("ahjuui", tmp_path)
    assert [splits[f"s{i}"] for i in range(8)] == [s["split"] for s in studies]
    assert (records["s1"].condition, records["s1"].findings) == ("malignant_lesion", ("spiculated_margin",))
    assert records["s3"].organ == "thyroid"  # read from the report


BAD_LINES = [
    ("{not json", "not valid JSON"),
    ("[1, 2]", "a list instead of a JSON object"),
    ({"study_id": None}, "'study_id' is a NoneType; expected text"),
    ({"study_id": "s0"}, "'study_id' is that of line 1"),
    ({"study_id": " ｓ0 "}, "'study_id' is that of line 1"),
    ({"patient_id": ""}, "'patient_id' is empty"),
    ({"patient_id": " \u3000"}, "'patient_id' is empty"),
    ({"patient_id": 10023457.5}, "'patient_id' is a float; expected text or a whole number"),
    ({"patient_id": True}, "'patient_id' is a bool"),
    ({"patient_id": "p\ud800"}, "'patient_id' holds half a character"),
    ({"study_id": "\udc00"}, "'study_id' holds half a character"),
    ({"report": "cyst \ud800"}, "'report' holds half a character"),
    ({"media": "a.png"}, "'media' is a str; expected a list"),
    ({"findings": "cyst of John Doe"}, "'findings' is a str; expected a list"),
    ({"media": ["../secret.png"]}, "leads outside"),
    ({"media": ["gone.png"]}, "no file 'gone.png'"),
    ({"language": "de"}, "'language' is 'de'"),
    ({"organ": "toe"}, "'organ': 'toe' is no organ"),
    ({"findings": ["liver"]}, "'findings': 'liver' is no finding"),
    ({"split": "val"}, "'split' is 'val'"),
    ({"reprot": "x"}, "unknown field 'reprot'"),
    ({"regions": [{"media": 0, "frame": 0, "box": [0, 0, 2, 1], "organ": "liver"}]}, r"box \[0, 0, 2, 1\]"),
    ({"regions": [{"media": 3, "frame": 0, "box": [0, 0, 1, 1], "organ": "liver"}]}, "media 3 is no index"),
    ({"regions": [{"media": 0, "frame": 7, "box": [0, 0, 1, 1], "organ": "liver"}]}, "beyond the clip"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINES)
def test_export_bad_line_is_named_and_skipped(tmp_path, source, change, message):
    manifest = source_folders.make_export(source)
    lines = manifest.read_text().splitlines()
    if isinstance(change, dict):
        study = {**json.loads(lines[6]), "study_id": "bad", "patient_id": "other"}
        change = json.dumps({**study, **change})
    lines.insert(6, change)
    manifest.write_text("\n".join(lines))
    (tmp_path / "secret.png").write_bytes(b"x")
    builder = make_builder("ahjuui", source, tmp_path / "prepared")
    studies = list(builder._studies(source))
    if len(studies) == 9:  # only reading the media shows it
        with pytest.raises(ValueError, match=message):
            studies[6].read()
        return
    assert len(studies) == 8
    ((name, reason),) = builder._skips
    assert name == "manifest.jsonl line 7"
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)
    with pytest.raises(ValueError, match=r"manifest.jsonl line 7: .*strict mode"):
        prepare("ahjuui", tmp_path, strict=True)


@pytest.mark.parametrize(
    ("text", "language", "organ"),
    [
        ("双肾结石", "zh", "kidney"),
        ("胆囊结石", "zh", "gallbladder"),
        ("肝左叶囊肿", "zh", "liver"),
        ("肝肾回声对比增强", "zh", "liver"),  # a finding of the liver
        ("右肾上腺占位", "zh", ""),  # beside the kidney
        ("肺炎，未见积液", "zh", "lung"),
        ("胆囊结石。肝大小正常", "zh", "liver"),  # an organ of its own comes first
        ("Kidney stone", "en", "kidney"),
        ("Fatty liver", "en", "liver"),
        ("Renal pelvis dilated, hydronephrosis", "en", "kidney"),
        ("Cholelithiasis", "en", ""),
    ],
)
def test_export_organ_inside_a_longer_name(text, language, organ):
    from dilbert_jax.data.ahjuui.ahjuui_dataset_builder import find_labels

    assert find_labels({"report": text, "language": language}, load_graph())[0] == organ


def test_export_studies_without_an_organ_are_counted(tmp_path, source, caplog):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    for study in studies[:3]:
        study["report"] = "详见附图。"
        del study["organ"]
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    prepare("ahjuui", tmp_path)
    (warning,) = [r.getMessage() for r in caplog.records if "organ" in r.getMessage()]
    assert warning.startswith("ahjuui: 3 of 8 studies have no organ")


def test_export_of_terms_of_ones_own(tmp_path, source, monkeypatch):
    monkeypatch.delenv("DILBERT_DATA_DIR", raising=False)
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    studies[0] |= {"organ": "uterus", "report": "子宫肌瘤3cm。"}
    studies[1] |= {"condition": "myoma", "organ": "uterus", "regions": []}
    studies[2]["report"] = "肌瘤3cm。"
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    terms = tmp_path / "terms.json"
    content = {
        "schema": "dilbert-jax/knowledge/1",
        "concepts": [
            {"id": "uterus", "type": "organ", "en": ["uterus"], "zh": ["子宫"]},
            {"id": "myoma", "type": "condition", "en": ["myoma"], "zh": ["子宫肌瘤", "肌瘤"]},
        ],
        "relations": [{"source": "uterus", "type": "shows", "target": ["normal", "myoma"]}],
    }
    terms.write_text(json.dumps(content), "utf-8")

    def labels(**options):
        records = datasets.load_records(
            "ahjuui", None, source, tmp_path / "prepared", progress=False, **options
        )
        return {r.study_id: (r.organ, r.condition) for r in records}

    found = labels(graph_file=terms)
    assert found["s0"] == found["s1"] == ("uterus", "myoma") and found["s2"] == ("thyroid", "myoma")
    plain = labels()  # another graph: prepared anew
    assert plain["s2"] == ("thyroid", "") and not {"s0", "s1"} & set(plain)
    prepared = datasets.prepare("ahjuui", source, tmp_path / "prepared", progress=False, graph_file=terms)
    assert prepared.preparation()["kept"] == 8
    with pytest.raises(ValueError, match=r"ahjuui: prepared with another graph_file"):
        datasets.prepare("ahjuui", None, tmp_path / "prepared", progress=False)
    with pytest.raises(ValueError, match=r"none.json: cannot be read"):
        datasets.prepare("ahjuui", source, tmp_path / "prepared", graph_file=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("study_id", ["19480131"]),
        ("study_id", "19480131"),
        ("patient_id", 19480131.5),
        ("patient_id", ["19480131"]),
        ("patient_id", 1e300),
        ("media", {"a": "19480131"}),
        ("language", "19480131"),
        ("split", "19480131"),
        ("organ", "liver of 19480131"),
        ("findings", "19480131"),
        ("findings", ["19480131"]),
        ("19480131", "x"),
        ("regions", [{"media": 19480131, "frame": 0, "box": [0, 0, 1, 1], "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": "19480131", "box": [0, 0, 1, 1], "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": 0, "box": "19480131", "organ": "liver"}]),
        ("regions", [{"media": 0, "frame": 0, "box": [0, 0, 1, 1], "organ": "19480131"}]),
    ],
)
def test_export_messages_hide_what_may_be_a_patient(tmp_path, source, field, value):
    manifest = source_folders.make_export(source)
    study = json.loads(manifest.read_text().splitlines()[0])
    lines = [
        json.dumps(study | {"study_id": "19480131"}),
        json.dumps(study | {"study_id": "x", field: value}),
    ]
    manifest.write_text("\n".join(lines))
    builder = make_builder("ahjuui", source, tmp_path / "prepared")
    assert len(list(builder._studies(source))) == 1
    ((name, reason),) = builder._skips
    assert name == "manifest.jsonl line 2" and "field" in reason and "19480131" not in reason


def test_export_ids_are_compared_without_blanks_width_and_type(tmp_path, source):
    manifest = source_folders.make_export(source)
    study = json.loads(manifest.read_text().splitlines()[0])
    ids = ("7", " 7", "７ ", 7, 7.0, "p4", "ｐ4 ")
    manifest.write_text(
        "\n".join(json.dumps(study | {"study_id": f" s{i} ", "patient_id": p}) for i, p in enumerate(ids))
    )
    studies = list(make_builder("ahjuui", source, tmp_path / "prepared")._studies(source))
    assert [s.study_id for s in studies] == [f"s{i}" for i in range(len(ids))]
    assert len({s.group_id for s in studies[:5]}) == len({s.group_id for s in studies[5:]}) == 1
    assert studies[0].group_id != studies[5].group_id


def test_export_official_splits_may_not_cut_a_patient(tmp_path, source):
    manifest = source_folders.make_export(source)
    studies = [json.loads(line) for line in manifest.read_text().splitlines()]
    studies[0]["split"], studies[1]["split"] = "train", "test"
    manifest.write_text("\n".join(json.dumps(s) for s in studies))
    where = (
        r"manifest.jsonl line 1 is in 'train', manifest.jsonl line 2 of the same patient or group in 'test'"
    )
    with pytest.raises(ValueError, match=f"ahjuui: {where}"):
        prepare("ahjuui", tmp_path)


def test_export_bad_media_is_skipped_with_its_line(tmp_path, source):
    source_folders.make_export(source)
    (source / "clips/3_1.png").write_bytes(b"not a picture")
    builder, records, _ = prepare("ahjuui", tmp_path)
    assert len(records) == 7
    (skipped,) = builder.preparation()["skipped_studies"]
    assert (
        skipped["source"] == "manifest.jsonl line 4, clips/3_1.png"
        and "no DICOM, video or image" in skipped["reason"]
    )


def test_studies_without_a_sector_are_counted_and_named_by_their_media(tmp_path, source):
    source_folders.make_export(source)
    sector = source_folders.ellipse(240, 320, (20, 60, 220, 260))
    screen = np.where(sector, source_folders.make_picture(5, 240, 320), 0).astype(np.uint8)
    source_folders.save(screen, source / "clips/0_0.png")
    builder, _, _ = prepare("ahjuui", tmp_path)
    whole = builder.preparation()["kept_whole"]
    assert len(whole) == 7 and "clips/1_0.png;clips/1_1.png" in whole and "clips/0_0.png" not in whole
    card = (Path(builder.data_dir) / "DATASET_CARD.md").read_text(encoding="utf-8")
    assert "7 of them were not blanked" in card and "7 of them not blanked" in datasets.format_counts(
        builder.preparation()
    )


def test_export_dicom_cine_with_a_region(tmp_path, source):
    manifest = source_folders.make_export(source)
    shutil.copy(pydicom.examples.get_path("ybr_color"), source / "cine.dcm")
    study = {
        "study_id": "cine",
        "patient_id": 7,
        "media": ["cine.dcm"],
        "report": "",
        "language": "en",
        "organ": "heart",
        "regions": [{"media": 0, "frame": 29, "box": [0.25, 0.25, 0.75, 0.75], "organ": "heart"}],
    }
    with manifest.open("a") as file:
        file.write(json.dumps(study) + "\n")
    _, records, _ = prepare("ahjuui", tmp_path)
    cine = records["cine"]
    assert cine.frames.shape == (30, 240, 320) and cine.fps == pytest.approx(30.0, abs=0.1)
    assert cine.regions == (Region(29, (0.25, 0.25, 0.75, 0.75), "heart"),)
    assert cine.condition == "" and cine.findings == () and cine.report == ""
    assert "pydicom" in cine.decoder
