"""`maese plan`: what a run will take, before anything is spent. Paper alone, unless `--probe` asks for a measure.

maese plan pokemon base=gpt2-xl
maese plan --base microsoft/phi-2 --method lora --context 2048 --batch 1x16 --fit 6GB
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from maese.errors import MaeseError, UsageError
from maese.say import say
from maese.spoken import Command

if TYPE_CHECKING:
    from maese.plan.shape import Anatomy
    from maese.recipe import Recipe
    from maese.terminal_plan import Asked, Planned

METHODS = ("full", "lora", "qlora")
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "g": 1e9, "tb": 1e12, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}


class Size(click.ParamType):
    """An amount of memory as people write it: `6GB`, `5.6 GiB`, «5,6GiB»."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*([a-z]+)", str(value).strip().lower())
        if not found or found[2] not in UNITS or not float(found[1].replace(",", ".")):
            self.fail(str(value), param, ctx)
        return float(found[1].replace(",", ".")) * UNITS[found[2]]


class Batch(click.ParamType):
    """Rows at once and turns: `4x4`."""

    name = "batch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"([1-9]\d*)[x×*]([1-9]\d*)", str(value).strip().lower())
        if not found:
            self.fail(str(value), param, ctx)
        return int(found[1]), int(found[2])


@click.command("plan", cls=Command, help=say("cli.plan.help"))
@click.argument("words", nargs=-1, metavar=say("cli.metavar.plan"))
@click.option("--base", metavar=say("cli.metavar.model"), help=say("cli.plan.base"))
@click.option("--method", type=click.Choice(METHODS), metavar="|".join(METHODS), help=say("cli.plan.method"))
@click.option("--context", type=click.IntRange(8), metavar="N", help=say("cli.plan.context"))
@click.option("--batch", type=Batch(), metavar="4x4", help=say("cli.plan.batch"))
@click.option("--fit", "room", type=Size(), metavar="6GB", help=say("cli.plan.fit"))
@click.option("--probe", is_flag=True, help=say("cli.plan.probe"))
@click.pass_context
def plan(ctx: click.Context, words: tuple[str, ...], room: float | None, probe: bool, **options: Any) -> None:
    from maese import terminal_plan

    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    if named and options["base"] is None and _is_base(words[0]):  # no recipe is called so, and a model is
        options["base"], words, named = words[0], words[1:], False
    if not named and options["base"] is None:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    asked = _asked(words[0], words[1:], options) if named else _asked(None, words, options)
    if probe and room is not None:
        raise UsageError("USE-14", words=asked.words(), room=terminal_plan.typed_size(room))
    planned = _planned(asked)
    if probe and (asked.name is None or asked.staged):
        raise UsageError("USE-13")
    if room is not None:
        terminal_plan.show_fit(planned, room, asked, **ctx.obj)
        return
    pace = None
    if probe:
        refuse_probe(planned[0].shape, planned[0].recipe)
        from maese.train.probe import probe as measure

        terminal_plan.say_probing(**ctx.obj)
        pace = measure(planned[0].recipe)
    terminal_plan.show(planned, pace, asked, **ctx.obj)


def _is_base(word: str) -> bool:
    from maese.plan.shape import KNOWN
    from maese.recipe import INSIDE

    return word in (*KNOWN, *INSIDE) and not Path(word).exists()


def _asked(name: str | None, changes: tuple[str, ...], options: dict[str, Any]) -> Asked:
    """What was typed, with the options as the keys they stand for, which count over those typed as keys."""
    from maese import pipeline
    from maese import recipe as recipes
    from maese.terminal_plan import Asked

    tree = recipes.tree_of(recipes.find(name)) if name is not None else {}
    staged = [each for each in pipeline.TRAININGS if each in tree]
    keys = []
    if name is not None and (base := options["base"]):
        # A model made from nothing has a size for its base. A folder's name may look like YAML.
        plain = recipes.change(f"base={base}")[1] == base
        keys.append(f"{'size' if staged else 'base'}={base if plain else json.dumps(base, ensure_ascii=False)}")
    if options["method"]:
        keys.append(f"method.kind={options['method']}")
    if options["context"]:
        keys += [f"{each}data.max_length={options['context']}" for each in [f"{one}." for one in staged] or [""]]
    if options["batch"]:
        rows, turns = options["batch"]
        keys += [f"train.micro_batch={rows}", f"train.accumulation={turns}"]
    return Asked(name, options["base"] if name is None else None, (*changes, *keys), bool(staged))


def _planned(asked: Asked) -> list[Planned]:
    """Every training there is. Errors: those of recipes and of shapes, BATCH-01 (rows too long), ADAPT-02 (targets)."""
    from maese import pipeline
    from maese import recipe as recipes
    from maese.plan.shape import built, of_size, open_shape
    from maese.terminal_plan import Planned

    name, changes = asked.name, asked.changes
    if name is not None and pipeline.is_pipeline(recipes.find(name)):
        from maese.kept import shape_of

        whole = pipeline.load(name, changes)
        shape = of_size(shape_of(whole), whole.architecture, whole.dropout)
        first, *_ = whole.trainings  # the others go on from what it learnt
        return [
            Planned(each, _checked(_sized(getattr(whole, each), whole.size), shape, f"{each}."), shape, each == first)
            for each in whole.trainings
        ]
    if name is not None:
        recipe = recipes.load(name, changes)
        shape = open_shape(recipe.base)
    else:
        tree: dict[str, Any] = {"name": "plan", "data": {"sources": [{"path": "-"}]}}
        for each in changes:
            recipes.put(tree, *recipes.change(each))
        recipe = recipes.check(tree | {"base": asked.base})
        shape = open_shape(recipe.base)
        if not any(each.startswith("data.max_length=") for each in changes):
            # Nobody said how long: as long as a row is by default, where the model takes that.
            shorter = recipe.data.model_copy(update={"max_length": min(recipe.data.max_length, shape.context)})
            recipe = recipe.model_copy(update={"data": shorter})
    return [Planned(recipe.name if name else recipe.base, _checked(recipe, shape), shape, built(recipe.base))]


def _sized(recipe: Recipe, size: str) -> Recipe:
    """The recipe of a training of several, whose base is what the one before it made, with the size for its base."""
    return recipe.model_copy(update={"base": size})


def _checked(recipe: Recipe, shape: Anatomy, prefix: str = "") -> Recipe:
    """The recipe, if the model can take it. Errors: BATCH-01 (rows longer than the model takes), ADAPT-02 (targets)."""
    from maese.plan.shape import targeted

    if recipe.data.max_length > shape.context:
        key = f"{prefix}data.max_length"
        raise MaeseError("BATCH-01", key=key, found=recipe.data.max_length, longest=shape.context)
    if recipe.method.adapts:
        targeted(shape, recipe.method.targets)
    return recipe


def refuse_probe(shape: Anatomy, recipe: Recipe) -> None:
    """PLAN-03 where the run, and so a few steps of it, would not fit in what is free now."""
    from maese.plan.fit import told
    from maese.plan.machine import glance, memory_free_gib

    here = glance(recipe.train)
    needed = told(shape, recipe, here.precision, here.device).needed / 2**30
    free = min(memory_free_gib(here.device), here.room_gib(recipe.train))
    if needed > free:
        # What fits is told of a card unless this says otherwise, and never of more than is free.
        room = max(1, int(free * 2**30 / 1e6))
        raise MaeseError("PLAN-03", needed=needed, free=free, device=here.device, room=room)
