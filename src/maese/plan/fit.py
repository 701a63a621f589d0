"""What fits where, and what to change when it does not: the smallest change first, each with what it saves and costs.

    ways(shape, recipe, "bf16", "cuda")              (Way(key="smaller", changes=(("train.micro_batch", 1), …), …), …)
    fit(shape, recipe, "bf16", "cuda", room=6e9)     the first settings that fit, or None
    CARDS                                            the memory of common cards, in bytes

Memory alone decides: what a change costs in time or in what is learnt is said beside it, and not weighed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from maese.errors import MaeseError
from maese.plan.memory import Estimate, estimate, job_of
from maese.plan.shape import KNOWN, Anatomy, file_of, open_shape, parameters
from maese.recipe import Recipe

# Makers count in powers of ten, and the screen takes some: to plan with less than is there does no harm.
CARDS = {f"{size} GB": size * 10**9 for size in (6, 8, 12, 16, 24, 80)}
SHORTEST = 4  # a context is not cut below this share of it: other data would be learnt
LENGTHS = (1, 2, SHORTEST)
METHODS = ("full", "lora", "qlora")
WORTH = 0.02  # share of the memory that a change must save to be named

Changes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Way:
    """Keys of the recipe that take less memory: which, how much less (bytes), and what the run then needs."""

    key: str  # smaller | checkpointing | shorter | eight_bits | lora | qlora
    changes: Changes
    saved: int
    needed: int


@dataclass(frozen=True)
class Fit:
    """Settings that fit, as changes to a recipe (none: it fits as it is), and what they need."""

    changes: Changes
    told: Estimate


def typed(changes: Changes) -> str:
    """Changes as they are typed: `train.micro_batch=1 train.accumulation=8`."""
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes)


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values at some keys, `section.key` each."""
    for key, value in changes:
        section, name = key.split(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def told(shape: Anatomy, recipe: Recipe, precision: str, device: str) -> Estimate:
    """The estimate of a recipe on a device."""
    return estimate(shape, job_of(recipe, precision, device), file=file_of(recipe.base))


def ways(shape: Anatomy, recipe: Recipe, precision: str, device: str, built: bool = False) -> list[Way]:
    """Each change by itself that takes less memory, from the smallest to the largest.

    `built`: the base was made and not trained, and an adapter over what knows nothing is no way out.
    """
    now, keys = told(shape, recipe, precision, device).needed, dict(_single(recipe, built))
    saved = {one.changes: now - one.told.needed for one in _tried(shape, recipe, precision, device, keys.values())}
    return [
        Way(key, changes, saved[changes], now - saved[changes])
        for key, changes in keys.items()
        if saved.get(changes, 0) > WORTH * now
    ]


def smaller(shape: Anatomy, recipe: Recipe, precision: str, device: str, room: float) -> str:
    """The largest model known by name, of those below this one, that some settings fit in `room` bytes; else the
    smallest there is."""
    known = {name: open_shape(name) for name in KNOWN}
    below = sorted((parameters(one), name) for name, one in known.items() if parameters(one) < parameters(shape))
    for _, name in reversed(below):
        long_enough = known[name].context >= recipe.data.max_length
        if long_enough and fit(known[name], recipe, precision, device, room):
            return name
    return "nano"


def _tried(shape: Anatomy, recipe: Recipe, precision: str, device: str, every: Iterable[Changes]) -> Iterator[Fit]:
    """What the recipe needs with each of some changes; not with an adapter on targets that another family has."""
    for changes in every:
        try:
            yield Fit(changes, told(shape, changed(recipe, changes), precision, device))
        except MaeseError as problem:
            if problem.code != "ADAPT-02":
                raise


def _methods(recipe: Recipe, built: bool) -> tuple[str, ...]:
    """The recipe's own, and those that take less."""
    return METHODS[METHODS.index(recipe.method.kind) :][: 1 if built else None]


def _single(recipe: Recipe, built: bool) -> Iterator[tuple[str, Changes]]:
    train = recipe.train
    if train.micro_batch > 1:
        yield "smaller", _batch(recipe, 1)
    if not train.gradient_checkpointing:
        yield "checkpointing", (("train.gradient_checkpointing", True),)
    if recipe.data.max_length >= 64:
        yield "shorter", (("data.max_length", recipe.data.max_length // 2),)
    if train.optimizer == "adamw":
        yield "eight_bits", (("train.optimizer", "adamw8bit"),)
    for kind in _methods(recipe, built)[1:]:
        yield kind, (("method.kind", kind),)


def _batch(recipe: Recipe, micro_batch: int) -> Changes:
    """Fewer rows at once and more turns: the same batch, which they must divide."""
    each = recipe.train.micro_batch * recipe.train.accumulation
    return ("train.micro_batch", micro_batch), ("train.accumulation", each // micro_batch)


def fit(
    shape: Anatomy, recipe: Recipe, precision: str, device: str, room: float, built: bool = False
) -> Fit | None:  # fmt: skip
    """The settings nearest to the recipe that fit in `room` bytes; None where no change is enough.

    The rows at once give way first, which changes nothing of what is learnt; then what is kept, the length, the
    optimizer, and the method last, unless the base was `built` and not trained.
    """
    every = _tried(shape, recipe, precision, device, _combined(recipe, built))
    return next((found for found in every if found.told.needed <= room), None)


def least(shape: Anatomy, recipe: Recipe, precision: str, device: str, built: bool = False) -> Fit:
    """The settings that need the least of all those `fit` tries."""
    every = _tried(shape, recipe, precision, device, _combined(recipe, built))
    return min(every, key=lambda found: found.told.needed)


def _combined(recipe: Recipe, built: bool = False) -> Iterator[Changes]:
    """All settings there are to try, the nearest to the recipe first."""
    train, data, method = recipe.train, recipe.data, recipe.method
    kinds, batch = _methods(recipe, built), train.micro_batch * train.accumulation
    optimizers = dict.fromkeys((train.optimizer, "adamw8bit" if train.optimizer == "adamw" else train.optimizer))
    halves = [cut for cut in LENGTHS if cut == 1 or data.max_length // cut >= 32]
    checkpoints = dict.fromkeys((train.gradient_checkpointing, True))
    halved = [train.micro_batch >> times for times in range(train.micro_batch.bit_length())]
    rows = [at_once for at_once in halved if batch % at_once == 0]  # a larger batch would learn otherwise
    for kind, optimizer, cut, again, micro_batch in itertools.product(kinds, optimizers, halves, checkpoints, rows):
        said: dict[str, Any] = {}
        if micro_batch != train.micro_batch:
            said |= dict(_batch(recipe, micro_batch))
        if again != train.gradient_checkpointing:
            said["train.gradient_checkpointing"] = again
        if cut > 1:
            said["data.max_length"] = data.max_length // cut
        if optimizer != train.optimizer:
            said["train.optimizer"] = optimizer
        if kind != method.kind:
            said["method.kind"] = kind
        yield tuple(said.items())
