"""One row to what is wrong with it, looked at alone: nothing here knows of any other row.

    faults_of(conversation)      [Fault("empty_turn", "…", 0)]: what makes a row useless; it cannot be learnt from
    signs_of(conversation)       [Fault("personal", "…", 31, "email")]: what someone should look at

A fault holds the text it was found in and the place in it, so that whoever shows it can cut an excerpt around.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from maese.text import personal
from maese.text.clean import ANSWER, repetition
from maese.text.record import Conversation, Document
from maese.text.repair import CONTROL, MOJIBAKE
from maese.text.spanish import ABOUT_LANGUAGES, english_passage, mixed_address, opening_mark, prose

ROLES = ("system", "user", "assistant")
SURROGATE = re.compile("[\ud800-\udfff]")
# The marks that chat templates are made of (ChatML, Llama 2 and 3, Mistral, Gemma, Alpaca), and those of old models.
MARKS = re.compile(
    r"<\|[a-zA-Z][\w-]{1,38}\|>|</s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|^#{2,3} ?(?:Instrucción|Instruction|Respuesta|Response|Pregunta|Human|Assistant|Usuario|Asistente) ?:",
    re.MULTILINE,
)
BOILERPLATE = re.compile(
    r"(?i)\b(?:como|soy un|as an?) (?:un )?(?:modelo(?: de lenguaje| de ia)|inteligencia artificial|ai language model|"
    r"language model|asistente de (?:ia|inteligencia artificial))\b|\blorem ipsum\b|\bopenai\b.{0,40}\b(?:entren|train)"
    r"|(?<!\$)\[(?:inserte?|introdu[zc]c?[ae]|escrib[ae] aquí|tu nombre|su nombre|nombre del? |your name|insert )"
    r"[^\]\n]{0,40}\]"
    r"|\b(?:mi|my) (?:fecha de corte|knowledge cutoff)\b|\bregenerate response\b"
)
# One of these is in every text that BOILERPLATE matches, and looking for them takes a tenth of the time.
BOILERPLATE_HAS = ("model", "artificial", "asistente", "lorem", "openai", "[", "corte", "cutoff", "regenerate")
LONG_ANSWER, TIMES_LONGER = 400, 20  # characters of an answer, and times its prompt
JUDGED = 200_000  # characters of a book that are looked at for loops
CUT_FROM = 200  # characters: a shorter answer may be a name or a title
CUT = re.compile(r"(?:[^\W\d_]|,)\s*\Z")
LAST_LINE_FREE = re.compile(r"\s*(?:[-*•#>|]|\d+[.)])|.{0,60}\Z")  # of a list, a table, a title or a verse


class Fault(NamedTuple):
    """What was found, the text it is in, its place there, and which of its kind: a role, a language, a mark…"""

    kind: str
    text: str
    at: int = 0
    label: str = ""


def texts(item: Document | Conversation) -> list[str]:
    return [item.text] if isinstance(item, Document) else [message.content for message in item.messages]


def faults_of(item: Document | Conversation) -> list[Fault]:
    """What makes an item one that cannot be learnt from, at most one of each kind of a conversation.

    Kinds: surrogate, mojibake, empty_text, roles, one_sided, empty_turn, empty_user.
    """
    found = [
        fault
        for text in texts(item)
        if not text.isascii()
        for kind, pattern in (("surrogate", SURROGATE), ("mojibake", MOJIBAKE))
        for fault in _matches(kind, pattern, text, isinstance(item, Document))
    ]
    if isinstance(item, Document):
        return found if item.text.strip() else [Fault("empty_text", item.text)]
    return _once([*found, *_turns(item)])


def _turns(item: Conversation) -> Iterator[Fault]:
    said = {message.role for message in item.messages}
    first = item.messages[0].content if item.messages else ""
    sided = False
    for role in ("user", "assistant"):
        if role not in said and said <= set(ROLES):
            sided = True
            yield Fault("one_sided", first, 0, role)
    for message in item.messages:
        if not message.content.strip() and message.role in ("user", "assistant"):
            yield Fault("empty_turn" if message.role == "assistant" else "empty_user", _around(item), 0)
    if not sided and (problem := _disorder(item)):
        yield Fault("roles", item.messages[problem[0]].content, 0, problem[1])


def _disorder(item: Conversation) -> tuple[int, str] | None:
    """The first turn that is out of order and why: `unknown`, `system` (late), `starts` (with an answer), `twice`."""
    before = "system"
    for i, message in enumerate(item.messages):
        if message.role not in ROLES:
            return i, "unknown"
        if message.role == "system":
            if i:
                return i, "system"
            continue
        if message.role == before:
            return i, "twice"
        if message.role == "assistant" and before == "system":
            return i, "starts"
        before = message.role
    return None


def brief(item: Document | Conversation) -> str:
    """What an item says without its system message: for the excerpt of a fault that is of the whole row."""
    if isinstance(item, Document):
        return item.text
    return " → ".join(message.content for message in item.messages if message.role != "system")


def _around(item: Conversation) -> str:
    """The turns as a line, for an excerpt of what has no text of its own."""
    return " · ".join(f"{message.role}: {message.content.strip() or '∅'}" for message in item.messages[-4:])


def signs_of(
    item: Document | Conversation, spoken: str | None, language: str = "es", specials: re.Pattern[str] = MARKS
) -> list[Fault]:
    """What is worth a look. `spoken` is the language of what is learnt, if it can be told, and `language` the one
    wanted; `specials` are the marks that must not be typed in a text.

    Kinds: bom, control, not_nfc, special_tokens, personal, boilerplate, repetitive, language, mixed_language,
    opening_marks, mixed_address, unclosed_code, long_answer, cut_answer, unanswered.
    """
    whole, every = isinstance(item, Document), "\n".join(texts(item))
    found: list[Fault] = []
    if not every.isprintable() and CONTROL.search(every):
        found += (
            fault._replace(kind="bom" if every[fault.at] == "\ufeff" else "control")
            for fault in _matches("control", CONTROL, every, whole)
        )
    if not every.isascii() and not unicodedata.is_normalized("NFC", every):
        found += _loose_accents(every, whole)
    if specials is not MARKS or any(sign in every for sign in "<[#"):
        found += _matches("special_tokens", specials, every, whole)
    lower = every.lower()
    if any(word in lower for word in BOILERPLATE_HAS):
        found += _matches("boilerplate", BOILERPLATE, every, whole)
    found += (Fault("personal", every, start, name) for name, start, _ in personal.find(every))
    # The wide thresholds for documents too: of half a page of reference, the narrow ones say it of one in five.
    if repetition(learnt(item)[:JUDGED], ANSWER):
        found.append(Fault("repetitive", learnt(item)))
    if language == "es":
        foreign = list(_spanish(item, spoken))
    else:
        foreign = [Fault("language", learnt(item), 0, str(spoken))] if spoken not in (None, language) else []
    # A row that asks for a translation has two languages, and should.
    if foreign and (whole or not ABOUT_LANGUAGES.search(brief(item))):
        found += foreign
    if isinstance(item, Conversation):
        found += _answers(item)
    return found if whole else _once(found)


def _answers(item: Conversation) -> Iterator[Fault]:
    answers = [m.content for m in item.messages if m.role == "assistant"]
    for message in item.messages:
        ticks = message.content.replace("```", "")
        if "`" in ticks and ticks.count("`") % 2:
            yield Fault("unclosed_code", message.content, message.content.find("`"))
    asked = sum(len(m.content) for m in item.messages if m.role == "user")
    if answers and len(answers[-1]) > max(LONG_ANSWER, TIMES_LONGER * asked):
        yield Fault("long_answer", answers[-1])
    if answers and len(answers[-1]) > CUT_FROM and CUT.search(answers[-1]) and "```" not in answers[-1]:
        last = answers[-1].rstrip().rsplit("\n", 1)[-1]
        if not LAST_LINE_FREE.match(last) and prose(last) == last:
            yield Fault("cut_answer", answers[-1], len(answers[-1].rstrip()))
    if answers and item.messages[-1].role == "user":
        yield Fault("unanswered", item.messages[-1].content)


def _spanish(item: Document | Conversation, spoken: str | None) -> Iterator[Fault]:
    """What in a text that should be Spanish is not, or was not written by who speaks it."""
    if spoken not in (None, "es"):
        yield Fault("language", learnt(item), 0, str(spoken))
        return
    if isinstance(item, Document):
        if spoken and (place := opening_mark(item.text)) is not None:
            yield Fault("opening_marks", item.text, place)
        return
    asked = False
    for message in item.messages:
        if (place := english_passage(message.content)) is not None:
            yield Fault("mixed_language", message.content, place, "en")
        # How someone types the first question is their own business; from there on it is a text somebody prepared.
        elif (asked or message.role != "user") and (place := opening_mark(message.content)) is not None:
            yield Fault("opening_marks", message.content, place)
        asked = asked or message.role == "user"
    answers = [m.content for m in item.messages if m.role == "assistant"]
    if len(answers) > 1 and (mixed := mixed_address(answers)):
        yield Fault("mixed_address", answers[mixed[0]], mixed[1])


def learnt(item: Document | Conversation) -> str:
    """What a model would learn to write: the document, or all the assistant says."""
    if isinstance(item, Document):
        return item.text
    return "\n".join(message.content for message in item.messages if message.role == "assistant")


def _matches(kind: str, pattern: re.Pattern[str], text: str, every: bool) -> Iterator[Fault]:
    """The first match; in a long document, the first of each line."""
    line_end = -1
    for m in pattern.finditer(text):
        if m.start() > line_end:
            said = m.group().strip()
            named = kind in ("special_tokens", "boilerplate")
            yield Fault(
                kind, text, m.start() + m.group().find(said), "".join(map(_visible, said[:40])) if named else ""
            )
            if not every:
                return
            line_end = text.find("\n", m.start())
            if line_end < 0:
                return


def _loose_accents(text: str, every: bool) -> Iterator[Fault]:
    start = 0
    for line in text.split("\n"):
        if not unicodedata.is_normalized("NFC", line):
            place = next(i for i, letter in enumerate(line) if not unicodedata.is_normalized("NFC", line[: i + 1]))
            yield Fault("not_nfc", text, start + place)
            if not every:
                return
        start += len(line) + 1


def _once(found: list[Fault]) -> list[Fault]:
    """The first of each kind, and of each label of it: a row with two e-mail addresses is one row."""
    kept = {(fault.kind, fault.label if fault.kind == "personal" else ""): fault for fault in reversed(found)}
    return list(kept.values())[::-1]


def excerpt(text: str, at: int, width: int = 120) -> tuple[str, int]:
    """At most `width` characters around a place, on one line and with nothing a terminal would obey, and the place in
    them. Personal data are covered: `excerpt("escribe a ana@correo.es", 10)` is `("escribe a an•••••••••••", 10)`.
    """
    start = max(0, min(at - width // 2, len(text) - width))
    # Covered with some text around, so that a number cut in two is still known for what it is.
    before = max(0, start - 60)
    piece = personal.hidden(text[before : start + width + 60])[start - before :][:width]
    shown = [_visible(letter) for letter in piece]
    if start:
        shown[0] = "…"
    if start + width < len(text):
        shown[-1] = "…"
    return "".join(shown), len("".join(shown[: at - start]))


def _visible(letter: str) -> str:
    if letter in "\n\r\t\u2028\u2029\x85":
        return " "
    category = unicodedata.category(letter)
    if letter == "\ufeff" or category in ("Cc", "Cs"):
        return "\ufffd"
    return "" if category == "Cf" else letter


# What the reader could not read, by the code of its error.
READING = {
    "DATA-02": "encoding", "DATA-03": "keys", "DATA-04": "bad_json", "DATA-06": "roles", "DATA-08": "one_sided",
    "DATA-11": "mojibake", "DATA-12": "shape", "DATA-15": "huge_line", "DATA-16": "surrogate", "DATA-19": "cells",
    "DATA-21": "not_text",
}  # fmt: skip
