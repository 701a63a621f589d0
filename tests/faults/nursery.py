"""A process with everything loaded that makes others: each line of orders is a child, forked, to be killed or not.

    {"do": "train", "args": ["receta.yaml", "output=x"], "cwd": …, "log": …, "env": {…}, "hook": {…}}   ->  its pid
    {"wait": 4711}                                                                                     ->  its exit

Loading torch takes seconds and a tiny run less than one: without this, a hundred kills would take an hour. Nothing is
trained before the fork, so no thread is lost in it. A hook sends a signal at the n-th call of some functions, or fills
the disk, or only counts; the code under test knows nothing of it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

DISK = [
    "os:fsync", "os:replace", "os:mkdir", "os:unlink", "os:rmdir", "shutil:rmtree", "safetensors.torch:save_file",
]  # fmt: skip


class Hook:
    """Something that happens at the `nth` call of any of `at`, before it or after it."""

    def __init__(self, at: list[str], nth: int = 0, when: str = "before", signal: int = 0, **more: object) -> None:
        self.nth, self.when, self.signal, self.more, self.calls = nth, when, signal, more, 0
        for place in at:
            module, name = place.split(":")
            owner = importlib.import_module(module)
            setattr(owner, name, self.around(getattr(owner, name), place))

    def around(self, function, place):
        def called(*args, **options):
            self.calls += 1
            mine = self.calls == self.nth
            if mine and self.when == "before":
                self.act()
            try:
                return function(*args, **options)
            finally:  # also after a call that failed: a folder that is there already is not made again
                if mine and self.when == "torn":
                    os.truncate(args[1], os.stat(args[1]).st_size // 2)
                if mine and self.when in ("after", "torn"):
                    self.act()

        return called

    def act(self) -> None:
        if self.signal:
            os.kill(os.getpid(), self.signal)
        if twice := self.more.get("again"):  # a second signal, while the first is being obeyed
            os.kill(os.getpid(), twice)
        if path := self.more.get("fill"):  # the disk, to the last byte
            with open(path, "wb", buffering=0) as out:
                try:
                    while True:
                        out.write(b"\0" * 4096)
                except OSError:
                    pass
        if folder := self.more.get("move"):
            os.rename(folder, f"{folder}-lejos")
        if number := self.more.get("errno"):
            raise OSError(number, os.strerror(number))
        if days := self.more.get("back"):
            set_back(days)


def set_back(days: int) -> None:
    """The clock of this process, so many days earlier from now on."""
    import datetime
    import time
    import types

    from maese import run

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(days=days)

    real = time.time
    time.time = lambda: real() - 86400 * days
    run.datetime = types.SimpleNamespace(datetime=Past, date=datetime.date, timedelta=datetime.timedelta)


def live(order: dict) -> int:
    """What a child does. Returns its exit code."""
    os.chdir(order["cwd"])
    os.environ |= order.get("env", {})
    hook = Hook(**order["hook"]) if order.get("hook") else None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from maese import cli, terminal

    terminal.close = lambda *_, **__: None  # figures and report take longer than the run, and are tested elsewhere
    code = cli.run([order["do"], *order["args"]])
    if hook:
        Path("calls").write_text(str(hook.calls), "utf-8")
    return code


def preload() -> None:
    import accelerate
    import peft  # noqa: F401
    import torch
    import transformers

    from maese import cli, terminal  # noqa: F401
    from maese.train import loop

    torch.set_num_threads(1)
    # Classes of the tiny model, which transformers imports when they are first asked for.
    assert transformers.GPT2LMHeadModel and transformers.AutoTokenizer and accelerate.Accelerator and loop.train


def main() -> None:
    preload()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        code = 99
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = live(order)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
