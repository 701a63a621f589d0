"""What is learnt and what is kept apart to be measured on: decided once, the same for ever.

A raw text: its last part, in one piece, because lines drawn at random from a book have neighbours in training that give
them away. Rows: by the hash of what they must not be parted from (the column `group`, or the question itself), so that
an author, a work or a question falls on the same side whatever is added to the file.
"""

from __future__ import annotations

import hashlib
import re

from maese.errors import MaeseError
from maese.text.record import Conversation, Document, Message


def tail(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """`tail([10 lines], 0.1)` keeps the first 9 to learn from and the last one to measure on."""
    if not share:
        return documents, []
    if len(documents) >= 10:  # one document a line: whole documents from the end
        cut = max(1, round(len(documents) * (1 - share)))
        return documents[:cut], documents[cut:]
    train: list[Document] = []
    held: list[Document] = []
    for document in documents:
        pieces = re.findall(r"[^\n]*\n|[^\n]+", document.text)
        cut = _place(pieces, share)
        kept = sum(map(len, pieces[cut:])) / len(document.text)
        if not share / 2 <= kept <= share * 2:  # few lines, or one that is half the book: cut at a word instead
            pieces = re.findall(r"\s*\S+", document.text)
            cut = _place(pieces, share)
        for side, text in ((train, "".join(pieces[:cut])), (held, "".join(pieces[cut:]))):
            if text.strip():
                side.append(Document(text.strip(), document.id, document.meta))
    return train, held


def _place(pieces: list[str], share: float) -> int:
    """How many of the pieces come before the last `share` of their letters."""
    left, cut = sum(map(len, pieces)) * (1 - share), 0
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            break
        cut += 1
    return cut


def group_of(item: Document | Conversation, column: str | None) -> str:
    """What an item must not be parted from: its column, or its first question, or the document itself.

    Error: DATA-23 (the column is not there).
    """
    if column is not None:
        if column not in item.meta:
            known = ", ".join(key for key in item.meta if key != "line") or "—"
            raise MaeseError("DATA-23", column=column, where=item.id, known=known)
        return " ".join(str(item.meta[column]).casefold().split())
    if isinstance(item, Document):
        return item.text
    asked = next((m.content for m in (*item.messages, Message("user", "")) if m.role == "user"), "")
    return " ".join(asked.lower().split())


def place(item: Document | Conversation, column: str | None = None) -> float:
    """Where the hash of its group sends an item, in [0, 1): it is kept apart when that is at most the share."""
    return chance(group_of(item, column))


def chance(text: str) -> float:
    """The same number in [0, 1) for the same text, here and everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def cut_at(share: float, lowest: float) -> float:
    """Up to which place rows are kept apart. In a short file chance may keep none apart; then it is the nearest to it:
    `cut_at(0.1, lowest=0.3)` is 0.3."""
    return max(share, lowest) if share else -1.0
