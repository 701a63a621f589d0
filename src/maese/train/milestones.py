"""The stops on the way: the plan told before, a look at validation and samples, a checkpoint, and the end."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from typing import Any

from maese.errors import MaeseError
from maese.evaluate.ability import bits_per_byte, whole_text
from maese.evaluate.likelihood import loss_and_targets
from maese.generate.engine import Writer
from maese.model import load
from maese.model.fingerprint import parameters
from maese.model.head import causal_of
from maese.model.save import save_final
from maese.plan.cost import disk
from maese.plan.machine import memory_peak_gib, memory_used_gib
from maese.plan.memory import estimate, facts, job_of
from maese.plan.shape import anatomy
from maese.recipe import Source
from maese.text.read import open_source, texts_of
from maese.tokens.settle import pieces
from maese.tokens.template import open_template
from maese.train import checkpoint
from maese.train.guard import give_back
from maese.train.session import Session
from maese.train.sharding import cut_again, whole_state

# Samples on the way are a glance; the full length is for the end.
GLANCE_TOKENS = 48
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def plan(session: Session) -> None:
    every, trained = parameters(session.inner[0])
    train, facts, told = session.recipe.train, session.data.facts, foretold(session)
    session.tell(
        "plan",
        parameters=every, trainable=trained, rows=facts["train"]["rows"], tokens=facts["train"]["tokens"],
        targets=facts["train"]["targets"], validation_rows=facts["validation"]["rows"],
        validation_tokens=facts["validation"]["targets"], steps=session.steps, epochs=train.epochs,
        micro_batch=train.micro_batch, accumulation=train.accumulation, max_length=session.recipe.data.max_length,
        run=str(session.run.path), format=session.data.format, processes=session.together.world,
        sharded=session.together.sharded, unpadded=session.unpadded, compiled=bool(session.compiled),
        **session.machine.facts(), **told,
    )  # fmt: skip
    session.room.estimated_gib = told.get("estimated_gib")
    if (rows := train.micro_batch * train.accumulation) < session.together.world:
        facts = {"rows": rows, "world": session.together.world, "accumulation": _enough(session)}
        session.tell("warning", step=session.state.step, code="DIST-02", facts=facts)


def foretold(session: Session) -> dict[str, Any]:
    """What the run should take at its worst (GiB) and its parts, what must be free for that and what there is, and its
    disk (bytes); nothing where that is not known how to count.

    With several processes each has rows of its own, and buckets to exchange: that is not counted yet.
    """
    if session.together.world > 1:
        return {}
    here, (model, _) = session.machine, session.inner
    job = job_of(session.recipe, here.precision, here.device, session.data.train.lengths)
    give_back()  # what reading the data took is free for the steps, and should not be counted twice
    # What this process already holds is better than the usual figure: a notebook has more in it than a command.
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    process = max(0, int((memory_used_gib("cpu") - held) * 2**30)) if here.device == "cpu" else None
    try:
        shape = anatomy(causal_of(model).config.to_dict())
        told = facts(estimate(shape, job, process, file=0))
    except MaeseError:  # a family that is not counted, or what else the arithmetic cannot tell: it stops no training
        return {}
    # To load has been done, and may have taken more than what comes.
    memory = {"estimated_gib": max(told["gib"], round(memory_peak_gib(here.device), 3)), "estimated": told["parts"]}
    space = disk(shape, job, session.recipe, session.steps)
    space_facts = {**asdict(space), "most": space.most, "free": shutil.disk_usage(session.run.path).free}
    room = round(here.room_gib(session.recipe.train), 3)
    return {**memory, "needed_gib": told["needed_gib"], "room_gib": room, "disk": space_facts}


def _enough(session: Session) -> int:
    """Micro-batches in a step that give every process a row."""
    return math.ceil(session.together.world / session.recipe.train.micro_batch)


def look(session: Session, final: bool) -> None:
    """Validate, remember the best, and write a glance of what the model says now."""
    state, recipe = session.state, session.recipe
    model, _ = session.inner
    if len(session.data.validation) and not final:
        loss, targets = _validated(session)
        # The untouched base is the measure, not a candidate: final/ holds weights that were trained.
        best = state.step > 0 and (state.best_loss is None or loss < state.best_loss)
        state.worse = 0 if best or not state.step else state.worse + 1
        if best:
            state.best_loss, state.best_step = loss, state.step
            if recipe.train.final == "best" and state.step < session.steps:
                path = checkpoint.save_best(session.run.checkpoints, state.step, model, together=session.together)
                session.tell("saved", step=state.step, what="best", path=str(path))
        perplexity = math.exp(min(loss, 700))
        session.tell("validation", step=state.step, loss=loss, perplexity=perplexity, tokens=targets, best=best)
    # With its weights in pieces a model speaks only when all processes have it speak, the same.
    speak = session.together.each if session.together.sharded else session.together.first
    if recipe.eval.general and (final or state.step == 0):
        speak(lambda: elsewhere(session, model, recipe.eval.general or "", final))
    whole = final or state.step == 0
    if whole or state.step < session.steps:
        speak(lambda: samples(session, model, whole, final))
        cut_again(model)


def validate(session: Session) -> None:
    """The loss on validation of the weights as they are, told beside those of the way."""
    if len(session.data.validation):
        loss, targets = _validated(session)
        facts = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": targets}
        session.tell("validation", step=session.state.step, **facts, best=False, averaged=True)


def _validated(session: Session) -> tuple[float, int]:
    """Mean loss over all that is kept apart (nats), and over how many tokens."""
    model, _ = session.inner
    with session.accelerator.autocast():
        pad = load.pad_id(session.tokenizer)
        sizes = (max(4, session.recipe.train.micro_batch), session.together.rank, session.together.world)
        total, counted = session.together.sums(*loss_and_targets(model, session.data.validation, pad, *sizes))
    cut_again(model)
    return total / max(1, counted), int(counted)


def elsewhere(session: Session, model: Any, path: str, final: bool) -> None:
    """Bits per byte of a text of another kind: the same before and after, unless learning this made it forget that."""
    tokenizer, room = session.tokenizer, min(session.recipe.data.max_length, load.context_of(model))
    texts = (text for item in open_source(Source(path=path)) for text in texts_of(item))
    rows = [row for text in texts for row in pieces(whole_text(tokenizer, text), room, 0)]
    with session.accelerator.autocast():
        found = bits_per_byte(model, tokenizer, rows)
    facts = {"bits_per_byte": found.per_byte, "bytes": found.bytes, "path": path, "final": final}
    session.tell("general", step=session.state.step, **facts)


def samples(session: Session, model: Any, whole: bool, final: bool) -> None:
    """Let the model answer the first prompt of the evaluation in a few words, or all of them at length."""
    state, recipe = session.state, session.recipe
    was_training = model.training
    model.eval()
    short = min(GLANCE_TOKENS, recipe.generate.max_new_tokens)
    glance = recipe.generate.model_copy(update={"max_new_tokens": short, "sentences": None})
    settings = recipe.generate if whole else glance
    writer = Writer(model, session.tokenizer, settings, recipe.data.format, recipe.data.template)
    for prompt in recipe.eval.prompts if whole else recipe.eval.prompts[:1]:
        answer = writer.generate(prompt)
        session.tell("sample", step=state.step, prompt=prompt, text=answer.text, final=final)
    model.train(was_training)


def save(session: Session) -> None:
    model, optimizer = session.inner
    state = {
        **session.state.__dict__,
        "base_sha256": load.weights_hash(session.base) if session.main else "",
        "spikes": asdict(session.spikes),
        "halvings": session.halving.times,
    }
    path = checkpoint.save(
        session.run.checkpoints, session.state.step, model, optimizer, state, session.recipe.train.keep,
        recipe=session.recipe.model_dump(mode="json"), scaler=session.accelerator.scaler, together=session.together,
        beside=_beside(session, model),
    )  # fmt: skip
    if session.main:
        checkpoint.keep_best(session.run.checkpoints, session.state.best_step)
    session.tell("saved", step=session.state.step, what="checkpoint", path=str(path))


def _beside(session: Session, model: Any) -> dict[str, bytes]:
    """What makes a checkpoint of a whole model one that can be opened and asked, as `final/` can."""
    if session.recipe.method.adapts or not session.main:
        return {}
    kept = {name: path.read_bytes() for name in TOKENIZER if (path := session.base / name).is_file()}
    if session.recipe.data.marks == "add":  # its tokens are more than those of the base
        kept["tokenizer.json"] = session.tokenizer.backend_tokenizer.to_str().encode()
    return kept | {"config.json": model.config.to_json_string().encode()}


def finish(session: Session, reason: str) -> None:
    """Choose the weights, write final/, let them speak once, and close the run."""
    state, recipe = session.state, session.recipe
    model, _ = session.inner
    chosen = state.step
    best = checkpoint.best(session.run.checkpoints, state.best_step)
    kept = session.together.first(best.is_dir)
    if recipe.train.final == "best" and kept and state.best_step != state.step:
        checkpoint.load_weights(best, model)
        chosen = state.best_step
    if recipe.train.final == "average":
        session.together.each(lambda: checkpoint.average(session.run.checkpoints, model))
        validate(session)
    weights = whole_state(model, session.main) if session.together.sharded else None

    def write() -> None:
        talks = recipe.data.format != "text"
        renderer = open_template(recipe.data.template, session.tokenizer) if talks else None
        save_final(model, session.tokenizer, session.run.final, recipe, session.base, renderer, weights)

    session.together.first(write)
    size = sum(path.stat().st_size for path in load.weight_files(session.run.final)) if session.main else 0
    session.tell("saved", step=chosen, what="final", path=str(session.run.final), bytes=size)
    look(session, final=True)
    end(session, reason, chosen)
    session.note(status="finished", step=state.step, final_step=chosen)


def end(session: Session, reason: str, chosen: int | None) -> None:
    state = session.state
    peak = round(memory_peak_gib(session.machine.device), 3)
    facts = {"seconds": round(state.seconds, 3), "tokens": state.tokens, "peak_gib": peak}
    session.tell("end", step=state.step, reason=reason, final_step=chosen, **facts)
