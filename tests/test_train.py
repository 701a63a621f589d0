"""The loop's equations: ours = transformers', accumulated = at once, resumed = uninterrupted; and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from maese import recipe as recipes
from maese.errors import Interrupted, MaeseError
from maese.run import Run
from maese.train import checkpoint
from maese.train.loop import resume, train
from maese.train.optim import rate


def steps(run: Run) -> list[dict]:
    return [e for e in run.history() if e["type"] == "step"]


def weights(run: Run) -> bytes:
    return next(iter(run.final.glob("*.safetensors"))).read_bytes()


def test_loss_is_that_of_the_transformers_trainer(recipe, here):
    """Twenty steps on the same data in the same order: same losses, 1e-5."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from maese.model.load import load_tokenizer
    from maese.tokens.batches import batches, collate
    from maese.tokens.prepare import prepare

    # The book twice over, so that twenty whole steps of six rows fit in one epoch: a last, smaller step is ours alone.
    changes = ["train.max_steps=20", "train.warmup=0", "eval.prompts=[]", "train.lr=2e-3", "train.accumulation=3"]
    sources = "data.sources=[{path: libro.txt}, {path: libro.txt}]"
    chosen = recipe(*changes, sources, "data.validation=0", f"base={_no_dropout(here)}")
    ours = [e["loss"] for e in steps(train(chosen))]

    base = here / "plain"
    tokenizer = load_tokenizer(base)
    rows = prepare(chosen.data, tokenizer, 128).train
    order = [i for step in batches(len(rows), 2, 3, chosen.train.seed, 0, 20) for micro in step for i in micro]
    assert len(order) == 120

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(data)

        def log(self, logs, *rest):
            theirs.append(logs["loss"]) if "loss" in logs else None

    theirs: list[float] = []
    data = [rows[i] for i in order]
    arguments = TrainingArguments(
        output_dir=str(here / "hf"), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=20,
        learning_rate=2e-3, weight_decay=0.01, lr_scheduler_type="cosine", logging_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", seed=42, remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    InOrder(model, arguments, data_collator=lambda part: collate(part, 1), train_dataset=data).train()
    assert len(ours) == len(theirs) == 20
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


def _no_dropout(here):
    from conftest import make_model

    return make_model(here / "plain")


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 8)])
def test_accumulated_is_the_same_as_at_once(recipe, here, shape):
    """8 rows at once = 4+4 = 2+2+2+2 = one by one, with answers of unequal length."""
    base = f"base={_no_dropout(here)}"
    micro, accumulation = shape
    common = (base, "train.max_steps=3", "eval.prompts=[]")
    whole = train(recipe(*common, "train.micro_batch=8", "train.accumulation=1", "output=a"))
    parts = train(recipe(*common, f"train.micro_batch={micro}", f"train.accumulation={accumulation}", "output=b"))
    for one, other in zip(steps(whole), steps(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-4)


def _straight(recipe, *changes):
    return train(recipe("output=straight", *changes))


@pytest.mark.parametrize(
    ("method", "optimizer"), [("full", "adamw"), ("lora", "adamw"), ("full", "adamw8bit"), ("full", "paged")]
)
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(recipe, method, optimizer):
    """Ctrl+C between any two steps, dropout on: same losses, same final weights, one row seen once an epoch."""
    changes = [f"method.kind={method}", "method.dropout=0.1", f"train.optimizer={optimizer}"]
    straight = _straight(recipe, *changes)

    def stop_at_3(event):
        if event["type"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as stopped:
        train(recipe("output=cut", *changes), watch=stop_at_3)
    assert stopped.value.exit_code == 130
    run = resume(Run("cut"))
    assert [e["loss"] for e in steps(run)] == [e["loss"] for e in steps(straight)]
    assert weights(run) == weights(straight)
    assert run.read("state.json")["status"] == "finished"


def test_killed_mid_training_resumes_bit_for_bit(recipe, here):
    """kill -9 of the real process while it trains; `maese resume` ends with the weights of a run never stopped."""
    changes = ("train.max_steps=30", "train.epochs=20", "train.save_every=4", "eval.every=10", "eval.prompts=[]")
    straight = _straight(recipe, *changes)
    recipe()
    command = [sys.executable, "-m", "maese", "train", "receta.yaml", "output=killed", *changes]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=here)
    events = here / "killed" / "events.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if events.exists() and events.read_text("utf-8").count('"step", "step"') >= 9:
            break
    process.kill()
    process.wait()
    assert Run("killed").read("state.json")["status"] == "training", "it ended before it could be killed"
    done = subprocess.run([sys.executable, "-m", "maese", "resume", "killed"], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(Run("killed")) == weights(straight)
    assert [e["loss"] for e in steps(Run("killed"))] == [e["loss"] for e in steps(straight)]


def test_the_run_folder_holds_what_was_promised(recipe):
    run = train(recipe())
    events = run.events()
    assert events[0]["type"] == "start" and events[-1]["type"] == "end"
    validations = [e for e in events if e["type"] == "validation"]
    first_step = next(i for i, e in enumerate(events) if e["type"] == "step")
    assert events.index(validations[0]) < first_step and validations[0]["step"] == 0
    assert validations[-1]["step"] == 6 and events.index(validations[-1]) > first_step
    assert all(e["v"] == 1 and e["t"] for e in events)
    assert [e["step"] for e in steps(run)] == [1, 2, 3, 4, 5, 6]
    assert any(e["type"] == "sample" and e["final"] for e in events)
    assert {"recipe.yaml", "environment.json", "data.json", "state.json", "events.jsonl", "final"} <= {
        p.name for p in run.path.iterdir()
    }
    assert recipes.load(run.path / "recipe.yaml", ["output=otra"]).train == run.recipe().train
    assert not (run.path / "lock").exists()


def test_full_model_opens_with_plain_transformers(recipe):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from maese.generate.engine import open_writer

    run = train(recipe())
    model = AutoModelForCausalLM.from_pretrained(run.final)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    ids = tokenizer("En un lugar", return_tensors="pt")["input_ids"]
    ours = open_writer(run).model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, ours)
    assert model.generation_config.top_k == 50


def test_adapter_opens_with_plain_peft(recipe, tiny):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from maese.generate.engine import open_writer

    run = train(recipe("method.kind=lora", "method.targets=[c_attn, c_proj, c_fc]", "train.lr=1e-2"))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = AutoTokenizer.from_pretrained(run.final)("En un lugar", return_tensors="pt")["input_ids"]
    plain = base(input_ids=ids).logits.detach()
    tuned = PeftModel.from_pretrained(base, str(run.final)).eval()(input_ids=ids).logits
    assert torch.equal(tuned, open_writer(run).model(input_ids=ids).logits)
    assert not torch.allclose(plain, tuned)
    assert sorted(p.name for p in run.final.glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_final_holds_the_best_weights_when_validation_rose(recipe, here):
    """A rate that wrecks the model after a good start: final/ is the best step, and its loss is the one told."""
    from maese.evaluate.likelihood import loss_and_targets
    from maese.generate.engine import open_writer
    from maese.tokens.prepare import prepare

    changes = ["train.schedule=constant", "train.lr=0.05", "train.warmup=0", "eval.every=1", "train.clip=100"]
    run = train(recipe(*changes, "train.max_steps=8"))
    validations = [e for e in run.history() if e["type"] == "validation"]
    best = min(validations[1:], key=lambda e: e["loss"])
    assert best["step"] < 8
    end = next(e for e in run.history() if e["type"] == "end")
    writer = open_writer(run)
    rows = prepare(run.recipe().data, writer.tokenizer, 128).validation
    loss, targets = loss_and_targets(writer.model, rows, 1, 4)
    assert end["final_step"] == best["step"]
    assert loss / targets == pytest.approx(best["loss"], abs=1e-4)


def test_early_stop(recipe):
    run = train(recipe("train.patience=2", "eval.every=1", "train.lr=1", "train.max_steps=9", "train.epochs=9"))
    assert run.history()[-1]["reason"] == "early_stop" and len(steps(run)) < 9


def test_gradient_checkpointing_changes_memory_not_numbers(recipe, here):
    common = (f"base={_no_dropout(here)}", "eval.prompts=[]")
    plain = train(recipe(*common, "output=a"))
    frugal = train(recipe(*common, "output=b", "train.gradient_checkpointing=true"))
    for one, other in zip(steps(plain), steps(frugal), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_the_python_interface(recipe, here):
    """The eight lines of the README, on the tiny model."""
    import maese

    run = maese.train(recipe())
    assert maese.load(run).generate("En un lugar", max_new_tokens=5).tokens <= 5
    again = maese.train(str(here / "receta.yaml"), "output=otra", "train.max_steps=1")
    assert again.final.is_dir()


@pytest.fixture
def poison(monkeypatch):
    """`poison({4, 5})`: the loss of those steps is no number."""
    from maese.train import step

    real = step._passes

    def put(steps):
        def poisoned(session, groups, weight):
            total = real(session, groups, weight)
            if session.state.step + 1 not in steps:
                return total
            for parameter in session.model.parameters():
                parameter.grad.fill_(float("nan"))
            return float("nan")

        monkeypatch.setattr(step, "_passes", poisoned)

    return put


def test_one_step_without_a_number_is_not_applied_and_is_told(recipe, poison):
    poison({4})
    run = train(recipe("output=nan"))
    told = [e for e in run.history() if e["type"] == "warning" and e["code"] == "NUM-05"]
    assert [e["step"] for e in told] == [4] and run.read("state.json")["status"] == "finished"
    assert [e["step"] for e in run.history() if e["type"] == "step"] == [1, 2, 3, 5, 6]


def test_nan_never_reaches_the_weights(recipe, poison):
    poison({4, 5, 6})
    with pytest.raises(MaeseError) as problem:
        train(recipe("output=nan", "train.save_every=1"))
    assert problem.value.code == "NUM-01"
    run = Run("nan")
    assert run.read("state.json")["status"] == "error"
    from safetensors.torch import load_file

    three, five = (load_file(run.checkpoints / f"checkpoint-{n}" / "model.safetensors") for n in (4, 5))
    assert all(bool(t.isfinite().all()) and bool((t == five[name]).all()) for name, t in three.items())


def test_a_recipe_changed_by_hand_is_refused_on_resume(recipe):
    def stop_at_3(event):
        if event["type"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut"), watch=stop_at_3)
    path = Run("cut").path / "recipe.yaml"
    path.write_text(path.read_text("utf-8").replace("lr: 0.001", "lr: 0.002"), "utf-8")
    with pytest.raises(MaeseError) as problem:
        resume(Run("cut"))
    assert problem.value.code == "RESUME-05" and "train.lr" in problem.value.facts["found"]
    path.write_text(
        path.read_text("utf-8").replace("lr: 0.002", "lr: 0.001").replace("save_every: 2", "save_every: 3"), "utf-8"
    )
    assert resume(Run("cut")).final.is_dir()


def test_rows_of_like_length_together_are_the_same_step(recipe, questions, tiny_llama):
    """The weights of a step do not depend on which rows went through the model together (but for dropout's draws)."""
    from safetensors.torch import load_file

    from maese.train import step

    changes = (
        "data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.max_length=128", "data.too_long=error",
        f"base={tiny_llama}", "train.max_steps=3", "train.micro_batch=4", "train.accumulation=2", "eval.prompts=[]",
    )  # fmt: skip
    grouped = load_file(train(recipe("output=juntas", *changes)).final / "model.safetensors")
    before = step.by_room
    step.by_room = lambda rows, lengths, room: [[row] for row in rows]
    try:
        alone = load_file(train(recipe("output=solas", *changes)).final / "model.safetensors")
    finally:
        step.by_room = before
    assert max(float((grouped[name] - alone[name]).abs().max()) for name in grouped) < 1e-5


def test_damaged_checkpoint_is_refused_aloud_and_the_one_before_used(recipe):
    straight = _straight(recipe)

    def stop_at_5(event):
        if event["type"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut", "train.keep=3"), watch=stop_at_5)
    newest = Run("cut").checkpoints / "checkpoint-5" / "model.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-9] ^= 1  # one bit: safetensors itself would load it without a word
    newest.write_bytes(raw)
    heard = []
    run = resume(Run("cut"), watch=heard.append)
    warning = next(e for e in heard if e["type"] == "warning")
    assert warning["code"] == "RESUME-03" and warning["facts"]["checkpoint"] == "checkpoint-5"
    assert weights(run) == weights(straight)


def test_disk_full_during_a_save_leaves_nothing_half_written(recipe, monkeypatch):
    import errno

    real = os.fsync

    def full(handle):
        # The second checkpoint meets a full disk; the first one had room.
        if list(Run("lleno").checkpoints.glob("checkpoint-4.tmp-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    with monkeypatch.context() as patch, pytest.raises(MaeseError) as problem:
        patch.setattr(os, "fsync", full)
        train(recipe("output=lleno"))
    assert problem.value.code == "DISK-01"
    assert [p.name for p in Run("lleno").checkpoints.iterdir() if p.name.startswith("checkpoint")] == ["checkpoint-2"]
    assert weights(resume(Run("lleno"))) == weights(_straight(recipe))


def test_disk_full_in_the_final_save_keeps_no_final(recipe, monkeypatch):
    import errno

    from maese.model import save

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "_save_weights", full)
    with pytest.raises(MaeseError) as problem:
        train(recipe("output=lleno"))
    assert problem.value.code == "DISK-01"
    assert [p.name for p in Run("lleno").path.iterdir() if p.name.startswith("final")] == []


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "MANIFEST.json"])
def test_a_checkpoint_is_whole_or_not_there(recipe, file):
    run = train(recipe("train.save_every=4"))
    folder = run.checkpoints / "checkpoint-4"
    assert checkpoint.damage(folder) is None
    (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    assert checkpoint.damage(folder) == file
    (folder / file).unlink()
    assert checkpoint.damage(folder) == file


def test_a_base_that_was_moved_is_asked_for_where_it_was(recipe, tiny, here):
    """To begin anew over it, as other errors propose, would be to lose what was learnt."""
    base = shutil.copytree(tiny, here / "base")

    def stop_at_3(event):
        if event["type"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut", f"base={base}"), watch=stop_at_3)
    moved = base.rename(here / "movida")
    with pytest.raises(MaeseError, match="RESUME-06") as problem:
        resume(Run("cut"))
    assert f"ln -s DONDE_ESTA_AHORA {base}" in str(problem.value)
    base.symlink_to(moved)
    assert resume(Run("cut")).read("state.json")["status"] == "finished"


def test_what_ended_is_not_resumed_and_what_is_all_damaged_cannot(recipe):
    run = train(recipe("output=hecho"))
    with pytest.raises(MaeseError, match="RUN-04"):
        resume(run)
    run.write("state.json", {"status": "training"})
    for folder in run.checkpoints.glob("checkpoint-*"):
        (folder / "rng.safetensors").unlink()
    with pytest.raises(MaeseError, match="RESUME-02"):
        resume(run)


def test_a_run_cut_before_its_first_checkpoint_begins_anew(recipe):
    straight = _straight(recipe)

    class Cut(Exception):
        pass

    def cut_at_1(event):
        if event["type"] == "step":
            raise Cut

    with pytest.raises(Cut):
        train(recipe("output=cut"), watch=cut_at_1)
    run = resume(Run("cut"))
    assert weights(run) == weights(straight)
    assert [e["step"] for e in run.history() if e["type"] == "validation"] == [0, 3, 6]


def test_changed_data_is_refused_on_resume(recipe, book):
    def stop_at_2(event):
        if event["type"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut"), watch=stop_at_2)
    book.write_text(book.read_text("utf-8") + "Una línea más.\n", "utf-8")
    with pytest.raises(MaeseError) as problem:
        resume(Run("cut"))
    assert problem.value.code == "RESUME-01" and "libro.txt" in str(problem.value)


def test_a_run_belongs_to_one_process(recipe):
    import psutil

    run = train(recipe("output=mia"))
    parent = os.getppid()
    lock = {"pid": parent, "started": psutil.Process(parent).create_time()}
    (run.path / "lock").write_text(json.dumps(lock), "utf-8")
    with pytest.raises(MaeseError, match="RUN-03"):
        run.open_for_writing()
    lock["started"] -= 1000  # the number was recycled: not the process that wrote it
    (run.path / "lock").write_text(json.dumps(lock), "utf-8")
    run.open_for_writing()
    run.close()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_climbs_once_and_never_starts_at_zero(schedule):
    from maese.recipe import Train

    chosen = Train(lr=1.0, warmup=0.1, schedule=schedule)
    rates = [rate(step, 100, chosen) for step in range(100)]
    assert rates[0] > 0 and max(rates) == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_one_process_trains_twice_with_two_precisions(recipe):
    first = train(recipe("output=a", "train.precision=fp32", "train.max_steps=1"))
    second = train(recipe("output=b", "train.precision=bf16", "train.max_steps=1"))
    assert steps(first)[0]["loss"] != steps(second)[0]["loss"]
    assert steps(first)[0]["loss"] == pytest.approx(steps(second)[0]["loss"], abs=0.05)


def test_a_file_that_is_called_like_a_template_is_none(here):
    from maese import recipe as recipes
    from maese.train.session import anywhere

    for name in ("maese", "mia.jinja"):
        (here / name).write_text("#!/bin/sh\n", "utf-8")
    chosen = recipes.load("tutor")
    assert anywhere(chosen).data.template == "maese"
    mine = recipes.load("tutor", ["data.template=mia.jinja"])
    assert anywhere(mine).data.template == str(here / "mia.jinja")


def test_the_saved_recipe_repeats_the_run(recipe, here, monkeypatch):
    """From any folder: its base and its texts are found, and it asks for no folder that is taken."""
    run = train(recipe())
    path = run.path.absolute() / "recipe.yaml"
    (here / "otra").mkdir()
    monkeypatch.chdir(here / "otra")
    again = train(recipes.load(path))
    assert weights(again) == (path.parent / "final" / "model.safetensors").read_bytes()


def test_a_changed_tokenizer_is_refused_on_resume(recipe, tiny, here):
    import shutil

    base = shutil.copytree(tiny, here / "base")

    def stop_at_2(event):
        if event["type"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut", f"base={base}"), watch=stop_at_2)
    file = base / "tokenizer.json"
    parts = json.loads(file.read_text("utf-8"))
    parts["model"]["merges"] = parts["model"]["merges"][:10]
    file.write_text(json.dumps(parts), "utf-8")
    with pytest.raises(MaeseError) as problem:
        resume(Run("cut"))
    assert problem.value.code == "RESUME-01" and "tokenizer.json" in str(problem.value)


def test_what_a_killed_save_left_is_swept_and_the_damaged_are_not_kept(recipe):
    def stop_at_5(event):
        if event["type"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut", "train.keep=2"), watch=stop_at_5)
    folder = Run("cut").checkpoints
    (folder / "checkpoint-7.tmp-1").mkdir()
    (folder / "checkpoint-5" / "rng.safetensors").write_bytes(b"")
    resume(Run("cut"))
    assert not list(folder.glob("*.tmp-*"))
    assert all(checkpoint.damage(path) is None for path in checkpoint.saved(folder))


def test_the_folder_of_a_run_is_taken_once(recipe):
    """The system's lock, not a file that two can read before either writes."""
    import multiprocessing

    train(recipe("output=mia"))
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_take, args=(gate, results)) for _ in range(4)]
    for process in processes:
        process.start()
    outcomes = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert outcomes == ["RUN-03", "RUN-03", "RUN-03", "mine"]


def _take(gate, results):
    run = Run("mia")
    gate.wait()
    try:
        run.open_for_writing()
        results.put("mine")
    except MaeseError as problem:
        results.put(problem.code)
    gate.wait()  # nobody lets go before all have tried
    run.close()


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\n"])
def test_a_sample_with_strange_line_ends_stays_in_the_history(here, mark):
    run = Run("r")
    run.open_for_writing()
    run.event("sample", step=0, text=f"uno{mark}dos")
    run.close()
    assert run.events()[0]["text"] == f"uno{mark}dos"


def test_find_takes_the_newest_run_of_that_recipe_and_no_other(here):
    from maese.run import find

    for name in ("2026-11-20-quijote", "2026-11-21-quijote", "2026-11-21-quijote-2", "2026-11-21-quijote-corto"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "recipe.yaml").touch()
    os.utime(here / "runs" / "2026-11-20-quijote")  # touched last, and still not the newest
    assert find("quijote").path.name == "2026-11-21-quijote-2"
    assert find("quijote-corto").path.name == "2026-11-21-quijote-corto"
    for other in ("2", "corto", "mi-quijote"):
        with pytest.raises(MaeseError, match="RUN-02"):
            find(other)


@pytest.mark.parametrize("counted", [True, False])
def test_where_memory_is_counted_the_longest_rows_are_tried_first(recipe, tiny_llama, monkeypatch, counted):
    from maese.train import step

    real = step._passes
    changes = (f"base={tiny_llama}", "train.micro_batch=2", "train.accumulation=1")

    def narrow(session, groups, weight):
        if max(len(rows) for rows in groups) > 1:
            raise MemoryError
        return real(session, groups, weight)

    monkeypatch.setattr(step, "_passes", narrow)
    asked = ("train.memory_gib=100",) if counted else ()
    run = train(recipe("output=longest", *changes, *asked))
    halved = [e for e in run.history() if e.get("code") == "MEM-03"]
    assert [e["step"] for e in halved] == [0 if counted else 1]  # once, and then never again
    monkeypatch.setattr(step, "_passes", real)
    usual = train(recipe("output=usual", *changes))
    assert [e["loss"] for e in steps(run)] == pytest.approx([e["loss"] for e in steps(usual)], rel=1e-5)


def test_a_run_that_could_not_be_saved_is_refused_before_its_first_step(recipe, monkeypatch):
    usage = SimpleNamespace(total=1 << 40, used=1 << 40, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(MaeseError) as problem:
        train(recipe("output=full"))
    assert problem.value.code == "DISK-03"
    assert not [e for e in Run("full").history() if e["type"] in ("step", "saved")]


def test_a_text_of_another_kind_is_measured_before_and_after(recipe, here):
    """What learning one thing does to another is told in bits per byte, and in the box at the end."""
    from maese.report.facts import facts
    from maese.report.summary import box

    (here / "otro.txt").write_text("Para instalar el programa, abre la terminal y escribe la orden. " * 20, "utf-8")
    run = train(recipe("eval.general=otro.txt", "train.max_steps=6", "train.lr=1e-2"))
    told = [e for e in run.history() if e["type"] == "general"]
    assert [e["final"] for e in told] == [False, True]
    assert told[0]["bytes"] == told[1]["bytes"] > 1000 and told[0]["bits_per_byte"] != told[1]["bits_per_byte"]
    figures = facts(run)
    assert figures["final_bytes"] == sum(p.stat().st_size for p in run.final.glob("*.safetensors"))
    assert "bits por byte" in box(figures) and run.recipe().eval.general == str(here / "otro.txt")
