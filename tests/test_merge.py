"""Merging is an equation: base and adapter say what the one folder says, or nothing is left behind."""

from __future__ import annotations

import json

import pytest
from test_marks import talk
from test_quant import save_model

from maese.cli import run as maese
from maese.errors import MaeseError
from maese.generate.engine import open_writer
from maese.model import load
from maese.model.merge import TOLERANCE, merge
from maese.train.loop import train


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    return {kind: save_model(folder / kind, kind, width=64) for kind in ("gpt2", "qwen3", "phi")}


def plain(folder, ids):
    """What transformers says of some ids, with nothing of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
@pytest.mark.parametrize("marks", ["auto", "add"])
def test_one_folder_says_what_base_and_adapter_say(recipe, questions, bases, here, kind, method, marks):
    import torch

    done = train(talk(recipe, bases[kind], f"method.kind={method}", f"data.marks={marks}"))
    made = merge(done.path, here / "entero")
    assert made.dtype == "fp32" and made.difference <= made.tolerance == TOLERANCE["fp32"] and made.tokens > 10
    writer, whole = open_writer(done), open_writer(str(here / "entero"))
    ids = writer.prompt_ids("¿Cuánto es 4 más 4?")
    assert ids == whole.prompt_ids("¿Cuánto es 4 más 4?")
    with torch.no_grad():
        wanted = writer.model(input_ids=torch.tensor([ids])).logits
    assert torch.allclose(plain(here / "entero", ids), wanted, atol=1e-4)
    assert not torch.allclose(plain(bases[kind], [i % 320 for i in ids])[..., :320], wanted[..., :320], atol=1e-2)
    settings = json.loads((here / "entero" / "generation_config.json").read_text("utf-8"))
    assert settings["max_new_tokens"] == 12 and whole.tokenizer.chat_template
    answers = [
        model.generate("¿Cuánto es 2 más 2?", temperature=0.0, max_new_tokens=8).text for model in (writer, whole)
    ]
    assert answers[0] == answers[1]
    assert not [p.name for p in here.iterdir() if p.name.startswith(".entero")]


def test_the_voice_goes_with_the_model(recipe, questions, bases, here):
    done = train(talk(recipe, bases["gpt2"], "method.kind=lora", "generate.system=Habla claro.", "generate.top_k=7"))
    merge(done.path, here / "entero")
    run, whole = open_writer(done), open_writer(str(here / "entero"))
    assert whole.settings == run.settings and whole.settings.system == "Habla claro."
    assert whole.generate("Hola", seed=3).ids == run.generate("Hola", seed=3).ids
    assert "base_sha256" not in json.loads((here / "entero" / "maese.json").read_text("utf-8"))
    # Whoever may read one of its files may read them all.
    assert len({path.stat().st_mode for folder in (done.final, here / "entero") for path in folder.iterdir()}) == 1


def test_an_adapter_without_its_run_and_16_bits(recipe, bases, here):
    done = train(recipe(f"base={bases['qwen3']}", "method.kind=lora", "train.lr=2e-2", "train.max_steps=12"))
    made = merge(str(done.final), here / "dieciseis", "bf16")
    assert made.dtype == "bf16" and 0 < made.difference <= TOLERANCE["bf16"]
    assert load.check(here / "dieciseis")["dtype"] == "bfloat16"
    assert made.bytes < 0.6 * merge(done, here / "treintaidos", "fp32").bytes


def test_what_rounding_would_take_is_not_written(recipe, bases, here):
    """An adapter that hardly learnt: in 16 bits the merge would be another model."""
    done = train(recipe(f"base={bases['qwen3']}", "method.kind=lora", "train.lr=1e-6", "train.max_steps=1"))
    with pytest.raises(MaeseError) as problem:
        merge(done, here / "nada", "bf16")
    assert problem.value.code == "MERGE-01" and f"export {done.path} OTRA_CARPETA --dtype fp32" in str(problem.value)
    assert not (here / "nada").exists() and not [p for p in here.iterdir() if ".nada" in p.name]
    merge(done, here / "todo", "fp32")


def test_a_merge_that_is_wrong_is_found(recipe, bases, here, monkeypatch):
    from peft.tuners.lora import Linear

    done = train(recipe(f"base={bases['phi']}", "method.kind=lora", "train.lr=1e-2"))
    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 2 * real(self, adapter))
    with pytest.raises(MaeseError) as problem:
        merge(done, here / "mal")
    assert problem.value.code == "MERGE-02" and not (here / "mal").exists()
    assert f"maese chat {done.path} " in str(problem.value) and "fp32" not in str(problem.value)


@pytest.mark.parametrize(("number", "code"), [(28, "DISK-01"), (30, "DISK-02")])
def test_a_disk_that_takes_no_more_is_said_and_nothing_stays(here, tiny, monkeypatch, number, code):
    """safetensors and tokenizers wrap what the system says in words of their own."""
    from conftest import make_voice
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    make_voice(here / "voz", tiny)

    def full(*_, **__):
        raise SafetensorError(f"Error while serializing: I/O error: no more (os error {number})")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(MaeseError, match=code):
        merge("voz", here / "entera")
    assert not [path for path in here.iterdir() if "entera" in path.name]


def test_a_prompt_without_a_word_is_asked_too(recipe, here):
    done = train(recipe("eval.prompts=['']", "train.max_steps=1"))
    assert merge(done, here / "copia").tokens == 1


def test_a_model_trained_whole_is_written_as_it_is(recipe, here):
    done = train(recipe())
    made = merge(done, here / "copia")
    ids = [5, 9, 30]
    assert made.difference == 0 and (plain(here / "copia", ids) == plain(done.final, ids)).all()


def test_on_the_command_line(recipe, here, capsys):
    done = train(recipe("output=uno", "method.kind=lora", "train.lr=1e-2"))
    assert maese(["export", "uno", "fuera"]) == 0
    out, err = capsys.readouterr()
    assert out == "fuera\n" and "maese chat fuera" in err
    assert maese(["export", "uno", "fuera"]) == 1 and "RUN-01" in capsys.readouterr().err
    assert maese(["--json", "export", "uno", "otra", "--dtype", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "otra"
    (done.final / "adapter_model.safetensors").rename(done.final / "x")
    done.final.rename(done.path / "lost")
    assert maese(["export", "uno", "nada"]) == 1 and "RUN-05" in capsys.readouterr().err
