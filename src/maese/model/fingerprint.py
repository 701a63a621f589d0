"""Which weights are at work: a fingerprint that changes when any of them does.

Two columns of «before» and «after» prove nothing if both sides used the same weights, so each side carries its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from typing import Any


def fingerprint(model: Any, rows: int | None = None) -> str:
    """SHA-256 of the active weights, names and shapes included; of the adapters, those that are switched on.

    Of embedding and head only the first `rows`, if given: those after them are of the tokens of somebody else.
    """
    import torch

    digest = hashlib.sha256()
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {id(p) for end in both if end is not None for p in end.parameters()}
    speaking = _speaking(model)
    named = (
        (_own(re.sub(r"base_model\.model\.|\.base_layer|\.token_adapter", "", name), speaking), p)
        for name, p in model.named_parameters()
    )
    for name, parameter in sorted((pair for pair in named if pair[0]), key=lambda pair: pair[0]):
        if id(parameter) in ends:
            parameter = parameter[:rows]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def _own(name: str, speaking: set[str]) -> str:
    """The name of a weight without that of its adapter, so that one adapter is the same under any; empty: it is off."""
    found = re.search(r"\.(lora_\w+|trainable_tokens_\w+)\.([^.]+)(\.[^.]+)?$", name)
    if not found:
        return name
    return f"{name[: found.start()]}.{found[1]}{found[3] or ''}" if found[2] in speaking else ""


def _speaking(model: Any) -> set[str]:
    """The adapters that are changing the model's output now."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}


def adapters_on(model: Any) -> bool:
    """Whether any adapter of the model is changing its output now."""
    return bool(_speaking(model))


@contextlib.contextmanager
def untouched(model: Any):
    """The base under the adapters, for as long as the block lasts."""
    if hasattr(model, "disable_adapter"):
        frozen = not any(p.requires_grad for p in model.parameters())
        try:
            with model.disable_adapter():
                yield model
        finally:
            if frozen:  # putting them back on, PEFT has them train
                model.requires_grad_(False)
    else:
        yield model


def parameters(model: Any) -> tuple[int, int]:
    """All parameters and those that train; shared ones are counted once."""
    every = list(model.parameters())
    return sum(map(_size, every)), sum(p.numel() for p in every if p.requires_grad)


def _size(parameter: Any) -> int:
    """How many numbers it stands for: in 4 bits two of them share a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
