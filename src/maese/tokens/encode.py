"""Text to ids, fast: tiktoken over a tokenizer's own merges where its ids are proved the same, else `tokenizers`.

    encoder = encoder_of(tokenizer)
    encoder.many(["¿Quién va?", "<|end|>"])     [[1203, 311, 40], [29, 93, …]]   what people type is never special
    encoder.engine, encoder.why                 ("tiktoken", "")

In:  a fast tokenizer of transformers. Out: lists of ids, the ones that
`tokenizer(texts, add_special_tokens=False, split_special_tokens=True)` gives.

The proof. Both engines cut a text into pieces by the same pattern and join bytes inside a piece. `tokenizers` joins
the pair that comes first in its list of merges; tiktoken, the pair whose result has the lowest id. If ids follow the
order of the merges, no token has two merges, and every token alone is joined up to itself, then wherever tiktoken may
form a token its parts are the pair of its only merge, and the two orders are one. The three conditions are checked,
token by token. That both cut alike was tried with every character of Unicode on the patterns below
(`benchmarks/tokenizer.py`); hard cases and the first texts are compared again on the machine at hand.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from maese.say import say

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_STOPS = r"(\s|.,!?…。，、।۔،)"  # between brackets they are letters of a set
# How a text is cut before anything is joined, as the models' own files write it.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "bloom": rf" ?[^{_STOPS}]+",
}
# The name each has in `tokenizer.ggml.pre` of a GGUF file, from llama.cpp's src/llama-vocab.cpp. Those of a name that
# also sets something (llama-bpe: a beginning token before each text; gpt-2: spaces before a comma are dropped when
# text is shown) are undone by the writer of the file with `tokenizer.ggml.add_bos_token` and the like.
LLAMA_CPP = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2", "bloom": "poro-chat"}
# What bloom's pattern does not match is a piece too for `tokenizers` and llama.cpp, and would be lost by tiktoken.
WHOLE = {"bloom": rf" ?[^{_STOPS}]+|[{_STOPS}]+(?= [^{_STOPS}])|[{_STOPS}]+"}

# Letters whose normal form no version of Unicode will change; with others only `tokenizers` knows its own tables.
_UNSETTLED = re.compile("[^\0-\u06ff\u1e00-\u33ff\u4e00-\u9fff\uac00-\ud7a3\ufe00-\ufe0f\U0001f000-\U0001f64f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = 100_000  # characters: a longer run of spaces can exhaust the stack of tiktoken's expressions
_ENDLESS = re.compile(rf"\s{{{_BLANK}}}")
_FIRST = 262_144  # characters of the first texts that are encoded both ways
_HANDFUL = 65_536  # characters for a thread at a time
_THREADS = min(8, os.cpu_count() or 1)

HARD = [
    "", " ", "  \n\n\t x", "áéíóúüñ ÁÉÍÓÚÜÑ ¿Qué? ¡Ay! «así» —dijo—. “Sí…” 1.º 2.ª", "a\u0301 n\u0303 \u0301",
    "I'LL don't 'S 'ſ", "👩\u200d👩\u200d👧\u200d👦 🇲🇽 👍🏽 ☕\ufe0f", "日本語と中文、한국어 עברית العربية ไทย हिन्दी",
    "1 12 123 1234 12.345,67 ½ ² Ⅷ ٣", "\r\n\r\r\n\n \r\n x\r", "def f(x):\n\treturn {'a': x**2}  # ok\n\n\n    y",
    "\0\x01\x7f\x85\u00a0\u2028\u200b\ufeff.", "a" * 700 + "ñ" * 700, "«" * 300, " " * 300 + "x" + "\n" * 300,
    "electroencefalografista" * 40, "<|endoftext|><|end|></s>[INST]<|im_end|>", "\ufffd", "ﬁ Å Ω K",
    "3,14€ 50 % n.º 5/8 https://example.org/a_b?c=d&e=f#g x@y.es", "QUE Que qUE ÑandÚ", "\U00010348\U0010ffff\ue000",
]  # fmt: skip


class Encoder:
    """One tokenizer with the fastest engine that gives its ids. `engine` is "tiktoken" or "tokenizers"; `why` is the
    sentence that says why not tiktoken, or empty."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        # A copy: the tokenizer's own switches (specials, padding, truncation) are changed by whoever calls it.
        spec = tokenizer.backend_tokenizer.to_str()
        self._slow = Tokenizer.from_str(spec)
        self._slow.no_padding()
        self._slow.no_truncation()
        self._slow.encode_special_tokens = True
        self.engine, self.why, self._unproved = "tokenizers", "", _FIRST
        self._fast, reason = _tiktoken(json.loads(spec), self._slow)
        self._nfc = self._slow.normalizer is not None
        self._marks = _marks(self._slow)
        if reason:
            self.why = say(f"tokenizer.engine.{reason}")
            return
        self.engine = "tiktoken"
        self._compare(HARD)

    def one(self, text: str) -> list[int]:
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as text; halves of a character (lone surrogates) become U+FFFD."""
        whole = [_whole(text) for text in texts]
        if self.engine != "tiktoken":
            return self._by_tokenizers(whole)
        if self._unproved <= 0:
            return self._by_tiktoken(whole)
        count, seen = 0, 0
        while count < len(whole) and seen < self._unproved:
            seen += len(whole[count])
            count += 1
        self._unproved -= max(seen, 1)
        return self._compare(whole[:count]) + (self.many(whole[count:]) if whole[count:] else [])

    def _compare(self, texts: list[str]) -> list[list[int]]:
        """Both engines on some texts: at the first difference tiktoken is left for good, and that is said."""
        slow = self._by_tokenizers(texts)
        if self._by_tiktoken(texts) != slow:
            self.engine, self.why = "tokenizers", say("tokenizer.engine.differs")
        return slow

    def _by_tokenizers(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._slow.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_tiktoken(self, texts: list[str]) -> list[list[int]]:
        ready = [self._normal(text) for text in texts]
        odd = {i for i, text in enumerate(ready) if self._odd(text) or self._odd(texts[i])}
        kept = [text for i, text in enumerate(ready) if i not in odd]
        ids = self._in_threads(kept)
        if not odd:
            return ids
        fast, slow = iter(ids), iter(self._by_tokenizers([texts[i] for i in sorted(odd)]))
        return [next(slow) if i in odd else next(fast) for i in range(len(texts))]

    def _in_threads(self, texts: list[str]) -> list[list[int]]:
        """Short texts by the handful: a thread asked for each of them costs more than its encoding."""
        encode, size = self._fast.encode_ordinary, 0
        handfuls: list[list[str]] = [[]]
        for text in texts:
            if size > _HANDFUL:
                handfuls.append([])
                size = 0
            handfuls[-1].append(text)
            size += len(text)
        if len(handfuls) == 1 or _THREADS == 1:
            return [encode(text) for text in texts]
        with ThreadPoolExecutor(_THREADS) as pool:
            done = pool.map(lambda some: [encode(text) for text in some], handfuls)
            return [ids for some in done for ids in some]

    def _normal(self, text: str) -> str:
        if not self._nfc or text.isascii():
            return text
        if _UNSETTLED.search(text):
            return self._slow.normalizer.normalize_str(text)
        return unicodedata.normalize("NFC", text)

    def _odd(self, text: str) -> bool:
        """Texts left to `tokenizers`: with a mark that it cuts out, or an endless blank."""
        return bool(self._marks and self._marks.search(text)) or (len(text) > _BLANK and bool(_ENDLESS.search(text)))


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of a fast tokenizer of transformers: `encoder_of(t).one("hola")`."""
    return Encoder(tokenizer)


def _whole(text: str) -> str:
    try:
        text.encode()  # quicker than looking for what is hardly ever there
        return text
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)


def pattern_of(spec: dict[str, Any]) -> str | None:
    """Which of PATTERNS a `tokenizer.json` cuts by: "gpt2", "llama3", "qwen2", "bloom" or None."""
    cut = spec.get("pre_tokenizer") or {}
    parts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    if [p.get("type") for p in parts] == ["ByteLevel"]:
        return "gpt2" if parts[0]["use_regex"] and not parts[0]["add_prefix_space"] else None
    if [p.get("type") for p in parts] != ["Split", "ByteLevel"]:
        return None
    split, bytes_ = parts
    plain = split["behavior"] == "Isolated" and not split["invert"]
    if not plain or bytes_["use_regex"] or bytes_["add_prefix_space"]:
        return None
    return next((name for name, text in PATTERNS.items() if split["pattern"].get("Regex") == text), None)


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies: `byte_letters()["Ġ"]` is 32."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _tiktoken(spec: dict[str, Any], slow: Any) -> tuple[Any, str]:
    """tiktoken's engine over the same merges, or None and the reason: a key of `tokenizer.engine`."""
    try:
        import tiktoken
    except ImportError:
        return None, "absent"
    model, normalizer = spec["model"], spec.get("normalizer")
    name = pattern_of(spec)
    special = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(key) for key in special):
        return None, "kind"
    if name is None:
        return None, "pattern"
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None, "normalizer"
    letters, added = byte_letters(), {t["content"] for t in spec["added_tokens"]}
    vocabulary = {text: i for text, i in model["vocab"].items() if text not in added}
    if not letters.keys() <= vocabulary.keys() or any(not letters.keys() >= {*text} for text in vocabulary):
        return None, "bytes"
    if not _one_order(model, vocabulary):
        return None, "merges"
    ranks = {bytes(letters[c] for c in text): i for text, i in vocabulary.items()}
    pattern = WHOLE.get(name, PATTERNS[name])
    return tiktoken.Encoding("maese", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), ""


def _one_order(model: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """The three conditions of the proof above."""
    from tokenizers import Tokenizer, models

    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    made = [vocabulary.get("".join(pair), -1) for pair in merges]
    if any(a >= b for a, b in itertools.pairwise(made)) or made[:1] == [-1]:
        return False
    if len(made) + 256 != len(vocabulary):
        return False
    alone = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    texts = list(vocabulary)
    return all(
        e.ids == [vocabulary[t]] for t, e in zip(texts, alone.encode_batch_fast(texts), strict=True)
    )  # no pattern and no bytes here: a token is spelt in the letters of the vocabulary itself


def _marks(slow: Any) -> re.Pattern[str] | None:
    """Added tokens that are not special: `tokenizers` cuts them out of any text, as tiktoken would not."""
    plain = [t.content for t in slow.get_added_tokens_decoder().values() if not t.special]
    return re.compile("|".join(map(re.escape, plain))) if plain else None
