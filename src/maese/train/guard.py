"""What stands between a step and the weights: numbers that make no sense, and memory that runs out.

    spikes = Spikes()
    spikes.judge(loss=3.1, norm=0.9)                    "ok", "skip" (this step is not applied) or "stop"
    fitting(halving, micro_batches, do, undo, tell, 7)  what `do` gives, with fewer rows at once when they do not fit

Both keep their state in plain numbers that a checkpoint holds, so a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from maese.errors import MaeseError
from maese.plan.machine import memory_used_gib
from maese.recipe import Recipe
from maese.say import say

if TYPE_CHECKING:
    import numpy as np

WINDOW = 128  # steps looked back at
NEEDED = 32  # of them before anything is called a spike: the first steps of a run are steep
SIGMAS = 6.0
FLOOR = 0.01  # of the mean, the least a sigma is: where all losses are alike, noise is no spike
NEAR, PATIENCE = 0.85, 50  # of what was estimated; and times that giving back has to wait what it takes
BROKEN, LEAPS = 3, 8  # in a row without a number, and spikes in a window, that end the run

Verdict = Literal["ok", "skip", "stop"]
Tell = Callable[..., object]
Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass
class Spikes:
    """The losses and norms of the last steps applied, and what was refused. `dataclasses.asdict` is its JSON.

    The rule is that of the SkipStepOptimizer of OLMo-core: a step more than six sigmas over the mean of the last 128 is
    not applied. Unlike there, refused ones stay out of the window: four of a size would make the fifth look ordinary.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    judged: int = 0
    leaps: list[int] = field(default_factory=list)  # which of the last WINDOW judged were spikes
    broken: int = 0  # in a row without a number
    refused: int = 0  # in all

    def judge(self, loss: float, norm: float, scaled: bool = False) -> Verdict:
        """What to do with a step, given its mean loss and the norm of its gradient before clipping.

        `scaled`: in fp16 an infinite norm only says that the scaler must come down; it drops the step by itself.
        """
        self.judged += 1
        self.leaps = [place for place in self.leaps if place > self.judged - WINDOW]
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
            self.refused, self.broken = self.refused + 1, self.broken + 1
            return "stop" if self.broken >= BROKEN else "skip"
        self.broken = 0
        if not math.isfinite(norm):
            return "ok"
        if loss > ceiling(self.losses) or norm > ceiling(self.norms):
            self.refused += 1
            self.leaps.append(self.judged)
            return "stop" if len(self.leaps) >= LEAPS else "skip"
        self.losses = [*self.losses[1 - WINDOW :], loss]
        self.norms = [*self.norms[1 - WINDOW :], norm]
        return "ok"

    def stopped(self, step: int, recipe: Recipe, run: Any) -> MaeseError:
        """Why the run ends here, after `judge` said "stop": NUM-01 (no numbers) or NUM-03 (spikes)."""
        lower = f"{recipe.train.lr / 5:.0e}"
        if self.broken:
            return MaeseError("NUM-01", step=step, run=str(run), lower=lower)
        return MaeseError("NUM-03", step=step, n=len(self.leaps), window=WINDOW, run=str(run), lower=lower)


def ceiling(values: Sequence[float]) -> float:
    """The largest value that is no spike: mean and six sigmas, or infinity while there are too few to tell."""
    n = len(values)
    if n < NEEDED:
        return math.inf
    mean = math.fsum(values) / n
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    return mean + SIGMAS * max(sigma, FLOOR * abs(mean))


def tell_skipped(tell: Tell, step: int, loss: float, norm: float) -> None:
    """Say that a step was not applied: NUM-04 for a spike, NUM-05 for what is no number."""
    if math.isfinite(loss) and math.isfinite(norm):
        tell("warning", step=step, code="NUM-04", facts={"step": step, "loss": loss, "norm": norm, "window": WINDOW})
    else:  # as text: JSON has no NaN
        tell("warning", step=step, code="NUM-05", facts={"step": step, "loss": str(loss), "norm": str(norm)})


def discard(accelerator: Any, optimizer: Any) -> None:
    """Forget the gradients of a step that is not applied, and let the fp16 scaler see what they were."""
    optimizer.zero_grad(set_to_none=True)
    if getattr(accelerator, "scaler", None) is not None:
        # Without it the next step would find that its gradients were unscaled already.
        accelerator.scaler.update()


class OverCeiling(MemoryError):
    """More memory in use than the recipe allows."""


@dataclass
class Halving:
    """How many rows go through the model at once, when the recipe's own number does not fit.

    A step keeps its rows, and so its loss and gradient: only more of them wait their turn. `times` goes to checkpoints.
    """

    device: str  # cpu | cuda
    limit_gib: float | None = None  # what the recipe lets this run take
    alone: bool = True  # with several processes the others wait in the exchange, and a step cannot be redone
    refuse: Callable[[float], MaeseError] | None = None  # the error at one row, given the GiB in use
    times: int = 0  # each micro-batch has been halved so often

    def split(self, micro_batches: list[list[Row]]) -> list[list[Row]]:
        """`Halving("cpu", times=1).split([[1, 2, 3], [4]])` is `[[1, 2], [3], [4]]`."""
        sizes = [math.ceil(len(rows) / 2**self.times) for rows in micro_batches]
        pairs = zip(micro_batches, sizes, strict=True)
        return [rows[i : i + size] for rows, size in pairs for i in range(0, len(rows), size)]

    def check(self) -> None:
        """Raise OverCeiling where more is in use than allowed. Call it between forward and backward, when all lives."""
        if self.limit_gib is not None and memory_used_gib(self.device) > self.limit_gib:
            raise OverCeiling


@dataclass
class Room:
    """Keeps the memory of a processor near what was estimated.

    Rows of many lengths leave holes that nothing fits into. What is free is given back when the process comes near the
    estimate, and never for more than one part in fifty of the time.
    """

    estimated_gib: float | None = None
    again: float = 0.0  # when it may be done next, by the clock

    def keep(self, device: str) -> None:
        """Call it between two steps, when little lives."""
        began = time.monotonic()
        if device != "cpu" or self.estimated_gib is None or began < self.again:
            return
        if memory_used_gib(device) > NEAR * self.estimated_gib:
            give_back()
            self.again = began + PATIENCE * (time.monotonic() - began)


def fitting(
    halving: Halving,
    micro_batches: list[list[Row]],
    do: Callable[[list[list[Row]]], Result],
    undo: Callable[[], object],
    tell: Tell,
    step: int,
) -> Result:
    """What `do(micro_batches)` gives; when memory runs out, undone and done again with half the rows at once.

    `do` runs forward and backward and nothing else: moving the weights cannot be undone. Each try begins from the same
    random state. Said once for each halving (MEM-03). Error: at one row, or with other
    processes that cannot wait, what `halving.refuse` gives (MEM-01, MEM-02, MEM-04).
    """
    began = rng_state()
    while True:
        parts = halving.split(micro_batches)
        try:
            return do(parts)
        except (RuntimeError, MemoryError) as problem:
            if not out_of_memory(problem):
                raise
            used, rows = memory_used_gib(halving.device), max(map(len, parts))
            if (rows == 1 or not halving.alone) and halving.refuse is None:
                raise
        # Out here the exception is gone, and with it the frames that held the tensors of the failed try.
        undo()
        give_back()
        if halving.refuse and (rows == 1 or not halving.alone):
            raise halving.refuse(used)
        halving.times += 1
        set_rng_state(began)
        now = max(map(len, halving.split(micro_batches)))
        tell("warning", step=step, code="MEM-03", facts={"before": rows, "now": now})


def rehearse(
    halving: Halving,
    rows: list[Row],
    do: Callable[[list[list[Row]]], object],
    undo: Callable[[], object],
    tell: Tell,
) -> None:
    """Try the heaviest micro-batch (`longest_rows`) before step 1; nothing is left of it but `halving.times`."""
    began = rng_state()
    fitting(halving, [rows], do, undo, tell, 0)
    undo()
    set_rng_state(began)


def longest_rows(lengths: Sequence[int] | np.ndarray, micro_batch: int) -> list[int]:
    """The rows of the heaviest micro-batch there can be: `longest_rows([3, 9, 5, 7], 2)` is `[1, 3]`."""
    return heapq.nlargest(min(micro_batch, len(lengths)), range(len(lengths)), key=lengths.__getitem__)


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that memory ran out: on a card, in RAM, or over the recipe's ceiling."""
    if isinstance(problem, MemoryError):
        return True
    words = str(problem).lower()
    signs = ("out of memory", "defaultcpuallocator: can't allocate", "defaultcpuallocator: not enough", "alloc_failed")
    return isinstance(problem, RuntimeError) and any(sign in words for sign in signs)


def give_back() -> None:
    """Return to the system what was freed, so that the next measure of memory is of what is in use."""
    import ctypes

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc alone keeps freed pages and has a call for it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def no_room(
    model: Any, optimizer: Any, recipe: Recipe, run: Any, device: str, used: float, world: int = 1
) -> MaeseError:
    """MEM-01 (card), MEM-02 (RAM) or MEM-04 (several processes): what weighs how much, in GiB, and what can be done.

    `used` is what was in use when it failed; what is neither weights, gradients nor optimizer is told as activations.
    """
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    states = _gib([v for state in optimizer.state.values() for v in state.values() if hasattr(v, "numel")])
    # Before the first step the optimizer holds nothing yet, and will hold two numbers in fp32 for each weight.
    kept = states or sum(p.numel() for p in trained) * 8 / 2**30
    facts: dict[str, Any] = {"weights": _gib(every), "gradients": _gib(trained), "optimizer": kept}
    rest = max(0.0, used - facts["weights"] - states)
    length = recipe.data.max_length
    typed = f"maese train {shlex.quote(f'{run}/recipe.yaml')} output={shlex.quote(f'{run}-2')}"
    ways = [(f"data.max_length={max(8, length // 2)}", "shorter", rest / 2)]
    if not recipe.train.gradient_checkpointing:
        ways.insert(0, ("train.gradient_checkpointing=true", "checkpointing", rest))
    if recipe.method.kind == "full":
        ways.append(("method.kind=lora", "lora", facts["gradients"] + kept))
    if recipe.method.kind == "lora":  # half a byte and a little for each number that takes two
        ways.append(("method.kind=qlora", "qlora", 0.7 * facts["weights"]))
    if recipe.train.memory_gib is not None:
        # Python and torch alone take some of it: under a ceiling lower than that no other way leads out.
        higher = math.ceil(used * 12) / 10
        ways.insert(0, (f"train.memory_gib={higher:.1f}", "ceiling", higher))
    train = recipe.train
    if divisible := world > 1 and train.micro_batch > 1:  # the others wait in the exchange: one cannot redo its step
        parts = 2 if train.micro_batch % 2 == 0 else train.micro_batch
        smaller = f"train.micro_batch={train.micro_batch // parts} train.accumulation={train.accumulation * parts}"
        ways.insert(0, (smaller, "smaller", rest * (1 - 1 / parts)))
    repairs = "\n".join(f"{typed} {change}   # {say(f'memory.repair.{key}', gib=gib)}" for change, key, gib in ways)
    facts |= {"rest": rest, "used": used, "length": length, "repairs": repairs}
    if divisible:
        return MaeseError("MEM-04", **facts)
    return MaeseError("MEM-01", **facts) if device == "cuda" else MaeseError("MEM-02", **facts)


def _gib(tensors: Sequence[Any]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**30


def rng_state() -> dict[str, Any]:
    """Every random state a step may draw from, as tensors: Python's, NumPy's, torch's, and the card's."""
    import numpy as np
    import torch

    _, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    place = [numpy["state"]["pos"], numpy["has_gauss"]]
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        # The second number of a normal pair waits here; NaN when none does.
        "gauss": torch.tensor([math.nan if gauss is None else gauss, numpy["gauss"]], dtype=torch.float64),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), *place], dtype=torch.int64),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    import numpy as np
    import torch

    torch.set_rng_state(states["cpu"])
    ours, theirs = states["gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(ours) else ours))
    *key, place, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), place, has_gauss, theirs))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
