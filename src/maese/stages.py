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
import json
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
from maese.pipeline import GATHERED, STAGES, TRAININGS, Pipeline
from maese.plan.sizes import SIZES, Shape
from maese.recipe import Data, Recipe
from maese.run import Run

TOKENIZER_MB = 200.0  # of text that a tokenizer is trained on; more changes few of its merges
ASKED = 200  # questions of those kept apart that are put to the model
LARGE, FEWER = 50e6, 24  # parameters above which an answer has to be waited for, and fewer are asked

Tell = Callable[[str, dict[str, Any]], object]


def make(
    pipeline: Pipeline, watcher: Callable[[], Any], tell: Tell, run: Run | None = None,
    first: str = STAGES[0], last: str = STAGES[-1],
) -> Run:  # fmt: skip
    """Do the stages from `first` to `last`. What they had left is made anew; what comes before them is kept.

    `watcher()` gives what shows one training; `tell(stage, facts)` hears of every stage that ends.
    Errors: RUN-07 (a stage before `first` was never done), DIST-05 (several processes), BATCH-01 (rows longer than the
    model takes), Interrupted (RUN-06 in a training, RUN-08 in any other stage), and those of each stage.
    """
    refuse_longer(pipeline)
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
    doing = first
    try:
        if done(run, "data"):
            _refuse_other_data(run, pipeline)
        for stage in STAGES[: STAGES.index(first)]:
            if stage in _stages(pipeline) and not done(run, stage):
                raise MaeseError("RUN-07", stage=stage, run=str(run.path), first=first)
        for stage in (stage for stage in _stages(pipeline) if stage in wanted):
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
        run.write("state.json", {"status": "error", "code": problem.code})
        raise
    except KeyboardInterrupt:  # no training was at work that would save first: the stage is done again
        run.write("state.json", {"status": "interrupted"})
        raise Interrupted("RUN-08", signal.SIGINT, stage=doing, run=str(run.path)) from None
    finally:
        run.close()
    return run


def forget(run: Run, first: str) -> None:
    """Throw away what a stage and those after it left, so that they are done again."""
    for stage in STAGES[STAGES.index(first) :]:
        for path in _products(run, stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def done(run: Run, stage: str) -> bool:
    """Whether a stage has left all it should."""
    if stage in TRAININGS:
        return (Run(run.path / stage).read("state.json") or {}).get("status") == "finished"
    return all(path.exists() for path in _products(run, stage))


def _products(run: Run, stage: str) -> list[Path]:
    """What a stage leaves; the last of them is written when all is there."""
    names = {
        "data": ["data", "counts.json"],
        "tokenizer": ["tokenizer", "base", "tokenizers.json"],
        "evaluate": ["scores.json"],
        "report": ["report", "report/index.html"],
    }
    return [run.path / name for name in names.get(stage, [stage])]


def _stages(pipeline: Pipeline) -> list[str]:
    return [stage for stage in STAGES if stage not in TRAININGS or stage in pipeline.trainings]


def refuse_longer(pipeline: Pipeline) -> None:
    """BATCH-01 where rows would be longer than the model takes: before the stages that come first take their time."""
    longest = shape_of(pipeline).context
    for training in pipeline.trainings:
        if (found := getattr(pipeline, training).data.max_length) > longest:
            raise MaeseError("BATCH-01", key=f"{training}.data.max_length", found=found, longest=longest)


def shape_of(pipeline: Pipeline) -> Shape:
    """The size asked for, with what was said otherwise."""
    said = {key: value for key, value in pipeline.shape.model_dump().items() if value is not None}
    return dataclasses.replace(SIZES[pipeline.size], **said)


def data_of(run: Run, pipeline: Pipeline, training: str) -> Data:
    """The data of a training as the first stage left it."""
    made = json.loads((run.path / "data" / f"{training}.json").read_text("utf-8"))
    data: Data = getattr(pipeline, training).data
    made["sources"] = [source | {"path": str(run.path / source["path"])} for source in made["sources"]]
    return Data.model_validate(data.model_dump() | made)


def recipe_of(run: Run, pipeline: Pipeline, training: str) -> Recipe:
    """A training as any recipe: its base, its data and its folder are those of the whole."""
    recipe: Recipe = getattr(pipeline, training)
    data = data_of(run, pipeline, training)
    changes = {"base": str(run.path / recipe.base), "output": str(run.path / training), "data": data}
    return recipe.model_copy(update=changes)


def gather_data(run: Run, pipeline: Pipeline, _watcher: Any) -> None:
    from maese.text.gather import gather

    shutil.rmtree(run.path / "data", ignore_errors=True)
    counts = {}
    for training in pipeline.trainings:
        data, counts[training] = gather(getattr(pipeline, training).data, run.path / "data" / training)
        if not data.sources:  # a recipe has some: nothing of them was worth learning
            raise MaeseError("DATA-05", path=counts[training][0]["source"])
        said = data.model_dump(include=set(GATHERED))
        for source in said["sources"]:
            source["path"] = str(Path(source["path"]).relative_to(run.path))
        run.write(f"data/{training}.json", said)
    run.write("data/asked.json", _asked(pipeline))
    run.write("counts.json", counts)


def _asked(pipeline: Pipeline) -> dict[str, Any]:
    """What decides the data that are gathered: `{"pretrain.data.dedup": "near", …}`."""
    datas = {name: getattr(pipeline, name).data.model_dump(mode="json") for name in pipeline.trainings}
    return {f"{name}.data.{key}": data[key] for name, data in datas.items() for key in GATHERED}


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
    for training in pipeline.trainings:  # so that one of them can be given to several processes by itself
        run.write(f"{training}.yaml", recipes.dump(recipe_of(run, pipeline, training)))
    run.write("tokenizers.json", compare([str(folder), "embedded", *_known()]) | fewer)


def make_base(run: Run, pipeline: Pipeline) -> None:
    """The model that knows nothing, of the shape asked for; one of another shape that is there is put aside."""
    from maese.model.build import build

    folder, shape, wanted = run.path / "base", shape_of(pipeline), _made_of(pipeline)
    if folder.exists() and run.read("base/shape.json") == wanted:
        return
    for path in (folder, *run.path.glob(".base.*")):  # the latter a process that died half way left
        shutil.rmtree(path, ignore_errors=True)
    build(shape, pipeline.architecture, run.path / "tokenizer", folder, pipeline.seed, pipeline.dropout)
    run.write("base/shape.json", wanted)


def _made_of(pipeline: Pipeline) -> dict[str, Any]:
    """What decides the first weights of a model."""
    return shape_of(pipeline).__dict__ | pipeline.model_dump(include={"architecture", "dropout", "seed"})


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
        _refuse_changed(run, pipeline, part)
    elif not part.holder():  # killed before its recipe was there, it left an empty folder that would be in the way
        shutil.rmtree(part.path, ignore_errors=True)
    if training == TRAININGS[0] and not begun:
        make_base(run, pipeline)
    with watcher() as watch:
        if begun:
            loop.resume(part, watch=watch)
        else:
            loop.train(recipe_of(run, pipeline, training), watch=watch)


def _refuse_other_data(run: Run, pipeline: Pipeline) -> None:
    """RESUME-05 where the recipe of the whole now asks for other data than were gathered."""
    before, now = run.read("data/asked.json") or {}, _asked(pipeline)
    changed = [(key, value, now.get(key)) for key, value in before.items() if now.get(key) != value]
    if changed:
        raise _changed(run, changed)


def _refuse_changed(run: Run, pipeline: Pipeline, part: Run) -> None:
    """RESUME-05 where the recipe of the whole now asks of a training half done what it was not begun with."""
    from maese.train.checkpoint import refusals

    name = part.path.name
    before, now = (recipe.model_dump(mode="json") for recipe in (part.recipe(), recipe_of(run, pipeline, name)))
    changed = [(f"{name}.{key}", *said) for key, *said in refusals(before, now)]
    made = run.read("base/shape.json") or {}
    changed += [(key, made[key], value) for key, value in _made_of(pipeline).items() if made.get(key, value) != value]
    if changed:
        raise _changed(run, changed)


def _changed(run: Run, changed: list[tuple[str, Any, Any]]) -> MaeseError:
    then, found = (", ".join(f"{key}: {said[i]}" for key, *said in changed) for i in (0, 1))
    return MaeseError("RESUME-05", found=found, then=then, run=str(run.path))


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


def write_report(run: Run, pipeline: Pipeline, _watcher: Any) -> None:
    from maese.report import curves, facts, page, whole

    for training in pipeline.trainings:
        part = Run(run.path / training)
        facts.write_metrics(part)
        curves.plot(part)
        page.write(part)
    whole.write(run, pipeline.trainings)


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
