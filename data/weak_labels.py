"""Weak labels: condition and findings read from a report, for sources that state none."""

from __future__ import annotations

from dilbert_jax.knowledge import KnowledgeGraph, extract_entities, load_graph
from dilbert_jax.knowledge.entities import STATUSES

# Descriptors that a report uses for lesions and abnormal tissue rather than for what is ordinary.
LESION_DESCRIPTORS = (
    "anechoic",
    "hypoechoic",
    "isoechoic",
    "hyperechoic",
    "mixed_echogenicity",
    "heterogeneous",
    "irregular",
    "circumscribed_margin",
    "indistinct_margin",
    "spiculated_margin",
    "taller_than_wide",
    "cystic",
    "solid",
    "enlarged",
)
# Present, these say nothing about disease.
NEUTRAL_FINDINGS = frozenset(
    {
        "a_lines",
        "architectural_distortion",  # nine in ten of the breast reports at hand say it of healthy glands
        "gas_interference",
        "good_sound_transmission",
        "poor_visualization",
        "positional_mobility",
        "pulsation",
        "respiratory_motion",
        "sliding",
        "vascularity",
    }
)
_MALIGNANT = {"malignant_lesion", "metastasis", "hepatocellular_carcinoma", "thyroid_carcinoma"}
_SOLID = {
    "hypoechoic",
    "markedly_hypoechoic",
    "isoechoic",
    "hyperechoic",
    "mixed_echogenicity",
    "mixed_composition",
    "solid",
}
# Present, these stand for something that the lexicon may not name; "heterogeneous" is said of healthy glands too.
_NOT_NORMAL = (set(LESION_DESCRIPTORS) | _SOLID | {"focal", "lesion", "poor_visualization"}) - {
    "heterogeneous"
}
_LOBES = {"left_lobe", "right_lobe"}
_DIFFUSE = {
    "liver": {
        "fine_bright_echotexture",
        "coarse_echotexture",
        "hepatorenal_contrast",
        "fatty_liver",
        "cirrhosis",
    },
    "thyroid": {"coarse_echotexture", "reticular_pattern", "reduced_echogenicity", "thyroiditis", "goiter"},
}


def label_report(
    text: str, language: str, organ: str, graph: KnowledgeGraph | None = None
) -> tuple[str, tuple[str, ...]]:
    """Reads weak labels from a report.

    Findings are what the text says is present. The condition is the first that applies of:

    1. a stated malignancy, unless resected;
    2. ``stone``: stated, or a mobile hyperechoic focus with shadow;
    3. ``nodule``; or ``cyst`` when it is anechoic or cystic and nothing solid is described;
    4. any other stated condition except resection;
    5. ``diffuse_disease``, by the echotexture of liver or thyroid;
    6. ``post_resection``;
    7. ``normal`` when the report says so (a denied finding, normal size, ...) and nothing else: no finding but
       neutral ones, no lesion, no doubt, no organ unseen; else unknown.

    Args:
      text: the report; an empty one gives no labels.
      language: "en" or "zh".
      organ: concept id; the diffuse rule depends on it.
      graph: the knowledge graph; by default the packaged one.

    Returns:
      (condition, findings): a concept id (``nodule`` is a finding that stands for a nodule of undetermined
      nature) or "", and sorted concept ids of findings and lesion descriptors.
    """
    graph = graph or load_graph()
    if not text.strip():
        return "", ()
    held: dict[str, set[str]] = {status: set() for status in STATUSES}
    for entity in extract_entities(text, language, graph):
        held[entity.status].add(entity.concept)
    present = held["present"]
    findings = {c for c in present if graph.concepts[c].type == "finding"}
    stated = {c for c in present if graph.concepts[c].type == "condition"} - {"normal", "post_resection"}
    kept = tuple(sorted(findings | (present & set(LESION_DESCRIPTORS))))
    focal = bool(present & {"nodule", "mass"})
    fluid = bool(present & {"anechoic", "cystic", "cyst"})
    if "post_resection" in present:
        stated -= _MALIGNANT  # the reason of an operation, not what is seen now
    if stated & _MALIGNANT:
        return "malignant_lesion", kept
    if "stone" in stated or {"hyperechoic", "posterior_shadowing", "positional_mobility"} <= present:
        return "stone", kept
    if focal and not (fluid and not present & _SOLID):
        return "nodule", kept
    if fluid:
        return "cyst", kept
    diffuse = _DIFFUSE.get(organ, set())
    if stated - diffuse:
        return min(stated - diffuse), kept
    if present & diffuse:
        return "diffuse_disease", kept
    if "post_resection" in present:
        return "post_resection", kept
    return ("normal" if _says_normal(held, graph) else ""), kept


def _says_normal(held: dict[str, set[str]], graph: KnowledgeGraph) -> bool:
    """Whether a report without a stated condition calls what it saw normal; silence is no finding of health."""

    def disease(status: str) -> set[str]:
        found = {
            c for c in held[status] if graph.concepts[c].type in ("finding", "condition") or c == "lesion"
        }
        return found - NEUTRAL_FINDINGS - {"normal"}

    unseen = {c for c in held["absent"] if graph.concepts[c].type == "organ"} | held["absent"] & _LOBES
    if unseen or "normal" in held["absent"] | held["uncertain"]:
        return False
    if disease("present") or disease("uncertain") or held["present"] & _NOT_NORMAL:
        return False
    # "Without calcification" may be said of a lesion; "no mass" is said of the organ.
    denied = {c for c in disease("absent") if not graph.relation_types(c, "nodule")}
    return bool(denied or "enlarged" in held["absent"]) or any(
        c.startswith("normal") for c in held["present"]
    )
