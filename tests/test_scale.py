"""Many processes: two on this machine learn what one does, stop together, and go on as more or as fewer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maese.run import Run
from maese.train.checkpoint import saved
from maese.train.loop import resume, train

PAIR = Path(__file__).parent / "pair.py"
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COMMON = ["train.epochs=9", "eval.prompts=[]", "train.final=last"]


def steps(run: Run) -> list[dict]:
    return [event for event in run.history() if event["type"] == "step"]


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.history() if event["type"] in ("step", "validation")]


def same(one: Run, other: Run, within: float = 1e-4) -> bool:
    pairs = [*zip(losses(one), losses(other), strict=True)]
    norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(steps(one), steps(other), strict=True)]
    return all(abs(a - b) < within for a, b in pairs) and all(a == pytest.approx(b, rel=1e-3) for a, b in norms)


def weights(run: Run) -> dict:
    from safetensors.torch import load_file

    return load_file(next(iter(run.final.glob("*.safetensors"))))


def launch(words: list[str], env: dict | None = None, **more) -> subprocess.Popen:
    chosen = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TWO, *words], env=chosen, **pipes, **more)


def pair(orders: list[dict], env: dict | None = None) -> list[list[str | None]]:
    """What each of two processes ended each order with."""
    Path("orders.json").write_text(json.dumps(orders), "utf-8")
    process = launch([str(PAIR), "orders.json"], env)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    told = [json.loads(Path(f"orders.json.{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert all(each["chunked"] for each in told)
    return [each["ended"] for each in told]


def do(kind: str, *args: str, **what) -> dict:
    return {"do": kind, "args": list(args), **what}


@pytest.fixture
def plain(here, recipe):
    """`plain("train.lr=…")`: a recipe over a model without dropout, whose draws differ from process to process."""
    from conftest import make_model

    base = make_model(here / "plain")
    recipe()  # writes receta.yaml
    return lambda *changes: [f"base={base}", *COMMON, *changes]


def test_two_processes_learn_what_one_does_and_one_of_them_writes(recipe, plain, here):
    """The command itself under torchrun; six rows a step, and fewer in the last of an epoch."""
    changes = plain("train.micro_batch=2", "train.accumulation=3", "train.max_steps=15", "eval.prompts=[En un lugar]")
    alone = train(recipe("output=one", *changes))
    process = launch(["-m", "maese", "train", "receta.yaml", "output=two", *changes])
    said, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    two = Run("two")
    assert same(alone, two) and [e["type"] for e in alone.events()] == [e["type"] for e in two.events()]
    assert said.split() == ["two"] and talk.count(str(two.report / "index.html")) == 1
    assert len(list(here.glob("two*"))) == 1 and two.read("environment.json")["processes"] == 2
    after, before = weights(two), weights(alone)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-4


SHAPES = {
    "full": ["train.micro_batch=2", "train.accumulation=4"],
    "lora": ["method.kind=lora", "train.micro_batch=2", "train.accumulation=4"],
    "packed": ["data.packing=true", "train.micro_batch=1", "train.accumulation=3"],
    "packed-lora": ["data.packing=true", "method.kind=lora", "train.micro_batch=2", "train.accumulation=3"],
    "few": ["train.micro_batch=1", "train.accumulation=1"],  # fewer rows than processes: DIST-02
}


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_are_one_in_every_shape_and_go_on_as_each_other(recipe, plain, tiny, env):
    """Full or LoRA, packed or not, at the end of an epoch too; a run of one goes on as two, and of two as one."""
    orders, kept = [], ["train.max_steps=7", "train.save_every=3", "eval.every=3", "train.epochs=3"]
    for name, shape in SHAPES.items():
        changes = plain(*kept, *shape)
        train(recipe(f"output=one-{name}", *changes))
        orders.append(do("train", f"output=two-{name}", *changes))
    for name in ("full", "lora"):
        changes = plain(*kept, *SHAPES[name])
        cut(recipe(f"output=grows-{name}", *changes), 4)
        orders += [
            do("resume", f"grows-{name}"),
            do("train", f"output=shrinks-{name}", *changes, signal=signal.SIGTERM, rank=1, after=4),
            do("train", f"output=stays-{name}", *changes, signal=signal.SIGINT, rank=0, after=4),
            do("resume", f"stays-{name}"),
        ]
    drops = plain(*kept, *SHAPES["full"], f"base={tiny}")  # each process draws its own, again the same
    # Saved at step 3, after a validation: FSDP2 then still holds some weights whole, without their moments.
    orders.append(do("train", "output=drops", *drops))
    orders.append(do("train", "output=drops-cut", *drops, signal=signal.SIGTERM, rank=1, after=2))
    orders.append(do("resume", "drops-cut"))
    ends = [None] * len(SHAPES) + [None, "RUN-06", "RUN-06", None] * 2 + [None, "RUN-06", None]
    assert pair(orders, env) == [ends, ends]
    assert losses(Run("drops")) == losses(Run("drops-cut"))
    for name in ("full", "lora"):
        # Asked after the numbers of step 4 were shared, so all of them know it at step 5.
        assert [p.name for p in saved(Run(f"shrinks-{name}").checkpoints)] == ["checkpoint-3", "checkpoint-5"]
        resume(Run(f"shrinks-{name}"))
    for name in SHAPES:
        assert same(Run(f"one-{name}"), Run(f"two-{name}")), name
    for name in ("full", "lora"):
        one = weights(Run(f"one-{name}"))
        for other in (f"two-{name}", f"grows-{name}", f"shrinks-{name}", f"stays-{name}"):
            assert same(Run(f"one-{name}"), Run(other)), other
            found = weights(Run(other))
            assert found.keys() == one.keys(), other
            assert max(float((found[key] - one[key]).abs().max()) for key in one) < 1e-4, other
    config = [json.loads((Run(f"{who}-full").final / "config.json").read_text("utf-8")) for who in ("one", "two")]
    assert config[0] == config[1]
    warned = {e["code"] for e in Run("two-few").events() if e["type"] == "warning"}
    assert "DIST-02" in warned
    plans = [e for name in SHAPES for e in Run(f"two-{name}").events() if e["type"] == "plan"]
    assert all(plan["processes"] == 2 and plan["sharded"] == bool(env) for plan in plans) and len(plans) == len(SHAPES)


@pytest.mark.slow
def test_a_base_in_4_bits_is_whole_on_each_process_and_learns_what_one_does(recipe, plain):
    """With tokens of its own besides, of which a row may meet none: their rows are part of every exchange."""
    pytest.importorskip("bitsandbytes")
    kept = ["train.max_steps=5", "method.kind=qlora", "train.micro_batch=2", "train.accumulation=4"]
    changes = plain(*kept, "data.template=maese", "data.marks=add")
    train(recipe("output=one-qlora", *changes))
    assert pair([do("train", "output=two-qlora", *changes)], {}) == [[None], [None]]
    one, two = (weights(Run(f"{name}-qlora")) for name in ("one", "two"))
    assert same(Run("one-qlora"), Run("two-qlora")) and one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4


def cut(chosen, after: int) -> None:
    """Train alone and stop after a step, as Ctrl+C does."""
    from maese.errors import Interrupted

    def watch(event):
        if event["type"] == "step" and event["step"] == after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(chosen, watch=watch)


@pytest.mark.slow
def test_what_happens_to_one_process_is_decided_by_all(recipe, plain):
    """A loss without a number on one of them, a disk that is full for the first, a validation that stops the run."""
    few = ["train.micro_batch=2", "train.accumulation=2", "train.save_every=4", "train.max_steps=6"]
    stops = plain(*few, "train.max_steps=9", "train.patience=2", "eval.every=1", "train.lr=1", "train.final=best")
    orders = [
        do("train", "output=nan", *plain(*few), nan=True, rank=1, after=3),
        do("train", "output=full", *plain(*few), full=True, rank=0, after=2),
        do("resume", "full"),
        do("train", "output=early", *stops),
        do("train", "output=early", *stops),  # the folder is taken
        do("train", "output=none", *plain("base=no/hay")),
    ]
    ends = [None, "DISK-01", None, None, "RUN-01", "MODEL-01"]
    assert pair(orders) == [ends, ends]
    told = [e for e in Run("nan").events() if e["type"] == "warning" and e["code"] == "NUM-05"]
    assert [e["step"] for e in told] == [3] and [e["step"] for e in steps(Run("nan"))] == [1, 2, 4, 5, 6]
    assert same(Run("full"), train(recipe("output=one", *plain(*few))))
    alone = train(recipe("output=alone", *stops))
    ends = [(e["reason"], e["step"], e["final_step"]) for run in (alone, Run("early")) for e in run.events()[-1:]]
    assert ends[0] == ends[1] and ends[0][0] == "early_stop"


@pytest.mark.slow
def test_one_process_that_ends_alone_ends_the_run_and_nobody_waits(plain):
    Path("orders.json").write_text(json.dumps([do("train", "output=x", *plain(), fail=True, rank=1, after=3)]), "utf-8")
    process = launch([str(PAIR), "orders.json"])
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and "a fault of this process alone" in said
    run = Run("x")
    assert run.read("state.json") == {"status": "error", "step": 3, "code": "DIST-03"}
    assert not run.holder() and saved(run.checkpoints)


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_at_one_step_and_the_command_goes_on(recipe, plain, here):
    changes = plain("train.max_steps=400", "train.epochs=99", "train.save_every=150", "eval.every=100")
    alone = train(recipe("output=one", *changes))
    process = launch(["-m", "maese", "train", "receta.yaml", "output=two", *changes])
    events = here / "two" / "events.jsonl"
    while process.poll() is None and (not events.exists() or events.read_text("utf-8").count('"type": "step"') < 9):
        time.sleep(0.02)
    process.terminate()
    _, talk = process.communicate(timeout=60)
    two = Run("two")
    state = two.read("state.json")
    assert state["status"] == "interrupted" and state["step"] < 400, talk
    assert talk.count("RUN-06") == 2 and talk.count("maese resume two") == 1  # its title and `maese explain`
    assert [p.name for p in saved(two.checkpoints)] == [f"checkpoint-{state['step']}"]
    process = launch(["-m", "maese", "resume", "two"])
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 0, talk
    assert same(alone, two)


@pytest.mark.slow
def test_a_mistake_is_told_once_and_what_cannot_be_shared_out_is_refused(plain):
    tries = {
        "DIST-01": (FSDP2, plain("train.optimizer=muon")),
        "DIST-04": ({"ACCELERATE_USE_FSDP": "true"}, plain()),
        "USE-02": ({}, ["tren.lr=1"]),
    }
    for code, (env, changes) in tries.items():
        process = launch(["-m", "maese", "train", "receta.yaml", f"output={code}", *changes], env)
        _, talk = process.communicate(timeout=60)
        assert process.returncode != 0 and talk.count(f"error[{code}]") == 1, talk
        assert not Path(code).exists()


@pytest.mark.parametrize(("packing", "unpadded"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_rows_of_a_step_are_dealt_once_and_pieces_pass_together(rows, packing, unpadded):
    """Every row to one process; company only for who has nothing, or as many passes for all with weights in pieces."""
    from types import SimpleNamespace as Facts

    from maese.train.step import _shares
    from maese.train.together import Together

    step = [list(range(rows))[i : i + 2] for i in range(0, rows, 2)]
    for sharded in (False, True):
        passes, dealt = [], []
        for rank in range(4):
            session = Facts(
                recipe=Facts(train=Facts(micro_batch=2), data=Facts(packing=packing, max_length=32)),
                data=Facts(train=Facts(lengths=[30, 4, 9, 17, 5, 5, 31, 2])),
                machine=Facts(device="cpu"),
                packs=packing,
                unpadded=unpadded,
                together=Together(rank, 4, sharded=sharded),
            )
            mine, company = _shares(session, step)
            dealt += [row for group in mine for row in group]
            passes.append(len(mine) + len(company))
            assert sharded or not (mine and company)
        assert sorted(dealt) == list(range(rows)) and min(passes) > 0
        assert not sharded or len(set(passes)) == 1
