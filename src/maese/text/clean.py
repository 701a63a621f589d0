"""A text to the reason it is not worth learning from, or None: optional rules, each with its threshold and its source.

    reason_to_drop("jaja " * 200, ["repetition"])             "repeated_words"
    reason(conversation, ["length", "language"])              "language:en"

A document is judged whole, by the thresholds its sources give for pages. Of a conversation only what the assistant
says is judged, all its turns joined, because only that is learnt; an answer may be one word, a list or a sum, so its
thresholds are wider. What stands between ``` marks is code and is not judged, except by its length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from maese.say import has, say
from maese.text.language import language_of
from maese.text.record import Conversation, Document

FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
SYMBOL = re.compile(r"#+|\.{3,}|…")  # «####» is one heading, not four signs
BULLETS = ("•", "‣", "▪", "◦", "●", "- ", "* ")  # with a space: «—Ven» and «-Ven» are dialogue
COMMON = {"de", "la", "que", "el", "en", "y", "a", "los", "se", "del", "las", "un", "por", "con", "no", "una"}


@dataclass(frozen=True)
class Thresholds:
    """Gopher (Rae et al. 2021, "Scaling language models", appendix A.1.1 and table A1), which FineWeb (Penedo et al.
    2024) also uses, unless another source is named. Shares are between 0 and 1."""

    min_words: int = 50
    max_words: int = 100_000
    # Ours: in fewer words one repeated pair or one figure is already a large share, and so is one line of three.
    judged_from: int = 20  # words
    lines_judged_from: int = 5
    repeated_lines: float = 0.30  # lines that were already there
    repeated_lines_letters: float = 0.20  # the same, weighed by their length
    repeated_paragraphs: float = 0.30
    repeated_paragraphs_letters: float = 0.20
    top_run: tuple[float, ...] = (0.20, 0.18, 0.16)  # letters in the commonest run of 2, 3, 4 words
    repeated_runs: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # letters in repeated runs of 5 … 10 words
    symbols: float = 0.10  # `#` and ellipses for each word
    letters: float = 0.80  # words with a letter
    word_length: tuple[float, float] = (3, 10)  # mean, in letters
    bullets: float = 0.90  # lines that begin with a bullet
    ellipsis: float = 0.30  # lines that end in an ellipsis
    common: int = 2  # different words among the commonest; the list is Spanish (FineWeb-2, Penedo et al. 2025)
    language: str = "es"


DOCUMENT = Thresholds()
# Ours: answers are short by nature, lists and figures are asked for, a line of code has no common words, and an
# explanation repeats what it explains («la raíz cuadrada»): twice Gopher's shares. A model's loops reach far above.
ANSWER = replace(
    DOCUMENT, min_words=1, judged_from=30, letters=0.5, word_length=(2, 15), bullets=1.0, common=0, symbols=0.2,
    top_run=(0.40, 0.36, 0.32), repeated_runs=(0.30, 0.28, 0.26, 0.24, 0.22, 0.20),
)  # fmt: skip

Rule = Callable[[str, Thresholds], str | None]


def length(text: str, limits: Thresholds = DOCUMENT) -> str | None:
    """`too_short` or `too_long_text`, by words."""
    words = len(text.split())
    if words < limits.min_words:
        return "too_short"
    return "too_long_text" if words > limits.max_words else None


def repetition(text: str, limits: Thresholds = DOCUMENT) -> str | None:
    """`repeated_lines`, `repeated_paragraphs`, `repeated_words` (one run of 2 to 4 over and over) or
    `repeated_ngrams` (runs of 5 to 10): Gopher, table A1."""
    prose = _prose(text)
    lines = [line for line in map(str.strip, prose.split("\n")) if any(map(str.isalpha, line))]
    words = " ".join(lines).casefold().split()
    if len(words) < limits.judged_from:
        return None
    if _repeats(lines, limits.repeated_lines, limits.repeated_lines_letters):
        return "repeated_lines"
    paragraphs = [part for part in map(str.strip, re.split(r"\n\s*\n", prose)) if part]
    if _repeats(paragraphs, limits.repeated_paragraphs, limits.repeated_paragraphs_letters):
        return "repeated_paragraphs"
    return _repeated_runs(words, sum(map(len, words)), limits)


def _repeats(pieces: list[str], share: float, letters: float) -> bool:
    """Whether too many of the pieces, or of their letters, were already there."""
    if len(pieces) < 2 or len(different := set(pieces)) == len(pieces):
        return False
    whole, once = sum(map(len, pieces)), sum(map(len, different))
    return len(pieces) - len(different) > share * len(pieces) or whole - once > letters * whole


def _repeated_runs(words: list[str], letters: int, limits: Thresholds) -> str | None:
    for size, share in enumerate(limits.top_run, 2):
        counts = Counter(zip(*(words[i:] for i in range(size)), strict=False))
        most = max(counts.values())
        if most == 1:  # what is not repeated in short is not repeated at length: most texts leave here
            return None
        top = max(len("".join(run)) * count for run, count in counts.items() if count > 1)
        if most > 2 and top > share * letters:
            return "repeated_words"
    for size, share in enumerate(limits.repeated_runs, len(limits.top_run) + 2):
        repeated = _letters_repeated(words, size)
        if not repeated:
            return None
        if repeated > share * letters:
            return "repeated_ngrams"
    return None


def _letters_repeated(words: list[str], size: int) -> int:
    """The letters in runs of `size` words that were already there, none counted twice."""
    seen, letters, place = set[tuple[str, ...]](), 0, 0
    while place + size <= len(words):
        run = tuple(words[place : place + size])
        if run in seen:
            letters += len("".join(run))
            place += size
        else:
            seen.add(run)
            place += 1
    return letters


def symbols(text: str, limits: Thresholds = DOCUMENT) -> str | None:
    """`symbols`, `few_letters`, `word_length`, `bullets`, `ellipsis` or `few_common_words`: Gopher, appendix A.1.1."""
    prose = _prose(text)
    words = prose.split()
    count = len(words)
    if count < limits.judged_from:
        return None
    if len(SYMBOL.findall(prose)) > limits.symbols * count:
        return "symbols"
    if sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) < limits.letters * count:
        return "few_letters"
    low, high = limits.word_length
    if not low <= sum(map(len, words)) / count <= high:
        return "word_length"
    lines = [line for line in map(str.strip, prose.split("\n")) if line]
    if len(lines) >= limits.lines_judged_from:
        if sum(line.startswith(BULLETS) for line in lines) > limits.bullets * len(lines):
            return "bullets"
        if sum(line.endswith(("...", "…")) for line in lines) > limits.ellipsis * len(lines):
            return "ellipsis"
    if limits.common and len(COMMON & set(map(str.casefold, words))) < limits.common:
        return "few_common_words"
    return None


def language(text: str, limits: Thresholds = DOCUMENT) -> str | None:
    """`language:en` when a text is clearly in English and not in the language wanted. DEP-01 without lingua."""
    found = language_of(text)
    return f"language:{found}" if found not in (None, limits.language) else None


def _prose(text: str) -> str:
    return FENCED.sub("\n", text) if "```" in text else text


# What a recipe names in `data.clean`, in the order they are tried: the cheap ones first.
RULES: dict[str, Rule] = {"length": length, "repetition": repetition, "symbols": symbols, "language": language}


def reason_to_drop(text: str, rules: list[str], limits: Thresholds = DOCUMENT) -> str | None:
    """The first reason one of the rules named gives, or None: `reason_to_drop("Sí.", ["length"])` is `too_short`."""
    return next((found for name, rule in RULES.items() if name in rules and (found := rule(text, limits))), None)


def reason(item: Document | Conversation, rules: list[str]) -> str | None:
    """The reason to leave an item out, or None; of a conversation, that of all the assistant says."""
    if isinstance(item, Document):
        return reason_to_drop(item.text, rules)
    said = "\n".join(message.content for message in item.messages if message.role == "assistant")
    return reason_to_drop(said, rules, ANSWER)


def reason_name(reason: str) -> str:
    """A reason as people read it: `reason_name("language:en")` is «en otro idioma: inglés»."""
    name, _, detail = reason.partition(":")
    spoken = say(f"reason.language_name.{detail}") if has(f"reason.language_name.{detail}") else detail
    return say(f"reason.{name}", language=spoken) if has(f"reason.{name}") else reason
