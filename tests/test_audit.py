"""The data doctor: every planted fault is found on its line and nothing else is, and what is mended stays mended."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest

from maese.errors import MaeseError
from maese.recipe import Source
from maese.report.views.doctor import doctor_html, told, verdict
from maese.say import catalogue, say
from maese.terminal_data import report, show_audit
from maese.text import personal
from maese.text.audit import audit
from maese.text.faults import excerpt, faults_of, signs_of
from maese.text.findings import KINDS, histogram, quantiles
from maese.text.mend import in_order, mend
from maese.text.read import open_source
from maese.text.record import Conversation, Document, Message
from maese.text.repair import fixed_name
from maese.text.spanish import english_passage, mixed_address, opening_mark

FIXABLE = ("encoding", "bad_json", "surrogate", "mojibake", "empty_turn", "empty_user", "one_sided", "roles", "control",
           "not_nfc", "bom", "exact_duplicate", "huge_line", "not_text", "empty_text")  # fmt: skip


def turns(*said: str, system: str | None = None) -> str:
    """A row: what the user and the assistant say, in turns."""
    roles = ("user", "assistant") * len(said)
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return json.dumps({"messages": messages}, ensure_ascii=False)


def raw_turns(*pairs: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


def clean_rows(count: int = 60) -> list[str]:
    return [
        turns(f"¿Cuánto son {i} y {i * 7 % 50}?", f"La suma de {i} y {i * 7 % 50} es {i + i * 7 % 50}.")
        for i in range(count)
    ]


THINGS = [
    "río",
    "torre",
    "nube",
    "caballo",
    "puerta",
    "camino",
    "barco",
    "piedra",
    "fuego",
    "huerta",
    "campana",
    "reloj",
]


def prose(count: int, seed: int = 0) -> str:
    """Spanish without a thread: `count` things, none with the words before the same as any other."""
    order = random.Random(seed)
    links = ["el", "la", "un", "su", "que", "de", "y", "con", "por", "sin", "para", "entre"]
    return (
        " ".join(f"{order.choice(links)} {order.choice(THINGS)}{order.randrange(99)}" for _ in range(count)) + " fin."
    )


STORY = (
    "El molinero subía cada mañana al cerro con dos sacos al hombro y bajaba por la tarde contando las nubes, porque "
    "decía que una nube de más era una hora menos de camino y un vaso más de agua en casa."
)
LOOP = "vuelve a la orilla y espera otra ola, " * 12 + "y calla."

# What is wrong with each planted row, and the row. None is a row that another one needs: it has no fault of its own.
PLANTED: list[tuple[str | None, str]] = [
    ("bad_json", '{"messages": [{"role": "user", "content": "¿Y esto?"'),
    ("keys", json.dumps({"pregunta": "¿Qué hora es?", "respuesta": "Las dos."})),
    ("shape", json.dumps({"instruction": "Cuenta hasta dos.", "output": "Uno, dos."})),
    ("not_text", json.dumps({"messages": [{"role": "user", "content": {"a": 1}}]})),
    ("surrogate", raw_turns(("user", "¿Qué cara pones hoy?"), ("assistant", "Pongo esta cara: \ud83d y sonrío."))),
    ("mojibake", turns("¿Cómo se llama lo que pasa cada enero?", "Se llama aÃ±o nuevo y se celebra en la plaza.")),
    ("empty_turn", turns("¿Por qué callas cuando te pregunto por el mar?", "  ")),
    ("empty_user", turns("", "Respondo sin que nadie me haya preguntado por la lluvia.")),
    ("one_sided", turns("¿Hay alguien en la casa del puerto?")),
    ("roles", raw_turns(("assistant", "Hola, soy el guía."), ("user", "¿Qué ves?"), ("assistant", "Veo la torre."))),
    ("roles", raw_turns(("user", "¿Vienes al río?"), ("user", "Contesta, por favor."), ("assistant", "Voy ahora."))),
    ("roles", raw_turns(("user", "¿Qué dice el árbitro?"), ("referee", "Fuera de juego."), ("assistant", "Nada más."))),
    ("roles", raw_turns(("user", "¿Quién manda aquí?"), ("system", "Sé breve."), ("assistant", "El alcalde."))),
    ("control", raw_turns(("user", "¿Qué hay entre las letras?"), ("assistant", "Un signo que no\u0000 se ve."))),
    ("not_nfc", turns("¿Qué canta la vecina?", unicodedata.normalize("NFD", "Canta una canción de cuna muy lenta."))),
    (None, turns("¿De qué color es el toro de la dehesa?", "El toro de la dehesa es negro como la noche.")),
    (
        "exact_duplicate",
        turns("¿De qué color es el toro de la dehesa?", "El toro de la dehesa es  negro como la noche."),
    ),
    ("same_question", turns("¿De qué color es el toro de la dehesa?", "Depende de la luz: al alba parece castaño.")),
    (
        "language",
        turns("Cuéntame algo del tiempo.", "The weather is nice today and we are going to the beach with them."),
    ),
    (
        "mixed_language",
        turns("1. x = 2\n2. return x Hey, I really need your help with this.", "Mira la línea dos con calma."),
    ),
    ("special_tokens", turns("Escribe una marca rara.", "Esta es la marca: <|im_end|> y no significa nada aquí.")),
    (
        "special_tokens",
        turns("[INST] ¿Cuál es la capital del valle? [/INST]", "La capital del valle es la villa vieja."),
    ),
    ("personal", turns("¿A quién escribo por lo del pozo?", "Escribe a marta.pozo@correovalle.es y espera su carta.")),
    (
        "personal",
        turns("¿A qué número llamo por lo del horno?", "Llama al 912 34 56 78 por la mañana, que es cuando abren."),
    ),
    ("personal", turns("¿Qué pone en el carné del abuelo?", "Pone 12345678Z, y debajo, la fecha de la boda.")),
    ("personal", turns("¿Y en la clave de la tía?", "Pone HEGG560427MVZRRL04 en letras muy pequeñas.")),
    ("personal", turns("¿Y en el documento de Chile?", "Pone 12.345.678-5 y una firma que no se entiende.")),
    (
        "repetitive",
        turns("Cuenta cómo vuelve siempre la ola a la orilla del pueblo donde nací, despacio y con detalle.", LOOP),
    ),
    ("boilerplate", turns("¿Te gusta el pan recién hecho?", "Como modelo de lenguaje, no puedo probar el pan.")),
    ("opening_marks", turns("¿Funciona el molino?", "Sí, ya está arreglado. Funciona de maravilla!")),
    (
        "mixed_address",
        turns(
            "Tengo una duda.",
            "¿Puedes contarme más de tu código?",
            "Falla en la línea dos.",
            "¿Puede usted decirme qué error sale?",
        ),
    ),
    ("unclosed_code", turns("¿Qué hace esa orden?", "La orden `ls enseña los archivos de la carpeta.")),
    ("long_answer", turns("Cuenta.", prose(90))),
    (
        "cut_answer",
        turns(
            "Resume la historia del molinero que subía al cerro cada mañana con sus sacos.",
            STORY + " Y cuando llegaba el invierno guardaba los sacos y se iba con",
        ),
    ),
    ("unanswered", turns("¿Qué es un dique?", "Un dique es un muro contra el agua.", "¿Y quién lo levantó?")),
    (
        "too_long",
        turns(
            "Copia esta cuenta de la vieja, número a número y sin saltarte ninguno, por favor.",
            " ".join(map(str, range(1000, 1300))) + ".",
        ),
    ),
    (
        "eval_leak",
        turns("¿Cuántas campanas tiene la torre del reloj viejo?", "La torre tiene cuatro campanas y un cuco."),
    ),
    (None, turns("Cuenta la historia del molinero, la que contaba mi padre en la cocina.", STORY)),
    ("leak", turns("Cuenta la historia del molinero, la que contaba mi padre en la cocina.", STORY.replace(",", ";"))),
]
ROWS = 30  # clean ones before the first fault
PROMPT = "¿Cuántas campanas tiene la torre del reloj viejo?"


@dataclass
class Words:
    """Stands for a renderer's example: a token a word, those of the assistant learnt."""

    ids: list[int]
    mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return sum(self.mask)


def words(items) -> list[Words]:
    rows = []
    for item in items:
        messages = item.messages if isinstance(item, Conversation) else (Message("assistant", item.text),)
        mask = [int(m.role == "assistant") for m in messages for _ in m.content.split()]
        rows.append(Words(list(range(len(mask))), mask))
    return rows


def look(path: str | Path, **options):
    return audit(open_source(Source(path=str(path))), **{"lengths": words, **options})


def found(result) -> dict[str, list[int]]:
    return {finding.kind: finding.lines for finding in result.findings}


def write(path: Path, rows: list[str], encoding: str = "utf-8") -> Path:
    path.write_bytes(("\n".join(rows) + "\n").encode(encoding, "surrogatepass"))
    return path


def planted(folder: Path) -> tuple[Path, dict[str, list[int]]]:
    rows = clean_rows(ROWS)
    expected: dict[str, list[int]] = {}
    for kind, row in PLANTED:
        rows.append(row)
        if kind:
            expected.setdefault(kind, []).append(len(rows))
    rows += clean_rows(60)[ROWS:]
    path = write(folder / "planted.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf" + path.read_bytes())
    return path, {**expected, "bom": [1]}


def test_thirty_faults_and_more_are_each_found_on_their_line_and_nothing_else(here):
    path, expected = planted(here)
    leaked = expected["leak"][0]
    # What is kept apart here is one row, so that its like is in what is learnt.
    result = look(path, limit=200, prompts=[PROMPT], held=lambda item: item.meta["line"] == leaked)
    # The same story told again is, besides, the same question with another answer.
    expected["same_question"] = sorted([*expected["same_question"], leaked])
    assert sum(map(len, expected.values())) >= 30
    assert found(result) == expected
    assert {f.kind: f.count for f in result.findings} == {kind: len(lines) for kind, lines in expected.items()}
    assert all(f.severity == KINDS[f.kind] for f in result.findings if f.kind != "too_long")
    assert {f.severity for f in result.findings if f.kind == "too_long"} == {"error"}
    labels = {f.kind: f.facts["labels"] for f in result.findings if "labels" in f.facts}
    assert labels["personal"] == {"email": 1, "phone": 1, "dni": 1, "curp": 1, "rut": 1}
    assert labels["roles"] == {"starts": 1, "twice": 1, "unknown": 1, "system": 1}
    assert result.rows == ROWS * 2 + len(PLANTED) - 4  # four could not be read


def test_a_clean_file_has_no_finding_at_all(here):
    result = look(
        write(here / "clean.jsonl", clean_rows()),
        limit=100,
        prompts=[PROMPT],
        near=True,
        held=lambda item: item.meta["line"] % 9 == 0,
    )
    assert result.findings == []
    assert (result.health, result.faulty, result.rows) == ("good", {}, 60)
    assert verdict(result) == "Salud: BUENA, sin ningún aviso"


def test_a_clean_text_has_no_finding_at_all(here):
    lines = [prose(20, i) for i in range(150)]
    result = look(write(here / "libro.txt", lines))
    assert result.findings == []
    assert (result.rows, result.units) == (1, 150)


def test_faults_of_a_raw_text_are_on_their_lines(here):
    lines = [f"Canción {prose(20, i)}" for i in range(150)]
    lines[9] += " aÃ±o"
    lines[19] += "\x00"
    lines[29] += " pregunta a ines@vallealto.es"
    lines[39] = unicodedata.normalize("NFD", lines[39])
    lines[49] += " <|endoftext|> </s>"
    result = look(write(here / "libro.txt", lines))
    assert found(result) == {
        "mojibake": [10],
        "control": [20],
        "personal": [30],
        "not_nfc": [40],
        "special_tokens": [50],
    }
    assert result.faulty == {10: "mojibake"}


def test_faults_of_texts_in_rows_are_on_the_line_of_their_row(here):
    rows = [json.dumps({"text": f"Uno.\n\nLa canción {prose(60, i)}\nDos."}, ensure_ascii=False) for i in range(60)]
    rows[7] = json.dumps({"text": f"La canción {prose(60, 99)}\n\nEscribe a ines@vallealto.es\n"}, ensure_ascii=False)
    result = look(write(here / "a.jsonl", rows))
    assert (found(result), result.units) == ({"personal": [8]}, 60)


def test_the_row_to_look_at_is_counted_as_commands_count(here):
    blocks = [f"###\nPregunta: ¿Cuánto son {i} y dos?\nRespuesta: Son {i + 2} en total." for i in range(60)]
    blocks[9] = "###\nPregunta: ¿Quién es?\nRespuesta: Es ines@vallealto.es y vive allí."
    result = look(write(here / "a.txt", [*blocks, "###"]))
    assert found(result) == {"personal": [29]}
    assert told(result.findings[0], result).repair.endswith("--row 10")


def test_a_file_in_another_encoding_is_one_finding(here):
    result = look(write(here / "viejo.jsonl", clean_rows(), "cp1252"))
    assert found(result) == {"encoding": [1]}
    assert result.health == "bad"


def test_a_huge_line_is_told_and_passed_over(here):
    rows = clean_rows()
    rows.insert(5, turns("Di la letra a.", "a" * (17 * 2**20)))
    assert found(look(write(here / "largo.jsonl", rows))) == {"huge_line": [6]}


def test_a_table_with_cells_that_do_not_fit(here):
    rows = ["prompt,completion", *(f"¿Cuánto son {i} y dos?,Son {i + 2} en total." for i in range(60)), "uno,dos,tres"]
    assert found(look(write(here / "tabla.csv", rows))) == {"cells": [62]}


def test_rows_all_equal_and_few_rows(here):
    same = look(write(here / "igual.jsonl", [clean_rows(1)[0]] * 60))
    assert [f.kind for f in same.findings] == ["all_equal"]
    assert (same.health, len(found(same)["all_equal"])) == ("bad", 60)
    one = look(write(here / "una.jsonl", clean_rows(1)))
    assert [(f.kind, f.severity) for f in one.findings] == [("few_rows", "error")]
    few = look(write(here / "pocas.jsonl", clean_rows(49)))
    assert [(f.kind, f.severity) for f in few.findings] == [("few_rows", "warning")]
    assert look(write(here / "bastan.jsonl", clean_rows(50))).findings == []
    assert [f.kind for f in look(write(here / "corto.txt", ["Poca cosa es esta."])).findings] == ["little_text"]


def test_one_answer_to_many_questions(here):
    rows = [*clean_rows(60), *(turns(f"¿Vendrás a la hora {i}?", "Claro que sí, allí estaré.") for i in range(21))]
    assert found(look(write(here / "s.jsonl", rows))) == {"same_answer": list(range(61, 82))}
    assert found(look(write(here / "n.jsonl", rows[:-1]))) == {}


def test_near_duplicates_only_when_asked(here):
    other = STORY.replace("dos sacos", "tres sacos").replace("una hora", "un rato")
    rows = [*clean_rows(), turns("Cuenta lo del molinero.", STORY), turns("Cuenta lo del molinero.", other)]
    path = write(here / "n.jsonl", rows)
    assert "near_duplicate" not in found(look(path))
    assert found(look(path, near=True))["near_duplicate"] == [62]


def test_what_the_template_makes_of_a_row(here):
    path = write(here / "t.jsonl", clean_rows())

    def without_one(items):
        return [Words(row.ids, [0] * len(row)) if i == 4 else row for i, row in enumerate(words(items))]

    assert found(look(path, lengths=without_one)) == {"nothing_to_learn": [5]}

    def ending(items):
        return [Words([*row.ids[:-1], 7 if i == 2 else 99], row.mask) for i, row in enumerate(words(items))]

    assert found(look(path, lengths=ending, stop_ids=frozenset({99}))) == {"lost_end": [3]}
    assert look(path, lengths=ending, stop_ids=frozenset({99})).faulty == {3: "lost_end"}


def test_too_long_says_the_length_that_would_fit(here):
    rows = [*clean_rows(99), turns("Cuenta hasta cien.", " ".join(map(str, range(100))) + ".")]
    result = look(write(here / "l.jsonl", rows), limit=50, too_long="drop")
    (long,) = (f for f in result.findings if f.kind == "too_long")
    size = 3 + 100
    assert (long.severity, long.lines, long.facts["longest"], long.facts["tokens"]) == (
        "warning",
        [100],
        size,
        size - 50,
    )
    assert look(here / "l.jsonl", limit=50, too_long="split").findings == []
    assert result.tokens == sum(len(w) for w in words(open_source(Source(path=str(here / "l.jsonl")))))
    assert 100 not in result.faulty  # `data.too_long` decides about it


def test_a_tokenizers_own_specials_count_as_marks(here):
    rows = [*clean_rows(), turns("¿Qué pone?", "Pone ‹fin› y nada más que eso en la pared.")]
    path = write(here / "m.jsonl", rows)
    assert found(look(path, specials=["‹fin›", "<|end|>"])) == {"special_tokens": [61]}
    assert found(look(path)) == {}


def test_rows_that_ask_for_a_translation_may_be_in_two_languages(here):
    asked = turns("Traduce al inglés: «El perro duerme».", "The dog is sleeping and it will not wake up for anyone.")
    assert found(look(write(here / "t.jsonl", [*clean_rows(), asked]))) == {}


def test_the_report_as_data_says_its_version_and_cuts_long_lists(here, monkeypatch):
    monkeypatch.setattr("maese.text.findings.MOST_LINES", 5)
    rows = [*clean_rows(60), *(turns(f"¿Vendrás a la hora {i}?", "Claro que sí, allí estaré.") for i in range(21))]
    plain = json.loads(json.dumps(look(write(here / "s.jsonl", rows)).json()))
    (finding,) = plain["findings"]
    assert (plain["schema"], finding["count"], len(finding["lines"]), finding["cut"]) == (1, 21, 5, True)


def test_nothing_of_a_row_is_kept_but_its_hashes(here, monkeypatch):
    """A thousand times the rows may not cost a thousand times the memory of their text."""
    import tracemalloc

    monkeypatch.setattr("maese.text.audit.BATCH_CHARACTERS", 2**14)
    answer = prose(900)
    rows = [turns(f"¿Qué dice la carta número {i}?", f"Carta {i}: {answer} {i}.") for i in range(150)]
    path = write(here / "m.jsonl", rows)
    text = path.stat().st_size
    reading = open_source(Source(path=str(path)))
    audit(open_source(Source(path=str(write(here / "uno.jsonl", rows[:1])))))
    tracemalloc.start()
    audit(reading)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < text / 3


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ana.gil+taller@correo.com.mx", "email"), ("+34 612 34 56 78", "phone"), ("+525512345678", "phone"),
        ("(011) 4321-1234", "phone"), ("móvil: 612345678", "phone"), ("celular 300 123 4567", "phone"),
        ("12345678Z", "dni"), ("X1234567L", "nie"), ("HEGG560427MVZRRL04", "curp"), ("12.345.678-5", "rut"),
        ("12345678-5", "rut"), ("4111 1111 1111 1111", "card"), ("378282246310005", "card"),
        ("ES91 2100 0418 4502 0005 1332", "iban"), ("DE89370400440532013000", "iban"),
    ],
)  # fmt: skip
def test_personal_data_are_found_where_they_are(text, kind):
    found = personal.find(f"Dice: {text}, y se va.")
    assert [name for name, _, _ in found] == [kind]
    _, start, end = found[0]
    assert f"Dice: {text}, y se va."[start:end] in text
    assert f"Dice: {text}, y se va."[start:end][2:] not in personal.hidden(f"Dice: {text}, y se va.")


@pytest.mark.parametrize(
    "text",
    ["12345678A", "X1234567A", "HEGG560427MVZRRL05", "12.345.678-4", "4111 1111 1111 1112",
     "ES92 2100 0418 4502 0005 1332", "1.234.567,89 euros", "600.123.456 habitantes", "de 1999 a 2003",
     "ISBN 978-84-376-0494-7", "192.168.100.200", "2026-11-21 10:30:00", "3.14159265358979", "git@github.com",
     "nombre@ejemplo.com", "icono@2x.png", "@decorador", "20080102-3", "10.1234/j.2020.123456"],
)  # fmt: skip
def test_what_only_looks_like_personal_data_is_left_in_peace(text):
    assert personal.find(f"Dice: {text}, y se va.") == []


def test_marks_nobody_opened_and_marks_inside_code():
    assert opening_mark("Funciona bien! ¿Y ahora?") == 13
    assert opening_mark("¿Qué? ¡No!, dijo. ¡¿Cómo?!") is None
    assert opening_mark("Usa `a != b?` y ```\nif x?: y!\n``` o https://a.es/b?c=1") is None


def test_english_is_a_passage_and_not_a_title_nor_code():
    assert english_passage("return b Hey, I really need your help.") == 9
    assert english_passage("Leí «The Lord of the Rings» y lo que vino después.") is None
    assert english_passage("for i in range(3):  # this is what you want\n    help(x)") is None


def test_the_manner_of_address_changes_or_not():
    assert mixed_address(["¿Qué ves tú?", "¿Puede decirme usted más?"]) == (1, 0)
    assert mixed_address(["¿Puedes decirme qué ves?", "¿Crees que tu código está bien?"]) is None


def test_faults_of_a_row_alone():
    def kinds(*pairs):
        return [f.kind for f in faults_of(Conversation(tuple(Message(*pair) for pair in pairs), "a#1"))]

    assert kinds(("system", "Sé breve."), ("user", "¿Y?"), ("assistant", "Sí.")) == []
    assert kinds(("assistant", "Sí.")) == ["one_sided"]
    assert kinds() == ["one_sided"]
    assert kinds(("user", " "), ("assistant", "")) == ["empty_user", "empty_turn"]
    assert [f.kind for f in faults_of(Document(" \n", "a#1"))] == ["empty_text"]
    assert [f.label for f in signs_of(Document("Escribe a ana@valle.es y a eva@valle.es.", "a#1"), "es")] == [
        "email",
        "email",
    ]


def test_an_excerpt_shows_the_fault_and_obeys_nothing():
    text, at = excerpt("x" * 500 + "\x1b[31m\x00 aquí" + "y" * 500, 500)
    assert len(text) <= 120 and "\x1b" not in text and "\x00" not in text
    assert text[at + 1 :].startswith("[31m")
    assert excerpt("escribe a ana@correo.es", 10) == ("escribe a an•••••••••••", 10)
    assert "ana" not in excerpt("z" * 300 + " ana@correo.es", 306)[0]


def test_the_histogram_counts_everyone_once():
    sizes = sorted([3, 7, 7, 40, 41, 99, 5000])
    for limit in (None, 64, 10_000):
        bars = histogram(sizes, limit)
        assert sum(count for _, _, count in bars) == len(sizes)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bars))
    assert histogram([], 5) == []
    assert quantiles(list(range(1, 101))) == {"p50": 51, "p90": 91, "p99": 100, "max": 100}


# The two faces


def test_the_terminal_fits_eighty_columns_and_says_all(here, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    path, _ = planted(here)
    result = look(path.name, limit=200, prompts=[PROMPT])
    lines = report(result)
    commands = [line for line in lines if line.startswith(f"    {say('doctor.try')}: ")]
    assert all(len(line) <= 80 for line in lines if line not in commands)
    assert len(commands) == len(result.findings)
    assert lines[1].startswith("Salud: MALA con ") and " errores" in lines[1]
    assert any("límite 200" in line for line in lines)
    show_audit(result, quiet=2)
    assert capsys.readouterr().out == lines[1] + "\n"
    show_audit(result, json=True)
    assert json.loads(capsys.readouterr().out)["health"] == "bad"


def test_a_console_with_few_signs_gets_plain_ones(here, monkeypatch):
    import io
    import sys

    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", console)
    show_audit(look(planted(here)[0], limit=200))
    console.flush()
    shown = console.buffer.getvalue().decode("cp1252")
    assert "\n  x " in shown and "#" in shown and "?" not in shown.split("Salud")[0]


@pytest.mark.parametrize("lang", ["es", "en"])
def test_the_page_escapes_asks_for_nothing_and_has_every_finding(here, monkeypatch, lang):
    monkeypatch.setenv("MAESE_LANG", lang)
    rows = [*clean_rows(), turns("¿Qué pone?", "<script>alert(1)</script> <|im_end|> y ya está todo dicho.")]
    result = look(write(here / "<b>.jsonl", rows), limit=5)
    page = doctor_html(result)
    assert f'<html lang="{lang}"' in page and "<script" not in page and "<b>.jsonl" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert all(told(finding, result).title.split("{")[0][:20] in page for finding in result.findings)
    assert page.count("<rect") == len(result.histogram)


@pytest.mark.parametrize("lang", ["es", "en"])
def test_every_kind_has_its_words(lang):
    words = catalogue(lang)
    for kind in KINDS:
        assert f"finding.{kind}.title" in words or f"finding.{kind}.title.other" in words
        assert words[f"finding.{kind}.why"] and words[f"finding.{kind}.repair"].startswith("maese ")


# Mending


def names(path: Path) -> tuple[Path, Path, Path]:
    return path, Path(f"{path}.diff"), Path(f"{path}.dropped.jsonl")


def test_what_is_mended_has_none_of_the_faults_that_can_be(here):
    path, expected = planted(here)
    before = path.read_bytes()
    done = mend(str(path), here / "new.jsonl")
    assert path.read_bytes() == before
    left = found(look(here / "new.jsonl", limit=200))
    assert not set(left) & set(FIXABLE)
    assert {"shape", "personal", "opening_marks"} <= set(left)  # these take a person
    assert done.dropped == {
        "bad_json": 1, "not_text": 1, "empty_turn": 1, "empty_user": 1, "one_sided": 1, "roles": 2,
        "exact_duplicate": 1, "keys": 1,
    }  # fmt: skip
    assert done.changed == {"bom": 1, "surrogate": 1, "mojibake": 1, "roles": 2, "control": 1, "not_nfc": 1}
    kept = [json.loads(line) for line in (here / "new.jsonl").read_text("utf-8").splitlines()]
    assert done.kept == len(kept) == ROWS * 2 + len(PLANTED) - 9
    dropped = [json.loads(line) for line in names(here / "new.jsonl")[2].read_text("utf-8").splitlines()]
    assert [row["line"] for row in dropped if row["reason"] == "bad_json"] == expected["bad_json"]
    assert "Se llama año nuevo" in (here / "new.jsonl").read_text("utf-8")


def test_mending_what_was_mended_changes_nothing(here):
    path, _ = planted(here)
    mend(str(path), here / "one.jsonl")
    again = mend(str(here / "one.jsonl"), here / "two.jsonl")
    assert (here / "one.jsonl").read_bytes() == (here / "two.jsonl").read_bytes()
    assert (again.changed, again.dropped, again.dropped_to) == ({}, {}, None)
    assert len(names(here / "two.jsonl")[1].read_text("utf-8").splitlines()) == 2  # the two names, and no difference
    assert not names(here / "two.jsonl")[2].exists()


def test_the_difference_applied_to_the_old_file_gives_the_new_one(here):
    rows = [turns("¿Y?", "Sí."), turns("¿Qué aÃ±o es?", "Este."), turns("¿Y?", "Sí."), turns("¿Fin?", "Fin.")]
    mend(str(write(here / "a.jsonl", rows)), here / "b.jsonl")
    lines = (here / "b.jsonl.diff").read_text("utf-8").splitlines()[2:]
    old = rows.copy()
    for i, line in enumerate(lines):
        if line.startswith("@@"):
            number = int(line.split("-")[1].split(",")[0])
            assert lines[i + 1] == f"-{old[number - 1]}"
            old[number - 1] = lines[i + 2][1:] if i + 2 < len(lines) and lines[i + 2].startswith("+") else ""
    assert [line for line in old if line] == (here / "b.jsonl").read_text("utf-8").splitlines()


def test_a_text_in_another_encoding_is_mended_line_by_line(here):
    (here / "a.txt").write_bytes(
        "\ufeffaño de nieves\n".encode() + "año de bienes\n".encode("cp1252") * 20 + b"fin\x00\n"
    )
    done = mend(str(here / "a.txt"), here / "b.txt")
    assert (here / "b.txt").read_text("utf-8") == "año de nieves\n" + "año de bienes\n" * 20 + "fin\n"
    assert done.changed == {"bom": 1, "encoding": 20, "control": 1} and done.dropped == {}
    assert "-a�o de bienes\n+año de bienes" in (here / "b.txt.diff").read_text("utf-8")


def test_blocks_without_an_answer_are_dropped_whole(here):
    good = "Pregunta: ¿Qué es un río?\nRespuesta: Agua que anda."
    (here / "a.txt").write_text(f"###\n{good}\n###\nPregunta: ¿Y un lago?\n###\n{good}\n###\n", "utf-8")
    done = mend(str(here / "a.txt"), here / "b.txt")
    assert done.dropped == {"one_sided": 1, "exact_duplicate": 1}
    assert len(list(open_source(Source(path=str(here / "b.txt"))))) == 1
    mend(str(here / "b.txt"), here / "c.txt")
    assert (here / "c.txt").read_bytes() == (here / "b.txt").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_tables_and_arrays_become_rows(here, suffix):
    path = here / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("prompt,completion,autor\n¿Uno?,aÃ±o,Eva\n¿Dos?,,Luz\n¿Tres?,Sí,Ana\n", "utf-8")
    else:
        rows = [("¿Uno?", "aÃ±o", "Eva"), ("¿Dos?", "", "Luz"), ("¿Tres?", "Sí", "Ana")]
        path.write_text(
            json.dumps([dict(zip(("prompt", "completion", "autor"), r, strict=True)) for r in rows]), "utf-8"
        )
    output = Path(fixed_name(str(path)))
    done = mend(str(path), output)
    assert output.name == "a.fixed.jsonl"
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == [
        {"prompt": "¿Uno?", "completion": "año", "autor": "Eva"},
        {"prompt": "¿Tres?", "completion": "Sí", "autor": "Ana"}
    ]  # fmt: skip
    assert done.dropped == {"empty_turn": 1}


def test_only_what_was_asked_for_is_repaired(here):
    rows = [turns("¿Qué aÃ±o es?", "Este."), turns("¿Y?", "")]
    done = mend(str(write(here / "a.jsonl", rows)), here / "b.jsonl", only={"mojibake"})
    assert (done.changed, done.dropped) == ({"mojibake": 1}, {})
    assert len((here / "b.jsonl").read_text("utf-8").splitlines()) == 2


@pytest.mark.parametrize("there", ["b.jsonl", "b.jsonl.diff", "b.jsonl.dropped.jsonl"])
def test_mending_writes_over_nothing(here, there):
    path = write(here / "a.jsonl", clean_rows(2))
    (here / there).write_text("mío")
    with pytest.raises(MaeseError) as problem:
        mend(str(path), here / "b.jsonl")
    assert (problem.value.code, problem.value.facts["free"]) == ("RUN-01", str(here / "b-2.jsonl"))
    assert (here / there).read_text() == "mío" and len(list(here.iterdir())) == 2


def test_turns_put_in_order():
    def row(*pairs):
        return [{"role": role, "content": content} for role, content in pairs]

    assert in_order(row(("user", "a"), ("user", "b"), ("assistant", "c"))) == row(
        ("user", "a\n\nb"), ("assistant", "c")
    )
    assert in_order(row(("system", "s"), ("assistant", "x"), ("user", "a"), ("assistant", "c"))) == row(
        ("system", "s"), ("user", "a"), ("assistant", "c")
    )
    good = row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert in_order(good) == good
