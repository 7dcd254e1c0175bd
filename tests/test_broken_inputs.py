"""What a user meets who hands in something broken: one line that names the file or field, and the cause."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_folders
from media_samples import encode, make_gray, video_bytes, write_dicom, write_video
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from dilbert_jax import datasets
from dilbert_jax.config import REVISION, check_config, default_config, load_config
from dilbert_jax.experiment import load_context
from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.media import MediaError, find_media, read_clip, read_stills

REPOSITORY = Path(__file__).parents[1]


def refuse(call: Callable[[], Any], error: type[Exception], *fragments: str) -> None:
    """The call must raise exactly this error, in one line that holds every fragment (a pattern)."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message and len(message) < 700
    for fragment in fragments:
        assert re.search(fragment, message), f"{fragment!r} is not in {message!r}"


# --- media ------------------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def _compressed(path: Path, frame: bytes, syntax: Any, **elements: Any) -> Path:
    sizes = {"Rows": 64, "Columns": 96, "NumberOfFrames": 1} | elements
    return write_dicom(path, encapsulate([frame]), syntax=syntax, **sizes)


def _save_gif(path: Path) -> Path:
    images = [Image.fromarray(frame) for frame in make_gray(4)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


NOISE = np.random.default_rng(0).integers(0, 255, (64, 96), np.uint8)
# name of the file -> (writer, cause)
MEDIA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent.mp4": (lambda p: None, "no such file"),
    "folder.dcm": (lambda p: p.mkdir(), "is a folder; name a file"),
    "broken_link.png": (lambda p: p.symlink_to(p.parent / "nowhere"), "no such file"),
    "empty.dcm": (lambda p: _write(p, b""), r"is empty \(0 bytes\)"),
    "empty.mp4": (lambda p: _write(p, b""), r"is empty \(0 bytes\)"),
    "text.png": (lambda p: _write(p, b"patient,finding\n" * 99), "no DICOM, video or image file"),
    "page.jpg": (lambda p: _write(p, b"<!DOCTYPE html><html></html>"), "no DICOM, video or image file"),
    "document.dcm": (lambda p: _write(p, b"%PDF-1.7\n" * 99), "no DICOM, video or image file"),
    "archive.mp4": (lambda p: _write(p, b"PK\x03\x04" * 999), "no DICOM, video or image file"),
    "array.npy": (lambda p: np.save(p, make_gray()), "no DICOM, video or image file"),
    "one_byte.gif": (lambda p: _write(p, b"G"), "no DICOM, video or image file"),
    "truncated.png": (lambda p: _cut(_write(p, encode(NOISE, "PNG")), 0.5), "cannot be decoded as an image"),
    "truncated.jpg": (lambda p: _cut(_write(p, encode(NOISE, "JPEG")), 0.5), "cannot be decoded as an image"),
    "truncated.tif": (lambda p: _cut(_write(p, encode(NOISE, "TIFF")), 0.5), "cannot be decoded as an image"),
    "truncated.bmp": (lambda p: _cut(_write(p, encode(NOISE, "BMP")), 0.5), "cannot be decoded as an image"),
    "truncated.gif": (lambda p: _cut(_save_gif(p), 0.2), "cannot be decoded as an image"),
    "truncated.mp4": (lambda p: _cut(write_video(p, make_gray(9), "mpeg4"), 0.7), "be decoded as video"),
    "truncated.mov": (lambda p: _cut(write_video(p, make_gray(9), "mpeg4"), 0.7), "be decoded as video"),
    "header_only.avi": (
        lambda p: _write(p, write_video(p, make_gray(9), "mjpeg", pixel_format="yuvj420p").read_bytes()[:80]),
        "decoded as video|holds no video stream|no video frame",
    ),
    "no_frames.avi": (
        lambda p: _write(p, video_bytes(".avi", "mpeg4", 0)),
        "no video frame can be decoded|cannot be decoded as video",
    ),
    "truncated.dcm": (lambda p: _cut(write_dicom(p, make_gray(4)), 0.6), "is truncated: 4 frames of 64 x 96"),
    "no_frames.dcm": (lambda p: write_dicom(p, b"\0\0", Rows=64, Columns=96, NumberOfFrames=0), "truncated"),
    "no_pixels.dcm": (lambda p: write_dicom(p, b""), "no DICOM pixel data"),
    "no_columns.dcm": (lambda p: write_dicom(p, b"ab", Rows=4), "no usable DICOM value for Columns"),
    "huge.dcm": (lambda p: write_dicom(p, b"ab", Rows=65535, Columns=65535), "the limit is 67108864 pixels"),
    "truncated_jpeg.dcm": (
        lambda p: _compressed(p, encode(NOISE, "JPEG")[:400], JPEGBaseline8Bit),
        "cannot be decoded",
    ),
    "truncated_j2k.dcm": (
        lambda p: _compressed(p, encode(NOISE, "JPEG2000", no_jp2=True)[:60], JPEG2000Lossless),
        "cannot be decoded",
    ),
    "text_as_jpeg.dcm": (
        lambda p: _compressed(p, b"no image" * 40, JPEGBaseline8Bit),
        "frame 0 holds no JPEG or JPEG 2000 image",
    ),
    "text_as_rle.dcm": (lambda p: _compressed(p, b"no image" * 40, RLELossless), "cannot be decoded"),
    "other_size.dcm": (
        lambda p: _compressed(p, encode(NOISE, "JPEG"), JPEGBaseline8Bit, Rows=99),
        "encoded with 64 x 96 pixels and the header says 99 x 96",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEDIA)
def test_broken_media(tmp_path, capfd, name):
    make, cause = MEDIA[name]
    path = tmp_path / name
    make(path)
    refuse(lambda: read_clip(path), MediaError, "^" + re.escape(f"{path}: "), cause)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_broken_image_sequences(tmp_path):
    _write(tmp_path / "1.png", encode(NOISE, "PNG"))
    _write(tmp_path / "2.png", encode(NOISE[:50], "PNG"))
    _save_gif(tmp_path / "3.gif")
    first = tmp_path / "1.png"
    refuse(
        lambda: read_stills([first, tmp_path / "2.png"]), MediaError, "2.png: has 50 x 96 pixels", "64 x 96"
    )
    refuse(lambda: read_stills([first, tmp_path / "3.gif"]), MediaError, "3.gif: holds several frames")
    refuse(lambda: read_stills([first, tmp_path / "4.png"]), MediaError, "4.png: no such file")
    refuse(lambda: read_stills([]), ValueError, "paths must be a non-empty list of files")
    refuse(lambda: find_media(tmp_path / "none"), MediaError, "none: no such file or folder")


# --- data sets --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """A set's folder after a damage; `fragments` are what the message must hold ({folder}: its path)."""

    name: str
    damage: Callable[[Path], Path | None]  # gets an empty folder; returns the one to prepare if another
    fragments: tuple[str, ...]
    strict: bool = False


def _after(make: Callable[[Path], Any], change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        make(folder)
        change(folder)

    return damage


def _remove(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = list(folder.rglob(pattern))
        assert found
        for path in found:
            path.unlink()

    return change


def _replace(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        assert (folder / name).is_file()
        (folder / name).write_bytes(data)

    return change


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, change((folder / name).read_bytes()))


def _line_7(change: dict[str, Any] | bytes) -> Callable[[Path], None]:
    """A hospital export whose seventh line is replaced, or has fields replaced (None: removed)."""

    def damage(folder: Path) -> None:
        manifest = source_folders.make_export(folder)
        lines = manifest.read_bytes().splitlines()
        if isinstance(change, dict):
            study = json.loads(lines[6]) | change
            lines[6] = json.dumps({k: v for k, v in study.items() if v is not None}).encode()
        else:
            lines[6] = change
        manifest.write_bytes(b"\n".join(lines) + b"\n")

    return damage


def _export(change: dict[str, Any] | bytes, cause: str) -> Source:
    return Source("ahjuui", _line_7(change), (r"^manifest\.jsonl line 7: ", cause), strict=True)


def _region(**changes: Any) -> dict[str, Any]:
    return {"regions": [{"media": 0, "frame": 0, "box": [0.1, 0.1, 0.5, 0.5], "organ": "lesion"} | changes]}


BUSI, KMVE, POCUS = source_folders.make_busi, source_folders.make_kmve, source_folders.make_pocus
BENIGN = "Dataset_BUSI_with_GT/benign"
SOURCES = {
    "busi missing folder": Source(
        "busi", lambda f: f / "none", ("busi: {folder}/none does not exist", "must hold Dataset_BUSI_with_GT")
    ),
    "busi file instead of folder": Source(
        "busi",
        lambda f: _write(f / "busi.zip", b"PK"),
        ("busi: {folder}/busi.zip is not a folder", "must hold Dataset_BUSI_with_GT"),
    ),
    "busi empty folder": Source(
        "busi", lambda f: None, ("busi: {folder} does not hold", "found an empty folder")
    ),
    "busi another set": Source("busi", _after(KMVE, lambda f: None), ("{folder} does not", "found Data/")),
    "busi without masks": Source(
        "busi", _after(BUSI, _remove("*_mask*.png")), ("{folder}", "found 10 images and not one mask file")
    ),
    "busi one mask absent": Source(
        "busi",
        _after(BUSI, _remove("benign (2)_mask.png")),
        (r"benign \(2\)\.png: lesion image without a mask",),
        strict=True,
    ),
    "busi text as png": Source(
        "busi",
        _after(BUSI, _replace(f"{BENIGN}/benign (3).png", b"text")),
        (r"benign \(3\)\.png: is no DICOM, video or image file",),
        strict=True,
    ),
    "busi empty mask": Source(
        "busi",
        _after(BUSI, _replace(f"{BENIGN}/benign (3)_mask.png", encode(np.zeros((96, 128), np.uint8), "PNG"))),
        (r"benign \(3\)", r"mask benign \(3\)_mask\.png of a lesion image is empty"),
        strict=True,
    ),
    "usss empty": Source("usss", lambda f: None, ("usss: {folder} does not hold", "found an empty folder")),
    "usss no images": Source(
        "usss",
        lambda f: (f / "abdominal_US/abdominal_US/RUS/images/train").mkdir(parents=True),
        ("usss: {folder}", "found no image like RUS/images/train/c1.jpg"),
    ),
    "pocus csv missing": Source(
        "pocus", _after(POCUS, _remove("*.csv")), ("pocus: {folder}", "no dataset_metadata.csv")
    ),
    "pocus csv of another table": Source(
        "pocus",
        _after(POCUS, _replace("data/dataset_metadata.csv", b"a,b\n1,2\n")),
        ("{folder}/data/dataset_metadata.csv: columns", "'Filename'", "are absent"),
    ),
    "pocus csv in another encoding": Source(
        "pocus",
        _after(POCUS, _rewrite("data/dataset_metadata.csv", lambda b: b + "肺".encode("gbk") + b"\n")),
        (r"{folder}/data/dataset_metadata\.csv: is not UTF-8 text", "save it as UTF-8"),
    ),
    "pocus csv with an endless cell": Source(
        "pocus",
        _after(POCUS, _rewrite("data/dataset_metadata.csv", lambda b: b + b"a" * 200_000 + b",regular\n")),
        (r"{folder}/data/dataset_metadata\.csv line 9: field larger than field limit",),
    ),
    "pocus broken clip": Source(
        "pocus",
        _after(POCUS, _replace("data/pocus_videos/linear/Cov-Atlas+(45).gif", b"GIF89a")),
        (r"linear/Cov-Atlas\+\(45\)\.gif: ", "cannot be decoded as an image"),
        strict=True,
    ),
    "kmve json broken": Source(
        "kmve",
        _after(KMVE, _replace("Data/new_Thyroid2.json", b'{"train": [\n}')),
        (r"{folder}/Data/new_Thyroid2\.json: not valid UTF-8 JSON", "line 2 column 1"),
    ),
    "kmve json is a list": Source(
        "kmve",
        _after(KMVE, _replace("Data/new_Thyroid2.json", b"[]")),
        (r"new_Thyroid2\.json: expected an object with lists 'train', 'val' and 'test'",),
    ),
    "kmve row without uid": Source(
        "kmve",
        _after(KMVE, _replace("Data/new_Thyroid2.json", b'{"train": [{}], "val": [], "test": []}')),
        (r"new_Thyroid2\.json", "field 'uid' is absent"),
        strict=True,
    ),
    "kmve broken image": Source(
        "kmve",
        _after(KMVE, _replace("Data/Thyroid_report/1_1.jpeg", b"text")),
        (r"1_1\.jpeg: is no DICOM, video or image file",),
        strict=True,
    ),
    "clust empty": Source("clust", lambda f: None, ("clust: {folder} does not hold", "an empty folder")),
    "clust annotation cut": Source(
        "clust",
        _after(
            source_folders.make_clust, _replace("TrainingSet/2D/CIL-01/Annotation/CIL-01_1.txt", b"1 2\n")
        ),
        (r"CIL-01_1\.txt line 1: '1 2'; expected 'frame x y'",),
        strict=True,
    ),
    "clust resolution is text": Source(
        "clust",
        _after(
            source_folders.make_clust,
            _replace("TrainingSet/resolution.csv", b"scan,res_x,res_y\nCIL-01,x,y\n"),
        ),
        (r"{folder}/TrainingSet/resolution\.csv line 2: ", "expected scan,res_x,res_y in mm"),
    ),
    "ahjuui no manifest": Source("ahjuui", lambda f: None, ("ahjuui: {folder}", r"hold manifest\.jsonl")),
    "ahjuui empty manifest": Source(
        "ahjuui",
        lambda f: _write(f / "manifest.jsonl", b"\n").parent,
        ("ahjuui: {folder}", "found no usable study"),
    ),
    "ahjuui bad json": _export(b'{"study_id": "s6", ', "not valid JSON"),
    "ahjuui not utf-8": _export(b'{"study_id": "\xff"}', "not valid JSON in UTF-8"),
    "ahjuui a list": _export(b"[1, 2]", "a list instead of a JSON object"),
    "ahjuui missing field": _export({"report": None}, "field 'report' is absent"),
    "ahjuui unknown field": _export({"raport": ""}, "unknown field 'raport'; known are study_id"),
    "ahjuui path traversal": _export({"media": ["../../etc/passwd"]}, "leads outside the data set's folder"),
    "ahjuui absolute path": _export({"media": ["/etc/passwd"]}, "'/etc/passwd' must be relative"),
    "ahjuui absent media": _export({"media": ["clips/none.png"]}, "field 'media': no file 'clips/none.png'"),
    "ahjuui unknown language": _export({"language": "de"}, r"'language' is 'de'; expected one of \('en'"),
    "ahjuui unknown organ": _export({"organ": "toe"}, "field 'organ': 'toe' is no organ"),
    "ahjuui unknown split": _export({"split": "dev"}, "field 'split' is 'dev'; expected one of"),
    "ahjuui box outside": _export(_region(box=[0, 0, 1.5, 1]), r"'regions'\[0\]: box \[0, 0, 1.5, 1\]"),
    "ahjuui box upside down": _export(_region(box=[0.5, 0, 0.1, 1]), r"expected \[ymin, xmin, ymax, xmax\]"),
    "ahjuui box of a late frame": _export(_region(frame=9), "frame 9 is beyond the clip's last frame"),
    "ahjuui duplicate study": _export({"study_id": "s0"}, "'study_id' is that of line 1"),
    "ahjuui broken clip": Source(
        "ahjuui",
        _after(source_folders.make_export, _replace("clips/6_0.png", encode(NOISE, "PNG")[:300])),
        (r"^manifest\.jsonl line 7: .*6_0\.png: cannot be decoded as an image",),
        strict=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_broken_source(tmp_path, monkeypatch, case):
    monkeypatch.delenv("DILBERT_DATA_DIR", raising=False)
    source = SOURCES[case]
    folder = tmp_path / "source"
    folder.mkdir()
    stated = source.damage(folder)
    manual_dir = stated if isinstance(stated, Path) else folder
    prepared = tmp_path / "prepared"
    refuse(
        lambda: datasets.prepare(source.name, manual_dir, prepared, strict=source.strict, progress=False),
        ValueError,
        *(fragment.replace("{folder}", re.escape(str(folder))) for fragment in source.fragments),
    )
    assert not list(prepared.rglob("preparation.json"))


def test_bad_lines_are_skipped_and_named_unless_strict(tmp_path):
    _line_7(b"{")(tmp_path)
    found = datasets.prepare("ahjuui", tmp_path, tmp_path / "prepared", progress=False).preparation()
    assert found["kept"] == 7 and found["skipped"] == 1
    (skipped,) = found["skipped_studies"]
    assert "manifest.jsonl line 7" in str(skipped) and "not valid JSON" in str(skipped)


# --- knowledge graph, vocabulary, configuration -----------------------------------------------------------


def _graph(**content: Any) -> bytes:
    return json.dumps({"schema": "dilbert-jax/knowledge/1"} | content).encode()


def _concept(**fields: Any) -> bytes:
    return _graph(concepts=[{"id": "tendon", "type": "region", "en": ["tendon"], "zh": ["肌腱"]} | fields])


def _relation(**fields: Any) -> bytes:
    return _graph(relations=[{"source": "cyst", "type": "located_at", "target": "liver"} | fields])


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "line 1 is not valid JSON"),
        (b'{"schema":\n "dilbert', "line 2 is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[]", "found list; expected an object"),
        (b"{}", "field 'schema' is None; expected 'dilbert-jax/knowledge/1'"),
        (_graph(concept=[]), "unknown field 'concept'"),
        (_graph(concepts={}), "field 'concepts' is dict; expected a list"),
        (_concept(id="Tendon!"), r"concepts\[0\]: field 'id' is 'Tendon!'"),
        (_concept(type="tissue"), r"concepts\[0\]: field 'type' of 'tendon' is 'tissue'"),
        (_concept(zh=[]), r"concepts\[0\]: field 'zh' of 'tendon' has no name"),
        (_concept(en=["liver"]), "'en' of 'tendon' holds 'liver', which already names 'liver'"),
        (_relation(type="near"), r"relations\[0\]: field 'type' is 'near'"),
        (_relation(target="toe"), r"relations\[0\]: field 'target' names 'toe'"),
    ],
)
def test_broken_graph(tmp_path, content, cause):
    path = _write(tmp_path / "graph.json", content)
    refuse(lambda: load_graph(path), ValueError, "^" + re.escape(f"{path}: "), cause)


SPECIALS = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", r"special token \[PAD\] is missing"),
        (b"liver\ncyst\n", r"special token \[PAD\] is missing"),
        (SPECIALS.replace(b"[MASK]\n", b"") + b"liver\n", r"special token \[MASK\] is missing"),
        (SPECIALS, "holds special tokens only"),
        (SPECIALS + b"liver\ncyst\nliver\n", "word piece 'liver' occurs twice"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_broken_vocabulary(tmp_path, content, cause):
    path = _write(tmp_path / "vocab.txt", content)
    refuse(lambda: ReportTokenizer.load(path), ValueError, "^" + re.escape(f"{path}: "), cause)


def test_absent_graph_and_vocabulary(tmp_path):
    for load in (load_graph, ReportTokenizer.load):
        refuse(lambda load=load: load(tmp_path / "none"), ValueError, "none: cannot be read", "No such file")
        refuse(lambda load=load: load(tmp_path), ValueError, "cannot be read", "Is a directory")


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("data.size", 63, "must be a multiple of 8"),
        ("data.size", 0, "must be positive"),
        ("data.num_frames", 0, "must be positive"),
        ("data.num_frames", 13, "must be divisible by [0-9], frames a step"),
        ("data.folds", 2, "or at least 3"),
        ("data.max_tokens", 2, "need at least 4"),
        ("model.hidden_size", 65, "must be divisible by 4 heads"),
        ("model.blocks", (), "must be positive"),
        ("model.blocks", (1,), "one entry for each"),
        ("model.stem_patch", (2, 4, 8), "rows and columns must be equal"),
        ("train.batch_size", 1, "need at least 2"),
        ("train.mutual_epochs", -1.0, "positive number of epochs"),
        ("optimizer.name", "adam", "choose 'sgd' or 'adamw'"),
        ("loss.temperature", 0.0, "must be positive"),
        ("loss.reduction", "max", "choose mean, mean_valid or sum"),
    ],
)
def test_bad_configuration(field, value, cause):
    config = default_config()
    section, name = field.split(".")
    config[section][name] = value
    refuse(lambda: check_config(config), ValueError, re.escape(f"config.{field} is {value!r}; "), cause)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (f'{{"revision": {REVISION}, "dta": {{"size": 64}}}}'.encode(), "unknown field 'dta'"),
        (f'{{"revision": {REVISION}, "data": {{"siez": 64}}}}'.encode(), r"unknown field 'data\.siez'"),
        (
            b'{"data": {"size": 64}}',
            f"field 'revision' is 1, and this version is revision {REVISION} of the method",
        ),
    ],
)
def test_configuration_of_another_version(tmp_path, content, cause):
    path = _write(tmp_path / "config.json", content)
    refuse(lambda: load_config(path), ValueError, "^" + re.escape(f"{path}: "), cause)


def test_workdir_without_a_run(tmp_path):
    for workdir in (tmp_path, tmp_path / "none"):
        named = re.escape(str(workdir / "config.json"))
        refuse(
            lambda workdir=workdir: load_context(workdir), FileNotFoundError, named, "train one with train.py"
        )


def test_misspelt_override_stops_train(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", "--config.data.nam=x"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "nam" in last and 'Did you mean "name"' in last
    assert not (tmp_path / "run").exists()
