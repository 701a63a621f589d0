"""The optimizer, its groups, and the rate of each step.

optimizer(model, train)                          the one the recipe names, in fp32
rate(0, 100, train)                              plain arithmetic, the same on every machine
"""

from __future__ import annotations

import math
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Train

BETAS = (0.9, 0.999)
DECAY = 0.2  # share of the steps in which wsd comes down


def optimizer(model: Any, train: Train) -> Any:
    """The optimizer over what trains, in fp32.

    adamw: Loshchilov and Hutter 2017, arXiv 1711.05101. adamw8bit: its state in 8 bits (Dettmers et al. 2021, arXiv
    2110.02861), paged: the same, in memory that a full card borrows from the processor, paged32: that with a state of
    32 bits (Dettmers et al. 2023, arXiv 2305.14314). muon: see `train.muon`. Error: DEP-01 (without bitsandbytes).
    """
    return build(groups(model, train), train)


def groups(model: Any, train: Train) -> list[dict[str, Any]]:
    """Groups of the parameters that train: matrices decay; biases and norms, which are vectors, do not.

    Pulling vectors to zero only costs accuracy. For Muon the matrices of the body are apart from the embeddings and
    the head, whose rows are words: only a few of them move in a step, and making that orthogonal has no sense.
    """
    from torch.nn import Embedding

    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    words = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    words |= {id(p) for end in ends if end is not None for p in end.parameters()}
    body = [p for p in matrices if train.optimizer == "muon" and p.ndim == 2 and id(p) not in words]
    turned = {id(p) for p in body}
    found = [
        {"params": body, "weight_decay": train.weight_decay, "orthogonal": True},
        {"params": [p for p in matrices if id(p) not in turned], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def build(groups: list[dict[str, Any]], train: Train) -> Any:
    """The optimizer that the recipe names over groups of parameters."""
    if train.optimizer == "muon":
        from maese.train.muon import Muon

        return Muon(groups, lr=train.lr, betas=BETAS)
    settings: dict[str, Any] = {"lr": train.lr, "betas": BETAS, "eps": 1e-8}
    if train.optimizer == "adamw":
        import torch

        return torch.optim.AdamW(groups, **settings, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError:
        raise MaeseError("DEP-01", package="bitsandbytes", extra="qlora") from None
    made = {"adamw8bit": "AdamW8bit", "paged": "PagedAdamW8bit", "paged32": "PagedAdamW32bit"}[train.optimizer]
    return getattr(optim, made)(groups, **settings)


def level(step: int, steps: int, train: Train) -> bool:
    """Whether a wsd rate has climbed and not begun to fall, so that how it goes on is still open."""
    return train.schedule == "wsd" and round(steps * train.warmup) <= step <= steps - steps * DECAY


def rate(step: int, steps: int, train: Train) -> float:
    """The learning rate of a step counted from 0: it climbs for the warm-up, then follows the schedule.

    cosine and linear fall from there to zero, constant stays, and wsd stays and falls to zero over the last fifth
    (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395). The first step already moves: a rate of exactly zero
    there would waste its batch.
    """
    warmup = round(steps * train.warmup)
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant": 1.0,
        "wsd": min(1.0, (steps - step) / (steps * DECAY)),
    }
    return train.lr * shape[train.schedule]
