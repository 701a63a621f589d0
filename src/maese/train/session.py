"""What one process holds while it trains: the run folder, the model with its adapters, the data, and how it lets go."""

from __future__ import annotations

import math
import signal
import threading
import time
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
from maese.model import adapter, load, rows
from maese.model.quant import load_quantized
from maese.plan.machine import Machine, allocator, few_kernels, machine
from maese.recipe import Recipe, Train, at_home
from maese.text import streams
from maese.tokens.batches import steps_per_epoch
from maese.tokens.marks import add_marks
from maese.tokens.pack import packed_rows
from maese.tokens.prepare import Prepared, prepare
from maese.tokens.template import FILES
from maese.train.compiling import compile_blocks, pays
from maese.train.feed import Feed, gather
from maese.train.guard import Halving, Room, Spikes, no_room
from maese.train.optim import optimizer as build_optimizer
from maese.train.sharding import accelerator_of, cut_again, refuse_sharded
from maese.train.together import Together, alone, gone, join

Watch = Callable[[runs.Event], object] | None
ECHO = 5.0  # seconds in which a signal that comes again is the same one: launchers repeat it to their processes


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
    room: Room = field(default_factory=Room)
    state: State = field(default_factory=State)
    together: Together = field(default_factory=Together)
    stop_signal: int = 0  # what this process was asked
    agreed_signal: int = 0  # what all know, of several, that one was asked
    unpadded: bool = False  # whether the model takes documents one after the other, with no padding between them
    compiled: list[Any] = field(default_factory=list)  # the blocks of the model that are

    @cached_property
    def feed(self) -> Feed:
        """What the rows become before the model sees them."""
        return Feed(lambda chosen: gather(self, chosen), self.accelerator.device)

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def inner(self) -> tuple[Any, Any]:
        """The model and the optimizer without what distribution wraps them in."""
        return self.accelerator.unwrap_model(self.model), self.optimizer.optimizer

    @property
    def packs(self) -> bool:
        """Whether rows of several examples go through the model as rows: where padding is none, so are rows."""
        return self.recipe.data.packing and not self.unpadded

    @property
    def stopping(self) -> int:
        """The signal that ends the run after this step; several processes know it at the same step, or none does."""
        return self.stop_signal if self.together.world == 1 else self.agreed_signal

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch: examples, or what they are packed into."""
        data = self.recipe.data
        return packed_rows(self.data.train.lengths, data.max_length) if data.packing else len(self.data.train)

    @property
    def steps(self) -> int:
        return self.planned(self.recipe.train)

    def planned(self, train: Train) -> int:
        """How many steps a recipe's training takes on these rows."""
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
    few_kernels()
    here = machine(recipe.train)
    load.quiet()
    accelerator = accelerator_of(here)
    try:
        return _open(recipe, run, watch, here, accelerator, join(accelerator))
    except BaseException:
        _let_go(accelerator)
        raise


def _open(
    recipe: Recipe, run: runs.Run | None, watch: Watch, here: Machine, accelerator: Any, together: Together
) -> Session:
    import torch

    from maese.model.attention import unpadded
    from maese.model.head import head_of
    from maese.model.quick import quicken

    if together.sharded:
        together.each(lambda: refuse_sharded(recipe))
    base, tokenizer, model, new = together.each(lambda: _load(recipe, here, str(accelerator.device)))

    def ready() -> Prepared:
        return prepare(recipe.data, tokenizer, load.context_of(model), recipe.eval.prompts, _telling(watch))

    if together.world > 1:  # one prepares, and the others find it prepared, also where a shared disk knows no locks
        together.first(lambda: bool(ready()))
    data = together.each(ready)
    if recipe.data.packing:
        together.each(lambda: refuse_blended(model, recipe.base))
    torch.manual_seed(recipe.train.seed)
    if recipe.method.adapts:
        model = together.each(lambda: adapter.add_lora(model, recipe.method, tokenizer, new))
    quicken(model)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = together.each(lambda: build_optimizer(model, recipe.train))
    if together.sharded:
        head_of(model)  # how its loss is taken cannot be tried once it is cut
    model, optimizer = accelerator.prepare(model, optimizer)
    # The saved recipe repeats this run on a file whose shape it no longer guesses.
    resolved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": data.format})})
    # Every process must know the folder that the first one took.
    owned = together.each(lambda: _take(resolved, run, here, together.world) if together.rank == 0 else None)
    path = together.tell(owned and str(owned.path))[0]
    run = owned or runs.Run(path)
    session = Session(run, resolved, model, tokenizer, data, here, accelerator, base, watch, optimizer)
    session.together = together
    session.halving = Halving(
        here.device, recipe.train.memory_gib, together.world == 1,
        lambda used: no_room(session.inner[0], optimizer, resolved, run.path, here.device, used, together.world),
    )  # fmt: skip
    session.unpadded = together.each(lambda: unpadded(model, recipe.data.max_length))
    cut_again(model)
    if pays(recipe.train, here.device, session.steps):
        session.compiled = compile_blocks(model)
    return session


def _load(recipe: Recipe, here: Machine, device: str) -> tuple[Path, Any, Any, list[int]]:
    """The folder of the base, its tokenizer and its model, with which data can be prepared, and the tokens it gets."""
    base = load.resolve(recipe.base)
    load.check(base)  # before the tokenizer, whose absence would be told instead
    tokenizer = load.load_tokenizer(base)
    new = add_marks(tokenizer, recipe.data.template) if recipe.data.marks == "add" else []
    if recipe.method.kind == "qlora":
        model = load_quantized(base, here.precision, device)
    else:  # frozen weights can stay in few bits; what trains keeps 32, or small updates would be rounded away
        model = load.load_model(base, here.precision if recipe.method.adapts else "fp32")
    load.refuse_rowless(model, tokenizer, base, new)
    if new:
        rows.make_room(model, tokenizer, new)
        if not recipe.method.adapts:
            rows.write(model, tokenizer, new)
    return base, tokenizer, model, new


def _take(recipe: Recipe, run: runs.Run | None, here: Machine, processes: int) -> runs.Run:
    """The folder of the run, ours to write in: a new one, or that of a run that goes on."""
    if run is None:
        run = runs.create(recipe)
        run.write("recipe.yaml", recipes.dump(anywhere(recipe)))
        run.write("environment.json", runs.environment() | {"device": here.facts(), "processes": processes})
    else:
        run.open_for_writing()
    return run


def _telling(watch: Watch) -> Callable[[int], object] | None:
    """What is prepared, shown to whoever watches; it is no event of the run, which does not exist yet."""
    return (lambda done: watch({"type": "preparing", "items": done})) if watch else None


def anywhere(recipe: Recipe) -> Recipe:
    """The recipe with its base and texts as they are found from any folder.

    What travels with maese keeps its name, so that the recipe can travel too.
    """

    def found(name: str) -> str:
        path = streams.locate(name) if name == "-" else at_home(name)
        ours = path.exists() and path.resolve() != recipes.shipped(name).resolve()
        return str(path.absolute()) if ours else name

    def absolute(source: recipes.Source) -> recipes.Source:
        return source if source.path is None else source.model_copy(update={"path": found(source.path)})

    template = at_home(recipe.data.template)
    changes = {
        "sources": [absolute(source) for source in recipe.data.sources],
        # A file here that happens to be called `maese` or `plain` is no template.
        "template": str(template.absolute())
        if template.suffix in FILES and template.is_file()
        else recipe.data.template,
    }
    data = recipe.data.model_copy(update=changes)
    folder = at_home(recipe.base)
    own = folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file())
    name = str(folder.absolute()) if recipe.base not in recipes.INSIDE and own else recipe.base
    looks = (
        recipe.eval.model_copy(update={"general": found(recipe.eval.general)}) if recipe.eval.general else recipe.eval
    )
    return recipe.model_copy(update={"base": name, "data": data, "eval": looks})


@contextmanager
def closing(session: Session):
    """Stop politely on the first Ctrl+C or SIGTERM, at once on the second; let go of the folder whatever happens."""

    asked = [0.0]

    def ask(number: int, _frame: Any) -> None:
        if session.stop_signal and (session.together.world == 1 or time.monotonic() - asked[0] > ECHO):
            raise KeyboardInterrupt
        if not session.stop_signal:
            session.stop_signal, asked[0] = number, time.monotonic()

    ours = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)} if ours else {}
    try:
        yield
    except Exception as found:
        problem = alone() if session.together.world > 1 and gone(found) else found
        if isinstance(problem, MaeseError) and not isinstance(problem, Interrupted):
            # A disk that is still full must not hide what brought us here.
            with suppress(MaeseError, OSError):
                session.note(status="error", step=session.state.step, code=problem.code)
        raise problem from (None if problem is found else found)
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
