"""The laws of the house: each fault names a place and what to move where. A wrong law is changed here, and says why."""

import ast
import functools
import os
import re
import shlex
import string
import subprocess
import sys
import timeit
import tomllib
from pathlib import Path

import click
import pytest

from maese.say import catalogue as words

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "maese"

# The one place where the order is decided: a stage imports its own folder and the rows before it.
RIVER = (
    "errors, say -> recipe, run, pipeline -> text -> tokens -> plan -> model -> generate -> evaluate -> train "
    "-> export -> report, learn -> serve, studio -> kept, stages, live, terminal, terminal_data, terminal_tokens, "
    "terminal_stages, terminal_study, terminal_chat, terminal_plan, retyped, spoken, cli_data, cli_use, cli_plan, cli"
)
ROWS = [row.split(", ") for row in RIVER.split(" -> ")]
TOP = [*ROWS[-1], "__init__", "__main__"]
ROW = {stage: i for i, row in enumerate([*ROWS[:-1], TOP]) for stage in row}
BELOW = ROW | dict.fromkeys(TOP, 99) | dict.fromkeys(["report", "learn"], ROW["plan"] + 1)  # what a stage may import
SIDEWAYS = {("errors", "say"), ("run", "recipe"), ("pipeline", "recipe"), ("learn", "report")}
DATA_FOLDERS = {"embedded", "shipped"}

IRON = {"torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "matplotlib", "numpy"}
IRON_STAGES = {"model", "generate", "evaluate", "train", "export", "serve", "studio"}
SLOW, AT_START = {"rich", "pydantic"}, {"__init__", "__main__", "cli", "say", "errors"}

# The "Never" column of the glossary. CODE_SPAN is looked past: `code`, {blanks}, commands, keys, «pérdida (*loss*)».
NEVER = (
    r"\b(?:loss|función de coste|ratio de aprendizaje|learning rate|batch(?:es)?|iteraci(?:ón|ones)|epochs?"
    r"|checkpoints?|afinación|reajuste|fine-?tun\w+|entrenamiento previo|incrustaci(?:ón|ones)|tokenizers?|backprop\w*"
    r"|padding|templates?|overfitting|datasets?|cuantificación|ficheros?|ordenador(?:es)?|computador(?:as?|es)"
    r"|vosotr[oa]s|vuestr[oa]s?|ustedes|usted|su equipo)\b"
)
CODE_SPAN = r"`[^`]*`|\{[^}]*\}|\(\*[^)]*\)|(?m:^\s*maese .*$)|\bmaese [a-z]+(?: [a-z]+)?|--[\w-]+|\S*\w[./=]\w\S*"
TAG = r"</?(?:a|b|i|u|p|br|hr|em|strong|code|pre|span|div|ul|ol|li|h[1-6]|table|tr|td|th|img|su[bp]|script)\b[^>]*>"
SHOWS = {"print", "echo", "secho", "add_column", "add_row", "set_title", "set_xlabel", "set_ylabel", "suptitle"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "eval", "exec"}


def law(find):
    """Make a test of a generator of faults."""

    @functools.wraps(find)
    def test():
        if faults := sorted(set(find())):
            pytest.fail("\n".join(faults), pytrace=False)

    return test


def files(*suffixes: str) -> list[Path]:
    return [
        p for p in sorted(SRC.rglob("*")) if p.suffix in suffixes and not DATA_FOLDERS & {*p.relative_to(SRC).parts}
    ]


def walk(node: ast.AST, early: bool = True):
    """Every node and whether it runs at import: bodies of functions do not, nor what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        late = late or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield child, early and not late
        yield from walk(child, early and not late)


@functools.cache
def nodes() -> list[tuple[str, str, ast.AST, bool]]:
    """Every syntax node of the package as (place, stage, node, whether it runs at import)."""
    found = []
    for path in files(".py"):
        name, stage = path.relative_to(ROOT).as_posix(), path.relative_to(SRC).parts[0].removesuffix(".py")
        for node, early in walk(ast.parse(path.read_text("utf-8"))):
            found.append((f"{name}:{getattr(node, 'lineno', 1)}:", stage, node, early))
    return found


@functools.cache
def calls() -> list[tuple[str, ast.Call, str]]:
    """Every call as (place, node, full name): `np.random.seed(…)` is `np.random.seed`."""
    return [(place, n, ast.unparse(n.func)) for place, _, n, _ in nodes() if isinstance(n, ast.Call)]


@functools.cache
def imports() -> list[tuple[str, str, str, str | None, bool]]:
    """Every import as (place, stage, full dotted name, stage of the imported, whether it runs at import)."""
    found = []
    for place, mine, node, early in nodes():
        level, module = getattr(node, "level", 0), getattr(node, "module", None)
        package = Path(place).parts[1:-1]  # of a relative import
        base = [*package[: len(package) - level + 1]] * bool(level) + [module] * bool(module)
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            name = ".".join([*base, alias.name])
            top, inner = [*name.split("."), "__init__"][:2]
            other = None if top != "maese" else inner if inner in ROW else "__init__"
            found.append((place, mine, name, other, early))
    return found


@law
def test_imports_flow_down_the_river():
    for place, mine, name, other, early in imports():
        if other in (None, mine) or mine not in ROW or ((mine, other) in SIDEWAYS and not (mine == "errors" and early)):
            continue
        if mine in ("serve", "studio") and other == "train":
            yield f"{place} imports {name}; a face starts `maese train` as a process and reads its events.jsonl"
        elif ROW[other] >= BELOW[mine]:
            yield f"{place} imports {name}; move what {mine} needs of {other} to {mine} or a row before, or pass it in"


@law
def test_every_stage_has_its_place_in_the_river():
    found = {p.name.removesuffix(".py") for p in SRC.iterdir() if not p.name.startswith((".", "__"))}
    for name in found - set(ROW) - DATA_FOLDERS - {"py.typed"}:
        yield f"src/maese/{name}: not in the river; move it into a stage, or give it a row in RIVER"
    # Two pages draw the same river, where stages that do not exist yet may be left out.
    for page in (SRC / "__init__.py", ROOT / "CONTRIBUTING.md"):
        drawn = re.search(r"(?s)errors, say ->.+?(?=\n\n|\"{3})", page.read_text("utf-8"))
        told = " ".join(drawn.group().split()) if drawn else ""
        kept = [[s for s in row if s in found or re.search(rf"\b{s}\b", told)] for row in ROWS]
        if told and told != (line := " -> ".join(", ".join(row) for row in kept if row)):
            yield f"{page.relative_to(ROOT)}: should draw the river so:\n    {line}"


@law
def test_paper_before_iron():
    for place, mine, name, other, early in imports():
        top = name.partition(".")[0]
        iron = mine not in IRON_STAGES and (top in IRON or other in IRON_STAGES)
        if early and (iron or (mine in AT_START and top in SLOW)):
            yield f"{place} imports {name} at module level; move it inside the function that uses it"


def python(*words: str, lang: str = "es") -> str:
    path = os.pathsep.join(filter(None, [str(SRC.parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"MAESE_LANG": lang, "PYTHONPATH": path, "PYTHONUTF8": "1", "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, *words], env=env, cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        pytest.fail(done.stdout[-500:] + done.stderr[-1500:], pytrace=False)
    return done.stdout


def test_help_comes_at_once():
    """In time of the processor: what else the machine is doing is no matter of ours."""

    def spent() -> float:
        used = os.times()
        return used.children_user + used.children_system

    best = min(timeit.repeat(lambda: python("-m", "maese", "--help"), timer=spent, number=1, repeat=5))
    assert best < 0.3, (
        f"maese --help took {best:.2f} s; `python -X importtime -m maese --help` shows what to import later"
    )


EVERY_HELP = """
import sys, click, maese
from maese.cli import cli, run
assert "torch" not in sys.modules, "maese.cli imports torch to start: move the import inside a command"
def walk(command, *path):
    assert run([*path, "--help"]) in (0, None)
    for name in command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []:
        walk(command.get_command(click.Context(command), name), *path, name)
walk(cli)
"""


@law
def test_the_help_of_every_command_speaks_one_language():
    own = {
        "es": ["Uso:", "Opciones", "Órdenes", "Muestra"],
        "en": ["Usage:", "Options", "Commands", "Show this message"],
    }
    own["en"] += ["[OPTIONS]", "[ARGS]"]  # click's own placeholders
    for lang, other in (("es", "en"), ("en", "es")):
        text = python("-c", EVERY_HELP, lang=lang)
        yield from (f"help in {lang}: «{w}» is click's, or of the other catalogue" for w in own[other] if w in text)
        if own[lang][0] not in text:
            yield f"help in {lang}: no «{own[lang][0]}»"


def blanks(*texts: str) -> set[str]:
    """`blanks("{n} de {total}")` is {"n", "total"}."""
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def shapes(node: ast.AST) -> list[str]:
    """The texts an expression can be, as patterns: `f"error.{code}.why"` is `error\\..+\\.why`."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in shapes(node.left) for b in shapes(node.right)]
    if isinstance(node, ast.IfExp):
        return shapes(node.body) + shapes(node.orelse)
    return [re.escape(node.value)] if isinstance(node, ast.Constant) and isinstance(node.value, str) else [".+"]


def quoted(before: str = "") -> list[str]:
    """Texts in quotes in the templates, as patterns: `say("report.box." ~ row)` is `report\\.box\\..+`."""
    pages = "\n".join(p.read_text("utf-8") for p in files(".html", ".j2", ".typ"))
    return [re.escape(t) + ".+" * t.endswith((".", "_")) for t in re.findall(before + r"""["']([\w.-]+)["']""", pages)]


@law
def test_both_catalogues_say_the_same_things():
    es, en = words("es"), words("en")
    for key in es.keys() | en.keys():
        one, other = es.get(key, ""), en.get(key, "")
        if not (one.strip() and other.strip()):
            yield f"{key}: missing or empty in {'en' if one.strip() else 'es'}; write it in both catalogues"
        elif blanks(one) != blanks(other):
            yield f"{key}: es fills {sorted(blanks(one))}, en fills {sorted(blanks(other))}"
        elif len(one) > 1.6 * max(len(other), 40):
            yield f"{key}: {len(one)} characters in es, {len(other)} in en; say it shorter"
        yield from (f"{key}: {tag} belongs in a template" for tag in re.findall(TAG, one + other, re.I))


@law
def test_every_key_asked_for_exists_and_gets_its_facts():
    asked = [("a template", shape, {None}) for shape in quoted(r"\bsay\(\s*")]
    for place, call, name in calls():
        if name.split(".")[-1] == "say" and call.args:
            asked += [(place, shape, {k.arg for k in call.keywords}) for shape in shapes(call.args[0])]
    for place, shape, given in asked:
        keys = [key for key in words("es") if re.fullmatch(shape + r"(\.one|\.other)?", key)]
        if not keys:
            yield f"{place} asks for {shape.replace(chr(92), '')}; write it in es.toml and en.toml"
        lacking = blanks(*(words("es")[key] for key in keys)) - given
        if lacking and None not in given and ".+" not in shape:  # `say(key, **facts)` cannot be judged from here
            yield f"{place} {keys[0]} needs {', '.join(sorted(lacking))}"


@law
def test_every_key_is_used():
    texts = {
        shape
        for _, _, n, _ in nodes()
        if isinstance(n, (ast.Constant, ast.JoinedStr, ast.BinOp))
        for shape in shapes(n)
    }
    texts = {text for text in texts | {*quoted()} if re.match(r"[\w-]+\\\.", text)}
    loose = re.compile("|".join(text for text in texts if ".+" in text) or "(?!)")
    for key in words("es"):
        forms = {key, re.sub(r"\.(one|other)$", "", key)}
        if not ({re.escape(form) for form in forms} & texts or any(map(loose.fullmatch, forms))):
            yield f"{key}: nothing says it; take it out of es.toml and en.toml"


@law
def test_spanish_uses_the_words_of_the_glossary():
    for key, text in words("es").items():
        for hit in re.findall(NEVER, re.sub(CODE_SPAN, " · ", text), re.I):
            yield f"{key}: «{hit}» is not a word of the glossary"


@law
def test_what_people_read_is_in_the_catalogues():
    for place, call, name in calls():
        shown = name.split(".")[-1] in SHOWS or name.endswith(("stdout.write", "stderr.write"))
        helps = [k.value for k in call.keywords if k.arg in ("help", "short_help", "epilog")]
        for text in [text for node in call.args * shown + helps for text in shapes(node)]:
            if re.search(r"[^\W\d_]{3}", re.sub(r"\\\[/?[\w #\\]*\]|\\.|maese", "", text)):  # [bold] is not a word
                yield f"{place} {name}({text.replace(chr(92), '')[:40]!r}); move the words to the catalogues"


@functools.cache
def raised() -> list[tuple[str, str, set[str | None]]]:
    """Every error raised, or told as an event with `code=`, as (place, code, names of its facts)."""
    kinds = {n.name for place, _, n, _ in nodes() if isinstance(n, ast.ClassDef) and "maese/errors" in place}
    found = [
        (at, n.args[0], {k.arg for k in n.keywords})
        for at, n, name in calls()
        if n.args and name.split(".")[-1] in kinds
    ]
    found += [(at, k.value, {None}) for at, n, _ in calls() for k in n.keywords if k.arg == "code"]
    codes = [(at, shape.replace("\\", ""), given) for at, node, given in found for shape in shapes(node)]
    return [each for each in codes if re.fullmatch(r"[A-Z]+-\d\d", each[1])]


@law
def test_every_error_has_its_words_and_its_facts():
    for (place, code, given), lang in ((each, lang) for each in raised() for lang in ("es", "en")):
        parts = {key.rpartition(".")[2]: text for key, text in words(lang).items() if key.startswith(f"error.{code}.")}
        repair = {"found", "expected", "try"} & {*parts} or {"try"}
        for part in {"title", "why", *repair} - {*parts}:
            yield f"{place} {code}: write error.{code}.{part} in {lang}.toml"
        if blanks(parts.pop("why", "")):
            yield f"error.{code}.why in {lang}: `maese explain` has no facts to fill it with"
        for name in blanks(*parts.values()) - given if None not in given else ():
            yield f"{place} {code} needs {name}"


@law
def test_every_error_is_raised_and_tested():
    codes = {code for _, code, _ in raised()}
    for code in {key.split(".")[1] for key in words("es") if re.match(r"error\.[A-Z]", key)} - codes:
        yield f"{code}: no code raises it; take it out of es.toml and en.toml"
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("*.py") if p.name != "test_house.py")
    yield from (f"{code}: no test provokes it; write one under tests/" for code in codes if code not in tests)


@law
def test_nothing_unsafe_is_called():
    for place, _, name, _, _ in imports():
        if name.partition(".")[0] in PICKLES or name in UNSAFE:
            yield f"{place} imports {name}; use safetensors, JSON or yaml.safe_load"
    for place, call, name in calls():
        on = {k.arg for k in call.keywords if ast.unparse(k.value) != "False"}
        if name in UNSAFE or name.endswith("extractall") or on & {"shell", "trust_remote_code", "allow_pickle"}:
            yield f"{place} {ast.unparse(call)[:60]}; nothing a stranger wrote is run or unpacked"


@law
def test_files_and_functions_stay_short():
    for path in files(".py", ".html", ".css", ".js"):
        name, lines = path.relative_to(ROOT).as_posix(), len(path.read_text("utf-8").splitlines())
        if lines > 400:
            yield f"{name}: {lines} lines; cut it in two by what comes in and what goes out"
        if re.search(r"/(utils?|common|misc|helpers?)[/.]", name):
            yield f"{name}: name it after what it does, in the stage that does it"
    for place, _, n, _ in nodes():
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.end_lineno - n.lineno >= 150:
            yield f"{place} {n.name} has {n.end_lineno - n.lineno + 1} lines; cut it"


def commands(page: str) -> list[str]:
    """The commands a page shows, without prompts, comments and what they print."""
    found, text = [], (ROOT / page).read_text("utf-8")
    for block in re.findall(r"^ *```(?:bash|console|sh)\b[^\n]*\n(.*?)^ *```", text, re.M | re.S):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        found += [" ".join(shlex.split(line, comments=True)) for line in prompted or lines]
    return list(filter(None, found))


def mistake(typed: str) -> str | None:
    """The first word of a `maese …` command that the command line does not know."""
    from maese.cli import cli

    node, options = cli, {"--help"}
    for word in re.sub(r"--lang[ =]\w+", "", typed).split():
        options |= {name for option in node.params for name in [*option.opts, *option.secondary_opts]}
        if word.startswith("--") and word.partition("=")[0] not in options:
            return word
        if isinstance(node, click.Group) and re.fullmatch(r"[a-z][a-z-]*", word):
            node = node.get_command(click.Context(node), word)
            if node is None:
                return word
    return None


@law
def test_the_readmes_show_the_same_commands_and_these_exist():
    en, es = commands("README.md"), commands("README.es.md")
    for a, b in [(a, b) for a, b in zip([*en, "nothing"], [*es, "nothing"], strict=False) if a != b][:1]:
        yield f"README.md shows `{a}` where README.es.md shows `{b}`; make the two lists one"
    text = (ROOT / "README.md").read_text("utf-8") + (ROOT / "README.es.md").read_text("utf-8")
    typed = [part for line in en + es for part in re.split(r"&&|[;|]", line)]
    for line in [*typed, *re.findall(r"`(maese [^`\n]+)`", text)]:
        ours = re.match(r"\s*(?:\w+=\S+ )*(?:\S*python3? -m )?(?:\S*/)?maese\b(?: (.*))?$", line)
        if ours and (wrong := mistake(ours.group(1) or "")):
            yield f"README: `{line.strip()}`: the command line does not know {wrong}"
    for name in re.findall(r"\brecipes/[\w./-]+\.ya?ml", text):
        if not (ROOT / name).exists():
            yield f"README: {name} does not exist"


@law
def test_the_changelog_begins_with_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if re.findall(r"^## +\[?v?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[:1] != [version]:
        yield f"CHANGELOG.md should begin with `## {version}`"


@law
def test_no_path_of_one_machine():
    own = re.compile(rb"(?<![\w.~-])/(?:wor" + rb"k|hom" + rb"e)/[\w.-]*")
    folders = ("src", "tests", "recipes", "data", "docs", "scripts", "benchmarks")
    for path in [p for f in folders for p in (ROOT / f).rglob("*")] + [*ROOT.glob("*.*"), ROOT / "Makefile"]:
        if path.is_file() and "__pycache__" not in path.parts and b"\0" not in (raw := path.read_bytes())[:4096]:
            yield from (f"{path.relative_to(ROOT)}: {hit.decode()}; write it relative" for hit in own.findall(raw))
