"""New tokens: the rows that train are theirs and no others, the loss knows them, and PEFT alone opens what is saved."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import make_voice
from test_quant import learn_alike, save_model

from maese.errors import MaeseError
from maese.model import load, quant, rows
from maese.model.adapter import add_lora, attach
from maese.model.fingerprint import fingerprint, untouched
from maese.recipe import Method
from maese.tokens.marks import add_marks, added, spelt
from maese.train.loop import resume, train

# What `make_tokenizer` of the tests lacks of the template `maese`: it has <|end|>.
MARKS = ["<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Heads that share their matrix (gpt2, qwen3) and one of its own with a bias (phi), with rows to spare."""
    import torch

    folder = tmp_path_factory.mktemp("marks")
    made = {kind: save_model(folder / kind, kind, width=64) for kind in ("gpt2", "qwen3")}
    made["phi"] = save_model(folder / "phi", "phi", width=64, vocabulary=384)
    model = load.load_model(made["phi"])
    with torch.no_grad():
        model.lm_head.bias.normal_()
    model.save_pretrained(made["phi"])
    return made


def opened(folder, four_bits: bool = False):
    tokenizer = load.load_tokenizer(folder)
    model = quant.load_quantized(folder, "fp32", "cpu") if four_bits else load.load_model(folder)
    new = add_marks(tokenizer, "maese")
    rows.make_room(model, tokenizer, new)
    return model, tokenizer, new


def adapted(folder, four_bits: bool = False):
    """A model whose new rows, and adapters, already say something of their own."""
    import torch

    model, tokenizer, new = opened(folder, four_bits)
    torch.manual_seed(1)
    model = add_lora(model, Method(kind="lora", rank=3), tokenizer, new).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model, tokenizer, new


def test_marks_become_tokens_once_and_only_those_that_were_missing(tiny):
    tokenizer = load.load_tokenizer(tiny)
    before = load.load_tokenizer(tiny)
    ids = add_marks(tokenizer, "maese")
    assert tokenizer.convert_ids_to_tokens(ids) == MARKS and ids == [320, 321, 322] and len(tokenizer) == 323
    assert add_marks(tokenizer, "maese") == [] and add_marks(tokenizer, "plain") == []
    assert added(tokenizer, before) == ids and added(before, before) == []
    assert [tokenizer.decode(pieces) for pieces in spelt(tokenizer, ids)] == MARKS
    assert all(max(pieces) < 320 for pieces in spelt(tokenizer, ids))


def test_what_a_person_types_is_never_a_mark(tiny):
    from maese.text.record import Conversation, Message
    from maese.tokens.template import open_template

    tokenizer = load.load_tokenizer(tiny)
    ids = add_marks(tokenizer, "maese")
    found = open_template("maese", tokenizer).render(
        Conversation((Message("user", "<|user|>"), Message("assistant", "<|system|>")), "")
    )
    assert [i for i in found.ids if i in ids] == [321, 322] and not open_template("maese", tokenizer).notes


@pytest.mark.parametrize(("kind", "size"), [("gpt2", 323), ("qwen3", 323), ("phi", 384)])
def test_the_embedding_grows_only_if_it_must_and_new_rows_begin_as_what_they_were_spelt(bases, kind, size):
    import torch

    model, tokenizer, new = opened(bases[kind])
    table = load.load_model(bases[kind]).get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == size
    assert torch.equal(model.get_input_embeddings().weight[:320], table[:320])
    model = add_lora(model, Method(kind="lora"), tokenizer, new)
    mean = torch.stack([table[pieces].mean(0) for pieces in spelt(tokenizer, new)])
    assert torch.allclose(model.get_input_embeddings()(torch.tensor(new)), mean, atol=1e-6)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
def test_only_the_new_rows_are_others(bases, kind, four_bits):
    """By hand: the base with these rows written into its matrices says what the adapter says."""
    import torch

    model, _, new = adapted(bases[kind], four_bits)
    plain, _, _ = opened(bases[kind], four_bits)
    reads, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        for end in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            end.weight[new] = (
                reads(torch.tensor(new))
                if end is plain.get_input_embeddings()
                else rows.rows_now(head, torch.tensor(new))
            )
        # Adapters of the body off, those of the rows on.
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.zero_()
        ids = torch.tensor([[5, new[0], 9, new[2], 30, new[1], 7]])
        plain.train()
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    assert rows.replaced(head)[1].tolist() == new


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
def test_the_loss_without_logits_and_the_short_ways_learn_what_peft_learns(bases, kind, four_bits):
    import torch

    from maese.model.attention import unpadded
    from maese.model.head import head_of
    from maese.model.quick import quicken
    from maese.tokens.template import Example

    (theirs, _, new), (ours, _, _) = adapted(bases[kind], four_bits), adapted(bases[kind], four_bits)
    quicken(ours)
    assert unpadded(ours, 32) and head_of(ours).tokens_K.tolist() == new
    examples = [Example([new[0], *range(n, 2 * n), new[1], 2, new[2]], [0, *[1] * (n + 3)]) for n in (3, 9, 14)]
    batch = learn_alike(theirs, ours, examples)
    learnt = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert learnt.keys() == mine.keys() and sum("lora_" not in name for name in learnt) == 1
    for name, grad in learnt.items():
        assert float((mine[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-6, name
    with untouched(ours):  # with its rows off, the head is no longer what was known of it
        assert head_of(ours) is None
        assert torch.allclose(
            ours(input_ids=batch["input_ids"]).logits,
            opened(bases[kind], four_bits)[0].train()(input_ids=batch["input_ids"]).logits,
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
def test_a_base_under_new_rows_has_its_own_fingerprint(bases, kind):
    plain, _, _ = opened(bases[kind])
    model, _, _ = adapted(bases[kind])
    assert fingerprint(model) != fingerprint(plain)
    with untouched(model):
        assert fingerprint(model) == fingerprint(plain)


def talk(recipe, base, *changes):
    data = ("data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.template=maese", "data.marks=add")
    more = ("data.max_length=96", "data.too_long=error", "eval.prompts=['¿Cuánto es 2 más 2?']", "train.lr=1e-2")
    return recipe(f"base={base}", *data, *more, "method.rank=4", *changes)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
def test_what_is_saved_opens_with_transformers_and_peft_alone(recipe, questions, bases, kind, method):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from maese.generate.engine import open_writer

    run = train(talk(recipe, bases[kind], f"method.kind={method}"))
    assert sum(p.stat().st_size for p in run.final.glob("*.safetensors")) < 200_000  # no whole embedding
    theirs, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run.final), AutoTokenizer.from_pretrained(run.final)
    writer = open_writer(run)
    ids = writer.prompt_ids("¿Cuánto es 2 más 2?")
    assert (
        321 in ids
        and 322 in ids
        and ids
        == tokenizer.apply_chat_template(
            [{"role": "user", "content": "¿Cuánto es 2 más 2?"}], add_generation_prompt=True, return_dict=False
        )
    )
    with torch.no_grad():
        said, found = (model.eval()(input_ids=torch.tensor([ids])).logits for model in (theirs, writer.model))
        assert torch.allclose(said, found, atol=1e-5)
        with untouched(writer.model):
            assert not torch.allclose(writer.model(input_ids=torch.tensor([ids])).logits, found, atol=1e-3)


def test_the_whole_model_learns_its_new_rows_too(recipe, questions, bases):
    from maese.generate.engine import open_folder, open_writer

    run = train(talk(recipe, bases["gpt2"], "train.save_every=3"))
    writer = open_writer(run)
    assert writer.model.config.vocab_size == 323 and {321, 322} < {*writer.prompt_ids("¿Y 3?")}
    kept, tokenizer = open_folder(run.checkpoints / "checkpoint-3")
    assert kept.config.vocab_size == len(tokenizer) == 323


@pytest.mark.parametrize("kind", ["gpt2", "phi"])
def test_a_whole_model_with_new_tokens_is_compared_with_what_it_began_as(recipe, questions, bases, kind):
    from maese.evaluate.compare import compare
    from maese.generate.engine import open_writer

    run = train(talk(recipe, bases[kind], "method.kind=full"))
    found = compare(run, ["¿Y 3?"], max_new_tokens=4)
    assert found["max_logit_difference"] > 0
    base = open_writer(run, base=True)
    ids = open_writer(run).prompt_ids("¿Y 3?")
    assert base.prompt_ids("¿Y 3?") == ids and len(base.model.get_input_embeddings().weight) > max(ids)
    base.generate("¿Y 3?", max_new_tokens=4)


def test_new_rows_resume_bit_for_bit(recipe, questions, bases):
    changes = ("method.kind=qlora", "method.dropout=0.1", "train.max_steps=6")
    whole = train(talk(recipe, bases["phi"], *changes, "output=whole"))

    class Stop(Exception):
        pass

    def stop(event):
        if event["type"] == "step" and event["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(talk(recipe, bases["phi"], *changes, "output=cut"), watch=stop)
    from maese.run import Run

    run = resume(Run("cut"))
    name = "adapter_model.safetensors"
    assert (run.final / name).read_bytes() == (whole.final / name).read_bytes()


def test_a_tokenizer_that_grew_without_its_rows_is_refused(recipe, questions, bases, here):
    from maese.generate.engine import open_writer

    run = train(talk(recipe, bases["qwen3"], "method.kind=lora", "data.marks=auto"))
    folder = shutil.copytree(run.final, here / "adaptador")
    open_writer(str(folder))
    tokenizer = load.load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<|filling|>"})
    tokenizer.save_pretrained(folder)
    open_writer(str(folder))  # what fills is never read
    add_marks(tokenizer, "maese")
    tokenizer.save_pretrained(folder)
    with pytest.raises(MaeseError) as problem:
        open_writer(str(folder))
    assert (
        problem.value.code == "TOKEN-06" and "<|user|>" in str(problem.value) and "data.marks=add" in str(problem.value)
    )


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_personality_with_marks_leaves_the_others_as_they_were(bases, tmp_path, kind):
    """The base grows for it; what the others write, and the weights they write with, stay the same."""
    import torch

    from maese.generate.personas import open_company

    voice, marked = make_voice(tmp_path / "voz", bases[kind]), tmp_path / "marcas"
    model, tokenizer, _ = adapted(bases[kind])
    model.save_pretrained(marked, save_embedding_layers=False)
    tokenizer.save_pretrained(marked)
    settings = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 60}
    company = open_company(str(bases[kind]), [str(voice)])
    said = {name: (w.fingerprint(), w.generate("Hola", **settings).ids) for name, w in company.writers.items()}
    other = company.add(str(marked))
    assert len(company.model.get_input_embeddings().weight) == other.words == 323
    with torch.no_grad():  # whoever speaks, the new rows would be chosen if they could be
        company.model.get_input_embeddings().weight[320:] *= 100
    for name, before in said.items():
        writer = company.writers[name]
        assert before == (writer.fingerprint(), writer.generate("Hola", **settings).ids), name
        assert company.ask_all("Hola", of=[writer, writer], **settings)[1].ids == before[1], name


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi"])
def test_after_one_with_marks_comes_one_without(bases, tmp_path, kind):
    from maese.generate.personas import open_company

    voice, marked = make_voice(tmp_path / "voz", bases[kind]), tmp_path / "marcas"
    model, tokenizer, _ = adapted(bases[kind])
    model.save_pretrained(marked, save_embedding_layers=False)
    tokenizer.save_pretrained(marked)
    alone = open_company(str(bases[kind]), [str(voice)]).personas[0].generate("Hola", temperature=0, max_new_tokens=8)
    second = open_company(str(bases[kind]), [str(marked), str(voice)]).personas[1]
    assert second.generate("Hola", temperature=0, max_new_tokens=8).ids == alone.ids


def test_of_two_personalities_with_marks_the_one_with_more_comes_first(bases, tmp_path):
    from maese.generate.personas import open_company

    for name, templates in (("pocas", ["maese"]), ("muchas", ["maese", "llama3"])):
        model, tokenizer = load.load_model(bases["gpt2"]), load.load_tokenizer(bases["gpt2"])
        new = [token for template in templates for token in add_marks(tokenizer, template)]
        rows.make_room(model, tokenizer, new)
        model = add_lora(model, Method(kind="lora", rank=3), tokenizer, new)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        tokenizer.save_pretrained(tmp_path / name)
    few, many = str(tmp_path / "pocas"), str(tmp_path / "muchas")
    company = open_company(str(bases["gpt2"]), [few])
    before = company.personas[0].generate("Hola", max_new_tokens=8).ids
    with pytest.raises(MaeseError, match="ADAPT-05"):
        company.add(many)
    assert company.personas[0].generate("Hola", max_new_tokens=8).ids == before
    other = open_company(str(bases["gpt2"]), [many, few])
    assert other.personas[1].generate("Hola", max_new_tokens=8).ids == before


def test_a_model_that_did_not_grow_with_its_tokenizer_is_refused(recipe, bases, here):
    from maese.generate.engine import open_writer

    folder = shutil.copytree(bases["gpt2"], here / "corta")
    tokenizer = load.load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<|filling|>"})
    tokenizer.save_pretrained(folder)
    assert open_writer(str(folder)).generate("Hola", max_new_tokens=3).tokens  # what fills is never read
    train(recipe(f"base={folder}", "train.max_steps=2"))
    add_marks(tokenizer, "maese")
    tokenizer.save_pretrained(folder)
    for opened in (lambda: open_writer(str(folder)), lambda: train(recipe(f"base={folder}"))):
        with pytest.raises(MaeseError) as problem:
            opened()
        assert problem.value.code == "TOKEN-07" and "<|user|>" in str(problem.value) and problem.value.facts["n"] == 3


def test_an_adapter_that_is_refused_leaves_the_base_as_it_was(bases, tmp_path):
    model, tokenizer, _ = adapted(bases["qwen3"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path)
    other = load.load_model(bases["gpt2"])
    with pytest.raises(MaeseError, match="ADAPT-01"):
        attach(other, tmp_path, bases["gpt2"])
    assert len(other.get_input_embeddings().weight) == other.config.vocab_size == 320


def test_with_the_model_in_pieces_they_are_refused(recipe):
    from maese.train.sharding import refuse_sharded

    with pytest.raises(MaeseError) as problem:
        refuse_sharded(recipe("data.marks=add"))
    assert problem.value.code == "DIST-06"


def test_muon_does_not_turn_rows_of_words(bases):
    from maese.recipe import Train
    from maese.train.optim import groups

    model, _, _ = adapted(bases["phi"])
    turned = {
        id(p) for group in groups(model, Train(optimizer="muon")) if group.get("orthogonal") for p in group["params"]
    }
    names = {n for n, p in model.named_parameters() if id(p) in turned}
    assert names and all("lora_" in name and "lm_head" not in name for name in names)


def test_peft_is_told_which_rows(recipe, questions, bases):
    run = train(talk(recipe, bases["phi"], "method.kind=lora", "train.max_steps=1"))
    config = json.loads((run.final / "adapter_config.json").read_text("utf-8"))
    assert config["trainable_token_indices"] == {"embed_tokens": [320, 321, 322]}
    assert config["rank_pattern"] == config["alpha_pattern"] == {"lm_head": 3}


@pytest.mark.slow
def test_the_recipe_of_the_tutor_learns_on_a_phi_of_more_than_a_hundred_million(questions, tmp_path):
    """As it travels, but for the size of the base and the rate: 4 bits, new rows, paged states, checkpointing."""
    from maese import recipe as recipes
    from maese.generate.engine import open_writer

    folder = save_model(tmp_path / "phi", "phi", width=768, layers=12, vocabulary=32_000, max_position_embeddings=2048)
    changes = ["data.sources=[{path: preguntas.txt}]", "data.format=qa", "train.max_steps=12", "train.epochs=9"]
    more = [f"base={folder}", "train.lr=2e-3", "eval.prompts=[]", "output=tutor"]
    run = train(recipes.load("tutor-phi2", [*changes, *more]))
    plan = next(e for e in run.history() if e["type"] == "plan")
    losses = [e["loss"] for e in run.history() if e["type"] == "step"]
    assert plan["parameters"] >= 100e6 and plan["unpadded"] and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert 32_000 - 3 > max(open_writer(run).prompt_ids("¿Cuánto es 2 más 2?")) >= 320
