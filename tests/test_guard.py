"""What a step must pass before it moves the weights: numbers that make sense, and memory that is there."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest

from maese.errors import MaeseError
from maese.train import guard
from maese.train.guard import Halving, Spikes, fitting, longest_rows, rehearse, rng_state, set_rng_state


def settled(n: int = 128, loss: float = 3.0, norm: float = 1.0) -> Spikes:
    """A judge that has seen n ordinary steps: losses one tenth above or below, in turn."""
    spikes = Spikes()
    for i in range(n):
        assert spikes.judge(loss + (0.1 if i % 2 else -0.1), norm) == "ok"
    return spikes


def test_a_spike_is_more_than_six_sigmas_over_the_mean_of_the_last_128():
    sigma = math.sqrt(128 * 0.1**2 / 127)
    assert settled().judge(3.0 + 5.99 * sigma, 1.0) == "ok"
    assert settled().judge(3.0 + 6.01 * sigma, 1.0) == "skip"
    assert settled().judge(0.1, 1.0) == "ok"  # a fall is none
    assert settled().judge(3.0, 1.07) == "skip"  # nor need the loss see what the gradient does


def test_the_first_32_steps_are_not_judged():
    spikes = Spikes()
    assert [spikes.judge(10.0**i, 10.0**i) for i in range(32)] == ["ok"] * 32
    assert spikes.judge(1e40, 1.0) == "skip"


def test_a_spike_leaves_no_trace_in_what_is_ordinary():
    spikes = settled()
    before = (spikes.losses, spikes.norms)
    assert spikes.judge(9.0, 1.0) == "skip"
    assert (spikes.losses, spikes.norms) == before and spikes.refused == 1


def test_only_the_last_128_count():
    spikes = settled(loss=30.0)
    for i in range(128):
        spikes.judge(3.0 + (0.1 if i % 2 else -0.1), 1.0)
    assert len(spikes.losses) == 128 and max(spikes.losses) < 4
    assert spikes.judge(30.0, 1.0) == "skip"


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_no_number_is_skipped_twice_and_the_third_in_a_row_ends_it(recipe, loss, norm):
    spikes = Spikes()
    assert [spikes.judge(loss, norm), spikes.judge(loss, norm)] == ["skip", "skip"]
    assert spikes.judge(3.0, 1.0) == "ok"
    assert [spikes.judge(loss, norm) for _ in range(3)] == ["skip", "skip", "stop"]
    problem = spikes.stopped(7, recipe(), "runs/mia")
    assert problem.code == "NUM-01" and "train.lr=2e-04" in str(problem)


def test_in_fp16_an_infinite_norm_is_the_scalers_business():
    spikes = settled()
    assert [spikes.judge(3.0, math.inf, scaled=True) for _ in range(9)] == ["ok"] * 9
    assert all(map(math.isfinite, spikes.norms)) and spikes.refused == 0
    assert spikes.judge(math.nan, math.inf, scaled=True) == "skip"


def test_eight_spikes_in_128_steps_end_it_and_as_many_further_apart_do_not(recipe):
    near, far = settled(), settled()
    assert [near.judge(9.0, 1.0) for _ in range(8)] == ["skip"] * 7 + ["stop"]
    problem = near.stopped(136, recipe(), "runs/mia")
    assert problem.code == "NUM-03" and "8 de los últimos 128" in str(problem) and "train.lr=2e-04" in str(problem)
    for _ in range(20):
        assert far.judge(9.0, 1.0) == "skip"
        for i in range(18):
            far.judge(3.0 + (0.1 if i % 2 else -0.1), 1.0)


def test_ordinary_noise_raises_no_alarm_and_losses_all_alike_may_differ_in_a_hundredth():
    draw = random.Random(0)
    spikes = Spikes()
    assert all(spikes.judge(draw.gauss(3, 0.3), draw.gauss(1, 0.1)) == "ok" for _ in range(5000))
    still = Spikes()
    assert all(still.judge(2.0 + 0.01 * (i == 90), 1.0) == "ok" for i in range(200))


def test_a_judge_that_comes_back_from_json_judges_the_same():
    draw = random.Random(1)
    steps = [(math.nan if draw.random() < 0.02 else draw.lognormvariate(1, 0.7), draw.random()) for _ in range(400)]
    straight, cut = Spikes(), Spikes()
    for loss, norm in steps:
        cut = Spikes(**json.loads(json.dumps(asdict(cut), allow_nan=False)))
        assert straight.judge(loss, norm) == cut.judge(loss, norm)
    assert straight == cut and straight.refused > 3


@pytest.mark.parametrize("loss, code", [(9.0, "NUM-04"), (math.nan, "NUM-05")])
def test_a_step_not_applied_is_said_in_words_and_in_json(loss, code):
    from maese.live import spoken

    told = []
    guard.tell_skipped(lambda kind, **facts: told.append({"type": kind} | facts), 12, loss, 4.5)
    event = json.loads(json.dumps(told[0], allow_nan=False))
    assert (event["type"], event["code"], event["step"]) == ("warning", code, 12)
    assert "paso 12 descartado" in spoken(event)


def test_a_discarded_fp16_step_leaves_weights_alone_and_the_next_one_possible():
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    accelerator = type("Accelerator", (), {"scaler": torch.amp.GradScaler("cpu")})
    scaler = accelerator.scaler
    scaler.scale((weight * math.nan).sum()).backward()
    scaler.unscale_(optimizer)
    guard.discard(accelerator, optimizer)
    assert weight.tolist() == [1.0, 1.0] and weight.grad is None
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert weight.tolist() == pytest.approx([0.9, 0.9])


# Memory


def memory_for(rows: int, problem: BaseException | None = None):
    """Something to do that fails for more rows at once than that."""

    def do(parts):
        if max(map(len, parts)) > rows:
            raise problem or RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return parts

    return do


def quiet(*_, **__):
    pass


def test_a_step_in_halves_is_the_whole_step(tiny_llama):
    """Rows of unequal length: the same loss and gradient, 1e-6, however many go at once."""
    import torch

    from maese.evaluate.likelihood import loss_sum
    from maese.model import load
    from maese.tokens.batches import collate
    from maese.tokens.template import Example

    model = load.load_model(tiny_llama).train()
    examples = [Example([5 + i + j for j in range(4 + 3 * i)], [1] * (4 + 3 * i), str(i)) for i in range(7)]

    def step(fits: int):
        halving = Halving("cpu")

        def do(parts):
            total = 0.0
            for rows in parts:
                if len(rows) > fits:
                    raise MemoryError
                loss = loss_sum(model, collate([examples[i] for i in rows], 1)) / 100
                loss.backward()
                total += loss.item()
            return total

        model.zero_grad()
        loss = fitting(halving, [[0, 1, 2, 3], [4, 5, 6]], do, model.zero_grad, quiet, 1)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()]), halving.times

    whole, gradient, _ = step(4)
    for fits, times in ((2, 1), (1, 2)):
        loss, other, halved = step(fits)
        assert halved == times
        assert loss == pytest.approx(whole, abs=1e-6)
        assert (gradient - other).abs().max() < 1e-6


def test_what_was_done_before_it_failed_is_undone_and_the_same_numbers_are_drawn_again():
    import numpy as np
    import torch

    done, undone = [], []

    def do(parts):
        drawn = (torch.rand(1).item(), np.random.rand(), random.random(), random.gauss(0, 1))
        done.append(drawn)
        memory_for(2)(parts)
        return drawn

    halving, told = Halving("cpu"), []
    tell = lambda kind, **facts: told.append((kind, facts))  # noqa: E731
    result = fitting(halving, [[1, 2, 3, 4, 5, 6], [7]], do, lambda: undone.append(1), tell, 9)
    assert len(done) == 3 and len(undone) == 2 and done == [result] * 3
    assert [facts["facts"] for _, facts in told] == [{"before": 6, "now": 3}, {"before": 3, "now": 2}]
    assert all((kind, facts["code"], facts["step"]) == ("warning", "MEM-03", 9) for kind, facts in told)
    # From now on it begins with what fits, and says no more.
    assert fitting(halving, [[1, 2, 3], [4]], memory_for(2), quiet, None, 10) == [[1], [2], [3], [4]]


@pytest.mark.parametrize("rows", range(1, 10))
def test_halves_keep_every_row_once_and_in_order(rows):
    for times in range(6):
        parts = Halving("cpu", times=times).split([[*range(rows)], [*range(rows, rows + 3)]])
        assert [row for part in parts for row in part] == [*range(rows + 3)]
        assert max(map(len, parts)) == max(math.ceil(n / 2**times) for n in (rows, 3))


def test_memory_that_ran_out_is_known_whoever_says_it():
    import torch

    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 55)  # more than any machine has: what torch itself says on a CPU
    problems = [
        real.value, torch.OutOfMemoryError("HIP out of memory"), MemoryError(), guard.OverCeiling(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ]  # fmt: skip
    for problem in problems:
        assert guard.out_of_memory(problem), problem
        assert fitting(Halving("cpu"), [[1, 2]], memory_for(1, problem), quiet, quiet, 1) == [[1], [2]]


def test_any_other_fault_goes_up_at_once():
    with pytest.raises(RuntimeError, match="shapes"):
        fitting(Halving("cpu"), [[1, 2]], memory_for(1, RuntimeError("shapes do not match")), quiet, quiet, 1)


def test_a_ceiling_on_real_memory_halves_until_it_fits():
    import torch

    from maese.plan.machine import memory_used_gib

    guard.give_back()
    row = 40 << 20
    halving = Halving("cpu", limit_gib=memory_used_gib("cpu") + 2.7 * row / 2**30)

    def do(parts):
        for rows in parts:
            held = torch.ones(len(rows) * row, dtype=torch.uint8)
            halving.check()
            del held
        return parts

    parts = fitting(halving, [[1, 2, 3, 4, 5, 6, 7, 8]], do, quiet, quiet, 1)
    assert max(map(len, parts)) == 2


def parts_of(chosen, device: str, used: float, world: int = 1) -> MaeseError:
    import torch

    model = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB
    optimizer = torch.optim.AdamW(model.parameters())
    return guard.no_room(model, optimizer, chosen, "runs/mi prueba", device, used, world)


@pytest.mark.parametrize("device, code", [("cuda", "MEM-01"), ("cpu", "MEM-02")])
def test_at_one_row_it_says_what_weighs_what_and_three_ways_out(recipe, device, code):
    chosen = recipe()
    halving = Halving(device if device == "cpu" else "cpu", refuse=lambda used: parts_of(chosen, device, 1.0))
    with pytest.raises(MaeseError) as problem:
        fitting(halving, [[1, 2, 3]], memory_for(0), quiet, quiet, 1)
    facts = problem.value.facts
    assert problem.value.code == code and halving.times == 2
    mib = 2**10
    assert (facts["weights"] * mib, facts["gradients"] * mib, facts["optimizer"] * mib) == (4, 4, 8)
    assert facts["rest"] * mib == pytest.approx(1020)
    typed = [line.split("   # ")[0] for line in facts["repairs"].splitlines()]
    assert len(typed) == 3
    for line in typed:
        words = shlex.split(line)
        assert words[:3] == ["maese", "train", "runs/mi prueba/recipe.yaml"]
        assert recipe(*words[3:]) != chosen


def test_under_a_ceiling_the_first_way_out_is_a_higher_one(recipe):
    first = parts_of(recipe("train.memory_gib=0.3"), "cpu", 0.55).facts["repairs"].splitlines()[0]
    assert shlex.split(first)[4] == "train.memory_gib=0.7"


def test_what_is_done_already_is_not_proposed(recipe):
    chosen = recipe("method.kind=lora", "train.gradient_checkpointing=true", "data.max_length=64")
    repairs = parts_of(chosen, "cpu", 1.0).facts["repairs"].splitlines()
    assert [shlex.split(line)[4] for line in repairs] == ["data.max_length=32", "method.kind=qlora"]


def test_with_several_processes_a_step_is_not_redone(recipe):
    """The others wait in the exchange: the one that has no room says so and ends."""
    chosen = recipe("train.micro_batch=3", "train.accumulation=2")
    halving = Halving("cpu", alone=False, refuse=lambda used: parts_of(chosen, "cuda", used, world=2))
    with pytest.raises(MaeseError, match="MEM-04") as problem:
        fitting(halving, [[1, 2, 3]], memory_for(2), quiet, quiet, 1)
    assert halving.times == 0
    first = problem.value.facts["repairs"].splitlines()[0].split("   # ")[0]
    smaller = recipe(*shlex.split(first)[3:]).train
    assert (smaller.micro_batch, smaller.accumulation) == (1, 6)  # the batch stays


def test_the_heaviest_micro_batch_is_that_of_the_longest_rows():
    import numpy as np

    lengths = [3, 9, 5, 7, 9]
    assert longest_rows(lengths, 3) == longest_rows(np.array(lengths), 3) == [1, 4, 3]
    assert longest_rows([4], 8) == [0]


def test_a_rehearsal_leaves_nothing_but_what_it_learnt():
    import torch

    weight = torch.nn.Parameter(torch.ones(3))
    halving, before = Halving("cpu"), rng_state()

    def do(parts):
        memory_for(1)(parts)
        (weight * torch.rand(3)).sum().backward()

    def undo():
        weight.grad = None

    rehearse(halving, [1, 2, 3, 4], do, undo, quiet)
    assert halving.times == 2 and weight.grad is None
    pairs = zip(rng_state().values(), before.values(), strict=True)
    assert all(torch.allclose(now, then, rtol=0, atol=0, equal_nan=True) for now, then in pairs)  # NaN: none waits


def test_random_states_come_back_through_a_file(tmp_path):
    """In the middle of a pair of normal numbers, when the second one is kept for later."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(1).item()

    for odd in (False, True):
        if odd:
            random.gauss(0, 1)
            np.random.randn()
        save_file(rng_state(), tmp_path / "rng.safetensors")
        drawn = [draw() for _ in range(3)]
        set_rng_state(load_file(tmp_path / "rng.safetensors"))
        assert [draw() for _ in range(3)] == drawn


def test_memory_is_given_back_near_the_estimate_and_seldom(monkeypatch):
    held, clock, given = [1.0], [100.0], []

    def give_back():
        given.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(guard, "memory_used_gib", lambda device: held[0])
    monkeypatch.setattr(guard, "give_back", give_back)
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    room = guard.Room(estimated_gib=2.0)
    for clock[0], held[0], device in ((100, 1.6, "cpu"), (101, 1.8, "cuda"), (102, 1.8, "cpu"), (126, 1.8, "cpu"),
                                      (128, 1.8, "cpu")):  # fmt: skip
        room.keep(device)
    assert given == [102, 128]
    guard.Room().keep("cpu")
    assert given == [102, 128]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_holes_between_what_is_kept_are_given_back():
    """Pieces of many lengths, of which one in ten stays: the rest is of nobody, and the system has it again."""
    code = """
import ctypes, random
from maese.plan.machine import allocator, memory_used_gib
from maese.train.guard import Room
allocator()
dice = random.Random(1)
pieces = [bytearray(dice.randrange(20_000, 200_000)) for _ in range(4000)]
kept = pieces[::10]
del pieces
before = memory_used_gib("cpu")
Room(estimated_gib=before).keep("cpu")
print(before - memory_used_gib("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux counts it")
def test_products_of_many_shapes_do_not_fill_the_memory():
    """oneDNN keeps a kernel for each shape it ever multiplied: a run of rows of many lengths grew with every step."""
    code = """
import sys, torch
from maese.plan.machine import few_kernels, memory_used_gib
if "few" in sys.argv:
    few_kernels()
weight = torch.ones(256, 256).bfloat16()
torch.ones(8, 256).bfloat16() @ weight
before = memory_used_gib("cpu")
for rows in range(9, 409):
    torch.ones(rows, 256).bfloat16() @ weight
print(memory_used_gib("cpu") - before)
"""
    env = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    words = [sys.executable, "-c", code]
    many, few = (
        float(subprocess.run([*words, *more], env=env, capture_output=True, text=True, check=True).stdout)
        for more in ([], ["few"])
    )
    if many < 0.1:
        pytest.skip("this processor makes no kernels for 16 bits")
    assert few < many / 3


def test_the_number_of_kernels_is_the_users_if_they_chose(monkeypatch):
    from maese.plan.machine import few_kernels

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    few_kernels()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "1")


def test_a_training_keeps_the_room_it_was_estimated(recipe, monkeypatch):
    from maese.train import loop

    seen = []
    monkeypatch.setattr(guard.Room, "keep", lambda self, device: seen.append((self.estimated_gib, device)))
    run = loop.train(recipe("train.max_steps=2"))
    told = next(e["estimated_gib"] for e in run.history() if e["type"] == "plan")
    assert seen == [(told, "cpu")] * 2
