"""Which pattern should a Spanish tokenizer be trained with, and how much shorter than GPT-2's are its texts?

    python benchmarks/tokenizer.py --data ../shared/data                     # about twelve minutes on two cores
    python benchmarks/tokenizer.py --data ../shared/data --only gpt2 llama3 --characters

In:  a folder with literatura_es.jsonl.zst (one work a line: id, author, text), docs_tecnicas_es.jsonl.zst,
leyes_es.jsonl.zst, tatoeba_oraciones_es.txt.zst, instrucciones_train.jsonl, quijote_limpio.txt, tokenizers/gpt2.
Out: a table on the screen, the tokenizers and results.json under build/tokenizers.

Held out: Cervantes, a set of authors of whom nothing is read (names that share a rare surname with them are left out of
training too), and by hash of their id 500 technical pages, 3,000 sentences, 1,000 instructions and 200 laws. An
instruction may be about a page that was read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import resource
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from maese.tokens import encode
from maese.tokens.compare import open_tokenizer
from maese.tokens.train import sample, train_tokenizer, untrained

OUT = Path("build/tokenizers")
SIZE = 32_000
# Megabytes of each kind. Laws repeat themselves, and literature has so much that the rest would not be heard.
SHARE = {"literature": 165, "technical": 25, "laws": 10, "sentences": 5, "instructions": 15}
HELD = {"technical": 500, "laws": 200, "sentences": 3000, "instructions": 1000}
HELD_AUTHORS = 20
# Patterns of llama.cpp's list beyond those of the package, two home-made ones that it does not know, and superwords.
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOW, SHORT = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MORE = {
    "gpt-4o": rf"{WORD}*{LOW}+{SHORT}|{WORD}+{LOW}*{SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # «¿Qué», « —dijo», «(así»: the marks that open stay with the word they open.
    "opening": r" ?[¿¡«“(\[—–_*-]{0,3}\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # … and the one that closes it too: «casa,».
    "both": r" ?[¿¡«“(\[—–_*-]{0,3}\p{L}+[,;.:?!»”)]?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# llama.cpp's `superbpe` cuts at figures alone, so that a token may hold several words (Liu et al., 2025, «SuperBPE»,
# https://arxiv.org/abs/2503.13423): words are learnt first, up to this many tokens, and then what follows what.
SUPERWORDS, WORDS_FIRST, SUPER_MB = "superbpe", 22_000, 50


def rows(path: Path) -> Iterator[dict]:
    import zstandard

    with open(path, "rb") as raw:
        plain = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        for number, line in enumerate(io.TextIOWrapper(plain, encoding="utf-8")):
            yield json.loads(line) if ".jsonl" in path.name else {"id": str(number), "text": line}


def lot(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def names(author: str | None) -> set[str]:
    """The words of a name, however the collection writes it: `names("GutiérrezE")` is {"gutierrez"}."""
    plain = unicodedata.normalize("NFD", re.sub(r"(?<=[a-zñáéíóú])(?=[A-ZÁÉÍÓÚ])", " ", author or "?"))
    return set(re.findall(r"[a-z]{4,}", "".join(c for c in plain if not unicodedata.combining(c)).lower()))


def choose_authors(path: Path) -> tuple[set[str], set[str]]:
    """(authors held out, rare words of their names: a work by anyone who shares one is not trained on)."""
    authors = {work["author"] or "?" for work in rows(path)}
    often = Counter(word for author in authors for word in names(author))
    own = {a: {w for w in names(a) if often[w] <= 2} for a in authors if "ervantes" not in a}
    held = sorted((a for a in own if own[a] and a not in ("?", "Various")), key=lot)[:HELD_AUTHORS]
    return set(held), {word for a in held for word in names(a) if often[word] <= 6} | {"cervantes", "saavedra"}


def corpus(data: Path, out: Path) -> None:
    """Write train.jsonl and held.jsonl, `{"kind", "text"}` a line."""
    kept: dict[str, list[str]] = {"quijote": [(data / "quijote_limpio.txt").read_text("utf-8")], "literature": []}
    held, words = choose_authors(data / "literatura_es.jsonl.zst")

    def literature() -> Iterator[str]:
        for work in rows(data / "literatura_es.jsonl.zst"):
            if work["author"] in held:
                kept["literature"].append(work["text"][20_000:120_000])
            elif not names(work["author"]) & words and "uijote" not in work["title"]:
                yield work["text"]

    def others(kind: str, name: str) -> Iterator[str]:
        found = list(rows(data / name))
        for row in found:
            parts = [row.get(name) for name in ("text", "instruction", "input", "output")]
            row["text"] = "\n".join(filter(None, parts))
        keys = [lot(f"{row.get('id')}{row['text']}") for row in found]
        apart = set(sorted(range(len(found)), key=keys.__getitem__)[: HELD[kind]])
        kept[kind] = [found[i]["text"] for i in sorted(apart)]
        yield from (row["text"] for i, row in enumerate(found) if i not in apart)

    texts = {
        "literature": literature(),
        "technical": others("technical", "docs_tecnicas_es.jsonl.zst"),
        "laws": others("laws", "leyes_es.jsonl.zst"),
        "sentences": others("sentences", "tatoeba_oraciones_es.txt.zst"),
        "instructions": others("instructions", "instrucciones_train.jsonl"),
    }
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for kind, some in texts.items():
            size = 0
            for text in sample(some, SHARE[kind] * 1_000_000):
                size += len(text.encode())
                file.write(json.dumps({"kind": kind, "text": text}, ensure_ascii=False) + "\n")
            print(f"  {kind}: {size / 1e6:.1f} MB", flush=True)
    with open(out / "held.jsonl", "w", encoding="utf-8") as file:
        for kind, some in kept.items():
            for text in some:
                file.write(json.dumps({"kind": kind, "text": text}, ensure_ascii=False) + "\n")
    (out / "held_authors.json").write_text(json.dumps(sorted(held), ensure_ascii=False, indent=1))


def train(name: str, size: int, out: Path) -> None:
    """One tokenizer, in a process of its own so that its peak of memory is its own."""
    texts = (row["text"] for row in rows(out / "train.jsonl"))
    began = time.monotonic()
    if name == SUPERWORDS:
        superwords(size, out)
    elif name in MORE:
        encode.PATTERNS[name], encode.LLAMA_CPP[name] = MORE[name], "gpt-4o" if name == "gpt-4o" else ""
    if name != SUPERWORDS:
        train_tokenizer(texts, size, out / f"{name}-{size}", name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": round(time.monotonic() - began), "peak_gib": round(peak, 2)}))


def superwords(size: int, out: Path) -> None:
    """Learn words as llama3 does, then write each word as one letter and learn which letters follow each other."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = out / f"llama3-{WORDS_FIRST}"
    if not folder.exists():
        train_tokenizer((row["text"] for row in rows(out / "train.jsonl")), WORDS_FIRST, folder, "llama3")
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, level = [words.id_to_token(i) for i in range(WORDS_FIRST)], encode.byte_letters()
    spelt = [bytes(level.get(c, 0) for c in token).decode("utf-8", "ignore").removeprefix(" ") for token in tokens]
    # What is no word, or part of one, ends a phrase; U+10000 and on are letters enough to stand for the tokens.
    letters = [chr(0x10000 + i) if spelt[i].isalpha() and i > 5 else " " for i in range(WORDS_FIRST)]

    def phrases() -> Iterator[str]:
        for text in sample((row["text"] for row in rows(out / "train.jsonl")), SUPER_MB * 1_000_000):
            yield "".join(letters[i] for i in words.encode(text, add_special_tokens=False).ids)

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted({*letters} - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + size - WORDS_FIRST, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(phrases(), trainer)
    spec = json.loads(words.to_str())
    for merge in json.loads(pairs.to_str())["model"]["merges"]:
        left, right = ("".join(tokens[ord(c) - 0x10000] for c in side) for side in merge)
        if left + right not in spec["model"]["vocab"]:
            spec["model"]["vocab"][left + right] = len(spec["model"]["vocab"])
            spec["model"]["merges"].append([left, right])
    spec["model"]["ignore_merges"] = False
    cuts = [r"\p{N}+", r"(?=(\d{3})+(?!\d))"]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    level_step = spec["pre_tokenizer"]["pretokenizers"][-1]
    spec["pre_tokenizer"]["pretokenizers"] = [*(split | {"pattern": {"Regex": cut}} for cut in cuts), level_step]
    target = out / f"{SUPERWORDS}-{size}"
    target.mkdir(exist_ok=True)
    Tokenizer.from_str(json.dumps(spec)).save(str(target / "tokenizer.json"))


def measure(tokenizer, held: dict[str, list[str]]) -> dict[str, list[float]]:
    """Of each kind: characters and bytes per token, over all its text."""
    figures = {}
    for kind, texts in held.items():
        tokens = sum(len(e) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        figures[kind] = [sum(map(len, texts)) / tokens, sum(len(t.encode()) for t in texts) / tokens]
    return figures


def characters(name: str) -> int:
    """In how many letters of Unicode the two engines cut differently: each is put in eight places of a text."""
    import tiktoken

    pairs = [(a, b) for a in encode.byte_letters() for b in encode.byte_letters()]
    letters = encode.byte_letters()
    vocabulary = {a: i for i, a in enumerate(letters)} | {a + b: 256 + i for i, (a, b) in enumerate(pairs)}
    slow = untrained(name)
    slow.model = type(slow.model)(vocab=vocabulary, merges=pairs)
    slow.normalizer = None
    ranks = {bytes(letters[c] for c in text): i for text, i in vocabulary.items()}
    pattern = encode.WHOLE.get(name, encode.PATTERNS[name])
    fast = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    forms = "{0}|a{0}b|1{0}2|.{0},| {0} |\n{0}\n|'{0} x'{0}|{0}a {0}1 {0}. {0}{0}"
    texts = [forms.format(chr(c)) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    different = 0
    for i in range(0, len(texts), 50_000):
        some = texts[i : i + 50_000]
        pairs = zip(slow.encode_batch_fast(some), fast.encode_ordinary_batch(some), strict=True)
        different += sum(encoding.ids != ids for encoding, ids in pairs)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--only", nargs="*", default=[*encode.PATTERNS, *MORE, SUPERWORDS])
    parser.add_argument("--characters", action="store_true", help="try every character of Unicode instead")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.size, args.out)
    elif args.characters:
        for name in set(args.only) & set(encode.PATTERNS):
            print(f"{name}: {characters(name)} letters cut differently", flush=True)
    else:
        bench(args)


def bench(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "held.jsonl").exists():
        corpus(args.data, args.out)
    held: dict[str, list[str]] = {}
    for row in rows(args.out / "held.jsonl"):
        held.setdefault(row["kind"], []).append(row["text"])
    results = {"GPT-2 (50,257)": {"held": measure(open_tokenizer(str(args.data / "tokenizers" / "gpt2")), held)}}
    for name in args.only:
        folder = args.out / f"{name}-{args.size}"
        if not (folder / "cost.json").exists():
            command = [sys.executable, __file__, "--data", args.data, "--out", args.out, "--size", args.size]
            done = subprocess.run([*map(str, command), "--train", name], check=True, capture_output=True, text=True)
            (folder / "cost.json").write_text(done.stdout.splitlines()[-1])
        cost = json.loads((folder / "cost.json").read_text())
        results[name] = cost | {"held": measure(open_tokenizer(str(folder)), held)}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    show(results, [*held])


def show(results: dict[str, dict], kinds: list[str]) -> None:
    """characters per token | bytes per token, a column for each kind of held-out text."""
    print("| tokenizer | " + " | ".join(kinds) + " | s | GiB |")
    print("|---|" + "---|" * (len(kinds) + 2))
    for name, row in results.items():
        cells = [f"{row['held'][kind][0]:.2f} · {row['held'][kind][1]:.2f}" for kind in kinds]
        print(f"| {name} | " + " | ".join(cells) + f" | {row.get('seconds', '')} | {row.get('peak_gib', '')} |")


if __name__ == "__main__":
    main()
