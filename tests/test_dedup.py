"""What repeats and what leaks: the estimate against the true Jaccard, every promise of the groups, and 13-grams."""

import random
import subprocess
import sys

import numpy as np
import pytest

from maese.errors import MaeseError
from maese.text.dedup import BANDS, ROWS, Duplicates, alike, exact_key, signature, signatures, text_runs, whole
from maese.text.grams import run_hashes, word_hashes, words
from maese.text.overlap import Overlap, Prompts
from maese.text.record import Conversation, Document, Message
from maese.text.survive import survivors

VOCABULARY = [f"{a}{b}{c}" for a in ("ca", "ño", "tré", "pi", "gü") for b in ("sal", "mon", "lla") for c in "aeiou"]


def page(seed: int, length: int = 200) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def edited(text: list[str], changes: int, seed: int = 0) -> list[str]:
    text, chance = list(text), random.Random(seed)
    for place in chance.sample(range(len(text)), changes):
        text[place] = f"cambio{chance.random()}"
    return text


def jaccard(a: str, b: str) -> float:
    one, other = {*text_runs(a).tolist()}, {*text_runs(b).tolist()}
    return len(one & other) / len(one | other)


def test_the_estimate_is_the_jaccard_within_its_error():
    errors = []
    for seed in range(60):
        a = page(seed)
        b = edited(a, seed % 12, seed)
        true = jaccard(" ".join(a), " ".join(b))
        errors.append(float((signature(" ".join(a)) == signature(" ".join(b))).mean()) - true)
    # Standard error of 120 draws is at most 0.046; of their mean, 0.006.
    assert abs(np.mean(errors)) < 0.02 and max(map(abs, errors)) < 0.18


def test_signatures_are_the_same_alone_in_company_and_in_another_process():
    texts = [" ".join(page(seed, 30 + 40 * seed)) for seed in range(5)]
    together = signatures([text_runs(text) for text in texts])
    assert together.shape == (5, BANDS * ROWS) and together.dtype == np.uint32
    assert all((signature(text) == row).all() for text, row in zip(texts, together, strict=True))
    code = "import sys; from maese.text.dedup import *; print(exact_key(sys.argv[1]), *signature(sys.argv[1])[:20])"
    told = {
        subprocess.run(
            [sys.executable, "-c", code, texts[0]], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert told == {" ".join(map(str, [exact_key(texts[0]), *together[0][:20]])) + "\n"}


@pytest.mark.parametrize("length, changes, found", [(200, 0, 1.0), (200, 2, 1.0), (200, 20, 0.0), (40, 1, 1.0)])
def test_near_duplicates_are_found_and_others_are_not(length, changes, found):
    seen = Duplicates()
    for seed in range(100):
        seen.add(f"a{seed}", " ".join(page(seed, length)))
    for seed in range(100):
        seen.add(f"b{seed}", " ".join(edited(page(seed, length), changes, seed)))
    dropped = seen.dropped()
    assert all(gone == f"b{kept[1:]}" for gone, kept in dropped.items())
    assert abs(len(dropped) / 100 - found) <= 0.05


def test_every_pair_above_the_threshold_is_joined_and_none_below():
    seeds = range(40)
    texts = [" ".join(edited(page(seed % 10), seed // 10 * 2, seed)) for seed in seeds]
    rows = signatures([text_runs(text) for text in texts])
    agree = (rows[:, None] == rows[None]).mean(axis=2) >= 0.8
    leader = list(seeds)
    for _ in seeds:  # by brute force: the smallest number that can be reached
        leader = [min(leader[j] for j in seeds if agree[i, j]) for i in seeds]
    assert alike(rows, 0.8) == leader
    assert len(set(leader)) < 40


def test_a_large_bucket_is_one_group():
    rows = np.tile(signature(" ".join(page(1))), (300, 1))
    assert alike(rows) == [0] * 300


@pytest.mark.parametrize("same", ["  El  NIÑO\tcomió\npan. ", "el nin\u0303o comio\u0301 pan."])
def test_case_spaces_and_loose_accents_do_not_make_another_text(same):
    assert exact_key(same) == exact_key("El niño comió pan.")


@pytest.mark.parametrize("other", ["El nino comió pan.", "El niño comió pan", "El niño comió pan. Y"])
def test_anything_else_makes_another_text(other):
    assert exact_key(other) != exact_key("El niño comió pan.")


def test_the_first_stays_and_the_groups_are_in_order():
    seen = Duplicates(near=False)
    for id, text in [("a", "Uno."), ("b", "Dos."), ("c", "UNO."), ("d", "Tres."), ("e", "dos."), ("f", " uno. ")]:
        seen.add(id, text)
    assert seen.groups() == [["a", "c", "f"], ["b", "e"]]
    assert seen.dropped() == {"c": "a", "e": "b", "f": "a"}
    seen.add("g", "Tres.")
    assert seen.dropped()["g"] == "d"  # asking does not close it


def test_reasons_tell_equal_from_nearly_equal():
    a = page(1)
    seen = Duplicates()
    for id, text in [("a", a), ("b", edited(a, 1)), ("c", a), ("d", edited(a, 1))]:
        seen.add(id, " ".join(text))
    assert seen.reasons() == {"b": "near_duplicate", "c": "duplicate", "d": "duplicate"}
    assert set(seen.dropped().values()) == {"a"}


@pytest.mark.parametrize(
    "one, other",
    [
        ("¿Cuánto es 12 más 7? Son 19.", "¿Cuánto es 12 más 8? Son 20."),
        ("Escribe x += 1 en Python", "Escribe x -= 1 en Python"),
        ("La capital de Perú es Lima.", "La capital de Chile es Santiago."),
        ("…", "¡!"),
        ("Sí", "No"),
        ("", " . "),
    ],
)
def test_short_texts_that_say_different_things_both_stay(one, other):
    seen = Duplicates()
    seen.add("1", one)
    seen.add("2", other)
    assert not seen.dropped()


def test_nothing_added_is_no_group():
    assert Duplicates().groups() == [] and Duplicates().dropped() == {}


def test_without_the_library_only_the_exact_ones_can_be_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    exact, near = Duplicates(near=False), Duplicates()
    for id in "ab":
        exact.add(id, "Hola.")
        near.add(id, "Hola.")
    assert exact.dropped() == {"b": "a"}
    with pytest.raises(MaeseError) as caught:
        near.dropped()
    assert caught.value.code == "DEP-01" and caught.value.facts["package"] == "rensa"


def test_what_was_worked_out_elsewhere_gives_the_same_groups():
    texts = [" ".join(edited(page(i % 6), i // 6, i)) for i in range(18)]
    one, other = Duplicates(), Duplicates()
    for i, text in enumerate(texts):
        one.add(str(i), text)
        other.add_known(str(i), exact_key(text), signature(text))
    assert one.groups() == other.groups() != []


def test_a_conversation_is_compared_whole_with_its_roles():
    def talk(*said):
        roles = ("user", "assistant")
        return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(said)), id=" ".join(said))

    same_question = [talk("¿Qué hora es?", "Las dos."), talk("¿Qué hora es?", "Las tres.")]
    assert [why for _, why in survivors(same_question, [])] == [None, None]
    assert whole(talk("Hola.", "Dime.")) == "user: Hola.\nassistant: Dime."
    twice = [talk("¿Qué hora es?", "Las dos."), talk("¿qué hora es?", "LAS DOS.")]
    assert [why for _, why in survivors(iter(twice), [], near=True)] == [None, "duplicate"]
    assert [why for _, why in survivors(twice, [], duplicates=False)] == [None, None]


def test_what_a_rule_drops_makes_no_other_text_a_duplicate():
    long = " ".join(page(1))
    items = [Document("jaja " * 80, "1"), Document("jaja " * 80, "2"), Document(long, "3"), Document(long, "4")]
    for near in (False, True):
        whys = [why for _, why in survivors(items, ["repetition"], near=near)]
        assert whys == ["repeated_words", "repeated_words", None, "duplicate"]


def test_runs_depend_on_the_words_and_on_their_order():
    a, b = word_hashes(words("uno dos tres uno dos")), word_hashes(words("dos uno"))
    pairs = run_hashes(a, 2)
    assert len(pairs) == 4 and pairs[0] == pairs[3] and run_hashes(b, 2)[0] not in pairs
    assert len(run_hashes(a, 6)) == 0
    long = word_hashes([*map(str, range(40)), *map(str, range(40))])
    for size in range(1, 41):
        runs = run_hashes(long, size)
        assert len(runs) == 81 - size and len(set(runs.tolist())) == 40 and runs[0] == runs[40]
    assert words("¿Qué, ANA? 3 + 4") == ["qué", "ana", "3", "4"]
    assert words("3 + 4, sí", signs=True) == ["3", "+", "4", "sí"]


def test_overlap_is_the_share_of_runs_of_thirteen_words():
    learnt, fresh = page(1, 100), page(2, 30)
    train = Overlap()
    train.learn(" ".join(learnt))
    assert train.check(" ".join(learnt).upper().replace(" ", ", ")) == 1.0
    assert train.check(" ".join(fresh)) == 0.0
    assert train.check(" ".join(learnt[:12] + fresh)) == 0.0  # twelve words are no leak
    mixed = learnt[10:25] + fresh  # 45 words, 33 runs, 3 of them known
    assert train.check(" ".join(mixed)) == pytest.approx(3 / 33)
    train.learn(" ".join(fresh))
    assert train.check(" ".join(fresh)) == 1.0


def test_short_texts_are_compared_whole_and_shorter_ones_never():
    train = Overlap()
    for text in ("¿Cuál es la capital de Perú?", "Sí, claro que sí.", "La capital de Perú es Lima desde 1535, dicen."):
        train.learn(text)
    assert train.check("¡Cuál es, la capital de PERÚ!") == 1.0
    assert train.check("¿Cuál es la capital de Chile?") == 0.0
    assert train.check("Sí, claro que sí.") == 0.0
    assert Overlap().check("¿Cuál es la capital de Perú?") == 0.0


def test_prompts_are_found_inside_longer_texts():
    long = " ".join(page(1, 40))
    prompts = Prompts(["¿Cuál es la capital de Perú?", long, "Hola", "En un lugar de la sierra de cuyo nombre"])
    assert prompts.inside("Dime: ¿cuál es la capital de Perú? Gracias.") == [0]
    assert prompts.inside("antes " + " ".join(page(1, 40)[20:35]) + " después") == [1]
    assert prompts.inside("antes " + " ".join(page(1, 40)[20:32]) + " después") == []
    assert prompts.inside("Hola, ¿qué tal estás hoy, buen amigo?") == []
    assert prompts.inside(long + ". En un lugar de la sierra de cuyo nombre") == [1, 3]
    assert Prompts([]).inside(long) == []


def test_a_million_runs_take_eight_bytes_each():
    train = Overlap()
    text = " ".join(str(i) for i in range(100_012))
    train.learn(text)
    assert train.check("0 1 2 3 4 5 6 7 8 9 10 11 12") == 1.0
    assert train._known.nbytes == 8 * 100_000
