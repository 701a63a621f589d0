"""Bad input gets a sentence: a code, what was found, what was expected, a command that mends it; and no work is lost.

All of it through the real command line, in this process.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer

from maese.say import catalogue

CODES = sorted(key.split(".")[1] for key in catalogue("es") if re.fullmatch(r"error\.[A-Z]+-\d\d\.why", key))
LABELS = {"found": "encontré", "expected": "esperaba", "try": "prueba"}


@pytest.fixture
def maese(maese, here, monkeypatch):
    # Figures take longer than the training of a model of two layers.
    monkeypatch.setattr("maese.report.curves.plot", lambda run: None)
    return maese


@pytest.fixture
def fails(maese):
    """`fails("DATA-01", "train", …)` asserts a well-made error with that code, and returns what it said."""

    def call(code, *words, exit=1):
        status, out, said = maese(*words)
        said = said[max(0, said.find("error[")) :]
        assert said.startswith(f"error[{code}]: "), said
        assert status == exit and out == ""
        for part, label in LABELS.items():
            assert bool(re.search(rf"^  {label}: +\S", said, re.M)) == (f"error.{code}.{part}" in catalogue("es")), said
        assert "Traceback" not in said and len(said.splitlines()) <= 12
        assert said.rstrip().endswith(f"maese explain {code}")
        return said

    return call


@pytest.fixture
def receta(recipe):
    """The small recipe of conftest as a file, trained for one step and without samples."""
    recipe()
    path = Path("receta.yaml")
    text = (
        path.read_text("utf-8").replace("max_steps: 6", "max_steps: 1").replace("prompts: [En un lugar]", "prompts: []")
    )
    path.write_text(text, encoding="utf-8")
    return "receta.yaml"


def typed(said: str, line: int = 0) -> list[str]:
    """The command after «prueba:» as a shell would take it, without the remark that follows it."""
    block = re.search(r"prueba: +(.*\n(?: {14}.*\n)*)", said).group(1)
    words = shlex.split(block.splitlines()[line].split("   # ")[0].replace("RECETA", "receta.yaml"))
    assert words[0] == "maese"
    return words[1:]


def source(path) -> str:
    return f"data.sources=[{{path: {json.dumps(str(path), ensure_ascii=False)}}}]"


def put(name: str, content: bytes | str) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Files


def test_a_missing_file_proposes_the_nearest(fails, maese, receta):
    said = fails("DATA-01", "train", receta, source("librp.txt"))
    assert "¿querías decir libro.txt?" in said and not Path("runs").exists()
    assert maese(*typed(said))[0] == 0
    assert "data/quijote_muestra.txt" in fails("DATA-01", "train", receta, source("no/hay/nada.txt"))
    fails("DATA-01", "data", "fix", "nada.txt")


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n \r\n", b"\xef\xbb\xbf", "\u00a0\n".encode()])
def test_an_empty_file(fails, receta, content):
    put("vacio.txt", content)
    assert "vacio.txt" in fails("DATA-05", "train", receta, source("vacio.txt"))
    assert not Path("runs").exists()


def test_a_book_of_gutenberg_with_nothing_but_its_header(fails, receta):
    put(
        "g.txt",
        "Cabecera\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nL\n",
    )
    fails("DATA-05", "train", receta, source("g.txt"))


SPANISH = "El niño comió piñas.\n¿Y la señora? Año nuevo en España, ¡mañana!\n" * 20


@pytest.mark.parametrize("name", ["antiguo.txt", "mi libro.txt", "d'Ors.txt"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be"])
def test_another_encoding_is_refused_and_the_command_proposed_mends_it(fails, maese, receta, encoding, name):
    path = put(name, SPANISH.encode(encoding))
    before = path.read_bytes()
    said = fails("DATA-02", "train", receta, source(name))
    assert "línea 1" in said and "# escribe " in said
    status, out, _ = maese(*typed(said))
    fixed = Path(out.strip())
    assert status == 0 and fixed.read_text("utf-8") == SPANISH and path.read_bytes() == before
    assert maese("-qq", "train", receta, source(fixed), "output=bien")[0] == 0


def test_the_line_of_the_first_bad_byte(fails, receta):
    put("a.txt", b"uno\ndos\ncaf\xe9\n")
    assert "línea 3" in fails("DATA-02", "train", receta, source("a.txt"))


def test_broken_letters_are_refused_and_the_command_proposed_mends_them(fails, maese, receta):
    path = put("rota.txt", "limpia\n" * 20 + "el niÃ±o\nsano\nla seÃ±ora\n")
    before = path.read_bytes()
    said = fails("DATA-11", "train", receta, source("rota.txt"))
    assert "«niÃ±o» en la línea 21 (2 líneas así)" in said
    status, out, _ = maese(*typed(said))
    assert status == 0 and Path(out.strip()).read_text("utf-8").endswith("el niño\nsano\nla señora\n")
    assert path.read_bytes() == before
    assert maese("-qq", "train", receta, source(out.strip()), "output=bien")[0] == 0


def test_a_copy_is_never_written_over_another_file(fails, maese):
    put("a.txt", "año".encode("cp1252"))
    kept = put("a.fixed.txt", "mío")
    assert "a.fixed-2.txt" in fails("RUN-01", "data", "fix", "a.txt")
    assert kept.read_text("utf-8") == "mío"
    assert maese("data", "fix", "a.txt", "--output", "otra/carpeta/a.txt")[0] == 0
    assert Path("otra/carpeta/a.txt").read_text("utf-8") == "año\n"


def test_a_byte_mark_is_accepted_aloud(maese, receta):
    put("bom.txt", b"\xef\xbb\xbf" + Path("libro.txt").read_bytes())
    status, _, said = maese("train", receta, source("bom.txt"), "output=bom")
    assert status == 0 and "aviso: bom.txt empezaba con una marca de orden de bytes" in said


@pytest.mark.parametrize("suffix", [".PDF", ".docx", ".epub"])
def test_a_format_with_pages_and_fonts(fails, receta, suffix):
    put(f"a{suffix}", "{}")
    assert suffix.lower() in fails("DATA-18", "train", receta, source(f"a{suffix}"))


@pytest.mark.parametrize(
    ("block", "label", "line", "found"),
    [
        ("\n\nPregunta: ¿Y?\n", "Respuesta:", 7, "Pregunta: ¿Y?"),
        ("\nRespuesta: Sí.\n", "Pregunta:", 6, "Respuesta: Sí."),
        ("Pregunta: ¿Y?\nRespuesta:   \n", "Respuesta:", 5, "Pregunta: ¿Y?"),
        ("Pregunta:\nRespuesta: Sí.\n", "Pregunta:", 5, "Pregunta:"),
        ("texto suelto\n", "Pregunta:", 5, "texto suelto"),
        ("Pregunta: ¿Y?\nRespuesta: Sí.\n\nPregunta: ¿Otra?\nRespuesta: No.\n", "###", 8, "Pregunta: ¿Otra?"),
    ],
)
def test_half_a_block_is_told_by_its_line(fails, receta, block, label, line, found):
    text = f"###\nPregunta: a\nRespuesta: b\n###\n{block}###\n"
    put("p.txt", text)
    assert text.splitlines()[line - 1] == found
    said = fails("DATA-08", "train", receta, source("p.txt"), "data.format=auto", "data.too_long=error")
    assert f"le falta {label}" in said and f"«{found}» (línea {line})" in said


def test_sources_of_two_shapes(fails, maese, receta, questions):
    both = "data.sources=[{path: preguntas.txt}, {path: libro.txt}]"
    said = fails("DATA-07", "train", receta, both, "data.format=auto")
    assert "preguntas.txt es qa; libro.txt es text" in said
    assert maese("-qq", *typed(said), both, "output=bien")[0] == 0


ASKED = ("data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.max_length=24", "data.too_long=error")


def test_rows_too_long_are_told_with_the_length_that_fits(fails, maese, receta, questions):
    # The longest one is among those kept apart: the length proposed must fit it too.
    text = questions.read_text("utf-8")
    put("preguntas.txt", text)
    from maese.recipe import Source
    from maese.text.read import open_source
    from maese.text.split import place

    held = min(open_source(Source(path="preguntas.txt")), key=place)
    answer = held.messages[1].content
    put("preguntas.txt", text.replace(f"Respuesta: {answer}\n", f"Respuesta: {answer} Y bien sumado está.\n"))
    said = fails("DATA-09", "train", receta, *ASKED)
    assert held.id in said and "60 de 60 pasan de 24 tokens" in said
    one, other = typed(said, 0), typed(said, 1)
    assert maese("-qq", *one[:2], *ASKED[:2], ASKED[3], *one[2:], "output=larga")[0] == 0
    # The second remedy drops all of these: there is nothing left, and that has its own sentence.
    fails("DATA-10", *other[:2], *ASKED[:3], *other[2:])


@pytest.mark.parametrize(("choice", "told"), [("drop", "too_long"), ("truncate", "truncated")])
def test_what_to_do_with_long_rows(maese, receta, questions, choice, told):
    put("preguntas.txt", questions.read_text("utf-8").replace("Son 20.", "Son veinte, " * 30))
    changes = [*ASKED[:2], "data.max_length=64", f"data.too_long={choice}", "output=uno"]
    assert maese("-qq", "train", receta, *changes)[0] == 0
    facts = json.loads(Path("uno/data.json").read_text("utf-8"))
    rows = facts["train"]["rows"] + facts["validation"]["rows"]
    assert facts["dropped"] == {told: 1} and rows == {"drop": 59, "truncate": 60}[choice]
    kept = Path("uno/dropped.jsonl")
    assert kept.exists() == (choice == "drop")
    if kept.exists():
        row = json.loads(kept.read_text("utf-8"))
        assert row["reason"] == "too_long" and "Son veinte" in row["messages"][1]["content"]


def test_conversations_are_not_cut_in_pieces(fails, receta, questions):
    assert "truncate" in fails("USE-03", "train", receta, *ASKED[:2], "data.too_long=split")


def test_a_context_shorter_than_the_template(fails, maese, receta, questions):
    said = fails("BATCH-02", "train", receta, *ASKED[:2], "data.max_length=16", "data.too_long=drop")
    # What it proposes holds the template; whether it holds these rows is another question, with its own answer.
    assert "data.too_long=drop" in typed(said) and "data.max_length=16" not in typed(said)
    fails("DATA-09", *typed(said), ASKED[3])


@pytest.mark.parametrize("text", ["Hola.\n", "a"])
def test_too_little_text(fails, receta, text):
    put("corto.txt", text)
    assert "al menos 3 ejemplos" in fails("DATA-10", "train", receta, source("corto.txt"))
    assert not Path("runs").exists()


# Recipes


def test_a_misspelt_key(fails, maese, receta):
    said = fails("USE-02", "train", receta, "train.lrr=2e-4")
    assert "¿querías decir train.lr?" in said
    status, out, _ = maese(*typed(said), "--dry-run")
    assert status == 0 and "lr: 0.0002\n" in out
    said = fails("USE-02", "train", receta, "method.target=[c_attn, c_fc]")
    assert "  - c_attn\n  - c_fc\n" in maese(*typed(said), "--dry-run")[1]


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ("train.lr=abc", "'abc'", "un número"),
        ("train.lr=99", "99", "≤ 10"),
        ("train.lr=0", "0", "> 0"),
        ("train.lr=1e400", "inf", "< ∞"),
        ("train.micro_batch=0", "0", "≥ 1"),
        ("train.micro_batch=1,5", "1.5", "un número entero"),
        ("data.format=pdf", "'pdf'", "auto | text | qa"),
        ("data.validation=0.95", "0.95", "≤ 0.9"),
        ("data.sources=libro.txt", "'libro.txt'", "una lista"),
        ("train.gradient_checkpointing=quizás", "'quizás'", "true | false"),
        ("name=a/b", "'a/b'", "a-z"),
    ],
)
def test_a_value_of_another_kind_or_out_of_range(fails, receta, change, found, expected):
    said = fails("USE-03", "train", receta, change)
    assert f"el valor de {change.partition('=')[0]} no vale" in said
    assert re.search(rf"encontré: +{re.escape(found)}\n", said) and f"esperaba:   {expected}" in said


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("name: x\ndata:\n\tsources: 1\n", 3, 1), ("- a\n", 1, 1), ("", 1, 1), ("name: 'x\n", 2, 1), ("a: b: c\n", 1, 5)],
)
def test_broken_yaml_is_told_by_line_and_column(fails, maese, text, line, column):
    put("mala.yaml", text)
    said = fails("USE-04", "train", "mala.yaml")
    assert "mala.yaml" in said and f"línea {line}, columna {column}" in said
    assert maese(*typed(said))[0] == 0 and maese("train", "mia.yaml", "--dry-run")[0] == 0


def test_broken_yaml_in_a_change(fails, receta):
    assert "data.sources=[{path: a" in fails("USE-04", "train", receta, "data.sources=[{path: a")


def test_a_recipe_in_another_encoding(fails, maese, receta):
    text = "# Pokémon\n" + Path(receta).read_text("utf-8")
    put("vieja.yaml", text.encode("cp1252"))
    said = fails("DATA-02", "train", "vieja.yaml")
    assert maese(*typed(said))[0] == 0
    assert maese("train", "vieja.fixed.yaml", "--dry-run")[0] == 0
    fails("DATA-02", "new", "otra", "--from", "vieja.yaml")
    put("notas.yaml", b"\xef\xbb\xbf" + text.encode())
    assert maese("train", "notas.yaml", "--dry-run")[0] == 0


def test_an_unknown_recipe(fails, maese):
    said = fails("USE-05", "train", "quijot")
    assert all(name in said for name in ("demo", "minigpt", "pokemon", "quijote"))
    assert maese(*typed(said), "--dry-run")[0] == 0
    fails("USE-05", "new", "mia", "--from", "nada")
    assert not Path("mia.yaml").exists()


@pytest.mark.parametrize("change", ["train.lr", "=3", "train.lr:2"])
def test_a_change_without_its_sign(fails, maese, receta, change):
    said = fails("USE-06", "train", receta, change)
    assert maese(*typed(said), "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [("name: x\n", "data"), ("name: x\ndata: {}\n", "data.sources"), ("data: {sources: [{path: a}]}", "name")],
)
def test_a_missing_key(fails, text, key):
    put("corta.yaml", text)
    assert f"le falta {key}\n" in fails("USE-07", "train", "corta.yaml")


def test_a_repair_is_made_of_what_was_typed(fails, maese, receta):
    """What is pasted does what was meant: the same command, recipe and changes, with the mistake mended."""
    said = fails("USE-02", "train", receta, "train.lrr=2e-4", "train.epochs=2")
    assert typed(said) == ["train", receta, "train.epochs=2", "train.lr=0.0002"]
    assert typed(fails("USE-03", "train", receta, "data.format=pdf")) == ["train", receta, "--dry-run"]
    assert typed(fails("USE-05", "plan", "quijot", "train.epochs=1")) == ["plan", "quijote", "train.epochs=1"]
    said = fails("BATCH-01", "plan", "--base", "gpt2", "--method", "lora", "--context", "4096")
    assert typed(said) == ["plan", "--base", "gpt2", "--method", "lora", "data.max_length=1024"]
    assert maese(*typed(said))[0] == 0
    assert typed(fails("USE-08", "explain", "train.lrr", exit=2)) == ["explain", "train.lr"]
    said = fails("RUN-02", "train", "minigpt", "size=nano", "--from", "instruct", "--until", "report")
    assert typed(said) == ["train", "minigpt", "size=nano", "--until", "report"]
    said = fails("BATCH-01", "plan", "--base=gpt2", "--context=4096")
    assert typed(said) == ["plan", "--base", "gpt2", "data.max_length=1024"]
    said = fails("USE-02", "train", receta, "data.sources=[{path: a b.txt, limt: 4}]")
    assert typed(said) == ["train", receta, "data.sources=[{path: a b.txt, limit: 4}]"]
    said = fails("USE-02", "train", receta, 'generate.sistem="Regla: sé breve"')
    assert typed(said) == ["train", receta, 'generate.system="Regla: sé breve"']
    assert typed(fails("USE-02", "train", receta, 'generate.sistem="null"'))[-1] == 'generate.system="null"'
    shutil.copy(receta, "mi gpt=2.yaml")
    said = fails("USE-03", "train", "mi gpt=2.yaml", "train.lr=99")
    assert typed(said) == ["train", "mi gpt=2.yaml", "--dry-run"]


def test_a_repair_of_a_model_in_stages_is_of_the_training_that_failed(fails, maese, receta):
    """`data.…` is no key of several trainings, and what was typed of all of them is mended for all."""
    for word, code, mended in (
        ("instruct.data.template=chatmll", "TEMPLATE-05", "instruct.data.template=chatml"),
        ("train.device=cuda", "DEVICE-01", "train.device=auto"),
        ("pretrain.train.device=cuda", "DEVICE-01", "pretrain.train.device=auto"),
        ("pretrain.learning_rate=3e-4", "USE-02", "pretrain.train.lr=0.0003"),
    ):
        assert typed(fails(code, "train", "minigpt", "size=nano", word)) == ["train", "minigpt", "size=nano", mended]


def test_a_base_misspelt_in_a_plan_keeps_the_rest(fails):
    said = fails("PLAN-02", "plan", "--base", "embeded", "--context", "64")
    assert typed(said) == ["plan", "--base", "embedded", "--context", "64"]
    assert typed(fails("PLAN-02", "plan", "quijote", "base=embeded")) == ["plan", "quijote", "base=embedded"]


def test_a_file_proposed_can_be_pasted(fails, maese):
    put("d d.json", "{}")
    assert typed(fails("DATA-01", "data", "check", "d d.jsn")) == ["data", "check", "d d.json"]


def test_a_misspelt_personality_is_told_the_one_that_was_meant(fails):
    said = fails("RUN-02", "chat", "sokratico")
    assert typed(said) == ["chat", "socratico"] and "embedded-instruct" in said
    words = ["embedded-instruct", "--persona", "socratco"]
    assert typed(fails("PERSONA-01", "chat", *words)) == ["chat", *words[:2], "socratico"]


def test_an_error_is_cut_between_words_and_its_command_is_not(monkeypatch):
    from maese.errors import MaeseError
    from maese.terminal import fold_error

    monkeypatch.setenv("COLUMNS", "60")
    said = str(MaeseError("USE-05", name="x" * 9, known=", ".join(["minigpt-classic"] * 9), nearest="y" * 60))
    lines = fold_error(said).splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(said.split())
    assert all(len(line) < 60 for line in lines if "maese " not in line) and any("y" * 60 in line for line in lines)


# The command line


def test_unknown_names(fails, maese):
    said = fails("USE-08", "explain", "DATA-99", exit=2)
    assert "DATA-" in said
    assert maese(*typed(said))[0] == 0
    assert "quijote" in fails("USE-08", "data", "get", "quijotes")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["train", "quijote", "--dry-rum"], "USE-09", "--dry-run"),
        (["--jsn"], "USE-09", "--json"),
        (["generate"], "USE-10", "MODELO"),
        (["generate", "embedded"], "USE-10", "PROMPT"),
        (["resume"], "USE-10", "ENTRENAMIENTO"),
        (["resume", "a", "sobra"], "USE-10", "sobra"),
        (["generate", "embedded", "Hola", "--seed"], "USE-10", "--seed"),
        (["generate", "embedded", "Hola", "--seed", "abc"], "USE-11", "--seed"),
        (["--lang", "fr"], "USE-11", "es | en"),
    ],
)
def test_words_of_the_command_line(fails, maese, words, code, told):
    said = fails(code, *words, exit=2)
    assert told in said and not re.search(r"\b(Got|unexpected|requires|argument|invalid)\b", said, re.I)
    assert maese(*typed(said))[0] == 0


@pytest.mark.parametrize(
    ("word", "meant"),
    [("trian", "train"), ("finetune", "train"), ("entrenar", "train"), ("charlar", "chat"), ("informe", "report"),
     ("continuar", "resume"), ("ls", "runs"), ("xyz", "")],
)  # fmt: skip
def test_an_unknown_command_proposes_the_one_meant(fails, word, meant):
    said = fails("USE-01", word, "algo", exit=2)
    assert f"«{word}»" in said and f"maese {meant}" in said


@pytest.mark.parametrize("words", [["generate", "Había una vez " * 30, "embedded"], ["chat", "a" * 300]])
def test_a_prompt_where_the_model_should_be(fails, words):
    assert words[1][:20] in fails("USE-15", *words, exit=2)


def test_a_number_out_of_bounds_is_told_with_them(fails):
    said = fails("USE-11", "plan", "--base", "gpt2", "--context", "0", exit=2)
    assert "un número entero, ≥ 8\n" in said and re.search(r"encontré: +0\n", said)
    assert re.search(r"encontré: +mucha\n", fails("USE-11", "generate", "x", "y", "--temperature", "mucha", exit=2))
    assert re.search(r"encontré: +fr\n", fails("USE-11", "--lang", "fr", exit=2))


def test_the_folder_one_is_in_is_no_new_name(fails, maese, receta):
    Path("obra").mkdir()
    put("obra/a.txt", "a")
    for name in (".", "obra/.."):
        said = fails("RUN-01", "train", receta, f"output={name}")
        assert not Path(re.search(r"otro nombre: (\S+)", said)[1]).exists()


def test_an_unknown_command_of_a_group(fails):
    assert typed(fails("USE-01", "data", "gt", exit=2)) == ["data", "get"]


@pytest.mark.parametrize(
    "flag", [["--temperature", "9"], ["--max-new-tokens", "0"], ["--top-p", "0"], ["--sentences", "0"]]
)
def test_ways_of_writing_out_of_range(fails, maese, tiny, flag):
    said = fails("GEN-03", "generate", tiny, "Hola", *flag)
    assert maese(*typed(said))[0] == 0


# Models


@pytest.fixture
def broken(tiny, here):
    """`broken(change)`: a copy of the tiny model in modelo/, spoilt."""

    def build(change) -> str:
        shutil.copytree(tiny, "modelo")
        change(Path("modelo"))
        return "base=modelo"

    return build


def config(**keys):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | keys), encoding="utf-8")

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize("typo", ["modelos/chikito", "./modelos/chikito"])
def test_a_base_that_is_not_there(fails, maese, receta, tiny, typo):
    shutil.copytree(tiny, "modelos/chiquito")
    said = fails("MODEL-01", "train", receta, f"base={typo}")
    assert typed(said)[-1] == "base=modelos/chiquito"
    assert maese("-qq", *typed(said), "output=bien")[0] == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("MODEL-01", ["train", "receta.yaml", "base=~nadie-con-este-nombre/modelo"]),
        ("DATA-01", ["train", "receta.yaml", "data.sources=[{path: ~nadie-con-este-nombre/libro.txt}]"]),
        ("DATA-01", ["data", "check", "~nadie-con-este-nombre/libro.txt"]),
        ("MODEL-01", ["generate", "~nadie-con-este-nombre/modelo", "Hola"]),
    ],
)
def test_the_house_of_somebody_who_is_not_here(fails, receta, code, words):
    assert "~nadie-con" in fails(code, *words)


@pytest.mark.parametrize("name", ["mi modelo é", "modelo (2)"])
def test_a_folder_with_odd_letters_can_be_typed_as_it_is_told(fails, maese, receta, tiny, name):
    shutil.copytree(tiny, f"modelos/{name}")
    said = fails("MODEL-01", "train", receta, f"base=./modelos/{name}x")
    assert maese(*typed(said), "--dry-run")[0] == 0 and typed(said)[-1] == f"base=modelos/{name}"
    assert "'modelos/" in fails("RUN-01", "train", receta, f"output=modelos/{name}")


@pytest.mark.parametrize("base", ["nadie/no-existe", "nadie/no-existe@v2", "gpt9", "./nada", "/nada/de/nada", "a/b/c"])
def test_a_base_of_the_hub_without_network(fails, receta, base):
    assert f"«{base}»" in fails("MODEL-01", "train", receta, f"base={base}")
    assert not Path("runs").exists()


def test_a_folder_without_a_model(fails, receta):
    Path("hueca").mkdir()
    assert "config.json" in fails("MODEL-01", "train", receta, "base=hueca")


def test_a_base_that_asks_for_permission(fails, receta, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(**_):
        raise GatedRepoError("403 Client Error: gated", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    assert "«alguien/cerrado»" in fails("MODEL-02", "train", receta, "base=alguien/cerrado")


def test_weights_that_could_run_code_are_never_opened(fails, receta, broken):
    def change(folder):
        without("model.safetensors")(folder)
        # A pickle that would write a file on being opened.
        (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(VABIERTO\nVw\ntR.")

    assert "pytorch_model.bin" in fails("MODEL-03", "train", receta, broken(change))
    fails("MODEL-03", "generate", "modelo", "Hola")
    assert not Path("ABIERTO").exists()


def test_a_model_with_code_of_its_own_is_not_run(fails, receta, broken):
    def change(folder):
        config(auto_map={"AutoModelForCausalLM": "propio.Modelo", "AutoConfig": "propio.Config"}, model_type="propio")(
            folder
        )
        (folder / "propio.py").write_text("open('ABIERTO', 'w')\n", encoding="utf-8")

    fails("MODEL-05", "train", receta, broken(change))
    fails("MODEL-05", "generate", "modelo", "Hola")
    assert not Path("ABIERTO").exists()


@pytest.mark.parametrize("kind", ["inventada", "t5"])
def test_an_architecture_that_does_not_write(fails, receta, broken, kind):
    fails("MODEL-04", "train", receta, broken(config(model_type=kind, architectures=["X"])))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


DAMAGE = {
    "cut": cut,
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "pointer": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "config": lambda folder: (folder / "config.json").write_text("{"),
    "shapes": config(n_embd=64),
    "layers": config(n_layer=3),
    "fewer layers": config(n_layer=1),
    "no layers": config(n_layer=-2),
    "no width": config(n_embd=0),
    "a number in words": config(n_layer="dos"),
    "bits that are none": config(dtype="float99"),
    "a list": lambda folder: (folder / "generation_config.json").write_text("[1]"),
    "endless": lambda folder: (folder / "config.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights(fails, receta, broken, damage):
    """Also those that transformers would complete with random numbers and say nothing of."""
    base = broken(DAMAGE[damage])
    fails("MODEL-06", "generate", "modelo", "Hola")
    fails("MODEL-06", "train", receta, base)


@pytest.mark.parametrize("names", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_no_tokenizer(fails, receta, broken, names):
    """Also where transformers would make one without a single word."""
    fails("TOKEN-01", "train", receta, broken(without(*names)))
    fails("TOKEN-01", "generate", "modelo", "Hola")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("left", ["", "{", "[1]", '"x"', "5"])
def test_a_damaged_tokenizer(fails, receta, broken, name, left):
    broken(lambda folder: (folder / name).write_text(left))
    fails("TOKEN-01", "generate", "modelo", "Hola")


def test_a_tokenizer_without_an_end(fails, receta, broken):
    def change(folder):
        path = folder / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key != "eos_token"}
        path.write_text(json.dumps(kept), encoding="utf-8")

    fails("TOKEN-02", "train", receta, broken(change))


def test_a_tokenizer_without_pad_learns_where_to_stop(receta, questions, tiny):
    from maese.model.load import load_tokenizer, pad_id
    from maese.recipe import Data
    from maese.tokens.batches import IGNORED, collate
    from maese.tokens.prepare import prepare

    shutil.copytree(tiny, "sin")
    make_tokenizer(Path("sin"), pad=False)
    tokenizer = load_tokenizer(Path("sin"))
    end = tokenizer.eos_token_id
    assert pad_id(tokenizer) == end
    rows = prepare(Data(sources=[{"path": "preguntas.txt"}], max_length=128), tokenizer, 128).train[:5]
    batch = collate(rows, pad_id(tokenizer))
    for labels, row in zip(batch["labels"].tolist(), rows, strict=True):
        assert labels[len(row) - 1] == end and set(labels[len(row) :]) <= {IGNORED}


def test_an_adapter_of_another_base(fails, maese, receta):
    make_model(Path("base"))
    assert maese("-qq", "train", receta, "base=base", "method.kind=lora", "output=uno")[0] == 0
    assert maese("generate", "uno", "Hola")[0] == 0
    make_model(Path("base"), seed=1)
    assert "uno/final" in fails("ADAPT-01", "generate", "uno", "Hola")
    fails("ADAPT-01", "compare", "uno", "Hola")


def test_a_target_that_the_model_does_not_have(fails, maese, receta):
    lora = ["method.kind=lora", "output=uno"]
    said = fails("ADAPT-02", "train", receta, *lora, "method.targets=[c_attn, q_proj]")
    assert "q_proj" in said and "c_attn, c_fc, c_proj" in said and not Path("uno").exists()
    assert maese("-qq", *typed(said), *lora)[0] == 0


def test_a_card_that_is_not_there(fails, maese, receta, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = fails("DEVICE-01", "train", receta, "train.device=cuda")
    assert maese("-qq", *typed(said), "output=uno")[0] == 0


def test_rows_longer_than_the_context_of_the_model(fails, maese, receta):
    said = fails("BATCH-01", "train", receta, "data.max_length=500")
    assert "128 como mucho" in said
    assert maese("-qq", *typed(said), "output=uno")[0] == 0


def test_half_a_character_is_written_as_it_can_be(maese, tiny):
    status, out, _ = maese("generate", tiny, "a\udcffb", "--max-new-tokens", "1")
    assert status == 0 and out.startswith("a?b")


def test_a_prompt_that_does_not_fit(fails, tiny):
    assert "menos de 128" in fails("GEN-01", "generate", tiny, "hola " * 200)


# Runs, disk, network and ourselves


def test_a_folder_with_work_in_it_is_never_written_over(fails, maese, receta):
    Path("mio").mkdir()
    kept = put("mio/tesis.txt", "mi vida")
    assert "mio-2" in fails("RUN-01", "train", receta, "output=mio")
    assert [p.name for p in Path("mio").iterdir()] == ["tesis.txt"] and kept.read_text("utf-8") == "mi vida"
    assert "libro.txt-2" in fails("RUN-01", "train", receta, "output=libro.txt")
    assert "receta-2.yaml" in fails("RUN-01", "new", "receta")


@pytest.mark.parametrize("command", ["resume", "report", "compare", "chat"])
@pytest.mark.parametrize("name", ["nada", "**", "runs/nada", ""])
def test_an_unknown_run(fails, maese, receta, command, name):
    Path("runs/2026-01-01-una").mkdir(parents=True)
    if name == "":
        shutil.rmtree("runs")
    said = fails("RUN-02", command, name)
    assert name == "" or "2026-01-01-una" not in said  # without its recipe it is no run
    assert maese(*typed(said))[0] == 0


def test_a_run_that_has_not_ended(fails, maese, receta):
    Path("runs/2026-01-01-mi vida").mkdir(parents=True)
    shutil.copy(receta, "runs/2026-01-01-mi vida/recipe.yaml")
    said = fails("RUN-05", "generate", "mi vida", "Hola")
    assert typed(said) == ["resume", "runs/2026-01-01-mi vida"]
    fails("RUN-05", "compare", "mi vida")
    assert maese("-qq", *typed(said))[0] == 0 and maese("generate", "mi vida", "Hola")[0] == 0


def test_a_folder_that_cannot_be_written(fails, receta, monkeypatch):
    real = Path.mkdir

    def closed(self, *rest, **more):
        if "cerrada" in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", closed)
    assert "cerrada" in fails("DISK-02", "train", receta, "output=cerrada/uno")
    assert "cerrada" in fails("DISK-02", "data", "fix", "libro.txt", "--output", "cerrada/b.txt")


def test_a_file_where_a_folder_should_be(fails, receta):
    fails("DISK-02", "train", receta, "output=libro.txt/uno")
    fails("DISK-02", "data", "fix", "libro.txt", "--output", "receta.yaml/b.txt")


@pytest.fixture
def known(monkeypatch):
    """A text of our own among those known, and `known(answer)` as the network."""
    from maese.text import get

    words = get.words_sha256("Érase una vez.")
    entry = {"address": "https://example.org/uno", "mirrors": ["https://example.org/dos"], "words_sha256": words}
    monkeypatch.setitem(get.TEXTS, "cuento", entry)
    asked = []

    def network(*answers):
        def fetch(address):
            asked.append(address)
            answer = answers[min(len(asked), len(answers)) - 1]
            if isinstance(answer, Exception):
                raise answer
            return answer

        asked.clear()
        monkeypatch.setattr(get, "_fetch", fetch)
        return asked

    return network


GOOD = "\ufeffCabecera\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\nÉrase una\r\nvez.\r\n".encode()


def test_no_network(fails, known):
    from http.client import IncompleteRead

    for failure in (OSError("sin red"), TimeoutError(), IncompleteRead(b"medio")):
        asked = known(failure)
        assert "https://example.org/uno" in fails("NET-01", "data", "get", "cuento")
        assert len(asked) == 2 and not Path("data").exists()


@pytest.mark.parametrize("page", [b"<html>hotel</html>", "<html>Contraseña</html>".encode("cp1252"), GOOD[:-8]])
def test_another_text_than_the_one_known(fails, known, page):
    known(page)
    fails("NET-02", "data", "get", "cuento")
    assert not Path("data").exists()


def test_the_text_that_was_known(maese, known):
    asked = known(OSError("caída"), GOOD)
    status, out, said = maese("data", "get", "cuento", "--folder", "textos/de aquí")
    assert status == 0 and out.strip() == "textos/de aquí/cuento.txt" and len(asked) == 2
    assert Path(out.strip()).read_text("utf-8") == "Érase una\nvez.\n"
    assert said.startswith("Voy a descargar de la red: https://example.org/uno")


def test_a_fault_of_ours_is_told_as_ours(fails, here, monkeypatch):
    def fault(*_):
        raise RuntimeError("la tuerca")

    monkeypatch.setattr("maese.recipe.load", fault)
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    said = fails("BUG-01", "train", "quijote", exit=3)
    detail = Path(re.search(r"está en (\S+)", said).group(1))
    assert "la tuerca" not in said and "RuntimeError: la tuerca" in detail.read_text("utf-8")


# The words themselves


@pytest.mark.parametrize("lang", ["es", "en"])
@pytest.mark.parametrize("code", CODES)
def test_every_code_is_explained(maese, monkeypatch, code, lang):
    monkeypatch.setenv("MAESE_LANG", lang)
    status, out, said = maese("explain", code.lower())
    assert status == 0 and said == "" and out.startswith(f"{code}: ") and len(out) > len(code) + 30
    assert f"error.{code}.title" in catalogue(lang) and f"error.{code}.try" in catalogue(lang)


def test_all_codes_are_listed(maese):
    status, out, _ = maese("explain")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == CODES
