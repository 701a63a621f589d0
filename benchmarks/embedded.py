"""The models inside the package: what they predict, as their scores say, and how fast they write and are adapted here.

    python benchmarks/embedded.py --write      some two minutes; nothing else should be running
    python benchmarks/embedded.py --quick      does everything still run?

Bits per byte need the held-out texts, which are not part of the repository: they are read from the scores that travel
with the weights (`scripts/embedded.py` measures them). Speeds are measured here and now, each the median of its goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHAT = {
    "authors": "eight authors never read", "centuries": "works before 1700", "technical": "documentation of today",
    "sentences": "sentences of today", "instructions": "answers to instructions",
}  # fmt: skip


def writing(name: str, goes: int) -> float:
    """Tokens a second, one at a time, of 60 at a go."""
    from maese.generate.engine import open_writer

    writer, found = open_writer(name), []
    for seed in range(goes):
        began = time.perf_counter()
        tokens = writer.generate("La noche", seed=seed, max_new_tokens=60).tokens
        found.append(tokens / (time.perf_counter() - began))
    return statistics.median(found)


def adapting(name: str, steps: int) -> float:
    """Real tokens a second of LoRA training over all linear layers, rank 16, on the tutor's conversations."""
    from maese import recipe as recipes
    from maese.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        run = train(
            recipes.check(
                {
                    "name": "speed",
                    "base": name,
                    "data": {
                        "sources": [{"path": str(HERE.parent / "data" / "tutor.jsonl")}],
                        "template": "maese",
                        "max_length": 512,
                        "validation": 0.0,
                    },
                    "method": {"kind": "lora", "rank": 16},
                    "train": {"max_steps": steps, "micro_batch": 8, "accumulation": 1},
                    "output": str(Path(folder) / "run"),
                }
            )
        )
        speeds = [event["tokens_s"] for event in run.history() if event["type"] == "step"]
    return statistics.median(speeds[2:] or speeds)


def table(goes: int, steps: int) -> str:
    from peers.meter import versions
    from trainers import machine

    from maese.model import load

    folder = load.resolve("embedded")
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    lines = [
        f"- {scores['base']['parameters']:,} parameters; weights of both, {size:.1f} MB; seeds and rates in"
        " scripts/embedded*.yaml",
        f"- {machine('cpu')}",
        "- " + ", ".join(f"{name} {version}" for name, version in sorted(versions().items())),
        "",
        "| held-out bits per byte | bytes | first edition | second | change | taught to answer |",
        "|---|---|---|---|---|---|",
    ]
    for name, what in WHAT.items():
        was, now, after = (scores[each]["bits_per_byte"][name] for each in ("first", "base", "instruct"))
        lines.append(
            f"| {what} | {now['bytes']:,} | {was['value']:.3f} | {now['value']:.3f} |"
            f" {now['value'] / was['value'] - 1:+.1%} | {after['value']:.3f} |"
        )
    pairs = [
        "{}/{}".format(*(sum(n[i] for n in scores[each]["pairs"].values()) for i in (0, 1)))
        for each in ("first", "base", "instruct")
    ]
    said = scores["instruct"]["answers"]
    lines += [
        f"| minimal pairs | – | {pairs[0]} | {pairs[1]} | – | {pairs[2]} |",
        "",
        f"Of {said['asked']} held-out instructions the one taught to answer ends {said['ended']}, in Spanish"
        f" {said['spanish']} of the {said['told']} that should be and are long enough to tell; {said['exact']} are the"
        " expected answer, letter by letter.",
        f"Writes {writing('embedded', goes):.0f} tokens/s; LoRA over all linear layers learns from"
        f" {adapting('embedded', steps):,.0f} tokens/s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    text = table(1 if args.quick else 7, 2 if args.quick else 20)
    print(text)
    if args.write:
        from trainers import write

        write("embedded", text)


if __name__ == "__main__":
    main()
