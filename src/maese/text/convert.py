"""Any source to one shape, and one file to two sides: new files, the old one as it was.

    convert(Source(path="a.csv", map={"prompt": "pregunta", "completion": "respuesta"}), Path("a.jsonl"))
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "autor": "…"}

Other columns travel along, so that a later `data.group` still finds the author.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Source
from maese.run import disk
from maese.text import split, streams
from maese.text.faults import SURROGATE
from maese.text.read import Item, open_source
from maese.text.record import Document
from maese.text.rows import rows
from maese.text.shape import item_of, mapped, shape_of, unknown
from maese.text.trees import pairs


def row_of(item: Item) -> dict[str, Any]:
    """An item as one line of JSONL: `text`, or `messages`, and the columns it came with."""
    rest = {key: value for key, value in item.meta.items() if key != "line"}
    if isinstance(item, Document):
        return {"text": item.text} | rest
    return {"messages": [{"role": m.role, "content": m.content} for m in item.messages]} | rest


def convert(source: Source, output: Path) -> int:
    """Write every row as `messages` (or `text`) and return how many. Rows of a file may each have their own shape.

    Errors: those of reading, and RUN-01 when the new file exists.
    """
    return _write({output: (row_of(item) for item in _each(source))})[output]


def _each(source: Source) -> Iterator[Item]:
    """Each row by its own shape, for files where `open_source` would ask for one."""
    places = streams.pieces(source.name) if source.path is not None else []
    if not places or any(piece.suffix in streams.TEXTS for piece in places):
        yield from open_source(source)
        return

    def stop(problem: MaeseError) -> None:
        if problem.code != "DATA-02":  # what is written is UTF-8, whatever was read
            raise problem

    for piece in places:
        for line, row in pairs(rows(piece, stop)):
            named = mapped(row, source.map)
            shape = shape_of(named)
            if shape is None:
                raise unknown(row, piece.name, line)
            yield item_of(named, shape, piece.name, line)


def divide(source: Source, share: float, group: str | None, outputs: tuple[Path, Path]) -> tuple[int, int]:
    """Write what is learnt and what is kept apart as two files; the side of a row is the one training would give it."""
    train, held = outputs
    reading = open_source(source)
    if reading.one_piece:
        learnt, kept = split.tail([item for item in reading if isinstance(item, Document)], share)
        counts = _write({train: map(row_of, learnt), held: map(row_of, kept)})
        return counts[train], counts[held]
    items = [(split.place(item, group), item) for item in reading]
    cut = split.cut_at(share, min(place for place, _ in items))
    sides = {train: (row_of(x) for p, x in items if p > cut), held: (row_of(x) for p, x in items if p <= cut)}
    counts = _write(sides)
    return counts[train], counts[held]


def line_of(row: dict[str, Any]) -> str:
    """A row as JSON; half a character, which is no text that a file can hold, stays spelt `\\ud83d`."""
    line = json.dumps(row, ensure_ascii=False)
    return line if line.isascii() or not SURROGATE.search(line) else json.dumps(row)


def _write(files: Mapping[Path, Iterable[dict[str, Any]]]) -> dict[Path, int]:
    """Rows to JSONL, each file whole or not there at all."""
    counts = dict.fromkeys(files, 0)
    for path in files:
        if path.exists():
            raise MaeseError("RUN-01", path=str(path), free=str(path.with_stem(f"{path.stem}-2")))
    for path, found in files.items():
        draft = path.with_name(f".{path.name}.part")
        with ExitStack() as stack:
            stack.callback(draft.unlink, missing_ok=True)
            with disk(path), draft.open("w", encoding="utf-8") as out:
                for row in found:
                    out.write(line_of(row) + "\n")
                    counts[path] += 1
            draft.replace(path)
    return counts
