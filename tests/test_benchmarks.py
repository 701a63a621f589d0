"""The benchmarks that need a card or hours: what they are asked, what they refuse, and their arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))


def test_the_card_benchmark_takes_all_its_tasks_unless_told(scripts):
    import cuda

    args = cuda.arguments(["--out", "r.json"])
    assert args.tasks == ["gpt2", "gpt2-xl-lora", "gpt2-xl", "phi-2"] and args.minutes <= 9
    assert cuda.arguments(["--out", "r.json", "--tasks", "phi-2"]).tasks == ["phi-2"]
    with pytest.raises(SystemExit):
        cuda.arguments([])
    with pytest.raises(SystemExit):
        cuda.arguments(["--out", "r.json", "--tasks", "gpt3"])


def test_tasks_of_one_size_share_their_rows(scripts):
    import cuda

    shared = [{k: v for k, v in cuda.TASKS[name].items() if k != "method"} for name in ("gpt2-xl", "gpt2-xl-lora")]
    assert shared[0] == shared[1]


def test_without_a_card_it_says_where_to_run_and_measures_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    command = [sys.executable, str(BENCHMARKS / "cuda.py"), "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "trainers.py" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_chosen_rows_have_the_lengths_of_the_file_and_none_is_held_out(scripts):
    from material import choose

    lengths = [10 + (i * 37) % 200 for i in range(3000)]
    chosen, held = choose(lengths, 10, 16)
    assert len(chosen) == 160 and len(set(chosen)) == 160 and not set(chosen) & set(held)
    assert sum(lengths[i] for i in chosen) / 160 == pytest.approx(sum(lengths) / 3000, rel=0.05)
    # Sorted again, they fall into the batches they came in: each is nearly of one length.
    again = sorted(lengths[i] for i in chosen)
    assert all(again[i + 15] - again[i] < 15 for i in range(0, 160, 16))


def test_useful_work_of_a_token_counts_the_head_where_something_is_learnt(scripts, tmp_path):
    import trainers

    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2, "n_embd": 8, "vocab_size": 100}))
    material = {"model": str(tmp_path), "share": 0.5, "width": 10.0}
    assert trainers.flops_per_token(material, "full") == 6 * (12 * 2 * 64 + 0.5 * 100 * 8) + 6 * 2 * 8 * 10
    assert trainers.flops_per_token(material, "lora") == 4 * (12 * 2 * 64 + 0.5 * 100 * 8) + 6 * 2 * 8 * 10


def test_the_table_takes_ratios_within_a_repeat_and_names_what_failed(scripts, tmp_path):
    import trainers

    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2, "n_embd": 8, "vocab_size": 100}))
    material = {"model": str(tmp_path), "share": 0.5, "width": 10.0, "steps": 4}

    def row(contender: str, repeat: int, speed: float, held: float) -> dict:
        figures = {"tokens_s": speed, "tokens": 1000, "steps": 4, "cpu_s": 2.0, "peak_gib": 1.0, "held": held}
        return {"contender": contender, "repeat": repeat, "method": "full", "others": 0.0, **figures}

    rows = [row("maese", 1, 300, 2.0), row("trl", 1, 100, 2.02), row("maese", 2, 200, 2.0), row("trl", 2, 50, 2.02)]
    rows.append({"contender": "trainer", "repeat": 1, "method": "full", "error": "a | b"})
    lines = trainers.table(rows, material, limit=1.0)
    assert any(line.startswith("| trl | 2 | 75 (50–100) | 3.50 (3.00–4.00)× |") and "+1.00%" in line for line in lines)
    assert any("failed: a / b" in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_installed_is_asked_without_importing_it(scripts, tmp_path, monkeypatch):
    import cuda

    (tmp_path / "costly.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cuda.installed(Path(sys.executable), "costly json")
    assert not cuda.installed(Path(sys.executable), "costly no_such_package")


def test_rows_and_the_product_are_made_once_and_every_task_has_them(scripts, tmp_path, monkeypatch):
    import cuda

    made, measured, kept = [], [], []
    monkeypatch.setattr(cuda, "installed", lambda *_: True)
    monkeypatch.setattr(cuda, "limit_of", lambda *_: made.append("product") or {"contender": "product", "tflops": 1.0})
    monkeypatch.setattr(
        cuda, "prepared", lambda _, task: made.append(task["size"]) or {**task, "contender": "material"}
    )
    monkeypatch.setattr(
        cuda, "measure", lambda _a, _p, material, name, *_: measured.append((material["method"], name)) or {}
    )
    tasks = ["gpt2-xl-lora", "gpt2-xl"]
    args = cuda.arguments(["--out", str(tmp_path / "r.json"), "--repeats", "2", "--tasks", *tasks])
    cuda.rounds(args, Path(sys.executable), float("inf"), lambda row, task: kept.append((task, row.get("contender"))))
    assert made == ["product", "gpt2-xl", "product"]
    assert {method for method, _ in measured} == {"lora", "full"} and len(measured) == 2 * 8
    assert all(kept.count((task, "material")) == 1 and kept.count((task, "product")) == 2 for task in tasks)


def test_the_allocator_of_everybody_can_be_chosen(scripts):
    import cuda

    assert cuda.arguments(["--out", "r.json"]).allocator is None
    assert cuda.ALLOCATORS[cuda.arguments(["--out", "r.json", "--allocator", "native"]).allocator].endswith("False")


def test_how_soon_one_recipe_is_as_good_as_another_ends(scripts):
    """Between two validations the curve is taken for straight; time is that of the other's whole training."""
    import minigpt

    def run(nats: list[float], seconds: float) -> dict:
        points = [{"seconds": i * seconds, "tokens": 10 * i, "nats": n} for i, n in enumerate(nats)]
        return {
            "curve": points,
            "tokens_per_byte": 0.25,
            "kind": "x",
            "seed": 1,
            "lr": 1.0,
            "parameters": 9,
            "steps": 3,
        }

    classic = run([8.0, 6.0, 5.0, 4.0], 10.0)
    assert minigpt.bits(classic)[-1] == pytest.approx(4.0 * 0.25 / 0.6931, rel=1e-3)
    assert minigpt.sooner(run([8.0, 5.0, 3.0, 2.0], 6.0), classic) == pytest.approx((6 + 3) / 30)
    assert minigpt.sooner(run([8.0, 7.0, 6.0, 5.0], 6.0), classic) is None
    both = [classic | {"kind": "classic"}, run([8.0, 5.0, 3.0, 2.0], 6.0) | {"kind": "modern"}]
    told = minigpt.table(both)
    assert "-50.0%" in told and "0.30 of its time" in told


def test_the_plan_is_held_against_what_was_measured(scripts):
    import plan

    row = {"name": "a", "parameters": 10, "changes": {"data.max_length": 8}, "precision": "fp32", "measured": 2.0}
    rows = [row | {"predicted": 2.2, "told_by_run": 1.9}, row | {"predicted": 1.6, "told_by_run": 2.0}]
    told = plan.table(rows)
    assert (
        "planned, the largest error is 20.0% and the median 15.0%" in told and "told, the largest error is 5.0%" in told
    )
    assert "| +10.0% | -5.0% |" in told and len({line.count("|") for line in told.splitlines() if "|" in line}) == 1
    assert len(plan.SETTINGS) >= 12 and {model for model, _ in plan.SETTINGS.values()} <= {*plan.MODELS}
    # A change of the arithmetic is seen on all that was measured before it.
    assert all(plan.planned({"name": name, "precision": "bf16"}).peak > 2**28 for name in plan.SETTINGS)
