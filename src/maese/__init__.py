"""maese: a Spanish-first workshop to make, adapt, measure, understand and use small language models.

    import maese
    run = maese.train("demo")
    maese.load(run).generate("En un lugar").text

The river: folders are what the data is now, files are the step that moves it on, and imports flow one way:

    errors, say -> recipe, run -> text -> tokens -> plan -> model -> generate -> evaluate -> train
    -> report -> live, terminal, cli
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maese.generate.engine import Writer

__version__ = "0.1.0"
__all__ = ["MaeseError", "load", "train"]


def load(what: str | Any) -> Writer:
    """A model ready to write: a run, a folder with a model or an adapter, `"embedded"` or a hub id."""
    from maese.generate.engine import open_writer

    return open_writer(what)


def __getattr__(name: str) -> Any:
    # Late, so that `import maese` costs nothing. `maese.train` is the folder and can be called (see train/__init__).
    if name == "train":
        import importlib

        return importlib.import_module("maese.train")
    if name == "MaeseError":
        from maese.errors import MaeseError

        return MaeseError
    raise AttributeError(name)
