"""Marks of a template that become tokens of a tokenizer which did not have them: `<|user|>`, `<|end|>`.

    ids = add_marks(tokenizer, "maese")      [50295, 50296, 50297, 50298], and the tokenizer knows them

Only the tokenizer is changed here; their rows are `model.rows`.
"""

from __future__ import annotations

from typing import Any

from maese.tokens.template import TEMPLATES, encode


def add_marks(tokenizer: Any, template: str) -> list[int]:
    """Give a tokenizer the marks of a built-in template that it lacks, as special tokens; returns their ids."""
    from tokenizers import AddedToken

    marks = TEMPLATES[template].marks if template in TEMPLATES else ()
    known = tokenizer.get_added_vocab()
    missing = [mark for mark in marks if mark not in known]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in missing], special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(mark) for mark in missing]


def spelt(tokenizer: Any, ids: list[int]) -> list[list[int]]:
    """For each token the ids it would be written with, were it text: where its meaning may begin."""
    return [[i for i in encode(tokenizer, tokenizer.convert_ids_to_tokens(token)) if i != token] for token in ids]


def added(tokenizer: Any, before: Any) -> list[int]:
    """The ids a tokenizer has and the one before it had not; a token for filling, which nobody reads, is none."""
    known = before.get_vocab()
    fill = tokenizer.pad_token
    return sorted(i for token, i in tokenizer.get_vocab().items() if token != fill and known.get(token) != i)
