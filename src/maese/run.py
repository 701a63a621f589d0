"""The run folder: where a run's facts are written once and read by everyone.

    runs/2026-11-21-quijote/
      recipe.yaml  environment.json  data.json  state.json  events.jsonl  checkpoints/  final/  report/

Training alone writes `events.jsonl`, one JSON a line, flushed at once; terminal, studio and report only read it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import functools
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese.errors import MaeseError

SCHEMA = 1
Event = dict[str, Any]
# Nothing can be written there: no permission, or a file stands where a folder should, or the other way round.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class Run:
    """One run folder, open for reading; `open_for_writing` makes it ours until `close`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._events: Any = None
        self._lock: Any = None

    # What is where
    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.path / "recipe.yaml")

    def read(self, name: str) -> Any:
        """A JSON file of the folder, or None when the run has not come that far."""
        path = self.path / name
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def write(self, name: str, content: Any) -> None:
        if not self.path.is_dir():  # to make it again would hide that the run has lost everything else
            raise MaeseError("DISK-04", path=str(self.path))
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
        write_whole(self.path / name, text)

    def events(self) -> list[Event]:
        """Every event, oldest first; a last line cut by a crash is left out."""
        path = self.path / "events.jsonl"
        found = []
        if path.exists():
            for line in path.read_text("utf-8", errors="replace").split("\n"):
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return found

    def history(self) -> list[Event]:
        """The events that led to the weights as they are: what a resumed run threw away is not in it."""
        kept: list[Event] = []
        for event in self.events():
            if event["type"] == "start" and event.get("resumed_from") is not None:
                past = event["resumed_from"]  # 0: it began anew
                kept = [e for e in kept if past and e.get("step", 0) <= past and e["type"] not in ("end", "error")]
            kept.append(event)
        return kept

    # Writing
    def open_for_writing(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        path = self.path / "events.jsonl"
        cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._events = path.open("a", encoding="utf-8")
        if cut:
            self._events.write("\n")

    def _take(self) -> None:
        """Make the folder ours: the system lets one process hold the lock, and lets go of it when that one dies."""
        holder = self.holder()
        lock = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            if holder:
                raise BlockingIOError
            with contextlib.suppress(ImportError):  # where there is no fcntl, the living process in the file must do
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise MaeseError("RUN-03", run=str(self.path), pid=self.holder() or 0) from None
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "started": _started(os.getpid())}))
        lock.flush()
        self._lock = lock

    def event(self, type: str, **facts: Any) -> Event:
        event = {
            "v": SCHEMA,
            "t": datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "type": type,
        }
        event |= facts
        with disk(self.path):
            self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._events.flush()
        return event

    def close(self) -> None:
        if self._events:
            with contextlib.suppress(OSError):  # what a full disk could not take has been told already
                self._events.close()
            self._events = None
        if self._lock:
            (self.path / "lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def holder(self) -> int | None:
        """The process that is writing this run now, if it is alive and is not this one."""
        try:
            lock = json.loads((self.path / "lock").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        alive = lock["pid"] != os.getpid() and _started(lock["pid"]) == lock["started"] is not None
        return lock["pid"] if alive else None


def create(recipe: recipes.Recipe) -> Run:
    """A new run folder for a recipe; an existing one with something in it is never written over."""
    if recipe.output:
        path = recipes.at_home(recipe.output)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise MaeseError("RUN-01", path=str(path), free=str(free(path)))
    else:
        path = Path("runs") / f"{datetime.date.today().isoformat()}-{recipe.name}"
        while True:  # two that start together must not take one name
            path = free(path) if path.exists() else path
            with contextlib.suppress(FileExistsError), disk(path):
                path.mkdir(parents=True)
                break
    run = Run(path)
    with disk(path):
        run.open_for_writing()
    return run


def find(what: str | Path) -> Run:
    """An existing run by folder, by name inside `runs/`, or the newest of a recipe: `find("quijote")`."""
    for path in (Path(what), Path("runs") / str(what)):
        if (path / "recipe.yaml").is_file():
            return Run(path)
    # Several runs of one recipe in one day are `-2`, `-3`…
    shape = re.compile(rf"(\d{{4}}-\d\d-\d\d)-{re.escape(str(what))}(?:-(\d+))?")
    found = []
    for path in Path("runs").glob("*/recipe.yaml"):
        if match := shape.fullmatch(path.parent.name):
            found.append((match[1], int(match[2] or 1), path.parent))
    if found:
        return Run(max(found)[2])
    known = sorted((p.parent.name for p in Path("runs").glob("*/recipe.yaml")), reverse=True)
    named = [re.sub(r"^\d{4}-\d\d-\d\d-", "", name) for name in known]
    near = difflib.get_close_matches(str(what), [*named, *known], n=1)
    raise MaeseError("RUN-02", run=str(what), known=", ".join(known[:5]) or "—", inside="", nearest=(near or [""])[0])


def trained(what: str | Path) -> Run:
    """The same, and of a model made in stages its last training: `runs/…-minigpt` is `runs/…-minigpt/instruct`."""
    run = find(what)
    parts = [Run(path.parent) for path in run.path.glob("*/recipe.yaml")]
    return max(parts, key=lambda part: (part.path / "recipe.yaml").stat().st_mtime) if parts else run


def first_process() -> bool:
    """Whether this is the process that speaks and writes, when several train together (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def speaks(agreed: bool) -> bool:
    """Whether this process tells an error: the first one does; another only what it alone has, or its machine.

    Before the processes have met nobody knows what the others have; then one of each machine speaks.
    """
    if first_process() or agreed:
        return first_process()
    talk = sys.modules.get("torch.distributed")
    return bool(talk and talk.is_initialized()) or os.environ.get("LOCAL_RANK", "0") == "0"


def environment() -> dict[str, Any]:
    """What another person needs to repeat the run, or to know why it came out otherwise."""
    packages = ("torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "numpy")
    return {
        "maese": metadata.version("maese"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: metadata.version(name) for name in packages},
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one move: readers see the old one or the new one, never half of either."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with open(draft, "w", encoding="utf-8", errors="replace") as out:  # half a character, as a terminal may give
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, path)


@functools.cache
def _umask() -> int:
    """What the system takes from the rights of new files; it can only be asked by setting it."""
    now = os.umask(0o022)
    os.umask(now)
    return now


def sync(path: Path) -> None:
    """Force a file or a folder's list of names to the disk, so that a power cut finds it there.

    Whoever may read the files of this person may read it: safetensors makes its own for its owner alone.
    """
    if os.name == "posix" and path.is_file():
        with contextlib.suppress(OSError):  # a disk that knows no rights
            os.chmod(path, 0o666 & ~_umask())
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened, nor needs to be
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # disks of other machines may not know how
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk(path: Path):
    """Turn the system's words about a full or closed disk into ours, wherever something is written."""
    try:
        yield
    except MaeseError:
        raise
    except Exception as problem:
        number = _number(problem)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise MaeseError("DISK-01", path=str(path), free=_gigabytes_free(path)) from problem
        if number in CLOSED:
            raise MaeseError("DISK-02", path=str(path)) from problem
        raise


def _number(problem: Exception) -> int | None:
    """The system's number for what went wrong, also where safetensors or tokenizers wrap it in words of their own."""
    if isinstance(problem, OSError) and problem.errno:
        return problem.errno
    found = re.search(r"\(os error (\d+)\)", str(problem))
    return int(found[1]) if found else None


def _gigabytes_free(path: Path) -> float:
    import shutil

    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free / 2**30


def free(path: Path, ending: str = "") -> Path:
    """The first name of the row `x-2`, `x-3`, … that nobody has taken; with an ending, `x-2.json`."""
    if path.name in ("", ".."):  # `.` has no name to put a number after
        path = Path(os.path.abspath(path))
        path = path if path.name else path / "maese"
    stem = path.name.removesuffix(ending)
    return next(p for i in range(2, 10_000) if not (p := path.with_name(f"{stem}-{i}{ending}")).exists())


def refuse_taken(path: Path) -> None:
    """RUN-01, with a name that is free, where there is something already."""
    if path.exists():
        raise MaeseError("RUN-01", path=str(path), free=str(free(path, path.suffix if path.is_file() else "")))


def _started(pid: int) -> float | None:
    """When a process began, so that a recycled number is not taken for the process that wrote it down."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None
