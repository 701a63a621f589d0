"""A file with faults to a new one without them, and the difference between both; the original is never touched.

    mend("tutor.jsonl", Path("tutor.fixed.jsonl"))    Mended(changed={"mojibake": 12}, dropped={"bad_json": 1}, …)
    tutor.fixed.jsonl    tutor.fixed.jsonl.diff    tutor.fixed.jsonl.dropped.jsonl

What can be repaired without guessing is: encodings, broken letters, marks of byte order, control characters, loose
accents, halves of characters, turns that say the same role twice. A row that would need guessing (no answer, no JSON)
goes to `.dropped.jsonl` with its line and its reason. Mending what was mended changes nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from maese.errors import MaeseError
from maese.run import disk
from maese.text import streams
from maese.text.dedup import exact_key, whole
from maese.text.faults import READING, SURROGATE, faults_of
from maese.text.read import MARK, blocks, text_or_blocks
from maese.text.repair import CONTROL, MOJIBAKE, encoding_of, fixed_table
from maese.text.rows import BOM, LONGEST_LINE, rows
from maese.text.shape import item_of, shape_of
from maese.text.streams import Piece

HEAD = 2**20
TABLES = (".csv", ".tsv", ".parquet", ".json")  # written out as JSONL, which has no cells to misplace
# In a `.diff` someone looks at on a terminal, control characters are drawn and not obeyed.
PICTURES = {c: 0x2400 + c for c in range(32) if c != 9} | dict.fromkeys([0x7F, 0xFEFF, *range(0xD800, 0xE000)], 0xFFFD)


@dataclass(frozen=True)
class Mended:
    """What came of it: where, how many rows (or lines of a raw text) are kept, changed and dropped, by kind."""

    path: str
    output: Path
    diff: Path
    dropped_to: Path | None
    kept: int
    changed: dict[str, int]
    dropped: dict[str, int]
    encoding: str


def mend(path: str, output: Path, only: set[str] | None = None) -> Mended:
    """Write the mended file, its `.diff` and what was dropped. `only` names the kinds to repair; None is all of them.

    Of a folder or an archive it makes a folder of mended files. Errors: RUN-01 (the new file exists), DISK-01, DISK-02,
    and those of finding the source.
    """
    inside = streams.pieces(path)
    if [piece.name for piece in inside] == [path] or path == "-":
        return _mend_one(path, inside[0], output, only)
    if output.exists():
        raise MaeseError("RUN-01", path=str(output), free=str(_free(output)))
    done = [
        _mend_one(piece.name, piece, output / fixed_table(piece.name.removeprefix(f"{path.rstrip('/')}/")), only)
        for piece in inside
    ]
    changed = sum((Counter(each.changed) for each in done), Counter[str]())
    dropped = sum((Counter(each.dropped) for each in done), Counter[str]())
    left = next((output for each in done if each.dropped_to), None)
    kept, odd = sum(each.kept for each in done), {each.encoding for each in done} - {"utf-8"}
    return Mended(path, output, output, left, kept, dict(changed), dict(dropped), odd.pop() if odd else "utf-8")


def _free(output: Path) -> Path:
    return next(p for i in itertools.count(2) if not (p := output.with_stem(f"{output.stem}-{i}")).exists())


def _mend_one(path: str, piece: Piece, output: Path, only: set[str] | None) -> Mended:
    names = [output, Path(f"{output}.diff"), Path(f"{output}.dropped.jsonl")]
    taken = next((name for name in names if name.exists()), None)
    if taken:
        raise MaeseError("RUN-01", path=str(taken), free=str(_free(output)))
    drafts = [name.with_name(f".{name.name}.{os.getpid()}") for name in names]
    with disk(output), contextlib.ExitStack() as stack:
        output.parent.mkdir(parents=True, exist_ok=True)
        for draft in drafts:
            stack.callback(draft.unlink, missing_ok=True)
        out, diff, dropped = (stack.enter_context(_new(draft)) for draft in drafts)
        diff.write(f"--- {path}\n+++ {output}\n")
        work = _Work(only, out, diff, dropped)
        work.piece(piece)
        for stream in (out, diff, dropped):
            stream.flush()
            os.fsync(stream.fileno())
        for draft, name in zip(drafts, names, strict=True):
            if name is not names[2] or work.dropped:
                os.replace(draft, name)
    left = names[2] if work.dropped else None
    return Mended(path, output, names[1], left, work.kept, dict(work.changed), dict(work.dropped), work.encoding)


def _new(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", newline="\n")


class _Work:
    """One mending under way: where things are written, and the counts."""

    def __init__(self, only: set[str] | None, out: TextIO, diff: TextIO, dropped: TextIO) -> None:
        self.only, self.out, self.diff, self.left = only, out, diff, dropped
        self.changed, self.dropped = Counter[str](), Counter[str]()
        self.kept, self.encoding = 0, "utf-8"
        self.seen: set[str] = set()
        self.shaped = False  # whether rows of this file have a shape we know: then one that has none is at fault

    def wanted(self, kind: str) -> bool:
        return self.only is None or kind in self.only

    def piece(self, piece: Piece) -> None:
        if piece.suffix not in streams.TEXTS:
            first = itertools.islice(rows(piece, lambda problem: None), 100)
            self.shaped = any(shape_of(row) for _, row in first)
        if piece.suffix in TABLES:
            self._table(piece)
        elif piece.suffix in streams.ROWS:
            for number, text, kinds in self._lines(piece):
                self._row_line(piece.name, number, text, kinds)
        else:
            with piece.open() as stream:
                head = stream.read(HEAD).decode("utf-8", errors="replace")
            if text_or_blocks(head) == "qa":
                self._blocks(piece)
            else:
                for number, text, kinds in self._lines(piece):
                    self.keep(number, text, self.text(text, kinds), kinds)

    def keep(self, number: int, old: str, new: str, kinds: set[str]) -> None:
        """Write a line that stays, and how it changed."""
        self.kept += 1
        self.changed.update(kinds)
        self.out.write(new + "\n")
        if kinds or old != new:
            # What was decoded well reads the same: the letters that were not UTF-8 are shown as what they were.
            shown = "".join(c if c.isascii() else "\ufffd" for c in old) if "encoding" in kinds else old
            self.differ(number, shown, new)

    def drop(self, name: str, number: int, old: str, kind: str) -> None:
        """Write down a row that goes, where it was and why."""
        self.dropped[kind] += 1
        row = {"line": number, "reason": kind, "path": name, "text": old}
        self.left.write(json.dumps(row, ensure_ascii=bool(SURROGATE.search(old))) + "\n")
        self.differ(number, old, None)

    def differ(self, number: int, old: str, new: str | None) -> None:
        count = old.count("\n") + 1
        self.diff.write(f"@@ -{number},{count} +{self.kept},{0 if new is None else new.count(chr(10)) + 1} @@\n")
        for sign, text in (("-", old), ("+", new)):
            for line in text.split("\n") if text is not None else ():
                self.diff.write(f"{sign}{line.translate(PICTURES)}\n")

    def text(self, text: str, kinds: set[str]) -> str:
        """A text repaired; what it took is added to `kinds`."""
        if text.isascii() and text.isprintable():
            return text
        for kind, repair in REPAIRS:
            if self.wanted(kind) and (new := repair(text)) != text:
                kinds.add(kind)
                text = new
        return text

    def _lines(self, piece: Piece) -> Iterator[tuple[int, str, set[str]]]:
        """Numbered lines, decoded one by one: whoever joined two files may not have seen their encodings."""
        with piece.open() as stream:
            head = stream.read(HEAD)
        guess = encoding_of(head) if _broken(head) else ""
        with piece.open() as stream:
            if guess == "utf-16":
                self.encoding = guess
                for number, line in enumerate(codecs.getreader("utf-16")(stream, "replace"), 1):
                    yield number, line.rstrip("\r\n"), {"encoding"}
                return
            number = 0
            while raw := stream.readline(LONGEST_LINE + 1):
                number += 1
                kinds: set[str] = set()
                if len(raw) > LONGEST_LINE:
                    self.drop(piece.name, number, raw[:200].decode("utf-8", errors="replace"), "huge_line")
                    while raw and not raw.endswith(b"\n"):
                        raw = stream.readline(HEAD)
                    continue
                while number == 1 and raw.startswith(BOM):
                    raw = raw.removeprefix(BOM)
                    kinds.add("bom")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    guess = guess or encoding_of(raw)
                    self.encoding = guess
                    text = raw.decode(guess, errors="replace")
                    kinds.add("encoding")
                yield number, text.rstrip("\r\n"), kinds

    def _row_line(self, name: str, number: int, text: str, kinds: set[str]) -> None:
        if not text.strip():
            return
        try:
            row = json.loads(text, strict=False)  # with control characters it is no JSON, but they can be taken out
        except (json.JSONDecodeError, RecursionError):
            self.drop(name, number, text, "bad_json")
            return
        if CONTROL.search(text) or "\t" in text:
            kinds.add("control")
        self._row(name, number, text, row, kinds)

    def _row(self, name: str, number: int, old: str, row: Any, kinds: set[str]) -> None:
        if not isinstance(row, dict):
            self.drop(name, number, old, "keys")
            return
        new = self._repaired(row, kinds)
        reason = self._reason(new, number)
        if reason and self.wanted(reason):
            self.drop(name, number, old, reason)
            return
        # A row that is right stays as it was typed, so that the difference shows only what changed.
        text = old if new == row and not kinds else json.dumps(new, ensure_ascii=False)
        self.keep(number, old, json.dumps(new) if SURROGATE.search(text) else text, kinds)

    def _repaired(self, row: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
        new = {key: self._value(value, kinds) for key, value in row.items()}
        for name in ("messages", "conversations"):
            if isinstance(new.get(name), list) and self.wanted("roles"):
                turns = in_order(new[name])
                if turns != new[name]:
                    kinds.add("roles")
                    new[name] = turns
        return new

    def _value(self, value: Any, kinds: set[str]) -> Any:
        if isinstance(value, str):
            return self.text(value, kinds)
        if isinstance(value, list):
            return [self._value(each, kinds) for each in value]
        if isinstance(value, dict):
            return {key: self._value(each, kinds) for key, each in value.items()}
        return value

    def _reason(self, row: dict[str, Any], number: int) -> str | None:
        """Why a repaired row still cannot be learnt from, or None. A file of columns we do not know is left to
        `convert`."""
        shape = shape_of(row)
        if shape is None:
            return "keys" if self.shaped else None
        try:
            item = item_of(row, shape, "", number)
        except MaeseError as problem:
            return READING.get(problem.code, "keys")
        if found := faults_of(item):
            return found[0].kind
        key = exact_key(whole(item))
        if key in self.seen:
            return "exact_duplicate"
        self.seen.add(key)
        return None

    def _table(self, piece: Piece) -> None:
        """CSV, parquet and JSON arrays: one JSON a line."""
        broken: list[MaeseError] = []

        def note(problem: MaeseError) -> None:
            if problem.code == "DATA-02":
                self.encoding = str(problem.facts.get("encoding"))
                self.changed["encoding"] += 1
            else:
                broken.append(problem)

        try:
            for number, row in rows(piece, note):
                self._row(piece.name, number, json.dumps(row, ensure_ascii=False, default=str), row, set())
        except MaeseError as last:  # nothing after it can be read
            note(last)
        for problem in broken:
            shown = str(problem.facts.get("shown") or problem.facts.get("found") or "")
            self.drop(piece.name, int(str(problem.facts.get("line", 0))), shown, READING.get(problem.code, "keys"))

    def _blocks(self, piece: Piece) -> None:
        """Question blocks: those that lack a side, or are there already, are dropped whole."""
        start, block, kinds = 1, list[str](), set[str]()
        for number, text, own in itertools.chain(self._lines(piece), [(-1, MARK, set[str]())]):
            if text.strip() != MARK:
                block.append(text)
                kinds |= own
                continue
            if number < 0 and not any(line.strip() for line in block):
                break
            self._block(piece.name, start, "\n".join(block), kinds)
            if number > 0:
                self.out.write(MARK + "\n")
            start, block, kinds = number + 1, [], set()

    def _block(self, name: str, start: int, old: str, kinds: set[str]) -> None:
        if not old.strip():
            self.out.write(old + "\n" if old else "")
            return
        new = self.text(old, kinds)
        broken: list[MaeseError] = []
        found = list(blocks(enumerate(new.split("\n"), start), name, broken.append))
        reason = "one_sided" if broken or not found else next((f.kind for f in faults_of(found[0])), None)
        if found and not reason:
            key = exact_key(whole(found[0]))
            reason = "exact_duplicate" if key in self.seen else None
            self.seen.add(key)
        if reason and self.wanted(reason):
            self.drop(name, start, old, reason)
        else:
            self.keep(start, old, new, kinds)


def in_order(turns: list[Any]) -> list[Any]:
    """Turns that a model can learn: an answer before any question goes, and whoever speaks twice speaks once.

    `in_order([user a, user b, assistant c])` is `[user a⏎⏎b, assistant c]`.
    """
    if not all(isinstance(turn, dict) for turn in turns):
        return turns
    kept: list[dict[str, Any]] = []
    asked = False
    for turn in turns:
        who, said = ("role", "content") if "role" in turn else ("from", "value")
        role, before = (str(each.get(who)).lower() if each else None for each in (turn, kept[-1] if kept else None))
        if role in ("assistant", "gpt") and not asked and before in (None, "system"):
            continue
        asked = asked or role not in ("system", "developer")
        if kept and role == before and all(isinstance(each.get(said), str) for each in (turn, kept[-1])):
            joined = "\n\n".join(part for part in (kept[-1][said].strip(), turn[said].strip()) if part)
            kept[-1] = kept[-1] | {said: joined}
        else:
            kept.append(turn)
    return kept if len(kept) > 1 else turns


def _broken(raw: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError:
        return True
    return False


def _unscrambled(text: str) -> str:
    """Letters put right, line by line as a clean line would veto the repair of a broken one, and twice if needed."""
    import ftfy

    lines = text.split("\n")
    for i, line in enumerate(lines):
        for _ in range(3):
            if not MOJIBAKE.search(lines[i]) or (line := ftfy.fix_encoding(lines[i])) == lines[i]:
                break
            lines[i] = line
    return "\n".join(lines)


# In this order: half characters would stop the repair of letters, and what that leaves behind may be a control mark.
REPAIRS = (
    ("surrogate", lambda text: SURROGATE.sub("", text)),
    ("mojibake", lambda text: _unscrambled(text) if MOJIBAKE.search(text) else text),
    ("bom", lambda text: text.replace("\ufeff", "")),
    ("control", lambda text: CONTROL.sub("", text)),
    ("not_nfc", lambda text: unicodedata.normalize("NFC", text)),
)
