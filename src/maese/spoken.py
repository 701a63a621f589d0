"""Click in our words: headings, examples and mistakes, in the language of the person.

Click's own translations cover part of what it says; here all of it comes from the catalogues.
"""

from __future__ import annotations

import difflib
import errno
import re
from typing import Any

import click

from maese.errors import UsageError
from maese.say import catalogue, has, language, number, say

# Words people bring from other tools or from their own language: suggestions, not aliases.
FALSE_FRIENDS = {
    "finetune": "train", "fine-tune": "train", "sft": "train", "run": "train", "entrenar": "train", "ajustar": "train",
    "infer": "generate", "generar": "generate", "escribir": "generate", "charlar": "chat", "comparar": "compare",
    "informe": "report", "continuar": "resume", "reanudar": "resume", "nuevo": "new", "datos": "data", "init": "new",
    "list": "runs", "memory": "plan", "estimate": "plan", "planear": "plan", "ls": "runs", "explicar": "explain",
    "merge": "export", "exportar": "export", "doctor": "data check", "medico": "data check", "médico": "data check",
}  # fmt: skip
ESSENTIAL = ("base", "size", "data.sources", "train.epochs", "train.lr", "train.micro_batch", "method.kind", "output")
GROUPS = {
    "start": ("demo", "new", "explain"),
    "data": ("data", "tokenizer"),
    "train": ("plan", "train", "resume", "runs"),
    "use": ("generate", "chat"),
    "look": ("inspect",),
    "measure": ("compare", "compare-architectures", "report"),
    "out": ("export",),
}


class Spoken:
    """Click's own headings in the language of the person."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        pieces = " ".join(self.collect_usage_pieces(ctx))  # type: ignore[attr-defined]  # of the command it is mixed into
        formatter.write_usage(ctx.command_path, pieces, prefix=say("cli.usage") + " ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]  # type: ignore[attr-defined]  # likewise
        rows = [(row[0], in_words(row[1])) for p in params if (row := p.get_help_record(ctx))]
        with formatter.section(say("cli.options")):
            formatter.write_dl(rows)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)  # type: ignore[misc]  # likewise
        if option:
            option.help = say("cli.help")
        return option


class Decimal(click.ParamType):
    """A number as people write it: `0.7` and «0,7»."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(str(value).replace(",", "."))
        except ValueError:
            self.fail(str(value), param, ctx)


class Command(Spoken, click.Command):
    """A command with its help in Spanish or English, and its examples below."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("options_metavar", say("cli.options_metavar"))
        super().__init__(*args, **kwargs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.command_path == "maese train":
            self.format_keys(formatter)
        key = "cli." + re.sub("[ -]", "_", ctx.command_path.split(" ", 1)[1]) + ".examples"
        if key in catalogue(language()):
            with formatter.section(say("cli.examples")):
                for line in say(key).splitlines():
                    formatter.write(f"  {line}\n")

    def format_keys(self, formatter: click.HelpFormatter) -> None:
        """The keys of a recipe that most people change, with their defaults, read from the recipe itself."""
        from maese import pipeline
        from maese.recipe import fields

        every = fields() | pipeline.fields()
        with formatter.section(say("cli.train.keys")):
            formatter.write_dl([(key, f"{say(f'key.{key}')} [{shown(every[key])}]") for key in ESSENTIAL])
        formatter.write(say("cli.train.more", n=len(every)) + "\n")


class Group(Spoken, click.Group):
    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("subcommand_metavar", say("cli.command_metavar"))
        kwargs.setdefault("options_metavar", say("cli.options_metavar"))
        super().__init__(*args, **kwargs)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups = GROUPS if ctx.parent is None else {"all": tuple(self.commands)}
        for group, names in groups.items():
            with formatter.section(say(f"cli.group.{group}")):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(140)) for name in names])


def shown(value: Any) -> str:
    """A default as the help shows it: nothing said is «nada», the rest as it is typed."""
    from maese.recipe import typed

    return say("cli.explain.none") if value in (None, []) else typed(value)


def in_words(text: str) -> str:
    """Click's bounds of a number in words: `in_words("Parte.  [0.1<=x<=0.9]")` is «Parte (de 0,1 a 0,9).»."""
    found = re.fullmatch(r"(.*?)\.?\s+\[(?:([\d.]+)<=)?x(?:([<>])=([\d.]+))?\]", text, re.DOTALL)
    if not found:
        return text
    low, sign, high = found[2], found[3], found[4]
    bounds = {"low": low or (high if sign == ">" else None), "high": high if sign == "<" else None}
    plain = {key: value for key, value in bounds.items() if value and float(value) < 1e9}  # more is no bound at all
    told = {key: number(float(value), len(value.rstrip("0").partition(".")[2])) for key, value in plain.items()}
    return say("cli.bounds." + "_".join(told), text=found[1], **told)


def usage_error(problem: click.ClickException) -> UsageError:
    """Click's structured exceptions in our words."""
    path = problem.ctx.command_path if isinstance(problem, click.UsageError) and problem.ctx else "maese"
    if isinstance(problem, click.NoSuchOption):
        near = problem.possibilities or difflib.get_close_matches(
            problem.option_name, _options(problem.ctx), n=1, cutoff=0
        )
        return UsageError("USE-09", found=problem.option_name, command=path, nearest=(near or ["--help"])[0])
    if isinstance(problem, click.MissingParameter):
        name = problem.param.make_metavar(problem.ctx) if problem.param and problem.ctx else "?"
        return UsageError("USE-10", name=name, command=path)
    if isinstance(problem, click.BadParameter):
        name = problem.param.opts[-1] if problem.param else "?"
        kind = getattr(problem.param.type, "choices", None) if problem.param else None
        expected = " | ".join(kind) if kind else _wanted(problem.param.type) if problem.param else "?"
        ours = problem.param is not None and type(problem.param.type).__module__.startswith("maese")
        theirs = re.match(r"'?(.*?)'? is not ", problem.message)
        found = problem.message if ours else theirs[1] if theirs else "?"  # a type of ours says the value alone
        return UsageError("USE-11", name=name, command=path, found=found, expected=expected)
    if isinstance(problem, click.exceptions.NoSuchCommand):
        word, known = problem.command_name, getattr(problem.ctx.command, "commands", {}) if problem.ctx else {}
        nearest = FALSE_FRIENDS.get(word) or (difflib.get_close_matches(word, known, n=1, cutoff=0) or ["--help"])[0]
        return UsageError("USE-01", found=word, nearest=nearest, command=path)
    # Of click's other complaints only the word they are about is kept: the rest is in English.
    words = re.search(r"\((.+)\)", problem.format_message())
    name = getattr(problem, "option_name", None) or (words.group(1) if words else problem.format_message())
    return UsageError("USE-10", name=name, command=path)


def _wanted(kind: click.ParamType) -> str:
    """What a type takes, in words, with its bounds: «un número entero, ≥ 8»."""
    plain = kind.name.removesuffix(" range")
    bounds = {"≥": getattr(kind, "min", None), "≤": getattr(kind, "max", None)}
    said = [f"{sign} {value}" for sign, value in bounds.items() if value is not None]
    return ", ".join([say(f"type.{plain}") if has(f"type.{plain}") else plain, *said])


def too_long(problem: OSError) -> UsageError | None:
    """USE-15 for a name that no system takes; None for any other trouble with files."""
    if problem.errno != errno.ENAMETOOLONG:
        return None
    return UsageError("USE-15", found=str(problem.filename)[:40])


def _options(ctx: click.Context | None) -> list[str]:
    return [name for p in (ctx.command.params if ctx else []) for name in p.opts if name.startswith("--")]
