"""How long data take from a file to packed rows, each stage in a process of its own: seconds and peak memory.

    python benchmarks/data.py --data ../data        a folder with instrucciones_train.jsonl and literatura_es.jsonl.zst

Without the folder the rows are made up, so that it runs anywhere; made-up figures are marked with an asterisk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DOCUMENTS = 50_000
PAGE = 2_000  # characters of a document in the search for near-duplicates


def audit(path: str) -> str:
    from maese.model import load
    from maese.recipe import Data, Source
    from maese.tokens.check import check

    source = Source(path=path)
    data = Data(sources=[source], max_length=512, too_long="truncate")
    found = check(source, data, load.load_tokenizer(load.resolve("embedded")))
    return f"{found.rows} rows, {found.tokens} tokens, {found.health}"


def pack(path: str) -> str:
    from maese.model import load
    from maese.recipe import Data, Source
    from maese.tokens.encode import encoder_of
    from maese.tokens.pack import best_fit, filled
    from maese.tokens.prepare import prepare

    tokenizer = load.load_tokenizer(load.resolve("embedded"))
    engine = encoder_of(tokenizer).engine
    data = Data(sources=[Source(path=path)], max_length=512, too_long="truncate", packing=True)
    rows = prepare(data, tokenizer, 512).train
    bins = best_fit(rows.lengths, 512, seed=42, epoch=0)
    return f"{engine}; {len(rows)} examples in {len(bins)} rows of 512, {filled(bins, rows.lengths, 512):.2%} filled"


def encode_and_pack(path: str) -> str:
    """Only tokenizing and packing: rendering, ids, masks, rows; no audit, no files."""
    import numpy as np

    from maese.model import load
    from maese.recipe import Source
    from maese.text.read import open_source
    from maese.tokens.encode import encoder_of
    from maese.tokens.pack import best_fit, filled
    from maese.tokens.template import open_template

    tokenizer = load.load_tokenizer(load.resolve("embedded"))
    renderer = open_template("plain", tokenizer, encoder_of(tokenizer).many)
    rendered = renderer.render_many(open_source(Source(path=path)))
    lengths = np.array([min(512, len(example)) for example in rendered])
    bins = best_fit(lengths, 512, seed=42, epoch=0)
    return f"{lengths.sum()} tokens, {filled(bins, lengths, 512):.2%} filled"


def near(path: str) -> str:
    from maese.recipe import Source
    from maese.text.dedup import Duplicates
    from maese.text.read import open_source, texts_of

    seen, count = Duplicates(), 0
    for item in open_source(Source(path=path)):
        text = "\n".join(texts_of(item))
        for start in range(0, len(text), PAGE):
            if count < DOCUMENTS:
                seen.add(str(count), text[start : start + PAGE])
                count += 1
        if count >= DOCUMENTS:
            break
    return f"{count} documents, {len(seen.dropped())} repeated"


def doctor_short(path: str) -> str:
    from maese.recipe import Source
    from maese.text.audit import audit as look
    from maese.text.read import open_source

    found = look(open_source(Source(path=path)))
    return f"{found.rows} short rows, {found.health}"


def made_up(path: Path, rows: int, letters: int) -> Path:
    chance = random.Random(1)
    words = ["la", "el", "de", "que", "casa", "niño", "corrió", "montaña", "señor", "luz", "agua", "camino", "sol"]
    with path.open("w", encoding="utf-8") as out:
        for i in range(rows):
            said = " ".join(chance.choices(words, k=letters // 5))
            row = {"instruction": f"¿Qué pasó el día {i}?", "input": "", "output": f"{said.capitalize()} {i}."}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def measured(stage: Callable[[str], str], path: str, answer: multiprocessing.Queue) -> None:
    began = time.monotonic()
    said = stage(path)
    answer.put((time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, said))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path)
    options.add_argument("--tokenizers", action="store_true", help="and benchmarks/tokenizer.py, some ten minutes more")
    chosen = options.parse_args()
    folder = chosen.data
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as room:
        import os

        os.environ["MAESE_CACHE"] = room
        short = made_up(Path(room) / "short.jsonl", 50_000, 80)
        real = folder / "instrucciones_train.jsonl" if folder else made_up(Path(room) / "rows.jsonl", 45_106, 150)
        pages = folder / "literatura_es.jsonl.zst" if folder else made_up(Path(room) / "pages.jsonl", DOCUMENTS, PAGE)
        mark = "" if folder else "*"
        stages = [
            ("doctor, 50,000 short rows*", doctor_short, short, 10),
            (f"reading + doctor with token lengths{mark}", audit, real, 20),
            (f"tokenizing + packing{mark}", encode_and_pack, real, 20),
            (f"a training's whole preparation{mark}", pack, real, None),
            (f"near-duplicates, {DOCUMENTS:,} pages{mark}", near, pages, 60),
        ]
        print(f"{'stage':<44} {'seconds':>8} {'goal':>6} {'GiB':>6}  what came of it")
        for name, stage, path, goal in stages:
            answer = context.Queue()
            process = context.Process(target=measured, args=(stage, str(path), answer))
            process.start()
            seconds, peak, said = answer.get()
            process.join()
            print(f"{name:<44} {seconds:>8.1f} {goal or '':>6} {peak:>6.2f}  {said}", flush=True)
    if chosen.tokenizers:
        script = Path(__file__).with_name("tokenizer.py")
        subprocess.run([sys.executable, str(script), "--data", str(folder)], check=True)


if __name__ == "__main__":
    main()
