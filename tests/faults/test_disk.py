"""Disks full, gone or closed, and files that are not as they were: the last whole checkpoint is gone back to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from faults.conftest import INT, same, steps_of
from maese.errors import MaeseError
from maese.run import Run
from maese.train import checkpoint

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "MANIFEST.json"]
STEP = ["maese.train.loop:rate"]  # called once a step


@pytest.fixture
def stopped(life) -> Path:
    """A run that was asked to stop in its seventh step, with the checkpoints 6 and 7."""
    child = life.train("stopped", hook={"at": STEP, "nth": 7, "signal": signal.SIGINT})
    assert child.wait() == INT, child.said
    assert steps_of(Path("stopped")) == [6, 7]
    return Path("stopped")


def flip(place: float):
    def change(raw: bytes) -> bytes:
        at = round(place * (len(raw) - 1))
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    return change


DAMAGES = {
    "first": flip(0), "middle": flip(0.5), "last": flip(1), "cut": lambda raw: raw[: len(raw) // 3],
    "zeroed": lambda raw: raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2), "empty": lambda raw: b"",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_named_and_the_checkpoint_before_is_used(life, straight, stopped, file):
    for name, change in DAMAGES.items():
        shutil.copytree(stopped, name)
        path = Path(name) / "checkpoints" / "checkpoint-7" / file
        path.write_bytes(change(path.read_bytes()))
        child = life.resume(name)
        assert child.wait() == 0, f"{name}: {child.said}"
        told = [e["facts"] for e in Run(name).events() if e["type"] == "warning" and e["code"] == "RESUME-03"]
        # In the last byte of the manifest there is a brace; in the others a digit may be as good as another.
        assert [facts["checkpoint"] for facts in told] == ["checkpoint-7"], name
        assert told[0]["file"] == file
        same(name, straight)


def test_with_every_checkpoint_broken_nothing_is_pretended(life, stopped):
    for path in stopped.glob("checkpoints/checkpoint-*/rng.safetensors"):
        path.write_bytes(DAMAGES["cut"](path.read_bytes()))
    child = life.resume("stopped")
    assert child.wait() == 1 and "RESUME-02" in child.said
    assert steps_of(stopped) == [6, 7]


@pytest.fixture
def reachable(stopped):
    """The stopped run where anybody may go, to be looked at by somebody without the rights of root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(stopped, folder / "run")
    for file in folder.rglob("*.safetensors"):  # written for their owner alone
        file.chmod(0o644)
    yield folder / "run"
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)


class Nobody:
    """Root may read and write everything: for a moment we are not root."""

    def __enter__(self):
        self.root = os.geteuid() == 0
        if self.root:
            os.seteuid(65534)

    def __exit__(self, *_):
        if self.root:
            os.seteuid(0)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read_is_a_broken_one(reachable, file):
    path = reachable / "checkpoints" / "checkpoint-7"
    (path / file).chmod(0)
    with Nobody():
        assert checkpoint.damage(path) == file
        found, manifest, refused = checkpoint.newest(path.parent)
    assert (found.name, manifest["step"], refused) == ("checkpoint-6", 6, [("checkpoint-7", file)])


def test_a_folder_that_may_not_be_written_is_said_and_left_alone(reachable):
    import torch

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    reachable.joinpath("checkpoints").chmod(0o555)
    with pytest.raises(MaeseError) as problem, Nobody():
        checkpoint.save(reachable / "checkpoints", 8, model, optimizer, {}, 2)
    assert problem.value.code == "DISK-02"
    assert steps_of(reachable) == [6, 7]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 80 MiB: room for the margin that is asked for, and little else."""
    path = tmp_path / "disco"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk may be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_fills_up_at_any_moment(life, straight, small_disk):
    """Something else takes the last byte; once there is room again, the run goes on as if nothing had happened."""
    codes = set()
    for nth in range(7, 30, 3):
        run = small_disk / f"r{nth}"
        hook = {"at": ["os:fsync"], "nth": nth, "fill": str(small_disk / "relleno")}
        child = life.train(str(run), hook=hook)
        assert child.wait() == 1, child.said
        codes |= {code for code in ("DISK-01", "DISK-03") if code in child.said}
        assert "DISK-0" in child.said
        assert all(checkpoint.damage(path) is None for path in checkpoint.saved(run / "checkpoints"))
        (small_disk / "relleno").unlink()
        child = life.resume(str(run))
        assert child.wait() == 0, f"{nth}: {child.said}"
        same(str(run), straight)
        shutil.rmtree(run)
    assert codes == {"DISK-01", "DISK-03"}


def test_a_disk_too_small_for_a_checkpoint_is_told_before_it_is_full(life, small_disk):
    (small_disk / "relleno").write_bytes(bytes(30 << 20))
    child = life.train(str(small_disk / "r"))
    assert child.wait() == 1 and "DISK-03" in child.said
    assert not list((small_disk / "r").glob("checkpoints/*"))


def test_a_write_that_finds_no_room_half_way_leaves_the_one_before(life, straight):
    """Without a disk of its own: the library's own writer is refused, as by a quota."""
    for nth in (5, 8):
        name = f"q{nth}"
        child = life.train(name, hook={"at": ["safetensors.torch:save_file"], "nth": nth, "errno": 28})
        assert child.wait() == 1 and "DISK-01" in child.said
        assert steps_of(Path(name)) and not list(Path(name).rglob("*.tmp-*"))
        assert life.resume(name).wait() == 0
        same(name, straight)


def test_a_run_folder_that_goes_away_is_said_and_not_made_again(life, straight):
    child = life.train("ida", hook={"at": STEP, "nth": 4, "move": "ida"})
    assert child.wait() == 1 and "DISK-04" in child.said
    assert not Path("ida").exists()
    os.rename("ida-lejos", "ida")
    assert steps_of(Path("ida")) == [2]
    assert life.resume("ida").wait() == 0
    same("ida", straight)
