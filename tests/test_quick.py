"""What is shortened computes what it did: GELU, and adapters on every kind of matrix, in value and in gradient."""

from __future__ import annotations

import copy
import json

import pytest
from test_pack import make

from maese.recipe import Method


def adapted(kind: str, dropout: float = 0.0):
    """A tiny model with adapters that already say something, and the same once more."""
    import torch

    from maese.model.adapter import add_lora

    model = add_lora(make(kind, "sdpa"), Method(kind="lora", rank=3, alpha=5, dropout=dropout)).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, copy.deepcopy(model)


def learnt(model, dtype=None):
    """Loss and gradients of one batch, with the dice thrown in the same way."""
    import torch

    torch.manual_seed(2)
    ids = torch.arange(24).reshape(2, 12) % 30
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["gpt2", "phi", "llama"])
def test_an_adapter_in_one_operation_is_the_one_of_peft(kind, dropout):
    from maese.model.quick import quicken

    theirs, ours = adapted(kind, dropout)
    assert quicken(ours) > 0
    (loss, grads), (found, mine) = learnt(theirs), learnt(ours)
    assert found == pytest.approx(loss, rel=1e-6) and mine.keys() == grads.keys() and len(grads) > 4
    for name in grads:
        assert float((mine[name] - grads[name]).norm()) <= 1e-4 * float(grads[name].norm()) + 1e-7, name


def test_in_16_bits_it_is_as_near_to_fp32_as_the_one_of_peft():
    import torch

    from maese.model.quick import quicken

    exact, theirs = adapted("gpt2")
    ours = copy.deepcopy(theirs)
    quicken(ours)
    truth, found = learnt(exact)[1], []
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.bfloat16()
        grads = learnt(model, torch.bfloat16)[1]
        found.append(sum(float((grads[n].float() - truth[n]).norm() / truth[n].norm()) for n in truth))
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert found[1] <= 1.1 * found[0]


def test_adapters_switched_off_merged_or_of_another_kind_are_as_before():
    import torch

    from maese.model.quick import quicken

    theirs, ours = adapted("gpt2")
    quicken(ours)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with theirs.disable_adapter(), ours.disable_adapter():
            assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)
        for model in (theirs, ours):
            model.merge_adapter()
        assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)
        for model in (theirs, ours):
            model.unmerge_adapter()
        assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)


def test_what_is_saved_does_not_know_of_it(tmp_path):
    from safetensors.torch import load_file

    from maese.model.quick import quicken

    theirs, ours = adapted("gpt2")
    quicken(ours)
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(bool((first[n] == second[n]).all()) for n in first)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8")) for name in ("theirs", "ours")]
    for config in configs:
        config["target_modules"].sort()  # a set, written in any order
    assert configs[0] == configs[1]


def test_gelu_is_one_operation_and_the_same_curve():
    import torch
    from transformers.activations import NewGELUActivation

    from maese.model.quick import quicken

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), NewGELUActivation())
    x = torch.linspace(-6, 6, 400)
    before = model[1](x)
    assert quicken(model) == 1 and type(model[1]) is torch.nn.GELU
    assert torch.allclose(model[1](x), before, atol=1e-6)
    assert quicken(model) == 0


def test_a_family_that_bears_no_adapters_is_refused_in_our_words():
    from transformers import MambaConfig, MambaForCausalLM

    from maese.errors import MaeseError
    from maese.model.adapter import add_lora

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(MaeseError) as problem:
        add_lora(model, Method(kind="lora"))
    assert problem.value.code == "ADAPT-03" and "mamba" in str(problem.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_norm_in_one_operation_is_the_norm(kind, dtype):
    """Loss and every gradient of the whole model, those of the norms' own weights among them."""
    import torch

    from maese.model.quick import quicken

    one = make(kind, "sdpa").train()
    other = copy.deepcopy(one)
    assert quicken(other) >= 5
    exact = copy.deepcopy(one)
    kind_of = getattr(torch, dtype) if dtype else None
    (loss, apart), (again, ours), (_, real) = learnt(one, kind_of), learnt(other, kind_of), learnt(exact)
    assert again == pytest.approx(loss, rel=1e-5 if dtype is None else 1e-2)

    def far(found: dict) -> float:
        return float(sum((found[name] - gradient).square().sum() for name, gradient in real.items()) ** 0.5)

    whole = float(sum(gradient.square().sum() for gradient in real.values()) ** 0.5)
    assert far(ours) <= 1.2 * far(apart) + 1e-6 * whole  # in 16 bits, as near to fp32 as the norm of the library is
    if dtype is None:
        assert all(float((ours[n] - g).norm()) <= 1e-5 * max(float(g.norm()), 1e-3) for n, g in real.items())


def test_a_norm_of_another_kind_is_left_alone():
    """Gemma's adds one to its weight: it has the name and not the sum."""
    import torch

    from maese.model.quick import _is_rms

    class ShiftedRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    assert not _is_rms(ShiftedRMSNorm())
