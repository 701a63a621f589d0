"""What is learnt and what is kept apart to be measured on.

Raw text: the last lines of each document, in one piece, because lines drawn at random from a book have neighbours in
training that give them away. Questions: by hash of the question, so that the same one falls on the same side for ever,
whatever is added to the file.
"""

from __future__ import annotations

import hashlib
import re

from maese.text.record import Conversation, Document


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


def by_hash(rows: list[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    """Each conversation goes where the hash of its first question sends it."""
    places = []
    for row in rows:
        key = " ".join(row.messages[0].content.lower().split())
        places.append(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64)
    # In a short file chance may keep none apart; then it is the nearest to it.
    share = max(share, min(places)) if share and places else share
    train = [row for row, place in zip(rows, places, strict=True) if place > share or not share]
    held = [row for row, place in zip(rows, places, strict=True) if place <= share and share]
    return train, held
