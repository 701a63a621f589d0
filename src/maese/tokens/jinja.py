"""Templates written in Jinja: a model's own, or a .jinja file; and the built-in ones as Jinja for a tokenizer to carry.

    Jinja("model", tokenizer).pieces(messages, generation=True)     [Piece(1), Piece("user\\nHola"), …]
    jinja_of(written)                                               "{{- '<|im_start|>' … }}"

What people typed is never shown to the template: each turn is rendered as one private character, and the marks are
looked for in what the template wrote around it. So a turn cannot become a special token, and a thousand conversations
of the same shape are rendered once. A template is a stranger's program: it runs in the sandbox of transformers, with a
bound on its steps.
"""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from maese.errors import MaeseError
from maese.recipe import at_home
from maese.say import say
from maese.text.record import Message, Note
from maese.tokens.template import CONTEXT, Piece, fitting

if TYPE_CHECKING:
    from maese.tokens.template import Written

FIRST = 0x100000  # one private character a turn; transformers keeps those of the plane before for itself
STAND_INS = re.compile("[\U00100000-\U0010fffd]")
STEPS = 400_000  # lines of a template run in one rendering: a long chat takes some thousands
SECONDS = 5  # that one rendering may take: a long chat takes some hundredths
ROOM = 2**28  # bytes of memory it may take
LARGEST = 100_000  # characters of a template, and the largest number it may write
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAPES_KEPT = 4096
# Llama 3.x writes today's date unless told; ids that change at midnight cannot be resumed. This is Meta's own default.
DATE = "26 Jul 2024"

# What a template must leave as it is, in two rounds: quotes, braces, markup, a break.
PROBE = ("a «b» \"c\" 'd' \\ <e> & {f} {{ g }}", "h\n\ni\tñ ¿j?")

Spans = list[tuple[int, int]]  # stretches of a string, from and up to


class Skeleton(NamedTuple):
    """A conversation whose turns are stand-ins: as a string and as pieces."""

    text: str
    pieces: tuple[Piece, ...]


class EndlessError(Exception):
    """A template ran for longer than any chat needs."""


class Jinja:
    """The chat template of a tokenizer (`name` is "model") or of a file, in the tokens of one tokenizer."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self._tokenizer, self._fits = name, tokenizer, fitting(tokenizer)
        self.jinja = self._source()
        self._looks_for = self._read()
        # Tokens of blanks alone are no marks: what the template indents would be one.
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self._ids = {token.content.strip(): i for i, token in added.items()}
        longest_first = sorted(added.values(), key=lambda token: -len(token.content))
        self._added = re.compile("|".join(map(_pattern, longest_first)) or "(?!)")
        self._known: dict[tuple[bool, tuple[Message, ...]], Skeleton] = {}
        dated = "strftime_now" in self.jinja and "date_string" not in self.jinja
        self.notes: list[Note] = [("template.date", {"template": name})] if dated else []
        turns = tuple(Message(role, text) for text in PROBE for role in ("user", "assistant"))
        self.ends = self._ends(turns[:2])
        pieces = self.pieces(turns, False)
        self.pieces(turns[:1], True)
        outside = {p.value for p in pieces if isinstance(p.value, int) and p.turn == CONTEXT}
        self.marks = self.ends | outside

    def _source(self) -> str:
        try:
            if self.name != "model":
                with at_home(self.name).open("rb") as file:
                    source = file.read(4 * LARGEST + 1).decode("utf-8-sig")
            elif self._tokenizer.chat_template:
                source = self._tokenizer.get_chat_template()
            else:
                raise MaeseError("TEMPLATE-01", fits=self._fits)
        except (OSError, ValueError) as problem:  # not a text, or several with names and none the default
            raise self._fault("broken", problem) from problem
        if len(source) > LARGEST or STAND_INS.search(source):
            raise self._fault("large", limit=LARGEST)
        return source

    def _read(self) -> re.Pattern[str]:
        """What it may look for inside a turn, read and not run; what would fill a memory in one step is refused."""
        from jinja2 import Environment, TemplateSyntaxError, nodes

        bare = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", "", self.jinja)
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
        except TemplateSyntaxError as problem:
            raise self._fault("syntax", problem, line=problem.lineno) from problem
        except (RecursionError, ValueError) as problem:  # nested without end, or a number of thousands of digits
            raise self._fault("large", limit=LARGEST) from problem
        constants = [node.value for node in tree.find_all(nodes.Const)]
        texts_of = [str(value) if not isinstance(value, int) else f"{value % 10**9}" for value in constants]
        huge = any(isinstance(value, int) and value > LARGEST for value in constants)
        numbers = [int(digits[:9]) for value in texts_of for digits in re.findall(r"\d{6,}", value)]
        if huge or tree.find(nodes.Pow) or any(number > LARGEST for number in numbers):
            raise self._fault("large", limit=LARGEST)
        texts = {c.strip() for c in constants if isinstance(c, str) and re.search(r"[^\w\s]", c)}
        return re.compile("|".join(re.escape(text) for text in sorted(texts) if len(text) > 1) or "(?!)")

    def _fault(self, reason: str, problem: BaseException | None = None, **facts: object) -> MaeseError:
        told = " ".join(str(problem).split())[:120] or type(problem).__name__ if problem else ""
        why = say(f"template.reason.{reason}", told=told, **facts)
        return MaeseError("TEMPLATE-04", template=self.name, reason=why, fits=self._fits)

    def _render(self, messages: tuple[Message, ...], generation: bool) -> tuple[str, Spans]:
        """What the template writes, and the stretches that it marks as generated."""
        from jinja2.exceptions import SecurityError
        from transformers.utils import chat_template_utils

        rendered: Any = chat_template_utils.render_jinja_template
        chat = [{"role": message.role, "content": message.content} for message in messages]
        marked = bool(GENERATION.search(self.jinja))
        given = {**self._tokenizer.special_tokens_map, "date_string": DATE}
        try:
            with Bounded(STEPS):
                texts, spans = rendered(
                    [chat],
                    chat_template=self.jinja,
                    add_generation_prompt=generation,
                    return_assistant_tokens_mask=marked,
                    **given,
                )
        except EndlessError as problem:
            raise self._fault("endless", steps=STEPS) from problem
        except MemoryError as problem:
            raise self._fault("large", limit=LARGEST) from problem
        except SecurityError as problem:
            raise self._fault("unsafe", problem) from problem
        except Exception as problem:  # a stranger's program fails in any way there is
            raise self._fault("broken", problem) from problem
        return texts[0], spans[0] if marked else []

    def string(self, messages: tuple[Message, ...], generation: bool) -> str:
        return self._render(messages, generation)[0]

    def pieces(self, messages: tuple[Message, ...], generation: bool) -> list[Piece]:
        # The white space around a turn is shown to the template, which may trim it, everywhere or in some places.
        cores = [message.content.strip() for message in messages]
        shown = tuple(
            Message(m.role, m.content.replace(core, chr(FIRST + i), 1) if core else m.content)
            for i, (m, core) in enumerate(zip(messages, cores, strict=True))
        )
        skeleton = self._known.get((generation, shown))

        def fill(text: str) -> str:
            return STAND_INS.sub(lambda found: cores[ord(found.group()) - FIRST], text)

        if skeleton is None or any(map(self._looks_for.search, cores)):
            skeleton = skeleton or self._skeleton(shown, generation)
            if self.string(messages, generation) != fill(skeleton.text):
                raise self._fault("changed")
            if len(self._known) >= SHAPES_KEPT:
                self._known.clear()
            self._known[generation, shown] = skeleton
        return [Piece(fill(p.value) if isinstance(p.value, str) else p.value, p.turn) for p in skeleton.pieces]

    def _ends(self, turns: tuple[Message, ...]) -> frozenset[int]:
        """The token that comes after the last answer of all, where no other turn can lend it its first."""
        text = self.string((turns[0], Message("assistant", chr(FIRST))), False)
        mark = self._added.search(text, text.find(chr(FIRST)) + 1)
        if mark is None:
            raise MaeseError("TEMPLATE-03", template=self.name, fits=self._fits)
        return frozenset({self._ids[mark.group().strip()]})

    def _skeleton(self, shown: tuple[Message, ...], generation: bool) -> Skeleton:
        text, spans = self._render(shown, generation)
        for i, message in enumerate(shown):
            if message.content.strip() and text.count(chr(FIRST + i)) != 1:
                raise self._fault("lost", role=say(f"template.role.{message.role}"), n=text.count(chr(FIRST + i)))
        answers = [i for i, message in enumerate(shown) if message.role == "assistant"]
        return Skeleton(text, tuple(self._cut(text, [self._answer(i, shown, text, spans) for i in answers])))

    def _answer(self, i: int, shown: tuple[Message, ...], text: str, spans: Spans) -> tuple[int, int, int]:
        """Where the i-th turn begins and ends, and what it teaches: itself, or less than CONTEXT if not marked."""
        place = text.find(chr(FIRST + i))
        start = self._start(shown[:i], text, place)
        said = max(place + 1, start)
        later = STAND_INS.search(text, said)
        mark = self._added.search(text, said, later.start() if later else len(text))
        if mark is None or self._ids[mark.group().strip()] not in self.ends:
            raise MaeseError("TEMPLATE-03", template=self.name, fits=self._fits)
        learnt = not GENERATION.search(self.jinja) or any(a <= said <= b for a, b in spans)
        return start, mark.end(), i if learnt else CONTEXT - 1 - i

    def _start(self, earlier: tuple[Message, ...], text: str, place: int) -> int:
        """Where an answer begins: there the prompt ends, which must be how the whole conversation begins."""
        if not earlier:
            return max(place, 0)
        before = self._render(earlier, True)[0]
        if not text.startswith(before):
            raise self._fault("unstable")
        silent = before == self._render(earlier, False)[0]
        if silent and self._added.search(text, len(before), max(place, len(before))):
            raise self._fault("cue")
        return len(before)

    def _cut(self, text: str, answers: list[tuple[int, int, int]]) -> list[Piece]:
        """Marks become tokens and the rest is cut where an answer begins and ends."""

        def turn(at: int) -> int:
            return next((i for start, stop, i in answers if start <= at < stop), CONTEXT)

        edges = {edge for start, stop, _ in answers for edge in (start, stop)}
        pieces: list[Piece] = []
        done = 0
        for mark in [*self._added.finditer(text), None]:
            stop = mark.start() if mark else len(text)
            cuts = [done, *sorted(edge for edge in edges if done < edge < stop), stop]
            pieces += [Piece(text[a:b], turn(a)) for a, b in pairwise(cuts) if a < b]
            if mark:
                pieces.append(Piece(self._ids[mark.group().strip()], turn(stop)))
                done = mark.end()
        return pieces


class Bounded:
    """Within it, a template runs at most so many lines, then EndlessError; and, where the system can hold it to that,
    takes at most ROOM bytes more than there were, then MemoryError. Other code is not slowed down."""

    def __init__(self, steps: int) -> None:
        self.left, self.until = steps, time.monotonic() + SECONDS

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        self._limits = _hold_memory(ROOM)
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        if self._limits:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, self._limits)

    def _trace(self, frame: FrameType, event: str, value: object) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        self.left -= 1
        if self.left < 0 or time.monotonic() > self.until:
            raise EndlessError
        return self._trace


def _hold_memory(room: int) -> tuple[int, int] | None:
    """Let this process grow by `room` bytes at most; returns the limits there were, or None where it cannot be done."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + room
        if limits[0] == resource.RLIM_INFINITY or wanted < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
            return limits
    except (ImportError, OSError, ValueError):
        pass
    return None


def _pattern(token: Any) -> str:
    """An added token as a pattern; some of them swallow the white space beside them."""
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


def jinja_of(written: Written) -> str:
    """A built-in template in Jinja, for a saved tokenizer: `apply_chat_template` then gives the ids of the renderer.

    Answers are between generation marks, so that other tools learn the same tokens.
    """

    def around(key: str, content: str) -> str:
        before, after = (json.dumps(part, ensure_ascii=False) for part in written.written(key).split("{}"))
        return "{{- " + f"{before} + {content} + {after}" + " }}"

    def alone(key: str) -> str:
        text = written.written(key)
        return "{{- " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    trimmed = json.dumps(list(written.row.trim))
    content = f'(message["content"] | trim if message["role"] in {trimmed} else message["content"])'
    waiting = "{%- if ns.said %}" + around("user", "ns.said[:-2]") + '{%- set ns.said = "" %}{%- endif %}'
    between = "{%- if not loop.first %}" + alone("between") + "{%- endif %}" if alone("between") else ""
    folded = written.row.system is None
    system = '{%- set ns.said = ns.said + content + "\\n\\n" %}' if folded else between + around("system", "content")
    question = between + around("user", "ns.said + content") + '{%- set ns.said = "" %}'
    end = json.dumps(written.written("end"), ensure_ascii=False)
    answer = around("answer", "content")[: -len(" }}")] + f" + {end}" + " }}"
    return (
        "{%- set ns = namespace(said=\"\") %}" + alone("start") + "{%- for message in messages %}"
        "{%- set content = " + content + " %}"
        "{%- if message[\"role\"] == \"system\" %}" + system +
        "{%- elif message[\"role\"] == \"assistant\" %}" + waiting + alone("cue") +
        "{%- generation %}" + answer + "{%- endgeneration %}" + alone("after") +
        "{%- else %}" + question + "{%- endif %}{%- endfor %}" + waiting +
        "{%- if add_generation_prompt %}" + alone("cue") + "{%- endif %}"
    )  # fmt: skip
