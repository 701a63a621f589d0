"""The one renderer: a document or a conversation to `(ids, mask)`, for training, evaluation and generation alike.

    render(conversation, tokenizer)    Example(ids=[…], mask=[0, 0, …, 1, 1])

`mask[i]` says whether token i is learnt, that is, predicted from the tokens before it. Text typed by people never
becomes a special token; the token that ends an answer comes from here alone and is always learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maese.text.record import Conversation, Document, Message

# The plain template: words any base model has met, no token of its own.
LABEL = {"system": "", "user": "Pregunta: ", "assistant": "Respuesta:"}


@dataclass(frozen=True)
class Example:
    """One row of training: `ids` and, for each, whether it is learnt. The first token never is."""

    ids: list[int]
    mask: list[int]
    id: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return sum(self.mask)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as text: `encode(t, "<|end|>")` spells the mark out, it does not make it."""
    # Not verbose: a whole book is encoded before it is cut, and the warning about its length would be about nothing.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def opening(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, when this tokenizer is of those that put one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def render(item: Document | Conversation, tokenizer: Any, loss: str = "assistant") -> Example:
    """Ids and mask of a whole item. `loss` is which turns are learnt: assistant, last or all."""
    end = tokenizer.eos_token_id
    ids = opening(tokenizer)
    if isinstance(item, Document):
        ids = [*ids, *encode(tokenizer, item.text), end]
        return Example(ids, [0] + [1] * (len(ids) - 1), item.id)
    mask = [0] * len(ids)
    answers = [i for i, m in enumerate(item.messages) if m.role == "assistant"]
    for i, message in enumerate(item.messages):
        learnt = loss == "all" or (message.role == "assistant" and (loss == "assistant" or i == answers[-1]))
        if message.role == "assistant":
            # The label is context; the answer and its end are what is learnt.
            label, body = encode(tokenizer, LABEL["assistant"]), encode(tokenizer, " " + message.content.strip())
            ids += [*label, *body, end]
            mask += [int(loss == "all")] * len(label) + [int(learnt)] * (len(body) + 1)
        else:
            turn = encode(tokenizer, f"{LABEL[message.role]}{message.content.strip()}\n")
            ids += turn
            mask += [int(learnt)] * len(turn)
    return Example(ids, [0, *mask[1:]], item.id)


def prompt_ids(tokenizer: Any, prompt: str, format: str, before: tuple[Message, ...] = ()) -> list[int]:
    """The ids a model continues: the text itself, or the question as it was rendered in training."""
    if format != "qa":
        ids = opening(tokenizer) + encode(tokenizer, prompt)
        return ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    turns = (*before, Message("user", prompt))
    example = render(Conversation(turns, "prompt"), tokenizer)
    return example.ids + encode(tokenizer, LABEL["assistant"])
