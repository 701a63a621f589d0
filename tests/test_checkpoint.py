"""Checkpoints alone: what is kept, what is let go, what is refused, and what a run may change when it goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest

from maese.errors import Interrupted, MaeseError
from maese.run import Run
from maese.train import checkpoint
from maese.train.checkpoint import refusals
from maese.train.loop import train
from maese.train.verify import verify

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def saving(here):
    """`saving(step, keep, …)` writes a checkpoint of a tiny layer into checkpoints/."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    folder = here / "r" / "checkpoints"
    folder.parent.mkdir()

    def save(step: int, keep: int = 2, **more):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return checkpoint.save(folder, step, model, optimizer, {"best_step": step}, keep, **more)

    save.folder, save.model, save.optimizer = folder, model, optimizer
    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_does_not_fit_twice_is_refused_before_a_byte_is_written(saving, monkeypatch):
    saving(1)
    free = 2 * 1000 + checkpoint.MARGIN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    checkpoint.room(saving.folder, 1000)
    with pytest.raises(MaeseError) as problem:
        checkpoint.room(saving.folder, 1001)
    assert problem.value.code == "DISK-03"
    assert problem.value.facts["needed"] * 2**30 == pytest.approx(free + 2)
    with pytest.raises(MaeseError, match="DISK-03"):
        saving(2)
    assert names(saving.folder) == ["checkpoint-1"]
    assert checkpoint.damage(saving.folder / "checkpoint-1") is None


def test_what_a_checkpoint_will_weigh_is_known_before_the_first_step(saving):
    foreseen = checkpoint.weight(saving.model, saving.optimizer)
    saving(1)
    kept = checkpoint.weight(saving.model, saving.optimizer)
    assert foreseen == 3 * 4 * 8 and foreseen <= kept <= foreseen + 2 * 4  # and the two counts of steps


def test_a_run_folder_that_is_gone_is_not_made_again(saving):
    shutil.rmtree(saving.folder.parent)
    for write in (lambda: saving(1), lambda: checkpoint.save_best(saving.folder, 1, saving.model)):
        with pytest.raises(MaeseError, match="DISK-04"):
            write()
    assert not saving.folder.parent.exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_flush_is_good_enough_and_one_that_fails_is_not(saving, monkeypatch, number):
    def flush(fault):
        def fsync(handle):
            raise OSError(fault, os.strerror(fault))

        return fsync

    monkeypatch.setattr(os, "fsync", flush(number))
    assert checkpoint.damage(saving(1)) is None
    monkeypatch.setattr(os, "fsync", flush(errno.EIO))
    with pytest.raises(OSError):
        saving(2)
    assert names(saving.folder) == ["checkpoint-1"]


def test_only_whole_ones_are_counted_among_those_kept(saving):
    for step in (1, 2):
        saving(step)
    (saving.folder / "checkpoint-2" / "rng.safetensors").write_bytes(b"")
    saving(3)
    assert names(saving.folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    saving(4)
    assert [p.name for p in checkpoint.saved(saving.folder) if checkpoint.intact(p)] == ["checkpoint-3", "checkpoint-4"]


def test_the_one_resumed_from_is_not_let_go(saving):
    for step in range(1, 6):
        saving(step, keep=1, spare={2})
    assert names(saving.folder) == ["checkpoint-2", "checkpoint-5"]


def test_the_best_of_every_checkpoint_kept_stays(saving):
    """Going back from a damaged newest one, final/ must still find what was the best until then."""
    for step in (1, 2, 3):
        checkpoint.save_best(saving.folder, step, saving.model)
        saving(step)
        checkpoint.keep_best(saving.folder, step)
    assert names(saving.folder) == ["best-000002", "best-000003", "checkpoint-2", "checkpoint-3"]


def test_the_best_is_checked_like_the_others(saving):
    path = checkpoint.save_best(saving.folder, 7, saving.model)
    assert checkpoint.damage(path) is None
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "model.safetensors").write_bytes(raw)
    assert checkpoint.damage(path) == "model.safetensors"
    assert checkpoint.damage(checkpoint.best(saving.folder, 8)) == "MANIFEST.json"


def test_saving_a_step_again_never_leaves_it_without_one(saving, monkeypatch):
    first = (saving(1) / "model.safetensors").read_bytes()
    real = os.replace

    def fails(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "broken")
        return real(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", fails)
        saving(1)
    assert names(saving.folder) == ["checkpoint-1"]
    assert (saving.folder / "checkpoint-1" / "model.safetensors").read_bytes() == first
    assert (saving(1) / "model.safetensors").read_bytes() != first


def test_a_death_between_two_renames_is_mended(saving):
    path = saving(3)
    os.rename(path, saving.folder / "checkpoint-3.old-99")
    shutil.copytree(saving.folder / "checkpoint-3.old-99", saving.folder / "checkpoint-3.tmp-99")
    checkpoint.sweep(saving.folder)
    assert names(saving.folder) == ["checkpoint-3"] and checkpoint.damage(path) is None
    (saving.folder / "checkpoint-3.old-99").mkdir()
    checkpoint.sweep(saving.folder)
    assert names(saving.folder) == ["checkpoint-3"]


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen_or_says_the_same(saving):
    path = saving(3, recipe={"train": {"lr": 0.001}}) / "MANIFEST.json"
    whole, raw = checkpoint.manifest_of(path.parent), path.read_bytes()
    refused = 0
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            assert checkpoint.manifest_of(path.parent) == whole  # blanks between words
        except ValueError:
            refused += 1
    assert refused > 0.7 * len(raw)


def test_the_scaler_of_fp16_comes_back(saving):
    import torch

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    path = saving(1, scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    other.scale(torch.ones(1))
    checkpoint.restore(path, saving.model, saving.optimizer, other)
    assert other.get_scale() == 1024.0
    checkpoint.restore(saving(2), saving.model, saving.optimizer, other)  # one written without
    assert other.get_scale() == 1024.0


def test_an_optimizer_that_counts_in_plain_integers_comes_back_counting(saving):
    """As those of bitsandbytes do, and a file of tensors holds none."""
    saving(1)
    for parameter in saving.model.parameters():
        saving.optimizer.state[parameter]["step"] = 7
    path = checkpoint.save(saving.folder, 2, saving.model, saving.optimizer, {"best_step": 1}, 2)
    saving.optimizer.state.clear()
    checkpoint.restore(path, saving.model, saving.optimizer)
    counts = [saving.optimizer.state[parameter]["step"] for parameter in saving.model.parameters()]
    assert {type(count) for count in counts} == {int} and set(counts) == {7}


def changed(recipe, *changes: str) -> list[str]:
    before = json.loads(json.dumps(recipe().model_dump()))
    return [key for key, *_ in refusals(before, recipe(*changes).model_dump())]


def test_what_is_learnt_may_not_change_between_two_lives_of_a_run(recipe):
    changes = ("train.lr=2e-3", "train.seed=1", "train.schedule=linear", "method.kind=lora", "data.max_length=64")
    assert changed(recipe, *changes) == [
        "data.max_length", "method.kind", "train.lr", "train.schedule", "train.seed",
    ]  # fmt: skip
    assert changed(recipe, "train.max_steps=7") == ["train.max_steps"]
    assert changed(recipe, "train.precision=bf16") == ["train.precision"]
    assert changed(recipe, "data.sources=[{path: libro.txt, weight: 2}]") == ["data.sources.0.weight"]
    assert changed(recipe, "data.clean=[length]") == ["data.clean.0"]


def test_when_to_look_save_and_speak_may_change_and_where_things_lie(recipe):
    assert changed(recipe) == []
    free = (
        "train.save_every=9", "train.keep=1", "eval.every=1", "eval.prompts=[Hola]", "output=otra", "train.device=cpu",
        "generate.top_k=1", "train.gradient_checkpointing=true", "name=otro", "base=otra/carpeta",
        "data.sources=[{path: otro/libro.txt}]",
    )  # fmt: skip
    assert changed(recipe, *free) == []


def test_a_step_may_go_in_smaller_pieces_but_not_have_other_rows(recipe):
    assert changed(recipe, "train.micro_batch=1", "train.accumulation=4") == []
    assert changed(recipe, "train.micro_batch=4") == ["train.micro_batch"]
    assert changed(recipe, "train.accumulation=3") == ["train.accumulation"]


def test_a_recipe_of_before_a_key_existed_has_its_default(recipe):
    now = recipe().model_dump()
    old = json.loads(json.dumps(now))
    del old["train"]["clip"], old["data"]["sources"][0]["weight"], old["data"]["packing"]
    assert refusals(old, now) == []
    assert refusals(old, recipe("train.clip=2").model_dump()) == [("train.clip", 1.0, 2.0)]


# Repetition


def test_a_run_is_repeated_from_its_last_checkpoint_but_one(recipe):
    run = train(recipe("train.max_steps=9", "train.epochs=9", "eval.every=3"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    found = verify(run)
    assert (found.first, found.last, found.weighed, found.same) == (7, 8, True, True)
    short = verify(run, steps=1)
    assert (short.first, short.last, short.weighed, short.same) == (7, 7, False, True)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_what_was_halved_or_refused_is_so_in_the_repetition(recipe, monkeypatch):
    """Both are in the checkpoint: without them other sums, and a step applied that was not."""
    from maese.train import guard

    monkeypatch.setattr(guard, "NEEDED", 2)
    monkeypatch.setattr(guard, "SIGMAS", -1e3)  # from the third step on, each is one too high
    monkeypatch.setattr(guard, "LEAPS", 99)
    calls = []

    def check(self):
        calls.append(self)
        if len(calls) == 1:
            raise guard.OverCeiling

    monkeypatch.setattr(guard.Halving, "check", check)
    run = train(recipe("train.max_steps=9", "train.epochs=9", "train.micro_batch=4", "eval.prompts=[]"))
    events = run.events()
    assert [e["code"] for e in events if e["type"] == "warning"].count("MEM-03") == 1
    assert all(e.get("skipped") for e in events if e["type"] == "step" and e["step"] > 2)
    assert verify(run).same


def test_what_was_not_so_is_found_out(recipe):
    """A loss told otherwise, and weights that are not those the steps lead to."""
    import torch
    from safetensors.torch import load_file, save_file

    run = train(recipe("train.max_steps=9", "train.epochs=9", "eval.prompts=[]"))
    events = run.path / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
    told = next(e for e in lines if e["type"] == "step" and e["step"] == 8)
    told["loss"] += 1e-9
    events.write_text("".join(json.dumps(e) + "\n" for e in lines), "utf-8")
    path = run.checkpoints / "checkpoint-8"
    tensors = load_file(path / "model.safetensors")
    name = "transformer.wte.weight"
    tensors[name] = tensors[name] + torch.eye(320, 32) / 1024
    save_file(tensors, path / "model.safetensors")
    manifest = checkpoint.manifest_of(path)
    manifest["files"]["model.safetensors"]["sha256"] = checkpoint._sha256(path / "model.safetensors")
    (path / "MANIFEST.json").write_text(json.dumps(manifest | {"seal": checkpoint._seal(manifest)}), "utf-8")
    found = verify(run)
    assert not found.same
    assert [(step, then) for step, then, _ in found.losses] == [(8, told["loss"])] and not found.norms
    assert found.weights == {name: pytest.approx(2**-10, rel=1e-3)}


def test_to_repeat_there_must_be_two_checkpoints_and_nobody_training(recipe, monkeypatch):
    def stop_at_3(event):
        if event["type"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=r", "train.keep=1"), watch=stop_at_3)
    with pytest.raises(MaeseError, match="RESUME-04") as problem:
        verify(Run("r"))
    assert "train.save_every=2 train.keep=2" in str(problem.value)  # of 6 steps: two before the end
    monkeypatch.setattr(Run, "holder", lambda self: 1)
    with pytest.raises(MaeseError, match="RUN-03"):
        verify(Run("r"))
