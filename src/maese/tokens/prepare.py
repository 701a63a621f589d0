"""From a recipe's sources to the examples the loop will see, once: afterwards they are opened from files.

    prepared = prepare(recipe.data, tokenizer, longest=512)
    prepared.train[0]                  Example(ids=[…], mask=[…])

Two passes over the sources, neither of which holds them: the doctor looks, and refuses; then rows are cleaned, put on
their side, rendered, cut, and written. Whatever is left out is counted and kept in `dropped.jsonl` with its reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Data, at_home
from maese.text import language, read, split
from maese.text.convert import row_of
from maese.text.deal import Examined, Parcel, examine, flow, summary
from maese.text.read import Reading
from maese.text.record import Note
from maese.tokens import store
from maese.tokens.encode import encoder_of
from maese.tokens.settle import settle
from maese.tokens.template import Example, open_template

# A corpus far shorter than this teaches nothing that could be told from noise.
FEWEST_ROWS = 2
AT_ONCE = 512  # items encoded together
COMMIT = 50 * AT_ONCE  # items after which what is written is made safe
KEPT_GIB = 10.0  # of prepared files, those used last
FORMAT = 1  # of the prepared files: raised when the same recipe would give other ids


@dataclass
class Prepared:
    train: store.Rows
    validation: store.Rows
    format: str
    facts: dict[str, Any]
    notes: list[Note]
    folder: Path


Progress = Callable[[int], object]


def prepare(
    data: Data, tokenizer: Any, longest: int, prompts: Iterable[str] = (), progress: Progress | None = None
) -> Prepared:
    """Prepare a recipe's data for a tokenizer and a model of `longest` tokens of context, or open what was prepared.

    `prompts` are those of the evaluation, looked for in what is learnt; `progress` receives how many items are done.
    Errors: those of `text.read` and `open_template`; DATA-06 and DATA-13 (too many faulty rows), DATA-07 (sources of
    different kinds), DATA-09 (rows too long), DATA-10 (too little text), BATCH-01 (max_length beyond the model),
    BATCH-02 (max_length shorter than the template).
    """
    if data.max_length > longest:
        raise MaeseError("BATCH-01", key="data.max_length", found=data.max_length, longest=longest)
    if data.stride >= data.max_length:
        raise MaeseError("USE-03", key="data.stride", found=str(data.stride), expected=f"< {data.max_length}")
    readings = [read.open_source(source, data.format) for source in data.sources]
    _one_kind(readings, data)
    encode_many = encoder_of(tokenizer).many if tokenizer.is_fast else None
    renderer = open_template(data.template, tokenizer, encode_many)
    if readings[0].kind == "chat":
        renderer.refuse_short(data.max_length)

    def fill(writer: store.Writer) -> dict[str, Any]:
        try:
            examined = [examine(reading, data, list(prompts)) for reading in readings]
            return _fill(writer, readings, examined, data, renderer, progress)
        finally:
            language.forget()  # what comes next is training, which has a better use for its memory

    folder = store.cached(store.place(_key(data, readings, tokenizer, list(prompts))), len(tokenizer), fill)
    store.prune(KEPT_GIB)
    prepared = _open(folder, data)
    for source, reading in zip(prepared.facts["sources"], readings, strict=True):
        source["path"] = reading.path
    if readings[0].kind == "chat":
        prepared.notes.extend(renderer.notes)
    return prepared


def _one_kind(readings: list[Reading], data: Data) -> None:
    first = readings[0]
    for other in readings[1:]:
        if other.kind != first.kind:
            facts = {"path": first.path, "format": first.format, "other": other.path, "other_format": other.format}
            raise MaeseError("DATA-07", **facts)
    if first.kind == "chat" and data.too_long == "split":
        raise MaeseError("USE-03", key="data.too_long", found="split", expected="error | drop | truncate")


def _open(folder: Path, data: Data) -> Prepared:
    train, validation = (store.Rows.open(folder, side) for side in store.SIDES)
    facts = train.meta | {
        "train": _count(train),
        "validation": _count(validation),
        "ids_sha256": hashlib.sha256(f"{train.sha256}{validation.sha256}".encode()).hexdigest(),
    }
    if len(train) < FEWEST_ROWS or (data.validation and not len(validation)):
        needed = FEWEST_ROWS + int(data.validation > 0)
        raise MaeseError(
            "DATA-10", rows=len(train) + len(validation), tokens=train.tokens + validation.tokens, needed=needed
        )
    notes = [(key, about) for key, about in facts.pop("notes")]
    return Prepared(train, validation, facts["format"], facts, notes, folder)


def _count(rows: store.Rows) -> dict[str, int]:
    return {"rows": len(rows), "tokens": rows.tokens, "targets": int(rows.targets.sum())}


def _key(data: Data, readings: list[Reading], tokenizer: Any, prompts: list[str]) -> str:
    """What the prepared files depend on, and nothing else: the same words, tokenizer and choices are the same files."""
    template = at_home(data.template)
    choices = data.model_dump() | {"packing": False}
    for source in choices["sources"]:
        source["path"] = None  # the same files are the same wherever they are; what they hold is in their hash
    facts = {
        "format": FORMAT,
        "data": choices,
        "prompts": prompts,
        "sources": [(reading.format, reading.sha256) for reading in readings],
        "tokenizer": _fingerprint(tokenizer),
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "template": template.read_text("utf-8") if template.is_file() else getattr(tokenizer, "chat_template", None),
    }
    return store.key(facts)


def _fingerprint(tokenizer: Any) -> str:
    spec = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return hashlib.sha256(spec.encode()).hexdigest()


@dataclass
class _Account:
    """What is counted while writing, kept with each commit so that a preparation can go on."""

    dropped: dict[str, int] = field(default_factory=dict)
    long: int = 0
    longest: int = 0
    where: str = ""
    rendered: int = 0

    def drop(self, writer: store.Writer, reason: str, facts: dict[str, Any]) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        writer.drop(facts | {"reason": reason})


def _fill(
    writer: store.Writer, readings: list[Reading], examined: list[Examined], data: Data, renderer: Any,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Write every example to its side; returns the facts that are kept with them."""
    account = _Account(**writer.state)
    dealt = flow(readings, examined, data)
    done = sum(1 for _ in itertools.islice(dealt, writer.done_items))
    while chosen := list(itertools.islice(dealt, AT_ONCE)):
        _write(writer, chosen, data, renderer, account)
        done += len(chosen)
        if done % COMMIT < AT_ONCE:
            writer.commit(done, dict(vars(account)))
        if progress:
            progress(done)
    if account.long and data.too_long == "error":
        facts = {"longest": account.longest, "where": account.where}
        raise MaeseError("DATA-09", count=account.long, total=account.rendered, limit=data.max_length, **facts)
    writer.commit(done, dict(vars(account)))
    return _facts(readings, examined, data, account)


def _write(writer: store.Writer, chosen: list[Parcel], data: Data, renderer: Any, account: _Account) -> None:
    """Render a handful of items, settle those that are too long, and add what is left to its side."""
    kept = [parcel for parcel in chosen if parcel.item is not None]
    for parcel in chosen:
        if parcel.item is None:
            account.drop(writer, parcel.reason, parcel.facts)
    items = [parcel.item for parcel in kept]
    for parcel, example in zip(kept, renderer.render_many(items, data.loss), strict=True):
        account.rendered += 1
        for settled in _settled(writer, parcel.item, example, data, renderer, account):
            for _ in range(copies(settled, parcel.weight)):
                writer.add(parcel.side, settled)


def copies(example: Example, weight: float) -> int:
    """How many times an example is learnt in an epoch: 2.5 is twice for all and once more for half of them.

    Which half, its ids decide: the same text from another folder falls the same way.
    """
    return int(weight) + (split.chance(str(example.ids)) < weight - int(weight))


def _settled(
    writer: store.Writer, item: Any, example: Example, data: Data, renderer: Any, account: _Account
) -> list[Example]:
    about = row_of(item) | {"id": item.id}
    if not example.targets:
        account.drop(writer, "nothing_to_learn", about)
        return []
    if len(example) <= data.max_length:
        return [example]
    account.long += 1
    if len(example) > account.longest:
        account.longest, account.where = len(example), item.id
    if data.too_long == "error":  # told when all have been seen: the length it proposes must fit them all
        return []
    found = settle(item, example, renderer, data)
    if not found:
        account.drop(writer, "too_long" if data.too_long == "drop" else "nothing_to_learn", about)
    elif data.too_long == "truncate":
        account.dropped["truncated"] = account.dropped.get("truncated", 0) + 1
    return found


def _facts(readings: list[Reading], examined: list[Examined], data: Data, account: _Account) -> dict[str, Any]:
    formats = {reading.format for reading in readings}
    notes = [note for reading in readings for note in reading.notes]
    if left_out := sum(count for reason, count in account.dropped.items() if reason != "truncated"):
        notes.append(("data.note.left_out", {"count": left_out}))
    notes += [("data.note.health", {"path": x.audit.path}) for x in examined if x.audit.of("warning")]
    return {
        "format": formats.pop() if len(formats) == 1 else "auto",
        "sources": [reading.facts() for reading in readings],
        "split": "tail" if all(seen.one_piece for seen in examined) else "hash",
        "template": data.template if readings[0].kind == "chat" else None,
        "dropped": account.dropped,
        "audit": [summary(seen.audit) for seen in examined],
        "notes": [list(note) for note in notes],
    }
