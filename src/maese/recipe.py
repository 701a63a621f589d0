"""The control panel: every option of a run, strict, in one place.

    recipe = load("quijote", ["train.lr=2e-4", "data.sources=[{path: mine.txt}]"])
    dump(recipe)                         the YAML that repeats the run, every default visible

A recipe file holds only what differs from the defaults below. An unknown key or a value out of range is an error that
names the key, what was found and the nearest name.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from maese.errors import MaeseError
from maese.say import has, say

NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Names people bring from other tools: suggestions, not aliases.
FALSE_FRIENDS = {
    "learning_rate": "train.lr", "batch_size": "train.micro_batch", "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation", "num_train_epochs": "train.epochs", "r": "method.rank",
    "lora_r": "method.rank", "lora_alpha": "method.alpha", "lora_dropout": "method.dropout", "model": "base",
    "system_prompt": "generate.system",
}  # fmt: skip
# The models that travel with the package: one that continues prose, and the same one taught to answer.
INSIDE = {
    "embedded": Path(__file__).parent / "embedded",
    "embedded-instruct": Path(__file__).parent / "embedded" / "instruct",
}
TEXTS = ("name", "base", "path", "output", "hub", "part", "group", "template", "map", "where", "system")
Share = Annotated[float, Field(strict=True, ge=0, le=0.9)]
Count = Annotated[int, Field(strict=True, ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Strict):
    """One place the text comes from: a file, a folder, `-` for what is piped in, or a data set of the hub."""

    path: str | None = None
    hub: str | None = None  # author/name, with @revision if wanted
    part: str = "train"  # of a data set of the hub
    streaming: bool = False  # read from the hub as it comes, nothing kept on disk
    limit: Count | None = None  # lines of a raw text, rows or blocks of anything else
    weight: Annotated[float, Field(strict=True, gt=0, le=100)] = 1.0  # times each row is learnt in one epoch
    documents: Literal["file", "line"] = "file"  # what one document of a raw text is
    where: dict[str, str] = {}  # only rows with these values: {lang: es}
    map: dict[Literal["prompt", "completion", "instruction", "input", "output", "system", "messages", "text"], str] = {}

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise PydanticCustomError("missing", "path")
        return self

    @property
    def name(self) -> str:
        """What it is called when something is said of it."""
        return self.path if self.path is not None else str(self.hub)


class Data(Strict):
    sources: Annotated[list[Source], Field(min_length=1)]
    format: Literal["auto", "text", "qa", "alpaca", "prompt", "messages", "sharegpt"] = "auto"
    template: str = "plain"  # maese | instruccion | chatml | llama3 | mistral | gemma | plain | model | a .jinja file
    marks: Literal["auto", "add"] = "auto"  # auto: a mark the tokenizer lacks is spelt out; add: it becomes a token
    loss: Literal["assistant", "last", "all"] = "assistant"  # which turns of a conversation are learnt
    max_length: Annotated[int, Field(strict=True, ge=8, le=131072)] = 256  # tokens in one example
    too_long: Literal["error", "drop", "truncate", "split"] = "error"
    stride: Annotated[int, Field(strict=True, ge=0)] = 0  # tokens of one piece repeated, unlearnt, before the next
    packing: bool = False  # several examples in one row of max_length, each blind to the others
    validation: Share = 0.1  # share kept apart, never trained on
    group: str | None = None  # column whose rows never part: the author, the work
    clean: list[Literal["length", "repetition", "symbols", "language"]] = []  # rules a row must pass
    dedup: Literal["none", "exact", "near"] = "none"
    tolerance: Share = 0.01  # share of faulty rows left out; above it nothing is trained


class Method(Strict):
    kind: Literal["full", "lora", "qlora"] = "full"  # qlora: the base in 4 bits under the adapter
    rank: Annotated[int, Field(strict=True, ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(strict=True, gt=0)] = 32
    dropout: Share = 0.0
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"

    @property
    def adapts(self) -> bool:
        """Whether the base stays as it is and an adapter learns."""
        return self.kind != "full"


class Train(Strict):
    epochs: Annotated[float, Field(strict=True, gt=0)] = 3
    max_steps: Count | None = None  # stops there, whatever the epochs say
    micro_batch: Count = 2  # examples through the model at once
    accumulation: Count = 4  # micro-batches before the weights move
    lr: Annotated[float, Field(strict=True, gt=0, le=10)] = 1e-4
    weight_decay: Annotated[float, Field(strict=True, ge=0)] = 0.01
    optimizer: Literal["adamw", "muon", "adamw8bit", "paged", "paged32"] = "adamw"
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: Share = 0.05  # share of the steps
    clip: Annotated[float, Field(strict=True, gt=0)] = 1.0  # largest norm of the gradient
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | Annotated[bool, Field(strict=True)] = "auto"  # auto: long runs on a card
    memory_gib: Annotated[float, Field(strict=True, gt=0)] | None = None  # no more than this is taken
    save_every: Count = 200  # steps between checkpoints
    keep: Count = 2  # checkpoints kept
    patience: Annotated[int, Field(strict=True, ge=0)] = (
        0  # validations without improvement before stopping; 0 never stops
    )
    final: Literal["best", "last", "average"] = "best"  # which weights go to final/
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 42


class Eval(Strict):
    every: Count = 50  # steps between validations
    prompts: list[str] = []
    general: str | None = None  # a text of another kind, measured before and after: what is forgotten


class Generate(Strict):
    max_new_tokens: Count = 160
    temperature: Annotated[float, Field(strict=True, ge=0, le=5)] = 0.9  # 0 is greedy
    top_k: Annotated[int, Field(strict=True, ge=0)] = 50  # 0 keeps all
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.95
    repetition_penalty: Annotated[float, Field(strict=True, ge=1, le=5)] = 1.1
    sentences: Count | None = None  # exactly so many, when given
    system: str | None = None  # the voice: said before a conversation that has no system message of its own
    stop: list[Annotated[str, Field(min_length=1)]] = []
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 42


class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", max_length=60)]
    base: str = "embedded"  # embedded | embedded-instruct | a folder | a hub id, with @revision if wanted
    data: Data
    method: Method = Method()
    train: Train = Train()
    eval: Eval = Eval()
    generate: Generate = Generate()
    output: str | None = None  # None: runs/<date>-<name>


def shipped(name: str) -> Path:
    """A file that travels with maese (`recipes/…`, `data/…`): inside the wheel, or beside `src/` in a clone."""
    here = Path(__file__).parent
    inside = here / "shipped" / name
    return inside if inside.exists() else here.parent.parent / name


def names() -> list[str]:
    """The recipes that travel with maese: `["demo", "pokemon", "quijote"]`."""
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def at_home(name: str | Path) -> Path:
    """A path as typed, `~` opened: of somebody who is not here, `~nadie/x`, it stays, and is told as not found."""
    return Path(os.path.expanduser(name))


def find(what: str) -> Path:
    """The file of a recipe, given its path or the name of one that travels with maese."""
    for path in (Path(what), shipped(f"recipes/{what}.yaml"), shipped(what)):
        if path.is_file():
            return path
    near = difflib.get_close_matches(Path(what).stem, names(), n=1, cutoff=0.5)
    if Path(f"{what}.yaml").is_file():
        near = [f"{what}.yaml"]
    raise MaeseError("USE-05", name=what, known=", ".join(names()), nearest=near[0] if near else names()[0])


def load(what: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by path or name and apply dotted overrides such as `train.lr=2e-4`."""
    tree = tree_of(find(str(what)))
    for override in overrides:
        put(tree, *change(override))
    return check(tree)


def tree_of(path: Path) -> dict[str, Any]:
    """A recipe file as plain data, numbers still as they were written. Errors: USE-04 (not YAML), DATA-02."""
    tree = _parse(text(path), str(path))
    if not isinstance(tree, dict):
        raise MaeseError("USE-04", path=str(path), line=1, column=1)
    return tree


def change(override: str) -> tuple[str, Any]:
    """`change("train.lr=2e-4")` is `("train.lr", "2e-4")`. Error: USE-06 (no `=`)."""
    key, mark, value = override.partition("=")
    if not mark or not key:
        raise MaeseError("USE-06", found=override)
    return key, _parse(value, override)


def text(path: Path) -> str:
    """The text of a recipe file. Error: DATA-02 (saved in another encoding)."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "cp1252"
        fixed = path.with_name(f"{path.stem}.fixed{path.suffix}")
        raise MaeseError("DATA-02", path=str(path), encoding=encoding, line=line, fixed=str(fixed)) from None


def check(tree: dict[str, Any]) -> Recipe:
    """A validated recipe from plain data; the first mistake found is raised as MaeseError."""
    try:
        return Recipe.model_validate(numbers(tree))
    except ValidationError as problem:
        raise mistake(problem) from None


def dump(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(), allow_unicode=True, sort_keys=False, width=100)


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its default: `{"train.lr": 0.0001, …}`."""
    flat: dict[str, Any] = {}
    for key, info in model.model_fields.items():
        one = info.annotation
        kinds = get_args(one) if isinstance(one, UnionType) else (one,)  # a table may be left out
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            flat |= fields(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = None if info.is_required() else info.default
    return flat


class _Loader(yaml.SafeLoader):
    """YAML that leaves numbers as they were written: what a `010`, a `1:30` or a `2026.10` is, its key decides."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # its parent's is no ClassVar

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:  # the first would be dropped without a word
                raise yaml.constructor.ConstructorError(None, None, key.value, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(?:~|null|)$"), ["~", "n", ""])


def _parse(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise MaeseError("USE-04", path=where, line=line, column=column) from None


def scalar(value: Any) -> Any:
    """A number as people write it: `scalar("2e-4")` is 0.0002 and so is «0,0002»; other texts stay."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        plain = value.replace(",", ".")
        if re.fullmatch(r"[+-]?\d+", plain):
            return int(plain)  # a long seed is one and no other
        # `1e3` is a whole number; `1.000` is not, since some would mean one and some a thousand.
        whole = "." not in plain and "e-" not in plain.lower() and math.isfinite(float(plain))
        return int(float(plain)) if whole else float(plain)
    return value


def numbers(tree: Any, key: str = "") -> Any:
    """Plain data with its numbers read, names left as text: `numbers({"name": "1", "lr": "2"})` has lr 2."""
    if key in TEXTS:  # names stay text, even those that look like a number
        return tree
    if isinstance(tree, dict):
        return {k: numbers(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [numbers(v) if isinstance(v, dict) else v for v in tree]
    return scalar(tree)


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key, making the tables above it."""
    *parents, last = dotted.split(".")
    for parent in parents:
        below = tree.get(parent)
        if not isinstance(below, dict):
            below = tree[parent] = {}
        tree = below
    tree[last] = value


def mistake(problem: ValidationError, panel: type[BaseModel] = Recipe) -> MaeseError:
    """The first mistake pydantic found, in our words: the key, what was there, what was expected."""
    first = problem.errors()[0]
    for error in problem.errors():  # a misspelt key explains the missing one better than the reverse
        if error["type"] == "extra_forbidden":
            first = error
            break
    # Where a field takes one type or another, pydantic adds the type's name to the place.
    key = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"\w+", str(part)))
    if first["type"] == "extra_forbidden":
        value = first["input"]
        while isinstance(value, dict) and len(value) == 1:  # `tren.lr=1` is told as it was typed
            key, value = f"{key}.{next(iter(value))}", next(iter(value.values()))
        leaf_key = key.rsplit(".", 1)[-1].lower()
        known = [*fields(panel), "data.sources", *panel.model_fields]
        if source := re.search(r"^(.*sources)\.\d+\.", key):
            known = [f"{source[1]}.{name}" for name in Source.model_fields]
        friend = None if source else FALSE_FRIENDS.get(leaf_key)
        part = key.split(".")[0]
        if friend and panel is not Recipe and part != key and part in panel.model_fields:  # of one training alone
            friend = f"{part}.{friend}"
        near = [friend] if friend else difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.4)
        if not near:
            leaf = {k.rsplit(".", 1)[-1]: k for k in known}
            near = [leaf[k] for k in difflib.get_close_matches(leaf_key, leaf, n=1, cutoff=0.4)]
        return MaeseError("USE-02", key=key, nearest=near[0] if near else "train.lr", value=typed(value))
    if first["type"] == "missing":
        return MaeseError("USE-07", key=f"{key}.path" if re.search(r"sources\.\d+$", key) else key)
    return MaeseError("USE-03", key=key, found=repr(first["input"]), expected=_expected(first))


def typed(value: Any) -> str:
    """A value as it is typed on the command line: `typed(0.5)` is `0.5`, `typed("a: b")` keeps quotation marks."""
    try:
        plain = isinstance(value, str) and _parse(value, "") == value
    except MaeseError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False, default=str)


def _expected(error: Any) -> str:
    """What a field takes, in signs where there are any: `≥ 1`, `cosine | linear`."""
    facts = error.get("ctx", {})
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("min_length", "≥"), ("max_length", "≤")):
        if name in facts:
            return f"{sign} {facts[name]}"
    if "expected" in facts:
        return str(facts["expected"]).replace(" or ", " | ").replace(", ", " | ").replace("'", "")
    if "pattern" in facts:
        return "a-z, 0-9, «-», «_», «.»"
    if error["type"] == "finite_number":
        return "< ∞"
    kind = error["type"].split("_")[0]
    return say(f"type.{kind}") if has(f"type.{kind}") else kind
