"""The final folder: a model or an adapter that plain transformers and PEFT open without maese."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from maese.model.adapter import ABOUT
from maese.model.gguf import PACKAGED
from maese.model.load import weights_hash
from maese.recipe import INSIDE, Recipe, at_home
from maese.run import disk, sync
from maese.tokens.template import Renderer


def save_final(
    model: Any, tokenizer: Any, folder: Path, recipe: Recipe, base: Path, renderer: Renderer | None = None,
    weights: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write model or adapter, tokenizer and generation settings, whole or not at all.

    With the `renderer` of its conversations, the tokenizer carries the same template and the settings its end tokens.
    `weights` are the model's own, gathered, where they lie in pieces on several processes.
    """
    draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    with disk(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _save_weights(model, draft, recipe, base, weights)
            settings = generation_config(model, recipe)
            if renderer:
                tokenizer.chat_template = renderer.jinja
                settings.eos_token_id = sorted(renderer.stop_ids | _listed(settings.eos_token_id))
            settings.save_pretrained(draft)  # after the model, which writes its own
            tokenizer.save_pretrained(draft)
            for path in draft.iterdir():
                sync(path)
            sync(draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _save_weights(model: Any, folder: Path, recipe: Recipe, base: Path, weights: dict[str, Any] | None = None) -> None:
    more: dict[str, Any] = {"state_dict": weights} if weights else {}
    if recipe.method.adapts:  # the rows of new tokens are in the adapter: not the whole embedding, as PEFT would
        more["save_embedding_layers"] = False
    model.save_pretrained(folder, safe_serialization=True, **more)
    place = at_home(recipe.base)
    in_folder = recipe.base not in INSIDE and place.is_dir()
    in_file = place.suffix == ".gguf" and place.is_file()
    about = {
        "base": str(place.absolute()) if in_folder or in_file else recipe.base,
        "base_sha256": weights_hash(base),
        "method": recipe.method.kind,
        "recipe": recipe.name,
        # Who it is when it speaks: its name, what it was fed, its voice and way of writing, and what to ask it first.
        "name": recipe.name,
        "format": recipe.data.format,
        "template": recipe.data.template,
        "generate": recipe.generate.model_dump(),
        "examples": list(recipe.eval.prompts),
    }
    (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    if recipe.method.adapts:
        # PEFT writes where the base was found, which for one of the hub is a folder of this machine's cache.
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text("utf-8"))
        name, _, revision = recipe.base.partition("@")
        here = in_folder or in_file or recipe.base in INSIDE or recipe.base in PACKAGED
        config["base_model_name_or_path"] = str(base.absolute()) if here else name
        config["revision"] = revision or None if not here else None
        path.write_text(json.dumps(config, ensure_ascii=False, indent=1, sort_keys=True), encoding="utf-8")


def _listed(ends: int | list[int] | None) -> set[int]:
    return set() if ends is None else {ends} if isinstance(ends, int) else {*ends}


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
        eos_token_id=model.generation_config.eos_token_id,  # a list, in models that end turns in several ways
        pad_token_id=getattr(model.config, "pad_token_id", None),
        **chosen,
    )
