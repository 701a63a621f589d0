"""Examples in files that are mapped and not read: prepared once, found again by what they were made from.

    folder = place(key({"source": …, "tokenizer": …}))     ~/.cache/maese/tokens/3f0a…/
    cached(folder, vocabulary=8192, fill=encode)            made if it was not there
    Rows.open(folder, "train")[7]                           Example(ids=[…], mask=[…], id="…")

A folder holds `meta.json` and, of each side (train, validation): `.ids` (uint16 or uint32 by the size of the
vocabulary), `.mask` (uint8, one byte a token), `.ends` (int64 pairs: where the ids and the name of each example end)
and `.names` (its id as UTF-8, one a line), all little endian; and `dropped.jsonl`, what was left out. While it is being
written its name ends in `.partial`, and `progress.json` says how far it is safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from maese.recipe import at_home
from maese.run import disk, sync, write_whole
from maese.tokens.template import Example

if TYPE_CHECKING:
    import numpy as np

LAYOUT = 1  # goes into every key: files written another way are not found, and not misread
SIDES = ("train", "validation")
PARTS = ("ids", "mask", "ends", "names")
FILES = (*(f"{side}.{part}" for side in SIDES for part in PARTS), "dropped.jsonl")
PIECE = 1 << 20  # tokens looked at together where all of them are gone through


class Damaged(Exception):
    """A folder is not what its meta.json says: it must be made again, and not be used."""


class Rows(Sequence[Example]):
    """The examples of one side of a folder; each is made when asked for, so a corpus needs no memory."""

    def __init__(self, folder: Path, side: str, meta: dict[str, Any]) -> None:
        import numpy as np

        self._ids = _map(folder / f"{side}.ids", f"<u{meta['bytes_per_id']}")
        self._mask = _map(folder / f"{side}.mask", "u1")
        self._names = _map(folder / f"{side}.names", "u1")
        self._ends = _map(folder / f"{side}.ends", "<i8").reshape(-1, 2)
        self.lengths: np.ndarray = np.diff(self._ends[:, 0], prepend=0).astype(np.int32)
        self.sha256: str = meta["content"][side]
        self.meta: dict[str, Any] = meta["facts"]

    @classmethod
    def open(cls, folder: Path, side: str, check: bool = False) -> Rows:
        """The rows of a finished folder. Sizes are always compared, hashes when `check`; else raises Damaged."""
        return cls(folder, side, _verified(folder, check))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # from the end, or an IndexError, as lists do
        start, name = self._ends[row - 1].tolist() if row else (0, 0)
        end, name_end = self._ends[row].tolist()
        label = self._names[name : name_end - 1].tobytes().decode("utf-8", "surrogatepass")
        return Example(self._ids[start:end].tolist(), self._mask[start:end].tolist(), label)

    @property
    def tokens(self) -> int:
        return int(self._ends[-1, 0]) if len(self) else 0

    @cached_property
    def targets(self) -> np.ndarray:
        """How many tokens of each example are learnt, in one pass over the masks."""
        import numpy as np

        counts = [np.zeros(0, dtype=np.int64)]
        for start, end in _pieces(self._ends[:, 0]):
            first = int(self._ends[start - 1, 0]) if start else 0
            inner = np.concatenate([[0], self._ends[start : end - 1, 0] - first])
            counts.append(np.add.reduceat(self._mask[first : int(self._ends[end - 1, 0])], inner, dtype=np.int64))
        return np.concatenate(counts)


class Writer:
    """Writes a folder so that a preparation that is killed goes on from its last `commit`, byte for byte.

    `done_items` says how many items of the source need not be encoded again, and `state` what the caller had counted by
    then. One process at a time (`cached` sees to it): `add` and `drop`, `commit` now and then, `finish` once.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self.partial = folder.with_name(folder.name + ".partial")
        self.bytes_per_id = 2 if vocabulary <= 1 << 16 else 4
        with disk(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self.done_items, self.state, sizes = self._progress()
            self._files = {name: (self.partial / name).open("a+b", buffering=PIECE) for name in FILES}
            for name, file in self._files.items():
                file.truncate(sizes[name])
        self._ends = {side: (sizes[f"{side}.mask"], sizes[f"{side}.names"]) for side in SIDES}

    def _progress(self) -> tuple[int, dict[str, Any], dict[str, int]]:
        """What was committed, if all of it is still there; else a fresh start."""
        try:
            known = json.loads((self.partial / "progress.json").read_text("utf-8"))
            sizes = {name: int(known["sizes"][name]) for name in FILES}
            here = all((self.partial / name).stat().st_size >= size for name, size in sizes.items())
            if here and known["vocabulary"] == self.vocabulary:
                return int(known["items"]), dict(known["state"]), sizes
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, {}, dict.fromkeys(FILES, 0)

    def add(self, side: str, example: Example) -> None:
        """Append one example. One without tokens, or with an id beyond the vocabulary, is a ValueError."""
        import numpy as np

        ids, mask = example.ids, example.mask
        if not ids or len(ids) != len(mask) or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(f"{example.id}: {len(ids)} ids, {len(mask)} of mask, vocabulary of {self.vocabulary}")
        name = example.id.encode("utf-8", "surrogatepass") + b"\n"
        tokens, letters = self._ends[side]
        ends = (tokens + len(ids), letters + len(name))
        with disk(self.partial):
            self._files[f"{side}.ids"].write(np.array(ids, dtype=f"<u{self.bytes_per_id}").tobytes())
            self._files[f"{side}.mask"].write(bytes(mask))
            self._files[f"{side}.ends"].write(np.array(ends, dtype="<i8").tobytes())
            self._files[f"{side}.names"].write(name)
        self._ends[side] = ends

    def drop(self, facts: dict[str, Any]) -> None:
        """Keep what was left out, and why, as a line of dropped.jsonl."""
        with disk(self.partial):
            line = json.dumps(facts, ensure_ascii=False) + "\n"
            # A lone surrogate comes out as \udc80, which JSON reads back as what it was.
            self._files["dropped.jsonl"].write(line.encode("utf-8", "backslashreplace"))

    def commit(self, done_items: int, state: dict[str, Any] | None = None) -> None:
        """Make safe all that was added: a killed preparation goes on after so many items of the source."""
        sizes = self._flush()
        with disk(self.partial):
            known = {"items": done_items, "vocabulary": self.vocabulary, "sizes": sizes, "state": state or {}}
            write_whole(self.partial / "progress.json", json.dumps(known))
        self.done_items, self.state = done_items, state or {}

    def _flush(self) -> dict[str, int]:
        with disk(self.partial):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def finish(self, facts: dict[str, Any]) -> Path:
        """Write meta.json with the hashes and give the folder its name, in one move. `facts` are kept as they are."""
        sizes = self._flush()  # and no commit: how many items this is, only the caller knows
        self.close()
        with disk(self.partial):
            hashes = {name: _sha256(self.partial / name) for name in FILES}
            content = {side: self._content(side) for side in SIDES}
            meta = {
                "layout": LAYOUT, "vocabulary": self.vocabulary, "bytes_per_id": self.bytes_per_id,
                "sizes": sizes, "sha256": hashes, "content": content, "facts": facts,
            }  # fmt: skip
            write_whole(self.partial / "meta.json", json.dumps(meta, indent=1))
            for stray in {path.name for path in self.partial.iterdir()} - {*FILES, "meta.json"}:  # progress, drafts
                (self.partial / stray).unlink()
            sync(self.partial)
            try:
                os.rename(self.partial, self.folder)
            except OSError:
                if not self.folder.is_dir():
                    raise
                shutil.rmtree(self.partial)  # somebody else finished the same; one of the two is enough
            sync(self.folder.parent)
        return self.folder

    def _content(self, side: str) -> str:
        """The hash of what the model sees: ids, masks and where examples end; not of names or of how it is stored."""
        digest = hashlib.sha256()
        ends = _map(self.partial / f"{side}.ends", "<i8").reshape(-1, 2)[:, 0]
        ids = _map(self.partial / f"{side}.ids", f"<u{self.bytes_per_id}")
        mask = _map(self.partial / f"{side}.mask", "u1")
        digest.update(f"{len(ends)} {len(ids)} ".encode())
        for values, kind in ((ends, "<i8"), (ids, "<u4"), (mask, "u1")):
            for at in range(0, len(values), PIECE):
                digest.update(values[at : at + PIECE].astype(kind).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what a full disk could not take has been told already
                file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def cached(folder: Path, vocabulary: int, fill: Callable[[Writer], dict[str, Any]], check: bool = True) -> Path:
    """The folder of a `place`, made by `fill` if it is not there, is damaged, or was left half done.

    `fill(writer)` adds what follows `writer.done_items`, commits now and then, and returns what should be kept in
    `Rows.meta`. A second process that wants the same waits for the first. Errors: DISK-01, DISK-02.
    """
    if not finished(folder, check):
        with _alone(folder):
            if not finished(folder, check):  # the one that was waited for may have made it
                shutil.rmtree(folder, ignore_errors=True)
                with Writer(folder, vocabulary) as writer:
                    writer.finish(fill(writer))
    with contextlib.suppress(OSError):
        os.utime(folder)  # `prune` lets go of what was used longest ago
    return folder


def finished(folder: Path, check: bool = True) -> bool:
    """Whether a folder is there and whole: every size is as its meta.json says and, with `check`, every hash."""
    try:
        return bool(_verified(folder, check))
    except Damaged:
        return False


def place(key: str) -> Path:
    """The folder of what has this key, whether it is there or not."""
    return cache_folder() / key


def key(facts: dict[str, Any]) -> str:
    """The name of what was made from these facts: the SHA-256 of them as JSON with sorted keys."""
    text = json.dumps({"layout": LAYOUT, "facts": facts}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_folder() -> Path:
    """Where token files are kept: $MAESE_CACHE, else the folder that the system sets apart for such things."""
    home = os.environ.get("MAESE_CACHE")
    if home:
        return at_home(home) / "tokens"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "maese" / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maese" / "tokens"


def prune(keep_gib: float) -> list[Path]:
    """Delete the folders used longest ago until the rest takes `keep_gib` GiB at most, and return them.

    The one used last stays whatever its size, and so does one that is being written or about to be.
    """
    taken, gone = 0, []
    for newest, (_, size, folder) in enumerate(sorted(_weighed(), reverse=True)):
        taken += size
        if newest and taken > keep_gib * 2**30:
            with contextlib.suppress(BlockingIOError), _alone(folder.with_name(folder.name.split(".")[0]), wait=False):
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
    return gone


def _weighed() -> Iterator[tuple[float, int, Path]]:
    """Every folder of the cache with when it was used and its bytes; others may be writing and deleting meanwhile."""
    for folder in cache_folder().glob("*"):
        with contextlib.suppress(OSError):
            if folder.is_dir():
                yield folder.stat().st_mtime, sum(_size(file) for file in folder.iterdir()), folder


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def _alone(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder; the system lets go of it when this process dies, whatever it dies of."""
    path = folder.with_name(folder.name + ".lock")
    while True:
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("a+b")
        try:
            _hold(lock, wait)
            # Whoever had it before took the file away: what is held now is the lock of nothing.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                break
        except BaseException:
            lock.close()
            raise
        lock.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that another process has open
            path.unlink()
        lock.close()


def _hold(lock: Any, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                return msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:  # it gives up after ten seconds
                if not wait:
                    raise BlockingIOError from None
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as problem:
        if problem.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # shared disks of clusters may have none
            raise


def _verified(folder: Path, check: bool) -> dict[str, Any]:
    """The meta.json of a folder whose files have the sizes, and if asked the hashes, that it says."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        for name in FILES if meta["layout"] == LAYOUT else ("meta.json",):
            right = (folder / name).stat().st_size == meta["sizes"][name]
            if not right or (check and _sha256(folder / name) != meta["sha256"][name]):
                raise Damaged(str(folder / name))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise Damaged(str(folder)) from problem
    return meta


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, kind: str) -> np.ndarray:
    import numpy as np

    # A plain view of what is mapped: the class of memmap itself is several times slower to index.
    return np.asarray(np.memmap(path, dtype=kind, mode="r")) if path.stat().st_size else np.zeros(0, dtype=kind)


def _pieces(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Spans of examples of about PIECE tokens: `_pieces` of three short ones is `(0, 3)`."""
    import numpy as np

    start = 0
    while start < len(ends):
        first = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, first + PIECE, side="right")))
        yield start, end
        start = end
