"""One renderer: the published strings, character by character; what is learnt; and nothing typed becomes a mark."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import SAMPLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maese.errors import MaeseError
from maese.report.views.mask import mask_fragment, mask_html
from maese.say import say
from maese.text.record import Conversation, Document, Message
from maese.tokens.look import mask_pieces, share_learnt
from maese.tokens.template import TEMPLATES, Example, encode, open_template

GOLDEN = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text("utf-8"))
MARKS = {name: list(row.marks) for name, row in TEMPLATES.items()}
ENDS = {  # the first and last tokens of a text in the tokenizers of each family
    "chatml": (None, "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
}


@cache
def tokenizer_of(name: str, marks: tuple[str, ...] | None = None, special: bool = True, kind: str = "bytes"):
    """A small tokenizer with the special tokens of a family: of bytes, or of words that begin with a space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos = ENDS.get(name, (None, "<|endoftext|>"))
    own = list(MARKS.get(name, ()) if marks is None else marks)
    specials = [token for token in dict.fromkeys([bos, eos, "<|pad|>"]) if token]
    made = Tokenizer(models.BPE(byte_fallback=kind == "words"))
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder, alphabet = decoders.Metaspace(), sorted(set(SAMPLE + "abcdefghijklmnopqrstuvwxyz:PR\n▁") - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([SAMPLE * 5], trainer)
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in own])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token="<|pad|>")


def renderer_of(name: str):
    return open_template(name, tokenizer_of(name))


def talk(*turns: str, system: str = "") -> Conversation:
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], turn) for i, turn in enumerate(turns)]
    return Conversation((*([Message("system", system)] if system else []), *messages), "1")


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def learnt(example: Example, tokenizer) -> list[str]:
    """What is learnt, one string for each unbroken stretch of it."""
    found, stretch = [], []
    for token, mask in [*zip(example.ids, example.mask, strict=True), (None, 0)]:
        if mask:
            stretch.append(token)
        elif stretch:
            found.append(tokenizer.decode(stretch, clean_up_tokenization_spaces=False))
            stretch = []
    return found


# The published templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda r: f"{r['published']}-{r['conversation']}-{r['generation']}")
def test_each_family_is_written_as_published(row):
    tokenizer, renderer = tokenizer_of(row["template"]), renderer_of(row["template"])
    messages = tuple(Message(*turn) for turn in GOLDEN["conversations"][row["conversation"]])
    messages = messages[:-1] if row["generation"] else messages
    assert renderer.text(messages, row["generation"]) == row["text"]
    made = renderer.prompt_ids(messages) if row["generation"] else renderer.render(Conversation(messages, "1")).ids
    assert tokenizer.decode(made, clean_up_tokenization_spaces=False) == row["text"]
    # An answer that begins with a break would join the break of the mark, and no prompt can end inside a token.
    if (row["template"], row["conversation"]) != ("chatml", "spaces"):
        assert made == whole(tokenizer, row["text"])


def test_every_published_family_has_its_rows():
    assert {row["template"] for row in GOLDEN["rows"]} == set(ENDS)
    assert {(row["template"], row["generation"]) for row in GOLDEN["rows"] if row["conversation"] == "system"} >= {
        ("chatml", False), ("llama3", False), ("gemma", False), ("mistral", True)
    }  # fmt: skip


def test_the_templates_of_the_house():
    messages = talk("¿Qué es?", " Un río. ", "¿Y?", "Va al mar.", system="Sé breve.").messages
    assert renderer_of("maese").text(messages) == (
        "<|system|>\nSé breve.<|end|>\n<|user|>\n¿Qué es?<|end|>\n<|assistant|>\nUn río.<|end|>\n"
        "<|user|>\n¿Y?<|end|>\n<|assistant|>\nVa al mar.<|end|>\n"
    )
    assert renderer_of("instruccion").text(messages[:2], True) == (
        "Sé breve.\n\n### Instrucción:\n¿Qué es?\n\n### Respuesta:\n"
    )
    assert renderer_of("instruccion").text(messages[1:]) == (
        "### Instrucción:\n¿Qué es?\n\n### Respuesta:\nUn río.<|endoftext|>\n\n"
        "### Instrucción:\n¿Y?\n\n### Respuesta:\nVa al mar.<|endoftext|>"
    )
    assert renderer_of("plain").text(messages[:3]) == ("Sé breve.\nPregunta: ¿Qué es?\nRespuesta: Un río.<|endoftext|>")


# What is learnt ----------------------------------------------------------------------------------------------------

TYPED = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=20),
    st.lists(
        st.sampled_from([*itertools.chain(*MARKS.values(), *ENDS.values()), "<|pad|>", " ", "\n", "¿qué?", "{}", "ñ"]),
        max_size=5,
    ).map(lambda parts: "".join(part or "" for part in parts)),
)  # fmt: skip
TALKS = st.builds(
    lambda pairs, system: talk(*[turn for pair in pairs for turn in pair], system=system),
    st.lists(st.tuples(TYPED, TYPED), min_size=1, max_size=3),
    st.one_of(st.just(""), TYPED),
)


def settled(examples: int):
    # Derandomized: the same conversations on every machine, so a failure is always anybody's to see.
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


@settled(1000)
@given(TALKS, st.sampled_from(sorted(TEMPLATES)))
def test_a_thousand_conversations_teach_their_answers_and_nothing_else(item, name):
    tokenizer, renderer, row = tokenizer_of(name), renderer_of(name), TEMPLATES[name]
    example = renderer.render(item)
    answers = [m.content for m in item.messages if m.role == "assistant"]
    end = row.end.replace("{eos}", tokenizer.eos_token)
    shown = [answer.strip() if "assistant" in row.trim else answer for answer in answers]
    assert learnt(example, tokenizer) == [row.answer.replace("{}", answer) + end for answer in shown]
    assert tokenizer.decode(example.ids, clean_up_tokenization_spaces=False) == renderer.text(item.messages)
    # The marks are those of the same conversation about nothing: none of them was typed.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    bland = Conversation(tuple(Message(m.role, "x") for m in item.messages), "1")
    assert [i for i in example.ids if i in special] == [i for i in renderer.render(bland).ids if i in special]
    for i, message in enumerate(item.messages):
        if message.role == "assistant":
            prompt = renderer.prompt_ids(item.messages[:i])
            assert example.ids[: len(prompt)] == prompt
            assert example.mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    last, everything = renderer.render(item, "last"), renderer.render(item, "all")
    assert last.ids == example.ids == everything.ids
    assert everything.mask == [0] + [1] * (len(example) - 1)
    assert all(a <= b for a, b in zip(last.mask, example.mask, strict=True))
    assert learnt(last, tokenizer) == learnt(example, tokenizer)[-1:]


@settled(60)
@given(st.lists(TALKS, max_size=12), st.sampled_from(sorted(TEMPLATES)), st.sampled_from(["assistant", "last", "all"]))
def test_many_at_once_are_the_same_as_one_by_one(items, name, loss):
    renderer = renderer_of(name)
    mixed = [*items, Document("El señor.", "d"), *items[:1]]
    assert list(renderer.render_many(mixed, loss)) == [renderer.render(item, loss) for item in mixed]


def test_many_more_than_fit_in_one_batch_keep_their_order():
    renderer = renderer_of("maese")
    rows = [Conversation((Message("user", str(i)), Message("assistant", str(i % 7))), str(i)) for i in range(2100)]
    made = list(renderer.render_many(iter(rows)))
    assert [row.id for row in made] == [row.id for row in rows]
    assert made[2099] == renderer.render(rows[2099])


def test_a_document_is_learnt_whole_with_its_end_whatever_the_loss():
    for name in TEMPLATES:
        tokenizer = tokenizer_of(name)
        for loss in ("assistant", "last", "all"):
            row = renderer_of(name).render(Document("El señor <|end|>.", "7"), loss)
            assert row.mask == [0] + [1] * (len(row) - 1) and row.ids[-1] == tokenizer.eos_token_id and row.id == "7"
            assert row.ids.count(tokenizer.eos_token_id) == 1


def test_the_break_after_the_end_of_an_answer_is_not_learnt():
    row = renderer_of("chatml").render(talk("a", "b"))
    assert row.mask[-2:] == [1, 0] and tokenizer_of("chatml").decode(row.ids[-1:]) == "\n"


def test_generation_stops_at_the_end_of_the_turn_or_of_the_text():
    chatml, gemma = tokenizer_of("chatml"), tokenizer_of("gemma")
    assert {chatml.decode([i]) for i in renderer_of("chatml").stop_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert {gemma.decode([i]) for i in renderer_of("gemma").stop_ids} == {"<end_of_turn>", "<eos>"}
    assert renderer_of("plain").stop_ids == {tokenizer_of("plain").eos_token_id}


def test_a_system_turn_with_no_question_after_it_is_still_said():
    for name in TEMPLATES:
        renderer = renderer_of(name)
        alone = (Message("system", "Sé breve."), Message("assistant", "Sí."))
        assert "Sé breve." in renderer.text(alone) and "Sé breve." in renderer.text(alone[:1])


# Tokenizers that lack something ------------------------------------------------------------------------------------


def test_marks_the_tokenizer_lacks_are_written_out_and_that_is_said():
    tokenizer = tokenizer_of("maese", ("<|user|>",))
    renderer = open_template("maese", tokenizer)
    row = renderer.render(talk("a", "b"))
    assert learnt(row, tokenizer) == ["b<|endoftext|>"]
    assert tokenizer.convert_tokens_to_ids("<|user|>") in row.ids
    assert renderer.stop_ids == {tokenizer.eos_token_id}
    [(key, facts)] = renderer.notes
    assert "<|assistant|>" in say(key, **facts) and "<|user|>" not in say(key, **facts)
    assert not renderer_of("maese").notes


@pytest.mark.parametrize("name", sorted(ENDS))
def test_marks_of_another_family_are_an_error_with_their_names(name):
    with pytest.raises(MaeseError) as problem:
        open_template(name, tokenizer_of("plain"))
    assert problem.value.code == "TEMPLATE-02" and MARKS[name][0] in problem.value.facts["missing"]
    assert "data.template=plain" in str(problem.value)


def test_an_unknown_name_is_an_error_with_the_nearest(tmp_path):
    for name, nearest in (("chatlm", "chatml"), ("Llama-3", "llama3"), (str(tmp_path / "no.jinja"), "plain")):
        with pytest.raises(MaeseError) as problem:
            open_template(name, tokenizer_of("plain"))
        assert problem.value.code == "TEMPLATE-05" and problem.value.facts["nearest"] == nearest


def test_without_any_end_there_is_no_template():
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("plain").backend_tokenizer)
    with pytest.raises(MaeseError, match="TEMPLATE-03"):
        open_template("plain", endless)


def test_a_context_shorter_than_the_template_is_an_error_with_one_that_fits():
    renderer = renderer_of("maese")
    assert renderer.shortest == len(renderer.render(talk("", "")).ids)
    renderer.refuse_short(renderer.shortest + 1)
    with pytest.raises(MaeseError) as problem:
        renderer.refuse_short(renderer.shortest)
    assert problem.value.code == "BATCH-02"
    renderer.refuse_short(problem.value.facts["needed"])


def test_a_mark_that_was_added_as_an_ordinary_word_is_not_made_out_of_what_is_typed():
    tokenizer = tokenizer_of("chatml", special=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode(tokenizer, "<|im_end|>") == [end]  # the tokenizer alone does make it
    row = open_template("chatml", tokenizer).render(talk("hola <|im_end|><|im_end|> x", "<|im_end|>"))
    assert row.ids.count(end) == 2
    assert learnt(row, tokenizer) == ["<|im_end|><|im_end|>"]


@pytest.mark.parametrize("name", ["plain", "mistral"])
def test_a_tokenizer_that_begins_with_a_space_cuts_turns_as_it_cuts_the_whole(name):
    tokenizer = tokenizer_of(name, kind="words")
    renderer = open_template(name, tokenizer)
    row = renderer.render(talk("un hidalgo", "el ventero", "la sierra", "dijo"))
    assert row.ids == whole(tokenizer, renderer.text(talk("un hidalgo", "el ventero", "la sierra", "dijo").messages))
    prompt = renderer.prompt_ids(talk("un hidalgo").messages)
    assert row.ids[: len(prompt)] == prompt and not any(row.mask[: len(prompt)]) and row.mask[len(prompt)]


# Looking at it -----------------------------------------------------------------------------------------------------


def test_pieces_say_how_each_token_is_treated():
    tokenizer = tokenizer_of("maese")
    row = renderer_of("maese").render(talk("señor", "Va\tél 你"))
    pieces = mask_pieces(row, tokenizer, limit=len(row) - 1)
    assert len(pieces) == len(row)
    assert pieces[0] == {"text": "<|user|>", "state": "special", "special": True}
    assert pieces[1] == {"text": "⏎", "state": "context", "special": False}
    assert pieces[-2] == {"text": "<|end|>", "state": "learnt", "special": True}
    assert pieces[-1]["state"] == "cut"
    written = "".join(piece["text"] for piece in pieces if piece["state"] == "learnt")
    assert written == "Va⇥él␣⟨E4⟩⟨BD⟩⟨A0⟩<|end|>"
    assert share_learnt(pieces) == sum(row.mask) / (len(row) - 1)


def test_pieces_of_words_that_begin_with_a_space():
    tokenizer = tokenizer_of("plain", kind="words")
    row = open_template("plain", tokenizer).render(Document("un lugar", "1"))
    assert "".join(piece["text"].replace("␣", " ") for piece in mask_pieces(row, tokenizer)) == " un lugar<|endoftext|>"


def test_the_page_escapes_everything_and_tells_states_without_colour():
    tokenizer = tokenizer_of("maese")
    row = renderer_of("maese").render(talk("<script>alert(1)</script>", "sí"))
    rows = [{"id": "<b>3</b>", "pieces": mask_pieces(row, tokenizer, len(row) - 1)}]
    page = mask_html(rows)
    assert page.startswith("<!doctype html>") and '<html lang="es">' in page
    assert "<script" not in page and "<b>3" not in page and "http" not in page
    assert "⟦&lt;|end|&gt;⟧" in page and "line-through" in page and "font-weight: 700" in page
    assert "3 de" in page and say("mask.lost", n=1) in page
    text = re.sub(r"<br>|\n", "", page[page.index('class="mz-tokens"') :])
    assert text.count("mz-token ") == len(row)
    assert mask_fragment(rows) in page


def test_an_example_that_teaches_nothing_says_so():
    assert say("mask.nothing") in mask_html(
        [{"id": "1", "pieces": [{"text": "a", "state": "context", "special": False}]}]
    )
