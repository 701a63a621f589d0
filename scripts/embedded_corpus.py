"""The text that the model inside the package reads, and the text it is measured on: from collections to files.

    python scripts/embedded_corpus.py --data DIR

In:  the collections named in COLLECTIONS, one JSON a line (`id, title, author, license, text`), and the instructions.
Out: build/embedded/text/*.jsonl       what is learnt, each kind in a file
     build/embedded/held/*.jsonl       what is only measured on
     build/embedded/instruct.jsonl     instructions that are learnt
     build/embedded/manifest.json      every work with its licence and hash, and every file with its hash

The text is not part of the repository: whoever has the same collections gets the same files, byte for byte.
Cervantes is left out, and whatever shares more than 20 runs of eight words with the Quijote, so that it stays new.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

BUILD = Path("build/embedded")
# Held out by the first edition too, which read nothing of their authors: both can be measured on them.
UNREAD = ("Los cursos", "El caballero de las botas azules", "Viaje a los Estados Unidos, Tomo III", "Nelly",
          "Cabezas: Pensadores", "Socialismo y ciencia positiva", "Cuentos Clásicos del Norte, Primera",
          "La Novela Picaresca")  # fmt: skip
# Words of the names of authors up to the seventeenth century: some to be measured on, a little of the others is learnt.
OLD = ("gracian", "espinel", "velez de guevara", "calderon de la barca", "lope de vega", "quevedo", "luis de leon",
       "ruiz de alarcon", "tirso", "hurtado de mendoza", "luis milan", "delicado", "villegas selvago", "munon",
       "juan ruiz", "pulgar", "pedro de aguado", "bartolome de las casas", "lizarraga", "cieza", "cabeza de vaca",
       "betanzos", "joseph, de acosta", "centenera", "schmidel", "francisco verdugo", "de moncada", "garau",
       "lucrecio", "zayas y sotomayor", "aleman", "herrera", "boscan", "garcilaso", "rojas")  # fmt: skip
OLD_MEASURED = ("gracian", "espinel", "velez de guevara", "calderon de la barca", "lope de vega", "quevedo",
                "ruiz de alarcon", "lizarraga")  # fmt: skip
COMMON = ("benito", "perez", "fernandez", "vicente", "armando", "enrique", "guillermo", "pierre", "edgar")
OF_AUTHOR = 500_000  # bytes of one author, whose name may be spelt in several ways
OF_OLD_SPELLING = 120_000  # of one that writes «á» and «fué», as was done until 1911
OF_OLD_AUTHOR = 250_000  # of one of the sixteenth or the seventeenth century
OLD_SPELLING = 1.0  # «á» standing alone in a thousand words, above which a work is of the old one
LAWS, BIBLE = 5_000_000, 500_000
SLICE = slice(20_000, 60_000)  # letters of a work that are measured on: its middle, not its title page
APART = 0.02  # of pages, sentences and instructions
TOGETHER = 6  # sentences or proverbs in a document: alone they would teach that a text ends at once


def rows(path: Path) -> Iterator[dict]:
    import zstandard

    with open(path, "rb") as raw:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8"):
            yield json.loads(line)


def plain(name: str) -> str:
    """`plain("Vicente Blasco Ibáñez (1867)")` is `vicente blasco ibanez`, `plain("BlascoIbanez")` `blasco ibanez`."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[(\[].*", "", name))
    bare = unicodedata.normalize("NFD", apart).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z,]+", bare))


def author_key(name: str) -> str:
    """One key for the ways a name is spelt: its longest word, that of «Galdos», «Pérez Galdós, Benito» and «Galdós»."""
    words = [
        word for word in re.findall(r"[a-z]+", plain(name)) if word not in ("perez", "fernandez", "vicente", "armando")
    ]
    return max(words, key=len, default="?")


def number(text: str) -> float:
    """The same number in [0, 1) for the same text, here and everywhere."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def shingles(text: str, n: int = 8) -> set[int]:
    """Hashes of every run of n words: `shingles("a b c", 2)` has two members."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)}


def old_spelling(text: str) -> bool:
    words = max(1, text.count(" "))
    return 1000 * len(re.findall(r"\s[áóéú]\s", text)) / words > OLD_SPELLING


def literature(path: Path, quijote: Path) -> tuple[dict[str, list[dict]], dict[str, list[dict]], dict[str, str]]:
    """Works to learn from (`literature`, and `old` those before 1700), to measure on (`authors`, `centuries`), and why
    the others are left out."""
    forbidden = shingles(quijote.read_text("utf-8"))
    every = sorted(rows(path), key=lambda work: number(work["id"]))
    held: dict[str, list[dict]] = {"authors": [], "centuries": []}
    apart = {author_key(w["author"] or "?") for w in every if w["title"].startswith(UNREAD)} - {"various", "?"}
    used: dict[str, int] = {}
    read: dict[str, list[dict]] = {"literature": [], "old": []}
    dropped = {}
    for work in every:
        name = plain(work["author"] or "?")
        key = author_key(work["author"] or "?")
        key = work["id"] if key in ("?", "various", "anonymous") else key
        if work["title"].startswith(UNREAD):
            held["authors"].append(work)
        elif "ervantes" in (work["author"] or "") or "uijote" in work["title"]:
            dropped[work["id"]] = "Cervantes"
        elif any(old in name for old in OLD_MEASURED):
            if len(work["text"]) > SLICE.stop and key not in {author_key(w["author"]) for w in held["centuries"]}:
                held["centuries"].append(work)
            dropped[work["id"]] = "another century, measured on"
        elif key in apart:
            dropped[work["id"]] = "author held out"
        else:
            kind = "old" if any(old in name for old in OLD) else "literature"
            most = OF_OLD_SPELLING if old_spelling(work["text"]) else OF_AUTHOR
            most = OF_OLD_AUTHOR if kind == "old" else most
            room = most - used.get(kind + key, 0)
            if room < 50_000:
                dropped[work["id"]] = "enough of this author"
            elif len(shared := shingles(work["text"][:room]) & forbidden) > 20:
                dropped[work["id"]] = f"shares {len(shared)} runs of 8 words with the Quijote"
            else:
                work["text"] = work["text"].encode()[:room].decode(errors="ignore").strip()
                used[kind + key] = used.get(kind + key, 0) + len(work["text"].encode())
                read[kind].append(work)
    return read, held, dropped


def apart(every: list[dict]) -> tuple[list[dict], list[dict]]:
    """What is learnt and what is measured on, by the hash of each text."""
    kept = [row for row in every if number(row["text"]) < APART]
    return [row for row in every if number(row["text"]) >= APART], kept


def up_to(every: list[dict], most: int) -> list[dict]:
    """Works in the order of their hash until `most` bytes are full."""
    chosen, size = [], 0
    for row in sorted(every, key=lambda row: number(row["id"])):
        if size < most:
            text = row["text"].encode()[: most - size].decode(errors="ignore")
            chosen.append(row | {"text": text})
            size += len(text.encode())
    return chosen


def grouped(lines: list[str], kind: str, license: str) -> list[dict]:
    """A few lines to a document, in the order of their hash."""
    lines = sorted((line for line in map(str.strip, lines) if line), key=number)
    groups = [lines[i : i + TOGETHER] for i in range(0, len(lines), TOGETHER)]
    return [{"id": f"{kind}/{i}", "license": license, "text": "\n".join(g)} for i, g in enumerate(groups)]


def as_text(row: dict) -> str:
    """An instruction as prose, for the model that is not instructed yet."""
    return "\n".join(part for part in (row["instruction"], row.get("input", ""), row["output"]) if part)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(name: str, every: list[dict], keys: tuple[str, ...] = ("id", "text")) -> Path:
    path = BUILD / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for row in every:
            out.write(json.dumps({key: row[key] for key in keys if key in row}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(every)} rows, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return path


def by_license(every: list[dict]) -> dict[str, int]:
    """Bytes of text under each licence."""
    found: dict[str, int] = {}
    for row in every:
        name = str(row.get("license"))
        found[name] = found.get(name, 0) + len(row["text"].encode())
    return dict(sorted(found.items()))


def main() -> None:
    import zstandard

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    read, held, dropped = literature(data / "literatura_es.jsonl.zst", data / "quijote_limpio.txt")
    pages, pages_apart = apart(list(rows(data / "docs_tecnicas_es.jsonl.zst")))
    tatoeba = zstandard.ZstdDecompressor().stream_reader((data / "tatoeba_oraciones_es.txt.zst").open("rb")).read()
    sentences, sentences_apart = apart(grouped(tatoeba.decode().split("\n"), "tatoeba", "CC-BY 2.0 FR"))
    proverbs = grouped((data / "refranes.txt").read_text("utf-8").split("\n"), "refranes", "public domain")
    laws = up_to(list(rows(data / "leyes_es.jsonl.zst")), LAWS)
    bible = up_to(list(rows(data / "biblia_rv1909.jsonl.zst")), BIBLE)
    lines = (data / "instrucciones_train.jsonl").read_text("utf-8").splitlines()
    asked = [row | {"text": as_text(row), "id": f"instrucciones/{i}"} for i, row in enumerate(map(json.loads, lines))]
    taught, taught_apart = apart(asked)
    texts = {
        **read, "technical": pages, "sentences": sentences, "proverbs": proverbs, "laws": laws,
        "bible": bible, "instructions": [row | {"license": row["licencia"]} for row in taught],
    }  # fmt: skip
    files = [write(f"text/{name}.jsonl", every) for name, every in texts.items()]
    for name, works in held.items():
        cut = [work | {"text": work["text"][SLICE]} for work in works]
        files.append(write(f"held/{name}.jsonl", cut, ("id", "author", "title", "text")))
    files.append(write("held/technical.jsonl", pages_apart))
    files.append(write("held/sentences.jsonl", sentences_apart))
    files.append(write("held/instructions.jsonl", taught_apart, ("instruction", "input", "output", "tarea")))
    files.append(write("instruct.jsonl", taught, ("instruction", "input", "output", "tarea")))

    def about(row: dict) -> dict:
        facts = {key: row[key] for key in ("id", "source", "title", "author", "license") if row.get(key)}
        return facts | {"bytes": len(row["text"].encode()), "sha256": hashlib.sha256(row["text"].encode()).hexdigest()}

    collections = [p for p in sorted(data.glob("*")) if p.suffix in (".zst", ".jsonl", ".txt")]
    manifest = {
        "collections": {path.name: sha256(path) for path in collections},
        "files": {str(p.relative_to(BUILD)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
        "licenses": {name: by_license(every) for name, every in texts.items()},
        "works": [about(work) for works in read.values() for work in works],
        "measured": {name: [about(work) for work in works] for name, works in held.items()},
        "dropped": dropped,
    }
    (BUILD / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
