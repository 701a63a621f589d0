"""What the processes of one run say to each other, besides gradients: who failed, who was asked to stop, who writes.

    together = join(accelerator)
    rows = together.each(lambda: prepare(…))        done by all; where one fails, all raise its error
    path = together.first(lambda: create(recipe))   done by the first, while the others wait for what it gives
    total, asked = together.sums(total, 1.0)        the sum over all, in double precision

With one process each of them only does its work. What is said travels as JSON over a group of its own (gloo), which
waits as long as it takes: to save a large model or prepare a large text takes longer than cards wait for each other.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from maese.errors import MaeseError

PATIENCE = datetime.timedelta(days=7)
# What torch says when another process has gone.
GONE = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo/transport",
    "nccl communicator was aborted", "remote process exited",
)  # fmt: skip
_GROUPS: list[Any] = []  # the one that talks, kept for the whole process

Result = TypeVar("Result")


@dataclass(frozen=True)
class Together:
    """One process among those of a run: its number, how many there are, and whether weights lie in pieces on them."""

    rank: int = 0
    world: int = 1
    device: Any = "cpu"
    sharded: bool = False

    def tell(self, said: Any) -> list[Any]:
        """What every process said, in their order. Error: DIST-03 where one has gone."""
        if self.world == 1:
            return [said]
        import torch
        import torch.distributed as dist

        words = json.dumps(said, default=str).encode()
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(words)]), group=_GROUPS[0])
            longest = max(int(size) for size in sizes)
            mine = torch.frombuffer(bytearray(words.ljust(longest)), dtype=torch.uint8)
            heard = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(heard, mine, group=_GROUPS[0])
        except RuntimeError as problem:
            raise (alone() if gone(problem) else problem) from problem
        return [json.loads(row.numpy().tobytes()) for row in heard]

    def each(self, work: Callable[[], Result]) -> Result:
        """What `work()` gives here; where it fails anywhere, the error of the first process that failed, everywhere."""
        return self._settle(work, lambda result, _: result)

    def first(self, work: Callable[[], Result]) -> Result:
        """What `work()` gives on the first process, which alone does it, as JSON would give it back."""
        mine: Callable[[], Any] = work if self.rank == 0 else lambda: None
        return self._settle(mine, lambda result, heard: result if self.rank == 0 else heard[0]["gave"], share=True)

    def _settle(self, work: Callable[[], Any], choose: Callable[[Any, list[Any]], Any], share: bool = False) -> Any:
        if self.world == 1:
            return work()
        result, problem = None, None
        try:
            result = work()
        except Exception as failed:
            problem = failed
        if isinstance(problem, MaeseError) and problem.code == "DIST-03":
            raise problem  # there is nobody to tell it to
        told = {"problem": _as_words(problem), "gave": result if share and self.rank == 0 else None}
        heard = self.tell(told)
        faults = [(rank, each["problem"]) for rank, each in enumerate(heard) if each["problem"]]
        if not faults:
            return choose(result, heard)
        rank, (code, facts, exit_code) = faults[0]
        if problem is not None and (rank == self.rank or code is None):
            if isinstance(problem, MaeseError):
                problem.agreed = True
            raise problem
        raise agreed(MaeseError(code, **facts) if code else alone(), exit_code)

    def sums(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number, the same bits on all of them."""
        if self.world == 1:
            return list(numbers)
        import torch

        both = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(both)
        return both.tolist()

    def stir(self, seed: int, step: int) -> None:
        """Give each process but the first draws of its own for a step, so that dropout does not repeat among them.

        From the seed and the step alone: a run that goes on draws what it would have drawn, and the first process
        draws what one alone does.
        """
        if self.rank:
            import torch

            torch.manual_seed((seed * 1_000_003 + step * 4_099 + self.rank) % 2**63)


def join(accelerator: Any) -> Together:
    """This process among those that Accelerate found. Error: DIST-04 (a way to share work that is not DDP or FSDP2)."""
    from accelerate.utils import DistributedType

    known = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in known and not accelerator.is_fsdp2:
        raise agreed(MaeseError("DIST-04", found=str(accelerator.distributed_type).rpartition(".")[2]))
    if accelerator.num_processes > 1 and not _GROUPS:
        import torch

        _GROUPS.append(torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    return Together(
        accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator.is_fsdp2
    )  # fmt: skip


def leave(wait: bool) -> None:
    """Take leave of the other processes at the end of this one, after the first has said all it had to say.

    Whoever goes earlier is taken for a failure by what launched them, which then stops the rest. `wait` is only for an
    end that all know of: nobody waits for a process that failed alone.
    """
    import torch

    if not _GROUPS or not torch.distributed.is_initialized():
        return
    with suppress(RuntimeError):
        if wait:
            torch.distributed.barrier(group=_GROUPS[0])
            torch.distributed.destroy_process_group()
    _GROUPS.clear()


def gone(problem: BaseException) -> bool:
    """Whether an error of torch says that another process is no longer there."""
    words = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(sign in words for sign in GONE)


def agreed(problem: MaeseError, exit_code: int | None = None) -> MaeseError:
    """The error as one that every process has, so that the first alone says it."""
    problem.agreed = True
    if exit_code is not None:
        problem.exit_code = exit_code
    return problem


def alone() -> MaeseError:
    """DIST-03: another process has gone."""
    return agreed(MaeseError("DIST-03", rank=int(os.environ.get("RANK", "0"))))


def _as_words(problem: Exception | None) -> Any:
    """An error as JSON takes it: code, facts, exit code. An unforeseen one has no code and stays with its process."""
    if problem is None:
        return None
    if isinstance(problem, MaeseError):
        return [problem.code, problem.facts, problem.exit_code]
    return [None, {}, 1]
