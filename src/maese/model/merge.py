"""An adapter into its base: one folder that plain transformers, and every server, opens as any model.

    made = merge("runs/2026-11-21-tutor", Path("tutor"))
    made.difference, made.tolerance           0.0000021, 0.0001

In:  a run, or the folder of an adapter. Out: a folder with the model, its tokenizer, its chat template and its way of
writing; or nothing, where what was written does not say what base and adapter say.

The sum is made in fp32 over the whole weights of the base, also for an adapter that learnt over 4 bits: to add it to
rounded weights and round again would lose what it learnt.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maese import run as runs
from maese.errors import MaeseError
from maese.model import adapter, load
from maese.model.fingerprint import untouched
from maese.run import Run, disk, refuse_taken, sync
from maese.say import percent, say
from maese.tokens.template import encode, open_template, opening

# How far the logits of what was written may be from those of base and adapter, as a share of their own spread (both as
# root mean squares). What is left in fp32 is the order of sums; in 16 bits every weight is rounded.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
DROWNED = 0.5  # of what the adapter changes in the logits: rounding that takes more has lost what was learnt
SPEAKS = ("name", "format", "template", "generate", "examples")  # of our notes of an adapter, what is not of its base
NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Merged:
    """What was written, and how far its logits are from those of base and adapter (a share of their spread)."""

    path: Path
    dtype: str
    difference: float
    tolerance: float
    tokens: int  # looked at
    bytes: int


def merge(what: str | Path | Run, out: Path, dtype: str = "auto", base: str | None = None) -> Merged:
    """Write base and adapter of a run, or of an adapter's folder, as one model. `auto`: in the precision of the base.

    A model that was trained whole is written as it is. `base` says where that of an adapter is now. Errors: RUN-01
    (`out` is there), RUN-02, RUN-05 (no such run, or not ended), ADAPT-01, ADAPT-04 (another base, or none), MERGE-01,
    MERGE-02 (it would not say the same), and those of loading and of the disk.
    """
    refuse_taken(out)
    named = str(what.path if isinstance(what, Run) else what)
    folder, below, prompts = _parts(what, base)
    chosen = _precision(below) if dtype == "auto" else dtype
    adapted = adapter.is_adapter(folder)
    words = below if adapted and not adapter.brings_words(folder) else folder
    model, tokenizer = load.load_model(below), load.load_tokenizer(words)
    if adapted:
        model = adapter.attach(model, folder, below)
    rows = [_ids(tokenizer, prompt, load.context_of(model)) for prompt in prompts]
    wanted = _logits(model, rows)
    with untouched(model):
        before = _logits(model, rows)
    if adapted:
        model = model.merge_and_unload()
    with disk(out):
        draft = out.with_name(f".{out.name}.tmp-{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _write(model, tokenizer, folder, draft, chosen)
            del model
            for path in draft.iterdir():
                sync(path)
            difference = _check(wanted, before, _logits(load.load_model(draft), rows), chosen, named)
            os.replace(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    size = sum(path.stat().st_size for path in load.weight_files(out))
    return Merged(out, chosen, difference, TOLERANCE[chosen], sum(map(len, rows)), size)


def _parts(what: str | Path | Run, base: str | None) -> tuple[Path, Path, list[str]]:
    """The folder with the adapter or the model, that of its base, and what to ask both."""
    if not isinstance(what, Run) and adapter.is_adapter(Path(what)):
        folder = Path(what)
        return folder, adapter.base_of(folder, base), [say("compare.prompt")]
    run = what if isinstance(what, Run) else runs.trained(what)
    if not run.final.is_dir():
        raise MaeseError("RUN-05", run=str(run.path))
    recipe = run.recipe()
    below = adapter.base_of(run.final, base or recipe.base) if adapter.is_adapter(run.final) else run.final
    return run.final, below, list(recipe.eval.prompts) or [say("compare.prompt")]


def _precision(folder: Path) -> str:
    """What the weights of a folder are in, by its configuration."""
    config = load.check(folder)
    return NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "fp32")


def _ids(tokenizer: Any, prompt: str, longest: int) -> list[int]:
    """A prompt as the model meets it: in its template, where it carries one."""
    from maese.text.record import Message

    if getattr(tokenizer, "chat_template", None) is not None:
        ids = open_template("model", tokenizer).prompt_ids((Message("user", prompt),))
    else:
        ids = opening(tokenizer) + encode(tokenizer, prompt) or [tokenizer.eos_token_id]
    return ids[-longest:]


def _logits(model: Any, rows: list[list[int]]) -> Any:
    """Those of every token of every prompt, one after the other: (N, V) in fp32."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in rows])


def _write(model: Any, tokenizer: Any, folder: Path, draft: Path, dtype: str) -> None:
    import torch
    from transformers import GenerationConfig

    named = {short: getattr(torch, name) for name, short in NAMES.items()}
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to(named[dtype]).save_pretrained(draft, safe_serialization=True)
    tokenizer.save_pretrained(draft)
    # Its voice and its way of writing go with it; it is over no base any more.
    about = {key: value for key, value in adapter.about_adapter(folder).items() if key in SPEAKS}
    if about:
        (draft / adapter.ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


def _check(wanted: Any, before: Any, found: Any, dtype: str, what: str) -> float:
    """How far the logits are, or MERGE-01 where that is more than rounding, or all that was learnt.

    MERGE-02 in fp32, where rounding is not what took it.
    """
    spread = float((wanted - wanted.mean()).square().mean().sqrt())
    far = float((found - wanted).square().mean().sqrt())
    learnt = float((wanted - before).square().mean().sqrt())
    # Written so that what is no number fails too.
    fine = far <= TOLERANCE[dtype] * spread and (dtype == "fp32" or not learnt or far <= DROWNED * learnt)
    if not fine:
        facts = {"difference": percent(far / spread, 2), "tolerance": percent(TOLERANCE[dtype], 2), "run": what}
        if dtype == "fp32":
            raise MaeseError("MERGE-02", **facts)
        raise MaeseError("MERGE-01", dtype=dtype, learnt=percent(learnt / spread, 2), **facts)
    return far / spread
