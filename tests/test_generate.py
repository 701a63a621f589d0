"""Writing: our distribution = transformers', cached = uncached, exactly n sentences, never half a character."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from maese.errors import MaeseError
from maese.generate import sentences
from maese.generate.chat import Chat
from maese.generate.engine import Writer, open_writer, stream_ids
from maese.generate.personas import open_company
from maese.generate.sample import probabilities
from maese.recipe import Generate


@pytest.fixture(scope="module")
def writer(tiny):
    return open_writer(str(tiny))


@pytest.mark.parametrize("temperature", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_distribution_is_that_of_transformers(temperature, top_k, top_p, penalty):
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    seen = [3, 9, 9, 41]
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)
    settings = Generate(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    assert torch.allclose(probabilities(logits, settings, seen), expected, atol=1e-6)


def test_greedy_puts_everything_on_the_likeliest():
    import torch

    logits = torch.tensor([0.1, 3.0, 2.9])
    assert probabilities(logits, Generate(temperature=0, repetition_penalty=1), []).tolist() == [0, 1, 0]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}])
@pytest.mark.parametrize("which", ["tiny", "tiny_llama"])
def test_cached_is_the_same_as_reading_everything_again(request, which, settings):
    import torch

    from maese.generate.sample import draw

    model = open_writer(str(request.getfixturevalue(which))).model
    chosen = Generate(max_new_tokens=20, repetition_penalty=1.0, **settings)
    prompt = [46, 80, 71, 67]
    cached = list(stream_ids(model, prompt, chosen, set()))
    generator, ids = torch.Generator().manual_seed(chosen.seed), list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(draw(probabilities(logits, chosen, ids), generator))
    assert cached == ids[len(prompt) :]


def test_greedy_is_that_of_transformers(writer):
    import torch

    ids = writer.tokenizer("En un lugar", return_tensors="pt")["input_ids"]
    theirs = writer.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=15, eos_token_id=None
    )
    ours = list(
        stream_ids(
            writer.model, ids[0].tolist(), Generate(temperature=0, max_new_tokens=15, repetition_penalty=1), set()
        )
    )
    assert ours == theirs[0, ids.shape[1] :].tolist()


def test_same_seed_same_text(writer):
    one, two, other = (writer.generate("Hola", max_new_tokens=30, seed=s).text for s in (7, 7, 8))
    assert one == two != other


def test_writing_leaves_the_caller_out_of_inference_mode(writer):
    import torch

    stream = stream_ids(writer.model, [46, 80], Generate(max_new_tokens=5), set())
    next(stream)
    assert not torch.is_inference_mode_enabled()


def test_the_context_is_never_overrun(writer):
    answer = writer.generate("a" * 60, max_new_tokens=1000, stop=[])
    assert answer.reason in ("context", "end") and answer.tokens <= 128
    with pytest.raises(MaeseError, match="GEN-01"):
        writer.generate("ab " * 200)


def test_the_first_word_keeps_its_space(monkeypatch):
    """Llama-type tokenizers drop the space of whatever is decoded first: the prompt's last token stands before it."""

    class Metaspace:
        eos_token_id, bos_token_id = -1, None
        words = ("▁En", "▁un", "▁lugar", "▁de")

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    monkeypatch.setattr("maese.generate.engine.stream_ids", lambda *_: iter([2, 3]))
    monkeypatch.setattr("maese.generate.engine.Writer.prompt_ids", lambda *_: [0, 1])
    monkeypatch.setattr("maese.generate.engine.load.context_of", lambda _: 100)
    heard: list[str] = []
    answer = Writer(_NoModel(), Metaspace(), Generate()).generate("En un", on_text=heard.append)
    assert answer.text == " lugar de" == "".join(heard)


class Scripted:
    """A tokenizer and a list of ids standing where a model would, to say exactly what is written."""

    def __init__(self, monkeypatch, text: str, chunk: int = 1):
        raw = text.encode()
        pieces = [raw[i : i + chunk] for i in range(0, len(raw), chunk)]
        self.pieces, self.eos_token_id, self.bos_token_id = [*pieces, b"x"], -1, None  # the last one is the prompt
        monkeypatch.setattr("maese.generate.engine.stream_ids", lambda *_: iter(range(len(pieces))))
        monkeypatch.setattr("maese.generate.engine.Writer.prompt_ids", lambda *_: [len(pieces)])
        monkeypatch.setattr("maese.generate.engine.load.context_of", lambda _: 10_000)

    def get_vocab(self):
        return {"": len(self.pieces)}

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


class _NoModel:
    generation_config = None


def scripted(monkeypatch, text: str, chunk: int = 1) -> Writer:
    return Writer(_NoModel(), Scripted(monkeypatch, text, chunk), Generate(max_new_tokens=10_000))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_streaming_never_shows_half_a_character(monkeypatch, chunk):
    text = "El ñandú dijo «¡olé!» y se fue a Alcalá 🐤 de Henares…"
    heard: list[str] = []
    answer = scripted(monkeypatch, text, chunk).generate("x", on_text=heard.append)
    assert "".join(heard) == answer.text == text
    assert not any("\ufffd" in piece for piece in heard)


def test_a_character_cut_by_the_limit_is_left_out(monkeypatch):
    heard: list[str] = []
    writer = scripted(monkeypatch, "año", 1)
    monkeypatch.setattr("maese.generate.engine.stream_ids", lambda *_: iter(range(2)))
    assert writer.generate("x", on_text=heard.append).text == "a" == "".join(heard)


@pytest.mark.parametrize("live", [True, False])
def test_stop_marks_end_the_text_and_are_never_shown(monkeypatch, live):
    heard: list[str] = []
    writer = scripted(monkeypatch, "Son cuatro.\n###\nPregunta: otra")
    answer = writer.generate("x", stop=["###"], on_text=heard.append if live else None)
    assert answer.text == "Son cuatro.\n" and answer.reason == "stop"
    assert (
        writer.generate("x", stop=["Pregunta", "###"]).text == "Son cuatro.\n"
    )  # the first in the text, not in the list
    assert "".join(heard) == (answer.text if live else "")


def test_an_answer_does_not_begin_with_the_space_after_its_label(monkeypatch):
    heard: list[str] = []
    writer = scripted(monkeypatch, " Son cuatro.")
    writer.format, writer.renderer = "qa", SimpleNamespace(stop_ids=frozenset())
    assert writer.generate("x", on_text=heard.append).text == "Son cuatro." == "".join(heard)


STORY = "El sr. Quijano salió. —¿Viene? —dijo el mozo. ¡Ya voy! Eran las 3.5 leguas. Y volvió… Nadie lo vio. Fin."


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_exactly_n_sentences(monkeypatch, n):
    answer = scripted(monkeypatch, STORY).generate("x", sentences=n)
    assert answer.reason == "sentences" and answer.sentences == n == sentences.count(answer.text)
    assert STORY.startswith(answer.text)


def test_fewer_sentences_than_asked_are_not_passed_off_as_enough(monkeypatch):
    answer = scripted(monkeypatch, "Una. Dos. Y la tercera no acaba").generate("x", sentences=5)
    assert answer.reason != "sentences" and answer.sentences == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("Sin punto", 0),
        ("Sí. No.", 2),
        ("—¿Viene? —dijo. Sí, señor.", 2),
        ("El Sr. Pérez y la Dra. Ruiz salieron.", 1),
        ("«¡Vaya!» Y se fue.", 2),
        ("Costó 3.500 reales.", 1),
        ("¿Qué? ¡No! Basta…", 3),
        ("Vino D. Alonso.", 1),
        ("Uno. Vino el Sr.", 1),
        ("Fin.\nOtro párrafo.", 2),
    ],
)
def test_sentences_of_spanish_prose(text, expected):
    assert sentences.count(text) == expected


def test_chat_keeps_the_window_by_dropping_whole_turns(tiny):
    chat = Chat(open_company(str(tiny)), max_new_tokens=8, temperature=0)
    chat.writer.format = "qa"
    for i in range(12):
        chat.reply(f"¿Cuánto es {i}?")
    assert chat.dropped > 0 and chat.dropped % 2 == 0
    assert chat._that_fit("¿Y?")[0].role == "user"


def test_chat_commands(tiny, here):
    chat = Chat(open_company(str(tiny)), max_new_tokens=4)
    assert chat.command("/temperature 0,5") == ("chat.set", {"name": "temperature", "value": "0.5"})
    assert chat.command("/temperature") == ("chat.set", {"name": "temperature", "value": "0.5"})
    with pytest.raises(MaeseError, match="GEN-03"):
        chat.command("/top_p 7")
    assert chat.settings["temperature"] == 0.5 and "top_p" not in chat.settings
    assert chat.command("/volar")[0] == "chat.unknown"
    chat.reply("Hola")
    assert chat.command("/save charla.json")[0] == "chat.saved" and (here / "charla.json").is_file()
    assert chat.asked == "Hola" and len(chat.turns) == 2
    chat.reply("Hola")
    assert chat.command("/clear")[0] == "chat.cleared" and chat.turns == []


def test_a_family_whose_memory_has_another_name_writes_as_transformers_does(tmp_path):
    """Mamba gives no `past_key_values`: it reads everything again, and says the same."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    from maese.generate.engine import stream_ids
    from maese.recipe import Generate

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **ends)).eval()
    ids = torch.tensor([[5, 9, 2, 40]])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, 4:]
    settings = Generate(temperature=0, repetition_penalty=1, max_new_tokens=6)
    assert list(stream_ids(model, ids[0].tolist(), settings, set())) == theirs.tolist()


@pytest.mark.parametrize(
    ("said", "temperature"), [({"do_sample": True, "temperature": 0.3}, 0.3), ({"do_sample": False}, 0.0), ({}, 0.9)]
)
def test_a_model_folder_writes_as_it_says_that_it_does(tiny, here, said, temperature):
    import json
    import shutil

    folder = shutil.copytree(tiny, here / "modelo")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": None, **said}), "utf-8")
    settings = open_writer(str(folder)).settings
    assert (settings.temperature, settings.top_k) == (temperature, 50)
