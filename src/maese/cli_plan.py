"""`maese plan`: what a run will take, before anything is spent. Paper alone, unless `--probe` asks for a measure.

maese plan pokemon base=gpt2-xl
maese plan --base microsoft/phi-2 --method lora --context 2048 --batch 1x16 --fit 6GB
"""

from __future__ import annotations

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
    name, changes = (words[0], words[1:]) if named else (None, words)
    if name is None and options["base"] is None:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    planned = _planned(name, changes, options)
    if probe and (name is None or len(planned) > 1):
        raise UsageError("USE-13")
    if room is not None:
        terminal_plan.show_fit(planned, room, name, **ctx.obj)
        return
    pace = None
    if probe:
        _, recipe, shape = planned[0]
        refuse_probe(shape, recipe)
        from maese.train.probe import probe as measure

        terminal_plan.say_probing(**ctx.obj)
        pace = measure(recipe)
    terminal_plan.show(planned, pace, name, **ctx.obj)


def _planned(name: str | None, changes: tuple[str, ...], options: dict[str, Any]) -> list[tuple[str, Recipe, Anatomy]]:
    """Every training there is: its name, its recipe with what was asked for on top, and what its model is made of."""
    from maese import pipeline
    from maese import recipe as recipes
    from maese.plan.shape import of_size, open_shape

    if name is not None and pipeline.is_pipeline(recipes.find(name)):
        from maese.stages import shape_of

        whole = pipeline.load(name, changes)
        size = of_size(shape_of(whole), whole.architecture, whole.dropout)
        shape = open_shape(options["base"]) if options["base"] else size
        return [(training, _asked(getattr(whole, training), options, shape), shape) for training in whole.trainings]
    tree: dict[str, Any] = {"name": "plan", "data": {"sources": [{"path": "-"}]}}
    if name is not None:
        tree = recipes.tree_of(recipes.find(name))
    for each in changes:
        recipes.put(tree, *recipes.change(each))
    recipe = recipes.check(tree)
    shape = open_shape(options["base"] or recipe.base)
    if name is None and not any(each.startswith("data.max_length=") for each in changes):
        # Nobody said how long: as long as a row is by default, where the model takes that.
        shorter = recipe.data.model_copy(update={"max_length": min(recipe.data.max_length, shape.context)})
        recipe = recipe.model_copy(update={"data": shorter})
    recipe = _asked(recipe, options, shape)
    return [(recipe.name if name else options["base"], recipe, shape)]


def _asked(recipe: Recipe, options: dict[str, Any], shape: Anatomy) -> Recipe:
    """The recipe with what the options say. Errors: BATCH-01 (rows longer than the model takes), ADAPT-02 (targets)."""
    from maese.plan.fit import changed
    from maese.plan.shape import targeted

    changes: list[tuple[str, Any]] = []
    if options["method"]:
        changes.append(("method.kind", options["method"]))
    if options["context"]:
        changes.append(("data.max_length", options["context"]))
    if options["batch"]:
        rows, turns = options["batch"]
        changes += [("train.micro_batch", rows), ("train.accumulation", turns)]
    recipe = changed(recipe, tuple(changes))
    if options["base"]:
        recipe = recipe.model_copy(update={"base": options["base"]})
    if recipe.data.max_length > shape.context:
        raise MaeseError("BATCH-01", found=recipe.data.max_length, longest=shape.context)
    if recipe.method.kind != "full":
        targeted(shape, recipe.method.targets)
    return recipe


def refuse_probe(shape: Anatomy, recipe: Recipe) -> None:
    """PLAN-03 where the run, and so a few steps of it, would not fit in what is free now."""
    import psutil

    from maese.plan.fit import told
    from maese.plan.machine import glance

    here = glance(recipe.train)
    needed = told(shape, recipe, here.precision, here.device).needed / 2**30
    free = here.memory_gib if here.device == "cuda" else psutil.virtual_memory().available / 2**30
    free = min(free, recipe.train.memory_gib or free)
    if needed > free:
        raise MaeseError("PLAN-03", needed=needed, free=free)
