"""What a model learns of some examples, as HTML: every token, with how it is treated written beside the colour.

    mask_html([{"id": "3", "pieces": mask_pieces(example, tokenizer)}])     "<!doctype html>…"
    mask_fragment(rows)                                                     the same, to go inside another page

Learnt tokens are bold and underlined, special ones are between brackets, cut ones are struck through: it reads the
same in print, in greyscale and aloud. Everything is escaped; nothing is fetched and nothing runs.
"""

from __future__ import annotations

from typing import Any

from maese.report.page import render
from maese.say import number, percent, say

STATES = ("learnt", "context", "special", "cut")
BREAK = "⏎"


def mask_html(rows: list[dict[str, Any]]) -> str:
    """A page that opens by itself. Each row has an `id` and its `pieces` (`text`, `state`, `special`)."""
    return render("views/mask.html", {"states": STATES, "rows": [_row(row) for row in rows]})


def mask_fragment(rows: list[dict[str, Any]]) -> str:
    """The tokens and their key, with their style, for a page that has its own head."""
    return render("views/mask_rows.html", {"states": STATES, "rows": [_row(row) for row in rows]})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    pieces = [piece | {"ends": BREAK in piece["text"]} for piece in row["pieces"]]
    kept = [piece for piece in pieces if piece["state"] != "cut"]
    learnt = sum(piece["state"] == "learnt" for piece in kept)
    lost = len(pieces) - len(kept)
    told = [say("mask.nothing")]
    if learnt:
        told = [say("mask.share", share=percent(learnt / len(kept)), learnt=number(learnt), total=number(len(kept)))]
    if lost:
        told.append(say("mask.lost", n=lost))
    return {"title": say("mask.example", id=row["id"]), "told": " ".join(told), "pieces": pieces}
