"""A model that writes: prompts in, text out, token by token.

    writer = open_writer("runs/2026-11-21-quijote")
    writer.generate("En un lugar", sentences=5).text

`stream_ids` knows only ids and a cache; `Writer` turns text into ids and back, and never hands out half a character.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese import run as runs
from maese.errors import MaeseError
from maese.generate import sentences
from maese.generate.sample import draw, probabilities
from maese.model import adapter, load
from maese.model.quant import open_base
from maese.text.record import Message
from maese.tokens.template import Renderer, encode, open_template, opening

# Up to this size one row of one token is bound by memory, not by arithmetic: a second thread gains 5 % on a quiet
# machine (161 against 151 tokens/s, 8.5 M parameters, two cores) and loses 40 to 90 % of the speed when anything else
# runs, because each small product waits for the slower thread.
ONE_THREAD_PARAMETERS = 200e6
# Asking for sentences lifts the limit of tokens: a long sentence of the Quijote is some 120.
TOKENS_PER_SENTENCE = 120


def stream_ids(model: Any, ids: list[int], settings: recipes.Generate, stop_ids: set[int]) -> Iterator[int]:
    """New token ids, one at a time, until a stop id, the token limit or the end of the model's context.

    `ids` (T,) must not be empty. The model is called once with the prompt and then with one token at a time.
    """
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    seen, room = list(ids), load.context_of(model) - len(ids)
    if room < 1:
        raise MaeseError("GEN-01", tokens=len(ids), longest=load.context_of(model))
    fresh, cache = list(ids), None
    small = model.device.type == "cpu" and model.num_parameters() < ONE_THREAD_PARAMETERS
    for _ in range(min(settings.max_new_tokens, room)):
        # Inside the loop and not around it: a generator that is put aside must not leave its caller in these modes.
        with torch.inference_mode(), _threads(1 if small else torch.get_num_threads()):
            out = model(input_ids=torch.tensor([fresh], device=model.device), past_key_values=cache, use_cache=True)
            chosen = draw(probabilities(out.logits[0, -1], settings, seen), generator)
        if chosen in stop_ids:
            return
        seen.append(chosen)
        # A family with a memory of another name (Mamba) reads all of it again each time.
        cache = getattr(out, "past_key_values", None)
        fresh = [chosen] if cache is not None else seen
        yield chosen


@contextmanager
def _threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Answer:
    """What was written and how it ended: `end`, `stop`, `sentences`, `length` or `context`."""

    text: str
    tokens: int
    seconds: float
    reason: str
    seed: int
    sentences: int


class Writer:
    """A model with its tokenizer and its way of writing."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: recipes.Generate, format: str = "text", template: str = "plain"
    ) -> None:
        self.model, self.tokenizer, self.settings, self.format = model, tokenizer, settings, format
        self.template = template

    @cached_property
    def renderer(self) -> Renderer:
        return open_template(self.template, self.tokenizer)

    def prompt_ids(self, prompt: str, before: tuple[Message, ...] = ()) -> list[int]:
        """The ids the model continues: the text itself, or the question as it was rendered in training."""
        if self.format != "text":
            return self.renderer.prompt_ids((*before, Message("user", prompt)))
        ids = opening(self.tokenizer) + encode(self.tokenizer, prompt)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return ids or [bos if bos is not None else eos]

    def generate(
        self,
        prompt: str,
        *,
        before: tuple[Message, ...] = (),
        on_text: Callable[[str], object] | None = None,
        tries: int = 4,
        **settings: Any,
    ) -> Answer:
        """Write after a prompt, with the recipe's settings or those given (`temperature=0.7`, `sentences=5`, …).

        `on_text` receives the text piece by piece as it is written. With `sentences=n` the text has exactly n, or the
        answer's `reason` is not `sentences`; `tries` seeds are tried before giving up, one if it is being streamed.
        """
        chosen = self.with_settings(settings)
        ids = self.prompt_ids(prompt, before)
        answer = self._write(ids, chosen, on_text)
        for seed in range(chosen.seed + 1, chosen.seed + tries):
            if on_text or not chosen.sentences or answer.reason == "sentences":
                break
            again = self._write(ids, chosen.model_copy(update={"seed": seed}), None)
            answer = again if again.sentences > answer.sentences else answer
        return answer

    def with_settings(self, settings: dict[str, Any]) -> recipes.Generate:
        given = {key: value for key, value in settings.items() if value is not None}
        try:
            return recipes.Generate.model_validate(self.settings.model_dump() | given)
        except ValueError as problem:
            raise recipes.mistake(problem) from None  # type: ignore[arg-type]  # pydantic's is one

    def _write(self, ids: list[int], settings: recipes.Generate, on_text: Callable[[str], object] | None) -> Answer:
        wanted = settings.sentences
        if wanted:
            limit = max(settings.max_new_tokens, wanted * TOKENS_PER_SENTENCE)
            settings = settings.model_copy(update={"max_new_tokens": limit})
        began, shown, text, new = time.monotonic(), 0, "", list[int]()
        # Decoded after the prompt's last token: some tokenizers drop the space of whatever comes first.
        anchor = ids[-1:]
        before = len(self.tokenizer.decode(anchor))
        reason = "end"
        for token in stream_ids(self.model, ids, settings, self.stop_ids()):
            new.append(token)
            text = self.tokenizer.decode(anchor + new)[before:]
            text = text.lstrip() if self.format != "text" else text  # the space after «Respuesta:» is no part of it
            done = self._finished(text, settings)
            if done is not None:
                text, reason = done
                break
            # A character of several bytes may be half written, and a stop mark half spelt: those wait.
            safe = len(text.rstrip("\ufffd")) - max((len(mark) for mark in settings.stop), default=0)
            if wanted and sentences.count(text) >= wanted:
                safe = min(safe, len(sentences.first(text, wanted) or ""))
            if on_text and safe > shown:
                on_text(text[shown:safe])
                shown = safe
        else:
            if len(ids) + len(new) >= load.context_of(self.model):
                reason = "context"
            elif len(new) >= settings.max_new_tokens:
                reason = "length"
        if wanted and reason != "sentences" and sentences.count(text) >= wanted:
            text, reason = sentences.first(text, wanted) or text, "sentences"
        text = text.rstrip("\ufffd")
        if on_text and len(text) > shown:
            on_text(text[shown:])
        return Answer(text, len(new), time.monotonic() - began, reason, settings.seed, sentences.count(text))

    def _finished(self, text: str, settings: recipes.Generate) -> tuple[str, str] | None:
        """The text cut where it should end and why, or None to go on."""
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

    def stop_ids(self) -> set[int]:
        ends = {self.tokenizer.eos_token_id}
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ends.update(listed if isinstance(listed, list) else [listed])
        if self.format != "text":
            ends |= self.renderer.stop_ids
        return {token for token in ends if token is not None}


def open_writer(what: str | Path | runs.Run, base: bool = False) -> Writer:
    """Open a run (by folder or name), a model folder, an adapter folder, `embedded` or a hub id, ready to write.

    `base=True` opens the untouched base of a run, with the run's settings.
    """
    run = what if isinstance(what, runs.Run) else _as_run(str(what))
    if run is None:
        folder = load.resolve(str(what))
        model, tokenizer = open_folder(folder)
        # A model that carries a template was taught to converse by it.
        talks = getattr(tokenizer, "chat_template", None) is not None
        kind = ("messages", "model") if talks else ("text", "plain")
        return Writer(model, tokenizer, recipes.Generate(), *kind)
    recipe = run.recipe()
    if not base and not run.final.is_dir():
        raise MaeseError("RUN-05", run=str(run.path))
    folder = load.resolve(recipe.base) if base else run.final
    model, tokenizer = open_folder(folder, recipe.base)
    return Writer(model, tokenizer, recipe.generate, recipe.data.format, recipe.data.template)


def open_folder(folder: Path, base: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; an adapter is put over its base. Frozen, on the best device here."""
    import torch

    if adapter.is_adapter(folder):
        below = load.resolve(base or adapter.about_adapter(folder).get("base", "embedded"))
        under = open_base(below, adapter.about_adapter(folder).get("method"))
        model = adapter.attach(under, folder, below)
        model.generation_config = model.base_model.model.generation_config
    else:
        model = load.load_model(folder)
    tokenizer = load.load_tokenizer(folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _as_run(what: str) -> runs.Run | None:
    inside = ("config.json", "adapter_config.json")
    if what in recipes.INSIDE or any((Path(what) / name).is_file() for name in inside):
        return None
    try:
        return runs.find(what)
    except MaeseError:
        # Only something that looks like a hub id may still be one.
        if what.count("/") == 1 and not Path(what).exists() and not what.startswith(("runs/", ".")):
            return None
        raise
