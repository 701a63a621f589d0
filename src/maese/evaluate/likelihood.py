"""Loss on text kept apart: nats per learnt token, each token counted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maese.errors import MaeseError
from maese.tokens.batches import IGNORED, collate
from maese.tokens.template import Example


def loss_sum(model: Any, batch: dict[str, Any], compiled: bool = False) -> Any:
    """Cross-entropy of one micro-batch (B, T), summed over its targets in fp32; divide by their count for the mean.

    The sum and not the mean, because rows of unequal length make a mean of means something else. The batch is padded
    (`collate`) or packed (`collate_packed`, `collate_flat`): the model is told what it has, an attention_mask or
    position_ids. Only the positions that are learnt meet the head, a few at a time (`model.head`), where the model has
    a plain one. A batch that brings `kept`, the places before learnt tokens counted over all rows, need not be asked:
    a card would have to be waited for. `compiled`: the softmax may be compiled, for runs that pay for it.
    """
    import torch.nn.functional as F

    from maese.model.head import head_of, hidden_states, in_pieces

    seen = {name: tensor for name, tensor in batch.items() if name not in ("labels", "kept")}
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED if "kept" not in batch else None

    def learnt(rows: Any) -> Any:
        return rows[:, :-1][kept] if kept is not None else rows.flatten(0, 1).index_select(0, batch["kept"])

    targets = targets[kept] if kept is not None else batch["labels"].flatten()[batch["kept"] + 1]
    if head := head_of(model):
        hidden_BTD, rest = hidden_states(model, head, seen)
        # FSDP2 leaves the head whole after the pass, unless it was told otherwise.
        if hidden_BTD is not None and not in_pieces(head.matrix):
            return head.loss(learnt(hidden_BTD), targets, rest, compiled)
        logits_BTV = rest if hidden_BTD is None else model(**seen, use_cache=False).logits
    else:
        logits_BTV = model(**seen, use_cache=False).logits
    return F.cross_entropy(learnt(logits_BTV).float(), targets, reduction="sum")


def loss_and_targets(
    model: Any, examples: Sequence[Example], pad: int, micro_batch: int, rank: int = 0, world: int = 1
) -> tuple[float, int]:
    """The loss in nats summed over one share of the examples in `world`, and how many targets that has.

    Rows of like length go together, which changes the time and not the figure. Every share takes the same number of
    passes, as models whose weights lie in pieces need.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, targets = 0.0, 0
    # Numbers are sorted and not examples, which may lie in a file and not in memory.
    lengths = [len(example) for example in examples]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    with torch.no_grad():
        starts = range(0, len(order), micro_batch)
        for place in range(rank, math.ceil(len(starts) / world) * world, world):
            i = starts[min(place, len(starts) - 1)]
            rows = [examples[row] for row in order[i : i + micro_batch]]
            batch = {k: v.to(device) for k, v in collate(rows, pad).items()}
            loss = float(loss_sum(model, batch))
            if place < len(starts):
                total, targets = total + loss, targets + sum(example.targets for example in rows)
    model.train(was_training)
    return total, targets


def refuse_blended(model: Any, base: str) -> None:
    """BATCH-03 when this model lets a packed document see the one before it in its row.

    Whether it looks at the borders is up to the class of each family, and some (OPT, Falcon, Mamba) do not: they would
    learn from the wrong context and say nothing. So it is tried: a document must not notice who sits before it.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.arange(32, device=device) % model.config.vocab_size
    positions = torch.tensor([[*range(12), *range(8)]], device=device)
    with torch.no_grad():
        neighbours = [torch.cat([before, ids[12:20]])[None] for before in (ids[:12], ids[20:])]
        one, other = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 12:].float() for row in neighbours
        )
    model.train(was_training)
    # Blind families differ by nothing at all, seeing ones by 0.6 % or more even with random weights.
    if float((one - other).norm() / one.norm()) > 1e-3:
        raise MaeseError("BATCH-03", base=base, family=model.config.model_type)
