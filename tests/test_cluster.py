"""The same rows stay on many machines as on one: the script written is run, with two workers, and compared."""

import gzip
import json
import os
import random
import runpy
import subprocess
import sys

import pytest

from maese.errors import MaeseError
from maese.recipe import Source
from maese.text.cluster import CLASSES, write_plan
from maese.text.read import open_source
from maese.text.survive import survivors

RULES = ["length", "repetition"]
WORDS = (
    "sierra puerto aldea valle ermita molino venta castillo pastor maestra barbero niña ventero mañana tarde noche"
    " camino lluvia viento fuego pan vino queso aceite miel caballo mula perro gato lechuza río puente fuente pozo"
    " huerto olivo encina higuera trigo cebada libro carta espejo llave puerta ventana escalera tejado campana reloj"
    " subió bajó contó calló rió lloró buscó halló perdió guardó abrió cerró cantó durmió despertó corrió volvió"
    " alto bajo viejo nuevo claro oscuro frío cálido ñoño pequeño enorme cien doce siete la el una un de con sin por"
)
VOCABULARY = WORDS.split()


def story(number: int) -> str:
    """Seventy words, no two alike in more than a few runs."""
    return " ".join(random.Random(number).choices(VOCABULARY, k=70)).capitalize() + "."


def row(text: str, **more) -> str:
    return json.dumps({"text": text, **more}, ensure_ascii=False) + "\n"


@pytest.fixture
def shards(here):
    """Three shards with duplicates across them, near ones, short rows, loops and a line of broken JSON."""
    good = [story(i) for i in range(24)]
    near = good[0].replace(good[0].split()[-3], "otra cosa", 1)
    bridge = good[9] + " Y nada más."
    (here / "partes").mkdir()
    files = {
        "a.jsonl": [*good[:8], "Corto.", "jaja " * 90, good[3].upper()],
        "b.jsonl": [good[1], near, *good[8:16], bridge],
        "c.jsonl.gz": [*good[16:], bridge, good[9], "Corto.", good[20] + " "],
    }
    number = 0
    for name, texts in files.items():
        lines = [row(text, n=number + i) for i, text in enumerate(texts)]
        number += len(lines)
        if name == "b.jsonl":
            lines.insert(2, '{"text": "sin cerrar\n')
        opener = gzip.open if name.endswith(".gz") else open
        with opener(here / "partes" / name, "wt", encoding="utf-8") as out:
            out.writelines(lines)
    return here / "partes"


def on_one_machine(folder, near: bool) -> tuple[list[int], dict[int, str]]:
    def items():
        for path in sorted(folder.iterdir()):
            yield from open_source(Source(path=str(path)), on_fault=lambda problem: None)

    fates = [(item.meta["n"], why) for item, why in survivors(items(), RULES, near=near)]
    return [n for n, why in fates if why is None], {n: why for n, why in fates if why}


def run(script) -> None:
    done = subprocess.run(
        [sys.executable, script], cwd=script.parent, capture_output=True, encoding="utf-8", timeout=120,
        env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def read(path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("near", [True, False])
def test_two_workers_keep_the_rows_that_one_machine_keeps(here, shards, near):
    script = write_plan(here / "plan.py", ["partes"], "limpio", "local", tasks=3, workers=2, rules=RULES, near=near)
    before = set(here.iterdir())
    run(script)
    kept, dropped = on_one_machine(shards, near)
    out = here / "limpio"
    assert [r["n"] for p in sorted((out / "kept").iterdir()) for r in read(p)] == kept
    gone = [r for p in sorted((out / "dropped").iterdir()) for r in read(p)]
    assert {r["row"]["n"]: r["reason"] for r in gone if r["row"]} == dropped
    broken = [r for r in gone if not r["row"]]
    assert [(r["reason"], r["id"]) for r in broken] == [("DATA-04", "partes/b.jsonl#3")]
    assert set(dropped.values()) == {"too_short", "repeated_words", "duplicate"} | (
        {"near_duplicate"} if near else set()
    )
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["kept"] == len(kept) and summary["rows"] == len(kept) + len(dropped) + 1
    assert set(here.iterdir()) - before == {out}  # nothing is left anywhere else
    first = next(r for r in gone if r["reason"] == "duplicate")
    assert first["same_as"] == "partes/a.jsonl#4"
    run(script)  # again: what is done is not done twice
    assert [r["n"] for p in sorted((out / "kept").iterdir()) for r in read(p)] == kept


def test_a_row_that_only_a_later_one_joins_to_the_first_goes_in_both(here):
    words = (story(1) + " " + story(2)).split()
    texts = [" ".join(words), " ".join(words[34:]), " ".join(words[17:])]
    for i, text in enumerate(texts):
        (here / f"{i}.jsonl").write_text(row(text, n=i), encoding="utf-8")
    run(write_plan(here / "plan.py", ["*.jsonl"], "limpio", tasks=2, workers=2, rules=[], near=True))
    items = [item for i in range(3) for item in open_source(Source(path=f"{i}.jsonl"))]
    alone = [item.meta["n"] for item, why in survivors(items, [], near=True) if why is None]
    kept = [r["n"] for p in sorted((here / "limpio" / "kept").iterdir()) for r in read(p)]
    assert kept == alone == [0]
    without = [item.meta["n"] for item, why in survivors(items[:2], [], near=True) if why is None]
    assert without == [0, 1]  # the first and the second are not alike by themselves


def test_a_shard_that_changes_between_the_passes_is_refused(here):
    from datatrove.data import Document as Row

    from maese.text.cluster_steps import Join, Keep, Signatures

    facts = {"shard": 0, "path": "a.jsonl", "item": None, "reason": "DATA-04"}
    list(Signatures("limpio").run([Row("", "a#1", metadata=facts | {"sha256": "before"})]))
    Join("limpio", 1).run()
    with pytest.raises(MaeseError) as caught:
        list(Keep("limpio").run([Row("", "a#1", metadata=facts | {"sha256": "after"})]))
    assert caught.value.code == "DATA-14"


@pytest.mark.parametrize("executor", list(CLASSES))
@pytest.mark.parametrize("lang", ["es", "en"])
def test_the_script_of_each_executor_is_whole_and_can_be_read(here, shards, executor, lang, monkeypatch):
    monkeypatch.setenv("MAESE_LANG", lang)
    sources = ["partes/*.jsonl*", 'raro "nombre"\'.jsonl']
    (here / sources[1]).write_text(row(story(2)), encoding="utf-8")
    script = write_plan(here / "plan.py", sources, "limpio/", executor, 2, 2, ["length"], near=False)
    text = script.read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 120 and "$" not in text and CLASSES[executor] in text
    if executor == "ray":  # not installed here; the class itself can be made without it
        text = text.replace("import ray\n", "")
        script.write_text(text, encoding="utf-8")
    made = runpy.run_path(str(script))
    assert made["SOURCES"] == sources and made["NEAR"] is False and made["OUTPUT"] == "limpio"
    last = made["plan"]()
    assert type(last).__name__ == CLASSES[executor]
    assert (last.tasks, last.depends.tasks, last.depends.depends.tasks) == (2, 1, 2)
    assert last.pipeline[0].files == ["partes/a.jsonl", "partes/b.jsonl", "partes/c.jsonl.gz", sources[1]]


def test_a_plan_is_never_written_over_another(here):
    (here / "plan.py").write_text("x", encoding="utf-8")
    with pytest.raises(MaeseError) as caught:
        write_plan(here / "plan.py", ["a.jsonl"], "limpio")
    assert caught.value.code == "RUN-01"


def test_shards_that_do_not_exist_are_told_by_name(here):
    from maese.text.cluster_steps import shards as found

    with pytest.raises(MaeseError) as caught:
        found(["nada/*.jsonl"])
    assert caught.value.code == "DATA-01" and caught.value.facts["path"] == "nada/*.jsonl"
    (here / "vacía").mkdir()
    with pytest.raises(MaeseError) as caught:
        found(["vacía"])
    assert caught.value.code == "DATA-05"
