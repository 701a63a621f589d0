"""Weights in bf16 that compute, and behind each its master in fp32 that learns.

    optimizer = Masters(groups, lambda masters: AdamW(masters, lr=1e-4, fused=True))
    loss.backward()                      each gradient is added to the master's, in fp32, and let go at once
    norm = optimizer.clip(1.0)
    optimizer.step()                     the masters move; the weights are their rounding
    optimizer.settle()                   at the end: the model is its masters again, in fp32

In bf16 a weight has three digits, and most updates are smaller than the last of them: added there they would vanish
(Micikevicius et al. 2018, arXiv 1710.03740). The weights are at every moment the masters rounded to nearest, so the
masters alone are saved. On CPU and on one or many CUDA devices; FSDP2 keeps masters of its own and needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Groups = list[dict[str, Any]]


class Masters:
    """An optimizer over fp32 copies of a model's parameters, which from here on are in `dtype`.

    `groups` are the groups of an optimizer over the model's own parameters, in fp32 if they are to lose nothing;
    `make_inner` is given the same groups over the masters. `param_groups` and `state` are the inner optimizer's.
    """

    def __init__(
        self, groups: Groups, make_inner: Callable[[Groups], Any], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._masters: dict[Tensor, Tensor] = {}
        mirrored = [group | {"params": [self._adopt(p, dtype) for p in group["params"]]} for group in groups]
        self.inner = make_inner(mirrored)
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._masters]

    def _adopt(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        # A parameter in fp32 gives its own memory to its master, and gets half of it anew.
        master = parameter.detach().float().requires_grad_()
        parameter.data = master.detach().to(dtype, copy=True)
        self._masters[parameter] = master
        return master

    def _take(self, parameter: Tensor) -> None:
        """Add the gradient of one backward pass to the master's and let go of it."""
        master, grad = self._masters[parameter], parameter.grad
        assert grad is not None
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad.add_(grad)
        parameter.grad = None

    @property
    def param_groups(self) -> Groups:
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.inner.state

    def truth(self, parameter: Tensor) -> Tensor:
        """What is saved and restored for a parameter of the model: its master, or itself if it has none."""
        return self._masters.get(parameter, parameter)

    def exchange(self) -> None:
        """Make the gradients their mean over all processes, where the model is not wrapped in DDP, which does it too.

        In fp32 and once a step, in the order of the parameters, which is the same everywhere.
        """
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            torch.distributed.all_reduce(master.grad)
            master.grad.div_(torch.distributed.get_world_size())

    def clip(self, largest: float) -> Tensor:
        """Shrink the gradients so that together they have no greater norm; returns the norm they had."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # A factor of 1 would still read and write them all; on CUDA to ask would cost more, as it stops the queue.
        if norm.device.type != "cpu" or not norm <= largest:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), largest, norm)
        return norm

    def step(self) -> None:
        """Move the masters, and round them into the weights."""
        self.inner.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights: after a step, and after masters were restored."""
        torch._foreach_copy_([p.detach() for p in self._masters], [*self._masters.values()])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, master in self._masters.items():
            parameter.grad = None
            if set_to_none or master.grad is None:
                master.grad = None
            else:
                master.grad.zero_()

    def settle(self) -> None:
        """Give the model its masters for weights, in fp32: what is saved is what was learnt. No step follows."""
        for hook in self._hooks:
            hook.remove()
        for parameter, master in self._masters.items():
            parameter.data, parameter.grad = master.detach(), None
