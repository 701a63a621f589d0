"""The one training loop. Full fine-tuning and LoRA differ only in what the model lets train.

    run = train(recipe)              runs/2026-11-21-quijote/, with final/ and its events
    run = resume(run)                goes on from the last whole checkpoint, bit for bit on CPU

Each step: the micro-batches of the step, their loss summed over real target tokens and divided by how many there are
in the whole step; clip; look at the numbers before they touch the weights; move; say so.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, pairwise
from typing import Any

from maese import run as runs
from maese.errors import Interrupted, MaeseError
from maese.evaluate.likelihood import loss_sum
from maese.model import load
from maese.plan.machine import memory_used_gib
from maese.recipe import Recipe
from maese.tokens.batches import batches, by_length, packed_batches, steps_per_epoch
from maese.train import checkpoint
from maese.train.compiling import surviving
from maese.train.guard import Spikes, discard, fitting, tell_skipped
from maese.train.milestones import end, finish, look, plan, save
from maese.train.optim import rate
from maese.train.session import Session, State, Watch, closing, open_session


def train(recipe: Recipe, watch: Watch = None) -> runs.Run:
    """Train a recipe from its base in a new run folder. Errors: all of reading, loading, disk, and NUM-01."""
    session = open_session(recipe, None, watch)
    with closing(session):
        _begin(session, resumed_from=None)
        _loop(session)
    return session.run


def resume(run: runs.Run, watch: Watch = None) -> runs.Run:
    """Go on with a run that stopped: from its last whole checkpoint, or from the start if it had none yet.

    Errors: RUN-04 (it had ended), RESUME-01 (data or base changed), RESUME-02 (no checkpoint is whole).
    """
    if (run.read("state.json") or {}).get("status") == "finished":
        raise MaeseError("RUN-04", run=str(run.path))
    session = open_session(run.recipe(), run, watch)
    with closing(session):
        if (run.read("state.json") or {}).get("status") == "finished":  # by another process, while this one loaded
            raise MaeseError("RUN-04", run=str(run.path))
        _same_data(session)
        checkpoint.sweep(run.path)
        if checkpoint.saved(run.checkpoints):
            _go_back(session)
        else:
            _begin(session, resumed_from=0)
        _loop(session)
    return session.run


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
    path, manifest, refused = checkpoint.newest(session.run.checkpoints)
    if manifest["state"]["base_sha256"] != load.weights_hash(session.base):
        raise MaeseError("RESUME-01", path=session.recipe.base, run=str(session.run.path))
    if changed := checkpoint.refusals(manifest["recipe"], session.recipe.model_dump(mode="json")):
        raise MaeseError("RESUME-01", path=f"recipe.yaml ({', '.join(changed)})", run=str(session.run.path))
    _start(session, manifest["step"], manifest["step"])
    for name, file in refused:
        # Left there, it would count among those kept when older ones are let go, and be tried again every time.
        shutil.rmtree(session.run.checkpoints / name, ignore_errors=True)
        session.tell("warning", step=manifest["step"], code="RESUME-03", facts={"checkpoint": name, "file": file})
    plan(session)
    session.state = State(**{k: v for k, v in manifest["state"].items() if k in State.__dataclass_fields__})
    session.spikes, session.halving.times = Spikes(**manifest["state"]["spikes"]), manifest["state"]["halvings"]
    model, scaler = session.accelerator.unwrap_model(session.model), session.accelerator.scaler
    checkpoint.restore(path, model, session.optimizer.optimizer, scaler)


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
    for micro_batches, following in pairwise(chain(_order(session, state.step, steps), [None])):
        assert micro_batches is not None
        began = time.monotonic()
        lr = rate(state.step, steps, train)
        loss, norm, tokens, applied = _step(session, micro_batches, lr, following)
        took = time.monotonic() - began
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + took
        if applied or (math.isfinite(loss) and math.isfinite(norm)):  # JSON has no NaN, and that step was told already
            session.tell(
                "step", step=state.step, epoch=round(state.step / each, 4), loss=loss, lr=lr, grad_norm=norm,
                tokens=tokens, tokens_s=round(tokens / took, 1),
                mem_gib=round(memory_used_gib(session.machine.device), 3), seconds=round(state.seconds, 3),
                **({} if applied else {"skipped": True}),
            )  # fmt: skip
        last = state.step == steps
        if (state.step % recipe.eval.every == 0 or last) and len(session.data.validation):
            look(session, final=False)
            if train.patience and state.worse >= train.patience and not last:
                reason = "early_stop"
                break
        if session.stop_signal:
            save(session)
            session.note(status="interrupted", step=state.step, steps=steps)
            end(session, "interrupted", None)
            raise Interrupted("RUN-06", session.stop_signal, step=state.step, run=str(session.run.path))
        if state.step % train.save_every == 0 and not last:
            save(session)
    finish(session, reason)


def _order(session: Session, start: int, stop: int) -> Iterator[list[list[Any]]]:
    """For each step its micro-batches: lists of row numbers, or of packed rows, which are lists of them."""
    data, train, rows = session.recipe.data, session.recipe.train, session.data.train
    sizes = (train.micro_batch, train.accumulation, train.seed, start, stop)
    return packed_batches(rows.lengths, data.max_length, *sizes) if data.packing else batches(len(rows), *sizes)


def _shares(session: Session, micro_batches: list[list[Any]]) -> tuple[list[list[Any]], float]:
    """What this process runs of a step, in groups, and what its loss weighs.

    Rows of like length go through together: the step learns from the same rows, with less padding.
    """
    world, rank = session.accelerator.num_processes, session.accelerator.process_index
    mine, weight = micro_batches[rank::world], 1.0
    if (
        not mine
    ):  # left without work in a short step, it still takes part in the exchange, with a loss that weighs nothing
        mine, weight = micro_batches[:1], 0.0
    if session.recipe.data.packing:
        return mine, weight
    room = session.recipe.train.micro_batch * session.recipe.data.max_length
    return by_length([row for chosen in mine for row in chosen], session.data.train.lengths, room), weight


def _passes(session: Session, groups: list[list[Any]], weight: float) -> Any:
    """Forward and backward over the groups of a step; returns the sum of their losses (nats), where the model is.

    To read it here would make the host wait for a card that still has work.
    """
    import torch

    accelerator = session.accelerator
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, batch in enumerate(session.feed.batches(groups)):
        with accelerator.no_sync(session.model) if i + 1 < len(groups) else nullcontext():
            loss = loss_sum(session.model, batch)
            session.halving.check()
            # Distribution averages the gradients over processes; the world in the weight makes it the sum again.
            accelerator.backward(loss * weight)
        if weight:
            total += loss.detach().double()
    return total


def _read(session: Session, total: Any, norm: Any) -> tuple[float, float]:
    """The loss over all processes and the norm as numbers: the one moment of a step in which a card is waited for."""
    import torch

    total = torch.as_tensor(total, dtype=torch.float64, device=session.accelerator.device)
    if session.accelerator.num_processes > 1:
        total = session.accelerator.reduce(total, "sum")
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # under FSDP2 it may lie in pieces
    nats, size = torch.stack([total, torch.as_tensor(norm).to(total)]).tolist()
    return nats, size


def _step(
    session: Session, micro_batches: list[list[Any]], lr: float, following: list[list[Any]] | None = None
) -> tuple[float, float, int, bool]:
    """One move of the weights: mean loss over the step's targets (nats), norm of the gradient, real tokens seen, and
    whether it was applied: numbers that make no sense never reach the weights. `following` is what comes after it."""
    accelerator, optimizer, step = session.accelerator, session.optimizer, session.state.step + 1
    # What the whole step learns from, on every process: the mean is over targets, not over micro-batches.
    rows = [i for chosen in micro_batches for row in chosen for i in (row if isinstance(row, list) else [row])]
    targets = int(session.data.train.targets[rows].sum())
    groups, mine = _shares(session, micro_batches)
    weight = mine * accelerator.num_processes / targets
    forget = partial(optimizer.zero_grad, set_to_none=True)
    total = surviving(
        session,
        lambda: fitting(
            session.halving, groups, lambda parts: _passes(session, parts, weight), forget, session.tell, step
        ),
        forget,
    )
    norm = accelerator.clip_grad_norm_(session.model.parameters(), session.recipe.train.clip)
    if following:
        session.feed.expect(session.halving.split(_shares(session, following)[0])[0])
    total, norm = _read(session, total, norm)
    loss, tokens = total / targets, int(session.data.train.lengths[rows].sum())
    verdict = session.spikes.judge(loss, norm, scaled=session.machine.precision == "fp16")
    if verdict == "stop":
        problem = session.spikes.stopped(step, session.recipe, session.run.path)
        session.tell("error", step=step, code=problem.code, facts={"loss": str(loss), "lr": lr})
        end(session, "error", None)
        raise problem
    if verdict == "skip":
        discard(accelerator, optimizer)
        tell_skipped(session.tell, step, loss, norm)
        return loss, norm, tokens, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, tokens, True
