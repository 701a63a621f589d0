"""Where the bytes are: a file, a folder, an archive or what is piped in, to streams of bytes, one a file inside.

    for piece in pieces("datos.tar.gz"):      Piece(name="datos.tar.gz/a.jsonl", suffix=".jsonl", …)
        with piece.open() as stream: …

Nothing is unpacked on disk and nothing is held whole: `.gz`, `.zst`, `.bz2`, `.xz`, `.zip` and `.tar` flow as they are
read. What is inside is known by its first bytes before its name, because names lie more often.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from maese.errors import MaeseError
from maese.recipe import at_home, shipped

MAGIC = {
    b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"PK\x03\x04": ".zip",
    b"PAR1": ".parquet",
}  # fmt: skip
PACKED, ARCHIVES = (".gz", ".zst", ".bz2", ".xz"), (".zip", ".tar", ".tgz")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md", ".text")
# Formats with pages and fonts; there are good programs that turn them into text, and this is not one.
NOT_TEXT = (".pdf", ".docx", ".doc", ".odt", ".epub", ".xlsx", ".xls", ".html", ".htm", ".rtf", ".rar", ".7z")


@dataclass(frozen=True)
class Piece:
    """One file of bytes: how it is called, what it says it is (`.jsonl`), and how it is opened, any number of times."""

    name: str
    suffix: str
    size: int
    open: Callable[[], Any]  # a context manager that gives a binary stream
    packed: bool = False  # its size is that of the packed bytes


def locate(path: str) -> Path:
    """The file or folder itself: from here, or among what travels with maese. DATA-01 proposes the nearest name."""
    if path == "-":
        return piped()
    try:
        place = at_home(path)
        for candidate in (place, shipped(path)):
            if candidate.is_fifo():
                return piped(str(candidate))
            if candidate.is_file() or candidate.is_dir():
                return candidate
    except (OSError, RuntimeError, ValueError):  # a name too long, a home of nobody, a NUL
        place = Path()
    folder = place.parent
    names = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.4)
    nearest = str(folder / near[0]) if near else "data/quijote_muestra.txt"
    raise MaeseError("DATA-01", path=path, folder=str(folder.absolute()), nearest=nearest)


@functools.cache
def piped(path: str = "-") -> Path:
    """What comes through a pipe, kept in a file: data are looked at before they are learnt from."""
    place = tempfile.NamedTemporaryFile(prefix="maese-", delete=False)  # noqa: SIM115
    with place:
        if path == "-":
            shutil.copyfileobj(sys.stdin.buffer, place)
        else:
            with open(path, "rb") as pipe:
                shutil.copyfileobj(pipe, place)
    return Path(place.name)


def pieces(path: str) -> list[Piece]:
    """The files behind a path, in order of name. Errors: DATA-01, DATA-17 (an archive that reaches outside itself),
    DATA-18 (a kind of file that is not read), DATA-05 (a folder with nothing to read)."""
    place = locate(path)
    if not place.is_dir():
        return list(_inside(_file(place, path)))
    found = [p for p in sorted(place.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    known = [p for p in found if suffix_of(p.name) in (*ROWS, *TEXTS, *ARCHIVES) or p.suffix.lower() in ARCHIVES]
    if not known:
        for p in found:
            if p.name.lower().endswith(NOT_TEXT):
                raise MaeseError("DATA-18", path=path, suffix=p.suffix.lower())
        raise MaeseError("DATA-05", path=path)
    return [piece for p in known for piece in _inside(_file(p, f"{path.rstrip('/')}/{p.relative_to(place)}"))]


def sha256(path: str) -> str:
    """One hash for a file's bytes, or for the names and bytes of a folder."""
    place = locate(path)
    if place.is_file():
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for each in sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")):
        whole.update(f"{each.relative_to(place)}\0{sha256(str(each))}\n".encode())
    return whole.hexdigest()


def stamp(path: str) -> tuple:
    """Sizes and times of what is behind a path: another stamp after reading means that it changed meanwhile."""
    place = locate(path)
    every = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in every)


def suffix_of(name: str) -> str:
    """What a name says, without compression: `suffix_of("a.jsonl.gz")` is `.jsonl`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in PACKED else path.suffix


def _file(place: Path, name: str) -> Piece:
    return Piece(name, place.suffix.lower(), place.stat().st_size, lambda: place.open("rb"))


def _inside(piece: Piece, packed: bool = False) -> Iterator[Piece]:
    """A plain piece from a packed one; several from an archive. What is packed twice is read as what it is: bytes."""
    with piece.open() as stream:
        head = stream.read(512)
    kind = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")
    lower = piece.name.lower()
    if kind == ".zip" and not lower.endswith(NOT_TEXT):
        yield from _zip(piece)
    elif head[257:262] == b"ustar" or lower.endswith(".tar"):
        yield from _tar(piece)
    elif kind in PACKED and not packed:
        yield from _inside(Piece(piece.name, suffix_of(piece.name), piece.size, _unpacked(piece, kind)), packed=True)
    elif kind in PACKED or lower.endswith(NOT_TEXT):
        raise MaeseError("DATA-18", path=piece.name, suffix=PurePosixPath(lower).suffix)
    else:
        yield Piece(piece.name, kind or _shape(piece.suffix, head), piece.size, piece.open, packed)


def _shape(suffix: str, head: bytes) -> str:
    """The name's word for it, or, when it says nothing known, what the first bytes look like."""
    if suffix in (*ROWS, *TEXTS):
        return suffix
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return {b"{": ".jsonl", b"[": ".json"}.get(start, ".txt")


def _unpacked(piece: Piece, kind: str) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        import bz2
        import gzip
        import lzma
        import zlib

        import zstandard

        library: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(kind)
        try:
            with piece.open() as raw:
                if library:
                    with library.open(raw) as stream:
                        yield stream
                else:
                    yield io.BufferedReader(_Zstd(raw), 2**20)  # type: ignore[misc]  # all that it asks of a raw stream
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError):
            raise MaeseError("DATA-20", path=piece.name) from None

    return opened


class _Zstd(io.RawIOBase):
    """Frames of zstd as one stream, that tells a cut one: the library's own reader takes its end for the end."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw: Any = raw
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        import zstandard

        left = b""
        while not self.ready:
            chunk = left or self.raw.read(2**18)
            if not chunk:
                if self.frame is not None:
                    raise EOFError
                return 0
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.ready = self.frame.decompress(chunk)
            left = b""
            if self.frame.eof:
                left, self.frame = self.frame.unused_data, None
                if self.ready and left:
                    self.raw = Joined(left, self.raw)
                    left = b""
        size = min(len(room), len(self.ready))
        room[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


class Joined:
    """A stream some of whose bytes were already taken."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.head, self.rest = head, rest

    def read(self, size: int = -1) -> bytes:
        if self.head:
            taken = len(self.head) if size < 0 else size
            head, self.head = self.head[:taken], self.head[taken:]
            return head
        return self.rest.read(size)


def _zip(piece: Piece) -> Iterator[Piece]:
    import zipfile
    import zlib

    @contextmanager
    def member(name: str) -> Iterator[BinaryIO]:
        try:
            with piece.open() as raw, zipfile.ZipFile(raw) as archive:
                try:
                    stream = archive.open(name)
                except (
                    RuntimeError,
                    NotImplementedError,
                ):  # it asks for a password, or is packed in a way unknown here
                    raise MaeseError("DATA-20", path=piece.name) from None
                with stream:
                    yield stream  # type: ignore[misc]  # zipfile's own kind of file
        except (zipfile.BadZipFile, EOFError, zlib.error):
            raise MaeseError("DATA-20", path=piece.name) from None

    try:
        with piece.open() as raw, zipfile.ZipFile(raw) as archive:
            members = [(m.filename, m.file_size) for m in archive.infolist() if not m.is_dir()]
    except zipfile.BadZipFile:
        raise MaeseError("DATA-20", path=piece.name) from None
    yield from _members(piece, members, member)


def _tar(piece: Piece) -> Iterator[Piece]:
    import tarfile

    @contextmanager
    def opened() -> Iterator[Any]:
        with piece.open() as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
            yield archive

    @contextmanager
    def member(name: str) -> Iterator[BinaryIO]:
        with opened() as archive:
            yield next(archive.extractfile(m) for m in archive if m.name == name)

    try:
        with opened() as archive:
            members = []
            for m in archive:
                if m.issym() or m.islnk():  # where it points cannot be trusted, and its target is read anyway
                    continue
                if m.isfile():
                    members.append((m.name, m.size))
    except tarfile.TarError:
        raise MaeseError("DATA-20", path=piece.name) from None
    yield from _members(piece, members, member)


def _members(piece: Piece, members: list[tuple[str, int]], member: Callable[[str], Any]) -> Iterator[Piece]:
    for name, size in sorted(members):
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or path.drive:
            raise MaeseError("DATA-17", path=piece.name, member=name)
        if path.suffix.lower() in ARCHIVES or suffix_of(name) in ARCHIVES:  # whoever nests them can take them out
            raise MaeseError("DATA-18", path=f"{piece.name}/{name}", suffix=path.suffix.lower())
        if path.name.startswith(".") or suffix_of(name) not in (*ROWS, *TEXTS):
            continue
        yield from _inside(Piece(f"{piece.name}/{name}", path.suffix, size, functools.partial(member, name)))
