"""The command line from one end to the other, on a model of two layers; and the panel, measured in characters."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from maese import __version__, live
from maese.cli import run as command_line
from maese.run import Run

RECIPE = """# La mía.
name: prueba
base: {base}
data: {{sources: [{{path: libro.txt}}], format: text, max_length: 32, too_long: split, validation: 0.2}}
train: {{max_steps: 6, micro_batch: 2, accumulation: 2, lr: 1e-2, precision: fp32, save_every: 2}}
eval: {{every: 3, prompts: [En un lugar]}}
generate: {{max_new_tokens: 12}}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny):
    """A folder with a recipe, a book and two runs trained from the command line: what they said is in `said`."""
    folder, before = tmp_path_factory.mktemp("taller"), Path.cwd()
    (folder / "receta.yaml").write_text(RECIPE.format(base=tiny), encoding="utf-8")
    (folder / "libro.txt").write_text("".join(f"Línea {i}: —¿Quién va? —dijo. ¡Ñu!\n" for i in range(60)), "utf-8")
    blocks = "".join(f"###\nPregunta: ¿Cuánto es {i}?\nRespuesta: Es {i}.\n" for i in range(60))
    (folder / "preguntas.txt").write_text(blocks, encoding="utf-8")
    said = {}
    os.chdir(folder)
    try:
        for name, words in {
            "texto": ["train", "receta.yaml", "output=runs/2026-01-01-texto"],
            "preguntas": [
                "--json", "train", "receta.yaml", "data.sources=[{path: preguntas.txt}]", "data.format=qa",
                "data.max_length=96", "data.too_long=error", "method.kind=lora", "output=runs/2026-01-02-preguntas",
            ],
        }.items():  # fmt: skip
            out, err = io.StringIO(), io.StringIO()
            old, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), (out, err)
            try:
                code = command_line(words)
            finally:
                sys.stdout, sys.stderr = old
            said[name] = (code, out.getvalue(), err.getvalue())
    finally:
        os.chdir(before)
    return types.SimpleNamespace(path=folder, said=said)


@pytest.fixture
def taller(workshop, monkeypatch):
    monkeypatch.chdir(workshop.path)
    return workshop


# Words


def test_welcome_and_version(maese):
    status, out, said = maese()
    assert status == 0 and said == ""
    assert f"maese {__version__}" in out and "maese demo" in out and "maese --lang en" in out
    assert maese("--version") == (0, f"maese {__version__}\n", "")


def test_welcome_in_english_when_asked_for(maese):
    assert "maese demo" in maese("--lang", "en")[1] and maese("--lang", "en")[1] != maese("--lang", "es")[1]


def test_help_in_spanish(maese):
    status, out, _ = maese("--help")
    assert status == 0 and out.startswith("Uso: maese")
    for command in (
        "demo",
        "new",
        "explain",
        "data",
        "train",
        "resume",
        "runs",
        "generate",
        "chat",
        "compare",
        "report",
    ):
        assert re.search(rf"^  {command} +\S", out, re.M), command
    status, out, _ = maese("train", "--help")
    assert status == 0 and "Ejemplos" in out and "maese train quijote" in out and "RECETA" in out
    assert maese("train", "-h")[1] == out


def test_help_in_english():
    command = [sys.executable, "-m", "maese", "--lang", "en", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.startswith("Usage: maese train")
    assert "Options" in done.stdout and "Examples" in done.stdout and "Opciones" not in done.stdout


def test_explain(maese):
    status, out, _ = maese("explain", "data-02")
    assert status == 0 and out.startswith("DATA-02: ") and "ñ" in out


def test_explain_says_what_mends_it(maese):
    """The facts of no case are known: «…» stands for them, and a line of facts alone is left out."""
    _, out, _ = maese("explain", "PERSONA-01")
    assert "\n  prueba:     maese chat MODELO --persona …\n" in out and "{" not in out
    assert "prueba:" not in maese("explain", "MEM-01")[1]


# Recipes


def test_new_makes_a_file_and_trains_nothing(maese, here):
    status, out, said = maese("new", "mia", "--from", "pokemon")
    assert status == 0 and out == "mia.yaml\n" and "maese train mia.yaml" in said
    assert [p.name for p in here.iterdir()] == ["mia.yaml"]
    from maese import recipe as recipes

    mine, theirs = recipes.load("mia.yaml"), recipes.load("pokemon")
    assert mine.name == "mia" and mine == theirs.model_copy(update={"name": "mia"})
    assert "# Teach a model" in Path("mia.yaml").read_text("utf-8"), "the reasons travel with the recipe"


@pytest.mark.parametrize("name", ["2024", "no", "1e3", "niño", "a.b-c_d"])
def test_any_usable_name_gives_a_usable_recipe(maese, here, name):
    assert maese("new", name)[0] == 0
    status, out, _ = maese("train", f"{name}.yaml", "--dry-run")
    assert status == 0 and out.splitlines()[0].replace("'", "") == f"name: {name}"


def test_new_refuses_what_exists_and_what_is_no_name(maese, here):
    Path("mia.yaml").write_text("lo mío", encoding="utf-8")
    status, out, said = maese("new", "mia")
    assert status == 1 and out == "" and "RUN-01" in said and "mia-2.yaml" in said
    assert Path("mia.yaml").read_text("utf-8") == "lo mío"
    assert maese("new", "../fuera")[0] == 1 and maese("new", "")[0] == 1
    assert [p.name for p in here.iterdir()] == ["mia.yaml"]


def test_dry_run_shows_every_value_and_trains_nothing(maese, here):
    import yaml

    status, out, said = maese("train", "quijote", "train.lr=2e-4", "--dry-run")
    assert status == 0 and said == "" and list(here.iterdir()) == []
    from maese import recipe as recipes

    assert recipes.check(yaml.safe_load(out)) == recipes.load("quijote", ["train.lr=2e-4"])


# Training


def test_stdout_of_a_training_is_the_folder_alone(taller):
    status, out, said = taller.said["texto"]
    assert status == 0 and out == "runs/2026-01-01-texto\n"
    for part in ("Plan · prueba", "paso 6/6", "validación", "RESUMEN", "maese compare runs/2026-01-01-texto"):
        assert part in said, part
    assert "\x1b" not in said


def test_json_is_events_on_stdout_and_silence_on_stderr(taller):
    status, out, said = taller.said["preguntas"]
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and said == ""
    assert [events[0]["type"], events[1]["type"], events[-1]["type"]] == ["start", "plan", "end"]
    assert events == Run("runs/2026-01-02-preguntas").events()
    assert [e["step"] for e in events if e["type"] == "step"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("quiet", ["-q", "-qq"])
def test_quiet(maese, recipe, monkeypatch, quiet):
    monkeypatch.setattr("maese.report.curves.plot", lambda run: None)
    recipe()
    status, out, said = maese(quiet, "train", "receta.yaml", "train.max_steps=2", "output=uno")
    assert status == 0 and out == "uno\n" and "Plan ·" not in said and "maese compare" not in said
    assert ("paso 2/2" in said) == (quiet == "-q") and (quiet == "-q" or said == "")


def test_runs_when_there_are_none(maese, here):
    status, out, said = maese("runs")
    assert status == 0 and out == "" and "maese demo" in said
    assert maese("--json", "runs")[:2] == (0, "[]\n")


def test_runs_tells_the_state_of_each(maese, recipe, monkeypatch):
    import psutil

    from maese import recipe as recipes

    text = recipes.dump(recipe())
    me = {"pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time()}
    dead = {"pid": 2**22 + 1, "started": 1.0}
    told = {
        "vivo": ({"status": "training"}, me),
        "muerto": ({"status": "training"}, dead),
        "reciclado": ({"status": "training"}, me | {"started": me["started"] - 99}),
        "nacido": (None, dead),
        "cortado": ({"status": "interrupted"}, None),
        "acabado": ({"status": "finished"}, None),
        "roto": ({"status": "error"}, None),
    }
    for i, (name, (state, lock)) in enumerate(told.items()):
        run = Run(f"runs/2026-01-0{i + 1}-{name}")
        run.path.mkdir(parents=True)
        run.write("recipe.yaml", text)
        if state:
            run.write("state.json", state)
        if lock:
            run.write("lock", lock)
        os.utime(run.path / "recipe.yaml", (i, i))
    events = [json.dumps({"type": "validation", "step": 1, "loss": loss}) for loss in (3.5, 2.25)]
    run.write("events.jsonl", "\n".join(events))
    for training, losses in (("pretrain", (9.0, 5.5)), ("instruct", (4.0, 1.5))):
        part = Run(f"runs/2026-01-06-acabado/{training}")
        part.path.mkdir()
        part.write("events.jsonl", "\n".join(json.dumps({"type": "validation", "loss": loss}) for loss in losses))
    status, out, said = maese("runs")
    rows = {line.split()[0][11:]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert status == 0 and list(rows) == list(told)[::-1]
    assert rows["roto"].split("  ")[-1].strip() == "3,500 → 2,250"
    assert rows["acabado"].split("  ")[-1].strip() == "4,000 → 1,500"
    states = {name: re.match(r"(con error|\w+)", row).group() for name, row in rows.items()}
    assert states == {
        "vivo": "entrenando", "muerto": "interrumpido", "reciclado": "interrumpido", "nacido": "interrumpido",
        "cortado": "interrumpido", "acabado": "terminado", "roto": "con error",
    }  # fmt: skip
    assert "maese resume 2026-01-05-cortado" in said
    assert {row["run"][11:]: row["status"] for row in json.loads(maese("--json", "runs")[1])}["vivo"] == "training"


# What comes after


def test_compare_shows_two_models_and_their_proof(maese, taller):
    status, out, said = maese("compare", "texto", "--max-new-tokens", "8")
    assert status == 0 and "Prompt: «En un lugar»" in out and "Comprobado" in said
    prints = re.findall(r"huella (\w{8})", out)
    assert len(prints) == 2 and prints[0] != prints[1]
    found = json.loads(maese("--json", "compare", "texto", "¿Quién?", "--seed", "7")[1])
    assert found["seed"] == 7 and [p["prompt"] for p in found["prompts"]] == ["¿Quién?"]
    assert found["max_logit_difference"] > 0


def test_the_class_sheet_keeps_the_key_out_of_the_terminal(maese, taller):
    status, out, said = maese("compare", "texto", "En un lugar", "La noche", "--class-sheet", "--max-new-tokens", "8")
    assert status == 0 and "¿Antes o después?" in out and "1. «En un lugar»" in out and "2. «La noche»" in out
    assert "huella" not in out and Path("runs/2026-01-01-texto/report/class-sheet.html").is_file()
    assert "class-sheet.html" in said


def test_generate_writes_the_text_and_talks_apart(maese, taller):
    words = ["generate", "texto", "En un lugar", "--seed", "3"]
    status, out, said = maese(*words)
    assert status == 0 and out.startswith("En un lugar") and out.endswith("\n") and "semilla 3" in said
    assert maese(*words)[1] == out, "the same seed, another text"
    answer = json.loads(maese("--json", *words)[1])
    assert "En un lugar" + answer["text"] + "\n" == out and answer["seed"] == 3 and answer["tokens"] <= 12
    assert maese("-q", *words) == (0, out, "")
    assert maese(*words, "--base")[1] != out
    assert "lo más probable" in maese("generate", "runs/2026-01-01-texto", "Hola", "--greedy")[2]
    assert maese("generate", "runs/2026-01-01-texto/final", "Hola", "--max-new-tokens", "2")[0] == 0


def test_generate_reads_the_prompt_from_a_pipe(maese, taller, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("La noche\n"))
    assert maese("generate", "texto", "-")[1].startswith("La noche")


def test_an_adapter_answers_without_repeating_the_question(maese, taller):
    for model in ("preguntas", "runs/2026-01-02-preguntas"):
        status, out, _ = maese("generate", model, "¿Cuánto es 3?", "--greedy")
        assert status == 0 and "¿Cuánto es 3?" not in out


def test_the_embedded_model_writes(maese, here):
    status, out, _ = maese("generate", "embedded", "En un lugar", "--max-new-tokens", "5")
    assert status == 0 and out.startswith("En un lugar")


def test_chat_over_a_pipe(maese, taller, monkeypatch):
    typed = ["¿Cuánto es 3?", "/temperature 0,5", "/temperature frío", "/inventada", "/tokens", "/retry",
             "/save notas/charla.json", "/exit", "no"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    status, out, said = maese("chat", "preguntas", "--max-new-tokens", "5")
    assert status == 0 and "Conversas con «preguntas»" in said and "tú>" not in out
    assert "temperature = 0.5" in said and "GEN-03" in said and "No conozco /inventada" in said
    assert len(out.splitlines()) >= 2 and said.count("tokens/s") == 2
    kept = json.loads(Path("notas/charla.json").read_text("utf-8"))
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
    assert kept["messages"][0]["content"] == "¿Cuánto es 3?"


def test_chat_ends_with_its_input(maese, taller, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hola"))
    status, out, said = maese("chat", "texto", "--max-new-tokens", "5")
    assert status == 0 and out.startswith("Hola") and "continúa lo que escribas" in said


def test_report_is_written_again(maese, taller):
    folder = Path("runs/2026-01-01-texto")
    (folder / "report" / "index.html").unlink()
    status, out, _ = maese("report", "texto")
    assert status == 0 and out == f"{folder}/report/index.html\n" and Path(out.strip()).stat().st_size > 1000
    assert (folder / "metrics.json").is_file() and (folder / "metrics.csv").is_file()


def test_interrupted_says_how_to_go_on_and_goes_on(maese, recipe, monkeypatch):
    import signal

    monkeypatch.setattr("maese.report.curves.plot", lambda run: None)
    recipe()
    real = live.Watcher.show

    def stop_at_3(self, event):
        real(self, event)
        if event["type"] == "step" and event["step"] == 3 and not Path("uno/checkpoints/checkpoint-3").exists():
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(live.Watcher, "show", stop_at_3)
    status, out, said = maese("train", "receta.yaml", "output=uno")
    assert status == 130 and out == "" and "error[RUN-06]" in said and "maese resume uno" in said
    status, out, said = maese("resume", "uno")
    assert status == 0 and out == "uno\n" and "Sigo desde el paso 3" in said
    assert "error[RUN-04]" in (said := maese("resume", "uno")[2]) and "output=uno-2 train.max_steps=12 " in said


# The panel


def event(type, **facts):
    return {"type": type, **facts}


def step(n, loss=3.5):
    return event("step", step=n, epoch=n / 200, loss=loss, tokens_s=1234.5, mem_gib=1.25, seconds=2.0 * n)


def panel(steps: int = 120, width: int = 120) -> live.Panel:
    from rich.console import Console

    shown = live.Panel()
    shown.console = Console(file=io.StringIO(), width=width)
    take = shown.progress.take
    take(event("start", name="prueba"))
    take(event("plan", steps=600, memory_gib=15.6))
    for n in range(1, steps + 1):
        take(step(n, 4 - n / 200))
        if n % 20 == 0:
            take(event("validation", step=n, loss=4 - n / 220))
    take(event("sample", prompt="En un lugar", text="de la sierra\nvivía un hidalgo " * 20))
    return shown


@pytest.mark.parametrize("lang", ["es", "en"])
@pytest.mark.parametrize("width", [36, 40, 56, 60, 76, 80, 96, 120])
def test_no_line_of_the_panel_is_wider_than_it(monkeypatch, width, lang):
    monkeypatch.setenv("MAESE_LANG", lang)
    shown = panel(width=width)
    for steps in (600, 123456):  # a long run has longer numbers
        shown.progress.plan["steps"] = steps
        rows = shown.rows(width)
        assert max(map(len, rows)) <= width and "\n" not in "".join(rows)
        assert 4 <= len(rows) <= 5


def test_a_narrow_panel_drops_sample_then_bars_then_memory():
    shown, seen = panel(), []
    for width in range(120, 35, -1):
        text = "\n".join(shown.rows(width))
        kept = ("muestra" in text, any(bar in text for bar in live.BARS[:-1]), "memoria" in text)
        if not seen or seen[-1] != kept:
            seen.append(kept)
    assert seen == [(True, True, True), (False, True, True), (False, False, True), (False, False, False)]
    # What is left still tells how it goes, and nothing of it is cut.
    rows = shown.rows(60)
    assert "pérdida    3,400 ↓" in rows[1] and "mejor: 3,455 (paso 120)" in rows[2] and "paso 120/600" in rows[3]
    assert "…" not in "".join(rows)


def test_the_panel_has_the_same_height_all_along():
    assert {len(panel(steps).rows(80)) for steps in (0, 1, 5, 120)} == {5}


def test_the_panel_is_drawn_on_a_terminal(monkeypatch):
    shown = panel(width=80)
    shown.console.print(shown.render())
    text = shown.console.file.getvalue()
    assert "Entrenando · prueba" in text and "Ctrl+C" in text and max(map(len, text.splitlines())) <= 80


def test_a_panel_only_where_someone_looks(monkeypatch):
    assert type(live.watcher()) is live.Watcher and type(live.watcher(json=True)) is live.Events
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    assert type(live.watcher()) is live.Panel and type(live.watcher(quiet=1)) is live.Watcher


def test_spark():
    assert live.spark([1, 2, 3]) in ("▁▄█", "▁▅█") and live.spark([]) == "" and live.spark([2, 2]) == "▄▄"
    assert live.spark([float("nan"), 1, float("inf"), 2]) == "▁█"
    long = live.spark([*range(1000)])
    assert len(long) == 24 and list(long) == sorted(long)


def test_ema_follows_slowly():
    assert live.ema([]) is None and live.ema([3.0]) == 3.0 and live.ema([2.0] * 50) == 2.0
    assert 0 < live.ema([0.0] * 50 + [10.0]) < 1


def test_time_left_waits_for_a_pace():
    progress = live.Progress()
    progress.take(event("plan", steps=100))
    for n in range(1, 5):
        assert progress.left() == "—"
        progress.take(step(n))
    assert progress.left() == "—"
    progress.take(step(5))
    assert progress.left() == "3 min 10 s"


def test_the_arrow_tells_where_the_loss_goes():
    progress = live.Progress()
    for n in range(1, 61):
        progress.take(step(n, 3 - n / 60))
    assert progress.arrow() == "↓"
    for n in range(61, 121):
        progress.take(step(n, 3.0))
    assert progress.arrow() == "↑"


def test_a_file_is_spoken_to_seldom(capsys):
    shown = live.Watcher()
    shown(event("start", name="x", base="embedded", method="lora", resumed_from=None))
    rows = {"rows": 9, "tokens": 900, "validation_rows": 1, "micro_batch": 1, "accumulation": 1, "max_length": 32}
    here = {"device": "cpu", "name": "x86", "threads": 2, "memory_gib": 8.0, "precision": "fp32", "run": "r"}
    shown(event("plan", steps=600, parameters=9e6, trainable=9e4, **rows, **here))
    for n in range(1, 601):
        shown(step(n))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("paso")]
    assert 20 <= len(lines) <= 22 and lines[0].startswith("paso 1/600") and lines[-1].startswith("paso 600/600")


def test_what_maese_chose_is_said_before_training():
    facts = {"rows": 9, "tokens": 900, "validation_rows": 1, "micro_batch": 1, "accumulation": 1, "max_length": 32}
    facts |= {"steps": 6, "parameters": 9e6, "trainable": 9e4, "run": "r", "threads": 2, "memory_gib": 8.0}

    def told(**more):
        return live.plan_box({**facts, "name": "AMD", **more}, {"name": "x", "base": "embedded", "method": "lora"})

    here = told(device="cpu", precision="bf16", processes=1, sharded=False, unpadded=True, compiled=False)
    assert "procesador AMD, hilos: 2, 8,0 GiB" in here
    assert "multiplica en 16 bits (bf16) · sin relleno · un proceso" in here
    there = told(device="cuda", precision="fp16", processes=8, sharded=True, unpadded=False, compiled=True)
    assert "tarjeta gráfica AMD" in there and "relleno" not in there
    line = "multiplica en 16 bits (fp16) · compilado · 8 procesos con el modelo en trozos (FSDP2)"
    assert line in " ".join(there.split()) and max(map(len, there.splitlines())) <= 80
    assert "32 bits (fp32) · 2 procesos" in told(device="cpu", precision="fp32", processes=2)


def test_words_of_the_model_are_not_markup(capsys):
    from rich.console import Console

    shown = panel()
    shown.live = types.SimpleNamespace(console=Console(file=io.StringIO(), width=80))
    shown.line("«[bold]hola[/x]»")
    assert "[bold]hola[/x]" in shown.live.console.file.getvalue()


def test_what_counts_for_every_command_may_be_typed_anywhere(maese):
    from maese.cli import general_first

    assert general_first(["chat", "--lang", "en", "x", "--", "--json"]) == ["--lang", "en", "chat", "x", "--", "--json"]
    assert general_first(["plan", "--lang"]) == ["--lang", "plan"] and general_first(["--lang=en"]) == ["--lang=en"]
    after, before = maese("plan", "tutor", "--json"), maese("--json", "plan", "tutor")
    assert after == before and json.loads(after[1])["name"] == "tutor"
    assert maese("plan", "tutor", "--lang", "en")[1].startswith("Plan · tutor\n  model ")


def test_without_a_network_the_hub_is_said_to_be_out_of_reach(maese, here):
    _, _, told = maese("train", "tutor-phi2")
    assert "error[MODEL-01]" in told and "no hay red" in told and "Error" not in told
