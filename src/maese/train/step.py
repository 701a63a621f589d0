"""One step: which rows it learns from, how they go through the model, and one move of the weights.

    for micro_batches, following in order(session, 0, steps): …
    loss, norm, tokens, applied = take_step(session, micro_batches, lr, following)

The loss is summed over the real targets of the whole step and divided by how many there are, so neither how its rows
are grouped, nor on how many processes, nor how many go through at once changes what is learnt.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, pairwise
from typing import Any

from maese.evaluate.likelihood import loss_sum
from maese.tokens.batches import ENOUGH, batches, by_length, by_room, packed_batches
from maese.train.compiling import surviving
from maese.train.guard import discard, fitting, longest_rows, rehearse, tell_skipped
from maese.train.milestones import end
from maese.train.session import Session
from maese.train.together import agreed

STOPS = (signal.SIGINT, signal.SIGTERM)

MicroBatches = list[list[Any]]


def order(session: Session, start: int, stop: int) -> Iterator[tuple[MicroBatches, MicroBatches | None]]:
    """For each step its micro-batches, and those of the next: row numbers, or packed rows, which are lists of them."""
    data, train, rows = session.recipe.data, session.recipe.train, session.data.train
    sizes = (train.micro_batch, train.accumulation, train.seed, start, stop)
    every = packed_batches(rows.lengths, data.max_length, *sizes) if data.packing else batches(len(rows), *sizes)
    return pairwise(chain(every, [None]))  # type: ignore[list-item, arg-type, return-value]  # the end


def try_the_longest(session: Session) -> None:
    """Run the heaviest rows there can be before step 1, where memory is counted: better then than at night."""
    if session.machine.device == "cpu" and session.recipe.train.memory_gib is None:
        return  # there the system swaps or kills, and nothing is learnt by trying
    train, lengths = session.recipe.train, session.data.train.lengths
    if session.recipe.data.packing:
        (first, _), *_ = order(session, 0, 1)
    else:
        first = [longest_rows(lengths, train.micro_batch * train.accumulation)]
    groups, _ = _shares(session, first)
    heaviest = max(groups, key=lambda rows: sum(map(len, rows)) if session.packs else int(lengths[rows].sum()))
    rehearse(session.halving, heaviest, lambda parts: _passes(session, parts, 0.0), _forget(session), session.tell)


def take_step(
    session: Session, micro_batches: MicroBatches, lr: float, following: MicroBatches | None = None
) -> tuple[float, float, int, bool]:
    """One move of the weights: mean loss over the step's targets (nats), norm of the gradient, real tokens seen, and
    whether it was applied: numbers that make no sense never reach the weights. `following` is what comes after it."""
    accelerator, optimizer, number = session.accelerator, session.optimizer, session.state.step + 1
    # What the whole step learns from, on every process: the mean is over targets, not over micro-batches.
    rows = _examples(micro_batches)
    targets = int(session.data.train.targets[rows].sum())
    groups, company = _shares(session, micro_batches)
    weight, forget = session.together.world / targets, _forget(session)
    session.together.stir(session.recipe.train.seed, number)
    passes = partial(_passes, session, weight=weight)
    fit = partial(fitting, session.halving, groups, passes, forget, session.tell, number)
    total = surviving(session, fit, forget)
    if company:
        _passes(session, company, 0.0)
    norm = accelerator.clip_grad_norm_(session.model.parameters(), session.recipe.train.clip)
    if following and (coming := session.halving.split(_shares(session, following)[0])):  # in a short one, none of ours
        session.feed.expect(coming[0])
    total, norm = _read(session, total, norm)
    loss, tokens = total / targets, int(session.data.train.lengths[rows].sum())
    verdict = session.spikes.judge(loss, norm, scaled=session.machine.precision == "fp16")
    if verdict == "stop":
        problem = session.spikes.stopped(number, session.recipe, session.run.path)
        session.tell("error", step=number, code=problem.code, facts={"loss": str(loss), "lr": lr})
        end(session, "error", None)
        raise agreed(problem)
    if verdict == "skip":
        discard(accelerator, optimizer)
        tell_skipped(session.tell, number, loss, norm)
        return loss, norm, tokens, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    forget()
    return loss, norm, tokens, True


def _forget(session: Session) -> partial[None]:
    return partial(session.optimizer.zero_grad, set_to_none=True)


def _examples(micro_batches: MicroBatches) -> list[int]:
    """`_examples([[3, 1], [[2, 7]]])` is `[3, 1, 2, 7]`."""
    return [i for chosen in micro_batches for row in chosen for i in (row if isinstance(row, list) else [row])]


def _shares(session: Session, micro_batches: MicroBatches) -> tuple[list[list[Any]], list[list[Any]]]:
    """What this process runs of a step, in groups, and what it runs beside it for company, which counts for nothing.

    Rows of like length go through together: the step learns from the same rows, with less padding. Dealt one by one
    from the longest, they are as much work for every process. In a short step one may be left without any and must
    still take part in the exchange; where weights lie in pieces, in as many passes as whoever has most.
    """
    train, lengths = session.recipe.train, session.data.train.lengths
    world, rank = session.together.world, session.together.rank
    room = train.micro_batch * session.recipe.data.max_length
    rows = [row for chosen in micro_batches for row in chosen] if session.packs else _examples(micro_batches)
    if not session.packs:
        rows.sort(key=lambda row: -int(lengths[row]))

    def groups(mine: list[Any]) -> list[list[Any]]:
        if session.packs:
            return [mine[i : i + train.micro_batch] for i in range(0, len(mine), train.micro_batch)]
        if session.unpadded:
            return by_room(mine, lengths, min(room, ENOUGH) if session.machine.device == "cpu" else room)
        return by_length(mine, lengths, room)

    mine = groups(rows[rank::world])
    most = max(len(groups(rows[i::world])) for i in range(world)) if session.together.sharded else 1
    return mine, [rows[-1:]] * (most - len(mine))


def _passes(session: Session, groups: list[list[Any]], weight: float) -> Any:
    """Forward and backward over the groups of a step; returns the sum of their losses (nats), where the model is.

    To read it here would make the host wait for a card that still has work.
    """
    import torch

    accelerator = session.accelerator
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for i, batch in enumerate(session.feed.batches(groups)):
        # Whole gradients kept until the last group would not fit where weights lie in pieces.
        later = i + 1 < len(groups) and not session.together.sharded
        with accelerator.no_sync(session.model) if later else nullcontext():
            loss = loss_sum(session.model, batch, compiled=bool(session.compiled))
            session.halving.check()
            # Distribution averages the gradients over processes; the world in the weight makes it the sum again.
            accelerator.backward(loss * weight)
        if weight:
            total += loss.detach().double()
    return total


def _read(session: Session, total: Any, norm: Any) -> tuple[float, float]:
    """The loss over all processes and the norm as numbers: the one moment of a step in which a card is waited for.

    What is decided from them, and whether to stop, must be the same on every process, to the last bit.
    """
    import torch

    from maese.train.sharding import whole

    total, norm = torch.stack([torch.as_tensor(n, dtype=torch.float64) for n in (total, whole(norm))]).tolist()
    world = session.together.world
    if world > 1:
        asked = [float(session.stop_signal == number) for number in STOPS]
        total, norm, *heard = session.together.sums(total, norm / world, *asked)
        session.agreed_signal = max((number for number, n in zip(STOPS, heard, strict=True) if n), default=0)
    return total, norm
