"""One answer while it is written: token ids come in, whole characters go out, and it knows where it must end.

    draft = Draft(tokenizer, prompt_ids, settings, talks=True)
    for token in stream:
        if draft.take(token):
            break
    draft.close(context=512).text

One draft serves an answer written alone and a row of many written together, so that both give the same text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from maese import recipe as recipes
from maese.generate import sentences

# Asking for sentences lifts the limit of tokens: a long sentence of the Quijote is some 120.
TOKENS_PER_SENTENCE = 120


@dataclass(frozen=True)
class Answer:
    """What was written and how it ended: `end`, `stop`, `sentences`, `length`, `context` or `stopped`.

    `ids` are its tokens, `persona` the name of who wrote it, empty where nobody has one.
    """

    text: str
    tokens: int
    seconds: float
    reason: str
    seed: int
    sentences: int
    persona: str = ""
    ids: tuple[int, ...] = ()

    def facts(self) -> dict[str, object]:
        """What is told of it as data: all but its ids, which mean nothing without their tokenizer."""
        return {key: value for key, value in asdict(self).items() if key != "ids"}


class Draft:
    """The text of an answer as its tokens come."""

    def __init__(
        self, tokenizer: Any, ids: list[int], settings: recipes.Generate, talks: bool,
        on_text: Callable[[str], object] | None = None, persona: str = "",
    ) -> None:  # fmt: skip
        self.tokenizer, self.ids, self.talks, self.on_text, self.persona = tokenizer, ids, talks, on_text, persona
        if settings.sentences:
            limit = max(settings.max_new_tokens, settings.sentences * TOKENS_PER_SENTENCE)
            settings = settings.model_copy(update={"max_new_tokens": limit})
        self.settings = settings
        self.new: list[int] = []
        self.text, self.reason = "", "end"
        self._began, self._shown = time.monotonic(), 0
        # Decoded after the prompt's last token: some tokenizers drop the space of whatever comes first.
        self._anchor = ids[-1:]
        self._before = len(tokenizer.decode(self._anchor))

    def take(self, token: int) -> bool:
        """Add a token; whether the text has come to its end with it."""
        self.new.append(token)
        text = self.tokenizer.decode(self._anchor + self.new)[self._before :]
        self.text = text.lstrip() if self.talks else text  # the space after «Respuesta:» is no part of it
        done = self._finished()
        if done is not None:
            self.text, self.reason = done
            return True
        # A character of several bytes may be half written, and a stop mark half spelt: those wait.
        safe = len(self.text.rstrip("\ufffd")) - max((len(mark) for mark in self.settings.stop), default=0)
        wanted = self.settings.sentences
        if wanted and sentences.count(self.text) >= wanted:
            safe = min(safe, len(sentences.first(self.text, wanted) or ""))
        self._show(safe)
        return False

    def full(self, context: int) -> bool:
        """Whether no token more may come, by its settings or because the model takes no more."""
        return len(self.new) >= self.settings.max_new_tokens or len(self.ids) + len(self.new) >= context

    def close(self, context: int, reason: str = "end") -> Answer:
        """The answer, once there are no more tokens: `context` is how many the model takes, prompt included."""
        wanted = self.settings.sentences
        if self.reason == "end":
            self.reason = reason
            if reason == "end" and len(self.ids) + len(self.new) >= context:
                self.reason = "context"
            elif reason == "end" and len(self.new) >= self.settings.max_new_tokens:
                self.reason = "length"
        if wanted and self.reason != "sentences" and sentences.count(self.text) >= wanted:
            self.text, self.reason = sentences.first(self.text, wanted) or self.text, "sentences"
        self.text = self.text.rstrip("\ufffd")
        self._show(len(self.text))
        seconds, count = time.monotonic() - self._began, sentences.count(self.text)
        return Answer(
            self.text, len(self.new), seconds, self.reason, self.settings.seed, count, self.persona, tuple(self.new)
        )

    def _show(self, safe: int) -> None:
        if self.on_text and safe > self._shown:
            self.on_text(self.text[self._shown : safe])
            self._shown = safe

    def _finished(self) -> tuple[str, str] | None:
        """The text cut where it should end and why, or None to go on."""
        text, settings = self.text, self.settings
        found = [text.index(mark) for mark in settings.stop if mark in text]
        if found:
            return text[: min(found)], "stop"
        if settings.sentences:
            body = sentences.first(text, settings.sentences)
            # The sentence is over only when the next one has begun: «¡No! —dijo» was not the end.
            if (
                body is not None
                and len(text.strip()) > len(body.strip()) + 2
                and sentences.first(text + " X", settings.sentences) == body
            ):
                return body, "sentences"
        return None
