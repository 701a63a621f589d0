"""What a model made in stages has left in its folder so far, and whether that is still what is asked for.

    done(run, "tokenizer")                                whether a stage need not be done again
    refuse_changed(run, pipeline, "pretrain", True)       before what was made from there on is thrown away

What is kept was made of a recipe: where the recipe now says something else, it is refused, and not passed over.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.pipeline import GATHERED, STAGES, TRAININGS, Pipeline
from maese.plan.sizes import SIZES, Shape
from maese.recipe import Data, Recipe
from maese.run import Run


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


def forget(run: Run, first: str) -> None:
    """Throw away what a stage and those after it left, so that they are done again."""
    for stage in STAGES[STAGES.index(first) :]:
        for path in _products(run, stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def stages_of(pipeline: Pipeline) -> list[str]:
    return [stage for stage in STAGES if stage not in TRAININGS or stage in pipeline.trainings]


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


def gathered(run: Run, training: str) -> bool:
    """Whether the data of a training are there, whole: they are counted last."""
    return training in (run.read("counts.json") or {})


def asked_of(pipeline: Pipeline) -> dict[str, Any]:
    """What decides the data that are gathered: `{"pretrain.data.dedup": "near", …}`."""
    datas = {name: getattr(pipeline, name).data.model_dump(mode="json") for name in pipeline.trainings}
    return {f"{name}.data.{key}": data[key] for name, data in datas.items() for key in GATHERED}


def made_of(pipeline: Pipeline) -> dict[str, Any]:
    """What decides the first weights of a model."""
    return shape_of(pipeline).__dict__ | pipeline.model_dump(include={"architecture", "dropout", "seed"})


def refuse_early(pipeline: Pipeline) -> None:
    """What a training would refuse for its recipe alone, before the stages that come first take their time.

    Errors: BATCH-01 (rows longer than the model takes), TEMPLATE-05 (no such template), DEVICE-01 (no such device).
    """
    from maese.plan.machine import glance
    from maese.tokens.template import refuse_unknown

    longest = shape_of(pipeline).context
    for training in pipeline.trainings:
        recipe: Recipe = getattr(pipeline, training)
        if (found := recipe.data.max_length) > longest:
            raise MaeseError("BATCH-01", key=f"{training}.data.max_length", found=found, longest=longest)
        with about(training):
            refuse_unknown(recipe.data.template)
            glance(recipe.train)


@contextmanager
def about(training: str) -> Iterator[None]:
    """Errors met here are of one training: their repairs are to change its keys."""
    try:
        yield
    except MaeseError as problem:
        problem.facts.setdefault("training", training)
        raise


def refuse_changed(run: Run, pipeline: Pipeline, first: str, anew: bool) -> None:
    """What would be kept is there and is what is asked for; what would be read again can be.

    Errors: RUN-07 (a stage before `first` was never done), RESUME-05 (it was made of another recipe), those of opening
    sources.
    """
    from maese.text.read import open_source

    before = STAGES[: STAGES.index(first)]
    for stage in before:
        if stage in stages_of(pipeline) and not done(run, stage):
            raise MaeseError("RUN-07", stage=stage, run=str(run.path), first=first)
    kept = [stage for stage in (before if anew else STAGES) if done(run, stage)]
    for training in pipeline.trainings if anew and first == "data" else ():
        data = getattr(pipeline, training).data
        with about(training):
            for source in (source for source in data.sources if source.path):
                open_source(source, data.format)
    if "data" in kept:  # a training that was not asked for then has none yet, one left out now keeps its own
        gathered, now = run.read("data/asked.json") or {}, asked_of(pipeline)
        _same(run, [(key, was, now[key]) for key, was in gathered.items() if key in now])
    if "tokenizer" in kept:
        was, vocabulary = (run.read("base/shape.json") or {}).get("vocabulary"), shape_of(pipeline).vocabulary
        _same(run, [("shape.vocabulary", was or vocabulary, vocabulary)])
    for training in pipeline.trainings:
        if training in kept:
            refuse_other_training(run, pipeline, training)


def _same(run: Run, compared: list[tuple[str, Any, Any]]) -> None:
    """RESUME-05 where a key, `("pretrain.train.lr", 3e-4, 0.5)`, is not now what it was then."""
    changed = [(key, was, now) for key, was, now in compared if was != now]
    if changed:
        then, found = (", ".join(f"{key}: {said[i]}" for key, *said in changed) for i in (0, 1))
        raise MaeseError("RESUME-05", found=found, then=then, run=str(run.path))


def refuse_other_training(run: Run, pipeline: Pipeline, name: str) -> None:
    """RESUME-05 where the recipe of the whole now asks of a training what it was not begun with."""
    from maese.train.checkpoint import refusals

    part = Run(run.path / name)
    before, now = (recipe.model_dump(mode="json") for recipe in (part.recipe(), recipe_of(run, pipeline, name)))
    made = run.read("base/shape.json") or {}
    compared = [(f"{name}.{key}", was, new) for key, was, new in refusals(before, now)]
    _same(run, [*compared, *((key, made.get(key, value), value) for key, value in made_of(pipeline).items())])
