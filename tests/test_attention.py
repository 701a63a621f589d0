"""Documents side by side with no padding: a kernel of any signature, proved equal to one document at a time."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise

import pytest
from test_pack import alone, gradients, make, rows_of

from maese.tokens.batches import IGNORED, collate, collate_flat
from maese.tokens.template import Example


def slowly(query, key, value, borders, causal: bool, scale: float):
    """The definition, a document at a time and in fp32, with nothing of ours: (T, H, D)."""
    import torch

    found, ends = [], borders.tolist()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    for start, end in pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1]  # shared keys were none of its business then
    assert all(cu_seq_q.diff() <= max_q) and cu_seq_k is cu_seq_q and max_k == max_q and cu_seq_q.dtype.itemsize == 4
    return slowly(query, key, value, cu_seq_q, is_causal, query.shape[-1] ** -0.5)


def of_torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert all(cu_seq_q.diff() <= max_q) and cu_seq_k is cu_seq_q and max_k == max_q and cu_seq_q.dtype.itemsize == 4
    assert window_size in ((-1, -1), (-1, 0))
    return slowly(query, key, value, cu_seq_q, window_size == (-1, 0), scale or query.shape[-1] ** -0.5)


SIGNATURES = pytest.mark.parametrize("signature", [of_torch_2_10, of_torch_2_13])
KINDS = pytest.mark.parametrize("kind", ["gpt2", "phi", "llama", "qwen3"])


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """`processor()`: what a processor has. Without that, the machine is taken to have a card."""
    from maese.model import attention

    ours = attention.kernel
    monkeypatch.setattr(attention, "kernel", lambda _device: attention.on_card())
    return lambda: monkeypatch.setattr(attention, "kernel", ours)


@pytest.fixture
def card(monkeypatch):
    """`card(of_torch_2_10)`: a kernel with that signature, that takes fp32 so that it can be held against the rest."""
    import torch
    from torch.nn.attention import varlen

    from maese.model import attention

    def put(kernel, dtypes=(torch.float32, torch.bfloat16)):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(attention, "DTYPES", dtypes)

    return put


def documents() -> list[Example]:
    """Those of the packed rows, a document of one token, and so many that the row has filling at its end."""
    found = [example for row in rows_of() for example in row] + [Example([7], [0])]
    assert sum(map(len, found)) % 64 and min(map(len, found)) == 1
    return found


def test_a_flat_row_holds_every_document_and_says_where_it_ends():
    batch = collate_flat([Example([5, 6, 7], [0, 0, 1]), Example([8], [1]), Example([9, 4], [1, 1])], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4] + [1] * 58]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1] + [0, 1, 2] * 19 + [0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, IGNORED, 4] + [IGNORED] * 58]
    borders = [0, 3, 4, *range(6, 64, 3), 64]  # what fills the row up is in documents no longer than those in it
    assert batch["cu_seq_lens_q"].tolist() == borders and batch["max_length_q"] == 4
    full = collate_flat([Example([5] * 64, [1] * 64)], pad=1)
    assert full["cu_seq_lens_q"].tolist() == [0, 64] and full["max_length_q"] == 64


def flat_is_alone(kind):
    from maese.evaluate.likelihood import loss_sum
    from maese.model.attention import unpadded

    model, some = make(kind, "sdpa"), documents()
    expected = sum(alone(model, example) for example in some)
    apart = gradients(model, expected)
    assert unpadded(model, 40) and not model.training
    whole = loss_sum(model, collate_flat(some, pad=1))
    assert float(whole.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    flat = gradients(model, whole)
    size = max(float(g.norm()) for g in apart.values())
    for name in apart:
        assert float((flat[name] - apart[name]).norm()) <= 1e-5 * max(float(apart[name].norm()), 1e-2 * size), name


@KINDS
@SIGNATURES
def test_a_flat_row_is_each_document_alone_in_loss_and_in_gradient(card, kind, signature):
    card(signature)
    flat_is_alone(kind)


@KINDS
def test_so_it_is_on_a_processor_with_a_kernel_of_ours(processor, kind):
    processor()
    flat_is_alone(kind)


def test_on_a_processor_attention_may_drop_and_share_its_keys():
    import torch

    from maese.model.attention_cpu import documents as attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    borders = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    out = attention(query, key, value, borders, 6, 0.3)
    expected = slowly(query, key, value, borders, True, 0.3)
    assert torch.allclose(out, expected, atol=1e-6)
    pull = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, (query, key, value), pull) for x in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    dropped = attention(query, key, value, borders, 6, 0.3, 0.5)
    assert not torch.allclose(dropped, out) and bool(dropped.isfinite().all())
    many = torch.stack([attention(query, key, value, borders, 6, 0.3, 0.2) for _ in range(2000)]).mean(0)
    assert float((many - out).detach().abs().max()) < 0.15  # nothing but noise was added


def test_blocks_hold_documents_of_like_length_and_every_token_once():
    from maese.model.attention_cpu import _blocks

    borders = (0, 3, 43, 44, 82, 122)
    blocks, taken, back = _blocks(borders)
    assert blocks == ((3, 40), (2, 3)) and taken[back].tolist() == list(range(122))
    assert taken[-3:].tolist() == [43, 43, 43]  # a document of one token, repeated where nobody looks


@KINDS
def test_rows_with_padding_and_a_cache_go_the_usual_way(card, kind):
    import torch

    from maese.model.attention import unpadded

    card(of_torch_2_13)
    model, some = make(kind, "sdpa"), documents()[:3]
    batch = collate(some, 1)
    batch.pop("labels")
    ids = torch.tensor([some[0].ids])
    with torch.no_grad():
        before = model(**batch).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        assert unpadded(model, 40)
        after = model(**batch).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("recomputed", [False, True])
def test_adapters_and_recomputed_activations_change_nothing(card, recomputed):
    from maese.evaluate.likelihood import loss_sum
    from maese.model.adapter import add_lora
    from maese.model.attention import unpadded
    from maese.recipe import Method

    card(of_torch_2_13)
    some = documents()
    expected = float(sum(alone(make("llama", "sdpa"), example) for example in some).detach())
    model = add_lora(make("llama", "sdpa"), Method(kind="lora", rank=2))
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert unpadded(model, 40)
    loss = loss_sum(model.train(), collate_flat(some, pad=1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_under_autocast_all_comes_in_one_dtype(card):
    """Rotated queries are fp32 there, and values bf16."""
    import torch

    from maese.evaluate.likelihood import loss_sum
    from maese.model.attention import unpadded

    card(of_torch_2_13, (torch.bfloat16,))
    model, some = make("llama", "sdpa"), documents()
    expected = float(sum(alone(model, example) for example in some).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unpadded(model, 40)
        loss = loss_sum(model, collate_flat(some, pad=1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=2e-2)


def test_places_looked_up_beforehand_give_the_same_loss():
    from maese.evaluate.likelihood import loss_sum
    from maese.train.feed import before_learnt

    model, batch = make("gpt2", "sdpa"), collate(documents(), 1)
    kept = before_learnt(batch["labels"])
    assert float(loss_sum(model, batch | {"kept": kept}).detach()) == float(loss_sum(model, batch).detach())


# What it refuses, and what comes instead


def refused(model, longest: int = 40) -> bool:
    from maese.model.attention import unpadded

    before, training = model.config._attn_implementation, model.training
    taken = unpadded(model, longest)
    assert model.training == training
    assert taken or model.config._attn_implementation == before
    return not taken


def test_a_torch_without_the_kernel_is_left_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert refused(make("llama", "sdpa"))


def test_a_kernel_with_a_signature_nobody_knows_is_not_called(card):
    card(lambda query, key, value, borders: 1 / 0)
    assert refused(make("llama", "sdpa"))


def test_fp32_is_beyond_the_kernel(card):
    import torch

    card(of_torch_2_13, (torch.bfloat16, torch.float16))
    assert refused(make("llama", "sdpa")) and not refused(make("llama", "sdpa").bfloat16())


@pytest.mark.parametrize("wide, taken", [(256, True), (264, False), (12, False)])
def test_a_head_too_wide_or_uneven_is_beyond_the_kernel(card, wide, taken):
    import torch
    import transformers as hf

    card(of_torch_2_13)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=wide,
    )  # fmt: skip
    torch.manual_seed(0)
    assert refused(hf.LlamaForCausalLM(config)) != taken


def test_attention_that_drops_something_is_beyond_the_kernel(card):
    import torch
    import transformers as hf

    card(of_torch_2_13)
    shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    dice = torch.get_rng_state()
    assert refused(hf.GPT2LMHeadModel(hf.GPT2Config(**shape, attn_pdrop=0.1)).eval())
    torch.set_rng_state(dice)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, attn_pdrop=0.0)).eval()  # others may drop, and draw for it
    dice = torch.get_rng_state()
    assert not refused(model) and torch.equal(torch.get_rng_state(), dice)


def test_a_window_is_no_matter_while_no_document_is_longer(card):
    import torch
    import transformers as hf

    from maese.evaluate.likelihood import loss_sum

    card(of_torch_2_13)
    config = hf.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, some = hf.MistralForCausalLM(config).eval(), documents()
    expected = float(sum(alone(model, example) for example in some).detach())
    assert refused(model, longest=17)
    assert not refused(model, longest=16)
    assert float(loss_sum(model, collate_flat(some, pad=1)).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Phimoe", "Llama4Text"])
def test_a_window_that_only_the_mask_knows_is_seen_as_well(processor, kind):
    """These families tell their layers nothing of it: longer documents would see too far, and nobody would notice."""
    import torch
    import transformers as hf

    processor()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        getattr(hf, f"{kind}Config")(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=16, attention_chunk_size=16, use_sliding_window=True,
            max_window_layers=0, num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, intermediate_size_mlp=32, head_dim=8, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    assert refused(model, longest=17)
    assert not refused(model, longest=16)


def test_models_with_caps_keep_their_own_attention_and_stay_right(card):
    import torch
    import transformers as hf

    from maese.evaluate.likelihood import loss_sum
    from maese.tokens.batches import collate_packed

    card(of_torch_2_13)
    config = hf.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, attn_logit_softcapping=2.0, initializer_range=0.3,
    )  # fmt: skip
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = hf.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
        model.config._attn_implementation_internal = implementation
        assert refused(model)
    model.config._attn_implementation_internal = "eager"
    rows = rows_of()
    expected = float(sum(alone(model, example) for row in rows for example in row).detach())
    assert float(loss_sum(model, collate_packed(rows, 1, 40)).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_family_with_an_attention_of_its_own_is_refused(card):
    import torch
    import transformers as hf

    card(of_torch_2_13)
    config = hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    torch.manual_seed(0)
    assert refused(hf.FalconForCausalLM(config))


def test_a_family_that_blends_packed_rows_is_right_where_it_is_told_the_borders(card):
    from maese.evaluate.likelihood import loss_sum

    card(of_torch_2_13)
    model, some = make("opt", "sdpa"), documents()
    expected = float(sum(alone(model, example) for example in some).detach())
    assert not refused(model)
    assert float(loss_sum(model, collate_flat(some, pad=1)).detach()) == pytest.approx(expected, rel=1e-5)


def without_borders(*inputs, **named):
    import torch

    whole = torch.tensor([0, len(inputs[0])], dtype=torch.int32)
    return of_torch_2_13(*inputs[:3], whole, whole, 99, 99, **named)


def looking_ahead(*inputs, **named):
    return of_torch_2_13(*inputs, **named | {"window_size": (-1, -1)})


def wrong_gradient(query, *rest, **named):
    return of_torch_2_13(query.detach(), *rest, **named) + 0 * query


def broken(*_inputs, **_named):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize("wrong", [without_borders, looking_ahead, wrong_gradient, broken])
def test_a_kernel_that_does_wrong_is_found_out(card, wrong):
    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=0, enable_gqa=False):
        named = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
        return wrong(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **named)

    card(kernel)
    assert refused(make("llama", "sdpa"))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_mask_that_comes_instead_is_the_definition(heads, window):
    import torch

    from maese.model.attention import by_mask

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 11, 8), torch.randn(1, heads, 11, 8), torch.randn(1, heads, 11, 8)
    found = by_mask(query, key, value, borders := torch.tensor([0, 5, 6, 11], dtype=torch.int32), 0.3, window=window)
    if window is None:
        expected = slowly(*(x[0].transpose(0, 1) for x in (query, key, value)), borders, True, 0.3)
    else:  # the last of three: its document begins at 6, and it sees 8, 9 and 10
        k, v = (x[0].repeat_interleave(4 // heads, 0)[:, 8:11] for x in (key, value))
        expected = ((query[0, :, 10:] @ k.transpose(1, 2) * 0.3).softmax(-1) @ v).transpose(0, 1)
        found = found[:, 10:]
    assert torch.allclose(found[0], expected, atol=1e-6)


def test_what_the_kernel_cannot_do_once_it_was_taken_is_done_with_a_mask(card, monkeypatch):
    """Evaluation outside of autocast, say: fp32 where the trial was in bf16."""
    import torch

    from maese.evaluate.likelihood import loss_sum
    from maese.model import attention

    card(of_torch_2_13)
    model, some = make("llama", "sdpa"), documents()
    expected = float(sum(alone(model, example) for example in some).detach())
    assert attention.unpadded(model, 40)
    monkeypatch.setattr(attention, "DTYPES", (torch.float16,))
    assert float(loss_sum(model, collate_flat(some, pad=1)).detach()) == pytest.approx(expected, rel=1e-5)


def test_nothing_of_it_is_saved_with_the_model(card, tmp_path):
    from maese.model import attention

    card(of_torch_2_13)
    model = make("llama", "sdpa")
    assert attention.unpadded(model, 40)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text("utf-8")
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "llama"
