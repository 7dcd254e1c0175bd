"""How concepts are put into English and Chinese sentences: the phrases that ``describe`` joins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dilbert_jax.knowledge.graph import KnowledgeGraph

ECHOGENICITY = (
    "anechoic",
    "markedly_hypoechoic",
    "hypoechoic",
    "isoechoic",
    "hyperechoic",
    "mixed_echogenicity",
)
NUMBER = ("single", "multiple")
_COUNTABLE = frozenset(
    [
        "cyst",
        "benign_lesion",
        "malignant_lesion",
        "fibroadenoma",
        "hemangioma",
        "hepatocellular_carcinoma",
        "thyroid_carcinoma",
        "goiter",
        "stone",
        "abscess",
        "hematoma",
        "nodule",
        "mass",
        "polyp",
        "lesion",
        "patchy_area",
        "halo",
        "thrombus",
        "punctate_echogenic_focus",
        "comet_tail_artifact",
        "septation",
    ]
)
_NUMERALS = dict(enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=2))
_IRREGULAR_PLURALS = {"punctate echogenic focus": "punctate echogenic foci", "thrombus": "thrombi"}
# Descriptors whose English name ends in one of these are said with "with", the others before the noun.
_NOUNS = frozenset(
    [
        "margin",
        "orientation",
        "echogenicity",
        "size",
        "shape",
        "echotexture",
        "contour",
        "caliber",
        "vascularity",
        "boundary",
        "differentiation",
        "edge",
        "layers",
    ]
)
# Chinese descriptors that read as a clause only behind 呈; size before a noun would read as another size.
_STATES = frozenset(
    [
        "round",
        "oval",
        "lobulated",
        "solid",
        "cystic",
        "mixed_composition",
        "spongiform",
        "parallel_orientation",
        "diffuse",
        "focal",
        "confluent",
        "punctate",
        "patchy",
    ]
)
_ECHO_STATES = frozenset(("homogeneous", "heterogeneous"))
# Chinese findings that are clauses themselves.
_CLAUSES = frozenset(("posterior_enhancement", "posterior_shadowing"))


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A focal finding with all that is said about it.

    Attributes:
      head: concept id of the finding.
      descriptors: concept ids that modify it.
      attachments: concept ids of findings at it (calcification, posterior shadowing).
      place: concept ids of sides and regions.
      count: how many; 0 when not counted.
      size: size in words, "" when unknown.
      frame_place: position in the image in words, "" when unknown.
    """

    head: str
    descriptors: tuple[str, ...] = ()
    attachments: tuple[str, ...] = ()
    place: tuple[str, ...] = ()
    count: int = 0
    size: str = ""
    frame_place: str = ""


def join_english(items: Sequence[str], conjunction: str = "and") -> str:
    """Joins items as "a", "a and b", "a, b and c"."""
    return f" {conjunction} ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def join_chinese(items: Sequence[str]) -> str:
    """Joins items as "a", "a及b", "a、b及c"."""
    return "及".join(["、".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def capitalize(sentence: str) -> str:
    """Upper-cases the first letter and leaves the rest."""
    return sentence[:1].upper() + sentence[1:]


def lower_first(sentence: str) -> str:
    """Undoes the capital behind a colon, except in names such as B-lines and COVID-19."""
    first = sentence.split(" ")[0]
    is_name = not first.isalpha() or (first.isupper() and len(first) > 1)
    return sentence if is_name else sentence[:1].lower() + sentence[1:]


def is_adjective(concept_id: str, graph: KnowledgeGraph) -> bool:
    """Tells whether a descriptor's English name stands before its noun."""
    return graph.name(concept_id, "en").split()[-1] not in _NOUNS


def with_article(concept_id: str, graph: KnowledgeGraph) -> str:
    """The English name with "a" or "an" where it is countable."""
    name = graph.name(concept_id, "en")
    return f"{_article(name)} {name}" if concept_id in _COUNTABLE else name


def place_english(place: Sequence[str], organ: str, graph: KnowledgeGraph) -> str:
    """ "in the left upper quadrant", "in the right lobe", "" without a place."""
    sides = [c for c in place if graph.concept(c).type == "descriptor"]
    areas = [c for c in place if graph.concept(c).type != "descriptor"]
    if not place:
        return ""
    words = " ".join(graph.name(c, "en") for c in sides)
    if areas:
        return f"in the {words} {join_english([graph.name(c, 'en') for c in areas])}".replace("  ", " ")
    if words.endswith("quadrant"):
        return f"in the {words}"
    quadrant = organ == "breast" and {"upper", "lower"} & set(sides)
    return f"in the {words} {'quadrant' if quadrant else 'part'}"


def place_chinese(place: Sequence[str], graph: KnowledgeGraph) -> str:
    """ "左侧上部", "右叶", "" without a place."""
    sides = ("left", "right", "bilateral")
    ordered = sorted(place, key=lambda c: (graph.concept(c).type != "descriptor", c not in sides))
    return "".join(graph.name(c, "zh") for c in ordered)


def lesion_english(lesion: Lesion, organ: str, graph: KnowledgeGraph) -> str:
    """One English sentence about a lesion."""
    many = lesion.count > 1 or "multiple" in lesion.descriptors
    adjectives = [c for c in lesion.descriptors if is_adjective(c, graph) and c not in NUMBER]
    adjectives.sort(key=lambda c: (c not in ("focal", "small_size", "large_size"), c not in ECHOGENICITY))
    nouns = [c for c in lesion.descriptors if c not in adjectives and c not in NUMBER]
    name = graph.name(lesion.head, "en")
    words = [graph.name(c, "en") for c in adjectives]
    number = [graph.name(c, "en") for c in NUMBER if c in lesion.descriptors]
    if lesion.count > 1:
        number = [*number, _NUMERALS.get(lesion.count, str(lesion.count))]
    phrase = " ".join(
        part for part in (" ".join(number), ", ".join(words), _plural(name) if many else name) if part
    )
    if not many and graph.concept(lesion.head).type in ("organ", "region") and lesion.head != "lesion":
        phrase = f"the {phrase}"
    elif not many and (lesion.head in _COUNTABLE or "single" in lesion.descriptors):
        phrase = f"{_article(phrase)} {phrase}"
    extras = [graph.name(c, "en") for c in (*nouns, *lesion.attachments)]
    if extras:
        phrase += f" with {join_english(extras)}"
    if lesion.size:
        phrase += f" measuring {lesion.size}"
    parts = (
        phrase,
        "are seen" if many or is_plural(name) else "is seen",
        place_english(lesion.place, organ, graph),
        lesion.frame_place,
    )
    return capitalize(" ".join(part for part in parts if part)) + "."


def lesion_chinese(lesion: Lesion, graph: KnowledgeGraph) -> str:
    """One Chinese sentence about a lesion."""
    if lesion.count > 1:
        number = f"{lesion.count}个"
    else:
        number = "" if set(NUMBER) & set(lesion.descriptors) or lesion.head not in _COUNTABLE else "一"
    number = (
        "".join("多个" if c == "multiple" else "单个" for c in NUMBER if c in lesion.descriptors) + number
    )
    echo = "".join(graph.name(c, "zh") for c in lesion.descriptors if c in ECHOGENICITY)
    clauses = [f"{place_chinese(lesion.place, graph)}可见{number}{echo}{graph.name(lesion.head, 'zh')}"]
    if lesion.frame_place:
        clauses.append(lesion.frame_place)
    if lesion.size:
        clauses.append(lesion.size)
    clauses += [
        clause_chinese(c, graph) for c in lesion.descriptors if c not in ECHOGENICITY and c not in NUMBER
    ]
    seen = [graph.name(c, "zh") for c in lesion.attachments if c not in _CLAUSES]
    if seen:
        clauses.append("可见" + join_chinese(seen))
    clauses += [graph.name(c, "zh") for c in lesion.attachments if c in _CLAUSES]
    return "，".join(clauses) + "。"


def clause_chinese(descriptor: str, graph: KnowledgeGraph) -> str:
    """A descriptor as a Chinese clause."""
    name = graph.name(descriptor, "zh")
    if descriptor in _STATES:
        return "呈" + name
    return "回声" + name if descriptor in _ECHO_STATES else name


def organ_english(organ: str, descriptors: Sequence[str], graph: KnowledgeGraph) -> str:
    """One English sentence about the organ as a whole."""
    adjectives = [graph.name(c, "en") for c in descriptors if is_adjective(c, graph)]
    nouns = [graph.name(c, "en") for c in descriptors if not is_adjective(c, graph)]
    name = graph.name(organ, "en")
    if not adjectives:
        return f"The {name} has {join_english(nouns)}."
    return f"The {name} is {join_english(adjectives)}{', with ' + join_english(nouns) if nouns else ''}."


def states_english(descriptors: Sequence[str], graph: KnowledgeGraph) -> str:
    """One English sentence of descriptors that belong to nothing named."""
    adjectives = [graph.name(c, "en") for c in descriptors if is_adjective(c, graph)]
    nouns = [graph.name(c, "en") for c in descriptors if not is_adjective(c, graph)]
    if not adjectives:
        return f"The image shows {join_english(nouns)}."
    return f"The appearance is {join_english(adjectives)}{', with ' + join_english(nouns) if nouns else ''}."


def states_chinese(descriptors: Sequence[str], graph: KnowledgeGraph) -> str:
    """One Chinese sentence of descriptors, of the organ as a whole or of nothing named."""
    echo = [c for c in descriptors if c in ECHOGENICITY]
    clauses = ["呈" + graph.name(c, "zh") for c in echo]
    return "，".join(clauses + [clause_chinese(c, graph) for c in descriptors if c not in echo]) + "。"


def is_plural(name: str) -> bool:
    """Tells whether an English name is plural already."""
    return name.endswith(("lines", "vessels", "layers"))


def _article(phrase: str) -> str:
    return "an" if phrase[:1].lower() in "aeiou" and not phrase.lower().startswith(("uni", "eu")) else "a"


def _plural(name: str) -> str:
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if is_plural(name):
        return name
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
