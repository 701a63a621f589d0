"""The same sums in fewer operations, put into a model before it trains: nothing it computes or saves is another.

    quicken(model)      how many of its modules take a shorter way now

Three things that libraries do in many small steps, each of them a trip of a whole activation to memory and back. GPT-2
and Phi write their GELU as eight operations where torch has one; Llama, Qwen and their kin write RMSNorm as five. PEFT
turns an activation into fp32 to multiply it in bf16, scales and adds what comes out in copies, and keeps them all for
the way back; here an adapter is one operation that keeps its input, which the frozen matrix shares, and the few
numbers in the middle. A matrix in 4 bits (`model.quant`) is unfolded for each of its two products and never kept.

N tokens, I and O the width of what comes in and goes out, R the rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from maese.model.rows import quicken_rows


def quicken(model: Any) -> int:
    """Shorten what can be shortened, in place; returns how many modules were. Saved files and names stay the same."""
    changed = quicken_rows(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is NewGELUActivation:  # the tanh form of Hendrycks and Gimpel 2016, arXiv 1606.08415
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
                changed += 1
            if _is_rms(child):
                setattr(module, name, Norm(child))
                changed += 1
        if _plain(module):
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]  # on purpose
            changed += 1
    return changed


def _plain(module: Any) -> bool:
    """Whether a module is an adapter over a matrix that is multiplied as it is, or unfolded from 4 bits for it."""
    if not isinstance(module, LoraLayer):
        return False
    base = module.get_base_layer()
    if type(module) is LoraLinear:
        return type(base) in (torch.nn.Linear, Conv1D)
    return type(module).__name__ == "Linear4bit" and _state(base) is not None


def _state(base: Any) -> Any:
    """How the weight of a layer was put into 4 bits, or None."""
    return getattr(base.weight, "quant_state", None)


def _is_rms(module: Any) -> bool:
    """Whether a module is the RMSNorm of Llama's kin; others have that name too, and Gemma's adds one to its weight."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    if weight.is_meta or weight.ndim != 1:
        return False
    with torch.no_grad():
        x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1)
        ours = _Norm.apply(x, weight, module.variance_epsilon, torch.promote_types(weight.dtype, x.dtype))
        return bool(torch.allclose(module(x).float(), ours.float(), rtol=1e-3, atol=1e-3))


class Norm(torch.nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) with the weight of another, in the dtype that one gives.

    A class and not another `forward` on the old one: what is compiled for one block then serves them all.
    """

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.weight, self.eps = of.weight, of.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _Norm.apply(x, self.weight, self.eps, torch.promote_types(self.weight.dtype, x.dtype))
        return normed


class _Norm(torch.autograd.Function):
    """`weight x / sqrt(mean(x²) + eps)`, in fp32; keeps x, which its block keeps anyway, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        grad = grad.float()
        to_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        pull = grad * weight
        inward = (pull * normal).mean(-1, keepdim=True)
        return pull.sub_(normal.mul_(inward)).mul_(scale).to(x.dtype), to_weight, None, None


def _forward(layer: Any, usual: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `layer` gives with one plain adapter in use; in every other state of it, what it gave before."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(active) == 1 and not (layer.disable_adapters or layer.merged or layer.lora_variant or args or kwargs)
    if not plain:
        return usual(x, *args, **kwargs)
    base, name = layer.get_base_layer(), active[0]
    a_RI, b_OR = layer.lora_A[name], layer.lora_B[name]
    if base.weight.requires_grad or a_RI.bias is not None or b_OR.bias is not None:
        return usual(x)
    kind = x.device.type
    state = _state(base)
    dtype = base.weight.dtype if state is None else base.compute_dtype
    if state is None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    given, x = x.dtype, x.to(dtype)
    dropout = layer.lora_dropout[name]
    dropped = x if isinstance(dropout, torch.nn.Identity) or not dropout.training else dropout(x)
    weight_OI = base.weight.t() if isinstance(base, Conv1D) else base.weight
    bias_O = None if base.bias is None else base.bias.to(dtype)
    if state is None:
        weight_OI = weight_OI.to(dtype)
    out: Tensor = _Adapted.apply(
        x, dropped, weight_OI, bias_O, a_RI.weight, b_OR.weight, float(layer.scaling[name]), state
    )  # fmt: skip
    return out if state is None else out.to(given)


class _Adapted(torch.autograd.Function):
    """`x Wᵀ + bias + scale · dropped Aᵀ Bᵀ`, with gradients for x, dropped, A and B: W and its bias are frozen.

    Hu et al. 2021, arXiv 2106.09685, equation 3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor,
                b_OR: Tensor, scale: float, state: Any) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            a, b = a_RI.to(x.dtype), (b_OR * scale).to(x.dtype)
            middle = F.linear(dropped, a)
            out = F.linear(x, weight_OI, bias_O) if state is None else _in_4_bits(x, weight_OI, bias_O, state)
            out += F.linear(middle, b)
        ctx.save_for_backward(dropped, middle, weight_OI, a, b)
        ctx.scale, ctx.same, ctx.dtypes, ctx.state = scale, dropped is x, (a_RI.dtype, b_OR.dtype), state
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dropped, middle, weight_OI, a, b = ctx.saved_tensors
        wants_x, wants_dropped, *_ = ctx.needs_input_grad
        pull = grad @ b  # (…, R)
        if wants_x and ctx.state is not None:
            weight_OI = _unfolded(weight_OI, ctx.state).to(grad.dtype)
        to_x = grad @ weight_OI if wants_x else None
        to_dropped = None
        if ctx.same and to_x is not None:
            to_x += pull @ a
        elif wants_dropped and not ctx.same:
            to_dropped = pull @ a
        flat_NO, flat_NR = grad.flatten(0, -2), pull.flatten(0, -2)
        # Rounded to 16 bits where they are products of such numbers, and added up over passes in what A and B are in.
        to_a = (flat_NR.t() @ dropped.flatten(0, -2)).to(ctx.dtypes[0])
        to_b = (middle.flatten(0, -2).t() @ flat_NO).t().to(ctx.dtypes[1]) * ctx.scale
        return to_x, to_dropped, None, None, to_a, to_b, None, None


def _in_4_bits(x: Tensor, weight: Tensor, bias_O: Tensor | None, state: Any) -> Tensor:
    """`x Wᵀ + bias` by the library, which has kernels of its own where there are few tokens."""
    from bitsandbytes import matmul_4bit

    out: Tensor = matmul_4bit(x, weight, quant_state=state, bias=bias_O)
    return out


def _unfolded(weight: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.view(-1, 1), state)
    return whole
