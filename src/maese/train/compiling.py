"""The blocks of a model compiled, where the run is long enough to pay for it; without a compiler it goes on as it was.

    session.compiled = compile_blocks(model) if pays(recipe.train, "cuda", steps) else []
    total = surviving(session, do, undo)      what do() gives; back to plain blocks, once, if the compiler fails

Each block is compiled by itself and for any length: all blocks share what is made for the first, and what is around
them (adapters, hooks, the loss) stays as it is. Only training goes through it: a validation now and then, and writing
a token at a time, would each need a compilation of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from maese.recipe import Train
from maese.train.guard import give_back, rng_state, set_rng_state

if TYPE_CHECKING:
    from maese.train.session import Session

PAYS = 200  # steps under which a card would be done before the compiler has earned its minute

Result = TypeVar("Result")


def pays(train: Train, device: str, steps: int) -> bool:
    """Whether a run is compiled: as the recipe says, or when it is long and on a card."""
    return device == "cuda" and steps >= PAYS if train.compile == "auto" else bool(train.compile)


def compile_blocks(model: Any) -> list[Any]:
    """Compile the repeated blocks of a model (wrapped or not), in place; returns them. Weights keep their names."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = _while_training(block, block.forward, torch.compile(block.forward, dynamic=True))
    return blocks


def _while_training(block: Any, plain: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def forward(*inputs: Any, **named: Any) -> Any:
        return (fused if block.training else plain)(*inputs, **named)

    return forward


def uncompile(blocks: list[Any]) -> None:
    """The blocks as they were before `compile_blocks`."""
    for block in blocks:
        del block.forward


def surviving(session: Session, do: Callable[[], Result], undo: Callable[[], object]) -> Result:
    """What `do` gives. If the compiler fails in it, it is undone and done again, plain, from the same random state."""
    if not session.compiled:
        return do()
    began = rng_state()
    try:
        return do()
    except Exception as problem:
        if not of_the_compiler(problem):
            raise
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
    uncompile(session.compiled)
    session.compiled = []
    undo()
    give_back()
    set_rng_state(began)
    session.tell("warning", step=session.state.step + 1, code="SPEED-01", facts={"reason": reason})
    return do()


def of_the_compiler(problem: BaseException | None) -> bool:
    """Whether an error is of torch's compiler and not of what was compiled."""
    from torch._dynamo.exc import TorchDynamoException

    while problem is not None:
        if isinstance(problem, TorchDynamoException):
            return True
        problem = problem.__cause__
    return False
