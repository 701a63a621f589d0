"""Small models made on the spot, with no network: two layers and a tokenizer of bytes, in a second."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two tests that each take both cores are slower than one after the other; and nothing here may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two threads on so small a model wait for each other more than they work: six times slower on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

SAMPLE = (
    "En un lugar de la sierra vivía un hidalgo. —¿Quién va? —dijo el ventero. ¡Qué señor! Ñandú, pingüino y cigüeña.\n"
)


@pytest.fixture(autouse=True)
def spanish(monkeypatch):
    monkeypatch.delenv("MAESE_LANG", raising=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What a test prepares is not found by another."""
    monkeypatch.setenv("MAESE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that is the current one, so that runs/ of a test stays in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_tokenizer(folder: Path, pad: bool = True) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE * 5], trainer)
    more = {"pad_token": "<|pad|>"} if pad else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        additional_special_tokens=["<|end|>"], **more,
    ).save_pretrained(folder)  # fmt: skip


def make_model(
    folder: Path, kind: str = "gpt2", seed: int = 0, dropout: float = 0.0, context: int = 128, wide: int = 32
) -> Path:
    """A random model of two layers, 320 tokens, with its tokenizer: `gpt2` or `llama`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320, hidden_size=wide, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=context, **ends,
            )
        )  # fmt: skip
    else:
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=320, n_positions=context, n_embd=wide, n_layer=2, n_head=2, **drops, **ends)
        )
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def maese(capsys, monkeypatch):
    """`maese("train", …)`: exit code, stdout and stderr of the command line."""
    from maese.cli import run as command_line

    for name, value in (("MAESE_LANG", "es"), ("NO_COLOR", "1")):  # what --lang and --no-color set is forgotten after
        monkeypatch.setenv(name, value)

    def call(*words):
        capsys.readouterr()
        code = command_line([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny GPT-2 with dropout, so that the random state matters."""
    return make_model(tmp_path_factory.mktemp("tiny-gpt2"), dropout=0.1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-llama"), "llama")


@pytest.fixture
def book(here) -> Path:
    """Forty lines of text in libro.txt."""
    path = here / "libro.txt"
    path.write_text("".join(f"Línea {i}: {SAMPLE}" for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def questions(here) -> Path:
    """Sixty questions and answers in preguntas.txt."""
    path = here / "preguntas.txt"
    blocks = (f"###\nPregunta: ¿Cuánto es {i} más {i}?\nRespuesta: Son {2 * i}.\n" for i in range(60))
    path.write_text("".join(blocks) + "###\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe(here, tiny, book):
    """`recipe("train.lr=1e-3", …)`: a small recipe over the tiny model and the book, with dotted changes."""
    from maese import recipe as recipes

    def build(*changes: str):
        path = here / "receta.yaml"
        path.write_text(
            f"name: prueba\nbase: {tiny}\n"
            f"data: {{sources: [{{path: {book}}}], format: text, max_length: 32, too_long: split, validation: 0.2}}\n"
            "train: {epochs: 1, max_steps: 6, micro_batch: 2, accumulation: 2, lr: 1e-3, precision: fp32,"
            " save_every: 2}\n"
            "eval: {every: 3, prompts: [En un lugar]}\n"
            "generate: {max_new_tokens: 12}\n",
            encoding="utf-8",
        )
        return recipes.load(path, changes)

    return build


def make_voice(folder: Path, base: Path, seed: int = 1, rank: int = 2, targets="all-linear", **about) -> Path:
    """A random adapter over a base, as a training leaves it: `about` goes to its notes."""
    import json

    import torch

    from maese.model import adapter, load
    from maese.recipe import Method

    torch.manual_seed(seed)
    model = adapter.add_lora(load.load_model(base), Method(kind="lora", rank=rank, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    load.load_tokenizer(base).save_pretrained(folder)
    notes = {"base": str(base), "base_sha256": load.weights_hash(base), "name": folder.name, "format": "qa"}
    (folder / adapter.ABOUT).write_text(json.dumps(notes | about), encoding="utf-8")
    return folder
