"""LEARNING: the one loop, and what keeps its work safe.

The folder can be called, because `maese.train("quijote")` is what a person types: importing any file of it would
otherwise put the module where the function stood.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    def __call__(self, recipe: Any, *overrides: str, watch: Any = None) -> Any:
        """Train a recipe (a name, a path or a `Recipe`) and return its `Run`. `watch(event)` sees every event."""
        from maese import recipe as recipes
        from maese.train.loop import train

        if not isinstance(recipe, recipes.Recipe):
            recipe = recipes.load(recipe, overrides)
        return train(recipe, watch=watch)


sys.modules[__name__].__class__ = _Train
