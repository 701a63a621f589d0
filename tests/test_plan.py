"""`maese plan`: what fits, what to change, what it costs, and how it is said; and the estimate around a training."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maese import recipe as recipes
from maese.errors import MaeseError
from maese.plan import cost, fit, memory, shape
from maese.run import Run

SRC = Path(__file__).resolve().parent.parent / "src"


def recipe_of(**train):
    tree = {"name": "x", "base": "gpt2-xl", "data": {"sources": [{"path": "x"}], "max_length": 256}, "train": train}
    return recipes.check(tree)


@pytest.fixture
def maese(maese, monkeypatch):
    monkeypatch.setattr("maese.plan.machine._card", lambda: None)  # no card is asked what it has
    return maese


def test_each_way_saves_what_it_says_and_the_batch_stays():
    told, asked = shape.open_shape("gpt2-xl"), recipe_of(micro_batch=8, accumulation=2)
    now = fit.told(told, asked, "bf16", "cuda").needed
    found = fit.ways(told, asked, "bf16", "cuda")
    assert [way.key for way in found] == ["smaller", "checkpointing", "shorter", "eight_bits", "lora", "qlora"]
    for way in found:
        after = fit.changed(asked, way.changes)
        assert fit.told(told, after, "bf16", "cuda").needed == way.needed == now - way.saved
    smaller = fit.changed(asked, found[0].changes).train
    assert smaller.micro_batch * smaller.accumulation == 16
    # What is frozen has no large optimizer to be made small.
    kept = fit.changed(asked, (("method.kind", "lora"),))
    assert "lora" not in {way.key for way in fit.ways(told, kept, "bf16", "cuda")}


def test_the_targets_of_another_family_matter_only_where_there_is_an_adapter(maese):
    code, out, talk = maese(
        "--json", "plan", "--base", "microsoft/phi-2", "--method", "full", "method.targets=[c_attn]"
    )
    assert code == 0, talk
    # LoRA and QLoRA of it cannot be: what is left is to train the whole, and the processor and the cards say so.
    found = json.loads(out)
    assert {way["key"] for way in found["ways"]} <= {"smaller", "checkpointing", "shorter", "eight_bits"}
    assert all("method.kind" not in (place["with"] or {}) for place in found["machines"])
    told = shape.open_shape("microsoft/phi-2")
    asked = fit.changed(recipe_of(micro_batch=8), (("method.targets", ["c_attn"]),))
    assert fit.fit(told, asked, "bf16", "cuda", 6e9) is None
    assert "method.kind" not in dict(fit.least(told, asked, "bf16", "cuda").changes)


def test_a_plan_that_cannot_be_told_stops_no_training(recipe, monkeypatch):
    from maese.train import milestones
    from maese.train.loop import train

    def fails(*_, **__):
        raise MaeseError("ADAPT-02", target="c_attn", present="q_proj", nearest="q_proj")

    monkeypatch.setattr(milestones, "estimate", fails)
    run = train(recipe("train.max_steps=1"))
    assert "estimated_gib" not in next(event for event in run.events() if event["type"] == "plan")


def test_fewer_rows_at_once_are_the_same_batch():
    for rows, turns in ((7, 1), (6, 1), (5, 3), (8, 2)):
        asked = recipe_of(micro_batch=rows, accumulation=turns)
        for changes in fit._combined(asked):
            train = fit.changed(asked, changes).train
            assert train.micro_batch * train.accumulation == rows * turns
        assert {fit.changed(asked, c).train.micro_batch for c in fit._combined(asked)} >= {1, rows}


@pytest.mark.parametrize("room", [6e9, 8e9, 12e9, 16e9, 24e9, 80e9])
@pytest.mark.parametrize("base", ["gpt2", "gpt2-xl", "microsoft/phi-2"])
def test_what_is_chosen_fits_and_nothing_nearer_does(base, room):
    told, asked = shape.open_shape(base), recipe_of(micro_batch=8, accumulation=2)
    found = fit.fit(told, asked, "bf16", "cuda", room)
    assert found is not None and found.told.needed <= room
    assert fit.told(told, fit.changed(asked, found.changes), "bf16", "cuda").needed == found.told.needed
    for changes in fit._combined(asked):
        if changes == found.changes:
            break
        assert fit.told(told, fit.changed(asked, changes), "bf16", "cuda").needed > room
    as_it_is = fit.told(told, asked, "bf16", "cuda").needed
    assert (found.changes == ()) == (as_it_is <= room)


def test_more_room_never_asks_for_more_changes():
    told, asked = shape.open_shape("gpt2-xl"), recipe_of(micro_batch=8, accumulation=2)
    order = list(fit._combined(asked))
    places = [order.index(fit.fit(told, asked, "bf16", "cuda", size).changes) for size in fit.CARDS.values()]
    assert places == sorted(places, reverse=True)


def test_the_disk_is_what_a_run_writes(recipe):
    from maese.train.loop import train

    asked = recipe("train.save_every=2", "train.keep=2", "train.final=last")
    run = train(asked)
    told = shape.open_shape(asked.base)
    found = cost.disk(told, memory.job_of(asked, "fp32", "cpu"), asked, steps=6)

    def size(path: Path, part: str) -> int:
        return sum(file.stat().st_size for file in path.glob(part))

    saved = [size(path, "[mo]*.safetensors") for path in sorted(run.checkpoints.glob("checkpoint-*"))]
    assert saved and all(found.checkpoint == pytest.approx(one, rel=0.06) for one in saved)
    assert found.checkpoints == 2 and found.best == 0
    assert found.final == pytest.approx(size(run.final, "*.safetensors"), rel=0.05)
    assert found.most == found.checkpoint * 2 + found.final


@pytest.mark.parametrize("optimizer", ["paged", "paged32"])
def test_a_checkpoint_of_the_paged_optimizer_is_as_large_from_a_card_as_from_a_processor(optimizer):
    told, asked = (
        shape.open_shape("microsoft/phi-2"),
        fit.changed(recipe_of(optimizer=optimizer), (("method.kind", "lora"),)),
    )
    card, processor = (cost.disk(told, memory.job_of(asked, "bf16", device), asked) for device in ("cuda", "cpu"))
    trained = shape.adapters(told, 16)
    assert card == processor and card.checkpoint == pytest.approx(
        trained * (12 if optimizer == "paged32" else 6), rel=0.01
    )


def test_time_is_a_range_from_the_fastest_to_the_slowest_step():
    pace = cost.Pace(seconds=(1.0, 2.0), tokens=(100, 100), steps=10, whole=1000, looks=2, look=150, peak_gib=1.0)
    assert pace.speeds == (100.0, 50.0)
    assert cost.total(pace) == pytest.approx((11.0, 22.0))
    assert cost.facts(cost.Disk(1, 1, 1, 1), pace)["time"]["seconds_step"] == [1.0, 2.0]


def test_a_few_steps_are_measured_and_nothing_of_them_stays(recipe, here, tiny):
    from maese.model.load import weights_hash
    from maese.train.probe import probe

    asked = recipe("train.max_steps=4")
    before, files = weights_hash(tiny), {path.name for path in here.iterdir()}
    pace = probe(asked)
    assert pace.steps == 4 and len(pace.seconds) == len(pace.tokens) == 3 and min(pace.seconds) > 0
    assert pace.whole > 0 and pace.looks == 3 and pace.look > 0 and pace.peak_gib > 0
    assert weights_hash(tiny) == before and {path.name for path in here.iterdir()} == files


def test_one_ctrl_c_ends_the_measuring_and_nothing_stays(recipe, here, monkeypatch, tmp_path_factory):
    from maese.train import probe

    taken, step, room = [], probe.take_step, tmp_path_factory.mktemp("temporary")

    def asked_to_stop(*given):
        taken.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    monkeypatch.setattr(probe, "take_step", asked_to_stop)
    monkeypatch.setattr("tempfile.tempdir", str(room))
    with pytest.raises(KeyboardInterrupt):
        probe.probe(recipe("train.max_steps=4"))
    assert len(taken) == 1 and not [*room.glob("maese-probe-*")]


def test_the_machine_at_a_glance_is_the_one_torch_sees():
    from maese.plan.machine import glance, machine

    asked = recipe_of(device="cpu").train
    seen, ours = machine(asked), glance(asked)
    assert (ours.device, ours.name, ours.precision) == (seen.device, seen.name, seen.precision)
    assert ours.memory_gib == pytest.approx(seen.memory_gib)


def test_a_card_is_known_by_what_its_driver_says(monkeypatch, tmp_path):
    from maese.plan import machine

    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-a1, Tesla T4, 15360, 14336, 7.5'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.cards.cache_clear()
    found = machine.glance()
    assert (found.device, found.name, found.memory_gib, found.precision) == ("cuda", "Tesla T4", 15.0, "fp16")
    program.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    machine.cards.cache_clear()
    assert machine.glance().device == "cpu"
    with pytest.raises(MaeseError) as problem:
        machine.glance(recipe_of(device="cuda").train)
    assert problem.value.code == "DEVICE-01"
    machine.cards.cache_clear()


SEEN = {
    None: "T4", "": None, "-1": None, "0": "T4", "1": "A100, 40 GB", "1,0": "A100, 40 GB", "7": None,
    "GPU-b2c3d4": "A100, 40 GB", "GPU-b2": "A100, 40 GB", "GPU-zz": None, "-1,0": None, " 1": "A100, 40 GB",
}  # fmt: skip


@pytest.mark.parametrize("visible", SEEN)
def test_the_card_is_the_one_that_torch_would_take(monkeypatch, tmp_path, visible):
    from maese.plan import machine

    program = tmp_path / "nvidia-smi"
    rows = "0, GPU-a1, T4, 15360, 14336, 7.5\n1, GPU-b2c3d4, A100, 40 GB, 40960, 1024, 8.0"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine.cards.cache_clear()
    found = machine.glance()
    assert (found.name if found.device == "cuda" else None) == SEEN[visible]
    if found.device == "cuda":
        assert machine.memory_free_gib("cuda") == (14.0 if found.name == "T4" else 1.0)
    machine.cards.cache_clear()


def test_what_others_hold_of_a_card_is_not_free(maese, monkeypatch, tmp_path, recipe):
    from maese.plan import machine

    recipe()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-a1, Tesla T4, 15360, 100, 7.5'\n")
    program.chmod(0o755)
    monkeypatch.undo()  # the card is asked what it has
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.cards.cache_clear()
    status, _, talk = maese("plan", tmp_path / "receta.yaml", "--probe")
    assert status == 1 and "error[PLAN-03]" in talk and "hay 0,10" in talk
    machine.cards.cache_clear()


ASKED = """
import sys
from maese.cli import run
code = run(["plan", "--base", "microsoft/phi-2", "--method", "qlora", "--context", "2048", "--batch", "1x16"])
heavy = {"torch", "transformers", "peft", "numpy"} & {*sys.modules}
raise SystemExit(f"imports {heavy}" if heavy else code)
"""


def test_phi_2_is_planned_at_full_size_in_a_second_without_torch():
    env = os.environ | {"PYTHONPATH": str(SRC), "MAESE_LANG": "es"}
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", ASKED], env=env, capture_output=True, encoding="utf-8")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Of a processor, and not of a clock that others share: it does one thing after another, and waits for nothing.
    assert min(spent) < 1.0
    assert "2.780 M" in done.stdout and "QLoRA" in done.stdout


@pytest.mark.parametrize("lang", ["es", "en"])
def test_a_plan_reads_well_in_eighty_columns(maese, monkeypatch, lang):
    for words in (
        ("tutor-phi2",),
        ("pokemon", "base=gpt2-xl"),
        ("minigpt", "size=mini"),
        ("--base", "gpt2-xl", "--batch", "8x2"),
    ):
        code, out, _ = maese("--lang", lang, "plan", *words)
        assert code == 0 and max(map(len, out.splitlines())) <= 80, max(out.splitlines(), key=len)
        assert re.search(r"80 GB .*✓", out)


def test_a_plan_as_data_says_what_the_page_says(maese):
    code, out, _ = maese("--json", "plan", "pokemon", "base=gpt2-xl")
    found = json.loads(out)
    assert code == 0 and found["parameters"] == 1_557_611_200 and found["method"] == "lora"
    parts, load = sum(found["memory"]["parts"].values()), found["memory"]["load_gib"]
    assert max(parts, load) == pytest.approx(found["memory"]["gib"], abs=0.01)
    assert len(found["machines"]) == 7 and all(place["fits"] for place in found["machines"])
    assert found["time"] is None and found["disk"]["checkpoints"] == 3
    code, out, _ = maese("--json", "plan", "minigpt", "size=nano")
    assert [part["name"] for part in json.loads(out)] == ["pretrain", "instruct"]


def test_a_recipe_for_a_card_is_planned_where_there_is_none_and_its_ceiling_counts(maese):
    code, out, _ = maese("--json", "plan", "pokemon", "base=gpt2-xl", "train.device=cuda", "train.memory_gib=4")
    found = json.loads(out)
    assert code == 0 and found["machine"]["device"] == "cpu" and found["machines"][0]["room_gib"] == 4
    assert not found["machines"][0]["fits"] and found["machines"][0]["with"]


def test_the_keys_of_fit_can_be_pasted(maese):
    words = ("plan", "pokemon", "base=gpt2-xl", "method.kind=full", "train.micro_batch=8")
    code, keys, talk = maese(*words, "--fit", "24GB")
    assert code == 0 and "train.micro_batch=2" in keys and "maese train pokemon" in talk
    code, again, talk = maese(*words, *keys.split(), "--fit", "24GB")
    assert (code, again) == (0, "") and "tal como está" in talk
    code, out, _ = maese("--json", *words, "--fit", "24 GB")
    found = json.loads(out)
    assert found["needed_gib"] <= found["room_gib"] == pytest.approx(24e9 / 2**30, abs=1e-3)
    assert fit.typed(tuple(found["changes"].items())) == keys.strip()


def test_the_options_stand_for_the_keys_of_a_recipe(maese):
    by_options = maese("--json", "plan", "--base", "gpt2", "--method", "lora", "--context", "128", "--batch", "4x4")
    by_keys = maese("--json", "plan", "base=gpt2", "--base", "gpt2", "method.kind=lora", "data.max_length=128",
                    "train.micro_batch=4", "train.accumulation=4")  # fmt: skip
    assert by_options[0] == by_keys[0] == 0
    assert json.loads(by_options[1]) == json.loads(by_keys[1])


FAULTS = {
    "MEM-05": ("--base", "gpt2-xl", "--fit", "1GB"),
    "PLAN-02": ("--base", "gtp2"),
    "BATCH-01": ("--base", "gpt2", "--context", "4096"),
    "ADAPT-02": ("--base", "gpt2", "--method", "lora", "method.targets=[q_proj]"),
    "USE-13": ("--base", "gpt2", "--probe"),
    "USE-14": ("pokemon", "--probe", "--fit", "6GB"),
    "USE-10": (),
    "USE-11": ("--base", "gpt2", "--fit", "6 potatoes"),
}


@pytest.mark.parametrize("code", FAULTS)
def test_what_cannot_be_planned_says_why(maese, code):
    status, out, talk = maese("plan", *FAULTS[code])
    assert status in (1, 2) and out == "" and f"error[{code}]" in talk
    assert code != "USE-11" or "6 potatoes" in talk.partition("encontré")[2].splitlines()[0]


NONE_OF = {
    "n_layer": [0, -2, 1e400, "doce", None],
    "vocab_size": [0],
    "n_embd": [0],
    "n_positions": [0],
    "n_inner": [[1]],
}


@pytest.mark.parametrize("key", NONE_OF)
def test_a_configuration_that_makes_no_model_is_said(maese, here, key):
    whole = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 320}
    for value in NONE_OF[key]:
        (here / "config.json").write_text(json.dumps(whole | {key: value}))
        status, _, talk = maese("plan", "--base", here)
        assert status == 1 and "error[MODEL-06]" in talk and "config.json" in talk, value
    (here / "config.json").write_text("[" * 100_000)
    assert "error[MODEL-06]" in maese("plan", "--base", here)[2]


def repair(talk: str) -> list[str]:
    """The words of the plan that an error says to try."""
    return shlex.split(re.search(r"maese plan (.*)", talk)[1])


def test_a_card_too_small_is_told_what_would_be_enough(maese):
    _, _, talk = maese("plan", "--base", "gpt2-xl", "--context", "512", "--fit", "1GB")
    assert "qlora" in talk and "una tarjeta de 6 GB" in talk
    assert repair(talk) == ["--base", "gpt2-xl", "data.max_length=512"]
    code, out, _ = maese("plan", *repair(talk))
    assert code == 0 and "tarjeta de 6 GB" in out
    assert maese("plan", *repair(talk), "--fit", "6GB")[0] == 0  # as it says
    # Of a model made from nothing, the same one, and not another whose name is that of its folder.
    _, _, talk = maese("plan", "minigpt", "size=mini", "--fit", "1MB")
    assert repair(talk) == ["minigpt", "size=mini"] and "pretrain" in talk


def test_rows_too_long_for_a_model_of_stages_are_told_by_their_own_key(maese):
    _, _, talk = maese("plan", "minigpt", "size=nano", "--context", "2000")
    assert "BATCH-01" in talk and repair(talk) == ["minigpt", "size=nano", "pretrain.data.max_length=256"]
    assert maese("plan", *repair(talk), "instruct.data.max_length=256")[0] == 0


def test_where_no_card_is_enough_a_smaller_base_is_proposed(maese, tmp_path):
    huge = {"model_type": "gpt2", "n_layer": 200, "n_embd": 16384, "n_head": 128, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    _, _, talk = maese("plan", "pokemon", f"base={tmp_path}", "train.epochs=1", "--fit", "24GB")
    assert "error[MEM-05]" in talk and "—" not in talk
    words = repair(talk)
    assert words[0] == "pokemon" and "train.epochs=1" in words and f"base={tmp_path}" not in words
    assert maese("plan", *words, "--fit", "24GB")[0] == 0
    _, _, talk = maese("plan", "--base", tmp_path, "--fit", "24GB")
    assert repair(talk)[0] == "--base" and maese("plan", *repair(talk), "--fit", "24GB")[0] == 0


def test_what_comes_next_repeats_all_that_was_typed(maese):
    words = ("plan", "pokemon", "base=gpt2-xl", "method.targets=[c_attn, c_proj]")
    options = ("--method", "qlora", "--context", "128", "--batch", "4x4")
    keys = (
        "pokemon base=gpt2-xl 'method.targets=[c_attn, c_proj]' method.kind=qlora data.max_length=128"
        " train.micro_batch=4 train.accumulation=4"
    )
    _, _, talk = maese(*words, *options)
    assert f"maese plan {keys} --fit 6GB" in talk and f"maese plan {keys} --probe" in talk
    _, _, talk = maese(*words, *options, "--fit", "80GB")
    assert "pokemon sobre gpt2-xl cabe" in talk and f"maese train {keys}\n" in talk
    # What gives way takes the place of what was typed.
    _, out, talk = maese(*words, *options, "--fit", "2500MB")
    assert "train.micro_batch=" in out and "train.micro_batch=4" not in talk and "base=gpt2-xl" in talk
    # An option stands for its key, also in a recipe of several trainings.
    _, _, talk = maese("plan", "pokemon", "--base", "gpt2-xl", "--fit", "80GB")
    assert "maese train pokemon base=gpt2-xl\n" in talk
    _, _, talk = maese("plan", "minigpt", "--base", "nano", "--context", "64")
    assert "maese plan minigpt size=nano pretrain.data.max_length=64 instruct.data.max_length=64 --fit" in talk
    assert "--probe" not in talk
    _, _, talk = maese("plan", "minigpt", "size=nano", "--fit", "80GB")
    assert "pretrain cabe" in talk and "maese train minigpt size=nano\n" in talk


def test_what_knows_nothing_yet_gets_no_adapter(maese):
    _, out, _ = maese("--json", "plan", "minigpt", "size=mini")
    first, then = json.loads(out)
    assert "lora" not in {way["key"] for way in first["ways"]} and "lora" in {way["key"] for way in then["ways"]}
    _, out, _ = maese("--json", "plan", "--base", "mini")
    assert not {"lora", "qlora"} & {way["key"] for way in json.loads(out)["ways"]}
    status, _, talk = maese("plan", "minigpt", "size=mini", "--fit", "900MB")
    assert status == 1 and "error[MEM-05]" in talk and "lora" not in talk


def test_a_model_made_in_stages_is_planned_by_its_size_and_not_measured(maese):
    _, out, talk = maese("plan", "minigpt-hub", "size=mini")
    assert "modelo   mini (qwen3)" in out and "probe" not in out + talk
    assert "error[USE-13]" in maese("plan", "minigpt-hub", "--probe")[2]


def test_a_model_typed_where_a_recipe_goes_is_planned(maese):
    assert maese("plan", "gpt2-xl", "--method", "lora")[1] == maese("plan", "--base", "gpt2-xl", "--method", "lora")[1]


def test_a_plan_says_fits_of_the_figure_it_shows(maese, monkeypatch):
    from maese.plan.machine import Machine

    asked = fit.changed(recipe_of(micro_batch=2), (("method.kind", "lora"),))
    told = fit.told(shape.open_shape("gpt2-xl"), asked, "bf16", "cuda")
    room = (told.training + told.needed) / 2 / 2**30  # the run would be there, and CUDA would not
    card = Machine("cuda", "T", 2, room, "bf16")
    monkeypatch.setattr("maese.terminal_plan.glance", lambda *_: card)
    _, out, _ = maese("plan", "--base", "gpt2-xl", "--method", "lora", "--context", "256", "--batch", "2x4")
    total = float(re.search(r"en total ([\d,]+) GiB de [\d,]+ ✗", out)[1].replace(",", "."))
    assert total == pytest.approx(told.needed / 2**30, abs=0.01)
    shown = [float(size.replace(",", ".")) for size in re.findall(r"([\d,]+) GiB  █", out)]
    assert sum(shown) == pytest.approx(total, abs=0.05)


def test_no_steps_are_measured_where_they_would_not_fit(maese, recipe, here):
    recipe()
    status, _, talk = maese("plan", "receta.yaml", "train.memory_gib=0.01", "--probe")
    assert status == 1 and "error[PLAN-03]" in talk
    # What it proposes is of this machine, and of no more than is free.
    assert repair(talk) == ["receta.yaml", "train.device=cpu", "--fit", "10MB"]
    status, _, talk = maese("plan", "receta.yaml", *repair(talk)[1:])
    assert status == 1 and "error[MEM-05]" in talk


def test_a_probe_gives_the_plan_its_time(maese, recipe, here):
    recipe()
    status, out, _ = maese("plan", "receta.yaml", "train.max_steps=3", "--probe")
    assert status == 0 and "entre" in out and "tokens/s" in out and "no medido" not in out
    assert re.search(r"de [\d,]+ a [\d,]+ s cada uno", out)
    assert max(map(len, out.splitlines())) <= 80, max(out.splitlines(), key=len)


def test_the_estimate_stands_before_a_training_and_beside_what_it_took(recipe, capsys):
    from maese.live import plan_box
    from maese.report.facts import facts
    from maese.report.summary import box
    from maese.train.loop import train

    events: list[dict] = []
    run = train(recipe("train.max_steps=1"), watch=events.append)
    plan = next(event for event in events if event["type"] == "plan")
    start = next(event for event in events if event["type"] == "start")
    assert plan["estimated_gib"] >= sum(plan["estimated"].values()) - 0.01
    shown = plan_box(plan, start | {"base": "embedded"})
    assert max(map(len, shown.splitlines()[:-1])) <= 80  # the last is a folder, whatever its length
    assert "GiB estimados de" in shown and "✓" in shown
    largest = sorted(plan["estimated"].values(), reverse=True)[:3]
    assert [float(size.replace(",", ".")) for size in re.findall("·\u00a0[^\\d·]+([\\d,]+)", shown)] == pytest.approx(
        largest, abs=0.006
    )
    assert plan["disk"]["most"] > plan["disk"]["final"] > 0 and re.search(r"disco +<?[\d,]+ GB como mucho", shown)
    assert "estimados" not in plan_box({k: v for k, v in plan.items() if "estimated" not in k}, start)
    figures = facts(Run(run.path))
    assert figures["estimated_gib"] == plan["estimated_gib"]
    told, real = figures["estimated_gib"], figures["peak_gib"]
    found = re.search(r"([\d,]+) GiB \(estimados ([\d,]+), ([+−])([\d,]+)\s%\)", box(figures))
    value, estimate, sign, off = (part.replace(",", ".") for part in found.groups())
    assert (float(value), float(estimate)) == pytest.approx((real, told), abs=0.006)
    assert float(off) == pytest.approx(100 * abs(told / real - 1), abs=0.06) and (sign == "+") == (told >= real)
    assert "estimados 3,00, −25,0" in box(figures | {"estimated_gib": 3.0, "peak_gib": 4.0})
    assert "estimados" not in box(figures | {"estimated_gib": None})


def test_the_box_compares_what_must_be_free_with_what_may_be_taken():
    from maese.live import plan_box
    from maese.plan.machine import Machine

    facts = {"rows": 9, "tokens": 900, "validation_rows": 1, "micro_batch": 1, "accumulation": 1, "max_length": 32}
    facts |= {"steps": 6, "parameters": 9e6, "trainable": 9e4, "run": "r", "threads": 2, "memory_gib": 10.0}
    facts |= {"device": "cuda", "precision": "bf16", "name": "T", "estimated_gib": 9.17, "estimated": {"weights": 9.17}}
    facts |= {"disk": {"most": 3e9, "final": 1e9, "free": 5e9}}

    def told(**more) -> str:
        return plan_box({**facts, **more}, {"name": "x", "base": "embedded", "method": "full"}).replace("\u00a0", " ")

    # The run alone would fit, and with what CUDA takes it does not.
    tight = told(needed_gib=10.08, room_gib=10.0)
    assert "10,1 GiB estimados de 10,0: puede no caber" in tight and "✓" not in tight
    assert "CUDA y su margen 0,91" in tight
    assert "9,6 GiB estimados de 10,0 ✓" in told(needed_gib=9.6, room_gib=10.0)
    # A ceiling of the recipe counts as what there is.
    assert "9,6 GiB estimados de 4,0: puede no caber" in told(needed_gib=9.6, room_gib=4.0)
    machine = Machine("cuda", "T", 2, 10.0, "bf16")
    rooms = [
        machine.room_gib(recipe_of(**ceiling).train) for ceiling in ({"memory_gib": 4.0}, {"memory_gib": 40.0}, {})
    ]
    assert rooms == [4.0, 10.0, 10.0]


def test_a_family_that_is_not_counted_trains_without_an_estimate(recipe, monkeypatch):
    from maese.plan import shape as shapes
    from maese.train.loop import train

    monkeypatch.setattr(shapes, "DEFAULTS", {})
    run = train(recipe("train.max_steps=1"))
    plan = next(event for event in run.events() if event["type"] == "plan")
    assert "estimated_gib" not in plan
