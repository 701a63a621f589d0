"""Ids and masks: what is learnt is what should be, and nothing typed by a person becomes a special token."""

from __future__ import annotations

import pytest

from maese.errors import MaeseError
from maese.recipe import Data
from maese.text.record import Conversation, Document, Message
from maese.tokens.batches import IGNORED, batches, collate, epoch_order, steps_per_epoch
from maese.tokens.prepare import prepare
from maese.tokens.template import encode, open_template


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from maese.model.load import load_tokenizer

    return load_tokenizer(tiny)


def render(item, tokenizer, loss="assistant"):
    return open_template("plain", tokenizer).render(item, loss)


def pair(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), "1")


def test_only_the_answer_and_its_end_are_learnt(tokenizer):
    row = render(pair("¿Quién va?", "El señor."), tokenizer)
    learnt = [i for i, m in zip(row.ids, row.mask, strict=True) if m]
    assert tokenizer.decode(learnt) == " El señor.<|endoftext|>"
    assert tokenizer.decode(row.ids) == "Pregunta: ¿Quién va?\nRespuesta: El señor.<|endoftext|>"


def test_all_and_last(tokenizer):
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    row = Conversation(turns, "1")
    last = render(row, tokenizer, "last")
    assert tokenizer.decode([i for i, m in zip(last.ids, last.mask, strict=True) if m]) == " d<|endoftext|>"
    assert sum(render(row, tokenizer, "all").mask) == len(last.ids) - 1


def test_a_text_is_learnt_from_its_second_token_to_its_end(tokenizer):
    row = render(Document("El señor.", "1"), tokenizer)
    assert row.mask == [0] + [1] * (len(row) - 1) and row.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|end|>", "<|pad|>"])
def test_what_people_type_never_becomes_a_special_token(tokenizer, mark):
    special = {tokenizer.convert_tokens_to_ids(m) for m in ("<|endoftext|>", "<|end|>", "<|pad|>")}
    assert not special & set(encode(tokenizer, f"hola {mark} adiós"))
    row = render(pair(mark, mark), tokenizer)
    assert [i for i in row.ids if i in special] == [tokenizer.eos_token_id]
    assert tokenizer.decode(encode(tokenizer, mark)) == mark


def test_the_prompt_is_the_beginning_of_what_was_learnt(tokenizer):
    row = render(pair("¿Quién va?", "Yo."), tokenizer)
    prompt = open_template("plain", tokenizer).prompt_ids((Message("user", "¿Quién va?"),))
    assert row.ids[: len(prompt)] == prompt
    assert sum(row.mask[: len(prompt)]) == 0 and all(row.mask[len(prompt) :])


def test_pad_that_is_the_end_token_never_hides_it_from_the_loss(tmp_path):
    from conftest import make_tokenizer

    from maese.model.load import load_tokenizer, pad_id

    make_tokenizer(tmp_path, pad=False)
    tokenizer = load_tokenizer(tmp_path)
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    rows = [render(pair("a", "b"), tokenizer), render(pair("a", "una respuesta más larga"), tokenizer)]
    batch = collate(rows, pad_id(tokenizer))
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert (labels != IGNORED).sum() == row.targets
    assert batch["attention_mask"].sum() == sum(map(len, rows))
    assert batch["input_ids"].shape[1] % 8 == 0


def test_padding_changes_no_loss(tiny, tokenizer):
    """Rows together, padded = the same rows one by one."""
    from maese.evaluate.likelihood import loss_and_targets
    from maese.model.load import load_model

    rows = [render(pair(f"¿Cuánto es {i}?", "Son " + "muchos " * i), tokenizer) for i in range(7)]
    model = load_model(tiny)
    (together, targets), (apart, same) = (loss_and_targets(model, rows, 1, size) for size in (7, 1))
    assert targets == same and together / targets == pytest.approx(apart / targets, abs=1e-5)


def test_every_row_once_an_epoch_and_the_same_from_any_step():
    seen = [i for step in batches(23, 2, 3, 42, 0, steps_per_epoch(23, 2, 3)) for micro in step for i in micro]
    assert sorted(seen) == list(range(23))
    whole = list(batches(23, 2, 3, 42, 0, 20))
    for start in range(20):
        assert list(batches(23, 2, 3, 42, start, 20)) == whole[start:]
    assert epoch_order(23, 42, 0) != epoch_order(23, 42, 1) != epoch_order(23, 43, 1)


def data(path, **more) -> Data:
    return Data.model_validate({"sources": [{"path": str(path)}], **more})


def test_split_keeps_every_token_of_the_text(tokenizer, book):
    made = prepare(data(book, format="text", max_length=16, too_long="split", validation=0), tokenizer, 128)
    ids = [i for row in made.train for i in row.ids]
    expected = render(Document(book.read_text("utf-8").strip(), "1"), tokenizer).ids
    assert ids == expected[: len(ids)] and len(expected) - len(ids) <= 1  # one last token alone teaches nothing
    assert max(map(len, made.train)) == 16


def test_training_and_validation_share_no_text(tokenizer, book, questions):
    made = prepare(data(book, max_length=32, too_long="split", validation=0.2), tokenizer, 128)
    text = tokenizer.decode([i for r in made.train for i in r.ids], skip_special_tokens=True)
    held = tokenizer.decode([i for r in made.validation for i in r.ids], skip_special_tokens=True)
    assert book.read_text("utf-8").split() == (text + " " + held).split()
    made = prepare(data(questions, validation=0.3), tokenizer, 128 * 2)
    assert not {tuple(r.ids) for r in made.train} & {tuple(r.ids) for r in made.validation}
    assert made.format == "qa" and len(made.train) + len(made.validation) == 60


def test_truncated_rows_keep_their_end_token(tokenizer, questions):
    longest = max(map(len, prepare(data(questions), tokenizer, 256).train))
    made = prepare(data(questions, max_length=longest - 2, too_long="truncate"), tokenizer, 128)
    assert all(row.ids[-1] == tokenizer.eos_token_id and row.mask[-1] for row in made.train)
    assert made.facts["dropped"]["truncated"] > 0


def test_a_question_that_fills_the_row_is_left_out_not_taught_to_break_off(tokenizer, here):
    text = "".join(f"###\nPregunta: {'larga ' * (60 if i % 2 else 1)}{i}\nRespuesta: Sí {i}.\n" for i in range(40))
    (here / "p.txt").write_text(text, "utf-8")
    made = prepare(data("p.txt", max_length=64, too_long="truncate"), tokenizer, 128)
    assert made.facts["dropped"] == {"nothing_to_learn": 20}
    assert all(row.targets > 1 for row in made.train)


def test_too_long_is_an_error_with_the_length_that_would_fit(tokenizer, questions):
    with pytest.raises(MaeseError) as problem:
        prepare(data(questions, max_length=24), tokenizer, 128)
    fits = problem.value.facts["longest"]
    assert problem.value.code == "DATA-09"
    assert prepare(data(questions, max_length=fits), tokenizer, 128).train
