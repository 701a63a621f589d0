"""The commands that look at data, through the real command line: what they print, what they leave, how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PAIRS = [(f"¿Cuánto es {i} más {i}?", f"Son {2 * i}.") for i in range(60)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(here):
    return here


@pytest.fixture
def csv(here):
    lines = ["pregunta;respuesta;autora", *(f"{q};{a};Ana {i % 9}" for i, (q, a) in enumerate(PAIRS))]
    Path("f.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return "f.csv"


@pytest.fixture
def clean(here):
    rows = [{"prompt": q, "completion": a, "autora": f"Ana {i % 9}"} for i, (q, a) in enumerate(PAIRS)]
    Path("f.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return "f.jsonl"


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_columns_with_other_names_are_converted_by_the_command_proposed(maese, csv):
    code, out, said = maese("data", "check", csv)
    assert code == 1 and out == "" and "error[DATA-03]" in said
    proposed = next(line for line in said.splitlines() if "prueba:" in line).split("prueba:")[1].split()
    code, out, _ = maese(*proposed[1:])
    assert code == 0 and out.strip() == "f.messages.jsonl"
    found = rows("f.messages.jsonl")
    assert len(found) == 60 and found[0]["messages"][0] == {"role": "user", "content": PAIRS[0][0]}
    assert found[0]["autora"] == "Ana 0"
    assert maese("data", "check", "f.messages.jsonl")[0] == 0
    code, _, said = maese(*proposed[1:])
    assert code == 1 and "error[RUN-01]" in said


def test_the_doctor_ends_well_or_badly(maese, clean):
    code, out, _ = maese("data", "check", clean)
    assert code == 0 and "60 conversaciones" in out
    with open(clean, "a", encoding="utf-8") as file:
        file.write('{"prompt": "roto\n')
    code, out, _ = maese("--json", "data", "check", clean)
    assert code == 1
    audit = json.loads(out)
    assert [(f["kind"], f["lines"]) for f in audit["findings"] if f["severity"] == "error"] == [("bad_json", [61])]
    code, out, _ = maese("data", "fix", clean)
    assert code == 0 and maese("data", "check", out.splitlines()[0])[0] == 0
    assert len(rows(out.splitlines()[0])) == 60


def test_the_doctor_s_page_opens_by_itself(maese, clean):
    assert maese("data", "check", clean, "--html", "p.html")[0] == 0
    page = Path("p.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "http" not in page.replace("http://www.w3.org", "")


def test_the_doctor_reads_what_a_recipe_reads(maese, here):
    code, out, _ = maese("data", "check", "--recipe", "pokemon")
    assert code == 0 and "152 conversaciones" in out


def test_rows_are_shown_as_the_model_sees_them(maese, clean):
    code, out, _ = maese("data", "show", clean, "--row", "3", "--rows", "2", "--html", "filas.html")
    assert code == 0 and "f.jsonl#3" in out and "f.jsonl#4" in out and "f.jsonl#5" not in out
    assert "⟦␣Son␣4.<|endoftext|>⟧" in out.replace("\n", "") and Path("filas.html").exists()
    shown = json.loads(maese("--json", "data", "show", clean, "--row", "3", "--rows", "1")[1])
    assert shown[0]["text"].startswith("Pregunta: ¿Cuánto es 2 más 2?")
    assert "".join(p["text"] for p in shown[0]["pieces"] if p["state"] == "learnt") == "␣Son␣4.<|endoftext|>"
    code, out, _ = maese("data", "show", clean, "--max-length", "10", "--rows", "1")
    assert code == 0 and "✂" in out


def test_one_conversation_in_another_template(maese, clean):
    code, out, _ = maese("inspect", "template", clean, "--row", "2", "--template", "maese")
    assert code == 0 and "<|user|>" in out and "⟦Son␣2.<|end|>⟧" in out.replace("\n", "")
    code, _, said = maese("inspect", "template", clean, "--template", "chatml")
    assert code == 1 and "error[TEMPLATE-02]" in said


def test_a_row_that_is_not_there(maese, clean):
    code, _, said = maese("data", "show", clean, "--row", "99")
    assert code == 1 and "error[DATA-24]" in said


def test_a_file_is_divided_as_training_would(maese, clean):
    code, out, _ = maese("data", "split", clean, "--share", "0.2", "--group", "autora")
    train, held = out.split()
    sides = [{row["autora"] for row in rows(path)} for path in (train, held)]
    assert code == 0 and sides[0] and sides[1] and not sides[0] & sides[1]
    assert len(rows(train)) + len(rows(held)) == 60


def test_a_plan_for_a_cluster_is_written_and_not_overwritten(maese, clean):
    code, out, _ = maese("data", "cluster-plan", clean, "--tasks", "2", "--rule", "length")
    assert code == 0 and out.strip() == "cluster.py"
    compile(Path("cluster.py").read_text("utf-8"), "cluster.py", "exec")
    assert "error[RUN-01]" in maese("data", "cluster-plan", clean)[2]


def test_a_tokenizer_trained_and_compared(maese, here):
    words = "La niña corrió hacia la montaña mientras el señor Núñez leía. ¿Qué pasó después? ¡Nada! "
    Path("t.txt").write_text("".join(f"{words}{i} {words[::-1]}\n" for i in range(400)), "utf-8")
    code, out, _ = maese("tokenizer", "train", "t.txt", "--size", "400", "--output", "mio")
    assert code == 0 and out.strip() == "mio" and json.loads(Path("mio/card.json").read_text("utf-8"))["size"] == 400
    code, out, _ = maese("tokenizer", "compare", "embedded", "mio", "--text", "t.txt")
    assert code == 0 and "embedded" in out and "mio" in out
    result = json.loads(maese("--json", "tokenizer", "compare", "embedded", "mio")[1])
    assert [row["name"] for row in result["tokenizers"]] == ["embedded", "mio"]


def test_what_comes_through_a_pipe(maese, clean, monkeypatch):
    import io

    from maese.text import streams

    streams.piped.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(clean).read_bytes())))
    code, out, _ = maese("data", "check", "-")
    assert code == 0 and "60 conversaciones" in out
    streams.piped().unlink()
    streams.piped.cache_clear()


def test_columns_can_be_named_where_data_are_looked_at(maese, csv):
    code, out, _ = maese("data", "check", csv, "--prompt", "pregunta", "--completion", "respuesta")
    assert code == 0 and "60 conversaciones" in out


def test_a_recipe_of_another_shape_looks_at_a_file_as_what_it_is(maese, clean):
    assert maese("data", "check", "--recipe", "pokemon", clean)[0] == 0


def test_a_table_in_an_old_encoding_is_converted_in_one_step(maese, csv):
    raw = Path(csv).read_text("utf-8").replace("Ana", "Íñigo")
    Path(csv).write_bytes(raw.encode("cp1252"))
    assert maese("data", "convert", csv, "--prompt", "pregunta", "--completion", "respuesta")[0] == 0
    assert rows("f.messages.jsonl")[0]["autora"] == "Íñigo 0"


def test_a_folder_is_mended_as_a_folder_and_an_archive_too(maese, here):
    import zipfile

    Path("poemas").mkdir()
    for i in range(3):
        Path(f"poemas/poema {i}.txt").write_bytes(f"Canción {i} del año.\n".encode("cp1252" if i else "utf-8"))
    code, _, said = maese("data", "split", "poemas")
    assert code == 1 and "maese data fix poemas " in said
    with zipfile.ZipFile("poemas.zip", "w") as archive:
        for path in Path("poemas").iterdir():
            archive.write(path)
    for name in ("poemas", "poemas.zip"):
        code, out, _ = maese("data", "fix", name)
        assert code == 0 and out.strip() == "poemas.fixed"
        found = sorted(Path("poemas.fixed").rglob("*.txt"))
        assert [p.read_text("utf-8") for p in found] == [f"Canción {i} del año.\n" for i in range(3)]
        Path("poemas.fixed").rename(f"{name}.visto")


def test_new_files_are_named_as_json_too(maese, clean):
    assert json.loads(maese("--json", "data", "fix", clean)[1])["kept"] == 60
    assert json.loads(maese("--json", "data", "split", clean)[1])["train"] > 40
    code, _, said = maese("data", "fix", clean, "--only", "inventada")
    assert code == 2 and "mojibake" in said


def test_explain_shows_braces_as_they_are_typed(maese):
    assert "map: {prompt: tu_columna" in maese("explain", "DATA-03")[1]


def test_a_recipe_beside_you_is_proposed_with_its_suffix(maese, here):
    Path("aula.yaml").write_text("name: aula\n", "utf-8")
    assert "maese train aula.yaml" in maese("train", "aula")[2]
    assert maese("train", "recipes/pokemon.yaml", "--dry-run")[0] == 0
