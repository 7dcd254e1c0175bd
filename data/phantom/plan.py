"""What is decided about a study before any pixel: organ, condition, lesion descriptors, motion."""

from __future__ import annotations

import dataclasses

import numpy as np

ORGANS = ("breast", "thyroid", "liver", "gallbladder", "pancreas", "spleen", "kidney")
LINEAR_ORGANS = ("breast", "thyroid")

# Shares of the conditions within an organ; each occurs where a sonographer would meet it.
CONDITIONS: dict[str, dict[str, float]] = {
    "breast": {"normal": 0.28, "cyst": 0.22, "benign_lesion": 0.25, "malignant_lesion": 0.25},
    "thyroid": {
        "normal": 0.28,
        "cyst": 0.15,
        "benign_lesion": 0.20,
        "malignant_lesion": 0.20,
        "diffuse_disease": 0.17,
    },
    "liver": {
        "normal": 0.30,
        "cyst": 0.17,
        "benign_lesion": 0.17,
        "malignant_lesion": 0.18,
        "diffuse_disease": 0.18,
    },
    "gallbladder": {"normal": 0.30, "stone": 0.40, "benign_lesion": 0.15, "malignant_lesion": 0.15},
    "pancreas": {"normal": 0.32, "cyst": 0.18, "malignant_lesion": 0.25, "diffuse_disease": 0.25},
    "spleen": {
        "normal": 0.34,
        "cyst": 0.18,
        "benign_lesion": 0.13,
        "malignant_lesion": 0.12,
        "diffuse_disease": 0.23,
    },
    "kidney": {
        "normal": 0.25,
        "cyst": 0.15,
        "stone": 0.25,
        "benign_lesion": 0.10,
        "malignant_lesion": 0.13,
        "diffuse_disease": 0.12,
    },
}
# A mass or a nodule, as reports of that organ call it.
LESION_WORD = {
    "breast": "mass",
    "thyroid": "nodule",
    "liver": "nodule",
    "gallbladder": "nodule",
    "pancreas": "mass",
    "spleen": "nodule",
    "kidney": "mass",
}
ECHO_DB = {"anechoic": -38.0, "hypoechoic": -13.0, "isoechoic": -2.0, "hyperechoic": 10.5}


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A focal lesion by its BI-RADS / TI-RADS descriptors.

    Attributes:
      kind: condition id.
      radius: mm, mean radius in the plane of its largest section.
      aspect: height over width.
      echogenicity, shape, margin: descriptor ids.
      orientation: descriptor id; "" where the skin is no reference (abdominal organs).
      posterior: finding id or "".
      heterogeneous, calcified: whether drawn so.
      elevation: mm, where along the sweep its center lies.
      place: random numbers in [0, 1] that choose its site within the organ.
    """

    kind: str
    radius: float
    aspect: float
    echogenicity: str
    shape: str
    margin: str
    orientation: str
    posterior: str
    heterogeneous: bool
    calcified: bool
    elevation: float
    place: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """Everything decided about a study.

    Attributes:
      organ, condition: concept ids.
      language: of the report.
      side: "left", "right" or "" for unpaired organs.
      lesions: the focal lesions, at most three (stones).
      pulsation: whether the main vessel pulsates; None where the layout has none.
      sliding: whether the organ slides under the abdominal wall; None where breathing does not move it.
      free_fluid: whether there is fluid next to the organ in part of the sweep.
      wall_thickening, duct_dilatation: as drawn.
    """

    organ: str
    condition: str
    language: str
    side: str
    lesions: tuple[Lesion, ...]
    pulsation: bool | None
    sliding: bool | None
    free_fluid: bool
    wall_thickening: bool
    duct_dilatation: bool

    @property
    def findings(self) -> tuple[str, ...]:
        """Sorted ids of the findings and descriptors that are present."""
        found: set[str] = set()
        for flag, name in (
            (self.pulsation, "pulsation"),
            (self.sliding, "sliding"),
            (self.sliding is False, "reduced_sliding"),
            (self.free_fluid, "free_fluid"),
            (self.wall_thickening, "wall_thickening"),
            (self.duct_dilatation, "duct_dilatation"),
        ):
            if flag:
                found.add(name)
        for lesion in self.lesions:
            if lesion.posterior:
                found.add(lesion.posterior)
            if lesion.kind == "stone":
                found.add("hyperechoic")
                continue
            if lesion.kind != "cyst":
                found.add(LESION_WORD[self.organ])
            found |= {lesion.echogenicity, lesion.shape, lesion.margin, lesion.orientation} - {""}
            if lesion.heterogeneous:
                found.add("heterogeneous")
            if lesion.calcified:
                found.add("calcification")
        if self.condition == "diffuse_disease":
            found |= set(DIFFUSE_SIGNS[self.organ])
        return tuple(sorted(found))


DIFFUSE_SIGNS = {
    "thyroid": ("enlarged", "heterogeneous", "hypoechoic"),
    "liver": ("enlarged", "hyperechoic"),
    "pancreas": ("heterogeneous", "hyperechoic"),
    "spleen": ("enlarged",),
    "kidney": ("hyperechoic",),
}


def study_count(patient_index: int) -> int:
    """Every third patient comes twice."""
    return 2 if patient_index % 3 == 2 else 1


def assign(seed: int, patient_index: int, study_index: int) -> tuple[str, str]:
    """Chooses organ and condition so that any run of patients is close to the shares of ``CONDITIONS``.

    Args:
      seed: of the data set.
      patient_index: >= 0.
      study_index: 0, or 1 for a second visit: every other time the same view again, else another organ.

    Returns:
      Organ id and condition id.
    """
    block, member = divmod(patient_index, len(ORGANS))
    order = np.random.default_rng([seed, 11, block]).permutation(len(ORGANS))
    organ = ORGANS[order[member]]
    offsets = np.random.default_rng([seed, 12]).random((2, len(ORGANS)))
    if study_index and patient_index % 6 == 2:
        study_index = 0
    elif study_index:
        organ = ORGANS[(order[member] + 1 + block % (len(ORGANS) - 1)) % len(ORGANS)]
    # A golden-ratio sequence fills [0, 1) evenly however many patients there are.
    level = (offsets[study_index, ORGANS.index(organ)] + 0.618033988749895 * (block + 1)) % 1
    shares = CONDITIONS[organ]
    edges = np.cumsum(list(shares.values())) / sum(shares.values())
    return organ, list(shares)[int(np.searchsorted(edges, level, side="right"))]


def draw_plan(organ: str, condition: str, language: str, reach: float, rng: np.random.Generator) -> StudyPlan:
    """Draws the details of a study.

    Args:
      organ, condition: concept ids; the pair must be in ``CONDITIONS``.
      language: "en" or "zh".
      reach: mm, the sweep runs from -reach to +reach in elevation.
      rng: of this study.

    Returns:
      The plan.
    """
    abdominal = organ not in LINEAR_ORGANS
    malignant = condition == "malignant_lesion"
    lesions: tuple[Lesion, ...] = ()
    if condition not in ("normal", "diffuse_disease"):
        count = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])) if condition == "stone" else 1
        lesions = tuple(_draw_lesion(organ, condition, reach, rng) for _ in range(count))
    return StudyPlan(
        organ=organ,
        condition=condition,
        language=language,
        side=str(rng.choice(["left", "right"])) if organ in ("breast", "thyroid", "kidney") else "",
        lesions=lesions,
        pulsation=bool(rng.random() < 0.5) if organ != "breast" else None,
        sliding=bool(rng.random() < 0.58) if abdominal else None,
        free_fluid=bool(abdominal and rng.random() < (0.3 if malignant else 0.14)),
        wall_thickening=bool(
            organ == "gallbladder"
            and rng.random() < (0.4 if condition in ("stone", "malignant_lesion") else 0.1)
        ),
        duct_dilatation=bool(organ == "pancreas" and rng.random() < (0.6 if malignant else 0.12)),
    )


def _draw_lesion(organ: str, kind: str, reach: float, rng: np.random.Generator) -> Lesion:
    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def pick(options: dict[str, float]) -> str:
        shares = np.asarray(list(options.values()))
        return str(rng.choice(list(options), p=shares / shares.sum()))

    low, high = {
        "breast": (4.8, 8.4),
        "thyroid": (5.0, 8.2),
        "gallbladder": (7.0, 9.5),
        "pancreas": (9.5, 14.0),
    }.get(organ, (10.5, 17.0))
    posterior, calcified, heterogeneous = "", False, False
    if kind == "cyst":
        echogenicity = pick({"anechoic": 0.82, "hypoechoic": 0.18})
        shape, margin = (
            pick({"round": 0.5, "oval": 0.5}),
            pick({"circumscribed_margin": 0.93, "indistinct_margin": 0.07}),
        )
        posterior = "posterior_enhancement" if chance(0.9) else ""
    elif kind == "stone":
        low, high = (5.0, 8.5) if organ == "gallbladder" else (5.0, 8.0)
        echogenicity, shape, margin = "hyperechoic", "oval", "circumscribed_margin"
        posterior = "posterior_shadowing"
    elif kind == "benign_lesion":
        bright = {"liver": 0.55, "kidney": 0.7, "spleen": 0.5, "gallbladder": 0.5}.get(organ, 0.15)
        echogenicity = pick({"hyperechoic": bright, "isoechoic": 0.15, "hypoechoic": 0.85 - bright})
        shape = pick({"oval": 0.6, "round": 0.28, "irregular": 0.12})
        margin = pick({"circumscribed_margin": 0.82, "indistinct_margin": 0.18})
        posterior = pick({"": 0.72, "posterior_enhancement": 0.2, "posterior_shadowing": 0.08})
        calcified, heterogeneous = chance(0.08), chance(0.15)
    else:
        echogenicity = pick({"hypoechoic": 0.82, "isoechoic": 0.1, "hyperechoic": 0.08})
        shape = pick({"irregular": 0.8, "oval": 0.12, "round": 0.08})
        spiculated = 0.45 if organ in LINEAR_ORGANS else 0.0  # a word of breast and thyroid reports
        margin = pick(
            {
                "spiculated_margin": spiculated,
                "indistinct_margin": 0.85 - spiculated,
                "circumscribed_margin": 0.15,
            }
        )
        posterior = pick({"posterior_shadowing": 0.55, "": 0.38, "posterior_enhancement": 0.07})
        calcified, heterogeneous = chance(0.45), chance(0.55)
        high *= 1.1
    tall = shape != "round" and chance({"malignant_lesion": 0.55, "benign_lesion": 0.1}.get(kind, 0.05))
    if shape == "round":
        aspect = rng.uniform(0.9, 0.99)
    elif tall:
        aspect = rng.uniform(1.25, 1.55)
    else:
        aspect = rng.uniform(0.6, 0.8)
    return Lesion(
        kind=kind,
        radius=float(rng.uniform(low, high)),
        aspect=float(aspect),
        echogenicity=echogenicity,
        shape=shape,
        margin=margin,
        orientation=("taller_than_wide" if tall else "parallel_orientation")
        if organ in LINEAR_ORGANS
        else "",
        posterior=posterior,
        heterogeneous=heterogeneous,
        calcified=calcified,
        elevation=float(rng.uniform(-0.55, 0.55) * reach),
        place=(float(rng.random()), float(rng.random())),
    )
