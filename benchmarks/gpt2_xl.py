"""GPT-2 XL at full size with the pokemon recipe: does it take its steps on this machine, and in how much memory?

    python benchmarks/gpt2_xl.py            # about 3 GB of disk and 12 GB of memory

The architecture is the real one (48 layers, 1600 wide, 25 heads, 50,257 tokens, 1,024 of context); the weights are
random, because what is measured is size and time. Prints the trainable share, the seconds a step and the peak memory.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path


def build(folder: Path) -> None:
    """A folder that `base:` takes for GPT-2 XL, with the embedded tokenizer (its ids all fit in the vocabulary)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.initialization import no_init_weights

    from maese.model.load import quiet, resolve

    quiet()
    config = GPT2Config(
        n_layer=48, n_embd=1600, n_head=25, n_positions=1024, vocab_size=50257, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = GPT2LMHeadModel(config)
    model.tie_weights()  # part of the initialisation that was left out
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if ".ln_" in name and name.endswith("weight") else parameter.normal_(0, 0.02)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for path in resolve("embedded").glob("tokenizer*"):
        shutil.copy(path, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the model here instead of in a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "gpt2-xl"
        if not (folder / "config.json").exists():
            build(folder)
        figures = measure(folder, Path(temporary) / "run", args.steps)
    print(
        f"GPT-2 XL, LoRA r=16: {figures['parameters']:,} parameters, {figures['trainable']:,} trained"
        f" ({100 * figures['trainable'] / figures['parameters']:.2f} %), {figures['steps']} steps,"
        f" {figures['seconds'] / figures['steps']:.1f} s a step, peak {figures['peak_gib']:.1f} GiB"
    )


def measure(folder: Path, output: Path, steps: int) -> dict:
    """Train the pokemon recipe for a few steps in a process of its own, whose peak memory is then its alone."""
    import json
    import subprocess
    import sys

    changes = [
        f"base={folder}", f"output={output}", f"train.max_steps={steps}", "eval.prompts=[]", "eval.every=1000000",
        "train.gradient_checkpointing=true", "data.validation=0", "train.final=last",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "maese", "-q", "train", "pokemon", *changes], check=True)
    events = [json.loads(line) for line in (output / "events.jsonl").read_text("utf-8").splitlines()]
    plan = next(e for e in events if e["type"] == "plan")
    end = next(e for e in events if e["type"] == "end")
    taken = sum(e["type"] == "step" for e in events)
    return {**plan, "steps": taken, "seconds": end["seconds"], "peak_gib": end["peak_gib"]}


if __name__ == "__main__":
    main()
