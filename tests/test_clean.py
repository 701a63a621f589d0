"""Each reason with a text that earns it and one like it that does not; languages told apart, code never judged."""

import random
import sys
import time

import pytest

from maese.errors import MaeseError
from maese.say import has
from maese.text import clean, language
from maese.text.clean import ANSWER, DOCUMENT, RULES, length, reason, reason_name, reason_to_drop, repetition, symbols
from maese.text.language import language_of
from maese.text.record import Conversation, Document, Message

PROSE = (
    "La mañana en que se abrió la feria llovía sobre el mercado, y nadie quiso montar su puesto hasta que el alcalde"
    " bajó con un paraguas roto a pedirlo por favor. Entonces salieron los primeros: un alfarero con sus cántaros,"
    " dos hermanas que vendían miel de romero y el cestero de siempre, que hablaba solo. A mediodía ya olía a pan"
    " recién hecho y a cuero mojado. ¿Quién iba a pensar en el frío? Los niños corrían entre los toldos buscando al"
    " titiritero, y más de uno volvió a casa sin un zapato."
)


def talk(*said: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(said)), id="1")


def test_good_prose_passes_every_rule():
    assert reason_to_drop(PROSE, [*RULES]) is None
    assert reason_to_drop(f"{PROSE}\n\n{PROSE[:200]}", ["length", "symbols", "language"]) is None


@pytest.mark.parametrize(
    "text, why",
    [
        (" ".join(PROSE.split()[:49]), "too_short"),
        (" ".join(PROSE.split()[:50]), None),
        ("de " * 100_001, "too_long_text"),
    ],
)
def test_length_counts_words(text, why):
    assert length(text) == why


def lines(different: int, repeated: int) -> str:
    own = [f"Línea {i}: {' '.join(PROSE.split()[i * 3 : i * 3 + 6])}" for i in range(different)]
    return "\n".join([*own, *["Suscríbete y comparte."] * (repeated + 1)])


@pytest.mark.parametrize(
    "text, why",
    [
        (lines(10, 6), "repeated_lines"),  # 6 of 17 lines
        (lines(14, 3), None),
        ("\n\n".join([PROSE[:130], PROSE[130:260], PROSE[260:400], PROSE[:130], PROSE[:130]]), "repeated_lines"),
        ("\n\n".join(f"{p}\nfirma {i}" for i, p in enumerate([PROSE[:130], PROSE[130:260], PROSE[260:400]])), None),
        ("no sé " * 40, "repeated_words"),
        (PROSE + " no sé no sé", None),
        (f"{PROSE} {PROSE[200:400]}", "repeated_ngrams"),
        ("}\n" * 40 + PROSE, None),  # lines without letters are not prose
        (f"```\n{'print(1)' * 3}\n" * 30 + "```\n" + PROSE, None),  # nor is what is marked as code
        ("no sé " * 5, None),  # too little to judge
    ],
)
def test_repetition_by_lines_and_by_words(text, why):
    assert repetition(text) == why


def test_repeated_paragraphs_of_several_lines():
    block = "Uno de los versos\ndice otra cosa"
    text = "\n\n".join([*(f"{PROSE[i * 60 : i * 60 + 60]}\nfin {i}" for i in range(5)), *[block] * 4])
    assert repetition(text) in ("repeated_lines", "repeated_paragraphs")
    whole = "\n\n".join(["a b\nc d", "a c\nb d", "a b\nc d"] * 4)
    assert clean._repeats(whole.split("\n\n"), 0.3, 0.2)


def test_a_repetition_exactly_at_the_threshold_passes():
    assert not clean._repeats(["aa"] * 4 + [f"b{i}" for i in range(6)], 0.30, 0.30)
    assert clean._repeats(["aa"] * 5 + [f"b{i}" for i in range(5)], 0.30, 0.50)
    assert clean._repeats(["a" * 90] * 2 + ["b"] * 8, 0.30, 0.20)


def test_letters_in_repeated_runs_are_counted_once():
    words = [*"abcde", "x", *"abcde", "y", *"abcde"]
    assert clean._letters_repeated(words, 5) == 10
    assert clean._letters_repeated(words, 6) == 0


@pytest.mark.parametrize(
    "text, why",
    [
        (PROSE.replace(". ", "... # … "), None),
        (PROSE.replace(" ", " # ", 20), "symbols"),
        ("## Título\n\n" + PROSE + "\n\n#### Final", None),
        ("12 45 + 3 de la " * 20, "few_letters"),
        ("o y a e u " * 20, "word_length"),
        ("constitucionalísimamente desoxirribonucleico " * 30, "word_length"),
        ("\n".join(f"• {' '.join(PROSE.split()[i : i + 5])}" for i in range(10)), "bullets"),
        ("\n".join(f"—{' '.join(PROSE.split()[i : i + 5])}" for i in range(10)), None),
        ("\n".join(" ".join(PROSE.split()[i : i + 14]) + ("…" if i % 2 else ".") for i in range(6)), "ellipsis"),
        (PROSE + "…", None),
        ("casa perro mesa árbol libro puerta cielo fuente " * 4, "few_common_words"),
    ],
)
def test_symbols_letters_bullets_and_common_words(text, why):
    assert symbols(text) == why


def test_an_answer_may_be_short_a_list_or_a_sum():
    bullets = "\n".join(f"- {' '.join(PROSE.split()[i : i + 5])}" for i in range(0, 50, 5))
    for answer in ("Sí.", "4", bullets, "2 + 2 = 4, 3 + 3 = 6", "tar -xf archivo.tar"):
        assert reason(talk("¿Qué?", answer), ["length", "repetition", "symbols"]) is None
    assert reason(Document("Sí.", "1"), ["length"]) == "too_short"
    assert reason(Document(bullets, "1"), ["symbols"]) == "bullets"
    assert reason(talk("¿Qué?", "no sé " * 40), ["repetition"]) == "repeated_words"


def test_only_what_the_assistant_says_is_judged():
    loop = "otra vez " * 60
    assert reason(talk(loop, "Claro."), [*RULES]) is None
    assert reason(talk("Hola.", "Claro.", "¿Y?", loop), [*RULES]) == "repeated_words"
    assert reason(talk("How do you say this in Spanish, please?", "Se dice así, como lo has oído."), [*RULES]) is None


def test_only_the_rules_named_are_tried_and_the_first_reason_is_given():
    assert reason_to_drop("no sé " * 20, []) is None
    assert reason_to_drop("no sé " * 20, ["repetition", "length"]) == "too_short"
    assert reason_to_drop("no sé " * 20, ["repetition"]) == "repeated_words"


@pytest.mark.parametrize(
    "text, code",
    [
        ("El perro de mi vecina ladra cuando pasa el cartero.", "es"),
        ("Vuessa merced, señor don Íñigo, non ha de fablar desa guisa.", "es"),
        ("Pienso, luego existo siempre.", "es"),
        ("The dog of my neighbour barks when the postman comes.", "en"),
        ("O cachorro da minha vizinha late quando o carteiro passa, e não para.", "pt"),
        ("Le chien de ma voisine aboie quand le facteur passe dans la rue.", "fr"),
        ("Il cane della mia vicina abbaia quando passa il postino.", "it"),
        ("Aquesta tarda anirem a la platja amb els nens, però abans hem de comprar pa al mercat.", "ca"),
        ("Der Hund meiner Nachbarin bellt, wenn der Postbote kommt und klingelt.", "de"),
        ("Собака моей соседки лает, когда приходит почтальон.", "ru"),
        ("Yes, of course.", None),  # too short
        ("12345 67890 + 54321 = ?", None),
        ("Juan Fernández Ortiz, María Etxeberria", None),
        ("git checkout -b rama && git push --set-upstream origin rama", None),
        ("docker run --rm -it -v $(pwd):/app python:3.11 bash", None),
        ("SELECT name FROM users WHERE age > 30 ORDER BY name;", None),
        ("def add(a, b):\n    return a + b\n\nprint(add(1, 2))", None),
        ("```python\n# the sum of the list, and what is left of it\nfor x in the_list:\n    print(x)\n```", None),
        ("Suma la lista:\n```python\n# this is the list that we will use for the sum\nxs = [1]\n```", None),
    ],
)
def test_languages_are_told_apart_and_doubt_is_none(text, code):
    assert language_of(text) == code


def test_what_a_long_text_says_in_the_middle_counts():
    words = (
        "this is the story of a man who was not at all what you would have thought of him when they first came to live"
        " in our street with their dogs and those two children nobody ever saw out before breakfast"
    )
    english = " ".join(random.Random(1).choices(words.split(), k=8000))
    assert language_of(PROSE[:100] + english + PROSE[:100]) == "en"
    assert language_of(PROSE * 100) == "es"


def test_without_the_detector_plain_spanish_is_still_known(monkeypatch):
    language._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "lingua", None)
    assert language_of(PROSE) == "es"
    with pytest.raises(MaeseError) as caught:
        language_of("The dog of my neighbour barks when the postman comes.")
    assert caught.value.code == "DEP-01"


def test_a_row_in_another_language_says_which():
    assert reason(talk("Hola", "I do not know what you are talking about, my friend."), ["language"]) == "language:en"
    assert reason_name("language:en") == "en otro idioma: inglés"
    assert reason_name("too_short") == "demasiado corto"


def test_every_reason_has_its_words():
    names = {"too_short", "too_long_text", "repeated_lines", "repeated_paragraphs", "repeated_words", "repeated_ngrams"}
    names |= {"symbols", "few_letters", "word_length", "bullets", "ellipsis", "few_common_words", "language"}
    assert all(has(f"reason.{name}") for name in names | {"duplicate", "near_duplicate"})


def test_the_cheap_rules_stay_cheap():
    rows = [PROSE[i % 200 : i % 200 + 300] for i in range(4500)]
    start = time.process_time()
    for text in rows:
        for rule in (length, repetition, symbols):
            rule(text, ANSWER)
    assert time.process_time() - start < 2  # 45,000 in at most 5 s, with room for a slow machine
    assert DOCUMENT != ANSWER
