"""`maese compare-architectures`: its texts, the study of an encoder and a decoder, and where its page is."""

from __future__ import annotations

import datetime
import itertools
import json as jsons
from pathlib import Path

from maese.errors import MaeseError
from maese.recipe import Source
from maese.run import disk, free, write_whole
from maese.say import say
from maese.terminal import talk
from maese.terminal_tokens import draw
from maese.text.read import open_source, texts_of
from maese.text.split import group_of

SAMPLES = ("data/quijote_muestra.txt", "data/pokemon.txt", "data/quien_soy.jsonl")  # what travels with maese
MOST = 3000  # texts with a class that the probes look at


def architectures(
    paths: list[str], labels: str | None, column: str, steps: int, output: Path | None, json: bool = False,
    quiet: int = 0,
) -> Path:  # fmt: skip
    """Train an encoder and a decoder on texts, measure both, and write their page; returns the folder of it all."""
    from maese.model.load import load_tokenizer, resolve
    from maese.report.architectures import table, write
    from maese.train.architectures import Study, study

    sources = paths or [*SAMPLES]
    labelled = (
        classes(labels, column) if labels else [(t, Path(path).stem) for path in SAMPLES for t in whole_texts(path)]
    )
    if len({label for _, label in labelled}) < 2:
        raise MaeseError("DATA-23", column=column, where=str(labels), known="—")
    folder = output or _dated("architectures")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MaeseError("RUN-01", path=str(folder), free=str(free(folder)))
    with disk(folder):  # now, and not when both have learnt
        folder.mkdir(parents=True, exist_ok=True)

    def tell(kind: str, step: int) -> None:
        if not quiet and not json and (step % 50 == 0 or step == steps):
            talk(say("architectures.step", kind=say(f"architectures.{kind}"), step=step, steps=steps))

    texts = [text for path in sources for text in whole_texts(path)]
    found = study(texts, labelled, load_tokenizer(resolve("embedded")), Study(steps=steps), tell=tell)
    write_whole(folder / "architectures.json", jsons.dumps(found, ensure_ascii=False, indent=1))
    page = write(found, folder)
    if not json:
        draw([table(found)], talk=True)
        talk(say("architectures.page", path=str(page)), quiet=quiet)
    return folder


def whole_texts(path: str) -> list[str]:
    """Whole texts of a source: a conversation is its turns, one after another."""
    return ["\n".join(texts_of(item)) for item in open_source(Source(path=path))]


def classes(path: str, column: str) -> list[tuple[str, str]]:
    """First turns with the value of a column. Error: DATA-23 (it is not there)."""
    items = itertools.islice(open_source(Source(path=path)), MOST)
    pairs = [(texts_of(item)[0], group_of(item, column)) for item in items]
    return [(text, label) for text, label in pairs if text.strip()]


def _dated(name: str) -> Path:
    path = Path("runs") / f"{datetime.date.today().isoformat()}-{name}"
    names = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(each for each in names if not each.exists())
