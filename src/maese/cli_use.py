"""`maese generate` and `maese chat`, and the options of writing that `compare` shares with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from maese.say import say
from maese.spoken import Command, Decimal


def writing_options(command: Any) -> Any:
    """The ways of writing, the same for `generate`, `chat` and `compare`."""
    for option in reversed(
        [
            click.option("--max-new-tokens", type=int, metavar="N", help=say("cli.write.max_new_tokens")),
            click.option("--temperature", type=Decimal(), metavar="N", help=say("cli.write.temperature")),
            click.option("--greedy", is_flag=True, help=say("cli.write.greedy")),
            click.option("--top-k", type=int, metavar="N", help=say("cli.write.top_k")),
            click.option("--top-p", type=Decimal(), metavar="N", help=say("cli.write.top_p")),
            click.option("--repetition-penalty", type=Decimal(), metavar="N", help=say("cli.write.repetition_penalty")),
            click.option("--sentences", type=int, metavar="N", help=say("cli.write.sentences")),
            click.option("--stop", multiple=True, metavar=say("cli.metavar.text"), help=say("cli.write.stop")),
            click.option("--seed", type=int, metavar="N", help=say("cli.write.seed")),
            click.option("--system", metavar=say("cli.metavar.text"), help=say("cli.write.system")),
        ]
    ):
        command = option(command)
    return command


def persona_option(command: Any) -> Any:
    """Who writes, the same for `generate` and `chat`."""
    metavar, words = say("cli.metavar.name"), say("cli.write.persona")
    return click.option("--persona", "personas", multiple=True, metavar=metavar, help=words)(command)


def settings_of(greedy: bool, stop: tuple[str, ...], **given: Any) -> dict[str, Any]:
    """Only what was asked for, so that the recipe decides the rest."""
    chosen = {key: value for key, value in given.items() if value is not None}
    return chosen | ({"temperature": 0.0} if greedy else {}) | ({"stop": list(stop)} if stop else {})


@click.command(cls=Command, help=say("cli.generate.help"))
@click.argument("model", metavar=say("cli.metavar.model"))
@click.argument("prompt", metavar=say("cli.metavar.prompt"))
@click.option("--base", is_flag=True, help=say("cli.generate.base"))
@persona_option
@writing_options
@click.pass_context
def generate(ctx: click.Context, model: str, prompt: str, base: bool, personas: tuple[str, ...], **given: Any) -> None:
    from maese import terminal

    settings = settings_of(**given)
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    from maese.generate.personas import open_company, shipped

    if personas or model in shipped():
        terminal.answers(open_company(model, personas), prompt, base, settings, **ctx.obj)
        return
    from maese.generate.engine import open_writer

    terminal.answer(open_writer(model, base), prompt, settings, **ctx.obj)


@click.command(cls=Command, help=say("cli.chat.help"))
@click.argument("model", metavar=say("cli.metavar.model"))
@persona_option
@click.option("--save", type=click.Path(path_type=Path), metavar=say("cli.metavar.file"), help=say("cli.chat.save"))
@writing_options
@click.pass_context
def chat(ctx: click.Context, model: str, personas: tuple[str, ...], save: Path | None, **given: Any) -> None:
    from maese import run, terminal_chat

    settings = settings_of(**given)
    if save:  # before anything is opened; afterwards the file is this conversation's
        run.refuse_taken(save)
    from maese.generate.personas import open_company

    terminal_chat.chat(open_company(model, personas), settings, save, **ctx.obj)
