"""What a run will take, as the terminal tells it: part by part, on this machine and on common ones, and what to change.

In go recipes with the anatomy of their models (`plan.shape`); out comes text of at most 80 columns, or JSON.
"""

from __future__ import annotations

import json as jsons
import shlex
import sys
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

from maese.errors import MaeseError
from maese.live import gigabytes
from maese.plan import cost, memory
from maese.plan.cost import Pace
from maese.plan.fit import CARDS, Changes, Fit, fit, least, smaller, told, typed, ways
from maese.plan.machine import Machine, glance
from maese.plan.shape import Anatomy, parameters
from maese.recipe import Recipe
from maese.say import duration, number, percent, quantity, say
from maese.terminal import talk

BAR = 22  # cells of the longest bar
GIB = 2**30
LEAST = GIB // 100  # what is smaller is only said to be so


@dataclass(frozen=True)
class Asked:
    """What was typed: a recipe, or the base of none, and every change as a key of recipes, the options among them."""

    name: str | None
    base: str | None
    changes: tuple[str, ...]
    staged: bool = False  # a recipe of several trainings, whose bases follow from its size

    def words(self, *more: str) -> str:
        """All of it as it is typed in a shell, with more keys, each in the place of its own if it has one."""
        last = {word.partition("=")[0]: word for word in (*self.changes, *more)}
        return shlex.join([*([self.name] if self.name else ["--base", self.base or ""]), *last.values()])


@dataclass(frozen=True)
class Planned:
    """A training: its name, its recipe with what was asked for, what its model is made of, and whether that is `built`
    and knows nothing yet."""

    title: str
    recipe: Recipe
    shape: Anatomy
    built: bool = False


def show(planned: list[Planned], pace: Pace | None, asked: Asked, json: bool = False, quiet: int = 0) -> None:
    """The whole plan of each training."""
    if json:
        _write_json([facts(each, pace) for each in planned])
        return
    lines: list[str] = []
    for each in planned:
        here = here_for(each.recipe)
        lines += [*_head(each, here), "", *_parts(each, here), "", *_rest(each, here, pace, asked.staged)]
        lines += ["", *_machines(each, here), *_ways(each, here), ""]
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    talk("\n" + say("plan.next", words=asked.words()), quiet=quiet)
    if asked.name is not None and not asked.staged and pace is None:
        talk(say("plan.next_probe", words=asked.words()), quiet=quiet)


def show_fit(planned: list[Planned], room: float, asked: Asked, json: bool = False, quiet: int = 0) -> None:
    """The keys with which each training fits in so many bytes. Error: MEM-05 (none of all settings does)."""
    found = [(each, fitted(each, room, asked)) for each in planned]
    if json:
        _write_json([
            {"name": each.title, "room_gib": round(room / GIB, 3), "changes": dict(one.changes),
             **memory.facts(one.told)} for each, one in found
        ])  # fmt: skip
        return
    keys: list[str] = []
    for each, one in found:
        figures = {"name": _named(each, asked), "room": _gib(room), "needed": _gib(one.told.needed)}
        talk(say("plan.fits_as_it_is" if not one.changes else "plan.fits_with", **figures), quiet=quiet)
        if one.changes:
            keys += (own := _prefixed(one.changes, each.title, len(found) > 1))
            sys.stdout.write(" ".join(own) + "\n")
            for key in _prices(one.changes):
                talk(f"  {say(f'plan.way.{key}')}: {say(f'plan.price.{key}')}", quiet=quiet)
    if asked.name is not None:
        talk(say("plan.then", words=asked.words(*keys)), quiet=quiet)
    elif not planned[0].built:  # there is a model and no recipe yet
        alike = Asked(say("cli.metavar.recipe"), None, (f"base={asked.base}", *asked.changes))
        talk(say("plan.then_recipe", words=alike.words(*keys)), quiet=quiet)
    sys.stdout.flush()


def _write_json(every: list[dict[str, Any]]) -> None:
    sys.stdout.write(jsons.dumps(every[0] if len(every) == 1 else every, ensure_ascii=False, indent=1) + "\n")


def _named(each: Planned, asked: Asked) -> str:
    """What a training is called, with its base where that is not the recipe's."""
    if asked.name is None or not any(change.startswith("base=") for change in asked.changes):
        return each.title
    return say("plan.named", name=each.title, base=each.recipe.base)


def say_probing(json: bool = False, quiet: int = 0) -> None:
    """Some steps are about to be measured, which takes a while."""
    talk(say("plan.probing"), json, quiet)


def fitted(each: Planned, room: float, asked: Asked) -> Fit:
    """The settings that fit: on a card, unless the recipe asks for the processor. Error: MEM-05."""
    recipe, shape = each.recipe, each.shape
    device, precision = asked_of(recipe)
    if found := fit(shape, recipe, precision, device, room, each.built):
        return found
    smallest = least(shape, recipe, precision, device, each.built)
    enough = [name for name, size in CARDS.items() if size >= smallest.told.needed]
    again = asked.words()
    if not enough and not asked.staged:
        other = smaller(shape, recipe, precision, device, room)
        again = asked.words(f"base={other}") if asked.name else replace(asked, base=other).words()
    raise MaeseError(
        "MEM-05", room=room / GIB, name=_named(each, asked), needed=smallest.told.needed / GIB, words=again,
        changes=typed(smallest.changes) or say("plan.nothing"),
        card=say("plan.enough", card=enough[0]) if enough else "",
    )  # fmt: skip


def typed_size(size: float) -> str:
    """Bytes as `--fit` takes them: `typed_size(6e9)` is «6GB»."""
    return f"{size / 1e9:g}GB"


def here_for(recipe: Recipe) -> Machine:
    """This machine for a recipe; one that asks for a card is planned where there is none, too. A ceiling of the recipe
    (`train.memory_gib`) counts as what there is."""
    train = recipe.train
    try:
        here = glance(train)
    except MaeseError:
        here = glance(train.model_copy(update={"device": "auto"}))
    return replace(here, memory_gib=here.room_gib(train))


def asked_of(recipe: Recipe) -> tuple[str, str]:
    """Device and precision of a machine that is not this one: a card with bf16, unless the recipe says otherwise."""
    precision = recipe.train.precision
    return "cpu" if recipe.train.device == "cpu" else "cuda", "bf16" if precision == "auto" else precision


def machines(recipe: Recipe, here: Machine) -> list[tuple[str, str, str, float]]:
    """Name, device, precision and bytes of this machine and of common ones."""
    _, precision = asked_of(recipe)
    known = [(say(f"plan.here.{here.device}"), here.device, here.precision, here.memory_gib * GIB)]
    if here.device == "cuda":
        own = glance(recipe.train.model_copy(update={"device": "cpu"}))
        known.append((say("plan.here.cpu"), "cpu", own.precision, own.memory_gib * GIB))
    return known + [(say("plan.card", size=name), "cuda", precision, float(room)) for name, room in CARDS.items()]


def facts(each: Planned, pace: Pace | None = None) -> dict[str, Any]:
    """A plan as JSON: sizes in GiB, disk in bytes, time in seconds."""
    recipe, shape = each.recipe, each.shape
    here = here_for(recipe)
    job = memory.job_of(recipe, here.precision, here.device)
    places = []
    for name, device, precision, room in machines(recipe, here):
        needed = told(shape, recipe, precision, device).needed
        found = fit(shape, recipe, precision, device, room, each.built)
        places.append({
            "name": name, "device": device, "room_gib": round(room / GIB, 3), "needed_gib": round(needed / GIB, 3),
            "fits": needed <= room, "with": dict(found.changes) if found else None,
        })  # fmt: skip
    return {
        "name": each.title, "base": recipe.base, "family": shape.family, "method": recipe.method.kind,
        "parameters": parameters(shape), "trained": memory.trained_of(shape, job), "machine": here.facts(),
        "memory": memory.facts(told(shape, recipe, here.precision, here.device)), "machines": places,
        "ways": [{"key": way.key, "changes": dict(way.changes), "saved_gib": round(way.saved / GIB, 3)}
                 for way in ways(shape, recipe, here.precision, here.device, each.built)],
        **cost.facts(cost.disk(shape, job, recipe, pace.steps if pace else None), pace),
    }  # fmt: skip


def _head(each: Planned, here: Machine) -> list[str]:
    recipe, shape = each.recipe, each.shape
    every, job = parameters(shape), memory.job_of(recipe, here.precision, here.device)
    trained, train = memory.trained_of(shape, job), recipe.train
    said = {"layers": shape.layers, "width": shape.width, "all": quantity(every), "family": shape.family}
    learnt = say(f"plan.method.{job.kind}", rank=job.rank, n=quantity(trained), share=percent(trained / every))
    asked = {"rows": train.micro_batch, "turns": train.accumulation, "length": recipe.data.max_length}
    more = f" · {say('plan.checkpointing')}" if train.gradient_checkpointing else ""
    return [
        say("plan.title", name=each.title), "  " + say("plan.model", base=_short(recipe.base), **said), "  " + learnt,
        *wrap("  " + say("plan.settings", **asked) + f" · {here.precision} · {train.optimizer}{more}", 80,
              subsequent_indent=" " * 11, break_on_hyphens=False),
        "  " + say("plan.at_once", n=job.tokens, turns=job.passes),
    ]  # fmt: skip


def _short(base: str, width: int = 52) -> str:
    """The end of a long path, which tells it apart."""
    return base if len(base) <= width else "…" + base[1 - width :]


def _parts(each: Planned, here: Machine) -> list[str]:
    """The worst moment, part by part, with a bar for each: together what must be free, which is what is compared."""
    found = told(each.shape, each.recipe, here.precision, here.device)
    full = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    parts = [*found.parts, ("card", found.needed - found.training)] if here.device == "cuda" else found.parts
    labels = {key: say(f"plan.part.{key}") for key, _ in parts}
    width, largest = max(map(len, labels.values())), max(size for _, size in parts)
    lines = [say(f"plan.moment.{found.moment}")]
    for key, size in parts:
        bar = full * max(1, round(BAR * size / largest))
        shown = number(size / GIB, 2) if size >= LEAST else f"<{number(LEAST / GIB, 2)}"
        lines.append(f"  {labels[key]:<{width}}  {shown:>7} GiB  {bar}")
    room = here.memory_gib
    fits = "fits" if found.needed / GIB <= room else "does_not"
    lines.append("  " + say(f"plan.total.{fits}", total=_gib(found.needed), room=number(room, 1)))
    if found.load > found.training:
        lines.append("  " + say("plan.loading", load=_gib(found.load), file=_gib(found.file)))
    return lines


def _rest(each: Planned, here: Machine, pace: Pace | None, staged: bool) -> list[str]:
    """Disk, and time where it was or could be measured."""
    job = memory.job_of(each.recipe, here.precision, here.device)
    found = cost.disk(each.shape, job, each.recipe, pace.steps if pace else None)
    # A disk is counted in powers of ten, as its maker does.
    sizes = {"most": gigabytes(found.most), "one": gigabytes(found.checkpoint), "final": gigabytes(found.final)}
    best = {"best": gigabytes(found.best)} if found.best else {}
    lines = ["  " + say(f"plan.disk.{'with_best' if best else 'plain'}", n=found.checkpoints, **sizes, **best)]
    if pace is None:
        return [*lines, *([] if staged else ["  " + say("plan.no_time")])]
    shortest, longest = cost.total(pace)
    speeds = f"{number(min(pace.speeds), 0)}–{number(max(pace.speeds), 0)}"
    measured = {"speeds": speeds, "n": len(pace.seconds), "peak": number(pace.peak_gib, 2), "steps": pace.steps}
    quickest, slowest = (
        number(seconds, 2 if seconds < 10 else 0) for seconds in (min(pace.seconds), max(pace.seconds))
    )
    measured |= {"quickest": quickest, "slowest": slowest}
    return [*lines, "  " + say("plan.time", least=duration(shortest), most=duration(longest), **measured)]


def _machines(each: Planned, here: Machine) -> list[str]:
    """A line for each machine: what it has, what the run needs there, and whether it fits, or with what."""
    recipe, shape = each.recipe, each.shape
    rows = machines(recipe, here)
    width = max(len(name) for name, *_ in rows)
    lines = [say("plan.where")]
    for name, device, precision, room in rows:
        found = told(shape, recipe, precision, device)
        begin = f"  {name:<{width}} {number(room / GIB, 1):>6} GiB  {number(found.needed / GIB, 2):>7}  "
        if found.needed <= room:
            lines.append(begin + say("plan.fits"))
        elif other := fit(shape, recipe, precision, device, room, each.built):
            lines += _folded(begin + say("plan.with") + " ", typed(other.changes))
        else:
            needed = _gib(least(shape, recipe, precision, device, each.built).told.needed)
            lines.append(begin + say("plan.never", needed=needed))
    return lines


def _folded(begin: str, words: str, width: int = 80) -> list[str]:
    """Words after a beginning, on more lines below it where they do not fit: cut between keys alone."""
    lines = [begin.rstrip()]
    for word in words.split():
        if len(lines[-1]) + 1 + len(word) > width and lines[-1].strip():
            lines.append(" " * 6 + word)
        else:
            lines[-1] += " " + word
    return lines


def _ways(each: Planned, here: Machine) -> list[str]:
    """What to change for less memory here, each by itself."""
    found = ways(each.shape, each.recipe, here.precision, here.device, each.built)
    if not found:
        return []
    lines = ["", say("plan.ways")]
    for way in found:
        saved = f"−{number(way.saved / GIB, 2)} GiB"
        lines += [f"  {typed(way.changes):<46} {saved:>12}", f"      {say(f'plan.price.{way.key}')}"]
    return lines


def _prices(changes: Changes) -> list[str]:
    """The names of what gives way, for the words that say what each costs."""
    said = dict(changes)
    names = {
        "train.micro_batch": "smaller", "train.gradient_checkpointing": "checkpointing", "data.max_length": "shorter",
        "train.optimizer": "eight_bits",
    }  # fmt: skip
    kinds = [str(said["method.kind"])] if "method.kind" in said else []
    return [name for key, name in names.items() if key in said] + kinds


def _prefixed(changes: Changes, training: str, several: bool) -> list[str]:
    """Changes as typed, `pretrain.train.micro_batch=1` where they are of one training among several."""
    return [(f"{training}." if several else "") + typed((one,)) for one in changes]


def _gib(size: float) -> str:
    return number(size / GIB, 2)
