"""What flows down the river: a document, or a conversation, with where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """A raw text learnt from end to end."""

    text: str
    id: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order; only what the assistant says is learnt unless the recipe says otherwise."""

    messages: tuple[Message, ...]
    id: str
    meta: dict[str, Any] = field(default_factory=dict)


# What was done to a text and should be said aloud: a catalogue key and its facts.
Note = tuple[str, dict[str, Any]]
