"""What a model could have written instead: for each token of an answer, the likeliest at that place.

    alternatives(writer, prompt_ids, answer.ids)[0].best      ((412, 0.31), (88, 0.22), …)

The probabilities are the model's own, before temperature and cuts: these say how it was chosen, not what it knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maese.generate.engine import Writer
from maese.model.voices import speaking


@dataclass(frozen=True)
class Place:
    """A token that was written, its probability, and the likeliest there, best first, as (token, probability)."""

    token: int
    chance: float
    best: tuple[tuple[int, float], ...]


def alternatives(writer: Writer, prompt_ids: Sequence[int], ids: Sequence[int], n: int = 5) -> list[Place]:
    """For each of `ids`, written after the prompt, the `n` likeliest tokens of its place."""
    import torch

    if not ids:
        return []
    whole_1T = torch.tensor([[*prompt_ids, *ids]], device=writer.model.device)
    with torch.inference_mode(), speaking(writer.model, writer.voice and [writer.voice]):
        logits_TV = writer.model(input_ids=whole_1T, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        chances_TV = logits_TV.float().softmax(-1)
        best = chances_TV.topk(min(n, chances_TV.shape[-1]), -1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    rows = [tuple(zip(tokens, chances, strict=True)) for tokens, chances in pairs]
    own = chances_TV.gather(1, torch.tensor(ids, device=chances_TV.device)[:, None])[:, 0].tolist()
    return [Place(token, chance, row) for token, chance, row in zip(ids, own, rows, strict=True)]
