"""The first MiniGPT's recipe against the modern one, on the same text and tokens: how far each goes, and how soon.

    python benchmarks/minigpt.py --text build/embedded/text/literature.jsonl --write        two seeds, about two hours
    python benchmarks/minigpt.py --quick                                                    does everything still run?

classic is GPT-2's architecture with AdamW and a cosine, modern Qwen3's with Muon and a linear fall, both as
`maese.model.build` makes them and the one loop trains them, of the same width and depth, over one tokenizer and the
same rows in the same order. Runs of a seed are interleaved. What is compared is held-out bits per byte: at the end,
and when modern was as good as classic ends, counted in classic's own seconds of training. Rates are looked for
with `--rates`, on another seed; what was found is in LOG.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = Path("build/minigpt")
SHAPE = {"layers": 6, "heads": 4, "width": 256, "vocabulary": 8192, "context": 512}
ROWS = 16  # of the context, in a step
RECIPES = {
    "classic": {"lr": 1e-3, "optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.01, "warmup": 0.05},
    "modern": {"lr": 2e-3, "optimizer": "muon", "schedule": "linear", "weight_decay": 0.1, "warmup": 0.02},
}


def one(kind: str, seed: int, steps: int, text: Path, lr: float | None = None) -> dict:
    """Train one model in this process; returns its curve: seconds, tokens and held-out nats of every validation."""
    from maese import recipe as recipes
    from maese.model.build import build
    from maese.plan.sizes import Shape
    from maese.recipe import Data, Source
    from maese.text.gather import learnt
    from maese.tokens.train import train_tokenizer
    from maese.train.loop import train

    source = {"path": str(text)}
    data = {"sources": [source], "format": "text", "max_length": SHAPE["context"], "too_long": "split"}
    data |= {"packing": True, "validation": 0.01, "tolerance": 0.1}
    tokenizer = OUT / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(learnt(Data(**(data | {"sources": [Source(**source)]}))), SHAPE["vocabulary"], tokenizer)
    name = f"{kind}-{seed}" + (f"-{lr}" if lr else "")
    base = OUT / "bases" / name
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        build(Shape(**SHAPE), kind, tokenizer, base, seed)
    settings = RECIPES[kind] | ({"lr": lr} if lr else {})
    recipe = recipes.check(
        {
            "name": kind,
            "base": str(base),
            "data": data,
            "train": settings
            | {"max_steps": steps, "epochs": 1, "micro_batch": 4, "accumulation": ROWS // 4, "seed": seed}
            | {"save_every": 10**6, "final": "last"},
            "eval": {"every": max(1, steps // 12)},
            "output": str(OUT / "runs" / name),
        }
    )
    events = train(recipe).history()
    plan = next(e for e in events if e["type"] == "plan")
    curve, at = [], {"seconds": 0.0, "tokens": 0}
    for event in events:
        if event["type"] == "step":
            at = {"seconds": event["seconds"], "tokens": at["tokens"] + event["tokens"]}
        if event["type"] == "validation":
            curve.append(at | {"nats": event["loss"]})
    spelt = held_bytes(recipe, base)
    facts = {"kind": kind, "seed": seed, "lr": settings["lr"], "parameters": plan["parameters"], "curve": curve}
    return facts | {"tokens_per_byte": plan["validation_tokens"] / spelt, "steps": steps}


def held_bytes(recipe, base: Path) -> int:
    """Bytes that the held-out targets spell."""
    from maese.evaluate.ability import byte_lengths
    from maese.model.load import load_tokenizer
    from maese.tokens.prepare import prepare

    tokenizer = load_tokenizer(base)
    spelt = byte_lengths(tokenizer)
    rows = prepare(recipe.data, tokenizer, SHAPE["context"]).validation
    return sum(spelt[i] for row in rows for i, m in zip(row.ids, row.mask, strict=True) if m)


def bits(run: dict) -> list[float]:
    return [point["nats"] * run["tokens_per_byte"] / 0.6931471805599453 for point in run["curve"]]


def sooner(modern: dict, classic: dict) -> float | None:
    """The share of classic's time after which modern is as good as classic ends; None: never."""
    goal, whole = bits(classic)[-1], classic["curve"][-1]["seconds"]
    points = list(zip((p["seconds"] for p in modern["curve"]), bits(modern), strict=True))
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= goal:
            share = 1.0 if high == low else (high - goal) / (high - low)
            return (before + share * (after - before)) / whole
    return None


def table(runs: list[dict]) -> str:
    from peers.meter import versions
    from trainers import machine

    lines = [
        f"- {SHAPE['layers']} layers of {SHAPE['width']}, {SHAPE['vocabulary']} tokens, rows of {SHAPE['context']};"
        f" {runs[0]['curve'][-1]['tokens']:,} tokens read once, {runs[0]['steps']} steps of {ROWS} rows",
        f"- {machine('cpu')}",
        "- " + ", ".join(f"{name} {version}" for name, version in sorted(versions().items())),
        "",
        "| recipe | seed | parameters | rate | tokens/s | seconds | bits per byte | against classic | as good after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by = {(run["kind"], run["seed"]): run for run in runs}
    for (kind, seed), run in sorted(by.items()):
        end, classic = run["curve"][-1], by.get(("classic", seed))
        against = ["–", "–"]
        if kind == "modern" and classic:
            share = sooner(run, classic)
            against = [
                f"{bits(run)[-1] / bits(classic)[-1] - 1:+.1%}",
                f"{share:.2f} of its time" if share else "never",
            ]
        lines.append(
            f"| {kind} | {seed} | {run['parameters']:,} | {run['lr']} | {end['tokens'] / end['seconds']:,.0f} |"
            f" {end['seconds']:,.0f} | {bits(run)[-1]:.4f} | {against[0]} | {against[1]} |"
        )
    seeds = [seed for kind, seed in by if kind == "modern" and ("classic", seed) in by]
    if seeds:
        falls = [bits(by["modern", s])[-1] / bits(by["classic", s])[-1] - 1 for s in seeds]
        lines += ["", f"Over {len(seeds)} seeds modern ends {statistics.mean(falls):+.1%} at equal tokens."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="only look for a rate: each of these, seed 0")
    parser.add_argument("--kinds", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SEED"), help="train one here and print its curve")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.text, args.steps, args.seeds = HERE.parent / "data" / "quijote_muestra.txt", 4, [1]
        SHAPE.update(layers=2, heads=2, width=64, vocabulary=1024, context=128)
    if args.one:
        found = one(args.one[0], int(args.one[1]), args.steps, args.text, (args.rates or [None])[0])
        print(json.dumps(found))
        return
    results = OUT / "results.jsonl"
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, 0, rate) for kind in args.kinds for rate in args.rates or []]
    jobs = jobs or [(kind, seed, None) for seed in args.seeds for kind in args.kinds]
    runs = []
    for kind, seed, rate in jobs:
        words = [
            sys.executable,
            __file__,
            "--text",
            str(args.text),
            "--steps",
            str(args.steps),
            "--one",
            kind,
            str(seed),
        ]
        words += ["--rates", str(rate)] if rate else []
        words += ["--quick"] if args.quick else []
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        end = runs[-1]["curve"][-1]
        speed = end["tokens"] / end["seconds"]
        print(
            f"{kind} {seed} {runs[-1]['lr']}: {bits(runs[-1])[-1]:.4f} bits per byte, {speed:,.0f} tokens/s", flush=True
        )
        with results.open("a", encoding="utf-8") as out:
            out.write(json.dumps(runs[-1]) + "\n")
    if args.rates:
        return
    text = table(runs)
    print(text)
    if args.write:
        from trainers import write

        write("minigpt", text)


if __name__ == "__main__":
    main()
