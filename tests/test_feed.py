"""What a card is spared: batches made ahead of time, one moment of waiting a step, blocks that are compiled."""

from __future__ import annotations

import threading

import pytest

from maese import recipe as recipes
from maese.train.feed import Feed, before_learnt


def feed_of(ahead: bool, made: list):
    import torch

    def make(chosen):
        made.append((chosen, threading.current_thread().name))
        if chosen == ["broken"]:
            raise ValueError("a row that cannot be read")
        return {"input_ids": torch.tensor([chosen]), "max_length_q": 8}

    return Feed(make, torch.device("cpu"), ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_come_in_order_whatever_was_foreseen(ahead):
    made: list = []
    feed = feed_of(ahead, made)
    found = [batch["input_ids"].tolist()[0] for batch in feed.batches([[1, 2], [3], [4, 5]])]
    feed.expect([6])
    found += [batch["input_ids"].tolist()[0] for batch in feed.batches([[7], [8]])]  # it was not 6 that came
    feed.expect([9])
    found += [batch["input_ids"].tolist()[0] for batch in feed.batches([[9]])]
    feed.expect([10])
    feed.close()
    assert found == [[1, 2], [3], [4, 5], [7], [8], [9]]
    assert [chosen for chosen, _ in made].count([9]) == 1
    assert any(name.startswith("maese-feed") for _, name in made) == ahead


def test_while_one_batch_is_used_the_next_is_made():
    made: list = []
    feed = feed_of(True, made)
    coming = feed.batches([[1], [2], [3]])
    next(coming)
    feed._coming[1].result(timeout=10)
    assert [chosen for chosen, _ in made] == [[1], [2]]
    feed.close()


def test_what_fails_on_the_other_thread_is_raised_where_it_is_asked_for():
    feed = feed_of(True, [])
    coming = feed.batches([[1], ["broken"]])
    next(coming)
    with pytest.raises(ValueError, match="cannot be read"):
        next(coming)
    feed.close()


def test_places_are_those_before_what_is_learnt():
    import torch

    assert before_learnt(torch.tensor([[-100, 5, -100], [-100, -100, 6]])).tolist() == [0, 4]


def losses(run) -> list[float]:
    return [event["loss"] for event in run.history() if event["type"] == "step"]


@pytest.fixture
def opened(monkeypatch):
    """`opened(change)`: every session is changed so when it opens."""
    from maese.train import loop

    real = loop.open_session

    def put(change):
        def changed(*given):
            session = real(*given)
            change(session)
            return session

        monkeypatch.setattr(loop, "open_session", changed)

    return put


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_without_padding_is_the_run_with_it(recipe, tiny_llama, opened, monkeypatch, packing):
    """On a processor, with a kernel that stands in for the card's, and batches made ahead."""
    import torch
    from test_attention import of_torch_2_13
    from torch.nn.attention import varlen

    from maese.model import attention
    from maese.train import feed as feeds
    from maese.train.loop import train

    changes = (f"base={tiny_llama}", f"data.packing={packing}", "data.max_length=48")
    monkeypatch.setattr(attention, "kernel", lambda _device: None)
    usual = train(recipe("output=usual", *changes))
    assert next(e for e in usual.history() if e["type"] == "plan")["unpadded"] is False
    monkeypatch.setattr(attention, "kernel", lambda _device: attention.on_card())
    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_13)
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    shapes = []

    def change(session):
        session.unpadded = attention.unpadded(session.model, 48)
        make = lambda chosen: feeds.gather(session, chosen)  # noqa: E731
        session.feed = Feed(make, session.accelerator.device, ahead=True)
        session.model.register_forward_pre_hook(
            lambda _m, _a, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
        )
        assert session.unpadded

    opened(change)
    flat = train(recipe("output=flat", *changes))
    assert losses(flat) == pytest.approx(losses(usual), rel=1e-5)
    assert any(rows == 1 and wide > 48 for rows, wide in shapes)


def test_no_pass_asks_the_card_for_a_number(recipe, tiny_llama, opened, monkeypatch):
    """Each look at one would wait for all that was asked before; a step has one look, at its loss and its norm."""
    import torch
    from torch.nn.attention import varlen
    from torch.utils._python_dispatch import TorchDispatchMode

    from maese.model import attention
    from maese.train import feed as feeds
    from maese.train import loop
    from maese.train import step as steps

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=0, enable_gqa=False):
        return attention.by_mask(*(x.transpose(0, 1)[None] for x in (query, key, value)), cu_seq_q, scale)[0]

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "kernel", lambda _device: attention.on_card())
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))

    def change(session):
        def make(chosen):
            batch = feeds.gather(session, chosen)
            return batch | {"kept": before_learnt(batch["labels"])}

        session.unpadded = attention.unpadded(session.model, 32)
        session.feed = Feed(make, session.accelerator.device, ahead=True)
        assert session.unpadded

    waits: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.overloadpacket.__name__
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
            if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave"):
                waits.append(name)
            return op(*args, **kwargs or {})

    passes, read = steps._passes, steps._read

    def watched(session, *rest, **named):
        if session.state.step == 0:  # the first time, the head of the model is tried
            return passes(session, *rest, **named)
        with Watch():
            return passes(session, *rest, **named)

    def looked(*given):
        with Watch():
            return read(*given)

    opened(change)
    monkeypatch.setattr(steps, "_passes", watched)
    loop.train(recipe("output=once", f"base={tiny_llama}", "train.max_steps=3"))
    assert waits == []
    monkeypatch.setattr(steps, "_passes", passes)
    monkeypatch.setattr(steps, "_read", looked)
    loop.train(recipe("output=again", f"base={tiny_llama}", "train.max_steps=3"))
    assert set(waits) <= {"_local_scalar_dense"} and len(waits) <= 3 * 2  # two numbers of one tensor, once a step


# Compiled blocks


def test_auto_compiles_long_runs_on_a_card_and_never_a_processor():
    from maese.train.compiling import PAYS, pays

    train = recipes.Train()
    assert train.compile == "auto"
    assert pays(train, "cuda", PAYS) and not pays(train, "cuda", PAYS - 1) and not pays(train, "cpu", 10**6)
    always, never = (recipes.Train(compile=value) for value in (True, False))
    assert pays(always, "cpu", 1) and not pays(never, "cuda", 10**6)


@pytest.mark.parametrize("value", ["yes please", "1"])
def test_compile_takes_three_values(recipe, value):
    from maese.errors import MaeseError

    with pytest.raises(MaeseError) as problem:
        recipe(f"train.compile={value}")
    assert problem.value.code == "USE-03"


def speed(run) -> list:
    return [event for event in run.history() if event.get("code") == "SPEED-01"]


def plain_compiler(monkeypatch, fails: bool = False):
    """A compiler that takes no minute: dynamo traces as always, and what it traced is run as it is, or refused."""
    import torch

    from maese.model import attention

    # A processor's attention is no part of what is compiled.
    monkeypatch.setattr(attention, "kernel", lambda _device: None)
    real, seen = torch.compile, []

    def backend(graph, _inputs):
        seen.append(graph)
        if fails:
            raise RuntimeError("no C++ compiler in this room")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **named: real(function, backend=backend, **named))
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize(
    "changes",
    [(), ("method.kind=lora", "method.rank=2"), ("train.gradient_checkpointing=true",), ("data.packing=true",)],
)
def test_a_compiled_run_is_the_plain_run(recipe, tiny_llama, monkeypatch, changes):
    from maese.train.loop import train

    plain = train(recipe("output=plain", f"base={tiny_llama}", *changes))
    seen = plain_compiler(monkeypatch)
    fused = train(recipe("output=fused", f"base={tiny_llama}", "train.compile=true", *changes))
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4) and seen
    assert next(e for e in fused.history() if e["type"] == "plan")["compiled"] is True
    assert not speed(fused)
    from safetensors import safe_open

    name = "adapter_model" if changes[:1] == ("method.kind=lora",) else "model"
    with (
        safe_open(plain.final / f"{name}.safetensors", "pt") as a,
        safe_open(fused.final / f"{name}.safetensors", "pt") as b,
    ):
        assert a.keys() == b.keys()


def test_compiled_blocks_take_documents_without_padding(recipe, tiny_llama, opened, monkeypatch):
    import torch
    from torch.nn.attention import varlen

    from maese.model import attention
    from maese.train.loop import train

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=0, enable_gqa=False):
        return attention.by_mask(*(x.transpose(0, 1)[None] for x in (query, key, value)), cu_seq_q, scale)[0]

    usual = train(recipe("output=usual", f"base={tiny_llama}"))
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    opened(lambda session: setattr(session, "unpadded", attention.unpadded(session.model, 32)))
    seen = plain_compiler(monkeypatch)
    monkeypatch.setattr(attention, "kernel", lambda _device: attention.on_card())
    flat = train(recipe("output=flat", f"base={tiny_llama}", "train.compile=true"))
    assert losses(flat) == pytest.approx(losses(usual), rel=1e-4) and 1 <= len(seen) <= 3
    assert next(e for e in flat.history() if e["type"] == "plan")["unpadded"] is True and not speed(flat)


def test_one_compilation_serves_all_blocks_and_all_lengths(recipe, tiny_llama, monkeypatch):
    from maese.train.loop import train

    seen = plain_compiler(monkeypatch)
    train(recipe("output=fused", f"base={tiny_llama}", "train.compile=true", "train.max_steps=4"))
    assert 1 <= len(seen) <= 3


def test_without_a_compiler_it_goes_on_plain_and_says_so_once(recipe, tiny, monkeypatch):
    from maese.live import spoken
    from maese.model import attention
    from maese.train.loop import train

    monkeypatch.setattr(attention, "kernel", lambda _device: None)  # dropout draws for places, padding among them
    plain = train(recipe("output=plain"))
    plain_compiler(monkeypatch, fails=True)
    fused = train(recipe("output=fused", "train.compile=true"))
    assert len(speed(fused)) == 1 and "compilar" in spoken(speed(fused)[0])
    assert losses(fused) == losses(plain)  # dropout and all


@pytest.mark.parametrize("compiled", [False, True])
def test_the_softmax_of_the_head_is_compiled_with_the_blocks(recipe, monkeypatch, compiled):
    from maese.train import loop, step

    real, asked = step.loss_sum, []
    monkeypatch.setattr(step, "loss_sum", lambda *a, compiled: asked.append(compiled) or real(*a, compiled=compiled))
    plain_compiler(monkeypatch)
    loop.train(recipe(f"train.compile={str(compiled).lower()}", "train.max_steps=1"))
    assert {*asked} == {compiled}


def test_errors_that_are_not_the_compilers_are_not_hidden(recipe, monkeypatch):
    from maese.train import loop, step

    def broken(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(step, "_passes", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        loop.train(recipe("train.compile=true"))


@pytest.mark.slow
def test_the_real_compiler_gives_the_losses_of_the_plain_run(recipe, tiny_llama):
    """Where there is no C++ compiler, this is the road back to plain blocks."""
    from maese.train.loop import train

    plain = train(recipe("output=plain", f"base={tiny_llama}"))
    fused = train(recipe("output=fused", f"base={tiny_llama}", "train.compile=true"))
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)


# The card's memory


@pytest.mark.parametrize("theirs", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
def test_memory_grows_in_one_piece_unless_the_user_chose(monkeypatch, theirs):
    import os

    from maese.plan.machine import allocator

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    allocator()
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    found = {name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ}
    assert found == (theirs or ours)
