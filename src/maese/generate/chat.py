"""A conversation with a model: its turns, its ways of writing, and the `/commands` that change them.

    chat = Chat(writer)
    chat.reply("¿Qué es una pila?")      Answer(text="Una pila es…", …)
    chat.command("/temperature 0,7")     ("chat.set", {"name": "temperature", "value": 0.7})

The window is kept by dropping whole turns, oldest first, never half of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maese.generate.engine import Answer, Writer
from maese.model.load import context_of
from maese.recipe import scalar
from maese.run import write_whole
from maese.text.record import Message

SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "sentences", "seed")
COMMANDS = ("help", *SETTINGS, "retry", "clear", "tokens", "save", "exit")


class Chat:
    """Turns and settings of one conversation."""

    def __init__(self, writer: Writer, **settings: Any) -> None:
        self.writer, self.settings = writer, dict(settings)
        self.turns: list[Message] = []
        self.dropped = 0  # turns that no longer fit and were left out of the last reply

    def reply(self, text: str, on_text: Callable[[str], object] | None = None) -> Answer:
        """The model's answer to a new turn. A model of raw text continues what was typed and remembers nothing."""
        before = self._that_fit(text) if self.writer.format != "text" else ()
        answer = self.writer.generate(text, before=before, on_text=on_text, **self.settings)
        self.turns += [Message("user", text), Message("assistant", answer.text.strip())]
        return answer

    def _that_fit(self, text: str) -> tuple[Message, ...]:
        chosen = self.writer.with_settings(self.settings)
        # An answer needs room, but never so much that nothing said before could stay.
        room = context_of(self.writer.model) - min(chosen.max_new_tokens, context_of(self.writer.model) // 2)
        start = 0
        while start < len(self.turns):
            ids = self.writer.prompt_ids(text, tuple(self.turns[start:]))
            if len(ids) <= room:
                break
            start += 2
        self.dropped = start
        return tuple(self.turns[start:])

    def command(self, line: str) -> tuple[str, dict[str, Any]]:
        """Carry out `/name value`; returns what to say of it, as a catalogue key and its facts."""
        name, _, value = line.removeprefix("/").strip().partition(" ")
        if name == "clear":
            self.turns.clear()
            return "chat.cleared", {}
        if name == "tokens":
            used = sum(len(self.writer.tokenizer(turn.content)["input_ids"]) for turn in self.turns)
            return "chat.tokens", {"used": used, "longest": context_of(self.writer.model)}
        if name == "save":
            path = Path(value.strip() or "chat.json")
            turns = [{"role": turn.role, "content": turn.content} for turn in self.turns]
            write_whole(path, json.dumps({"messages": turns, "settings": self.settings}, ensure_ascii=False, indent=1))
            return "chat.saved", {"path": str(path)}
        if name in SETTINGS:
            if not value.strip():
                return "chat.now", {"name": name, "value": str(getattr(self.writer.with_settings(self.settings), name))}
            changed = self.settings | {name: scalar(value.strip())}
            chosen = getattr(self.writer.with_settings(changed), name)
            self.settings = changed
            return "chat.set", {"name": name, "value": str(chosen)}
        return "chat.unknown", {"name": name, "commands": " ".join(f"/{c}" for c in COMMANDS)}

    def take_back(self) -> str | None:
        """Forget the last exchange and return what the person had asked, to ask it again."""
        if len(self.turns) < 2:
            return None
        asked = self.turns[-2].content
        del self.turns[-2:]
        return asked
