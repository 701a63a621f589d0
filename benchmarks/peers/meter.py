"""What every contender is measured with, ours and theirs: no maese here, so that any python with torch can run it.

meter = Meter("cpu"); meter.start()
meter.saw(tokens, loss)          once per micro-batch: real tokens, and its share of the loss of the step
meter.step()                     once the weights have moved
meter.stop()                     {"tokens", "seconds", "cpu_s", "peak_gib", "losses", …}
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

IGNORED = -100
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "maese")


class Meter:
    """Time, processor time, tokens and losses between `start` and `stop`. Nothing here waits for the device."""

    def __init__(self, device: str, skip: int = 0) -> None:
        self.device, self.skip, self.began = device, skip, False
        self.figures: dict[str, Any] = {}
        self.tokens: Any = 0
        self.skipped: Any = 0  # tokens of the first `skip` steps, which are taken and not timed
        self.losses: list[Any] = []
        self._parts: list[Any] = []

    def start(self, earlier: float = 0.0) -> None:
        """Begin now, or `earlier` seconds ago when the first sign of a loop is the end of its first step."""
        _wait(self.device)
        self.began = True
        self._began = time.perf_counter() - earlier
        self._cpu = time.process_time() - earlier * _threads() * (self.device == "cpu")

    def saw(self, tokens: Any, loss: Any) -> None:
        self.tokens += tokens  # a tensor on a card stays there: reading it would make the loop wait
        self._parts.append(loss.detach())

    def step(self) -> None:
        self.losses.append(sum(self._parts))
        self._parts = []
        if len(self.losses) == self.skip:
            self.skipped, self.tokens = self.tokens, 0
            self.start()

    def stop(self) -> dict[str, Any]:
        _wait(self.device)
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        tokens = int(self.tokens)
        self.figures = {
            "tokens": tokens,
            "all_tokens": tokens + int(self.skipped),
            "seconds": round(seconds, 3),
            "tokens_s": round(tokens / seconds, 1),
            "cpu_s": round(cpu, 2),
            "steps": len(self.losses),
            "losses": [round(float(loss), 5) for loss in self.losses],
            **peak(self.device),
        }
        return self.figures


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def forget(device: str) -> None:
    """Give back what the warm-up left behind and let the peak begin again from what is held now."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> dict[str, float]:
    """`peak_gib`: resident memory of this process, or what the card gave to its tensors."""
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        allocated = torch.cuda.max_memory_allocated() / 2**30
        # The card keeps what it once gave, so what is taken at the end is the most that was, context and all.
        return {"peak_gib": round(allocated, 3), "card_gib": round((total - free) / 2**30, 3)}
    if sys.platform == "linux":
        # Not ru_maxrss: a child takes over that of the process it was born from.
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return {"peak_gib": round(kib / 2**20, 3)}
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gib": round(size / (2**30 if sys.platform == "darwin" else 2**20), 3)}


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], labels[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def held_loss(model: Any, path: str, pad: int) -> float:
    """Mean loss in nats per learnt token on rows nobody trained on, the same way and in fp32 for every contender."""
    import torch
    import torch.nn.functional as F

    if not getattr(model, "is_loaded_in_4bit", False):
        model.float()
    model.eval()
    device = next(model.parameters()).device
    rows = sorted(read(path), key=lambda row: len(row["input_ids"]))
    total, targets = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(rows), 8):
            batch = {k: v.to(device) for k, v in collate(rows[i : i + 8], pad).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            kept = labels != IGNORED
            total += float(F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
            targets += int(kept.sum())
    return round(total / targets, 5)


def product(device: str, repeats: int = 12) -> dict[str, float]:
    """TFLOP/s of the bf16 product that everything is held against: 8192³ on a card, a layer of GPT-2 on a processor."""
    import torch

    n, k, m = (8192, 8192, 8192) if device == "cuda" else (2048, 768, 3072)
    times = []
    a = torch.randn(n, k, device=device).bfloat16()
    b = torch.randn(k, m, device=device).bfloat16()
    for _ in range(repeats + 3):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - began)
    times = sorted(times[3:])
    return {"tflops": round(2 * n * k * m / times[len(times) // 2] / 1e12, 4)}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": sys.version.split()[0]}


def answer(facts: dict[str, Any]) -> None:
    """The last line of a worker is its result."""
    print("\n" + json.dumps(facts | {"versions": versions()}), flush=True)
