"""Packing: rows hardly have holes, every example is in one of them, and the model sees each as if it were alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maese.errors import MaeseError
from maese.tokens import batches
from maese.tokens.batches import IGNORED, collate_packed, packed_batches, steps_per_epoch
from maese.tokens.pack import best_fit, filled, packed_rows
from maese.tokens.template import Example

LENGTHS = st.lists(st.integers(1, 40), max_size=80)


@given(LENGTHS, st.integers(40, 64), st.integers(0, 9), st.integers(0, 3))
def test_every_example_is_in_one_row_and_none_overflows(lengths, capacity, seed, epoch):
    bins = best_fit(lengths, capacity, seed, epoch)
    assert sorted(row for chosen in bins for row in chosen) == list(range(len(lengths)))
    assert all(chosen and sum(lengths[row] for row in chosen) <= capacity for chosen in bins)
    assert best_fit(np.array(lengths, dtype=np.int32), capacity, seed, epoch) == bins


@given(LENGTHS, st.integers(40, 64), st.integers(0, 9), st.integers(1, 9))
def test_epochs_have_the_same_number_of_rows_and_of_the_same_lengths(lengths, capacity, seed, epoch):
    """So the steps of a run are known before it, and a step has its place without the epochs before it."""

    def shape(bins):
        return sorted(sorted(lengths[row] for row in chosen) for chosen in bins)

    bins = best_fit(lengths, capacity, seed, epoch)
    assert len(bins) == packed_rows(lengths, capacity) and shape(bins) == shape(best_fit(lengths, capacity, 0, 0))


@given(LENGTHS, st.integers(40, 64))
def test_it_is_best_fit_decreasing(lengths, capacity):
    """The definition, by looking at every row: the longest first, each where it leaves least room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    bins = best_fit(lengths, capacity, 1, 1)
    assert sorted(capacity - sum(lengths[row] for row in chosen) for chosen in bins) == sorted(rooms)


def test_examples_and_rows_trade_places_from_epoch_to_epoch():
    lengths = [5, 5, 5, 3, 3, 3] * 10
    orders = [best_fit(lengths, 8, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len({str(bins) for bins in orders}) == 3
    assert len({str(sorted(map(sorted, bins))) for bins in orders}) == 3


@pytest.mark.parametrize("lengths", [[9], [3, 0], [-1]])
def test_what_cannot_be_packed_is_an_error(lengths):
    with pytest.raises(ValueError, match="do not fit"):
        best_fit(lengths, 8, 0, 0)


def test_nothing_makes_no_rows():
    assert best_fit([], 8, 0, 0) == [] and filled([], [], 8) == 0


def test_filled_is_the_share_of_places_with_a_token():
    assert filled([[0, 1], [2], [3, 4]], [5, 3, 8, 2, 3], 8) == 21 / 24


def test_rows_are_full_and_soon_made():
    """Lengths like those of short instructions, with a long tail; the time is ten times what it should be."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.7, 45_000).astype(int), 5, 512)
    began = time.monotonic()
    bins = best_fit(lengths, 512, 42, 0)
    assert time.monotonic() - began < 2
    assert filled(bins, lengths, 512) > 0.97


@settings(max_examples=30)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 3), st.integers(1, 3))
def test_every_example_once_an_epoch_and_the_same_from_any_step(lengths, micro_batch, accumulation):
    each = steps_per_epoch(packed_rows(lengths, 16), micro_batch, accumulation)
    whole = list(packed_batches(lengths, 16, micro_batch, accumulation, 42, 0, 3 * each))
    for epoch in range(3):
        steps = whole[epoch * each : (epoch + 1) * each]
        assert sorted(i for step in steps for m in step for row in m for i in row) == list(range(len(lengths)))
    assert all(len(step) <= accumulation and len(m) <= micro_batch for step in whole for m in step)
    for start in range(3 * each):
        assert list(packed_batches(lengths, 16, micro_batch, accumulation, 42, start, 3 * each)) == whole[start:]


def test_going_on_late_packs_no_epoch_that_is_over(monkeypatch):
    lengths, packed = [5, 3, 8, 2, 3], []

    def counted(*given):
        packed.append(given[-1])
        return best_fit(*given)

    monkeypatch.setattr(batches, "best_fit", counted)
    assert len(list(packed_batches(lengths, 8, 1, 1, 42, 3 * 1000 + 1, 3 * 1001 + 1))) == 3
    assert packed == [0, 1000, 1001]  # the first one only to know how many rows there are


def rows_of(seed: int = 0) -> list[list[Example]]:
    """Two packed rows: five documents of unequal length, whose beginnings are not learnt, and one of a single token."""
    generator = np.random.default_rng(seed)
    documents = []
    for length, context in ((9, 1), (14, 5), (7, 3), (20, 1), (1, 1), (11, 10)):
        ids = generator.integers(3, 64, length).tolist()
        documents.append(Example(ids, [0] * context + [1] * (length - context), str(length)))
    return [documents[:3], documents[3:]]


def test_a_packed_batch_by_hand():
    rows = [[Example([5, 6, 7], [0, 0, 1]), Example([8, 9], [1, 1])], [Example([4], [0])]]
    batch = {name: tensor.tolist() for name, tensor in collate_packed(rows, pad=1, width=8).items()}
    no = IGNORED
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]],
        # The first token of the second example is marked as learnt and is not: before it is another document.
        "labels": [[no, no, 7, no, 9, no, no, no], [no] * 8],
    }


def test_a_row_that_holds_too_much_is_an_error():
    with pytest.raises(ValueError, match="32 tokens in rows of 24"):
        collate_packed(rows_of(), 1, 24)


def make(kind: str, attention: str):
    """A model with weights large enough for attention to matter; with the usual ones all texts look alike."""
    import torch
    import transformers as hf

    common = {"vocab_size": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    size = common | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    grouped = size | {"num_key_value_heads": 1, "head_dim": 16}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {
        "gpt2": lambda: hf.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **drops, **common),
        "phi": lambda: hf.PhiConfig(**size),
        "llama": lambda: hf.LlamaConfig(**grouped),
        "qwen3": lambda: hf.Qwen3Config(**grouped),
        "mistral": lambda: hf.MistralConfig(sliding_window=4, **grouped),  # the mask has a second reason to be
        "opt": lambda: hf.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, init_std=0.3,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


KINDS = pytest.mark.parametrize("kind", ["gpt2", "phi", "llama", "qwen3", "mistral"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def alone(model, example: Example):
    """The loss of one document from the plain forward of the library: no padding, no labels, none of our code."""
    import torch

    logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    learnt = [i for i in range(1, len(example)) if example.mask[i]]
    return -sum((logits[i - 1, example.ids[i]] for i in learnt), start=torch.zeros(()))


def gradients(model, loss):
    import torch

    model.zero_grad()
    loss.backward()
    return {name: torch.clone(p.grad) for name, p in model.named_parameters()}


@KINDS
@ATTENTION
def test_packed_is_unpacked_in_loss_and_in_gradient(kind, attention):
    from maese.evaluate.likelihood import loss_sum

    model, rows = make(kind, attention), rows_of()
    batch = collate_packed(rows, pad=1, width=40)
    whole = loss_sum(model, batch)
    expected = sum(alone(model, example) for row in rows for example in row)
    assert float(whole.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    packed, apart = gradients(model, whole), gradients(model, expected)
    size = max(float(g.norm()) for g in apart.values())
    for name in apart:
        # Some gradients are zero but for rounding (a bias of the keys): they are measured against the others.
        assert float((packed[name] - apart[name]).norm()) <= 1e-5 * max(float(apart[name].norm()), 1e-2 * size), name


@KINDS
@ATTENTION
def test_each_document_has_its_own_loss(kind, attention):
    import torch

    from maese.evaluate.likelihood import loss_sum

    model, rows = make(kind, attention), rows_of()
    batch = collate_packed(rows, pad=1, width=40)
    for i, row in enumerate(rows):
        at = 0
        for example in row:
            labels = torch.full_like(batch["labels"], IGNORED)
            labels[i, at : at + len(example)] = batch["labels"][i, at : at + len(example)]
            found = float(loss_sum(model, batch | {"labels": labels}).detach())
            assert found == pytest.approx(float(alone(model, example).detach()), rel=1e-5)
            at += len(example)


@KINDS
@ATTENTION
def test_no_document_notices_another(kind, attention):
    import torch

    model, rows = make(kind, attention), rows_of()

    def logits(rows):
        batch = collate_packed(rows, pad=1, width=40)
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    with torch.no_grad():
        before = logits(rows)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            changed = [list(row) for row in rows]
            changed[i][j] = Example([(t + 7) % 64 for t in rows[i][j].ids], rows[i][j].mask)
            start = sum(map(len, rows[i][:j]))
            inside = torch.zeros(before.shape[:2], dtype=torch.bool)
            inside[i, start : start + len(rows[i][j])] = True
            differs = (logits(changed) - before).abs().amax(-1) > 1e-5
            assert not (differs & ~inside).any() and differs[inside].all()


@KINDS
@ATTENTION
def test_padding_changes_nothing(kind, attention):
    import torch

    model, rows = make(kind, attention), rows_of()
    batch = collate_packed(rows, pad=1, width=40)
    with torch.no_grad():
        for pad in (1, 9):
            other = collate_packed(rows, pad=pad, width=40)
            for i, row in enumerate(rows):
                n = sum(map(len, row))
                one = {name: batch[name][i : i + 1, :n] for name in ("input_ids", "position_ids")}
                padded = model(input_ids=other["input_ids"], position_ids=other["position_ids"], use_cache=False).logits
                assert torch.allclose(padded[i, :n], model(**one, use_cache=False).logits[0], rtol=1e-5, atol=1e-4)
    assert (batch["labels"] == 1).sum() == 0


@KINDS
@ATTENTION
@pytest.mark.parametrize("wrong", ["no positions", "positions that do not begin again", "a mask of ones"])
def test_the_wrong_way_is_seen(kind, attention, wrong):
    """Without the borders the figures differ by far more than the tolerance of the tests above."""
    import torch

    from maese.evaluate.likelihood import loss_sum

    model, rows = make(kind, attention), rows_of()
    batch = collate_packed(rows, pad=1, width=40)
    expected = float(sum(alone(model, example) for row in rows for example in row).detach())
    if wrong == "no positions":
        del batch["position_ids"]
    elif wrong == "positions that do not begin again":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])  # why `collate_packed` gives none
    assert abs(float(loss_sum(model, batch).detach()) / expected - 1) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_is_unpacked_with_adapters_and_recomputed_activations(kind):
    from maese.evaluate.likelihood import loss_sum
    from maese.model.adapter import add_lora
    from maese.recipe import Method

    rows = rows_of()
    expected = float(sum(alone(make(kind, "sdpa"), example) for row in rows for example in row).detach())
    model = add_lora(make(kind, "sdpa"), Method(kind="lora", rank=2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    loss = loss_sum(model.train(), collate_packed(rows, pad=1, width=40))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@KINDS
@ATTENTION
def test_families_that_keep_documents_apart_are_let_in(kind, attention):
    from maese.evaluate.likelihood import refuse_blended

    model = make(kind, attention).train()
    refuse_blended(model, kind)
    assert model.training


def test_a_family_that_blends_documents_is_refused():
    from maese.evaluate.likelihood import loss_sum, refuse_blended

    model, rows = make("opt", "sdpa"), rows_of()
    with pytest.raises(MaeseError) as problem:
        refuse_blended(model, "modelo")
    assert problem.value.code == "BATCH-03" and problem.value.facts["family"] == "opt"
    assert "data.packing=false" in str(problem.value)
    # And it would have been wrong:
    expected = float(sum(alone(model, example) for row in rows for example in row).detach())
    assert abs(float(loss_sum(model, collate_packed(rows, 1, 40)).detach()) / expected - 1) > 1e-3
