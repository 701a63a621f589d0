"""One measurement of maese: its own loop on a recipe, as `maese train` runs it.

    python benchmarks/peers/ours.py '{"method": "full", "recipe": {…}, "changes": ["train.micro_batch=8"], …}'

What is counted begins with the first step and ends with the last: loading, preparing and the final folder are outside,
as they are for everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from meter import Meter, answer, forget, held_loss


def main() -> None:
    job = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory(dir=job["room"]) as room:
        measure(job, Path(room) / "warm", steps=2)
        forget(job["device"])
        figures = measure(job, Path(room) / "run", job["steps"])
        figures["expected"] = job["expected"]
        answer(figures | {"held": held_loss(trained(job, Path(room) / "run" / "final"), job["held"], job["pad"])})


def measure(job: dict[str, Any], output: Path, steps: int) -> dict[str, Any]:
    from maese import recipe as recipes
    from maese.train.loop import train

    meter = Meter(job["device"], job["skip"] if steps == job["steps"] else 0)
    notes: list[str] = []  # which road it took, and what it warned of

    def watch(event: dict[str, Any]) -> None:
        if event["type"] == "plan":
            notes.extend(name for name in ("unpadded", "compiled") if event.get(name))
        if event["type"] == "warning":
            notes.append(event["code"])
        if event["type"] != "step":
            return
        if not meter.began:  # the end of the first step is the first sign of the loop
            meter.start(earlier=event["seconds"])
        meter.saw(event["tokens"], torch.tensor(event["loss"]))
        meter.step()
        if event["step"] == steps:
            meter.stop()

    import torch

    tree = job["recipe"]
    tree["train"] |= {"seed": job["seed"], "max_steps": steps}
    chosen = recipes.check(tree | {"output": str(output)})
    for change in job["changes"]:
        chosen = changed(chosen, change)
    train(chosen, watch=watch)
    if steps < job["steps"]:
        shutil.rmtree(output)
    return meter.figures | {"notes": notes}


def changed(recipe: Any, change: str) -> Any:
    """The recipe with `train.micro_batch=4`, as it is typed after `maese train`."""
    from maese import recipe as recipes

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipes.dump(recipe), "utf-8")
        return recipes.load(path, [change])


def trained(job: dict[str, Any], final: Path) -> Any:
    """The model that the run left, opened by the libraries of everybody."""
    from transformers import AutoModelForCausalLM

    if job["method"] == "full":
        return AutoModelForCausalLM.from_pretrained(final, local_files_only=True).to(job["device"])
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True)
    return PeftModel.from_pretrained(base, str(final)).to(job["device"])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
