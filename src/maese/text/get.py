"""Texts that can be brought from the network, each named before it is asked for and checked by hash after.

get("quijote", Path("data"))      data/quijote.txt, header and licence taken off
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path

from maese.errors import MaeseError
from maese.run import write_whole
from maese.text.repair import decode, strip_gutenberg

TEXTS = {
    "quijote": {
        "address": "https://www.gutenberg.org/cache/epub/2000/pg2000.txt",
        "mirrors": [
            "https://www.gutenberg.org/files/2000/2000-0.txt",
            "https://www.gutenberg.org/ebooks/2000.txt.utf-8",
        ],
        # Gutenberg changes header and licence now and then, and a correction of the text changes nothing else: what
        # is checked is the book itself, words only, without them.
        "words_sha256": "b853e8199dfa69690f3b29b9214cfd44db67e7a869c385e03dd99c9ffb08f63b",
        "license": "public domain",
    }
}


def words_sha256(text: str) -> str:
    """A hash of the words alone, whatever the line breaks: `words_sha256("a  b") == words_sha256("a b")`."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def address(name: str) -> str:
    return str(_known(name)["address"])


def get(name: str, folder: Path, fetch=None) -> tuple[Path, int]:
    """Bring a text, check it and write it clean. Returns its path and its words.

    `fetch(address) -> bytes` stands in for the network in tests. Errors: NET-01 (cannot be reached), NET-02 (another
    text than the one known).
    """
    known = _known(name)
    from http.client import HTTPException

    fetch = fetch or _fetch
    raw, last = b"", ""
    for place in (known["address"], *known["mirrors"]):
        try:
            raw = fetch(place)
            break
        except (OSError, HTTPException) as problem:
            last = type(problem).__name__
    if not raw:
        raise MaeseError("NET-01", name=name, address=known["address"], reason=last)
    try:
        text, _ = strip_gutenberg(*decode(raw, name))
        found = words_sha256(text)
    except MaeseError:  # not even text: the page of a hotel's network, say
        text, found = "", hashlib.sha256(raw).hexdigest()
    if found != known["words_sha256"]:
        raise MaeseError("NET-02", name=name, found=found[:16], expected=known["words_sha256"][:16])
    path = folder / f"{name}.txt"
    write_whole(path, text + "\n")
    return path, len(text.split())


def _known(name: str) -> dict:
    if name not in TEXTS:
        near = difflib.get_close_matches(name, TEXTS, n=1, cutoff=0)
        raise MaeseError("USE-08", found=name, nearest=near[0])
    return TEXTS[name]


def _fetch(place: str) -> bytes:
    import urllib.request

    request = urllib.request.Request(place, headers={"User-Agent": "maese"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()
