"""Templates in Jinja: the built-in ones give the same ids through transformers; a stranger's is held to its word."""

from __future__ import annotations

import resource
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_template import MARKS, TALKS, learnt, renderer_of, settled, talk, tokenizer_of

from maese.errors import MaeseError
from maese.say import say
from maese.text.record import Conversation, Document, Message
from maese.tokens.template import TEMPLATES, open_template

CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_of(source: str, name: str = "chatml"):
    """A tokenizer of a family whose own template is `source`."""
    from copy import deepcopy

    tokenizer = deepcopy(tokenizer_of(name))
    tokenizer.chat_template = source
    return tokenizer


def fault(source: str, *items: Conversation, name: str = "chatml") -> MaeseError:
    with pytest.raises(MaeseError) as problem:
        renderer = open_template("model", model_of(source, name))
        for item in items:
            renderer.render(item)
    return problem.value


# The built-in ones as Jinja ----------------------------------------------------------------------------------------

CASES = [
    talk("¿Qué es?", "Un río."),
    talk("¿Qué es?", "Un río.\n\n```python\nx = {'a': 1}\n```", "¿Y «esto»?", "Va al mar."),
    talk("Hola.", "¡Hola!", "¿Qué tal?", "Bien.", system="Sé breve.\nY clara."),
]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("item", CASES, ids=["one", "code", "system"])
def test_transformers_gives_the_ids_and_the_mask_of_the_renderer(name, item):
    tokenizer, renderer = model_of(renderer_of(name).jinja, name), renderer_of(name)
    chat = [{"role": m.role, "content": m.content} for m in item.messages]
    theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ours = renderer.render(item)
    assert theirs["input_ids"] == ours.ids
    assert theirs["assistant_masks"] == ours.mask
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == renderer.prompt_ids(item.messages[:-1])


@settled(120)
@given(TALKS, st.sampled_from(sorted(TEMPLATES)))
def test_a_built_in_template_is_the_same_carried_by_the_model(item, name):
    renderer, carried = renderer_of(name), carried_by(name)
    assert carried.render(item) == renderer.render(item)
    assert carried.text(item.messages) == renderer.text(item.messages)
    assert carried.prompt_ids(item.messages[:-1]) == renderer.prompt_ids(item.messages[:-1])
    assert carried.render(item, "last") == renderer.render(item, "last")


@cache
def carried_by(name: str):
    return open_template("model", model_of(renderer_of(name).jinja, name))


def test_a_file_is_as_good_as_what_the_model_carries(tmp_path):
    for name in ("mía.jinja", "otra.j2"):
        (tmp_path / name).write_text(CHATML, "utf-8")
        renderer = open_template(str(tmp_path / name), tokenizer_of("chatml"))
        for item in CASES:
            assert renderer.render(item) == renderer_of("chatml").render(item)
        assert renderer.stop_ids == renderer_of("chatml").stop_ids
        assert renderer.render(Document("a", "1")) == renderer_of("chatml").render(Document("a", "1"))


# What is learnt of a stranger's ------------------------------------------------------------------------------------


def test_without_generation_marks_answers_are_found_by_asking_for_them():
    tokenizer = model_of(CHATML)
    row = open_template("model", tokenizer).render(talk("¿a?", "<|im_end|> b", "c", " d ", system="s"))
    assert learnt(row, tokenizer) == ["<|im_end|> b<|im_end|>", " d <|im_end|>"]
    assert row.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5


def test_only_the_marked_answers_are_learnt_and_the_borders_stay():
    only_last = CHATML.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if loop.last %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '' }}",
    )
    tokenizer = model_of(only_last)
    renderer, item = open_template("model", tokenizer), talk("a", "b", "c", "d")
    row = renderer.render(item)
    assert learnt(row, tokenizer) == ["d<|im_end|>"]
    assert row.ids == renderer_of("chatml").render(item).ids
    assert renderer.prompt_ids(item.messages[:1]) == row.ids[: len(renderer.prompt_ids(item.messages[:1]))]


def test_what_the_template_adds_to_the_last_answer_is_learnt_with_it():
    thinks = CHATML.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<t>\n\n</t>\n{% endif %}{{ m['content'] }}",
    )
    tokenizer = model_of(thinks)
    row = open_template("model", tokenizer).render(talk("a", "b", "c", "d"))
    assert learnt(row, tokenizer) == ["b<|im_end|>", "<t>\n\n</t>\nd<|im_end|>"]


def test_white_space_is_trimmed_where_the_template_trims_it():
    source = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] | trim if m['role'] == 'user' else m['content'].lstrip('\n') }}"
    )
    tokenizer = model_of(source)
    renderer, item = open_template("model", tokenizer), talk("  a \n", "\n\n b \n", "\n", "  ")
    row = renderer.render(item)
    assert tokenizer.decode(row.ids) == renderer.text(item.messages)
    assert learnt(row, tokenizer) == [" b \n<|im_end|>", "  <|im_end|>"]


def test_a_mark_that_swallows_the_white_space_beside_it_is_cut_as_in_the_whole_string():
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    base = tokenizer_of("plain").backend_tokenizer.from_str(tokenizer_of("plain").backend_tokenizer.to_str())
    base.add_special_tokens([AddedToken(mark, rstrip=True, special=True) for mark in ("<|u|>", "<|a|>", "<|fin|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'][0] + '|>\n' + m['content'] + '<|fin|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|a|>\n' }}{% endif %}"
    )
    renderer, item = open_template("model", tokenizer), talk("un hidalgo", "el ventero", "c", "d")
    row = renderer.render(item)
    assert row.ids == tokenizer(renderer.text(item.messages), add_special_tokens=False)["input_ids"]
    assert learnt(row, tokenizer) == ["el ventero<|fin|>", "d<|fin|>"]


def test_thousands_of_conversations_of_one_shape_are_rendered_once():
    renderer = open_template("model", model_of(CHATML))
    rows = [Conversation((Message("user", f"¿{i}?"), Message("assistant", f"{i}")), str(i)) for i in range(3000)]
    list(renderer.render_many(rows[:1]))
    start = time.process_time()
    made = list(renderer.render_many(rows))
    assert time.process_time() - start < 12
    assert made[2999] == renderer_of("chatml").render(rows[2999])


def test_a_template_with_the_date_says_so_and_metas_date_does_not_move():
    dated = "{{ strftime_now('%Y') }}" + CHATML
    [(key, facts)] = open_template("model", model_of(dated)).notes
    assert "model" in say(key, **facts)
    told = "{% set d = date_string if date_string is defined else strftime_now('%d %b %Y') %}{{ d }}" + CHATML
    renderer = open_template("model", model_of(told))
    assert "26 Jul 2024" in renderer.text(talk("a").messages) and not renderer.notes


# What is refused ---------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_is_an_error():
    with pytest.raises(MaeseError) as problem:
        open_template("model", tokenizer_of("plain"))
    assert problem.value.code == "TEMPLATE-01"


def test_a_template_that_ends_no_answer_is_an_error():
    assert fault(CHATML.replace("<|im_end|>", "")).code == "TEMPLATE-03"
    answer = "{{ '<|endoftext|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}"
    assert fault(CHATML.replace("<|im_end|>", answer)).code == "TEMPLATE-03"


REFUSED = {
    "syntax": "{% for m in messages %}{{ m['content'] }",
    "unknown_tag": "{% include 'x' %}" + CHATML,
    "raises": "{{ raise_exception('no me gusta') }}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML,
    "writes": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}" + CHATML,
    "range": "{% for i in range(10000000000) %}{% endfor %}" + CHATML,
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML,
    "power": "{{ 9 ** 9 ** 9 ** 9 }}" + CHATML,
    "wide": "{{ 'x' | center(2000000000) }}" + CHATML,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + CHATML,
    "zero": "{{ 1 / 0 }}" + CHATML,
    "long": CHATML + " " * 100_001,
    "upper": CHATML.replace("m['content']", "m['content'] | upper"),
    "escapes": CHATML.replace("m['content']", "m['content'] | tojson"),
    "twice": CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}"),
    "drops": CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '' }}"),
    "no_cue": CHATML.split("{%- if add_generation_prompt")[0],
    "unstable": CHATML.replace("<|im_start|>assistant", "<|im_start|>yo"),
    "end_only_last": CHATML.replace("<|im_end|>", "{% if loop.last %}<|im_end|>{% endif %}"),
    "own_stand_in": CHATML + "\U00100000",
    "doubles": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}" + CHATML,
    "slow": "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}" + CHATML,
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + CHATML,
    "digits": "{{ '" + "1" * 5000 + "' }}" + CHATML,
    "multiplies": "{% set x = 'a' * 99999 %}{% set y = x * 99999 %}{{ y | length }}" + CHATML,
    "replaces": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) | length }}" + CHATML,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_template_that_cannot_be_trusted_is_refused_soon_and_with_its_reason(kind):
    start, limits = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
    problem = fault(REFUSED[kind])
    assert problem.code == "TEMPLATE-04" and problem.facts["reason"]
    assert "data.template=chatml" in str(problem)  # the built-in one whose marks this tokenizer has
    assert time.process_time() - start < 12
    assert len(str(problem)) < 600
    # What held it in is let go of.
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_the_sandbox_lets_nothing_out_through_a_format():
    renderer = open_template("model", model_of("{{ '{0.__class__}'.format(messages) }}" + CHATML))
    assert renderer.text(talk("a").messages) == renderer_of("chatml").text(talk("a").messages)


def test_reasons_say_what_happened():
    assert "línea 1" in fault(REFUSED["syntax"]).facts["reason"]
    assert "no me gusta" in fault(REFUSED["raises"]).facts["reason"]
    assert fault(REFUSED["nested"]).facts["reason"] == say("template.reason.endless", steps=400_000)
    assert fault(REFUSED["no_cue"]).facts["reason"] == say("template.reason.cue")
    assert fault(REFUSED["unstable"]).facts["reason"] == say("template.reason.unstable")
    assert fault(REFUSED["upper"]).facts["reason"] == say("template.reason.changed")


def test_a_turn_that_the_template_leaves_out_or_rewrites_is_an_error_when_it_comes():
    silent = CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m['role'] != 'system' %}")
    assert "sistema" in fault(silent, talk("a", "b"), talk("a", "b", system="s")).facts["reason"]
    rewrites = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    problem = fault(rewrites, talk("a", "b"), talk("a", "<think>mm</think>b"))
    assert problem.facts["reason"] == say("template.reason.changed")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.jinja"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MaeseError, match="TEMPLATE-04"):
        open_template(str(path), tokenizer_of("chatml"))


def test_several_templates_with_no_default_are_refused_and_the_default_is_used():
    with pytest.raises(MaeseError, match="TEMPLATE-04"):
        open_template("model", model_of({"tool_use": CHATML, "rag": CHATML}))
    renderer = open_template("model", model_of({"default": CHATML, "tool_use": "x"}))
    assert renderer.render(CASES[0]) == renderer_of("chatml").render(CASES[0])


def test_what_people_type_is_never_a_mark_of_a_strangers_template():
    tokenizer = model_of(CHATML)
    typed = " ".join([*MARKS["chatml"], "<|endoftext|>", "{{ messages }}", "{% raw %}", "\U00100000", "\U00100001"])
    row = open_template("model", tokenizer).render(talk(typed, typed))
    assert row == renderer_of("chatml").render(talk(typed, typed))
    assert learnt(row, tokenizer) == [typed + "<|im_end|>"]
