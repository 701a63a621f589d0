"""What a training will hold in memory at its worst moment, part by part, before anything is loaded.

    shape = open_shape("gpt2-xl")
    told = estimate(shape, job_of(recipe, "bf16", "cpu"))
    told.peak                       bytes, as `plan.machine.memory_peak_gib` counts them when it is over
    told.parts                      (("process", …), ("weights", …), ("activations", …), …), what that moment is made of

The parts are counted as this loop keeps them: rows without padding (`tokens.batches`), weights that train in 32 bits
with a copy in 16 for products, attention on a processor in 32 bits (`model.attention_cpu`), a head whose logits exist
a few hundred rows at a time (`model.head`), adapters that keep their input once (`model.quick`). A test holds each
formula against what a small model really keeps for the way back.

T tokens go through at once; c bytes a number that is multiplied, s bytes one of the stream between blocks.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from maese.plan.shape import Anatomy, Matrix, Targets, adapters, parameters, targeted
from maese.recipe import Recipe
from maese.tokens.batches import ENOUGH, FLAT_MULTIPLE, batches, by_room

if TYPE_CHECKING:
    import numpy as np

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # four bits, a byte for 64 of them, and four for 256 of those bytes
EIGHT_BITS = 2 * (1 + 4 / 256)  # both moments in a byte, and their scales
# Those of `model.head` and `train.muon`, which cannot be imported from here; a test holds them together.
HEAD_BUDGET = {"cpu": 48 << 20, "cuda": 128 << 20}
HEAD_ROWS = {"cpu": 512, "cuda": 4096}
MUON_TOGETHER = 64 << 20
# Python, torch, transformers, PEFT and a tokenizer, before there is any model; bitsandbytes comes with PEFT. Then what
# is imported and kept once it works: kernels of oneDNN (`plan.machine.few_kernels`), room of MKL, what writes samples.
PROCESS, BITSANDBYTES, LATER = 351 << 20, 110 << 20, 32 << 20
# What comes and goes in a step leaves holes that nothing fits into, as measured (`benchmarks/plan.py`, thirty steps):
# glibc keeps what is let go of (`plan.machine.allocator`). Shares of what all blocks would keep, more where gates and
# rotary positions come and go in all sizes, most where blocks are made again; it stops growing with them (fitted on
# one large model alone); then a share of copies, head and tables, whose pieces are the largest. A card is counted by
# what was asked of it, without its holes.
HOLES_FEW, HOLES_MANY, HOLES_AGAIN, HOLES_LARGE = 0.5, 0.7, 1.0, 1.25
HOLES_MOST = 360 << 20
CONTEXT = int(0.45 * 2**30)  # what CUDA takes for itself
LOOKED_AT = 300  # steps of which the heaviest is taken, where the lengths of the rows are known

Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Job:
    """What of a recipe and a machine memory depends on."""

    kind: str  # full | lora | qlora
    precision: str  # fp32 | bf16 | fp16
    device: str  # cpu | cuda
    optimizer: str
    checkpointing: bool
    tokens: int  # through the model at once
    longest: int  # of them, in one document
    passes: int  # of a step
    rank: int = 16
    targets: Targets = "all-linear"
    dropout: float = 0.0  # of the adapters

    @property
    def c(self) -> int:
        """Bytes of a number that is multiplied."""
        return 4 if self.precision == "fp32" else 2

    @property
    def s(self) -> int:
        """Bytes of a number of the stream: that of the weights, and those that train have 32 bits."""
        return 4 if self.kind == "full" else self.c


@dataclass(frozen=True)
class Estimate:
    """The parts of the worst moment of training in bytes, which moment that is, and what loading takes before it."""

    parts: Parts
    moment: str  # forward | backward | ending | moving
    device: str
    load: int
    file: int  # of it, the weights on disk, which are mapped: the system takes them back when it must

    @property
    def training(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def peak(self) -> int:
        """What the run will say that it took: of a card, what was asked of it; else what the process held."""
        return max(self.training, self.load)

    @property
    def needed(self) -> int:
        """What must be free: on a card CUDA itself takes some, and holes are left between rows of many lengths."""
        if self.device == "cuda":
            return int(self.peak * 1.05) + CONTEXT
        return max(self.training, self.load - self.file)


def job_of(recipe: Recipe, precision: str, device: str, lengths: Sequence[int] | np.ndarray | None = None) -> Job:
    """The job of a recipe; with the lengths of its rows (tokens), else as if every row were as long as it may be."""
    train, method, longest = recipe.train, recipe.method, recipe.data.max_length
    tokens, passes = heaviest(recipe, device, lengths)
    return Job(
        method.kind, precision, device, train.optimizer, train.gradient_checkpointing, tokens,
        min(longest, int(max(lengths))) if lengths is not None and len(lengths) else longest, passes,
        method.rank, method.targets, method.dropout,
    )  # fmt: skip


def heaviest(recipe: Recipe, device: str, lengths: Sequence[int] | np.ndarray | None = None) -> tuple[int, int]:
    """Tokens that go through at once in the heaviest pass, and the most passes of a step.

    Rows are grouped as `train.step` does where there is no padding; packed or not, they fill the same room.
    """
    train, longest = recipe.train, recipe.data.max_length
    room = train.micro_batch * longest
    room = min(room, ENOUGH) if device == "cpu" else room
    each = train.micro_batch * train.accumulation
    if lengths is None or not len(lengths) or recipe.data.packing:  # all alike, as `by_room` would deal them
        share = each * longest / math.ceil(each * longest / room)
        at_once = min(max(1, room // longest), math.ceil(share / longest))
        return _rounded(at_once * longest), math.ceil(each / at_once)
    stop = min(LOOKED_AT, math.ceil(len(lengths) / each), train.max_steps or LOOKED_AT)
    found = []
    for chosen in batches(len(lengths), train.micro_batch, train.accumulation, train.seed, 0, stop):
        step = [int(lengths[row]) for rows in chosen for row in rows]
        groups = by_room(range(len(step)), step, room)
        most = max(sum(step[row] for row in group) for group in groups)
        found.append((_rounded(most), len(groups)))
    return max(tokens for tokens, _ in found), max(passes for _, passes in found)


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / FLAT_MULTIPLE) * FLAT_MULTIPLE


def estimate(shape: Anatomy, job: Job, process: int | None = None, file: int | None = None) -> Estimate:
    """The worst of the moments of a run. `process` is what it held before it loaded (bytes; a usual figure if not
    said), `file` the size of the weights on disk (as many bits as GPT-2 and Phi have on the hub, if not said)."""
    trained = trained_of(shape, job)
    weights = {"weights": weights_of(shape, job), "adapters": 0 if job.kind == "full" else 4 * trained}
    moving = {"optimizer": optimizer_of(shape, job, trained)}
    gradients, copies = 4 * trained, copies_of(shape, job)
    kept, one = activations(shape, job), int(kept_by_block(shape, job) * job.tokens)
    head, chunk = head_of(shape, job)
    # Gradients of a step are there from its first pass on; where it has but one, they come as activations go.
    before = gradients if job.passes > 1 else 0
    block = (copies - (2 * shape.table if job.kind == "full" and job.c == 2 else 0)) // shape.layers
    held = {"copies": copies, "head": head + chunk}
    if job.checkpointing:  # nothing keeps the copies once the blocks are through, and the head comes after them
        held = dict([max(held.items(), key=lambda item: item[1])])
    forward = weights | moving | {"gradients": before, "activations": kept} | held
    backward = weights | moving | {
        "gradients": before, "copies": block if job.checkpointing else copies,
        "activations": int(kept + (one if job.checkpointing else 0) + workspace(shape, job)), "head": head,
    }  # fmt: skip
    # At the end of the way back the table has a gradient from the head and another from the words.
    table = 4 * shape.table if job.kind == "full" else 0
    ending = weights | moving | {"gradients": gradients, "table": table * (2 if job.passes > 1 else 1)}
    moments: dict[str, dict[str, int]] = {"forward": forward, "backward": backward, "ending": ending}
    if job.optimizer == "muon":  # matrices of one size are turned together, in 16 bits and several copies
        moments["moving"] = weights | moving | {"gradients": gradients, "copies": 4 * min(MUON_TOGETHER, shape.body)}
    base: dict[str, int] = {}
    if job.device == "cpu":
        base["process"] = (usual_process() if process is None else process) + LATER
        for moment in moments.values():
            passing = activations(shape, replace(job, checkpointing=False)) if "activations" in moment else 0
            large = sum(moment.get(name, 0) for name in ("copies", "head", "table"))
            share = HOLES_AGAIN if job.checkpointing else HOLES_MANY if shape.gated else HOLES_FEW
            moment["holes"] = int(min(share * passing, HOLES_MOST) + HOLES_LARGE * large)
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    parts = tuple((name, int(size)) for name, size in (base | moments[worst]).items() if size)
    # What is read is mapped: weights that stay in the bits of the file are the file, others stand beside it.
    read = (4 if shape.family == "gpt2" else 2) * parameters(shape) if file is None else file
    if job.device == "cuda" or abs(read - weights["weights"]) < 0.05 * weights["weights"]:
        read = 0
    return Estimate(parts, worst, job.device, sum(base.values()) + weights["weights"] + read, read)


def usual_process() -> int:
    """What a process holds before there is a model, on a processor."""
    return PROCESS + (BITSANDBYTES if importlib.util.find_spec("bitsandbytes") else 0)


def trained_of(shape: Anatomy, job: Job) -> int:
    """How many numbers train."""
    return parameters(shape) if job.kind == "full" else adapters(shape, job.rank, job.targets)


def weights_of(shape: Anatomy, job: Job) -> int:
    """Bytes of the base: 32 bits where it trains, those of a product where it is frozen, NF4 in `qlora`."""
    if job.kind == "full":
        return 4 * parameters(shape)
    if job.kind == "lora":
        return job.c * parameters(shape)
    return int(NF4 * shape.body + job.c * (parameters(shape) - shape.body))


def optimizer_of(shape: Anatomy, job: Job, trained: int, place: Literal["device", "disk"] = "device") -> int:
    """Bytes of what the optimizer remembers, on the device that trains or in a checkpoint.

    The paged one's lie where the processor can take them back from a card."""
    if job.optimizer == "muon":
        body = shape.body if job.kind == "full" else trained
        return 4 * body + 8 * (trained - body)
    if job.optimizer.startswith("paged") and job.device == "cuda" and place == "device":
        return 0
    if job.optimizer in ("adamw8bit", "paged"):
        return int(EIGHT_BITS * trained)
    return 8 * trained


def copies_of(shape: Anatomy, job: Job) -> int:
    """Bytes of the copies in 16 bits that products are made of; frozen weights are so already."""
    if job.kind != "full":
        return job.c * adapters(shape, job.rank, job.targets)
    return 2 * (shape.body + shape.table) if job.c == 2 else 0


def activations(shape: Anatomy, job: Job) -> int:
    """Bytes kept for the way back when all blocks are through: what each keeps, or its input alone (checkpointing)."""
    kept = shape.width * job.s if job.checkpointing else kept_by_block(shape, job)
    after = shape.width * (job.s + job.c)  # what the last norm reads, and the gradient of what it gives
    first = shape.width * 4 if shape.first_dropout and job.kind == "full" else 0
    return int(job.tokens * (shape.layers * kept + after + first))


def kept_by_block(shape: Anatomy, job: Job) -> float:
    """Bytes a block keeps for the way back, a token."""
    kept = float(shape.norms * (shape.width * job.s + 8))
    kept += _inputs(shape, job)
    kept += job.c * shape.inner * (3 if shape.gated else 1)  # before what bends it, and the other side of the gate
    if shape.query_norms:
        kept += job.c * (shape.across + shape.across_shared)
    if shape.dropout:
        kept += 2 * job.c * shape.width
    return kept + _attention(shape, job)


def _inputs(shape: Anatomy, job: Job) -> float:
    """What the matrices keep of what they read. Frozen ones keep nothing, those with an adapter share one copy."""
    full = job.kind == "full"
    reading = list(shape.matrices) if full else targeted(shape, job.targets)
    each = (full and job.c == 2) or bool(job.dropout)  # autocast makes a copy for each, and so does dropout
    groups: dict[str, list[Matrix]] = {}
    for matrix in reading:
        groups.setdefault(matrix.reads, []).append(matrix)
    kept = sum(job.c * group[0].comes * (len(group) if each else 1) for group in groups.values())
    if not full:
        kept += sum(job.c * (job.rank + (matrix.comes if job.dropout else 0)) for matrix in reading)
    return kept


def _attention(shape: Anatomy, job: Job) -> float:
    """Queries, keys, values and what comes out. On a processor in 32 bits and with keys for each head; with dropout
    there is no kernel for it, and the matrices of all pairs are kept, three times."""
    across, lines = shape.across, 4 * shape.heads
    if job.device == "cpu" and shape.attention_dropout:
        return 4 * 3 * across + 3 * 4 * shape.heads * job.longest
    if job.device == "cpu":
        return 4 * 4 * across + lines
    out = job.kind != "full" and all(matrix.reads != "attention" for matrix in targeted(shape, job.targets))
    return job.c * (across + 2 * shape.across_shared + (across if out else 0)) + lines


def workspace(shape: Anatomy, job: Job) -> int:
    """Bytes of what exists for a moment on the way back through one block."""
    mlp = job.c * shape.inner * (3 if shape.gated else 2) + 2 * shape.width * job.s
    attention = 4 * 6 * shape.across if job.device == "cpu" else job.c * 6 * shape.across
    if job.device == "cpu" and shape.attention_dropout:
        attention += 3 * 4 * shape.heads * job.longest
    largest = max(matrix.weights for matrix in shape.matrices)
    product = (job.c + 4) * largest if job.kind == "full" else 2 * largest if job.kind == "qlora" else 0
    return int(job.tokens * max(mlp, attention) + product)


def head_of(shape: Anatomy, job: Job) -> tuple[int, int]:
    """Bytes of the head that last until the way back (the gradient of its matrix), and of those that do not."""
    device = "cuda" if job.device == "cuda" else "cpu"
    rows = max(32, min(HEAD_BUDGET[device] // (shape.vocabulary * job.c), HEAD_ROWS[device]) // 32 * 32)
    logits = min(rows, job.tokens) * shape.vocabulary * (job.c if device == "cpu" else job.c + 8)
    hidden = job.tokens * shape.width * (job.s + job.c)  # what the last norm gave, and of it what is learnt from
    if job.kind != "full":
        return 0, logits + hidden
    return 4 * shape.table, logits + hidden + (2 * shape.table if job.c == 2 else 0)


def gib(parts: Parts) -> dict[str, float]:
    """The parts in GiB, as files and people take them."""
    return {name: size / 2**30 for name, size in parts}


def facts(told: Estimate) -> dict[str, Any]:
    """An estimate as JSON."""
    sizes = {"gib": told.peak, "needed_gib": told.needed, "load_gib": told.load}
    return {name: round(size / 2**30, 3) for name, size in sizes.items()} | {
        "moment": told.moment, "parts": {name: round(size, 4) for name, size in gib(told.parts).items()},
    }  # fmt: skip
