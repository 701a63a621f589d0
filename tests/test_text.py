"""From bytes to documents: what is cleaned is told, what is limited is counted, what is kept apart is never seen."""

from __future__ import annotations

import hashlib
import unicodedata

import pytest

from maese.recipe import Source
from maese.text import split
from maese.text.read import open_source, text_or_blocks
from maese.text.record import Conversation, Document, Message
from maese.text.repair import decode, fixed_name, normalise, strip_gutenberg


def read(**source):
    """A source read whole: what was said of it, and its items."""
    reading = open_source(Source(**source))
    return reading, list(reading)


BOOK = """The Project Gutenberg eBook of Libro

Title: Libro
*** START OF THE PROJECT GUTENBERG EBOOK LIBRO ***

Produced by Ana and
the volunteers of the place

CAPÍTULO PRIMERO

En un lugar, de cuyo nombre no me acuerdo.

*** END OF THE PROJECT GUTENBERG EBOOK LIBRO ***
This is the licence, and it is long.
"""


def names(notes) -> list[str]:
    return [key for key, _ in notes]


def test_clean_text_is_left_alone_and_says_nothing():
    text = "¿Qué? ¡Año nuevo! «Pingüino» — fin…\n\n  sangrado\tcon tabulador\n"
    assert decode(text.encode(), "f.txt") == (text, [])


def test_every_change_leaves_a_note():
    loose = unicodedata.normalize("NFD", "canción")
    text, notes = decode(b"\xef\xbb\xbf" + f"{loose}\r\nuno\x00\x07\rdos".encode(), "f.txt")
    assert text == "canción\nuno\ndos"
    assert names(notes) == ["data.note.bom", "data.note.nfc", "data.note.control"]
    assert notes[2][1] == {"count": 2}


def test_line_ends_become_one_kind():
    assert normalise("a\r\nb\rc\nd", [])[0] == "a\nb\nc\nd"


@pytest.mark.parametrize("word", ["Ã la carte no: À", "São Paulo", "Âmbar", "NIÑO", "€uro", "Ã"])
def test_letters_that_only_look_broken_are_accepted(word):
    assert decode(word.encode(), "f.txt")[0] == word


def test_header_licence_and_credits_of_gutenberg_are_taken_off():
    body, notes = strip_gutenberg(BOOK, [])
    assert body == "CAPÍTULO PRIMERO\n\nEn un lugar, de cuyo nombre no me acuerdo."
    assert names(notes) == ["data.note.gutenberg"]
    assert notes[0][1]["lines"] == BOOK.count("\n") - body.count("\n")


@pytest.mark.parametrize(
    "mark", ["***START OF THIS PROJECT GUTENBERG EBOOK X***", "*** START OF THE PROJECT GUTENBERG X"]
)
def test_older_marks_and_a_missing_end(mark):
    assert strip_gutenberg(f"cabecera\n{mark}\n\nTexto.\n", [])[0] == "Texto."


def test_a_text_that_is_not_of_gutenberg_is_left_alone():
    text = "Se habla del Project Gutenberg aquí.\nEnd of Project Gutenberg\n"
    assert strip_gutenberg(text, []) == (text, [])


def test_a_book_of_gutenberg_read_whole(here):
    (here / "pg.txt").write_text(BOOK, encoding="utf-8")
    reading, (document,) = read(path="pg.txt")
    assert document.text.startswith("CAPÍTULO") and names(reading.notes) == ["data.note.gutenberg"]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("###\nPregunta: a\nRespuesta: b\n###", "qa"),
        ("  ###  \n  pregunta : a\n", "qa"),
        ("### Título\nPregunta: a", "text"),
        ("Pregunta: a\nRespuesta: b", "text"),
        ("###\nhola\n###", "text"),
    ],
)
def test_the_shape_is_told_by_marks_and_labels(text, shape):
    assert text_or_blocks(text) == shape


def test_limit_counts_lines_that_say_something(here):
    (here / "t.txt").write_text("\n\nuno\n\n\ndos\n   \ntres\ncuatro\n", encoding="utf-8")
    assert read(path="t.txt", limit=2)[1][0].text == "uno\n\n\ndos"
    assert read(path="t.txt", limit=3)[1][0].text.endswith("tres")
    assert read(path="t.txt", limit=99)[1][0].text.endswith("cuatro")
    lines = read(path="t.txt", limit=3, documents="line")[1]
    assert [(d.text, d.id) for d in lines] == [("uno", "t.txt#3"), ("dos", "t.txt#6"), ("tres", "t.txt#8")]


def test_questions_and_answers_of_several_lines(here):
    text = "###\nPregunta: ¿Quién\nes?\nRESPUESTA:\nUn hidalgo.\n\n  Con lanza.\n\n###\n\n\nPregunta: b\nRespuesta: c\n"
    (here / "q.txt").write_text(text, encoding="utf-8")
    _, (one, other) = read(path="q.txt")
    assert [m.role for m in one.messages] == ["user", "assistant"]
    assert one.messages[0].content == "¿Quién\nes?" and one.messages[1].content == "Un hidalgo.\n\n  Con lanza."
    assert (one.id, other.id) == ("q.txt#2", "q.txt#12") and other.messages[1].content == "c"


def test_limit_counts_blocks_of_a_question_file(questions):
    assert len(read(path=str(questions), limit=7)[1]) == 7


def test_the_facts_of_a_file_are_enough_to_know_it_again(book, questions):
    raw = book.read_bytes()
    reading, (document,) = read(path="libro.txt")
    assert reading.facts() == {
        "path": "libro.txt", "format": "text", "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw),
        "documents": 1, "characters": len(document.text), "notes": [],
    }  # fmt: skip
    facts = read(path="preguntas.txt")[0].facts()
    assert facts["documents"] == 60 and facts["format"] == "qa" and facts["characters"] > 60 * 10


def test_the_name_of_a_mended_copy():
    assert fixed_name("a/b.c.txt") == "a/b.c.fixed.txt" and fixed_name("a/b.csv.gz") == "a/b.fixed.jsonl"


def lines(n: int) -> list[Document]:
    return [Document("".join(f"Línea número {i}.\n" for i in range(n)).strip(), "libro#1")]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_what_is_kept_apart_is_the_end_of_the_text_in_one_piece(share):
    document = lines(200)[0]
    (train,), (held,) = split.tail([document], share)
    assert f"{train.text}\n{held.text}" == document.text
    assert not {*train.text.splitlines()} & {*held.text.splitlines()}
    assert len(held.text) / len(document.text) == pytest.approx(share, abs=0.01)


def test_a_text_of_one_line_is_cut_between_words():
    words = " ".join(f"palabra{i}" for i in range(100))
    (train,), (held,) = split.tail([Document(words, "a")], 0.1)
    assert f"{train.text} {held.text}" == words and 8 <= len(held.text.split()) <= 12


def test_documents_of_a_line_go_whole_to_one_side():
    rows = [Document(f"fila {i}", str(i)) for i in range(50)]
    train, held = split.tail(rows, 0.1)
    assert train + held == rows and len(held) == 5


def test_no_share_keeps_all():
    assert split.tail(lines(5), 0) == (lines(5), [])
    assert by_hash(ask(range(5)), 0) == (ask(range(5)), [])


def by_hash(rows, share, column=None):
    places = [split.place(row, column) for row in rows]
    cut = split.cut_at(share, min(places))
    sides = [[r for r, p in zip(rows, places, strict=True) if (p <= cut) == held] for held in (False, True)]
    return sides[0], sides[1]


def ask(numbers) -> list[Conversation]:
    return [Conversation((Message("user", f"¿Cuánto es {n}?"), Message("assistant", "Eso.")), str(n)) for n in numbers]


def test_a_question_falls_on_the_same_side_whatever_is_added():
    few, many = by_hash(ask(range(200)), 0.1), by_hash(ask(reversed(range(600))), 0.1)
    assert {c.id for c in few[1]} == {c.id for c in many[1] if int(c.id) < 200}
    assert not {c.id for c in many[0]} & {c.id for c in many[1]} and sum(map(len, many)) == 600
    assert 0.05 < len(many[1]) / 600 < 0.15
    # More share only adds to what was apart.
    assert {c.id for c in many[1]} <= {c.id for c in by_hash(ask(range(600)), 0.2)[1]}


def test_the_same_question_written_otherwise_is_the_same():
    def place(text):
        return bool(by_hash([Conversation((Message("user", text),), "x")], 0.5)[1])

    for i in range(20):
        assert place(f"¿Qué es {i}?") == place(f"  ¿qué   ES {i}?\n")


def test_something_is_always_kept_apart():
    """One line that is half the book, or a file of few questions, are no reason for measuring on nothing."""
    text = "\n".join(f"Párrafo {i} de pocas palabras." for i in range(11)) + "\n" + "una palabra tras otra " * 60
    train, held = split.tail([Document(text, "1")], 0.1)
    assert train and held and 0.05 < len(held[0].text) / len(text) < 0.2
    for n in range(2, 30):
        rows = [Conversation((Message("user", f"¿{n}-{i}?"), Message("assistant", "sí")), str(i)) for i in range(n)]
        train, held = by_hash(rows, 0.1)
        assert train and held and len(train) + len(held) == n


def test_rows_of_an_author_are_never_parted():
    rows = [Document(f"poema {i}", str(i), {"author": f"Autora {i % 20}"}) for i in range(200)]
    train, held = by_hash(rows, 0.2, "author")
    assert train and held and not {r.meta["author"] for r in train} & {r.meta["author"] for r in held}


def test_a_system_turn_does_not_put_all_on_one_side():
    def with_system(row):
        return Conversation((Message("system", "Eres un tutor."), *row.messages), row.id)

    plain, same = by_hash(ask(range(300)), 0.1), by_hash([with_system(row) for row in ask(range(300))], 0.1)
    assert [r.id for r in plain[1]] == [r.id for r in same[1]] and 10 < len(same[1]) < 60
