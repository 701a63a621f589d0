"""From sources to examples: sides that never change, nothing lost without its reason, prepared once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maese.errors import MaeseError
from maese.model.load import load_tokenizer
from maese.recipe import Data
from maese.text import language
from maese.tokens import store
from maese.tokens.prepare import prepare
from maese.tokens.settle import pieces, truncate
from maese.tokens.template import Example, open_template


@pytest.fixture
def tokenizer(tiny):
    return load_tokenizer(tiny)


def rows(n: int, **more) -> list[dict]:
    return [{"prompt": f"¿Cuánto es {i} más {i}?", "completion": f"Son {2 * i}."} | more for i in range(n)]


def write(found: list[dict], name: str = "f.jsonl") -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    return path


def data(*paths: str, **choices) -> Data:
    sources = [{"path": path} if isinstance(path, str) else path for path in paths or ("f.jsonl",)]
    return Data.model_validate({"sources": sources, "max_length": 128} | choices)


def names(side) -> list[str]:
    return [row.id for row in side]


def dropped(prepared) -> list[dict]:
    return [json.loads(line) for line in (prepared.folder / "dropped.jsonl").read_text("utf-8").splitlines()]


def test_prepared_once_and_found_again(here, tokenizer, monkeypatch):
    write(rows(60))
    first = prepare(data(), tokenizer, 128)
    monkeypatch.setattr("maese.tokens.prepare.examine", lambda *_: pytest.fail("it was prepared already"))
    again = prepare(data(), tokenizer, 128)
    assert again.folder == first.folder and list(again.train) == list(first.train)
    assert again.facts == first.facts and again.notes == first.notes


def test_what_the_detector_of_languages_read_is_let_go_of(here, tokenizer, monkeypatch):
    """Two hundred mebibytes that a training would carry to its end."""
    asked, french = [], "Le chien de ma voisine aboie quand le facteur passe dans la rue, et il ne dort pas. "
    detected = language._detected
    monkeypatch.setattr(language, "_detected", lambda prose: asked.append(prose) or detected(prose))
    write([*rows(60), {"prompt": "¿Qué dijo?", "completion": 3 * french}])
    prepare(data(tolerance=0.9, max_length=512), tokenizer, 512)
    assert asked and not language._detector.cache_info().currsize
    assert language.language_of(french) == "fr"


@pytest.mark.parametrize(
    "change", [{"loss": "all"}, {"template": "instruccion"}, {"max_length": 64}, {"validation": 0.2}]
)
def test_another_choice_is_other_files(here, tokenizer, change):
    write(rows(60))
    assert prepare(data(), tokenizer, 128).folder != prepare(data(**change), tokenizer, 128).folder


def test_other_words_are_other_files_and_packing_is_not(here, tokenizer):
    write(rows(60))
    first = prepare(data(), tokenizer, 128)
    assert prepare(data(packing=True), tokenizer, 128).folder == first.folder
    write(rows(61))
    assert prepare(data(), tokenizer, 128).facts["ids_sha256"] != first.facts["ids_sha256"]


def test_a_preparation_cut_short_goes_on_to_the_same_bytes(here, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("maese.tokens.prepare.AT_ONCE", 8)
    monkeypatch.setattr("maese.tokens.prepare.COMMIT", 16)
    bad = [{"prompt": "¿?", "completion": "niÃ±o"}]
    write(rows(30) + bad + rows(30)[:5] + [{"prompt": "x" * 400, "completion": "y"}] + rows(90)[40:])
    choices = data(dedup="exact", too_long="drop", tolerance=0.1)
    straight = prepare(choices, tokenizer, 128)
    whole = {path.name: path.read_bytes() for path in straight.folder.iterdir()}

    for stop in range(8, 81, 24):
        monkeypatch.setenv("MAESE_CACHE", str(tmp_path / f"cut{stop}"))

        def cut(done, stop=stop):
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(choices, tokenizer, 128, progress=cut)
        begun: list[int] = []
        resumed = prepare(choices, tokenizer, 128, progress=begun.append)
        assert {path.name: path.read_bytes() for path in resumed.folder.iterdir()} == whole
        assert begun[0] > 8 or stop < 16, "what was committed is not done again"


def test_what_is_left_out_is_counted_and_kept(here, tokenizer):
    good = rows(60)
    bad = [
        {"prompt": "¿Y?", "completion": ""},
        {"prompt": "¿Qué comió?", "completion": "El niÃ±o comiÃ³."},
        {"prompt": "p" * 300, "completion": "larga"},
        good[0],
    ]
    write([*good, *bad])
    prepared = prepare(data(dedup="exact", too_long="drop", tolerance=0.1), tokenizer, 128)
    assert prepared.facts["dropped"] == {"empty_turn": 1, "mojibake": 1, "too_long": 1, "duplicate": 1}
    kept = dropped(prepared)
    reasons = {row["id"]: row["reason"] for row in kept}
    assert [reasons[f"f.jsonl#{i}"] for i in range(61, 65)] == ["empty_turn", "mojibake", "too_long", "duplicate"]
    assert next(row for row in kept if row["reason"] == "mojibake")["messages"][1]["content"] == "El niÃ±o comiÃ³."
    assert prepared.facts["train"]["rows"] + prepared.facts["validation"]["rows"] == 60


def test_rows_the_reader_cannot_read_are_left_out_too(here, tokenizer):
    path = write(rows(120))
    path.write_text(path.read_text("utf-8") + '{"prompt": "roto\n', "utf-8")
    prepared = prepare(data(), tokenizer, 128)
    assert prepared.facts["dropped"] == {"DATA-04": 1} and dropped(prepared)[0]["line"] == 121


def test_too_many_faulty_rows_are_refused(here, tokenizer):
    write(rows(60) + [{"prompt": "¿Y?", "completion": " "}] * 3)
    with pytest.raises(MaeseError) as problem:
        prepare(data(), tokenizer, 128)
    assert problem.value.code == "DATA-13" and problem.value.facts["count"] == 3
    assert "maese data fix f.jsonl" in str(problem.value)
    prepare(data(tolerance=0.1), tokenizer, 128)


def test_turns_out_of_order_have_their_own_words(here, tokenizer):
    turns = [{"role": "assistant", "content": "Hola."}, {"role": "user", "content": "¿Y?"}]
    good = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(20)]
    write([*good, {"messages": turns}])
    with pytest.raises(MaeseError) as problem:
        prepare(data(), tokenizer, 128)
    assert (problem.value.code, problem.value.facts["line"]) == ("DATA-06", 21)


def test_half_a_character_is_left_out_and_never_reaches_the_tokenizer(here, tokenizer):
    path = write(rows(120))
    path.write_text(path.read_text("utf-8") + '{"prompt": "media \\ud83d", "completion": "letra"}\n', "utf-8")
    prepared = prepare(data(), tokenizer, 128)
    assert prepared.facts["dropped"] == {"surrogate": 1} and dropped(prepared)[0]["id"] == "f.jsonl#121"


def test_another_encoding_is_refused_however_few_rows_it_touches(here, tokenizer):
    path = write(rows(300))
    path.write_bytes(path.read_bytes() + '{"prompt": "¿Año?", "completion": "Sí."}\n'.encode("cp1252"))
    with pytest.raises(MaeseError) as problem:
        prepare(data(), tokenizer, 128)
    assert problem.value.code == "DATA-02"


def test_rows_all_the_same_are_refused(here, tokenizer):
    write(rows(1) * 40)
    with pytest.raises(MaeseError) as problem:
        prepare(data(), tokenizer, 128)
    assert problem.value.code == "DATA-13"


def test_one_row_is_too_few(here, tokenizer):
    write(rows(1))
    with pytest.raises(MaeseError) as problem:
        prepare(data(), tokenizer, 128)
    assert problem.value.code == "DATA-10"


def test_an_author_is_on_one_side(here, tokenizer):
    found = [row | {"autora": f"A{i % 12}"} for i, row in enumerate(rows(240))]
    write(found)
    prepared = prepare(data(group="autora", validation=0.25), tokenizer, 128)
    authors = [{found[int(name.split("#")[1]) - 1]["autora"] for name in names(side)} for side in
               (prepared.train, prepared.validation)]  # fmt: skip
    assert authors[0] and authors[1] and not authors[0] & authors[1]
    with pytest.raises(MaeseError) as problem:
        prepare(data(group="obra"), tokenizer, 128)
    assert problem.value.code == "DATA-23" and "autora" in problem.value.facts["known"]


def test_what_was_apart_stays_apart_when_rows_are_added(here, tokenizer):
    write(rows(200))
    before = {tuple(row.ids) for row in prepare(data(), tokenizer, 128).validation}
    write(rows(400))
    after = prepare(data(), tokenizer, 128)
    assert before <= {tuple(row.ids) for row in after.validation}
    assert not before & {tuple(row.ids) for row in after.train}


def test_weights_repeat_what_is_learnt_and_only_that(here, tokenizer):
    write(rows(200))
    one = prepare(data(), tokenizer, 128)
    more = prepare(data({"path": "f.jsonl", "weight": 2.5}), tokenizer, 128)
    assert names(more.validation) == names(one.validation)
    ratio = len(more.train) / len(one.train)
    assert set(names(more.train)) == set(names(one.train)) and 2.3 < ratio < 2.7
    less = prepare(data({"path": "f.jsonl", "weight": 0.5}), tokenizer, 128)
    assert 0.35 < len(less.train) / len(one.train) < 0.65


def test_sources_of_different_shapes_flow_together(here, tokenizer):
    write(rows(60))
    write([{"instruction": f"Di {i}.", "output": str(i)} for i in range(60)], "g.jsonl")
    prepared = prepare(data("f.jsonl", "g.jsonl"), tokenizer, 128)
    assert prepared.format == "auto" and len(prepared.train) + len(prepared.validation) == 120
    Path("libro.txt").write_text("Érase una vez.\n" * 20, "utf-8")
    with pytest.raises(MaeseError) as problem:
        prepare(data("f.jsonl", "libro.txt"), tokenizer, 128)
    assert problem.value.code == "DATA-07"


def test_rules_drop_what_they_say(here, tokenizer):
    good = [{"text": f"El caminante número {i} siguió su senda sin mirar atrás hasta que la noche cubrió la montaña; "
             "entonces buscó posada donde dormir, y nadie supo nunca de dónde venía ni qué llevaba consigo."}
            for i in range(40)]  # fmt: skip
    write([*good, {"text": "jaja " * 200}])
    prepared = prepare(data(clean=["repetition"], too_long="split", template="plain"), tokenizer, 128)
    assert sum(prepared.facts["dropped"].values()) >= 1
    assert {row["id"] for row in dropped(prepared)} >= {"f.jsonl#41"}


def test_a_corpus_of_documents_is_dealt_by_document(here, tokenizer):
    write([{"text": f"Documento {i}: " + "palabra " * 30} for i in range(100)])
    prepared = prepare(data(too_long="split", max_length=32), tokenizer, 128)
    sides = [{name.split("@")[0] for name in names(side)} for side in (prepared.train, prepared.validation)]
    assert sides[1] and not sides[0] & sides[1] and prepared.facts["split"] == "hash"


# What is too long


def example(n: int) -> Example:
    return Example(list(range(100, 100 + n)), [0] + [1] * (n - 1), "d")


@pytest.mark.parametrize("stride", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 17, 18, 40])
def test_pieces_cover_the_text_and_learn_each_token_once(n, stride):
    found = pieces(example(n), 10, stride)
    learnt = [i for piece in found for i, m in zip(piece.ids, piece.mask, strict=True) if m]
    assert len(learnt) == len(set(learnt)) and all(len(piece) <= 10 and not piece.mask[0] for piece in found)
    first_of_pieces = {100 + start for start in range(0, n, 10 - stride)} if not stride else {100}
    assert set(learnt) == set(range(100, 100 + n)) - first_of_pieces
    assert len({piece.id for piece in found}) == len(found)


def test_a_cut_answer_keeps_its_end():
    ends = frozenset({99})
    row = Example([1, 2, 3, 4, 5, 6, 99, 7], [0, 0, 0, 1, 1, 1, 1, 0])
    assert truncate(row, 6, ends) == Example([1, 2, 3, 4, 5, 99], [0, 0, 0, 1, 1, 1])
    assert truncate(row, 3, ends) is None and truncate(row, 8, ends) is row
    # A break after the end is learnt when all is, and is not what ends the answer.
    assert truncate(Example([1, 2, 3, 4, 99, 8], [0, 1, 1, 1, 1, 1]), 4, ends).ids == [1, 2, 3, 99]
    # The cut falls in a question: the row ends with the answer before it, and no end is made up.
    talk = Example([1, 2, 99, 5, 5, 5, 5, 7, 99], [0, 1, 1, 0, 0, 0, 0, 1, 1])
    assert truncate(talk, 6, ends) == Example([1, 2, 99], [0, 1, 1])


def test_a_chat_too_long_loses_its_oldest_turns_whole(here, tokenizer):
    turns = [{"role": "system", "content": "Sé breve."}]
    for i in range(12):
        turns += [{"role": "user", "content": f"¿Número {i}?"}, {"role": "assistant", "content": f"El {i}."}]
    write([{"messages": turns}] + [{"messages": turns[:3]}] * 1 + [{"messages": turns[3:5]}, {"messages": turns[5:7]}])
    prepared = prepare(data(too_long="truncate", template="maese", validation=0, max_length=96), tokenizer, 128)
    row = next(row for row in prepared.train if row.id == "f.jsonl#1")
    text = tokenizer.decode(row.ids)
    assert len(row) <= 96 and "Sé breve." in text and "El 11." in text and "Número 0?" not in text
    assert text.count("¿Número") == text.count("El 1") + sum(text.count(f"El {i}.") for i in range(2, 10))
    renderer = open_template("maese", tokenizer)
    last = max(i for i, learnt in enumerate(row.mask) if learnt)
    assert row.ids[last] in renderer.stop_ids


# Packed


def test_a_packed_run_learns_from_the_same_tokens(here, recipe, questions):
    """Two epochs of packed rows see every token twice, and resume in the middle ends as if never stopped."""
    from maese.train.loop import train

    chosen = recipe(
        "data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.max_length=128", "data.too_long=error",
        "data.packing=true", "train.max_steps=null", "train.epochs=2", "train.micro_batch=1", "train.accumulation=2",
        "eval.prompts=[]", "output=empaquetado",
    )  # fmt: skip
    run = train(chosen)
    events = run.history()
    plan = next(e for e in events if e["type"] == "plan")
    steps = [e for e in events if e["type"] == "step"]
    assert sum(e["tokens"] for e in steps) == 2 * plan["tokens"] and len(steps) == plan["steps"]
    assert len(steps) < 2 * plan["rows"] / 2, "several examples share a row"


def test_the_saved_tokenizer_carries_the_template(here, recipe, questions):
    from transformers import AutoTokenizer

    from maese.generate.engine import open_writer
    from maese.text.record import Message
    from maese.train.loop import train

    chosen = recipe(
        "data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.max_length=128", "data.too_long=error",
        "data.template=instruccion", "train.max_steps=1", "eval.prompts=[]", "output=uno",
    )  # fmt: skip
    run = train(chosen)
    turns = (Message("user", "¿Cuánto es 3 más 3?"),)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    theirs = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in turns], add_generation_prompt=True, return_dict=False
    )
    writer = open_writer(run)
    assert theirs == writer.prompt_ids(turns[0].content) == open_writer(str(run.final)).prompt_ids(turns[0].content)
    assert writer.renderer.stop_ids <= set(
        json.loads((run.final / "generation_config.json").read_text())["eos_token_id"]
    )


def test_a_damaged_cache_is_made_again(here, tokenizer):
    write(rows(60))
    first = prepare(data(), tokenizer, 128)
    path = first.folder / "train.ids"
    kept = list(first.train)
    raw = bytearray(path.read_bytes())
    raw[10] ^= 0xFF
    path.write_bytes(raw)
    assert not store.finished(first.folder)
    assert list(prepare(data(), tokenizer, 128).train) == kept


def test_equal_lines_of_several_files_are_several_rows(here, tokenizer):
    from maese.recipe import Source
    from maese.text.audit import audit
    from maese.text.read import open_source

    Path("d").mkdir()
    for name in ("a", "b"):
        found = [{"prompt": f"¿Qué es {name}{i}?", "completion": f"Es {name}{i}."} for i in range(30)]
        write([*found, {"prompt": "¿Y?", "completion": ""}], f"d/{name}.jsonl")
    seen = audit(open_source(Source(path="d")))
    assert list(seen.faulty) == ["d/a.jsonl#31", "d/b.jsonl#31"]
    assert next(f for f in seen.findings if f.kind == "empty_turn").count == 2
    with pytest.raises(MaeseError) as problem:
        prepare(data("d", tolerance=0.02), tokenizer, 128)
    assert problem.value.facts["count"] == 2
    assert prepare(data("d", tolerance=0.05), tokenizer, 128).facts["dropped"] == {"empty_turn": 2}


# What an attack found


def test_one_bad_line_of_a_long_text_is_refused_and_its_licence_is_not_learnt(here, tokenizer, monkeypatch):
    monkeypatch.setattr("maese.text.read.LONGEST_DOCUMENT", 3000)
    lines = [f"Línea {i} de un libro largo." for i in range(600)]
    path = Path("libro.txt")
    marks = [
        "Cabecera",
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***",
        *lines,
        "*** END OF THE PROJECT GUTENBERG",
        "L",
    ]
    path.write_text("\n".join(marks), "utf-8")
    prepared = prepare(data("libro.txt", too_long="split"), tokenizer, 128)
    text = tokenizer.decode([i for side in (prepared.train, prepared.validation) for row in side for i in row.ids])
    assert "Línea 0 de" in text and "Línea 599 de" in text and "GUTENBERG" not in text and "Cabecera" not in text
    lines[300] = "El niÃ±o."
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(MaeseError) as problem:
        prepare(data("libro.txt", too_long="split"), tokenizer, 128)
    assert (problem.value.code, problem.value.facts["line"]) == ("DATA-11", 301)


def test_the_same_file_elsewhere_is_the_same_rows_whatever_its_weight(here, tokenizer):
    path = write(rows(80))
    Path("otra").mkdir()
    write(rows(80), "otra/g.jsonl")
    first = prepare(data({"path": str(path), "weight": 1.5}), tokenizer, 128)
    other = prepare(data({"path": str(Path("otra/g.jsonl").absolute()), "weight": 1.5}), tokenizer, 128)
    assert other.facts["ids_sha256"] == first.facts["ids_sha256"]
    assert other.facts["sources"][0]["path"].endswith("g.jsonl")


def test_half_the_weight_of_a_book_is_half_its_pieces(here, tokenizer):
    Path("libro.txt").write_text("".join(f"Capítulo {i}. Érase una vez, hace {i} años.\n" for i in range(300)), "utf-8")
    whole = prepare(data("libro.txt", too_long="split", max_length=32), tokenizer, 128)
    half = prepare(data({"path": "libro.txt", "weight": 0.5}, too_long="split", max_length=32), tokenizer, 128)
    assert 0.35 < len(half.train) / len(whole.train) < 0.65 and len(half.validation) == len(whole.validation)


def test_a_group_is_on_one_side_whatever_source_it_is_in(here, tokenizer):
    from maese.text import split

    every = [f"A{i}" for i in range(300)]
    late = sorted(every, key=lambda name: -split.chance(name.casefold()))[:3]  # by themselves none would be apart
    write([row | {"autora": every[i]} for i, row in enumerate(rows(300))])
    write([{"prompt": f"¿{name}?", "completion": "Sí.", "autora": name} for name in late], "g.jsonl")
    prepared = prepare(data("f.jsonl", "g.jsonl", group="autora", validation=0.2), tokenizer, 128)
    assert not [name for name in names(prepared.validation) if name.startswith("g.jsonl")]


def test_a_local_data_set_of_the_hub_that_changes_is_prepared_again(here, tokenizer):
    pytest.importorskip("datasets")
    Path("d").mkdir()
    write(rows(60), "d/train.jsonl")
    first = prepare(data({"hub": "d"}), tokenizer, 128)
    write([row | {"completion": "Otra cosa."} for row in rows(60)], "d/train.jsonl")
    again = prepare(data({"hub": "d"}), tokenizer, 128)
    assert again.facts["ids_sha256"] != first.facts["ids_sha256"]


def test_a_file_changed_after_it_was_hashed_is_told(here, tokenizer):
    from maese.recipe import Source
    from maese.text.read import open_source

    write(rows(60))
    reading = open_source(Source(path="f.jsonl"))
    write(rows(70))
    with pytest.raises(MaeseError) as problem:
        list(reading)
    assert problem.value.code == "DATA-14"


def test_columns_of_the_row_do_not_hide_why_it_was_left_out(here, tokenizer):
    write([*rows(120), {"prompt": "¿Y?", "completion": "", "id": "mala", "reason": "porque sí"}])
    (row,) = dropped(prepare(data(), tokenizer, 128))
    assert (row["id"], row["reason"]) == ("f.jsonl#121", "empty_turn")
