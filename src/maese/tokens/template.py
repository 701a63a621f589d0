"""The one renderer: a document or a conversation to `(ids, mask)`, for training, evaluation and generation alike.

    renderer = open_template("chatml", tokenizer)
    renderer.render(conversation)          Example(ids=[…], mask=[0, 0, …, 1, 1])
    renderer.prompt_ids(messages)          the same ids, up to where the assistant begins to write

A template is a row of data that says how each role is written. In between, a conversation is a list of pieces: a
special token or a run of text, each with the turn it teaches. Text typed by people never becomes a special token; the
token that ends an answer comes from the template alone and is always learnt with it.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from maese.errors import MaeseError
from maese.recipe import at_home
from maese.text.record import Conversation, Document, Message, Note
from maese.tokens.runs import Encode, Runs

CONTEXT = -1  # the turn of what is read and not learnt, as is any below it
CHUNK = 1024  # conversations encoded together: enough for a tokenizer to be fast, little to hold
FILES = (".jinja", ".j2")


@dataclass(frozen=True)
class Example:
    """One row of training: `ids` and, for each, whether it is learnt. The first token never is."""

    ids: list[int]
    mask: list[int]
    id: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return sum(self.mask)


class Piece(NamedTuple):
    """A special token (its id) or a run of text, and the number of the turn it teaches, or CONTEXT."""

    value: int | str
    turn: int = CONTEXT


@dataclass(frozen=True)
class Template:
    """How each role is written. `{}` is what was said; `{bos}` and `{eos}` are those of the tokenizer, and `{opening}`
    is `{bos}` where the tokenizer puts one by itself."""

    user: str
    cue: str  # what comes before an answer: the prompt ends exactly here
    system: str | None = None  # None: it is said at the beginning of the next question
    answer: str = "{}"
    end: str = "{eos}"  # the token that ends an answer, learnt with it
    after: str = ""
    start: str = "{opening}"
    between: str = ""  # before any question but the first
    trim: tuple[str, ...] = ("system", "user", "assistant")  # roles whose outer white space is not written
    marks: tuple[str, ...] = ()  # what must be one token each
    spelt: bool = False  # a mark the tokenizer lacks is written out, and an end it lacks is its eos


TEMPLATES = {
    "maese": Template(
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        cue="<|assistant|>\n",
        end="<|end|>",
        after="\n",
        marks=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        spelt=True,
    ),
    "instruccion": Template(system="{}", user="### Instrucción:\n{}", cue="\n\n### Respuesta:\n", between="\n\n"),
    # As Qwen3-Instruct-2507 writes it. Qwen 2 and 2.5 add a system turn in English where there is none: whoever wants
    # their sentence asks for `model`, and nobody else is taught words that are not in their data.
    "chatml": Template(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        cue="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        trim=(),
        marks=("<|im_start|>", "<|im_end|>"),
    ),
    # As Llama 3 Instruct. From 3.1 on, the published one adds a system turn with dates: that one is `model`.
    "llama3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        start="{bos}",
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # As Mistral 7B Instruct v0.3 (tokenizer v3; v1 puts a space before [INST] and v7 gives system its own marks).
    # The published one says the system turn in the last question, so each answer would rewrite what came before it
    # and a whole conversation loses it; here it stays in the first. With one question both are the same.
    "mistral": Template(
        user="[INST] {}[/INST]",
        cue="",
        answer=" {}",
        start="{bos}",
        trim=("assistant",),
        marks=("[INST]", "[/INST]"),
    ),
    # As Gemma 2, which refuses a system turn; it is said as Gemma 3 says it.
    "gemma": Template(
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        cue="<start_of_turn>model\n",
        end="<end_of_turn>",
        after="\n",
        start="{bos}",
        trim=("user", "assistant"),
        marks=("<start_of_turn>", "<end_of_turn>"),
    ),
    # Words any base model has met, no token of its own.
    "plain": Template(system="{}\n", user="Pregunta: {}\n", cue="Respuesta:", answer=" {}"),
}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as text: `encode(t, "<|end|>")` spells the mark out, it does not make it."""
    return _encoder(tokenizer)([text])[0]


def opening(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, when this tokenizer is of those that put one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def fitting(tokenizer: Any) -> str:
    """The built-in template whose marks this tokenizer has; `plain`, which needs none, when it has no one's."""
    added = tokenizer.get_added_vocab()
    return next((name for name, row in TEMPLATES.items() if row.marks and set(row.marks) <= set(added)), "plain")


def refuse_unknown(name: str) -> None:
    """TEMPLATE-05 where a template is none of the built-in ones, not `model`, and no file."""
    names = [*TEMPLATES, "model"]
    if name not in names and not (name.endswith(FILES) and at_home(name).is_file()):
        nearest = (difflib.get_close_matches(name.lower(), names, 1, 0.4) or ["plain"])[0]
        raise MaeseError("TEMPLATE-05", template=name, names=", ".join(names), nearest=nearest)


def open_template(name: str, tokenizer: Any, encode_many: Encode | None = None) -> Renderer:
    """The renderer of a built-in template, of the tokenizer's own (`model`), or of a .jinja file.

    Errors: TEMPLATE-01 (`model` without one), TEMPLATE-02 (marks of another family), TEMPLATE-03 (nothing ends an
    answer), TEMPLATE-04 (the file cannot be used), TEMPLATE-05 (unknown name).
    """
    refuse_unknown(name)
    shape: Shape
    if name in TEMPLATES:
        shape = Written(name, TEMPLATES[name], tokenizer)
    else:
        from maese.tokens.jinja import Jinja

        shape = Jinja(name, tokenizer)
    return Renderer(name, tokenizer, shape, encode_many or _encoder(tokenizer))


def _encoder(tokenizer: Any) -> Encode:
    # Not verbose: a whole book is encoded before it is cut, and the warning about its length would be about nothing.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}

    def ids(texts: Sequence[str]) -> list[list[int]]:
        # A terminal may give half a character, which cannot be spelt in bytes.
        whole = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return tokenizer(whole, **options)["input_ids"] if whole else []

    return ids


class Shape(Protocol):
    """What tells one kind of template from another: how messages become pieces, and the same as a string."""

    ends: frozenset[int]  # the tokens that end an answer
    marks: frozenset[int]  # the tokens that only the template may write
    notes: list[Note]

    @property
    def jinja(self) -> str: ...

    def pieces(self, messages: tuple[Message, ...], generation: bool) -> list[Piece]: ...

    def string(self, messages: tuple[Message, ...], generation: bool) -> str: ...


class Written:
    """A row of TEMPLATES in the tokens of one tokenizer."""

    def __init__(self, name: str, row: Template, tokenizer: Any) -> None:
        added = tokenizer.get_added_vocab()
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        missing = [mark for mark in row.marks if mark not in added]
        if row.start == "{bos}" and bos is None:
            missing.append("bos")
        if missing and not row.spelt:
            raise MaeseError("TEMPLATE-02", template=name, missing=", ".join(missing), fits=fitting(tokenizer))
        end = "{eos}" if row.end in missing else row.end
        if "{eos}" in end and eos is None:
            raise MaeseError("TEMPLATE-03", template=name, fits=fitting(tokenizer))
        fill = {row.end: end, "{bos}": bos or "", "{eos}": eos or "", "{opening}": bos if opening(tokenizer) else ""}
        marks = {mark for mark in (*row.marks, bos, eos) if mark and mark not in missing}
        # Longest first: a mark that begins like another is not cut in two.
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
        self._ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
        self._names = {i: mark for mark, i in self._ids.items()}
        self.name, self.row, self._fill = name, row, fill
        self.marks = frozenset(self._ids.values())
        self.ends = frozenset(piece for piece in self._parts("end") if isinstance(piece, int))
        self.parts = {key: self._parts(key) for key in ("start", "cue", "answer", "end", "after", "between", "user")}
        self.parts["assistant"] = [*self.parts["answer"], *self.parts["end"]]
        if row.system is not None:
            self.parts["system"] = self._parts("system")
        spelt = ", ".join(missing)
        self.notes: list[Note] = [("template.spelt", {"template": name, "marks": spelt, "end": eos})] if spelt else []

    def written(self, key: str) -> str:
        """One of the strings of the row, with the tokens of this tokenizer: `written("end")` is `<|im_end|>`."""
        text = getattr(self.row, key) or ""
        for blank, value in self._fill.items():
            text = text.replace(blank, value)
        return text

    @property
    def jinja(self) -> str:
        from maese.tokens.jinja import jinja_of

        return jinja_of(self)

    def _parts(self, key: str) -> list[int | str | None]:
        """Ids, texts and, where what was said goes, None."""
        parts: list[int | str | None] = []
        for i, text in enumerate(self.written(key).split("{}")):
            found = self._marks.findall(text)
            parts += [None] * (i > 0)
            for before, mark in itertools.zip_longest(self._marks.split(text), found):
                parts += [part for part in (before, self._ids.get(mark)) if part not in ("", None)]
        return parts

    def pieces(self, messages: tuple[Message, ...], generation: bool) -> list[Piece]:
        pieces: list[Piece] = []

        def write(key: str, content: str = "", turn: int = CONTEXT) -> None:
            pieces.extend(Piece(content if part is None else part, turn) for part in self.parts[key])

        write("start")
        pending = ""
        for i, message in enumerate(messages):
            content = message.content.strip() if message.role in self.row.trim else message.content
            if message.role not in self.parts:  # a system turn with no marks of its own waits for a question
                pending += content + "\n\n"
                continue
            if message.role == "assistant":
                if pending:
                    write("user", pending.removesuffix("\n\n"))
                write("cue")
                write("assistant", content, i)
                write("after")
            else:
                if i:
                    write("between")
                write(message.role, pending + content)
            pending = ""
        if pending:
            write("user", pending.removesuffix("\n\n"))
        if generation:
            write("cue")
        return pieces

    def string(self, messages: tuple[Message, ...], generation: bool) -> str:
        pieces = self.pieces(messages, generation)
        return "".join(self._names[p.value] if isinstance(p.value, int) else p.value for p in pieces)


class Renderer:
    """Conversations and documents to ids and masks, through one template and one tokenizer.

    `stop_ids` are the tokens that end an answer, `notes` what a person should be told of how the template is written
    with this tokenizer, and `jinja` the same template for a saved tokenizer to carry.
    """

    def __init__(self, name: str, tokenizer: Any, shape: Shape, encode_many: Encode) -> None:
        self.name, self.notes, self._shape = name, shape.notes, shape
        self._opening = opening(tokenizer)
        eos = tokenizer.eos_token_id
        self._end = eos if eos is not None else min(shape.ends)
        self.stop_ids = shape.ends | {self._end}
        self._runs = Runs(tokenizer, encode_many, shape.marks)

    @property
    def jinja(self) -> str:
        return self._shape.jinja

    @cached_property
    def shortest(self) -> int:
        """Tokens of the template around one empty question and one empty answer."""
        try:
            return len(self._exchange(""))
        except MaeseError:  # templates that refuse an empty turn
            return len(self._exchange("a")) - 2

    def _exchange(self, content: str) -> list[int]:
        return self.render(Conversation((Message("user", content), Message("assistant", content)), "")).ids

    def refuse_short(self, limit: int) -> None:
        """BATCH-02 when `limit` tokens do not hold the template and one token more."""
        if limit <= self.shortest:
            facts = {"shortest": self.shortest, "needed": 8 * (self.shortest // 8 + 2)}
            raise MaeseError("BATCH-02", template=self.name, limit=limit, **facts)

    def text(self, messages: tuple[Message, ...], generation: bool = False) -> str:
        """The conversation as one string; with `generation`, ready for the assistant to write."""
        return self._shape.string(messages, generation)

    def prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids a model continues: they end exactly where the assistant begins to write."""
        pieces = join(self._shape.pieces(messages, True))
        return next(self._examples([(pieces, "")], [False])).ids

    def render(self, item: Document | Conversation, loss: str = "assistant") -> Example:
        """Ids and mask of a whole item. `loss` is which turns are learnt: assistant, last or all."""
        return next(self.render_many([item], loss))

    def render_many(self, items: Iterable[Document | Conversation], loss: str = "assistant") -> Iterator[Example]:
        """As `render`, one by one and in order, encoding many at a time."""
        stream = iter(items)
        while chunk := list(itertools.islice(stream, CHUNK)):
            everything = [loss == "all" or isinstance(item, Document) for item in chunk]
            yield from self._examples([(self._pieces(item, loss), item.id) for item in chunk], everything)

    def _pieces(self, item: Document | Conversation, loss: str) -> list[Piece]:
        if isinstance(item, Document):
            return [*map(Piece, self._opening), Piece(item.text), Piece(self._end)]
        pieces = join(self._shape.pieces(item.messages, False))
        if loss == "last":
            last = max((i for i, message in enumerate(item.messages) if message.role == "assistant"), default=0)
            return [Piece(p.value, p.turn if p.turn == last else CONTEXT) for p in pieces]
        return pieces

    def _examples(self, rows: list[tuple[list[Piece], str]], everything: list[bool]) -> Iterator[Example]:
        found = self._runs.encode([pieces for pieces, _ in rows])
        for (pieces, name), runs, whole in zip(rows, found, everything, strict=True):
            ids: list[int] = []
            mask: list[int] = []
            for piece, run in zip(pieces, runs, strict=True):
                ids += run
                mask += [int(whole or piece.turn >= 0)] * len(run)
            yield Example(ids, [0, *mask[1:]] if mask else [], name)


def join(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts that teach the same turn, as one: so they are encoded as the whole string would be."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and isinstance(last.value, str) and isinstance(piece.value, str) and last.turn == piece.turn:
            joined[-1] = Piece(last.value + piece.value, piece.turn)
        elif piece.value != "":
            joined.append(piece)
    return joined
