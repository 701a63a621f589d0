"""A run as it happens, on a terminal: a panel of fixed height, plain lines, or the events themselves.

A watcher is called with every event and used as a context manager around the training:

    with watcher() as watch:
        train(recipe, watch=watch)
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from textwrap import wrap
from types import TracebackType
from typing import Any

from maese.run import Event, first_process
from maese.say import duration, has, number, percent, quantity, say

BARS = "▁▂▃▄▅▆▇█"
# Colab and log files keep every line, so a plain run speaks seldom.
PLAIN_SECONDS = 10.0
REFRESH = 4
BOX, PARTS = 80, 3  # columns of the plan, and how many parts of the memory it tells
WHOLE = "\u00a0"  # a space at which no line ends


def ema(values: list[float], span: int = 20) -> float | None:
    """Exponential mean of a series, so that one lucky batch does not look like progress."""
    mean = None
    for value in values:
        mean = value if mean is None else mean + (value - mean) * 2 / (span + 1)
    return mean


def spark(values: list[float], width: int = 24) -> str:
    """A series as bars of text: `spark([1, 2, 3])` is «▁▄█»."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if not finite:
        return ""
    size = max(1, len(finite) / width)
    means = []
    for i in range(min(width, len(finite))):
        part = finite[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    if high == low:
        return BARS[3] * len(means)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in means)


class Progress:
    """What is known of a run from its events so far."""

    def __init__(self) -> None:
        self.name, self.plan = "", Event()
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.last, self.sample = Event(), Event()
        self.prepared = 0  # items of the data, while they are turned into numbers

    def take(self, event: Event) -> None:
        kind = event["type"]
        if kind == "start":
            self.name = event["name"]
        elif kind == "plan":
            self.plan = event
        elif kind == "step":
            self.losses.append(event["loss"])
            self.last = event
        elif kind == "validation":
            self.validations.append((event["step"], event["loss"]))
        elif kind == "sample":
            self.sample = event
        elif kind == "preparing":
            self.prepared = event["items"]

    @property
    def share(self) -> float:
        return self.last.get("step", 0) / max(1, self.plan.get("steps", 1))

    def left(self) -> str:
        """Time left by the pace of training alone; the first steps are no measure of it."""
        step = self.last.get("step", 0)
        if len(self.losses) < 5 or not step:
            return "—"
        return duration(self.last["seconds"] / step * (self.plan["steps"] - step))

    def arrow(self) -> str:
        now, before = ema(self.losses), ema(self.losses[:-20])
        if now is None or before is None:
            return ""
        return "↓" if now < before else "↑"

    def best(self) -> tuple[int, float] | None:
        return min(self.validations, key=lambda v: v[1]) if self.validations else None


def spoken(event: Event) -> str | None:
    """An event as one line for people, or None for those that only move the panel."""
    kind = event["type"]
    if kind == "validation":
        facts = {"loss": number(event["loss"], 3), "perplexity": number(event["perplexity"], 1)}
        return say("live.validation", step=event["step"], **facts)
    if kind == "sample":
        return say("live.sample", prompt=event["prompt"], text=shorten(event["text"], 150))
    if kind == "saved":
        return say("live.saved", step=event["step"], path=event["path"])
    if kind == "warning":
        key = event["code"] if has(event["code"]) else f"error.{event['code']}.title"
        return say("live.warning", text=say(key, **event["facts"]))
    if kind == "start" and event["resumed_from"] is not None:
        return say("live.resumed", step=event["resumed_from"])
    return None


def plan_box(event: Event, start: Event) -> str:
    """What is about to happen, before it does."""
    rows = [
        ("base", f"{start['base']} ({quantity(event['parameters'])})"),
        (
            "data",
            say("live.plan.data", rows=event["rows"], tokens=quantity(event["tokens"]),
                held=event["validation_rows"], format=event.get("format", "auto")),
        ),
        (
            "method",
            say(f"live.plan.{start['method']}", trained=quantity(event["trainable"]),
                share=percent(event["trainable"] / event["parameters"])),
        ),
        (
            "steps",
            say("live.plan.counts", steps=event["steps"], batch=event["micro_batch"],
                accumulation=event["accumulation"], length=event["max_length"]),
        ),
        (
            "machine",
            say(f"live.plan.{event['device']}", name=event["name"], threads=event["threads"],
                memory=number(event["memory_gib"], 1)),
        ),
        ("how", _how(event)),
        *([("memory", _memory(event)), ("disk", _disk(event["disk"]))] if event.get("estimated_gib") else []),
        ("folder", event["run"]),
    ]  # fmt: skip
    labels = {key: say(f"live.plan.label.{key}") for key, _ in rows}
    width = max(map(len, labels.values()))
    lines = [say("live.plan.title", name=start["name"])]
    for key, text in rows:
        # A folder stays whole, to be copied.
        parts = [text] if key in ("base", "folder") else wrap(text, BOX - width - 4, break_on_hyphens=False)
        lines += [f"  {labels[key] if i == 0 else '':<{width}}  {part}" for i, part in enumerate(parts)]
    return "\n".join(lines)


def _memory(event: Event) -> str:
    """What must be free for the worst of the run, whether that is there, and its largest parts in GiB."""
    parts = dict(event["estimated"])
    if event["device"] == "cuda":
        parts["card"] = event["needed_gib"] - sum(parts.values())
    fits = "fits" if event["needed_gib"] <= event["room_gib"] else "tight"
    figures = {"needed": number(event["needed_gib"], 1), "total": number(event["room_gib"], 1)}
    largest = sorted(parts, key=lambda part: -parts[part])[:PARTS]
    told = [f"· {say(f'plan.part.{part}')} {number(parts[part], 2)}".replace(" ", WHOLE) for part in largest]
    return " ".join([say(f"live.plan.memory.{fits}", **figures), *told])


def _disk(space: dict[str, int]) -> str:
    """What its folder takes at most and in the end. A disk is counted in powers of ten, as its maker does."""
    return say("live.plan.disk", **{key: gigabytes(space[key]) for key in ("most", "free", "final")})


def gigabytes(size: float) -> str:
    """Of a disk: `gigabytes(2.5e9)` is «2,50», and what is too little for that «<0,01»."""
    return number(size / 1e9, 2) if size >= 1e7 or not size else f"<{number(0.01, 2)}"


def _how(event: Event) -> str:
    """What maese chose by itself: the precision, whether there is padding, who shares the work, what is compiled."""
    n = event.get("processes", 1)
    shared = "sharded" if event.get("sharded") else "one" if n == 1 else "other"
    parts = [say(f"live.plan.{event['precision']}")]
    parts += [say("live.plan.unpadded")] if event.get("unpadded") else []
    parts += [say("live.plan.compiled")] if event.get("compiled") else []
    return " · ".join([*parts, say(f"live.plan.processes.{shared}", n=n)])


def shorten(text: str, width: int) -> str:
    """One line of at most `width` signs: `shorten("a\\nb", 9)` is «a b»."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1].rstrip() + "…"


class Watcher:
    """Plain lines: for files, pipes and notebooks."""

    def __init__(self, quiet: int = 0) -> None:
        self.progress, self.quiet = Progress(), quiet
        self._start, self._spoke = Event(), 0.0

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        self.progress.take(event)
        if event["type"] == "start":
            self._start = event
        if event["type"] == "plan" and not self.quiet:
            self.line(plan_box(event, self._start))
        line = spoken(event)
        if line and not self.quiet:
            self.line(line)
        self.show(event)

    def show(self, event: Event) -> None:
        step, steps = self.progress.last.get("step", 0), self.progress.plan.get("steps", 1)
        if event["type"] == "preparing" and not self.quiet and time.monotonic() - self._spoke > PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self.line(say("live.prepared", n=event["items"]))
        if event["type"] != "step" or self.quiet > 1:
            return
        twentieth = step * 20 // steps != (step - 1) * 20 // steps
        if step in (1, steps) or twentieth or time.monotonic() - self._spoke > PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self.line(self.one_line())

    def one_line(self) -> str:
        last = self.progress.last
        return say(
            "live.line", step=last["step"], steps=self.progress.plan["steps"], share=percent(self.progress.share, 0),
            loss=number(last["loss"], 3), speed=number(last["tokens_s"], 0), left=self.progress.left(),
        )  # fmt: skip

    def line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Events(Watcher):
    """The events themselves, one JSON a line, on stdout."""

    def __call__(self, event: Event) -> None:
        if event["type"] == "preparing":  # of no run yet
            return
        sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class Panel(Watcher):
    """A panel of fixed height at the foot; events scroll above it."""

    def __enter__(self) -> Panel:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.live = Live(console=self.console, refresh_per_second=REFRESH, transient=True, get_renderable=self.render)
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def line(self, text: str) -> None:
        # Escaped by being Text: a model may write square brackets.
        from rich.text import Text

        self.live.console.print(Text(text))

    def show(self, event: Event) -> None:
        return None

    def render(self) -> Any:
        from rich.panel import Panel as Box
        from rich.text import Text

        if not self.progress.plan:
            done = self.progress.prepared
            return Text(say("live.prepared", n=done) if done else say("live.preparing"), style="dim")
        width = max(40, min(self.console.width, 100))
        body = Text("\n".join(self.rows(width - 4)), no_wrap=True, overflow="ellipsis")
        title = say("live.title", name=self.progress.name)
        return Box(body, title=title, title_align="left", subtitle=say("live.keys"), subtitle_align="left", width=width)

    def rows(self, width: int) -> list[str]:
        """The lines of the panel, none wider than it; a narrow one drops sample, bars and memory, in that order."""
        p, last = self.progress, self.progress.last
        full, empty = ("█", "░") if self.console.encoding.startswith("utf") else ("#", ".")
        cells = min(30, width - 28)
        done = round(p.share * cells)
        rows = [f"{full * done}{empty * (cells - done)}  {percent(p.share, 0)}  " + say("live.left", left=p.left())]
        loss = number(last["loss"], 3) if last else "—"
        bars = spark(p.losses[-240:]) + "  " if width >= 72 and self.console.encoding.startswith("utf") else ""
        rows.append(say("live.loss", bars=bars, loss=loss, arrow=p.arrow()))
        shown = " · ".join(number(loss, 3) for _, loss in p.validations[-4 if width >= 70 else -1 :]) or "—"
        best = p.best() if width >= 48 else None
        rows.append(
            say("live.validations", shown=shown)
            + (say("live.best", loss=number(best[1], 3), step=best[0]) if best else "")
        )
        epoch, speed = number(last.get("epoch", 0.0), 1), number(last.get("tokens_s", 0.0), 0)
        pace = say("live.pace", step=last.get("step", 0), steps=p.plan["steps"], epoch=epoch, speed=speed)
        memory = say("live.memory", used=number(last.get("mem_gib", 0.0), 1), total=number(p.plan["memory_gib"], 1))
        rows.append(pace + (memory if width >= 70 else ""))
        if width >= 74:
            sample = say("live.said", prompt=p.sample["prompt"], text=p.sample["text"]) if p.sample else "—"
            rows.append(shorten(sample, width))
        return [row if len(row) <= width else row[: width - 1] + "…" for row in rows]


def watcher(json: bool = False, quiet: int = 0) -> Watcher:
    """The right way of showing a run on this stream."""
    if json:
        return Events(quiet)
    if quiet or not sys.stderr.isatty() or not first_process():
        return Watcher(quiet)
    with contextlib.suppress(ImportError):
        return Panel(quiet)
    return Watcher(quiet)
