"""The optimizer's groups and the rate of each step, as plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

from maese.recipe import Train


def optimizer(model: Any, train: Train) -> Any:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over what trains.

    Matrices decay; biases and norms, which are vectors, do not: pulling them to zero only costs accuracy.
    """
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def rate(step: int, steps: int, train: Train) -> float:
    """The learning rate of a step counted from 0: it climbs for the warm-up, then follows the schedule to zero.

    The first step already moves: a rate of exactly zero there would waste its batch.
    """
    warmup = round(steps * train.warmup)
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return train.lr * shape[train.schedule]
