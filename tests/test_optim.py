"""Our steps are torch's steps, and many matrices turn as one does."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest

from maese.errors import MaeseError
from maese.recipe import Train
from maese.train.optim import build, groups, optimizer, rate

TRAIN = Train(lr=1e-2, weight_decay=0.1)
MUON = TRAIN.model_copy(update={"optimizer": "muon"})


def tiny_model(seed=0):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=2, **drops))


def rows(n=8, width=16):
    import torch

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(320, (n, width), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def backward(model, batch, parts=1):
    from maese.evaluate.likelihood import loss_sum

    targets = batch["labels"][:, 1:].numel()
    total = 0.0
    for part in range(parts):
        loss = loss_sum(model, {k: v.chunk(parts)[part] for k, v in batch.items()}) / targets
        loss.backward()
        total += float(loss.detach())
    return total


def with_gradients(*shapes, seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(*p.shape, generator=generator)
    return made


def distance(one, other):
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm())


def test_our_adamw_is_the_one_of_the_paper():
    import torch

    matrix, vector = with_gradients((6, 5), (7,))
    module = torch.nn.Module()
    module.matrix, module.vector = matrix, vector
    expected, mean, square = [p.detach().clone() for p in (matrix, vector)], [0.0, 0.0], [0.0, 0.0]
    ours = optimizer(module, TRAIN)
    for step in (1, 2, 3):
        for i, (p, decay) in enumerate(((matrix, 0.1), (vector, 0.0))):
            mean[i] = 0.9 * mean[i] + 0.1 * p.grad
            square[i] = 0.999 * square[i] + 0.001 * p.grad**2
            moved = (mean[i] / (1 - 0.9**step)) / ((square[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[i] = expected[i] * (1 - 1e-2 * decay) - 1e-2 * moved
        ours.step()
    assert distance(matrix, expected[0]) < 1e-6 and distance(vector, expected[1]) < 1e-6


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_muon_of_one_matrix_is_torchs(shape, monkeypatch):
    import torch

    from maese.train import muon

    monkeypatch.setattr(muon, "bf16_pays_on_cpu", lambda: True)  # torch's is always in bf16
    (ours,), (theirs,) = with_gradients(shape), with_gradients(shape)
    mine = muon.Muon([{"params": [ours], "orthogonal": True, "weight_decay": 0.1}], lr=1e-2)
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for _ in range(3):
        mine.step()
        other.step()
    assert distance(ours - start, theirs - start) < 5e-3


def test_matrices_of_equal_shape_turn_together_as_they_do_alone(monkeypatch):
    from maese.train import muon

    monkeypatch.setattr(muon, "bf16_pays_on_cpu", lambda: False)
    shapes = [(16, 40), (40, 16), (16, 40), (24, 24), (16, 40)]
    together, alone, split = (with_gradients(*shapes) for _ in range(3))
    group = {"orthogonal": True, "weight_decay": 0.1}
    muon.Muon([group | {"params": together}], lr=1e-2).step()
    for p in alone:
        muon.Muon([group | {"params": [p]}], lr=1e-2).step()
    monkeypatch.setattr(muon, "TOGETHER", 2 * 16 * 40 * 4)  # two at a time
    muon.Muon([group | {"params": split}], lr=1e-2).step()
    for one, other, third in zip(together, alone, split, strict=True):
        assert distance(one, other) < 1e-6 and distance(third, other) < 1e-6


def test_turned_matrices_are_nearly_orthogonal_and_move_as_adamw_does():
    import torch

    from maese.train.muon import orthogonal, rms_scale

    torch.manual_seed(0)
    turned = orthogonal(torch.randn(3, 32, 96))
    values = torch.linalg.svdvals(turned)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert 0.13 < float((turned[0] * rms_scale((32, 96))).pow(2).mean().sqrt()) < 0.25  # AdamW's is about 0.2


def test_muon_takes_the_matrices_of_the_body_and_adamw_the_rest():
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in groups(model, MUON)]
    assert len(found[0]) == 8 and all(".h." in name and name.endswith("weight") for name in found[0])
    assert found[1] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert sum(map(len, found)) == len(names) and not any(name.endswith("e.weight") for name in found[2])
    assert [group["weight_decay"] for group in groups(model, MUON)] == [0.1, 0.1, 0.0]
    # What does not train is in no group.
    model.transformer.wte.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in groups(model, TRAIN)) == len(names) - 1


def test_under_one_roof_adamws_part_is_adamws_also_after_a_state_was_loaded():
    import torch

    ours, theirs = tiny_model(), tiny_model()
    mine, adamw = optimizer(ours, MUON), optimizer(theirs, TRAIN)
    for again in (False, True):
        if again:
            mine.load_state_dict(copy.deepcopy(mine.state_dict()))  # Accelerate does this to every optimizer
            for group in (*mine.param_groups, *adamw.param_groups):
                group["lr"] = 3e-3
        for name, p in ours.named_parameters():
            p.grad = torch.full_like(p, 0.1)
            theirs.get_parameter(name).grad = torch.full_like(p, 0.1)
        mine.step()
        adamw.step()
        assert torch.equal(ours.transformer.wte.weight, theirs.transformer.wte.weight)
        assert torch.equal(ours.transformer.ln_f.bias, theirs.transformer.ln_f.bias)
        assert not torch.equal(ours.transformer.h[0].mlp.c_fc.weight, theirs.transformer.h[0].mlp.c_fc.weight)
    assert set(mine.state[ours.transformer.wte.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_learns_what_it_is_shown():
    model, batch = tiny_model(), rows()
    ours = optimizer(model, MUON)
    losses = []
    for _ in range(12):
        losses.append(backward(model, batch))
        ours.step()
        ours.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_eight_bits_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for kind in ("adamw8bit", "paged"):
        with pytest.raises(MaeseError) as problem:
            optimizer(tiny_model(), TRAIN.model_copy(update={"optimizer": kind}))
        assert problem.value.code == "DEP-01" and problem.value.facts["extra"] == "qlora"


def test_eight_bits_are_asked_of_their_package_with_our_groups_and_rates(monkeypatch):
    package = ModuleType("bitsandbytes")
    package.optim = ModuleType("bitsandbytes.optim")
    package.optim.AdamW8bit = lambda made, **settings: ("AdamW8bit", made, settings)
    package.optim.PagedAdamW8bit = lambda made, **settings: ("PagedAdamW8bit", made, settings)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    made = groups(tiny_model(), TRAIN)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    for kind, name in (("adamw8bit", "AdamW8bit"), ("paged", "PagedAdamW8bit")):
        assert build(made, TRAIN.model_copy(update={"optimizer": kind})) == (name, made, settings)


def test_wsd_stays_and_comes_down_in_the_last_fifth():
    train = Train(lr=1.0, warmup=0.1).model_copy(update={"schedule": "wsd"})
    rates = [rate(step, 100, train) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
