"""A tokenizer of one's own: from texts to a folder that transformers opens and llama.cpp can follow.

    train_tokenizer(texts, 32_000, out=Path("mi-tokenizador"), pattern="llama3")

In:  an iterator of texts, read once. Out: tokenizer.json, tokenizer_config.json and card.json, what it was made from.

Byte-level BPE (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909; bytes as in Radford et al., 2019): any text can
be written, none is lost. Text is brought to NFC first, so that «ñ» is one thing however it was typed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.run import free
from maese.tokens.encode import LLAMA_CPP, PATTERNS

# First, so that their ids never depend on the text. The same six, in the same places, as the embedded model's.
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEFAULT = "llama3"
# Letters of a text given to the trainer at once: it holds 256 of them, and some thirty bytes for each letter.
PIECE = 65_536
SAMPLED = 8_192  # letters of the stretches that a sample is made of: a page or two
Progress = Callable[[int, str], None]


def train_tokenizer(
    texts: Iterable[str],
    size: int,
    out: Path,
    pattern: str = DEFAULT,
    specials: Sequence[str] = SPECIALS,
    progress: Progress | None = None,
    limit_mb: float | None = None,
    sources: Sequence[Any] = (),
) -> Path:
    """Train a tokenizer of `size` tokens and write it to the folder `out`. The same texts give the same file.

    `pattern` is a name of `encode.PATTERNS`. `progress(bytes done, stage)` hears of "read", "merge" and "write".
    `limit_mb` keeps that many megabytes, taken evenly from the whole of the texts. `sources` is written in the card as
    it comes. Errors: RUN-01 (the folder has something in it), TOKEN-03 (size too small), TOKEN-04 (too little text).
    """
    began, seen = time.monotonic(), _Seen(progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaeseError("RUN-01", path=str(out), free=str(free(out)))
    least = len(specials) + 256
    if size < least:
        raise MaeseError("TOKEN-03", size=size, least=least)
    read = seen.reading(texts)
    used = seen.using(_pieces(sample(read, round(limit_mb * 1e6)) if limit_mb else read, PIECE))
    tokenizer = untrained(pattern)
    _learn(tokenizer, used, size, specials)
    made = tokenizer.get_vocab_size()
    if made < size:
        raise MaeseError("TOKEN-04", size=size, made=made, bytes=seen.used)
    seen.tell("write")
    _save(tokenizer, out, specials)
    card = {
        "schema": 1,
        "size": made,
        "pattern": pattern,
        "llama_cpp": LLAMA_CPP[pattern],
        "normalizer": "NFC",
        "specials": list(specials),
        "texts": seen.texts,
        "bytes_read": seen.read,
        "bytes_used": seen.used,
        "limit_mb": limit_mb,
        "sources": list(sources),
        "sha256": hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(),
        "seconds": round(time.monotonic() - began, 1),
        "versions": {name: metadata.version(name) for name in ("maese", "tokenizers", "transformers")},
    }
    (out / "card.json").write_text(json.dumps(card, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return out


def untrained(pattern: str) -> Any:
    """A byte-level BPE that cuts by one of PATTERNS and knows no word yet."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # llama.cpp takes a piece that is a token whole when it reads this pattern, and so did Llama 3.
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern == "llama3"))
    tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    cut = pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated")
    tokenizer.pre_tokenizer = level if pattern == "gpt2" else pre_tokenizers.Sequence([cut, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """About `limit` bytes of the texts, in order, stretches taken evenly from all of them in one reading.

    Each stretch gets a number that depends on its place alone, and those with the lowest stay: a long work gives as
    large a share of itself as a short one, from its beginning to its end, and the same texts give the same sample.
    """
    kept: list[tuple[int, int, bytes]] = []
    held = 0
    for place, piece in enumerate(_pieces(texts, SAMPLED)):
        lot = int.from_bytes(hashlib.blake2b(str(place).encode(), digest_size=8).digest(), "big")
        raw = piece.encode("utf-8", "replace")
        heapq.heappush(kept, (-lot, place, raw))
        held += len(raw)
        while held > limit and len(kept) > 1:
            held -= len(heapq.heappop(kept)[2])
    for _, _, raw in sorted(kept, key=lambda row: row[1]):
        yield raw.decode()


def _pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts in stretches of at most `size` letters, cut after a line where there is one, else before a space."""
    for text in texts:
        start = 0
        while len(text) - start > size:
            line = text.rfind("\n", start, start + size) + 1
            end = line if line > start else text.rfind(" ", start + 1, start + size)
            end = end if end > start else start + size
            yield text[start:end]
            start = end
        yield text[start:]


def _learn(tokenizer: Any, texts: Iterator[str], size: int, specials: Sequence[str]) -> None:
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)


class _Seen:
    """Counts what goes by, and tells it."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.texts, self.read, self.used = progress, 0, 0, 0

    def tell(self, stage: str) -> None:
        if self.progress:
            self.progress(self.read, stage)

    def reading(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            # Half a character cannot be written down as bytes; the reader of files refuses it earlier.
            raw = text.encode("utf-8", "replace")
            self.texts, self.read = self.texts + 1, self.read + len(raw)
            yield text if text.isascii() else raw.decode()
            self.tell("read")

    def using(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.used += len(text.encode())
            yield text
        self.tell("merge")


def _save(tokenizer: Any, out: Path, specials: Sequence[str]) -> None:
    """A folder for transformers, written aside and then given its name."""
    from transformers import PreTrainedTokenizerFast

    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    named = {"bos_token": specials[0], "eos_token": specials[0]} if specials else {}
    if "<|pad|>" in specials:
        named["pad_token"] = "<|pad|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[mark for mark in specials if mark not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
    ).save_pretrained(draft)
    if out.exists():
        out.rmdir()  # empty, as was seen at the start
    draft.rename(out)
