"""Two sets of texts to what they share: runs of 13 words, as in GPT-3 (Brown et al. 2020, appendix C).

    train = Overlap()
    for text in learnt: train.learn(text)
    train.check("…")                          0.0 when none of its runs was learnt from, 1.0 when all were

    Prompts(["¿Cuál es la capital de Perú?"]).inside(text)      [0] when the text holds the first prompt

Case, punctuation and spaces do not count. A text shorter than 13 words is compared whole; one shorter than 6 is never
judged: «Sí, claro» is not a leak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maese.text.grams import run_hashes, word_hashes, words

if TYPE_CHECKING:
    import numpy as np

RUN, SHORTEST = 13, 6  # words


def _runs(text: str) -> np.ndarray:
    said = words(text)
    return run_hashes(word_hashes(said), min(RUN, len(said)) if len(said) >= SHORTEST else RUN)


class Overlap:
    """The runs of words of the texts learnt from, 8 bytes each: learn from all of them, then check others."""

    def __init__(self) -> None:
        import numpy as np

        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []

    def learn(self, text: str) -> None:
        """Take note of a text's runs."""
        if len(runs := _runs(text)):
            self._new.append(runs)

    def check(self, text: str) -> float:
        """The share of a text's runs, between 0 and 1, that were learnt from; 0 when it is too short to judge."""
        import numpy as np

        if self._new:
            # Sorted by hand: numpy's own `unique` takes fifteen times as long on so many.
            runs = np.sort(np.concatenate([self._known, *self._new]))
            self._known, self._new = runs[np.concatenate(([True], runs[1:] != runs[:-1]))], []
        runs = _runs(text)
        if not len(runs) or not len(self._known):
            return 0.0
        places = np.minimum(np.searchsorted(self._known, runs), len(self._known) - 1)
        return float((self._known[places] == runs).mean())


class Prompts:
    """Evaluation prompts or tasks, to be looked for inside texts: a long one by any of its runs, a short one whole."""

    def __init__(self, prompts: list[str]) -> None:
        self._of: dict[int, dict[int, set[int]]] = {}  # words of the run, its hash, the prompts that have it
        self._starts = set[int]()  # the first words of each run: most texts hold none, and that is all they cost
        for number, prompt in enumerate(prompts):
            each = word_hashes(words(prompt))
            size = min(RUN, len(each))
            if size >= SHORTEST:
                for run in run_hashes(each, size).tolist():
                    self._of.setdefault(size, {}).setdefault(run, set()).add(number)
                self._starts.update(run_hashes(each, SHORTEST)[: len(each) - size + 1].tolist())

    def inside(self, text: str) -> list[int]:
        """The places, from 0, of the prompts that a text holds."""
        each, found = word_hashes(words(text)), set[int]()
        if self._starts.isdisjoint(run_hashes(each, SHORTEST).tolist()):
            return []
        for size, known in self._of.items():
            for run in known.keys() & run_hashes(each, size).tolist():
                found |= known[run]
        return sorted(found)
