"""The end of a training in a box of plain text, for the terminal and for a file.

    print(box(facts(run)))

In go the figures of `report.facts`; out comes text of at most 64 columns that any terminal or printer can show.
"""

from __future__ import annotations

from typing import Any

from maese.say import duration, number, percent, quantity, say

WIDTH = 64  # fits in half a screen and in a printed page


def box(figures: dict[str, Any]) -> str:
    """The metrics summary, with a rule between what was learnt, what was held out and what it cost."""
    title = say("report.box.title")
    groups = [_training(figures), _held_out(figures), _cost(figures)]
    rows = [row for group in groups for row in group]
    label_width = max(len(label) for label, _ in rows)
    widest = max(label_width + 3 + max(len(value) for _, value in rows), len(title))
    inner = min(WIDTH - 4, widest + 2)
    lines = ["╔" + "═" * (inner + 2) + "╗", f"║ {title:^{inner}} ║"]
    for group in groups:
        lines.append("╠" + "═" * (inner + 2) + "╣" if group is groups[0] else "╟" + "─" * (inner + 2) + "╢")
        lines += [_line(label, value, inner) for label, value in group]
    return "\n".join([*lines, "╚" + "═" * (inner + 2) + "╝"])


def _line(label: str, value: str, inner: int) -> str:
    """Label on the left, figure on the right, so that the figures of a column can be compared."""
    gap = inner - len(label) - len(value)
    if gap < 1:
        label, gap = label[: gap - 2] + "…", 1
    return f"║ {label}{' ' * gap}{value} ║"


def _training(f: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (say("report.box.initial"), _loss(f["loss_initial"])),
        (say("report.box.final"), _loss(f["loss_final"])),
        (say("report.box.minimum"), _loss(f["loss_minimum"], f["loss_minimum_step"])),
        (say("report.box.maximum"), _loss(f["loss_maximum"], f["loss_maximum_step"])),
        (say("report.box.improvement"), shown(f["loss_improvement_percent"], lambda v: percent(v / 100))),
    ]


def _held_out(f: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (say("report.box.validation"), arrow(f["validation_initial"], f["validation_kept"], 4)),
        (say("report.box.perplexity"), arrow(f["perplexity_initial"], f["perplexity_kept"], 2)),
        (say("report.box.best_step"), shown(f["validation_best_step"], number)),
        *([(say("report.box.general"), arrow(f["general"][0], f["general"][-1], 3))] if f["general"] else []),
    ]


def _cost(f: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *([(say("report.box.trained"), f"{quantity(f['trainable'])} ({percent(f['share'])})")] if f["share"] else []),
        *([(say("report.box.file"), f"{number(f['final_bytes'] / 1e6, 1)} MB")] if f["final_bytes"] else []),
        (say("report.box.steps"), shown(f["steps"], number)),
        (say("report.box.time"), shown(f["seconds"], duration)),
        (say("report.box.speed"), shown(f["tokens_s"], lambda v: say("report.unit.tokens_s", value=number(v, 0)))),
        (say("report.box.memory"), shown(f["peak_gib"], lambda v: memory(v, f.get("estimated_gib")))),
    ]


def shown(value: Any, how) -> str:
    """A figure written by `how`, or the words for «not measured»."""
    return say("report.missing") if value is None else how(value)


def memory(peak: float, estimated: float | None) -> str:
    """`memory(2.0, 2.1)` is «2,00 GiB (estimados 2,10, +5,0 %)»."""
    if not estimated or not peak:
        return say("report.unit.gib", value=number(peak, 2))
    off = estimated / peak - 1
    difference = f"{'−' if off < 0 else '+'}{percent(abs(off))}"
    return say("report.box.against", value=number(peak, 2), estimated=number(estimated, 2), difference=difference)


def arrow(before: float | None, after: float | None, decimals: int) -> str:
    """`arrow(3.2, 2.1, 2)` is «3,20 → 2,10»; neither measured is one «not measured», not two."""
    if before is None and after is None:
        return say("report.missing")
    return " → ".join("—" if v is None else number(v, decimals) for v in (before, after))


def _loss(value: float | None, step: int | None = None) -> str:
    if value is None:
        return say("report.missing")
    return number(value, 4) if step is None else say("report.box.at_step", value=number(value, 4), step=step)
