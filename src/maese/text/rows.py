"""Streams of bytes to rows: `(line, {"column": value})`, from JSON, CSV or parquet, one at a time.

    for line, row in rows(piece, fault): …      (1, {"prompt": "¿Qué es una pila?", "completion": "…"})

What cannot be read is handed to `fault`, which raises it or takes note and lets the reading go on.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from maese.errors import MaeseError
from maese.text.repair import encoding_of, fixed_name
from maese.text.shape import shape_of
from maese.text.streams import Joined, Piece

Fault = Callable[[MaeseError], None]
Row = tuple[int, dict[str, Any]]
# A line longer than this is no row that someone wrote: a whole file without line ends, or the wrong file.
LONGEST_LINE = 16 * 2**20
CHUNK = 2**20
BOM = b"\xef\xbb\xbf"


def rows(piece: Piece, fault: Fault) -> Iterator[Row]:
    """Every row with its 1-based line (its number, in parquet).

    Faults: DATA-02 (encoding), DATA-04 (JSON), DATA-15 (a line of more than 16 MiB), DATA-19 (cells), DATA-03.
    """
    if piece.suffix == ".parquet":
        yield from _parquet(piece)
        return
    with piece.open() as stream:
        if piece.suffix in (".csv", ".tsv"):
            yield from _csv(piece, lines(stream, piece.name, fault), fault)
        elif piece.suffix == ".json":
            yield from _json(piece, stream, fault)
        else:
            yield from _jsonl(piece, lines(stream, piece.name, fault), fault)


def lines(stream: BinaryIO, name: str, fault: Fault) -> Iterator[tuple[int, str]]:
    """Numbered lines of text, without their ends. Byte order marks at the start, however many, are passed over."""
    encoding, number = "utf-8", 0
    while raw := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            fault(MaeseError("DATA-15", path=name, line=number, longest=LONGEST_LINE // 2**20))
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(CHUNK)
            continue
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                fault(_encoding(name, raw, number))
                wide = codecs.getreader("utf-16")(Joined(raw, stream), "replace")  # type: ignore[arg-type]  # it only reads
                yield from ((i, line.rstrip("\r\n")) for i, line in enumerate(wide, 1))
                return
            if raw.count(0) * 4 > len(raw):  # UTF-16 or 32 without its mark: no UTF-8 text is a quarter of NULs
                fault(_encoding(name, raw, number))
                return
            while raw.startswith(BOM):
                raw = raw.removeprefix(BOM)
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            fault(_encoding(name, raw, number))
            encoding = encoding_of(raw)
            text = raw.decode(encoding, errors="replace")
        text = text.rstrip("\r\n")
        if number == 1 and "\r" in text and not raw.endswith(b"\n"):  # old Macs ended lines with it alone
            yield from enumerate(text.split("\r"), 1)
            return
        yield number, text


def _encoding(name: str, raw: bytes, line: int) -> MaeseError:
    return MaeseError("DATA-02", path=name, encoding=encoding_of(raw), line=line, fixed=fixed_name(name))


def _jsonl(piece: Piece, numbered: Iterator[tuple[int, str]], fault: Fault) -> Iterator[Row]:
    for line, text in numbered:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as problem:  # a number of 4,300 digits is a plain ValueError
            fault(_broken(piece.name, line, text, getattr(problem, "colno", 1)))
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            fault(_no_row(piece.name, line, row))


def _broken(name: str, line: int, text: str, column: int) -> MaeseError:
    """DATA-04 with the place pointed at: the text around it, and a caret below."""
    start = max(0, column - 1 - 40)
    shown = text[start : start + 60].replace("\t", " ")
    return MaeseError(
        "DATA-04", path=name, line=line, column=column, shown=shown, caret=" " * (column - 1 - start) + "^"
    )


def _no_row(name: str, line: int, found: Any) -> MaeseError:
    return MaeseError("DATA-03", path=name, line=line, keys=json.dumps(found, ensure_ascii=False)[:60], command="")


def _json(piece: Piece, stream: BinaryIO, fault: Fault) -> Iterator[Row]:
    """Arrays of objects, objects one after another, or one object that holds the list, read as they come.

    A broken object on a line of its own is a fault, and the next line is read; inside an array nobody could say where
    the next one begins, and DATA-04 is raised whatever `fault` would do.
    """
    decoder = json.JSONDecoder()
    text = _Text(piece, stream, fault)
    array, found = False, 0
    while True:
        text.skip(" \t\r\n,\ufeff")
        mark = text.peek()
        if not mark:
            if array:
                raise _broken(piece.name, text.line, "…", 1)
            return
        if mark == "[" and not array:
            array = True
            text.take(1)
        elif mark == "]" and array:
            array = False
            text.take(1)
        else:
            try:
                row, size = text.value(decoder)
            except (ValueError, RecursionError) as problem:
                broken = text.broken(getattr(problem, "pos", text.at))
                if array:
                    raise broken from None
                fault(broken)
                text.next_line()
                continue
            line = text.line
            text.take(size)
            held = _held(row) if not array and not found and text.ended_after() else None
            found += 1
            if held is not None:
                yield from enumerate(held, 1)
            elif isinstance(row, dict):
                yield line, row
            else:
                fault(_no_row(piece.name, line, row))


class _Text:
    """A stream of text looked at a piece at a time, with the line where it is."""

    def __init__(self, piece: Piece, stream: BinaryIO, fault: Fault) -> None:
        self.piece, self.stream, self.fault = piece, stream, fault
        self.reader: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """What is left is kept, and as much again is read: a long row costs its length, not its square."""
        if self.ended:
            return False
        raw = self.stream.read(max(CHUNK, len(self.buffer) - self.at))
        self.ended = not raw
        try:
            new = self.reader.decode(raw, final=self.ended)
        except UnicodeDecodeError:
            self.fault(_encoding(self.piece.name, raw, self.line))
            self.reader = codecs.getincrementaldecoder(encoding_of(raw))(errors="replace")
            new = self.reader.decode(raw, final=self.ended)
        self.buffer, self.at = self.buffer[self.at :] + new, 0
        return True

    def peek(self) -> str:
        while self.at >= len(self.buffer) and self.more():
            pass
        return self.buffer[self.at : self.at + 1]

    def take(self, size: int) -> None:
        self.line += self.buffer.count("\n", self.at, self.at + size)
        self.at += size

    def skip(self, letters: str) -> None:
        while (letter := self.peek()) and letter in letters:
            self.take(1)

    def next_line(self) -> None:
        while (end := self.buffer.find("\n", self.at)) < 0 and self.more():
            pass
        self.take((end if end >= 0 else len(self.buffer)) - self.at)

    def value(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The JSON value here and its size, reading on while it may only be incomplete."""
        while True:
            try:
                row, end = decoder.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or self.ended or isinstance(row, (dict, list)):
                    return row, end - self.at
            except (ValueError, RecursionError):
                if self.ended or len(self.buffer) - self.at > LONGEST_LINE or self._closed():
                    raise
            self.more()

    def _closed(self) -> bool:
        """Whether a broken value on a line of its own is all there: then more text would not mend it."""
        end = self.buffer.find("\n", self.at)
        rest = self.buffer[end + 1 : end + 200].lstrip() if end >= 0 else ""
        return rest.startswith("{")

    def ended_after(self) -> bool:
        self.skip(" \t\r\n,")
        return not self.peek()

    def broken(self, place: int) -> MaeseError:
        start = self.buffer.rfind("\n", 0, place) + 1
        shown = self.buffer[start:].split("\n", 1)[0]
        line = self.line + self.buffer.count("\n", self.at, place)
        return _broken(self.piece.name, line, shown, place - start + 1)


def _held(row: Any) -> list[dict[str, Any]] | None:
    """The rows inside `{"data": [{…}, …]}`: an object with one list of objects that is not itself a row."""
    if not isinstance(row, dict) or shape_of(row):
        return None
    lists = [v for v in row.values() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    return lists[0] if len(lists) == 1 else None


def _csv(piece: Piece, numbered: Iterator[tuple[int, str]], fault: Fault) -> Iterator[Row]:
    import csv

    csv.field_size_limit(LONGEST_LINE)
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for number, text in numbered:
            last = number
            yield text + "\n"

    source = texts()
    head = next(source, "")
    mark = "\t" if piece.suffix == ".tsv" else max(",;\t|", key=head.count)
    names = next(csv.reader([head.replace("\r", " ")], delimiter=mark), [])
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        fault(MaeseError("DATA-25", path=piece.name, column=twice))
        return
    # Strict: a quote that is never closed would swallow the rest of the file into one cell.
    reader = csv.reader(source, delimiter=mark, strict=True)
    while True:
        start = last + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            broken = MaeseError("DATA-19", path=piece.name, line=start, found="…", expected=len(names))
            if "end of data" in str(problem):  # a quote never closed has swallowed all that came after it
                raise broken from None
            fault(broken)
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if len(cells) != len(names):
            fault(MaeseError("DATA-19", path=piece.name, line=start, found=len(cells), expected=len(names)))
            continue
        yield start, dict(zip(names, cells, strict=True))


def _parquet(piece: Piece) -> Iterator[Row]:
    import io

    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MaeseError("DEP-01", package="pyarrow", extra="data") from None
    number = 0
    try:
        with piece.open() as stream:
            # Its index is at the end: inside an archive, which cannot jump, it is brought whole.
            place = stream if stream.seekable() else io.BytesIO(stream.read())
            for batch in parquet.ParquetFile(place).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (arrow.ArrowException, OSError):
        raise MaeseError("DATA-20", path=piece.name) from None
