"""Measure the models that scripts/embedded.yaml and the recipes that follow it made, and put them into the package.

    python scripts/embedded.py measure build/embedded/first --as first          the edition before, for comparison
    python scripts/embedded.py measure build/embedded/end/final --as base       bits per byte, minimal pairs, speed
    python scripts/embedded.py measure build/embedded/again/final --as instruct --talks
    python scripts/embedded.py install                                          weights in bf16, cards, manifest

In: build/embedded/ as scripts/embedded_corpus.py and the training left it. Out: build/embedded/scores-NAME.json, and
src/maese/embedded/. Every figure of the cards is read from what was measured, with the weights as they are shipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from maese.generate.engine import Writer
from maese.recipe import INSIDE, Generate
from maese.run import Run

BUILD = Path("build/embedded")
SETS = ("authors", "centuries", "technical", "sentences", "instructions")
CONTEXT = 512
ASKED = 200  # held-out instructions that are answered


def held(name: str) -> list[dict]:
    return [json.loads(line) for line in (BUILD / "held" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def question(row: dict) -> str:
    return "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)


def rows_of(name: str, tokenizer: Any, talks: bool) -> list:
    """Examples to measure on: windows that overlap by half, so that each token counts once, with enough before it.

    Of an instruction only the answer counts: after the template's marks in a model that talks, after a new line in one
    that continues prose, which is how it read them.
    """
    from maese.evaluate.ability import whole_text
    from maese.text.record import Conversation, Message
    from maese.tokens.settle import pieces
    from maese.tokens.template import Example, encode, open_template

    if name != "instructions":
        whole = (whole_text(tokenizer, row["text"]) for row in held(name))
        return [piece for one in whole for piece in pieces(one, CONTEXT, CONTEXT // 2)]
    found = []
    for row in held(name):
        if talks:
            talk = Conversation((Message("user", question(row)), Message("assistant", row["output"])), "")
            example = open_template("maese", tokenizer).render(talk)
        else:
            before = [tokenizer.bos_token_id, *encode(tokenizer, question(row) + "\n")]
            answer = encode(tokenizer, row["output"])
            example = Example(before + answer, [0] * len(before) + [1] * len(answer))
        found += [example] if len(example) <= CONTEXT else []
    return found


def measure(args: argparse.Namespace) -> None:
    """Bits per byte on every set, minimal pairs, the speed of writing and, of one that talks, how it answers."""
    from maese.evaluate.ability import bits_per_byte, minimal_pairs
    from maese.generate.engine import open_folder

    model, tokenizer = open_folder(args.model)
    for parameter in model.parameters():  # rounded, as they are shipped
        parameter.data = parameter.data.bfloat16().float()
    scores: dict = {"parameters": sum(p.numel() for p in model.parameters()), "bits_per_byte": {}}
    for name in SETS:
        found = bits_per_byte(model, tokenizer, rows_of(name, tokenizer, args.talks))
        scores["bits_per_byte"][name] = {"value": found.per_byte, "bytes": found.bytes, "tokens": found.tokens}
        print(f"{name:13} {found.per_byte:.4f} bits per byte, {found.bytes:,} bytes", flush=True)
    scores["pairs"] = minimal_pairs(model, tokenizer)
    print({kind: f"{right}/{n}" for kind, (right, n) in scores["pairs"].items()})
    scores["tokens_s"] = speed(model, tokenizer)
    print(f"writes {scores['tokens_s']:.0f} tokens a second")
    if args.talks:
        scores["answers"] = talk(model, tokenizer)
    (BUILD / f"scores-{args.name}.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False), "utf-8")


def talk(model: Any, tokenizer: Any) -> dict:
    """How it answers the first held-out instructions, and in what language where Spanish is what was asked for."""
    from maese.evaluate.ability import answers
    from maese.text.language import language_of

    writer = Writer(model, tokenizer, Generate(max_new_tokens=200), "messages", "maese")
    fitting = (row for row in held("instructions") if len(writer.prompt_ids(question(row))) <= CONTEXT - 200)
    asked = list(itertools.islice(fitting, ASKED))
    found = answers(writer, [question(row) for row in asked])
    both = [(language_of(row["output"]), language_of(said)) for row, said in zip(asked, found.said, strict=True)]
    told = [ours for right, ours in both if right == "es" and ours is not None]
    result = {
        "asked": found.asked, "ended": found.ended, "told": len(told), "spanish": told.count("es"),
        "said": [row | {"said": said} for row, said in zip(asked, found.said, strict=True)],
        "exact": sum(row["output"].strip() == said.strip() for row, said in zip(asked, found.said, strict=True)),
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "said"})
    return result


def speed(model: Any, tokenizer: Any) -> float:
    """Tokens a second written one at a time, the median of five goes of 60."""
    writer = Writer(model, tokenizer, Generate(max_new_tokens=60))
    found = []
    for seed in range(5):
        began = time.perf_counter()
        tokens = writer.generate("La noche", seed=seed).tokens
        found.append(tokens / (time.perf_counter() - began))
    return statistics.median(found)


def trained() -> dict[str, float]:
    """What the weights that ship have read: of each run before the last, up to where the next began."""
    run, until = Run(BUILD / "end"), 1 << 30
    parts = []
    while True:
        parts.append(read_by(run, until))
        base = Path(str(run.recipe().base))
        if base.parent.name != "checkpoints":
            return together(parts)
        run, until = Run(base.parents[1]), int(base.name.rsplit("-", 1)[-1])


def together(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def read_by(run: Run, until: int) -> dict[str, float]:
    """Tokens, steps and seconds of a training up to a step."""
    steps = [event for event in run.history() if event["type"] == "step" and event["step"] <= until]
    return {"tokens": sum(e["tokens"] for e in steps), "steps": len(steps), "seconds": steps[-1]["seconds"]}


def es(value: float, decimals: int = 0) -> str:
    """A number as it is written in Spanish: `es(1234.5, 1)` is «1.234,5»."""
    return f"{value:,.{decimals}f}".translate(str.maketrans(",.", ".,"))


def sets(first: dict, second: dict) -> str:
    rows = []
    for name, now in second["bits_per_byte"].items():
        was, value = first["bits_per_byte"][name]["value"], now["value"]
        change = f"{100 * (value / was - 1):+.1f}".replace("-", "−").replace(".", ",")
        rows.append(f"| {WHAT[name]} | {es(now['bytes'])} | {es(was, 3)} | {es(value, 3)} | {change} % |")
    return "\n".join(rows)


def read_scores(name: str) -> dict:
    return json.loads((BUILD / f"scores-{name}.json").read_text("utf-8"))


def base_card(model: Any, tokenizer: Any) -> str:
    """The card of the model that continues prose: what was measured, and what its runs' events say."""
    first, base, manifest = read_scores("first"), read_scores("base"), json.loads((BUILD / "manifest.json").read_text())
    licenses = "\n".join(
        f"| {KINDS[kind]} | {LICENSES.get(license, license)} | {es(size / 1e6, 1) if size >= 50_000 else '<0,1'} |"
        for kind, found in manifest["licenses"].items()
        for license, size in found.items()
    )
    writer, config, read = Writer(model, tokenizer, Generate(max_new_tokens=40)), model.config, trained()
    return CARD.read_text("utf-8").format(
        parameters=f"{base['parameters']:,}", parametros=es(base["parameters"]), layers=config.num_hidden_layers,
        width=config.hidden_size, heads=config.num_attention_heads, context=CONTEXT, vocabulary=es(len(tokenizer)),
        tokens=es(read["tokens"] / 1e6, 1), steps=es(read["steps"]), hours=es(read["seconds"] / 3600, 1),
        sets=sets(first, base), licenses=licenses, right=sum(n[0] for n in base["pairs"].values()),
        asked=sum(n[1] for n in base["pairs"].values()), works=len(manifest["works"]), speed=es(base["tokens_s"]),
        bpb=f"{base['bits_per_byte']['authors']['value']:.3f}",
        samples="\n\n".join(f"> **{start}**{writer.generate(start, seed=1605).text}" for start in STARTS),
    )  # fmt: skip


def instruct_card(model: Any, tokenizer: Any) -> str:
    """The card of the one that answers, with questions of ours as it answered them."""
    base, scores = read_scores("base"), read_scores("instruct")
    found = scores["answers"]
    writer = Writer(model, tokenizer, Generate(temperature=0.0, repetition_penalty=1.0), "messages", "maese")
    said = [(text, writer.generate(text).text.strip()) for text in QUESTIONS]
    was, now = (some["bits_per_byte"]["instructions"]["value"] for some in (base, scores))
    read = together([read_by(Run(BUILD / taught), 1 << 30) for taught in ("instruct", "again")])
    return INSTRUCT_CARD.read_text("utf-8").format(
        parameters=f"{scores['parameters']:,}", parametros=es(scores["parameters"]),
        steps=es(read["steps"]), was=es(was, 3), now=es(now, 3),
        was_en=f"{was:.3f}", now_en=f"{now:.3f}",
        tokens=es(read["tokens"] / 1e6, 1), minutes=es(read["seconds"] / 60),
        change=es(100 * (now / was - 1), 1).replace("-", "−"), sets=sets(base, scores),
        asked=found["asked"], ended=es(100 * found["ended"] / found["asked"], 1), told=found["told"],
        spanish=es(100 * found["spanish"] / max(1, found["told"]), 1), exact=found["exact"],
        samples="\n\n".join("\n".join(["> " + line for line in f"**{a}**\n\n{b}".split("\n")]) for a, b in said),
    )  # fmt: skip


ROOT = Path(__file__).parent
CARD, INSTRUCT_CARD = ROOT / "embedded-card.md", ROOT / "embedded-instruct-card.md"
WHAT = {
    "authors": "obras de ocho autores que no ha leído", "centuries": "obras de los siglos XVI y XVII, que no ha leído",
    "technical": "documentación técnica de hoy", "sentences": "oraciones sueltas de hoy",
    "instructions": "respuestas a instrucciones",
}  # fmt: skip
KINDS = {
    "literature": "literatura", "old": "literatura anterior a 1700", "technical": "técnica",
    "sentences": "oraciones (Tatoeba)", "proverbs": "refranes",
    "laws": "leyes de Argentina y Uruguay", "bible": "Reina-Valera 1909", "instructions": "instrucciones",
}  # fmt: skip
LICENSES = {
    "public domain": "dominio público", "public domain (US)": "dominio público (EE. UU.)",
    "Public Domain Mark 1.0": "dominio público (marca 1.0)",
    "text PD, markup CC-BY 4.0": "texto en dominio público, marcado CC-BY 4.0",
    "CC-BY 4.0 (texts PD)": "CC-BY 4.0 (textos en dominio público)",
}  # fmt: skip
STARTS = ("La noche", "El capitán", "Para instalar el programa", "Mi hermana")
QUESTIONS = (
    "Hola", "¿Quién eres?", "¿Quién ganó el partido de anoche?", "Traduce al inglés: La puerta está abierta.",
    "Corrige la ortografía de esta oración.\nayer fuimos a el mercado y compre naranjas",
    "¿Qué sinónimos tiene «alegre»?", "Escribe una oración sobre la lluvia.", "¿Cuál es la capital de Mongolia?",
    "¿Qué significa el refrán «A quien madruga, Dios le ayuda»?",
    "¿Cómo cuento las líneas de un archivo en la terminal?",
)  # fmt: skip


def install(_args: argparse.Namespace) -> None:
    """Copy both models into the package, their weights in bf16, each with its card.

    The personalities go with the base they were trained over: scripts/personas.py makes and puts them back.
    """
    import torch

    from maese.model.load import load_model, load_tokenizer

    shutil.rmtree(INSIDE["embedded"])
    for name, made, card in (("embedded", "end", base_card), ("embedded-instruct", "again", instruct_card)):
        folder = INSIDE[name]
        model, tokenizer = (opened(BUILD / made / "final") for opened in (load_model, load_tokenizer))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "MODEL_CARD.md").write_text(card(model, tokenizer), encoding="utf-8")
        model.generation_config.max_new_tokens = Generate().max_new_tokens  # samples on the way were shorter
        model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    scores = {name: read_scores(name) for name in ("first", "base", "instruct")}
    del scores["instruct"]["answers"]["said"]
    (INSIDE["embedded"] / "scores.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.copy(BUILD / "manifest.json", INSIDE["embedded"])
    files = [path for path in INSIDE["embedded"].rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes for its owner alone
    print(f"{INSIDE['embedded']}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    stage = stages.add_parser("measure")
    stage.add_argument("model", type=Path)
    stage.add_argument("--as", dest="name", required=True, choices=("first", "base", "instruct"))
    stage.add_argument("--talks", action="store_true", help="it was taught to answer, with maese's template")
    stage.set_defaults(run=measure)
    stages.add_parser("install").set_defaults(run=install)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
