"""The chat: what each command does, over the same pipe a person would use, and what it keeps when it is interrupted."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import make_voice

from maese import terminal_chat
from maese.cli import run as command_line
from maese.errors import MaeseError
from maese.generate import engine
from maese.generate.alternatives import alternatives
from maese.generate.chat import Chat
from maese.generate.engine import open_writer
from maese.generate.personas import open_company
from maese.model.load import context_of
from maese.recipe import Generate
from maese.tokens.template import open_template


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny):
    """Two personalities that talk over the tiny model: with a template, a voice, and questions to begin with."""
    from maese.model.load import load_tokenizer

    found = []
    for seed, name in enumerate(("ana", "blas")):
        writing = Generate(system=f"Soy {name}.", max_new_tokens=8, temperature=0).model_dump()
        folder = tmp_path_factory.mktemp("voces") / name
        make_voice(folder, tiny, seed, generate=writing, format="messages", examples=[f"Hola, {name}"])
        tokenizer = load_tokenizer(tiny)
        tokenizer.chat_template = open_template("plain", tokenizer).jinja
        tokenizer.save_pretrained(folder)
        found.append(str(folder))
    return found


@pytest.fixture
def talk(tiny, folders, capsys, monkeypatch, here):
    """`talk("Hola", "/next", flags=[…])`: what a chat with both personalities wrote, and what it said."""
    monkeypatch.setenv("NO_COLOR", "1")

    def typed(*lines: str, flags: tuple[str, ...] = (), who: list[str] = folders, top: tuple[str, ...] = ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        asked = [word for folder in who for word in ("--persona", folder)]
        code = command_line([*top, "chat", str(tiny), *asked, *flags])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out, said.err

    return typed


@pytest.fixture
def chat(tiny, folders):
    return Chat(open_company(str(tiny), folders))


def test_each_reply_says_who_wrote_it(talk):
    out, said = talk("Hola", "/persona blas", "Hola", "/persona")
    assert "Conversas con «ana»" in said and "Para empezar: «Hola, ana»" in said
    assert "Ahora responde «blas»." in said and "«Hola, blas»" in said
    lines = [line for line in said.splitlines() if "tokens/s" in line]
    assert [line.split(" · ")[0] for line in lines] == ["ana", "blas"]
    assert "Responde «blas»" in said and "ana>" not in out, "over a pipe, stdout is what was written and nothing else"


def test_ask_all_labels_every_reply(talk, folders, tiny):
    out, said = talk("/ask-all ¿Quién eres?")
    company = open_company(str(tiny), folders)
    expected = [f"{a.persona}> {a.text}" for a in company.ask_all("¿Quién eres?")]
    assert out == "\n".join(expected) + "\n" and out.startswith("ana> ") and "\nblas> " in out
    assert said.count("tokens/s") == 2


def test_data_comes_out_as_json(talk):
    out, said = talk("Hola", "/clear", "/ask-all Hola", "/next 2", top=("--json",))
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("persona") for row in rows] == ["ana", "ana", "blas", None, None] and said == ""
    assert rows[0]["text"] == rows[1]["text"] and len(rows[3]["best"]) == 5 and rows[3]["token"]


def test_next_shows_five_for_each_token(talk, chat):
    answer = chat.reply("Hola")
    _, places = chat.alternatives()
    assert [place.token for place in places] == [*answer.ids]
    for place in places:
        assert len(place.best) == 5 and [p for _, p in place.best] == sorted((p for _, p in place.best), reverse=True)
    out, said = talk("Hola", "/next", "/next 2")
    rows = [line for line in out.splitlines() if line.count("%") == 6]
    assert len(rows) == len(answer.ids) + 2 and "antes de temperatura" in said


def test_the_probabilities_are_those_of_the_model(tiny):
    import torch

    writer = open_writer(str(tiny))
    prompt = writer.prompt_ids("En un lugar")
    answer = writer.generate("En un lugar", temperature=0.0, repetition_penalty=1.0, max_new_tokens=5)
    places = alternatives(writer, prompt, answer.ids)
    with torch.inference_mode():
        for i, place in enumerate(places):
            ids = torch.tensor([[*prompt, *answer.ids[:i]]])
            chances = writer.model(input_ids=ids).logits[0, -1].softmax(-1)
            assert place.best[0][0] == place.token and place.chance == pytest.approx(float(chances.max()), abs=1e-5)
    assert alternatives(writer, prompt, ()) == []


def test_compare_asks_the_base_the_same(talk, chat):
    answer = chat.reply("Hola")
    exchange, bare, prints = chat.on_base()
    assert prints[0] != prints[1] and exchange.answer is answer and bare.persona == ""
    ids = exchange.writer.prompt_ids("Hola")
    assert chat.company.base(exchange.writer).prompt_ids("Hola") == ids, "only the adapter is another"
    assert len(chat.turns) == 2, "what the base says is no turn"
    out, said = talk("Hola", "/compare")
    assert f"base> {bare.text}" in out and prints[0][:8] in said and prints[1][:8] in said


def test_the_base_of_a_run_of_whole_weights_is_opened(recipe, tiny):
    from maese.train.loop import train

    run = train(recipe("train.lr=1e-2", "output=runs/entera"))
    chat = Chat(open_company("runs/entera"))
    chat.reply("En un lugar")
    _, _, prints = chat.on_base()
    assert prints[0] == open_writer(str(tiny)).fingerprint() and prints[1] == open_writer(run).fingerprint()
    assert chat.company.base(chat.writer) is chat.company.base(chat.writer), "opened once"


def interrupted(monkeypatch, after: int) -> None:
    """As if Ctrl+C came while the token after so many was being made."""
    real = engine.stream_ids

    def stream(*given):
        for i, token in enumerate(real(*given)):
            if i == after:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(engine, "stream_ids", stream)


def test_ctrl_c_stops_the_reply_and_keeps_what_was_written(talk, chat, monkeypatch):
    whole = chat.reply("Hola")
    chat.command("/clear")
    interrupted(monkeypatch, 3)
    half = chat.reply("Hola")
    assert half.reason == "stopped" and half.ids == whole.ids[:3] and whole.text.startswith(half.text)
    assert chat.turns[-1].stopped and chat.turns[-1].content == half.text.strip()
    out, said = talk("Hola", "/tokens", "/save charla.json")
    assert "Respuesta detenida: lo escrito queda como turno." in said and "/save" not in out
    kept = json.loads(Path("charla.json").read_text("utf-8"))["messages"]
    assert [m["role"] for m in kept] == ["user", "assistant"] and kept[1]["stopped"] is True


def test_a_reply_stopped_before_its_first_word_is_no_turn(chat, talk, monkeypatch):
    interrupted(monkeypatch, 0)
    assert chat.reply("Hola").text == "" and chat.turns == [] and chat.last is None
    assert "la pregunta no cuenta" in talk("Hola")[1]


def test_ctrl_c_stops_everybody_who_is_writing(chat, monkeypatch):
    from maese.generate import batch

    real, calls = batch.draw, []

    def draw(*given):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(batch, "draw", draw)
    answers = chat.ask_all("Hola")
    assert [a.reason for a in answers] == ["stopped"] * 2 and len(answers[0].ids) == 2
    monkeypatch.setattr(batch, "draw", real)
    assert chat.ask_all("Hola")[0].reason != "stopped", "and nothing of it stays in the model"


def test_elsewhere_ctrl_c_still_ends_the_program(tiny, monkeypatch):
    interrupted(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        open_writer(str(tiny)).generate("Hola")


def test_the_voice_stays_while_turns_are_dropped(chat):
    for i in range(9):
        chat.reply(f"¿{i}?")
    assert chat.dropped > 0 and chat.dropped % 2 == 0
    exchange = chat.last
    ids = exchange.writer.prompt_ids(exchange.prompt, exchange.before, exchange.settings)
    text = exchange.writer.tokenizer.decode(ids)
    assert text.startswith("Soy ana.") and exchange.before[0].role == "user"
    assert len(ids) + 8 <= context_of(chat.writer.model)


def test_a_voice_taken_away_is_given_back(chat):
    """One asked for counts for everybody; `+` gives each its own."""
    own = chat.chosen.system
    chat.command("/system Grita.")
    assert chat.chosen.system == "Grita."
    chat.command("/system -")
    assert not chat.chosen.system
    chat.command("/system +")
    assert chat.chosen.system == own


def test_what_is_said_of_a_reply_that_was_stopped_is_true(chat, monkeypatch, capsys):
    """That of the base is no turn, and no model is to blame for the sentences it was not let write."""
    room = terminal_chat.Room(chat, None, json=False, quiet=0)
    room.do("/sentences 3")
    room.do("Hola")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        room.do("/compare")
    told = capsys.readouterr().err
    assert "Respuesta detenida." in told and "queda como turno" not in told and "semilla:" not in told
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        room.do("Otra")
    assert "queda como turno" in capsys.readouterr().err


def test_a_reply_that_ends_with_the_context_says_so(chat, capsys):
    room = terminal_chat.Room(chat, None, json=False, quiet=0)
    long = "larga " * 40
    while len(chat.writer.prompt_ids(long, (), chat.chosen)) > context_of(chat.writer.model) - 4:
        long = long[:-6]
    chat.settings |= {"max_new_tokens": 30, "temperature": 0.0}
    room.do(long)
    assert f"no lee más de {context_of(chat.writer.model)} tokens" in capsys.readouterr().err


def test_the_window_is_said_to_have_lost_turns(talk):
    _, said = talk(*["¿Y cuánto será todo esto, si puede saberse?"] * 4, flags=("--max-new-tokens", "40"))
    assert "se ha dejado fuera el turno más antiguo" in said


def test_settings_are_commands_and_flags_alike(talk):
    plain = talk("Hola")[0]
    by_flag = talk("Hola", flags=("--system", "Hablas poco.", "--seed", "7", "--temperature", "1.5"))
    by_command = talk("/system Hablas poco.", "/seed 7", "/temperature 1,5", "Hola")
    assert by_flag[0] == by_command[0] != plain and "semilla 7" in by_command[1]
    assert "system = Hablas poco." in by_command[1] and "temperature = 1.5" in by_command[1]
    assert "temperature = 0.0\n" in talk("/temperature 0")[1] and "system = -" in talk("/system -")[1]
    assert talk("/system -", "Hola")[0] != plain


def test_retry_and_edit_take_the_last_question_back(chat, talk):
    _, said = talk("Hola", "/retry", "/save uno.json")
    assert "semilla 43" in said and len(json.loads(Path("uno.json").read_text("utf-8"))["messages"]) == 2
    talk("Hola", "/edit Adiós", "/save dos.json")
    assert json.loads(Path("dos.json").read_text("utf-8"))["messages"][0]["content"] == "Adiós"


@pytest.mark.parametrize("command", ["/retry", "/edit Adiós"])
def test_an_exchange_is_replaced_only_by_another(chat, monkeypatch, command):
    """Neither a question that does not fit nor Ctrl+C before the first word takes the last answer away."""
    room = terminal_chat.Room(chat, None, json=False, quiet=1)
    room.do("Hola")
    kept, last = [*chat.turns], chat.last
    with pytest.raises(MaeseError, match="GEN-01"):
        room.do("/edit " + "muy larga " * 200)
    assert chat.turns == kept and chat.last is last
    with monkeypatch.context() as patch:
        interrupted(patch, 0)
        room.do(command)
    assert chat.turns == kept and chat.last is last
    room.do(command)
    assert len(chat.turns) == 2 and chat.last is not last
    assert chat.turns[0].content == ("Hola" if command == "/retry" else "Adiós")


def test_a_file_of_somebody_else_is_never_written_over(chat, maese, tiny, here, monkeypatch):
    Path("LEEME.md").write_text("mío", encoding="utf-8")
    Path("charla.json").write_text("{}", encoding="utf-8")
    chat.reply("Hola")
    with pytest.raises(MaeseError) as problem:
        chat.command("/save LEEME.md")
    assert problem.value.code == "RUN-01" and problem.value.facts["free"] == "LEEME-2.md"
    for _ in range(2):  # what it wrote itself it writes again
        chat.command("/save otra.json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hola"))
    code, _, said = maese("chat", tiny, "--save", "charla.json")
    assert code == 1 and "RUN-01" in said and "charla-2.json" in said and Path("charla.json").read_text() == "{}"
    assert Path("LEEME.md").read_text("utf-8") == "mío"


def test_the_number_of_sentences_is_lifted_again(chat):
    chat.writer.settings = chat.writer.with_settings({"sentences": 4})
    for value in ("no", "0", "-"):
        assert chat.command("/sentences 3")[1]["value"] == "3" and chat.chosen.sentences == 3
        assert chat.command(f"/sentences {value}")[1]["value"] == "-" and chat.chosen.sentences is None


def test_ctrl_c_is_not_answered_with_another_try(tiny, monkeypatch):
    real, began = engine.stream_ids, []

    def stream(*given):
        began.append(1)
        for i, token in enumerate(real(*given)):
            if i == 2 and len(began) == stop_in:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(engine, "stream_ids", stream)
    writer = open_writer(str(tiny))
    for stop_in, reason in ((1, "stopped"), (2, "context")):
        began.clear()
        answer = writer.generate("Hola", sentences=50, stoppable=True)
        assert len(began) == stop_in and (answer.reason == reason or stop_in == 2)


def test_what_the_base_writes_leaves_nothing_training(tiny, folders):
    from maese.model.fingerprint import untouched

    model = open_company(str(tiny), folders).model
    with pytest.raises(KeyboardInterrupt), untouched(model):
        raise KeyboardInterrupt
    assert not any(p.requires_grad for p in model.parameters())


def test_the_conversation_is_kept_turn_by_turn(talk):
    talk("Hola", "/persona blas", "¿Y tú?", flags=("--save", "notas/charla.json"))
    kept = json.loads(Path("notas/charla.json").read_text("utf-8"))
    assert [m.get("persona") for m in kept["messages"]] == [None, "ana", None, "blas"]
    assert kept["voices"]["blas"] == "Soy blas."


def test_a_model_of_raw_text_says_that_it_reads_no_voice(talk, tiny):
    out, said = talk("/system Habla", "En un lugar", "/compare", who=[], flags=("--max-new-tokens", "4"))
    assert "no lee mensajes de sistema" in said and out.startswith("En un lugar") and "CHAT-02" in said


def test_odd_things_typed_do_not_end_a_conversation(talk, monkeypatch, here):
    """Names too long, counts that are no count, a house of nobody: each said, and the next question is answered."""
    monkeypatch.setenv("HOME", str(here / "casa"))
    odd = ["/persona " + "a" * 300, "/next ²", "/seed 1e400", "/save ~/charla.json", "/save .", "/edit", "/system"]
    _, said = talk("Hola", *odd, "/save " + "b" * 300, "👩\u200d👧 n\u0303", "/tokens")
    assert (
        "USE-15" in said
        and "GEN-03" in said
        and "maese train" not in said
        and "RUN-01" in said
        and said.count("tokens/s") == 3
    )
    assert (here / "casa" / "charla.json").is_file() and not (here / "~").exists()
    assert "tokens de 128 en la conversación" in said and "BUG" not in said


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 2 GiB", "otra cosa"])
def test_where_memory_runs_out_the_conversation_stays(talk, monkeypatch, words, capsys):
    real, asked = engine.stream_ids, []

    def stream(*given):
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError(words)
        yield from real(*given)

    monkeypatch.setattr(engine, "stream_ids", stream)
    if words == "otra cosa":
        with pytest.raises(AssertionError, match="BUG-01"):
            talk("Hola", "¿Y?", "Bien")
        return
    _, said = talk("Hola", "¿Y?", "Bien", "/save charla.json")
    assert "MEM-06" in said and said.count("tokens/s") == 2
    assert [m["content"] for m in json.loads(Path("charla.json").read_text("utf-8"))["messages"]][::2] == [
        "Hola",
        "Bien",
    ]


def test_half_a_character_in_a_voice_is_written_down(talk):
    talk("Hola", flags=("--system", "Habla \udcff.", "--save", "charla.json"))
    assert json.loads(Path("charla.json").read_text("utf-8"))["voices"]["ana"] == "Habla ?."


def test_a_voice_longer_than_the_context_is_said_and_can_be_taken_away(talk):
    _, said = talk("Hola", "/system -", "Hola", flags=("--system", "muy larga " * 200))
    assert "GEN-01" in said and "/system -" in said.split("system = -")[0] and said.count("tokens/s") == 1


@pytest.mark.parametrize("line", ["/retry", "/edit otra", "/next", "/compare", "/ask-all"])
def test_commands_about_an_answer_need_one(talk, line):
    assert "CHAT-01" in talk(line)[1]


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(talk, tiny, monkeypatch):
    out, said = talk("/persona nadie", "/ask-all Hola", "/nex", "Hola", who=[], flags=("--max-new-tokens", "3"))
    assert "PERSONA-01" in said and "PERSONA-03" in said and "¿Querías decir /next?" in said and out.startswith("Hola")
    alone = Chat(open_company(str(tiny)))
    with pytest.raises(MaeseError, match="CHAT-01"):
        alone.on_base()
    for asked in (alone, alone.company):
        with pytest.raises(MaeseError, match="PERSONA-03"):
            asked.ask_all("Hola")


def test_generate_takes_personalities_too(maese, tiny, folders):
    asked = ["--persona", folders[0], "--persona", folders[1]]
    status, out, said = maese("generate", tiny, "Hola", *asked)
    assert status == 0 and out.startswith("ana> ") and "\nblas> " in out and said.count("tokens/s") == 2
    one = maese("generate", tiny, "Hola", *asked[:2])
    assert f"ana> {one[1]}" == out[: len(one[1]) + 5] and "ana · " in one[2]
    rows = [json.loads(line) for line in maese("--json", "generate", tiny, "Hola", *asked)[1].splitlines()]
    assert [row["persona"] for row in rows] == ["ana", "blas"]
    bare = maese("generate", tiny, "Hola", "--base", *asked[:2])[1]
    assert bare != one[1] and maese("generate", tiny, "Hola", "--system", "Otra", *asked[:2])[1] != one[1]


def test_the_door_of_python(tiny, folders):
    import maese

    company = maese.company(str(tiny), *folders)
    assert [a.persona for a in company.ask_all("Hola")] == ["ana", "blas"]
    assert company.generate("Hola", "blas").persona == "blas"


# On a terminal


@pytest.mark.parametrize("width", [30, 60])
def test_no_word_is_cut_at_the_edge(monkeypatch, capsys, width):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((width, 24)))
    text = "Había una vez un hidalgo que leía  y leía.\n    sangrado, con 3,5\u00a0% de más\nFin"
    for size in (1, 3, 50):
        page = terminal_chat.Page(live=True)
        page.begin("ana> ")
        for i in range(0, len(text), size):
            page.write(text[i : i + size])
        page.end()
        out = capsys.readouterr().out
        assert out.split() == ("ana> " + text).split() and "\n    sangrado" in out
        assert all(len(line) < width for line in out.splitlines()) and out.endswith("Fin\n")
    line = "ana · 84 tokens · 31 tokens/s · 2,7 s · semilla 42 · T=0,7 top-k=50"
    folded = terminal_chat.fold(line, "  ")
    assert all(len(row) < width for row in folded.splitlines()) and folded.split() == line.split()


def test_ctrl_c_while_a_question_is_corrected_leaves_it_as_it_was(monkeypatch):
    from types import SimpleNamespace

    from maese.terminal_chat import Room

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", stopped)
    asked = []
    room = SimpleNamespace(chat=SimpleNamespace(asked="¿Qué?"), typed=True)
    room.ask = lambda *words, **_: asked.append(words)
    room.rewrite = lambda old: Room.rewrite(room, old)
    Room.edit(room, "")
    assert not asked
    monkeypatch.setattr("builtins.input", lambda _: " ¿Y esto? ")
    Room.edit(room, "")
    assert asked == [("¿Y esto?",)]
