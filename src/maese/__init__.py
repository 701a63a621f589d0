"""maese: a Spanish-first workshop to make, adapt, measure, understand and use small language models.

    import maese
    run = maese.train("demo")
    maese.load(run).generate("En un lugar").text

The river: folders are what the data is now, files are the step that moves it on, and imports flow one way:

    errors, say -> recipe, run, pipeline -> text -> tokens -> plan -> model -> generate -> evaluate -> train
    -> report -> kept, stages, live, terminal, terminal_data, terminal_tokens, terminal_stages, terminal_study,
    terminal_chat, terminal_plan, retyped, spoken, cli_data, cli_use, cli_plan, cli
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maese.generate.engine import Writer
    from maese.generate.personas import Company
    from maese.recipe import Recipe
    from maese.run import Run

__version__ = "0.1.0"
__all__ = ["MaeseError", "company", "load", "train"]


def load(what: str | Run) -> Writer:
    """A model ready to write: a run, a folder with a model or an adapter, `"embedded"` or a hub id."""
    from maese.generate.engine import open_writer

    return open_writer(what)


def company(what: str | Run, *personas: str) -> Company:
    """A model and personalities over its base: `company("embedded-instruct", "socratico").ask_all("¿Qué es?")`.

    Each is one of the package's, a run with an adapter, or the folder of one; the base is in memory once.
    """
    from maese.generate.personas import open_company

    return open_company(what, personas)


class _Train(ModuleType):
    def __call__(self, recipe: str | Recipe, *changes: str, watch: Any = None) -> Run:
        """Train a recipe (a name, a path or a `Recipe`) with dotted changes; returns its run, report written.

        `watch(event)` sees every event as it happens.
        """
        from maese import recipe as recipes
        from maese.run import first_process
        from maese.terminal import write_papers
        from maese.train.loop import train

        chosen = recipe if isinstance(recipe, recipes.Recipe) else recipes.load(recipe, changes)
        run = train(chosen, watch=watch)
        if first_process():
            write_papers(run)
        return run


class _Maese(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # `maese.train("quijote")` is what a person types, and importing any file of the folder train/ puts the folder
        # in that place: so the folder itself answers the call.
        if name == "train":
            value.__class__ = _Train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Maese


def __getattr__(name: str) -> Any:
    # Late, so that `import maese` costs nothing.
    if name == "train":
        import importlib

        return importlib.import_module("maese.train")
    if name == "MaeseError":
        from maese.errors import MaeseError

        return MaeseError
    raise AttributeError(name)
