"""Several adapters over one base: each row of what goes through the model is written with its own.

    model = adapter.attach(model, folder, base, "voice1")           and another, "voice2", over the same base
    with speaking(model, ["voice1", "voice2", BASE]):
        model(input_ids=ids_3T)                                     three rows, three voices, one pass

An adapter waits in the few bits it was saved in; while it speaks, a copy of its two matrices is there in those of the
base, and the arithmetic is done in these: eight over the model of the package weigh 15 % of it while they wait, and up
to 45 % while all speak at once. PEFT can mix adapters too, row by row through each one; here the rows go together
through one product of stacked matrices: `y_b = W x_b + s_b B_b A_b x_b` (LoRA: Hu et al. 2021, arXiv 2106.09685).

B rows, T tokens, I and O the width of what comes in and goes out, R the rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from maese.model.fingerprint import untouched

BASE = "__base__"  # the voice of no adapter; PEFT calls it so too


@contextlib.contextmanager
def speaking(model: Any, voices: Sequence[str] | None) -> Iterator[None]:
    """While it lasts, row i of what goes through the model is written with adapter `voices[i]`.

    A single voice serves any number of rows; None leaves the model as it is. Several need `mixes` to be true. No
    weight is copied from disk and none begins to train.
    """
    kinds = {*voices} if voices else set()
    if not voices or kinds == {BASE}:
        with untouched(model) if kinds else contextlib.nullcontext():
            yield
        return
    if len(kinds) == 1 and (model.active_adapter != voices[0]):
        # Everything that asks PEFT who is active, the fingerprint first of all, must hear the truth.
        model.set_adapter(voices[0], inference_mode=True)
    names = [voices[0]] if len(kinds) == 1 else [*voices]
    taken = [layer for layer in _layers(model) if all(_plain(layer, name) for name in kinds)]
    usual = [layer.__dict__.get("forward") for layer in taken]
    try:
        for layer in taken:
            layer.forward = _Voices(layer, names)
        yield
    finally:
        for layer, forward in zip(taken, usual, strict=True):
            if forward is not None:
                layer.forward = forward
            else:
                layer.__dict__.pop("forward", None)


def mixes(model: Any, voices: Sequence[str]) -> bool:
    """Whether these voices can write in one batch: not if one is more than plain LoRA, as with tokens of its own."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    alone = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    return not alone and all(_plain(layer, name) for layer in _layers(model) for name in {*voices})


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _plain(layer: Any, name: str) -> bool:
    """Whether an adapter does to this layer what the equation above says and nothing else (as DoRA would)."""
    if layer.lora_embedding_A or layer.merged or layer.lora_variant.get(name):  # a table of words reads no vectors
        return False
    if name not in layer.lora_A:
        return True
    a, b = layer.lora_A[name], layer.lora_B[name]
    return a.weight.ndim == 2 and a.bias is None and b.bias is None


class _Voices:
    """The forward of one layer while some voices speak: what its base gives, and to each row what its adapter adds."""

    def __init__(self, layer: Any, names: list[str]) -> None:
        self.base = layer.get_base_layer()
        pairs = [_matrices(layer, name) for name in names]
        if len(pairs) == 1:
            self.a, self.b = pairs[0]
        else:
            self.a, self.b = _stacked([a for a, _ in pairs], [b for _, b in pairs])

    def __call__(self, x_BTI: Any, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.nn.functional import linear

        out_BTO = self.base(x_BTI, *args, **kwargs)
        if self.a.dtype != out_BTO.dtype:  # known only now where the base is in 4 bits
            self.a, self.b = self.a.to(out_BTO.dtype), self.b.to(out_BTO.dtype)
        x_BTI = x_BTI.to(out_BTO.dtype)
        if self.a.ndim == 2:
            return out_BTO + linear(linear(x_BTI, self.a), self.b)
        middle_BTR = torch.bmm(x_BTI, self.a.transpose(1, 2))
        return torch.baddbmm(out_BTO, middle_BTR, self.b.transpose(1, 2))


def _matrices(layer: Any, name: str) -> tuple[Any, Any]:
    """A (R, I) and B (O, R) of an adapter in this layer, its scale in B; of rank 0 where it has none here."""
    import torch

    if name not in layer.lora_A:
        device = next(layer.parameters()).device
        return torch.zeros(0, layer.in_features, device=device), torch.zeros(layer.out_features, 0, device=device)
    with torch.no_grad():
        return layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float() * layer.scaling[name]


def _stacked(a: list[Any], b: list[Any]) -> tuple[Any, Any]:
    """Matrices of several ranks as (B, R, I) and (B, O, R), with zeros up to the greatest."""
    import torch
    from torch.nn.functional import pad

    rank = max(len(matrix) for matrix in a)
    grown_a = [pad(matrix, (0, 0, 0, rank - len(matrix))) for matrix in a]
    grown_b = [pad(matrix, (0, rank - matrix.shape[1])) for matrix in b]
    return torch.stack(grown_a), torch.stack(grown_b)
