"""A generated hospital export of 24 patients that trains in seconds: what the end-to-end tests run on."""

from __future__ import annotations

import json
from pathlib import Path

import av
import ml_collections
import numpy as np
import pytest
from PIL import Image
from source_folders import ellipse, make_picture, save
from tiny import tiny_run_config

from dilbert_jax.experiment import Experiment, open_experiment
from dilbert_jax.run import train_and_report

HEIGHT, WIDTH = 40, 48
ORGANS, CONDITIONS = ("liver", "kidney"), ("normal", "cyst", "stone")
FINDINGS = {"normal": (), "cyst": ("anechoic", "posterior_enhancement"), "stone": ("posterior_shadowing",)}
NAMES = {
    "liver": ("Liver", "肝脏"),
    "kidney": ("Kidney", "肾脏"),
}
REPORTS = {
    "normal": (
        "{organ} of normal size, homogeneous echotexture. No mass.",
        "{organ}大小正常，回声均匀。未见肿块。",
    ),
    "cyst": (
        "{organ}: anechoic cyst of {size} mm with posterior enhancement.",
        "{organ}内见无回声囊肿，大小{size}mm，后方回声增强。",
    ),
    "stone": (
        "{organ}: hyperechoic stone of {size} mm with posterior shadowing.",
        "{organ}内见强回声结石，大小{size}mm，后方声影。",
    ),
}


def make_clip(organ: str, condition: str, num_frames: int, seed: int) -> tuple[np.ndarray, list[list[float]]]:
    """Frames uint8 [T, 40, 48], and the lesion's box in each frame (none for a normal organ).

    Livers are bright and even, kidneys dark with a bright rim; a cyst is a black disc, a stone a white one
    above a shadow. The lesion moves to the right.
    """
    base = make_picture(seed, HEIGHT, WIDTH) * (0.5 if organ == "liver" else 0.2)
    if organ == "kidney":
        rim = ellipse(HEIGHT, WIDTH, (2, 2, 38, 46)) & ~ellipse(HEIGHT, WIDTH, (6, 6, 34, 42))
        base = np.where(rim, 200, base)
    frames, boxes = [], []
    for t in range(num_frames):
        frame = base.copy()
        if condition != "normal":
            left = 10 + seed % 7 + t
            box = (12, left, 26, left + 14)
            disc = ellipse(HEIGHT, WIDTH, box)
            if condition == "stone":
                frame[26:, left : left + 14] = 0
            frame[disc] = 0 if condition == "cyst" else 255
            boxes.append([box[0] / HEIGHT, box[1] / WIDTH, box[2] / HEIGHT, box[3] / WIDTH])
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return np.stack(frames), boxes


def write_mp4(path: Path, frames: np.ndarray, rate: int = 20) -> Path:
    """Writes uint8 [T, H, W] with even sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def make_small_export(folder: Path) -> Path:
    """Writes 28 studies of 24 patients: stills, GIFs and mp4s, reports in both languages, some boxes.

    Every sixth patient has two studies; one study has no report. The splits hold 14, 7 and 7 studies, with
    each organ and condition in all of them. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for patient in range(24):
        for _ in range(2 if patient % 6 == 0 else 1):
            organ, condition = ORGANS[patient % 2], CONDITIONS[patient // 2 % 3]
            number = len(lines)
            num_frames = (4, 5, 12)[number % 3]
            frames, boxes = make_clip(organ, condition, num_frames, seed=number)
            if number % 3 == 0:
                media = [f"stills/{number}/{t}.png" for t in range(num_frames)]
                for name, frame in zip(media, frames, strict=True):
                    save(frame, folder / name)
                places = [(t, 0) for t in range(num_frames)]
            elif number % 3 == 1:
                media = [f"{number}.gif"]
                first, *rest = (Image.fromarray(frame) for frame in frames)
                first.save(folder / media[0], save_all=True, append_images=rest, duration=50)
                places = [(0, t) for t in range(num_frames)]
            else:
                media = [f"{number}.mp4"]
                write_mp4(folder / media[0], frames)
                places = []
            chinese = number % 4 < 2
            report = REPORTS[condition][chinese].format(organ=NAMES[organ][chinese], size=10 + number)
            study = {
                "study_id": f"study{number:02d}",
                "patient_id": f"patient {patient}",
                "media": media,
                "report": "" if number == 5 else report,
                "language": "zh" if chinese else "en",
                "organ": organ,
                "condition": condition,
                "findings": list(FINDINGS[condition]),
                "regions": [
                    {"media": m, "frame": f, "box": box, "organ": "lesion"}
                    for (m, f), box in zip(places, boxes, strict=False)
                ],
                "split": "train" if patient < 12 else "validation" if patient < 18 else "test",
            }
            lines.append(json.dumps(study, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


_shared: dict[str, Path] = {}


def shared_config(factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    """The tiny configuration on the export, which is written once a session."""
    if "root" not in _shared:
        _shared["root"] = factory.mktemp("small_export")
        make_small_export(_shared["root"] / "export")
    root = _shared["root"]
    config = tiny_run_config(
        name="ahjuui", manual_dir=str(root / "export"), data_dir=str(root / "prepared"), min_entity_count=2
    )
    config.model.num_layers = 1  # compiling dominates
    # Batches no larger than the validation set, whose loss then needs no programs of its own.
    config.train.update(batch_size=4, teacher_epochs=1.0, student_epochs=1.0)
    config.train.update(mutual_epochs=1.5, finetune_epochs=8.0)
    config.evaluate.mask_repeats = 8
    return config


def shared_experiment(factory: pytest.TempPathFactory) -> Experiment:
    """An untrained run on the export, for what only needs its data."""
    config = shared_config(factory)
    return open_experiment(config, _shared["root"] / "untrained")


def shared_run(factory: pytest.TempPathFactory) -> tuple[ml_collections.ConfigDict, Path]:
    """Trains and evaluates the tiny configuration once a session; tests change only copies of its workdir."""
    config = shared_config(factory)
    workdir = _shared["root"] / "run"
    if not (workdir / "complete.json").exists():
        # The compilation cache of the commands goes here, not to the user's.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(_shared["root"] / "cache"))
            train_and_report(config, workdir, command="python train.py --config=tiny.py")
    return config, workdir
