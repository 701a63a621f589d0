"""What `maese plan` foretells of memory against what a run takes: each setting in a process of its own, right here.

    python benchmarks/plan.py --write                       all of them: an hour and 6 GiB
    python benchmarks/plan.py --only mini-full mini-lora    these alone; what was measured before stays in --out
    python benchmarks/plan.py --read --write                the table of what is in --out

The weights are random and the text is the sample that travels with maese, over and over, or its conversations:
what is measured is memory. A run takes thirty steps through the real loop, as what a process holds may grow where rows
have many lengths, with its validation, its best and its final folder; what it says it took (`peak_gib`) stands beside
what the plan said before it began, from the recipe and a config.json alone.
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
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 30
# GPT-2: layers, width, heads, vocabulary, context. The rest: the same, and what its family adds.
MODELS: dict[str, dict[str, Any]] = {
    "embedded": {"model_type": "qwen3", "layers": 8, "width": 256, "heads": 4, "inner": 704, "vocabulary": 10240},
    "nano": {"model_type": "qwen3", "layers": 4, "width": 192, "heads": 3, "inner": 512, "vocabulary": 10240},
    "small": {"model_type": "gpt2", "layers": 12, "width": 256, "heads": 4, "vocabulary": 16384},
    "mini": {"model_type": "qwen3", "layers": 8, "width": 384, "heads": 6, "inner": 1024, "vocabulary": 32000},
    "phi-like": {"model_type": "phi", "layers": 8, "width": 320, "heads": 5, "inner": 1280, "vocabulary": 16384},
    "base": {"model_type": "qwen3", "layers": 12, "width": 768, "heads": 12, "inner": 2048, "vocabulary": 32000},
    "gpt2": {"model_type": "gpt2", "layers": 12, "width": 768, "heads": 12, "vocabulary": 50257},
    "gpt2-drops": {"model_type": "gpt2", "layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "dropout": 0.1},
    "smollm2": {
        "model_type": "llama", "layers": 30, "width": 576, "heads": 9, "shared": 3, "inner": 1536, "vocabulary": 49152,
    },
}  # fmt: skip
CONTEXT = 1024
SCIENCE = "ciencia_y_programacion"
# The recipe `tutor`: rows of 60 to 450 tokens.
TUTOR: dict[str, Any] = {
    "data.max_length": 512, "train.micro_batch": 2, "train.accumulation": 2, "method.rank": 8, "method.dropout": 0.05,
    "conversations": "tutor",
}  # fmt: skip
# Each: the model, and what the recipe says otherwise than by default.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nano-full": ("nano", {"data.max_length": 128}),
    "small-full": ("small", {"data.max_length": 256, "train.micro_batch": 4}),
    "small-full-long": ("small", {"data.max_length": 1024, "train.micro_batch": 2, "train.accumulation": 1}),
    "small-full-checkpointing": (
        "small", {"data.max_length": 1024, "train.micro_batch": 2, "train.gradient_checkpointing": True},
    ),
    "small-full-fp32": ("small", {"data.max_length": 256, "train.micro_batch": 8, "train.precision": "fp32"}),
    "small-lora": ("small", {"data.max_length": 512, "train.micro_batch": 4, "method.kind": "lora"}),
    "small-qlora": ("small", {"data.max_length": 512, "train.micro_batch": 4, "method.kind": "qlora"}),
    "small-conversations": (
        "small",
        {"data.max_length": 256, "train.micro_batch": 8, "method.kind": "lora", "conversations": SCIENCE},
    ),
    "embedded-tutor": ("embedded", {**TUTOR, "method.kind": "lora"}),
    "embedded-tutor-qlora": ("embedded", {**TUTOR, "method.kind": "qlora"}),
    "mini-full": ("mini", {"data.max_length": 256, "train.micro_batch": 4, "train.accumulation": 2}),
    "mini-muon-packed": (
        "mini", {"data.max_length": 512, "train.micro_batch": 4, "train.optimizer": "muon", "data.packing": True},
    ),
    "mini-lora": ("mini", {"data.max_length": 512, "train.micro_batch": 4, "method.kind": "lora"}),
    "phi-like-lora": (
        "phi-like",
        {"data.max_length": 512, "train.micro_batch": 2, "method.kind": "lora", "method.targets": ["q_proj", "dense"]},
    ),
    "phi-like-qlora-checkpointing": (
        "phi-like",
        {
            "data.max_length": 512, "train.micro_batch": 2, "method.kind": "qlora",
            "train.gradient_checkpointing": True, "train.optimizer": "paged32",
        },
    ),
    "phi-like-full": ("phi-like", {"data.max_length": 512, "train.micro_batch": 2}),
    "base-full": ("base", {"data.max_length": 512, "train.micro_batch": 4, "train.accumulation": 2}),
    "gpt2-full": ("gpt2", {"data.max_length": 256, "train.micro_batch": 4, "train.accumulation": 2}),
    "gpt2-full-checkpointing": (
        "gpt2", {"data.max_length": 512, "train.micro_batch": 4, "train.gradient_checkpointing": True},
    ),
    "gpt2-full-drops": ("gpt2-drops", {"data.max_length": 256, "train.micro_batch": 4, "train.accumulation": 2}),
    "gpt2-lora": ("gpt2", {"data.max_length": 256, "train.micro_batch": 4, "method.kind": "lora"}),
    "gpt2-lora-long": (
        "gpt2",
        {"data.max_length": 1024, "train.micro_batch": 2, "method.kind": "lora", "train.gradient_checkpointing": True},
    ),
    "smollm2-tutor": ("smollm2", {**TUTOR, "method.kind": "lora"}),
    "smollm2-lora": ("smollm2", {"data.max_length": 512, "train.micro_batch": 2, "method.kind": "lora"}),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """The config.json of one of MODELS."""
    row = MODELS[name]
    kind, width, layers, heads = row["model_type"], row["width"], row["layers"], row["heads"]
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": row["vocabulary"]}
    if kind == "gpt2":
        drop = row.get("dropout", 0.0)
        drops = {"resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
        sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": CONTEXT, **drops}
    else:
        sizes = {
            "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": row.get("shared", heads), "intermediate_size": row["inner"],
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": kind != "phi", "resid_pdrop": 0.0,
        }  # fmt: skip
        sizes |= {"head_dim": width // heads} if kind == "qwen3" else {}
    return {"model_type": kind, **sizes, **ends}


def make(name: str, folder: Path) -> None:
    """A folder that `base:` takes, of one of MODELS, with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from maese.model.load import quiet, resolve

    quiet()
    torch.manual_seed(0)
    said = config_of(name)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(said.pop("model_type"), **said)).save_pretrained(folder)
    for path in resolve("embedded").glob("tokenizer*"):
        shutil.copy(path, folder)


def recipe_of(name: str, room: Path) -> list[str]:
    """The changes to a recipe that is written in `room`, whose base lies there too."""
    import yaml

    from maese.recipe import shipped

    _, changes = SETTINGS[name]
    changes = dict(changes)
    if talks := changes.pop("conversations", None):
        path = shipped(f"data/{talks}.jsonl")
        data: dict[str, Any] = {"sources": [{"path": str(path)}], "template": "maese"}
    else:
        path = room / "text.txt"
        sample = shipped("data/quijote_muestra.txt").read_text("utf-8")
        path.write_text("".join(f"Vuelta {i}.\n{sample}\n" for i in range(8)), "utf-8")
        data = {"sources": [{"path": str(path)}], "format": "text", "too_long": "split", "validation": 0.05}
    recipe = {"name": "plan", "base": str(room / "model"), "data": data, "train": {"max_steps": STEPS}}
    (room / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def measure(name: str) -> dict[str, Any]:
    """What the run of a setting took, and what it had said that it would."""
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        alone([__file__, "--make", SETTINGS[name][0], str(room / "model")])
        changes = [*recipe_of(name, room), f"output={room / 'run'}"]
        alone(["-m", "maese", "-q", "train", str(room / "recipe.yaml"), *changes], MAESE_CACHE=str(room / "cache"))
        events = [json.loads(line) for line in (room / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    plan = next(event for event in events if event["type"] == "plan")
    end = next(event for event in events if event["type"] == "end")
    return {
        "name": name, "parameters": plan["parameters"], "changes": SETTINGS[name][1], "precision": plan["precision"],
        "measured": end["peak_gib"], "told_by_run": plan.get("estimated_gib"),
    }  # fmt: skip


def planned(row: dict[str, Any]) -> Any:
    """What the plan says of a setting that was measured: from its recipe and its config.json, and nothing else."""
    from maese.plan.memory import estimate, job_of
    from maese.plan.shape import anatomy, parameters
    from maese.recipe import load

    shape = anatomy(config_of(SETTINGS[row["name"]][0]))
    with tempfile.TemporaryDirectory() as temporary:
        changes = recipe_of(row["name"], Path(temporary))
        recipe = load(Path(temporary) / "recipe.yaml", changes)
    return estimate(shape, job_of(recipe, row["precision"], "cpu"), file=4 * parameters(shape))


def alone(words: list[str], **more: str) -> None:
    """Run it in a process of its own, whose peak of memory is then its alone."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | more
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def show(row: dict[str, Any]) -> None:
    told = planned(row)
    row = row | {"predicted": told.peak / 2**30}
    print(
        f"{row['name']}: {row['predicted']:.3f} GiB planned, {row['measured']:.3f} taken, {percent(row, 'predicted')}"
    )
    print("   " + ", ".join(f"{part} {size / 2**30:.3f}" for part, size in told.parts), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each setting, and what the errors are over all."""
    known = ("method.kind", "data.max_length", "train.micro_batch", "train.accumulation")
    lines = [
        f"- {STEPS} steps of the real loop each, random weights, with validation and final/; {machine()}",
        "- «planned»: from the recipe and a config.json, every row as long as it may be; «told»: what the run says"
        " before it begins, which knows its rows and what its process holds already",
        f"- {len(rows)} settings: {errors_of(rows, 'predicted', 'planned')}; {errors_of(rows, 'told_by_run', 'told')}",
        "",
        "| setting | parameters | method | precision | length | batch | else | planned GiB | told | measured |"
        " planned | told |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = row["changes"]
        batch = f"{said.get('train.micro_batch', 2)} × {said.get('train.accumulation', 4)}"
        rest = [f"{key.split('.')[-1]}: {value}" for key, value in said.items() if key not in known]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {said.get('method.kind', 'full')} | {row['precision']} |"
            f" {said['data.max_length']} | {batch} | {', '.join(rest) or '–'} | {row['predicted']:.2f} |"
            f" {'–' if row['told_by_run'] is None else format(row['told_by_run'], '.2f')} | {row['measured']:.2f} |"
            f" {percent(row, 'predicted')} | {percent(row, 'told_by_run')} |"
        )
    return "\n".join(lines)


def percent(row: dict[str, Any], key: str) -> str:
    """How far a figure is from what was measured; a dash where nobody gave it."""
    return "–" if row[key] is None else f"{row[key] / row['measured'] - 1:+.1%}"


def errors_of(rows: list[dict[str, Any]], key: str, name: str) -> str:
    """The largest and the usual error over all settings that have that figure."""
    sizes = [abs(row[key] / row["measured"] - 1) for row in rows if row[key] is not None]
    if not sizes:
        return f"{name}: none"
    middle = statistics.median(sizes)
    return f"{name}, the largest error is {max(sizes):.1%} and the median {middle:.1%} (n = {len(sizes)})"


def machine() -> str:
    import datetime

    from maese.plan.machine import cpu_name

    name = " ".join(cpu_name().split()[:2])
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, {datetime.date.today().isoformat()}"


def main() -> None:
    args = arguments()
    if args.make:
        make(args.make[0], Path(args.make[1]))
        return
    known: dict[str, dict[str, Any]] = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in [] if args.read else args.only:
        known[name] = measure(name)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(known, indent=1), "utf-8")
        show(known[name])
    text = table([known[name] | {"predicted": planned(known[name]).peak / 2**30} for name in SETTINGS if name in known])
    print("\n" + text)
    if args.write:
        from trainers import write

        write("plan", text)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--out", type=Path, default=Path("build/plan/results.json"))
    parser.add_argument("--read", action="store_true", help="measure nothing: the table of what is in --out")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
