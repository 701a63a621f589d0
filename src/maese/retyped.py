"""The repair of an error, made of the words that were typed: what is pasted does what was meant.

    retyped(MaeseError("USE-03", key="train.lr", …), ["train", "mio.yaml", "size=nano", "train.lr=99"],
            ["maese train RECETA train.lr=1"])    →    ["maese train mio.yaml size=nano train.lr=1"]

The catalogues write a repair for anybody: a command to a line, after it a remark as a shell takes one, and RECETA where
the recipe's name goes. Where the typed words tell nothing, a line stays as it is.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from maese.errors import MaeseError
from maese.say import say

# Errors about a name that was typed and the fact that holds it: typed again with the nearest one, they are mended.
MISSPELT = {"USE-05": "name", "USE-08": "found", "PERSONA-01": "name", "RUN-02": "run", "PLAN-02": "base"}
STANDS_FOR = {"--context": "data.max_length", "--method": "method.kind"}  # options of `plan`, as keys


def retyped(problem: MaeseError, words: list[str], lines: list[str]) -> list[str]:
    """The lines of a repair, in the words of the command that failed."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    name, near = problem.facts.get(MISSPELT.get(problem.code, "")), problem.facts.get("nearest")
    if near and any(word in (name, f"base={name}") for word in words):
        meant = [word.removesuffix(str(name)) + str(near) if word in (name, f"base={name}") else word for word in words]
        return [shlex.join(["maese", *meant]), *lines[1:]]
    if problem.code == "USE-02" and (again := _respelt(problem, words)):
        return [shlex.join(["maese", *again]), *lines[1:]]
    command = next((word for word in words if word in ("train", "plan")), None)
    rest = words[words.index(command) + 1 :] if command else []
    return [_line(line, problem, words, rest) for line in lines]


def _line(line: str, problem: MaeseError, words: list[str], rest: list[str]) -> str:
    """One line, where `rest` are the words after `train` or `plan`, the first of them perhaps a recipe."""
    proposed, gap, remark = line.partition("   # ")
    named = bool(rest) and not rest[0].startswith("-") and ("=" not in rest[0] or Path(rest[0]).is_file())
    recipe = rest[0] if named else None
    blank, key, training = say("cli.metavar.recipe"), str(problem.facts.get("key")), problem.facts.get("training")
    keys = [_of(training, word, rest) for word in _keys(proposed, f"maese train {blank} ")]
    if rest and keys:
        proposed = shlex.join(["maese", *_without(words, {word.partition("=")[0] for word in keys} | {key}), *keys])
    elif recipe and problem.code == "RUN-02" and "--from" in rest:  # there is nothing yet to go on from
        at = words.index("--from")
        proposed = shlex.join(["maese", *words[:at], *words[at + 2 :]])
    elif recipe and problem.code == "USE-03" and any(word.startswith(f"{key}=") for word in rest):
        proposed = proposed.replace("maese train quijote", shlex.join(["maese", "train", recipe]))
    elif recipe:
        proposed = proposed.replace(f" {blank}", f" {shlex.quote(recipe)}")
    return proposed + gap + remark


def _keys(proposed: str, before: str) -> list[str]:
    """The changes that a command proposes: `_keys("maese train RECETA a=1 b=2", "maese train RECETA ")`."""
    try:
        words = shlex.split(proposed.removeprefix(before)) if proposed.startswith(before) else []
    except ValueError:  # a name with half a pair of quotes
        return []
    return words if all("=" in word for word in words) else []


def _of(training: object, change: str, rest: list[str]) -> str:
    """A change as one of a training of several, unless it was typed of all: `_of("instruct", "data.clean=[]", [])`."""
    key = change.partition("=")[0]
    if not training or key.startswith(f"{training}.") or any(word.startswith(f"{key}=") for word in rest):
        return change
    return f"{training}.{change}"


def _respelt(problem: MaeseError, words: list[str]) -> list[str] | None:
    """Typed words with a misspelt key inside a value, `data.sources=[{path: a.txt, limt: 4}]`, spelt as was meant."""
    wrong, right = (str(problem.facts.get(fact)).rpartition(".")[2] for fact in ("key", "nearest"))
    again = [re.sub(rf"(?<=[{{, ]){re.escape(wrong)}(?=\s*:)", right, word) if "=" in word else word for word in words]
    return again if again != words else None


def _without(words: list[str], keys: set[str]) -> list[str]:
    """Typed words less what they say of some keys: `_without(["plan", "--context", "9"], {"data.max_length"})`."""
    kept, skip = [], False
    for word in words:
        # In a recipe of stages the key is that of one of them: `pretrain.data.max_length`.
        stands = word in STANDS_FOR and any(f".{key}".endswith(f".{STANDS_FOR[word]}") for key in keys)
        if not skip and word.partition("=")[0] not in keys and not stands:
            kept.append(word)
        skip = stands
    return kept
