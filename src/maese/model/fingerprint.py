"""Which weights are at work: a fingerprint that changes when any of them does.

Two columns of «before» and «after» prove nothing if both sides used the same weights, so each side carries its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from typing import Any


def fingerprint(model: Any) -> str:
    """SHA-256 of the active weights, names and shapes included; adapters count only while they are switched on."""
    import torch

    digest = hashlib.sha256()
    adapters = adapters_on(model)
    named = (
        (re.sub(r"base_model\.model\.|\.base_layer|\.token_adapter", "", name), p)
        for name, p in model.named_parameters()
    )
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        if re.search("lora_|trainable_tokens", name) and not adapters:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def adapters_on(model: Any) -> bool:
    """Whether any adapter of the model is changing its output now."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    return any(not module.disable_adapters and module.active_adapters for module in layers)


@contextlib.contextmanager
def untouched(model: Any):
    """The base under the adapters, for as long as the block lasts."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
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
