"""Training speed of maese against its peers on the same rows, weights and cores: interleaved, one process at a time.

    python benchmarks/trainers.py --peers build/peers --data ../data --repeats 5      about four hours
    python benchmarks/trainers.py --peers build/peers --quick                         does everything still run?

`--peers` is a folder with an environment of its own, made there if it is missing: the package never depends on them.
Every measurement is a fresh process that first takes two steps that do not count. What is compared: real tokens (no
padding) a second over one epoch of the same rows with 16 rows a step, the peak of resident memory, processor time,
and the loss on rows that nobody trained on. Results go to `--out`; `--write` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKERS, RESULTS = HERE / "peers", HERE / "RESULTS.md"
PINNED = (
    "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", "torch==2.13.0",
)  # fmt: skip
CONTENDERS = ("maese", "trainer", "trainer-best", "trl", "trl-grouped", "trl-packed", "plain", "plain-grouped")
STEPS = {"14m": 100, "gpt2": 12, "tiny": 4}  # twenty seconds and more of the fastest
BATCH = MICRO = 16  # rows of a step, and those of them that go through at once where nothing else is said
KIND = {"text": False, "skip": 0, "compile": False}  # what tasks on a card do otherwise
TRAIN = {"lr": 2e-4, "decay": 0.01, "clip": 1.0}
NOISY = 0.15  # cores that others used, above which a measurement is marked


def environment(folder: Path) -> Path:
    """The python of the peers, in an environment that is made the first time. All in one command: they must agree."""
    if folder.is_file():
        return folder
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINNED]).returncode:
            shutil.rmtree(folder)  # half an environment would be taken for a whole one the next time
            raise SystemExit("the peers could not be installed")
    return python


def work(python: Path | str, script: str, job: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Run a worker to its end and return the line it prints, with what else ran meanwhile; a failure is told in it."""
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    # From a clone nothing need be installed.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    env |= {"MAESE_CACHE": str(Path(job["room"]) / "cache"), "PYTHONWARNINGS": "ignore"}
    load, busy, began = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cpu_busy(), time.monotonic()
    used = children()
    command = [str(python), str(WORKERS / script), json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit)
        said, trouble = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        said, trouble, failed = [], [f"longer than {limit:.0f} s"], True
    wall = time.monotonic() - began
    others = max(0.0, (cpu_busy() - busy - (children() - used)) / wall)
    about = {"load": round(load, 2), "others": round(others, 2), "process_s": round(wall, 1)}
    if failed or not said:
        return about | {"error": " | ".join(trouble[-3:])[-400:]}
    return json.loads(said[-1]) | about


def cpu_busy() -> float:
    """Seconds that all cores have been at work since the machine began."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def calm(limit: float, patience: float = 600) -> None:
    """Wait until others use fewer than `limit` cores, ten minutes at most; then it is measured, and marked, anyway."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = cpu_busy()
        time.sleep(2)
        if (cpu_busy() - before) / 2 <= limit:
            return


def recipe(material: dict[str, Any], method: str, device: str) -> dict[str, Any]:
    """The recipe of maese for what the peers are given: the same batch, rate and clip; nothing saved or looked at."""
    never = 1_000_000
    train = {
        "epochs": 1000 if material["text"] else 1, "micro_batch": MICRO, "accumulation": material["batch"] // MICRO,
        "lr": TRAIN["lr"], "weight_decay": TRAIN["decay"], "clip": TRAIN["clip"], "schedule": "constant", "warmup": 0,
        "save_every": never, "final": "last", "device": device, "compile": material["compile"],
    }  # fmt: skip
    return {
        "name": "bench", "base": material["model"], "data": material["data"] | {"validation": 0},
        "method": {"kind": method}, "train": train, "eval": {"every": never},
    }  # fmt: skip


def measure(
    args: argparse.Namespace,
    python: Path,
    material: dict[str, Any],
    contender: str,
    seed: int,
    limit: float | None = None,
) -> dict[str, Any]:
    """One contender, once, in a process of its own."""
    out, method, ours = Path(material["model"]).parent, material["method"], contender == "maese"
    same = {key: material[key] for key in ("method", "model", "pad", "batch", "steps", "max_length", "skip", "compile")}
    job = TRAIN | same | {
        "contender": contender, "seed": seed, "ids": str(out / "rows.ids.jsonl"), "held": str(out / "held.ids.jsonl"),
        "threads": args.threads, "device": args.device, "expected": material["tokens"], "room": str(args.out),
        "recipe": recipe(material, method, args.device), "changes": args.change,
    }  # fmt: skip
    figures = work(sys.executable if ours else python, "ours.py" if ours else "theirs.py", job, limit)
    if "tokens" in figures and abs(figures["all_tokens"] / figures["expected"] - 1) > 0.02:
        figures["uneven"] = round(figures["all_tokens"] / figures["expected"], 3)
    return {"size": material["size"], "method": method, "contender": contender, "repeat": seed, **figures}


def prepared(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """The model and the rows of a task (size, steps, batch, max_length, text), as `peers/material.py` makes them."""
    data = str(args.data) if args.data else None
    where = {"out": str(args.out / task["size"]), "data": data, "device": args.device, "room": str(args.out)}
    made = work(sys.executable, "material.py", task | where | {"threads": args.threads})
    if "error" in made:
        raise SystemExit(made["error"])
    return task | made | {"contender": "material", "machine": machine(args.device)}


def main() -> None:
    args = arguments()
    python = environment(args.peers)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    if args.only_report:
        return report(args, [json.loads(line) for line in log.read_text("utf-8").splitlines()])
    rows: list[dict[str, Any]] = []
    if log.exists() and not args.append:
        log.rename(log.with_suffix(f".{int(log.stat().st_mtime)}.jsonl"))
    elif log.exists():
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told(row)

    for size in args.sizes:
        steps = args.steps or STEPS[size]
        task = {"size": size, "steps": steps, "batch": BATCH, "max_length": args.max_length, **KIND}
        material = prepared(args, task)
        keep(material)
        first = 1 + max((row["repeat"] for row in rows if row.get("repeat") and row["size"] == size), default=0)
        for seed in range(first, first + args.repeats):
            calm(args.quiet)
            keep(limit_of(args, python, size, seed))
            for method in args.methods:
                # Each repeat begins with another one, so that none always comes after the same.
                turn = seed % len(args.only)
                for contender in [*args.only[turn:], *args.only[:turn]]:
                    calm(args.quiet)
                    keep(measure(args, python, material | {"method": method}, contender, seed))
    report(args, rows)
    return None


def limit_of(args: argparse.Namespace, python: Path, size: str, seed: int) -> dict[str, Any]:
    """What a bf16 product of matrices gives on this machine now."""
    job = {"contender": "product", "threads": args.threads, "device": args.device, "room": str(args.out)}
    return {"size": size, "contender": "product", "repeat": seed, **work(python, "theirs.py", job)}


def told(row: dict[str, Any]) -> None:
    said = f"{row['size']} {row.get('method', '')} {row['contender']} {row.get('repeat', '')}:".replace("  ", " ")
    if "error" in row:
        said += f" failed: {row['error']}"
    elif "tokens_s" in row:
        said += (
            f" {row['tokens_s']:.0f} tokens/s, {row['seconds']:.1f} s, {row['peak_gib']:.2f} GiB,"
            f" {row['cpu_s']:.0f} s of processor, loss {row['losses'][-1]:.3f}, held out {row['held']:.4f}"
        )
        said += f" [{', '.join(row['notes'])}]" if row.get("notes") else ""
    elif "tflops" in row:
        said += f" {row['tflops']:.3f} TFLOP/s"
    else:
        said += f" {row['rows']} rows, {row['tokens']} tokens, {row['share']:.0%} learnt, {row['tokenizer']}"
    print(f"{said} (load {row['load']}, others {row['others']} cores)", flush=True)


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    text = "\n\n".join(section(rows, size) for size in dict.fromkeys(row["size"] for row in rows))
    print("\n" + text)
    if args.write:
        write("trainers", text)


def section(rows: list[dict[str, Any]], size: str) -> str:
    """The tables of one size: what was run, on what, and a line for each contender and method."""
    rows = [row for row in rows if row["size"] == size]
    material = [row for row in rows if row["contender"] == "material"][-1]
    limits = [row["tflops"] for row in rows if "tflops" in row]
    limit = statistics.median(limits) if limits else 0.0
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row.get("versions", {})
    about = [
        f"{material['steps']} steps of {material['batch']} rows: {material['tokens']:,} tokens,"
        f" {material['share']:.0%} learnt, at most {material['max_length']} a row"
        f" ({material.get('left_out', 0):.1%} of the file is longer and left out)",
        f"tokenizer: {material['tokenizer']}; random weights, no dropout",
        f"fused AdamW at {TRAIN['lr']:g}, clip {TRAIN['clip']:g}, bf16",
        f"{material['machine']}; bf16 product {limit * 1000:,.0f} GFLOP/s",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    ]
    lines = [f"### {size}", "", *(f"- {line}" for line in about)]
    for method in dict.fromkeys(row["method"] for row in rows if row.get("repeat") and "method" in row):
        lines += ["", f"**{method}**", "", *table([r for r in rows if r.get("method") == method], material, limit)]
    return "\n".join(lines)


HEAD = (
    "contender", "n", "tokens/s", "maese is", "peak GiB", "CPU s / 1,000 tokens", "of the product", "held-out loss",
    "others, cores",
)  # fmt: skip


def table(rows: list[dict[str, Any]], material: dict[str, Any], limit: float) -> list[str]:
    """Medians (least–most). The ratio is taken within each repeat, so that a slow hour touches both sides."""
    rows = [row for row in rows if row["contender"] != "material"]
    ours = {row["repeat"]: row for row in rows if row["contender"] == "maese" and "tokens_s" in row}
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        good = [row for row in mine if "tokens_s" in row]
        if good:
            cells = line(name, good, ours, material, limit)
        else:
            cells = [name, "0", "failed: " + mine[0]["error"][-90:].replace("|", "/"), *[""] * (len(HEAD) - 3)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def line(name: str, good: list[dict], ours: dict[int, dict], material: dict[str, Any], limit: float) -> list[str]:
    def of(key: str, digits: int) -> str:
        return spread([row[key] for row in good], digits)

    ratios = [ours[row["repeat"]]["tokens_s"] / row["tokens_s"] for row in good if row["repeat"] in ours]
    gaps = [row["held"] / ours[row["repeat"]]["held"] - 1 for row in good if row["repeat"] in ours]
    flops = flops_per_token(material, good[0]["method"])
    share = statistics.median(row["tokens_s"] for row in good) * flops / (limit * 1e12) if limit else 0.0
    same = name == "maese" or not ratios
    notes = [f"{good[0]['steps']} steps"] if good[0]["steps"] != material["steps"] else []
    notes += [f"{good[0]['uneven']:.0%} of the tokens"] if "uneven" in good[0] else []
    noisy = " (noisy)" if statistics.median(row["others"] for row in good) > NOISY else ""
    # On a card, all that it gave: context and what its allocator keeps.
    memory = "card_gib" if "card_gib" in good[0] else "peak_gib"
    return [
        name + (f" ({', '.join(notes)})" if notes else ""), str(len(good)), of("tokens_s", 0),
        "–" if same else spread(ratios, 2) + "×", of(memory, 2),
        spread([1000 * row["cpu_s"] / row["tokens"] for row in good], 2), f"{share:.0%}",
        of("held", 3) + ("" if same else f", {statistics.median(gaps):+.2%}"), of("others", 2) + noisy,
    ]  # fmt: skip


def spread(values: Iterable[float], digits: int) -> str:
    """`spread([1, 2, 4], 1)` is `2.0 (1.0–4.0)`; one value stands alone."""
    values = list(values)
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def flops_per_token(material: dict[str, Any], method: str) -> float:
    """Useful work a real token: matrices, attention over what it sees, and the head only where something is learnt.

    Frozen matrices need no gradient of their own: four operations a weight instead of six.
    """
    config = json.loads((Path(material["model"]) / "config.json").read_text("utf-8"))
    layers, wide = (
        config.get(a, config.get(b)) for a, b in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"))
    )
    matrices = 12 * layers * wide**2 + material["share"] * config["vocab_size"] * wide
    return (6 if method == "full" else 4) * matrices + 6 * layers * wide * material["width"]


@cache
def machine(device: str) -> str:
    if device == "cuda":  # asked by another process: one that lives on would take memory of the card
        ask = "import torch; print(torch.cuda.get_device_name() + ', CUDA', torch.version.cuda)"
        named = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip()
        return f"{named}, {time.strftime('%Y-%m-%d')}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {time.strftime('%Y-%m-%d')}"


SKELETON = """# Results

Written by the scripts named below; nothing here is typed by hand. Medians, with the least and the most in brackets.
«maese is» says how many times the speed of that contender maese has, repeat by repeat. Tokens are real ones: padding
does not count. «of the product» is the useful work (the head only where something is learnt) over what a bf16 product
of matrices gave in the same run. `trainer` and `trl` are the defaults of transformers and TRL with 8 rows at once;
`-best`, `-grouped` and `-packed` are 16 rows at once by length, or packed, without gradient checkpointing, and frozen
weights in bf16. `plain` is a loop of twenty lines. Losses are compared on rows that nobody trained on.

## On processors: `python benchmarks/trainers.py --peers build/peers --data … --write`

<!-- trainers -->
Not measured yet on a quiet machine.
<!-- /trainers -->

## On a card: `python benchmarks/cuda.py --out cuda.json --write`

<!-- cuda -->
Not measured yet.
<!-- /cuda -->

## A model from nothing: `python benchmarks/minigpt.py --text … --write`

<!-- minigpt -->
Not measured yet.
<!-- /minigpt -->

## The models inside the package: `python benchmarks/embedded.py --write`

<!-- embedded -->
Not measured yet.
<!-- /embedded -->

## An encoder and a decoder: `python benchmarks/architectures.py --text … --labels … --write`

<!-- architectures -->
Not measured yet.
<!-- /architectures -->

## What a plan foretells of memory: `python benchmarks/plan.py --write`

<!-- plan -->
Not measured yet.
<!-- /plan -->
"""


def write(part: str, text: str) -> None:
    """Put a text between the marks of its part of RESULTS.md."""
    before = RESULTS.read_text("utf-8") if RESULTS.exists() else SKELETON
    start, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
    head, rest = before.split(start)
    RESULTS.write_text(f"{head}{start}{text}\n{end}{rest.split(end)[1]}", "utf-8")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, default=Path("build/peers"), help="environment of the peers, or its python"
    )
    parser.add_argument("--data", type=Path, help="folder with instrucciones_train.jsonl; else the rows are made up")
    parser.add_argument("--out", type=Path, default=Path("build/trainers"))
    parser.add_argument("--sizes", nargs="+", choices=[*STEPS], default=["14m", "gpt2"])
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help=f"steps of {BATCH} rows; {STEPS}")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quiet", type=float, default=99.0, help="wait until others use fewer cores than this")
    parser.add_argument("--change", action="append", default=[], help="of maese's recipe: train.micro_batch=8")
    parser.add_argument("--append", action="store_true", help="add repeats to those in --out")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--only-report", action="store_true", help="the table of what is in --out")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one repeat")
    args = parser.parse_args(given)
    if args.quick:
        args.sizes, args.repeats, args.out = ["tiny"], 1, args.out / "quick"
    args.device, args.out = "cpu", args.out.resolve()
    return args


if __name__ == "__main__":
    main()
