"""The loss as a drawing: an accessible SVG for the page and four plots in a PNG for everything else.

    svg(run.history())     "<svg role='img' …>", no script, no font, no request
    plot(run)              runs/…/metrics.png

Thin line, thick line and ringed points differ in shape, so they still do in greyscale and for the colour blind.
"""

from __future__ import annotations

import math
from html import escape

from maese.report.lines import Line, ema, points, sentence, shrink
from maese.report.plots import plot
from maese.run import Event
from maese.say import number, say

__all__ = ["plot", "svg"]

STYLE = """
.mz-curve{--mz-paper:#fff;--mz-ink:#26231d;--mz-soft:#6b675e;--mz-grid:#e4e0d6;--mz-train:#1f5f99;--mz-held:#a8480a;
font-family:system-ui,sans-serif;font-size:13px;max-width:100%;height:auto;display:block}
@media (prefers-color-scheme:dark){.mz-curve{--mz-paper:#1e2024;--mz-ink:#ece9e2;--mz-soft:#a9a69d;--mz-grid:#383b41;
--mz-train:#86bdf0;--mz-held:#f2a966}}
@media print{.mz-curve{--mz-paper:#fff;--mz-ink:#000;--mz-soft:#444;--mz-grid:#ddd;--mz-train:#1f5f99;
--mz-held:#a8480a}}
.mz-curve text{fill:var(--mz-soft)}.mz-curve .mz-strong{fill:var(--mz-ink);font-weight:600}
.mz-curve .mz-label{paint-order:stroke;stroke:var(--mz-paper);stroke-width:5px;stroke-linejoin:round}
.mz-paper{fill:var(--mz-paper)}.mz-grid{stroke:var(--mz-grid)}
.mz-raw,.mz-smooth,.mz-held{fill:none;stroke-linejoin:round}
.mz-raw{stroke:var(--mz-train);stroke-width:1;opacity:.45}.mz-smooth{stroke:var(--mz-train);stroke-width:2.6}
.mz-held{stroke:var(--mz-held);stroke-width:1.6;stroke-dasharray:5 4}
.mz-mark{fill:var(--mz-paper);stroke:var(--mz-held);stroke-width:2}.mz-best{fill:var(--mz-held)}
"""


def svg(history: list[Event], width: int = 900, height: int = 400) -> str:
    """The loss curve. `width` chooses the size of the letters against the drawing: about 900 for a page, 340 for a
    telephone."""
    train, held = points(history, "step"), points(history, "validation")
    mark = f"mz{width}"
    words = sentence(history)
    frame = Frame(train, held, width, height) if train or held else None
    if frame and frame.clipped:
        words += " " + say("report.curves.clipped", limit=float(frame.high))
    head = (
        f'<svg class="mz-curve" role="img" aria-labelledby="{mark}t {mark}d" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{mark}t">{escape(say("report.curves.title"))}</title>'
        f'<desc id="{mark}d">{escape(words)}</desc><style>{STYLE}</style>'
        f'<rect class="mz-paper" width="{width}" height="{height}" rx="6"/>'
    )
    if not frame:
        return f'{head}<text x="{width / 2}" y="{height / 2}" text-anchor="middle">{escape(words)}</text></svg>'
    parts = [head, frame.axes(), frame.legend()]
    if train:
        parts.append(f'<polyline class="mz-raw" points="{frame.place(shrink(train))}"/>')
        parts.append(f'<polyline class="mz-smooth" points="{frame.place(shrink(ema(train)))}"/>')
    if held:
        parts.append(f'<polyline class="mz-held" points="{frame.place(held)}"/>')
        parts.append(frame.marks(shrink(held, 80)))
    return "".join([*parts, "</svg>"])


class Frame:
    """The paper of one curve: from steps and losses to places on it."""

    def __init__(self, train: Line, held: Line, width: int, height: int) -> None:
        self.held, self.width, self.height = held, width, height
        self.narrow = width < 500
        self.left, self.right, self.top, self.bottom = 52, width - 18, 92 if self.narrow else 54, height - 46
        raw = sorted(y for _, y in train)
        # One wild batch must not flatten the rest: the raw line may leave the paper, the smooth one and the checks not.
        most = [y for _, y in [*ema(train), *held]] + raw[: max(1, math.ceil(0.99 * len(raw)))]
        low, high = min(y for _, y in [*train, *held]), max(most)
        self.clipped = bool(raw) and raw[-1] > high
        self.y_ticks = ticks(low, high, 5)
        self.low, self.high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        last = max(x for x, _ in [*train, *held])
        self.x_ticks = [t for t in ticks(0, max(last, 1), 4 if self.narrow else 8) if t <= last and t == int(t)]
        self.last = max(last, 1)

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * step / self.last

    def y(self, loss: float) -> float:
        inside = min(max(loss, self.low), self.high)
        return self.bottom - (self.bottom - self.top) * (inside - self.low) / ((self.high - self.low) or 1)

    def place(self, line: Line) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in line)

    def axes(self) -> str:
        gap = self.y_ticks[1] - self.y_ticks[0] if len(self.y_ticks) > 1 else 1
        decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="mz-grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick, decimals)}</text>')
        for tick in self.x_ticks:
            label = number(int(tick))
            parts.append(f'<text x="{self.x(tick):.1f}" y="{self.bottom + 18}" text-anchor="middle">{label}</text>')
        middle = (self.left + self.right) / 2
        step, loss = escape(say("report.curves.step")), escape(say("report.curves.loss"))
        parts.append(f'<text x="{middle}" y="{self.height - 8}" text-anchor="middle">{step}</text>')
        parts.append(f'<text x="{self.left - 42}" y="20" class="mz-strong">{loss}</text>')
        return "".join(parts)

    def legend(self) -> str:
        """Above the drawing, in one row, or in three when the paper is narrow."""
        parts, x, y = [], self.left - 42, 40
        for name in ("raw", "smooth", "validation"):
            if name == "validation" and not self.held:
                continue
            words = say(f"report.curves.{name}")
            shape = "mz-held" if name == "validation" else f"mz-{name}"
            parts.append(f'<polyline class="{shape}" points="{x},{y - 4} {x + 26},{y - 4}"/>')
            if name == "validation":
                parts.append(f'<circle class="mz-mark" cx="{x + 13}" cy="{y - 4}" r="4"/>')
            parts.append(f'<text x="{x + 32}" y="{y}">{escape(words)}</text>')
            x, y = (x, y + 18) if self.narrow else (x + 52 + round(6.6 * len(words)), y)
        return "".join(parts)

    def marks(self, held: Line) -> str:
        """A ring per check; the lowest is filled, larger and labelled."""
        best = min(self.held, key=lambda p: p[1])
        rings = [f'<circle class="mz-mark" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4"/>' for x, y in held]
        x, y = self.x(best[0]), self.y(best[1])
        anchor = "end" if x > (self.left + self.right) / 2 else "start"
        label = escape(
            say("report.curves.best_short" if self.narrow else "report.curves.best", loss=best[1], step=best[0])
        )
        # Above, where a falling curve leaves room; the halo of `mz-label` keeps it legible if it does not.
        above = y - 20 if y - 30 > self.top else y + 26
        rings.append(f'<circle class="mz-mark mz-best" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
        place = f'x="{x:.1f}" y="{above:.1f}" text-anchor="{anchor}"'
        rings.append(f'<text class="mz-strong mz-label" {place}>{label}</text>')
        return "".join(rings)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover low to high: `ticks(0, 240, 5)` is [0, 50, 100, 150, 200, 250]."""
    if high <= low:
        high = low + (abs(low) or 1) * 0.1
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    gap = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [round(i * gap, 12) for i in range(first, last + 1)]
