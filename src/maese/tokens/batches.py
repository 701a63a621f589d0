"""Which examples go together and in what order: a pure function of (seed, epoch, position).

    batches(23, 2, 3, …)                 for each step, its micro-batches as lists of row numbers
    packed_batches(lengths, 512, 2, …)   the same of rows that hold several examples each
    collate, collate_packed              those examples as tensors
    collate_flat                         the same with no padding, for attention that is told where each one ends

Nothing here has state, so a run that resumes at step k sees exactly what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from maese.tokens.pack import best_fit
from maese.tokens.template import Example

if TYPE_CHECKING:
    import numpy as np

IGNORED = -100  # the label that no loss looks at
MULTIPLE = 8  # rows are padded to a multiple of it: matrix units like it, and few shapes repeat
# The same of a row of documents, where it costs little: for each new length oneDNN makes, and keeps, new kernels.
FLAT_MULTIPLE = 64
# On a processor more tokens at once are no faster than these, and only take more memory. Fewer would be slower where
# the model is large: each pass turns its weights into 16 bits anew.
ENOUGH = 2048

Row = TypeVar("Row")


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the rows: `sorted(epoch_order(5, 42, 0))` is `[0, 1, 2, 3, 4]`."""
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(rows).tolist()


def steps_per_epoch(rows: int, micro_batch: int, accumulation: int) -> int:
    """Moves of the weights in one pass over the rows; packed rows are counted by `pack.packed_rows`."""
    return math.ceil(rows / (micro_batch * accumulation))


def batches(
    rows: int, micro_batch: int, accumulation: int, seed: int, start: int, stop: int
) -> Iterator[list[list[int]]]:
    """For each step in `[start, stop)`, its micro-batches as lists of row numbers.

    Every row is seen once an epoch; the last step of an epoch may be smaller.
    """
    return _steps(lambda epoch: epoch_order(rows, seed, epoch), rows, micro_batch, accumulation, start, stop)


def packed_batches(
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    micro_batch: int,
    accumulation: int,
    seed: int,
    start: int,
    stop: int,
) -> Iterator[list[list[list[int]]]]:
    """For each step in `[start, stop)`, its micro-batches as lists of packed rows, each a list of example numbers.

    Every example is seen once an epoch, in a row of `capacity` tokens at most. Epochs are packed anew, and all have
    the same number of rows (`pack.packed_rows`), so a step has its place without the packings before it.
    """
    first = best_fit(lengths, capacity, seed, 0)

    def order(epoch: int) -> list[list[int]]:
        return best_fit(lengths, capacity, seed, epoch) if epoch else first

    return _steps(order, len(first), micro_batch, accumulation, start, stop)


def _steps(
    order_of: Callable[[int], list[Row]], rows: int, micro_batch: int, accumulation: int, start: int, stop: int
) -> Iterator[list[list[Row]]]:
    per_epoch = steps_per_epoch(rows, micro_batch, accumulation)
    order: list[Row] = []
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        if not order or place == 0:
            order = order_of(epoch)
        chosen = order[place * micro_batch * accumulation : (place + 1) * micro_batch * accumulation]
        yield [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]


def by_length(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """The rows of one step in groups that go through the model together, like with like so that little is padded.

    A group of n rows takes n times its longest, rounded up to MULTIPLE; that is `room` tokens at most, or one row.
    Which rows a step learns from, and so its gradient, is not changed by how they are grouped:
    `by_length([0, 1, 2], [9, 2, 3], 16)` is `[[0], [2, 1]]`.
    """
    groups: list[list[int]] = []
    wide = 0
    for row in sorted(rows, key=lambda row: -int(lengths[row])):  # stable: equal lengths keep the step's order
        if not groups or (len(groups[-1]) + 1) * wide > room:
            groups.append([])
            wide = math.ceil(int(lengths[row]) / MULTIPLE) * MULTIPLE
        groups[-1].append(row)
    return groups


def by_room(rows: Sequence[int], lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """The rows, from the longest, in groups of about as many tokens each and no more than `room`, or one row.

    For rows that go through with no padding: `by_room([0, 1, 2], [5, 4, 4], 8)` is `[[0], [1, 2]]`.
    """
    ordered = sorted(rows, key=lambda row: -int(lengths[row]))
    total = sum(int(lengths[row]) for row in ordered)
    share = total / max(1, math.ceil(total / room))
    groups: list[list[int]] = []
    held = 0
    for row in ordered:
        if not groups or held >= share or held + int(lengths[row]) > room:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += int(lengths[row])
    return groups


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


def collate_packed(rows: list[list[Example]], pad: int, width: int) -> dict[str, Any]:
    """Rows of several examples each as tensors (B, T): input_ids, position_ids, labels. `width` is the most they hold.

    Positions begin again at 0 with every example, and with the padding. There is no attention_mask, and that is how
    the model knows: without one it takes every new 0 for the border of a document, and looks across none. The first
    token of an example is never learnt, because nothing before it in its row is its own.
    """
    import torch

    longest = max(sum(map(len, row)) for row in rows)
    if longest > width:
        raise ValueError(f"a row of {longest} tokens in rows of {width}")
    wide = math.ceil(longest / MULTIPLE) * MULTIPLE
    ids = torch.full((len(rows), wide), pad)
    positions = torch.zeros((len(rows), wide), dtype=torch.long)
    labels = torch.full((len(rows), wide), IGNORED)
    for i, row in enumerate(rows):
        at = 0
        for example in row:
            here = slice(at, at + len(example))
            ids[i, here] = torch.tensor(example.ids)
            positions[i, here] = torch.arange(len(example))
            mask = torch.tensor([0, *example.mask[1:]], dtype=torch.bool)
            labels[i, here] = torch.where(mask, ids[i, here], IGNORED)
            at += len(example)
        positions[i, at:] = torch.arange(wide - at)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def collate_flat(examples: list[Example], pad: int) -> dict[str, Any]:
    """One row (1, T) of all the examples with nothing between them, and where each of them ends.

    For models that `model.attention.unpadded` has taken: their layers are given `cu_seq_lens_q`, the borders. The
    attention_mask only says that there is none to be made: one with four dimensions is passed on as it is. A few
    tokens at the end round the row up to FLAT_MULTIPLE, as documents of their own.
    """
    import torch

    ids = [i for example in examples for i in example.ids]
    learnt = [m for example in examples for m in (0, *example.mask[1:])]
    spans = [len(example) for example in examples]
    while rest := min(-len(ids) % FLAT_MULTIPLE, max(spans)):  # no longer than a document: positions have an end
        ids, learnt, spans = ids + [pad] * rest, learnt + [0] * rest, [*spans, rest]
    row, lengths = torch.tensor([ids]), torch.tensor(spans)
    ends = lengths.cumsum(0)
    borders = torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)])
    begins = torch.repeat_interleave(ends - lengths, lengths)
    longest = 1 << (max(spans) - 1).bit_length()  # an upper bound that seldom changes: what is compiled holds longer
    return {
        "input_ids": row,
        "position_ids": (torch.arange(len(ids)) - begins)[None],
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "labels": torch.where(torch.tensor([learnt], dtype=torch.bool), row, IGNORED),
    }
