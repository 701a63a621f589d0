"""Whatever file a person has: every shape and container gives the same records, and a bad row is told by its line."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from maese.errors import MaeseError
from maese.recipe import Source
from maese.text.read import open_source
from maese.text.record import Document

PAIRS = [("¿Qué es una pila?", "Una lista en la que sale primero lo último que entró."), ("¿Y una cola?", "Al revés.")]


def said(path="f.jsonl", format="auto", **source) -> list[list[tuple[str, str]]]:
    """Who said what, item after item."""
    items = open_source(Source(path=str(path), **source), format)
    return [[(m.role, m.content) for m in item.messages] for item in items]


TURNS = [[("user", q), ("assistant", a)] for q, a in PAIRS]
SHAPES = {
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in PAIRS],
    "prompt": [{"prompt": q, "completion": a} for q, a in PAIRS],
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
}


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fails(code: str, path="f.jsonl", **source) -> dict:
    with pytest.raises(MaeseError) as problem:
        list(open_source(Source(path=str(path), **source)))
    assert problem.value.code == code, str(problem.value)
    assert str(problem.value)
    return problem.value.facts


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_conversations(here, shape):
    Path("f.jsonl").write_text(jsonl(SHAPES[shape]), "utf-8")
    assert open_source(Source(path="f.jsonl")).format == shape
    assert said() == TURNS and said(format=shape) == TURNS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SHAPES["alpaca"]),
        json.dumps(SHAPES["alpaca"], indent=2, ensure_ascii=False),
        json.dumps({"version": 1, "data": SHAPES["alpaca"]}),
        jsonl(SHAPES["alpaca"]),
        "\ufeff" + json.dumps(SHAPES["alpaca"]),
    ],
)
def test_json_in_any_of_its_layouts(here, text):
    Path("f.json").write_text(text, "utf-8")
    assert said("f.json") == TURNS


def test_json_rows_wider_than_what_is_read_at_once(here, monkeypatch):
    monkeypatch.setattr("maese.text.rows.CHUNK", 7)
    Path("f.json").write_text(json.dumps(SHAPES["messages"], indent=1), "utf-8")
    assert said("f.json") == TURNS
    assert [i.meta["line"] for i in open_source(Source(path="f.json"))] == [2, 14]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_with_columns_mapped_by_the_recipe(here, mark):
    rows = [f'"{q}"{mark}"{a}"{mark}Ana' for q, a in PAIRS]
    Path("f.csv").write_text("\n".join([f"pregunta{mark}respuesta{mark}autora", *rows]), "utf-8-sig")
    names = {"prompt": "pregunta", "completion": "respuesta"}
    assert said("f.csv", map=names) == TURNS
    assert next(iter(open_source(Source(path="f.csv", map=names)))).meta == {"autora": "Ana", "line": 2}
    assert "--prompt pregunta --completion respuesta" in fails("DATA-03", "f.csv")["command"]


def test_a_cell_of_several_lines(here):
    Path("f.csv").write_text('prompt,completion\n"uno\ndos","tres ""y"" cuatro"\nb,c\n', "utf-8")
    assert said("f.csv") == [
        [("user", "uno\ndos"), ("assistant", 'tres "y" cuatro')],
        [("user", "b"), ("assistant", "c")],
    ]
    assert [i.meta["line"] for i in open_source(Source(path="f.csv"))] == [2, 4]


def test_parquet_and_the_hub_s_own_folders(here):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    Path("d").mkdir()
    parquet.write_table(arrow.Table.from_pylist(SHAPES["messages"]), "d/train.parquet")
    assert said("d/train.parquet") == TURNS
    for streaming in (False, True):
        items = list(open_source(Source(hub="d", streaming=streaming)))
        assert [i.messages[0].content for i in items] == [q for q, _ in PAIRS]
    assert len(list(open_source(Source(hub="d", limit=1)))) == 1
    with pytest.raises(MaeseError) as problem:
        list(open_source(Source(hub="d", part="prueba")))
    assert problem.value.code == "DATA-22"


def test_containers_are_read_without_unpacking(here):
    zstandard = pytest.importorskip("zstandard")
    raw = jsonl(SHAPES["prompt"]).encode()
    Path("f.jsonl.gz").write_bytes(gzip.compress(raw))
    Path("f.jsonl.zst").write_bytes(zstandard.compress(raw))
    with zipfile.ZipFile("f.zip", "w") as archive:
        archive.writestr("dentro/a.jsonl", raw)
        archive.writestr("LÉEME", "nada")
    with tarfile.open("f.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    Path("carpeta").mkdir()
    Path("carpeta/a.jsonl").write_bytes(raw)
    Path("carpeta/b.jsonl.gz").write_bytes(gzip.compress(raw))
    Path("carpeta/.oculto").write_bytes(b"x")
    for name in ("f.jsonl.gz", "f.jsonl.zst", "f.zip", "f.tar.gz"):
        assert said(name) == TURNS
    assert said("carpeta") == TURNS * 2
    assert {p.name for p in here.iterdir()} == {"f.jsonl.gz", "f.jsonl.zst", "f.zip", "f.tar.gz", "carpeta"}


def test_a_name_that_lies_is_known_by_its_bytes(here):
    Path("sin_nombre").write_bytes(gzip.compress(jsonl(SHAPES["prompt"]).encode()))
    assert said("sin_nombre") == TURNS
    Path("otro").write_text(jsonl(SHAPES["prompt"]), "utf-8")
    assert said("otro") == TURNS


@pytest.mark.parametrize("name", ["../fuera.jsonl", "/etc/fuera.jsonl", "a/../../fuera.jsonl", "..\\fuera.jsonl"])
def test_an_archive_that_reaches_outside_is_refused(here, name):
    with zipfile.ZipFile("malo.zip", "w") as archive:
        archive.writestr(name, jsonl(SHAPES["prompt"]))
    assert fails("DATA-17", "malo.zip")["member"] == name
    with tarfile.open("malo.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    assert fails("DATA-17", "malo.tar")["member"] == name


def test_a_link_inside_an_archive_is_not_followed(here):
    Path("secreto.txt").write_text("no se lee", "utf-8")
    with tarfile.open("enlaces.tar", "w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.type, info.linkname = tarfile.SYMTYPE, "secreto.txt"
        archive.addfile(info)
        good = tarfile.TarInfo("b.jsonl")
        raw = jsonl(SHAPES["prompt"]).encode()
        good.size = len(raw)
        archive.addfile(good, io.BytesIO(raw))
    assert said("enlaces.tar") == TURNS


def test_what_is_piped_in(here, monkeypatch):
    from maese.text import streams

    streams.piped.cache_clear()
    raw = jsonl(SHAPES["alpaca"]).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert said("-") == TURNS and said("-") == TURNS, "what is piped can be read twice"
    streams.piped().unlink()
    streams.piped.cache_clear()


def test_turns_in_parts_other_names_and_a_system_column(here):
    parts = [
        {"type": "text", "text": "¿Qué "},
        {"type": "text", "text": "es?"},
        {"type": "image_url", "image_url": "x"},
    ]
    row = {
        "system": "Eres breve.",
        "messages": [{"role": "Human", "content": parts}, {"role": "GPT", "content": "Eso."}],
    }
    Path("f.jsonl").write_text(jsonl([row]), "utf-8")
    assert said() == [[("system", "Eres breve."), ("user", "¿Qué es?"), ("assistant", "Eso.")]]


def test_alpaca_s_input_is_part_of_the_question(here):
    Path("f.jsonl").write_text(jsonl([{"instruction": "Corrige.", "input": "el niña", "output": "la niña"}]), "utf-8")
    assert said()[0][0] == ("user", "Corrige.\n\nel niña")


def test_documents_of_rows_and_their_columns(here):
    Path("f.jsonl").write_text(jsonl([{"text": "Érase una vez.", "author": "Ana", "year": 1900}]), "utf-8")
    (item,) = open_source(Source(path="f.jsonl"))
    assert item == Document("Érase una vez.", "f.jsonl#1", {"author": "Ana", "year": 1900, "line": 1})


def test_a_long_text_flows_in_documents_and_loses_nothing(here, monkeypatch):
    monkeypatch.setattr("maese.text.read.LONGEST_DOCUMENT", 2000)
    text = "".join(f"Línea {i} del libro, con su ñ.\n" for i in range(1000))
    Path("libro.txt").write_text(text, "utf-8")
    items = list(open_source(Source(path="libro.txt")))
    assert len(items) > 10 and "\n".join(i.text for i in items) == text.strip()
    assert all(text.splitlines()[i.meta["line"] - 1] == i.text.splitlines()[0] for i in items)


def test_rows_flow_without_being_held(here):
    row = json.dumps({"prompt": "¿Qué?", "completion": "x" * 2000})
    with open("f.jsonl", "w", encoding="utf-8") as out:
        for _ in range(10_000):
            out.write(row + "\n")
    tracemalloc.start()
    count = sum(1 for _ in open_source(Source(path="f.jsonl")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < 3e6, f"{peak / 1e6:.1f} MB held of 20 MB"


# Bad rows


def test_broken_json_is_told_by_line_and_column(here):
    Path("f.jsonl").write_text(jsonl(SHAPES["prompt"][:1]) + '{"prompt": "¿Y?", "completion": "sin cerrar}\n', "utf-8")
    facts = fails("DATA-04")
    assert (facts["line"], facts["column"]) == (2, 33)
    assert facts["shown"][len(facts["caret"]) - 1] == '"'
    Path("f.json").write_text('[{"prompt": "a",\n "completion": "b"},\n {"prompt": c}]', "utf-8")
    facts = fails("DATA-04", "f.json")
    assert facts["line"] == 3 and facts["shown"][len(facts["caret"]) - 1] == "c"


def test_json_nested_without_end(here):
    Path("f.jsonl").write_text("[" * 100_000 + "\n", "utf-8")
    fails("DATA-04")


@pytest.mark.parametrize("row", ['"una frase"', "17", "[1, 2]", "null"])
def test_a_row_that_is_no_object(here, row):
    Path("f.jsonl").write_text(jsonl(SHAPES["prompt"]) + row + "\n", "utf-8")
    assert fails("DATA-03")["line"] == 3


def test_a_row_of_another_shape(here):
    Path("f.jsonl").write_text(jsonl(SHAPES["prompt"] + SHAPES["alpaca"]), "utf-8")
    facts = fails("DATA-12")
    assert (facts["line"], facts["format"], facts["other_format"]) == (3, "prompt", "alpaca")
    Path("d").mkdir()
    Path("d/a.jsonl").write_text(jsonl(SHAPES["prompt"]), "utf-8")
    Path("d/b.jsonl").write_text(jsonl(SHAPES["alpaca"]), "utf-8")
    facts = fails("DATA-12", "d")
    assert (facts["path"], facts["line"]) == ("d", "b.jsonl:1"), "what mends it is done to the whole folder"


@pytest.mark.parametrize(("format", "shape"), [("text", "prompt"), ("qa", "prompt"), ("alpaca", "prompt")])
def test_a_recipe_that_says_another_shape(here, format, shape):
    Path("f.jsonl").write_text(jsonl(SHAPES["prompt"]), "utf-8")
    with pytest.raises(MaeseError) as problem:
        open_source(Source(path="f.jsonl"), format)
    assert (problem.value.code, problem.value.facts["found"]) == ("DATA-26", shape)


def test_a_value_that_is_not_text(here):
    Path("f.jsonl").write_text(jsonl([{"prompt": {"a": 1}, "completion": "b"}]), "utf-8")
    facts = fails("DATA-21")
    assert (facts["name"], facts["found"]) == ("prompt", "dict")
    Path("f.jsonl").write_text(jsonl([{"messages": "no es una lista"}]), "utf-8")
    fails("DATA-21")
    Path("f.jsonl").write_text(jsonl([{"messages": [{"role": "user", "contenido": "x"}]}]), "utf-8")
    fails("DATA-03")


def test_numbers_and_nothing_are_texts(here):
    Path("f.jsonl").write_text(
        jsonl([{"prompt": "¿2+2?", "completion": 4}, {"prompt": "¿?", "completion": None}]), "utf-8"
    )
    assert [turns[1][1] for turns in said()] == ["4", ""]


def test_a_line_of_fifty_megabytes_is_passed_over_and_not_held(here):
    with open("f.jsonl", "wb") as out:
        out.write(jsonl(SHAPES["prompt"][:1]).encode() + b'{"prompt": "')
        for _ in range(50):
            out.write(b"x" * 2**20)
        out.write(b'"}\n' + jsonl(SHAPES["prompt"][1:]).encode())
    assert fails("DATA-15")["line"] == 2
    met: list = []
    tracemalloc.start()
    items = list(open_source(Source(path="f.jsonl"), on_fault=met.append))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.code for p in met] == ["DATA-15"] and [i.meta["line"] for i in items] == [1, 3] and peak < 60e6


def test_nul_bytes_go_and_are_counted(here):
    Path("f.jsonl").write_text(jsonl([{"prompt": "a\0b", "completion": "c\x07"}]), "utf-8")
    reading = open_source(Source(path="f.jsonl"))
    assert [m.content for m in next(iter(list(reading))).messages] == ["ab", "c"]
    assert [(key, facts["count"]) for key, facts in reading.notes] == [("data.note.control", 2)]
    raw = next(iter(list(open_source(Source(path="f.jsonl"), raw=True))))
    assert raw.messages[0].content == "a\0b", "the doctor sees what is there"


def test_byte_marks_however_many(here):
    Path("f.jsonl").write_bytes(b"\xef\xbb\xbf" * 2 + jsonl(SHAPES["prompt"]).encode())
    assert said() == TURNS
    Path("f.txt").write_bytes(b"\xef\xbb\xbf" * 2 + "Érase una vez.".encode())
    assert next(iter(open_source(Source(path="f.txt")))).text == "Érase una vez."


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_rows_in_another_encoding(here, encoding):
    Path("f.jsonl").write_bytes(jsonl([{"prompt": "¿Año?", "completion": "niño y mañana"}] * 3).encode(encoding))
    facts = fails("DATA-02")
    assert facts["line"] == 1
    met: list = []
    items = list(open_source(Source(path="f.jsonl"), "prompt", met.append))
    assert [p.code for p in met] == ["DATA-02"], "told once, not for every line"
    assert [i.messages[1].content for i in items] == ["niño y mañana"] * 3, "and read as what it is"


def test_a_csv_row_with_other_cells(here):
    Path("f.csv").write_text("prompt,completion\na,b\nc,d,e\n", "utf-8")
    facts = fails("DATA-19", "f.csv")
    assert (facts["line"], facts["found"], facts["expected"]) == (3, 3, 2)


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.zip", "f.parquet", "f.jsonl.zst"])
def test_a_file_cut_in_the_middle(here, name):
    zstandard = pytest.importorskip("zstandard")
    raw = jsonl(SHAPES["prompt"] * 5000).encode()
    whole = {"f.jsonl.gz": gzip.compress(raw), "f.jsonl.zst": zstandard.compress(raw)}
    with zipfile.ZipFile("f.zip", "w") as archive:
        archive.writestr("a.jsonl", raw)
    whole |= {"f.zip": Path("f.zip").read_bytes(), "f.parquet": b"PAR1" + b"\0" * 100}
    Path(name).write_bytes(whole[name][: len(whole[name]) // 2])
    fails("DATA-20", name)


@pytest.mark.parametrize("suffix", [".pdf", ".docx", ".xlsx", ".html"])
def test_a_file_that_is_not_text(here, suffix):
    Path(f"a{suffix}").write_bytes(b"PK\x03\x04" if suffix in (".docx", ".xlsx") else b"%PDF-1.7")
    assert fails("DATA-18", f"a{suffix}")["suffix"] == suffix


def test_a_folder_with_nothing_to_read(here):
    Path("d").mkdir()
    Path("d/foto.png").write_bytes(b"\x89PNG")
    fails("DATA-05", "d")


def test_a_file_that_changes_while_it_is_read(here):
    Path("f.jsonl").write_text(jsonl(SHAPES["prompt"]), "utf-8")
    items = iter(open_source(Source(path="f.jsonl")))
    next(items)
    with open("f.jsonl", "a", encoding="utf-8") as out:
        out.write(jsonl(SHAPES["prompt"]))
    with pytest.raises(MaeseError) as problem:
        list(items)
    assert problem.value.code == "DATA-14"


def test_a_missing_package_is_named_with_the_line_that_installs_it(here, monkeypatch):
    Path("f.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert fails("DEP-01", "f.parquet")["extra"] == "data"


def test_a_source_is_a_path_or_a_hub_and_not_both():
    from maese.recipe import check

    for source in ({}, {"path": "a", "hub": "b/c"}):
        with pytest.raises(MaeseError) as problem:
            check({"name": "x", "data": {"sources": [source]}})
        assert (problem.value.code, problem.value.facts["key"]) == ("USE-07", "data.sources.0.path")


def test_numbers_and_nests_beyond_python_s_patience(here):
    Path("f.jsonl").write_text('{"prompt": ' + "9" * 5000 + ', "completion": "b"}\n', "utf-8")
    assert fails("DATA-04")["line"] == 1
    Path("f.json").write_text('[{"prompt": ' + "9" * 5000 + ', "completion": "b"}]', "utf-8")
    fails("DATA-04", "f.json")
    for cell in ("[" * 5000, "9" * 5000):
        Path("f.csv").write_text(f'messages\n"{cell}"\n', "utf-8")
        fails("DATA-21", "f.csv")


@pytest.mark.parametrize("end", ["", ",", ',\n{"prompt": "c"', "] y más"])
def test_an_array_that_does_not_close_is_not_passed_over(here, end):
    Path("f.json").write_text('[{"prompt": "a", "completion": "b"}' + end, "utf-8")
    fails("DATA-04", "f.json")


def test_arrays_one_after_another(here):
    Path("f.json").write_text(json.dumps(SHAPES["prompt"][:1]) + "\n" + json.dumps(SHAPES["prompt"][1:]), "utf-8")
    assert said("f.json") == TURNS


def test_a_broken_line_of_json_lines_is_one_and_the_rest_is_read(here):
    text = jsonl(SHAPES["prompt"][:1]) + '{"prompt": "rota\n' + jsonl(SHAPES["prompt"][1:])
    Path("f.json").write_text(text, "utf-8")
    assert fails("DATA-04", "f.json")["line"] == 2
    met: list = []
    items = list(open_source(Source(path="f.json"), on_fault=met.append))
    assert [i.meta["line"] for i in items] == [1, 3] and [p.facts["line"] for p in met] == [2]


def test_a_list_inside_a_row_is_not_taken_for_the_rows(here):
    found = [row | {"history": [{"a": 1}]} for row in SHAPES["prompt"]]
    Path("f.json").write_text(jsonl(found), "utf-8")
    assert said("f.json") == TURNS
    Path("f.json").write_text(jsonl(found[:1]), "utf-8")
    assert said("f.json") == TURNS[:1]


def test_a_quote_never_closed_does_not_swallow_the_file(here):
    Path("f.csv").write_text('prompt,completion\na,"b\n' + "c,d\n" * 50, "utf-8")
    assert fails("DATA-19", "f.csv")["line"] == 2


def test_two_columns_of_one_name(here):
    Path("f.csv").write_text("prompt,prompt,completion\na,b,c\n", "utf-8")
    assert fails("DATA-25", "f.csv")["column"] == "prompt"


def test_lines_ended_as_old_macs_did(here):
    Path("f.jsonl").write_bytes(jsonl(SHAPES["prompt"]).encode().replace(b"\n", b"\r"))
    assert said() == TURNS
    Path("f.csv").write_bytes(b"prompt,completion\ra,b\rc,d\r")
    assert [turns[1][1] for turns in said("f.csv")] == ["b", "d"]


def test_an_empty_file_in_a_folder_has_no_shape_of_its_own(here):
    Path("d").mkdir()
    Path("d/a.jsonl").write_text("", "utf-8")
    Path("d/b.jsonl").write_text(jsonl(SHAPES["alpaca"]), "utf-8")
    assert said("d") == TURNS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-le"])
def test_wide_characters_without_their_mark(here, encoding):
    Path("f.csv").write_bytes("prompt,completion\na,b\n".encode(encoding))
    fails("DATA-02", "f.csv", map={"prompt": "prompt"})


def test_archives_that_cannot_be_opened(here):
    with zipfile.ZipFile("f.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", jsonl(SHAPES["prompt"] * 300))
    raw = bytearray(Path("f.zip").read_bytes())
    raw[raw.index(b"PK\x01\x02") + 16] ^= 1  # its sum, in the directory at the end
    Path("f.zip").write_bytes(raw)
    fails("DATA-20", "f.zip")
    raw[6] |= 1  # the mark of a password, in both headers
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    Path("g.zip").write_bytes(raw)
    fails("DATA-20", "g.zip")


@pytest.mark.parametrize("name", ["bz2", "xz"])
def test_other_ways_of_packing(here, name):
    import bz2
    import lzma

    raw = jsonl(SHAPES["prompt"]).encode()
    Path(f"f.jsonl.{name}").write_bytes({"bz2": bz2, "xz": lzma}[name].compress(raw))
    assert said(f"f.jsonl.{name}") == TURNS


def test_half_a_character_can_be_converted_and_stays_half(here):
    from maese.text.convert import convert

    Path("f.jsonl").write_text(
        '{"prompt": "a\\ud83d", "completion": "ñ"}\n{"prompt": "¿?", "completion": "ñ"}\n', "utf-8"
    )
    assert convert(Source(path="f.jsonl"), Path("g.jsonl")) == 2
    assert said("g.jsonl") == said("f.jsonl") and "ñ" in Path("g.jsonl").read_text("utf-8")


def test_a_conversation_of_no_turns_has_a_side_all_the_same(here):
    from maese.text.split import place

    Path("f.jsonl").write_text('{"messages": []}\n', "utf-8")
    assert 0 <= place(next(iter(open_source(Source(path="f.jsonl"))))) < 1


def test_limits_count_what_they_say_whatever_the_source(here):
    Path("f.jsonl").write_text(jsonl({"text": f"Documento {i}."} for i in range(30)), "utf-8")
    assert len(list(open_source(Source(path="f.jsonl", limit=10)))) == 10
    Path("d").mkdir()
    for name in "abc":
        Path(f"d/{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(10)), "utf-8")
    text = "\n".join(item.text for item in open_source(Source(path="d", limit=14)))
    assert text.split() == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(4)]


def test_empty_cells_are_rows_and_nan_is_nothing(here):
    Path("f.csv").write_text("prompt,completion\na,b\n,\nc,d\n\n", "utf-8")
    assert len(said("f.csv")) == 3
    Path("f.jsonl").write_text('{"prompt": "a", "completion": NaN}\n', "utf-8")
    assert said() == [[("user", "a"), ("assistant", "")]]


def test_archives_in_a_folder_are_read_and_inside_another_are_told(here):
    Path("d").mkdir()
    with tarfile.open("d/a.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("a.jsonl")
        raw = jsonl(SHAPES["prompt"]).encode()
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    assert said("d") == TURNS
    with zipfile.ZipFile("f.zip", "w") as archive:
        archive.writestr("dentro.zip", b"PK\x03\x04")
    assert fails("DATA-18", "f.zip")["suffix"] == ".zip"


def test_a_pipe_is_read_once_and_a_device_is_not(here):
    import os
    import threading

    os.mkfifo("tubo")
    raw = jsonl(SHAPES["prompt"]).encode()
    writer = threading.Thread(target=lambda: Path("tubo").write_bytes(raw))
    writer.start()
    assert said("tubo") == TURNS and said("tubo") == TURNS
    writer.join()
    fails("DATA-01", "/dev/zero")
    for name in ("a" * 300, "~nadie123/x"):
        fails("DATA-01", name)


def test_lines_are_those_an_editor_counts(here):
    Path("f.txt").write_text("\n\n\nUno\u2028dos\fTres\n", "utf-8")
    (item,) = open_source(Source(path="f.txt"))
    assert item.meta["line"] == 4
    Path("g.txt").write_text("a\fb\u2028c\nd\nel niÃ±o\n", "utf-8")
    assert fails("DATA-11", "g.txt")["line"] == 3


def test_a_book_is_divided_at_its_end(here):
    from maese.text.convert import divide

    Path("libro.txt").write_text("".join(f"Línea {i}.\n" for i in range(100)), "utf-8")
    assert divide(Source(path="libro.txt"), 0.1, None, (Path("a.jsonl"), Path("b.jsonl"))) == (1, 1)
    assert "Línea 99." in Path("b.jsonl").read_text("utf-8") and "Línea 99." not in Path("a.jsonl").read_text("utf-8")


def test_a_tree_of_messages_is_its_questions_and_their_best_answers(here):
    """OpenAssistant's table: by parent, whatever the order; the best answer alone; of one language when asked."""

    def message(id, parent, role, text, lang="es", rank=None):
        return {"message_id": id, "parent_id": parent, "role": role, "text": text, "lang": lang, "rank": rank}

    rows = [
        message("b", "a", "assistant", "Una pila guarda lo último arriba.", rank=0),
        message("a", None, "prompter", "¿Qué es una pila?"),
        message("c", "a", "assistant", "No sé.", rank=1),
        message("d", "b", "prompter", "¿Y una cola?"),
        message("e", "d", "assistant", "Lo primero que entra es lo primero que sale."),
        message("f", None, "prompter", "What is a stack?", "en"),
        message("g", "f", "assistant", "A pile.", "en", 0),
    ]
    Path("oasst.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    every = [[m.content for m in item.messages] for item in open_source(Source(path="oasst.jsonl"))]
    assert every[0] == ["¿Qué es una pila?", "Una pila guarda lo último arriba."] and len(every) == 3
    spanish = [item.messages[0].content for item in open_source(Source(path="oasst.jsonl", where={"lang": "es"}))]
    assert spanish == ["¿Qué es una pila?", "¿Y una cola?"]
