"""A text to the hashes of its runs of words: what duplicates and leaks are found by.

    run_hashes(word_hashes(words("¡Hola, mundo! Hola, mundo.")), 2)     3 pairs, the first and the last of them equal

Hashes are the same in every process and on every machine, so what two of them found can be put together.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WORD = re.compile(r"\w+")
# Signs that change what is said («3 + 4», «x -= 1») count as words when whole texts are compared; commas do not.
WORD_OR_SIGN = re.compile(r"\w+|[-+*/=<>%^&|~$€#@\\]")
FACTOR = 0x9E3779B97F4A7C15  # odd, so the order of the words counts and nothing is lost
MOST_WORDS = 2**20  # remembered at once: about 150 MB


class _WordHashes(dict):
    """Each word's 64-bit hash, worked out once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        self[word] = hashed = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        return hashed


_HASHES = _WordHashes()


def words(text: str, signs: bool = False) -> list[str]:
    """Lower-case words without punctuation: `words("¿Qué, Ana?")` is `["qué", "ana"]`."""
    return (WORD_OR_SIGN if signs else WORD).findall(unicodedata.normalize("NFC", text).casefold())


def word_hashes(words: list[str]) -> np.ndarray:
    """A 64-bit hash for each word: `(words,)`."""
    import numpy as np

    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def run_hashes(each: np.ndarray, size: int) -> np.ndarray:
    """From the hashes of words, one for every run of `size`: `(words - size + 1,)`, empty when there are fewer."""
    import numpy as np

    count = len(each) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    # A run of n + m words from one of n and the one of m after it: 13 words take 5 such steps instead of 12.
    run, length, block, width = each, 0, each, 1
    while True:
        shift = np.uint64(pow(FACTOR, width, 2**64))
        if size & width:
            end = len(each) - length - width + 1
            run = block if not length else run[:end] * shift + block[length : length + end]
            length += width
        if length == size:
            break
        block = block[:-width] * shift + block[width:]
        width *= 2
    run = run ^ (run >> np.uint64(32))
    run *= np.uint64(0xD6E8FEB86659FD93)
    return run ^ (run >> np.uint64(32))
