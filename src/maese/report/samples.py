"""What the model wrote, side by side and frame by frame, with the proof that two models wrote it.

    pairs(history, run.read("compare.json"))[0]     {"prompt": …, "before": …, "after": …}

In go the run's samples and, when there is one, the comparison; out come plain rows for the page.
"""

from __future__ import annotations

from typing import Any

from maese.report.facts import finite
from maese.report.summary import shown
from maese.run import Event
from maese.say import number, say


def pairs(history: list[Event], comparison: dict | None) -> list[dict[str, Any]]:
    """The same prompt before and after: from `maese compare` if there was one, else from the run's own samples."""
    if comparison and comparison.get("prompts"):
        return [{key: row.get(key) for key in ("prompt", "before", "after")} for row in comparison["prompts"]]
    samples = [e for e in history if e["type"] == "sample"]
    final = [e for e in samples if e.get("final")]
    last = max((e["step"] for e in samples), default=0)
    after = {e["prompt"]: e["text"] for e in final or [e for e in samples if e["step"] == last > 0]}
    before = {e["prompt"]: e["text"] for e in samples if e["step"] == 0 and not e.get("final")}
    return [{"prompt": p, "before": before.get(p), "after": after.get(p)} for p in dict.fromkeys([*before, *after])]


def proof(comparison: dict | None) -> dict[str, Any] | None:
    """What shows that the two sides are two models: fingerprints of their weights, and how far their logits differ."""
    if not comparison:
        return None
    before, after = ((comparison.get(side) or {}).get("fingerprint") for side in ("before", "after"))
    difference = finite(comparison.get("max_logit_difference"))
    same = difference == 0 or (before is not None and before == after)
    settings = {**(comparison.get("settings") or {}), "seed": comparison.get("seed")}
    return {
        "same": same,
        "before": shown(before, str),
        "after": shown(after, str),
        "difference": shown(difference, lambda v: number(v, 3)),
        "settings": [(key, str(value)) for key, value in settings.items() if value is not None],
    }


def film(history: list[Event]) -> list[dict[str, Any]]:
    """For each prompt, what the model wrote at each step: learning seen frame by frame."""
    frames: dict[str, list[dict[str, Any]]] = {}
    for event in history:
        if event["type"] == "sample":
            key = "final" if event.get("final") else "base" if event["step"] == 0 else "step"
            label = say(f"report.page.frame_{key}", step=event["step"])
            frames.setdefault(event["prompt"], []).append({"label": label, "text": event["text"]})
    return [{"prompt": prompt, "frames": rows} for prompt, rows in frames.items()]
