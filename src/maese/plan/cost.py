"""What a run will take of disk and of time, from arithmetic and from the pace of a few steps.

disk(shape, job, recipe)                      bytes: its checkpoints, the best and the final folder
total(Pace(…), …)                             (shortest, longest) in seconds, with its validations
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maese.plan.memory import Job, optimizer_of, trained_of
from maese.plan.shape import Anatomy, parameters
from maese.recipe import Recipe

FORWARD = 1 / 3  # of the work of a step, what a pass without the way back is


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, how many lie there at once, and of what stays when all is over."""

    checkpoint: int
    checkpoints: int
    best: int
    final: int

    @property
    def most(self) -> int:
        """What must be free: the oldest checkpoint goes only when the new one is whole."""
        return self.checkpoint * self.checkpoints + self.best + self.final


@dataclass(frozen=True)
class Pace:
    """What a few measured steps took, and what the whole run has to go through."""

    seconds: tuple[float, ...]  # of each measured step
    tokens: tuple[int, ...]  # that went through in it
    steps: int  # of the run
    whole: int  # tokens of the run
    looks: int  # validations
    look: int  # tokens of each
    peak_gib: float

    @property
    def speeds(self) -> tuple[float, ...]:
        """Tokens a second of each measured step."""
        return tuple(n / max(1e-9, s) for n, s in zip(self.tokens, self.seconds, strict=True))


def disk(shape: Anatomy, job: Job, recipe: Recipe, steps: int | None = None) -> Disk:
    """What a run writes; with its number of steps, or the most it may take, no more checkpoints than it comes to."""
    steps = steps if steps is not None else recipe.train.max_steps
    trained = trained_of(shape, job)
    states = optimizer_of(shape, job, trained, "disk")
    saves = recipe.train.keep + 1
    if steps is not None:
        saves = min(saves, (steps - 1) // recipe.train.save_every)
    best = 4 * trained if recipe.train.final == "best" and recipe.data.validation else 0
    final = 4 * parameters(shape) if job.kind == "full" else 4 * trained
    return Disk(4 * trained + states, saves, best, final)


def total(pace: Pace) -> tuple[float, float]:
    """Seconds the run would take at the fastest and at the slowest of the measured steps.

    Of all it does, only what it writes now and then is not in it. The first step should not be in the pace: what is
    made once is made there.
    """
    work = pace.whole + FORWARD * pace.looks * pace.look
    return work / max(pace.speeds), work / min(pace.speeds)


def facts(found: Disk, pace: Pace | None = None) -> dict[str, Any]:
    """Disk in bytes and time in seconds, as JSON; `None` for a time that nobody measured."""
    figures: dict[str, Any] = {"disk": {**found.__dict__, "most": found.most}, "time": None}
    if pace is not None:
        shortest, longest = total(pace)
        figures["time"] = {
            "shortest_s": round(shortest, 1), "longest_s": round(longest, 1), "steps": pace.steps,
            "measured_steps": len(pace.seconds), "tokens_s": [round(speed, 1) for speed in pace.speeds],
            "seconds_step": [round(seconds, 4) for seconds in pace.seconds],
            "peak_gib": pace.peak_gib,
        }  # fmt: skip
    return figures
