"""The sources of a recipe, each in a file of its own with only what is worth learning, and how much that is.

    data, counts = gather(recipe.data, Path("runs/mini/data/pretrain"))
    counts[0]      {"source": "libros/", "read": 812, "train": 700, "validation": 36, "duplicate": 61, "length": 15, …}

What follows (a tokenizer, a training, another one) reads those files, and need not clean again: `data` is the recipe's
own with those files for sources. A row falls on the side it would have fallen on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from maese.recipe import Data
from maese.run import disk
from maese.text import read
from maese.text.convert import line_of, row_of
from maese.text.deal import Parcel, examine, flow
from maese.text.read import Reading, letters, texts_of
from maese.text.record import Document

Progress = Callable[[int], object]


def gather(data: Data, folder: Path, progress: Progress | None = None) -> tuple[Data, list[dict[str, Any]]]:
    """Write `data`'s sources to `folder`, cleaned and without repetitions; returns what reads them, and the counts.

    Errors: those of reading; DATA-06 and DATA-13 (too many faulty rows).
    """
    readings = [read.open_source(source, data.format) for source in data.sources]
    examined = [examine(reading, data, []) for reading in readings]
    paths = [folder / _name(number, reading) for number, reading in enumerate(readings, 1)]
    counts = [Counter[str]() for _ in readings]
    with disk(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in paths]
        for done, parcel in enumerate(flow(readings, examined, data), 1):
            # The end of a book, kept apart, is of the book that was read.
            counts[parcel.source]["read"] += not (readings[parcel.source].one_piece and parcel.side == "validation")
            if parcel.item is None:
                counts[parcel.source][parcel.reason] += 1
                continue
            counts[parcel.source][parcel.side] += 1
            counts[parcel.source]["characters"] += letters(parcel.item)
            _write(files[parcel.source], parcel, readings[parcel.source].one_piece)
            if progress:
                progress(done)
    sources = [
        source.model_copy(update={"path": str(path), "hub": None, "limit": None, "map": {}, "where": {}})
        for source, path in zip(data.sources, paths, strict=True)
        if path.stat().st_size
    ]
    facts = [{"source": r.path, "weight": r.source.weight, **c} for r, c in zip(readings, counts, strict=True)]
    return data.model_copy(
        update={"sources": sources, "clean": [], "dedup": "none", "format": _format(readings)}
    ), facts


def parcels(data: Data) -> Iterator[Parcel]:
    """Every item of a recipe's sources with its side, or what is left out with its reason."""
    readings = [read.open_source(source, data.format) for source in data.sources]
    yield from flow(readings, [examine(reading, data, []) for reading in readings], data)


def learnt(data: Data) -> Iterator[str]:
    """The texts of a recipe that will be learnt, once each: what a tokenizer may look at."""
    for parcel in parcels(data):
        if parcel.item is not None and parcel.side == "train":
            yield from texts_of(parcel.item)


def _format(readings: list[Reading]) -> Any:
    """Conversations are all written as messages, whatever they came as."""
    return "text" if readings[0].kind == "text" else "messages"


def _name(number: int, reading: Reading) -> str:
    """`1-quijote.txt`, `2-cuentos.jsonl`: a raw text stays one, as its end is what is kept apart."""
    stem = Path(reading.path).name.split(".")[0] or "text"
    return f"{number}-{stem}.{'txt' if reading.one_piece else 'jsonl'}"


def _write(file: TextIO, parcel: Parcel, as_text: bool) -> None:
    if as_text and isinstance(parcel.item, Document):
        file.write(parcel.item.text + "\n")
    elif parcel.item is not None:
        file.write(line_of(row_of(parcel.item)) + "\n")
