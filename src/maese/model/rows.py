"""Rows for tokens that are new to a model: where they begin, how they train alone, and how they are saved.

    make_room(model, tokenizer, ids)            the embedding grows, if it must
    model = get_peft_model(model, LoraConfig(**settings(model, ids), …))
    begin(model, tokenizer, ids)                each new row is the mean of those its mark was spelt with

In:  ids of tokens (`tokens.marks`). Out: an adapter that holds their rows, and that PEFT opens by itself. The rows an
embedding gives are replaced (PEFT's trainable tokens). So are those of a head that shares its matrix. A head with a
matrix of its own, as Phi's, may have a bias, which PEFT's way would lose: there the rows are a LoRA of as many ranks,
whose B is ones in the places of the tokens and does not train, so that row `i` of A is what is added to token `i`.

K new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maese.tokens.marks import spelt


def make_room(model: Any, tokenizer: Any, ids: list[int]) -> None:
    """Let the embedding and the head have rows for all of a tokenizer; those that were not there begin as `begin` says.

    Phi-2 has 51,200 rows for 50,295 tokens: there nothing grows. How many there were is kept as `rows_at_first`.
    """
    before = len(model.get_input_embeddings().weight)
    if len(tokenizer) > before:
        model.rows_at_first = getattr(model, "rows_at_first", before)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if grown := [i for i in ids if i >= before]:
            write(model, tokenizer, grown)


@torch.no_grad()
def write(model: Any, tokenizer: Any, ids: list[int]) -> None:
    """Put the first values of new rows into the matrices of a model without adapters."""
    for matrix in {id(m.weight): m.weight for m in _ends(model) if m is not None}.values():
        matrix[ids] = first_rows(matrix, tokenizer, ids)


def first_rows(matrix_VD: Tensor, tokenizer: Any, ids: list[int]) -> Tensor:
    """(K, D): for each new token the mean of the rows its mark was spelt with, which the model read in its place."""
    rows = [
        matrix_VD[torch.tensor(pieces, device=matrix_VD.device)].float().mean(0) for pieces in spelt(tokenizer, ids)
    ]
    return torch.stack(rows).to(matrix_VD.dtype)


def settings(model: Any, ids: list[int]) -> dict[str, Any]:
    """What a LoraConfig must say for these rows to train; `head`, apart, is the name of one that shares no matrix."""
    reads, head = _ends(model)
    found: dict[str, Any] = {"trainable_token_indices": {_name(model, reads): list(ids)}}
    if head is not None and head.weight is not reads.weight:
        name = _name(model, head)
        found |= {"head": name, "rank_pattern": {name: len(ids)}, "alpha_pattern": {name: len(ids)}}
    return found


@torch.no_grad()
def begin(model: Any, tokenizer: Any, ids: list[int]) -> None:
    """Give the new rows of an adapter their first values; the base under it stays as it is."""
    for layer in token_layers(model):
        if layer.tied_adapter is None:
            (delta,) = layer.trainable_tokens_delta.values()
            delta.copy_(first_rows(layer.get_base_layer().weight, tokenizer, ids))
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A"):
        (name,) = head.lora_A
        matrix, places = head.get_base_layer().weight, torch.tensor(ids, device=head.lora_B[name].weight.device)
        chosen = F.one_hot(places, len(matrix)).t()
        head.lora_B[name].weight.copy_(chosen)
        head.lora_B[name].weight.requires_grad_(False)
        head.lora_A[name].weight.copy_(first_rows(matrix, tokenizer, ids).float() - matrix[places].float())
        head.lora_dropout[name] = torch.nn.Identity()


def token_layers(model: Any) -> list[Any]:
    """What PEFT puts around an embedding, and around a head that shares its matrix, to replace rows."""
    return [part for part in model.modules() if hasattr(part, "trainable_tokens_delta")]


def heed_others(model: Any) -> None:
    """Let an adapter without rows of its own come after one that has some: PEFT would look for them in its file."""
    from peft.utils.other import TrainableTokensWrapper

    def asked(wrapper: Any, usual: Any, voice: str, *more: Any) -> dict[str, Any]:
        return usual(wrapper, voice, *more) if voice in wrapper._adapters else {}

    for part in model.modules():
        if isinstance(part, TrainableTokensWrapper):
            for name in ("adapter_state_dict_load_map", "adapter_state_dict"):
                setattr(part, name, partial(asked, part, getattr(type(part), name)))


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _name(model: Any, module: Any) -> str:
    return next(name for name, part in model.named_modules() if part is module).rsplit(".", 1)[-1]


def replaced(module: Any) -> tuple[Any, Tensor] | None:
    """The matrix a head has under its adapter and the tokens (K,) whose rows are others; None for any other adapter."""
    if layer := getattr(module, "token_adapter", None):
        name, base = in_use(module), layer.get_base_layer()
        return None if name is None else (base, torch.tensor(layer.token_indices[name], device=base.weight.device))
    if not hasattr(module, "lora_A") or module.lora_variant or (name := in_use(module)) is None:
        return None
    chosen_VK = module.lora_B[name].weight
    if chosen_VK.requires_grad or module.scaling[name] != 1:
        return None
    if not bool(((chosen_VK != 0).sum(0) == 1).all() and (chosen_VK.sum(0) == 1).all()):
        return None
    return module.get_base_layer(), chosen_VK.argmax(0)


def rows_now(module: Any, ids: Tensor) -> Tensor:
    """(K, D): what the rows of these tokens are now in a head of which `replaced` knows, with a way back to them."""
    name, layer = in_use(module), getattr(module, "token_adapter", None)
    if layer is not None:
        delta: Tensor = layer.trainable_tokens_delta[name]
        return delta
    return F.embedding(ids, module.get_base_layer().weight).float() + module.lora_A[name].weight


def in_use(module: Any) -> str | None:
    """The one adapter a head works with at this moment: none while they are off or merged."""
    layer = getattr(module, "token_adapter", module)
    return _only(layer, getattr(layer, "trainable_tokens_delta", None) or getattr(layer, "lora_A", {}))


def _only(layer: Any, adapters: Any) -> str | None:
    """The one adapter in use, if there is one and it is not merged."""
    if not adapters or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in adapters]
    return active[0] if len(active) == 1 else None


def quicken_rows(model: Any) -> int:
    """Have new rows replace what they should and nothing be copied: PEFT makes the whole matrix anew in each pass."""
    changed = 0
    for layer in token_layers(model):
        if type(layer.get_base_layer()) in (torch.nn.Embedding, torch.nn.Linear):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]  # on purpose
            changed += 1
    return changed


def _forward(layer: Any, usual: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name, base = _only(layer, layer.trainable_tokens_delta), layer.get_base_layer()
    if name is None or args or kwargs or base.weight.requires_grad or getattr(base, "max_norm", None) is not None:
        return usual(x, *args, **kwargs)
    ids = _kept_ids(layer, name, x.device)
    rows = layer.trainable_tokens_delta[name].to(base.weight.dtype)
    if isinstance(base, torch.nn.Linear):
        out = F.linear(x, base.weight)
        return out.index_copy_(-1, ids, F.linear(x, rows).to(out.dtype))
    out, match = F.embedding(x, base.weight, base.padding_idx), x[..., None] == ids
    return torch.where(match.any(-1, keepdim=True), F.embedding(match.int().argmax(-1), rows), out)


def _kept_ids(layer: Any, name: str, device: torch.device) -> Tensor:
    """The tokens of an adapter, made once: to send them in each pass would have a card wait."""
    kept = layer.__dict__.setdefault("kept_ids", {})
    if (name, device) not in kept:
        kept[name, device] = torch.tensor(layer.token_indices[name], device=device)
    found: Tensor = kept[name, device]
    return found
