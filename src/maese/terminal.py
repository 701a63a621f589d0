"""What the commands say when they have done: samples, comparisons, and the next useful command."""

from __future__ import annotations

import json as jsons
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maese.live import shorten, watcher
from maese.pipeline import TRAININGS
from maese.run import Run, first_process
from maese.say import duration, number, percent, say

WIDEST = 100  # columns: longer lines are hard to read
__all__ = [
    "answer", "answers", "close", "columns", "comparison", "complain", "demo_verdict", "fold", "list_runs",
    "talk", "tell", "watcher", "write_papers",
]  # fmt: skip


def talk(text: str, json: bool = False, quiet: int = 0) -> None:
    """To the person, not to the pipe."""
    if not quiet and not json:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def columns() -> int:
    return max(20, min(WIDEST, shutil.get_terminal_size().columns - 1))


def fold(text: str, indent: str = "") -> str:
    """The text in lines no wider than the terminal, cut between words; what a no-break space joins stays together.

    Lines after a cut begin with `indent`.
    """
    width, lines = columns(), []
    for line in text.splitlines():
        now = ""
        for piece in re.split(r"(?<=[ \t])(?=[^ \t])", line):
            if now.strip() and len(now) + len(piece.rstrip()) > width:
                lines.append(now.rstrip())
                now = indent
            now += piece
        lines.append(now.rstrip())
    return "\n".join(lines)


def fold_error(text: str) -> str:
    """An error in lines no wider than the terminal; a command stays whole, to be copied."""
    return "\n".join(line if "maese " in line else fold(line, " " * 14) for line in text.splitlines())


def complain(problem: object, err: bool = True) -> None:
    """An error, or what explains one: on a terminal, in lines no wider than it."""
    stream = sys.stderr if err else sys.stdout
    stream.write((fold_error(str(problem)) if stream.isatty() else str(problem)) + "\n")


def tell(text: str, indent: str = "") -> None:
    """A line of the result; on a terminal no word is cut at its edge."""
    sys.stdout.write((fold(text, indent) if sys.stdout.isatty() else text) + "\n")


def write_papers(run: Run) -> dict[str, Any]:
    """metrics.json, .csv and .png and the report, from the run's folder alone."""
    from maese.report import curves, facts, page

    facts.write_metrics(run)
    curves.plot(run)
    page.write(run)
    return facts.facts(run)


def merged(made: Any, json: bool = False, quiet: int = 0) -> None:
    """Where a model went, and how far its logits are from those of base and adapter."""
    if json:
        sys.stdout.write(jsons.dumps(asdict(made) | {"path": str(made.path)}, ensure_ascii=False) + "\n")
        return
    sys.stdout.write(f"{made.path}\n")
    facts = {"path": str(made.path), "dtype": made.dtype, "size": number(made.bytes / 1e6, 1), "tokens": made.tokens}
    shares = {"difference": percent(made.difference, 4), "tolerance": percent(made.tolerance, 2)}
    talk(say("export.done", **facts, **shares), json, quiet)


def close(run: Run, json: bool = False, quiet: int = 0) -> None:
    """The end of a training: figures, verdict, the test question answered, what to do next."""
    if not first_process():
        return
    from maese.report.diagnosis import diagnose
    from maese.report.summary import box

    found = write_papers(run)
    if json:
        return
    history = run.history()
    answers = [e for e in history if e["type"] == "sample" and e.get("final")]
    talk("\n" + box(found), quiet=max(0, quiet - 1))
    verdict = diagnose(history, [e["text"] for e in answers])
    talk("\n" + verdict.text(), quiet=quiet)
    for event in answers[:1]:
        talk("\n" + say("end.asked", prompt=event["prompt"], text=shorten(event["text"], 600)), quiet=quiet)
    kind = next((e["format"] for e in history if e.get("format")), "text")
    key = "end.next" if kind == "text" else "end.next_chat"  # one that answers is asked something
    talk("\n" + say(key, run=str(run.path), report=str(run.report / "index.html")), quiet=quiet)
    sys.stdout.write(f"{run.path}\n")


def comparison(result: dict[str, Any], json: bool = False, quiet: int = 0) -> None:
    """Before and after, one prompt after another, with the proof that two models wrote them."""
    if json:
        sys.stdout.write(jsons.dumps(result, ensure_ascii=False, indent=1) + "\n")
        return
    for pair in result["prompts"]:
        lines = ["", say("compare.asked", prompt=pair["prompt"])]
        for side in ("before", "after"):
            mark = say(f"compare.{side}", fingerprint=result[side]["fingerprint"][:8])
            lines += ["", mark, *("  " + line for line in pair[side].strip().splitlines() if line.strip())]
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    wanted = result["settings"]["sentences"]
    for pair in result["prompts"]:
        for side in ("before", "after"):
            if wanted and pair["sentences"][side] != wanted:
                fewer = {"wanted": wanted, "n": pair["sentences"][side], "prompt": pair["prompt"]}
                talk(say(f"compare.fewer_{side}", **fewer), quiet=quiet)
    talk("\n" + say("compare.proof", difference=number(result["max_logit_difference"], 2)), quiet=quiet)


def verified(done: Any, json: bool = False, quiet: int = 0) -> None:
    """Whether steps done again came out as they were."""
    if json:
        sys.stdout.write(jsons.dumps(asdict(done) | {"same": done.same}, ensure_ascii=False) + "\n")
        return
    facts = {"first": done.first, "last": done.last}
    if done.same:
        sys.stdout.write(say("resume.same", **facts) + "\n")
        return
    largest = max(done.weights.values(), default=0.0)
    counts = {"losses": len(done.losses), "weights": len(done.weights), "largest": f"{largest:.1e}"}
    sys.stdout.write(say("resume.differ", **facts, **counts) + "\n")


def demo_verdict(run: Run, json: bool = False, quiet: int = 0) -> None:
    """The one figure of the demo: how much better the model now finds text of the book it has not read."""
    validations = [e for e in run.history() if e["type"] == "validation"]
    before = validations[0]["loss"]
    after = min(e["loss"] for e in validations)
    facts = {"before": number(before, 3), "after": number(after, 3), "change": percent((before - after) / before)}
    talk("\n" + say("demo.verdict", **facts, tokens=validations[0]["tokens"]), json, quiet)
    talk(say("demo.report", report=str((run.report / "index.html").absolute())), json, quiet)


def list_runs(json: bool = False, quiet: int = 0) -> None:
    """Every run under `runs/`, newest first, with its state and its loss on text kept apart."""
    rows = []
    for path in sorted(Path("runs").glob("*/recipe.yaml"), key=lambda p: p.stat().st_mtime, reverse=True):
        run = Run(path.parent)
        state = run.read("state.json") or {}
        status = state.get("status", "training")
        if status == "training":
            status = "training" if run.holder() else "interrupted"
        # A model made from nothing keeps them by training: those of the last it came to.
        folders = (*(path.parent / stage for stage in TRAININGS[::-1]), path.parent)
        checks = ([e["loss"] for e in Run(each).history() if e["type"] == "validation"] for each in folders)
        losses = next(filter(None, checks), [])
        rows.append({"run": path.parent.name, "status": status, "first": losses[:1], "last": losses[-1:]})
    if json:
        sys.stdout.write(jsons.dumps(rows, ensure_ascii=False) + "\n")
        return
    if not rows:
        talk(say("runs.none"), quiet=quiet)
    width = max((len(row["run"]) for row in rows), default=0)
    for row in rows:
        change = " → ".join(number(v[0], 3) for v in (row["first"], row["last"]) if v)
        sys.stdout.write(f"{row['run']:<{width}}  {say('runs.' + row['status']):<13} {change}\n")
    if any(row["status"] == "interrupted" for row in rows):
        talk(say("runs.resume", run=next(r["run"] for r in rows if r["status"] == "interrupted")), quiet=quiet)


def answer(writer: Any, prompt: str, settings: dict[str, Any], json: bool = False, quiet: int = 0) -> None:
    """Write after a prompt: as it comes on a terminal, whole otherwise."""
    chosen = writer.with_settings(settings)
    if settings.get("system") and writer.format == "text":
        talk(say("generate.no_system"), json, quiet)
    # Sentences may take several attempts, and an attempt that failed should not be seen.
    live = sys.stdout.isatty() and not json and not chosen.sentences
    if live:
        sys.stdout.write(prompt if writer.format == "text" else "")
    result = writer.generate(prompt, on_text=_show if live else None, **settings)
    if json:
        as_data(prompt, result)
        return
    if not live:
        sys.stdout.write((prompt if writer.format == "text" else "") + result.text)
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in (*fewer(result, chosen), footer(result, chosen)):
        talk(line, quiet=quiet)


def answers(
    company: Any, prompt: str, base: bool, settings: dict[str, Any], json: bool = False, quiet: int = 0
) -> None:
    """What the personalities that were asked for write after a prompt: several in one batch, each with its name."""
    writers = company.guests or [company.writers[company.main]]
    if base:  # their words and ways, without what they learnt
        writers = [company.base(writer) or writer for writer in writers]
    if len(writers) == 1:
        answer(writers[0], prompt, settings, json, quiet)
        return
    for writer, result in zip(writers, company.ask_all(prompt, of=writers, **settings), strict=True):
        chosen = writer.with_settings(settings)
        if json:
            as_data(prompt, result)
            continue
        begun = prompt if writer.format == "text" else ""
        sys.stdout.write(f"{result.persona or say('chat.base')}> {begun}{result.text}\n")
        sys.stdout.flush()
        for line in (*fewer(result, chosen), footer(result, chosen)):
            talk(line, quiet=quiet)


def as_data(prompt: str, result: Any) -> None:
    """An answer as one line of JSON, with what it answers."""
    sys.stdout.write(jsons.dumps({"prompt": prompt} | result.facts(), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fewer(result: Any, settings: Any) -> list[str]:
    """That there are not so many sentences as were asked for, if so it is."""
    if not settings.sentences or result.reason == "sentences":
        return []
    return [say("generate.not_so_many", wanted=settings.sentences, n=result.sentences)]


def footer(result: Any, settings: Any) -> str:
    """The line below an answer: «socratico · 84 tokens · 31 tokens/s · 2,7 s · semilla 42 · T=0,7 top-k=50»."""
    speed = number(result.tokens / max(1e-6, result.seconds), 0)
    facts = {"tokens": result.tokens, "speed": speed, "seconds": duration(result.seconds), "seed": result.seed}
    line = say("generate.footer", **facts, how=how(settings))
    return f"{result.persona} · {line}" if result.persona else line


def how(settings: Any) -> str:
    if settings.temperature == 0:
        return say("generate.greedy")
    return f"T={number(settings.temperature, 1)} top-k={settings.top_k} top-p={number(settings.top_p, 2)}"


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
