"""Muon: each matrix of the body moves by its gradient made orthogonal; everything else moves by AdamW.

    Muon([{"params": matrices, "orthogonal": True, "weight_decay": 0.1},
          {"params": the_rest, "orthogonal": False, "weight_decay": 0.0}], lr=1e-3)

Jordan et al. 2024, kellerjordan.github.io/posts/muon; the size of an update is AdamW's, so both share one rate: Liu et
al. 2025, arXiv 2502.16982. `torch.optim.Muon` turns one matrix at a time; here those of equal shape go together, and
AdamW (fused) lives under the same roof, so that there is one optimizer to step, save and restore.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from maese.plan.machine import bf16_pays_on_cpu

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95
# Bytes of matrices turned together: beyond it the work is no faster and needs its memory several times over.
TOGETHER = 64 << 20


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `orthogonal` and fused AdamW for the others; decay is decoupled in both."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "orthogonal": False})
        rest = self._rest()
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=1e-8, fused=True) if rest else None

    def _rest(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group["orthogonal"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One move of every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            if group["orthogonal"]:
                self._turn(group)
        if self._adamw:
            # Groups and state are the same objects; loading a state has put others in their place.
            self._adamw.param_groups, self._adamw.state = self._rest(), self.state
            self._adamw.step()
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                # A tall matrix and its wide transpose are the same work.
                alike[min(p.shape), max(p.shape), p.device].append(p)
        for (low, high, device), matrices in alike.items():
            dtype = torch.bfloat16 if device.type != "cpu" or bf16_pays_on_cpu() else torch.float32
            many = max(1, TOGETHER // (low * high * dtype.itemsize))
            for i in range(0, len(matrices), many):
                some = matrices[i : i + many]
                turned = orthogonal(torch.stack([self._wide_update(p).to(dtype) for p in some]))
                for p, update in zip(some, turned, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.t() if p.shape[0] > p.shape[1] else update, alpha=-group["lr"] * rms_scale(p.shape))

    def _wide_update(self, p: torch.Tensor) -> torch.Tensor:
        """The gradient with Nesterov's momentum, no taller than wide."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(state["momentum_buffer"], MOMENTUM)
        return update.t() if p.shape[0] > p.shape[1] else update


def rms_scale(shape: Any) -> float:
    """How much larger an orthogonal matrix must be for its entries to move as AdamW moves them: `0.2 sqrt(max)`."""
    return 0.2 * math.sqrt(max(shape))


def orthogonal(matrices_KMN: torch.Tensor) -> torch.Tensor:
    """Wide matrices (K, M, N), M ≤ N, with their singular values all brought near 1 (0.7 to 1.2), by five steps.

    Newton-Schulz: products alone, so it works in bf16 where a decomposition would not.
    """
    a, b, c = COEFFICIENTS
    x = matrices_KMN / torch.linalg.matrix_norm(matrices_KMN, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
