"""Train the personalities that travel with maese, each from its recipe, and put them into the package.

    python scripts/personas.py train                    build/personas/NAME: three runs over embedded-instruct
    python scripts/personas.py train narrador           only some
    python scripts/personas.py install                  adapters in bf16, with their notes and a card each

In: recipes/, data/ and the model of the package that answers. Out: src/maese/embedded/personas/NAME/. Every figure of a
card is read from the events of its run or measured here, with the weights as they are shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from embedded import es

from maese import recipe as recipes
from maese.generate.engine import Writer, open_folder, open_writer
from maese.generate.personas import PERSONAS, open_company
from maese.model import adapter, load
from maese.model.fingerprint import parameters
from maese.run import Run
from maese.say import duration

BUILD = Path("build/personas")
RECIPES = {"algoritmos": "tutor", "socratico": "socratico", "narrador": "narrador"}
BASE = "embedded-instruct"
MOST = 3_000_000  # bytes of one personality
CARD = Path(__file__).parent / "persona-card.md"
WEIGHTS = "adapter_model.safetensors"


def train(args: argparse.Namespace) -> None:
    from maese.live import watcher
    from maese.terminal import write_papers
    from maese.train.loop import train as learn

    for name in args.names or RECIPES:
        with watcher() as watch:
            run = learn(recipes.load(RECIPES[name], [f"output={BUILD / name}"]), watch=watch)
        write_papers(run)
        print(run.path)


def install(args: argparse.Namespace) -> None:
    for name in args.names or RECIPES:
        run, folder = Run(BUILD / name), PERSONAS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        put(run, folder, name)
        (folder / "MODEL_CARD.md").write_text(card(run, folder, name), encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.iterdir())
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
        if size > MOST:
            raise SystemExit(f"{folder}: {size:,} bytes, more than {MOST:,}")
        print(f"{folder}: {size / 1e6:.2f} MB")


def put(run: Run, folder: Path, name: str) -> None:
    """The adapter of a run in bf16, with what PEFT and maese need to know of it; its tokenizer is that of the base."""
    import torch
    from safetensors.torch import load_file, save_file

    rounded = {key: value.to(torch.bfloat16) for key, value in load_file(run.final / WEIGHTS).items()}
    save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((run.final / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = BASE  # its folder is another on every machine
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    about = adapter.about_adapter(run.final) | {"name": name, "base": BASE}
    (folder / adapter.ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    below = load.resolve(BASE)
    model = adapter.attach(load.load_model(below), folder, below)
    for key, value in model.state_dict().items():  # PEFT reopens them, wider, with not one value changed
        saved = rounded.get(key.replace(".default.", "."))
        if ".lora_" in key and (saved is None or not torch.equal(value, saved.float())):
            raise SystemExit(f"{folder}: PEFT reopens {key} as another")


def card(run: Run, folder: Path, name: str) -> str:
    """What was trained and measured, and how it answers the questions of its recipe."""
    recipe, events = run.recipe(), run.history()
    plan = next(e for e in events if e["type"] == "plan")
    losses = [e["loss"] for e in events if e["type"] == "validation"]
    learnt = [e["loss"] for e in events if e["type"] == "step"]
    elsewhere = [e["bits_per_byte"] for e in events if e["type"] == "general"]
    ended = next(e for e in reversed(events) if e["type"] == "end")
    company = open_company(BASE, [str(folder)])
    writer = company.guests[0]
    base = company.base(writer)
    samples = []
    for question in recipe.eval.prompts:
        said = [one.generate(question, temperature=0.0).text.strip() for one in (writer, base)]
        lines = [f"**{question}**", f"{name}: {said[0]}", f"base: {said[1]}"]
        samples.append("\n>\n".join("> " + line.replace("\n", "\n> ") for line in lines))
    every, _ = parameters(open_folder(load.resolve(BASE))[0])
    return CARD.read_text("utf-8").format(
        name=name, voice=recipe.generate.system, rank=recipe.method.rank, recipe=recipe.name,
        source=recipe.data.sources[0].path, general=recipe.eval.general, parameters=es(every),
        trained=es(plan["trainable"]), trained_en=f"{plan['trainable']:,}", parameters_en=f"{every:,}",
        share=es(100 * plan["trainable"] / every, 1),
        size=es((folder / WEIGHTS).stat().st_size / 1e3), rows=es(plan["rows"]), held=es(plan["validation_rows"]),
        tokens=es(ended["tokens"]), steps=es(ended["final_step"]), time=duration(ended["seconds"]),
        first=es(sum(learnt[:10]) / 10, 3), learnt=es(sum(learnt[-10:]) / 10, 3),
        before=es(losses[0], 3), after=es(losses[-1], 3), general_before=es(elsewhere[0], 3),
        general_after=es(elsewhere[-1], 3), rounding=es(rounding(run, writer, recipe.eval.prompts), 3),
        samples="\n\n".join(samples),
    )  # fmt: skip


def rounding(run: Run, writer: Writer, questions: list[str]) -> float:
    """The largest difference between the logits of the weights as trained and as shipped, over the questions."""
    import torch

    from maese.model.voices import speaking

    whole, largest = open_writer(run), 0.0
    for question in questions:
        ids = torch.tensor([writer.prompt_ids(question)], device=writer.model.device)
        with torch.inference_mode():
            trained = whole.model(input_ids=ids, use_cache=False).logits
            with speaking(writer.model, [writer.voice or ""]):
                shipped = writer.model(input_ids=ids, use_cache=False).logits
        largest = max(largest, float((trained - shipped).abs().max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for work in (train, install):
        stage = stages.add_parser(work.__name__)
        stage.add_argument("names", nargs="*", choices=[*RECIPES, []], metavar="NAME")
        stage.set_defaults(run=work)
    args: Any = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
