"""Attention over documents with no padding between them, on a processor.

    out_THD = documents(query_THD, key, value, borders, longest, scale)        causal, each document by itself

A processor has no kernel for that. Documents of like length are gathered into one block, padded only there, where it
costs little: all the rest of the model sees real tokens alone. Always in fp32: the backward kernel for 16 bits takes
ten times as long on short rows, and no less on long ones.

T tokens of all documents, H heads, D width of a head; n documents of up to L tokens in a block, P places in all blocks.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 0.75  # of the longest of a block, the least its documents have: fewer blocks against less padding
Blocks = tuple[tuple[int, int], ...]


@torch.compiler.disable  # its blocks are other ones each time
def documents(
    query_THD: Tensor, key: Tensor, value: Tensor, borders: Tensor, _longest: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention of each document by itself; `borders` are the places where they begin, and the end.

    Keys and values may have fewer heads than queries.
    """
    blocks, taken_P, back_T = _blocks(tuple(borders.tolist()))
    wide = torch.promote_types(query_THD.dtype, torch.float32)
    parts = [_Take.apply(x, taken_P, back_T).to(wide) for x in (query_THD, key, value)]
    shared = query_THD.shape[1] // key.shape[1]
    done, at = [], 0
    for n, size in blocks:
        here = slice(at, at + n * size)
        query, keys, values = (part[here].unflatten(0, (n, size)).transpose(1, 2) for part in parts)
        if shared > 1:
            keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
        with torch.autocast("cpu", enabled=False):  # it would turn them into 16 bits again
            out = F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout, is_causal=True, scale=scale)
        done.append(out.transpose(1, 2).flatten(0, 1))
        at += n * size
    return _Drop.apply(torch.cat(done).to(query_THD.dtype), back_T)


@lru_cache(maxsize=8)  # every layer of a pass asks for the same, and on the way back again
def _blocks(borders: tuple[int, ...]) -> tuple[Blocks, Tensor, Tensor]:
    """Blocks (n, L), which token stands in each of their P places, and in which place each of the T tokens does.

    A document shorter than its block repeats its last token, which nobody looks at: those places come later than all
    that is real, and what they give is dropped. `_blocks((0, 3, 5))` is `((2, 3),)`, [0, 1, 2, 3, 4, 4], [0 … 4].
    """
    spans = sorted(((b - a, a) for a, b in pairwise(borders)), reverse=True)
    groups: list[list[tuple[int, int]]] = []
    for size, begin in spans:
        if not groups or size < ALIKE * groups[-1][0][0] - 4:
            groups.append([])
        groups[-1].append((size, begin))
    taken: list[Tensor] = []
    back = torch.empty(borders[-1], dtype=torch.long)
    places = 0
    for group in groups:
        longest = group[0][0]
        for size, begin in group:
            taken.append(torch.arange(begin, begin + longest).clamp_(max=begin + size - 1))
            back[begin : begin + size] = torch.arange(places, places + size)
            places += longest
    return tuple((len(group), group[0][0]) for group in groups), torch.cat(taken), back


class _Take(torch.autograd.Function):
    """Rows in another order, some of them twice; the gradient of a second one is zero, so each has one to be read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken_P: Tensor, back_T: Tensor) -> Tensor:
        ctx.save_for_backward(back_T)
        return x.index_select(0, taken_P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (back_T,) = ctx.saved_tensors
        return grad.index_select(0, back_T), None, None


class _Drop(torch.autograd.Function):
    """The rows at some places, each once; the others have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back_T: Tensor) -> Tensor:
        ctx.save_for_backward(back_T)
        ctx.places = len(x)
        return x.index_select(0, back_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (back_T,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, back_T, grad), None
