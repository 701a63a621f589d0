"""Shapes of models by name: what `plan.shape` and `model.build` make a model of.

`classic` is GPT-2 (Radford et al. 2019), `modern` Qwen3's (Yang et al. 2025, arXiv 2505.09388).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["classic", "modern"]
ROUND = 64  # the inner width of the gated MLP is a multiple of it: matrix units like it


@dataclass(frozen=True)
class Shape:
    """Layers, heads and width of a model, tokens of its vocabulary and of its context."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int

    @property
    def inner(self) -> int:
        """Width inside a gated MLP: three matrices of it weigh what two of four times the width do."""
        return -(-8 * self.width // (3 * ROUND)) * ROUND


SIZES = {
    "nano": Shape(layers=4, heads=3, width=192, vocabulary=2_048, context=256),
    "mini": Shape(layers=8, heads=6, width=384, vocabulary=32_000, context=512),
    "base": Shape(layers=12, heads=12, width=768, vocabulary=32_000, context=512),
}
