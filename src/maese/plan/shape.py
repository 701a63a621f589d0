"""What a model is made of, from its configuration alone: no weights, no torch.

    anatomy = open_shape("gpt2-xl")              48 layers of 1,600
    parameters(anatomy)                          1,557,611,200
    adapters(anatomy, 16, "all-linear")          the numbers of a LoRA of that rank

In goes the name of a base: one of the package's, a folder with a config.json, a size of `plan.sizes`, or a model of
the hub that is here already or is in KNOWN. Out come its matrices, which is all that counting parameters, memory and
work needs. GPT-2, Phi, Llama, Mistral, Qwen2 and Qwen3 are counted exactly; others are not guessed.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from maese.errors import MaeseError
from maese.plan.sizes import SIZES, Architecture, Shape
from maese.recipe import INSIDE, at_home

Targets = list[str] | tuple[str, ...] | Literal["all-linear"]


@dataclass(frozen=True)
class Matrix:
    """A matrix of one block: its name, how wide what comes in and goes out is, and which norm or part it reads."""

    name: str
    comes: int
    goes: int
    reads: str  # those that read the same share one copy of it
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.comes * self.goes


@dataclass(frozen=True)
class Anatomy:
    """A causal model: `layers` blocks alike, with a table of words before and a head after."""

    family: str
    layers: int
    width: int
    heads: int
    shared: int  # heads of keys and values
    head: int  # width of one
    inner: int  # of the MLP
    vocabulary: int
    context: int
    tied: bool  # one table reads and writes
    matrices: tuple[Matrix, ...]
    norms: int  # of a block, that its stream goes through
    vectors: int  # numbers of a block that are in no matrix: norms
    outside: int  # those of no block and no table: last norm, learnt positions, bias of the head
    gated: bool  # an MLP of three matrices
    query_norms: bool = False
    layer_norm: bool = False  # and not RMSNorm
    dropout: float = 0.0  # of what is written into the stream
    attention_dropout: float = 0.0
    first_dropout: float = 0.0  # of what the table of words gives

    @property
    def across(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head

    @property
    def across_shared(self) -> int:
        return self.shared * self.head

    @property
    def table(self) -> int:
        """Numbers in a table of words."""
        return self.vocabulary * self.width

    @property
    def body(self) -> int:
        """Numbers in the matrices of all blocks."""
        return self.layers * sum(matrix.weights for matrix in self.matrices)


# What a config.json may leave unsaid, by family: the defaults of transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1},
    "phi": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "num_key_value_heads": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 128},
}


SIZED = ("layers", "width", "heads", "shared", "head", "inner", "vocabulary", "context")  # no model has none of one


def _gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", **sizes}


_SMOL = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
_PHI2 = {
    "model_type": "phi", "num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32,
    "intermediate_size": 10240, "vocab_size": 51200, "max_position_embeddings": 2048, "resid_pdrop": 0.1,
}  # fmt: skip
# Models of the hub that recipes name, so that they can be planned before they are fetched.
KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "datificate/gpt2-small-spanish": _gpt2(12, 768, 12),
    "microsoft/phi-2": _PHI2,
    "HuggingFaceTB/SmolLM2-135M": _SMOL,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOL,
    "smollm2": _SMOL,
}


def open_shape(base: str, architecture: Architecture = "modern") -> Anatomy:
    """The anatomy of a base by name, folder or size. Errors: PLAN-01 (a family not counted), PLAN-02 (not known here).

    A size (`nano`, `mini`, `base`) is of the `architecture`, and a folder of that name comes before it.
    """
    folder = INSIDE.get(base, at_home(base))
    if (folder / "config.json").is_file():
        return anatomy(_read(folder / "config.json"), base)
    if base in SIZES:
        return of_size(SIZES[base], architecture)
    name = base.partition("@")[0]
    row = KNOWN.get(name)
    if row is None and (place := _fetched(base)):
        row = _read(place / "config.json")
    if row is None:
        short = {known.rpartition("/")[2].lower(): known for known in (*INSIDE, *KNOWN)}
        near = difflib.get_close_matches(name.rpartition("/")[2].lower(), short, n=1, cutoff=0.3)
        raise MaeseError("PLAN-02", base=base, known=", ".join(KNOWN), nearest=short[near[0]] if near else "gpt2")
    return anatomy(row, base)


def built(base: str) -> bool:
    """Whether a base is made and not read: a size, which knows nothing yet."""
    return base in SIZES and not (Path(base) / "config.json").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise MaeseError("MODEL-06", base=str(path.parent), reason=f"config.json: {problem}"[:80]) from problem
    if not isinstance(config, dict):
        raise MaeseError("MODEL-06", base=str(path.parent), reason="config.json")
    return config


@cache
def file_of(base: str) -> int | None:
    """Bytes of the weights of a base on this disk; None where they are not here."""
    folder = INSIDE.get(base, at_home(base))
    place = folder if (folder / "config.json").is_file() else _fetched(base)
    return sum(path.stat().st_size for path in place.glob("*.safetensors")) if place else None


def _fetched(base: str) -> Path | None:
    """The folder of a model of the hub that was fetched before; the network is not asked."""
    name, _, revision = base.partition("@")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    cache = at_home(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    store = cache / f"models--{name.replace('/', '--')}"
    with_ref = store / "refs" / (revision or "main")
    at = with_ref.read_text("utf-8").strip() if with_ref.is_file() else revision
    place = store / "snapshots" / (at or "")
    return place if at and (place / "config.json").is_file() else None


def of_size(shape: Shape, architecture: Architecture, dropout: float = 0.0) -> Anatomy:
    """The anatomy of a model made from nothing, as `model.build` makes it."""
    if architecture == "classic":
        row = _gpt2(shape.layers, shape.width, shape.heads) | {"vocab_size": shape.vocabulary}
        drops = {"resid_pdrop": dropout, "attn_pdrop": dropout, "embd_pdrop": dropout}
        return anatomy(row | {"n_positions": shape.context} | drops)
    row = {
        "model_type": "qwen3", "num_hidden_layers": shape.layers, "hidden_size": shape.width,
        "num_attention_heads": shape.heads, "head_dim": shape.width // shape.heads, "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary, "max_position_embeddings": shape.context, "tie_word_embeddings": True,
        "attention_dropout": dropout,
    }  # fmt: skip
    return anatomy(row)


def anatomy(config: dict[str, Any], base: str = "") -> Anatomy:
    """The anatomy a config.json describes. Errors: PLAN-01 (a family not counted), MODEL-06 (sizes of no model)."""
    family = str(config.get("model_type"))
    if family not in DEFAULTS:
        raise MaeseError("PLAN-01", base=base, family=family, known=", ".join(DEFAULTS))
    said = DEFAULTS[family] | {key: value for key, value in config.items() if value is not None}
    try:
        found = _as_gpt2(said) if family == "gpt2" else _as_llama(family, said)
        for name in SIZED:
            if (size := getattr(found, name)) < 1:
                raise ValueError(f"{name}: {size}")
        return found
    except (ArithmeticError, KeyError, TypeError, ValueError) as problem:
        raise MaeseError("MODEL-06", base=base, reason=f"config.json: {problem}"[:80]) from problem


def _as_gpt2(said: dict[str, Any]) -> Anatomy:
    width, heads, context = int(said["n_embd"]), int(said["n_head"]), int(said.get("n_positions", 1024))
    inner = int(said.get("n_inner", 4 * width))
    matrices = (
        Matrix("c_attn", width, 3 * width, "first", True), Matrix("c_proj", width, width, "attention", True),
        Matrix("c_fc", width, inner, "second", True), Matrix("c_proj", inner, width, "inner", True),
    )  # fmt: skip
    return Anatomy(
        "gpt2", int(said["n_layer"]), width, heads, heads, width // heads, inner, int(said["vocab_size"]), context,
        bool(said["tie_word_embeddings"]), matrices, norms=2, vectors=4 * width, outside=context * width + 2 * width,
        gated=False, layer_norm=True, dropout=said["resid_pdrop"], attention_dropout=said["attn_pdrop"],
        first_dropout=said["embd_pdrop"],
    )  # fmt: skip


def _as_llama(family: str, said: dict[str, Any]) -> Anatomy:
    """Llama and its kin, and Phi, whose two halves read one norm."""
    width, heads = int(said["hidden_size"]), int(said["num_attention_heads"])
    shared, inner = int(said.get("num_key_value_heads", heads)), int(said["intermediate_size"])
    head, phi, vocabulary = int(said.get("head_dim", width // heads)), family == "phi", int(said["vocab_size"])
    across, across_shared = heads * head, shared * head
    asked = family in ("llama", "qwen3") and bool(said.get("attention_bias", False))
    biased, ends_biased = phi or family == "qwen2" or asked, phi or asked
    attention = (
        Matrix("q_proj", width, across, "first", biased), Matrix("k_proj", width, across_shared, "first", biased),
        Matrix("v_proj", width, across_shared, "first", biased),
        Matrix("dense" if phi else "o_proj", across, width, "attention", ends_biased),
    )  # fmt: skip
    bent = family == "llama" and bool(said.get("mlp_bias", False))
    mlp = (
        (Matrix("fc1", width, inner, "first", True), Matrix("fc2", inner, width, "inner", True))
        if phi
        else (
            Matrix("gate_proj", width, inner, "second", bent), Matrix("up_proj", width, inner, "second", bent),
            Matrix("down_proj", inner, width, "inner", bent),
        )
    )  # fmt: skip
    normed = family == "qwen3"
    tied = bool(said["tie_word_embeddings"])
    vectors = 2 * width + (2 * head if normed else 0) + (4 * head if phi and said.get("qk_layernorm") else 0)
    outside = 2 * width + vocabulary if phi else width  # the head of Phi has a bias
    return Anatomy(
        family, int(said["num_hidden_layers"]), width, heads, shared, head, inner, vocabulary,
        int(said["max_position_embeddings"]), tied, (*attention, *mlp), norms=1 if phi else 2, vectors=vectors,
        outside=outside, gated=not phi, query_norms=normed, layer_norm=phi, dropout=said.get("resid_pdrop", 0.0),
        attention_dropout=said.get("attention_dropout", 0.0), first_dropout=said.get("embd_pdrop", 0.0),
    )  # fmt: skip


def parameters(shape: Anatomy) -> int:
    """How many parameters there are; a table that reads and writes counts once."""
    biases = sum(matrix.goes for matrix in shape.matrices if matrix.bias)
    tables = shape.table * (1 if shape.tied else 2)
    return tables + shape.body + shape.layers * (biases + shape.vectors) + shape.outside


def targeted(shape: Anatomy, targets: Targets) -> list[Matrix]:
    """The matrices of a block that take an adapter. Error: ADAPT-02 (a name this family does not have)."""
    if targets == "all-linear":
        return list(shape.matrices)
    present = sorted({matrix.name for matrix in shape.matrices})
    if missing := [name for name in targets if name not in present]:
        near = difflib.get_close_matches(missing[0], present, n=1, cutoff=0)
        raise MaeseError("ADAPT-02", target=missing[0], present=", ".join(present), nearest=near[0])
    return [matrix for matrix in shape.matrices if matrix.name in targets]


def adapters(shape: Anatomy, rank: int, targets: Targets = "all-linear") -> int:
    """The numbers of LoRA's two matrices over all that are targeted: `rank (in + out)` for each."""
    return shape.layers * sum(rank * (matrix.comes + matrix.goes) for matrix in targeted(shape, targets))
