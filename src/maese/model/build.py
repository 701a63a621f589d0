"""A model that knows nothing yet: its configuration, and the weights it begins with.

    build(SIZES["mini"], "modern", tokenizer, Path("base"), seed=42)

In:  a shape (`plan.sizes`) and the folder of a tokenizer. Out: a folder like any other base, which everything here
trains from.

    classic   GPT-2 (Radford et al. 2019), as the first MiniGPT was
    modern    Qwen3's (Yang et al. 2025, arXiv 2505.09388): rotary positions, RMSNorm, gated MLP, norms on queries and
              keys, no biases; matrices that write into the stream begin at zero
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from maese.plan.sizes import Architecture, Shape
from maese.run import disk

ROPE_THETA = 10_000.0
ECHO = 8.0  # the most that a word speaks for itself at the beginning, in logits: below the logarithm of any vocabulary


def config(shape: Shape, architecture: Architecture, tokenizer: Any, dropout: float = 0.0) -> Any:
    """The configuration of transformers for a shape. A modern one knows dropout in its attention alone."""
    from transformers import GPT2Config, Qwen3Config

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    if architecture == "classic":
        return GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **ends,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=shape.vocabulary, max_position_embeddings=shape.context, hidden_size=shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads, intermediate_size=shape.inner, tie_word_embeddings=True,
        attention_dropout=dropout, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA}, **ends,
    )  # fmt: skip


def begin(shape: Shape, architecture: Architecture, tokenizer: Any, seed: int, dropout: float = 0.0) -> Any:
    """The model itself, with its first weights, the same for the same seed."""
    import torch
    from transformers import GPT2LMHeadModel, Qwen3ForCausalLM

    from maese.model.load import quiet

    quiet()
    kind: Any = GPT2LMHeadModel if architecture == "classic" else Qwen3ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config(shape, architecture, tokenizer, dropout))
    if architecture == "modern":
        # Every block begins as one that changes nothing (modded-nanogpt, Jordan et al. 2024).
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
            # A table that reads and writes then answers each word with itself, the surer the wider: its deviation times
            # the width. At 768 that would be 15, and a loss of 15 where one that knows nothing has 10.
            words = model.get_input_embeddings().weight
            words.mul_(min(1.0, ECHO / (model.config.initializer_range * shape.width)))
    return model


def build(
    shape: Shape, architecture: Architecture, tokenizer: Path, out: Path, seed: int = 42, dropout: float = 0.0
) -> Path:
    """Write a base that knows nothing: configuration, first weights and tokenizer, of at least its vocabulary.

    Errors: TOKEN-01, TOKEN-02 (no tokenizer there), DISK-01, DISK-02.
    """
    from maese.model.load import load_tokenizer

    words = load_tokenizer(tokenizer)
    shape = dataclasses.replace(shape, vocabulary=max(shape.vocabulary, len(words)))
    model = begin(shape, architecture, words, seed, dropout)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    with disk(out):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        model.save_pretrained(draft)
        words.model_max_length = shape.context
        words.save_pretrained(draft)
        draft.rename(out)
    return out
