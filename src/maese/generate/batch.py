"""Many answers at once, each row with its own prompt, settings, seed and, of several over one base, its own voice.

    write_many([socratico, narrador], [prompt_ids, other_ids], [settings, settings])     [Answer(…), Answer(…)]

A row gives the text it would give alone: its neighbours are behind its mask, its positions are its own, and its chance
is its own. Rows that cannot go together (a family with no cache of keys and values, an adapter that is more than LoRA)
are written one after another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from maese import recipe as recipes
from maese.errors import MaeseError
from maese.generate.draft import Answer, Draft
from maese.generate.engine import ONE_THREAD_PARAMETERS, Writer, threads
from maese.generate.sample import draw, probabilities
from maese.model.load import context_of
from maese.model.voices import BASE, mixes, speaking

OnText = Callable[[int, str], object] | None  # the number of the row and a piece of its text
OnEnd = Callable[[int, Answer], object] | None  # the number of a row that has ended, and all of it


def write_many(
    writers: Sequence[Writer], rows: Sequence[list[int]], settings: Sequence[recipes.Generate], on_text: OnText = None,
    on_end: OnEnd = None, stoppable: bool = False,
) -> list[Answer]:  # fmt: skip
    """The answers of writers that share one model, each to its own ids. Error: GEN-01 (a prompt with no room after it).

    With `stoppable`, Ctrl+C ends those that are being written, their `reason` then `stopped`.
    """
    model = writers[0].model
    context = context_of(model)
    for ids in rows:
        if len(ids) >= context:
            raise MaeseError("GEN-01", tokens=len(ids), longest=context)
    drafts = [
        writer.draft(ids, chosen, _to(on_text, i))
        for i, (writer, ids, chosen) in enumerate(zip(writers, rows, settings, strict=True))
    ]
    voices = [writer.voice or BASE for writer in writers]
    named = all(writer.voice for writer in writers)
    together = _batches(model) and (mixes(model, voices) if named and len({*voices}) > 1 else True)
    groups = [[*range(len(drafts))]] if together else [[i] for i in range(len(drafts))]
    ended: dict[int, Answer] = {}

    def end(i: int, reason: str = "end") -> None:
        ended[i] = drafts[i].close(context, reason)
        if on_end:
            on_end(i, ended[i])

    try:
        for group in groups:
            with speaking(model, [voices[i] for i in group] if named else None):
                _write(model, {i: drafts[i] for i in group}, [writers[i] for i in group], together, end)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        for i in range(len(drafts)):
            if i not in ended:
                end(i, "stopped")
    return [ended[i] for i in range(len(drafts))]


def _to(on_text: OnText, row: int) -> Callable[[str], object] | None:
    return None if on_text is None else lambda piece: on_text(row, piece)


def _batches(model: Any) -> bool:
    """Whether the family keeps keys and values and is told positions: without these a padded row is another row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"position_ids", "past_key_values"} <= {*inspect.signature(inner.forward).parameters}


def _write(
    model: Any, numbered: dict[int, Draft], writers: list[Writer], padded: bool, end: Callable[[int], object]
) -> None:
    """Feed the drafts, one token each a pass, until all have ended; `end` is told the number of each that does."""
    import torch

    drafts, device, context = [*numbered.values()], model.device, context_of(model)
    longest = max(len(draft.ids) for draft in drafts)
    pads = [longest - len(draft.ids) for draft in drafts]
    fresh_BT = torch.tensor([[0] * pad + draft.ids for pad, draft in zip(pads, drafts, strict=True)], device=device)
    mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    places_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    dice = [torch.Generator().manual_seed(draft.settings.seed) for draft in drafts]
    stops, words = [writer.stop_ids() for writer in writers], [writer.words for writer in writers]
    live, cache = {*range(len(drafts))}, None
    small = device.type == "cpu" and model.num_parameters() < ONE_THREAD_PARAMETERS
    while live:
        with torch.inference_mode(), threads(1 if small else torch.get_num_threads()):
            placed = {"attention_mask": mask_BT, "position_ids": places_BT} if padded else {}
            out = model(input_ids=fresh_BT, past_key_values=cache, use_cache=True, **placed)
            cache = getattr(out, "past_key_values", None)
            chosen = [0] * len(drafts)  # what a row that has ended is fed is never looked at
            for i in live:
                draft = drafts[i]
                known_V = out.logits[i, -1, : words[i]]
                chosen[i] = draw(probabilities(known_V, draft.settings, draft.ids + draft.new), dice[i])
            next_B1 = torch.tensor(chosen, device=device)[:, None]
            # A family with a memory of another name (Mamba) reads all of it again each time.
            fresh_BT = next_B1 if cache is not None else torch.cat([fresh_BT, next_B1], 1)
            mask_BT = torch.cat([mask_BT, torch.ones_like(next_B1)], 1)
            # A row that has ended is still fed: it must not be counted past the end of learned positions.
            places_BT = (places_BT[:, -1:] + 1).clamp(max=context - 1)
        for i, number in enumerate(numbered):
            draft = drafts[i]
            over = i in live and (chosen[i] in stops[i] or draft.take(chosen[i]) or draft.full(context))
            if over:
                live.remove(i)
                end(number)
