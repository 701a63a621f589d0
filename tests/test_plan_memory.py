"""What the plan says of memory, against what small models really keep, and what their parameters really are."""

from __future__ import annotations

import pytest

from maese.plan import memory, shape
from maese.plan.memory import Job

TOKENS, ROWS = 64, 2
COMMON = {
    "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
    "intermediate_size": 100, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip


def row(family: str, **more) -> dict:
    if family == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_layer": 4, "n_embd": 48, "n_head": 3, "n_positions": 128, "vocab_size": 320}
        return {"model_type": "gpt2", **sizes, **drops, **more}
    own = {"head_dim": 16} if family == "qwen3" else {"num_key_value_heads": 3} if family == "phi" else {}
    return {"model_type": family, **COMMON, **own, "tie_word_embeddings": family != "phi", **more}


def build(config: dict, where: str = "cpu"):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from maese.model.load import quiet

    quiet()
    torch.manual_seed(0)
    said = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(where):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **said))


def kept(config: dict, job: Job) -> int:
    """Bytes a model keeps for the way back, parameters aside, of two rows without padding."""
    import torch

    from maese.evaluate.likelihood import loss_sum
    from maese.model.adapter import add_lora
    from maese.model.attention import unpadded
    from maese.model.quick import quicken
    from maese.recipe import Method
    from maese.tokens.batches import collate_flat
    from maese.tokens.template import Example

    model, short = build(config), job.precision == "bf16"
    if job.kind == "lora":
        chosen = job.targets if job.targets == "all-linear" else list(job.targets)
        model = model.to(torch.bfloat16) if short else model
        model = add_lora(model, Method(kind="lora", rank=job.rank, dropout=job.dropout, targets=chosen))
    quicken(model)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or its place would be given to another
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=short):
        assert unpadded(model, TOKENS)
        model.train()
        rows = [Example([(i * 7 + r) % 320 for i in range(TOKENS)], [1] * TOKENS) for r in range(ROWS)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sum(model, collate_flat(rows, 0))
    return sum(size for size, _ in seen.values())


def job(**more) -> Job:
    usual = {
        "kind": "full", "precision": "bf16", "device": "cpu", "optimizer": "adamw", "checkpointing": False,
        "tokens": TOKENS * ROWS, "longest": TOKENS, "passes": 2, "rank": 4,
    }  # fmt: skip
    return Job(**(usual | more))


FAMILIES = ["gpt2", "phi", "llama", "qwen3", "qwen2", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_model_keeps_for_the_way_back_is_what_the_plan_counts(family, precision, kind):
    config, asked = row(family), job(kind=kind, precision=precision)
    found, told = kept(config, asked), shape.anatomy(config)
    # With checkpointing off the copies of weights are kept too, and the gradient of the head.
    counted = memory.activations(told, asked) + memory.copies_of(told, asked) + memory.head_of(told, asked)[0]
    assert counted == pytest.approx(found, rel=0.04)


DROPS = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, "phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.0},
    "llama": {"attention_dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("family", DROPS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_counted_with_its_masks(family, kind):
    config, asked = row(family, **DROPS[family]), job(kind=kind, dropout=0.1 if kind == "lora" else 0.0)
    told = shape.anatomy(config)
    counted = memory.activations(told, asked) + memory.copies_of(told, asked) + memory.head_of(told, asked)[0]
    assert counted == pytest.approx(kept(config, asked), rel=0.06)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_matrices_without_an_adapter_keep_nothing(family):
    names = {"gpt2": ["c_attn"], "phi": ["q_proj", "k_proj", "v_proj", "dense"]}[family]
    # The first block keeps less, since nothing before it learns: among eight it counts little.
    layers = {"n_layer": 8} if family == "gpt2" else {"num_hidden_layers": 8}
    config, asked = row(family, **layers), job(kind="lora", targets=tuple(names))
    told = shape.anatomy(config)
    counted = memory.activations(told, asked) + memory.copies_of(told, asked)
    assert counted == pytest.approx(kept(config, asked), rel=0.05)
    assert counted < 0.9 * memory.activations(told, job(kind="lora"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_keeps_what_goes_into_each_block_alone(family, kind):
    config, asked = row(family), job(kind=kind, checkpointing=True)
    told, found = shape.anatomy(config), kept(config, asked)
    # The gradient of the head is there in any case, and its copy in 16 bits.
    head = memory.head_of(told, asked)[0] + (2 * told.table if kind == "full" else 0)
    assert memory.activations(told, asked) + head == pytest.approx(found, rel=0.08)
    assert found - head < 0.2 * kept(config, job(kind=kind))


@pytest.mark.parametrize("name", [*shape.KNOWN])
def test_models_of_the_hub_have_the_parameters_of_the_real_ones(name):
    config = shape.KNOWN[name]
    model, told = build(config, "meta"), shape.open_shape(name)
    assert shape.parameters(told) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_parameters_and_adapters_are_counted_exactly(family, tied, biased):
    from maese.model.adapter import add_lora
    from maese.recipe import Method

    more = {"tie_word_embeddings": tied}
    more |= {} if family in ("gpt2", "phi") else {"attention_bias": biased, "mlp_bias": biased}
    config = row(family, **more)
    model, told = build(config, "meta"), shape.anatomy(config)
    assert shape.parameters(told) == sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in add_lora(model, Method(kind="lora", rank=4)).parameters() if p.requires_grad)
    assert shape.adapters(told, 4) == trained


def test_what_travels_and_the_sizes_are_counted_from_their_files(tmp_path):
    from maese.plan.sizes import SIZES
    from maese.recipe import INSIDE

    assert shape.parameters(shape.open_shape("embedded")) > 1e6
    assert shape.open_shape("embedded") == shape.open_shape(str(INSIDE["embedded"]))
    assert shape.parameters(shape.of_size(SIZES["mini"], "modern")) == 26_451_328
    for name, size in SIZES.items():
        assert shape.open_shape(name) == shape.of_size(size, "modern")


def test_a_model_fetched_before_is_found_where_the_hub_keeps_it(tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    store = tmp_path / "models--ana--suyo"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("abc")
    (store / "snapshots" / "abc").mkdir(parents=True)
    (store / "snapshots" / "abc" / "config.json").write_text(json.dumps(row("llama")))
    assert shape.open_shape("ana/suyo") == shape.anatomy(row("llama"))


def test_a_config_that_is_broken_or_of_another_family_is_said(tmp_path):
    import json

    from maese.errors import MaeseError

    def code(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MaeseError) as problem:
            shape.open_shape(str(tmp_path))
        assert str(problem.value)
        return problem.value.code

    assert code("{") == "MODEL-06"
    assert code("[1]") == "MODEL-06"
    assert code(json.dumps({"model_type": "gpt2", "n_layer": 2})) == "MODEL-06"
    assert code(json.dumps({"model_type": "mamba"})) == "PLAN-01"


def test_four_bits_weigh_what_bitsandbytes_gives_them():
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch

    numbers = 512 * 1024
    packed, state = functional.quantize_4bit(torch.randn(512, 1024), quant_type="nf4", compress_statistics=True)
    constants = 4 * (state.code.numel() + state.state2.code.numel())  # the same for every matrix
    found = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert found == pytest.approx(memory.NF4 * numbers, rel=1e-3) and constants < 2000
    config = row("phi", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4)
    told = shape.anatomy(config)
    assert memory.weights_of(told, job(kind="qlora")) < memory.weights_of(told, job(kind="lora"))


def test_the_figures_of_the_head_and_of_muon_are_theirs():
    from maese.model import head
    from maese.train import muon

    assert memory.HEAD_BUDGET == head.BUDGET and memory.HEAD_ROWS == head.MOST_ROWS
    assert memory.MUON_TOGETHER == muon.TOGETHER


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon"])
def test_what_the_optimizer_remembers_is_counted(kind):
    import torch

    from maese.recipe import Train
    from maese.train.optim import optimizer

    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = row("gpt2", n_embd=192, vocab_size=640)
    model, told = build(config), shape.anatomy(config)
    made = optimizer(model, Train(optimizer=kind))
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    made.step()
    held = sum(v.nbytes for state in made.state.values() for v in state.values() if hasattr(v, "nbytes") and v.ndim)
    if kind == "adamw8bit":  # its tables of 256 numbers, one for each parameter, are nothing beside a real model
        held -= sum(v.nbytes for state in made.state.values() for k, v in state.items() if k.startswith("qmap"))
    counted = memory.optimizer_of(told, job(optimizer=kind), shape.parameters(told))
    assert counted == pytest.approx(held, rel=0.06)


def test_the_heaviest_pass_is_the_one_a_step_makes():
    from types import SimpleNamespace

    import numpy as np

    from maese import recipe as recipes
    from maese.train.step import _shares
    from maese.train.together import Together

    lengths = np.random.default_rng(0).integers(5, 200, 400)
    for rows, turns, device in ((8, 4, "cpu"), (32, 1, "cpu"), (4, 4, "cuda")):
        tree = {"name": "x", "data": {"sources": [{"path": "x"}], "max_length": 256}}
        tree["train"] = {"micro_batch": rows, "accumulation": turns}
        asked = recipes.check(tree)
        session = SimpleNamespace(
            recipe=asked, data=SimpleNamespace(train=SimpleNamespace(lengths=lengths)), together=Together(),
            packs=False, unpadded=True, machine=SimpleNamespace(device=device),
        )  # fmt: skip
        from maese.tokens.batches import batches

        most = 0
        for step in batches(len(lengths), rows, turns, asked.train.seed, 0, -(-400 // (rows * turns))):
            groups, _ = _shares(session, step)
            most = max(most, *(int(lengths[group].sum()) for group in groups))
        tokens, passes = memory.heaviest(asked, device, lengths)
        assert tokens - 64 < most <= tokens and passes >= 1
        # Without the rows at hand, they are all as long as they may be.
        assert memory.heaviest(asked, device)[0] >= tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_all_alike_are_dealt_as_a_step_deals_them(device):
    """By arithmetic and not by dealing them: a batch of millions is planned at once."""
    from maese.tokens.batches import ENOUGH, by_room

    for rows, turns, longest in ((1, 1, 512), (8, 4, 256), (3, 5, 700), (7, 3, 129), (2, 1, 2048), (64, 2, 33)):
        asked = recipe_of(longest, rows, turns)
        room = min(rows * longest, ENOUGH) if device == "cpu" else rows * longest
        groups = by_room(range(rows * turns), [longest] * rows * turns, room)
        most = max(len(group) for group in groups) * longest
        assert memory.heaviest(asked, device) == (-(-most // 64) * 64, len(groups)), (rows, turns, longest)
    assert memory.heaviest(recipe_of(128, 1, 10**9), device)[1] >= 10**8


def recipe_of(longest: int, rows: int, turns: int):
    from maese import recipe as recipes

    data = {"sources": [{"path": "x"}], "max_length": longest}
    return recipes.check({"name": "x", "data": data, "train": {"micro_batch": rows, "accumulation": turns}})


def test_the_worst_moment_and_what_makes_it_larger():
    from dataclasses import replace

    from maese.plan.sizes import Shape

    told = shape.open_shape("gpt2")
    usual = job(tokens=1024, longest=256)
    base = memory.estimate(told, usual)
    assert base.peak == base.training == sum(size for _, size in base.parts) == base.needed
    # Frozen weights are read beside a file twice as large, which the system can take back and a card never sees.
    frozen = memory.estimate(shape.open_shape("gpt2-xl"), job(kind="lora", checkpointing=True, tokens=64))
    assert frozen.peak == frozen.load > frozen.training == frozen.needed
    assert dict(base.parts)["weights"] == 4 * shape.parameters(told)
    assert memory.estimate(told, replace(usual, tokens=2048)).peak > base.peak
    assert memory.estimate(told, replace(usual, checkpointing=True)).peak < base.peak
    assert memory.estimate(told, replace(usual, kind="lora")).peak < base.peak
    assert memory.estimate(told, usual, process=0).peak == base.peak - memory.usual_process()
    # Weights that stay in the bits of their file are the file: nothing stands beside it.
    assert memory.estimate(told, usual, file=2 * shape.parameters(told)).file and not base.file
    card = memory.estimate(told, replace(usual, device="cuda"))
    assert "process" not in dict(card.parts) and card.needed > card.peak + memory.CONTEXT
    # A run of one pass has its gradients only at the end of the way back.
    assert "gradients" not in dict(memory.estimate(told, replace(usual, passes=1)).parts)
    # With few words and few tokens at once, the most that Muon holds is when it turns its matrices.
    few = shape.of_size(Shape(layers=12, heads=12, width=768, vocabulary=300, context=512), "modern")
    assert memory.estimate(few, replace(usual, optimizer="muon", tokens=64)).moment == "moving"
    # So few tokens that the weights are all there is: the tables have two gradients at the end.
    assert memory.estimate(told, replace(usual, tokens=64)).moment in ("forward", "ending")


def test_phi_2_in_four_bits_fits_where_it_was_promised():
    """2,048 tokens a step on the card of six gigabytes it was trained on: no more than four."""
    told = shape.open_shape("microsoft/phi-2")
    asked = job(
        kind="qlora", device="cuda", optimizer="paged", checkpointing=True, tokens=2048, longest=2048, rank=16,
        targets=("q_proj", "k_proj", "v_proj", "dense"),
    )  # fmt: skip
    assert memory.estimate(told, asked).needed < 4.0e9
