"""The loss of a run as lines of points, ready to be drawn or told.

points(run.history(), "step")     [(1, 3.92), (2, 3.87), …]
sentence(run.history())           what a drawing of them shows, in words
"""

from __future__ import annotations

from itertools import pairwise

from maese.report.facts import finite, series
from maese.run import Event
from maese.say import say

Line = list[tuple[float, float]]

MOST_POINTS = 800  # more than there are pixels across
# Steps after which a loss weighs half in the smooth line: a fortieth of the run, because a line that lags behind the
# losses it smooths seems to learn later than it did; never over 20, for the same reason.
SHORTEST, LONGEST, SHARE = 2, 20, 1 / 40


def points(history: list[Event], type: str) -> Line:
    """`[(step, loss), …]` of the measures that are numbers."""
    return [(e["step"], e["loss"]) for e in series(history, type) if finite(e.get("loss")) is not None]


def ema(line: Line) -> Line:
    """An exponential mean that starts at the first point, so that it is not drawn down by a zero."""
    if not line:
        return []
    half_life = min(LONGEST, max(SHORTEST, SHARE * len(line)))
    keep, value, smooth = 0.5 ** (1 / half_life), line[0][1], []
    for x, y in line:
        value = keep * value + (1 - keep) * y
        smooth.append((x, value))
    return smooth


def shrink(line: Line, most: int = MOST_POINTS) -> Line:
    """At most so many points, keeping the lowest and highest of each stretch: no peak is lost in the drawing."""
    if len(line) <= most:
        return line
    stretches = most // 2
    cuts = [round(i * len(line) / stretches) for i in range(stretches + 1)]
    kept: Line = []
    for a, b in pairwise(cuts):
        ends = {min(line[a:b], key=lambda p: p[1]), max(line[a:b], key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def sentence(history: list[Event]) -> str:
    """What the drawing shows, in words."""
    train, held = points(history, "step"), points(history, "validation")
    if not train:
        return say("report.curves.empty")
    words = [say("report.curves.sentence", n=len(train), initial=train[0][1], final=train[-1][1])]
    if held:
        step, best = min(held, key=lambda p: p[1])
        facts = {"n": len(held), "initial": held[0][1], "final": held[-1][1], "best": best, "step": step}
        words.append(say("report.curves.sentence_validation", **facts))
    return " ".join(words)
