"""Tokenizers side by side, on several kinds of text: how short they write, how they cut, what they cost.

    result = compare(["embedded", "models/gpt2"])          on the sample texts that travel with the package
    for table in tables(result): …                         headers and rows, in the language of the person
    plot(result, Path("tokenizers.png"))

In:  names and texts by kind. Out: a dictionary that goes to JSON as it is. A token is worth what it spells: the loss
per token of two tokenizers cannot be compared, and fewer tokens for the same text is more text in the same context.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.recipe import INSIDE, at_home
from maese.say import has, number, percent, quantity, say
from maese.tokens.encode import byte_letters

SAMPLES = Path(__file__).parent / "samples.toml"
# The two files of a byte-level BPE before tokenizer.json: as GPT-2 was published, and as transformers kept them.
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
WORDS = re.compile(r"[^\W\d_]+")
# A word is cut otherwise at the beginning of a text than after a space, where most of them stand.
MARKS = ("ñ", "á", "¿", "¡", "«", "»", "—", " niño", " corazón", " pingüino", "¿Qué", " «así", " —dijo")
WIDTHS = (256, 768, 2048)
INK, SOFT, GRID = "#26231d", "#6b675e", "#e4e0d6"
# Told apart without colour too: by hatching and by the order of the legend.
LOOKS = (("#1f5f99", ""), ("#d98c3f", "///"), ("#5d8a66", "..."), ("#a8480a", "xxx"), ("#8a86a8", "\\\\\\"))


@dataclass(frozen=True)
class Table:
    """What a face prints: the first column is a name, the others are figures or pieces of text."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def samples() -> dict[str, list[str]]:
    """The texts by kind that come with the package: narrative, dialogue, technical, instructions, chat, code."""
    tables = tomllib.loads(SAMPLES.read_text("utf-8"))
    return {kind: [text.strip("\n") for text in table["texts"]] for kind, table in tables.items()}


def open_tokenizer(name: str) -> Any:
    """A tokenizer of `tokenizers`: "embedded", a folder of transformers, a tokenizer.json, or GPT-2's pair of files.

    Specials are spelt out when they are typed. Errors: TOKEN-05 (nothing there that is a tokenizer).
    """
    path = INSIDE[name] if name in INSIDE else at_home(name)
    try:
        tokenizer = _open(path)
    except Exception as problem:  # a damaged file raises whatever the reader of its format raises
        raise MaeseError("TOKEN-05", name=name, reason=str(problem).split("\n")[0][:120]) from problem
    if tokenizer is None:
        raise MaeseError("TOKEN-05", name=name, reason=say("tokenizer.nothing"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _open(path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    for file in (path, path / "tokenizer.json"):
        if file.is_file():
            return Tokenizer.from_file(str(file))
    for vocabulary, merges in PAIRS:
        if (path / vocabulary).is_file() and (path / merges).is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(path / vocabulary), str(path / merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return tokenizer
    if (path / "tokenizer.model").is_file() or (path / "vocab.txt").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    return None


def compare(names: Sequence[str], texts: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Measure each tokenizer on each kind of text. Errors: TOKEN-05."""
    texts = samples() if texts is None else texts
    words = {kind: Counter(word for text in some for word in WORDS.findall(text)) for kind, some in texts.items()}
    kinds = {
        kind: {
            "texts": len(some),
            "characters": sum(map(len, some)),
            "bytes": sum(len(text.encode("utf-8", "replace")) for text in some),
            "words": words[kind].total(),
        }
        for kind, some in texts.items()
    }
    rows = []
    for name, short in zip(names, _labels(names), strict=True):
        tokenizer = open_tokenizer(name)
        size = tokenizer.get_vocab_size()
        rows.append(
            {
                "name": name,
                "label": short,
                "vocabulary": size,
                # One table serves to read and to write (tied): its rows are counted once.
                "parameters": {str(width): size * width for width in WIDTHS},
                "kinds": {kind: _measure(tokenizer, some, words[kind], kinds[kind]) for kind, some in texts.items()},
                "pieces": {mark: pieces(tokenizer, mark) for mark in MARKS},
            }
        )
    return {"schema": 1, "kinds": kinds, "tokenizers": rows}


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that is enough to tell them apart."""
    short = [Path(name).name or name for name in names]
    return short if len({*short}) == len({*names}) else list(names)


def _measure(tokenizer: Any, texts: list[str], words: Counter[str], size: dict[str, int]) -> dict[str, float | int]:
    tokens, same = 0, 0
    for start in range(0, len(texts), 256):
        some = texts[start : start + 256]
        for text, encoding in zip(some, tokenizer.encode_batch_fast(some, add_special_tokens=False), strict=True):
            tokens += len(encoding.ids)
            same += tokenizer.decode(encoding.ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    cut = _pieces_of_words(tokenizer, words)
    total = max(size["words"], 1)
    return {
        "tokens": tokens,
        "characters_per_token": size["characters"] / max(tokens, 1),
        "bytes_per_token": size["bytes"] / max(tokens, 1),
        "tokens_per_word": sum(count * cut[word] for word, count in words.items()) / total,
        "whole_words": sum(count for word, count in words.items() if cut[word] == 1) / total,
        "round_trip": same / max(len(texts), 1),
    }


def _pieces_of_words(tokenizer: Any, words: Counter[str]) -> dict[str, int]:
    """Tokens of each word as it stands in a sentence, after a space."""
    each = list(words)
    encodings = tokenizer.encode_batch_fast([" " + word for word in each], add_special_tokens=False)
    return {word: len(encoding.ids) for word, encoding in zip(each, encodings, strict=True)}


def pieces(tokenizer: Any, text: str) -> list[str]:
    """The tokens of a text for eyes: `pieces(gpt2, "niño")` is `["ni", "ñ", "o"]`, a lone byte is `⟨C3⟩`, a space ␣."""
    level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
    return [readable(token, level) for token in tokenizer.encode(text, add_special_tokens=False).tokens]


def readable(token: str, level: bool) -> str:
    """A token of a vocabulary for eyes; `level` says that its letters stand for bytes."""
    letters = byte_letters()
    if level and letters.keys() >= {*token}:
        raw = bytes(letters[c] for c in token)
        # Bytes that are no whole letter come out of surrogateescape as U+DC80 and on: they are named, never «�».
        text = raw.decode("utf-8", "surrogateescape")
        text = "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
    else:
        text = re.sub(r"<0x([0-9A-F]{2})>", r"⟨\1⟩", token).replace("▁", " ")
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def overall(result: dict[str, Any], row: dict[str, Any], figure: str) -> float:
    """A figure of one tokenizer over all kinds together, each weighing by how much of it there is."""
    kinds, own = result["kinds"], row["kinds"]
    per = {"characters_per_token": "characters", "bytes_per_token": "bytes", "round_trip": "texts"}.get(figure, "words")
    total = sum(size[per] for size in kinds.values())
    if figure.endswith("_per_token"):  # of a ratio the parts are added, not the ratios
        return total / max(sum(own[kind]["tokens"] for kind in kinds), 1)
    return sum(own[kind][figure] * kinds[kind][per] for kind in kinds) / max(total, 1)


def tables(result: dict[str, Any]) -> list[Table]:
    """Four tables for a person: the whole, each kind of text, how marks and words are cut, what a vocabulary costs."""
    kinds, rows = result["kinds"], result["tokenizers"]
    names = [row["label"] for row in rows]
    whole = [
        [
            row["label"],
            number(row["vocabulary"]),
            number(overall(result, row, "characters_per_token"), 2),
            number(overall(result, row, "bytes_per_token"), 2),
            number(overall(result, row, "tokens_per_word"), 2),
            percent(overall(result, row, "whole_words"), 0),
            percent(overall(result, row, "round_trip"), 0),
        ]
        for row in rows
    ]
    by_kind = [
        [row["label"], *(number(row["kinds"][kind]["characters_per_token"], 2) for kind in kinds)] for row in rows
    ]
    cuts = [[mark.replace(" ", "␣"), *(" | ".join(row["pieces"][mark]) for row in rows)] for mark in MARKS]
    cost = [[row["label"], *(quantity(row["parameters"][str(width)]) for width in WIDTHS)] for row in rows]
    columns = ("name", "vocabulary", "characters", "bytes", "words", "whole", "round")
    heads = [say(f"tokenizer.column.{column}") for column in columns]
    return [
        Table(say("tokenizer.table.whole"), heads, whole),
        Table(say("tokenizer.table.kinds"), [heads[0], *map(label, kinds)], by_kind),
        Table(say("tokenizer.table.cuts"), [say("tokenizer.column.text"), *names], cuts),
        Table(say("tokenizer.table.cost"), [heads[0], *(say("tokenizer.width", width=w) for w in WIDTHS)], cost),
    ]


def label(kind: str) -> str:
    """A kind of text in the language of the person; a name of one's own stays as it is."""
    return say(f"tokenizer.kind.{kind}") if has(f"tokenizer.kind.{kind}") else kind


def plot(result: dict[str, Any], path: Path) -> Path:
    """Characters per token of each kind, and share of words kept whole, as bars in one PNG."""
    # A Figure of its own, not pyplot: no window, no global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter

    kinds, rows = list(result["kinds"]), result["tokenizers"]
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": SOFT}
    with rc_context(style | {"xtick.color": SOFT, "ytick.color": INK, "axes.edgecolor": GRID, "hatch.color": "white"}):
        height = 1.9 + len(kinds) * (0.3 + 0.24 * len(rows))
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(12, height), dpi=120, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(say("tokenizer.plot.title"), fontsize=14, fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, name, decimals in ((left, "characters_per_token", 2), (right, "whole_words", 0)):
            scale = 100 if name == "whole_words" else 1
            thick = 0.8 / len(rows)
            for i, row in enumerate(rows):
                color, hatch = LOOKS[i % len(LOOKS)]
                ys = [k + (i - (len(rows) - 1) / 2) * thick for k in range(len(kinds))]
                xs = [scale * row["kinds"][kind][name] for kind in kinds]
                bars = axes.barh(ys, xs, thick * 0.92, color=color, hatch=hatch, label=row["label"])
                axes.bar_label(bars, [number(x, decimals) for x in xs], padding=3, color=INK, fontsize=8)
            axes.set_title(say(f"tokenizer.plot.{name}"), loc="left", fontsize=11, fontweight="bold")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x, 0 if x == round(x) else 1)))
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.margins(x=0.1)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
        left.invert_yaxis()
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(rows)), frameon=False, fontsize=9)
        figure.savefig(path, format="png")
    return path
