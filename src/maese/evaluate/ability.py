"""What a model can do, in figures that do not depend on its tokenizer nor on a judge's taste.

    bits_per_byte(model, tokenizer, rows)        how well it foretells text it has not read: less is better
    minimal_pairs(model, tokenizer)              how often it prefers the right one of two sentences
    answers(writer, questions)                   whether its answers end, and are in Spanish

Bits per byte is the loss over how much it spells: two models of different tokenizers can be compared by it, which by
loss per token or by perplexity they cannot.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from maese.evaluate.likelihood import loss_and_targets, loss_sum
from maese.model.load import pad_id
from maese.tokens.batches import collate
from maese.tokens.encode import byte_letters
from maese.tokens.template import Example

PAIRS = Path(__file__).parent / "pairs.toml"
ROWS = 16  # through the model at once


@dataclass(frozen=True)
class Bits:
    """What a text costs a model: `per_byte`, over how many bytes, and tokens, that was measured."""

    bits: float
    bytes: int
    tokens: int

    @property
    def per_byte(self) -> float:
        return self.bits / max(1, self.bytes)


def bits_per_byte(model: Any, tokenizer: Any, rows: Sequence[Example]) -> Bits:
    """The bits of what is learnt in the rows over the bytes it spells. Tokens that spell nothing do not count.

    An end that a model was never shown would say more of its schooling than of its Spanish.
    """
    spelt = byte_lengths(tokenizer)
    kept = [_spelling(example, spelt) for example in rows]
    nats, targets = loss_and_targets(model, [example for example in kept if example.targets], pad_id(tokenizer), ROWS)
    size = sum(spelt[i] for example in kept for i, m in zip(example.ids, example.mask, strict=True) if m)
    return Bits(nats / math.log(2), size, targets)


def whole_text(tokenizer: Any, text: str) -> Example:
    """A text as one example, after the token that begins one; `tokens.settle.pieces` cuts it to a model's context."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return Example(ids, [0] + [1] * (len(ids) - 1))


def _spelling(example: Example, spelt: list[int]) -> Example:
    """The example with nothing learnt of what spells no byte, nor of the first token, which nothing comes before."""
    mask = [m and int(spelt[i] > 0) for i, m in zip(example.ids, example.mask, strict=True)]
    return replace(example, mask=[0, *mask[1:]])


def byte_lengths(tokenizer: Any) -> list[int]:
    """How many bytes each token spells; a special one, none: `byte_lengths(t)[t.convert_tokens_to_ids("ñ")]` is 2."""
    letters = byte_letters()
    special = set(tokenizer.all_special_ids)
    found = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in special or token is None:
            found.append(0)
        elif all(letter in letters for letter in token):
            found.append(len(token))
        else:  # not a vocabulary of bytes: what it shows is what it spells
            found.append(len(tokenizer.decode([i]).encode()))
    return found


@lru_cache(maxsize=1)
def pairs() -> dict[str, list[tuple[str, str]]]:
    """Right and wrong sentences by what they differ in: `{"gender": [("La casa blanca.", "La casa blanco."), …]}`."""
    tables = tomllib.loads(PAIRS.read_text("utf-8"))
    return {kind: [(right, wrong) for right, wrong in table["pairs"]] for kind, table in tables.items()}


def minimal_pairs(model: Any, tokenizer: Any) -> dict[str, tuple[int, int]]:
    """For each kind of pair, in how many the right sentence is the likelier, and how many there are.

    As BLiMP does (Warstadt et al. 2020, arXiv 1912.00582): a model that knows nothing gets half of them.
    """
    found = {}
    for kind, some in pairs().items():
        each = [_log_likelihood(model, tokenizer, [right, wrong]) for right, wrong in some]
        found[kind] = (sum(right > wrong for right, wrong in each), len(each))
    return found


def _log_likelihood(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    """Of each text after the token that begins one, in nats."""
    import torch

    device, found = next(model.parameters()).device, []
    for text in texts:
        batch = collate([whole_text(tokenizer, text)], pad_id(tokenizer))
        with torch.no_grad():
            found.append(-float(loss_sum(model, {key: value.to(device) for key, value in batch.items()})))
    return found


@dataclass(frozen=True)
class Answered:
    """Of how many questions the answer ended by itself, and of how many it was Spanish, by those that can be told."""

    asked: int
    ended: int
    spanish: int
    told: int  # answers long enough to tell their language
    said: list[str]


def answers(
    writer: Any, questions: Sequence[str], progress: Callable[[int], object] | None = None, **settings: Any
) -> Answered:
    """Have a model answer, always with its likeliest token, and look at how."""
    from maese.text.language import language_of

    ended, languages, said = 0, [], []
    for done, question in enumerate(questions, 1):
        answer = writer.generate(question, temperature=0.0, repetition_penalty=1.0, **settings)
        ended += answer.reason == "end"
        languages.append(language_of(answer.text))
        said.append(answer.text)
        if progress:
            progress(done)
    told = [language for language in languages if language is not None]
    return Answered(len(said), ended, told.count("es"), len(told), said)
