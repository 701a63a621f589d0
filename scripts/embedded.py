"""Measure the model that `maese train scripts/embedded.yaml` made, and put it into the package.

    python scripts/embedded.py measure build/embedded/run/pretrain/final     bits per byte on the five held-out texts
    python scripts/embedded.py measure build/embedded/first --as first       the edition before it, for comparison
    python scripts/embedded.py install build/embedded/run/pretrain/final     weights in bf16, card, manifest

In: build/embedded/ as scripts/embedded_corpus.py and the training left it. Out: build/embedded/scores-NAME.json, and
src/maese/embedded/. Every figure of the card is read from what was measured, with the weights as they are shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

BUILD = Path("build/embedded")
PACKAGE = Path("src/maese/embedded")
SETS = ("authors", "centuries", "technical", "sentences", "instructions")
CONTEXT = 512
ASKED = 200


def held(name: str) -> list[str]:
    """The texts of a held-out set; of an instruction, the answer alone is measured, after its question."""
    return [json.loads(line) for line in (BUILD / "held" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def rows_of(name: str, tokenizer, template: str) -> list:
    """Examples to measure on: windows that overlap by half, so that each token counts once, with enough before it."""
    from maese.evaluate.ability import whole_text
    from maese.text.record import Conversation, Message
    from maese.tokens.settle import pieces
    from maese.tokens.template import open_template

    found = []
    if name == "instructions":
        renderer = open_template(template, tokenizer)
        for i, row in enumerate(held(name)):
            asked = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
            talk = Conversation((Message("user", asked), Message("assistant", row["output"])), str(i))
            example = renderer.render(talk)
            found += [example] if len(example) <= CONTEXT else []
        return found
    for row in held(name):
        found += pieces(whole_text(tokenizer, row["text"]), CONTEXT, CONTEXT // 2)
    return found


def measure(args) -> dict:
    """Bits per byte on every set, minimal pairs, and the speed of writing."""
    from maese.evaluate.ability import bits_per_byte, minimal_pairs
    from maese.generate.engine import open_folder

    model, tokenizer = open_folder(args.model)
    scores: dict = {"parameters": sum(p.numel() for p in model.parameters()), "bits_per_byte": {}}
    for name in SETS:
        found = bits_per_byte(model, tokenizer, rows_of(name, tokenizer, args.template))
        scores["bits_per_byte"][name] = {"value": found.per_byte, "bytes": found.bytes, "tokens": found.tokens}
        print(f"{name:13} {found.per_byte:.4f} bits per byte, {found.bytes:,} bytes", flush=True)
    scores["pairs"] = minimal_pairs(model, tokenizer)
    print({kind: f"{right}/{n}" for kind, (right, n) in scores["pairs"].items()})
    scores["tokens_s"] = speed(model, tokenizer)
    print(f"writes {scores['tokens_s']:.0f} tokens a second")
    (BUILD / f"scores-{args.name}.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return scores


def speed(model, tokenizer) -> float:
    """Tokens a second written one at a time, the median of five goes of 60."""
    from maese.generate.engine import Writer
    from maese.recipe import Generate

    writer = Writer(model, tokenizer, Generate(max_new_tokens=60))
    found = []
    for seed in range(5):
        began = time.perf_counter()
        tokens = writer.generate("La noche", seed=seed).tokens
        found.append(tokens / (time.perf_counter() - began))
    return statistics.median(found)


def install(args) -> None:
    """Copy a model into the package, its weights in bf16."""
    import torch

    from maese.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    for path in PACKAGE.iterdir():
        path.unlink()
    model.to(torch.bfloat16).save_pretrained(PACKAGE, safe_serialization=True)
    tokenizer.save_pretrained(PACKAGE)
    shutil.copy(BUILD / "manifest.json", PACKAGE)
    for path in PACKAGE.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    print(f"{PACKAGE}: {sum(p.stat().st_size for p in PACKAGE.iterdir()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    stage = stages.add_parser("measure")
    stage.add_argument("model", type=Path)
    stage.add_argument("--as", dest="name", default="second")
    stage.add_argument("--template", default="maese")
    stage.set_defaults(run=measure)
    stage = stages.add_parser("install")
    stage.add_argument("model", type=Path)
    stage.set_defaults(run=install)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
