"""Asked to stop, in each phase; the clock set back; two that want one folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from faults.conftest import INT, TERM, same, steps_of, wait_for
from maese import run as runs
from maese.errors import MaeseError
from maese.run import Run

STEP = ["maese.train.loop:rate"]  # called once a step
# Where a signal finds the run, and at which of its calls: the second look is that of step 5.
PHASES = {
    "first look": ("maese.train.milestones:loss_and_targets", 1), "step": ("maese.train.step:loss_sum", 9),
    "validating": ("maese.train.milestones:loss_and_targets", 2), "sampling": ("maese.train.milestones:Writer", 2),
    "saving": ("safetensors.torch:save_file", 5), "moving": ("os:replace", 6),
}  # fmt: skip
CODES = {signal.SIGINT: INT, signal.SIGTERM: TERM}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(life, straight, phase, number):
    place, nth = PHASES[phase]
    child = life.train("r", hook={"at": [place], "nth": nth, "signal": number})
    assert child.wait() == CODES[number], child.said
    assert "RUN-06" in child.said and "maese resume r" in child.said
    assert Run("r").read("state.json")["step"] == steps_of(Path("r"))[-1]
    assert life.resume("r").wait() == 0
    same("r", straight)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_it_prepares_leaves_no_run(life, number):
    child = life.train("r", hook={"at": ["maese.train.session:prepare"], "nth": 1, "signal": number})
    assert child.wait() in (CODES[number], -number)
    assert not Path("r").exists()


@pytest.mark.parametrize("number", CODES)
def test_a_signal_at_the_very_end_does_not_undo_it(life, straight, number):
    child = life.train("r", hook={"at": ["maese.train.milestones:save_final"], "nth": 1, "signal": number})
    assert child.wait() in (0, CODES[number])
    if child.code:
        assert life.resume("r").wait() == 0
    same("r", straight)


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_leaves_at_once(life, straight, number):
    """In the middle of a save: nothing waits for it, and what was whole stays whole."""
    hook = {"at": ["safetensors.torch:save_file"], "nth": 5, "signal": number, "again": number}
    child = life.train("r", hook=hook)
    assert child.wait() in (INT, TERM, -number)
    assert steps_of(Path("r")) == [2]
    assert life.resume("r").wait() == 0
    same("r", straight)


def test_a_clock_set_back_changes_nothing(life, straight):
    child = life.train("r", hook={"at": STEP, "nth": 4, "back": 10 * 365})
    assert child.wait() == 0, child.said
    same("r", straight)
    times = [event["t"] for event in Run("r").events()]
    assert times != sorted(times)
    assert all(e["seconds"] >= 0 and e["tokens_s"] > 0 for e in Run("r").history() if e["type"] == "step")


def test_two_processes_do_not_share_a_folder_whatever_the_clock_says(life, straight, monkeypatch):
    one = life.train("r", hook={"at": STEP, "nth": 4, "signal": signal.SIGSTOP})
    wait_for(lambda: Path(f"/proc/{one.pid}/stat").read_text("ascii").split()[2] == "T")
    lock = Path("r/lock").read_text("utf-8")
    other = life.resume("r")
    assert other.wait() == 1 and "RUN-03" in other.said
    again = life.train("r")
    assert again.wait() == 1 and "RUN-01" in again.said
    # Set back, the clock makes a living process look younger than its own lock: the system's lock still holds.
    monkeypatch.setattr(runs, "_started", lambda pid: None if pid == os.getpid() else 1.0)
    with pytest.raises(MaeseError, match="RUN-03"):
        Run("r").open_for_writing()
    assert Path("r/lock").read_text("utf-8") == lock and json.loads(lock)["pid"] == one.pid
    os.kill(one.pid, signal.SIGCONT)
    assert one.wait() == 0, one.said
    same("r", straight)
