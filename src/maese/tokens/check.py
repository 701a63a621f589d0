"""The doctor with a tokenizer at hand: how long rows are in tokens, how much of them is learnt, what would be cut.

found = check(Source(path="tutor.jsonl"), recipe.data, tokenizer)      Audit(unit="tokens", …)
for row in shown(Source(path="tutor.jsonl"), recipe.data, tokenizer, first=3): …      one row as the model sees it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Data, Source
from maese.text import split
from maese.text.audit import audit
from maese.text.findings import Audit
from maese.text.read import Item, open_source
from maese.tokens.encode import encoder_of
from maese.tokens.look import mask_pieces
from maese.tokens.template import open_template


def check(
    source: Source,
    data: Data,
    tokenizer: Any,
    prompts: Iterable[str] = (),
    near: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """What the doctor says of a source, by the choices of a recipe's data. Errors: those of opening it."""
    reading = open_source(source, data.format)
    renderer = open_template(data.template, tokenizer, encoder_of(tokenizer).many if tokenizer.is_fast else None)

    def held(item: Item) -> bool:
        return split.place(item, data.group) <= data.validation

    found = audit(
        reading,
        lengths=lambda items: list(renderer.render_many(items, data.loss)),
        limit=data.max_length,
        too_long="split" if reading.kind == "text" and data.too_long != "drop" else data.too_long,
        held=None if reading.one_piece or not data.validation else held,
        prompts=list(prompts),
        near=near,
        specials=list(tokenizer.all_special_tokens),
        stop_ids=renderer.stop_ids,
        progress=progress,
    )
    if not found.rows and not found.findings:
        raise MaeseError("DATA-05", path=source.name)
    return found


def shown(source: Source, data: Data, tokenizer: Any, first: int = 1, rows: int = 3) -> Iterator[dict[str, Any]]:
    """Rows from the `first` on (from 1): the `id`, the `text` as one string, and the `pieces` the model sees."""
    renderer = open_template(data.template, tokenizer)  # few rows: the slow way is the quick one
    whole = open_source(source, data.format, on_fault=lambda problem: None)  # counted as the doctor counts them
    for item in itertools.islice(whole, first - 1, first - 1 + rows):
        example = renderer.render(item, data.loss)
        text = item.text if hasattr(item, "text") else renderer.text(item.messages)
        limit = data.max_length
        yield {"id": item.id, "text": text, "pieces": mask_pieces(example, tokenizer, limit), "tokens": len(example)}
