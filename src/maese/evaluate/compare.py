"""Before and after: the same prompts through the base and through the tuned weights, with proof that they differ.

Same seed, same settings, both sides; each with the fingerprint of the weights that were active, and the largest
difference between their logits. Two equal sides are an error (COMPARE-01), never two columns.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from maese.errors import MaeseError
from maese.generate.engine import Writer, open_base_of, open_writer
from maese.model import adapter, load
from maese.model.fingerprint import fingerprint, untouched
from maese.recipe import Generate
from maese.run import Run


def compare(
    run: Run, prompts: list[str], on_pair: Callable[[dict], object] | None = None, **settings: Any
) -> dict[str, Any]:
    """The comparison as plain data, also written to `compare.json` of the run."""
    after = open_writer(run)
    recipe = run.recipe()
    if adapter.is_adapter(run.final):
        before = after  # the same model, its adapter off while the base writes
    else:
        folder = load.resolve(recipe.base)
        adapter.check_base(run.final, folder)  # a base replaced since then was never the «before» of this run
        model, _ = open_base_of(recipe)
        before = Writer(model, after.tokenizer, after.settings, after.format, after.template)

    with untouched(before.model):
        print_before = fingerprint(before.model)
    print_after = fingerprint(after.model)
    chosen = after.with_settings(settings)
    difference = max(logit_difference(before, after, prompt, chosen) for prompt in prompts)
    if difference == 0 or print_before == print_after:
        raise MaeseError("COMPARE-01", run=str(run.path), fingerprint=print_after[:12])

    pairs = []
    for prompt in prompts:
        with untouched(before.model):
            # One try a side: another seed on one of them would not be the same comparison.
            old = before.generate(prompt, tries=1, **settings)
        new = after.generate(prompt, tries=1, **settings)
        counts = {"before": old.sentences, "after": new.sentences}
        pairs.append({"prompt": prompt, "before": old.text, "after": new.text, "sentences": counts})
        if on_pair:
            on_pair(pairs[-1])
    result = {
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "base": recipe.base,
        "seed": chosen.seed,
        "settings": chosen.model_dump(),
        "before": {"fingerprint": print_before},
        "after": {"fingerprint": print_after},
        "max_logit_difference": difference,
        "prompts": pairs,
    }
    run.write("compare.json", result)
    return result


def logit_difference(before: Writer, after: Writer, prompt: str, settings: Generate) -> float:
    """The largest absolute difference between the logits of the two sides over a prompt."""
    import torch

    ids = after.prompt_ids(prompt, (), settings)
    if len(ids) >= load.context_of(after.model):
        raise MaeseError("GEN-01", tokens=len(ids), longest=load.context_of(after.model))
    with torch.inference_mode():
        batch = torch.tensor([ids], device=after.model.device)
        with untouched(before.model):
            old = before.model(input_ids=batch, use_cache=False).logits.float()
        new = after.model(input_ids=batch, use_cache=False).logits.float()
    return float((old - new).abs().max())
