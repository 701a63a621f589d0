"""The data doctor's report: an audit to words, and to one HTML page that opens offline, prints and asks for nothing.

    told(audit.findings[0], audit)     Told(sign="✗", title="12 filas con letras rotas…", why="…", repair="maese …")
    doctor_html(audit)                 "<!doctype html>…": health, findings and their rows, lengths drawn and in a table

The terminal says the same words; both take them from here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from maese.report.page import render
from maese.say import has, number, percent, quantity, say
from maese.text.findings import Audit, Finding

SIGNS = {"error": "✗", "warning": "!", "info": "·"}
SHOWN_LINES, SHOWN_LABELS = 12, 5
# Their share of the rows says nothing: they are of the whole.
# Of a raw text, whose other faults are counted by line.
OF_DOCUMENTS = ("exact_duplicate", "near_duplicate", "leak", "eval_leak", "language", "repetitive", "too_long")
OF_THE_WHOLE = ("encoding", "all_equal", "few_rows", "little_text", "bom")


@dataclass(frozen=True)
class Told:
    """A finding in words."""

    kind: str
    severity: str
    sign: str
    title: str
    share: str  # empty when it is of the whole
    why: str
    repair: str
    lines: str
    examples: tuple[dict[str, Any], ...]


def told(finding: Finding, audit: Audit) -> Told:
    """A finding in the words of the current language, with the command that repairs it."""
    facts = {
        **finding.facts,
        "n": finding.count,
        "labels": _labels(finding),
        "path": shlex.quote(audit.path),
        "line": _line(finding, number),
    }
    share = "" if finding.kind in OF_THE_WHOLE else share_of(finding.count, audit, finding.kind in OF_DOCUMENTS)
    typed = {**facts, "line": _line(finding, str)}
    title, why = (say(f"finding.{finding.kind}.{part}", **facts) for part in ("title", "why"))
    # What is pasted is not localised: 1.024 would be another number.
    repair = say(f"finding.{finding.kind}.repair", **{k: str(v) for k, v in typed.items()})
    return Told(
        finding.kind, finding.severity, SIGNS[finding.severity], title, share, why, repair, lines_of(finding),
        tuple(finding.examples),
    )  # fmt: skip


def _line(finding: Finding, write: Callable[[int], str]) -> str:
    first = finding.lines[0] if finding.lines else 1
    return write(first) if isinstance(first, int) else first


def share_of(count: int, audit: Audit, of_documents: bool = False) -> str:
    """`share_of(1, audit)` of 45,000 rows is «menos de 0,1 %», never «0,0 %»."""
    share = count / (max(audit.rows, 1) if of_documents else audit.units)
    return f"{say('doctor.less')} {percent(0.001)}" if share < 0.0005 else percent(share)


def lines_of(finding: Finding) -> str:
    """The first line numbers, and how many more there are."""
    if not finding.lines or finding.kind in ("all_equal", "few_rows", "little_text"):
        return ""
    first = ", ".join(str(line) for line in finding.lines[:SHOWN_LINES])
    more = len(finding.lines) - SHOWN_LINES
    word = say("doctor.line" if len(finding.lines) == 1 else "doctor.lines")
    return f"{word} {first}" + (f" {say('doctor.more', n=more)}" if more > 0 else "")


def _labels(finding: Finding) -> str:
    names, labels = [], finding.facts.get("labels", {})
    for label, count in list(labels.items())[:SHOWN_LABELS]:
        for key in (f"finding.{finding.kind}.label.{label}", f"reason.language_name.{label}"):
            if has(key):
                label = say(key)
        names.append(label if finding.count == count else f"{label}: {number(count)}")
    return ", ".join([*names, *["…"] * (len(labels) > SHOWN_LABELS)])


def headline(audit: Audit) -> str:
    """«datos/tutor.jsonl · 1.842 conversaciones · 471.000 tokens · español 99 %»."""
    if audit.tokens is None:
        size = say("doctor.size.characters", characters=quantity(audit.characters))
    else:
        size = say("doctor.size.tokens", tokens=quantity(audit.tokens))
    kind = "talk" if audit.counts.get("conversations") else "text"
    return say(f"doctor.header.{kind}", path=audit.path, n=audit.rows, size=size, language=_language(audit))


def _language(audit: Audit) -> str:
    """The commonest language and its share of the rows whose language can be told."""
    known = {name: count for name, count in audit.languages.items() if name != "?"}
    if not known:
        return ""
    name, count = max(known.items(), key=lambda pair: pair[1])
    share = percent(count / sum(known.values()), 0)
    return say("doctor.spoken", language=say(f"reason.language_name.{name}"), share=share)


def verdict(audit: Audit) -> str:
    """«Salud: BUENA con 3 avisos»."""
    counts = [(severity, len(audit.of(severity))) for severity in SIGNS]
    what = [say(f"doctor.count.{severity}", n=n) for severity, n in counts if n]
    health = say(f"doctor.health.{audit.health}")
    if not what:
        return say("doctor.verdict.none", health=health)
    listed = say("doctor.and").join(filter(None, [", ".join(what[:-1]), what[-1]]))
    return say("doctor.verdict.some", health=health, what=listed)


def excluded(audit: Audit) -> str:
    """How many rows will not be learnt from; empty when all of them will."""
    n = len(audit.faulty)
    return say("doctor.excluded", n=n, share=share_of(n, audit)) if n else ""


def learnt(audit: Audit) -> str:
    return say("doctor.learnt", share=percent(audit.learnt, 0)) if audit.learnt is not None else ""


def quantiles(audit: Audit) -> str:
    return say("doctor.quantiles", **audit.lengths)


def doctor_html(audit: Audit) -> str:
    """A whole page, in the current language. Everything that comes from the data is escaped."""
    from markupsafe import Markup

    return render(
        "views/doctor.html",
        {
            "audit": audit, "headline": headline(audit), "verdict": verdict(audit), "excluded": excluded(audit),
            "learnt": learnt(audit), "mood": {"good": "good", "fair": "care", "bad": "bad"}[audit.health],
            "findings": [told(finding, audit) for finding in audit.findings], "quantiles": quantiles(audit),
            "bars": _bars(audit), "drawing": Markup(histogram_svg(audit)) if audit.histogram else "",
            "private": any(finding.kind == "personal" for finding in audit.findings),
        },
    )  # fmt: skip


def _bars(audit: Audit) -> list[tuple[str, str, str]]:
    return [(number(start), number(end - 1), number(count)) for start, end, count in audit.histogram]


def histogram_svg(audit: Audit, width: int = 720, height: int = 260) -> str:
    """The lengths as bars, with the limit as a dashed line. No script and no font: it draws itself anywhere."""
    bars = audit.histogram
    left, top, bottom = 56, 28, height - 44
    step, tallest = (width - left - 12) / len(bars), max(count for _, _, count in bars) or 1
    name = say(f"doctor.lengths.{audit.unit}")
    parts = [
        f'<svg class="mz-bars" role="img" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="{escape(name)}: {escape(quantiles(audit))}">'
    ]
    for i, (start, end, count) in enumerate(bars):
        tall = (bottom - top) * count / tallest
        x, y = left + i * step, bottom - tall
        # Past the limit the bar is hollow: in greyscale too one sees what would not fit.
        past = audit.limit is not None and start >= audit.limit
        shape = ' class="mz-past"' if past else ""
        tip = f"{number(start)}–{number(end - 1)}: {number(count)}"
        parts.append(
            f'<rect{shape} x="{x + 1:.1f}" y="{y:.1f}" width="{max(1, step - 2):.1f}" height="{tall:.1f}">'
            f"<title>{escape(tip)}</title></rect>"
        )
        if i % 2 == 0 or len(bars) < 9:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(number(start))}</text>')
    parts.append(f'<line class="mz-axis" x1="{left}" y1="{bottom}" x2="{width - 12}" y2="{bottom}"/>')
    parts.append(f'<text x="{left - 8}" y="{top + 4}" text-anchor="end">{escape(number(tallest))}</text>')
    parts.append(f'<text x="{left - 8}" y="{bottom}" text-anchor="end">0</text>')
    parts.append(f'<text x="{width - 12}" y="{height - 6}" text-anchor="end">{escape(name.lower())}</text>')
    parts += _limit_mark(audit, left, step, top, bottom)
    return "".join([*parts, "</svg>"])


def _limit_mark(audit: Audit, left: int, step: float, top: int, bottom: int) -> list[str]:
    wide = audit.histogram[0][1] - audit.histogram[0][0]
    if audit.limit is None or audit.limit > wide * len(audit.histogram):
        return []
    x = left + step * audit.limit / wide
    label = escape(say("doctor.limit", limit=audit.limit))
    side = "end" if audit.limit > wide * len(audit.histogram) / 2 else "start"
    shift = -6 if side == "end" else 6
    return [
        f'<line class="mz-limit" x1="{x:.1f}" y1="{top - 14}" x2="{x:.1f}" y2="{bottom}"/>',
        f'<text class="mz-strong" x="{x + shift:.1f}" y="{top - 6}" text-anchor="{side}">{label}</text>',
    ]
