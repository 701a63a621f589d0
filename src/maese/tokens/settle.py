"""What becomes of an example longer than the context: what the recipe says, and never half a silence.

    settle(item, example, renderer, data)     [] left out · [Example] cut · [Example, Example, …] in pieces

`truncate` keeps the token that ends the answer, and of a conversation drops the oldest turns, whole. `split` is for
raw text: each piece may begin with the last `stride` tokens of the one before, to be read and not learnt again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maese.recipe import Data
from maese.text.record import Conversation, Document, Message
from maese.tokens.template import Example


def settle(item: Document | Conversation, example: Example, renderer: Any, data: Data) -> list[Example]:
    """The examples of an item that is too long, by `data.too_long`: `drop`, `truncate` or `split`."""
    if data.too_long == "split":
        return pieces(example, data.max_length, data.stride)
    if data.too_long == "drop":
        return []
    if isinstance(item, Conversation):
        example = fewer_turns(item, example, renderer, data)
    cut = truncate(example, data.max_length, renderer.stop_ids)
    return [cut] if cut else []


def pieces(example: Example, limit: int, stride: int) -> list[Example]:
    """Windows of at most `limit` tokens; every token but the very first is learnt once, given a stride of 1 or more.

    With no stride the first token of each piece is context for the others, since nothing comes before it.
    """
    found = []
    for start in range(0, max(1, len(example) - stride), limit - stride):
        ids = example.ids[start : start + limit]
        read = min(len(ids), max(1, stride)) if start else 1  # what the piece before learnt already
        mask = [*([0] * read), *example.mask[start + read : start + limit]]
        if any(mask):
            found.append(Example(ids, mask, f"{example.id}@{start}" if start or len(example) > limit else example.id))
    return found


def truncate(example: Example, limit: int, stop_ids: frozenset[int]) -> Example | None:
    """The first `limit` tokens, the last of them one that ends an answer; None when no answer would be left.

    Where the cut falls in what is only read, the example ends with the last whole answer before it.
    """
    if len(example) <= limit:
        return example
    ends = [i for i, learnt in enumerate(example.mask) if learnt and example.ids[i] in stop_ids]
    if example.mask[limit - 2] and example.mask[limit - 1] and ends:
        kept = example.mask[: limit - 1]
        return Example([*example.ids[: limit - 1], example.ids[ends[-1]]], [*kept, 1], example.id)
    whole = [i for i in ends if i < limit]
    # The question alone fills the row: only its end would be learnt, in the middle of a word.
    return Example(example.ids[: whole[-1] + 1], example.mask[: whole[-1] + 1], example.id) if whole else None


def fewer_turns(item: Conversation, example: Example, renderer: Any, data: Data) -> Example:
    """The conversation without its oldest exchanges, as many as must go; the system's word and the last one stay."""
    system = [m for m in item.messages[:1] if m.role == "system"]
    turns: list[Message] = list(item.messages[len(system) :])
    while len(example) > data.max_length:
        later = next((i for i, m in enumerate(turns) if m.role == "user" and i), 0)
        if not later or not any(m.role == "assistant" for m in turns[later:]):
            break
        turns = turns[later:]
        example = renderer.render(replace(item, messages=(*system, *turns)), data.loss)
    return example
