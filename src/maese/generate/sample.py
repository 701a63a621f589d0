"""From logits to the next token, one visible step at a time.

    logits -> repetition penalty -> / temperature -> top-k -> top-p -> renormalise -> draw

The order and the meaning of each step are those of transformers, so the same settings give the same distribution.
"""

from __future__ import annotations

from typing import Any

from maese.errors import MaeseError
from maese.recipe import Generate

# Below it the division would overflow, and the likeliest token has all the chance anyway.
COLDEST = 1e-4


def probabilities(logits_V: Any, settings: Generate, seen: list[int]) -> Any:
    """The distribution (V,) the next token is drawn from; with temperature 0, all of it on the likeliest.

    `seen` are the ids so far, prompt included. Repetition penalty: Keskar et al. 2019, arXiv 1909.05858; nucleus
    (top-p): Holtzman et al. 2019, arXiv 1904.09751. Error: GEN-02 (the model gives no numbers).
    """
    import torch

    logits_V = logits_V.float()
    if bool(logits_V.isnan().any()):
        raise MaeseError("GEN-02")
    if settings.repetition_penalty != 1 and seen:
        ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
        some = logits_V[ids]
        penalised = torch.where(some > 0, some / settings.repetition_penalty, some * settings.repetition_penalty)
        logits_V = logits_V.index_copy(0, ids, penalised)
    if settings.temperature < COLDEST:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).float()
    logits_V = logits_V / settings.temperature
    if 0 < settings.top_k < logits_V.numel():
        weakest = torch.topk(logits_V, settings.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < weakest, float("-inf"))
    if settings.top_p < 1:
        ordered, order = torch.sort(logits_V)
        below = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        below[-1] = False  # the likeliest token always stays
        logits_V = logits_V.index_fill(0, order[below], float("-inf"))
    return logits_V.softmax(-1)


def draw(probabilities_V: Any, generator: Any) -> int:
    """One token id, drawn on the CPU so that the same seed gives the same text on every device."""
    import torch

    return int(torch.multinomial(probabilities_V.cpu(), 1, generator=generator))
