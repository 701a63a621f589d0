"""The head of a model and its loss, without ever holding the matrix of logits.

    head = head_of(model)                            its weight, and what is done to its logits; None: not a plain one
    hidden_BTD, dtype = hidden_states(model, head, seen)
    loss = chunked_loss(hidden_ND, head.weight, head.bias, targets_N)       a sum, in fp32, ready for backward()

The logits of 2,048 tokens over a vocabulary of 50,000 are 400 MB in fp32, several times over once their softmax and
gradient are counted. Here a few hundred rows are multiplied, turned into their gradient in place, and let go: what is
left is the gradient of the hidden states and, if the head learns, that of its weight.

B rows, T tokens, N learnt tokens, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from maese.model.rows import in_use, replaced, rows_now

# Bytes of logits that exist at once: enough rows to keep a matrix product busy, and no more.
BUDGET = {"cpu": 48 << 20, "cuda": 128 << 20}
MOST_ROWS = {"cpu": 512, "cuda": 4096}
# The softmax reads its rows several times; so many numbers stay in the cache of a processor while it does.
CACHED = 1 << 19
# Rows of the weight's gradient that are added up together: the product in few bits stays in the cache as well.
TILE = 4096


@dataclass(frozen=True)
class Head:
    """The last matrix of a causal model, and what becomes of its logits: `cap * tanh(scale * (Wh + b) / cap)`."""

    module: Any  # what the model calls
    matrix: torch.nn.Linear  # the same, or what is under an adapter that replaces the rows of some tokens
    scale: float = 1.0
    softcap: float | None = None
    tokens_K: torch.Tensor | None = None  # those tokens
    adapter: str | None = None  # of that name

    def loss(
        self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype, compiled: bool = False
    ) -> torch.Tensor:
        """`chunked_loss` through this head, multiplied in `dtype`; `compiled` has its softmax so where that pays."""
        bias_V: torch.Tensor | None = self.matrix.bias
        rows_KD = None if self.tokens_K is None else rows_now(self.module, self.tokens_K)
        if self.scale != 1.0:  # on the narrow side of the product
            hidden_ND = hidden_ND * self.scale
            bias_V = bias_V if bias_V is None else bias_V * self.scale
        compiled = compiled and hidden_ND.device.type == "cuda"
        return chunked_loss(
            hidden_ND, self.matrix.weight, bias_V, targets_N, self.softcap, dtype, compiled, self.tokens_K, rows_KD
        )  # fmt: skip


def chunked_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    tokens_K: torch.Tensor | None = None,
    rows_KD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against the targets, summed, in fp32 (nats).

    Products are made in `dtype` (that of the weight if not said), softmax and sums in fp32. The gradients are made
    along with the loss, so backward() costs no product more; it may be called once. `compiled` fuses the softmax: it
    pays on CUDA, and without a compiler the plain one is used. `rows_KD` stand in the place of those of `tokens_K`.
    The idea: Wijmans et al. 2024, arXiv 2411.09009.
    """
    learn = torch.is_grad_enabled()
    hidden_ND = hidden_ND.to(dtype or weight_VD.dtype)
    return _Chunked.apply(hidden_ND, weight_VD, bias_V, targets_N, softcap, learn, compiled, tokens_K, rows_KD)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, softcap, learn, compiled, tokens_K, rows_KD):
        device, dtype = hidden_ND.device.type, hidden_ND.dtype
        wants_h, wants_w, wants_b = (learn and wanted for wanted in ctx.needs_input_grad[:3])
        wants_r = learn and ctx.needs_input_grad[8]
        learn = wants_h or wants_w or wants_b or wants_r
        softmax = _compiled() if compiled else _softmax_in_cache if device == "cpu" else _softmax
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_h = torch.empty_like(hidden_ND) if wants_h else None
        # As large as the head: filling it with zeros first would take longer than some of the products.
        fresh = torch.empty_like if len(hidden_ND) else torch.zeros_like
        grad_w = fresh(weight_VD, dtype=wide) if wants_w else None
        grad_b = torch.zeros_like(bias_V, dtype=wide) if wants_b else None
        grad_r = torch.zeros_like(rows_KD, dtype=wide) if wants_r else None
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V, rows_KD)]
        rows_KD = None if rows_KD is None else rows_KD.to(dtype)
        weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        # Whoever called may be inside autocast; here every product already has the dtype it should have.
        with torch.autocast(device, enabled=False):
            for at in _chunks(len(hidden_ND), weight_VD):
                logits = F.linear(hidden_ND[at], weight_VD, bias_V)
                if rows_KD is not None:
                    offset = None if bias_V is None else bias_V[tokens_K]
                    logits.index_copy_(1, tokens_K, F.linear(hidden_ND[at], rows_KD, offset))
                loss += softmax(logits, targets_N[at], softcap, learn)
                if grad_b is not None:
                    grad_b += logits.sum(0, dtype=wide)
                if learn and rows_KD is not None:  # what is of other rows is nothing to the matrix
                    apart_NK = logits[:, tokens_K]
                    logits.index_fill_(1, tokens_K, 0)
                    if grad_r is not None:
                        grad_r += apart_NK.t() @ hidden_ND[at]
                if grad_h is not None:
                    torch.mm(logits, weight_VD, out=grad_h[at])
                    if rows_KD is not None:
                        grad_h[at].addmm_(apart_NK, rows_KD)
                if grad_w is not None:
                    _add_product(grad_w, logits, hidden_ND[at], first=at.start == 0)
        ctx.save_for_backward(grad_h, grad_w, grad_b, grad_r)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        def scaled(tensor, dtype):
            if tensor is None:
                return None
            # In one pass, into what is there or into fewer bits: a scaled copy would be as large as the head.
            out = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
            return torch.mul(tensor, grad, out=out)

        *found, rows = map(scaled, ctx.saved_tensors, ctx.dtypes)
        return *found, None, None, None, None, None, rows


def _chunks(rows: int, weight_VD: torch.Tensor) -> list[slice]:
    """Slices of the rows, all alike but for the last, whose logits fit the budget."""
    device = weight_VD.device.type
    fit = BUDGET.get(device, BUDGET["cuda"]) // (weight_VD.shape[0] * weight_VD.element_size())
    fit = max(32, min(fit, MOST_ROWS.get(device, MOST_ROWS["cuda"])) // 32 * 32)
    return [slice(i, min(i + fit, rows)) for i in range(0, rows, fit)]


def _softmax(logits_NV: Any, targets_N: Any, softcap: float | None, learn: bool) -> Any:
    """The loss of these rows in fp32; the logits become the gradient of it, in place, when something is to learn."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    column = targets_N[:, None]
    if softcap is None:
        bent, logp = None, torch.log_softmax(logits_NV, -1, dtype=wide)
    else:
        bent = torch.tanh(logits_NV.to(wide) / softcap)
        logp = torch.log_softmax(bent * softcap, -1)
    loss = -logp.gather(1, column).sum()
    if learn:
        grad = logp.exp_()
        grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=wide))
        logits_NV.copy_(grad if bent is None else grad.mul_(1 - bent * bent))
    return loss


def _softmax_in_cache(logits_NV: Any, targets_N: Any, softcap: float | None, learn: bool) -> Any:
    """The same a few rows at a time: as fast on a processor as one that is compiled, and with no fp32 copy."""
    few = max(1, CACHED // logits_NV.shape[1])
    parts = zip(logits_NV.split(few), targets_N.split(few), strict=True)
    return sum(_softmax(logits, targets, softcap, learn) for logits, targets in parts)


def _whole(logits_NV: Any, targets_N: Any, softcap: float | None, learn: bool) -> Any:
    """The same without a scatter, which a compiler could not fuse."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logits = logits_NV.to(wide)
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits = bent * softcap
    logp = torch.log_softmax(logits, -1)
    loss = -logp.gather(1, targets_N[:, None]).sum()
    if learn:
        columns = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        grad = logp.exp() - (columns == targets_N[:, None]).to(wide)
        logits_NV.copy_(grad if softcap is None else grad * (1 - bent * bent))
    return loss


@cache
def _compiled() -> Callable[..., Any]:
    fused = torch.compile(_whole, dynamic=True)
    broken = False

    def step(*inputs: Any) -> Any:
        nonlocal broken
        if not broken:
            try:
                return fused(*inputs)
            except Exception:  # no compiler, or one that cannot: it fails before it touches anything
                broken = True
        return _softmax(*inputs)

    return step


def _add_product(total_VD: torch.Tensor, logits_NV: torch.Tensor, hidden_ND: torch.Tensor, first: bool) -> None:
    """`total += logits.T @ hidden`, added in the precision of `total`; the `first` one finds nothing there yet."""
    if total_VD.dtype == logits_NV.dtype:
        total_VD.addmm_(logits_NV.t(), hidden_ND, beta=0 if first else 1)
        return
    tile = TILE if total_VD.device.type == "cpu" else len(total_VD)
    for i in range(0, len(total_VD), tile):
        product, here = logits_NV[:, i : i + tile].t() @ hidden_ND, total_VD[i : i + tile]
        here.copy_(product) if first else here.add_(product)


_KNOWN: WeakKeyDictionary[Any, Head | None] = WeakKeyDictionary()


def head_of(model: Any) -> Head | None:
    """The head of a causal model (wrapped or not), or None where it is not a plain matrix at the end.

    Tried once for each model on a few tokens, and not believed from its configuration: what the model says must be
    what this head says of the same hidden states, also when these are large enough to show a cap.
    """
    inner = causal_of(model)
    module: Any = getattr(inner, "get_output_embeddings", lambda: None)()
    known = _KNOWN.get(inner)
    # With pieces of it on other processes only what was known before it was cut can be told.
    if module is not None and (in_pieces(module) or hasattr(module, "set_requires_gradient_sync")):
        return known if known and known.module is module else None
    now = in_use(module)
    if inner not in _KNOWN or (known and (known.module is not module or (now and known.adapter != now))):
        # Other adapters on the head, or few bits: each has its own way to multiply.
        plain = type(module) is torch.nn.Linear
        matrix, tokens_K = (module, None) if plain else replaced(module) or (None, None)
        if type(matrix) is not torch.nn.Linear or not matrix.weight.numel() or matrix.weight.device.type == "meta":
            return None
        known = _KNOWN[inner] = _tried(inner, Head(module, matrix, tokens_K=tokens_K, adapter=now))
    # Where they may be off or merged since then.
    return None if known and known.adapter != now else known


def in_pieces(module: Any) -> bool:
    """Whether the weight of a head lies in pieces now: FSDP2 puts it together for each pass."""
    return hasattr(module._parameters.get("weight"), "device_mesh")


def hidden_states(model: Any, head: Head, seen: dict[str, Any]) -> tuple[torch.Tensor | None, Any]:
    """What reaches the head, (B, T, D), and the dtype it would multiply in; (None, logits) if it was not asked.

    The whole model is called, with all it is wrapped in (adapters, autocast, DDP, checkpointing), and only its head is
    given nothing to multiply.
    """
    caught: list[tuple[torch.Tensor, torch.dtype]] = []

    def catch(_module: Any, inputs: Any) -> Any:
        caught.append((inputs[0], _dtype(head.matrix, inputs[0])))
        return (inputs[0][:, :0],)

    handle = head.module.register_forward_pre_hook(catch)
    try:
        logits = model(**seen, use_cache=False).logits
    finally:
        handle.remove()
    # A model compiled whole does not look at hooks that came later: it has made its logits.
    return caught[0] if len(caught) == 1 else (None, logits)


def _dtype(module: torch.nn.Linear, hidden: torch.Tensor) -> torch.dtype:
    """What the head multiplies in at this moment."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else module.weight.dtype


def causal_of(model: Any) -> Any:
    """The causal model of transformers inside what wraps it: DDP, a compiler, adapters."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _tried(model: Any, head: Head) -> Head | None:
    device, modes = head.matrix.weight.device, [(part, part.training) for part in model.modules()]
    ids = torch.arange(8, device=device)[None] % head.matrix.weight.shape[0]
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _matching(model, head, ids)
            # A model that cannot go on with no logits is not one for us either.
            return found if found and hidden_states(model, found, {"input_ids": ids})[0] is not None else None
    except Exception:  # whatever an unusual model does not bear, the plain way is right for it
        return None
    finally:
        for part, training in modes:
            part.training = training


def _matching(model: Any, head: Head, ids: torch.Tensor) -> Head | None:
    """The head, with the scale and cap whose logits are the model's own, if one of those we know is."""
    shown: list[tuple[torch.Tensor, torch.dtype]] = []

    def enlarge(_module: Any, inputs: Any) -> Any:
        hidden = inputs[0]
        with torch.autocast(hidden.device.type, enabled=False):
            largest = float(F.linear(hidden.float(), matrix.weight.float()).abs().max())
        shown.append((hidden * (50 / max(largest, 1e-6)), _dtype(matrix, hidden)))
        return (shown[-1][0],)

    matrix = head.matrix
    handle = head.module.register_forward_pre_hook(enlarge)
    try:
        said = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    if len(shown) != 1 or shown[0][0].shape[:-1] != ids.shape:
        return None
    hidden, dtype = shown[0]
    bias = None if matrix.bias is None else matrix.bias.float()
    logits = F.linear(hidden.float(), matrix.weight.float(), bias)
    if head.tokens_K is not None:
        rows = rows_now(head.module, head.tokens_K).float()
        offset = None if bias is None else bias[head.tokens_K]
        logits.index_copy_(-1, head.tokens_K, F.linear(hidden.float(), rows, offset))
    config = model.config.get_text_config()
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    for scale in dict.fromkeys((1.0, 1 / divisor if divisor else 1.0, factor or 1.0)):
        ours = logits * scale
        ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
        # Logits in 16 bits are rounded by 0.2 %.
        if float((ours - said).norm() / said.norm()) < (1e-4 if dtype == torch.float32 else 1e-2):
            return replace(head, scale=scale, softcap=softcap)
    return None
