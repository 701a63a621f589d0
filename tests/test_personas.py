"""Personalities: many adapters over one base, each row its own; who answers is who it says; the chat keeps its word."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import make_model, make_voice

from maese.errors import MaeseError
from maese.generate import personas
from maese.generate.batch import write_many
from maese.generate.chat import Chat
from maese.generate.engine import Writer, open_writer
from maese.generate.personas import open_company
from maese.model import adapter, load
from maese.model.fingerprint import fingerprint
from maese.model.merge import merge
from maese.model.voices import BASE, mixes, speaking
from maese.recipe import INSIDE, Generate
from maese.text.record import Message

VOICES = {"ana": "Eres Ana.", "blas": "Eres Blas.", "carla": "Eres Carla."}
TEN = [
    "¿Qué es una pila?", "¿Y una cola?", "¿Quién eres?", "Hola", "¿Cuánto es 2 más 2?", "Cuéntame algo", "¿Por qué?",
    "Ordena 3, 1, 2", "¿Qué es un árbol?", "Adiós",
]  # fmt: skip


@pytest.fixture(scope="session")
def voices(tmp_path_factory, tiny, tiny_llama):
    """Three adapters over each tiny model, of ranks 2, 3 and 4, the second of them only in a part of the matrices."""
    found = {}
    for kind, base, part in (("gpt2", tiny, ["c_attn"]), ("llama", tiny_llama, ["q_proj", "up_proj"])):
        for i, (name, system) in enumerate(VOICES.items()):
            writing = Generate(system=system, max_new_tokens=12, temperature=0).model_dump()
            more = {"targets": part} if i == 1 else {}
            folder = tmp_path_factory.mktemp(kind) / name
            make_voice(folder, base, i, i + 2, **more, generate=writing, examples=[f"Hola, {name}"])
            found.setdefault(kind, []).append(folder)
    return found


@pytest.fixture(params=["gpt2", "llama"])
def base(request, tiny, tiny_llama):
    return {"gpt2": tiny, "llama": tiny_llama}[request.param]


@pytest.fixture
def company(base, voices, tiny):
    """Three who talk over one base; the tiny tokenizers carry no template, so their format is set here."""
    found = open_company(str(base), [str(folder) for folder in voices["gpt2" if base == tiny else "llama"]])
    for writer in found.writers.values():
        writer.format, writer.template = "qa", "plain"
    return found


def logits(model, ids):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids), use_cache=False).logits


def test_each_voice_gives_what_it_gives_alone(base, voices, tiny):
    import torch
    from peft import PeftModel

    folders = voices["gpt2" if base == tiny else "llama"]
    ids = [[46, 80, 71, 67], [9, 8, 7, 6], [40, 50, 60, 70], [5, 5, 5, 9]]
    model, alone = load.load_model(base), {BASE: load.load_model(base)}
    for folder in folders:
        model = adapter.attach(model, folder, base, folder.name)
        alone[folder.name] = PeftModel.from_pretrained(load.load_model(base), str(folder)).eval()
    mixed = ["carla", BASE, "ana", "blas"]
    assert mixes(model, mixed)
    with speaking(model, mixed):
        together = logits(model, ids)
    for i, name in enumerate(mixed):
        expected = logits(alone[name], [ids[i]])[0]
        assert torch.allclose(together[i], expected, atol=1e-5), name
        with speaking(model, [name]):
            assert torch.allclose(logits(model, [ids[i]])[0], expected, atol=1e-5), name
            assert fingerprint(model) == fingerprint(alone[name])
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_ten_questions_to_three_personalities(company):
    """Labels and weights, not taste: who is said to have answered is the one whose weights were at work."""
    prints = {name: writer.fingerprint() for name, writer in company.writers.items()}
    assert len({*prints.values()}) == 4
    said = {name: [] for name in VOICES}
    for question in TEN:
        answers = company.ask_all(question)
        assert [answer.persona for answer in answers] == [*VOICES]
        for answer in answers:
            said[answer.persona].append(answer.text)
            alone = company.writers[answer.persona].generate(question)
            assert (alone.text, alone.persona) == (answer.text, answer.persona)
    assert len({tuple(texts) for texts in said.values()}) == 3
    assert prints == {name: writer.fingerprint() for name, writer in company.writers.items()}


def test_those_of_the_package_answer_the_ten_questions_each_in_its_own_way():
    """The weights that ship: no two give the same answer, nor that of their base, and all go on as they were."""
    company = open_company("embedded-instruct", personas.shipped())
    assert [writer.name for writer in company.guests] == ["algoritmos", "narrador", "socratico"]
    everybody = [company.writers[company.main], *company.guests]
    prints = [writer.fingerprint() for writer in everybody]
    assert len({*prints}) == 4
    for question in TEN:
        answers = company.ask_all(question, of=everybody, temperature=0.0, max_new_tokens=24)
        assert [answer.persona for answer in answers] == [writer.name for writer in everybody]
        assert len({answer.text for answer in answers}) == 4, question
    assert prints == [writer.fingerprint() for writer in everybody]


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}])
def test_a_batch_says_what_each_says_alone(company, how):
    """Prompts of several lengths, one voice twice, the base among them; each draws as if it were alone."""
    names = ["ana", company.main, "carla", "ana"]
    writers = [company.writers[name] for name in names]
    asked = ["Hola", "¿Y por qué no ha de ser así, señor mío?", "¿Qué?", "Uno dos tres cuatro"]
    settings = [w.with_settings(how | {"seed": i, "max_new_tokens": 8 + 5 * i}) for i, w in enumerate(writers)]
    rows = [w.prompt_ids(text, (), s) for w, text, s in zip(writers, asked, settings, strict=True)]
    heard: dict[int, str] = {}
    ended: list[int] = []
    answers = write_many(
        writers,
        rows,
        settings,
        lambda i, piece: heard.update({i: heard.get(i, "") + piece}),
        lambda i, _: ended.append(i),
    )
    for i, (writer, text, s, answer) in enumerate(zip(writers, asked, settings, answers, strict=True)):
        alone = writer.generate(text, **s.model_dump())
        assert (answer.ids, answer.text, answer.reason) == (alone.ids, alone.text, alone.reason), i
        assert heard.get(i, "") == answer.text
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_batch_refuses_what_does_not_fit_and_ends_by_its_marks(company):
    with pytest.raises(MaeseError, match="GEN-01"):
        company.ask_all("hola " * 200)
    long = company.ask_all("Hola", max_new_tokens=1000)
    assert all(answer.reason in ("context", "end") for answer in long)
    letter = next(c for c in long[0].text if c.strip())
    assert company.ask_all("Hola", max_new_tokens=1000, stop=[letter])[0].reason == "stop"


def test_a_row_that_reaches_the_context_lets_the_others_go_on(company):
    """Learned positions end with the table: a row that is over must not be counted past it."""
    writers = [company.writers["ana"], company.writers["blas"]]
    settings = [w.with_settings({"temperature": 1.0, "max_new_tokens": 60}) for w in writers]
    rows = [[40 + i % 90 for i in range(120)], [46, 80, 71, 67, 9]]
    long, short = write_many(writers, rows, settings)
    assert long.reason in ("context", "end") and len(short.ids) > 20
    alone = write_many(writers[1:], rows[1:], settings[1:])[0]
    assert short.ids == alone.ids


def test_adapters_that_are_more_than_lora_are_written_one_after_another(tiny, tmp_path, voices):
    """DoRA and added tokens are PEFT's own affair: they are asked alone, and say what they say alone."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    for name, more in {"dora": {"use_dora": True}, "marcas": {"trainable_token_indices": [5, 46, 80]}}.items():
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **more)
        model = get_peft_model(load.load_model(tiny), config)
        for path, parameter in model.named_parameters():
            if "lora_B" in path or "trainable_tokens" in path:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        load.load_tokenizer(tiny).save_pretrained(tmp_path / name)
        company = open_company(str(tiny), [str(voices["gpt2"][0]), str(tmp_path / name)])
        writers = company.personas
        assert not mixes(company.model, [writer.voice for writer in writers])
        answers = company.ask_all("Hola", temperature=0.0, max_new_tokens=10)
        assert [a.ids for a in answers] == [w.generate("Hola", temperature=0.0, max_new_tokens=10).ids for w in writers]
        for folder, writer, answer in zip((voices["gpt2"][0], tmp_path / name), writers, answers, strict=True):
            alone = PeftModel.from_pretrained(load.load_model(tiny), str(folder)).eval()
            bare = Writer(alone, writer.tokenizer, Generate(temperature=0, max_new_tokens=10))
            assert answer.ids == bare.generate("Hola").ids, name


def of_peft(tiny, folder, config, stirred="lora_B"):
    """The folder of an adapter that PEFT made over the tiny base, without our notes."""
    import torch
    from peft import get_peft_model

    model = get_peft_model(load.load_model(tiny), config)
    for path, parameter in model.named_parameters():
        if stirred in path:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["pissa", "olora", "IA3", "PROMPT_TUNING", "bias"])
def test_an_adapter_that_would_change_the_base_of_others_is_refused(tiny, tmp_path, voices, kind):
    """PiSSA takes from the base's matrices when it is opened: everybody over it would write otherwise from then on."""
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    config = {
        "pissa": lambda: LoraConfig(**lora, init_lora_weights="pissa"),
        "olora": lambda: LoraConfig(**lora, init_lora_weights="olora"),
        "bias": lambda: LoraConfig(**lora, bias="all"),
        "IA3": lambda: IA3Config(target_modules=["c_attn"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    folder = of_peft(tiny, tmp_path / kind, config)
    company = open_company(str(tiny), [str(voices["gpt2"][0])])
    before = [
        (w.fingerprint(), w.generate("Hola", temperature=0, max_new_tokens=8).ids) for w in company.writers.values()
    ]
    with pytest.raises(MaeseError) as problem:
        company.add(folder)
    assert problem.value.code == "ADAPT-06" and kind in str(problem.value)
    assert before == [
        (w.fingerprint(), w.generate("Hola", temperature=0, max_new_tokens=8).ids) for w in company.writers.values()
    ]
    if kind == "bias":  # alone there is nobody it could harm; but nobody comes after it
        with pytest.raises(MaeseError, match="ADAPT-06"):
            open_company(folder, [str(voices["gpt2"][0])])


def test_an_adapter_of_the_table_of_words_leaves_the_others_their_table(tiny, tmp_path, voices):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    folder = of_peft(tiny, tmp_path / "tabla", config, "lora_embedding_B")
    company = open_company(str(tiny), [str(voices["gpt2"][0])])
    (other,) = company.personas
    before = other.generate("Hola", temperature=0, max_new_tokens=8).ids
    company.add(folder).generate("Hola", max_new_tokens=2)
    assert other.generate("Hola", temperature=0, max_new_tokens=8).ids == before


@pytest.mark.parametrize("lost", ["lora_magnitude_vector", "modules_to_save"])
def test_an_adapter_that_lost_a_part_is_refused(tiny, tmp_path, lost):
    """PEFT fills what is missing with what does nothing, and DoRA would speak with half of what it learnt."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    more = {"use_dora": True} if lost == "lora_magnitude_vector" else {"modules_to_save": ["ln_f"]}
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **more)
    path = Path(of_peft(tiny, tmp_path / "rota", config)) / adapter.WEIGHTS
    whole = load_file(path)
    left = {name: tensor for name, tensor in whole.items() if lost not in name and "ln_f" not in name}
    assert len(left) < len(whole)
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(MaeseError, match="MODEL-06"):
        open_writer(str(path.parent))


def test_a_family_that_keeps_no_cache_is_written_row_by_row(tiny):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, **ends)).eval()
    writer = Writer(model, load.load_tokenizer(tiny), Generate(temperature=0, max_new_tokens=6))
    rows = [writer.prompt_ids(text) for text in ("Hola", "En un lugar de la")]
    answers = write_many([writer] * 2, rows, [writer.settings] * 2)
    assert [a.ids for a in answers] == [writer.generate(text).ids for text in ("Hola", "En un lugar de la")]


# Memory and time


def tensor_bytes(model) -> int:
    """What the model holds, and while some speak, the matrices they speak with, which are no parameters."""
    at_work = [layer.__dict__.get("forward") for layer in model.modules()]
    held = [*model.parameters(), *(matrix for voice in at_work if voice for matrix in (voice.a, voice.b))]
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in held if p.numel()}.values())


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The packaged model with eight adapters of the size that those of the package have, in bf16 as they travel."""
    from safetensors.torch import load_file, save_file

    folder = make_voice(tmp_path_factory.mktemp("voz") / "una", INSIDE["embedded"], rank=8)
    path = folder / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    model = load.load_model(INSIDE["embedded"])
    alone = tensor_bytes(model)
    for i in range(8):
        model = adapter.attach(model, folder, INSIDE["embedded"], f"v{i}")
    return model, alone


def test_the_memory_of_a_base_and_eight_adapters(eight):
    """Those that wait weigh what their files do; those that speak, besides, their matrices in the bits of the base."""
    import torch

    model, alone = eight
    kinds = {p.dtype for name, p in model.named_parameters() if ".lora_" in name}
    assert kinds == {torch.bfloat16}
    waiting = tensor_bytes(model)
    assert alone < waiting <= 1.15 * alone
    for names, most in ((["v3"], 1.18), ([f"v{i}" for i in range(8)], 1.45)):
        with speaking(model, names):
            assert waiting < tensor_bytes(model) <= most * alone, (names, tensor_bytes(model) / alone)
    assert tensor_bytes(model) == waiting


def test_switching_takes_no_time_and_reads_nothing(eight, monkeypatch):
    model, _ = eight
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    monkeypatch.setattr(adapter, "attach", None)
    taken = []
    for name in ("v0", "v5", BASE, "v0", "v7"):
        began = time.perf_counter()
        with speaking(model, [name]):
            taken.append(time.perf_counter() - began)
            assert name == BASE or model.active_adapter == name
            assert not any(p.requires_grad for p in model.parameters())
    assert sorted(taken)[2] < 0.2, taken
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


# The voice


def test_the_voice_of_a_recipe_goes_before_what_has_none(tiny):
    writer = open_writer(str(tiny))
    writer.format, writer.settings = "qa", Generate(system="Hablas en verso.")
    said = writer.tokenizer.decode(writer.prompt_ids("¿Qué es?"))
    assert said.startswith("Hablas en verso.\n") and said.endswith("¿Qué es?\nRespuesta:")
    own = (Message("system", "Hablas en prosa."),)
    assert "verso" not in writer.tokenizer.decode(writer.prompt_ids("¿Qué es?", own))
    for other in ("", "Callas."):
        chosen = writer.with_settings({"system": other})
        assert writer.tokenizer.decode(writer.prompt_ids("¿Qué es?", (), chosen)).startswith(other or "Pregunta")
    writer.format = "text"  # continues what is typed, and reads no message
    assert writer.tokenizer.decode(writer.prompt_ids("¿Qué es?")) == "¿Qué es?"


def test_a_run_keeps_its_voice_and_is_a_personality(recipe, questions, tiny):
    from maese.train.loop import train

    asked = ["method.kind=lora", "data.sources=[{path: preguntas.txt}]", "data.format=qa", "data.max_length=96"]
    run = train(recipe(*asked, "data.too_long=error", "generate.system=Cuentas despacio.", "output=runs/cuentas"))
    told = [event["text"] for event in run.events() if event["type"] == "sample" and event["final"]]
    own, mute = (open_writer(run).generate("En un lugar", **more).text for more in ({}, {"system": ""}))
    assert told == [own] != [mute], "the samples on the way hear the voice too"
    about = adapter.about_adapter(run.final)
    assert about["name"] == "prueba" and about["generate"]["system"] == "Cuentas despacio."
    assert about["examples"] == ["En un lugar"] and about["format"] == "qa"
    for what in ("runs/cuentas", "runs/cuentas/final", "cuentas"):
        company = open_company(str(tiny), [what])
        writer = company.guests[0]
        assert writer.name == ("cuentas" if what == "cuentas" else "prueba")
        assert writer.settings.system == "Cuentas despacio." and company.examples(writer.name) == ["En un lugar"]
        said = writer.generate("¿Cuánto es 3?", temperature=0.0)
        assert said.ids == open_writer(run).generate("¿Cuánto es 3?", temperature=0.0).ids
        assert company.base(writer).fingerprint() == fingerprint(load.load_model(tiny))
    main = open_company(run)
    assert main.guests == [] and [w.name for w in main.personas] == ["prueba"]
    assert main.add("cuentas") is main.writers["prueba"], "an adapter that is here is not read again"


def test_an_adapter_is_read_once(tiny, voices, monkeypatch):
    company, calls = open_company(str(tiny)), []
    real = adapter.attach
    monkeypatch.setattr(adapter, "attach", lambda *given: calls.append(given) or real(*given))
    one = company.add(str(voices["gpt2"][0]))
    assert company.add(str(voices["gpt2"][0])) is one and len(calls) == 1
    other = company.add(str(voices["gpt2"][1]))
    assert company.model is one.model is other.model is company.writers[company.main].model


def test_two_of_one_name_are_told_apart(tiny, voices, tmp_path):
    shutil.copytree(voices["gpt2"][0], tmp_path / "ana")
    company = open_company(str(tiny), [str(voices["gpt2"][0]), str(tmp_path / "ana")])
    assert [w.name for w in company.guests] == ["ana", "ana-2"]


def test_those_of_the_package_are_found_by_name_and_offered_where_they_fit(
    tiny, tiny_llama, tmp_path, monkeypatch, voices, maese
):
    for folder in voices["gpt2"]:
        shutil.copytree(folder, tmp_path / folder.name)
        for path in (tmp_path / folder.name).glob("tokenizer*"):
            path.unlink()  # theirs is that of the base
        notes = adapter.about_adapter(folder) | {"template": "plain"}
        (tmp_path / folder.name / adapter.ABOUT).write_text(json.dumps(notes), encoding="utf-8")
    monkeypatch.setattr(personas, "PERSONAS", tmp_path)
    assert open_company(str(tiny), ["ana"]).guests[0].format == "messages"
    assert personas.shipped() == personas.fitting(tiny) == [*VOICES] and personas.fitting(tiny_llama) == []
    chat = Chat(open_company(str(tiny), ["blas"]))
    key, facts = chat.command("/persona")
    assert key == "chat.personas_more" and facts == {
        "now": "blas",
        "loaded": f"{tiny}".rpartition("/")[2] + ", blas",
        "more": "ana, carla",
    }
    assert chat.command("/persona carla") == ("chat.persona", {"name": "carla"}) and chat.writer.name == "carla"
    assert len(chat.company.guests) == 2
    with pytest.raises(MaeseError, match="ADAPT-01") as problem:
        open_company(str(tiny_llama), ["ana"])
    assert problem.value.facts["adapter"] == "ana"
    # By its name alone it comes with its base; by its folder it has the words of its base.
    for opened in (open_company("ana"), open_company("ana", ["blas"])):
        assert Chat(opened).writer.name == "ana" and opened.main == f"{tiny}".rpartition("/")[2]
    said = open_company("ana").generate("Hola", "ana", temperature=0.0, max_new_tokens=6).text
    assert open_writer(str(tmp_path / "ana")).generate("Hola", temperature=0.0, max_new_tokens=6).text == said
    assert maese("generate", "ana", "Hola", "--greedy", "--max-new-tokens", 6)[1] == f"{said}\n"
    assert load.load_tokenizer(merge(str(tmp_path / "ana"), tmp_path / "entera").path)("Hola")["input_ids"]


# What can go wrong


def test_names_that_are_no_personality(recipe, here, tiny):
    from maese.train.loop import train

    run = train(recipe("output=runs/2026-01-01-entera"))
    with pytest.raises(MaeseError) as problem:
        open_company(str(tiny), ["entera"])
    assert problem.value.code == "PERSONA-02" and problem.value.facts["run"] == str(run.path)
    shutil.rmtree(run.final)
    with pytest.raises(MaeseError, match="RUN-05"):
        personas.find("entera")
    make_voice(here / "runs" / "2026-01-02-voz" / "final", tiny)
    with pytest.raises(MaeseError) as problem:
        personas.find("vos")
    assert problem.value.code == "PERSONA-01" and problem.value.facts["nearest"] == "voz"
    assert "voz" in problem.value.facts["known"]


def test_a_base_that_was_moved(here, tiny, maese):
    """The error says where it was; the base given where it is now, with the adapter as personality, works."""
    shutil.copytree(tiny, here / "base")
    make_voice(here / "voz", here / "base")
    (here / "base").rename(here / "otra")
    with pytest.raises(MaeseError) as problem:
        open_writer("voz")
    assert problem.value.code == "ADAPT-04" and problem.value.facts == {"path": "voz", "base": str(here / "base")}
    assert "--persona voz" in str(problem.value)
    assert open_company("otra", ["voz"]).guests[0].generate("Hola", max_new_tokens=2).persona == "voz"
    with pytest.raises(MaeseError, match="ADAPT-01"):  # the same shape, other weights
        open_company(str(make_model(here / "ajena", seed=9)), ["voz"])
    code, _, said = maese("export", "voz", "entero")
    assert code == 1 and "ADAPT-04" in said and "export voz CARPETA_NUEVA --base CARPETA_DE_LA_BASE" in said
    code, _, said = maese("export", "voz", "entero", "--base", "ajena")
    assert code == 1 and "ADAPT-01" in said
    assert maese("export", "voz", "entero", "--base", "otra")[0] == 0 and (here / "entero" / "config.json").is_file()


def test_the_base_of_an_adapter_without_our_notes_is_the_one_that_peft_noted(here, tiny):
    make_voice(here / "voz", tiny)
    (here / "voz" / adapter.ABOUT).unlink()
    assert adapter.base_of(here / "voz") == tiny and adapter.base_of(here / "voz", "embedded") == INSIDE["embedded"]
    assert open_writer("voz", base=True).fingerprint() == fingerprint(load.load_model(tiny))
    config = json.loads((here / "voz" / adapter.CONFIG).read_text("utf-8"))
    for gone in (str(here / "nada"), None):
        (here / "voz" / adapter.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": gone}), "utf-8")
        with pytest.raises(MaeseError, match="ADAPT-04"):
            adapter.base_of(here / "voz")


def test_the_base_of_an_adapter_is_asked_without_it(tiny, voices, maese):
    folder = str(voices["gpt2"][0])
    bare = open_writer(folder, base=True)
    assert bare.fingerprint() == fingerprint(load.load_model(tiny)) != open_writer(folder).fingerprint()
    said = maese("generate", folder, "Hola", "--base", "--greedy", "--max-new-tokens", "8")
    assert said[1] == f"Hola{bare.generate('Hola', temperature=0.0, max_new_tokens=8).text}\n"
    assert said[1] != maese("generate", folder, "Hola", "--greedy", "--max-new-tokens", "8")[1]


def test_what_a_recipe_takes_as_base_reaches_the_loading_code(here, monkeypatch):
    monkeypatch.setitem(load.PACKAGED, "smollm2", "llm-of-no-package")
    codes = {"smollm2": "MODEL-07", "gpt2-xl": "MODEL-01", "gpt2@main": "MODEL-01", "nada.gguf": "MODEL-01"}
    found = {}
    for name in codes:
        with pytest.raises(MaeseError) as problem:
            open_company(name)
        found[name] = problem.value.code
    assert found == codes


@pytest.mark.parametrize("name", [adapter.WEIGHTS, adapter.CONFIG, adapter.ABOUT])
def test_an_adapter_of_which_a_file_is_cut(here, tiny, voices, name):
    folder = shutil.copytree(voices["gpt2"][0], here / "rota")
    company = open_company(str(tiny))
    for left in (0.5, 0.0):
        whole = (voices["gpt2"][0] / name).read_bytes()
        (folder / name).write_bytes(whole[: int(left * len(whole))])
        for opened in (open_writer, company.add):
            with pytest.raises(MaeseError) as problem:
                opened(str(folder))
            assert problem.value.code == "MODEL-06" and name in str(problem.value)


def spoilt(folder, copy, config=None, tensors=None, about=None):
    """A copy of an adapter with other notes of PEFT's, other tensors or other notes of ours."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    for name, keys in ((adapter.CONFIG, config), (adapter.ABOUT, about)):
        if keys is not None:
            kept = json.loads((copy / name).read_text("utf-8"))
            kept = keys if keys == {} else {key: value for key, value in (kept | keys).items() if value != "gone"}
            (copy / name).write_text(json.dumps(kept), encoding="utf-8")
    if tensors:
        found = tensors(load_file(copy / adapter.WEIGHTS))
        save_file(found, copy / adapter.WEIGHTS, metadata={"format": "pt"})
    return str(copy)


def with_first(change):
    """The tensors of an adapter with the first one changed, or without it."""

    def change_first(tensors):
        name = min(tensors)
        new = change(tensors.pop(name))
        return tensors | ({} if new is None else {name: new})

    return change_first


SPOILT = {
    "rank 0": {"config": {"r": 0}},
    "rank of letters": {"config": {"r": "abc"}},
    "another rank": {"config": {"r": 3}},
    "no target": {"config": {"target_modules": ["q_proj"]}},
    "fewer targets": {"config": {"target_modules": ["c_attn"]}},
    "no kind of PEFT's": {"config": {"peft_type": "XYZ"}},
    "no kind": {"config": {"peft_type": "gone"}},
    "nothing": {"config": {}},
    "NaN": {"tensors": with_first(lambda tensor: tensor * float("nan"))},
    "infinite": {"tensors": with_first(lambda tensor: tensor.fill_(float("inf")))},
    "half a pair": {"tensors": with_first(lambda tensor: None)},
    "no tensors": {"tensors": lambda tensors: {}},
    "ways that are a list": {"about": {"generate": [1]}},
    "a name that is a number": {"about": {"name": 5}},
    "examples that are a number": {"about": {"examples": 5}},
}


@pytest.mark.parametrize("fault", SPOILT)
def test_an_adapter_whose_files_do_not_go_together(here, tiny, voices, fault):
    """All of it JSON and safetensors, and of no use: it is said, and those who speak over the base go on unchanged."""
    folder = spoilt(voices["gpt2"][0], here / "rota", **SPOILT[fault])
    with pytest.raises(MaeseError, match="MODEL-06"):
        open_writer(folder)
    for guests in ([], [str(voices["gpt2"][1])]):
        company = open_company(str(tiny), guests)
        before = [company.model, company.generate("Hola", temperature=0.0, max_new_tokens=8).text, *company.writers]
        prints = [writer.fingerprint() for writer in company.writers.values()]
        with pytest.raises(MaeseError, match="MODEL-06"):
            company.add(folder)
        after = [company.model, company.generate("Hola", temperature=0.0, max_new_tokens=8).text, *company.writers]
        assert before == after and prints == [writer.fingerprint() for writer in company.writers.values()]
        assert [writer.name for writer in company.personas] == ["blas"][: len(guests)]
        assert company.add(str(voices["gpt2"][2])).generate("Hola", max_new_tokens=2).persona == "carla"
        assert len({writer.fingerprint() for writer in company.writers.values()}) == 2 + len(guests)


def test_an_adapter_without_its_weights(here, tiny, voices):
    folder = shutil.copytree(voices["gpt2"][0], here / "rota")
    (folder / adapter.WEIGHTS).unlink()
    with pytest.raises(MaeseError, match="MODEL-06"):
        open_company(str(tiny), [str(folder)])
    (folder / "adapter_model.bin").touch()
    with pytest.raises(MaeseError, match="MODEL-03"):
        open_company(str(tiny), [str(folder)])


def test_a_way_of_writing_that_a_folder_says_is_told_with_its_file(here, tiny, voices):
    folder = spoilt(voices["gpt2"][0], here / "rota", about={"generate": {"temperature": "alta"}})
    with pytest.raises(MaeseError, match="GEN-03") as problem:
        open_writer(folder)
    assert "explain generate.temperature " in str(problem.value) and adapter.ABOUT in str(problem.value)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0}])
def test_a_base_that_gives_no_numbers_is_told(tiny, how):
    import torch

    writer = open_writer(str(tiny))
    with torch.no_grad():
        writer.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(MaeseError, match="GEN-02"):
        writer.generate("Hola", **how)
    with pytest.raises(MaeseError, match="GEN-02"):
        write_many([writer], [writer.prompt_ids("Hola")], [writer.with_settings(how)])


def test_an_adapter_of_another_shape_without_notes(here, tiny, tiny_llama, voices):
    """It is refused before anything is put on the model, which goes on as it was."""
    make_model(here / "ancho", wide=64)
    make_voice(here / "ancha", here / "ancho")
    shutil.copytree(voices["llama"][0], here / "llama")
    for name in ("ancha", "llama"):
        (here / name / adapter.ABOUT).unlink()
    company = open_company(str(tiny))
    before = company.generate("Hola", temperature=0.0, max_new_tokens=8).text
    for name in ("ancha", "llama"):
        with pytest.raises(MaeseError, match="ADAPT-01"):
            company.add(name)
    assert company.generate("Hola", temperature=0.0, max_new_tokens=8).text == before
    assert company.add(str(voices["gpt2"][0])).name == "ana"
    with pytest.raises(MaeseError, match="PERSONA-01"):
        company.generate("Hola", "nadie")
