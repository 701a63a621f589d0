"""Training speed on a card: GPT-2 124M from scratch, GPT-2 XL whole and with LoRA, Phi-2 with QLoRA, at full size.

    python benchmarks/cuda.py --out cuda.json                 nine minutes at most, in one call
    python benchmarks/cuda.py --out cuda.json --tasks gpt2 phi-2 --peers build/peers
    python benchmarks/cuda.py --out native.json --tasks gpt2-xl --allocator native      against maese's own choice
    python benchmarks/cuda.py --out cuda.json --read --write  the table of that file, into RESULTS.md

Weights are random: what is measured is speed and memory. Useful work is held against an 8192³ product in bf16 measured
in the same run. maese and whatever of transformers and TRL is installed take turns, each in a process of its own, until
the time is over; what there was no time for, or what one of them cannot do, is said and not left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainers import environment, limit_of, measure, prepared, section, told, write

# Rows of a step, tokens of a row, and against whom. From scratch there is no padding: every row is full, so all steps
# cost the same and the first ones, in which something is compiled, need not be timed. Tasks of one size share their
# rows, and so have the same batch, length and steps.
INSTRUCTIONS = {"batch": 64, "max_length": 512, "steps": 40, "text": False, "skip": 0, "compile": False}
TEXT = {"batch": 32, "max_length": 1024, "steps": 130, "text": True, "skip": 10, "compile": True}
NEEDS = {"trainer": "transformers accelerate", "trl": "trl datasets"}
AGAINST = ("maese", "trl", "trl-packed", "trainer-best")
TASKS: dict[str, dict[str, Any]] = {
    "gpt2": {"size": "gpt2", "method": "full", **TEXT, "against": ("maese", "trainer", "trainer-best")},
    "gpt2-xl-lora": {"size": "gpt2-xl", "method": "lora", **INSTRUCTIONS, "against": AGAINST},
    "gpt2-xl": {"size": "gpt2-xl", "method": "full", **INSTRUCTIONS, "against": AGAINST},
    "phi-2": {"size": "phi-2", "method": "qlora", **INSTRUCTIONS, "against": AGAINST},
}
# How the card's memory is given out: as each contender has it by default, or the same way for all.
ALLOCATORS = {"native": "expandable_segments:False", "expandable": "expandable_segments:True"}
LEAST = 45.0  # seconds under which no further measurement is begun: a model of billions takes them to load


def main() -> None:
    args = arguments()
    if args.read:
        return show(json.loads(args.out.read_text("utf-8")), args.write)
    if not card():
        raise SystemExit(
            "There is no CUDA device here. Run this where `python -c 'import torch; print(torch.cuda.is_available())'`"
            " says True; on a processor, use benchmarks/trainers.py."
        )
    until = time.monotonic() + args.minutes * 60
    python = environment(args.peers) if args.peers else Path(sys.executable)
    if args.allocator:
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATORS[args.allocator]
    args.device, results, args.out = "cuda", args.out, args.room.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any], task: str) -> None:
        rows.append(row | {"size": task})
        results.write_text(json.dumps(rows), "utf-8")  # at once: the machine may be taken away
        told(row | {"size": task})

    rounds(args, python, until, keep)
    return show(rows, args.write)


def rounds(args: argparse.Namespace, python: Path, until: float, keep: Any) -> None:
    """Every task against everybody, again and again in turns, until the repeats or the time are over."""
    here = [name for name, needs in NEEDS.items() if installed(python, needs)]
    materials: dict[tuple[str, bool], dict[str, Any]] = {}
    for seed in range(1, args.repeats + 1):
        limit = limit_of(args, python, args.tasks[0], seed)
        for name in args.tasks:
            task = {key: value for key, value in TASKS[name].items() if key != "against"}
            task["batch"] = args.batch or task["batch"]
            kind = (task["size"], task["text"])  # tasks of one size share their rows, and need them made once
            if kind not in materials:
                materials[kind] = prepared(args, task)
            material = materials[kind] | {"method": task["method"]}
            if seed == 1:
                keep(material, name)
            keep(limit, name)
            for contender in TASKS[name]["against"]:
                left = until - time.monotonic()
                row = {"method": task["method"], "contender": contender, "repeat": seed, "load": 0.0, "others": 0.0}
                if contender != "maese" and contender.split("-")[0] not in here:
                    keep(row | {"error": "not installed"}, name)
                elif left < LEAST:
                    keep(row | {"error": "no time left"}, name)
                else:
                    keep(measure(args, python, material, contender, seed, left), name)


def card() -> bool:
    import torch

    return torch.cuda.is_available()


def installed(python: Path, packages: str) -> bool:
    """Whether they are there; to import them would take a tenth of the time there is."""
    ask = f"from importlib.util import find_spec; raise SystemExit(not all(map(find_spec, {packages.split()!r})))"
    return subprocess.run([str(python), "-c", ask], capture_output=True).returncode == 0


def show(rows: list[dict[str, Any]], into_results: bool) -> None:
    text = "\n\n".join(section(rows, task) for task in dict.fromkeys(row["size"] for row in rows))
    print("\n" + text)
    if into_results:
        write("cuda", text)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the results, JSON")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--peers", type=Path, help="environment of the peers, or its python; else this one's")
    parser.add_argument("--data", type=Path, help="folder with instrucciones_train.jsonl; else the rows are made up")
    parser.add_argument("--room", type=Path, default=Path("build/cuda"), help="folder for models and rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch", type=int, help="rows of a step, instead of those of the task")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--change", action="append", default=[], help="of maese's recipe: train.micro_batch=8")
    parser.add_argument("--allocator", choices=[*ALLOCATORS], help="of everybody, instead of what each one has")
    parser.add_argument("--read", action="store_true", help="measure nothing: show what --out holds")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
