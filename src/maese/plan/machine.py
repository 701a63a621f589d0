"""This machine: device, threads, memory, and the precision that pays on it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Train

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # their numbers in glibc's malloc.h
# The most kernels that are kept, and of those before them that torch keeps for itself: see `few_kernels`.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "1"}


@dataclass(frozen=True)
class Machine:
    device: str  # cpu | cuda
    name: str
    threads: int
    memory_gib: float  # of the device that trains
    precision: str  # fp32 | bf16 | fp16

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def room_gib(self, train: Train) -> float:
        """What may be taken of its memory: a ceiling of the recipe counts as what there is."""
        return min(self.memory_gib, train.memory_gib or self.memory_gib)


@dataclass(frozen=True)
class Card:
    name: str
    memory_gib: float
    bf16: bool  # whether it multiplies it in hardware


def machine(train: Train | None = None) -> Machine:
    """What will be used, given what the recipe asks for. Error: DEVICE-01 when it asks for a card that is not there."""
    import torch

    card = None
    if (train is None or train.device != "cpu") and torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        card = Card(seen.name, seen.total_memory / 2**30, bf16)
    # What torch works with: OMP_NUM_THREADS, and torchrun, leave it fewer than there are cores.
    return _chosen(train, card, torch.get_num_threads(), bf16_pays_on_cpu)


def glance(train: Train | None = None) -> Machine:
    """The same without torch, at once: the card as its driver tells it, the processor as the system does.

    Error: DEVICE-01.
    """
    card = _card() if train is None or train.device != "cpu" else None
    threads = os.environ.get("OMP_NUM_THREADS", "")
    quick = {"avx512_bf16", "amx_bf16"}
    return _chosen(train, card, int(threads) if threads.isdigit() else _cores(), lambda: bool(quick & _flags()))


def _chosen(train: Train | None, card: Card | None, threads: int, bf16_pays: Callable[[], bool]) -> Machine:
    """The device and the precision, given the card there is, if any, and what a processor is like."""
    asked = train.precision if train else "auto"
    if card is not None:
        auto = "bf16" if card.bf16 else "fp16"
        return Machine("cuda", card.name, _cores(), card.memory_gib, auto if asked == "auto" else asked)
    if train is not None and train.device == "cuda":
        raise MaeseError("DEVICE-01")
    import psutil

    # fp16 has no fast path on any CPU; asking for it there is taken as asking for small numbers.
    precision = ("bf16" if bf16_pays() else "fp32") if asked in ("auto", "fp16") else asked
    return Machine("cpu", cpu_name(), threads, psutil.virtual_memory().total / 2**30, precision)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _card() -> Card | None:
    """The first card that CUDA would show, or None."""
    row = _seen()
    return Card(row[2], float(row[3]) / 1024, float(row[5]) >= 8) if row else None


def _seen() -> list[str] | None:
    """The row of `cards` of the first card that CUDA shows: by number or by the beginning of its UUID where
    CUDA_VISIBLE_DEVICES says so, and none where it says nothing or something that is not there."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    found = [row for row in cards() if wanted and (row[0] == wanted or row[1].startswith(wanted))]
    return found[0] if found else None


@cache
def cards() -> list[list[str]]:
    """Number, UUID, name, MiB, free MiB and capability of every card; none where the driver's program finds none."""
    import shutil
    import subprocess

    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap"
    command = [program, asked, "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    # A name may have commas.
    rows = [re.match(r"(\d+), ([^,]+), (.+), (\d+), (\d+), (\d+\.\d+)$", line.strip()) for line in lines]
    return [list(row.groups()) for row in rows if row]


def _flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
    except OSError:
        return set()


def few_kernels() -> None:
    """Have oneDNN, which multiplies in 16 bits on a processor, keep few of the kernels it makes.

    It makes one for each shape of a product, in a quarter of a millisecond, and keeps the last 1,024 of them, which
    weigh half a mebibyte each: rows of many lengths fill hundreds. A pass through a model has less than thirty. It
    counts only before the first product, and not where the user chose.
    """
    for name, most in KERNELS.items():
        os.environ.setdefault(name, most)


def allocator() -> None:
    """On Linux, have glibc keep memory that is let go of, and a card's memory grow in one piece.

    glibc would give the gradients of a large matrix back to the system, and have every page zeroed again for the next
    step. On a card, rows of many lengths then leave no holes: it counts only before the card is first used, and not
    where the user chose.
    """
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):  # another C library has no such call
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def bf16_pays_on_cpu() -> bool:
    """Whether the processor multiplies bf16 in hardware; without that it is slower than fp32."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def memory_used_gib(device: str) -> float:
    """Memory in use now: of the card, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def memory_free_gib(device: str) -> float:
    """Memory that nobody holds now: of the card, as its driver tells it, or of this machine."""
    if device == "cuda":
        cards.cache_clear()
        row = _seen()
        return float(row[4]) / 1024 if row else 0.0
    import psutil

    return psutil.virtual_memory().available / 2**30


def memory_peak_gib(device: str) -> float:
    """The most this process has held at once."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
