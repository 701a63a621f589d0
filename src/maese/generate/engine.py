"""A model that writes: prompts in, text out, token by token.

    writer = open_writer("runs/2026-11-21-quijote")
    writer.generate("En un lugar", sentences=5).text

`stream_ids` knows only ids and a cache; `Writer` turns text into ids and back, and never hands out half a character.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese import run as runs
from maese.errors import MaeseError
from maese.generate.draft import Answer, Draft
from maese.generate.sample import draw, probabilities
from maese.model import adapter, load, rows
from maese.model.fingerprint import fingerprint
from maese.model.quant import open_base
from maese.model.voices import BASE, speaking
from maese.plan.shape import KNOWN
from maese.say import say
from maese.text.record import Message
from maese.tokens.marks import add_marks
from maese.tokens.template import TEMPLATES, Renderer, encode, open_template, opening

# Up to this size one row of one token is bound by memory, not by arithmetic: a second thread gains 5 % on a quiet
# machine (161 against 151 tokens/s, 8.5 M parameters, two cores) and loses 40 to 90 % of the speed when anything else
# runs, because each small product waits for the slower thread.
ONE_THREAD_PARAMETERS = 200e6


def stream_ids(
    model: Any, ids: list[int], settings: recipes.Generate, stop_ids: set[int], words: int | None = None
) -> Iterator[int]:
    """New token ids, one at a time, until a stop id, the token limit or the end of the model's context.

    `ids` (T,) must not be empty. The model is called once with the prompt and then with one token at a time. Ids from
    `words` on are never drawn.
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
        with torch.inference_mode(), threads(1 if small else torch.get_num_threads()):
            out = model(input_ids=torch.tensor([fresh], device=model.device), past_key_values=cache, use_cache=True)
            chosen = draw(probabilities(out.logits[0, -1, :words], settings, seen), generator)
        if chosen in stop_ids:
            return
        seen.append(chosen)
        # A family with a memory of another name (Mamba) reads all of it again each time.
        cache = getattr(out, "past_key_values", None)
        fresh = [chosen] if cache is not None else seen
        yield chosen


@contextmanager
def threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Writer:
    """A model with its tokenizer and its way of writing."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: recipes.Generate, format: str = "text", template: str = "plain",
        voice: str | None = None, name: str = "",
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.settings, self.format = model, tokenizer, settings, format
        self.template = template
        self.voice, self.name = voice, name  # its adapter, of several over one base, and what people call it

    @cached_property
    def renderer(self) -> Renderer:
        return open_template(self.template, self.tokenizer)

    @cached_property
    def words(self) -> int:
        """How many ids its tokenizer has: a model may have rows for more, as after a personality with marks came."""
        return load.ids_of(self.tokenizer)

    def prompt_ids(
        self, prompt: str, before: Sequence[Message] = (), settings: recipes.Generate | None = None
    ) -> list[int]:
        """The ids the model continues: the text itself, or the question as it was rendered in training.

        A conversation that has no system message begins with the voice of the settings, if these have one.
        """
        if self.format != "text":
            return self.renderer.prompt_ids(self.with_voice((*before, Message("user", prompt)), settings))
        ids = opening(self.tokenizer) + encode(self.tokenizer, prompt)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return ids or [bos if bos is not None else eos]

    def with_voice(
        self, messages: tuple[Message, ...], settings: recipes.Generate | None = None
    ) -> tuple[Message, ...]:
        """The messages with the system message of the settings before them, unless they bring one or there is none."""
        voice = (settings or self.settings).system
        if not voice or any(message.role == "system" for message in messages):
            return messages
        return (Message("system", voice), *messages)

    def generate(
        self,
        prompt: str,
        *,
        before: Sequence[Message] = (),
        on_text: Callable[[str], object] | None = None,
        tries: int = 4,
        stoppable: bool = False,
        **settings: Any,
    ) -> Answer:
        """Write after a prompt, with the recipe's settings or those given (`temperature=0.7`, `sentences=5`, …).

        `on_text` receives the text piece by piece as it is written. With `sentences=n` the text has exactly n, or the
        answer's `reason` is not `sentences`; `tries` seeds are tried before giving up, one if it is being streamed. A
        `stoppable` answer is ended by Ctrl+C, its `reason` then `stopped`; of any other, the program is.
        """
        chosen = self.with_settings(settings)
        ids = self.prompt_ids(prompt, before, chosen)
        answer = self._write(ids, chosen, on_text, stoppable)
        for seed in range(chosen.seed + 1, chosen.seed + tries):
            if on_text or not chosen.sentences or answer.reason in ("sentences", "stopped"):
                break
            again = self._write(ids, chosen.model_copy(update={"seed": seed}), None, stoppable)
            answer = again if again.sentences > answer.sentences else answer
            if again.reason == "stopped":
                break
        return answer

    def fingerprint(self) -> str:
        """Which weights are at work while this one writes: see `model.fingerprint`."""
        # Rows that the tokens of another personality brought are none of its own.
        first = getattr(self.model, "rows_at_first", None)
        with speaking(self.model, self.voice and [self.voice]):
            return fingerprint(self.model, first and max(first, self.words))

    def with_settings(self, settings: dict[str, Any]) -> recipes.Generate:
        """Its settings with those given; None is not given, and `sentences=False` takes away the number it had."""
        given = {key: value for key, value in settings.items() if value is not None}
        # Told how many tokens, it does not go on for the sentences that its recipe would have.
        if given.get("sentences") is False or ("max_new_tokens" in given and "sentences" not in given):
            given["sentences"] = None
        try:
            return recipes.Generate.model_validate(self.settings.model_dump() | given)
        except ValueError as problem:
            wrong = recipes.mistake(problem)  # type: ignore[arg-type]  # pydantic's is one
            raise (MaeseError("GEN-03", **wrong.facts) if wrong.code == "USE-03" else wrong) from None

    def _write(
        self, ids: list[int], settings: recipes.Generate, on_text: Callable[[str], object] | None,
        stoppable: bool = False,
    ) -> Answer:  # fmt: skip
        draft, reason = self.draft(ids, settings, on_text), "end"
        try:
            with speaking(self.model, self.voice and [self.voice]):
                for token in stream_ids(self.model, ids, draft.settings, self.stop_ids(), self.words):
                    if draft.take(token):
                        break
        except KeyboardInterrupt:
            if not stoppable:
                raise
            reason = "stopped"
        return draft.close(load.context_of(self.model), reason)

    def draft(
        self, ids: list[int], settings: recipes.Generate, on_text: Callable[[str], object] | None = None
    ) -> Draft:
        """An empty answer to `ids`, for whoever writes it: this writer alone, or many together."""
        return Draft(self.tokenizer, ids, settings, self.format != "text", on_text, self.name)

    def stop_ids(self) -> set[int]:
        ends = {self.tokenizer.eos_token_id}
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ends.update(listed if isinstance(listed, list) else [listed])
        if self.format != "text":
            ends |= self.renderer.stop_ids
        return {token for token in ends if token is not None}


def open_writer(what: str | Path | runs.Run, base: bool = False) -> Writer:
    """Open a run (by folder or name), a model folder, an adapter folder, `embedded` or a hub id, ready to write.

    `base=True` opens the untouched base of a run, or of an adapter, with its settings.
    """
    run = what if isinstance(what, runs.Run) else as_run(str(what))
    if run is None:
        folder = load.resolve(str(what))
        model, tokenizer = open_folder(folder)
        writer = folder_writer(model, tokenizer, folder)
        if base and adapter.is_adapter(folder):
            writer.voice, writer.name = BASE, ""
        return writer
    recipe = run.recipe()
    if not base and not run.final.is_dir():
        raise MaeseError("RUN-05", run=str(run.path))
    model, tokenizer = open_base_of(recipe) if base else open_folder(run.final, recipe.base, recipe.method.kind)
    return Writer(
        model, tokenizer, recipe.generate, recipe.data.format, recipe.data.template, name="" if base else recipe.name
    )


def open_base_of(recipe: recipes.Recipe) -> tuple[Any, Any]:
    """The model and tokenizer of a recipe as its training found them: with the tokens it adds, which say no more yet
    than what they were spelt with."""
    model, tokenizer = open_folder(load.resolve(recipe.base), recipe.base, recipe.method.kind)
    if recipe.data.marks == "add" and (new := add_marks(tokenizer, recipe.data.template)):
        rows.make_room(model, tokenizer, new)
        rows.write(model, tokenizer, new)
    return model, tokenizer


def folder_writer(model: Any, tokenizer: Any, folder: Path) -> Writer:
    """A writer as the folder itself says it writes: its own notes where there are some, its template if it has one."""
    about = adapter.about_adapter(folder)
    said = about.get("generate") or published(folder)
    known = {key: value for key, value in said.items() if key in recipes.Generate.model_fields and value is not None}
    # A model that carries a template was taught to converse by it, unless what it was fed was plain text; an adapter
    # that brings no tokenizer names its template.
    carried = getattr(tokenizer, "chat_template", None) is not None
    template = "model" if carried else about.get("template")
    talks = about.get("format") != "text" and (carried or template in TEMPLATES)
    kind = ("messages", str(template)) if talks else ("text", "plain")
    writer = Writer(model, tokenizer, recipes.Generate(), *kind, name=about.get("name", ""))
    try:
        writer.settings = writer.with_settings(known)
    except MaeseError as problem:  # nobody typed it: the file that says so is named
        name = adapter.ABOUT if about.get("generate") else "generation_config.json"
        facts = problem.facts | {"found": f"{problem.facts['found']} ({folder / name})"}
        raise MaeseError(problem.code, **facts) from None
    return writer


def published(folder: Path) -> dict[str, Any]:
    """How a folder says that it writes, in transformers' words: `{"temperature": 0.3, …}` of generation_config.json."""
    said = load.read_json(folder, "generation_config.json")
    greedy = "do_sample" in said and not said["do_sample"]
    return said | ({"temperature": 0.0} if greedy else {})


def open_folder(folder: Path, base: str | None = None, method: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder; an adapter is put over its base. Frozen, on the best device here.

    `method` is how what is there, or goes over it, was trained. Errors: those of loading, TOKEN-07.
    """
    words = folder
    if adapter.is_adapter(folder):
        below = adapter.base_of(folder, base)
        under = open_base(below, adapter.about_adapter(folder).get("method") or method)
        model = adapter.attach(under, folder, below).to(under.device)
        model.generation_config = model.base_model.model.generation_config
        words = folder if adapter.brings_words(folder) else below
    else:
        model = open_base(folder, method)
    tokenizer = load.load_tokenizer(words)
    load.refuse_rowless(model, tokenizer, words)
    return model, tokenizer


def as_run(what: str) -> runs.Run | None:
    """The run something names, or None for what `load.resolve` is to open. Error: RUN-02 (it is neither)."""
    inside = ("config.json", "adapter_config.json")
    if what in recipes.INSIDE or what.endswith(".gguf") or any((Path(what) / name).is_file() for name in inside):
        return None
    try:
        return runs.trained(what)
    except MaeseError as problem:
        # Without its owner a name of the hub could be any slip of the hand: only those of the recipes are taken.
        if what.partition("@")[0] in KNOWN or what in load.PACKAGED:
            return None
        # Only something that looks like a hub id may still be one.
        if what.count("/") == 1 and not Path(what).exists() and not what.startswith(("runs/", ".")):
            return None
        from maese.generate.personas import shipped

        names = [*recipes.INSIDE, *shipped()]
        near = difflib.get_close_matches(what, names, n=1)
        told = {"inside": say("generate.inside", names=", ".join(names))} | ({"nearest": near[0]} if near else {})
        raise MaeseError("RUN-02", **(problem.facts | told)) from None
