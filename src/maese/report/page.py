"""The report of a run: one HTML file that opens offline, prints, and can be written again years later.

    write(run)     runs/…/report/index.html

In goes the run folder, whatever of it there is; out comes a page where each figure has its unit and the missing ones
say so. The words are in the catalogues and the shape is in page.html; here the facts are only put in order.
"""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Any

from maese.report.curves import svg
from maese.report.diagnosis import Diagnosis, diagnose
from maese.report.facts import facts, finite, series
from maese.report.lines import sentence
from maese.report.samples import film, pairs, proof
from maese.report.summary import arrow, shown
from maese.run import Event, Run, disk
from maese.say import duration, has, language, number, percent, quantity, say
from maese.text.clean import reason_name

# A sign beside the colour, for those who do not see the colour.
GOOD, CARE, BAD = ("good", "✓"), ("care", "!"), ("bad", "✕")
MOODS = {
    "learning": GOOD,
    "settled": GOOD,
    "diverged": BAD,
    "diverged_nan": BAD,
    "failed": BAD,
    "worse": BAD,
    "too_high": BAD,
}
PLAN = ("rows", "tokens", "targets", "validation_rows", "validation_tokens", "steps", "epochs", "micro_batch",
        "accumulation", "max_length", "precision", "device", "threads", "memory_gib")  # fmt: skip
FEW_TOKENS = 20_000  # under this many held-out tokens, a second decimal of the loss is noise


def write(run: Run) -> Path:
    """Write report/index.html in the current language, whole or not at all."""
    with disk(run.report):
        run.report.mkdir(parents=True, exist_ok=True)
    run.write("report/index.html", render("page.html", context(run)))
    return run.report / "index.html"


def render(template: str, content: dict[str, Any]) -> str:
    """Fill a template of this folder. Everything is escaped: what a model writes is text, never markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.globals |= {"say": say, "lang": language()}
    return room.get_template(template).render(content)


def context(run: Run) -> dict[str, Any]:
    """Everything the page shows, in the order it shows it."""
    from markupsafe import Markup

    history, figures = run.history(), facts(run)
    comparison = run.read("compare.json")
    written = pairs(history, comparison)
    verdict = diagnose(history, [pair["after"] for pair in written if pair["after"]], alive=run.holder() is not None)
    data = run.read("data.json") or {}
    mood, sign = MOODS.get(verdict.kind, CARE)
    return {
        "figures": figures,
        "subtitle": _subtitle(figures),
        "verdict": verdict,
        "mood": mood,
        "sign": sign,
        "tiles": _tiles(figures),
        "pairs": written,
        "comparison": comparison,
        "proof": proof(comparison),
        "film": film(history),
        # Two drawings of one curve: letters that fit a page would be dust on a telephone.
        "curves": [("wide", Markup(svg(history))), ("narrow", Markup(svg(history, 340, 330)))],
        "sentence": sentence(history),
        "checks": _checks(history, figures),
        "sources": [_source(source) for source in data.get("sources", [])],
        "data": _data(data, run),
        "method": _method(run, figures),
        "plan": _plan(history),
        "recipe": _text(run.path / "recipe.yaml"),
        "environment": _environment(run.read("environment.json")),
        "command": f"maese train {shlex.quote(f'{run.path}/recipe.yaml')} output={shlex.quote(f'{run.path}-2')}",
        "limits": _limits(figures, data, written, verdict),
    }


def _subtitle(f: dict[str, Any]) -> str:
    names = [_base(f), method_name(f["method"])]
    return " · ".join([*names, _date(f["started"])] if f["started"] else names)


def method_name(kind: str | None) -> str:
    return say(f"report.method.{kind}") if has(f"report.method.{kind}") else shown(kind, str)


def _base(f: dict[str, Any]) -> str:
    return say(f"report.base.{f['base']}") if has(f"report.base.{f['base']}") else shown(f["base"], str)


def _date(written: str) -> str:
    moment = datetime.datetime.fromisoformat(written)
    month = say("report.months").split()[moment.month - 1]
    return say("report.date", day=moment.day, month=month, year=moment.year, time=f"{moment:%H:%M}")


def _tiles(f: dict[str, Any]) -> list[dict[str, str]]:
    """Each figure with its label and, under it, its unit and on how much it was measured."""
    held = shown(f["validation_tokens"], number)
    change = f["validation_change_percent"]
    sign = "" if change is None else ("▼ " if change < 0 else "▲ ")
    kept = shown(f["validation_kept_step"], number)
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("validation", arrow(f["validation_initial"], f["validation_kept"], 2), {"tokens": held}),
        ("change", sign + shown(change, lambda v: percent(abs(v) / 100)), {"step": kept}),
        ("perplexity", arrow(f["perplexity_initial"], f["perplexity_kept"], 1), {"tokens": held}),
        ("training", arrow(f["loss_initial"], f["loss_final"], 2), {"n": f["steps"] or 0}),
        ("time", shown(f["seconds"], duration), {"n": f["steps"] or 0}),
        ("speed", shown(f["tokens_s"], lambda v: number(v, 0)), {}),
        ("memory", shown(f["peak_gib"], lambda v: say("report.unit.gib", value=number(v, 2))), {}),
        ("trainable", shown(f["trainable"], quantity), {
            "parameters": shown(f["parameters"], quantity), "share": shown(f["share"], percent)}),
    )  # fmt: skip
    return [
        {"label": say(f"report.tile.{key}.label"), "value": value, "note": say(f"report.tile.{key}.note", **note)}
        for key, value, note in rows
    ]


def _checks(history: list[Event], f: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for event in series(history, "validation"):
        loss, perplexity = finite(event.get("loss")), finite(event.get("perplexity"))
        first = f["validation_initial"]
        change = "—" if not first or loss is None else percent(loss / first - 1)
        rows.append({
            "step": number(event["step"]),
            "loss": shown(loss, lambda v: number(v, 4)),
            "perplexity": shown(perplexity, lambda v: number(v, 2)),
            "change": change,
            "best": event["step"] == f["validation_best_step"],
        })  # fmt: skip
    return rows


def _source(source: dict[str, Any]) -> dict[str, Any]:
    notes = [say(key, **told) if has(key) or has(f"{key}.other") else key for key, told in source.get("notes", [])]
    counts = {k: shown(source.get(k), number) for k in ("documents", "characters", "bytes")}
    return {
        "path": source.get("path", "—"),
        "counts": say("report.page.source_counts", **counts),
        "sha256": shown(source.get("sha256"), str),
        "notes": notes,
    }


def _data(data: dict[str, Any], run: Run) -> list[str]:
    """What was learnt from, what was kept apart and how, and what was left out."""
    lines = []
    for side in ("train", "validation"):
        counts = data.get(side) or {}
        told = {k: shown(counts.get(k), number) for k in ("rows", "tokens", "targets")}
        lines.append(say(f"report.page.side_{side}", **told))
    if has(f"report.split.{data.get('split')}"):
        lines.append(say(f"report.split.{data['split']}"))
    dropped = {k: v for k, v in (data.get("dropped") or {}).items() if v}
    for reason, count in dropped.items():
        lines.append(say("report.page.dropped", reason=reason_name(reason), n=count))
    return lines if data else [say("report.page.no_data", file=str(run.path / "data.json"))]


def _method(run: Run, f: dict[str, Any]) -> str:
    told = {
        "method": method_name(f["method"]),
        "base": _base(f),
        "trainable": shown(f["trainable"], quantity),
        "parameters": shown(f["parameters"], quantity),
        "share": shown(f["share"], percent),
    }
    words = [say("report.page.method", **told)]
    words[0] = words[0][:1].upper() + words[0][1:]
    if (run.path / "recipe.yaml").is_file():
        recipe = run.recipe()
        if recipe.method.adapts:
            words.append(say("report.page.lora", rank=recipe.method.rank, alpha=f"{recipe.method.alpha:g}"))
        words.append(say(f"report.page.keeps_{recipe.train.final}", step=shown(f["validation_kept_step"], number)))
    return " ".join(words)


def _plan(history: list[Event]) -> list[tuple[str, str]]:
    plan = next((e for e in reversed(history) if e["type"] == "plan"), {})
    return [(say(f"report.plan.{key}"), shown(plan.get(key), _plain)) for key in PLAN]


def _environment(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not found:
        return []
    rows = [(say(f"report.environment.{key}"), shown(found.get(key), str)) for key in ("maese", "python", "system",
            "machine", "cores")]  # fmt: skip
    packages = [f"{name} {version}" for name, version in (found.get("packages") or {}).items()]
    return [*rows, (say("report.environment.packages"), ", ".join(packages) or say("report.missing"))]


def _limits(f: dict[str, Any], data: dict, written: list, verdict: Diagnosis) -> list[str]:
    """What this run cannot tell, said by the report itself and not left to the reader."""
    tokens = f["validation_tokens"]
    lines = [say("report.limit.no_validation")]
    if tokens is not None:
        rows = shown((data.get("validation") or {}).get("rows"), number)
        lines = [say("report.limit.validation", tokens=number(tokens), rows=rows)]
        if tokens < FEW_TOKENS:
            lines.append(say("report.limit.small"))
        lines.append(say("report.limit.loss"))
    lines.append(say("report.limit.seed"))
    if written:
        lines.append(say("report.limit.samples", n=len(written)))
    if f["resumes"]:
        lines.append(say("report.limit.resumed", n=f["resumes"]))
    if verdict.kind == "interrupted":
        lines.append(say("report.limit.unfinished"))
    return lines


def _plain(value: Any) -> str:
    """A figure of the plan: numbers as people write them (3 epochs, not 3,00), the rest as it is."""
    if finite(value) is None:
        return str(value)
    return number(int(value) if value == int(value) else value)


def _text(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None
