"""Bytes to clean text: nothing is guessed in silence, nothing is changed without a note.

    text, notes = decode(b"\\xef\\xbb\\xbfhola", "f.txt")     ("hola", [("data.note.bom", {...})])

A file in another encoding, or with text already broken by one («aÃ±o»), is refused with the command that mends it:
training on it would teach the model to write it.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from maese.errors import MaeseError
from maese.text.record import Note

# The usual remains of UTF-8 read as cp1252 or latin-1: Ã or Â before a symbol, or the three letters of a dash.
MOJIBAKE = re.compile(r"Ã[\u0080-\u00bf‚ƒ„…†‡ˆ‰Š‹Œ‘’“”•–—˜™š›œŸ]|Â[\u00a0-\u00bf]|â€")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
GUTENBERG_START = re.compile(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)
GUTENBERG_END = re.compile(
    r"^(\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG|End of (the )?Project Gutenberg)", re.MULTILINE
)

TABLES = (".csv", ".tsv", ".parquet", ".json")

GUTENBERG_CREDITS = re.compile(r"\A(?:Produced by|E-text prepared by|Credits:).*?(?:\n\s*\n|\Z)", re.DOTALL)


def decode(raw: bytes, path: str) -> tuple[str, list[Note]]:
    """The text of a file's bytes. Errors: DATA-02 (another encoding), DATA-11 (mojibake), DATA-05 (empty)."""
    notes: list[Note] = []
    if not raw.strip():
        raise MaeseError("DATA-05", path=path)
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        notes.append(("data.note.bom", {"path": path}))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise MaeseError("DATA-02", path=path, encoding=encoding_of(raw), line=line, fixed=fixed_name(path)) from None
    broken = [i for i, line in enumerate(text.split("\n"), 1) if MOJIBAKE.search(line)]
    if broken:
        sample = MOJIBAKE.search(text)
        assert sample is not None
        word = re.search(r"\S*$", text[: sample.start()])
        found = (word.group() if word else "") + text[sample.start() : sample.end() + 6].split()[0]
        raise MaeseError("DATA-11", path=path, line=broken[0], count=len(broken), sample=found, fixed=fixed_name(path))
    return normalise(text, notes)


def normalise(text: str, notes: list[Note]) -> tuple[str, list[Note]]:
    """One line end, composed accents (NFC), no control characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    composed = unicodedata.normalize("NFC", text)
    if composed != text:
        notes.append(("data.note.nfc", {}))
    clean, removed = CONTROL.subn("", composed)
    if removed:
        notes.append(("data.note.control", {"count": removed}))
    return clean, notes


def strip_gutenberg(text: str, notes: list[Note]) -> tuple[str, list[Note]]:
    """Without the header and the licence that Project Gutenberg puts around a book, if they are there."""
    start, end = GUTENBERG_START.search(text), GUTENBERG_END.search(text)
    if not start:
        return text, notes
    body = text[start.end() : end.start() if end else len(text)].strip()
    # The volunteers' credits stand inside the marks, but are no part of the book either.
    body = GUTENBERG_CREDITS.sub("", body).strip()
    lines = text.count("\n") - body.count("\n")
    return body, [*notes, ("data.note.gutenberg", {"lines": lines})]


def encoding_of(raw: bytes) -> str:
    """The likeliest encoding among those that Spanish text is found in."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    from charset_normalizer import from_bytes

    best = from_bytes(raw, cp_isolation=["cp1252", "cp850", "mac_roman"]).best()
    return best.encoding if best else "cp1252"


def fixed_name(path: str) -> str:
    """Where a mended copy goes unless told: `fixed_name("a/tutor.csv.gz")` is `a/tutor.fixed.jsonl`.

    Tables are written out as JSONL, which has no cells to misplace.
    """
    bare = Path(fixed_table(path))
    if bare.suffix.lower() in (".zip", ".tar", ".tgz"):
        bare = bare.with_suffix("")  # what is mended of an archive is a folder
        return f"{bare}.fixed"
    return str(bare.with_name(f"{bare.stem}.fixed{bare.suffix}"))


def fixed_table(path: str) -> str:
    """The name without compression, and as JSONL what was a table: `fixed_table("a.csv.gz")` is `a.jsonl`."""
    old = Path("stdin" if path == "-" else path)
    old = old if old.name else old.resolve()
    bare = old.with_suffix("") if old.suffix.lower() in (".gz", ".zst", ".bz2", ".xz") else old
    return str(bare.with_suffix(".jsonl") if bare.suffix.lower() in TABLES else bare)
