"""Which side each item of the sources is on, and what is left out before it is ever turned into numbers.

    seen = examine(reading, data, prompts)         the doctor's look; refuses what is not worth a night
    for parcel in flow(readings, [seen], data): …      Parcel(side="train", item=…) or Parcel(reason="roles", facts=…)

The same sources give the same parcels in the same order, so that a preparation that was cut short can skip those done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Data
from maese.say import has, percent, say
from maese.text import split
from maese.text.audit import audit
from maese.text.convert import row_of
from maese.text.faults import faults_of
from maese.text.findings import Audit, Finding
from maese.text.read import Item, Reading
from maese.text.record import Document
from maese.text.survive import survivors

SIDES = ("train", "validation")


@dataclass
class Examined:
    """What the first look at a source found, as the second one needs it."""

    audit: Audit
    one_piece: bool  # a raw text, whose end is kept apart; else rows, dealt out by their hash
    lowest: float  # the lowest place of its rows


def examine(reading: Reading, data: Data, prompts: list[str]) -> Examined:
    """The doctor's look before anything is spent. Refuses a source with more faulty rows than the recipe tolerates."""
    lowest = [1.0]

    def held(item: Item) -> bool:
        item = reading.cleaned(item)  # the place is that of the text as it will be learnt
        place = split.place(item, data.group)
        if not faults_of(item):
            lowest[0] = min(lowest[0], place)
        return place <= data.validation

    one_piece = reading.one_piece
    found = audit(reading, held=None if one_piece else held, prompts=prompts)
    whole = {"encoding", "all_equal"} & {finding.kind for finding in found.findings}
    if not found.rows or whole or len(found.faulty) > data.tolerance * found.units:
        _refuse(reading, data, found)
    return Examined(found, one_piece, lowest[0])


def _refuse(reading: Reading, data: Data, found: Audit) -> None:
    """The error that says most: what the reader itself trips over, else the faults the doctor counted."""
    for _ in reading:
        pass
    errors = found.of("error")
    count = len(found.faulty) or found.units
    facts = {"path": reading.path, "count": count, "rows": found.units}
    if [finding.kind for finding in errors] == ["roles"]:
        raise MaeseError("DATA-06", **facts, line=errors[0].lines[0])
    names = "; ".join(_title(finding) for finding in errors[:3])
    share = {"share": percent(count / found.units), "tolerance": percent(data.tolerance)}
    raise MaeseError("DATA-13", **facts, **share, worst=names)


def _title(finding: Finding) -> str:
    keys = {label: f"finding.{finding.kind}.label.{label}" for label in finding.facts.get("labels", {})}
    labels = ", ".join(say(key) if has(key) else label for label, key in keys.items())
    return say(f"finding.{finding.kind}.title", **finding.facts | {"n": finding.count, "labels": labels})


def summary(found: Audit) -> dict[str, Any]:
    """An audit in the few figures that a run keeps."""
    kinds = [{"kind": f.kind, "severity": f.severity, "count": f.count} for f in found.findings]
    return {"path": found.path, "health": found.health, "rows": found.rows, "findings": kinds}


@dataclass
class _Dealt:
    """The good items of several sources, one after another, any number of times; `side`, `weight` and `source` are
    those of the item just given, and `out` holds the bad ones met on the way, with their reasons, until somebody takes
    them."""

    readings: list[Reading]
    examined: list[Examined]
    data: Data
    side: str = "train"
    weight: float = 1.0
    source: int = 0
    out: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def cut(self) -> float:
        """Up to which place rows are kept apart: one for all the sources, or a group could be on both sides."""
        lowest = min((seen.lowest for seen in self.examined if not seen.one_piece), default=1.0)
        return split.cut_at(self.data.validation, lowest)

    def __iter__(self) -> Iterator[Item]:
        self.out.clear()
        for number, (reading, seen) in enumerate(zip(self.readings, self.examined, strict=True)):
            self.source, reading.fault = number, self._meet
            for side, item in self._sided(reading, seen):
                self.side = side
                if faults := faults_of(item):
                    self.out.append((faults[0].kind, row_of(item) | {"id": item.id}))
                    continue
                self.weight = reading.source.weight if side == "train" else 1.0
                yield item

    def _sided(self, reading: Reading, seen: Examined) -> Iterator[tuple[str, Item]]:
        if not seen.one_piece:
            for item in reading:
                apart = bool(self.data.validation) and split.place(item, self.data.group) <= self.cut
                yield SIDES[apart], item
            return
        documents = [item for item in reading if isinstance(item, Document)]
        for side, part in zip(SIDES, split.tail(documents, self.data.validation), strict=True):
            yield from ((side, item) for item in part)

    def _meet(self, problem: MaeseError) -> None:
        self.out.append((problem.code, dict(problem.facts)))


@dataclass(frozen=True)
class Parcel:
    """One thing of the flow: an item with its side, or what was left out with its reason."""

    side: str = ""
    item: Item | None = None
    weight: float = 1.0  # times it is learnt in an epoch
    source: int = 0  # which of the sources it came from
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def flow(readings: list[Reading], examined: list[Examined], data: Data) -> Iterator[Parcel]:
    """Every item with its side and how many times it is learnt, or what is left out with its reason."""
    dealt = _Dealt(readings, examined, data)
    for item, why in survivors(dealt, list(data.clean), data.dedup == "near", data.dedup != "none"):
        yield from _left_out(dealt)
        if why:
            yield Parcel(reason=why, facts=row_of(item) | {"id": item.id}, source=dealt.source)
        else:
            yield Parcel(dealt.side, item, dealt.weight, dealt.source)
    yield from _left_out(dealt)


def _left_out(dealt: _Dealt) -> Iterator[Parcel]:
    while dealt.out:
        reason, facts = dealt.out.pop(0)
        yield Parcel(reason=reason, facts=facts, source=dealt.source)
