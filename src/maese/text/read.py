"""A file on disk to documents or conversations.

    read(Source(path="pokemon.txt"), "auto")    Reading(format="qa", conversations=[…], …)

Two formats: raw text, and question blocks such as

    ###
    Pregunta: ¿De qué tipo es Pikachu?
    Respuesta: Es de tipo eléctrico.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from maese.errors import MaeseError
from maese.recipe import Source, shipped
from maese.text.record import Conversation, Document, Message, Note
from maese.text.repair import decode, strip_gutenberg

MARK = "###"
QUESTION, ANSWER = re.compile(r"^\s*pregunta\s*:\s*", re.I), re.compile(r"^\s*respuesta\s*:\s*", re.I)
NOT_YET = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".zip", ".pdf", ".docx"}


@dataclass
class Reading:
    """What one source gave, with enough facts to know later that it was the same file."""

    path: str
    format: str
    documents: list[Document] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    sha256: str = ""
    size: int = 0

    def facts(self) -> dict:
        return {
            "path": self.path,
            "format": self.format,
            "sha256": self.sha256,
            "bytes": self.size,
            "documents": len(self.documents) or len(self.conversations),
            "characters": sum(len(d.text) for d in self.documents)
            + sum(len(m.content) for c in self.conversations for m in c.messages),
            "notes": [list(note) for note in self.notes],
        }


def locate(path: str) -> Path:
    """The file itself: from here, or among those that travel with maese. DATA-01 proposes the nearest name."""
    for candidate in (Path(path).expanduser(), shipped(path)):
        if candidate.is_file():
            return candidate
    folder = Path(path).expanduser().parent
    names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.4)
    nearest = str(folder / near[0]) if near else "data/quijote_muestra.txt"
    raise MaeseError("DATA-01", path=path, folder=str(folder.absolute()), nearest=nearest)


def read(source: Source, format: str = "auto") -> Reading:
    """Read one source whole. Errors: DATA-01, -02, -03, -05, -06, -08."""
    path = locate(source.path)
    if path.suffix.lower() in NOT_YET:
        raise MaeseError("DATA-03", path=source.path, suffix=path.suffix.lower())
    raw = path.read_bytes()
    text, notes = decode(raw, source.path)
    text, notes = strip_gutenberg(text, notes)
    found = shape_of(text) if format == "auto" else format
    reading = Reading(source.path, found, notes=notes, sha256=hashlib.sha256(raw).hexdigest(), size=len(raw))
    if found == "qa":
        reading.conversations = list(blocks(text, source.path))[: source.limit]
    else:
        reading.documents = list(documents(text, source))
    if not (reading.documents or reading.conversations):
        raise MaeseError("DATA-05", path=source.path)
    return reading


def shape_of(text: str) -> str:
    """`qa` when the text has `###` lines and a `Pregunta:`, else `text`."""
    lines = text.splitlines()
    marked = any(line.strip() == MARK for line in lines)
    return "qa" if marked and any(QUESTION.match(line) for line in lines) else "text"


def documents(text: str, source: Source):
    """A raw text as one document, or one a line; `limit` counts lines that say something."""
    lines = text.splitlines()
    if source.limit:
        full = [i for i, line in enumerate(lines) if line.strip()]
        lines = lines[: full[source.limit - 1] + 1] if len(full) > source.limit else lines
    if source.documents == "file":
        body = "\n".join(lines).strip()
        if body:
            yield Document(body, id=f"{source.path}#1")
        return
    for i, line in enumerate(lines, 1):
        if line.strip():
            yield Document(line.strip(), id=f"{source.path}#{i}")


def blocks(text: str, path: str):
    """The conversations of a question file, each with the line where its block begins."""
    start, block = 1, list[str]()
    for i, line in enumerate([*text.splitlines(), MARK], 1):
        if line.strip() != MARK:
            block.append(line)
            continue
        if any(part.strip() for part in block):
            yield _pair(block, path, start)
        start, block = i + 1, []


def _pair(block: list[str], path: str, start: int) -> Conversation:
    """One block's question and answer; either may run over several lines."""
    parts: dict[str, list[str]] = {}
    into = None
    line = start
    for i, text in enumerate(block):
        if "answer" in parts and QUESTION.match(
            text
        ):  # two blocks run together would be one answer with a question in it
            raise MaeseError("DATA-08", path=path, line=start + i, label=MARK, found=text.strip()[:60])
        for name, mark in (("question", QUESTION), ("answer", ANSWER)):
            if mark.match(text) and name not in parts:
                into, text = name, mark.sub("", text)
                parts[name] = []
                line = start + i if name == "question" else line
        if into:
            parts[into].append(text)
    said = {name: "\n".join(lines).strip() for name, lines in parts.items()}
    for name, label in (("question", "Pregunta:"), ("answer", "Respuesta:")):
        if not said.get(name):
            at, first = next((i, part.strip()) for i, part in enumerate(block) if part.strip())
            raise MaeseError("DATA-08", path=path, line=start + at, label=label, found=first[:60])
    turns = (Message("user", said["question"]), Message("assistant", said["answer"]))
    return Conversation(turns, id=f"{path}#{line}", meta={"line": line})
