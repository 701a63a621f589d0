"""Proof that a run can be repeated: some of its steps done again from a checkpoint, and compared with what it kept.

    verify(run).same                     True when losses, gradients and weights come out bit for bit
    verify(run, steps=3).weights         names of the tensors that differ, with by how much

Nothing is written in the run folder: the repetition has a folder of its own, which goes when it ends.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from maese.errors import MaeseError
from maese.run import Run
from maese.train import checkpoint
from maese.train.guard import Spikes
from maese.train.optim import rate
from maese.train.session import Session, closing, open_session
from maese.train.step import order, take_step


@dataclass(frozen=True)
class Verified:
    """Steps `first` to `last` done again. A difference is (step, told then, found now), or the largest of a tensor."""

    first: int
    last: int
    losses: list[tuple[int, float, float]]
    norms: list[tuple[int, float, float]]
    weights: dict[str, float]
    weighed: bool  # whether the repetition came as far as the newest checkpoint, so that weights could be compared

    @property
    def same(self) -> bool:
        return not (self.losses or self.norms or self.weights)


def verify(run: Run, steps: int | None = None) -> Verified:
    """Repeat `steps` steps, or all there are, from the checkpoint before the newest, and compare with the run's own.

    On a CPU every bit must agree; on a card, or another machine, the differences tell how far it is from that.
    Errors: RUN-03 (it is training now), RESUME-04 (fewer than two whole checkpoints), and those of opening it.
    """
    if holder := run.holder():
        raise MaeseError("RUN-03", run=str(run.path), pid=holder)
    whole = [path for path in checkpoint.saved(run.checkpoints) if checkpoint.damage(path) is None]
    if len(whole) < 2:
        every = max(1, (run.read("state.json") or {}).get("steps", 30) // 3)  # often enough for two before the end
        raise MaeseError("RESUME-04", run=str(run.path), n=len(whole), every=every)
    before, after = whole[-2:]
    first, newest = (checkpoint.manifest_of(path)["step"] for path in (before, after))
    last = newest if steps is None else min(newest, first + steps)
    with tempfile.TemporaryDirectory(prefix="maese-") as folder:
        beside = Run(folder)
        shutil.copy(run.path / "recipe.yaml", folder)
        session = open_session(run.recipe(), beside, None)
        with closing(session):
            told = _repeat(session, before, first, last)
            differ = _differences(session, after) if last == newest else {}
    known = {event["step"]: event for event in run.history() if event["type"] == "step"}
    pairs = [(step, known[step], found) for step, found in told.items() if step in known]
    losses = [(step, then["loss"], loss) for step, then, (loss, _) in pairs if then["loss"] != loss]
    norms = [(step, then["grad_norm"], norm) for step, then, (_, norm) in pairs if then["grad_norm"] != norm]
    return Verified(first + 1, last, losses, norms, differ, weighed=last == newest)


def _repeat(session: Session, path: Path, first: int, last: int) -> dict[int, tuple[float, float]]:
    """Loss and norm of each step from `first`, whose checkpoint is at `path`, to `last`."""
    checkpoint.restore(path, *session.inner, session.accelerator.scaler)
    # A step is in as many pieces as it was, and refused if it was.
    state = checkpoint.manifest_of(path)["state"]
    session.spikes, session.halving.times = Spikes(**state["spikes"]), state["halvings"]
    session.model.train()
    found = {}
    for step, (micro_batches, _) in enumerate(order(session, first, last), start=first):
        session.state.step = step
        loss, norm, *_ = take_step(session, micro_batches, rate(step, session.steps, session.recipe.train))
        found[step + 1] = (loss, norm)
    return found


def _differences(session: Session, path: Path) -> dict[str, float]:
    """The tensors that are not those of a checkpoint, with the largest difference of each."""
    import torch
    from safetensors.torch import load_file

    kept = load_file(path / "model.safetensors")
    now = checkpoint.trainable(session.inner[0])
    return {
        name: float((tensor.float() - kept[name].float()).abs().max())
        for name, tensor in now.items()
        if not torch.equal(tensor, kept[name])
    }
