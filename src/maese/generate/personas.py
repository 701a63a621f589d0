"""Personalities: adapters with a name, a voice and opening questions, several of them over one base.

    company = open_company("embedded-instruct", ["socratico", "runs/2026-11-21-tutor"])
    company.writers["socratico"].generate("¿Qué es una pila?").text
    company.ask_all("¿Qué es una pila?")               one answer each, all in one batch, each with its name

One base is in memory however many speak: an adapter is read once and waits there, and who writes is decided as the
writing begins. One that was trained over other weights is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese import run as runs
from maese.errors import MaeseError
from maese.generate.batch import OnEnd, OnText, write_many
from maese.generate.draft import Answer
from maese.generate.engine import Writer, as_run, folder_writer, open_writer
from maese.model import adapter, load
from maese.model.voices import BASE
from maese.recipe import at_home
from maese.text.record import Message

PERSONAS = recipes.INSIDE["embedded"] / "personas"  # those that travel with the package


@dataclass(frozen=True)
class Persona:
    """Where a personality is and what it is called; `run` is its training, if it is one of the person's."""

    name: str
    folder: Path
    run: runs.Run | None = None


def shipped() -> list[str]:
    """The personalities of the package: `["algoritmos", "narrador", "socratico"]`."""
    return sorted(path.parent.name for path in PERSONAS.glob("*/adapter_config.json"))


def fitting(below: Path) -> list[str]:
    """Those of the package that were trained over the weights of a folder."""
    if not shipped():
        return []
    found = load.weights_hash(below)
    return [name for name in shipped() if adapter.about_adapter(PERSONAS / name).get("base_sha256") == found]


def find(what: str) -> Persona:
    """A personality by its name, by the folder of an adapter, or by a run.

    Errors: PERSONA-01 (there is none), PERSONA-02 (a run of whole weights, not of an adapter), RUN-05 (not finished).
    """
    folder = at_home(what)
    if what in shipped():
        return Persona(what, PERSONAS / what)
    if adapter.is_adapter(folder):
        return Persona(adapter.about_adapter(folder).get("name") or folder.resolve().name, folder)
    try:
        run = runs.trained(what)
    except MaeseError:
        mine = sorted({_plain_name(path.parts[1]) for path in Path("runs").glob("*/final/adapter_config.json")})
        known = [*shipped(), *mine]
        near = difflib.get_close_matches(what, known, n=1, cutoff=0) or ["socratico"]
        raise MaeseError("PERSONA-01", name=what, known=", ".join(known) or "—", nearest=near[0]) from None
    if not run.final.is_dir():
        raise MaeseError("RUN-05", run=str(run.path))
    if not adapter.is_adapter(run.final):
        raise MaeseError("PERSONA-02", run=str(run.path))
    return Persona(what if "/" not in what else run.recipe().name, run.final, run)


def _plain_name(folder: str) -> str:
    """What `run.find` takes: `2026-11-21-tutor` is `tutor`."""
    date, name = folder[:10], folder[11:]
    return name if name and date.count("-") == 2 and date.replace("-", "").isdigit() else folder


class Company:
    """One base in memory and those who speak with it, by name, in the order they came.

    `main` is the name of the model it was opened with, `run` its training if it has one.
    """

    def __init__(self, writer: Writer, main: str, below: Path, run: runs.Run | None = None) -> None:
        self.main, self.below, self.run = main, below, run
        writer.name = main
        self.writers = {self.main: writer}
        self.folders: dict[str, Path] = {}
        self._tried = 0
        self._bare: Writer | None = None

    @property
    def model(self) -> Any:
        return self.writers[self.main].model

    @property
    def personas(self) -> list[Writer]:
        """Those who speak with an adapter."""
        return [writer for writer in self.writers.values() if writer.voice != BASE and _adapted(writer)]

    @property
    def guests(self) -> list[Writer]:
        """Those who were brought, in their order, without the one it was opened with."""
        return [writer for writer in self.personas if writer.name != self.main]

    def examples(self, name: str) -> list[str]:
        """What to ask one of them first."""
        folder = self.folders.get(name)
        return [str(text) for text in adapter.about_adapter(folder).get("examples", [])] if folder else []

    def add(self, what: str) -> Writer:
        """Bring a personality, read from disk only the first time. Errors: those of `find`, ADAPT-01, MODEL-03."""
        persona = find(what)
        here = persona.folder.resolve()
        for name, folder in self.folders.items():
            if folder == here:
                return self.writers[name]
        main, was_bare = self.writers[self.main], not _adapted(self.writers[self.main])
        self._tried += 1
        voice = f"voice{self._tried}"  # PEFT's names take no dots, and one that failed to load keeps its own
        try:
            model = adapter.attach(main.model, persona.folder, self.below, voice)
        except MaeseError as problem:
            raise MaeseError(problem.code, **(problem.facts | {"adapter": what})) from problem
        model.generation_config = main.model.generation_config
        if was_bare:  # from now on what was the whole model is the base of others
            main.voice = BASE
        for writer in self.writers.values():
            writer.model = model
        writer = self._writer(persona, model, main.tokenizer)
        writer.voice, writer.name = voice, _free(persona.name, self.writers)
        self.writers[writer.name], self.folders[writer.name] = writer, here
        return writer

    def _writer(self, persona: Persona, model: Any, tokenizer: Any) -> Writer:
        """Its own words and its own way of writing; those that travel with the package share the base's tokenizer."""
        if adapter.brings_words(persona.folder):
            tokenizer = load.load_tokenizer(persona.folder)
        if persona.run is None:
            return folder_writer(model, tokenizer, persona.folder)
        recipe = persona.run.recipe()
        return Writer(model, tokenizer, recipe.generate, recipe.data.format, recipe.data.template)

    def base(self, writer: Writer) -> Writer | None:
        """Who would write what `writer` writes without what it learnt: the same words and ways over the untouched base.

        None where there is nothing beneath: a base itself. The base of a run of whole weights is opened for it.
        """
        if writer.voice != BASE and _adapted(writer):
            return Writer(writer.model, writer.tokenizer, writer.settings, writer.format, writer.template, BASE)
        if writer.name == self.main and self.run is not None:
            self._bare = self._bare or open_writer(self.run, base=True)
            return self._bare
        return None

    def ask_all(
        self, prompt: str, *, of: Sequence[Writer] = (), before: Sequence[Message] = (), on_text: OnText = None,
        on_end: OnEnd = None, stoppable: bool = False, **settings: Any,
    ) -> list[Answer]:  # fmt: skip
        """The answer of every personality, or `of` some, to one question: written in one batch, each with its name.

        Error: PERSONA-03 (none is loaded).
        """
        writers = [*of] or self.personas
        if not writers:
            raise MaeseError("PERSONA-03", known=" ".join(fitting(self.below)) or "—")
        chosen = [writer.with_settings(settings) for writer in writers]
        pairs = zip(writers, chosen, strict=True)
        rows = [writer.prompt_ids(prompt, before, one) for writer, one in pairs]
        return write_many(writers, rows, chosen, on_text, on_end, stoppable)

    def generate(self, prompt: str, persona: str | None = None, **settings: Any) -> Answer:
        """What one of them writes after a prompt, brought if it is not here; without a name, that of the beginning."""
        name = persona or self.main
        return (self.writers.get(name) or self.add(name)).generate(prompt, **settings)


def open_company(what: str | Path | runs.Run, personas: Sequence[str] = ()) -> Company:
    """A model and the personalities that go over its base: a run, a folder, a model of the package or a hub id.

    The name of a personality of the package opens its base with it.
    """
    if isinstance(what, str) and what in shipped() and not Path(what).exists():
        name = what
        try:
            what = runs.trained(name)  # a training of the person's that has the same name
        except MaeseError:
            return open_company(adapter.about_adapter(PERSONAS / name)["base"], [name, *personas])
    run = what if isinstance(what, runs.Run) else as_run(str(what))
    found = [find(name) for name in personas]  # a name that is misspelt is told before a model is opened
    writer = open_writer(what)
    folder, base = (load.resolve(str(what)), None) if run is None else (run.final, run.recipe().base)
    below = adapter.base_of(folder, base) if adapter.is_adapter(folder) else folder
    # What was typed, unless it is a path: then what it calls itself.
    typed = str(what) if not isinstance(what, runs.Run) and "/" not in str(what) else ""
    company = Company(writer, typed or writer.name or folder.resolve().name, below, run)
    company.folders[company.main] = folder.resolve()
    if adapter.is_adapter(folder):
        writer.voice = writer.model.active_adapter
    for name, _ in zip(personas, found, strict=True):
        company.add(name)
    return company


def _adapted(writer: Writer) -> bool:
    return hasattr(writer.model, "peft_config")


def _free(name: str, taken: dict[str, Writer]) -> str:
    """The name, or the first of `name-2`, `name-3`… that nobody has."""
    return name if name not in taken else next(n for i in range(2, 10_000) if (n := f"{name}-{i}") not in taken)
