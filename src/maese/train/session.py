"""What one process holds while it trains: the run folder, the model with its adapters, the data, and how it lets go."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese import run as runs
from maese.errors import Interrupted, MaeseError
from maese.evaluate.likelihood import refuse_blended
from maese.model import adapter, load
from maese.plan.machine import Machine, allocator, machine
from maese.recipe import Recipe
from maese.text import streams
from maese.tokens.batches import steps_per_epoch
from maese.tokens.pack import packed_rows
from maese.tokens.prepare import Prepared, prepare
from maese.train.compiling import compile_blocks, pays
from maese.train.feed import Feed, gather
from maese.train.guard import Halving, Spikes, no_room
from maese.train.optim import optimizer as build_optimizer

Watch = Callable[[runs.Event], object] | None


@dataclass
class State:
    """What changes from step to step and must survive a crash, besides the tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # validations since the best


@dataclass
class Session:
    """Everything one process needs while it trains."""

    run: runs.Run
    recipe: Recipe
    model: Any
    tokenizer: Any
    data: Prepared
    machine: Machine
    accelerator: Any
    base: Any
    watch: Watch
    optimizer: Any = None
    spikes: Spikes = field(default_factory=Spikes)
    halving: Halving = field(default_factory=lambda: Halving("cpu"))
    state: State = field(default_factory=State)
    stop_signal: int = 0
    unpadded: bool = False  # whether the model takes documents one after the other, with no padding between them
    compiled: list[Any] = field(default_factory=list)  # the blocks of the model that are

    @cached_property
    def feed(self) -> Feed:
        """What the rows become before the model sees them."""
        return Feed(lambda chosen: gather(self, chosen), self.accelerator.device)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch: examples, or what they are packed into."""
        data = self.recipe.data
        return packed_rows(self.data.train.lengths, data.max_length) if data.packing else len(self.data.train)

    @property
    def steps(self) -> int:
        train = self.recipe.train
        each = steps_per_epoch(self.rows, train.micro_batch, train.accumulation)
        whole = max(1, math.ceil(train.epochs * each))
        return min(whole, train.max_steps) if train.max_steps else whole

    def note(self, **state: Any) -> None:
        """Write how the run stands now to state.json."""
        if self.main:
            self.run.write("state.json", state)

    def tell(self, type: str, **facts: Any) -> None:
        """Write an event and show it to whoever watches."""
        if self.main:
            event = self.run.event(type, **facts)
            if self.watch:
                self.watch(event)


def open_session(recipe: Recipe, run: runs.Run | None, watch: Watch) -> Session:
    """Load base and data, put the adapters on, and take hold of the run folder."""
    allocator()
    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    here = machine(recipe.train)
    load.quiet()
    base = load.resolve(recipe.base)
    load.check(base)  # before the tokenizer, whose absence would be told instead
    tokenizer = load.load_tokenizer(base)
    # Frozen weights can stay in few bits; what trains keeps 32, or small updates would be rounded away.
    frozen = recipe.method.kind == "lora" and here.precision != "fp32"
    model = load.load_model(base, here.precision if frozen else "fp32")
    data = prepare(recipe.data, tokenizer, load.context_of(model), recipe.eval.prompts, _telling(watch))
    if recipe.data.packing:
        refuse_blended(model, recipe.base)
    torch.manual_seed(recipe.train.seed)
    if recipe.method.kind == "lora":
        model = adapter.add_lora(model, recipe.method)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    kind = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[here.precision]
    accelerator = Accelerator(mixed_precision=kind, cpu=here.device == "cpu")
    model, optimizer = accelerator.prepare(model, build_optimizer(model, recipe.train, recipe.train.optimizer))
    # The saved recipe repeats this run on a file whose shape it no longer guesses.
    resolved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": data.format})})
    if accelerator.is_main_process:
        if run is None:
            run = runs.create(resolved)
            run.write("recipe.yaml", recipes.dump(anywhere(resolved)))
            run.write("environment.json", runs.environment() | {"device": here.facts()})
        else:
            run.open_for_writing()
    # Every process must know the folder that the first one took.
    (path,) = broadcast_object_list([str(run.path) if run else None])
    run = run or runs.Run(path)
    session = Session(run, resolved, model, tokenizer, data, here, accelerator, base, watch, optimizer)
    session.halving = Halving(
        here.device, recipe.train.memory_gib, accelerator.num_processes == 1,
        lambda used: no_room(accelerator.unwrap_model(model), optimizer, resolved, run.path, here.device, used),
    )  # fmt: skip
    if here.device == "cuda":
        from maese.model.attention import unpadded

        session.unpadded = unpadded(model, recipe.data.max_length)
    if pays(recipe.train, here.device, session.steps):
        session.compiled = compile_blocks(model)
    return session


def _telling(watch: Watch) -> Callable[[int], object] | None:
    """What is prepared, shown to whoever watches; it is no event of the run, which does not exist yet."""
    return (lambda done: watch({"type": "preparing", "items": done})) if watch else None


def anywhere(recipe: Recipe) -> Recipe:
    """The recipe with its base and texts as they are found from any folder.

    What travels with maese keeps its name, so that the recipe can travel too.
    """

    def absolute(source: recipes.Source) -> recipes.Source:
        if source.path is None:
            return source
        path = streams.locate(source.path) if source.path == "-" else Path(source.path).expanduser()
        ours = path.exists() and path.resolve() != recipes.shipped(source.path).resolve()
        return source.model_copy(update={"path": str(path.absolute())}) if ours else source

    template = Path(recipe.data.template).expanduser()
    changes = {
        "sources": [absolute(source) for source in recipe.data.sources],
        "template": str(template.absolute()) if template.is_file() else recipe.data.template,
    }
    data = recipe.data.model_copy(update=changes)
    folder = Path(recipe.base).expanduser()
    name = str(folder.absolute()) if recipe.base != "embedded" and folder.is_dir() else recipe.base
    return recipe.model_copy(update={"base": name, "data": data})


@contextmanager
def closing(session: Session):
    """Stop politely on the first Ctrl+C or SIGTERM, at once on the second; let go of the folder whatever happens."""

    def ask(number: int, _frame: Any) -> None:
        if session.stop_signal:
            raise KeyboardInterrupt
        session.stop_signal = number

    ours = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)} if ours else {}
    try:
        yield
    except MaeseError as problem:
        if not isinstance(problem, Interrupted):
            # A disk that is still full must not hide what brought us here.
            with suppress(MaeseError, OSError):
                session.note(status="error", step=session.state.step, code=problem.code)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        session.feed.close()
        session.run.close()
        _let_go(session.accelerator)


def _let_go(accelerator: Any) -> None:
    """Free what Accelerate keeps for the whole process: the next recipe may want another precision or device."""
    from accelerate.state import AcceleratorState

    accelerator.free_memory()
    # With several processes their connection is part of that state, and must outlive the run.
    AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)
