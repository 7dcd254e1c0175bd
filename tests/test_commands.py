"""What the commands leave behind: eval.json, report.html, annotations of files and folders, exit statuses."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pydicom
import pytest
from PIL import Image
from small_export import make_clip, shared_run, write_mp4

from dilbert_jax import annotate, run
from dilbert_jax.evaluate import evaluate, summarize
from dilbert_jax.evaluation.metrics import classification_report
from dilbert_jax.media import find_media
from dilbert_jax.report import encode_frames

SCHEMA_PAGE = Path(__file__).resolve().parents[1] / "docs" / "annotation_schema.md"

# One worker runs both files: they share one trained run.
pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return shared_run(tmp_path_factory)


@pytest.fixture(scope="module")
def evaluation(trained):
    return json.loads((trained[1] / "eval.json").read_text(encoding="utf-8"))


# --- evaluation -------------------------------------------------------------------------------------------


def intervals(node):
    """Every INTERVAL within eval.json."""
    if isinstance(node, dict):
        if {"value", "low", "high"} <= node.keys():
            yield node
        for value in node.values():
            yield from intervals(value)
    elif isinstance(node, list):
        for value in node:
            yield from intervals(value)


def test_eval_json_says_what_was_evaluated(evaluation):
    assert evaluation["schema"] == "dilbert-jax/evaluation/1"
    assert (evaluation["dataset"], evaluation["split"], evaluation["fold"]) == ("ahjuui", "test", None)
    assert (evaluation["num_clips"], evaluation["num_groups"], evaluation["seed"]) == (7, 6, 0)
    assert evaluation["command"] == "python train.py --config=tiny.py" and evaluation["device"]
    assert {"dilbert-jax", "jax", "flax", "numpy"} <= evaluation["versions"].keys()
    assert evaluation["synthetic_reports"] in (False, 0)


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_both_networks_are_measured_in_every_task(evaluation, network):
    tasks = evaluation["networks"][network]["pretraining"]
    for task in ("mlm", "mlm_guided", "mdc", "moc"):
        result = tasks[task]
        assert {"recall_at_1", "recall_at_10", "chance_at_1", "chance_at_10", "num"} <= result.keys()
        assert result["num"] > 0 and 0 <= result["recall_at_1"] <= result["recall_at_10"] <= 1
    assert 0 <= tasks["cmm"]["accuracy"] <= 1


def heads(evaluation):
    for network in evaluation["networks"].values():
        yield network["annotation"]
    yield from evaluation["baseline"].values()


def test_reports_follow_the_schema(evaluation):
    assert {"organ", "condition", "findings"} <= evaluation["networks"]["student"]["annotation"].keys()
    assert {"organ", "condition", "findings"} <= evaluation["baseline"]["majority"].keys()
    for reports in heads(evaluation):
        for head, report in reports.items():
            assert ("accuracy" in report) == (head in ("organ", "condition"))
            assert (report["num"], report["num_groups"]) == (7, 6)
            for average in ("macro", "micro"):
                assert report[average].keys() >= {"sensitivity", "precision", "f1"}
            for entry in report["per_class"]:
                assert entry.keys() >= {"id", "support", "predicted", "sensitivity", "precision", "f1"}
    organ = evaluation["networks"]["student"]["annotation"]["organ"]
    assert {e["id"]: e["support"] for e in organ["per_class"]} == {"liver": 4, "kidney": 3}


def test_intervals_hold_their_value(evaluation):
    found = list(intervals(evaluation))
    assert len(found) > 50
    for interval in found:
        assert 0 <= interval["value"] <= 1
        if interval["low"] is not None:
            assert interval["low"] <= interval["value"] <= interval["high"]


def test_the_kept_answers_give_the_reported_figures(trained, evaluation):
    decisions = json.loads((trained[1] / "decisions.json").read_text(encoding="utf-8"))
    kept = decisions["student"]["organ"]
    assert len(kept["study_ids"]) == 7
    again = classification_report(
        np.asarray(kept["targets"]),
        np.asarray(kept["predictions"]),
        kept["class_ids"],
        np.asarray(kept["groups"]),
        num_resamples=100,
    )
    reported = evaluation["networks"]["student"]["annotation"]["organ"]
    assert again["accuracy"]["value"] == reported["accuracy"]["value"]
    assert np.mean(np.equal(kept["targets"], kept["predictions"])) == pytest.approx(
        reported["accuracy"]["value"], abs=1e-5
    )


def test_the_results_page_shows_run_and_examples(trained):
    page = (trained[1] / "report.html").read_text(encoding="utf-8")
    assert "Research use only" in page and "python train.py --config=tiny.py" in page
    assert page.count("<img") + page.count("<svg") >= 2 and "http://" not in re.sub(
        r"http://www\.w3\.org\S*", "", page
    )
    assert "{{" not in page and "{%" not in page


def test_evaluating_again_gives_the_same(trained, evaluation, tmp_path):
    config, workdir = trained
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    again = evaluate(config, copy, command=evaluation["command"], progress=False)
    assert json.loads(json.dumps(again)) == evaluation
    lines = summarize(again).splitlines()
    assert lines[0].startswith("dilbert (") and lines[0].endswith("MFLOP a clip): 7 test clips of 6 groups")
    assert lines[1].startswith("teacher: CMM accuracy")


# --- annotation -------------------------------------------------------------------------------------------


def write_dicom(path, frames):
    """A multi-frame ultrasound DICOM that names a patient in its header."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Doe^John", "MRN-4711", "US"
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.CineRate = 25
    dataset.PixelData = frames.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def inbox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inbox")
    write_mp4(folder / "clip.mp4", make_clip("liver", "cyst", 14, 1)[0])
    (folder / "later").mkdir()
    Image.fromarray(make_clip("kidney", "stone", 1, 2)[0][0]).save(folder / "later" / "still.png")
    write_dicom(folder / "cine.dcm", make_clip("kidney", "normal", 6, 3)[0])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"not a picture" * 9)
    (folder / "notes.txt").write_text("no clip", encoding="utf-8")
    return folder


def documented_fields():
    """Fields of the annotation and of its parts, as the documentation lists them."""
    block = SCHEMA_PAGE.read_text(encoding="utf-8").split("```")[1]
    fields = {}
    for line in block.splitlines():
        match = re.match(r'\s*"(\w+)": (.*)', line)
        if match:
            nested = re.findall(r'"([^"]+)"', match[2]) if match[2].lstrip("[").startswith("{") else []
            fields[match[1]] = nested
        if line.startswith("LABEL"):
            label, alternative = line.split('"alternatives"')
            fields["LABEL"] = [*re.findall(r'"(\w+)"', label), "alternatives"]
            fields["alternative"] = re.findall(r'"(\w+)"', alternative)
    return fields


def check_annotation(annotation):
    fields = documented_fields()
    label, alternative = fields.pop("LABEL"), fields.pop("alternative")
    assert annotation.keys() == fields.keys() and len(fields) == 11
    for name, nested in fields.items():
        parts = annotation[name] if isinstance(annotation[name], list) else [annotation[name]]
        for part in parts if nested else ():
            assert part.keys() == set(nested), name
    for head in ("organ", "condition"):
        assert annotation[head].keys() == set(label)
        assert all(entry.keys() == set(alternative) for entry in annotation[head]["alternatives"])
    source = annotation["source"]
    for entity in annotation["entities"]:
        assert len(entity["frame_scores"]) == len(annotation["frame_index"])
        assert len(entity["region_scores"]) == len(annotation["regions"])
    assert all(0 <= i < source["num_frames"] for i in annotation["frame_index"])
    for region in annotation["regions"]:
        ymin, xmin, ymax, xmax = region["box"]
        assert 0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1 and 0 <= region["frame"] < source["num_frames"]
    assert re.fullmatch("[0-9a-f]{64}", source["sha256"])
    assert annotation["description"]["en"] and re.search("[一-鿿]", annotation["description"]["zh"])


def test_a_folder_with_a_broken_file_is_annotated_but_for_it(trained, inbox, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [f"--workdir={trained[1]}", f"--input={inbox}", f"--output={tmp_path / 'out'}"]
    assert annotate.main(arguments) == 1
    printed = capsys.readouterr()
    assert "3 of 4 annotated, 1 failed" in printed.out and "broken.png" in printed.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [e["file"] for e in summary] == ["broken.png", "cine.dcm", "clip.mp4", "later/still.png"]
    (failed,) = [e for e in summary if "reason" in e]
    assert failed["file"] == "broken.png" and failed["reason"] and "href" not in failed
    for entry in summary:
        if entry is failed:
            continue
        page = tmp_path / "out" / entry["href"]
        assert "Research use only" in page.read_text(encoding="utf-8")
        text = page.with_name("annotation.json").read_text(encoding="utf-8")
        assert "Doe" not in text and "4711" not in text and str(inbox) not in text
        annotation = json.loads(text)
        check_annotation(annotation)
        assert annotation["source"]["file"] == Path(entry["file"]).name
        assert annotation["model"]["step"] == 28 and annotation["model"]["network"] == "student"
    index = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert all(e["href"] in index for e in summary if e is not failed) and "broken.png" in index


def test_a_folder_gives_what_its_files_give_alone_in_their_order(trained, inbox, tmp_path):
    annotator = annotate.Annotator(trained[1])
    files = find_media(inbox)
    outputs = {path: tmp_path / str(i) for i, path in enumerate(files)}
    entries = annotate.annotate_files(annotator, outputs, batch_size=2)
    assert ["reason" in entry for entry in entries] == [path.name == "broken.png" for path in files]
    for (path, folder), entry in zip(outputs.items(), entries, strict=True):
        if "reason" in entry:
            assert entry.keys() == {"reason"} and not folder.exists()
            continue
        assert entry.keys() == {"annotation", "frames", "seconds"} and len(entry["frames"]) == 1
        assert entry["frames"].base is None  # a slice of the clip would keep all of it
        annotation, clip = annotate.annotate_path(annotator, path, tmp_path / "alone")
        assert entry["annotation"]["source"] == annotation["source"]
        scores, expected = (
            {e["id"]: [e["score"], *e["frame_scores"], *e["region_scores"]] for e in a["entities"]}
            for a in (entry["annotation"], annotation)
        )
        for concept, values in expected.items():
            assert scores[concept] == pytest.approx(values, abs=1.01e-4)
        assert (folder / "annotation.html").exists() and len(clip.frames) == annotation["source"][
            "num_frames"
        ]


def test_a_clip_that_waits_keeps_what_its_page_shows():
    frames = np.random.default_rng(0).integers(0, 255, (2, 600, 900)).astype(np.uint8)
    shrunk = annotate.shrink_for_page(frames)
    assert shrunk.shape == (2, 320, 480)
    assert encode_frames(shrunk) == encode_frames(frames)
    small = frames[:, :300, :480]
    assert annotate.shrink_for_page(small) is small


def test_a_single_good_file_succeeds_and_prints_its_description(
    trained, inbox, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [f"--workdir={trained[1]}", f"--input={inbox / 'clip.mp4'}", f"--output={tmp_path / 'out'}"]
    assert annotate.main([*arguments, "--network=teacher"]) == 0
    annotation = json.loads((tmp_path / "out" / "annotation.json").read_text(encoding="utf-8"))
    check_annotation(annotation)
    assert annotation["source"]["num_frames"] == 14 and annotation["model"]["network"] == "teacher"
    printed = capsys.readouterr().out
    assert annotation["description"]["en"] in printed and annotation["description"]["zh"] in printed
    assert (tmp_path / "out" / "annotation.html").exists()


def test_a_long_clip_is_numbered_in_frames_of_the_source(trained, tmp_path):
    path = write_mp4(tmp_path / "long.mp4", make_clip("liver", "normal", 300, 4)[0])
    annotation, clip = annotate.annotate_path(annotate.Annotator(trained[1]), path, tmp_path / "out")
    assert len(clip.frames) == annotate.MAX_FRAMES and annotation["source"]["num_frames"] == 300
    written = json.loads((tmp_path / "out" / "annotation.json").read_text(encoding="utf-8"))
    assert written["frame_index"] == [clip.frame_index[i] for i in annotation["frame_index"]]
    assert max(written["frame_index"]) > annotate.MAX_FRAMES


def test_files_of_similar_names_have_their_own_annotations(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for i, name in enumerate(("scan.1.png", "scan_1.png")):
        Image.fromarray(make_clip("kidney", "stone", 1, i)[0][0]).save(inbox / name)
    out = tmp_path / "out"
    assert annotate.main([f"--workdir={trained[1]}", f"--input={inbox}", f"--output={out}"]) == 0
    files = [json.loads(p.read_text("utf-8"))["source"]["file"] for p in out.rglob("annotation.json")]
    assert sorted(files) == ["scan.1.png", "scan_1.png"]


@pytest.mark.parametrize("missing", ["input", "workdir", "media"])
def test_what_is_missing_is_named_before_anything_is_loaded(
    trained, inbox, tmp_path, missing, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    paths = {"workdir": trained[1], "input": inbox}
    if missing == "media":
        paths["input"] = tmp_path / "empty"
    else:
        paths[missing] = tmp_path / "nowhere"
    arguments = [f"--{name}={path}" for name, path in paths.items()]
    assert annotate.main([*arguments, f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ("nowhere" in error or "empty" in error)
    assert not (tmp_path / "out").exists()


def test_a_compilation_cache_that_the_environment_names_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    before = jax.config.jax_compilation_cache_dir
    run.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())
