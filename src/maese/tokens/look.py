"""What the model sees of an example, token by token, for people: which are learnt, which are read, which are cut.

    mask_pieces(example, tokenizer, limit=256)
    [{"text": "Pregunta", "state": "context", "special": False}, …, {"text": "␣Sí", "state": "learnt", …}]

The terminal and the pages draw these same pieces; none of them decides anything.
"""

from __future__ import annotations

import re
from typing import Any

from maese.tokens.encode import byte_letters
from maese.tokens.template import Example

# What has no ink of its own: a break, a tab, the space before a word.
INK = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀", "\u00a0": "⍽"})
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def mask_pieces(example: Example, tokenizer: Any, limit: int | None = None) -> list[dict[str, Any]]:
    """Each token as `text`, `state` (learnt, context, cut or special) and whether it is `special`.

    `cut` is from `limit` on; a special token that is learnt, such as the end of an answer, has the state "learnt". A
    space that begins a token is ␣, a break ⏎, and bytes that are not a whole character are ⟨C3⟩.
    """
    shown = _Shown(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    pieces = []
    for i, (token, learnt) in enumerate(zip(example.ids, example.mask, strict=True)):
        marked = token in special
        state = (
            "cut" if limit is not None and i >= limit else "learnt" if learnt else "special" if marked else "context"
        )
        pieces.append({"text": shown.text(token), "state": state, "special": marked})
    return pieces


def share_learnt(pieces: list[dict[str, Any]]) -> float:
    """Learnt tokens over all that are kept, in [0, 1]."""
    kept = [piece for piece in pieces if piece["state"] != "cut"]
    return sum(piece["state"] == "learnt" for piece in kept) / len(kept) if kept else 0.0


class _Shown:
    """One token at a time as readable text: `decode` alone would show half a letter as a question mark."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        probe = "".join(tokenizer.convert_ids_to_tokens(tokenizer("ñ", add_special_tokens=False)["input_ids"]))
        self._letters = byte_letters() if "ñ" not in probe and "<0x" not in probe else {}
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}

    def text(self, token: int) -> str:
        name = self._added.get(token)
        if name is not None:
            return name.translate(INK)
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a model may have rows in its table that its tokenizer does not know
            return f"⟨{token}⟩"
        if self._letters and all(letter in self._letters for letter in name):
            text = bytes(self._letters[letter] for letter in name).decode("utf-8", "surrogateescape")
        elif found := BYTE.fullmatch(name):
            text = bytes([int(found.group(1), 16)]).decode("utf-8", "surrogateescape")
        else:
            text = name.replace("▁", " ")
        inked = "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if "\udc80" <= c <= "\udcff" else c for c in text.translate(INK))
        space = len(inked) - len(inked.lstrip(" "))
        return "␣" * space + inked[space:]
