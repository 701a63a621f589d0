"""From a recipe's sources to the examples the loop will see, and the facts of everything that was done on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Data
from maese.text import read, split
from maese.text.record import Note
from maese.tokens.template import Example, render

# A corpus far shorter than this teaches nothing that could be told from noise.
FEWEST_ROWS = 2


@dataclass
class Prepared:
    train: list[Example]
    validation: list[Example]
    format: str
    facts: dict[str, Any]
    notes: list[Note]


def prepare(data: Data, tokenizer: Any, longest: int) -> Prepared:
    """Read, split, render, and settle what is too long. `longest` is the context of the model, in tokens.

    Errors: those of `text.read`; DATA-07 (sources of different shapes), DATA-09 (rows too long), DATA-10 (too little
    text), BATCH-01 (max_length beyond the context of the model).
    """
    if data.max_length > longest:
        raise MaeseError("BATCH-01", found=data.max_length, longest=longest)
    readings = [read.read(source, data.format) for source in data.sources]
    shapes = {reading.format for reading in readings}
    if len(shapes) > 1:
        first, other = readings[0], next(r for r in readings if r.format != readings[0].format)
        raise MaeseError("DATA-07", path=first.path, format=first.format, other=other.path, other_format=other.format)
    kind = shapes.pop()
    dropped: Counter[str] = Counter()
    divided = _divide(readings, data.validation)
    sides = [[render(item, tokenizer, data.loss) for item in side] for side in divided]
    _refuse_long([*sides[0], *sides[1]], data)
    train, validation = (list(_settle(rows, data, dropped)) for rows in sides)
    if len(train) < FEWEST_ROWS or (data.validation and not validation):
        needed = FEWEST_ROWS + int(data.validation > 0)
        found = sum(len(row) for row in train + validation)
        raise MaeseError("DATA-10", rows=len(train) + len(validation), tokens=found, needed=needed)
    facts = {
        "format": kind,
        "sources": [reading.facts() for reading in readings],
        "split": "tail" if kind == "text" else "hash",
        "dropped": dict(dropped),
        "train": _count(train),
        "validation": _count(validation),
        "ids_sha256": _hash(train + validation),
    }
    return Prepared(train, validation, kind, facts, [note for reading in readings for note in reading.notes])


def _divide(readings: list[read.Reading], share: float):
    train: list = []
    held: list = []
    for reading in readings:
        sides = (
            split.tail(reading.documents, share) if reading.documents else split.by_hash(reading.conversations, share)
        )
        train += sides[0]
        held += sides[1]
    return train, held


def _refuse_long(rows: list[Example], data: Data) -> None:
    """DATA-09 over everything there is: the length it proposes must fit what is kept apart too."""
    long = [row for row in rows if len(row) > data.max_length]
    if long and data.too_long == "error":
        longest = max(long, key=len)
        facts = {"longest": len(longest), "where": longest.id}
        raise MaeseError("DATA-09", count=len(long), total=len(rows), limit=data.max_length, **facts)


def _settle(rows: list[Example], data: Data, dropped: Counter[str]):
    """Rows that fit, by the recipe's choice: error, drop, truncate (the end token stays) or split (raw text)."""
    limit = data.max_length
    for row in rows:
        if not row.targets:
            dropped["nothing_to_learn"] += 1
        elif len(row) <= limit:
            yield row
        elif data.too_long == "drop":
            dropped["too_long"] += 1
        elif data.too_long == "truncate" and not any(row.mask[: limit - 1]):
            # The question alone fills the row: only its end would be learnt, in the middle of a word.
            dropped["nothing_to_learn"] += 1
        elif data.too_long == "truncate":
            cut = Example([*row.ids[: limit - 1], row.ids[-1]], [*row.mask[: limit - 1], row.mask[-1]], row.id)
            dropped["truncated"] += 1
            yield cut
        else:
            for start in range(0, len(row), limit):
                ids, mask = row.ids[start : start + limit], [0, *row.mask[start + 1 : start + limit]]
                if any(mask):  # a piece of a question alone has nothing to be learnt from
                    yield Example(ids, mask, f"{row.id}@{start}")


def _hash(rows: list[Example]) -> str:
    """What is learnt, down to the last id: two runs with the same hash see the same numbers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.ids}{row.mask}".encode())
    return digest.hexdigest()


def _count(rows: list[Example]) -> dict[str, int]:
    return {"rows": len(rows), "tokens": sum(map(len, rows)), "targets": sum(row.targets for row in rows)}
