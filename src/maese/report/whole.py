"""The page of a model made from nothing: its data, its vocabulary, its trainings and what came of them, in order.

    write(run, ["pretrain", "instruct"])     runs/…-minigpt/report/index.html

In goes the folder of the whole, with a run for each training; a stage that was not done is left out. `tables` gives
the same figures to the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maese.report.curves import svg
from maese.report.diagnosis import diagnose
from maese.report.facts import facts
from maese.report.lines import sentence
from maese.report.page import render
from maese.report.summary import shown
from maese.run import Run, disk
from maese.say import duration, has, number, percent, quantity, say
from maese.text.clean import reason_name
from maese.tokens.compare import Table, label, overall

SIDES = ("read", "train", "validation")
KNOWN = {"source", "weight", "characters", *SIDES}
SHOWN = 10  # answers on the page: the first ones, not the best


def write(run: Run, trainings: list[str]) -> Path:
    """Write report/index.html in the current language, whole or not at all."""
    with disk(run.report):
        run.report.mkdir(parents=True, exist_ok=True)
    run.write("report/index.html", render("whole.html", context(run, trainings)))
    return run.report / "index.html"


def context(run: Run, trainings: list[str]) -> dict[str, Any]:
    """Everything the page shows, in the order it shows it."""
    parts = [_part(run, training) for training in trainings if (run.path / training / "events.jsonl").exists()]
    scores = run.read("scores.json") or {}
    said = scores.get("answers", {})
    return {
        "name": run.path.name,
        "tiles": _tiles(run, parts, scores),
        "data": data_tables(run.read("counts.json") or {}),
        "tokenizer": tokenizer_tables(run.read("tokenizers.json")),
        "parts": parts,
        "scores": score_tables(scores),
        "answers": list(zip(said.get("questions", []), said.get("said", []), strict=True))[:SHOWN],
    }


def _part(run: Run, training: str) -> dict[str, Any]:
    """A training in short: its verdict and its curve; the rest is on its own page."""
    from markupsafe import Markup

    part = Run(run.path / training)
    history, figures = part.history(), facts(part)
    verdict = diagnose(history, [], alive=part.holder() is not None)
    keys = (("steps", number), ("tokens", quantity), ("seconds", duration), ("peak_gib", _gib))
    return {
        "name": training,
        "title": say(f"stage.{training}.title"),
        "verdict": verdict,
        "figures": [(say(f"whole.figure.{key}"), shown(figures[key], how)) for key, how in keys],
        "parameters": figures["parameters"],
        "curves": [("wide", Markup(svg(history))), ("narrow", Markup(svg(history, 340, 330)))],
        "sentence": sentence(history),
        "link": f"../{training}/report/index.html",
    }


def _gib(value: float) -> str:
    return say("report.unit.gib", value=number(value, 1))


def _tiles(run: Run, parts: list[dict[str, Any]], scores: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    if parts:
        found.append(("parameters", shown(parts[0]["parameters"], quantity)))
    for kept, by in scores.get("bits_per_byte", {}).items():
        found.append((f"bits_{kept}", number(by[list(by)[-1]]["value"], 3)))
    if answers := scores.get("answers"):
        found.append(("ended", percent(answers["ended"] / max(1, answers["asked"]))))
    named = ((say(f"whole.tile.{key}"), value, say(f"whole.note.{key}")) for key, value in found)
    return [dict(zip(("label", "value", "note"), each, strict=True)) for each in named]


def data_tables(counts: dict[str, list[dict[str, Any]]]) -> list[Table]:
    """For each training, what its sources gave and what was left out, with its reason."""
    made = []
    for training, sources in counts.items():
        reasons = sorted({key for source in sources for key in source if key not in KNOWN})
        heads = [say("whole.column.source"), *(say(f"whole.column.{key}") for key in SIDES)]
        heads += [*(reason_name(reason) for reason in reasons), say("whole.column.characters")]
        rows = [
            [
                Path(source["source"]).name + (f" × {number(source['weight'])}" if source["weight"] != 1 else ""),
                *(number(source.get(key, 0)) for key in (*SIDES, *reasons)),
                quantity(source.get("characters", 0)),
            ]
            for source in sources
        ]
        if len(rows) > 1:
            total = [number(sum(source.get(key, 0) for source in sources)) for key in (*SIDES, *reasons)]
            rows.append([say("whole.total"), *total, quantity(sum(s.get("characters", 0) for s in sources))])
        made.append(Table(say(f"stage.{training}.data"), heads, rows))
    return made


def tokenizer_tables(found: dict[str, Any] | None) -> list[Table]:
    """The new vocabulary beside the others."""
    if not found:
        return []
    kinds = list(found["kinds"])
    heads = [say("tokenizer.column.name"), say("tokenizer.column.vocabulary"), say("tokenizer.column.characters")]
    rows = [
        [
            row["label"], number(row["vocabulary"]), number(overall(found, row, "characters_per_token"), 2),
            *(number(row["kinds"][kind]["characters_per_token"], 2) for kind in kinds),
        ]
        for row in found["tokenizers"]
    ]  # fmt: skip
    return [Table(say("tokenizer.table.kinds"), [*heads, *map(label, kinds)], rows)]


def score_tables(scores: dict[str, Any]) -> list[Table]:
    """Bits per byte of each model on each text, and how often it prefers the right sentence."""
    if not scores:
        return []
    models = list(scores["pairs"])
    heads = [say("whole.column.text"), *(say(f"stage.{model}.title") for model in models), say("whole.column.bytes")]
    bits = [
        [say(f"whole.kept.{kept}"), *(number(by[m]["value"], 3) for m in models), quantity(by[models[0]]["bytes"])]
        for kept, by in scores["bits_per_byte"].items()
    ]
    kinds = scores["pairs"][models[0]]
    rows = [[say(f"whole.pairs.{kind}"), *(_share(scores["pairs"][m][kind]) for m in models)] for kind in kinds]
    whole = [[sum(n) for n in zip(*scores["pairs"][m].values(), strict=True)] for m in models]
    rows.append([say("whole.total"), *map(_share, whole)])
    made = [Table(say("whole.table.bits"), heads, bits), Table(say("whole.table.pairs"), heads[:-1], rows)]
    if answers := scores.get("answers"):
        made.append(_answers(answers))
    return made


def _answers(found: dict[str, Any]) -> Table:
    rows = [
        [say("whole.answers.ended"), _share((found["ended"], found["asked"]))],
        [say("whole.answers.spanish"), _share((found["spanish"], found["told"]))],
    ]
    return Table(say("whole.table.answers"), [say("whole.column.question"), say("whole.column.share")], rows)


def _share(of: Any) -> str:
    """`_share((3, 4))` is «75 % (3/4)»."""
    done, asked = of
    return f"{percent(done / max(1, asked), 0)} ({number(done)}/{number(asked)})"


def tables(stage: str, found: Any) -> list[Table]:
    """What a stage came to, for the terminal."""
    made = {"data": data_tables, "tokenizer": tokenizer_tables, "evaluate": score_tables}
    return made[stage](found) if stage in made else []


def sizes(rows: list[tuple[str, dict[str, Any]]], chosen: str) -> Table:
    """The sizes there are, the one that is made marked: `("mini", {"layers": 8, …})`."""
    keys = ("layers", "heads", "width", "vocabulary", "context", "parameters")
    heads = [say("whole.column.size"), *(say(f"whole.column.{key}") for key in keys)]
    body = [[("▸ " if name == chosen else "  ") + name, *(number(row[key]) for key in keys)] for name, row in rows]
    return Table(say("whole.table.sizes"), heads, body)


def named(stage: str) -> str:
    return say(f"stage.{stage}.title") if has(f"stage.{stage}.title") else stage
