"""Which examples go together and in what order: a pure function of (seed, epoch, position).

Nothing here has state, so a run that resumes at step k sees exactly what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from maese.tokens.template import Example

IGNORED = -100  # the label that no loss looks at
MULTIPLE = 8  # rows are padded to a multiple of it: matrix units like it, and few shapes repeat


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the rows: `sorted(epoch_order(5, 42, 0))` is `[0, 1, 2, 3, 4]`."""
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(rows).tolist()


def steps_per_epoch(rows: int, micro_batch: int, accumulation: int) -> int:
    return math.ceil(rows / (micro_batch * accumulation))


def batches(
    rows: int, micro_batch: int, accumulation: int, seed: int, start: int, stop: int
) -> Iterator[list[list[int]]]:
    """For each step in `[start, stop)`, its micro-batches as lists of row numbers.

    Every row is seen once an epoch; the last step of an epoch may be smaller.
    """
    per_epoch = steps_per_epoch(rows, micro_batch, accumulation)
    order: list[int] = []
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        if not order or place == 0:
            order = epoch_order(rows, seed, epoch)
        chosen = order[place * micro_batch * accumulation : (place + 1) * micro_batch * accumulation]
        yield [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]


def collate(examples: list[Example], pad: int) -> dict[str, Any]:
    """Rows of one micro-batch as tensors (B, T): input_ids, attention_mask, labels.

    Labels come from the mask of each example, never from comparing ids with the pad id: a tokenizer whose pad is its
    end token still learns where to stop.
    """
    import torch

    longest = max(len(example) for example in examples)
    width = math.ceil(longest / MULTIPLE) * MULTIPLE
    ids = torch.full((len(examples), width), pad)
    attention = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        n = len(example)
        ids[row, :n] = torch.tensor(example.ids)
        attention[row, :n] = 1
        mask = torch.tensor(example.mask, dtype=torch.bool)
        labels[row, :n] = torch.where(mask, ids[row, :n], IGNORED)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}
