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
        # A text without line breaks is cut at a word, never inside one.
        pieces = re.findall(r"[^\n]*\n|[^\n]+", document.text)
        if len(pieces) < 10:
            pieces = re.findall(r"\s*\S+", document.text)
        total, seen, cut = len(document.text), 0, len(pieces)
        for i, piece in enumerate(pieces):
            if seen >= total * (1 - share):
                cut = i
                break
            seen += len(piece)
        for side, text in ((train, "".join(pieces[:cut])), (held, "".join(pieces[cut:]))):
            if text.strip():
                side.append(Document(text.strip(), document.id, document.meta))
    return train, held


def by_hash(rows: list[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    """Each conversation goes where the hash of its first question sends it."""
    train: list[Conversation] = []
    held: list[Conversation] = []
    for row in rows:
        key = " ".join(row.messages[0].content.lower().split())
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        (held if place < share else train).append(row)
    return train, held
