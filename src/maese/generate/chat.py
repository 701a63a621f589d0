"""A conversation with a model: its turns, who answers, its ways of writing, and the `/commands` that change them.

    chat = Chat(open_company("embedded-instruct", ["socratico"]))
    chat.reply("¿Qué es una pila?")      Answer(text="¿Has apilado platos?…", persona="socratico", …)
    chat.command("/temperature 0,7")     ("chat.set", {"name": "temperature", "value": "0.7"})

The window is kept by dropping whole turns, oldest first, never half of one; the system message stays.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.generate.alternatives import Place, alternatives
from maese.generate.batch import OnEnd, OnText
from maese.generate.draft import Answer
from maese.generate.engine import Writer
from maese.generate.personas import Company, fitting
from maese.model.load import context_of
from maese.recipe import Generate, at_home, scalar
from maese.run import refuse_taken, write_whole
from maese.text.record import Conversation, Message
from maese.tokens.template import encode

SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "sentences", "system", "seed")
COMMANDS = (
    "help", "persona", "ask-all", "retry", "edit", "next", "compare", *SETTINGS, "tokens", "clear", "save", "exit",
)  # fmt: skip
# `/system -` takes the voice away and `/system +` gives each its own back; `/sentences no` takes their number away.
NONE, OWN, OFF = "-", "+", ("-", "no", "0")


@dataclass(frozen=True)
class Turn(Message):
    """What was said, by which personality, and whether the person cut it short."""

    persona: str = ""
    stopped: bool = False


@dataclass(frozen=True)
class Exchange:
    """The last question, what came before it, and what was answered, by whom and how."""

    prompt: str
    before: tuple[Turn, ...]
    writer: Writer
    settings: Generate
    answer: Answer


class Chat:
    """Turns, settings and the one who answers, of one conversation."""

    def __init__(self, company: Company, **settings: Any) -> None:
        self.company, self.settings = company, dict(settings)
        self.writer = (company.guests or [*company.writers.values()])[0]
        self.turns: list[Turn] = []
        self.last: Exchange | None = None
        self.dropped = 0  # turns that no longer fit and were left out of the last reply
        self.written: set[Path] = set()  # files of this conversation, which it may write again

    @property
    def chosen(self) -> Generate:
        """How the one who answers writes now: its own ways, changed by what was asked in this conversation."""
        return self.writer.with_settings(self.settings)

    def reply(self, text: str, on_text: Callable[[str], object] | None = None, instead: bool = False) -> Answer:
        """The answer to a new turn. Ctrl+C ends it, and what was written stays as the turn.

        With `instead` it takes the place of the last exchange, which stays if nothing comes of it. A model of raw text
        continues what was typed and remembers nothing.
        """
        whole = self.turns
        if instead:
            self.turns = whole[:-2]
        began = len(self.turns)
        try:
            before = self._that_fit(text)
            answer = self.writer.generate(text, before=before, on_text=on_text, stoppable=True, **self.settings)
            self._keep(Exchange(text, before, self.writer, self.chosen, answer))
        finally:
            if instead and len(self.turns) == began:
                self.turns = whole
        return answer

    def ask_all(self, text: str, on_text: OnText = None, on_end: OnEnd = None) -> list[Answer]:
        """What every personality answers; the conversation goes on with what the one who answers now said.

        Error: PERSONA-03 (none is loaded).
        """
        asked = self.company.personas
        before = self._that_fit(text, asked)
        answers = self.company.ask_all(
            text, before=before, on_text=on_text, on_end=on_end, stoppable=True, **self.settings
        )
        mine = asked.index(self.writer) if self.writer in asked else 0
        self._keep(Exchange(text, before, asked[mine], asked[mine].with_settings(self.settings), answers[mine]))
        return answers

    def on_base(self, on_text: Callable[[str], object] | None = None) -> tuple[Exchange, Answer, tuple[str, str]]:
        """The last question once more, as it was asked, to the untouched base; and the fingerprints of both sides.

        Errors: CHAT-01 (nothing was asked), CHAT-02 (there is no base beneath), COMPARE-01 (both sides are the same).
        """
        last = self._last()
        bare = self.company.base(last.writer)
        if bare is None:
            raise MaeseError("CHAT-02", name=last.writer.name)
        prints = bare.fingerprint(), last.writer.fingerprint()
        if prints[0] == prints[1]:
            raise MaeseError("COMPARE-01", run=last.writer.name, fingerprint=prints[0][:12])
        settings = last.settings.model_dump()
        answer = bare.generate(last.prompt, before=last.before, on_text=on_text, stoppable=True, tries=1, **settings)
        return last, answer, prints

    def alternatives(self) -> tuple[Exchange, list[Place]]:
        """The likeliest tokens at each place of the last answer. Error: CHAT-01 (there is none)."""
        last = self._last()
        ids = last.writer.prompt_ids(last.prompt, last.before, last.settings)
        return last, alternatives(last.writer, ids, last.answer.ids)

    def _last(self) -> Exchange:
        if self.last is None:
            raise MaeseError("CHAT-01")
        return self.last

    def _keep(self, exchange: Exchange) -> None:
        answer = exchange.answer
        if answer.reason == "stopped" and not answer.text.strip():
            return  # stopped before a word was said
        self.last = exchange
        said = Turn("assistant", answer.text.strip(), answer.persona, answer.reason == "stopped")
        self.turns += [Turn("user", exchange.prompt), said]

    def _that_fit(self, text: str, writers: Sequence[Writer] = ()) -> tuple[Turn, ...]:
        """The turns that go before a question, for all who will answer it."""
        talkers = [writer for writer in writers or [self.writer] if writer.format != "text"]
        self.dropped = max((self._too_many(writer, text) for writer in talkers), default=0)
        return tuple(self.turns[self.dropped :]) if talkers else ()

    def _too_many(self, writer: Writer, text: str) -> int:
        chosen, context = writer.with_settings(self.settings), context_of(writer.model)
        # An answer needs room, but never so much that nothing said before could stay.
        room = context - min(chosen.max_new_tokens, context // 2)
        start = 0
        while start < len(self.turns) and len(writer.prompt_ids(text, self.turns[start:], chosen)) > room:
            start += 2
        return start

    def command(self, line: str) -> tuple[str, dict[str, Any]]:
        """Carry out `/name value`; returns what to say of it, as a catalogue key and its facts."""
        name, _, value = line.removeprefix("/").strip().partition(" ")
        value = value.strip()
        if name == "persona":
            return self._persona(value)
        if name == "clear":
            self.turns.clear()
            self.last = None
            return "chat.cleared", {}
        if name == "tokens":
            return "chat.tokens", {"used": self.used(), "longest": context_of(self.writer.model)}
        if name == "save":
            return "chat.saved", {"path": str(self.save(at_home(value or "chat.json")))}
        if name in SETTINGS:
            return self._set(name, value)
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)
        return "chat.unknown", {"name": name, "nearest": near[0]}

    def _set(self, name: str, value: str) -> tuple[str, dict[str, Any]]:
        if name == "system" and self.writer.format == "text":
            return "generate.no_system", {}
        if (name, value) == ("system", OWN):
            self.settings.pop(name, None)
        elif value:
            typed = ("" if value == NONE else value) if name == "system" else scalar(value)
            if name == "sentences" and value in OFF:
                typed = False
            changed = self.settings | {name: typed}
            self.writer.with_settings(changed)  # what it cannot be is said before anything changes
            self.settings = changed
        now = getattr(self.chosen, name)
        return "chat.set", {"name": name, "value": NONE if now in (None, "") else str(now)}

    def _persona(self, name: str) -> tuple[str, dict[str, Any]]:
        if not name:
            loaded = [*self.company.writers]
            more = [found for found in fitting(self.company.below) if found not in loaded]
            facts = {"now": self.writer.name, "loaded": ", ".join(loaded), "more": ", ".join(more)}
            return "chat.personas" if not more else "chat.personas_more", facts
        self.writer = self.company.writers.get(name) or self.company.add(name)
        return "chat.persona", {"name": self.writer.name}

    def used(self) -> int:
        """Tokens of the conversation as the model would read it, its voice and its marks included."""
        if not self.turns:
            return 0
        if self.writer.format == "text":
            return sum(len(encode(self.writer.tokenizer, turn.content)) for turn in self.turns)
        messages = self.writer.with_voice(tuple(self.turns), self.chosen)
        return len(self.writer.renderer.render(Conversation(messages, "")))

    def save(self, path: Path) -> Path:
        """Write the conversation: who said what, with which voices and settings, over what it wrote there before.

        Error: RUN-01 (there is a file that this conversation did not write).
        """
        if path.resolve() not in self.written:
            refuse_taken(path)
        turns = [{key: value for key, value in asdict(turn).items() if value} for turn in self.turns]
        voices = {name: writer.with_settings(self.settings).system for name, writer in self.company.writers.items()}
        facts = {"messages": turns, "model": self.company.main, "voices": voices, "settings": self.settings}
        write_whole(path, json.dumps(facts, ensure_ascii=False, indent=1))
        self.written.add(path.resolve())
        return path

    @property
    def asked(self) -> str:
        """The last question. Error: CHAT-01 (there is none)."""
        if not self.turns:
            raise MaeseError("CHAT-01")
        return self.turns[-2].content
