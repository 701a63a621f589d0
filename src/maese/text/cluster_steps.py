"""The cleaning of one machine as steps of datatrove, for many: shards in, kept and dropped rows out.

    stage 1, a task a shard   [ReadShards(files), Rules(["length"]), Signatures(output)]      notes of each row
    stage 2, one task         [Join(output)]                                                  what repeats what
    stage 3, a task a shard   [ReadShards(files), Keep(output)]                               kept/ and dropped/

Rows are read by the same reader, judged by the same rules and compared by the same signatures as in `survivors`, so
the same ones stay. Nothing else imports this file: datatrove is an optional part.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document as Row
from datatrove.io import DataFolder, get_datafolder
from datatrove.pipeline.base import PipelineStep

from maese.errors import MaeseError
from maese.recipe import Source
from maese.text.clean import reason
from maese.text.convert import row_of
from maese.text.dedup import Duplicates, exact_key, signatures, text_runs, whole
from maese.text.read import open_source
from maese.text.streams import ROWS, TEXTS, suffix_of

SIGNED_AT_ONCE = 1000  # rows


def shards(sources: list[str]) -> list[str]:
    """The files behind paths, folders and patterns (`data/*.jsonl.gz`), in the order that decides which row stays:
    that of the list and, within one of its entries, of name. Errors: DATA-01, DATA-05."""
    files: list[str] = []
    for source in sources:
        if Path(source).is_dir():
            inside = (str(p) for p in sorted(Path(source).rglob("*")) if p.is_file() and not p.name.startswith("."))
            files += [name for name in inside if suffix_of(name) in (*ROWS, *TEXTS)]
        elif Path(source).is_file():
            files.append(source)
        elif not (found := sorted(glob.glob(source, recursive=True))):
            raise MaeseError("DATA-01", path=source, folder=str(Path(source).parent.absolute()), nearest="data/*.jsonl")
        else:
            files += found
    if not files:
        raise MaeseError("DATA-05", path=sources[0])
    return list(dict.fromkeys(files))


class ReadShards(PipelineStep):
    """Each task reads its files, every so many of the list. A row that cannot be read goes on with its reason (the
    code of the error) instead of disappearing."""

    type, name = "📖 - READER", "maese"

    def __init__(self, files: list[str], format: str = "auto") -> None:
        super().__init__()
        self.files, self.format = files, format

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        for shard in range(rank, len(self.files), world_size):
            faults: list[MaeseError] = []
            reading = open_source(Source(path=self.files[shard]), self.format, on_fault=faults.append)
            facts = {"shard": shard, "path": self.files[shard], "sha256": reading.sha256}
            for item in reading:
                yield from _unread(faults, facts)
                self.stat_update("read")
                yield Row(whole(item), item.id, metadata={**facts, "item": item, "reason": None})
            yield from _unread(faults, facts)


def _unread(faults: list[MaeseError], facts: dict[str, Any]) -> Iterator[Row]:
    while faults:
        fault = faults.pop(0)
        place = f"{fault.facts.get('path', facts['path'])}#{fault.facts.get('line', '')}"
        yield Row("", place, metadata={**facts, "item": None, "reason": fault.code})


class Rules(PipelineStep):
    """Note the first reason that the rules give for leaving a row out."""

    type, name = "🔻 - FILTER", "maese rules"

    def __init__(self, rules: list[str]) -> None:
        super().__init__()
        self.rules = rules

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        for row in data:
            if row.metadata["reason"] is None:
                row.metadata["reason"] = reason(row.metadata["item"], self.rules)
            yield row


class Signatures(PipelineStep):
    """Write what the join needs of each shard: a line a row (`id`, `reason`, `key`) and, for `near`, the signature of
    the first row with each key."""

    type, name = "🫂 - DEDUP", "maese signatures"

    def __init__(self, output: str, near: bool = True) -> None:
        super().__init__()
        self.output, self.near = output, near

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        folder = get_datafolder(self.output)
        for shard, rows in _by_shard(data):
            seen, runs, signed = set[str](), list[Any](), list[Any]()
            with folder.open(_notes(shard), "wt", encoding="utf-8") as notes:
                for row in rows:
                    key = None
                    if row.metadata["reason"] is None:
                        key = exact_key(row.text)
                        if self.near and key not in seen:
                            runs.append(text_runs(row.text))
                        seen.add(key)
                    if len(runs) >= SIGNED_AT_ONCE:
                        signed, runs = [*signed, signatures(runs)], []
                    line = {"id": row.id, "reason": row.metadata["reason"], "key": key, "of": row.metadata["sha256"]}
                    notes.write(json.dumps(line) + "\n")
                    yield row
            if self.near:
                _save(folder, shard, [*signed, *([signatures(runs)] if runs else [])])


class Join(PipelineStep):
    """Put the notes of all shards together, in order, and write what becomes of each row. One task; it holds about
    1.2 kB of memory for each different text (0.6 without `near`)."""

    type, name = "🎯 - DEDUP", "maese join"

    def __init__(self, output: str, shards: int, near: bool = True) -> None:
        super().__init__()
        self.output, self.shards, self.near = output, shards, near

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        folder, seen = get_datafolder(self.output), Duplicates(self.near)
        names: dict[str, str] = {}
        present = [shard for shard in range(self.shards) if folder.exists(_notes(shard))]
        for shard in present:
            signed, new = iter(_load(folder, shard) if self.near else ()), set[str]()
            for place, note in enumerate(_read(folder, shard)):
                if note["key"] is not None:
                    signature = next(signed) if self.near and note["key"] not in new else None
                    new.add(note["key"])
                    names[f"{shard}:{place}"] = note["id"]
                    seen.add_known(f"{shard}:{place}", note["key"], signature)
        repeated, stays = seen.reasons(), seen.dropped()
        total = Counter[str]()
        for shard in present:
            with folder.open(_fates(shard), "wt", encoding="utf-8") as fates:
                for place, note in enumerate(_read(folder, shard)):
                    here = f"{shard}:{place}"
                    why = note["reason"] or repeated.get(here)
                    same_as = names[stays[here]] if here in stays else None
                    fates.write(json.dumps({"reason": why, "same_as": same_as, "of": note["of"]}) + "\n")
                    total[why or "kept"] += 1
        self.stat_update(*total)
        with folder.open("summary.json", "wt", encoding="utf-8") as out:
            json.dump({"rows": total.total(), **dict(sorted(total.items()))}, out, indent=2)


class Keep(PipelineStep):
    """Write each shard again in two: `kept/00000.jsonl.gz`, ready to train on, and `dropped/00000.jsonl`, each row
    with its reason. Error: DATA-14, when a file is no longer the one that was judged."""

    type, name = "💽 - WRITER", "maese keep"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        folder = get_datafolder(self.output)
        for shard, rows in _by_shard(data):
            fates = _read(folder, shard, _fates)
            with (
                folder.open(f"kept/{shard:05d}.jsonl.gz", "wb", compression="gzip") as kept,
                folder.open(f"dropped/{shard:05d}.jsonl", "wb") as dropped,
            ):
                for row in rows:
                    fate = next(fates, {"of": None})
                    if fate["of"] != row.metadata["sha256"]:
                        raise MaeseError("DATA-14", path=row.metadata["path"])
                    item = row.metadata["item"]
                    written = row_of(item) if item else {}
                    if fate["reason"] is None:
                        kept.write(_line(written))
                        yield row
                    else:
                        same = {"same_as": fate["same_as"]} if fate["same_as"] else {}
                        dropped.write(_line({"id": row.id, "reason": fate["reason"], **same, "row": written}))
                    self.stat_update(fate["reason"] or "kept")


def _by_shard(rows: Iterator[Row]) -> Iterator[tuple[int, Iterator[Row]]]:
    from itertools import groupby

    return groupby(rows, lambda row: row.metadata["shard"])


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()


def _notes(shard: int) -> str:
    return f"notes/{shard:05d}.jsonl"


def _fates(shard: int) -> str:
    return f"fates/{shard:05d}.jsonl"


def _read(folder: DataFolder, shard: int, name: Any = _notes) -> Iterator[dict[str, Any]]:
    with folder.open(name(shard), "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _save(folder: DataFolder, shard: int, parts: list[Any]) -> None:
    import numpy as np

    with folder.open(f"notes/{shard:05d}.npy", "wb") as out:
        np.save(out, np.concatenate(parts) if parts else np.empty((0, 0), np.uint32))


def _load(folder: DataFolder, shard: int) -> Any:
    import numpy as np

    with folder.open(f"notes/{shard:05d}.npy", "rb") as stream:
        return np.load(stream)
