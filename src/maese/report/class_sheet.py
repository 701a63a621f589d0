"""A sheet for the classroom: which text did the model write before training, and which after?

    sheet = shuffle(run.read("compare.json"), seed=42)
    print(text(sheet))                   the pairs, for the terminal; answers(sheet) tells which is which
    write(run, comparison)               runs/…/report/class-sheet.html, two or three pages to print

In go the texts of `maese compare`; the two of each prompt come out as A and B in an order that only the seed and the
key know.
"""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maese.report.page import render
from maese.run import Run, disk
from maese.say import number, say

MOST_PAIRS = 4  # two to a page; with the key, three pages
EXCERPT = 420  # characters: what a class reads in half a minute, and half a page holds twice
COLUMNS = 76


@dataclass(frozen=True)
class Pair:
    number: int
    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Sheet:
    """The pairs as the class sees them and, apart, the letter of the trained text of each."""

    pairs: tuple[Pair, ...]
    key: tuple[str, ...]
    seed: int


def shuffle(comparison: dict[str, Any], seed: int) -> Sheet:
    """Shuffle each prompt's two texts into A and B; the same seed gives the same sheet for ever."""
    rows = comparison.get("prompts") or []
    order = random.Random(seed)
    # As many A as B, or one more: tossing a coin for three pairs gives «all A» once in four times.
    letters = order.sample("AB", 2) * ((len(rows) + 1) // 2)
    letters = letters[: len(rows)]
    order.shuffle(letters)
    pairs = []
    for i, (row, letter) in enumerate(zip(rows, letters, strict=True), 1):
        texts = (row["after"], row["before"]) if letter == "A" else (row["before"], row["after"])
        pairs.append(Pair(i, row["prompt"], *texts))
    return Sheet(tuple(pairs), tuple(letters), seed)


def text(sheet: Sheet) -> str:
    """The pairs for the terminal, whole and without the key."""
    lines = [say("report.sheet.title"), say("report.sheet.question"), ""]
    for pair in sheet.pairs:
        lines.append(say("report.sheet.pair", number=pair.number, prompt=pair.prompt))
        for letter, written in (("A", pair.a), ("B", pair.b)):
            lines += textwrap.wrap(" ".join(written.split()), COLUMNS, initial_indent=f"  {letter}  ",
                                   subsequent_indent="     ") or [f"  {letter}"]  # fmt: skip
        lines.append("")
    return "\n".join(lines).rstrip()


def answers(sheet: Sheet) -> str:
    """The key for the terminal: `1 B · 2 A · 3 B`."""
    found = " · ".join(f"{pair.number} {letter}" for pair, letter in zip(sheet.pairs, sheet.key, strict=True))
    return say("report.sheet.answers", letters=found or "—")


def write(run: Run, comparison: dict[str, Any], seed: int | None = None) -> Path:
    """Write report/class-sheet.html, with the seed of the comparison unless another is given."""
    chosen = comparison.get("seed") or 0 if seed is None else seed
    sheet = shuffle(comparison, chosen)
    shown = sheet.pairs[:MOST_PAIRS]
    content = {
        "name": run.path.name,
        "read": _read(run),
        "pairs": [{"number": p.number, "prompt": p.prompt, "sides": [("A", excerpt(p.a)), ("B", excerpt(p.b))]}
                  for p in shown],
        "key": list(zip(shown, sheet.key, strict=False)),
        "half": number(len(shown) / 2, len(shown) % 2),
        "seed": chosen,
        "base": comparison.get("base"),
        "cut": any(len(t) > EXCERPT for p in shown for t in (p.a, p.b)),
    }  # fmt: skip
    with disk(run.report):
        run.report.mkdir(parents=True, exist_ok=True)
    run.write("report/class-sheet.html", render("class_sheet.html", content))
    return run.report / "class-sheet.html"


def excerpt(written: str) -> str:
    """The beginning of a text, up to a whole word, with a mark where it was cut."""
    written = written.strip()
    if len(written) <= EXCERPT:
        return written
    return written[:EXCERPT].rsplit(None, 1)[0] + " […]"


def _read(run: Run) -> str:
    """The names of what the model was trained on, as the question tells them to the class."""
    sources = (run.read("data.json") or {}).get("sources", [])
    names = [Path(source["path"]).name for source in sources if source.get("path")]
    return ", ".join(names) or run.path.name
