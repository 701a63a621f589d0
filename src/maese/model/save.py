"""The final folder: a model or an adapter that plain transformers and PEFT open without maese."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from maese.model.adapter import ABOUT
from maese.model.load import weights_hash
from maese.recipe import Recipe
from maese.run import disk


def save_final(model: Any, tokenizer: Any, folder: Path, recipe: Recipe, base: Path) -> None:
    """Write model or adapter, tokenizer and generation settings, whole or not at all."""
    draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    with disk(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _save_weights(model, draft, recipe, base)
            generation_config(model, recipe).save_pretrained(draft)  # after the model, which writes its own
            tokenizer.save_pretrained(draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
        shutil.rmtree(old, ignore_errors=True)


def _save_weights(model: Any, folder: Path, recipe: Recipe, base: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as problem:  # it wraps the system's own words about a full disk
        raise OSError(28, str(problem)) from problem
    about = {
        "base": recipe.base,
        "base_sha256": weights_hash(base),
        "method": recipe.method.kind,
        "recipe": recipe.name,
    }
    (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    if recipe.method.kind == "lora":
        # PEFT writes the path of the base on this machine; another machine needs its name.
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text("utf-8"))
        config["base_model_name_or_path"] = str(base) if recipe.base == "embedded" else recipe.base.partition("@")[0]
        path.write_text(json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True), encoding="utf-8")


def generation_config(model: Any, recipe: Recipe) -> Any:
    """The recipe's way of writing, as transformers keeps it."""
    from transformers import GenerationConfig

    settings = recipe.generate
    sampled = settings.temperature > 0
    chosen = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p} if sampled else {}
    return GenerationConfig(
        do_sample=sampled,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=getattr(model.config, "pad_token_id", None),
        **chosen,
    )
