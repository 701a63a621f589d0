"""Runs of text to ids, many at a time, each as it would come out in the middle of the whole string.

    Runs(tokenizer, encode_many, marks).encode([[Piece(5), Piece("user\\nHola")]])     [[[5], [312, 198, 9210]]]

Most tokenizers cut a text the same way wherever it stands, and there is nothing to do. Those that put a space before
the first word would put one in the middle of a turn too; and a mark that was added without being declared special
would be made out of what a person typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maese.tokens.template import Piece

Encode = Callable[[list[str]], list[list[int]]]


class Runs:
    """`encode_many` turns texts into ids and never makes a special token; `marks` are ids that no text may become."""

    def __init__(self, tokenizer: Any, encode_many: Encode, marks: Iterable[int]) -> None:
        self._first = encode_many
        self._glued = without_prefix(tokenizer)
        eos = tokenizer.eos_token
        # Whether a text after a special token is cut as one that begins, or as one that goes on.
        self._begins = bool(self._glued and eos and self._alone(tokenizer, eos))
        added = tokenizer.added_tokens_decoder
        loose = [added[i].content for i in marks if i in added and not added[i].special]
        self._loose = re.compile("|".join(map(re.escape, loose))) if loose else None

    def encode(self, rows: list[list[Piece]]) -> list[list[Sequence[int]]]:
        """Ids of every piece of every row; a text met twice is encoded once."""
        if not self._glued:
            made = self._made(dict.fromkeys(value for row in rows for value, _ in row if isinstance(value, str)), False)
            return [[made[value] if isinstance(value, str) else (value,) for value, _ in row] for row in rows]
        places = [self._places(row) for row in rows]
        both = [
            self._made(
                dict.fromkeys(t for row in places for t, how in row if how == glued and isinstance(t, str)), glued
            )
            for glued in (False, True)
        ]
        return [[both[how][text] if isinstance(text, str) else (text,) for text, how in row] for row in places]

    def _places(self, row: list[Piece]) -> list[tuple[int | str, bool]]:
        """Each piece, and whether it goes on from the one before it."""
        before = [None, *(piece.value for piece in row[:-1])]
        follows = [isinstance(b, str) or (isinstance(b, int) and not self._begins) for b in before]
        return [(piece.value, how) for piece, how in zip(row, follows, strict=True)]

    def _made(self, texts: Iterable[str], glued: bool) -> dict[str, list[int]]:
        ordered = list(texts)
        return dict(zip(ordered, self._many(ordered, glued), strict=True))

    def _many(self, texts: list[str], glued: bool) -> list[list[int]]:
        encode = self._glued if glued and self._glued else self._first
        ids = encode(texts) if texts else []
        for i, text in enumerate(texts if self._loose else []):
            if self._loose and self._loose.search(text):
                ids[i] = self._spelt(text, encode)
        return ids

    def _spelt(self, text: str, encode: Encode) -> list[int]:
        """A text with marks in it, cut inside each so that none is whole."""
        assert self._loose is not None
        cuts = [0, *(match.start() + 1 for match in self._loose.finditer(text)), len(text)]
        first, *others = [text[a:b] for a, b in pairwise(cuts)]
        return [*encode([first])[0], *(i for part in (self._glued or self._first)(others) for i in part)]

    def _alone(self, tokenizer: Any, eos: str) -> bool:
        after = tokenizer(eos + "a", add_special_tokens=False)["input_ids"]
        return after[1:] == self._first(["a"])[0]


def without_prefix(tokenizer: Any) -> Encode | None:
    """The same tokenizer without the space it puts before the first word; None when it puts none."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not first or not first[0].startswith(("▁", "Ġ")) or backend is None:
        return None
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["normalizer"] = _unprefixed(state["normalizer"])
    state["pre_tokenizer"] = _unprefixed(state["pre_tokenizer"])
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return lambda texts: [found.ids for found in copy.encode_batch_fast(texts, add_special_tokens=False)]


def _unprefixed(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [kept for each in part[key] if (kept := _unprefixed(each)) is not None]}
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if "add_prefix_space" in part else part
