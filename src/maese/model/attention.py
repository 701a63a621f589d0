"""Documents one after the other with no padding between them: attention that ends where each of them ends.

    if unpadded(model, longest=512):                    tried on the model itself; False where it cannot
        loss = loss_sum(model, collate_flat(examples, pad))

`tokens.batches.collate_flat` says where the documents end; transformers hands that down to every layer, and torch's
variable-length kernel reads it there. No mask is made and nothing waits for the card. All else that a model is asked
(rows with padding, a cache) goes on to the attention of transformers, untouched.

T tokens of all documents, H heads, D width of a head.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from maese.model.attention_cpu import documents
from maese.model.head import causal_of
from maese.tokens.batches import collate_flat
from maese.tokens.template import Example

NAME = "maese_varlen"
DTYPES = (torch.bfloat16, torch.float16)  # of the kernel
WIDEST, MULTIPLE = 256, 8  # a head it takes is no wider than this, and a multiple of that
# What one kernel gives and another differ by in 16 bits; a border that is not seen differs in the third figure too,
# but there the two sides have the same shape, and with it the same order of sums.
ROUNDING, NOTHING = 5e-2, 1e-3


@dataclass(frozen=True)
class Kernel:
    """Attention over documents, and whether it takes given queries, values and dropout."""

    run: Callable[..., torch.Tensor]
    takes: Callable[[torch.Tensor, torch.Tensor, float], bool] = lambda *_: True


class Cannot(RuntimeError):
    """Documents without padding are beyond this kernel, or this model."""


_kernel: Kernel | None = None
_met: list[tuple[Any, ...]] | None = None  # while a model is tried: what the kernel was asked for; else None
_windows: list[int] = []  # and how far the masks it would have let its layers see


def kernel(device: str) -> Kernel | None:
    """`run(query_THD, key, value, borders, longest, scale, dropout)`, causal, and what it takes; None where none is.

    On a processor our own (`model.attention_cpu`), on a card torch's.
    """
    return Kernel(documents) if device == "cpu" else on_card()


def on_card() -> Kernel | None:
    """The kernel around torch's `varlen_attn`, which knows no dropout.

    torch 2.10 and 2.11 call it `is_causal` and know no scale nor shared keys; later ones have a `window_size`.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if "is_causal" in takes:
        causal: dict[str, Any] = {"is_causal": True}
    elif "window_size" in takes:
        causal = {"window_size": (-1, 0)}
    else:
        return None
    shares, scales = "enable_gqa" in takes, "scale" in takes

    def run(
        query: Any, key: Any, value: Any, borders: Any, longest: int, scale: float, _dropout: float = 0.0
    ) -> torch.Tensor:
        more = dict(causal)
        if query.shape[1] != key.shape[1]:
            if shares:
                more["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if scales:
            more["scale"] = scale
        elif scale != (usual := query.shape[-1] ** -0.5):
            query = query * (scale / usual)
        out: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **more)
        return out

    return Kernel(run, fits)


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as transformers asks for it (1, H, T, D), with `cu_seq_lens_q` of one row of documents: (1, T, H, D).

    What the kernel cannot do is done with a mask. Error: Cannot, where no mask would be right either.
    """
    borders = more.get("cu_seq_lens_q")
    if borders is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )  # fmt: skip
    both_ways = more.get("is_causal", getattr(module, "is_causal", True)) is False
    if both_ways or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise Cannot("one causal row, and no cache")
    if any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise Cannot("softcap, sinks or a bias of positions")
    longest, window = more["max_length_q"], more.get("sliding_window")
    window = window if window is not None and window < longest else None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key, value = _of_one_dtype(query, key, value)
    if _kernel is not None and window is None and _kernel.takes(query, value, dropout):
        if _met is not None:
            _met.append((query.shape[1], key.shape[1], query.shape[3], scale, query.dtype, query.device))
        out = _kernel.run(*(x[0].transpose(0, 1) for x in (query, key, value)), borders, longest, scale, dropout)
        return out[None], None
    if _met is not None:
        raise Cannot("dropout, a window, the width of a head or its dtype")
    return by_mask(query, key, value, borders, scale, dropout, window), None


def _mask(*shape: Any, **more: Any) -> Any:
    """The mask of transformers. Some families say there alone how far they see, and nothing of it to their layers."""
    if _met is not None and more.get("local_size") is not None:
        _windows.append(more["local_size"])
    return sdpa_mask(*shape, **more)


def fits(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel of a card takes heads of this dtype and width, and drops as much: nothing."""
    wide = query.shape[-1]
    return not dropout and query.dtype in DTYPES and wide == value.shape[-1] and wide <= WIDEST and wide % MULTIPLE == 0


def by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, scale: float,
    dropout: float = 0.0, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same with a mask of T x T, right on every device and in every dtype: (1, T, H, D)."""
    place = torch.arange(query.shape[2], device=query.device)
    document = torch.searchsorted(borders[1:].contiguous(), place.to(borders.dtype), right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def _of_one_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, rotated queries come in fp32 and values do not; its own attention would even that out."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def unpadded(model: Any, longest: int) -> bool:
    """Have a model take rows of `collate_flat`, with documents up to `longest` tokens, if it can do so rightly.

    Not believed but tried, forward on the model (wrapped or not, where it trains) and backward on heads like its own;
    with any doubt it stays as it was. A model that caps its attention or slides cannot; nor, on a card, one that drops.
    """
    global _kernel, _met
    inner = causal_of(model)
    before = getattr(inner.config, "_attn_implementation", None)
    _kernel = kernel(next(model.parameters()).device.type)
    if _kernel is None or before not in ("sdpa", NAME):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    modes, fine = [(part, part.training) for part in model.modules()], False
    _met = []
    _windows.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inner.set_attn_implementation(NAME)
            fine = _keeps_apart(model, longest) and min(_windows, default=longest) >= longest
            fine = fine and all(_agrees(*kind) for kind in {*_met})
    except Exception:  # whatever a kernel or an unusual model does not bear, the plain way is right for it
        fine = False
    finally:
        _met = None
        for part, training in modes:
            part.training = training
        if not fine:
            inner.config._attn_implementation = before
    return fine


def _keeps_apart(model: Any, longest: int) -> bool:
    """Whether a document notices nothing of its neighbours nor of what comes later, and is what it is alone."""
    device = next(model.parameters()).device
    vocabulary = len(causal_of(model).get_input_embeddings().weight)
    spans = (range(9), [3], range(9, 20), range(20, 26))
    first, word, other, last = ([i % vocabulary for i in ids] for ids in spans)

    def said(*documents: list[int]) -> torch.Tensor:
        batch = collate_flat([Example(ids, [1] * len(ids)) for ids in documents], 0)
        batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items() if k != "labels"}
        batch["max_length_q"] = batch["max_length_k"] = max(1 << (longest - 1).bit_length(), batch["max_length_q"])
        return model(**batch, use_cache=False).logits[0].float()

    devices = [device] if device.type == "cuda" else []
    with torch.no_grad():
        model.train()
        with torch.random.fork_rng(devices):  # a layer that drops something must not move the dice of the run
            said(first, word, other, last)
        if not _met:  # the model never asked: it has an attention of its own
            return False
        model.eval()
        usual = said(first, word, other, last)
        neighbours = said(last, word, first[:3] + word * 5 + last[:3], first[:6])
        turned = said(first[::-1], word, other, last)
        later = said(first, word, [*other[:-1], other[0]], last)
        alone = model(input_ids=torch.tensor([other], device=device), use_cache=False).logits[0].float()
    at, end = len(first) + 1, len(first) + 1 + len(other)
    same = _far(turned[at:end], usual[at:end]) < NOTHING and _far(later[at : end - 1], usual[at : end - 1]) < NOTHING
    # The same word alone in a document of its own, whoever sits beside it.
    same = same and _far(neighbours[len(last)], usual[len(first)]) < ROUNDING
    return same and _far(usual[at:end], alone) < ROUNDING and bool((later[end - 1] != usual[end - 1]).any())


def _agrees(heads: int, shared: int, wide: int, scale: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives what the mask gives, and the same gradients, for heads like those of the model."""
    assert _kernel is not None
    dice = torch.Generator(device).manual_seed(0)
    borders = torch.tensor([0, 37, 38, 60, 64], dtype=torch.int32, device=device)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(1, n, 64, wide, generator=dice, device=device)

    drawn, pull = [draw(heads), draw(shared), draw(shared)], draw(heads).transpose(1, 2)
    found = []
    for ours, kind in ((True, dtype), (False, torch.float32)):
        query, key, value = (x.to(dtype).to(kind).requires_grad_() for x in drawn)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            if ours:
                out = _kernel.run(*(x[0].transpose(0, 1) for x in (query, key, value)), borders, 64, scale)[None]
            else:
                out = by_mask(query, key, value, borders, scale)
            found.append([out, *torch.autograd.grad(out, (query, key, value), pull.to(kind))])
    return all(math.isfinite(float(a.float().norm())) and _far(a, b) < ROUNDING for a, b in zip(*found, strict=True))


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
