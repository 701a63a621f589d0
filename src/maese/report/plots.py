"""Four plots of a run in one PNG, drawn by matplotlib without a screen.

    plot(run)     runs/…/metrics.png

Only this file knows matplotlib, and only inside its functions: importing it costs half a second.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from maese.report.facts import facts, finite, series
from maese.report.lines import Line, ema, points
from maese.run import Event, Run, disk
from maese.say import number, say

INK, SOFT, GRID, TRAIN, HELD = "#26231d", "#6b675e", "#e4e0d6", "#1f5f99", "#a8480a"
MOST_BARS = 12  # beyond these the figures above the bars run into each other


def plot(run: Run) -> Path:
    """Loss by step, loss by epoch, learning rate and loss on a logarithmic axis."""
    # A Figure of its own, not pyplot: no window, no global state, safe inside a server.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    history = run.history()
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": SOFT}
    with rc_context(style | {"xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": GRID}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(12, 8.4), dpi=120, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(say("report.plot.title", name=facts(run)["name"]), fontsize=14, fontweight="bold")
        grid = figure.subplots(2, 2)
        drawings = {"per_step": _per_step, "per_epoch": _per_epoch, "lr": _rate, "progress": _progress}
        for axes, (name, draw) in zip(grid.flat, drawings.items(), strict=True):
            axes.set_title(say(f"report.plot.{name}"), loc="left", fontsize=11, fontweight="bold")
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if not draw(axes, history):
                axes.text(0.5, 0.5, say("report.missing"), ha="center", va="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
        path = run.path / "metrics.png"
        with disk(path):
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            figure.savefig(draft, format="png")
            os.replace(draft, path)
    return path


def _per_step(axes: Any, history: list[Event]) -> bool:
    if not _lines(axes, history, positive=False):
        return False
    axes.set_ylabel(say("report.curves.loss"))
    axes.yaxis.set_major_formatter(_local())
    axes.legend(frameon=False, fontsize=9)
    return True


def _progress(axes: Any, history: list[Event]) -> bool:
    """The same losses on a logarithmic axis, where equal distances are equal proportions."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if not _lines(axes, history, positive=True):
        return False
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within one decade powers of ten alone would leave an axis with a single figure on it, or none.
    close, closer = high / low < 30, high / low < 4
    axes.yaxis.set_major_locator(
        MaxNLocator(5) if closer else LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if close else (1, 3))
    )
    axes.yaxis.set_major_formatter(_local())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(say("report.curves.loss"))
    return True


def _lines(axes: Any, history: list[Event], positive: bool) -> bool:
    """Raw, smooth and held-out loss. A logarithm has no place for zero: such losses are left out, not moved."""

    def fit(line: Line) -> Line:
        return [p for p in line if p[1] > 0] if positive else line

    train, held = fit(points(history, "step")), fit(points(history, "validation"))
    for line, look in (
        (train, {"color": TRAIN, "linewidth": 0.8, "alpha": 0.45, "label": say("report.curves.raw")}),
        (fit(ema(train)), {"color": TRAIN, "linewidth": 2.2, "label": say("report.curves.smooth")}),
        (held, {"color": HELD, "linestyle": "--", "linewidth": 1.4, "marker": "o", "markerfacecolor": "white",
                "markersize": 6, "label": say("report.curves.validation")}),
    ):  # fmt: skip
        if line:
            axes.plot([x for x, _ in line], [y for _, y in line], **look)
    axes.set_xlabel(say("report.curves.step"))
    axes.xaxis.set_major_formatter(_local())
    return bool(train or held)


def _per_epoch(axes: Any, history: list[Event]) -> bool:
    """One bar per epoch from zero, so that heights can be compared; points when there are many."""
    epochs: dict[int, list[float]] = {}
    for event in series(history, "step"):
        if finite(event.get("epoch")) is not None and finite(event.get("loss")) is not None:
            # The step that completes an epoch carries a whole number and still belongs to it.
            epochs.setdefault(max(1, math.ceil(event["epoch"] - 1e-9)), []).append(event["loss"])
    if not epochs:
        return False
    xs = sorted(epochs)
    means = [sum(epochs[x]) / len(epochs[x]) for x in xs]
    if len(xs) <= MOST_BARS:
        bars = axes.bar(xs, means, color=TRAIN, width=0.6)
        axes.bar_label(bars, [number(mean, 2) for mean in means], padding=3, color=INK, fontsize=9)
        axes.set(xticks=xs, xlim=(xs[0] - 0.8, xs[-1] + 0.8))
        axes.margins(y=0.12)
    else:
        axes.plot(xs, means, color=TRAIN, marker="o", markersize=4)
    axes.set(xlabel=say("report.plot.epoch"), ylabel=say("report.curves.loss"))
    axes.xaxis.set_major_formatter(_local())
    axes.yaxis.set_major_formatter(_local())
    return True


def _rate(axes: Any, history: list[Event]) -> bool:
    rates = [(e["step"], e["lr"]) for e in series(history, "step") if finite(e.get("lr")) is not None]
    top = max((lr for _, lr in rates), default=0)
    if top <= 0:
        return False
    power = math.floor(math.log10(top) + 1e-9)
    small = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    axes.plot([x for x, _ in rates], [lr / 10**power for _, lr in rates], color=TRAIN, linewidth=2.2)
    axes.fill_between([x for x, _ in rates], [lr / 10**power for _, lr in rates], color=TRAIN, alpha=0.1, linewidth=0)
    axes.set(xlabel=say("report.curves.step"), ylabel=say("report.plot.lr_axis", power=small), ylim=(0, None))
    axes.xaxis.set_major_formatter(_local())
    axes.yaxis.set_major_formatter(_local())
    return True


def _local() -> Any:
    """Ticks as people of the language write numbers, all of an axis with the decimals that the finest one needs."""
    from matplotlib.ticker import Formatter

    class Local(Formatter):
        places: tuple[float, ...] = ()

        def set_locs(self, locs: Any) -> None:
            self.places = tuple(locs)

        def __call__(self, value: float, position: int | None = None) -> str:
            return number(value, max((_decimals(tick) for tick in self.places), default=0))

    return Local()


def _decimals(value: float) -> int:
    return next((d for d in range(4) if abs(value - round(value, d)) < 1e-9 * max(1, abs(value))), 4)
