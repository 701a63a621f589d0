"""The control panel of several trainings in a row: from raw text to a model of one's own that answers.

    chosen = load("minigpt", ["size=nano", "train.max_steps=3"])
    chosen.pretrain                      an ordinary recipe, whose base is the model that knows nothing yet
    is_pipeline(find("minigpt"))         whether a file is one of these, by what it holds

`train.…`, `eval.…` and `generate.…` typed after the name go to every training there is; `pretrain.train.…` to one.
"""

from __future__ import annotations

import shlex
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from maese import recipe as recipes
from maese.errors import MaeseError
from maese.recipe import Count, Recipe, Share, Strict

TRAININGS = ("pretrain", "instruct")
STAGES = ("data", "tokenizer", *TRAININGS, "evaluate", "report")
SHARED = ("train", "eval", "generate", "method")
MADE = ("size", "architecture", "shape", "dropout", "seed", "pretrain")  # what a model is once it is pretrained
GATHERED = ("sources", "clean", "dedup", "format")  # of the data of each training, what its first stage works on
OWN = {"name", "base", "output"}  # of each training: they follow from what it is part of


class Shape(Strict):
    """What differs from the size: a size of one's own. Nothing said: the size's."""

    layers: Count | None = None
    heads: Count | None = None
    width: Count | None = None
    vocabulary: Annotated[int, Field(strict=True, ge=300)] | None = None
    context: Annotated[int, Field(strict=True, ge=8)] | None = None


class Pipeline(Strict):
    """Data, tokenizer, a model from nothing, its instructions, what came of it."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=60)]
    size: Literal["nano", "mini", "base"] = "mini"
    architecture: Literal["classic", "modern"] = "modern"
    shape: Shape = Shape()
    dropout: Share = 0.0
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 42  # of the first weights
    pretrain: Recipe
    instruct: Recipe | None = None
    output: str | None = None  # None: runs/<date>-<name>

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: Any) -> Any:
        """Each training is called after the whole, and begins where the one before it ended."""
        if not isinstance(tree, dict):
            return tree
        whole = dict(tree)
        for training, base in zip(TRAININGS, ("base", "pretrain/final"), strict=True):
            if isinstance(whole.get(training), dict):
                whole[training] = whole[training] | {"name": training, "base": base}
        return whole

    @property
    def trainings(self) -> list[str]:
        return [name for name in TRAININGS if getattr(self, name) is not None]


def over(asked: Pipeline, made: Pipeline, run: str, first: str, typed: tuple[str, ...]) -> Pipeline:
    """What is asked of the stages from `first` on, over what was made in the folder `run`.

    The data are those that were gathered, and after pretraining the model is the size it is, whatever the recipe says
    by default. `typed` is the recipe and its changes as they were typed. Error: RUN-09 (one of them is about what is
    made already).
    """
    if first == "data":
        return asked
    kept = {f"{training}.data.{key}": "data" for training in made.trainings for key in GATHERED}
    kept = {dotted: stage for dotted, stage in kept.items() if dotted.split(".")[0] in asked.trainings}
    if STAGES.index(first) > STAGES.index("pretrain"):
        kept |= dict.fromkeys(MADE, "tokenizer")
    if STAGES.index(first) > STAGES.index("instruct"):
        kept["instruct"] = "instruct"
    for change in typed[1:]:
        key = change.partition("=")[0]
        for dotted, stage in kept.items():
            about = f"{key}.".startswith(f"{dotted}.") or f"{dotted}.".startswith(f"{key}.")  # `pretrain.data={…}` too
            if about and attrgetter(dotted)(asked) != attrgetter(dotted)(made):
                raise MaeseError("RUN-09", change=change, run=run, first=first, stage=stage, words=shlex.join(typed))
    now = asked.model_dump()
    for dotted in kept:
        recipes.put(now, dotted, attrgetter(dotted)(made))
    return Pipeline.model_validate(now)


def is_pipeline(path: Path) -> bool:
    """Whether a recipe file describes several trainings and not one."""
    return "pretrain" in recipes.tree_of(path)


def load(what: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Pipeline:
    """Read it by path or name and apply dotted overrides. Errors: those of `recipe.load`."""
    tree = recipes.tree_of(recipes.find(str(what)))
    for override in overrides:
        key, value = recipes.change(override)
        if key.split(".")[0] in TRAININGS and key.partition(".")[2] in OWN:  # it would be dropped without a word
            raise MaeseError("USE-02", key=key, nearest=key.partition(".")[2], value=recipes.typed(value))
        for dotted in _meant(key, tree):
            recipes.put(tree, dotted, value)
    try:
        return Pipeline.model_validate(recipes.numbers(tree))
    except ValidationError as problem:
        raise _as_typed(recipes.mistake(problem, Pipeline), overrides) from None


def _as_typed(problem: MaeseError, overrides: list[str] | tuple[str, ...]) -> MaeseError:
    """A mistake in a key that went to every training is told as it was typed: `train.lr`, not `pretrain.train.lr`."""
    stage, _, key = str(problem.facts.get("key")).partition(".")
    if stage not in TRAININGS or not any(override.startswith(f"{key}=") for override in overrides):
        return problem
    told = {
        name: str(problem.facts[name]).removeprefix(f"{stage}.") for name in ("key", "nearest") & problem.facts.keys()
    }
    return MaeseError(problem.code, **(problem.facts | told))


def _meant(key: str, tree: dict[str, Any]) -> list[str]:
    """`_meant("train.lr", tree)` is `["pretrain.train.lr", "instruct.train.lr"]`, `_meant("size", tree)` `["size"]`."""
    if key.split(".")[0] not in SHARED:
        return [key]
    return [f"{training}.{key}" for training in TRAININGS if isinstance(tree.get(training), dict)]


def fields() -> dict[str, Any]:
    """Its own keys with their defaults, `{"size": "mini", …}`; those of each training are those of a recipe."""
    every = {
        key: value for key, value in recipes.fields(Pipeline).items() if key.split(".")[0] not in (*TRAININGS, *OWN)
    }
    return every | dict.fromkeys(TRAININGS)


def dump(pipeline: Pipeline) -> str:
    """The YAML that repeats it, every default visible."""
    tree = pipeline.model_dump()
    for training in pipeline.trainings:
        tree[training] = {key: value for key, value in tree[training].items() if key not in OWN}
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False, width=100)
