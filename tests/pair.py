"""What each process does of a test with several: orders one after another, so that one launch tries many things.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/pair.py orders.json

An order is {"do": "train" | "resume", "args": [...], "changes": [...]} with, if something is to happen, {"signal": 15,
"rank": 1, "after": 3} (sent to that process after its third step), "nan" (its loss is no number then), "full" (its disk
is from then on) or "fail" (it ends, by itself). What each process ended with goes to `<orders>.<rank>.json`: null, or
the code of its error; and how often a loss was taken without its logits.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import warnings
from pathlib import Path


def happen(order: dict, loop) -> None:
    """Wrap the step of the loop so that what the order says happens in its process, and in no other."""
    from maese.train import checkpoint
    from maese.train import step as steps

    real, real_passes, calls = loop.take_step, steps._passes, [0]

    def step(*given):
        result = real(*given)
        calls[0] += 1
        if calls[0] == order.get("after") and int(os.environ["RANK"]) == order["rank"]:
            if number := order.get("signal"):
                os.kill(os.getpid(), number)
            if order.get("full"):
                checkpoint._write = full
            if order.get("fail"):
                raise RuntimeError("a fault of this process alone")
        return result

    def passes(*given, **named):
        total = real_passes(*given, **named)
        now = calls[0] + 1 == order.get("after") and int(os.environ["RANK"]) == order["rank"]
        return math.nan if order.get("nan") and now else total

    loop.take_step, steps._passes = step, passes


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def live(order: dict) -> str | None:
    from maese import recipe as recipes
    from maese.errors import MaeseError
    from maese.run import Run
    from maese.train import checkpoint, loop
    from maese.train import step as steps

    real = loop.take_step, steps._passes, checkpoint._write
    happen(order, loop)
    try:
        if order["do"] == "train":
            loop.train(recipes.load("receta.yaml", order["args"]))
        else:
            loop.resume(Run(*order["args"]))
    except MaeseError as problem:
        return problem.code
    finally:
        loop.take_step, steps._passes, checkpoint._write = real
    return None


def main() -> None:
    warnings.simplefilter("ignore")
    path = Path(sys.argv[1])
    from maese.model import head

    whole, calls = head.chunked_loss, []
    head.chunked_loss = lambda *given, **more: calls.append(1) or whole(*given, **more)
    ended = [live(order) for order in json.loads(path.read_text("utf-8"))]
    told = {"ended": ended, "chunked": len(calls)}
    path.with_name(f"{path.name}.{os.environ['RANK']}.json").write_text(json.dumps(told), "utf-8")
    from maese.train.together import leave

    leave(wait=True)


if __name__ == "__main__":
    main()
