"""The tokenizer lab: fast ids that are the same ids, tokenizers from one's own text, and fair comparisons."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maese.errors import MaeseError
from maese.say import catalogue
from maese.tokens import compare as lab
from maese.tokens import encode
from maese.tokens.train import SPECIALS, sample, train_tokenizer

TEXT = """—¿Quién anda ahí? —preguntó la niña, y encendió el farol—. ¡Nadie responde nunca!
El pingüino no es una cigüeña; tampoco el ñandú, que corre más que el corazón del hidalgo.
En 1998 llegaron 12 barcos y 345 marineros: «todos cantaban», dijo el capitán (muy serio).
def suma(a, b):\n\treturn a + b  # 3,14 € y 50 %\n
Mañana volverán las niñas, los niños y los señores a la canción del otoño y del corazón.
"""
SIZE = 420


@pytest.fixture(scope="module", params=sorted(encode.PATTERNS))
def trained(request, tmp_path_factory):
    return train_tokenizer([TEXT] * 3, SIZE, tmp_path_factory.mktemp("lab") / request.param, request.param)


@pytest.fixture(scope="module")
def gpt2_kind(tmp_path_factory):
    return opened(train_tokenizer([TEXT] * 3, SIZE, tmp_path_factory.mktemp("lab") / "g", "gpt2"))


@pytest.fixture(scope="module")
def qwen2_kind(tmp_path_factory):
    return opened(train_tokenizer([TEXT] * 3, SIZE, tmp_path_factory.mktemp("lab") / "q", "qwen2"))


def opened(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def by_transformers(tokenizer, texts):
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def changed(tokenizer, change):
    """The same tokenizer after `change(spec)` on its tokenizer.json."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def why(reason: str) -> str:
    return catalogue("es")[f"tokenizer.engine.{reason}"]


# Encoding


def test_every_pattern_is_encoded_by_tiktoken_with_the_ids_of_tokenizers(trained):
    tokenizer = opened(trained)
    encoder = encode.encoder_of(tokenizer)
    texts = [*encode.HARD, *TEXT.splitlines(keepends=True), TEXT]
    assert (encoder.engine, encoder.why) == ("tiktoken", "")
    assert encoder.many(texts) == by_transformers(tokenizer, texts)
    assert encoder.engine == "tiktoken" and encoder.one(TEXT) == by_transformers(tokenizer, [TEXT])[0]


LETTERS = st.one_of(
    st.characters(exclude_categories=("Cs",)),
    st.sampled_from("aeiounñáéíóúü ¿¡«»—,.;:'sStT0123\r\n\t \u0301\u0303\u00a0\u200d()|<>"),
    st.sampled_from(["<|end|>", "<|endoftext|>", " de", "ción", "\r\n", "'ll", "    "]),
)
TEXTS = st.lists(st.lists(LETTERS, max_size=40).map("".join), max_size=6)


@functools.cache
def encoder_at_work(tokenizer):
    encoder = encode.encoder_of(tokenizer)
    encoder._unproved = 0  # the first texts are answered by the engine they are compared with
    return encoder


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS)
def test_many_gives_what_transformers_gives(gpt2_kind, qwen2_kind, texts):
    for tokenizer in (gpt2_kind, qwen2_kind):
        encoder = encoder_at_work(tokenizer)
        assert encoder.many(texts) == by_transformers(tokenizer, texts)
        assert encoder.engine == "tiktoken"


def test_what_people_type_is_never_special_in_either_engine(qwen2_kind, monkeypatch):
    special = set(range(len(SPECIALS)))
    fast = encode.encoder_of(qwen2_kind)
    monkeypatch.setitem(encode.PATTERNS, "qwen2", "another")
    slow = encode.encoder_of(qwen2_kind)
    assert (fast.engine, slow.engine, slow.why) == ("tiktoken", "tokenizers", why("pattern"))
    for encoder in (fast, slow):
        ids = encoder.one("hola <|end|><|endoftext|> adiós")
        assert not special & {*ids}
        assert qwen2_kind.decode(ids) == "hola <|end|><|endoftext|> adiós"


def test_the_switches_of_the_tokenizer_are_left_as_they_were(qwen2_kind):
    mark = qwen2_kind.backend_tokenizer.encode_special_tokens = False
    assert encode.encoder_of(qwen2_kind).one("<|end|>")
    assert qwen2_kind.backend_tokenizer.encode_special_tokens is mark


def test_half_a_character_becomes_the_replacement_character(qwen2_kind):
    encoder = encode.encoder_of(qwen2_kind)
    assert encoder.many(["a\ud83d ñ", "bien"]) == encoder.many(["a\ufffd ñ", "bien"])


def test_nfc_and_nfd_give_the_same_ids(qwen2_kind):
    encoder = encode.encoder_of(qwen2_kind)
    encoder._unproved = 0
    assert encoder.one("man\u0303ana esta\u0301") == encoder.one("mañana está")
    # A mark whose class changed between versions of Unicode goes by the tables of `tokenizers`.
    odd = "a\u0323\u1df6\u0301"
    assert encoder.one(odd) == by_transformers(qwen2_kind, [odd])[0]


def test_a_mark_that_is_added_and_not_special_is_cut_out_as_tokenizers_does(qwen2_kind):
    tokenizer = changed(qwen2_kind, lambda spec: None)
    tokenizer.add_tokens(["<nota>", "[ñ]"])
    encoder = encode.encoder_of(tokenizer)
    encoder._unproved = 0
    texts = ["hola <nota> a", "nada", "[n\u0303] fin", "[ñ]"]
    assert encoder.engine == "tiktoken" and encoder.many(texts) == by_transformers(tokenizer, texts)
    assert tokenizer.convert_tokens_to_ids("<nota>") in encoder.one("hola <nota> a")


def test_endless_blanks_do_not_exhaust_the_stack(qwen2_kind, capfd):
    encoder = encode.encoder_of(qwen2_kind)
    encoder._unproved = 0
    ids = encoder.one("a" + " " * 1_100_000 + "b")
    assert qwen2_kind.decode(ids[:1] + ids[-1:]) == "a b" and "panicked" not in capfd.readouterr().err


def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[3], merges[40] = merges[40], merges[3]


def drop_merge(spec):
    spec["model"]["merges"].pop(5)


def lower(spec):
    spec["normalizer"] = {"type": "Lowercase"}


def prefix(spec):
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def dropout(spec):
    spec["model"]["dropout"] = 0.5


def lose_a_byte(spec):
    # 0xF5 is in no text, so that nothing else is spelt with it.
    model = spec["model"]
    letter = next(c for c, b in encode.byte_letters().items() if b == 0xF5)
    del model["vocab"][letter]


@pytest.mark.parametrize(
    ("change", "reason"),
    [(swap_merges, "merges"), (drop_merge, "merges"), (lower, "normalizer"), (prefix, "pattern"), (dropout, "kind"),
     (lose_a_byte, "bytes")],
)  # fmt: skip
def test_what_is_not_proved_is_left_to_tokenizers_and_said(qwen2_kind, change, reason):
    encoder = encode.encoder_of(changed(qwen2_kind, change))
    assert (encoder.engine, encoder.why) == ("tokenizers", why(reason))
    assert encoder.one("¿Quién anda ahí?")


def test_a_tokenizer_of_words_is_left_to_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "niña": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = encode.encoder_of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    assert (encoder.engine, encoder.why, encoder.one("niña ñu")) == ("tokenizers", why("kind"), [1, 0])


def test_a_difference_in_the_first_texts_is_never_returned(qwen2_kind):
    encoder = encode.encoder_of(qwen2_kind)
    wrong = type("Wrong", (), {"encode_ordinary": lambda self, text: [1]})
    encoder._fast = wrong()
    assert encoder.many(["hola", "otra vez"]) == by_transformers(qwen2_kind, ["hola", "otra vez"])
    assert (encoder.engine, encoder.why) == ("tokenizers", why("differs"))


def test_without_tiktoken_it_still_works(qwen2_kind, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    encoder = encode.encoder_of(qwen2_kind)
    assert (encoder.why, encoder.many(["ñ"])) == (why("absent"), by_transformers(qwen2_kind, ["ñ"]))


# Training


def test_a_trained_folder_opens_with_its_specials_first_and_its_card(trained):
    tokenizer = opened(trained)
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(6)) and len(tokenizer) == SIZE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIALS[0], SPECIALS[0], SPECIALS[1])
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    card = json.loads((trained / "card.json").read_text("utf-8"))
    assert card["bytes_read"] == card["bytes_used"] == 3 * len(TEXT.encode()) and card["size"] == SIZE
    assert card["llama_cpp"] == encode.LLAMA_CPP[card["pattern"]] == encode.LLAMA_CPP[trained.name]
    assert {path.name for path in trained.parent.iterdir()} == {trained.name}


def test_the_patterns_cut_as_the_models_they_come_from(trained):
    cut = opened(trained).backend_tokenizer.pre_tokenizer.pre_tokenize_str("¿Qué 1234, no?")
    pieces = {
        "gpt2": "¿|Qué|␣1234|,|␣no|?",
        "llama3": "¿Qué|␣|123|4|,|␣no|?",
        "qwen2": "¿Qué|␣|1|2|3|4|,|␣no|?",
        "bloom": "¿Qué|␣1234|,|␣no|?",
    }
    assert "|".join(lab.readable(piece, True) for piece, _ in cut) == pieces[trained.name]


def test_the_same_texts_give_the_same_tokenizer_and_progress_is_told(tmp_path):
    told = []
    for name in ("a", "b"):
        texts = iter([TEXT, TEXT])
        train_tokenizer(texts, SIZE, tmp_path / name, progress=lambda done, stage: told.append((stage, done)))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    size = len(TEXT.encode())
    assert told[: len(told) // 2] == [("read", size), ("read", 2 * size), ("merge", 2 * size), ("write", 2 * size)]


def test_a_sample_takes_from_the_whole_and_is_always_the_same():
    works = [f"obra {i} " + f"línea {i}\n" * 20_000 for i in range(4)]
    total = sum(len(w.encode()) for w in works)
    limit = total // 4
    found = list(sample(works, limit))
    assert found == list(sample(iter(works), limit))
    assert 0.9 * limit < sum(len(text.encode()) for text in found) <= limit
    for i, work in enumerate(works):
        mine = [text for text in found if f"línea {i}" in text]
        assert 0.1 < sum(map(len, mine)) / len(work) < 0.4 and all(text in work for text in mine)
    assert "".join(sample(works, 10 * total)) == "".join(works)


def test_limit_mb_is_kept_and_written_down(tmp_path):
    folder = train_tokenizer([TEXT * 300], SIZE, tmp_path / "t", limit_mb=0.05)
    card = json.loads((folder / "card.json").read_text("utf-8"))
    assert 30_000 < card["bytes_used"] <= 50_000 < card["bytes_read"] and card["limit_mb"] == 0.05


def test_half_characters_in_the_text_do_not_stop_a_training(tmp_path):
    assert train_tokenizer([TEXT + "\ud83d", TEXT], SIZE, tmp_path / "t").is_dir()


@pytest.mark.parametrize(
    ("code", "size", "texts", "there"),
    [("TOKEN-03", 200, [TEXT], False), ("TOKEN-04", 5000, [TEXT], False), ("RUN-01", SIZE, [TEXT], True)],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(tmp_path, code, size, texts, there):
    out = tmp_path / "t"
    if there:
        out.mkdir()
        (out / "mine.txt").touch()
    with pytest.raises(MaeseError) as problem:
        train_tokenizer(texts, size, out)
    assert problem.value.code == code and str(problem.value)
    assert [p.name for p in tmp_path.rglob("*")] == (["t", "mine.txt"] if there else [])


def test_a_text_of_one_letter_gives_a_vocabulary_of_bytes(tmp_path):
    """What the error proposes can be done: the bytes and the specials are a vocabulary, if a poor one."""
    with pytest.raises(MaeseError, match="TOKEN-04") as problem:
        train_tokenizer(["a"], 8000, tmp_path / "t")
    made = problem.value.facts["made"]
    assert opened(train_tokenizer(["a"], made, tmp_path / "t")).decode([made - 1]) and made == 256 + len(SPECIALS)


# Comparing


def gpt2_files(folder, tokenizer, names):
    """A tokenizer as the two files that came before tokenizer.json."""
    folder.mkdir()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / names[1]).write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", lab.PAIRS)
def test_the_pair_of_files_of_gpt2_opens(tmp_path, gpt2_kind, names):
    folder = gpt2_files(tmp_path / "pair", gpt2_kind, names)
    ids = lab.open_tokenizer(str(folder)).encode(TEXT).ids
    assert ids == by_transformers(gpt2_kind, [TEXT])[0]


def test_figures_are_those_counted_by_hand(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = encode.byte_letters()
    vocabulary = {c: i for i, c in enumerate(letters)} | {"no": 256, "Ġno": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("n", "o"), ("Ġ", "no")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = lab.compare([str(tmp_path)], {"a": ["no no ñu"]})
    row = result["tokenizers"][0]
    # no | ␣no | ␣ | C3 | B1 | u: six tokens, 8 characters, 9 bytes; of three words two stay whole and ñu takes 4.
    assert row["kinds"]["a"] == pytest.approx(
        {"tokens": 6, "characters_per_token": 8 / 6, "bytes_per_token": 9 / 6, "tokens_per_word": 2.0,
         "whole_words": 2 / 3, "round_trip": 1.0}
    )  # fmt: skip
    assert row["vocabulary"] == 258 and row["parameters"] == {"256": 66048, "768": 198144, "2048": 528384}
    assert row["pieces"][" niño"] == ["␣", "n", "i", "⟨C3⟩", "⟨B1⟩", "o"] and row["pieces"]["¿"] == ["⟨C2⟩", "⟨BF⟩"]
    assert result["kinds"]["a"] == {"texts": 1, "characters": 8, "bytes": 9, "words": 3}


def test_a_tokenizer_that_loses_letters_does_not_come_back_whole(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "niña": 1}, unk_token="[UNK]"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    words.save(str(tmp_path / "w.json"))
    figures = lab.compare([str(tmp_path / "w.json")], {"a": ["niña", "Niña", "ñu"]})["tokenizers"][0]["kinds"]["a"]
    assert figures["round_trip"] == pytest.approx(1 / 3)


def test_tokens_are_shown_as_a_person_reads_them():
    assert lab.readable("ĠniÃ±o", True) == "␣niño" and lab.readable("Ċĉ", True) == "⏎⇥"
    assert lab.readable("Ã", True) == "⟨C3⟩" and lab.readable("aÃ±Ã", True) == "añ⟨C3⟩"
    assert lab.readable("▁niño", False) == "␣niño" and lab.readable("<0xC3>", False) == "⟨C3⟩"


def test_the_samples_are_spanish_of_six_kinds():
    kinds = lab.samples()
    assert list(kinds) == ["narrative", "dialogue", "technical", "instructions", "chat", "code"]
    for texts in kinds.values():
        assert 10 <= len(texts) <= 20 and len({*texts}) == len(texts)
    assert all(mark in str(kinds.values()) for mark in "ñáéíóúü¿¡«»—")


@pytest.mark.parametrize("lang", ["es", "en"])
def test_embedded_and_another_are_compared_in_tables_and_a_picture(tmp_path, qwen2_kind, lang, monkeypatch):
    monkeypatch.setenv("MAESE_LANG", lang)
    qwen2_kind.save_pretrained(tmp_path / "q")
    result = json.loads(json.dumps(lab.compare(["embedded", str(tmp_path / "q")])))
    embedded, own = result["tokenizers"]
    assert embedded["kinds"]["narrative"]["characters_per_token"] > own["kinds"]["narrative"]["characters_per_token"]
    assert all(row["kinds"][kind]["round_trip"] == 1 for row in (embedded, own) for kind in result["kinds"])
    for table in lab.tables(result):
        assert table.title and all(len(row) == len(table.headers) for row in table.rows)
    assert ("characters" in lab.tables(result)[0].headers[2]) == (lang == "en")
    picture = lab.plot(result, tmp_path / "t.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


def test_what_is_no_tokenizer_is_said(tmp_path):
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    for name in ("nowhere", tmp_path, tmp_path / "bad.json"):
        with pytest.raises(MaeseError) as problem:
            lab.compare([str(name)])
        assert problem.value.code == "TOKEN-05" and str(problem.value)


def test_a_table_of_many_columns_is_turned_where_it_does_not_fit(monkeypatch, capsys):
    from maese.terminal_tokens import draw
    from maese.tokens.compare import Table

    kinds = ["narración", "diálogo", "técnico", "instrucciones", "charla", "código"]
    rows = [[name, "2.048", *["2,38"] * len(kinds)] for name in ("tokenizer", "embedded")]
    table = Table("Letras por token", ["nombre", "tokens", *kinds], rows)
    monkeypatch.setenv("COLUMNS", "80")
    draw([table])
    said = capsys.readouterr().out
    assert all(kind in said for kind in kinds) and "embedded" in said.splitlines()[2]
    monkeypatch.setenv("COLUMNS", "120")
    draw([table])
    assert "instrucciones" in capsys.readouterr().out.splitlines()[2]
