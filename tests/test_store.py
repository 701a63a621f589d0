"""Token files: what is read back is what was written, however often the writing was cut off, or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from maese.errors import MaeseError
from maese.tokens import store
from maese.tokens.store import Damaged, Rows, Writer, cached, finished, key, place, prune
from maese.tokens.template import Example

ITEMS = [
    Example([10 * i + j for j in range(1 + i % 4)], [0] + [1] * (i % 4), f"niñez {i}\n¿línea?" if i % 3 else "")
    for i in range(9)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESE_CACHE", str(tmp_path / "cache"))


def side(i: int) -> str:
    return "validation" if i % 3 == 2 else "train"


def write(writer: Writer, items: list[Example] = ITEMS, every: int = 2) -> dict:
    """What a preparation does: each item after those done, a commit now and then."""
    for i, example in enumerate(items):
        if i < writer.done_items:
            continue
        writer.add(side(i), example)
        if i == 4:
            writer.drop({"id": example.id, "reason": "too_long"})
        if (i + 1) % every == 0:
            writer.commit(i + 1, {"seen": i + 1})
    return {"rows": len(items)}


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(folder, items: list[Example] = ITEMS, vocabulary: int = 100):
    with Writer(folder, vocabulary) as writer:
        return writer.finish(write(writer, items))


def test_what_is_read_back_is_what_was_written(tmp_path):
    folder = whole(tmp_path / "a")
    train, validation = (Rows.open(folder, name, check=True) for name in store.SIDES)
    assert list(train) == [e for i, e in enumerate(ITEMS) if side(i) == "train"]
    assert list(validation) == [e for i, e in enumerate(ITEMS) if side(i) == "validation"]
    assert train.lengths.dtype == np.int32 and train.lengths.tolist() == [len(row) for row in train]
    assert train.targets.tolist() == [row.targets for row in train]
    assert train.tokens == sum(map(len, train)) and train.meta == {"rows": 9}
    assert train[-1] == train[5] and train[1:3] == [train[1], train[2]]
    assert type(train[0].ids[0]) is int and type(train[0].mask[0]) is int
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            train[beyond]
    assert json.loads((folder / "dropped.jsonl").read_text("utf-8")) == {"id": ITEMS[4].id, "reason": "too_long"}


def test_a_side_without_examples_is_empty(tmp_path):
    with Writer(tmp_path / "a", 100) as writer:
        writer.add("train", ITEMS[3])
        writer.finish({})
    rows = Rows.open(tmp_path / "a", "validation", check=True)
    assert list(rows) == [] and rows.tokens == 0 and rows.targets.tolist() == [] and rows.lengths.tolist() == []


@pytest.mark.parametrize(("vocabulary", "size"), [(65536, 2), (65537, 4), (200_000, 4)])
def test_ids_take_two_bytes_while_the_vocabulary_fits(tmp_path, vocabulary, size):
    highest = vocabulary - 1
    folder = whole(tmp_path / "a", [Example([0, highest], [0, 1], "x")], vocabulary)
    assert (folder / "train.ids").stat().st_size == 2 * size
    assert Rows.open(folder, "train")[0].ids == [0, highest]


@pytest.mark.parametrize("ids", [[], [100], [-1, 2]])
def test_an_example_that_cannot_be_is_refused(tmp_path, ids):
    with Writer(tmp_path / "a", 100) as writer, pytest.raises(ValueError, match="vocabulary of 100"):
        writer.add("train", Example(ids, [0] * len(ids), "x"))


def test_targets_are_counted_in_pieces_as_at_once(tmp_path, monkeypatch):
    folder = whole(tmp_path / "a", ITEMS * 5)
    expected = [row.targets for row in Rows.open(folder, "train")]
    for piece in (1, 3, 7, 1000):
        monkeypatch.setattr(store, "PIECE", piece)
        assert Rows.open(folder, "train").targets.tolist() == expected


def test_the_hash_is_of_what_the_model_sees(tmp_path):
    """Names, storage and commits do not change it; one id, one mask, or where an example ends does."""
    rows = [Example([1, 2, 3], [0, 1, 1], "a"), Example([4, 5], [0, 1], "b")]
    same = [Example([1, 2, 3], [0, 1, 1], "otro"), Example([4, 5], [0, 1], "")]

    def hash_of(name, items, vocabulary=100):
        return Rows.open(whole(tmp_path / name, items, vocabulary), "train").sha256

    first = hash_of("a", rows)
    assert hash_of("b", same) == first and hash_of("c", rows, 100_000) == first
    others = [
        [Example([1, 2, 9], [0, 1, 1], "a"), rows[1]],
        [Example([1, 2, 3], [0, 0, 1], "a"), rows[1]],
        [Example([1, 2], [0, 1], "a"), Example([3, 4, 5], [1, 0, 1], "b")],
        rows[::-1],
        rows[:1],
    ]
    assert len({first, *(hash_of(f"d{i}", items) for i, items in enumerate(others))}) == 6


def test_a_preparation_cut_at_any_byte_ends_in_the_same_files(tmp_path, monkeypatch):
    """Killed after 8 items of which 6 were committed: each file may have kept any number of its bytes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of them, and the disk is not what is tried
    expected = bytes_of(whole(tmp_path / "whole"))
    killed = tmp_path / "killed.partial"
    with Writer(tmp_path / "killed", 100) as writer:
        write(writer, ITEMS[:6])
        safe = json.loads((killed / "progress.json").read_text())["sizes"]
        writer.add("train", ITEMS[6])
        writer.add("validation", ITEMS[7])
        writer.drop({"id": "x", "reason": "never committed"})
    left = bytes_of(killed)
    tried = 0
    for name in store.FILES:
        for cut in range(len(left[name]) + 1):
            here = tmp_path / "again.partial"
            here.mkdir()
            for other, content in left.items():
                (here / other).write_bytes(content[:cut] if other == name else content)
            (here / ".progress.json.1").write_bytes(b"{")  # a draft that never took its place
            with Writer(tmp_path / "again", 100) as writer:
                committed = cut >= safe[name]
                assert writer.done_items == (6 if committed else 0)
                assert writer.state == ({"seen": 6} if committed else {})
                folder = writer.finish(write(writer))
            assert bytes_of(folder) == expected
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            tried += 1
    assert tried > 150


def test_what_was_added_after_the_last_commit_is_not_kept_twice(tmp_path, monkeypatch):
    """Killed while the hashes are made: everything is written, and not all of it was committed."""
    expected = bytes_of(whole(tmp_path / "a"))

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, Writer(tmp_path / "b", 100) as writer:
        patch.setattr(store, "_sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish(write(writer))
    with Writer(tmp_path / "b", 100) as writer:
        assert writer.done_items == 8
        assert bytes_of(writer.finish(write(writer))) == expected


@pytest.mark.parametrize("progress", [b"", b"{", b"[]", b'{"items": 2}', None])
def test_unreadable_progress_is_a_fresh_start(tmp_path, progress):
    with Writer(tmp_path / "a", 100) as writer:
        write(writer)
    path = tmp_path / "a.partial" / "progress.json"
    path.unlink() if progress is None else path.write_bytes(progress)
    with Writer(tmp_path / "a", 100) as writer:
        assert writer.done_items == 0
        writer.finish(write(writer))
    assert len(Rows.open(tmp_path / "a", "train", check=True)) == 6


def test_another_vocabulary_is_a_fresh_start(tmp_path):
    with Writer(tmp_path / "a", 100) as writer:
        write(writer)
    with Writer(tmp_path / "a", 100_000) as writer:
        assert writer.done_items == 0
        writer.finish(write(writer))
    assert Rows.open(tmp_path / "a", "train", check=True)[0] == ITEMS[0]


def test_prepared_once_and_found_again():
    folder, calls = place(key({"a": 1})), []

    def fill(writer):
        calls.append(writer.done_items)
        return write(writer)

    assert not finished(folder)
    assert cached(folder, 100, fill) == cached(folder, 100, fill) == folder
    assert calls == [0] and finished(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # neither locks nor drafts stay


def test_a_preparation_that_failed_goes_on_where_it_was():
    folder, calls = place("k"), []

    def fill(writer):
        calls.append(writer.done_items)
        facts = write(writer, ITEMS if len(calls) > 1 else ITEMS[:5])
        if len(calls) == 1:
            raise RuntimeError
        return facts

    with pytest.raises(RuntimeError):
        cached(folder, 100, fill)
    cached(folder, 100, fill)
    assert calls == [0, 4] and len(Rows.open(folder, "train")) == 6


@pytest.mark.parametrize("name", [*store.FILES, "meta.json"])
@pytest.mark.parametrize("how", ["shorter", "longer", "gone"])
def test_a_damaged_folder_is_made_again_and_not_used(name, how):
    folder = cached(place("k"), 100, write, check=False)
    expected = bytes_of(folder)
    path = folder / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "shorter" else content + b"x")
    with pytest.raises(Damaged):
        Rows.open(folder, "train")
    assert bytes_of(cached(folder, 100, write, check=False)) == expected


@pytest.mark.parametrize("name", store.FILES)
def test_one_changed_byte_is_seen_by_its_hash(name):
    folder = cached(place("k"), 100, write)
    expected = bytes_of(folder)
    content = bytearray(expected[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(Damaged):
        Rows.open(folder, "train", check=True)
    assert finished(folder, check=False) and not finished(folder)
    assert bytes_of(cached(folder, 100, write)) == expected


SECOND = """
import sys
from pathlib import Path
from maese.tokens.store import Rows, cached, place
from maese.tokens.template import Example

def fill(writer):
    with open(sys.argv[1], "a") as log:
        log.write("filled\\n")
    print("in", flush=True)
    sys.stdin.readline()  # until the other one has come too
    for i in range(50):
        writer.add("train", Example([i, i], [0, 1], str(i)))
    return {}

print("start", flush=True)
print(len(Rows.open(cached(place("k"), 100, fill), "train", check=True)))
"""


def test_two_processes_that_want_the_same_prepare_it_once(tmp_path):
    log = tmp_path / "log"
    start = [sys.executable, "-c", SECOND, str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(start, **pipes) as one:
        assert [one.stdout.readline(), one.stdout.readline()] == ["start\n", "in\n"]
        with subprocess.Popen(start, **pipes) as two:
            assert two.stdout.readline() == "start\n"
            assert one.communicate("\n")[0] == "50\n"
            assert two.communicate("\n")[0] == "50\n"
    assert log.read_text() == "filled\n"


def test_a_process_that_dies_leaves_no_lock_behind(tmp_path):
    start = [sys.executable, "-c", SECOND, str(tmp_path / "log")]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dying:
        assert [dying.stdout.readline(), dying.stdout.readline()] == ["start\n", "in\n"]
        dying.kill()
    assert len(Rows.open(cached(place("k"), 100, write), "train")) == 6


def test_a_full_disk_is_said_and_what_was_committed_stays(monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:

        def fill(writer):
            write(writer, ITEMS[:4])
            patch.setattr(os, "fsync", full)
            return write(writer)

        with pytest.raises(MaeseError) as problem:
            cached(place("k"), 100, fill)
    assert problem.value.code == "DISK-01"
    with Writer(place("k"), 100) as writer:
        assert writer.done_items == 4


def test_a_key_depends_on_facts_and_not_on_their_order():
    assert key({"a": 1, "ñ": [1, 2]}) == key({"ñ": [1, 2], "a": 1})
    assert len({key(f) for f in ({"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, {})}) == 5


def test_the_cache_is_where_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MAESE_CACHE", str(tmp_path))
    assert store.cache_folder() == tmp_path / "tokens"
    monkeypatch.delenv("MAESE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert store.cache_folder() == tmp_path / "x" / "maese" / "tokens"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "l"))
    assert store.cache_folder() == tmp_path / "l" / "maese" / "tokens"


def test_prune_lets_go_of_the_oldest_and_not_of_one_at_work():
    folders = [cached(place(name), 100, write) for name in ("viejo", "medio", "nuevo")]
    with Writer(place("roto"), 100) as writer:  # left half done long ago
        write(writer)
    with Writer(place("ahora"), 100) as writer:
        write(writer)
    for age, folder in enumerate([writer.partial, *folders[::-1], place("roto.partial")]):
        os.utime(folder, (time.time() - 1000 * age,) * 2)
    size = sum(len(content) for content in bytes_of(folders[0]).values())
    with store._alone(place("roto")):  # somebody is at it again
        assert {path.name for path in prune(2.9 * size / 2**30)} == {"viejo"}

    def left():
        return {path.name for path in place("x").parent.iterdir()}

    assert left() == {"medio", "nuevo", "roto.partial", "ahora.partial"}
    assert {path.name for path in prune(0)} == {"medio", "nuevo", "roto.partial"}
    assert left() == {"ahora.partial"}  # what was used last is what somebody is about to open


def test_a_corpus_of_rows_is_mapped_and_not_held(tmp_path):
    rows = Rows.open(whole(tmp_path / "a"), "train")
    for values in (rows._ids, rows._mask, rows._names, rows._ends):
        assert not values.flags.owndata and not values.flags.writeable
