"""The nursery of child processes, and the tiny run that all of them train."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maese.run import Run

HERE = Path(__file__).parent
KILLED, TERM, INT = -9, 143, 130
CHANGES = [
    "train.max_steps=10", "train.epochs=9", "train.save_every=2", "train.keep=2", "eval.every=5",
    "eval.prompts=[En un lugar]", "generate.max_new_tokens=4",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


class Child:
    """One life of a run, in a process of its own."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self.log = nursery, pid, log
        self.code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = int(self.nursery.ask({"wait": self.pid}))
        return self.code

    def kill(self, number: int) -> int:
        os.kill(self.pid, number)
        return self.wait()

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8")


class Nursery:
    def __init__(self, cache: Path) -> None:
        # In its own group, so that a Ctrl+C of whoever runs the tests does not reach the children as one of ours.
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"MAESE_CACHE": str(cache), "COLUMNS": "100"},
        )  # fmt: skip
        assert self.read() == "ready"

    def read(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, order: dict) -> str:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.read()

    def child(self, do: str, *args: str, **more) -> Child:
        """`child("resume", "cut", hook={"at": DISK, "nth": 5, "signal": 9})`."""
        log = Path.cwd() / f"{do}-{random.random()}.log"
        pid = int(self.ask({"do": do, "args": args, "cwd": str(Path.cwd()), "log": str(log), **more}))
        return Child(self, pid, log)

    def train(self, name: str, *changes: str, **more) -> Child:
        return self.child("train", "receta.yaml", f"output={name}", *CHANGES, *changes, **more)

    def resume(self, name: str, **more) -> Child:
        return self.child("resume", name, **more)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    found = Nursery(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


@pytest.fixture
def life(nursery, recipe):
    """The nursery, in a folder with receta.yaml."""
    recipe()
    return nursery


def losses(run: Run) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in run.history() if e["type"] == "step"]


def weights(run: Run) -> bytes:
    return (run.final / "model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    return sorted(int(n) for path in folder.glob("checkpoints/checkpoint-*") if (n := path.name[11:]).isdigit())


@pytest.fixture
def straight(life) -> Run:
    """The run that nothing happened to."""
    child = life.train("straight")
    assert child.wait() == 0, child.said
    return Run("straight")


def same(name: str, straight: Run) -> None:
    """The run of that name ended as the one that nothing happened to, bit for bit."""
    run = Run(name)
    assert run.read("state.json")["status"] == "finished"
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    assert not [p.name for p in run.checkpoints.rglob("*") if ".tmp-" in p.name or ".old-" in p.name]


def wait_for(happened, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
