"""Weights: fingerprints that tell them apart, and comparisons that prove it."""

from __future__ import annotations

import pytest

from maese.errors import MaeseError
from maese.evaluate.compare import compare
from maese.model import adapter, load
from maese.model.fingerprint import adapters_on, fingerprint, parameters, untouched
from maese.recipe import Method
from maese.train.loop import train


def test_a_fingerprint_changes_with_any_weight(tiny):
    import torch

    one, two = load.load_model(tiny), load.load_model(tiny)
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.transformer.h[1].mlp.c_fc.bias[3] += 1e-6
    assert fingerprint(one) != fingerprint(two)


def test_adapters_count_only_while_they_are_on(tiny):
    base = fingerprint(load.load_model(tiny))
    model = adapter.add_lora(load.load_model(tiny), Method(kind="lora", rank=2))
    assert adapters_on(model) and fingerprint(model) != base
    with untouched(model):
        assert not adapters_on(model) and fingerprint(model) == base
    every, trained = parameters(model)
    assert 0 < trained < every


def test_lora_touches_what_was_asked_and_nothing_else(tiny):
    model = adapter.add_lora(load.load_model(tiny), Method(kind="lora", rank=4, targets=["c_attn"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("c_attn.lora_" in name for name in trained)
    # r × (in + out) for each of the two layers: 4 × (32 + 96)
    assert parameters(model)[1] == 2 * 4 * (32 + 96)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_before_and_after_are_two_models_and_it_is_proved(recipe, method):
    run = train(recipe(f"method.kind={method}", "train.lr=1e-2"))
    result = compare(run, ["En un lugar", "El señor"], max_new_tokens=15)
    assert result["before"]["fingerprint"] != result["after"]["fingerprint"]
    assert result["max_logit_difference"] > 0
    assert [p["prompt"] for p in result["prompts"]] == ["En un lugar", "El señor"]
    assert run.read("compare.json") == result


def test_the_before_side_is_the_untouched_base(recipe, tiny):
    """With an adapter, both sides live in one model: the left one must still be the base, word for word."""
    from maese.generate.engine import open_writer

    run = train(recipe("method.kind=lora", "train.lr=1e-2"))
    result = compare(run, ["En un lugar"], max_new_tokens=15)
    base = open_writer(str(tiny))
    settings = {k: v for k, v in result["settings"].items() if v is not None}
    assert result["prompts"][0]["before"] == base.generate("En un lugar", **settings).text
    assert result["before"]["fingerprint"] == fingerprint(base.model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_equal_sides_are_an_error(recipe, method):
    """A rate too small to move anything: the comparison refuses to print two columns."""
    run = train(recipe(f"method.kind={method}", "train.lr=1e-30", "train.weight_decay=0"))
    with pytest.raises(MaeseError) as problem:
        compare(run, ["En un lugar"])
    assert problem.value.code == "COMPARE-01" and not (run.path / "compare.json").exists()


@pytest.mark.parametrize(("name", "measured"), [("embedded", "base"), ("embedded-instruct", "instruct")])
def test_a_model_of_the_package_is_what_its_card_says(name, measured):
    import json

    folder = load.resolve(name)
    model, tokenizer = load.load_model(folder), load.load_tokenizer(folder)
    scores = json.loads((load.resolve("embedded") / "scores.json").read_text("utf-8"))
    card = (folder / "MODEL_CARD.md").read_text("utf-8")
    every, _ = parameters(model)
    assert every == scores[measured]["parameters"] and f"{every:,}" in card
    for found in scores[measured]["bits_per_byte"].values():
        assert f"{found['value']:.3f}".replace(".", ",") in card
    assert load.context_of(model) == 512
    assert (tokenizer.chat_template is not None) == (name == "embedded-instruct")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "En un lugar de la Mancha, «¿qué?» ñandú 🐤\n\n  fin"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_all_linear_layers_of_gpt2_are_those_of_the_pokemon_exercise(tiny):
    assert adapter.linear_names(load.load_model(tiny)) == {"c_attn", "c_proj", "c_fc"}


def test_the_models_of_the_package_fit_in_it_and_the_second_beats_the_first():
    import json

    folder = load.resolve("embedded")
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 48e6
    first, base, instruct = json.loads((folder / "scores.json").read_text("utf-8")).values()
    was, now = ({k: v["value"] for k, v in some["bits_per_byte"].items()} for some in (first, base))
    assert len(was) == 5 and all(now[kind] <= 0.95 * was[kind] for kind in was)
    answers = instruct["answers"]
    assert answers["asked"] == 200 and answers["ended"] >= 190
    assert answers["told"] >= 30 and answers["spanish"] >= 0.98 * answers["told"]
    assert instruct["bits_per_byte"]["instructions"]["value"] <= 0.9 * now["instructions"]


def test_the_model_that_answers_says_who_it_is_and_stops():
    from maese.generate.engine import open_writer

    writer = open_writer("embedded-instruct")
    answer = writer.generate("¿Quién eres?", temperature=0.0, repetition_penalty=1.0)
    assert answer.reason == "end" and "maese" in answer.text


def test_an_index_that_points_at_a_pickle_is_refused(tiny, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    weight_map = {"transformer.wte.weight": "pytorch_model.bin"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(MaeseError) as problem:
        load.load_model(folder)
    assert problem.value.code == "MODEL-03" and "pytorch_model.bin" in str(problem.value)


def test_final_keeps_what_the_base_says_of_itself(recipe, tiny, here):
    import json
    import shutil

    folder = shutil.copytree(tiny, here / "base")
    for name, key, value in (
        ("tokenizer_config.json", "model_max_length", 128),
        ("generation_config.json", "eos_token_id", [0, 2]),
    ):
        facts = json.loads((folder / name).read_text("utf-8")) | {key: value}
        (folder / name).write_text(json.dumps(facts), "utf-8")
    run = train(recipe(f"base={folder}", "train.max_steps=1"))
    for name, key, value in (
        ("tokenizer_config.json", "model_max_length", 128),
        ("generation_config.json", "eos_token_id", [0, 2]),
    ):
        assert json.loads((run.final / name).read_text("utf-8"))[key] == value
