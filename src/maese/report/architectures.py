"""The page of an encoder and a decoder side by side: what each learnt, what each is for.

    write(found, Path("runs/2026-11-21-architectures"))     report/index.html

In go the figures of `train.architectures`; `table` gives the same ones to the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maese.report.curves import svg
from maese.report.page import render
from maese.run import write_whole
from maese.say import duration, number, percent, quantity, say
from maese.tokens.compare import Table

KINDS = ("encoder", "decoder")
FIGURES = ("hole_accuracy", "perplexity", "similarity", "probe", "probe_tuned")


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write report/index.html in the current language; returns where it is."""
    path = folder / "report" / "index.html"
    write_whole(path, render("architectures.html", context(found)))
    return path


def context(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows, in its order."""
    from markupsafe import Markup

    curves = []
    for kind in KINDS:
        history = [{"type": "step", "step": i, "loss": loss} for i, loss in enumerate(found[kind]["loss"], 1)]
        sizes = [("wide", Markup(svg(history))), ("narrow", Markup(svg(history, 340, 330)))]
        curves.append((say(f"architectures.{kind}"), sizes))
    return {
        "table": table(found),
        "curves": curves,
        "wrote": [(say(f"architectures.{kind}"), found[kind]["wrote"]) for kind in KINDS],
        "opening": found["opening"],
        "meanings": [(say(f"architectures.{key}"), say(f"architectures.{key}_means")) for key in FIGURES],
        "settings": found["settings"] | {"learnt": found["rows"][0], "held": found["rows"][1]},
        "classes": ", ".join(found["classes"]),
    }


def table(found: dict[str, Any]) -> Table:
    """Every figure of both, a row each."""
    how = {"perplexity": lambda value: number(value, 1)}
    rows = [
        [say("architectures.parameters"), *(quantity(found[kind]["parameters"]) for kind in KINDS)],
        [say("architectures.seconds"), *(duration(found[kind]["seconds"]) for kind in KINDS)],
    ]
    for key in FIGURES:
        values = [found[kind][key] for kind in KINDS]
        shown = [say("architectures.none") if v is None else how.get(key, percent)(v) for v in values]
        rows.append([say(f"architectures.{key}"), *shown])
    heads = [say("architectures.figure"), *(say(f"architectures.{kind}") for kind in KINDS)]
    return Table(say("architectures.table"), heads, rows)
