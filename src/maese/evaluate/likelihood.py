"""Loss on text kept apart: nats per learnt token, each token counted once."""

from __future__ import annotations

from typing import Any

from maese.tokens.batches import IGNORED, collate
from maese.tokens.template import Example


def loss_sum(model: Any, batch: dict[str, Any]) -> Any:
    """Cross-entropy of one micro-batch (B, T), summed over its targets in fp32; divide by their count for the mean.

    The sum and not the mean, because rows of unequal length make a mean of means something else.
    """
    import torch.nn.functional as F

    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    # Only the positions that are learnt reach the softmax: for a question file they are the fewest.
    return F.cross_entropy(logits_BTV[:, :-1][kept].float(), targets[kept], reduction="sum")


def mean_loss(model: Any, examples: list[Example], pad: int, micro_batch: int) -> tuple[float, int]:
    """Mean loss in nats per target token over all examples, and how many targets there were.

    Rows of like length go together, which changes the time and not the figure.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, targets = 0.0, 0
    rows = sorted(examples, key=len)
    with torch.no_grad():
        for i in range(0, len(rows), micro_batch):
            batch = {k: v.to(device) for k, v in collate(rows[i : i + micro_batch], pad).items()}
            total += float(loss_sum(model, batch))
            targets += sum(example.targets for example in rows[i : i + micro_batch])
    model.train(was_training)
    return total / max(1, targets), targets
