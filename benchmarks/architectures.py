"""An encoder and a decoder of one size on the same real text: what each is better at, over two seeds.

    python benchmarks/architectures.py --text texts.jsonl --labels instructions.jsonl --write       some ten minutes
    python benchmarks/architectures.py --quick                                                does everything still run?

The study is that of `maese compare-architectures`; the class that the probes look for is the column `--column`, of
rows of which nine in ten are learnt from and the rest measured on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = ("encoder", "decoder")
FIGURES = {
    "parameters": ("parameters", "{:,}"), "seconds": ("seconds", "{:,.0f}"),
    "hole_accuracy": ("masked tokens guessed", "{:.1%}"), "perplexity": ("perplexity", "{:,.1f}"),
    "similarity": ("sentence similarity", "{:.1%}"), "probe": ("class, frozen features", "{:.1%}"),
    "probe_tuned": ("class, fine-tuned", "{:.1%}"),
}  # fmt: skip


def table(runs: list[tuple[int, dict]]) -> str:
    from peers.meter import versions
    from trainers import machine

    first = runs[0][1]
    of = first["settings"]
    lines = [
        f"- {of['layers']} layers of {of['width']}, rows of {of['context']} tokens: {first['rows'][0]:,} learnt,"
        f" {first['rows'][1]:,} measured on; {of['steps']} steps of {of['rows']} rows; {len(first['classes'])} classes",
        f"- {machine('cpu')}",
        "- " + ", ".join(f"{name} {version}" for name, version in sorted(versions().items())),
        "",
        "| figure | " + " | ".join(f"{kind}, seed {seed}" for kind in KINDS for seed, _ in runs) + " |",
        "|---|" + "---|" * (2 * len(runs)),
    ]
    for key, (name, how) in FIGURES.items():
        values = [found[kind][key] for kind in KINDS for _, found in runs]
        lines.append(f"| {name} | " + " | ".join("–" if v is None else how.format(v) for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    from maese.model.load import load_tokenizer, resolve
    from maese.terminal_study import MOST, classes, whole_texts
    from maese.train.architectures import Study, study

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "quijote_muestra.txt")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--column", default="tarea")
    parser.add_argument("--most", type=int, default=2000, help="texts that are read")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 3, [1]
    labelled = classes(str(args.labels), args.column)[:MOST] if args.labels else [("uno", "a"), ("dos", "b")] * 20
    texts, runs = whole_texts(str(args.text))[: args.most], []
    for seed in args.seeds:
        settings = Study(steps=args.steps, seed=seed)
        runs.append((seed, study(texts, labelled, load_tokenizer(resolve("embedded")), settings)))
    text = table(runs)
    print(text)
    if args.write:
        from trainers import write

        write("architectures", text)


if __name__ == "__main__":
    main()
