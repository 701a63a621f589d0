"""What the plan says of memory, against what small models really keep, and what their parameters really are."""

from __future__ import annotations

import pytest

from maese.plan import memory, shape
from maese.plan.memory import Job

TOKENS, ROWS = 64, 2
COMMON = {
    "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
    "intermediate_size": 100, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip


def row(family: str, **more) -> dict:
    if family == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_layer": 4, "n_embd": 48, "n_head": 3, "n_positions": 128, "vocab_size": 320}
        return {"model_type": "gpt2", **sizes, **drops, **more}
    own = {"head_dim": 16} if family == "qwen3" else {"num_key_value_heads": 3} if family == "phi" else {}
    return {"model_type": family, **COMMON, **own, "tie_word_embeddings": family != "phi", **more}


def build(config: dict, where: str = "cpu"):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from maese.model.load import quiet

    quiet()
    torch.manual_seed(0)
    said = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(where):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **said))


def kept(config: dict, job: Job) -> int:
    """Bytes a model keeps for the way back, parameters aside, of two rows without padding."""
    import torch

    from maese.evaluate.likelihood import loss_sum
    from maese.model.adapter import add_lora
    from maese.model.attention import unpadded
    from maese.model.quick import quicken
    from maese.recipe import Method
    from maese.tokens.batches import collate_flat
    from maese.tokens.template import Example

    model, short = build(config), job.precision == "bf16"
    if job.kind == "lora":
        chosen = job.targets if job.targets == "all-linear" else list(job.targets)
        model = model.to(torch.bfloat16) if short else model
        model = add_lora(model, Method(kind="lora", rank=job.rank, dropout=job.dropout, targets=chosen))
    quicken(model)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or its place would be given to another
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=short):
        assert unpadded(model, TOKENS)
        model.train()
        rows = [Example([(i * 7 + r) % 320 for i in range(TOKENS)], [1] * TOKENS) for r in range(ROWS)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sum(model, collate_flat(rows, 0))
    return sum(size for size, _ in seen.values())


def job(**more) -> Job:
    usual = {
        "kind": "full", "precision": "bf16", "device": "cpu", "optimizer": "adamw", "checkpointing": False,
        "tokens": TOKENS * ROWS, "longest": TOKENS, "passes": 2, "rank": 4,
    }  # fmt: skip
    return Job(**(usual | more))


FAMILIES = ["gpt2", "phi", "llama", "qwen3", "qwen2", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_model_keeps_for_the_way_back_is_what_the_plan_counts(family, precision, kind):
    config, asked = row(family), job(kind=kind, precision=precision)
    found, told = kept(config, asked), shape.anatomy(config)
    # With checkpointing off the copies of weights are kept too, and the gradient of the head.
    counted = memory.activations(told, asked) + memory.copies_of(told, asked) + memory.head_of(told, asked)[0]
    assert counted == pytest.approx(found, rel=0.04)


DROPS = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, "phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.0},
    "llama": {"attention_dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("family", DROPS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_counted_with_its_masks(family, kind):
    config, asked = row(family, **DROPS[family]), job(kind=kind, dropout=0.1 if kind == "lora" else 0.0)
    told = shape.anatomy(config)
    counted = memory.activations(told, asked) + memory.copies_of(told, asked) + memory.head_of(told, asked)[0]
    assert counted == pytest.approx(kept(config, asked), rel=0.06)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_matrices_without_an_adapter_keep_nothing(family):
    names = {"gpt2": ["c_attn"], "phi": ["q_proj", "k_proj", "v_proj", "dense"]}[family]
    config, asked = row(family), job(kind="lora", targets=tuple(names))
    told = shape.anatomy(config)
    counted = memory.activations(told, asked) + memory.copies_of(told, asked)
    assert counted == pytest.approx(kept(config, asked), rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_keeps_what_goes_into_each_block_alone(family):
    config, asked = row(family), job(kind="lora", checkpointing=True)
    found = kept(config, asked)
    assert memory.activations(shape.anatomy(config), asked) == pytest.approx(found, rel=0.25)
    assert found < 0.2 * kept(config, job(kind="lora"))
