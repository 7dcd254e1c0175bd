"""The data set command line: prepare, list, show; reuse; errors in one line."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import source_folders
from PIL import Image

from dilbert_jax import datasets
from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.record import Record, Region


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.delenv("DILBERT_DATA_DIR", raising=False)
    monkeypatch.setenv("DILBERT_PREPARED_DIR", str(tmp_path / "prepared"))
    source = tmp_path / "sources" / "busi"
    source.mkdir(parents=True)
    source_folders.make_busi(source)
    return source, tmp_path / "prepared"


def test_prepare_list_show(folders, capsys, tmp_path):
    source, prepared = folders
    assert datasets.main(["prepare", "busi", f"--manual_dir={source}", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "busi: kept 10 studies, skipped 0" in out and str(prepared) in out
    assert datasets.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in datasets.NAMES)
    assert "prepared, 10 studies" in out and out.count("not prepared") == len(datasets.NAMES) - 1
    sheet = tmp_path / "sheets" / "busi.png"
    assert datasets.main(["show", "busi", f"--output={sheet}"]) == 0
    out = capsys.readouterr().out
    assert "malignant_lesion" in out and "contact sheet of 10 studies" in out
    with Image.open(sheet) as image:
        assert image.width > 1000 and image.height > 500


def make_record(study_id="s", label="lesion"):
    frames = np.zeros((3, 50, 80), np.uint8)
    frames[2] = 120
    return Record(
        study_id=study_id,
        group_id="g",
        frames=frames,
        organ="liver",
        condition="cyst",
        report="",
        language="en",
        report_is_synthetic=True,
        source="",
        decoder="",
        regions=(Region(2, (0.2, 0.2, 0.8, 0.8), label),),
    )


def test_contact_sheet_shows_study_ids_of_any_characters(tmp_path):
    pictures = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for study_id in ("$a{$ b", "a\tb", "肝脏 07", "肝囊 07"):
            datasets.draw_contact_sheet([make_record(study_id, "$x{$")], tmp_path / "a.png", columns=1)
            pictures.append((tmp_path / "a.png").read_bytes())
    assert len(set(pictures)) == 4  # boxes in the place of characters would look alike


def test_contact_sheet_draws_boxes_on_the_frame_that_has_them(tmp_path):
    datasets.draw_contact_sheet([make_record()], tmp_path / "a.png", columns=1)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == (120, 120, 120)).all(1).sum() > 5000
    assert (pixels == (31, 119, 180)).all(1).sum() > 200  # the box in the first colour of the cycle


def test_a_size_of_a_set_has_its_own_folder_and_a_wrong_one_is_named(tmp_path, capsys):
    default, small = (datasets.make_builder(name, data_dir=tmp_path) for name in ("phantom", "phantom/small"))
    assert small.builder_config.num_patients == 63 and default.builder_config.num_patients == 360
    assert small.data_dir != default.data_dir
    assert datasets.main(["prepare", "phantom/huge"]) == 1
    assert "phantom/default, phantom/small, phantom/large" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose from busi"):
        datasets.make_builder("busi/large")


def test_second_prepare_does_no_work_and_changes_are_noticed(folders, monkeypatch):
    source, _ = folders
    first = datasets.prepare("busi", source, progress=False)
    data = {p: p.stat().st_mtime_ns for p in os.scandir(first.data_dir) if p.is_file()}
    with monkeypatch.context() as context:
        context.setattr(type(first), "_studies", lambda *_: pytest.fail("the source was read again"))
        again = datasets.prepare("busi", source, progress=False)
        assert datasets.prepare("busi", progress=False).preparation() == again.preparation()
    assert {p.name: p.stat().st_mtime_ns for p in os.scandir(first.data_dir)} == {
        p.name: t for p, t in data.items()
    }
    (source / "Dataset_BUSI_with_GT" / "malignant" / "malignant (1)_mask.png").unlink()
    changed = datasets.prepare("busi", source, progress=False)
    assert changed.preparation()["kept"] == 9
    assert sum(1 for _ in datasets.load_records("busi", manual_dir=source, progress=False)) == 9


def test_the_folder_of_a_set_with_configurations_is_made(tmp_path):
    fresh = tmp_path / "fresh" / "phantom" / "default" / "2.0.0"
    fresh.mkdir(parents=True)
    (fresh / "data").write_text("new")
    folder = tmp_path / "prepared" / "phantom" / "default" / "2.0.0"
    for _ in range(2):  # into nothing, then over the earlier one
        datasets._replace_folder(folder, fresh, tmp_path / "earlier")
        assert (folder / "data").read_text() == "new"
        fresh.mkdir()
        (fresh / "data").write_text("new")


def test_failed_preparation_leaves_nothing(folders):
    source, prepared = folders
    with pytest.raises(ValueError, match="does not hold"):
        datasets.prepare("busi", source.parent.parent / "sources", progress=False)
    assert not list(prepared.rglob("*"))
    assert datasets.make_builder("busi").preparation() is None


def spoil_a_mask(monkeypatch, source):
    """A study that strict mode cannot read."""
    mask = source / "Dataset_BUSI_with_GT" / "malignant" / "malignant (2)_mask.png"
    source_folders.save(np.zeros((5, 5), np.uint8), mask, "1")


def interrupt_reading(monkeypatch, source):
    """Ctrl-C at the third study."""
    (source / "note.txt").write_text("a change, so that the source is read again")
    read, entries = UltrasoundBuilder._read, []

    def read_or_stop(builder, entry):
        entries.append(entry)
        if len(entries) == 3:
            raise KeyboardInterrupt
        return read(builder, entry)

    monkeypatch.setattr(UltrasoundBuilder, "_read", read_or_stop)


def refuse_to_move(monkeypatch, source):
    """The finished folder cannot take its place."""
    (source / "note.txt").write_text("a change, so that the source is read again")
    rename = Path.rename

    def rename_or_fail(path, target):
        if path.name == Path(target).name:
            raise OSError("no permission")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(spoil_a_mask, ValueError), (interrupt_reading, KeyboardInterrupt), (refuse_to_move, OSError)],
)
def test_failed_preparation_leaves_the_earlier_one(folders, monkeypatch, spoil, error):
    source, prepared = folders
    datasets.prepare("busi", source, progress=False)
    before = {p: p.read_bytes() for p in prepared.rglob("*") if p.is_file()}
    with monkeypatch.context() as context:
        spoil(context, source)
        with pytest.raises(error):
            datasets.prepare("busi", source, strict=True, progress=False)
    assert {p: p.read_bytes() for p in prepared.rglob("*") if p.is_file()} == before
    assert [p.name for p in prepared.iterdir()] == ["busi"]
    assert [p.name for p in (prepared / "busi").iterdir()] == ["2.0.0"]
    assert len(list(datasets.load_records("busi", progress=False))) == 10


def test_data_dir_variable_is_the_default_source(folders, monkeypatch, capsys):
    source, _ = folders
    monkeypatch.setenv("DILBERT_DATA_DIR", str(source.parent))
    assert datasets.main(["prepare", "busi", "--quiet"]) == 0
    assert "kept 10 studies" in capsys.readouterr().out
    assert datasets.main(["prepare", "usss", "--quiet"]) == 1
    assert "usss does not exist; it must hold abdominal_US" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "busi"], "error: busi: no folder given; manual_dir must hold Dataset_BUSI_with_GT"),
        (["prepare", "kmve", "--manual_dir=/nowhere"], "error: kmve: /nowhere does not exist"),
        (["show", "usss"], "usss is not prepared"),
    ],
)
def test_errors_are_one_line(folders, capsys, arguments, message):
    assert datasets.main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_prepare_names_what_it_skipped_the_rarest_reason_first(folders, capsys):
    source, prepared = folders
    root = source / "Dataset_BUSI_with_GT" / "benign"
    for number in range(20, 32):
        source_folders.save(source_folders.make_picture(number), root / f"benign ({number}).png")
    (root / "benign (3).png").write_bytes(b"text")
    assert datasets.main(["prepare", "busi", f"--manual_dir={source}", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if ".png: " in line]
    assert len(named) == 10 and "benign (3).png: is no DICOM, video or image file" in named[0]
    assert "benign (20).png: lesion image without a mask" in named[1]
    assert f"  list  {prepared / 'busi' / '2.0.0' / 'preparation.json'}" in lines


def test_strict_reads_again_and_stops(folders, capsys):
    source, _ = folders
    (source / "Dataset_BUSI_with_GT" / "malignant" / "malignant (1)_mask.png").unlink()
    assert datasets.main(["prepare", "busi", f"--manual_dir={source}", "--quiet"]) == 0
    assert "skipped 1: lesion image without a mask" in capsys.readouterr().out
    assert datasets.main(["prepare", "busi", f"--manual_dir={source}", "--quiet", "--strict"]) == 1
    assert "malignant (1).png: lesion image without a mask" in capsys.readouterr().err


def test_unknown_names_are_refused(folders):
    with pytest.raises(ValueError, match="'bus' is unknown; known are phantom, busi"):
        datasets.make_builder("bus")
    builder = datasets.prepare("busi", folders[0], progress=False)
    with pytest.raises(ValueError, match="split 'val' is unknown"):
        datasets.open_split(builder, "val")


def test_command_runs_without_tensorflow(folders):
    source, _ = folders
    code = (
        "import sys\nfrom dilbert_jax import datasets\n"
        f"assert datasets.main(['prepare', 'busi', '--manual_dir={source}', '--quiet']) == 0\n"
        "assert len(list(datasets.load_records('busi', 'test', progress=False))) >= 1\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
