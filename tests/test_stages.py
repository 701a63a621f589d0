"""A model from nothing: its size by arithmetic, its data counted, every stage done once, and what it is measured by."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from maese import pipeline as panel
from maese.cli import STAGES as ASKED
from maese.cli import run as command_line
from maese.errors import MaeseError
from maese.model.build import begin, build
from maese.plan.shape import of_size, parameters
from maese.plan.sizes import SIZES
from maese.recipe import Data
from maese.run import Run

PIPELINE = """
name: mio
size: nano
shape: {layers: 2, heads: 2, width: 32, vocabulary: 330, context: 64}
pretrain:
  data: {sources: [{path: libro.txt}], format: text, max_length: 64, too_long: split, packing: true, validation: 0.1}
  train: {max_steps: 4, micro_batch: 2, accumulation: 1, lr: 1e-3, optimizer: muon, precision: fp32}
  eval: {every: 2, prompts: [En un]}
  generate: {max_new_tokens: 8}
instruct:
  data: {sources: [{path: preguntas.jsonl}], template: maese, max_length: 64, too_long: drop, dedup: exact}
  train: {max_steps: 3, micro_batch: 2, accumulation: 1, lr: 1e-3, precision: fp32}
  eval: {every: 3, prompts: ["¿Qué?"]}
  generate: {max_new_tokens: 8}
"""


@pytest.fixture
def workshop(here, monkeypatch):
    """A folder with a recipe of stages, a book and questions, some of them twice."""
    monkeypatch.setattr("maese.report.curves.plot", lambda run: None)
    monkeypatch.setattr("maese.stages.ASKED", 2)
    Path("mio.yaml").write_text(PIPELINE, "utf-8")
    words = ("hidalgo", "ventero", "molino", "camino", "caballo", "lugar", "sierra", "noche", "señora", "libro")
    text = "".join(
        f"El {words[i % 10]} {i} vio al {words[i * 7 % 10]} junto a la {words[i * 3 % 10]}.\n" for i in range(300)
    )
    Path("libro.txt").write_text(text, "utf-8")
    rows = [{"instruction": f"¿Cuánto es {i} más {i}?", "output": f"Son {2 * i}."} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows + rows[:5]]
    Path("preguntas.jsonl").write_text("".join(lines), "utf-8")
    return here


def maese(*words: str) -> int:
    return command_line(list(words))


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_by_arithmetic_are_those_of_the_model(size, architecture, tiny):
    import torch
    from transformers import AutoModelForCausalLM

    from maese.model.build import config
    from maese.model.load import load_tokenizer

    shape = SIZES[size]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(shape, architecture, load_tokenizer(tiny)))
    assert sum(p.numel() for p in model.parameters()) == parameters(of_size(shape, architecture))


def test_the_sizes_are_those_promised():
    assert 109e6 < parameters(of_size(SIZES["base"], "classic")) < 111e6
    assert 109e6 < parameters(of_size(SIZES["base"], "modern")) < 111e6
    assert all(25e6 < parameters(of_size(SIZES["mini"], kind)) < 30e6 for kind in ("classic", "modern"))


@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_a_model_from_nothing_is_a_base_like_any_other_and_the_same_for_the_same_seed(architecture, tiny, here):
    from maese.model.load import load_model, weights_hash

    shape = dataclasses.replace(SIZES["nano"], layers=2, heads=2, width=32, vocabulary=320, context=64)
    folders = [build(shape, architecture, tiny, here / f"b{i}", seed) for i, seed in enumerate((1, 1, 2))]
    one, two, other = map(weights_hash, folders)
    assert one == two != other
    model = load_model(folders[0])
    assert model.config.vocab_size == 320 and model.config.max_position_embeddings == 64


def test_every_block_of_a_modern_model_begins_as_one_that_changes_nothing(tiny):
    import torch

    from maese.model.load import load_tokenizer

    shape = dataclasses.replace(SIZES["nano"], layers=2, heads=2, width=32, vocabulary=320)
    model = begin(shape, "modern", load_tokenizer(tiny), seed=3).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        through = model.model(input_ids=ids).last_hidden_state
        straight = model.model.norm(model.model.embed_tokens(ids))
    assert torch.allclose(through, straight, atol=1e-6)


def test_a_wide_modern_model_begins_as_one_that_knows_nothing(tiny):
    """With tied tables and blocks that change nothing it would be sure that every word comes twice: 15 nats here."""
    import math

    import torch

    from maese.model.load import load_tokenizer

    shape = dataclasses.replace(SIZES["base"], layers=1)
    model = begin(shape, "modern", load_tokenizer(tiny), seed=3).eval()
    ids = torch.randint(shape.vocabulary, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert abs(loss - math.log(shape.vocabulary)) < 0.3


def test_every_stage_leaves_its_folder_and_the_report_shows_it(workshop, capsys):
    assert maese("train", "mio.yaml", "output=hecho") == 0
    said = capsys.readouterr()
    assert said.out.strip() == "hecho" and "Evaluación" in said.err and "nano" in said.err
    run = Run("hecho")
    counts = run.read("counts.json")["instruct"][0]
    assert counts["duplicate"] == 5 and counts["train"] + counts["validation"] == 40 and counts["read"] == 45
    book = run.read("counts.json")["pretrain"][0]
    assert (book["read"], book["train"], book["validation"]) == (1, 1, 1)
    scores = run.read("scores.json")
    assert {"pretrain", "instruct"} == scores["bits_per_byte"].keys() == scores["pairs"].keys()
    assert all(0 < by[m]["value"] < 20 for by in scores["bits_per_byte"].values() for m in by)
    assert scores["answers"]["asked"] == 2 == len(scores["answers"]["said"])
    page = (run.report / "index.html").read_text("utf-8")
    for part in ("libro.txt", "Preentrenamiento", "bits por byte", "../instruct/report/index.html", "<svg"):
        assert part in page, part
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert Path(Run("hecho/instruct").recipe().base) == Path("hecho/pretrain/final").absolute()
    assert run.read("state.json")["status"] == "finished"


def test_what_is_done_is_not_done_again_and_from_does_it_anew(workshop):
    assert maese("train", "mio.yaml", "--until", "tokenizer", "output=hecho") == 0
    before = Path("hecho/tokenizer/tokenizer.json").stat().st_mtime_ns
    assert not Path("hecho/pretrain").exists()
    assert maese("resume", "hecho") == 0
    assert Path("hecho/tokenizer/tokenizer.json").stat().st_mtime_ns == before
    first = Path("hecho/pretrain/events.jsonl").read_text("utf-8")
    assert maese("train", "mio.yaml", "--from", "instruct", "output=hecho") == 0
    assert Path("hecho/pretrain/events.jsonl").read_text("utf-8") == first
    assert maese("train", "mio.yaml", "--from", "pretrain", "shape.layers=1", "output=hecho") == 0
    config = json.loads(Path("hecho/pretrain/final/config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == 1 and panel.load("hecho/recipe.yaml").shape.layers == 1
    shutil.rmtree("hecho/tokenizer")
    assert maese("train", "mio.yaml", "--from", "pretrain", "output=hecho") == 1


def test_what_follows_pretraining_is_done_over_the_model_there_is(workshop, capsys):
    """`train minigpt size=nano` and then `--from instruct`: the recipe still says another size by default."""
    whole = Path("mio.yaml").read_text("utf-8")
    assert maese("train", "mio.yaml", "output=hecho", "--until", "pretrain") == 0
    said = capsys.readouterr().err
    assert "maese resume hecho" in said and Run("hecho").read("state.json")["status"] == "interrupted"
    Path("mio.yaml").write_text(whole.replace("size: nano", "size: mini").replace("width: 32", "width: 64"), "utf-8")
    assert maese("train", "mio.yaml", "output=hecho", "size=base", "--from", "instruct") == 1
    assert "RUN-09" in capsys.readouterr().err and Path("hecho/pretrain/final").is_dir()
    assert maese("train", "mio.yaml", "output=hecho", "--from", "instruct", "--until", "instruct") == 0
    made = panel.load("hecho/recipe.yaml")
    assert (made.size, made.shape.width) == ("nano", 32) and "▸ nano" in capsys.readouterr().err


def test_what_was_gathered_is_what_is_worked_on(workshop, capsys):
    """Other sources in the recipe are not passed over in silence once the texts of the old ones are there."""
    assert maese("train", "mio.yaml", "output=hecho", "--until", "tokenizer") == 0
    kept = Path("hecho/recipe.yaml").read_text("utf-8")
    assert "dedup: exact" in kept
    Path("hecho/recipe.yaml").write_text(kept.replace("dedup: exact", "dedup: near"), "utf-8")
    capsys.readouterr()
    assert maese("resume", "hecho") == 1
    assert "RESUME-05" in (said := capsys.readouterr().err) and "instruct.data.dedup: near" in said
    Path("hecho/recipe.yaml").write_text(kept, "utf-8")
    asked = ("train", "mio.yaml", "output=hecho", "--from", "tokenizer", "--until", "tokenizer")
    assert maese(*asked, "instruct.data.dedup=near") == 1
    assert "RUN-09" in (said := capsys.readouterr().err) and "--from data" in said
    Path("mio.yaml").write_text(Path("mio.yaml").read_text("utf-8").replace("dedup: exact", "dedup: near"), "utf-8")
    assert maese(*asked) == 0 and "dedup: exact" in Path("hecho/recipe.yaml").read_text("utf-8")


def test_nothing_is_thrown_away_for_what_cannot_be(workshop, capsys):
    """Sources that are not there, another process at work, a change of what is kept: all is as it was."""
    assert maese("train", "mio.yaml", "output=hecho", "--until", "pretrain") == 0
    run = Run("hecho")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "lock"}
    for code, words in (
        ("DATA-01", ["--from", "data", "pretrain.data.sources=[{path: libr.txt}]"]),
        ("TEMPLATE-05", ["--from", "data", "instruct.data.template=chatmll"]),
        ("RUN-09", ["--from", "tokenizer", "pretrain.data={sources: [{path: preguntas.jsonl}], format: text}"]),
        ("RUN-09", ["--from", "evaluate", "instruct=null"]),
        ("RUN-09", ["--from", "evaluate", "instruct.train.lr=0.5"]),
        ("RUN-07", ["--from", "report"]),
        ("RESUME-05", ["--from", "pretrain", "shape.vocabulary=320"]),
    ):
        capsys.readouterr()
        assert maese("train", "mio.yaml", "output=hecho", *words) == 1
        assert code in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in before}, words
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS], **pipes) as other:
        assert other.stdout.readline().strip() == "held"
        assert maese("train", "mio.yaml", "output=hecho", "--from", "tokenizer") == 1
        assert "RUN-03" in capsys.readouterr().err and before == {path: path.read_bytes() for path in before}
        other.kill()


HOLDS = "from maese.run import Run; Run('hecho').open_for_writing(); print('held', flush=True); input()"


@pytest.mark.parametrize(("old", "new"), [("lr: 0.001", "lr: 0.5"), ("vocabulary: 330", "vocabulary: 320")])
def test_a_recipe_changed_under_what_is_done_is_not_passed_over(workshop, capsys, old, new):
    assert maese("train", "mio.yaml", "output=hecho", "--until", "pretrain") == 0
    path = Path("hecho/recipe.yaml")
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
    assert maese("resume", "hecho") == 1 and "RESUME-05" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["resume", "--from"])
def test_a_training_asked_for_later_has_its_data_gathered(workshop, way):
    assert maese("train", "mio.yaml", "output=hecho", "instruct=null") == 0
    first = Path("hecho/pretrain/events.jsonl").read_text("utf-8")
    if way == "resume":
        Path("hecho/recipe.yaml").write_text(panel.dump(panel.load("mio.yaml", ["output=hecho"])), "utf-8")
        assert maese("resume", "hecho") == 0
    else:
        assert maese("train", "mio.yaml", "output=hecho", "--from", "instruct") == 0
    assert {*Run("hecho").read("counts.json")} == {"pretrain", "instruct"} and Path("hecho/instruct/final").is_dir()
    assert Path("hecho/pretrain/events.jsonl").read_text("utf-8") == first


@pytest.mark.parametrize("change", ["pretrain.base=embedded", "instruct.output=x", "pretrain.name=x"])
def test_what_follows_from_the_whole_is_not_said_of_a_part(workshop, capsys, change):
    assert maese("train", "mio.yaml", change) == 1
    assert "USE-02" in (said := capsys.readouterr().err) and change.partition("=")[0] in said


def test_a_model_made_in_stages_is_used_by_its_name(workshop, capsys, monkeypatch):
    """The last training there is writes, chats, is compared and goes out; the report is that of the whole."""
    assert maese("train", "mio.yaml", "--until", "pretrain") == 0
    assert maese("report", "mio") == 0 and Path(capsys.readouterr().out.strip()).parent.parent.name.endswith("-mio")
    assert maese("generate", "mio", "En un", "--max-new-tokens", "4") == 0
    name = next(Path("runs").iterdir()).name
    assert maese("resume", name) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    for words in ("generate mio ¿Qué?", f"chat runs/{name}", "compare mio", "export mio fuera"):
        assert maese(*words.split()) == 0, words
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in ("fuera", f"runs/{name}/instruct/final")]
    assert weights[0] == weights[1]


def test_too_little_text_for_the_vocabulary_is_said_and_the_model_keeps_its_size(workshop, capsys):
    assert maese("train", "mio.yaml", "--until", "tokenizer", "shape.vocabulary=20000", "output=hecho") == 0
    assert "20.000" in capsys.readouterr().err
    found = Run("hecho").read("tokenizers.json")
    assert found["asked"] == 20_000 > found["made"] == found["tokenizers"][0]["vocabulary"]
    assert json.loads(Path("hecho/base/config.json").read_text("utf-8"))["vocab_size"] == 20_000


def test_a_training_cut_short_goes_on_with_the_whole(workshop, capsys, monkeypatch):
    from maese.train import loop

    real = loop.take_step

    def stop(session, *given):
        found = real(session, *given)
        if session.state.step == 1:
            session.stop_signal = 2
        return found

    monkeypatch.setattr(loop, "take_step", stop)
    assert maese("train", "mio.yaml", "output=hecho") == 130
    assert "maese resume hecho\n" in capsys.readouterr().err
    assert Run("hecho").read("state.json")["status"] == "interrupted"
    monkeypatch.setattr(loop, "take_step", real)
    assert maese("resume", "hecho") == 0
    kinds = [e["type"] for e in Run("hecho/pretrain").history()]
    assert kinds.count("step") == 4


def test_a_training_half_done_is_not_resumed_with_another_recipe(workshop, capsys, monkeypatch):
    """A change of the whole recipe would be lost without a word: what the training began with is in its own."""
    from maese.train import loop

    assert maese("train", "mio.yaml", "--until", "tokenizer", "output=hecho") == 0
    shutil.copytree("hecho/base", "hecho/.base.1")  # as a process that was killed leaves it
    part, went_on = Path("hecho/pretrain"), []
    for path in (part / "recipe.yaml", part / "events.jsonl"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy("hecho/pretrain.yaml", path)
    monkeypatch.setattr(loop, "resume", lambda *_, **__: went_on.append("resumed"))
    monkeypatch.setattr(loop, "train", lambda recipe, **_: went_on.append(Path(recipe.output).exists()))
    monkeypatch.setattr("maese.stages.done", lambda run, stage: stage not in ("pretrain",))
    monkeypatch.setattr("maese.stages.facts_of", lambda run, stage: {})
    kept = Path("hecho/recipe.yaml").read_text("utf-8")
    for old, new, key in (("lr: 0.001", "lr: 0.5", "pretrain.train.lr: 0.5"), ("layers: 2", "layers: 1", "layers: 1")):
        Path("hecho/recipe.yaml").write_text(kept.replace(old, new, 1), "utf-8")
        capsys.readouterr()
        assert maese("-q", "resume", "hecho") == 1 and not went_on
        said = capsys.readouterr().err
        assert "RESUME-05" in said and key in said and "hecho/recipe.yaml output=hecho-2" in said
    Path("hecho/recipe.yaml").write_text(kept, "utf-8")
    assert maese("-q", "resume", "hecho") == 0 and went_on == ["resumed"]
    # Killed before its recipe was there: what is in the folder is of no use, and must not be in the way.
    (part / "recipe.yaml").unlink()
    shutil.rmtree("hecho/base")
    assert maese("-q", "resume", "hecho") == 0 and went_on == ["resumed", False]
    assert not Path("hecho/.base.1").exists() and Path("hecho/base/shape.json").exists()


def test_ctrl_c_in_a_stage_that_does_not_train_says_how_it_goes_on(workshop, capsys, monkeypatch):
    from maese import stages

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.DO, "tokenizer", stopped)
    assert maese("train", "mio.yaml", "output=hecho") == 130
    said = capsys.readouterr().err
    assert "RUN-08" in said and "tokenizer" in said and "maese resume hecho\n" in said
    assert Run("hecho").read("state.json")["status"] == "interrupted" and not Path("hecho/lock").exists()


def test_a_report_half_written_is_written_again(workshop):
    from maese.kept import done, forget

    run = Run("hecho")
    run.report.mkdir(parents=True)
    assert not done(run, "report")
    (run.report / "index.html").touch()
    assert done(run, "report")
    forget(run, "report")
    assert not run.report.exists()


def test_what_the_stages_cannot_do_is_said_before_anything_is_lost(workshop, capsys):
    assert maese("train", "mio.yaml", "--until", "data", "output=hecho") == 0
    kept = sorted(path for path in Path("hecho").rglob("*") if path.name != "lock")
    for code, key, words in (
        ("USE-11", "--until", ["--from", "data", "--until", "data", "--from", "tokenizer"]),
        ("BATCH-01", "instruct.data.max_length=64", ["--from", "data", "instruct.data.max_length=500"]),
        ("USE-03", "nano | mini | base", ["--from", "data", "size=gigante"]),
    ):
        capsys.readouterr()
        assert maese("train", "mio.yaml", "output=hecho", *words) in (1, 2)
        said = capsys.readouterr().err
        assert code in said and key in said
        assert kept == sorted(path for path in Path("hecho").rglob("*") if path.name != "lock")


def test_sources_of_which_nothing_is_left(workshop, capsys):
    told = "The cat number {} sat on the mat and slept there all day, because it was warm and nobody came to see it."
    rows = "".join(json.dumps({"text": f"{told.format(i)} {told.format(i + 1)}"}) + "\n" for i in range(20))
    Path("ajenas.jsonl").write_text(rows, "utf-8")
    words = ["pretrain.data.sources=[{path: ajenas.jsonl}]", "pretrain.data.clean=[language]", "output=hecho"]
    assert maese("train", "mio.yaml", "--until", "data", *words) == 1
    said = capsys.readouterr().err
    assert "DATA-05" in said and "ajenas.jsonl" in said


def test_stages_are_asked_of_what_has_them(workshop, capsys):
    assert tuple(ASKED) == panel.STAGES
    assert maese("train", "quijote", "--from", "pretrain") == 2
    assert "USE-12" in capsys.readouterr().err
    assert maese("train", "mio.yaml", "--until", "data", "output=hecho") == 0
    assert maese("train", "mio.yaml", "--from", "evaluate", "output=hecho") == 1
    assert "RUN-07" in capsys.readouterr().err


def test_with_several_processes_each_training_goes_by_itself(workshop, capsys, monkeypatch):
    """The stages are one process's; what can be shared out is a recipe that the whole then takes for done."""
    from maese import recipe as recipes
    from maese.train.loop import train

    assert maese("train", "mio.yaml", "--until", "tokenizer", "output=hecho") == 0
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        assert maese("resume", "hecho") == 1
        assert "DIST-05" in capsys.readouterr().err
    train(recipes.load("hecho/pretrain.yaml"))
    first = Path("hecho/pretrain/events.jsonl").read_text("utf-8")
    assert maese("resume", "hecho") == 0
    assert Path("hecho/pretrain/events.jsonl").read_text("utf-8") == first


def test_a_change_goes_to_every_training_or_to_the_one_named(workshop):
    chosen = panel.load("mio.yaml", ["train.max_steps=9", "instruct.train.lr=0.5", "shape.layers=3"])
    assert chosen.pretrain.train.max_steps == chosen.instruct.train.max_steps == 9
    assert chosen.instruct.train.lr == 0.5 and chosen.pretrain.train.lr == 1e-3 and chosen.shape.layers == 3
    Path("otra.yaml").write_text(panel.dump(chosen), "utf-8")
    assert panel.load("otra.yaml") == chosen


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("instruct.train.epoch", "instruct.train.epochs"), ("pretrain.train.epoch", "pretrain.train.epochs"),
        ("train.epoch", "train.epochs"), ("shape.layer", "shape.layers"), ("sise", "size"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_mended_in_the_training_it_was_meant_for(workshop, typed, nearest):
    with pytest.raises(MaeseError, match="USE-02") as problem:
        panel.load("mio.yaml", [f"{typed}=1"])
    assert problem.value.facts["key"] == typed and problem.value.facts["nearest"] == nearest


@pytest.mark.parametrize("name", ["minigpt", "minigpt-classic", "minigpt-hub"])
def test_the_recipes_of_stages_that_travel_are_whole(name, workshop):
    chosen = panel.load(name)
    assert chosen.name == name and chosen.pretrain.base == "base"


def test_gathered_sources_deal_the_same_rows(workshop, tiny):
    """What the first stage writes is learnt and kept apart as the sources themselves would be."""
    from maese.model.load import load_tokenizer
    from maese.text.gather import gather, learnt
    from maese.tokens.prepare import prepare

    tokenizer = load_tokenizer(tiny)
    for data in (panel.load("mio.yaml").pretrain.data, panel.load("mio.yaml").instruct.data):
        data = Data.model_validate(data.model_dump() | {"template": "plain"})
        ours, counts = gather(data, workshop / f"data-{data.template}-{data.format}")
        direct, again = (prepare(each, tokenizer, 128) for each in (data, ours))
        for side in ("train", "validation"):
            assert [e.ids for e in getattr(direct, side)] == [e.ids for e in getattr(again, side)], side
        assert sum(c["train"] for c in counts) <= counts[0]["read"]
        held = {tokenizer.decode(e.ids, skip_special_tokens=True).strip() for e in direct.validation}
        assert not held & {text.strip() for text in learnt(ours)}


def test_bits_per_byte_are_nats_over_what_is_spelt(tiny):
    """Against the sum by hand; special tokens cost and spell nothing, and every byte is counted once."""
    import torch

    from maese.evaluate.ability import bits_per_byte, byte_lengths
    from maese.model.load import load_model, load_tokenizer
    from maese.tokens.template import Example

    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    texts = ["En un lugar de la sierra.", "¿Quién va? Ñandú y 👩\u200d👧."]
    spelt = byte_lengths(tokenizer)
    assert all(sum(spelt[i] for i in tokenizer(text)["input_ids"]) == len(text.encode()) for text in texts)
    rows = []
    for text in texts:
        ids = [0, *tokenizer(text)["input_ids"], 2]
        rows.append(Example(ids, [0] + [1] * (len(ids) - 1)))
    found = bits_per_byte(model, tokenizer, rows)
    nats = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logits[i - 1, row.ids[i]]) for i in range(1, len(row.ids) - 1))
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.bits == pytest.approx(nats / math.log(2), rel=1e-5)


def test_pairs_differ_and_a_model_is_asked_for_the_likelier(tiny, monkeypatch):
    from maese.evaluate import ability
    from maese.model.load import load_model, load_tokenizer

    kinds = ability.pairs()
    assert sum(map(len, kinds.values())) >= 60
    assert all(right != wrong for some in kinds.values() for right, wrong in some)
    one = {"x": [("En un lugar", "xzqwk jhgfd"), ("xzqwk jhgfd", "En un lugar")]}
    monkeypatch.setattr(ability, "pairs", lambda: one)
    assert ability.minimal_pairs(load_model(tiny), load_tokenizer(tiny)) == {"x": (1, 2)}


def test_answers_are_told_by_how_they_end(tiny, monkeypatch):
    from maese.evaluate import ability
    from maese.generate.engine import Answer

    class Writer:
        def generate(self, question, **settings):
            assert settings["temperature"] == 0.0
            spoken = {
                "a": "Los niños juegan en la calle con sus amigos.",
                "b": "The cat sat on the mat and slept there all day, because it was warm and nobody came.",
            }
            return Answer(spoken[question], 9, 0.1, "end" if question == "a" else "length", 1, 1)

    found = ability.answers(Writer(), ["a", "b"])
    assert (found.asked, found.ended, found.spanish, found.told) == (2, 1, 1, 2)


def test_the_average_is_that_of_the_checkpoints_and_the_end(recipe):
    from safetensors.torch import load_file

    from maese.train.checkpoint import saved
    from maese.train.loop import train

    run = train(recipe("train.final=average", "train.max_steps=6", "train.save_every=2", "train.keep=2"))
    last = train(recipe("train.final=last", "train.max_steps=6", "train.save_every=2", "train.keep=2", "output=last"))
    kept = [load_file(path / "model.safetensors") for path in saved(run.checkpoints)]
    ends, found = (load_file(r.final / "model.safetensors") for r in (last, run))
    assert len(kept) == 2
    for name, tensor in found.items():
        mean = (ends[name] + sum(each[name] for each in kept)) / 3
        assert float((tensor - mean).abs().max()) < 1e-6, name
    told = [e for e in run.history() if e["type"] == "validation"]
    assert told[-1]["averaged"] and not told[-1]["best"]


def test_before_its_rate_falls_a_run_may_be_made_longer(recipe, here):
    """Trained to 10 steps at once, or to 6 and then made longer while the rate was still level: the same."""
    from test_scale import cut

    from maese.errors import MaeseError
    from maese.train.loop import resume, train

    steady = ["train.schedule=wsd", "train.warmup=0.1", "train.save_every=50", "train.epochs=9"]
    straight = train(recipe(*steady, "train.max_steps=10", "output=straight"))
    cut(recipe(*steady, "train.max_steps=6", "output=longer"), 3)
    path = here / "longer" / "recipe.yaml"
    path.write_text(path.read_text("utf-8").replace("max_steps: 6", "max_steps: 10"), "utf-8")
    resume(Run("longer"))
    losses = [[e["loss"] for e in Run(r).history() if e["type"] == "step"] for r in ("straight", "longer")]
    assert len(losses[0]) == 10 and losses[0] == losses[1] and straight.path.name == "straight"
    cut(recipe(*steady, "train.max_steps=6", "output=late"), 5)
    path = here / "late" / "recipe.yaml"
    path.write_text(path.read_text("utf-8").replace("max_steps: 6", "max_steps: 10"), "utf-8")
    with pytest.raises(MaeseError) as caught:
        resume(Run("late"))
    assert caught.value.code == "RESUME-05"


def test_an_encoder_and_a_decoder_learn_the_same_rows_and_are_measured_on_others(workshop, capsys):
    """Both lose less than at the start; the table, the page and the file say the same."""
    rows = [{"text": f"{'rojo azul verde' if i % 2 else 'uno dos tres'} {i}", "tarea": str(i % 2)} for i in range(60)]
    Path("clases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["compare-architectures", "libro.txt", "--labels", "clases.jsonl", "--steps", "30", "--output", "estudio"]
    assert maese(*words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "estudio" and "codificador" in said.err
    found = json.loads(Path("estudio/architectures.json").read_text("utf-8"))
    sizes = [found[kind]["parameters"] for kind in ("encoder", "decoder")]
    assert max(sizes) / min(sizes) < 1.05
    for kind in ("encoder", "decoder"):
        assert len(found[kind]["loss"]) == 30 and found[kind]["loss"][-1] < found[kind]["loss"][0] - 0.5
        assert found[kind]["probe"] > 0.9  # the classes have no word in common
    assert found["encoder"]["perplexity"] is None and found["decoder"]["perplexity"] > 1
    page = Path("estudio/report/index.html").read_text("utf-8")
    assert page.count("<svg") == 4 and found["decoder"]["wrote"][:20] in page
    assert maese(*words) == 1 and "RUN-01" in capsys.readouterr().err


def test_a_study_that_cannot_be_is_refused_before_it_begins(workshop, capsys):
    Path("corto.txt").write_text("Hola.\n", "utf-8")
    for words, code in (
        (["corto.txt", "--output", "nada"], "DATA-10"),
        (["libro.txt", "--output", "mio.yaml"], "RUN-01"),
        (["libro.txt", "--output", "mio.yaml/estudio"], "DISK-02"),
    ):
        assert maese("compare-architectures", *words, "--steps", "1") == 1
        assert code in capsys.readouterr().err


def test_holes_are_seen_from_both_sides_by_one_and_from_the_left_by_the_other(tiny):
    """A decoder that says nothing of what follows a hole is not changed by it; an encoder is."""
    import torch

    from maese.train.architectures import Study, build

    settings = Study(layers=1, heads=2, width=32, context=8, steps=1)
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    later = ids.clone()
    later[:, 7] = 3
    for kind in ("encoder", "decoder"):
        model = build(kind, 51, settings).eval()
        with torch.no_grad():
            said = [model(input_ids=x).logits[:, 4] for x in (ids, later)]
        assert bool((said[0] == said[1]).all()) == (kind == "decoder")


WORDS, HOLE = 50, 50  # of the little language of the tests below: ids 0 to 49, and the hole


def known(say, seen=None):
    """A model that says what `say(ids)` (B, T) gives, surely: what is measured of it can be counted by hand."""
    import torch

    def model(input_ids, **_):
        if seen is not None:
            seen.append(input_ids)
        logits = torch.nn.functional.one_hot(say(input_ids), WORDS + 1) * 100.0
        return SimpleNamespace(logits=logits, last_hidden_state=logits)

    model.base_model, model.cls = model, lambda logits: logits
    return model


@pytest.fixture
def held():
    """Forty rows of eight words, no two together alike, with holes in the first place and in the fifth."""
    import torch

    from maese.train.architectures import Held

    ids = (torch.arange(40)[:, None] * 3 + torch.arange(8) * 7) % WORDS
    holes = torch.zeros_like(ids, dtype=torch.bool)
    holes[:, [0, 4]] = True
    return Held(ids, holes)


def test_holes_filled_are_counted_as_by_hand(held):
    """Whoever knows the text fills all; whoever repeats what it sees, none; of half the rows known, half."""
    import torch

    from maese.train.architectures import hole_accuracy

    ids, step = held.ids_BT, 7

    def undone(seen):  # the text again, from the words beside its holes
        return (seen.roll(-1, 1) - step) % WORDS

    shown = []
    assert hole_accuracy("encoder", known(undone, shown), held, HOLE) == 1
    seen = torch.cat(shown)
    assert bool((seen[held.holes_BT] == HOLE).all()) and bool((seen == ids)[~held.holes_BT].all())
    assert hole_accuracy("encoder", known(lambda seen: seen), held, HOLE) == 0
    # A decoder says at each place what comes after it.
    assert hole_accuracy("decoder", known(lambda seen: (seen + step) % WORDS), held, HOLE) == 1
    assert hole_accuracy("decoder", known(lambda seen: seen), held, HOLE) == 0
    half = hole_accuracy("decoder", known(lambda seen: (seen + step * (seen[:, :1] % 2)) % WORDS), held, HOLE)
    assert half == pytest.approx(float((ids[:, 0] % 2).float().mean()))


def test_what_each_learns_is_its_own_loss(held):
    """Both are those of transformers; the encoder learns of holes alone, and of one in seven."""
    import torch

    from maese.train.architectures import MASKED, Study, build, loss_of, perplexity

    settings = Study(layers=1, heads=2, width=32, context=8)
    decoder = build("decoder", WORDS + 1, settings).eval()
    with torch.no_grad():
        theirs = float(decoder(input_ids=held.ids_BT, labels=held.ids_BT).loss)
        assert float(loss_of("decoder", HOLE)(decoder, held.ids_BT)) == pytest.approx(theirs, rel=1e-4)
        assert perplexity(decoder, held) == pytest.approx(math.exp(theirs), rel=1e-4)
        for parameter in decoder.parameters():
            parameter.zero_()
        assert perplexity(decoder, held) == pytest.approx(WORDS + 1, rel=1e-4)
        encoder, shown = build("encoder", WORDS + 1, settings).eval(), []
        encoder.base_model.register_forward_pre_hook(
            lambda _, __, given: shown.append(given.get("input_ids")), with_kwargs=True
        )
        torch.manual_seed(0)
        ours = float(loss_of("encoder", HOLE)(encoder, held.ids_BT))
        torch.manual_seed(0)
        labels = torch.where(torch.rand(held.ids_BT.shape) < MASKED, held.ids_BT, -100)
        assert ours == pytest.approx(float(encoder(input_ids=shown[0], labels=labels).loss), rel=1e-5)
    torch.manual_seed(0)
    ids, shown = held.ids_BT.repeat(50, 1), []
    assert float(loss_of("encoder", HOLE)(known(lambda _: ids, shown), ids)) == pytest.approx(0, abs=1e-6)
    # Eight of ten are hidden and one is another word, which by chance may be the same.
    assert float((shown[0] == HOLE).float().mean()) == pytest.approx(0.8 * MASKED, rel=0.1)
    assert float(((shown[0] != ids) & (shown[0] != HOLE)).float().mean()) == pytest.approx(0.1 * MASKED, rel=0.2)
    wrong = float(loss_of("encoder", HOLE)(known(lambda _: (ids + 1) % WORDS), ids))
    assert wrong == pytest.approx(100, rel=1e-3)


def test_a_probe_finds_what_the_features_tell_and_nothing_else(tiny, monkeypatch):
    """Features that are the class: all right. Features that say nothing: no better than always the same class."""
    import torch

    from maese.model.load import load_tokenizer
    from maese.train import architectures
    from maese.train.architectures import Study, build, probe, similarity

    tokenizer, settings = load_tokenizer(tiny), Study(layers=1, heads=2, width=16, context=16, rows=2, lr=0.1)
    torch.manual_seed(0)
    labelled = [("lugar" if i % 2 else "sierra", "ab"[i % 2]) for i in range(40)]
    model = build("encoder", 321, settings).eval()
    before = [p.clone() for p in model.parameters()]

    def told(_model, ids):
        return torch.nn.functional.one_hot(ids.sum(1) % 16, 16).float()

    with monkeypatch.context() as patch:
        patch.setattr(architectures, "features", told)
        assert probe(model, labelled, tokenizer, settings) == 1
        # Halves alike in each row are found; halves that are those of the row before are not.
        rows = torch.arange(8)[:, None].repeat(1, 4)
        assert similarity(model, rows) == 1
        assert similarity(model, torch.cat([rows[:, :2], rows[:, 2:].roll(1, 0)], 1)) == 0
        patch.setattr(architectures, "features", lambda _model, ids: torch.ones(len(ids), 16))
        blind = probe(model, labelled, tokenizer, settings)
        assert 0.2 <= blind <= 0.8
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)), "it was frozen"
    assert probe(model, labelled, tokenizer, settings, tuned=True) == 1
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_each_goes_on_with_its_likeliest_word_and_never_with_a_hole(kind):
    import torch

    from maese.train.architectures import FOLLOWED, write

    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [3, 4]}

        def decode(self, ids):
            return " ".join(map(str, ids))

    def model(input_ids):
        # The encoder sees a hole at the end; both say one more than the last word, and would rather say a hole.
        seen = input_ids[:, :-1] if kind == "encoder" else input_ids
        assert (int(input_ids[0, -1]) == HOLE) == (kind == "encoder")
        logits = torch.nn.functional.one_hot((seen[:, -1:] + 1) % WORDS, WORDS + 1) * 5.0
        logits[..., HOLE] = 9
        return SimpleNamespace(logits=logits.expand(1, input_ids.shape[1], -1))

    assert write(kind, model, Tokenizer(), "x", HOLE, 64) == " ".join(str(i) for i in range(3, 5 + FOLLOWED))
    assert write(kind, model, Tokenizer(), "x", HOLE, 8) == "3 4 5 6 7 8 9"


def test_a_checkpoint_of_a_whole_model_opens_like_one(recipe):
    """`checkpoints/checkpoint-2` writes what the model was then: config, tokenizer and weights are there."""
    from maese.generate.engine import open_writer
    from maese.train.loop import train

    run = train(recipe("train.max_steps=3", "train.save_every=2"))
    writer = open_writer(run.checkpoints / "checkpoint-2")
    writer.generate("En un lugar", max_new_tokens=4)
    before, after = (
        dict(open_writer(p).model.named_parameters()) for p in (run.checkpoints / "checkpoint-2", run.final)
    )
    assert any(bool((before[name] != after[name]).any()) for name in after)


def test_rows_chosen_by_a_column_stay_when_they_are_written_without_it(workshop):
    """A question becomes a message, so its column is gone: asking for it again would leave nothing."""
    from maese.text.gather import gather, parcels

    rows = [{"instruction": "Dime algo." if i % 2 else "Calla.", "output": f"Son {i} cosas."} for i in range(8)]
    Path("dichos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {"path": "dichos.jsonl", "where": {"instruction": "Dime algo."}}
    ours, counts = gather(Data.model_validate({"sources": [source], "validation": 0.0}), workshop / "pocas")
    assert counts[0]["train"] == 4 == sum(parcel.item is not None for parcel in parcels(ours))
