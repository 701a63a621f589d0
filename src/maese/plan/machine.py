"""This machine: device, threads, memory, and the precision that pays on it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Train

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # their numbers in glibc's malloc.h


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


def machine(train: Train | None = None) -> Machine:
    """What will be used, given what the recipe asks for. Error: DEVICE-01 when it asks for a card that is not there."""
    import torch

    wanted = train.device if train else "auto"
    asked = train.precision if train else "auto"
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise MaeseError("DEVICE-01")
    device = "cuda" if cuda and wanted != "cpu" else "cpu"
    if device == "cuda":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        card = torch.cuda.get_device_properties(0)
        auto = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return Machine(device, card.name, cores, card.total_memory / 2**30, auto if asked == "auto" else asked)
    import psutil

    auto = "bf16" if bf16_pays_on_cpu() else "fp32"
    # fp16 has no fast path on any CPU; asking for it there is taken as asking for small numbers.
    precision = auto if asked in ("auto", "fp16") else asked
    # What torch works with: OMP_NUM_THREADS, and torchrun, leave it fewer than there are cores.
    return Machine(device, cpu_name(), torch.get_num_threads(), psutil.virtual_memory().total / 2**30, precision)


def glance(train: Train | None = None) -> Machine:
    """The same without torch, at once: the card as its driver tells it, the processor as the system does.

    Error: DEVICE-01.
    """
    wanted = train.device if train else "auto"
    asked = train.precision if train else "auto"
    card = _card() if wanted != "cpu" else None
    if wanted == "cuda" and card is None:
        raise MaeseError("DEVICE-01")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if card:
        name, memory_gib, capability = card
        auto = "bf16" if capability >= 8 else "fp16"
        return Machine("cuda", name, cores, memory_gib, auto if asked == "auto" else asked)
    import psutil

    auto = "bf16" if {"avx512_bf16", "amx_bf16"} & _flags() else "fp32"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Machine(
        "cpu", cpu_name(), int(threads) if threads.isdigit() else cores, psutil.virtual_memory().total / 2**30,
        auto if asked in ("auto", "fp16") else asked,
    )  # fmt: skip


@cache
def _card() -> tuple[str, float, float] | None:
    """Name, GiB and capability of the first card, or None where its driver's own program finds none."""
    import shutil
    import subprocess

    if not (program := shutil.which("nvidia-smi")):
        return None
    command = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[0]
        name, mebibytes, capability = line.rsplit(",", 2)
        return name.strip(), float(mebibytes) / 1024, float(capability)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def _flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
    except OSError:
        return set()


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
