"""The loss without its logits is the loss: in value, in gradient, through every wrapper, in less memory."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from maese.tokens.batches import IGNORED


def naive(hidden, weight, bias, targets, softcap=None):
    import torch
    import torch.nn.functional as F

    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def inputs(rows=200, vocabulary=700, width=24, dtype="float32", bias=True):
    import torch

    torch.manual_seed(3)
    made = [torch.randn(rows, width), torch.randn(vocabulary, width) / 2, torch.randn(vocabulary) if bias else None]
    made = [None if t is None else t.to(getattr(torch, dtype)).requires_grad_() for t in made]
    return made, torch.randint(vocabulary, (rows,))


def value_and_gradients(loss, tensors, weight=0.01):
    import torch

    given = [t for t in tensors if t is not None and t.requires_grad]
    return float(loss.detach()), torch.autograd.grad(loss * weight, given)


def close(found, expected, tolerance):
    return float((found.float() - expected.float()).norm()) <= tolerance * float(expected.float().norm())


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, tiles and blocks even in a test."""
    from maese.model import head

    monkeypatch.setattr(head, "BUDGET", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(head, "CACHED", 5000)
    monkeypatch.setattr(head, "TILE", 256)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_is_naive_in_value_and_gradient(small_chunks, softcap, bias):
    from maese.model.head import chunked_loss

    tensors, targets = inputs(bias=bias)
    expected, theirs = value_and_gradients(naive(*tensors, targets, softcap), tensors)
    found, ours = value_and_gradients(chunked_loss(*tensors, targets, softcap), tensors)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(ours) == 2 + bias
    for mine, other in zip(ours, theirs, strict=True):
        assert close(mine, other, 1e-5)


def test_in_bf16_it_is_as_near_to_the_truth_as_the_naive_one(small_chunks):
    from maese.model.head import chunked_loss

    tensors, targets = inputs(dtype="bfloat16")
    truth = [t.detach().float().requires_grad_() for t in tensors]
    exact, gradients = value_and_gradients(naive(*truth, targets), truth)
    expected, theirs = value_and_gradients(naive(*tensors, targets), tensors)
    found, ours = value_and_gradients(chunked_loss(*tensors, targets), tensors)
    assert found == pytest.approx(exact, rel=1e-3) and found == pytest.approx(expected, rel=1e-6)
    for mine, other, true in zip(ours, theirs, gradients, strict=True):
        assert mine.dtype == tensors[0].dtype and close(mine, true, 0.01)
        # Sums of the chunks in fp32: dividing the rows costs nothing that one product had.
        assert float((mine.float() - true).norm()) <= 1.1 * float((other.float() - true).norm())


def test_a_frozen_head_is_given_no_gradient_and_without_learning_none_is_made(small_chunks, monkeypatch):
    import torch

    from maese.model import head

    (hidden, weight, _), targets = inputs(bias=False)
    weight.requires_grad_(False)
    monkeypatch.setattr(head, "_add_product", lambda *_: pytest.fail("a product for a weight that does not learn"))
    expected, theirs = value_and_gradients(naive(hidden, weight, None, targets), [hidden])
    found, ours = value_and_gradients(head.chunked_loss(hidden, weight, None, targets), [hidden])
    assert found == pytest.approx(expected, rel=1e-6) and close(ours[0], theirs[0], 1e-5)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a gradient nobody asked for"))
    with torch.no_grad():
        assert float(head.chunked_loss(hidden, weight, None, targets)) == pytest.approx(expected, rel=1e-6)


def test_of_no_rows_the_loss_is_zero_and_so_are_the_gradients():
    from maese.model.head import chunked_loss

    tensors, targets = inputs(rows=0)
    found, ours = value_and_gradients(chunked_loss(*tensors, targets), tensors)
    assert found == 0 and all(not gradient.any() for gradient in ours)


def test_backward_twice_is_refused_and_not_wrong():
    from maese.model.head import chunked_loss

    tensors, targets = inputs()
    loss = chunked_loss(*tensors, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def build(kind: str, **more):
    import torch
    import transformers

    torch.manual_seed(0)
    size = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 0, "head_dim": 16, **more,
    }  # fmt: skip
    if kind == "GPT2":
        size = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        size |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if kind == "Phi":
        size |= {"num_key_value_heads": 2, "resid_pdrop": 0.0}
    config = getattr(transformers, f"{kind}Config")(**size)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # a bias of zeros would hide that it was left out; small logits, that they are capped
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 5)
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch_of(width=24, rows=3, vocabulary=320):
    import torch

    torch.manual_seed(1)
    ids = torch.randint(2, vocabulary, (rows, width))
    attention = torch.ones_like(ids)
    attention[1, 15:] = 0
    labels = torch.where((attention == 1) & (torch.rand(rows, width) < 0.6), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def plain_loss(model, batch):
    import torch.nn.functional as F

    seen = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**seen, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model, loss):
    import torch

    model.zero_grad()
    loss.backward()
    return {name: torch.clone(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, tolerance=1e-5):
    from maese.evaluate.likelihood import loss_sum

    batch = batch_of()
    expected, found = plain_loss(model, batch), loss_sum(model, batch)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    theirs, ours = gradients(model, expected), gradients(model, found)
    assert theirs.keys() == ours.keys()
    largest = max(float(g.norm()) for g in theirs.values())
    for name, other in theirs.items():
        assert float((ours[name] - other).norm()) <= tolerance * max(float(other.norm()), 1e-2 * largest), name


FAMILIES = pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("GPT2", {}), ("Llama", {}), ("Phi", {}), ("Qwen3", {}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
        ("Gemma2", {"final_logit_softcapping": 5.0}), ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}), ("Mixtral", {"num_local_experts": 2}),
    ],
)  # fmt: skip


@FAMILIES
def test_the_loss_of_a_model_is_that_of_its_logits(kind, more):
    from maese.model.head import head_of

    model = build(kind, **more)
    assert head_of(model)
    assert_same(model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_with_adapters_too_also_where_one_is_on_the_head(targets):
    import torch

    from maese.model.adapter import add_lora
    from maese.model.head import head_of
    from maese.recipe import Method

    model = add_lora(build("Llama"), Method(kind="lora", rank=4, dropout=0.0))
    if targets != "all-linear":  # a recipe is refused such a target; a model made elsewhere may have it
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert (head_of(model) is not None) == (targets == "all-linear")
    assert_same(model)


def test_a_head_that_bends_its_logits_in_a_way_of_its_own_is_not_trusted():
    import torch

    from maese.model.head import head_of

    model = build("Llama")
    real = model.forward

    def bent(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)  # with logits this small nothing shows
    model.forward = bent
    assert head_of(model) is None
    assert_same(model)


def test_being_tried_leaves_the_model_and_chance_as_they_were():
    import torch

    from maese.model.head import head_of

    model = build("Llama").train()
    model.model.layers[0].eval()
    before, modes, hooks = (
        torch.get_rng_state(),
        [m.training for m in model.modules()],
        model.lm_head._forward_pre_hooks,
    )
    assert head_of(model)
    assert torch.equal(before, torch.get_rng_state()) and modes == [m.training for m in model.modules()] and not hooks


def test_inside_autocast_the_head_multiplies_in_the_dtype_it_would_have():
    import torch

    from maese.evaluate.likelihood import loss_sum

    model, batch = build("GPT2"), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_loss(model, batch)
        found = loss_sum(model, batch)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    ours, theirs = gradients(model, found), gradients(model, expected)
    for name in theirs:
        assert close(ours[name], theirs[name], 0.02), name


def test_accelerates_own_autocast_around_the_model_is_seen():
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from maese.evaluate.likelihood import loss_sum
    from maese.model.head import chunked_loss, head_of

    dtypes, batch = [], batch_of()
    plain = build("GPT2")
    expected = float(plain_loss(plain, batch).detach())
    try:
        model = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(plain))
        assert head_of(model)
        from maese.model import head

        def spy(*args):
            dtypes.append(args[5])
            return chunked_loss(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "chunked_loss", spy)
            assert float(loss_sum(model, batch).detach()) == pytest.approx(expected, rel=5e-3)
        assert dtypes == [torch.bfloat16]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from maese.model.head import chunked_loss
import torch.nn.functional as F
way, vocabulary, learns = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "learns"
hidden = torch.randn(2048, 64).requires_grad_()
weight = torch.randn(vocabulary, 64).requires_grad_(learns)
targets = torch.randint(vocabulary, (2048,))
def loss(h, t):
    if way == "chunked":
        return chunked_loss(h, weight, None, t)
    return F.cross_entropy(F.linear(h, weight)[torch.ones(len(h), dtype=torch.bool)].float(), t, reduction="sum")
loss(hidden[:8], targets[:8]).backward()  # what the library itself loads is not of the head
hidden.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(hidden, targets).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_the_peak_of_the_head_is_a_tenth_of_the_naive_one():
    def peak(way):
        done = subprocess.run([sys.executable, "-c", PEAK, way, "32000", "learns"], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return float(done.stdout)

    assert peak("chunked") <= 0.12 * peak("naive")
