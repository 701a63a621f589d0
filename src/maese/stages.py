"""From raw text to a model of one's own that answers: each stage leaves a folder, and is done once.

    run = make(pipeline, watch)                       runs/2026-11-21-minigpt/
    make(pipeline, watch, run, first="pretrain")      that stage again, and those after it

    data/         the sources, cleaned, without repetitions         counts.json
    tokenizer/    a vocabulary of one's own                         tokenizers.json, beside the embedded model's
    base/         the model that knows nothing yet                  pretrain.yaml, instruct.yaml: each by itself
    pretrain/     a run like any other, with its own report         checkpoint-1000/ … while it lasts
    instruct/     another, that begins where that one ended
    scores.json   what came of it, on what nobody trained on
    report/       all of it on one page

A stage whose product is there is not done again, so whatever stops the whole, it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maese import pipeline as panel
from maese import recipe as recipes
from maese import run as runs
from maese.errors import Interrupted, MaeseError
from maese.kept import (
    about,
    asked_of,
    data_of,
    done,
    forget,
    gathered,
    made_of,
    recipe_of,
    refuse_changed,
    refuse_early,
    refuse_other_training,
    shape_of,
    stages_of,
)
from maese.pipeline import GATHERED, STAGES, TRAININGS, Pipeline
from maese.recipe import Data
from maese.run import Run

TOKENIZER_MB = 200.0  # of text that a tokenizer is trained on; more changes few of its merges
ASKED = 200  # questions of those kept apart that are put to the model
LARGE, FEWER = 50e6, 24  # parameters above which an answer has to be waited for, and fewer are asked

Tell = Callable[[str, dict[str, Any]], object]


def make(
    pipeline: Pipeline, watcher: Callable[[], Any], tell: Tell, run: Run | None = None,
    first: str = STAGES[0], last: str = STAGES[-1], anew: bool = False,
) -> Run:  # fmt: skip
    """Do the stages from `first` to `last`; what comes before them is kept. `anew`, what they had left is thrown away.

    `watcher()` gives what shows one training; `tell(stage, facts)` hears of every stage that ends.
    Errors: those of `refuse_early`; RUN-03 (another process is at it), RUN-07 (a stage before `first` was never done),
    RESUME-05 (what is kept was made of another recipe), DIST-05 (several processes), Interrupted (RUN-06 in a training,
    RUN-08 in any other stage), and those of each stage.
    """
    refuse_early(pipeline)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problem = MaeseError("DIST-05", name=pipeline.name, run=str(run.path) if run else f"runs/…-{pipeline.name}")
        problem.agreed = True  # each of them finds it: the first says it
        raise problem
    wanted = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if run is None:
        run = runs.create(pipeline)  # type: ignore[arg-type]  # its name and its output are all that is asked
        run.write("recipe.yaml", panel.dump(pipeline))
        run.write("environment.json", runs.environment())
    else:
        run.open_for_writing()
        try:
            refuse_changed(run, pipeline, first, anew)
        except MaeseError:
            run.close()
            raise
    doing = first
    try:
        if anew:
            forget(run, first)
            run.write("recipe.yaml", panel.dump(pipeline))  # what is asked now is what a resume would go on with
        if done(run, "data") and not all(gathered(run, training) for training in pipeline.trainings):
            gather_data(run, pipeline, watcher)  # of a training that was not asked for before
        for stage in (stage for stage in stages_of(pipeline) if stage in wanted):
            doing = stage
            if not done(run, stage):
                run.write("state.json", {"status": "training", "stage": stage})
                DO[stage](run, pipeline, watcher)
            tell(stage, facts_of(run, stage))
        # One that was told to stop half way waits to be resumed, like one that was interrupted.
        status = "finished" if wanted[-1] == STAGES[-1] else "interrupted"
        run.write("state.json", {"status": status, "stage": wanted[-1]})
    except Interrupted as stopped:  # a training says how it goes on, and what goes on is the whole
        run.write("state.json", {"status": "interrupted"})
        stopped.facts["run"] = str(run.path)
        raise
    except MaeseError as problem:
        if doing in TRAININGS:
            problem.facts.setdefault("training", doing)
        run.write("state.json", {"status": "error", "code": problem.code})
        raise
    except KeyboardInterrupt:  # no training was at work that would save first: the stage is done again
        run.write("state.json", {"status": "interrupted"})
        raise Interrupted("RUN-08", signal.SIGINT, stage=doing, run=str(run.path)) from None
    finally:
        run.close()
    return run


def gather_data(run: Run, pipeline: Pipeline, _watcher: Any) -> None:
    from maese.text.gather import gather

    counts = run.read("counts.json") or {}
    for training in (training for training in pipeline.trainings if not gathered(run, training)):
        shutil.rmtree(run.path / "data" / training, ignore_errors=True)
        with about(training):
            data, counts[training] = gather(getattr(pipeline, training).data, run.path / "data" / training)
            if not data.sources:  # a recipe has some: nothing of them was worth learning
                raise MaeseError("DATA-05", path=counts[training][0]["source"])
        said = data.model_dump(include=set(GATHERED))
        for source in said["sources"]:
            source["path"] = str(Path(source["path"]).relative_to(run.path))
        run.write(f"data/{training}.json", said)
        # So that one of them can be given to several processes by itself.
        run.write(f"{training}.yaml", recipes.dump(recipe_of(run, pipeline, training)))
    run.write("data/asked.json", asked_of(pipeline))
    run.write("counts.json", counts)


def make_tokenizer(run: Run, pipeline: Pipeline, _watcher: Any) -> None:
    """The vocabulary, from what will be learnt alone, and the model whose words they are."""
    from maese.text.gather import learnt
    from maese.tokens.compare import compare
    from maese.tokens.train import train_tokenizer

    for path in (run.path / "tokenizer", run.path / "base", *run.path.glob(".tokenizer.*")):
        shutil.rmtree(path, ignore_errors=True)
    datas = [data_of(run, pipeline, training) for training in pipeline.trainings]
    shape, folder = shape_of(pipeline), run.path / "tokenizer"
    names = [source.name for data in datas for source in data.sources]

    def made(size: int) -> Path:
        texts = (text for data in datas for text in learnt(data))
        return train_tokenizer(texts, size, folder, limit_mb=TOKENIZER_MB, sources=names)

    fewer: dict[str, int] = {}
    try:
        made(shape.vocabulary)
    except MaeseError as problem:
        if problem.code != "TOKEN-04":
            raise
        # The model keeps its size, with rows that no word uses: more text is what it waits for.
        fewer = {"asked": shape.vocabulary, "made": int(str(problem.facts["made"]))}
        made(fewer["made"])
    make_base(run, pipeline)
    run.write("tokenizers.json", compare([str(folder), "embedded", *_known()]) | fewer)


def make_base(run: Run, pipeline: Pipeline) -> None:
    """The model that knows nothing, of the shape asked for; one of another shape that is there is put aside."""
    from maese.model.build import build

    folder, shape, wanted = run.path / "base", shape_of(pipeline), made_of(pipeline)
    if folder.exists() and run.read("base/shape.json") == wanted:
        return
    for path in (folder, *run.path.glob(".base.*")):  # the latter a process that died half way left
        shutil.rmtree(path, ignore_errors=True)
    build(shape, pipeline.architecture, run.path / "tokenizer", folder, pipeline.seed, pipeline.dropout)
    run.write("base/shape.json", wanted)


def _known() -> list[str]:
    """GPT-2's tokenizer, where somebody once brought it here: nothing is asked of the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache("gpt2", "tokenizer.json")
    return [found] if isinstance(found, str) else []


def train(run: Run, pipeline: Pipeline, watcher: Any, training: str) -> None:
    """One training, from its beginning or from where it was."""
    from maese.train import loop

    part = Run(run.path / training)
    begun = (part.path / "recipe.yaml").exists()
    if begun:
        refuse_other_training(run, pipeline, training)
    elif not part.holder():  # killed before its recipe was there, it left an empty folder that would be in the way
        shutil.rmtree(part.path, ignore_errors=True)
    if training == TRAININGS[0] and not begun:
        make_base(run, pipeline)
    with watcher() as watch:
        if begun:
            loop.resume(part, watch=watch)
        else:
            loop.train(recipe_of(run, pipeline, training), watch=watch)


def evaluate(run: Run, pipeline: Pipeline, _watcher: Any) -> None:
    """What each model foretells of what was kept apart, which sentences it prefers, and how it answers."""
    from maese.evaluate import ability
    from maese.generate.engine import open_writer
    from maese.tokens.prepare import prepare

    scores: dict[str, Any] = {"bits_per_byte": {}, "pairs": {}}
    for training in pipeline.trainings:
        writer = open_writer(Run(run.path / training))
        for kept in pipeline.trainings:
            rows = prepare(data_of(run, pipeline, kept), writer.tokenizer, shape_of(pipeline).context).validation
            bits = ability.bits_per_byte(writer.model, writer.tokenizer, rows)
            measured = dataclasses.asdict(bits) | {"value": bits.per_byte}
            scores["bits_per_byte"].setdefault(kept, {})[training] = measured
        scores["pairs"][training] = ability.minimal_pairs(writer.model, writer.tokenizer)
        if writer.format != "text":
            most = FEWER if writer.model.num_parameters() > LARGE else ASKED
            asked = _questions(data_of(run, pipeline, training), most)
            found = ability.answers(writer, asked)
            scores["answers"] = dataclasses.asdict(found) | {"questions": asked}
    run.write("scores.json", scores)


def _questions(data: Data, most: int) -> list[str]:
    """First questions of conversations kept apart, each once."""
    from maese.text.gather import parcels
    from maese.text.record import Conversation

    found: dict[str, None] = {}
    for parcel in parcels(data):
        if parcel.side == "validation" and isinstance(parcel.item, Conversation):
            turn = parcel.item.messages[0]
            found |= {turn.content: None} if turn.role == "user" else {}
    return list(found)[:most]


def write_report(run: Run, pipeline: Pipeline, _watcher: Any = None) -> None:
    from maese.report import curves, facts, page, whole

    there = [training for training in pipeline.trainings if (run.path / training / "recipe.yaml").is_file()]
    for part in (Run(run.path / training) for training in there):
        facts.write_metrics(part)
        curves.plot(part)
        page.write(part)
    whole.write(run, there)


DO: dict[str, Callable[[Run, Pipeline, Any], None]] = {
    "data": gather_data,
    "tokenizer": make_tokenizer,
    "pretrain": lambda run, pipeline, watcher: train(run, pipeline, watcher, "pretrain"),
    "instruct": lambda run, pipeline, watcher: train(run, pipeline, watcher, "instruct"),
    "evaluate": evaluate,
    "report": write_report,
}


def facts_of(run: Run, stage: str) -> dict[str, Any]:
    """What a stage came to, for whoever tells it."""
    if stage in TRAININGS:
        from maese.report.facts import facts

        return facts(Run(run.path / stage))
    name = {"data": "counts.json", "tokenizer": "tokenizers.json", "evaluate": "scores.json"}.get(stage)
    return {"path": str(run.report / "index.html")} if name is None else run.read(name)
