"""A source of the recipe to documents or conversations, as they come.

    reading = open_source(Source(path="tutor.jsonl.gz"))     reading.format == "messages", found by looking
    for item in reading: …                                   Conversation(…, id="tutor.jsonl.gz#1", meta={"line": 1})

A raw text is one document; question blocks (`###`, `Pregunta:`, `Respuesta:`), JSON, CSV and parquet are one record a
row. Only a book is held whole; rows flow.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Source, at_home
from maese.text import streams
from maese.text.hub import hub_rows
from maese.text.record import Conversation, Document, Message, Note
from maese.text.repair import (
    GUTENBERG_END,
    GUTENBERG_START,
    MOJIBAKE,
    decode,
    fixed_name,
    normalise,
    strip_gutenberg,
)
from maese.text.rows import BOM, Fault, lines, rows
from maese.text.shape import item_of, mapped, shape_of, unknown
from maese.text.trees import pairs

MARK = "###"
QUESTION, ANSWER = re.compile(r"^\s*pregunta\s*:\s*", re.I), re.compile(r"^\s*respuesta\s*:\s*", re.I)
# A raw text longer than this is learnt in documents of about this many characters, each ending at a line.
LONGEST_DOCUMENT = 8 * 2**20

Item = Document | Conversation


@dataclass
class Reading:
    """A source that can be read any number of times; what was seen on the way is in `facts()` afterwards."""

    source: Source
    format: str
    sha256: str
    size: int
    stamp: tuple = ()  # sizes and times of its files, taken before the hash: what comes later is another file
    fault: Fault | None = None
    raw: bool = False  # leave every character as it is: for the doctor, who judges them
    items: int = 0
    characters: int = 0
    notes: list[Note] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> str:
        return self.source.name

    @property
    def kind(self) -> str:
        return "text" if self.format == "text" else "chat"

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._counted()
        except MaeseError as problem:
            raise of_source(problem, self.path) from None

    def _counted(self) -> Iterator[Item]:
        self.items = self.characters = 0
        self._seen.clear()
        for item in itertools.islice(self._items(), None if self._limits_itself else self.source.limit):
            self.items += 1
            self.characters += (
                len(item.text) if isinstance(item, Document) else sum(len(m.content) for m in item.messages)
            )
            yield item
        if self.stamp != _stamp(self.source):
            raise MaeseError("DATA-14", path=self.path)
        if not self.items and self.fault is None:
            raise MaeseError("DATA-05", path=self.path)
        self.notes = [*_once(self.notes), *_tally(self._seen, self.path)]

    @property
    def one_piece(self) -> bool:
        """Whether it is one raw text, whose end is kept apart, and not rows that a hash can deal out."""
        if self.format != "text" or self.source.path is None:
            return False
        inside = streams.pieces(self.path)
        return len(inside) == 1 and inside[0].suffix in streams.TEXTS

    @property
    def _limits_itself(self) -> bool:
        """Whether `limit` counts the lines of raw texts; else it counts items."""
        if self.format != "text" or self.source.documents != "file" or self.source.path is None:
            return False
        return all(piece.suffix in streams.TEXTS for piece in streams.pieces(self.path))

    def cleaned(self, item: Item) -> Item:
        """An item as training sees it, when this reading is the doctor's."""
        return replace(self, raw=False)._clean(item)

    def facts(self) -> dict[str, Any]:
        return {
            "path": self.path, "format": self.format, "sha256": self.sha256, "bytes": self.size,
            "documents": self.items, "characters": self.characters, "notes": [list(note) for note in self.notes],
        }  # fmt: skip

    def _items(self) -> Iterator[Item]:
        if self.source.hub is not None:
            yield from self._from_rows(hub_rows(self.source), self.path)
            return
        self._room = self.source.limit
        for piece in streams.pieces(self.path):
            if piece.suffix not in streams.TEXTS:
                yield from self._from_rows(rows(piece, self._meet), piece.name)
            elif self.format == "qa":
                with piece.open() as stream:
                    yield from map(self._clean, blocks(lines(stream, piece.name, self._meet), piece.name, self._meet))
            else:
                yield from self._raw_text(piece)

    def _meet(self, problem: MaeseError) -> None:
        if self.fault is None:
            raise problem
        self.fault(problem)

    def _from_rows(self, found: Iterable[tuple[int, dict[str, Any]]], name: str) -> Iterator[Item]:
        wanted = self.source.where.items()
        for line, row in pairs(found):
            if any(str(row.get(column)) != value for column, value in wanted):
                continue
            try:
                item = item_of(mapped(row, self.source.map), self.format, name, line)
            except MaeseError as problem:
                self._meet(problem)
                continue
            yield self._clean(item)

    def _clean(self, item: Item) -> Item:
        """Line ends, accents and control characters as in a raw text; how many rows needed it is noted once."""
        if self.raw:
            return item
        if isinstance(item, Document):
            return replace(item, text=self._mended(item.text))
        return replace(item, messages=tuple(Message(m.role, self._mended(m.content)) for m in item.messages))

    def _mended(self, text: str) -> str:
        if text.isascii() and text.isprintable():
            return text
        notes: list[Note] = []
        clean = normalise(text, notes)[0]
        for key, facts in notes:
            self._seen[key] += int(facts.get("count", 1))
        return clean

    def _raw_text(self, piece: streams.Piece) -> Iterator[Document]:
        """A text as one document, or one a line; `limit` counts lines that say something."""
        long = piece.packed or piece.size > LONGEST_DOCUMENT  # of a packed one the size is not known
        if long and self.source.documents == "file" and not self.source.limit:
            yield from self._long_text(piece)
            return
        with piece.open() as stream:
            if self.raw:
                text, notes = "\n".join(line for _, line in lines(stream, piece.name, self._meet)), list[Note]()
            else:
                text, notes = decode(stream.read(), piece.name)
        body, notes = strip_gutenberg(text, notes)
        self.notes += notes
        before = text.count("\n", 0, max(0, text.find(body[:500])))
        if self._limits_itself and self._room is not None:
            body, used = first_lines(body, self._room)
            self._room -= used
        yield from documents(body, self.source.documents, piece.name, before)

    def _long_text(self, piece: streams.Piece) -> Iterator[Document]:
        with piece.open() as stream:
            marked = bool(GUTENBERG_START.search(stream.read(2**17).decode("utf-8", errors="replace")))
        with piece.open() as stream:
            part: list[str] = []
            length = start = 0
            for number, line in lines(stream, piece.name, self._meet):
                if marked:  # up to here it is the licence's header
                    marked = not GUTENBERG_START.match(line)
                    continue
                if GUTENBERG_END.match(line):
                    break
                if not self.raw and not line.isascii() and (broken := MOJIBAKE.search(line)):
                    facts = {"line": number, "count": 1, "sample": line[broken.start() :][:12]}
                    raise MaeseError("DATA-11", path=piece.name, fixed=fixed_name(piece.name), **facts)
                if not part and not line.strip():
                    continue
                start = start or number
                part.append(line)
                length += len(line) + 1
                if length >= LONGEST_DOCUMENT:
                    yield Document(self._clean_text(part), f"{piece.name}#{start}", {"line": start})
                    part, length, start = [], 0, 0
            if any(line.strip() for line in part):
                yield Document(self._clean_text(part), f"{piece.name}#{start}", {"line": start})

    def _clean_text(self, part: list[str]) -> str:
        text = "\n".join(part).strip()
        return text if self.raw else self._mended(text)


def _once(notes: list[Note]) -> list[Note]:
    """Read twice, a file says the same things twice."""
    return list({repr(note): note for note in notes}.values())


def _tally(seen: Counter[str], path: str) -> list[Note]:
    return [(key, {"path": path, "count": count, "lines": count}) for key, count in seen.items()]


def open_source(source: Source, format: str = "auto", on_fault: Fault | None = None, raw: bool = False) -> Reading:
    """A source ready to be read: found, hashed, and its shape looked at when it is not given.

    Faults of a row go to `on_fault(problem)` and reading goes on; without it they are raised. Errors: DATA-01, -03,
    -05, -17, -18, DEP-01, and those of `rows`, `shape` and `hub`.
    """
    try:
        return _opened(source, format, on_fault, raw)
    except MaeseError as problem:
        raise of_source(problem, source.name) from None


def _stamp(source: Source) -> tuple:
    """Of a data set that is not a folder here there is nothing to look at."""
    here = source.path is not None or at_home(str(source.hub)).is_dir()
    return streams.stamp(source.name) if here else ()


def _opened(source: Source, format: str, on_fault: Fault | None, raw: bool) -> Reading:
    stamp = _stamp(source)
    if source.hub is not None:
        found = format if format != "auto" else _looked(source, hub_rows(source), source.hub) or "messages"
        folder = at_home(source.hub)
        known = streams.sha256(source.hub) if folder.is_dir() else source.hub
        name = hashlib.sha256(f"{known}\0{source.part}".encode()).hexdigest()
        return Reading(source, found, name, 0, stamp, on_fault, raw)
    inside = streams.pieces(source.name)
    found = format
    if format == "auto":
        found = ""
        for piece in inside:
            shape = _shape_of_piece(source, piece)
            if found and shape and shape != found:
                raise MaeseError("DATA-12", path=piece.name, line=1, format=found, other_format=shape)
            found = found or shape or ""
        found = found or "messages"  # nothing could be read: reading it says what is wrong
    else:
        for piece in inside:
            shape = _shape_of_piece(source, piece)
            # Question blocks can be read as raw text, and a raw text says by itself that it has no blocks.
            if shape and shape != format and {shape, format} != {"text", "qa"}:
                raise MaeseError("DATA-26", path=piece.name, format=format, found=shape)
    size = sum(piece.size for piece in inside)
    return Reading(source, found, streams.sha256(source.name), size, stamp, on_fault, raw)


def of_source(problem: MaeseError, path: str) -> MaeseError:
    """The same problem told of the folder or archive that was named, its file beside the line: what mends it is done
    to the whole."""
    inner = str(problem.facts.get("path", ""))
    if not inner.startswith(f"{path.rstrip('/')}/"):
        return problem
    facts: dict[str, object] = {**problem.facts, "path": path}
    if "line" in facts:
        facts["line"] = f"{inner.removeprefix(path.rstrip('/') + '/')}:{facts['line']}"
    if "fixed" in facts:
        facts["fixed"] = fixed_name(path)
    return MaeseError(problem.code, **facts)


def _shape_of_piece(source: Source, piece: streams.Piece) -> str | None:
    """What a piece is, from its first row or its first lines; None when it has neither."""
    if piece.suffix not in streams.TEXTS:
        return _looked(source, rows(piece, lambda problem: None), piece.name)
    with piece.open() as stream:
        head = stream.read(2**20)
    while head.startswith(BOM):
        head = head.removeprefix(BOM)
    return text_or_blocks(head.decode("utf-8", errors="replace"))


def _looked(source: Source, found: Iterable[tuple[int, dict[str, Any]]], name: str) -> str | None:
    """The shape of the first row that has one. A file whose first hundred rows have none is in no shape we know."""
    first: tuple[int, dict[str, Any]] | None = None
    for line, row in itertools.islice(pairs(found), 100):
        first = first or (line, row)
        shape = shape_of(mapped(row, source.map))
        if shape:
            return shape
    if first is None:
        return None
    raise unknown(first[1], name, first[0])


def text_or_blocks(text: str) -> str:
    """`qa` when the text has `###` lines and a `Pregunta:`, else `text`."""
    found = text.split("\n")
    marked = any(line.strip() == MARK for line in found)
    return "qa" if marked and any(QUESTION.match(line) for line in found) else "text"


def texts_of(item: Item) -> list[str]:
    """The text of a document, or of each turn: what a tokenizer is trained on."""
    return [item.text] if isinstance(item, Document) else [message.content for message in item.messages]


def letters(item: Item) -> int:
    return sum(map(len, texts_of(item)))


def first_lines(text: str, limit: int) -> tuple[str, int]:
    """A text up to the `limit`-th line that says something, and how many such lines it has."""
    found = text.split("\n")
    full = [i for i, line in enumerate(found) if line.strip()]
    if len(full) <= limit:
        return text, len(full)
    return "\n".join(found[: full[limit - 1] + 1] if limit else []), limit


def documents(text: str, kind: str, name: str, before: int = 0) -> Iterator[Document]:
    """A raw text as one document (`file`), or one a `line`; `before` is how many lines of the file came before it."""
    if kind == "file":
        body = text.lstrip()
        line = before + 1 + text.count("\n", 0, len(text) - len(body))
        if body:
            yield Document(body.rstrip(), id=f"{name}#{line}", meta={"line": line})
        return
    # Not splitlines: a form feed ends no line, and would shift every number after it.
    for i, line_text in enumerate(text.split("\n"), before + 1):
        if line_text.strip():
            yield Document(line_text.strip(), id=f"{name}#{i}", meta={"line": i})


def blocks(numbered: Iterable[tuple[int, str]], name: str, fault: Fault) -> Iterator[Conversation]:
    """The conversations of a question file, each with the line where its block begins."""
    start, block = 1, list[str]()
    last = 0
    for i, line in itertools.chain(numbered, [(-1, MARK)]):
        last = i if i > 0 else last + 1
        if line.strip() != MARK:
            block.append(line)
            continue
        if any(part.strip() for part in block):
            try:
                yield _pair(block, name, start)
            except MaeseError as problem:
                fault(problem)
        start, block = last + 1, []


def _pair(block: list[str], path: str, start: int) -> Conversation:
    """One block's question and answer; either may run over several lines."""
    parts: dict[str, list[str]] = {}
    into = None
    line = start
    for i, text in enumerate(block):
        if "answer" in parts and QUESTION.match(text):  # two blocks run together: one answer with a question in it
            raise MaeseError("DATA-08", path=path, line=start + i, label=MARK, found=text.strip()[:60])
        for name, mark in (("question", QUESTION), ("answer", ANSWER)):
            if mark.match(text) and name not in parts:
                into, text = name, mark.sub("", text)
                parts[name] = []
                line = start + i if name == "question" else line
        if into:
            parts[into].append(text)
    said = {name: "\n".join(found).strip() for name, found in parts.items()}
    for name, label in (("question", "Pregunta:"), ("answer", "Respuesta:")):
        if not said.get(name):
            at, first = next((i, part.strip()) for i, part in enumerate(block) if part.strip())
            raise MaeseError("DATA-08", path=path, line=start + at, label=label, found=first[:60])
    turns = (Message("user", said["question"]), Message("assistant", said["answer"]))
    return Conversation(turns, id=f"{path}#{line}", meta={"line": line})
