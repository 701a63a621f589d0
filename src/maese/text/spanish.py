"""Marks that a Spanish text was translated by a machine, or only in part: where each one is.

    opening_mark("Funciona bien! ¿Y ahora?")             13, the «!» that nothing opened
    english_passage("return b Hey, I need your help.")    9, where the English begins
    mixed_address(["Dime qué ves.", "¿Puede usted decirme más?", "¿Qué crees tú?"])    the «tú» after the «usted»

Code is looked past: what stands between backticks, comments and quoted strings may be in any language.
"""

from __future__ import annotations

import re

# Blanked with as many spaces, so that places stay what they were.
NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|www\.\S+|</?[a-zA-Z][^<>\n]*>"
    r"|(?:^|(?<=[\s({\[;]))(?:#|//|--) [^\n]*|/\*.*?\*/|\{\{.*?\}\}",
    re.DOTALL | re.MULTILINE,
)
CODE_LINE = re.compile(
    r"^[ \t]*(?:\d+[.:)]?[ \t]+)?(?:def |class |return\b|import |from \w+ import|for\b.*:|while\b.*:|"
    r"if\b.*:|elif |else:|print\(|[\w.\[\]]+ ?[-+*/]?= ?\S|[\w.]+\(.*\)|[}{;$<>#]|.*[;{}]\s*$).*$",
    re.MULTILINE,
)
QUOTED = re.compile(r"\"[^\"\n]*\"|(?<!\w)'[^'\n]*'(?!\w)")

# Words that only English has; those that code is written in (for, in, is, not, and, if, with, as) do not count.
ENGLISH = re.compile(
    r"\b(?:(?P<sure>I'm|I've|I'll|I'd|it's|don't|doesn't|didn't|isn't|aren't|wasn't|won't|can't|couldn't|you're|let's|"
    r"that's|what's|there's)|(?P<plain>I|you|your|my|we|our|they|their|he|she|his|her|was|were|are|am|have|had|does|did|"
    r"can|could|would|should|will|what|why|how|who|where|which|it|this|that|these|those|because|there|some|any|very|"
    r"hello|hi|hey|help|need|want|please|thanks|thank|only|just|when|about|been|being|then|than|nothing|something|wrote|"
    r"really|stuck|working|issue|with my)"
    r"|(?P<weak>the|of|to|an|on|at|by|but|be|its)|(?P<spanish>el|la|los|las|un|una|unos|unas|de|del|que|qué|en|y|se|es|por|"
    r"para|con|su|sus|lo|le|les|al|como|cómo|pero|muy|mi|mis|tu|tus|está|este|esta|esto|son|porque|cuando|si|sí|más|ya))"
    r"(?![\w'’])",
    re.IGNORECASE,
)
ENOUGH = 3.0  # points that make a passage: «Help, I'm stuck» has them, «The Lord of the Rings» does not
GATE = re.compile(r"(?i)\b(?:the|you|I|it's|my|this|what|help|are|how|that|don't|can|stuck|there)\b")
WEIGHT = {"sure": 2.0, "plain": 1.0, "weak": 0.5}
# Whoever asks for another language gets it.
ABOUT_LANGUAGES = re.compile(
    r"(?i)traduc|traduz|tradúz|ingl[eé]s|english|translat|franc[eé]s|alem[aá]n|italian|portugu[eé]s|"
    r"idioma|se dice en |al español|castellano|lat[ií]n|catal[aá]n|gallego|euskera|vasco|japon[eé]s|chino\b|ruso\b"
)

ENDS = re.compile(r"(?P<open>[¿¡])|(?<=[\w»)\"”’'`%])[?!]+(?=[\s»\"”’')\]—]|$)")
TU = re.compile(
    r"(?i)\b(?:tú|tus?|contigo|puedes|podrías|tienes|crees|quieres|debes|deberías|sabes|eres|estás|ves|piensas|necesitas)\b"
)
USTED = re.compile(
    r"\b[Uu]sted\b|¿(?:Puede|Podría) (?!haber|ser)\w+[aei]r(?:me|nos|lo|la)?\b|¿(?:Cree|Ha) (?:que|\w+[ai]do)\b"
    r"|\b(?i:(?:hága|díga|permíta|déje|muéstre|explíque)(?:me|nos)|inténtelo|ayudarle)\b"
)


def prose(text: str) -> str:
    """The text with code, links and tags blanked, as long as it was: `prose("usa `a!`.")` is `"usa     ."`."""
    if not re.search(r"[`<{=/#*]|--", text):
        return text
    return NOT_PROSE.sub(_blank, text)


def _blank(m: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", m.group())


def opening_mark(text: str) -> int | None:
    """The place of the first `?` or `!` that closes what no `¿` or `¡` opened, or None."""
    if "?" not in text and "!" not in text:
        return None
    opened, clear = False, prose(text)
    for m in ENDS.finditer(clear):
        if m["open"]:
            opened = True
        elif opened:
            opened = False
        elif _said(clear, m.start()):
            return m.start()
    return None


def _said(text: str, place: int) -> bool:
    """Whether what stands there is neither in a line of code nor between quotes."""
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    line = text[start : end if end >= 0 else len(text)]
    return not CODE_LINE.match(line) and QUOTED.sub(_blank, line)[place - start] != " "


def english_passage(text: str) -> int | None:
    """Where a passage in English begins inside a text, or None. Identifiers and comments of code are no passage."""
    if not GATE.search(text):
        return None
    clear, done = prose(text.replace("’", "'")), 0
    for hit in GATE.finditer(clear):
        if hit.start() < done:
            continue
        # A whole line, because code is told by its beginning, and a little more, because a passage may go on.
        start = max(done, clear.rfind("\n", 0, hit.start()) + 1)
        end = clear.find("\n", hit.end() + 200)
        done = end if end >= 0 else len(clear)
        place = _passage(CODE_LINE.sub(lambda m: QUOTED.sub(_blank, m.group()), clear[start:done]))
        if place is not None:
            return start + place
    return None


def _passage(text: str) -> int | None:
    points, start = 0.0, 0
    for m in ENGLISH.finditer(text):
        kind = m.lastgroup or "spanish"
        if kind == "spanish":
            points = 0.0
        # `i` and `help(x)` are code; «I» alone is a person, or a chapter.
        elif m.group() != "i" and text[m.end() : m.end() + 1] not in ("(", "_", "="):
            start = start if points else m.start()
            points += WEIGHT[kind]
            if points >= ENOUGH:
                return start
    return None


def mixed_address(turns: list[str]) -> tuple[int, int] | None:
    """The turn and the place where whoever said «usted» says «tú», or the other way round; None if they keep to one."""
    first: str | None = None
    for number, turn in enumerate(turns):
        clear = prose(turn)
        tu, usted = TU.search(clear), USTED.search(clear)
        for name, found in (("tú", tu), ("usted", usted)):
            if found and first not in (None, name):
                return number, found.start()
        if tu or usted:
            first = "tú" if tu else "usted"
    return None
