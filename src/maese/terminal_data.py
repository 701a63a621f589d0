"""What the data commands show in a terminal: the doctor's report, in at most 80 columns.

    show_audit(audit)      header, health, each finding with its rows and its repair, and the lengths as bars

stdout carries the result: the report, or JSON. Where the console cannot write ✗ or █ plain signs take their place.
"""

from __future__ import annotations

import json as jsons
import shutil
import sys
import textwrap

from maese.report.views import doctor
from maese.say import number, say
from maese.text.clean import reason_name
from maese.text.findings import Audit
from maese.text.mend import Mended

WIDEST = 80
PLAIN = str.maketrans({"✗": "x", "·": "-", "█": "#", "▌": "#", "┊": "|", "→": ">", "…": ".", "•": "*", "≥": ">"})
COLOURS = {"error": "31", "warning": "33", "info": "2", "good": "32", "fair": "33", "bad": "31"}


def show_audit(audit: Audit, json: bool = False, quiet: int = 0) -> None:
    """Write the report to stdout: whole, without examples and reasons (quiet: 1), only its verdict (2), or as JSON."""
    if json:
        sys.stdout.write(jsons.dumps(audit.json(), ensure_ascii=False) + "\n")
        return
    sys.stdout.write("\n".join(map(_writable, report(audit, quiet))) + "\n")
    sys.stdout.flush()


def report(audit: Audit, quiet: int = 0) -> list[str]:
    """The lines of the report, none wider than the terminal or 80 columns except a command, which is pasted whole."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    lines = [] if quiet > 1 else _wrapped(doctor.headline(audit), width, "")
    lines.append(_coloured(doctor.verdict(audit), audit.health))
    if quiet > 1:
        return lines
    for told in (doctor.told(finding, audit) for finding in audit.findings):
        lines += ["", *_finding(told, width, quiet)]
    shown = [text for text in (doctor.excluded(audit), doctor.learnt(audit)) if text]
    lines += ["", *(line for text in shown for line in _wrapped(text, width, ""))] if shown else []
    if not quiet and audit.histogram:
        lines += ["", *_histogram(audit, width)]
    return lines


def _finding(told: doctor.Told, width: int, quiet: int) -> list[str]:
    title = f"{told.title} · {told.share}" if told.share else told.title
    first, *rest = _wrapped(title, width - 4, "")
    lines = [f"  {_coloured(told.sign, told.severity)} {first}"[:None], *(f"    {line}" for line in rest)]
    if quiet:
        return lines
    if told.lines:
        lines += _wrapped(told.lines, width, "    ")
    for example in told.examples:
        if example["text"]:
            like = f" {say('doctor.first', line=example['first'])}" if example.get("first") else ""
            head = f"    {example['line']}{like}: "
            lines.append(head + _around(example["text"], example["at"], max(20, width - len(head))))
    lines += _wrapped(told.why, width, "    ")
    return [*lines, f"    {say('doctor.try')}: {told.repair}"]


def _histogram(audit: Audit, width: int) -> list[str]:
    """A bar a step, and the limit beside the one it falls in."""
    bars, tallest = audit.histogram, max(count for _, _, count in audit.histogram)
    names = [f"{number(start)}–{number(end - 1)}" for start, end, _ in bars]
    counts = [number(count) for _, _, count in bars]
    wide, tall = max(map(len, names)), max(map(len, counts))
    lines = [say(f"doctor.lengths.{audit.unit}")]
    mark = "" if audit.limit is None else f" < {say('doctor.limit', limit=audit.limit)}"
    room = max(10, width - wide - tall - len(mark) - 6)
    for (start, end, count), name, shown in zip(bars, names, counts, strict=True):
        bar = "█" * round(count / tallest * room) or ("▌" if count else "")
        here = mark if audit.limit is not None and start <= audit.limit < end else ""
        lines.append(f"  {name:>{wide}}  {shown:>{tall}}  {bar}{here}".rstrip())
    return [*lines, *_wrapped(doctor.quantiles(audit), width, "  ")]


def _around(text: str, at: int, width: int) -> str:
    """`width` characters of an excerpt with its fault inside."""
    if len(text) <= width:
        return text
    start = max(0, min(at - width // 3, len(text) - width))
    piece = text[start : start + width]
    return ("…" + piece[1:] if start else piece)[: width - 1] + ("…" if start + width < len(text) else piece[-1])


def _wrapped(text: str, width: int, before: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=before, subsequent_indent=before, break_on_hyphens=False)


def _coloured(text: str, of: str) -> str:
    """Colour adds to the sign and never stands for it; only a terminal that wants it gets it."""
    import os

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{COLOURS[of]}m{text}\x1b[0m"


def _writable(line: str) -> str:
    """The line, with plain signs where the console has no others (cp1252)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return line.translate(PLAIN).encode(encoding, "replace").decode(encoding)
    return line


def show_mended(done: Mended, json: bool = False, quiet: int = 0) -> None:
    """What was changed, what was left out and where it all is; to stderr, because the result is the file's name."""
    if quiet or json:
        return
    lines = [say("doctor.mended.kept", n=done.kept, path=str(done.output))]
    for what, counts in (("changed", done.changed), ("dropped", done.dropped)):
        shown = ", ".join(f"{reason_name(kind)} ({number(count)})" for kind, count in counts.items())
        lines += [f"  {say(f'doctor.mended.{what}')}: {shown}"] if shown else []
    places = [str(done.diff), *([str(done.dropped_to)] if done.dropped_to else [])]
    lines.append(f"  {say('doctor.mended.see')}: {', '.join(places)}")
    sys.stderr.write("\n".join(lines) + "\n")
