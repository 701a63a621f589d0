"""What all contenders get: a model with random weights, its tokenizer, and the same rows as text and as ids.

    python benchmarks/peers/material.py '{"size": "14m", "out": "build/trainers/14m", "steps": 40, …}'

Rows are rendered once, by maese. From one draw of the file, sorted by length as length grouping would sort it, whole
batches are taken at even distances: few steps then have the lengths, and the little padding, that many would have.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meter import answer, read

DRAW = 50  # batches sorted together: what transformers does by default
HELD = 96  # rows kept apart to compare what was learnt

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 512},
    "14m": {"n_layer": 12, "n_embd": 256, "n_head": 4, "n_positions": 512, "vocab_size": 16_384},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024, "vocab_size": 50_257},
    "phi-2": {
        "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10_240,
        "partial_rotary_factor": 0.4, "max_position_embeddings": 2048, "vocab_size": 51_200,
    },
}  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    source = Path(job["data"]) / "instrucciones_train.jsonl" if job["data"] else made_up(out / "made_up.jsonl")
    model = out / "model"
    if not (model / "config.json").exists():
        said = tokenizer(job["size"], job["data"], source, model)
        (out / "tokenizer.txt").write_text(said, "utf-8")
        weights(job["size"], model, job["device"])
    facts = text_rows(job, source, model, out) if job["text"] else instructions(job, source, model, out)
    answer(facts | {"model": str(model), "tokenizer": (out / "tokenizer.txt").read_text("utf-8")})


def made_up(path: Path, rows: int = 6000) -> Path:
    """Instructions of made-up Spanish words, with the lengths of real ones; for machines without the real file."""
    chance = random.Random(1)
    words = ["la", "el", "de", "que", "casa", "niño", "corrió", "montaña", "señor", "luz", "agua", "camino", "sol"]
    with path.open("w", encoding="utf-8") as out:
        for i in range(rows):
            said = " ".join(chance.choices(words, k=min(400, round(chance.lognormvariate(3.6, 0.7)) + 3)))
            row = {"instruction": f"¿Qué pasó el día {i}?", "input": "", "output": f"{said.capitalize()} {i}."}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def tokenizer(size: str, data: str | None, source: Path, folder: Path) -> str:
    """Put a tokenizer in the folder of a model; says which. Ids beyond it are weights that no row names."""
    from maese.model.load import resolve
    from maese.tokens.train import train_tokenizer

    original = Path(data or "") / "tokenizers" / "gpt2"
    if size == "gpt2" and (original / "encoder.json").exists():
        from transformers import GPT2Tokenizer

        files = (str(original / "encoder.json"), str(original / "vocab.bpe"))
        GPT2Tokenizer(*files, pad_token="<|endoftext|>").save_pretrained(folder)
        return "GPT-2 (50,257)"
    if size == "14m" and data:
        texts = ("\n".join(row[key] for key in ("instruction", "input", "output")) for row in read(source))
        train_tokenizer(texts, SIZES[size]["vocab_size"], folder)
        return "trained on these instructions (16,384)"
    folder.mkdir(parents=True, exist_ok=True)
    for path in resolve("embedded").glob("tokenizer*"):
        shutil.copy(path, folder)
    return "the embedded one (8,192)"


def weights(size: str, folder: Path, device: str) -> None:
    """Random weights of that architecture, without dropout: two loops could not draw the same one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PhiConfig

    ids = AutoTokenizer.from_pretrained(folder)
    shape = {"vocab_size": len(ids), **SIZES[size]}
    ends = {"bos_token_id": ids.eos_token_id, "eos_token_id": ids.eos_token_id, "pad_token_id": ids.pad_token_id}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = (
        PhiConfig(**shape, **ends, **still) if size == "phi-2" else GPT2Config(**shape, **ends, **still, attn_pdrop=0.0)
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    if size in ("gpt2-xl", "phi-2"):
        model = model.bfloat16()
    model.save_pretrained(folder)


def instructions(job: dict[str, Any], source: Path, model: Path, out: Path) -> dict[str, Any]:
    from maese.model import load
    from maese.recipe import Source
    from maese.text.read import open_source
    from maese.tokens.encode import encoder_of
    from maese.tokens.template import open_template

    ids = load.load_tokenizer(model)
    renderer = open_template("instruccion", ids, encoder_of(ids).many)
    lengths = [len(example) for example in renderer.render_many(open_source(Source(path=str(source))))]
    fit = [i for i, length in enumerate(lengths) if length <= job["max_length"]]
    chosen, held = choose([lengths[i] for i in fit], job["steps"], job["batch"])
    lines = source.read_text("utf-8").splitlines()
    if len(lines) != len(lengths):
        raise SystemExit(f"{source} has {len(lines)} lines and {len(lengths)} rows")
    for name, some in (("rows", chosen), ("held", held)):
        (out / f"{name}.jsonl").write_text("\n".join(lines[fit[i]] for i in some) + "\n", "utf-8")
    data = {"sources": [{"path": str(out / "rows.jsonl")}], "template": "instruccion", "max_length": job["max_length"]}
    facts = write_ids(data, ids, out, "rows")
    write_ids(data | {"sources": [{"path": str(out / "held.jsonl")}]}, ids, out, "held")
    if facts["rows"] != len(chosen):
        raise SystemExit(f"{len(chosen)} rows were chosen and {facts['rows']} were prepared")
    return facts | {"left_out": round(1 - len(fit) / len(lengths), 4), "pad": load.pad_id(ids), "data": data}


def choose(lengths: Sequence[int], steps: int, batch: int) -> tuple[list[int], list[int]]:
    """(rows of so many batches, held-out rows): `choose(lengths, 10, 16)` gives 160 and 96 row numbers, shuffled."""
    chance = random.Random(7)
    order = list(range(len(lengths)))
    chance.shuffle(order)
    held, rest = order[:HELD], order[HELD:]
    draws = -(-steps // DRAW)
    drawn = sorted(rest[: draws * DRAW * batch], key=lambda i: lengths[i])
    batches = [drawn[i : i + batch] for i in range(0, len(drawn) - batch + 1, batch)]
    if len(batches) < steps:
        raise SystemExit(f"{len(lengths)} rows are too few for {steps} steps of {batch}")
    chosen = [row for k in range(steps) for row in batches[int((k + 0.5) * len(batches) / steps)]]
    chance.shuffle(chosen)
    return chosen, held


def text_rows(job: dict[str, Any], source: Path, model: Path, out: Path) -> dict[str, Any]:
    """Running text for a model from scratch: whole rows of `max_length` for the peers, the same text for maese."""
    from maese.model import load

    ids = load.load_tokenizer(model)
    texts = [" ".join(row[key] for key in ("instruction", "output")) for row in read(source)]
    batch = 64
    (out / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "\n".join(texts[i : i + batch])}) + "\n" for i in range(0, len(texts), batch)),
        "utf-8",
    )
    data = {
        "sources": [{"path": str(out / "rows.jsonl")}],
        "max_length": job["max_length"],
        "too_long": "split",
        "packing": True,
    }
    facts = write_ids(data, ids, out, "pieces")
    flat = [i for row in read(out / "pieces.ids.jsonl") for i in row["input_ids"]]
    size, needed = job["max_length"], job["steps"] * job["batch"]
    while len(flat) < (needed + 8) * size:
        flat += flat
    rows = [flat[i : i + size] for i in range(0, (needed + 8) * size, size)]
    for name, some in (("rows", rows[:needed]), ("held", rows[needed : needed + 8])):
        with (out / f"{name}.ids.jsonl").open("w") as file:
            file.writelines(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in some)
    return facts | {
        "tokens": needed * size,
        "rows": needed,
        "share": 1.0,
        "width": size,
        "pad": load.pad_id(ids),
        "data": data,
    }


def write_ids(data: dict[str, Any], tokenizer: Any, out: Path, name: str) -> dict[str, Any]:
    """The ids that maese itself will train on, for everybody; says how many tokens, and which share is learnt."""
    from maese.recipe import Data
    from maese.tokens.prepare import prepare

    rows = prepare(Data.model_validate(data | {"validation": 0.0}), tokenizer, data["max_length"]).train
    with (out / f"{name}.ids.jsonl").open("w") as file:
        for row in rows:
            labels = [i if learnt else -100 for i, learnt in zip(row.ids, row.mask, strict=True)]
            file.write(json.dumps({"input_ids": list(map(int, row.ids)), "labels": list(map(int, labels))}) + "\n")
    lengths = [len(row) for row in rows]
    tokens = sum(lengths)
    # What a token looks back on, on the average over tokens: attention costs by it.
    width = sum(n * n for n in lengths) / tokens
    return {
        "rows": len(rows),
        "tokens": tokens,
        "share": round(int(rows.targets.sum()) / tokens, 4),
        "width": round(width, 1),
    }


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
