"""Words for people: one catalogue a language, looked up by key, filled with facts.

    say("train.saved", step=200)      "Guardado el paso 200"
    number(1234.5)                    "1.234,5" in Spanish, "1,234.5" in English

Spanish always, unless `MAESE_LANG=en` or `--lang en`: neither LANG nor the browser is asked, because shared and
rented machines speak whatever their image speaks.
"""

from __future__ import annotations

import os
import string
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources

LANGUAGES = ("es", "en")


def language() -> str:
    chosen = os.environ.get("MAESE_LANG", "es").lower()[:2]
    return chosen if chosen in LANGUAGES else "es"


@cache
def catalogue(lang: str) -> dict[str, str]:
    """The whole catalogue of a language, flat: `{"train.saved": "Guardado…", …}`."""
    flat: dict[str, str] = {}

    def walk(table: dict, prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(tomllib.loads(resources.files(__name__).joinpath(f"{lang}.toml").read_text("utf-8")), "")
    return flat


class _Fill(string.Formatter):
    """Like str.format, except that numbers are written as people of the language write them."""

    def format_field(self, value, spec):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or spec == "raw":
            return str(value)
        return number(value, int(spec)) if spec else number(value)


class _Blank(_Fill):
    """Every fact as «…»: the sentence of no case in particular."""

    def get_field(self, field_name, args, kwargs):
        return "…", field_name


def say(key: str, /, **facts: object) -> str:
    """The sentence for `key` in the current language.

    A key with `.one` and `.other` forms is chosen by the fact `n`. Unknown keys raise KeyError: a missing sentence
    is a bug, never an empty line.
    """
    words = catalogue(language())
    if "n" in facts and f"{key}.other" in words:
        key = f"{key}.one" if facts["n"] == 1 else f"{key}.other"
    return _Fill().format(words[key], **facts)


def has(key: str) -> bool:
    return key in catalogue(language())


def number(value: float, decimals: int | None = None) -> str:
    """A measure as people write it: `number(1234.5)` is «1.234,5» in Spanish."""
    if value != value or value in (float("inf"), float("-inf")):
        return "—"
    if decimals is None:
        decimals = 0 if isinstance(value, int) or abs(value) >= 100 else 2
    text = f"{value:,.{decimals}f}"
    return text.translate(str.maketrans(",.", ".,")) if language() == "es" else text


def percent(share: float, decimals: int = 1) -> str:
    """`percent(0.031)` is «3,1 %», with a no-break space in Spanish."""
    return number(100 * share, decimals) + ("\u00a0%" if language() == "es" else "%")


def duration(seconds: float) -> str:
    """`duration(126)` is «2 min 6 s»."""
    whole = round(seconds)
    if whole < 60:
        return f"{number(seconds, 1) if seconds < 10 else whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def quantity(n: float) -> str:
    """A large count in few characters: `quantity(8_423_000)` is «8,4 M»."""
    if n >= 1e9 and language() == "es":  # «mil millones» has no letter: 2.780 M
        return f"{number(n / 1e6, 0)} M"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size and not (letter == "k" and n < 1e4):
            return f"{number(n / size, 1)} {letter}"
    return number(int(n))


def error_explained(code: str) -> str:
    """Why an error is one and what mends it, with «…» where a case puts its facts."""
    lines = [f"{code}: " + say(f"error.{code}.why")]
    for part in ("expected", "try"):
        body = _Blank().format(catalogue(language()).get(f"error.{code}.{part}", ""))
        if body.strip("…\n "):
            lines.append(f"  {say(f'error.label.{part}') + ':':<11} " + body.replace("\n", "\n" + " " * 14))
    return "\n".join(lines)


def error_text(code: str, facts: dict[str, object], again: Callable[[list[str]], list[str]] | None = None) -> str:
    """An error for people: what happened, what was found, what was expected, what to type.

    `again` gives the lines of what to type as this person would type them.
    """
    from shlex import quote

    # What is typed must survive a folder with spaces in its name.
    names = ("path", "run", "value", "adapter", "free", "nearest")
    typed = {k: quote(v) if k in names and isinstance(v, str) else v for k, v in facts.items()}
    lines = [f"error[{code}]: " + say(f"error.{code}.title", **facts)]
    for part in ("found", "expected", "try"):
        if has(f"error.{code}.{part}"):
            label = say(f"error.label.{part}") + ":"
            body = say(f"error.{code}.{part}", **(typed if part == "try" else facts)).splitlines() or ["—"]
            if again and part == "try":
                body = again(body)
            lines += [f"  {label:<11} {body[0]}", *(" " * 14 + line for line in body[1:])]
    label = say("error.label.more") + ":"
    return "\n".join([*lines, f"  {label:<11} maese explain {code}"])
