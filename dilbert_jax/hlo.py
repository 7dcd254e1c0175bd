"""Reads what a compiled TPU program says of itself: its cycles, and what crosses between chips how often."""

from __future__ import annotations

import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations=\{|branch_computations=\{)=?([^,)}]*(?:, ?%[\w.\-]+)*)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= [su]32\[\][^=]* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(.*?\), channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: what one chip sends, over all its runs.
      count: how often it runs.
    """

    kind: str
    bytes: float
    count: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes: `cycles` by the compiler's own estimate, each loop as often as it runs; `collectives`."""

    cycles: float
    collectives: tuple[Collective, ...]


def read_program(text: str) -> Program:
    """Reads a compiled program.

    Args:
      text: `compiled.as_text()` of a program for TPUs.

    Raises:
      ValueError: no entry computation, or a loop whose number of rounds is not to be seen.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    if not entry:
        raise ValueError("the text holds no ENTRY computation; give it compiled.as_text()")

    times: dict[str, int] = {}  # how often a computation runs, for those that hold instructions of their own
    everywhere: dict[str, int] = {}  # with the insides of fusions

    def visit(name: str, count: int, inside_fusion: bool) -> None:
        everywhere[name] = everywhere.get(name, 0) + count
        if not inside_fusion:
            times[name] = times.get(name, 0) + count
        for line in computations[name]:
            loop = _WHILE.search(line)
            if loop:
                visit(loop[2], count * _rounds(computations[loop[1]], line), inside_fusion)
                continue
            fused = inside_fusion or " fusion(" in line
            for called in _CALLED.findall(line):
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in computations:
                        visit(callee, count, fused)

    visit(entry, 1, False)
    cycles = sum(
        count * int(found[1])
        for name, count in times.items()
        for line in computations[name]
        if (found := _CYCLES.search(line))
    )
    # One exchange appears in several fusions: where it starts, where it goes on beside other work, where it ends.
    exchanges: dict[tuple[str, str], Collective] = {}
    for name, count in everywhere.items():
        for line in computations[name]:
            found = _COLLECTIVE.search(line)
            if found:
                shape, kind, starts, channel = found.groups()
                # An all-reduce that starts names its results alone.
                size: float = _size(shape, bool(starts) and kind != "all-reduce")
                group = _group_size(line)
                if name.startswith("all-reduce-scatter"):
                    # It reads as an all-reduce of which each chip keeps its part. They all have the same channel.
                    kind, size, channel = "reduce-scatter", size / group, name
                sent = _sent(kind, size, group)
                key = kind, channel
                if key not in exchanges or exchanges[key].bytes < sent * count:
                    exchanges[key] = Collective(kind, sent * count, count)
    return Program(float(cycles), tuple(exchanges.values()))


def _rounds(condition: list[str], loop: str) -> int:
    """Rounds of a loop that counts from 0: the constant that its condition compares with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
    constants = [int(c[1]) for line in condition if (c := _CONSTANT.search(line))]
    if known:
        return int(known[1])
    if len(constants) != 1:
        raise ValueError(f"no single bound in the condition of the loop {loop.split('=')[0].strip()}")
    return constants[0]


def _size(shape: str, starts: bool) -> int:
    """Bytes of a result; that of an asynchronous start holds its operands first."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dims or not starts  # the start of a permutation holds two counters too
    ]
    return sum(sizes[len(sizes) // 2 :] if starts else sizes)


def _group_size(line: str) -> int:
    """Chips of one group."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    return 2  # a permutation names pairs


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes that a chip sends, in the schemes that use every link equally.

    Args:
      size: bytes of the result.
    """
    share = (group - 1) / group
    factor = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": group - 1, "all-to-all": share}
    return size * factor.get(kind, 1.0)
