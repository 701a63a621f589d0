"""The report is a pure function of a run folder: invented events in, known figures, verdicts and pages out."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from maese import recipe as recipes
from maese.report import class_sheet, curves, page
from maese.report.diagnosis import diagnose, repetition
from maese.report.facts import facts, write_metrics
from maese.report.lines import ema, shrink
from maese.report.summary import box
from maese.run import Run
from maese.say import say

PROSE = "en un lugar de la mancha de cuyo nombre no quiero acordarme vivía un hidalgo de los de lanza en astillero"
LOOP = "que no que no que no " * 10
ATTACK = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def spanish(monkeypatch):
    monkeypatch.setenv("MAESE_LANG", "es")


def event(type, **facts):
    return {"v": 1, "t": "2026-11-21T14:05:00+00:00", "type": type, **facts}


def start(resumed_from=None):
    return event(
        "start", step=resumed_from or 0, resumed_from=resumed_from, name="prueba", base="embedded", method="full"
    )


def step(n, loss, total):
    return event("step", step=n, epoch=3 * n / total, loss=loss, lr=1e-4, grad_norm=0.5, tokens=512 * n,
                 tokens_s=1000.0 + n, mem_gib=1.5, seconds=0.5 * n)  # fmt: skip


def check(n, loss, best=False):
    return event("validation", step=n, loss=loss, perplexity=math.exp(min(loss, 50)), tokens=1234, best=best)


def history(losses, checks=(), reason="finished", extra=()):
    """Events of a whole run; `checks` are spread evenly from step 0 to the last."""
    total = len(losses)
    plan = event("plan", parameters=2000, trainable=500, rows=40, tokens=9000, steps=total, epochs=3.0, device="cpu")
    steps = [step(i, loss, total) for i, loss in enumerate(losses, 1)]
    held = [check(round(i * total / max(1, len(checks) - 1)), loss) for i, loss in enumerate(checks)]
    end = event("end", step=total, reason=reason, final_step=total, seconds=0.5 * total, tokens=9000, peak_gib=1.75)
    return [start(), plan, *sorted([*steps, *held], key=lambda e: e["step"]), *extra, *([end] if reason else [])]


FALLING = [4 - 2 * i / 39 for i in range(40)]
STILL = [3.0 + 0.01 * (i % 2) for i in range(40)]
CHECKS = [4.0, 3.2, 2.6, 2.4]


@pytest.fixture
def run(tmp_path):
    """A folder as training leaves it, markup in the model's own words included."""
    run = Run(tmp_path / "2026-11-21-prueba")
    run.path.mkdir()
    source = {"path": "quijote.txt"}
    recipe = recipes.check({"name": "prueba", "data": {"sources": [source]}, "eval": {"prompts": ["En un lugar"]}})
    run.write("recipe.yaml", recipes.dump(recipe))
    told = ((0, f"antes {ATTACK}", False), (20, "a medias", False), (40, PROSE, True))
    samples = [event("sample", step=n, prompt="En un lugar", text=text, final=final) for n, text, final in told]
    save(run, history(FALLING, CHECKS, extra=samples))
    run.write("data.json", {
        "format": "text", "split": "tail", "dropped": {"too_long": 2, "odd_reason": 1},
        "sources": [{**source, "sha256": "ab" * 32, "bytes": 999, "documents": 1, "characters": 950,
                     "notes": [["report.method.lora", {}]]}],
        "train": {"rows": 40, "tokens": 9000, "targets": 8960},
        "validation": {"rows": 4, "tokens": 1234, "targets": 1230},
    })  # fmt: skip
    run.write("environment.json", {"maese": "0.1.0", "python": "3.12", "packages": {"torch": "2.10"}})
    return run


def save(run, events):
    run.write("events.jsonl", "".join(json.dumps(e) + "\n" for e in events))


def comparison(difference=4.2, after="b2"):
    rows = [{"prompt": f"Comienzo {i}", "before": f"viejo {i}", "after": f"nuevo {i}"} for i in range(6)]
    return {"created": "2026-11-21", "base": "embedded", "settings": {"top_k": 50}, "seed": 42, "prompts": rows,
            "before": {"fingerprint": "a1"}, "after": {"fingerprint": after},
            "max_logit_difference": difference}  # fmt: skip


NAN = event("error", step=7, code="NUM-01", facts={})
FULL = event("error", step=40, code="XXX-99", facts={"path": "x"})
CASES = {
    "learning": (history(FALLING, CHECKS), [PROSE]),
    "overfitting": (history(FALLING, [4, 3, 2.5, 2.6, 2.8]), [PROSE]),
    "worse": (history(FALLING, [2.0, 2.1, 2.3]), [PROSE]),
    "settled": (history(FALLING, [4.0, 2.6, 2.4, 2.41]), [PROSE]),
    "not_following": (history(FALLING, [3.0, 2.999, 2.998]), [PROSE]),
    "too_high": (history([3, 3, 3, *[4.2] * 10, *[2.9] * 27], CHECKS), [PROSE]),
    "flat": (history(STILL, [3.0, 3.0, 3.0]), [PROSE]),
    "diverged": (history([3.0] * 20 + [9.0] * 20, CHECKS), [PROSE]),
    "diverged_nan": (history(FALLING, CHECKS, reason="error", extra=[NAN]), []),
    "repetitive": (history(FALLING, CHECKS), [LOOP]),
    "short": (history(FALLING, [4.0, 3.0]), [PROSE]),
    "unmeasured": (history(FALLING), [PROSE]),
    "interrupted": (history(FALLING, CHECKS, reason="interrupted"), []),
    "failed": (history(FALLING, CHECKS, reason="error", extra=[FULL]), []),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("lang", ["es", "en"])
def test_each_verdict_is_reached_and_said(kind, lang, monkeypatch):
    monkeypatch.setenv("MAESE_LANG", lang)
    found = diagnose(*CASES[kind])
    assert found.kind == kind
    assert say(f"report.verdict.{kind}.title") in found.text()
    assert "{" not in found.text() and "None" not in found.text() and say("report.missing") not in found.text()


def test_a_nan_loss_without_its_error_event_is_seen_too():
    assert diagnose(history([3.0, 2.9, math.nan, 2.8])).kind == "diverged_nan"


def test_a_run_without_end_is_interrupted_unless_it_is_alive():
    events = history(FALLING, CHECKS, reason=None)
    assert diagnose(events).kind == "interrupted"
    assert diagnose(events, alive=True).kind == "learning"
    assert "ningún paso" in diagnose([start()]).text()


def test_an_error_mended_by_resuming_is_no_longer_the_verdict():
    broken = [*history(FALLING, CHECKS, reason=None)[:20], event("error", code="NUM-01", facts={})]
    assert diagnose(broken, alive=True).kind == "diverged_nan"
    assert diagnose([*broken, start(resumed_from=5), *history(FALLING, CHECKS)[1:]]).kind == "learning"


def test_the_verdict_gives_its_figures_and_an_order_to_paste():
    text = diagnose(*CASES["overfitting"]).text()
    assert "paso 20" in text and "2,50" in text and "12,0\u00a0%" in text  # lowest check, its loss, the rise from it
    assert "train.epochs=1.5" in text and "train.lr=3e-5" in text


def test_noise_between_batches_is_not_too_high_a_rate():
    noisy = [loss * (1 + 0.12 * (-1) ** i) for i, loss in enumerate(FALLING)]
    assert diagnose(history(noisy, CHECKS)).kind == "learning"


def test_repetition():
    assert repetition([PROSE]) == 0
    assert repetition([LOOP]) > 0.9
    assert repetition(["muy corto"]) is None


def test_facts(run):
    found = facts(run)
    assert (found["loss_initial"], found["loss_final"]) == (4, 2)
    assert found["loss_improvement_percent"] == pytest.approx(50)
    assert (found["validation_initial"], found["validation_kept"], found["validation_best_step"]) == (4, 2.4, 40)
    assert found["validation_change_percent"] == pytest.approx(-40)
    assert (found["share"], found["peak_gib"], found["steps"], found["reason"]) == (0.25, 1.75, 40, "finished")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_kept_weights_follow_the_recipe(run):
    save(run, history(FALLING, [4, 2.5, 3]))
    assert facts(run)["validation_kept"] == 2.5
    tree = run.recipe().model_dump()
    tree["train"]["final"] = "last"
    run.write("recipe.yaml", recipes.dump(recipes.check(tree)))
    assert facts(run)["validation_kept"] == 3


def test_what_was_not_measured_is_none(tmp_path):
    found = facts(Run(tmp_path))
    assert found["loss_initial"] is found["validation_best"] is found["peak_gib"] is found["seconds"] is None
    save(Run(tmp_path), [start(), check(0, 3.0)])  # a check before training is no «after»
    found = facts(Run(tmp_path))
    assert (found["validation_initial"], found["validation_kept"]) == (3.0, None)


def test_metrics_files(run):
    save(run, history([3.0, math.nan, 2.0, 1.0], [3.5, 1.5]))
    as_json, as_csv = write_metrics(run)
    written = json.loads(as_json.read_text("utf-8"), parse_constant=pytest.fail)
    assert written["steps"][1]["loss"] is None and len(written["validations"]) == 2
    rows = list(csv.DictReader(as_csv.read_text("utf-8").splitlines()))
    assert [row["loss"] for row in rows] == ["3.0", "", "2.0", "1.0"]
    assert rows[3]["validation_loss"] == "1.5" and rows[0]["validation_loss"] == ""
    assert rows[0]["timestamp"].startswith("2026-11-21T") and rows[0]["tokens_s"] == "1001.0"


def test_a_resumed_run_counts_each_step_once(run):
    first = [e for e in history(FALLING, CHECKS, reason="interrupted") if e.get("step", 0) <= 30]
    again = [step(n, 1.0, 40) for n in range(21, 41)]
    save(run, [*first, start(resumed_from=20), *again])
    write_metrics(run)
    rows = list(csv.DictReader((run.path / "metrics.csv").read_text("utf-8").splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert facts(run)["resumes"] == 1 and rows[20]["loss"] == "1.0"
    assert say("report.limit.resumed", n=1) in page.write(run).read_text("utf-8")


@pytest.mark.parametrize(
    ("lang", "title", "figure", "missing"),
    [
        ("es", "RESUMEN DE MÉTRICAS DE ENTRENAMIENTO", "2,0000", "no medido"),
        ("en", "TRAINING METRICS SUMMARY", "2.0000", "not measured"),
    ],
)
def test_box(run, tmp_path, monkeypatch, lang, title, figure, missing):
    monkeypatch.setenv("MAESE_LANG", lang)
    drawn = box(facts(run))
    assert title in drawn and figure in drawn and missing not in drawn
    bare = box(facts(Run(tmp_path)))
    assert missing in bare
    for text in (drawn, bare):
        widths = {len(line) for line in text.splitlines()}
        assert len(widths) == 1 and widths.pop() <= 64


def test_smoothing_and_shrinking():
    line = [(i, 3.0) for i in range(5000)]
    line[1234] = (1234, 99.0)
    small = shrink(line)
    assert len(small) <= 800 and (1234, 99.0) in small and small == sorted(small)
    assert ema([(1, 2.0), (2, 2.0)]) == [(1, 2.0), (2, 2.0)] and ema([]) == []


@pytest.mark.parametrize("losses", [FALLING, [3.0], [0.0, -1.0, 2.0], [math.nan], [], [2.0] * 3000])
def test_svg_is_sound_and_tells_itself_in_words(losses):
    drawn = curves.svg(history(losses, CHECKS if losses == FALLING else ()))
    root = ET.fromstring(drawn)
    named = {part.get("id"): part for part in root if part.get("id")}
    assert root.get("role") == "img" and all(named[i].text for i in root.get("aria-labelledby").split())
    assert all(len(line.get("points").split()) <= 800 for line in root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert "nan" not in drawn.lower()


def test_plot(run):
    from maese.report import plots

    save(run, history([3.0, 0.0, -1.0, math.nan, 2.0], [4.0, 3.0]))
    drawn = plots.plot(run)
    assert drawn.name == "metrics.png" and drawn.read_bytes().startswith(b"\x89PNG")
    assert curves.plot is plots.plot and not list(run.path.glob(".metrics*"))


def test_page_escapes_what_the_model_wrote(run):
    html = page.write(run).read_text("utf-8")
    assert ATTACK not in html and "&lt;script&gt;alert(1)" in html
    run.write("compare.json", comparison() | {"prompts": [{"prompt": ATTACK, "before": ATTACK, "after": ATTACK}]})
    assert ATTACK not in page.write(run).read_text("utf-8")
    assert ATTACK not in class_sheet.write(run, run.read("compare.json")).read_text("utf-8")


@pytest.mark.parametrize("lang", ["es", "en"])
def test_page_opens_offline_and_reads_aloud(run, monkeypatch, lang):
    monkeypatch.setenv("MAESE_LANG", lang)
    html = page.write(run).read_text("utf-8")
    assert f'<html lang="{lang}">' in html and html.count("<h1") == 1
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script|<link", html)
    assert len(set(re.findall(r'\bid="([^"]+)"', html))) == len(re.findall(r'\bid="', html))
    assert f"maese train {run.path}/recipe.yaml output={run.path}-2" in html
    assert "odd_reason" in html and "ab" * 32 in html and PROSE in html
    assert not list(run.report.glob(".*"))


def test_page_warns_when_both_sides_are_one_model(run):
    for same in (comparison(difference=0.0), comparison(after="a1")):
        run.write("compare.json", same)
        assert say("report.page.same") in page.write(run).read_text("utf-8")
    run.write("compare.json", comparison())
    html = page.write(run).read_text("utf-8")
    assert say("report.page.same") not in html and "4,200" in html and "nuevo 3" in html


@pytest.mark.parametrize(
    ("missing", "key"),
    [
        ("recipe.yaml", "page.no_recipe"),
        ("data.json", "page.no_data"),
        ("environment.json", "missing"),
        ("events.jsonl", "curves.empty"),
    ],
)
def test_a_missing_part_is_said_and_not_invented(run, missing, key):
    (run.path / missing).unlink()
    words = say(f"report.{key}", file=str(run.path / missing))
    assert words in page.write(run).read_text("utf-8")


def test_an_empty_folder_still_makes_every_file(tmp_path):
    run = Run(tmp_path)
    assert page.write(run).exists() and curves.plot(run).exists() and all(p.exists() for p in write_metrics(run))
    assert class_sheet.write(run, {}).exists()


def test_class_sheet_is_shuffled_by_its_seed_and_its_key_is_right():
    told = comparison()
    sheet = class_sheet.shuffle(told, 7)
    assert sheet == class_sheet.shuffle(told, 7)
    assert len({class_sheet.shuffle(told, seed).key for seed in range(20)}) > 5
    for pair, letter, row in zip(sheet.pairs, sheet.key, told["prompts"], strict=True):
        assert {"A": pair.a, "B": pair.b}[letter] == row["after"]
        assert {pair.a, pair.b} == {row["before"], row["after"]}
    assert sorted(sheet.key) == ["A"] * 3 + ["B"] * 3


def test_class_sheet_keeps_its_key_apart(run):
    sheet = class_sheet.shuffle(comparison(), 42)
    shown = class_sheet.text(sheet)
    assert "nuevo 5" in shown and "Después de entrenar" not in shown
    assert f"1 {sheet.key[0]} · 2 {sheet.key[1]}" in class_sheet.answers(sheet)
    html = class_sheet.write(run, comparison()).read_text("utf-8")
    before_key, key = html.split('<section class="key">')
    assert "quijote.txt" in before_key and say("report.sheet.key_after") not in before_key
    letters = re.findall(r"<strong>([AB])</strong></td>", key)
    assert tuple(letters) == sheet.key[: len(letters)] and letters


def test_class_sheet_cuts_long_texts_aloud():
    cut = class_sheet.excerpt("palabra " * 200)
    assert len(cut) < 450 and cut.endswith("palabra […]")
