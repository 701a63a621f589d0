"""The data doctor: a source to a report of its health, in one reading and without holding its rows.

    audit(open_source(Source(path="tutor.jsonl")))      Audit(rows=1842, health="good", findings=[Finding("…"), …])

What is judged of each row alone is in `faults`; here is what takes all of them: how long they are, which say the same,
which of those kept apart were learnt from. Only hashes, counts and line numbers are kept,
and the text of the rows that will be measured on.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from maese.errors import MaeseError
from maese.text import streams
from maese.text.dedup import Duplicates, exact_key, whole
from maese.text.faults import MARKS, READING, Fault, brief, excerpt, faults_of, learnt, signs_of
from maese.text.findings import (
    FEW_ROWS,
    FEWEST_ROWS,
    KINDS,
    LITTLE_TEXT,
    MOST_EXAMPLES,
    MOST_LABELS,
    NOT_OF_A_ROW,
    SAME_ANSWER_ROWS,
    SAME_ANSWER_SHARE,
    SEVERITIES,
    Audit,
    Finding,
    health,
    histogram,
    quantiles,
)
from maese.text.language import ANY_FOREIGN, LETTERS, OWN, SPANISH, language_of
from maese.text.overlap import Overlap, Prompts
from maese.text.read import Item, Reading, letters
from maese.text.record import Conversation, Document

LEAK_SHARE = 0.5  # of the runs of 13 words of a row kept apart, before it is said to be known already
# Words that no other language of the detector has: enough of them and it need not be asked.
ENGLISH = OWN["en"] - SPANISH - frozenset[str]().union(*(words for code, words in OWN.items() if code != "en"))
SHORT = 5000  # characters in which every word is looked at
OTHER_LETTERS = re.compile("[\u0370-\u1dff\u2e80-\uffef]")  # Greek, Cyrillic, Arabic, Chinese…
FILE = 2**40  # places of one file: more lines than any has
BATCH_ITEMS, BATCH_CHARACTERS = 512, 2**20


@dataclass
class _Kind:
    lines: list[int] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)


def audit(
    reading: Reading,
    *,
    lengths: Callable[[list[Item]], list[Any]] | None = None,
    limit: int | None = None,
    too_long: str = "error",
    held: Callable[[Item], bool] | None = None,
    prompts: list[str] | None = None,
    near: bool = False,
    language: str = "es",
    specials: list[str] | None = None,
    stop_ids: frozenset[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Read a source once and report on it.

    `lengths` renders items to examples (`len`, `.ids`, `.mask`, `.targets`); without it lengths are in characters.
    `limit` and `too_long` are the recipe's, `held` tells the items kept apart, `prompts` are those it will be judged
    with, `stop_ids` the tokens that may end an answer. Near-duplicates are looked for only if asked: it takes longer.
    """
    doctor = Doctor(lengths, limit, too_long, held, prompts or [], near, language, specials or [], stop_ids)
    inside = streams.pieces(reading.path) if reading.source.path is not None else []
    doctor.of_lines = (
        reading.format == "text" and bool(inside) and all(piece.suffix in streams.TEXTS for piece in inside)
    )
    for done, item in enumerate(dataclasses.replace(reading, raw=True, fault=doctor.unread), 1):
        doctor.look(item)
        if progress and not done % 1000:
            progress(done)
    _marks_of_order(inside, doctor)
    return doctor.report(reading.path, reading.format)


def _marks_of_order(inside: list[streams.Piece], doctor: Doctor) -> None:
    for piece in inside:
        with piece.open() as stream:
            head = stream.read(12)
        marks = len(head) - len(head.removeprefix(b"\xef\xbb\xbf"))
        if marks:
            doctor.note(Fault("bom", ""), doctor._place(piece.name, 1), piece.name)


class Doctor:
    """The state of one examination: `look` at each item, then `report`."""

    def __init__(
        self, lengths: Callable[[list[Item]], list[Any]] | None, limit: int | None, too_long: str,
        held: Callable[[Item], bool] | None, prompts: list[str], near: bool, language: str, specials: list[str],
        stop_ids: frozenset[int] | None,
    ) -> None:  # fmt: skip
        self.lengths, self.limit, self.too_long, self.held = lengths, limit, too_long, held
        self.language, self.stop_ids = language, stop_ids
        own = [re.escape(mark) for mark in sorted(specials, key=len, reverse=True) if mark.strip()]
        self.marks = re.compile("|".join([MARKS.pattern, *own]), re.MULTILINE) if own else MARKS
        self.prompts = Prompts(prompts) if prompts else None
        self.questions = {_said(prompt) for prompt in prompts}
        self.of_lines = False  # a raw text: its faults are on its lines, and not where its one document begins
        self.files: dict[str, int] = {}
        self.kinds: dict[str, _Kind] = {}
        self.faulty: dict[int, str] = {}
        self.rows = self.units = self.characters = self.tokens = self.targets = 0
        self.counts, self.languages = Counter[str](), Counter[str]()
        self.sizes, self.item_lines = array("L"), array("Q")
        self.waiting: list[tuple[Item, int]] = []
        self.waiting_characters = 0
        self.first: dict[int, int] = {}  # a hash of each row, and its line
        self.asked: dict[int, tuple[int, int]] = {}  # of each question: its line and a hash of its answer
        self.answers, self.answer_lines, self.said_again = Counter[int](), array("Q"), dict[int, str]()
        self.copies = Duplicates() if near else None
        self.overlap, self.kept_apart = Overlap(), list[tuple[int, str]]()

    def look(self, item: Item) -> None:
        """Take an item into account."""
        line = self._place(item.id.rpartition("#")[0], int(item.meta.get("line", self.rows + 1)))
        self.rows += 1
        self.item_lines.append(line)
        self._count(item)
        found = faults_of(item)
        place = _places(item, line) if self.of_lines else lambda at: line
        for fault in found:
            self.note(fault, place(fault.at), item.id)
        spoken = self._spoken(item)
        self.languages[spoken or "?"] += 1
        for fault in signs_of(item, spoken, self.language, self.marks):
            self.note(fault, place(fault.at), item.id)
        self._compare(item, line)
        if not found:
            self.waiting.append((item, line))
            self.waiting_characters += letters(item)
            if len(self.waiting) >= BATCH_ITEMS or self.waiting_characters >= BATCH_CHARACTERS:
                self._measure()

    def unread(self, problem: MaeseError) -> None:
        """Take into account what the reader could not read."""
        kind, facts = READING.get(problem.code, "keys"), problem.facts
        line = self._place(str(facts.get("path", "")), int(facts.get("line", 1)))  # type: ignore[call-overload]  # facts are of any type
        # Of what is no text there is nothing to show: its «found» is the name of a type.
        names = ("shown", "keys", "other_format", *(("found",) if kind != "not_text" else ()))
        shown = str(next((facts[name] for name in names if facts.get(name)), ""))
        if kind == "encoding" and kind in self.kinds:
            return
        self.units += kind != "encoding"
        self.note(Fault(kind, shown, 0), line, str(problem.facts.get("path", "")))
        self.kinds[kind].facts = {
            **{k: v for k, v in problem.facts.items() if isinstance(v, (str, int))},
            **self.kinds[kind].facts,
        }

    def _place(self, file: str, line: int) -> int:
        """A line among all the files of a source, as one number that keeps their order."""
        return self.files.setdefault(file, len(self.files)) * FILE + line

    def _line(self, place: int) -> int | str:
        """The line of a place as people are told it: with its file, when there are several."""
        number, line = divmod(place, FILE)
        return line if len(self.files) < 2 else f"{list(self.files)[number]}#{line}"

    def note(self, fault: Fault, line: int, where: str, first: int | None = None) -> None:
        """Keep a fault: its line, what it is labelled, an excerpt if it is among the first; `first` is the line that
        it repeats."""
        kept = self.kinds.setdefault(fault.kind, _Kind())
        if fault.label:
            kept.labels[fault.label] += 1
        if KINDS[fault.kind] == "error" and fault.kind not in NOT_OF_A_ROW:
            self.faulty.setdefault(line, fault.kind)
        if kept.lines and kept.lines[-1] == line:
            return
        kept.lines.append(line)
        if len(kept.examples) < MOST_EXAMPLES:
            text, at = excerpt(fault.text, fault.at)
            example = {"line": line, "id": where, "text": text, "at": at}
            kept.examples.append(example | ({"first": first} if first is not None else {}))

    def report(self, path: str, format: str) -> Audit:
        """What was found in all that was looked at."""
        self._measure()
        self._copies()
        self._leaks()
        self._few()
        self._long()
        findings = sorted(
            (self._finding(kind, kept) for kind, kept in self.kinds.items()),
            key=lambda found: (SEVERITIES.index(found.severity), -found.count),
        )
        sizes = sorted(self.sizes)
        measured = self.lengths is not None
        limit = self.limit if measured else None  # it is in tokens
        units = max(self.units, 1)
        return Audit(
            path, format, self.rows, units, dict(self.counts), self.characters,
            self.tokens if measured else None, self.targets / self.tokens if measured and self.tokens else None,
            "tokens" if measured else "characters", quantiles(sizes), histogram(sizes, limit), limit,
            dict(self.languages.most_common()), findings, health(findings, len(self.faulty), self.rows, units),
            {self._line(place): kind for place, kind in sorted(self.faulty.items())},
        )  # fmt: skip

    def _count(self, item: Item) -> None:
        if isinstance(item, Document):
            self.counts["documents"] += 1
            self.characters += len(item.text)
            self.units += 1 + item.text.count("\n") * self.of_lines
        else:
            self.counts["conversations"] += 1
            self.counts["turns"] += len(item.messages)
            self.counts["system"] += any(m.role == "system" for m in item.messages)
            self.characters += sum(len(m.content) for m in item.messages)
            self.units += 1

    def _spoken(self, item: Item) -> str | None:
        text = learnt(item)
        if len(text) < SHORT and not OTHER_LETTERS.search(text):
            said = LETTERS.findall(text.lower())
            # Without words of another language it is Spanish or cannot be told, and the detector is slow.
            if sum(map(ANY_FOREIGN.__contains__, said)) * 12 < len(said):
                return "es" if sum(map(SPANISH.__contains__, said)) >= 2 else None
            if sum(map(ENGLISH.__contains__, said)) > max(2, len(said) // 6):
                return "en"
        try:
            return language_of(text)
        except MaeseError as problem:
            if problem.code != "DEP-01":
                raise
            return None  # the detector is an extra, and the rest of the doctor does not need it

    def _compare(self, item: Item, line: int) -> None:
        """Is this row, this question or this answer there already?"""
        everything = whole(item)
        first = self.first.setdefault(_hash(everything), line)
        if first != line:
            self.note(Fault("exact_duplicate", brief(item)), line, item.id, first)
        if self.copies:
            self.copies.add(f"{len(self.copies.ids)} {line} {item.id}", everything)
        if isinstance(item, Conversation):
            self._compare_turns(item, line)
        if self.held:
            said = (
                "\n".join(m.content for m in item.messages if m.role != "system")
                if isinstance(item, Conversation)
                else item.text
            )
            if self.held(item):
                self.kept_apart.append((line, said))
            else:
                self.overlap.learn(said)
        if self.prompts and (self.prompts.inside(everything) or self._asks(item)):
            self.note(Fault("eval_leak", brief(item)), line, item.id)

    def _asks(self, item: Item) -> bool:
        """Whether someone asks in it, word for word, an evaluation prompt too short to be looked for inside."""
        return isinstance(item, Conversation) and any(
            m.role == "user" and _said(m.content) in self.questions for m in item.messages
        )

    def _compare_turns(self, item: Conversation, line: int) -> None:
        last = max((i for i, m in enumerate(item.messages) if m.role == "assistant"), default=-1)
        if last < 1 or not item.messages[last].content.strip():
            return
        answer = _hash(item.messages[last].content)
        asked = _hash("\n".join(f"{m.role}: {m.content}" for m in item.messages[:last]))
        first = self.asked.setdefault(asked, (line, answer))
        if first[1] != answer:
            self.note(Fault("same_question", brief(item)), line, item.id, first[0])
        self.answers[answer] += 1
        self.answer_lines.extend((answer, line))
        if self.answers[answer] == SAME_ANSWER_ROWS + 1:
            self.said_again[answer] = item.messages[last].content[:400]

    def _measure(self) -> None:
        """Lengths of the rows that wait, rendered together because that is several times faster."""
        waiting, self.waiting, self.waiting_characters = self.waiting, [], 0
        if not waiting:
            return
        if self.lengths is None:
            self.sizes.extend(letters(item) for item, _ in waiting)
            return
        for (item, line), example in zip(waiting, self.lengths([item for item, _ in waiting]), strict=True):
            self.sizes.append(len(example))
            self.tokens += len(example)
            self.targets += example.targets
            if not example.targets:
                self.note(Fault("nothing_to_learn", brief(item)), line, item.id)
            elif self.stop_ids is not None:
                last = len(example.mask) - 1 - example.mask[::-1].index(1)
                if example.ids[last] not in self.stop_ids:
                    self.note(Fault("lost_end", brief(item), len(brief(item))), line, item.id)
            if self._passes(len(example)):
                self.note(Fault("too_long", brief(item)), line, item.id)

    def _passes(self, size: int) -> bool:
        return self.limit is not None and self.too_long != "split" and size > self.limit

    def _copies(self) -> None:
        if len(self.first) == 1 and self.rows >= FEWEST_ROWS:
            copied = self.kinds.pop("exact_duplicate")
            self.kinds["all_equal"] = _Kind([min(self.first.values()), *copied.lines], copied.examples)
            return
        if self.copies:
            why = self.copies.reasons()
            for id, kept in self.copies.dropped().items():
                if why[id] == "near_duplicate":
                    (_, line, where), like = id.split(" ", 2), int(kept.split(" ", 2)[1])
                    self.note(Fault("near_duplicate", ""), int(line), where, like)
        for answer, text in self.said_again.items():
            if self.answers[answer] > SAME_ANSWER_SHARE * self.rows:
                pairs = zip(self.answer_lines[::2], self.answer_lines[1::2], strict=True)
                for place in (line for each, line in pairs if each == answer):
                    self.note(Fault("same_answer", text), place, "")

    def _leaks(self) -> None:
        for line, said in self.kept_apart:
            if self.overlap.check(said) >= LEAK_SHARE:
                self.note(Fault("leak", said), line, "")

    def _few(self) -> None:
        talks = self.counts["conversations"]
        if talks and talks < FEW_ROWS:
            self.kinds["few_rows"] = _Kind(facts={"rows": talks, "wanted": FEW_ROWS})
        elif self.counts["documents"] and self.characters < LITTLE_TEXT:
            self.kinds["little_text"] = _Kind(facts={"characters": self.characters, "wanted": LITTLE_TEXT})

    def _long(self) -> None:
        if found := self.kinds.get("too_long"):
            sizes = sorted(self.sizes)
            over = [size - self.limit for size in sizes if size > (self.limit or 0)]  # type: ignore[operator]  # with no limit none is found
            found.facts = {
                "limit": self.limit,
                "tokens": sum(over),
                "longest": sizes[-1],
                "most": quantiles(sizes)["p99"],
            }

    def _finding(self, kind: str, kept: _Kind) -> Finding:
        severity = KINDS[kind]
        if (kind == "too_long" and self.too_long == "error") or (
            kind == "few_rows" and kept.facts["rows"] < FEWEST_ROWS
        ):
            severity = "error"
        # Commands count rows, and a row may take several lines.
        row = bisect.bisect_right(self.item_lines, kept.lines[0]) if kept.lines and not self.of_lines else 1
        facts = {
            "row": max(row, 1),
            **kept.facts,
            **({"labels": dict(kept.labels.most_common(MOST_LABELS))} if kept.labels else {}),
        }
        lines = [self._line(place) for place in sorted(set(kept.lines))]
        examples = [each | {k: self._line(each[k]) for k in ("line", "first") if k in each} for each in kept.examples]
        return Finding(kind, severity, len(lines) or 1, lines, examples, facts)


def _places(item: Item, line: int) -> Callable[[int], int]:
    """The line of the file a place of an item is on: a conversation is one line, a document may have many."""
    if isinstance(item, Conversation) or "\n" not in item.text:
        return lambda at: line
    breaks: list[int] = []

    def place(at: int) -> int:
        if not breaks:
            breaks.extend(m.start() for m in re.finditer("\n", item.text))
        return line + bisect.bisect_left(breaks, at)

    return place


def _hash(text: str) -> int:
    return int(exact_key(text)[:16], 16)


def _said(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
