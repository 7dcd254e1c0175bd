"""Negation and uncertainty cues of ultrasound reports, and how far each reaches, in English and Chinese.

Everything works on folded text (``entities.fold_text``): lower case, ASCII punctuation, hyphens as spaces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

# Kinds of cue. "either" looks forward and, where nothing follows in the clause, backward.
_CUES = {
    "en": (
        # Longest first wherever two alternatives begin alike; the first of these groups that matches wins.
        (
            "ignore",
            r"no (?:significant |interval |obvious |appreciable )?(?:increase|change|decrease|further)"
            r"|not (?:only|necessarily|all|just)|without (?:difficulty|change)|no (?:doubt|comment)",
        ),
        (
            "uncertain_after",
            r"(?:(?:can ?not|could not|can't|couldn't) be|not|not be) (?:excluded|ruled out)"
            r"|(?:is |are |was |were )?(?:possible|suspected|questionable)(?= *(?:[.,;:!?\n)]|$))",
        ),
        (
            "uncertain_before",
            r"(?:can ?not|could not|can't|couldn't) (?:be sure about|be certain about|exclude|rule out|say)"
            r"|unable to (?:exclude|rule out|say)|rule out|r/o"
            r"|(?:not |un)sure about|suspicio(?:us|n) (?:for|of)|concern(?:ing)? for|question of"
            r"|suggest(?:s|ed|ing|ive of)?|consistent with|compatible with|in keeping with"
            r"|(?:may|might|could) (?:be|represent|reflect)|possibly|possible|presumed|suspected|questionable"
            r"|appears? to be|almost like",
        ),
        ("uncertain_either", r"probably|probable|likely|unlikely|maybe|perhaps"),
        (
            "absent_after",
            r"(?:is |are |was |were |has been |have been |can ?be )?(?:not|no longer|never) "
            r"(?:seen|identified|visuali[sz]ed|detected|evident|present|demonstrated|noted|appreciated|found"
            r"|observed|visible|shown|displayed)"
            r"|(?:cannot|could not|can't|couldn't) be (?:seen|identified|visuali[sz]ed|detected|shown|found)"
            r"|(?:(?:is|are|was|were|has been|have been) )?(?:ruled out|excluded)"
            r"|(?:is|are|was|were) (?:absent|negative|missing)"
            r"|(?:has|have|had|is|are|was|were)(?: (?:now|since|completely|fully|entirely))* resolved",
        ),
        (
            "absent_before",
            r"no (?:definite |clear |obvious |sonographic )?(?:evidence|signs?|suspicion) (?:of|for)"
            r"|negative for|(?:free|absence|lack|loss|devoid|instead) of|rather than|rules out|excludes?"
            r"|(?:unable|fails?|failed) to (?:identify|see|visuali[sz]e|detect|find|show|demonstrate|appreciate)"
            r"|without|w/o|neither|nor|not|no|never|denies|cannot"
            r"|(?:would|does|do|did|is|are|was|were|has|have|can|could)n't",
        ),
        ("absent_either", r"absent|negative"),
    ),
    "zh": (
        (
            "ignore",
            r"超声(?:诊断|检查)?提示"  # the heading of the impression
            r"|无(?:明显|显著)?(?:变化|改变|差异)|无法|无症状|无痛|无特殊|无名|肋(?:缘)?下未(?:触)?及|不全|不等|不均|未见好转",
        ),
        (
            "uncertain_either",
            r"不能(?:完全)?(?:除外|排除)|不(?:除外|排除)|不能确定|待(?:排除|除外|排|查)|可能性(?:较?大|小|高)?|可能|除外",
        ),
        ("uncertain_before", r"考虑|疑似|可疑|怀疑|疑|倾向(?:于)?|提示|似(?:见|为|呈)|或为"),
        (
            "absent_after",
            r"(?:未能?(?:见显示|见|探及|显示|发现|检出)|未看[到见]|看不[到见]|阴性|消失|缺如|不明显|已排除)"
            r"(?= *(?:[,。;:!?\n)]|$))",
        ),
        (
            "absent_before",
            r"未[再能]?(?:见到|见及|见|探及|探查到|探测到|显示|发现|检出|检测到|扪及|触及|记录到|引出|及|查见|示|伴|出现|看到|看见|提示)"
            r"|看不[到见]|不支持|不考虑|没有|不伴(?:有)?|无|否认|排除|并非",
        ),
        ("absent_touching", r"不|非|未"),
    ),
}
# Punctuation that speaks about what precedes it.
_MARKS = (
    r"|(?P<absent_answer>: *(?:no|none|absent|negative|无|未见)(?= *(?:[.,;!?\n。]|$)))"
    r"|(?P<uncertain_mark>\?)"
)
_PATTERN = {
    language: re.compile(
        "|".join(
            f"(?P<{kind}>{rf'(?<![a-z0-9])(?:{words})(?![a-z0-9])' if language == 'en' else words})"
            for kind, words in groups
        )
        + _MARKS
    )
    for language, groups in _CUES.items()
}
_SENTENCE_END = {
    "en": re.compile(r"[;!?\n:。()]|\.(?!\d)"),
    "zh": re.compile(r"[。;!?\n:,()]|\.(?!\d)"),
}
_STOP = {
    "en": re.compile(
        r"\b(?:but|however|although|though|except|apart from|aside from|which|because"
        r"|due to|secondary to|next to|and (?:a|an|multiple|some|few|several|many|numerous|lots of|there|the"
        r"|mild|minimal|moderate|normal)"
        r"|with (?:a|an|multiple|some|few|several|normal))\b"
    ),
    "zh": re.compile(
        r"可见|可探及|(?<!未)探及|(?<!未)见(?=[一多数少])|呈|但|而(?!移)|(?<!不)伴|考虑|提示|(?<!显)(?<!未)示"
    ),
}
# Where a clause read backwards begins anew.
_RESTART = {
    "en": re.compile(r"\b(?:is|are|was|were|shows?|but|however|although|and an?|seen|has|have)\b"),
    "zh": re.compile(r"可见|可探及|(?<!未)见|呈|但|(?<!不)伴|(?<!显)(?<!未)示|考虑"),
}
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|shows?|seen|noted|there|but|with|without|w/o|no|neither|measur\w+|demonstrat\w+|appears?|moves?)\b"
)
_OWN_VERB = re.compile(r"\b(?:is|are|was|were|seems?|appears?) +(?:\w+ly +)?$")
_CLOSING_VERB = re.compile(
    r"\b(?:is|are|was|were)(?: \w+){0,2} *$|\b(?:seen|noted|identified|detected|present) *$"
)


@dataclasses.dataclass(frozen=True)
class Cue:
    """A cue and the stretch of text it speaks about.

    Attributes:
      status: "absent" or "uncertain".
      begin, end: the cue's own characters.
      reach: (begin, end) of the characters it speaks about.
      forward: True when its reach lies behind the cue in reading order.
    """

    status: str
    begin: int
    end: int
    reach: tuple[int, int]
    forward: bool


def find_cues(text: str, language: str, spans: Sequence[tuple[int, int]]) -> list[Cue]:
    """Finds negation and uncertainty cues and their reach.

    Args:
      text: folded report.
      language: "en" or "zh".
      spans: (begin, end) of the entities; a cue inside a name (无回声, "not enlarged") is none.

    Returns:
      Cues in reading order.
    """
    named = bytearray(len(text))
    for begin, end in spans:
        named[begin:end] = b"\x01" * (end - begin)
    cues = []
    for match in _PATTERN[language].finditer(text):
        kind = str(match.lastgroup)
        begin, end = match.span()
        if kind == "ignore" or any(named[begin:end]):
            continue
        status, _, direction = kind.partition("_")
        if direction == "touching":
            stop = next((e for b, e in spans if b == end), end)
            cues.append(Cue(status, begin, end, (end, stop), True))
            continue
        ahead = (end, _forward_end(text, end, language))
        forward = direction == "before" or (
            direction == "either" and any(ahead[0] <= b < ahead[1] for b, _ in spans)
        )
        reach = ahead if forward else (_backward_begin(text, begin, language), begin)
        if direction == "mark":
            before = [b for b, e in spans if e <= begin and not text[e:begin].strip()]
            reach = (before[-1] if before else begin, begin)
        cues.append(Cue(status, begin, end, reach, forward))
    return cues


def _forward_end(text: str, begin: int, language: str) -> int:
    match = _SENTENCE_END[language].search(text, begin)
    end = match.start() if match else len(text)
    if language == "en":
        end = _list_end(text, begin, end)
    stop = _STOP[language].search(text, begin, end)
    return stop.start() if stop else end


def _list_end(text: str, begin: int, end: int) -> int:
    """End of "A, B or C" after a cue; the first comma where the commas separate no such list."""
    parts = text[begin:end].split(",")
    cursor = begin + len(parts[0])
    first = cursor
    if _VERB.search(parts[0]):
        return first
    for part in parts[1:]:
        cursor += 1 + len(part)
        listed = re.search(r"\b(?:or|nor)\b", part)
        if _VERB.search(_CLOSING_VERB.sub("", part)):
            return first
        if listed:
            return cursor
    return first


def _backward_begin(text: str, end: int, language: str) -> int:
    begin = 0
    for match in _SENTENCE_END[language].finditer(text, 0, end):
        begin = match.end()
    if language == "en":
        parts = text[begin:end].split(",")
        is_list = re.search(r"\b(?:and|or)\b", parts[-1]) and not any(
            _VERB.search(part) for part in parts[:-1]
        )
        if len(parts) > 1 and not is_list:
            begin = end - len(parts[-1])
    # The verb of the cue's own sentence ("a cyst is | unlikely") is no new beginning.
    tail = _OWN_VERB.search(text[:end], begin)
    for match in _RESTART[language].finditer(text, begin, tail.start() if tail else end):
        begin = match.end()
    return begin
