"""Texts to groups that say the same: exactly, or nearly (MinHash, Broder 1997).

    seen = Duplicates()
    for item in items: seen.add(item.id, whole(item))
    seen.dropped()                        {"b.txt#7": "a.txt#2"}: the first of each group stays

Nearly the same means that the runs of words of both texts coincide in 80 % (Jaccard). A text of 50 words or more is
compared by runs of five, so what is moved about counts as changed; a shorter one by pairs, because there one other
word would touch most of the runs of five. Fewer words than that make too little to be alike without being equal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

from maese.errors import MaeseError
from maese.text.grams import run_hashes, word_hashes, words
from maese.text.record import Conversation, Document

if TYPE_CHECKING:
    import numpy as np

THRESHOLD = 0.8  # Lee et al. 2022, "Deduplicating training data makes language models better", appendix A
LONG, LONG_RUN, SHORT_RUN = 50, 5, 2  # words
# 20 bands of 6: two texts alike in 0.8 share one with probability 0.998, in 0.5 with 0.27; each pair is then verified.
BANDS, ROWS = 20, 6
SEED = 1997
AT_ONCE = 2**20  # runs hashed together: 8 MB, and some 20 for the answer
SMALL_BUCKET = 64


def whole(item: Document | Conversation) -> str:
    """All that an item says: a document's text, or every turn with its role."""
    if isinstance(item, Document):
        return item.text
    return "\n".join(f"{message.role}: {message.content}" for message in item.messages)


def exact_key(text: str) -> str:
    """Equal for texts that differ only in case and spaces: `exact_key(" Hola  tú") == exact_key("hola tú")`."""
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def text_runs(text: str) -> np.ndarray:
    """The 64-bit hashes a text is compared by; at least one, whatever the text."""
    said = words(text, signs=True) or [exact_key(text)]
    return run_hashes(word_hashes(said), LONG_RUN if len(said) >= LONG else min(SHORT_RUN, len(said)))


def signature(text: str) -> np.ndarray:
    """The MinHash of a text, `(120,)` of 32 bits: two of them agree in about the share of runs both texts have."""
    return signatures([text_runs(text)])[0]


def signatures(runs: list[np.ndarray]) -> np.ndarray:
    """The MinHash of each text from its runs: `(texts, 120)`. Error: DEP-01 (rensa is not installed)."""
    import numpy as np

    try:
        from rensa import RMinHash
    except ImportError:
        raise MaeseError("DEP-01", package="rensa", extra="data") from None

    borders = np.cumsum([0, *map(len, runs)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(runs), borders, BANDS * ROWS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


class Duplicates:
    """Which of the texts added say the same as one before. A text costs about 0.8 kB, 0.3 without `near`."""

    def __init__(self, near: bool = True, threshold: float = THRESHOLD) -> None:
        self.near, self.threshold = near, threshold
        self.ids: list[str] = []
        self.first: dict[str, int] = {}  # the place of the first text with each key
        self.same: list[int] = []  # the place of the first text exactly like each
        self._pending: list[np.ndarray] = []
        self._waiting = 0
        self._parts: list[np.ndarray] = []
        self._groups: list[int] | None = None

    def add(self, id: str, text: str) -> None:
        """Take note of a text; ids are yours and are not repeated."""
        if self._note(id, exact_key(text)) and self.near:
            self._pending.append(text_runs(text))
            self._waiting += len(self._pending[-1])
            if self._waiting >= AT_ONCE:
                self._flush()

    def add_known(self, id: str, key: str, signature: np.ndarray | None) -> None:
        """Take note of a text by what was worked out of it elsewhere: its `exact_key` and its `signature`."""
        if self._note(id, key) and self.near:
            assert signature is not None
            self._flush()
            self._parts.append(signature[None])

    def _note(self, id: str, key: str) -> bool:
        """Whether it is the first text with its key."""
        self._groups = None
        place = len(self.ids)
        self.ids.append(id)
        self.same.append(self.first.setdefault(key, place))
        return self.same[-1] == place

    def _flush(self) -> None:
        if self._pending:
            self._parts.append(signatures(self._pending))
            self._pending, self._waiting = [], 0

    def _kept(self) -> list[int]:
        """For each text, the place of the one that stays for it."""
        if self._groups is None:
            self._flush()
            self._groups = self.same
            if self._parts:
                self._parts = [_stacked(self._parts)]
                places = [place for place, same in enumerate(self.same) if place == same]
                leaders = alike(self._parts[0], self.threshold)
                nearest = {place: places[row] for place, row in zip(places, leaders, strict=True)}
                self._groups = [nearest[same] for same in self.same]
        return self._groups

    def groups(self) -> list[list[str]]:
        """The ids of each group of two or more that say the same, in order, the one that stays first."""
        members: dict[int, list[str]] = {}
        for id, kept in zip(self.ids, self._kept(), strict=True):
            members.setdefault(kept, []).append(id)
        return [group for group in members.values() if len(group) > 1]

    def dropped(self) -> dict[str, str]:
        """The ids that go, each with the id that stays in its place."""
        return {self.ids[i]: self.ids[kept] for i, kept in enumerate(self._kept()) if kept != i}

    def reasons(self) -> dict[str, str]:
        """The ids that go, each with `duplicate` (exactly one before) or `near_duplicate`."""
        kept = self._kept()
        return {
            id: "duplicate" if self.same[i] != i else "near_duplicate" for i, id in enumerate(self.ids) if kept[i] != i
        }


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """One array of them all, emptying the list on the way: half the memory of having both."""
    import numpy as np

    end = sum(map(len, parts))
    rows = np.empty((end, BANDS * ROWS), np.uint32)
    while parts:
        part = parts.pop()
        rows[end - len(part) : end] = part
        end -= len(part)
    return rows


def alike(signatures: np.ndarray, threshold: float = THRESHOLD) -> list[int]:
    """For each row of `(texts, 120)`, the first row of its group: rows that agree in `threshold` are joined, and
    those joined to the same one are one group."""
    import numpy as np

    leader = list(range(len(signatures)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return row

    for bucket in _buckets(signatures):
        while len(bucket) > 1:
            first, rest = bucket[0], bucket[1:]
            root = find(first)
            # Those already together need no proof; what is left of a small bucket is compared each with each.
            apart = [row for row in rest if find(row) != root]
            agree = (signatures[apart] == signatures[first]).mean(axis=1) >= threshold if apart else np.empty(0, bool)
            for row in (row for row, same in zip(apart, agree, strict=True) if same):
                low, high = sorted((find(row), find(first)))
                leader[high] = low
            bucket = rest if len(rest) < SMALL_BUCKET else [row for row in apart if find(row) != find(first)]
    return [find(row) for row in range(len(signatures))]


def _buckets(signatures: np.ndarray) -> Iterator[list[int]]:
    """The rows that share a band, band after band, each bucket in order."""
    import numpy as np

    for band in range(BANDS):
        key = np.zeros(len(signatures), np.uint64)
        for column in range(band * ROWS, band * ROWS + ROWS):
            key *= np.uint64(0x9E3779B97F4A7C15)
            key += signatures[:, column]
            key ^= key >> np.uint64(29)
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        ends = np.concatenate((starts[1:], [len(order)]))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            yield order[start:end].tolist()
