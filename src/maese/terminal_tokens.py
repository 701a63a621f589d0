"""Tokens in the terminal: what is learnt of a row, and tokenizers side by side."""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from maese.say import has, number, percent, say

# Each state told by its marks as well as by its colour: `⟦learnt⟧`, `✂cut✂`.
OPEN = {"learnt": "⟦", "cut": "✂ ", "context": "", "special": ""}
CLOSE = {"learnt": "⟧", "cut": " ✂", "context": "", "special": ""}
# Two shades, so that one token is told from the next.
SHADES = {
    "learnt": ("bold green", "bold bright_green"), "context": ("", "dim"), "cut": ("red strike", "bright_red strike"),
    "special": ("cyan", "cyan"),
}  # fmt: skip


def show_rows(rows: list[dict[str, Any]], json: bool = False, quiet: int = 0) -> None:
    """Rows as the model sees them, with the share that is learnt."""
    if json:
        sys.stdout.write(jsons.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        kept = [piece for piece in row["pieces"] if piece["state"] != "cut"]
        learnt = sum(piece["state"] == "learnt" for piece in kept)
        share = percent(learnt / len(kept)) if kept else "—"
        said = say("show.row", id=row["id"], tokens=number(row["tokens"]), learnt=number(learnt), share=share)
        console.print(said, style="bold", markup=False)
        console.print(mask_text(row["pieces"]))
        console.print()
    if not quiet:
        console.print(say("show.key"), style="dim", markup=False)


def mask_text(pieces: list[dict[str, Any]]) -> Any:
    """The tokens of a row as a rich text."""
    from rich.text import Text

    text, state = Text(), "context"
    for i, piece in enumerate(pieces):
        now = piece["state"] if piece["state"] in OPEN else "context"
        if (now in ("learnt", "cut") or state in ("learnt", "cut")) and now != state:
            text.append(CLOSE[state] + OPEN[now], style="dim")
        state = now
        text.append(piece["text"].replace("⏎", "⏎\n"), style="cyan" if piece["special"] else SHADES[now][i % 2])
    text.append(CLOSE[state], style="dim")
    return text


def show_tables(tables: list[Any], result: dict[str, Any], json: bool = False, quiet: int = 0) -> None:
    """Tokenizers side by side."""
    if json:
        sys.stdout.write(jsons.dumps(result, ensure_ascii=False, indent=1) + "\n")
        return
    draw(tables)


def draw(tables: list[Any], talk: bool = False) -> None:
    """Tables on stdout, or on stderr where they are talk and not the result."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=talk, highlight=False)
    for each in tables:
        if least(each) > console.width:  # more columns than there is room for, and few rows
            each = turned(each)
        table = Table(title=each.title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
        for i, header in enumerate(each.headers):
            figures = i and each.rows and each.rows[0][i][:1].isdigit()
            table.add_column(header, justify="right" if figures else "left", overflow="fold", no_wrap=not i)
        for row in each.rows:
            table.add_row(*row)
        console.print(table)


def least(table: Any) -> int:
    """Signs of the narrowest that a table can be without cutting a word."""
    cells = zip(table.headers, *table.rows, strict=True)
    return sum(max(len(word) for text in column for word in text.split() or [""]) + 3 for column in cells)


def turned(table: Any) -> Any:
    """The table with its columns as rows, if it is narrower so."""
    headers, *rows = [list(row) for row in zip(table.headers, *table.rows, strict=True)]
    other = replace(table, headers=headers, rows=rows)
    return other if least(other) < least(table) else table


@contextmanager
def bar(json: bool = False, quiet: int = 0) -> Iterator[Callable[[int, str], None] | None]:
    """A bar of megabytes read, and the stages after it; nothing where there is nobody to look."""
    from rich.console import Console

    console = Console(stderr=True)
    if json or quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(say("tokenizer.stage.read"), total=None, size="")

        def tell(done: int, stage: str) -> None:
            name = say(f"tokenizer.stage.{stage}") if has(f"tokenizer.stage.{stage}") else stage
            progress.update(task, description=name, size=f"{number(done / 1e6, 0)} MB")

        yield tell
