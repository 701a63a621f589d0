"""What the data doctor writes down: the kinds of finding, how grave each is, and the report they make.

    Finding("personal", "warning", count=3, lines=[17, 40, 41], …)      in      Audit(health="good", findings=[…], …)

The words for each kind are in the catalogues (`finding.<kind>.title`, `.why`, `.repair`): here are only facts.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
MOST_LINES, MOST_EXAMPLES, MOST_LABELS = 10_000, 3, 20
SEVERITIES = ("error", "warning", "info")
# Every kind of finding. An error is a row that is not learnt from; whoever trains leaves it out or refuses.
KINDS = {
    "encoding": "error", "bad_json": "error", "keys": "error", "shape": "error", "cells": "error", "not_text": "error",
    "huge_line": "error", "surrogate": "error", "mojibake": "error", "empty_turn": "error", "empty_user": "error",
    "empty_text": "error",
    "one_sided": "error", "roles": "error", "nothing_to_learn": "error", "lost_end": "error", "all_equal": "error",
    "too_long": "warning", "few_rows": "warning", "little_text": "warning", "control": "warning",
    "exact_duplicate": "warning", "near_duplicate": "warning", "leak": "warning", "eval_leak": "warning",
    "language": "warning", "mixed_language": "warning", "special_tokens": "warning", "personal": "warning",
    "repetitive": "warning", "boilerplate": "warning", "bom": "info", "not_nfc": "info", "same_question": "info",
    "same_answer": "info", "opening_marks": "info", "mixed_address": "info", "unclosed_code": "info",
    "long_answer": "info", "cut_answer": "info", "unanswered": "info",
}  # fmt: skip
# What the recipe decides on its own (`data.too_long`), or what no row has the fault of.
NOT_OF_A_ROW = {"too_long", "few_rows", "all_equal", "encoding"}
FEW_ROWS, FEWEST_ROWS, LITTLE_TEXT = 50, 2, 10_000  # rows; rows; characters
SAME_ANSWER_SHARE, SAME_ANSWER_ROWS = 0.1, 20
BAD_SHARE, FAIR_SHARE, WARNED_SHARE = 0.05, 0.01, 0.1
BARS = 14


@dataclass(frozen=True)
class Finding:
    """One kind of fault: how many rows have it, which, and up to three examples."""

    kind: str
    severity: str
    count: int
    lines: list[int] | list[int | str]  # with their file, `b.jsonl#3`, when a source has several
    examples: list[dict[str, Any]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What a source holds and what is wrong with it. Lengths and histogram are in `unit`: tokens or characters."""

    path: str
    format: str
    rows: int
    units: int  # what shares are of: rows, or the lines of a raw text
    counts: dict[str, int]
    characters: int
    tokens: int | None
    learnt: float | None
    unit: str
    lengths: dict[str, int]
    histogram: list[tuple[int, int, int]]  # from, to (not included), how many
    limit: int | None
    languages: dict[str, int]
    findings: list[Finding]
    health: str  # good | fair | bad
    faulty: dict[int | str, str] = field(default_factory=dict)

    def of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]

    def json(self) -> dict[str, Any]:
        """Everything as plain data; lists of more than 10,000 lines are cut, and say so."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        findings = [
            {**dataclasses.asdict(found), "lines": found.lines[:MOST_LINES], "cut": len(found.lines) > MOST_LINES}
            for found in self.findings
        ]
        faulty = {str(line): kind for line, kind in itertools.islice(self.faulty.items(), MOST_LINES)}
        return {"schema": SCHEMA, **plain, "findings": findings, "faulty": faulty}


def health(findings: list[Finding], faulty: int, rows: int, units: int) -> str:
    """`good`, `fair` or `bad`: bad when all of it is useless or 5 % of the rows are; fair from 1 %, when a tenth of the
    rows deserve a warning, or when there is too little to learn from."""
    useless = any(
        f.kind in ("encoding", "all_equal") or (f.kind == "few_rows" and f.severity == "error") for f in findings
    )
    if useless or not rows or faulty >= BAD_SHARE * units:
        return "bad"
    little = any(f.kind in ("few_rows", "little_text") for f in findings)
    warned = max((f.count for f in findings if f.severity != "info"), default=0)
    return "fair" if little or faulty >= FAIR_SHARE * units or warned >= WARNED_SHARE * units else "good"


def quantiles(sizes: list[int]) -> dict[str, int]:
    """`quantiles([1, 2, 3])` is the middle, the 90th and 99th of a hundred and the longest; all 0 of nothing."""

    def at(share: float) -> int:
        return sizes[min(len(sizes) - 1, int(share * len(sizes)))] if sizes else 0

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)}


def histogram(sizes: list[int], limit: int | None) -> list[tuple[int, int, int]]:
    """How many fall in each of about fourteen equal steps of a round width; the last one takes all that is longer."""
    if not sizes:
        return []
    most = max(quantiles(sizes)["p99"], min(limit or 0, sizes[-1])) + 1
    rough = most / BARS
    power = 10 ** max(0, len(str(int(rough))) - 2)
    width = next(w for w in (power * m for m in (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 100)) if w >= rough)
    edges = list(range(0, most + width, width))
    if edges[-1] - width >= most:
        edges.pop()
    counts = [
        bisect.bisect_left(sizes, end) - bisect.bisect_left(sizes, start) for start, end in itertools.pairwise(edges)
    ]
    bars = [(start, end, n) for (start, end), n in zip(itertools.pairwise(edges), counts, strict=True)]
    if sizes[-1] >= edges[-1]:
        start, _, n = bars[-1]
        bars[-1] = (start, sizes[-1] + 1, n + len(sizes) - bisect.bisect_left(sizes, edges[-1]))
    return bars
