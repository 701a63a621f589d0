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

from maese.generate.engine import Writer
from maese.recipe import Generate
from maese.report.facts import facts
from maese.run import Run

BUILD = Path("build/embedded")
PACKAGE = Path("src/maese/embedded")
SETS = ("authors", "centuries", "technical", "sentences", "instructions")
CONTEXT = 512


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
    for parameter in model.parameters():  # rounded, as they are shipped
        parameter.data = parameter.data.bfloat16().float()
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
    writer = Writer(model, tokenizer, Generate(max_new_tokens=60))
    found = []
    for seed in range(5):
        began = time.perf_counter()
        tokens = writer.generate("La noche", seed=seed).tokens
        found.append(tokens / (time.perf_counter() - began))
    return statistics.median(found)


def card(model, tokenizer) -> str:
    """The model card, every figure in it read from what was measured and from the runs' own events."""
    first, second = (json.loads((BUILD / f"scores-{name}.json").read_text()) for name in ("first", "second"))
    manifest = json.loads((BUILD / "manifest.json").read_text())
    runs = [Run(BUILD / "run" / "pretrain"), Run(BUILD / "end")]
    trained = [facts(run) for run in runs]
    rows = []
    for name, now in second["bits_per_byte"].items():
        was, value = first["bits_per_byte"][name]["value"], now["value"]
        change = es(100 * (value / was - 1), 1)
        rows.append(f"| {WHAT[name]} | {es(now['bytes'])} | {es(was, 3)} | {es(value, 3)} | {change} % |")
    licenses = "\n".join(
        f"| {KINDS[kind]} | {license} | {es(size / 1e6, 1)} |"
        for kind, found in manifest["licenses"].items()
        for license, size in found.items()
    )
    right, asked = (sum(n[i] for n in second["pairs"].values()) for i in (0, 1))
    writer = Writer(model, tokenizer, Generate(max_new_tokens=40, temperature=0.8))
    config = model.config
    return CARD.format(
        parameters=f"{second['parameters']:,}", parametros=es(second["parameters"]), layers=config.num_hidden_layers,
        width=config.hidden_size, heads=config.num_attention_heads, context=CONTEXT, vocabulary=es(len(tokenizer)),
        tokens=es(sum(f["tokens"] for f in trained) / 1e6, 1), steps=es(sum(f["steps"] for f in trained)),
        hours=es(sum(f["seconds"] for f in trained) / 3600, 1), sets="\n".join(rows), licenses=licenses, right=right,
        asked=asked,
        works=len(manifest["works"]), speed=es(second["tokens_s"]),
        bpb=f"{second['bits_per_byte']['authors']['value']:.3f}",
        samples="\n\n".join(f"> **{start}**{writer.generate(start, seed=1605).text}" for start in STARTS),
    )  # fmt: skip


def es(value: float, decimals: int = 0) -> str:
    """A number as it is written in Spanish: `es(1234.5, 1)` is «1.234,5»."""
    return f"{value:,.{decimals}f}".translate(str.maketrans(",.", ".,"))


WHAT = {
    "authors": "obras de ocho autores que no ha leído", "centuries": "obras de los siglos XVI y XVII, que no ha leído",
    "technical": "documentación técnica de hoy", "sentences": "oraciones sueltas de hoy",
    "instructions": "respuestas a instrucciones",
}  # fmt: skip
KINDS = {
    "literature": "literatura", "technical": "técnica", "sentences": "oraciones (Tatoeba)", "proverbs": "refranes",
    "laws": "leyes de Argentina y Uruguay", "bible": "Reina-Valera 1909", "instructions": "instrucciones",
}  # fmt: skip
STARTS = ("La noche", "El capitán", "Para instalar el programa", "Mi hermana")
CARD = """---
language: es
license: mit
pipeline_tag: text-generation
---
# El modelo incluido en maese, segunda edición

*In English: a {parameters}-parameter Qwen3-type model trained from scratch on two CPU cores, on Spanish literature
in the public domain (Cervantes left out), technical documentation, sentences, laws and instructions. It continues
text; what it says is not true. {bpb} bits per byte on works by eight authors it never read.*

Un modelo pequeño de español para empezar sin descargar nada. Continúa texto; no sabe hechos.

| | |
|---|---|
| arquitectura | la de Qwen3: {layers} capas, {width} de ancho, {heads} cabezas, contexto de {context} tokens |
| parámetros | {parametros} (pesos en bf16) |
| tokenizador | BPE de bytes, {vocabulary} tokens |
| entrenado con | {tokens} M de tokens en {steps} pasos, con Muon y AdamW |
| coste | {hours} h en 2 núcleos de CPU, compartidos con otro trabajo |
| velocidad | {speed} tokens por segundo al escribir, con un núcleo |
| receta | `scripts/embedded_corpus.py`, `scripts/embedded.yaml`, `scripts/embedded-end.yaml` |

## Qué tan bien predice lo que no ha leído

Bits por byte (menos es mejor), con los pesos tal como se incluyen; ventanas de {context} tokens que avanzan de
media en media.

| datos apartados | bytes | primera edición | esta | cambio |
|---|---|---|---|---|
{sets}

Pares mínimos de `evaluate/pairs.toml`: prefiere la oración correcta en {right} de {asked}.

## Ejemplos, sin escoger

{samples}

## Datos

{works} obras de literatura, de cada autor 0,5 MB como mucho (0,12 de las que tienen la ortografía de antes de
1911), y lo de la tabla. Fuera: Cervantes, las obras que comparten más de 20 series de ocho palabras con el Quijote,
los autores apartados y los anteriores a 1700. Todo, con autor, licencia y SHA-256, en `manifest.json`. Las obras
con licencia CC-BY o CC-BY-SA se atribuyen a sus autores, que allí se nombran.

| clase | licencia | MB |
|---|---|---|
{licenses}

## Límites

Es muy pequeño y ha leído poco: pierde el hilo en una o dos oraciones, inventa nombres y hechos, y mezcla la
ortografía de hoy con la de antes. La literatura de los siglos XVIII a XX trae las ideas de su tiempo sobre mujeres,
pueblos y religiones, y el modelo puede repetirlas. No sirve para informarse ni para decidir nada. Licencia de los
pesos: MIT.
"""


def install(args) -> None:
    """Copy a model into the package, its weights in bf16, with its card."""
    import torch

    from maese.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    text = card(model, tokenizer)
    for path in PACKAGE.iterdir():
        path.unlink()
    (PACKAGE / "MODEL_CARD.md").write_text(text, encoding="utf-8")
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
