"""A base in 4 bits: what it loses, what it weighs, and that it learns as PEFT's does and goes on bit for bit."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import make_voice

from maese.errors import Interrupted, MaeseError
from maese.model import quant
from maese.recipe import Method, Train
from maese.run import Run
from maese.train.loop import resume, train

pytest.importorskip("bitsandbytes")

# The 16 values of NF4 (Dettmers et al. 2023, appendix E).
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def learn_alike(theirs, ours, examples: list) -> dict:
    """One pass and its way back through both: padded, by the definition of the loss, and as maese does it."""
    from torch.nn import functional as F

    from maese.evaluate.likelihood import loss_sum
    from maese.tokens.batches import IGNORED, collate, collate_flat

    batch = collate(examples, 1)
    logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    found = loss_sum(ours, collate_flat(examples, 1))
    expected.backward()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    return batch


def save_model(folder: Path, kind: str, width: int = 128, layers: int = 2, vocabulary: int = 320, **more) -> Path:
    """A model with random weights of one of three families, with the tokenizer of the tests."""
    import torch
    from conftest import make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    common = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": 128,
        "intermediate_size": 2 * width, "num_attention_heads": width // 32, **ends, **more,
    }  # fmt: skip
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, n_positions=128, resid_pdrop=0,
                embd_pdrop=0, attn_pdrop=0, **ends,
            )
        )  # fmt: skip
    elif kind == "phi":
        model = PhiForCausalLM(PhiConfig(tie_word_embeddings=False, **common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, head_dim=32, num_key_value_heads=2, **common))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quant")
    return {kind: save_model(folder / kind, kind) for kind in ("gpt2", "phi", "qwen3")}


def adapted(model):
    """The model with adapters that already say something."""
    import torch

    from maese.model.adapter import add_lora

    torch.manual_seed(1)
    model = add_lora(model, Method(kind="qlora", rank=3, alpha=5)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def learnt(model, dtype: str = "fp32"):
    """Loss and gradients of one batch."""
    import torch

    ids = torch.arange(24).reshape(2, 12) % 30
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_what_comes_back_is_the_nearest_of_sixteen_values(bases):
    """By the table of the paper and blocks of 64: nothing is further away than half of the gap it falls in."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from maese.model.load import load_model

    plain, model = load_model(bases["qwen3"]), quant.load_quantized(bases["qwen3"], "fp32", "cpu")
    table, seen = torch.tensor(NF4), 0
    for name, module in model.named_modules():
        if module in quant.quantized(model):
            wanted = plain.get_submodule(name).weight.detach().reshape(-1, quant.BLOCK)
            found = dequantize_4bit(module.weight.data, module.weight.quant_state).reshape(-1, quant.BLOCK)
            scale = wanted.abs().amax(1, keepdim=True)
            nearest = table[(wanted[..., None] / scale[..., None] - table).abs().argmin(-1)] * scale
            # The scales themselves are in 8 bits.
            assert float((found - nearest).norm() / nearest.norm()) < 0.02
            assert bool(((found - wanted).abs() <= quant.WORST * scale).all())
            seen += 1
    assert seen == 2 * 7


@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen3"])
def test_in_4_bits_it_says_what_transformers_says_in_4_bits(bases, kind):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(bases[kind], quantization_config=config, device_map={"": "cpu"})
    ours = quant.load_quantized(bases[kind], "fp32", "cpu")
    ids = torch.arange(24).reshape(2, 12) % 30
    with torch.enable_grad():  # where it only reads, theirs multiplies in 16 bits on some processors
        expected, found = (model.train()(input_ids=ids).logits for model in (theirs, ours))
    assert torch.equal(expected, found)


def weight_bytes(model) -> tuple[int, int]:
    """Bytes of the quantized matrices as they would be in 16 bits, and as they are, scales and tables counted."""
    layers = quant.quantized(model)
    whole = sum(2 * math.prod(layer.weight.quant_state.shape) for layer in layers)
    return whole, sum(held(layer.weight) for layer in layers)


def held(weight) -> int:
    state = weight.quant_state
    parts = [weight.data, state.absmax, state.code, state.offset]
    parts += [state.state2.absmax, state.state2.code] if state.nested else []
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def test_matrices_in_4_bits_weigh_a_third_of_16_at_most(tmp_path):
    """Every scale, table and second scale counted; embeddings, norms and head stay in 16 bits."""
    import torch

    model = quant.load_quantized(save_model(tmp_path / "base", "qwen3", width=256), "bf16", "cpu")
    whole, packed = weight_bytes(model)
    assert len(quant.quantized(model)) == 14 and whole == 2 * 2 * (256 * (256 + 2 * 64 + 256) + 3 * 256 * 512)
    assert 0.25 < packed / whole <= 0.32
    rest = {n: p.dtype for n, p in model.named_parameters() if p.dtype != torch.uint8}
    assert set(rest.values()) == {torch.bfloat16} and {"model.embed_tokens.weight", "model.norm.weight"} <= rest.keys()


def test_parameters_are_counted_as_what_they_stand_for(bases):
    from maese.model.fingerprint import parameters
    from maese.model.load import load_model

    assert parameters(quant.load_quantized(bases["phi"], "fp32", "cpu"))[0] == parameters(load_model(bases["phi"]))[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen3"])
def test_an_adapter_over_4_bits_in_one_operation_is_the_one_of_peft(bases, kind, dtype):
    from maese.model.quick import quicken

    theirs, ours = (adapted(quant.load_quantized(bases[kind], dtype, "cpu")) for _ in range(2))
    exact = adapted(quant.load_quantized(bases[kind], "fp32", "cpu"))
    quicken(ours)
    assert sum("forward" in vars(part) for part in ours.modules()) == len(quant.quantized(ours)) > 0
    (loss, grads), (found, mine), (_, truth) = learnt(theirs, dtype), learnt(ours, dtype), learnt(exact)
    assert found == pytest.approx(loss, rel=1e-6 if dtype == "fp32" else 1e-2) and mine.keys() == grads.keys()
    if dtype == "fp32":
        for name in grads:
            assert float((mine[name] - grads[name]).norm()) <= 1e-4 * float(grads[name].norm()) + 1e-7, name
    else:  # as near to 32 bits as the other is
        far = [sum(float((g[n].float() - truth[n]).norm()) for n in truth) for g in (mine, grads)]
        assert far[0] <= 1.1 * far[1]


@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen3"])
def test_all_our_ways_together_learn_what_peft_learns(bases, kind):
    """Documents without padding, the loss without logits, adapters in one operation: against padded rows of PEFT."""

    from maese.model.attention import unpadded
    from maese.model.head import head_of
    from maese.model.quick import quicken
    from maese.tokens.template import Example

    theirs, ours = (adapted(quant.load_quantized(bases[kind], "fp32", "cpu")) for _ in range(2))
    quicken(ours)
    assert unpadded(ours, 32) and head_of(ours)
    rows = [Example([*range(n, 2 * n + 3)], [0, *[1] * (n + 2)]) for n in (3, 9, 14)]
    learn_alike(theirs, ours, rows)
    pairs = [(one.grad, other.grad) for one, other in zip(theirs.parameters(), ours.parameters(), strict=True)]
    learnt = [(one, other) for one, other in pairs if one is not None]
    assert len(learnt) == 2 * len(quant.quantized(ours))
    assert all(float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-6 for one, other in learnt)


@pytest.mark.parametrize("quick", [True, False])
def test_to_look_does_not_take_the_gradient_away(bases, quick):
    """bitsandbytes repacks a weight that is only read, on processors with AVX512-BF16, and then nothing flows back."""
    import torch

    from maese.model.quick import quicken

    model = adapted(quant.load_quantized(bases["qwen3"], "bf16", "cpu"))
    if quick:
        quicken(model)
    _, before = learnt(model, "bf16")
    before = {name: grad.clone() for name, grad in before.items()}
    model.zero_grad()
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(12)[None])
    _, after = learnt(model.train(), "bf16")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["gpt2", "phi", "qwen3"])
def test_its_loss_falls(recipe, bases, kind):
    run = train(recipe(f"base={bases[kind]}", *QLORA, "train.max_steps=30", "train.epochs=9", "train.lr=2e-2"))
    losses = [e["loss"] for e in run.history() if e["type"] == "step"]
    assert sum(losses[-4:]) < 0.96 * sum(losses[:4])
    plan = next(e for e in run.history() if e["type"] == "plan")
    assert plan["unpadded"] and 0 < plan["trainable"] < plan["parameters"]
    assert {p.name for p in run.final.glob("*.safetensors")} == {"adapter_model.safetensors"}


QLORA = ("method.kind=qlora", "method.rank=4", "train.precision=fp32")


@pytest.mark.parametrize(
    "more", [(), ("train.gradient_checkpointing=true",), ("train.precision=bf16", "train.optimizer=paged")]
)
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(recipe, bases, more):
    changes = (f"base={bases['qwen3']}", *QLORA, *more, "method.dropout=0.1")
    straight = train(recipe("output=straight", *changes))

    def stop_at_3(event):
        if event["type"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe("output=cut", *changes), watch=stop_at_3)
    run = resume(Run("cut"))
    name = "adapter_model.safetensors"
    assert (run.final / name).read_bytes() == (straight.final / name).read_bytes()
    kept = {p.name for p in (run.checkpoints / "checkpoint-4").iterdir()}
    assert kept == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "MANIFEST.json"}


def test_a_run_opens_as_an_adapter_over_the_whole_base(recipe, bases):
    """The adapter was learnt over what 4 bits left of the base, and is used over all of it."""
    import torch

    from maese.evaluate.compare import compare
    from maese.generate.engine import open_writer

    run = train(recipe(f"base={bases['qwen3']}", *QLORA, "train.lr=1e-2"))
    writer = open_writer(run)
    assert not quant.quantized(writer.model) and writer.model.dtype == torch.float32
    result = compare(run, ["En un lugar"], max_new_tokens=8)
    assert result["max_logit_difference"] > 0
    from peft import AutoPeftModelForCausalLM

    theirs = AutoPeftModelForCausalLM.from_pretrained(run.final)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, writer.model(input_ids=ids).logits, atol=1e-5)


def test_where_the_whole_base_has_no_room_it_opens_as_it_was_learnt_over(recipe, bases, monkeypatch, capsys):
    """A run that fitted a small card can be asked on that card."""
    import torch

    from maese.generate.engine import open_writer

    phi = 2_780_000_000
    free = {6: None, 8: "fp16", 11: "fp16", 16: "fp32"}
    assert {gib: quant.precision_that_fits(phi, gib << 30, "fp16") for gib in free} == free
    run = train(recipe(f"base={bases['qwen3']}", *QLORA, "train.lr=1e-2", "train.max_steps=2"))
    whole = open_writer(run)
    monkeypatch.setattr(quant, "_card", lambda: ("cpu", 1 << 20, "bf16"))
    capsys.readouterr()
    small = open_writer(run)
    assert len(quant.quantized(small.model)) == 14 and "4 bits" in capsys.readouterr().err
    # What 4 bits leave of the base is near it, and is not it.
    ids = torch.tensor([whole.prompt_ids("En un lugar")])
    with torch.no_grad():
        wanted, found = (writer.model(input_ids=ids).logits.float() for writer in (whole, small))
    assert 0 < float((found - wanted).norm()) < 0.5 * float(wanted.norm())
    assert small.generate("En un lugar", temperature=0.0, max_new_tokens=4).tokens > 0
    bare = open_writer(run, base=True)
    assert len(quant.quantized(bare.model)) == 14 and not hasattr(bare.model, "peft_config")
    monkeypatch.setattr(quant, "_card", lambda: ("cpu", 1 << 40, "bf16"))
    capsys.readouterr()
    assert not quant.quantized(open_writer(run).model) and not capsys.readouterr().err


@pytest.mark.parametrize("what", ["whole", "adapter"])
def test_where_32_bits_have_no_room_a_model_comes_in_16_or_stays_on_the_processor(
    bases, tmp_path, monkeypatch, capsys, what
):
    import torch

    from maese.generate.engine import open_writer

    folder = bases["qwen3"] if what == "whole" else make_voice(tmp_path / "voz", bases["qwen3"])
    numbers = open_writer(str(bases["qwen3"])).model.num_parameters()
    room = {8: (torch.float32, ""), 3: (torch.bfloat16, "en 16"), 1: (torch.float32, "escribe el procesador")}
    for each, (dtype, told) in room.items():
        free = quant.ROOM + int(numbers * each * quant.SPARE)
        monkeypatch.setattr(quant, "_card", lambda free=free: ("cpu", free, "bf16"))
        capsys.readouterr()
        writer = open_writer(str(folder))
        said = capsys.readouterr().err
        assert writer.model.get_input_embeddings().weight.dtype == dtype and told in said and bool(said) == bool(told)
        assert writer.generate("En un lugar", max_new_tokens=3).tokens > 0


def test_without_the_package_it_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MaeseError) as problem:
        train(recipe(*QLORA))
    assert problem.value.code == "DEP-01" and ".[qlora]" in str(problem.value)


@pytest.mark.parametrize("how", ["broken", "wrong"])
def test_where_4_bits_cannot_run_it_says_what_to_do_instead(recipe, monkeypatch, how):
    from bitsandbytes import functional

    real = functional.dequantize_4bit

    def dequantize(*given, **more):
        if how == "broken":
            raise RuntimeError("libbitsandbytes_cuda130.so: cannot open shared object file\nand much more")
        return real(*given, **more) * 1.5

    monkeypatch.setattr(functional, "dequantize_4bit", dequantize)
    with pytest.raises(MaeseError) as problem:
        train(recipe(*QLORA))
    assert problem.value.code == "QUANT-01" and "method.kind=lora" in str(problem.value)
    assert ("cannot open" in str(problem.value)) == (how == "broken") and "much more" not in str(problem.value)


def test_in_pieces_it_is_refused(recipe):
    from maese.train.sharding import refuse_sharded

    with pytest.raises(MaeseError) as problem:
        refuse_sharded(recipe(*QLORA))
    assert problem.value.code == "QUANT-02" and "torchrun" in str(problem.value)
    refuse_sharded(recipe("method.kind=lora"))


def test_a_rank_of_nothing_and_a_target_that_is_not_there_are_said(recipe):
    with pytest.raises(MaeseError) as problem:
        recipe(*QLORA, "method.rank=0")
    assert problem.value.code == "USE-03" and "method.rank" in str(problem.value) and "≥ 1" in str(problem.value)
    with pytest.raises(MaeseError) as problem:
        train(recipe(*QLORA, "method.targets=[c_atn]"))
    assert problem.value.code == "ADAPT-02" and "c_attn" in str(problem.value)


@pytest.mark.parametrize("kind", ["adamw8bit", "paged", "paged32"])
def test_the_optimizers_of_the_package_step(kind):
    import torch

    from maese.model.load import quiet
    from maese.train.optim import build

    quiet()  # on a processor there is nowhere to page to, and it warns of it
    weight = torch.nn.Parameter(torch.ones(64, 80))
    weight.grad = torch.ones_like(weight)
    made = build([{"params": [weight], "weight_decay": 0.0}], Train(lr=1e-2, optimizer=kind))
    made.step()
    assert torch.allclose(weight, torch.full_like(weight, 0.99), atol=1e-4)
    wanted = torch.float32 if kind == "paged32" else torch.uint8
    assert made.state[weight]["state1"].dtype == wanted and type(made).__name__.startswith(
        "Paged" if kind.startswith("paged") else "Adam"
    )


def test_native_code_is_not_fetched_from_a_hub():
    """bitsandbytes and transformers do, where the package `kernels` is installed."""
    from maese.model.load import quiet

    quiet()
    assert sys.modules["kernels"] is None
