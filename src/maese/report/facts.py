"""The figures of a run, from its events: nothing here is estimated, and what was not measured is None.

    facts(run)["validation_best"]      2.03, nats per token
    write_metrics(run)                 metrics.json and metrics.csv in the run folder

In goes `run.history()`, which already leaves out what a resumed run threw away; out come plain dicts fit for JSON.
Everything else in `report` starts from these figures, so page, box and files can never disagree.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

from maese.run import Event, Run

STEP_KEYS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_s", "mem_gib", "seconds")
VALIDATION_KEYS = ("step", "loss", "perplexity", "tokens", "best")
CSV_KEYS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens_s", "mem_gib")


def facts(run: Run) -> dict[str, Any]:
    """The summary of a run; `None` wherever the run did not measure."""
    history = run.history()
    start, plan, end = (_last(history, type) or {} for type in ("start", "plan", "end"))
    steps, checks = series(history, "step"), series(history, "validation")
    final_step = end.get("final_step", steps[-1]["step"] if steps else None)
    figures: dict[str, Any] = {
        "name": start.get("name", run.path.name),
        "base": start.get("base"),
        "method": start.get("method"),
        "started": next((e["t"] for e in history if e["type"] == "start" and "t" in e), None),
        "resumes": sum(e["type"] == "start" and e.get("resumed_from") is not None for e in history),
        "reason": end.get("reason"),
        "steps": steps[-1]["step"] if steps else None,
        "final_step": final_step,
        "steps_planned": plan.get("steps"),
        "epochs": finite(steps[-1].get("epoch")) if steps else None,
        "seconds": finite(end.get("seconds", steps[-1].get("seconds") if steps else None)),
        "tokens": end.get("tokens"),
        "tokens_s": _median(steps, "tokens_s"),
        "peak_gib": finite(end.get("peak_gib")) or max(_values(steps, "mem_gib"), default=None),
        "estimated_gib": finite(plan.get("estimated_gib")),
        "parameters": plan.get("parameters"),
        "trainable": plan.get("trainable"),
        "final_bytes": next((e.get("bytes") for e in reversed(history) if e.get("what") == "final"), None),
        "general": [e["bits_per_byte"] for e in history if e["type"] == "general"],
        "share": _ratio(plan.get("trainable"), plan.get("parameters")),
    }
    return figures | _training(steps) | _validation(checks, _keeps(run))


def _training(steps: list[Event]) -> dict[str, Any]:
    losses = [(e["loss"], e["step"]) for e in steps if finite(e.get("loss")) is not None]
    low, high = (choose(losses, default=(None, None)) for choose in (min, max))
    initial, final = (finite(steps[i].get("loss")) if steps else None for i in (0, -1))
    return {
        "loss_initial": initial,
        "loss_final": final,
        "loss_minimum": low[0],
        "loss_minimum_step": low[1],
        "loss_maximum": high[0],
        "loss_maximum_step": high[1],
        "loss_improvement_percent": _percent_less(initial, final),
    }


def _validation(checks: list[Event], keeps: str) -> dict[str, Any]:
    """Held-out loss at three moments, and at a fourth: that of the weights the run kept in final/."""
    measured = [e for e in checks if finite(e.get("loss")) is not None]
    flagged = [e for e in measured if e.get("best")]
    best = flagged[-1] if flagged else min(measured, key=lambda e: e["loss"], default=None)
    initial = measured[0] if measured and measured[0]["step"] == 0 else None
    final = measured[-1] if measured and measured[-1] is not initial else None
    # "After" is only what was measured after some training: a run with one check at step 0 has no after.
    kept = (best if keeps == "best" else final) if final else None
    figures: dict[str, Any] = {
        "validations": len(measured),
        "validation_tokens": _of(measured[-1] if measured else None, "tokens"),
    }
    for name, event in (("initial", initial), ("best", best), ("final", final), ("kept", kept)):
        figures[f"validation_{name}"] = _of(event, "loss")
        figures[f"perplexity_{name}"] = _of(event, "perplexity")
    figures["validation_best_step"] = _of(best, "step")
    figures["validation_kept_step"] = _of(kept, "step")
    less = _percent_less(figures["validation_initial"], figures["validation_kept"])
    figures["validation_change_percent"] = None if less is None else -less
    return figures


def series(history: list[Event], type: str) -> list[Event]:
    """The events of one type by step; where a resumed run measured a step again, the last measure stands."""
    by_step = {e["step"]: e for e in history if e["type"] == type and "step" in e}
    return [by_step[step] for step in sorted(by_step)]


def finite(value: Any) -> float | None:
    """The number itself, or None when it is missing, NaN or infinite: JSON knows none of the three."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def write_metrics(run: Run) -> tuple[Path, Path]:
    """metrics.json (summary and every measure with its time) and metrics.csv (one row per training step)."""
    history = run.history()
    steps, checks = series(history, "step"), series(history, "validation")
    run.write(
        "metrics.json",
        {
            "facts": facts(run),
            "steps": [_row(e, STEP_KEYS) for e in steps],
            "validations": [_row(e, VALIDATION_KEYS) for e in checks],
        },
    )
    held_out = {e["step"]: finite(e.get("loss")) for e in checks}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["timestamp", *CSV_KEYS, "validation_loss"])
    for event in steps:  # None is written as an empty cell
        row = _row(event, CSV_KEYS)
        writer.writerow([*row.values(), held_out.get(event["step"])])
    run.write("metrics.csv", table.getvalue())
    return run.path / "metrics.json", run.path / "metrics.csv"


def _row(event: Event, keys: tuple[str, ...]) -> dict[str, Any]:
    values = {key: event.get(key) for key in keys}
    return {"timestamp": event.get("t")} | {k: v if isinstance(v, bool) else finite(v) for k, v in values.items()}


def _keeps(run: Run) -> str:
    """Which weights the recipe sends to final/; a folder whose recipe is lost is read as the default says."""
    if not (run.path / "recipe.yaml").is_file():
        return "best"
    return run.recipe().train.final


def _last(history: list[Event], type: str) -> Event | None:
    return next((e for e in reversed(history) if e["type"] == type), None)


def _of(event: Event | None, key: str) -> Any:
    return finite(event.get(key)) if event else None


def _values(events: list[Event], key: str) -> list[float]:
    return [e[key] for e in events if finite(e.get(key)) is not None]


def _median(events: list[Event], key: str) -> float | None:
    found = _values(events, key)
    return statistics.median(found) if found else None


def _ratio(part: Any, whole: Any) -> float | None:
    return part / whole if finite(part) is not None and finite(whole) else None


def _percent_less(before: float | None, after: float | None) -> float | None:
    """`_percent_less(4, 3)` is 25: how much smaller the second is, in percent of the first."""
    return None if not before or after is None else 100 * (before - after) / before
