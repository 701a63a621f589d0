"""A few real steps of a recipe on this machine, to know its pace before the run: nothing of them stays.

pace = probe(recipe)
plan.cost.total(pace)            seconds, at the fastest and at the slowest of them
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from pathlib import Path

from maese.plan.cost import Pace
from maese.plan.machine import memory_peak_gib
from maese.recipe import Recipe
from maese.tokens.batches import steps_per_epoch
from maese.train.optim import rate
from maese.train.session import closing, open_session
from maese.train.step import order, take_step

MOST, SECONDS = 6, 15.0  # steps that are measured, and after how long no other one is begun


def probe(recipe: Recipe) -> Pace:
    """The pace of the first steps of a recipe, as they would be. Errors: all of opening a run."""
    room = Path(tempfile.mkdtemp(prefix="maese-probe-"))
    try:
        session = open_session(recipe.model_copy(update={"output": str(room / "run")}), None, None)
        with closing(session):
            session.model.train()
            seconds, tokens, began = [], [], time.monotonic()
            for done, (micro_batches, following) in enumerate(order(session, 0, min(MOST + 1, session.steps))):
                start = time.monotonic()
                _, _, seen, _ = take_step(session, micro_batches, rate(done, session.steps, recipe.train), following)
                seconds.append(time.monotonic() - start)
                tokens.append(seen)
                if session.stopping:  # there is nothing to save first
                    raise KeyboardInterrupt
                if time.monotonic() - began > SECONDS:
                    break
            first = 1 if len(seconds) > 1 else 0  # kernels are made in the first step
            train, data = recipe.train, session.data
            each = steps_per_epoch(session.rows, train.micro_batch, train.accumulation)
            looks = 1 + math.ceil(session.steps / recipe.eval.every) if len(data.validation) else 0
            return Pace(
                tuple(seconds[first:]), tuple(tokens[first:]), session.steps,
                int(data.train.tokens * session.steps / each), looks, data.validation.tokens,
                round(memory_peak_gib(session.machine.device), 3),
            )  # fmt: skip
    finally:
        shutil.rmtree(room, ignore_errors=True)
