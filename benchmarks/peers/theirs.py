"""One measurement of somebody else's loop, in a process and an environment of its own: transformers, TRL, plain torch.

    python benchmarks/peers/theirs.py '{"contender": "trainer-best", "method": "lora", …}'

Reads the same ids and weights as everybody, takes a warm-up that is not counted, prints a line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from typing import Any

from meter import Meter, answer, collate, forget, held_loss, product, read

# `micro`: rows at once; accumulation makes up the batch of the step. By default they take 8, in any order.
CONTENDERS: dict[str, dict[str, Any]] = {
    "trainer": {"loop": "trainer", "micro": 8},
    "trainer-best": {"loop": "trainer", "micro": 16, "grouped": True, "best": True},
    "trl": {"loop": "sft", "micro": 8, "checkpointing": True},
    "trl-grouped": {"loop": "sft", "micro": 16, "grouped": True, "best": True},
    "trl-packed": {"loop": "sft", "micro": 16, "packing": True, "best": True},
    "plain": {"loop": "plain", "micro": 16},
    "plain-grouped": {"loop": "plain", "micro": 16, "grouped": True, "best": True},
}


def main() -> None:
    job = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(job["threads"])
    if job["contender"] == "product":
        answer(product(job["device"]))
        return
    how = CONTENDERS[job["contender"]]
    rows = read(job["ids"])
    measure(job, how, rows[: 2 * job["batch"]], steps=2)
    forget(job["device"])
    figures, model = measure(job, how, rows, job["steps"])
    # A whole epoch of the rows must have gone through, or the contenders did not do the same work.
    figures["expected"] = sum(len(row["input_ids"]) for row in rows)
    answer(figures | {"held": held_loss(model, job["held"], job["pad"])})


def measure(job: dict[str, Any], how: dict[str, Any], rows: list[dict], steps: int) -> tuple[dict[str, Any], Any]:
    import torch

    torch.manual_seed(job["seed"])
    model = load(job, how)
    if how["loop"] == "plain":
        return plain(job, how, model, rows, steps), model
    return trainer(job, how, model, rows, steps), model


def load(job: dict[str, Any], how: dict[str, Any]) -> Any:
    """The model as that configuration loads it: fp32 master weights, or frozen ones in bf16 where only LoRA trains."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    lora = job["method"] != "full"
    options: dict[str, Any] = {"dtype": torch.bfloat16 if lora and how.get("best") else torch.float32}
    if job["method"] == "qlora":
        options = {
            "dtype": torch.bfloat16,
            "device_map": {"": 0},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        }
    model = AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True, **options)
    if job["method"] != "qlora":
        model.to(job["device"])
    if lora:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if job["method"] == "qlora":
            kept = bool(how.get("checkpointing"))
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=kept)
        turned = model.config.model_type == "gpt2"  # its matrices are transposed
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            fan_in_fan_out=turned,
        )
        model = get_peft_model(model, config)
    return model.train()


def trainer(job: dict[str, Any], how: dict[str, Any], model: Any, rows: list[dict], steps: int) -> dict[str, Any]:
    """transformers Trainer or TRL SFTTrainer, untouched but for what counts tokens and keeps the loss of each step."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    options = arguments(job, how, rows, steps)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    meter = Meter(job["device"], job["skip"] if steps == job["steps"] else 0)
    with tempfile.TemporaryDirectory() as folder:
        if how["loop"] == "sft":
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            more: dict[str, Any] = {"max_length": job["max_length"], "packing": bool(how.get("packing"))}
            if not how.get("checkpointing"):
                more["gradient_checkpointing"] = False
            config = SFTConfig(folder, **options, **more)
            made = counted(SFTTrainer, meter)(
                model=model,
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock(meter)],
            )
        else:
            config = TrainingArguments(folder, **options)
            made = counted(Trainer, meter)(
                model=model,
                args=config,
                train_dataset=rows,
                data_collator=lambda some: collate(some, job["pad"]),
                callbacks=[clock(meter)],
            )
        made.train()
    return meter.figures


def arguments(job: dict[str, Any], how: dict[str, Any], rows: list[dict], steps: int) -> dict[str, Any]:
    micro, batch = how["micro"], job["batch"]
    accumulation = max(1, batch // micro)
    if how.get("packing"):
        # A packed row holds several examples: as many rows a step as make up the same number of examples.
        tokens = sum(len(row["input_ids"]) for row in rows)
        packed = max(1, round(batch * tokens / len(rows) / job["max_length"]))
        micro = min(micro, packed)
        accumulation = max(1, round(packed / micro))
        steps = -1
    options: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "max_steps": steps,
        "learning_rate": job["lr"],
        "weight_decay": job["decay"],
        "max_grad_norm": job["clip"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "bf16": True,
        "seed": job["seed"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
        "dataloader_pin_memory": job["device"] == "cuda",
        "torch_compile": bool(job["compile"] and how.get("best")),
    }
    if how.get("grouped"):
        options["train_sampling_strategy"] = "group_by_length"
    return options


def counted(kind: type, meter: Meter) -> type:
    """The trainer with a look at what goes through it, and grouped rows sorted as over the whole file."""

    class Counted(kind):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = mask.sum() if mask is not None else inputs["input_ids"].numel()
            loss = super().compute_loss(model, inputs, *rest, **named)
            meter.saw(tokens, loss[0] if isinstance(loss, tuple) else loss)
            return loss

        def _get_train_sampler(self, *rest: Any) -> Any:
            sampler = super()._get_train_sampler(*rest)
            if hasattr(sampler, "lengths"):
                # It sorts 50 batches at a time, but a quarter of a file shorter than that. These rows stand for 50
                # batches and more of the file, so all are sorted at once: what the default does with the file.
                from transformers.trainer_pt_utils import get_length_grouped_indices

                size = sampler.batch_size
                return get_length_grouped_indices(sampler.lengths, size, -(-len(sampler.lengths) // size))
            return sampler

    return Counted


def clock(meter: Meter) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not meter.began:
                meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            meter.stop()

    return Clock()


def plain(job: dict[str, Any], how: dict[str, Any], model: Any, rows: list[dict], steps: int) -> dict[str, Any]:
    """The loop most people write: autocast, the model's own loss, fused AdamW, clipped gradients."""
    import random

    import torch

    device, size = job["device"], how["micro"]
    chance = random.Random(job["seed"])
    order = list(range(len(rows)))
    chance.shuffle(order)
    if how.get("grouped"):
        order.sort(key=lambda i: len(rows[i]["input_ids"]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    chance.shuffle(batches)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": job["decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=job["lr"], fused=True)
    meter = Meter(device, job["skip"] if steps == job["steps"] else 0)
    meter.start()
    for chosen in batches[:steps]:
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen], job["pad"]).items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.saw(batch["attention_mask"].sum(), loss)
        meter.step()
    return meter.stop()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
