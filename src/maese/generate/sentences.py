"""Sentences of Spanish prose: where they end, so that five means five.

count("—¿Viene? —dijo. Sí, señor.")     2
"""

from __future__ import annotations

import re

# Marks that end a sentence, with the quotes and brackets that close after them, before a space or the end.
END = re.compile(r"[.!?…]+[»”\"')\]]*(?=\s|$)")
ABBREVIATIONS = {
    "sr", "sra", "srta", "sres", "dr", "dra", "d", "dª", "dña", "ud", "uds", "vd", "vds", "v", "vm", "s", "sto", "sta",
    "san", "fr", "gral", "cap", "pág", "p", "núm", "art", "etc", "ej", "p.ej", "prof", "lic", "ing", "excmo", "ilmo",
}  # fmt: skip


def ends(text: str) -> list[int]:
    """Positions just after each sentence: `ends("Sí. No.")` is `[3, 7]`."""
    found = []
    for match in END.finditer(text):
        after = text[match.end() :].lstrip()
        if match.group()[0] == "." and _abbreviation(text[: match.start()], after):
            continue
        # «¿Qué? —dijo él» goes on: what follows in lower case belongs to the same sentence.
        follow = after.lstrip("—–-«“\"'([ ")
        if follow[:1].islower():
            continue
        found.append(match.end())
    return found


def _abbreviation(before: str, after: str) -> bool:
    word = re.search(r"[\wª.]*$", before)
    last = word.group().lower() if word else ""
    if last in ABBREVIATIONS and last not in ("etc", "san", "p", "s", "v"):
        return True
    # An initial: «J. Pérez».
    return bool(after) and len(last) == 1 and last.isalpha() and last not in "aeouy" and before[-1:].isupper()


def count(text: str) -> int:
    return len(ends(text))


def first(text: str, n: int) -> str | None:
    """The first n sentences, or None when there are fewer."""
    found = ends(text)
    return text[: found[n - 1]] if len(found) >= n else None
