"""Whole examples into rows of a fixed number of tokens, with hardly a hole and nothing cut.

    best_fit([5, 3, 8, 2, 3], 8, seed=42, epoch=0)    [[0, 4], [1, 3], [2]]; in epoch 3, [[2], [0, 1], [4, 3]]

Comes in: how long each example is. Goes out: which examples share a row. Only numbers are looked at here; that
documents of one row are blind to each other is the business of `tokens.batches.collate_packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """Bins of example numbers, each of `capacity` tokens at most; every example is in exactly one.

    Best-fit decreasing: the longest first, each into the bin it leaves least room in (Ding et al. 2024, «Fewer
    Truncations Improve Language Modeling», arXiv:2404.10830). Examples of one length trade places from epoch to epoch,
    and so do the bins; how many bins there are depends on the lengths alone. A length of 0 or beyond `capacity` is a
    ValueError.
    """
    import numpy as np

    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    shortest = int(sizes.min())
    if shortest < 1 or sizes.max() > capacity:
        raise ValueError(f"lengths from {shortest} to {sizes.max()} do not fit in rows of 1 to {capacity} tokens")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    bins = _place(order.tolist(), sizes[order].tolist(), capacity, shortest)
    return [bins[i] for i in generator.permutation(len(bins)).tolist()]


def _place(order: list[int], sizes: list[int], capacity: int, shortest: int) -> list[list[int]]:
    bins: list[list[int]] = []
    # Bins by the room they have left, and the rooms there are as the bits of one number: the least room that is
    # enough is its lowest bit from `size` up, found without looking at any bin.
    with_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0
    for row, size in zip(order, sizes, strict=True):
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            place = with_room[room].pop()
            bins[place].append(row)
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, place = capacity, len(bins)
            bins.append([row])
        left = room - size
        if left >= shortest:
            if not with_room[left]:
                rooms |= 1 << left
            with_room[left].append(place)
    return bins


def packed_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> int:
    """How many bins `best_fit` makes, whatever the seed and the epoch: `packed_rows([5, 3, 8, 2, 3], 8)` is 3."""
    return len(best_fit(lengths, capacity, 0, 0))


def filled(bins: list[list[int]], lengths: Sequence[int] | np.ndarray, capacity: int) -> float:
    """The share of the places that hold a token, from 0 to 1: 21 tokens in 3 rows of 8 are `0.875`."""
    return sum(int(lengths[row]) for chosen in bins for row in chosen) / (capacity * max(1, len(bins)))
