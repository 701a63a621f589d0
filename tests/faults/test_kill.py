"""kill -9 at any instant: what is resumed ends as what was never stopped, and at most one interval is lost."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from faults.conftest import KILLED, losses, same, steps_of, wait_for
from faults.nursery import DISK
from maese.run import Run

SEED = 20261121


def test_killed_at_twenty_four_random_instants(life, straight):
    draw, killed = random.Random(SEED), 0
    for i in range(24):
        name = f"r{i}"
        child = life.train(name)
        recipe = Path(name) / "recipe.yaml"
        wait_for(recipe.exists)
        # From when there is something to resume: a run this small lives for about half a second more.
        time.sleep(draw.uniform(0, 0.5))
        if child.kill(signal.SIGKILL) == KILLED:
            killed += 1
            if (Run(name).read("state.json") or {}).get("status") == "finished":  # it was only writing its report
                same(name, straight)
                continue
            _at_most_one_interval_is_lost(name)
            child = life.resume(name)
            assert child.wait() == 0, f"{name} of seed {SEED}: {child.said}"
        same(name, straight)
    assert killed >= 20, "the instants drawn came too late for this machine"


def _at_most_one_interval_is_lost(name: str) -> None:
    done = [step for step, *_ in losses(Run(name))]
    kept = steps_of(Path(name))
    assert max(done, default=0) - max(kept, default=0) <= 2


def test_killed_before_and_after_every_touch_of_the_disk(life, straight):
    """Every flush, rename, folder made and file removed from the first event to the last; and files half written."""
    child = life.train("count", hook={"at": DISK})
    assert child.wait() == 0, child.said
    calls = int(Path("calls").read_text("utf-8"))
    assert calls > 60
    print(f"{calls} touches of the disk")
    for nth in range(1, calls + 1):
        name, when = f"n{nth}", ("before", "after")[nth % 2]
        child = life.train(name, hook={"at": DISK, "nth": nth, "when": when, "signal": signal.SIGKILL})
        assert child.wait() == KILLED
        _goes_on(life, name, straight)


@pytest.mark.parametrize("nth", range(1, 14))
def test_killed_with_a_file_half_written(life, straight, nth):
    hook = {"at": ["safetensors.torch:save_file"], "nth": nth, "when": "torn", "signal": signal.SIGKILL}
    assert life.train("torn", hook=hook).wait() == KILLED
    _goes_on(life, "torn", straight)


def test_killed_again_and_again_while_it_is_resumed(life, straight):
    """Lives cut at their 45th touch of the disk: each gets a little further, and the last one arrives."""
    hook = {"at": DISK, "nth": 45, "when": "after", "signal": signal.SIGKILL}
    child, lives = life.train("r", hook=hook), 1
    while child.wait() == KILLED:
        child, lives = life.resume("r", hook=hook), lives + 1
        assert lives < 30, "it does not move on"
    assert lives > 2
    same("r", straight)


def _goes_on(life, name: str, straight: Run) -> None:
    """Resumed to the same end; or trained again when it died before there was a run to resume."""
    if not (Path(name) / "recipe.yaml").exists():
        child = life.resume(name)
        assert child.wait() == 1 and "RUN-02" in child.said
        return
    child = life.resume(name)
    if child.wait() == 1 and "RUN-04" in child.said:  # it had written everything
        return
    assert child.code == 0, f"{name}: {child.said}"
    same(name, straight)
