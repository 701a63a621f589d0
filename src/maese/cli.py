"""Every command in a few lines; what it does lives elsewhere, and is imported when it is asked for.

stdout carries the result, stderr the talk. A command ends by naming the next useful ones.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from maese import __version__
from maese.cli_data import data, inspect, tokenizer
from maese.cli_plan import plan
from maese.cli_use import chat, generate, settings_of, writing_options
from maese.errors import MaeseError, UsageError
from maese.retyped import retyped
from maese.say import catalogue, error_explained, error_text, language, say
from maese.spoken import Group, shown, too_long, usage_error

# What a model made from nothing goes through (`stages`), written here so that the help need not read the recipes.
STAGES = ("data", "tokenizer", "pretrain", "instruct", "evaluate", "report")


@click.group(
    cls=Group,
    invoke_without_command=True,
    help=say("cli.about"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--lang", type=click.Choice(["es", "en"]), metavar="es|en", help=say("cli.lang"))
@click.option("--json", "as_json", is_flag=True, help=say("cli.json"))
@click.option("-q", "--quiet", count=True, help=say("cli.quiet"))
@click.option("--no-color", is_flag=True, help=say("cli.no_color"))
@click.option("--version", is_flag=True, help=say("cli.version"))
@click.pass_context
def cli(ctx: click.Context, lang: str | None, as_json: bool, quiet: int, no_color: bool, version: bool) -> None:
    if lang:
        os.environ["MAESE_LANG"] = lang
    if no_color:
        os.environ["NO_COLOR"] = "1"
    ctx.obj = {"json": as_json, "quiet": quiet}
    if version:
        click.echo(f"maese {__version__}")
    elif ctx.invoked_subcommand is None:
        click.echo(say("cli.welcome", version=__version__))


def _train(ctx: click.Context, recipe: Any) -> Any:
    """Train, write metrics and report, and say what came of it: shared by `train` and `demo`."""
    from maese import terminal
    from maese.train.loop import train

    watch = terminal.watcher(**ctx.obj)
    with watch:
        run = train(recipe, watch=watch)
    terminal.close(run, **ctx.obj)
    return run


@cli.command(help=say("cli.demo.help"))
@click.option("--data", "path", type=click.Path(), metavar=say("cli.metavar.path"), help=say("cli.demo.data"))
@click.option("--output", type=click.Path(), metavar=say("cli.metavar.path"), help=say("cli.output"))
@click.pass_context
def demo(ctx: click.Context, path: str | None, output: str | None) -> None:
    from maese import recipe as recipes
    from maese import terminal

    changes = [f"output={json.dumps(output)}"] if output else []
    if path:
        changes.append(f"data.sources=[{{path: {json.dumps(path)}, limit: 500}}]")
    recipe = recipes.load("demo", changes)
    terminal.talk(say("demo.intro", base=recipe.base, path=recipe.data.sources[0].path), **ctx.obj)
    run = _train(ctx, recipe)
    from maese.evaluate.compare import compare
    from maese.report import page

    result = compare(run, list(recipe.eval.prompts))
    page.write(run)
    terminal.comparison(result, **ctx.obj)
    terminal.demo_verdict(run, **ctx.obj)


@cli.command(help=say("cli.new.help"))
@click.argument("name", metavar=say("cli.metavar.name"))
@click.option("--from", "source", default="quijote", metavar=say("cli.metavar.recipe"), help=say("cli.new.source"))
@click.pass_context
def new(ctx: click.Context, name: str, source: str) -> None:
    import yaml

    from maese import recipe as recipes
    from maese import terminal
    from maese.run import write_whole

    path = Path(f"{name}.yaml")
    if path.exists():
        raise MaeseError("RUN-01", path=str(path), free=f"{name}-2.yaml")
    recipes.check({"name": name, "data": {"sources": [{"path": "x"}]}})  # the name itself must be usable
    text = recipes.text(recipes.find(source))
    line = yaml.safe_dump({"name": name}, allow_unicode=True)  # quoted when YAML would take it for a number or a no
    write_whole(path, "".join(line if x.startswith("name:") else x for x in text.splitlines(keepends=True)))
    click.echo(path)
    terminal.talk(say("new.done", path=str(path)), **ctx.obj)


@cli.command(help=say("cli.explain.help"))
@click.argument("code", required=False, metavar=say("cli.metavar.code"))
def explain(code: str | None) -> None:
    from maese import pipeline, terminal
    from maese import recipe as recipes

    words = catalogue(language())
    codes = sorted(key.split(".")[1] for key in words if key.startswith("error.") and key.endswith(".why"))
    keys = recipes.fields() | pipeline.fields()
    # `instruct.train.lr` is the `train.lr` of one of the trainings.
    plain = code.partition(".")[2] if code and code.partition(".")[0] in pipeline.TRAININGS and "." in code else code
    wanted = [key for key in keys if plain in ("train", key) or key.startswith(f"{plain}.")] if plain else []
    if wanted:
        width = max(map(len, wanted)) + 2
        for key in wanted:
            terminal.tell(f"{key:<{width}}{say(f'key.{key}')} [{shown(keys[key])}]", " " * width)
    elif code is None:
        for each in codes:
            terminal.tell(f"{each:<12} {words[f'error.{each}.why'].split('. ')[0].rstrip('.')}", " " * 13)
    elif code.upper() in codes:
        terminal.complain(error_explained(code.upper()), err=False)
    else:
        near = difflib.get_close_matches(code, [*codes, *keys], n=1, cutoff=0)
        raise UsageError("USE-08", found=code, nearest=near[0])


cli.add_command(data)
cli.add_command(tokenizer)
cli.add_command(inspect)
cli.add_command(plan)


@cli.command(help=say("cli.train.help"))
@click.argument("recipe", metavar=say("cli.metavar.recipe"))
@click.argument("changes", nargs=-1, metavar=say("cli.metavar.changes"))
@click.option("--dry-run", is_flag=True, help=say("cli.train.dry_run"))
@click.option(
    "--from",
    "first",
    type=click.Choice(STAGES),
    metavar=say("cli.metavar.stage"),
    help=say("cli.train.first", stages=", ".join(STAGES)),
)
@click.option(
    "--until", "last", type=click.Choice(STAGES), metavar=say("cli.metavar.stage"), help=say("cli.train.last")
)
@click.pass_context
def train(
    ctx: click.Context, recipe: str, changes: tuple[str, ...], dry_run: bool, first: str | None, last: str | None
) -> None:
    from maese import pipeline
    from maese import recipe as recipes

    if pipeline.is_pipeline(recipes.find(recipe)):
        whole = pipeline.load(recipe, changes)
        if dry_run:
            click.echo(pipeline.dump(whole).rstrip())
        else:
            _make(ctx, whole, first, last, typed=(recipe, *changes))
        return
    if first or last:
        raise UsageError("USE-12", name=recipe)
    chosen = recipes.load(recipe, changes)
    if dry_run:
        click.echo(recipes.dump(chosen).rstrip())
    else:
        _train(ctx, chosen)


def _make(
    ctx: click.Context, pipeline: Any, first: str | None, last: str | None, run: Any = None,
    typed: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """The stages of a model made from nothing: all, or those asked for, in the newest folder of that name."""
    from maese import pipeline as panel
    from maese import run as runs
    from maese import stages, terminal, terminal_stages

    if first and last and STAGES.index(last) < STAGES.index(first):
        later = " | ".join(STAGES[STAGES.index(first) :])
        raise UsageError("USE-11", name="--until", command=ctx.command_path, found=last, expected=later)
    again = first if run is None else None
    if again:
        run = runs.find(pipeline.output or pipeline.name)
        pipeline = panel.over(pipeline, panel.load(run.path / "recipe.yaml"), str(run.path), again, typed)
    terminal_stages.show_sizes(pipeline, **ctx.obj)
    tell = terminal_stages.teller(**ctx.obj)
    span = {"first": first or STAGES[0], "last": last or STAGES[-1]}
    made = stages.make(pipeline, lambda: terminal.watcher(**ctx.obj), tell, run, anew=bool(again), **span)
    terminal_stages.close(made, pipeline, **ctx.obj)


@cli.command(help=say("cli.resume.help"))
@click.argument("run", metavar=say("cli.metavar.run"))
@click.option("--verify", is_flag=True, help=say("cli.resume.verify"))
@click.pass_context
def resume(ctx: click.Context, run: str, verify: bool) -> None:
    from maese import pipeline, terminal
    from maese import run as runs

    found = runs.find(run)
    if pipeline.is_pipeline(found.path / "recipe.yaml"):
        _make(ctx, pipeline.load(found.path / "recipe.yaml"), None, None, found)
        return
    if verify:
        from maese.train.verify import verify as repeat

        done = repeat(found)
        terminal.verified(done, **ctx.obj)
        raise click.exceptions.Exit(0 if done.same else 1)
    from maese.train.loop import resume as go_on

    watch = terminal.watcher(**ctx.obj)
    with watch:
        go_on(found, watch=watch)
    terminal.close(found, **ctx.obj)


@cli.command(help=say("cli.runs.help"))
@click.pass_context
def runs(ctx: click.Context) -> None:
    from maese import terminal

    terminal.list_runs(**ctx.obj)


cli.add_command(generate)
cli.add_command(chat)


@cli.command(help=say("cli.compare.help"))
@click.argument("run", metavar=say("cli.metavar.run"))
@click.argument("prompts", nargs=-1, metavar=say("cli.metavar.prompts"))
@click.option("--class-sheet", is_flag=True, help=say("cli.compare.class_sheet"))
@writing_options
@click.pass_context
def compare(ctx: click.Context, run: str, prompts: tuple[str, ...], class_sheet: bool, **given: Any) -> None:
    from maese import run as runs
    from maese import terminal

    settings = settings_of(**given)
    found = runs.trained(run)
    from maese.evaluate.compare import compare as both
    from maese.report import class_sheet as sheet
    from maese.report import page

    asked = list(prompts) or list(found.recipe().eval.prompts) or [say("compare.prompt")]
    result = both(found, asked, **settings)
    page.write(found)
    if class_sheet:
        path = sheet.write(found, result)
        click.echo(sheet.text(sheet.shuffle(result, result["seed"])))
        terminal.talk(say("compare.sheet", path=str(path)), **ctx.obj)
    else:
        terminal.comparison(result, **ctx.obj)


@cli.command("compare-architectures", help=say("cli.compare_architectures.help"))
@click.argument("paths", nargs=-1, metavar=f"[{say('cli.metavar.files')}]")
@click.option("--labels", metavar=say("cli.metavar.file"), help=say("cli.compare_architectures.labels"))
@click.option(
    "--column", default="tarea", metavar=say("cli.metavar.column"), help=say("cli.compare_architectures.column")
)
@click.option("--steps", type=click.IntRange(1), default=300, metavar="N", help=say("cli.compare_architectures.steps"))
@click.option("--output", type=click.Path(path_type=Path), metavar=say("cli.metavar.path"), help=say("cli.output"))
@click.pass_context
def compare_architectures(
    ctx: click.Context, paths: tuple[str, ...], labels: str | None, column: str, steps: int, output: Path | None
) -> None:
    from maese import terminal_study

    click.echo(terminal_study.architectures(list(paths), labels, column, steps, output, **ctx.obj))


@cli.command(help=say("cli.report.help"))
@click.argument("run", metavar=say("cli.metavar.run"))
@click.pass_context
def report(ctx: click.Context, run: str) -> None:
    from maese import pipeline, stages, terminal
    from maese import run as runs

    found = runs.find(run)
    if pipeline.is_pipeline(found.path / "recipe.yaml"):
        stages.write_report(found, pipeline.load(found.path / "recipe.yaml"))
    else:
        terminal.write_papers(found)
    click.echo(found.report / "index.html")


@cli.command(help=say("cli.export.help"))
@click.argument("run", metavar=say("cli.metavar.run"))
@click.argument("folder", type=click.Path(path_type=Path), metavar=say("cli.metavar.path"))
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", help=say("cli.export.dtype")
)
@click.option("--base", metavar=say("cli.metavar.model"), help=say("cli.export.base"))
@click.pass_context
def export(ctx: click.Context, run: str, folder: Path, dtype: str, base: str | None) -> None:
    from maese import terminal
    from maese.model.merge import merge

    terminal.merged(merge(run, folder, dtype, base), **ctx.obj)


def general_first(words: list[str]) -> list[str]:
    """What counts for every command, wherever it was typed: `["plan", "demo", "--json"]` gives `["--json", "plan",
    "demo"]`. After `--` all is text."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word == "--lang":
            front += [word, *([value] if (value := next(left, None)) is not None else [])]
        else:
            (front if word in ("--json", "--no-color") or word.startswith("--lang=") else rest).append(word)
    return front + rest


def run(arguments: list[str]) -> int:
    """The whole command line: runs it and turns what went wrong into words. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # half a character, or one that the console does not have, ends nothing
        sys.stdout.reconfigure(errors="replace")
    try:
        ended = cli.main(general_first(arguments), prog_name="maese", standalone_mode=False)
        return _bye(ended if isinstance(ended, int) else 0)
    except MaeseError as problem:
        told = error_text(problem.code, problem.facts, partial(retyped, problem, arguments))
        return _bye(problem.exit_code, told, problem.code, problem.agreed)
    except click.ClickException as problem:
        return _bye(2, usage_error(problem))
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _bye(130, "")
    except BrokenPipeError:
        # Someone closed the other end (`| head`): there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as problem:  # nobody foresaw it: a person gets a file to send us, not a traceback
        if isinstance(problem, OSError) and (named := too_long(problem)):
            return _bye(named.exit_code, named)
        import tempfile
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="maese-", suffix=".txt", delete=False, encoding="utf-8") as out:
            out.write(traceback.format_exc())
        return _bye(3, MaeseError("BUG-01", path=out.name))


def _bye(status: int, problem: object = None, code: str = "", agreed: bool = False) -> int:
    """Say what went wrong, if it is this process that should, and leave with the others that train."""
    if problem is not None:
        from maese.run import speaks  # here: the help need not wait for recipes
        from maese.terminal import complain

        if speaks(agreed):
            complain(problem)
    if "maese.train.together" in sys.modules:
        from maese.train.together import leave

        # Of one that has gone (DIST-03) nobody knows whether it will ever come.
        leave(wait=status == 0 or (agreed and code != "DIST-03"))
    return status
