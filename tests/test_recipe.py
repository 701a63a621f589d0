"""The control panel: the numbers promised, everything written back as it was read, and changes typed as people type."""

from __future__ import annotations

import pytest

from maese import pipeline
from maese import recipe as recipes
from maese.errors import MaeseError


def test_the_quijote_recipe_has_the_numbers_of_its_exercise():
    recipe = recipes.load("quijote")
    assert (recipe.base, recipe.data.format, recipe.method.kind) == ("embedded", "text", "full")
    assert recipe.train.epochs == 2 and recipe.train.lr == 1e-4
    assert (recipe.train.micro_batch, recipe.train.accumulation) == (2, 4)
    assert recipe.data.max_length == 128 and recipe.data.sources[0].limit == 500
    writing = recipe.generate
    assert (writing.max_new_tokens, writing.temperature, writing.top_k) == (160, 0.9, 50)
    assert (writing.top_p, writing.repetition_penalty, writing.sentences) == (0.95, 1.1, 5)


def test_the_pokemon_recipe_has_the_numbers_of_its_exercise():
    recipe = recipes.load("pokemon")
    method, train = recipe.method, recipe.train
    assert (method.kind, method.rank, method.alpha, method.dropout) == ("lora", 16, 32, 0.1)
    assert method.targets == "all-linear"  # of GPT-2: c_attn, c_proj and c_fc (see test_model)
    assert (train.epochs, train.micro_batch, train.accumulation, train.lr) == (5, 1, 4, 5e-5)
    assert (train.weight_decay, train.schedule, recipe.data.max_length) == (0.01, "cosine", 256)
    assert (recipe.data.format, recipe.data.loss) == ("qa", "assistant")


ALONE = [name for name in recipes.names() if not pipeline.is_pipeline(recipes.find(name))]


@pytest.mark.parametrize("name", ALONE)
def test_every_recipe_that_travels_loads_and_comes_back_the_same(name, here):
    from maese.text.streams import locate

    recipe = recipes.load(name)
    assert recipe.name == name and recipe.output is None
    assert all(locate(source.path).is_file() for source in recipe.data.sources)
    (here / "otra.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load("otra.yaml") == recipe
    for key in recipes.fields():
        assert f"{key.rsplit('.', 1)[-1]}:" in recipes.dump(recipe), f"--dry-run does not show {key}"


def test_the_three_recipes_are_there():
    assert {"demo", "pokemon", "quijote"} <= set(recipes.names())


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("train.lr=2e-4", "train.lr", 2e-4),
        ("train.lr=0.5", "train.lr", 0.5),
        ("train.lr=0,5", "train.lr", 0.5),
        ("train.lr=2E-4", "train.lr", 2e-4),
        ("train.epochs=1,5", "train.epochs", 1.5),
        ("train.max_steps=7", "train.max_steps", 7),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("method.targets=[c_attn, c_fc]", "method.targets", ["c_attn", "c_fc"]),
        ("method.targets=all-linear", "method.targets", "all-linear"),
        ("eval.prompts=[Uno, 'Dos, tres']", "eval.prompts", ["Uno", "Dos, tres"]),
        ("eval.prompts=['1,5']", "eval.prompts", ["1,5"]),
        ("generate.stop=['###']", "generate.stop", ["###"]),
        ("generate.system=2026", "generate.system", "2026"),
        ("output=nan", "output", "nan"),
        ("output=2e-4", "output", "2e-4"),
        ("output=2026", "output", "2026"),
        ("output=2026-11-21", "output", "2026-11-21"),
        ("output=a=b", "output", "a=b"),
        ("name=1e3", "name", "1e3"),
        ("base=gente/modelo@v2", "base", "gente/modelo@v2"),
    ],
)
def test_changes_are_read_as_people_type_them(change, key, value):
    found = recipes.load("quijote", [change])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_sources_inside_a_change():
    change = "data.sources=[{path: mi libro.txt, limit: 500}, {path: 1.5, documents: line}]"
    one, other = recipes.load("quijote", [change]).data.sources
    assert (one.path, one.limit, one.documents) == ("mi libro.txt", 500, "file")
    assert (other.path, other.limit, other.documents) == ("1.5", None, "line")


def test_the_last_change_wins_and_nothing_else_moves():
    plain, changed = recipes.load("quijote"), recipes.load("quijote", ["train.lr=1", "train.lr=2", "generate.top_k=0"])
    assert changed.train.lr == 2 and changed.generate.top_k == 0
    assert changed.data == plain.data and changed.train.epochs == plain.train.epochs


def test_a_recipe_cannot_be_changed_by_accident():
    with pytest.raises(ValueError):
        recipes.load("quijote").train.lr = 3


def test_fields_has_every_key():
    found = recipes.fields()
    for table in ("data", "method", "train", "eval", "generate"):
        model = recipes.Recipe.model_fields[table].annotation
        assert {f"{table}.{key}" for key in model.model_fields} <= found.keys()
    assert {"name", "base", "output", "data.sources"} <= found.keys()
    assert found["train.lr"] == 1e-4 and found["name"] is None
    assert len(found) <= 54, "each new option is a decision: see the style guide"


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("train.lrr", "train.lr"), ("tren.lr", "train.lr"), ("train.LR", "train.lr"), ("learning_rate", "train.lr"),
        ("train.learning_rate", "train.lr"), ("epochs", "train.epochs"), ("train.batch_size", "train.micro_batch"),
        ("method.target", "method.targets"), ("generate.temperatura", "generate.temperature"), ("nane", "name"),
    ],
)  # fmt: skip
def test_a_misspelt_key_finds_its_nearest(typed, nearest):
    with pytest.raises(MaeseError) as problem:
        recipes.load("quijote", [f"{typed}=2e-4"])
    facts = problem.value.facts
    assert problem.value.code == "USE-02" and facts["key"] == typed and facts["nearest"] == nearest
    assert facts["value"] == "0.0002" or nearest == "name"


@pytest.mark.parametrize(
    "change", ["train.epochs=.inf", "train.weight_decay=.inf", "train.lr=.nan", "method.alpha=.inf"]
)
def test_a_number_without_end_is_not_a_number(change):
    with pytest.raises(MaeseError, match="USE-03"):
        recipes.load("quijote", [change])


def test_a_wrong_value_is_told_by_the_key_and_not_by_its_type():
    with pytest.raises(MaeseError) as problem:
        recipes.load("quijote", ["method.targets=7"])
    assert problem.value.facts["key"] == "method.targets"
    with pytest.raises(MaeseError) as problem:
        recipes.load("quijote", ["data.sources=[]"])
    assert problem.value.facts["expected"] == "≥ 1"


@pytest.mark.parametrize("lang", ["es", "en"])
def test_every_key_has_its_line_and_no_line_is_left_over(lang):
    from maese.say import catalogue

    told = {key.removeprefix("key.") for key in catalogue(lang) if key.startswith("key.")}
    assert told == recipes.fields().keys() | pipeline.fields().keys()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("train.max_steps=1.000", "USE-03"),  # one, or a thousand?
        ("train.max_steps=1:30", "USE-03"),
        ("train.epochs=yes", "USE-03"),
        ("method.rank=true", "USE-03"),
        ("method.targets=[]", "USE-03"),
    ],
)
def test_what_could_mean_two_things_is_refused(change, code):
    with pytest.raises(MaeseError) as problem:
        recipes.load("quijote", [change])
    assert problem.value.code == code


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("train.seed=9007199254740993", 9007199254740993),
        ("output=2026.10", "2026.10"),
        ("output=007", "007"),
        ("train.max_steps=1e3", 1000),
        ("train.lr=0,001", 0.001),
    ],
)
def test_what_is_written_is_what_is_meant(change, value):
    found = recipes.load("quijote", [change]).model_dump()
    for key in change.partition("=")[0].split("."):
        found = found[key]
    assert found == value


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "dos.yaml"
    path.write_text("name: a\ndata: {sources: [{path: x}]}\ntrain: {lr: 1e-3}\ntrain: {epochs: 2}\n", "utf-8")
    with pytest.raises(MaeseError, match="USE-04"):
        recipes.load(path)


@pytest.mark.parametrize("name", ["tutor", "socratico", "narrador"])
def test_a_personality_speaks_with_the_voice_it_was_taught(name):
    import json

    recipe = recipes.load(name)
    rows = recipes.shipped(recipe.data.sources[0].path).read_text("utf-8").splitlines()
    talks = [json.loads(row)["messages"] for row in rows]
    assert {m["content"] for talk in talks for m in talk if m["role"] == "system"} == {recipe.generate.system}
    assert not {*recipe.eval.prompts} & {m["content"] for talk in talks for m in talk}, (
        "asked what it has learnt by heart"
    )
