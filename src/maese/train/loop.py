"""The one training loop. Full fine-tuning and LoRA differ only in what the model lets train.

    run = train(recipe)              runs/2026-11-21-quijote/, with final/ and its events
    run = resume(run)                goes on from the last whole checkpoint, bit for bit on CPU

Each step: the micro-batches of the step, their loss summed over real target tokens and divided by how many there are
in the whole step; clip; look at the numbers before they touch the weights; move; say so.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from maese import recipe as recipes
from maese import run as runs
from maese.errors import Interrupted, MaeseError
from maese.evaluate.likelihood import loss_sum, mean_loss
from maese.generate.engine import Writer
from maese.model import adapter, load
from maese.model.fingerprint import parameters
from maese.model.save import save_final
from maese.plan.machine import Machine, machine, memory_peak_gib, memory_used_gib
from maese.recipe import Recipe
from maese.tokens.batches import batches, collate, steps_per_epoch
from maese.tokens.prepare import Prepared, prepare
from maese.train import checkpoint
from maese.train.optim import optimizer as build_optimizer
from maese.train.optim import rate

Watch = Callable[[runs.Event], object] | None
# Samples on the way are a glance; the full length is for the end.
GLANCE_TOKENS = 48


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
    state: State = field(default_factory=State)
    stop_signal: int = 0

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def steps(self) -> int:
        train = self.recipe.train
        each = steps_per_epoch(len(self.data.train), train.micro_batch, train.accumulation)
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


def train(recipe: Recipe, watch: Watch = None) -> runs.Run:
    """Train a recipe from its base in a new run folder. Errors: all of reading, loading, disk, and NUM-01."""
    session = _open(recipe, None, watch)
    with _closing(session):
        _begin(session, resumed_from=None)
        _loop(session)
    return session.run


def resume(run: runs.Run, watch: Watch = None) -> runs.Run:
    """Go on with a run that stopped: from its last whole checkpoint, or from the start if it had none yet.

    Errors: RUN-04 (it had ended), RESUME-01 (data or base changed), RESUME-02 (no checkpoint is whole).
    """
    if (run.read("state.json") or {}).get("status") == "finished":
        raise MaeseError("RUN-04", run=str(run.path))
    session = _open(run.recipe(), run, watch)
    with _closing(session):
        _same_data(session)
        if any(run.checkpoints.glob("step-??????")):
            _go_back(session)
        else:
            _begin(session, resumed_from=0)
        _loop(session)
    return session.run


def _begin(session: Session, resumed_from: int | None) -> None:
    """The first events of a run: what it is, what it will cost, and what the untouched base does."""
    if session.main:
        session.run.write("data.json", session.data.facts)
    _start(session, 0, resumed_from)
    for key, facts in session.data.notes:
        session.tell("warning", step=0, code=key, facts=facts)
    _plan(session)
    _look(session, final=False)


def _go_back(session: Session) -> None:
    """Put everything as it was at the newest checkpoint that is whole, and say which were not."""
    path, manifest, refused = checkpoint.newest(session.run.checkpoints)
    if manifest["state"]["base_sha256"] != load.weights_hash(session.base):
        raise MaeseError("RESUME-01", path=session.recipe.base, run=str(session.run.path))
    _start(session, manifest["step"], manifest["step"])
    for name, file in refused:
        session.tell("warning", step=manifest["step"], code="RESUME-03", facts={"checkpoint": name, "file": file})
    _plan(session)
    session.state = State(**{k: v for k, v in manifest["state"].items() if k in State.__dataclass_fields__})
    checkpoint.restore(path, session.accelerator.unwrap_model(session.model), session.optimizer.optimizer)


def _start(session: Session, step: int, resumed_from: int | None) -> None:
    recipe = session.recipe
    facts = {"name": recipe.name, "base": recipe.base, "method": recipe.method.kind}
    session.tell("start", step=step, resumed_from=resumed_from, **facts)


def _same_data(session: Session) -> None:
    known = session.run.read("data.json")
    before = {source["path"]: source["sha256"] for source in known["sources"]} if known else {}
    for source in session.data.facts["sources"]:
        if before and before.get(source["path"]) != source["sha256"]:
            raise MaeseError("RESUME-01", path=source["path"], run=str(session.run.path))


def _open(recipe: Recipe, run: runs.Run | None, watch: Watch) -> Session:
    """Load base and data, put the adapters on, and take hold of the run folder."""
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
    data = prepare(recipe.data, tokenizer, load.context_of(model))
    torch.manual_seed(recipe.train.seed)
    if recipe.method.kind == "lora":
        model = adapter.add_lora(model, recipe.method)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    kind = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[here.precision]
    accelerator = Accelerator(mixed_precision=kind, cpu=here.device == "cpu")
    model, optimizer = accelerator.prepare(model, build_optimizer(model, recipe.train))
    # What was asked and what it became: the saved recipe repeats this run on a file whose shape it no longer guesses.
    resolved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": data.format})})
    if accelerator.is_main_process:
        if run is None:
            run = runs.create(resolved)
            run.write("recipe.yaml", recipes.dump(resolved.model_copy(update={"output": str(run.path)})))
            run.write("environment.json", runs.environment() | {"device": here.facts()})
        else:
            run.open_for_writing()
    # Every process must know the folder that the first one took.
    (path,) = broadcast_object_list([str(run.path) if run else None])
    run = run or runs.Run(path)
    return Session(run, resolved, model, tokenizer, data, here, accelerator, base, watch, optimizer)


def _loop(session: Session) -> None:
    recipe, state, steps = session.recipe, session.state, session.steps
    rows, train = session.data.train, recipe.train
    each = steps_per_epoch(len(rows), train.micro_batch, train.accumulation)
    session.note(status="training", steps=steps)
    session.model.train()
    reason = "finished"
    plan = batches(len(rows), train.micro_batch, train.accumulation, train.seed, state.step, steps)
    for micro_batches in plan:
        began = time.monotonic()
        lr = rate(state.step, steps, train)
        loss, norm, tokens = _step(session, [[rows[i] for i in chosen] for chosen in micro_batches], lr)
        took = time.monotonic() - began
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + took
        session.tell(
            "step", step=state.step, epoch=round(state.step / each, 4), loss=loss, lr=lr, grad_norm=norm, tokens=tokens,
            tokens_s=round(tokens / took, 1), mem_gib=round(memory_used_gib(session.machine.device), 3),
            seconds=round(state.seconds, 3),
        )  # fmt: skip
        last = state.step == steps
        if (state.step % recipe.eval.every == 0 or last) and session.data.validation:
            _look(session, final=False)
            if train.patience and state.worse >= train.patience and not last:
                reason = "early_stop"
                break
        if session.stop_signal:
            _save(session)
            session.note(status="interrupted", step=state.step, steps=steps)
            _end(session, "interrupted", None)
            raise Interrupted("RUN-06", session.stop_signal, step=state.step, run=str(session.run.path))
        if state.step % train.save_every == 0 and not last:
            _save(session)
    _finish(session, reason)


def _step(session: Session, micro_batches: list[list[Any]], lr: float) -> tuple[float, float, int]:
    """One move of the weights: mean loss over the step's targets (nats), norm of the gradient, real tokens seen."""
    accelerator, optimizer = session.accelerator, session.optimizer
    world, rank = accelerator.num_processes, accelerator.process_index
    # What the whole step learns from, on every process: the mean is over targets, not over micro-batches.
    targets = sum(example.targets for rows in micro_batches for example in rows)
    # A process left without work in a short step still takes part in the exchange, with a loss that weighs nothing.
    mine, weight = micro_batches[rank::world], world / targets
    if not mine:
        mine, weight = micro_batches[:1], 0.0
    pad, total = load.pad_id(session.tokenizer), 0.0
    for i, rows in enumerate(mine):
        batch = {k: v.to(accelerator.device) for k, v in collate(rows, pad).items()}
        with accelerator.no_sync(session.model) if i + 1 < len(mine) else nullcontext():
            loss = loss_sum(session.model, batch)
            # Distribution averages the gradients over processes; this makes it the sum again.
            accelerator.backward(loss * weight)
        total += float(loss.detach()) if weight else 0.0
    if world > 1:
        import torch

        total = float(accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum"))
    norm = float(accelerator.clip_grad_norm_(session.model.parameters(), session.recipe.train.clip))
    loss_value = total / targets
    # A gradient scaled in fp16 may overflow now and then: the scaler skips that step by itself.
    if not math.isfinite(loss_value) or not (math.isfinite(norm) or session.machine.precision == "fp16"):
        session.tell("error", step=session.state.step + 1, code="NUM-01", facts={"loss": str(loss_value), "lr": lr})
        _end(session, "error", None)
        lower = f"{session.recipe.train.lr / 5:.0e}"
        raise MaeseError("NUM-01", step=session.state.step + 1, run=str(session.run.path), lower=lower)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_value, norm, sum(len(example) for rows in micro_batches for example in rows)


def _look(session: Session, final: bool) -> None:
    """Validate, remember the best, and write a glance of what the model says now."""
    state, recipe = session.state, session.recipe
    model = session.accelerator.unwrap_model(session.model)
    if session.data.validation and not final:
        with session.accelerator.autocast():
            pad = load.pad_id(session.tokenizer)
            loss, targets = mean_loss(session.model, session.data.validation, pad, max(4, recipe.train.micro_batch))
        best = state.best_loss is None or loss < state.best_loss
        state.worse = 0 if best else state.worse + 1
        if best:
            state.best_loss, state.best_step = loss, state.step
            if recipe.train.final == "best" and 0 < state.step < session.steps and session.main:
                _write_best(session)
        perplexity = math.exp(min(loss, 700))
        session.tell("validation", step=state.step, loss=loss, perplexity=perplexity, tokens=targets, best=best)
    whole = final or state.step == 0
    if not session.main or (not whole and state.step == session.steps):
        return
    was_training = model.training
    model.eval()
    short = min(GLANCE_TOKENS, recipe.generate.max_new_tokens)
    glance = recipe.generate.model_copy(update={"max_new_tokens": short, "sentences": None})
    writer = Writer(model, session.tokenizer, recipe.generate if whole else glance, recipe.data.format)
    for prompt in recipe.eval.prompts if whole else recipe.eval.prompts[:1]:
        answer = writer.generate(prompt)
        session.tell("sample", step=state.step, prompt=prompt, text=answer.text, final=final)
    model.train(was_training)


def _finish(session: Session, reason: str) -> None:
    """Choose the weights, write final/, let them speak once, and close the run."""
    state, recipe = session.state, session.recipe
    model = session.accelerator.unwrap_model(session.model)
    chosen = state.step
    best = session.run.checkpoints / "best"
    if recipe.train.final == "best" and state.best_loss is not None and state.best_step != state.step and best.is_dir():
        _read_best(session, model)
        chosen = state.best_step
    if session.main:
        save_final(model, session.tokenizer, session.run.final, recipe, session.base)
        session.tell("saved", step=chosen, what="final", path=str(session.run.final))
    _look(session, final=True)
    session.note(status="finished", step=state.step, final_step=chosen)
    _end(session, reason, chosen)


def _end(session: Session, reason: str, chosen: int | None) -> None:
    state = session.state
    peak = round(memory_peak_gib(session.machine.device), 3)
    facts = {"seconds": round(state.seconds, 3), "tokens": state.tokens, "peak_gib": peak}
    session.tell("end", step=state.step, reason=reason, final_step=chosen, **facts)


def _save(session: Session) -> None:
    if not session.main:
        return
    model, optimizer = session.accelerator.unwrap_model(session.model), session.optimizer.optimizer
    state = {**session.state.__dict__, "base_sha256": load.weights_hash(session.base)}
    path = checkpoint.save(
        session.run.checkpoints, session.state.step, model, optimizer, state, session.recipe.train.keep
    )
    session.tell("saved", step=session.state.step, what="checkpoint", path=str(path))


def _write_best(session: Session) -> None:
    """The best weights so far, alone: the optimizer is of no use to them."""
    model = session.accelerator.unwrap_model(session.model)
    folder = session.run.checkpoints / "best"
    checkpoint.save_weights(folder, model)
    session.tell("saved", step=session.state.step, what="best", path=str(folder))


def _read_best(session: Session, model: Any) -> None:
    checkpoint.load_weights(session.run.checkpoints / "best", model)


def _plan(session: Session) -> None:
    every, trained = parameters(session.accelerator.unwrap_model(session.model))
    train, facts = session.recipe.train, session.data.facts
    session.tell(
        "plan",
        parameters=every, trainable=trained, rows=facts["train"]["rows"], tokens=facts["train"]["tokens"],
        targets=facts["train"]["targets"], validation_rows=facts["validation"]["rows"],
        validation_tokens=facts["validation"]["targets"], steps=session.steps, epochs=train.epochs,
        micro_batch=train.micro_batch, accumulation=train.accumulation, max_length=session.recipe.data.max_length,
        run=str(session.run.path), format=session.data.format, **session.machine.facts(),
    )  # fmt: skip


@contextmanager
def _closing(session: Session):
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
        session.run.close()
        _let_go(session.accelerator)


def _let_go(accelerator: Any) -> None:
    """Free what Accelerate keeps for the whole process: the next recipe may want another precision or device."""
    from accelerate.state import AcceleratorState

    accelerator.free_memory()
    # With several processes their connection is part of that state, and must outlive the run.
    AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)
