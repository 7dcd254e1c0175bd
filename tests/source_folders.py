"""Small generated folders in the layout of each data set, with its traps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def make_picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A textured picture, uint8 [H, W]; pictures of two seeds look nothing alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 220, (9, 11), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    return np.clip(smooth + rng.normal(0, 6, (height, width)), 0, 255).astype(np.uint8)


def save(picture: np.ndarray, path: Path, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).convert(mode).save(path)


def ellipse(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """bool [H, W], an ellipse that fills rows box[0]:box[2] and columns box[1]:box[3]."""
    y, x = np.mgrid[:height, :width] + 0.5
    top, left, bottom, right = box
    return ((y - (top + bottom) / 2) / ((bottom - top) / 2)) ** 2 + (
        (x - (left + right) / 2) / ((right - left) / 2)
    ) ** 2 <= 1


def make_busi(folder: Path) -> Path:
    """4 benign (one with two masks, one RGBA mask), 3 malignant (one equal to a benign one), 3 normal."""
    root = folder / "Dataset_BUSI_with_GT"
    lesion = ellipse(96, 128, (20, 40, 50, 90))
    second = ellipse(96, 128, (60, 10, 80, 30))
    for label, numbers in (("benign", (1, 2, 3, 4)), ("malignant", (1, 2, 3)), ("normal", (1, 2, 3))):
        for number in numbers:
            seed = 1 if (label, number) == ("malignant", 3) else hash_name(label, number)
            if (label, number) == ("benign", 1):
                seed = 1
            picture = make_picture(seed)
            if label != "normal":
                picture = np.where(lesion, picture // 4, picture).astype(np.uint8)
            save(picture, root / label / f"{label} ({number}).png", "RGB")
            mask = np.zeros_like(lesion) if label == "normal" else lesion
            mode = {("benign", 2): "RGBA", ("normal", 1): "RGB"}.get((label, number), "1")
            save(mask.astype(np.uint8) * 255, root / label / f"{label} ({number})_mask.png", mode)
    save(second.astype(np.uint8) * 255, root / "benign" / "benign (1)_mask_1.png", "1")
    return root


def hash_name(label: str, number: int) -> int:
    return 100 * sum(label.encode()) + number


USSS_TINTED = {"liver": (103, 2, 97), "kidney": (253, 255, 0), "background": (10, 0, 10)}


def make_usss(folder: Path) -> Path:
    """RUS: training subjects c (with a gap) and d, test subject a with a mask; AUS: 2 + 1 images."""
    root = folder / "abdominal_US" / "abdominal_US"
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12):
        save(make_picture(number), root / "RUS/images/train" / f"c{number}.jpg")
    for number in (1, 2, 3):
        save(make_picture(50 + number), root / "RUS/images/train" / f"d{number}.jpg")
    for number in (1, 2, 3):
        save(make_picture(70 + number), root / "RUS/images/test" / f"a{number}.jpg")
    # The same pixels in the training and the test split.
    data = (root / "RUS/images/test/a3.jpg").read_bytes()
    (root / "RUS/images/train/d4.jpg").write_bytes(data)
    mask = np.zeros((96, 128, 4), np.uint8)
    mask[..., :3], mask[..., 3] = USSS_TINTED["background"], 255
    mask[10:60, 20:80, :3] = USSS_TINTED["liver"]
    mask[30:50, 90:120, :3] = USSS_TINTED["kidney"]
    mask[10:60, 80, :3] = (60, 3, 58)  # an anti-aliased edge
    path = root / "RUS/annotations/test/a2.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(mask, "RGBA").save(path)
    Image.fromarray(mask, "RGBA").save(path.with_name("h100.png"))
    for split, names in (("train", ("ct2-1", "ct4-1")), ("test", ("ct1-9",))):
        for i, name in enumerate(names):
            save(make_picture(90 + i + 5 * len(names)), root / "AUS/images" / split / f"{name}.png", "RGB")
    return root


POCUS_HEADER = (
    "Filename,Label,License,Effusion,Consolidations,B-lines,A-lines,Pleural line irregularities,"
    "Air bronchogram,Healthy,Comments from web site,Comments first medical doctor (MD1),MD2,Length (frames)"
)


def make_pocus(folder: Path) -> Path:
    """Four clips and a still with rows in every style, and a row without a file."""
    data = folder / "data"
    for name, seed in (
        ("convex/Reg_pat1Image_1.gif", 1),
        ("convex/Reg_pat1Image_2.gif", 2),
        ("convex/Pneu_northumbria_0409_set1_vid1.GIF", 3),
        ("linear/Cov-Atlas+(45).gif", 4),
    ):
        path = data / "pocus_videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = [Image.fromarray(make_picture(10 * seed + i)).convert("RGBA") for i in range(5)]
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=100)
    save(make_picture(77), data / "pocus_images/convex/Vir_liftl_case2_still.JPG")
    rows = [
        'Reg_pat1Image_1.gif,Regular,None,0,0,0,1,0,0,1,,"normal\nlung",healthy,210',
        "Reg_pat1Image_2,regular,None,0,0,0,0,0,0,1,see filename,,,5",
        "Pneu_northumbria_0409_set1_vid1,Bacterial Pneumonia,CC BY,1,1,0,0,0,0,0,Effusion,,effusion,5",
        "Cov-Atlas+(45),COVID-19,,,,,,,,,B lines.,,,5",
        "Vir_liftl_case2_still.jpg,viral pneumonia,,0,1,1,0,0,0,0,,,Subpleural consolidation,1",
        "Cov-absent.mp4,COVID-19,,0,0,1,0,0,0,0,,,,30",
    ]
    (data / "dataset_metadata.csv").write_text("\n".join([POCUS_HEADER, *rows]) + "\n", encoding="utf-8")
    return data


KMVE_NODULE = (
    "甲状腺大小形态如常，左叶中段可见一低回声结节，大小约_3DS_，边界清晰。双侧颈部未见明显肿大淋巴结。"
)
KMVE_NORMAL = "甲状腺大小形态如常，腺体回声均匀，未见明确占位性病变。"


def make_kmve(folder: Path) -> Path:
    """Thyroid alone: 4 training and 2 val reports with images, 3 without; JSON with byte order mark."""
    data = folder / "Data"
    index: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}

    def add(part: str, uid: int, text: str, names: list[str]) -> None:
        index[part].append({"uid": uid, "finding": text, "image_path": names, "labels": 1, "split": part})

    for uid in (1, 2, 3, 4, 11, 12):
        text = KMVE_NODULE if uid % 2 else KMVE_NORMAL
        for k in (1, 2):
            save(make_picture(10 * uid + k), data / "Thyroid_report" / f"{uid}_{k}.jpeg", "RGB")
        names = [f"{uid}_1.jpeg", f"{uid}_2.jpeg"] if uid != 2 else ["2_1.jpeg", "2_1.jpeg"]
        add("val" if uid > 10 else "train", uid, text, names)
    for uid in (21, 22, 23):
        add("train", uid, KMVE_NORMAL, [f"{uid}_1.jpeg", f"{uid}_2.jpeg"])
    (data / "new_Thyroid2.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8-sig")
    return data


def make_clust(folder: Path, training: str = "TrainingSet") -> Path:
    """Four sequences of three subjects; each annotation file in another style; frames from 4 or 5 digits."""
    root = folder / training / "2D"
    styles = {
        "CIL-01": ("{:04d}", "{} {} {}"),
        "ETH-01-1": ("{:05d}", "{}\t{}\t{}"),
        "ETH-01-2": ("{:05d}", "{},{},{}"),
        "MED-02-1": ("{:d}", " {} ,  {} , {} "),
    }
    for i, (name, (digits, line)) in enumerate(styles.items()):
        for frame in range(1, 7):
            save(make_picture(20 * i + frame), root / name / "Data" / (digits.format(frame) + ".png"))
        lines = [line.format(f, 40.5 + f, 30 + 4 * f) for f in (1, 3, 6)]
        path = root / name / "Annotation" / f"{name}_1.txt"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root.parent / "resolution.csv").write_text("scan,res_x,res_y\nCIL-01,0.5,0.4\n", encoding="utf-8")
    return root


def make_export(folder: Path, studies: int = 8) -> Path:
    """A hospital export with PNG sequences and stills of four patients."""
    lines = []
    for i in range(studies):
        media = [f"clips/{i}_{k}.png" for k in range(2 if i % 2 else 1)]
        for k, name in enumerate(media):
            save(make_picture(10 * i + k), folder / name)
        study = {
            "study_id": f"s{i}",
            "patient_id": f"Private-{i // 2}",
            "media": media,
            "report": KMVE_NODULE if i % 2 else KMVE_NORMAL,
            "language": "zh",
            "organ": "thyroid",
        }
        if i == 1:
            study["regions"] = [{"media": 1, "frame": 0, "box": [0.1, 0.2, 0.5, 0.6], "organ": "lesion"}]
        lines.append(json.dumps(study, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.jsonl"
