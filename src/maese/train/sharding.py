"""Weights that lie in pieces on several processes (FSDP2): how they are cut, gathered for a file, and put back.

    accelerator = accelerator_of(machine)       as torchrun or `accelerate launch` set things up
    gathered(parameter)                         a whole tensor on the processor, wherever its pieces lie
    as_pieces(tensor, like=parameter)           a whole tensor cut as that parameter is

What is saved never knows how many processes there were: names and shapes are those of the plain model.
"""

from __future__ import annotations

import os
from typing import Any

from maese.errors import MaeseError
from maese.plan.machine import Machine
from maese.recipe import Recipe


def accelerator_of(here: Machine) -> Any:
    """Accelerate's view of this process, for the device and precision of the machine.

    FSDP2 is asked for as Accelerate's own launcher does, in the environment (ACCELERATE_USE_FSDP, FSDP_VERSION=2).
    Error: DIST-04 where that asks for the first FSDP.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    kind = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[here.precision]
    plugin = None
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise MaeseError("DIST-04", found="FSDP 1")
        # Each process reads the base by itself: only so can it be looked at and adapted before it is cut.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(mixed_precision=kind, cpu=here.device == "cpu", fsdp_plugin=plugin)
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on cards alone and would go on with DDP, without a word; torch can on processors too.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        plugin.set_mixed_precision(kind if kind != "no" else "fp32")
    return accelerator


def refuse_sharded(recipe: Recipe) -> None:
    """What needs whole matrices, which nobody has here: DIST-01 (an optimizer), QUANT-02 (a base in 4 bits), DIST-06
    (the rows of new tokens)."""
    if recipe.method.kind == "qlora":  # its bytes are no numbers that could be put together again
        raise MaeseError("QUANT-02")
    if recipe.data.marks == "add":
        raise MaeseError("DIST-06")
    if recipe.train.optimizer != "adamw":
        raise MaeseError("DIST-01", found=recipe.train.optimizer)


def whole(tensor: Any) -> Any:
    """The tensor itself, or put together from its pieces: all processes must ask for it, in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensor: Any, here: bool = True) -> Any:
    """A tensor whole and on the processor, to be written; nothing where it is not `here` that it will be."""
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if here else None


def as_pieces(tensor: Any, like: Any) -> Any:
    """A whole tensor, the same on all processes, cut as `like` is; itself where that is whole, or is not its shape."""
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Each process cuts its piece out of what it has read: nothing travels.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def cut_again(model: Any) -> None:
    """Once a pass has no way back, let go of what FSDP2 still keeps whole after it: embeddings and head.

    Until then these are all that is seen of them: what is put there never reaches the pieces, and the optimizer knows
    nothing under them. All processes must do so at the same moment.
    """
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()


def whole_state(model: Any, here: bool) -> dict[str, Any]:
    """The state of a model with all its tensors gathered; what is one tensor under two names stays so."""
    made: dict[int, Any] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in made:
            made[id(tensor)] = gathered(tensor, here)
    return {name: made[id(tensor)] for name, tensor in state.items()}
