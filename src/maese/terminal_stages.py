"""A model made from nothing, as the terminal tells it: the sizes there are, then each stage when it ends."""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable
from typing import Any

from maese.kept import shape_of
from maese.pipeline import STAGES, Pipeline
from maese.plan.shape import of_size, parameters
from maese.plan.sizes import SIZES
from maese.run import Run
from maese.say import number, quantity, say
from maese.terminal import talk
from maese.terminal_tokens import draw

Tell = Callable[[str, dict[str, Any]], object]


def show_sizes(pipeline: Pipeline, json: bool = False, quiet: int = 0) -> None:
    """The table of sizes, with the parameters of each computed for the architecture, and what will be made."""
    if json or quiet:
        return
    from maese.report.whole import sizes

    kind, mine = pipeline.architecture, shape_of(pipeline)
    all_of_it = parameters(of_size(mine, kind))
    rows = {name: shape.__dict__ | {"parameters": parameters(of_size(shape, kind))} for name, shape in SIZES.items()}
    rows[pipeline.size] = mine.__dict__ | {"parameters": all_of_it}
    draw([sizes(list(rows.items()), pipeline.size)], talk=True)
    talk(say("stage.making", name=pipeline.name, size=pipeline.size, n=quantity(all_of_it)))


def teller(json: bool = False, quiet: int = 0) -> Tell:
    """What hears that a stage ended: its name and its tables, or one line of JSON."""

    def tell(stage: str, facts: dict[str, Any]) -> None:
        if json:
            sys.stdout.write(jsons.dumps({"stage": stage, "facts": facts}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            return
        if quiet:
            return
        from maese.report import whole

        place = {"n": STAGES.index(stage) + 1, "of": len(STAGES), "title": whole.named(stage)}
        talk("\n" + say("stage.done", **place))
        draw(whole.tables(stage, facts), talk=True)
        if facts.get("asked"):
            talk(say("stage.fewer", made=facts["made"], asked=facts["asked"]))
        if facts.get("validation_kept") is not None:
            loss = number(facts["validation_kept"], 3)
            talk(say("stage.learnt", loss=loss, n=quantity(facts["tokens"] or 0), steps=facts["steps"]))

    return tell


def close(run: Run, pipeline: Pipeline, json: bool = False, quiet: int = 0) -> None:
    """What to do next with it."""
    if json:
        return
    last = next((name for name in reversed(pipeline.trainings) if (run.path / name / "final").is_dir()), None)
    if last:
        talk("\n" + say("stage.next", run=str(run.path / last)), quiet=quiet)
    page = run.report / "index.html"
    talk(
        say("stage.page", report=str(page)) if page.exists() else "\n" + say("stage.on", run=str(run.path)),
        quiet=quiet,
    )
    sys.stdout.write(f"{run.path}\n")
