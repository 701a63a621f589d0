"""The README is tried, not trusted: every `maese` command of it runs, in its order, and so does its Python.

The recipes are made small (the tiny model, two steps, few tokens); everything else is as a reader would type it.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "train.max_steps=2",
    "train.save_every=1",
    "generate.max_new_tokens=8",
    "generate.sentences=null",
    "data.max_length=120",
]


def fenced(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
def small(here, tiny, monkeypatch):
    """Recipes over the tiny model, the network replaced by a made-up book, and the folder of a clone."""
    from maese import pipeline
    from maese import recipe as recipes
    from maese.text import get
    from maese.train import architectures

    real = recipes.load
    limits = ["data.too_long=truncate"]

    def load(what, changes=()):
        if str(what).endswith("recipe.yaml"):  # a run's own: as it was
            return real(what, changes)
        kind = real(what, changes).data.format
        # The tutor's answers are longer than the tiny model reads.
        short = (
            ["data.sources=[{path: data/quien_soy.jsonl}]", "data.format=auto", "generate.system=null"]
            if kind == "messages"
            else []
        )
        return real(what, [*changes, f"base={tiny}", *SMALL, *([] if kind == "text" else limits), *short])

    real_whole = pipeline.load

    def load_whole(what, changes=()):
        if str(what).endswith("recipe.yaml"):
            return real_whole(what, changes)
        few = [change for change in SMALL if not change.startswith("data.")]
        return real_whole(what, [*changes, *few, "size=nano", "shape.layers=1", "shape.width=48"])

    monkeypatch.setattr(recipes, "load", load)
    monkeypatch.setattr(pipeline, "load", load_whole)
    monkeypatch.setattr("maese.stages.ASKED", 3)
    little = architectures.Study(layers=1, heads=2, width=32, context=32, rows=4, steps=3)
    monkeypatch.setattr(architectures, "Study", lambda **given: little)
    book = "\n".join(f"Capítulo {i}. De lo que sucedió en la venta con un mozo de mulas." for i in range(80))
    known = {"address": "https://example.org/a", "mirrors": [], "words_sha256": get.words_sha256(book)}
    monkeypatch.setitem(get.TEXTS, "quijote", known)
    monkeypatch.setattr(get, "_fetch", lambda _: book.encode())
    (here / "recipes").symlink_to(ROOT / "recipes")
    return here


def test_every_command_of_the_readme_runs(small, monkeypatch, capsys):
    from maese import cli
    from maese.run import find

    ran = []
    for block in fenced("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["maese"]:
                continue
            if words[1] == "resume":  # a run that was cut after its first step
                run = find(words[2])
                run.write("state.json", {"status": "training"})
                assert list(run.checkpoints.glob("checkpoint-*"))
            monkeypatch.setattr("sys.stdin", io.StringIO("¿De qué tipo es Pikachu?\n/exit\n"))
            code = cli.run(words[1:])
            assert code == 0, f"{line}\n{capsys.readouterr().err}"
            ran.append(words[1])
    assert {"train", "data", "new", "generate", "chat", "compare", "resume", "runs", "explain"} <= set(ran)
    assert (find("quijote").report / "class-sheet.html").is_file()


def test_the_python_of_the_readme_runs(small, capsys):
    (script,) = fenced("python")
    assert len([line for line in script.splitlines() if line.strip()]) <= 8
    exec(compile(script, "README.md", "exec"), {})
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page.is_file()
    metrics = json.loads((page.parent.parent / "metrics.json").read_text("utf-8"))
    assert metrics["steps"]
