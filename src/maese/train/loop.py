"""The one training loop. Full fine-tuning and LoRA differ only in what the model lets train.

    run = train(recipe)              runs/2026-11-21-quijote/, with final/ and its events
    run = resume(run)                goes on from the last whole checkpoint, bit for bit on CPU

Each step (`train.step`): its rows forward and backward, their loss over real target tokens; clip; look at the numbers
before they touch the weights; move. Then say so, look at validation now and then, save now and then.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

from maese import run as runs
from maese.errors import Interrupted, MaeseError
from maese.model import load
from maese.plan.machine import memory_used_gib
from maese.recipe import Recipe, Train
from maese.tokens.batches import steps_per_epoch
from maese.train import checkpoint
from maese.train.guard import Spikes
from maese.train.milestones import end, finish, look, plan, save
from maese.train.optim import level, rate
from maese.train.session import Session, State, Watch, closing, open_session
from maese.train.step import order, take_step, try_the_longest
from maese.train.together import agreed


def train(recipe: Recipe, watch: Watch = None) -> runs.Run:
    """Train a recipe from its base in a new run folder. Errors: all of reading, loading, disk, and NUM-01."""
    session = open_session(recipe, None, watch)
    with closing(session):
        _begin(session, resumed_from=None)
        _loop(session)
    return session.run


def resume(run: runs.Run, watch: Watch = None) -> runs.Run:
    """Go on with a run that stopped: from its last whole checkpoint, or from the start if it had none yet.

    Errors: RUN-04 (it had ended), RESUME-01 (data or base changed), RESUME-02 (no checkpoint is whole),
    RESUME-05 (the recipe changed in what is learnt), RESUME-06 (its base is no longer there).
    """
    _refuse_finished(run)
    recipe = run.recipe()
    if Path(recipe.base).is_absolute() and not Path(recipe.base).exists():
        raise agreed(MaeseError("RESUME-06", run=str(run.path), base=recipe.base))
    session = open_session(recipe, run, watch)
    with closing(session):
        _refuse_finished(run)  # again: another process may have ended it while this one loaded
        session.together.each(lambda: _same_data(session))
        session.together.first(lambda: checkpoint.sweep(run.path))
        if session.together.first(lambda: bool(checkpoint.saved(run.checkpoints))):
            _go_back(session)
        else:
            _begin(session, resumed_from=0)
        _loop(session)
    return session.run


def _refuse_finished(run: runs.Run) -> None:
    if (run.read("state.json") or {}).get("status") == "finished":
        train = run.recipe().train
        twice = f"train.max_steps={2 * train.max_steps}" if train.max_steps else f"train.epochs={2 * train.epochs:g}"
        raise agreed(MaeseError("RUN-04", run=str(run.path), twice=twice))


def _begin(session: Session, resumed_from: int | None) -> None:
    """The first events of a run: what it is, what it will cost, and what the untouched base does."""
    if session.main:
        session.run.write("data.json", session.data.facts)
        if (left_out := session.data.folder / "dropped.jsonl").stat().st_size:
            shutil.copy(left_out, session.run.path)
    _start(session, 0, resumed_from)
    for key, facts in session.data.notes:
        session.tell("warning", step=0, code=key, facts=facts)
    plan(session)
    look(session, final=False)


def _go_back(session: Session) -> None:
    """Put everything as it was at the newest checkpoint that is whole, and say which were not."""
    folder = session.run.checkpoints
    path, manifest, refused = session.together.first(lambda: checkpoint.newest(folder))
    path = folder / Path(path).name
    if manifest["state"]["base_sha256"] != load.weights_hash(session.base):
        raise agreed(MaeseError("RESUME-01", path=session.recipe.base, run=str(session.run.path)))
    now, before = session.recipe, Train.model_validate(manifest["recipe"]["train"])
    open_end = all(level(manifest["step"], session.planned(train), train) for train in (before, now.train))
    if changed := checkpoint.refusals(manifest["recipe"], now.model_dump(mode="json"), open_end):
        then, found = (", ".join(f"{key}: {said[i]}" for key, *said in changed) for i in (0, 1))
        raise agreed(MaeseError("RESUME-05", found=found, then=then, run=str(session.run.path)))
    _start(session, manifest["step"], manifest["step"])
    for name, file in refused:
        # Left there, it would count among those kept when older ones are let go, and be tried again every time.
        if session.main:
            shutil.rmtree(folder / name, ignore_errors=True)
        session.tell("warning", step=manifest["step"], code="RESUME-03", facts={"checkpoint": name, "file": file})
    plan(session)
    session.state = State(**{k: v for k, v in manifest["state"].items() if k in State.__dataclass_fields__})
    session.spikes, session.halving.times = Spikes(**manifest["state"]["spikes"]), manifest["state"]["halvings"]
    checkpoint.restore(path, *session.inner, session.accelerator.scaler)


def _start(session: Session, step: int, resumed_from: int | None) -> None:
    recipe = session.recipe
    facts = {"name": recipe.name, "base": recipe.base, "method": recipe.method.kind}
    session.tell("start", step=step, resumed_from=resumed_from, **facts)


def _same_data(session: Session) -> None:
    known = session.run.read("data.json")
    for before, source in zip(known["sources"] if known else [], session.data.facts["sources"], strict=False):
        if before["sha256"] != source["sha256"]:
            raise MaeseError("RESUME-01", path=source["path"], run=str(session.run.path))
    # The same words may be other ids, if the tokenizer changed.
    if known and known["ids_sha256"] != session.data.facts["ids_sha256"]:
        raise MaeseError("RESUME-01", path=f"{session.recipe.base}/tokenizer.json", run=str(session.run.path))


def _loop(session: Session) -> None:
    recipe, state, steps = session.recipe, session.state, session.steps
    train = recipe.train
    each = steps_per_epoch(session.rows, train.micro_batch, train.accumulation)
    session.note(status="training", steps=steps)
    session.model.train()
    reason = "finished"
    session.together.first(lambda: checkpoint.room(session.run.checkpoints, checkpoint.weight(*session.inner)))
    try_the_longest(session)
    for micro_batches, following in order(session, state.step, steps):
        began = time.monotonic()
        lr = rate(state.step, steps, train)
        loss, norm, tokens, applied = take_step(session, micro_batches, lr, following)
        took = time.monotonic() - began
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + took
        if applied or (math.isfinite(loss) and math.isfinite(norm)):  # JSON has no NaN, and that step was told already
            session.tell(
                "step", step=state.step, epoch=round(state.step / each, 4), loss=loss, lr=lr, grad_norm=norm,
                tokens=tokens, tokens_s=round(tokens / took, 1),
                mem_gib=round(memory_used_gib(session.machine.device), 3), seconds=round(state.seconds, 3),
                **({} if applied else {"skipped": True}),
            )  # fmt: skip
        session.room.keep(session.machine.device)
        last = state.step == steps
        if (state.step % recipe.eval.every == 0 or last) and len(session.data.validation):
            look(session, final=False)
            if train.patience and state.worse >= train.patience and not last:
                reason = "early_stop"
                break
        if number := session.stopping:
            save(session)
            session.note(status="interrupted", step=state.step, steps=steps)
            end(session, "interrupted", None)
            raise agreed(Interrupted("RUN-06", number, step=state.step, run=str(session.run.path)))
        if state.step % train.save_every == 0 and not last:
            save(session)
    finish(session, reason)
