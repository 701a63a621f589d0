"""What a run's curve says, by rules: a verdict, its reason in figures, and what to change.

    diagnose(run.history(), ["texto escrito al final"]).text()

In go events and the final samples; out comes a Diagnosis whose words live in the catalogues. The rules are asked in
order and the first that fits speaks: first what makes the rest meaningless, then what went wrong, then what went well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from maese.report.facts import finite, series
from maese.run import Event
from maese.say import has, say

# One batch is noisy, so "start" and "end" are means: ten steps halve the noise of a batch to a third, and never more
# than a quarter of the run, or start and end would overlap.
WINDOW = 10
# Below three points there is no telling a trend from a bump.
ENOUGH = 3
# A loss half as large again as the first is far outside batch noise: the weights are worse than untouched.
DIVERGED = 1.5
# Less than 1 % is within what another seed would change.
MOVED = 0.01
# A validation minimum followed by two worse checks, the last by more than 1 %, is a turn and not a wobble.
WORSE_CHECKS = 2
# Too high a rate shows in the first third, before the schedule lowers it: a mean of five steps 15 % above the first
# three, or a quarter of the steps 30 % above. Short answers make noisier batches than that, so the rise must also be
# beyond what batches differ in the second half, when the rate is low: four standard errors, for there are many windows.
EARLY, RISE = 3, 0.15
START_STEPS, RISE_STEPS, LONG = 3, 5, 100  # in a run of over 100 steps, both grow with it
SWING, SWING_SHARE = 0.3, 0.25
SURE = 4
EARLY_STEPS = 8  # fewer than this and the first third is one batch
# In ordinary prose fewer than one in twenty groups of four words comes back; three in ten is a loop.
LOOP, LOOP_WORDS, LOOP_GROUPS = 0.3, 4, 10


@dataclass(frozen=True)
class Diagnosis:
    """A verdict (`kind`) and the figures it rests on."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)

    def title(self) -> str:
        return say(f"report.verdict.{self.kind}.title")

    def reason(self) -> str:
        empty = f"report.verdict.{self.kind}.reason_empty"  # it stopped before there was any loss to speak of
        if not self.facts.get("steps") and has(empty):
            return say(empty, **self._worded())
        return say(f"report.verdict.{self.kind}.reason", **self._worded())

    def change(self) -> str:
        return say(f"report.verdict.{self.kind}.change", **self._worded())

    def text(self) -> str:
        return f"{self.title()}. {self.reason()} {self.change()}"

    def _worded(self) -> dict[str, Any]:
        """The facts, with the ones not measured said in words and an error's code turned into its sentence."""
        worded = {k: say("report.missing") if v is None else v for k, v in self.facts.items()}
        if self.kind == "failed":
            key = f"error.{self.facts['code']}.title"
            worded["problem"] = say(key, **self.facts["problem"]) if has(key) else self.facts["code"]
        return worded


def diagnose(history: list[Event], sample_texts: Sequence[str] = (), alive: bool = False) -> Diagnosis:
    """The first rule that fits. `alive`: the run is still going, so a missing end is no interruption."""
    steps, checks = series(history, "step"), series(history, "validation")
    base = _figures(history, steps, checks)
    return (
        _diverged(history, steps, checks, base)
        or _stopped(history, base, alive)
        or _too_high(steps, base)
        or _short(steps, checks, base)
        or _overfitting(steps, checks, base)
        or _flat(checks, base)
        or _repetitive(sample_texts, base)
        or _learning(checks, base)
    )


def repetition(texts: Sequence[str]) -> float | None:
    """The share of groups of four words that had already appeared in the same text; None for too little text."""
    groups = repeated = 0
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        grams = [tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1)]
        groups += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / groups if groups >= LOOP_GROUPS else None


def _figures(history: list[Event], steps: list[Event], checks: list[Event]) -> dict[str, Any]:
    losses = [e["loss"] for e in steps if finite(e.get("loss")) is not None]
    held = [e["loss"] for e in checks if finite(e.get("loss")) is not None]
    size = max(1, min(WINDOW, len(losses) // 4))
    lr = max((e["lr"] for e in steps if finite(e.get("lr"))), default=0.0)
    planned = next((e.get("steps") for e in reversed(history) if e["type"] == "plan"), None)
    start = next((e for e in reversed(history) if e["type"] == "start"), {})
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "planned": planned,
        "checks": len(held),
        "name": start.get("name", "RUN"),
        "loss_first": losses[0] if losses else None,
        "loss_start": fmean(losses[:size]) if losses else None,
        "loss_end": fmean(losses[-size:]) if losses else None,
        "validation_initial": held[0] if held else None,
        "validation_final": held[-1] if held else None,
        # Written so that they can be pasted into an order.
        "lr": _rate(lr),
        "lr_less": _rate(lr / 3),
        "lr_more": _rate(lr * 3),
    }


def _diverged(history: list[Event], steps: list[Event], checks: list[Event], base: dict) -> Diagnosis | None:
    # An error before the last start was mended by resuming.
    history = _latest(history)
    broken = next((e for e in [*steps, *checks] if _is_broken(e.get("loss"))), None)
    told = next((e for e in history if e["type"] == "error" and e.get("code") == "NUM-01"), None)
    if broken or told:
        step = (broken or told or {}).get("step", base["steps"])
        return Diagnosis("diverged_nan", base | {"step": step})
    if base["steps"] and len(steps) >= ENOUGH and base["loss_first"]:
        ratio = base["loss_end"] / base["loss_first"]
        # One easy first batch is not enough: the end must be worse than the first steps together, too.
        if ratio > DIVERGED and base["loss_end"] > base["loss_start"]:
            return Diagnosis("diverged", base | {"ratio": ratio})
    return None


def _stopped(history: list[Event], base: dict, alive: bool) -> Diagnosis | None:
    history = _latest(history)
    end = next((e for e in reversed(history) if e["type"] == "end"), None)
    reason = end.get("reason") if end else None
    if reason == "error":
        told: Event = next((e for e in reversed(history) if e["type"] == "error"), {})
        return Diagnosis("failed", base | {"code": told.get("code", "?"), "problem": told.get("facts") or {}})
    if reason == "interrupted" or (end is None and not alive):
        return Diagnosis("interrupted", base)
    return None


def _too_high(steps: list[Event], base: dict) -> Diagnosis | None:
    pairs = [(e["loss"], e["step"]) for e in steps if finite(e.get("loss")) is not None]
    if len(pairs) < EARLY_STEPS:
        return None
    scale = max(1, len(pairs) / LONG)
    first, wide = round(START_STEPS * scale), round(RISE_STEPS * scale)
    start = fmean(loss for loss, _ in pairs[:first])
    early = pairs[: max(EARLY_STEPS, len(pairs) // EARLY)]
    means = [fmean(loss for loss, _ in early[i : i + wide]) for i in range(1, len(early) - wide + 1)]
    noise = _noise([loss for loss, _ in pairs[len(pairs) // 2 :]])
    rise = max(RISE * start, SURE * noise * math.sqrt(1 / first + 1 / wide))
    swing = max(SWING * start, 2 * noise)
    swings = sum(loss > start + swing for loss, _ in early) / len(early)
    if max(means) > start + rise or swings >= SWING_SHARE:
        peak, step = max(early)
        return Diagnosis("too_high", base | {"start": start, "peak": peak, "peak_step": step})
    return None


def _noise(losses: list[float]) -> float:
    """How much one batch differs from the next, as a standard deviation; by medians: one wild batch counts once."""
    gaps = [abs(b - a) for a, b in pairwise(losses)]
    return median(gaps) / (0.6745 * math.sqrt(2)) if gaps else 0.0


def _short(steps: list[Event], checks: list[Event], base: dict) -> Diagnosis | None:
    if len(steps) < ENOUGH or 0 < base["checks"] < ENOUGH:
        return Diagnosis("short", base | {"enough": ENOUGH})
    return None


def _overfitting(steps: list[Event], checks: list[Event], base: dict) -> Diagnosis | None:
    held = [(e["loss"], e["step"]) for e in checks if finite(e.get("loss")) is not None]
    best, best_step = min(held, default=(0.0, 0))
    if best <= 0:  # none measured, or a perfect one
        return None
    after = [loss for loss, step in held if step > best_step]
    rise = held[-1][0] / best - 1
    near = [e["loss"] for e in steps if e["step"] <= best_step and finite(e.get("loss")) is not None][-WINDOW:]
    loss_best = fmean(near) if near else base["loss_start"]
    if len(after) < WORSE_CHECKS or rise <= MOVED or base["loss_end"] >= loss_best:
        return None
    found = base | {"best": best, "best_step": best_step, "rise": 100 * rise, "loss_best": loss_best}
    epoch = next((finite(e.get("epoch")) for e in reversed(steps) if e["step"] <= best_step), None)
    # A tenth of an epoch upwards: to stop before the best step would be to advise a worse model.
    found["epochs"] = f"{math.ceil(10 * epoch) / 10:g}" if epoch else None
    return Diagnosis("overfitting" if best_step else "worse", found)


def _flat(checks: list[Event], base: dict) -> Diagnosis | None:
    fall = 1 - base["loss_end"] / base["loss_start"] if base["loss_start"] else 0
    if fall < MOVED and not (base["checks"] and _held_fall(base) >= MOVED):
        return Diagnosis("flat", base | {"fall": 100 * fall})
    return None


def _repetitive(texts: Sequence[str], base: dict) -> Diagnosis | None:
    share = repetition(texts)
    if share is not None and share > LOOP:
        return Diagnosis("repetitive", base | {"share": 100 * share, "texts": len(texts), "limit": 100 * LOOP})
    return None


def _learning(checks: list[Event], base: dict) -> Diagnosis:
    if not base["checks"]:
        return Diagnosis("unmeasured", base)
    fall = _held_fall(base)
    if fall < MOVED:
        return Diagnosis("not_following", base | {"fall": 100 * fall})
    best, step = min((e["loss"], e["step"]) for e in checks if finite(e.get("loss")) is not None)
    if step < base["steps"] and best < base["validation_final"]:  # more of the same would bring nothing
        fall = 1 - best / base["validation_initial"]
        return Diagnosis("settled", base | {"best": best, "best_step": step, "fall": 100 * fall})
    return Diagnosis("learning", base | {"fall": 100 * fall})


def _held_fall(base: dict) -> float:
    before, after = base["validation_initial"], base["validation_final"]
    return 1 - after / before if before else 0.0


def _latest(history: list[Event]) -> list[Event]:
    """The events since training last started or was resumed."""
    starts = [i for i, e in enumerate(history) if e["type"] == "start"]
    return history[starts[-1] :] if starts else history


def _is_broken(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _rate(value: float) -> str | None:
    """`_rate(3.33e-05)` is "3e-5": one figure is all the precision a learning rate has."""
    if not value:
        return None
    digits, _, power = f"{value:.0e}".partition("e")
    return f"{digits}e{int(power)}"
