"""Annotating streams of clips and folders of files."""

import itertools
import json
import os
import types

import numpy as np
import pytest
from annotation_samples import CYST, make_prediction, with_buckets
from PIL import Image
from small_export import make_clip

from dilbert_jax import annotate
from dilbert_jax import annotation as annotation_module
from dilbert_jax.annotation import annotate_clips, build_visual, compiled_probabilities, predict
from dilbert_jax.media import Clip
from dilbert_jax.thresholds import Thresholds

# --- streams ----------------------------------------------------------------------------------------------


def make_clips(lengths):
    """Endlessly possible: clips named after their place in the stream."""
    for number, num_frames in enumerate(lengths):
        frames = np.random.default_rng(number).integers(0, 255, (num_frames, 30, 60)).astype(np.uint8)
        yield (
            Clip(frames, fps=None, pixel_spacing_mm=None, decoder="d", source=f"{number}.png"),
            f"{number:x}",
        )


def close(ours, theirs):
    """Equal dictionaries, but for the last of the four places of a number."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            close(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    else:
        assert ours == (pytest.approx(theirs, abs=1.01e-4) if isinstance(ours, float) else theirs)


LENGTHS = (1, 9, 3, 2, 4, 4, 1, 12)


@pytest.mark.numerics
def test_a_stream_gives_what_every_clip_gives_alone(experiment, params):
    context = with_buckets(experiment.context, 2)
    compiled_probabilities.cache_clear()

    def annotate(clips, batch_size):
        return list(
            annotate_clips(context, params, clips, Thresholds({}, {}), model={}, batch_size=batch_size)
        )

    together = annotate(make_clips(LENGTHS), 3)
    assert (
        compiled_probabilities(context.model)._cache_size() == 2
    )  # one a bucket, full and short batches alike
    alone = [annotation for clip in make_clips(LENGTHS) for annotation in annotate([clip], 1)]
    assert [a["source"]["file"] for a in together] == [f"{i}.png" for i in range(len(LENGTHS))]
    assert [a["source"]["sha256"] for a in together] == [f"{i:x}" for i in range(len(LENGTHS))]
    # Entities of equal score to four places may change places.
    for annotation in (*together, *alone):
        for name in ("findings", "entities"):
            annotation[name].sort(key=lambda entry: entry["id"])
    close(together, alone)
    assert annotate([], 3) == []


@pytest.mark.numerics
def test_a_prediction_is_the_same_alone_in_a_batch_and_in_another_bucket(experiment, params):
    context, short = experiment.context, with_buckets(experiment.context, 2)
    clips = [clip.frames for clip, _ in make_clips((1, 2, 2))]

    def run(context, clips):
        examples = [build_visual(context, frames)[0] for frames in clips]
        return predict(context, params, {name: np.stack([e[name] for e in examples]) for name in examples[0]})

    together = run(short, clips)
    for row, frames in enumerate(clips):
        for other in (run(short, [frames]), run(context, [frames])):
            for name, values in other.items():
                steps = slice(0, 1) if name == "frame_scores" else slice(None)
                np.testing.assert_allclose(
                    together[name][row][..., steps], values[0][..., steps], rtol=1e-5, atol=1e-5, err_msg=name
                )


@pytest.fixture
def batches(monkeypatch):
    """Replaces the network by one that answers at once; returns the shapes of the batches it was given."""
    shapes = []

    def fake(context, params, batch):
        del params
        count, length = batch["frame_mask"].shape
        shapes.append((count, length))
        row = make_prediction(context, CYST)
        row["frame_scores"] = row["frame_scores"][:, : length // context.spec.frames_per_step]
        return {name: np.stack([value] * count) for name, value in row.items()}

    monkeypatch.setattr(annotation_module, "predict", fake)
    return shapes


def test_a_rare_bucket_does_not_hold_up_an_endless_stream(experiment, batches):
    context, read = with_buckets(experiment.context, 2), 0

    def endless():
        nonlocal read
        for clip in make_clips(itertools.chain([4, 1], itertools.repeat(9))):
            read += 1
            yield clip

    stream = annotate_clips(context, None, endless(), Thresholds({}, {}), model={}, batch_size=3)
    for number in range(20):
        assert next(stream)["source"]["file"] == f"{number}.png"
        assert read - number <= 2 * 3  # clips read and not yielded, this one included
    assert batches.count((3, 2)) == 1 and set(batches) == {(3, 2), (3, 4)}


def test_full_batches_run_as_soon_as_they_are_full(experiment, batches):
    clips = make_clips([4] * 7)
    stream = annotate_clips(experiment.context, None, clips, Thresholds({}, {}), model={}, batch_size=3)
    assert next(stream)["source"]["file"] == "0.png"
    assert next(clips)[0].source == "3.png"  # no clip was read beyond the first batch
    assert [a["source"]["file"] for a in stream] == ["1.png", "2.png", "4.png", "5.png", "6.png"]
    assert batches == [(3, 4)] * 2
    with pytest.raises(ValueError, match="batch_size"):
        next(annotate_clips(experiment.context, None, clips, Thresholds({}, {}), model={}, batch_size=0))


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def annotated(experiment, batches, monkeypatch, tmp_path):
    """Runs the command with a network that answers at once; returns the exit status."""

    def stream(clips, batch_size):
        model = {"network": "student", "stage": "finetune", "step": 1, "dataset": "d"}
        return annotate_clips(
            experiment.context, None, clips, Thresholds({}, {}), model=model, batch_size=batch_size
        )

    def run(source, output):
        return annotate.main(["--workdir=none", f"--input={source}", f"--output={output}"])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotate, "Annotator", lambda *_: types.SimpleNamespace(annotate_stream=stream))
    return run


def write_still(path):
    Image.fromarray(make_clip("kidney", "stone", 1, 2)[0][0]).save(path)


def test_names_that_are_not_utf_8_are_annotated_like_all_others(annotated, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / os.fsdecode(b"out \xff")
    inbox.mkdir()
    names = [os.fsdecode(name) for name in (b"a.png", b"\xb9\xfa.png", b"\xd6\xd0.png")]
    for name in names:
        write_still(inbox / name)
    (inbox / os.fsdecode(b"\xd6\xd1.png")).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert annotated(inbox, out) == 1
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [e["file"] for e in summary] == [
        "a.png",
        r"\udcb9\udcfa.png",
        r"\udcd6\udcd0.png",
        r"\udcd6\udcd1.png",
    ]
    assert ["reason" in e for e in summary] == [False, False, False, True]
    assert summary[2]["href"] == r"\udcd6\udcd0.png/annotation.html"
    for name, entry in zip(names, summary, strict=False):
        page = json.loads((out / name / "annotation.json").read_text(encoding="utf-8"))
        assert page["source"]["file"] == entry["file"]
        assert entry["file"] in (out / name / "annotation.html").read_text(encoding="utf-8")
    index = (out / "index.html").read_text(encoding="utf-8")
    assert 'href="%D6%D0.png/annotation.html"' in index and r"\udcd6\udcd1.png" in index
    assert annotated(inbox / names[2], tmp_path / "alone") == 0


def test_files_that_are_no_clips_fail_when_their_names_say_that_they_are(annotated, tmp_path, capsys):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    write_still(inbox / "a.png")
    for name, content in {
        "empty.dcm": b"", "tiny.DCM": b"\0" * 100, "x.webp": b"RIFF1234WEBPVP8 ", "lost.mp4": b"ID3",
        "notes.txt": b"no clip", "table.csv": b"a,b", "labels.json": b"{}", "DICOMDIR": b"", ".a.png": b"", "DONE": b"",
    }.items():  # fmt: skip
        (inbox / name).write_bytes(content)
    assert annotated(inbox, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "1 of 5 annotated, 4 failed" in printed.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    reasons = {e["file"]: e["reason"] for e in summary if "reason" in e}
    assert reasons.keys() == {"empty.dcm", "tiny.DCM", "x.webp", "lost.mp4"}
    assert reasons["empty.dcm"] == "is empty (0 bytes)" and "of a known kind" in reasons["x.webp"]
    assert all(printed.err.count(f"{name}: {reason}") == 1 for name, reason in reasons.items())


@pytest.mark.parametrize("case", ["folder into itself", "file onto itself", "onto a file", "below a file"])
def test_an_output_that_is_a_file_is_refused_before_the_run_is_loaded(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotate, "Annotator", lambda *_: pytest.fail("the run was loaded"))
    (tmp_path / "inbox").mkdir()
    still, file = tmp_path / "inbox" / "a.png", tmp_path / "file"
    write_still(still)
    file.write_text("kept")
    source, output, named = {
        "folder into itself": (still.parent, still.parent, still),
        "file onto itself": (still, still, still),
        "onto a file": (still.parent, file, file),
        "below a file": (still, file / "out", file),
    }[case]
    content = still.read_bytes()
    assert annotate.main(["--workdir=none", f"--input={source}", f"--output={output}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {output}: {named} is a file") and error.count("\n") == 1
    assert still.read_bytes() == content and file.read_text() == "kept"


def test_an_output_inside_the_input_is_a_folder_like_any_other(annotated, tmp_path):
    write_still(tmp_path / "a.png")
    for _ in range(2):
        assert annotated(tmp_path, tmp_path / "annotations") == 0
