"""A text to the language it is written in, offline: `language_of("The cat sat on the mat again")` is "en".

Nearly every Spanish text is known by its commonest words, in microseconds, and never reaches the detector (lingua).
When in doubt the answer is None: of a name, an order of the terminal or three words nobody can tell.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from maese.errors import MaeseError

FEWEST_LETTERS = 20
LOOKED_AT = 3000  # letters at the start, the middle and the end of a long text
DOUBT = 0.1  # a text is foreign when Spanish is ten times less likely, and its commonest words are foreign too
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Lines that are code without marks around them, and words that are paths, addresses, options or names of things.
CODE_LINE = re.compile(
    r"^\s*(?:[#$>%]|//|/\*|\*|<[\w/!?]|(?:def|class|import|from|return|const|let|var|function|public|private|static"
    r"|print|echo|sudo|SELECT|INSERT|UPDATE|DELETE|CREATE)\b)|[{};]\s*$|\w\(.*\)|\s[=!<>+]=?\s|->|=>"
)
CODE_WORD = re.compile(r"\S*[_/\\@={}<>\[\]|$~^*+#&]\S*|--?\w\S*|\S*\w[.:]\w\S*|\S*\d\S*")
LETTERS = re.compile(r"[^\W\d_]+")
# Words that only Spanish has among its neighbours, and those that it shares with one of them.
ONLY_SPANISH = (
    "y los las muy más pero también hay cuando qué cómo cuál fue sin hasta ya su sus esto ese yo él usted tiene puede"
    " hace según quien hacia otra otro siempre después había hemos pues á ó estos estas cuyo aunque mientras sino donde"
    " aquí así eres estoy tengo quiero mucho mucha"
)
SHARED_SPANISH = (
    "el del una porque está estaba son ser era le les lo al como para por con este esta esa eso tú ella si no se que de"
    " en la un es mi me te cada todo toda todos dos nada algo nunca antes ni e u ha han he é mas cual nos entre sobre"
    " desde soy bien"
)
ONLY, SPANISH = frozenset(ONLY_SPANISH.split()), frozenset(f"{ONLY_SPANISH} {SHARED_SPANISH}".split())
# Letters and elisions that Spanish does not write.
FOREIGN_MARK = re.compile(r"[àèìòùâêîôûãõçëï]|\b[dls]['’][aeiouh]", re.IGNORECASE)
OPENING = re.compile("[ñÑ¿¡]")
# Words of other languages that Spanish does not have; those it shares («no», «para», «con») speak for neither.
FOREIGN = {
    "en": "the of and to is that for with you are was this on it be as have not or from by at we they he she his her"
    " i my your what which will can do does don't were an but if there their how when all would",
    "pt": "não em um uma os as dos das ao do da é você com mais são seu sua ele isso foi à pelo pela também nos às"
    " eu muito quando na",
    "fr": "le des et est une dans pour qui du au avec sur pas ce il je vous nous sont aux elle cette mais ou ne à",
    "it": "il di che è per della sono non gli nel anche ha più dei alla questo una delle ho mi si con",
    "ca": "i amb és els dels per aquest aquesta són hi ha també més però seva seu les què",
    "de": "der die und das ist nicht ein zu den mit von auf für eine im sich dem ich sie wir es",
    "nl": "de het een en van niet ik is dat met voor zijn op aan ook maar",
    "eu": "eta da ez bat du dira zen izan baina",
    "la": "et est non ad cum sed qui quod ut ab sunt ex",
}
OWN = {code: frozenset(said.split()) for code, said in FOREIGN.items()}
RARE_SPANISH = {"os", "da", "das", "di", "pelo", "sed", "sur", "van", "ex"}
ANY_FOREIGN = frozenset().union(*OWN.values()) - SPANISH - RARE_SPANISH
OTHER_SCRIPTS = ("ru", "zh", "ja", "ar")  # known by their letters


def language_of(text: str) -> str | None:
    """The two letters of a language (ISO 639-1), or None when the text is too short, is code or cannot be told.

    Error: DEP-01 (lingua is not installed), only for texts that are not plainly Spanish.
    """
    if len(text) > 3 * LOOKED_AT:
        middle = len(text) // 2
        text = "\n".join((text[:LOOKED_AT], text[middle : middle + LOOKED_AT], text[-LOOKED_AT:]))
    if len(text) < FEWEST_LETTERS:
        return None
    if _plainly_spanish(text):
        return "es" if sum(map(str.isalpha, text)) >= FEWEST_LETTERS else None
    prose = "\n".join(line for line in CODE.sub(" ", text).split("\n") if not CODE_LINE.search(line))
    prose = CODE_WORD.sub(" ", prose)
    if sum(map(str.isalpha, prose)) < FEWEST_LETTERS:
        return None
    return "es" if _plainly_spanish(prose) else _detected(prose)


def _plainly_spanish(text: str) -> bool:
    said = LETTERS.findall(text.lower())
    ours = sum(map(SPANISH.__contains__, said))
    theirs = sum(map(ANY_FOREIGN.__contains__, said)) + len(FOREIGN_MARK.findall(text))
    # Two fifths of running Spanish are words of the list, and a third of English is words of the other.
    if ours < 2 or ours * 6 < len(said) or ours < 4 * theirs:
        return False
    return not theirs or any(map(ONLY.__contains__, said)) or bool(OPENING.search(text))


def _detected(prose: str) -> str | None:
    """What the detector says, if it is sure and the words bear it out."""
    values = _detector().compute_language_confidence_values(prose)
    sure = {each.language.iso_code_639_1.name.lower(): each.value for each in values}
    code = next(iter(sure))
    if code == "es":
        return code
    if sure["es"] > DOUBT * sure[code]:
        return None
    if code in OTHER_SCRIPTS:
        return code
    said = LETTERS.findall(prose.lower())
    return code if sum(map(OWN[code].__contains__, said)) * 12 >= len(said) else None


def forget() -> None:
    """Let go of what the detector has read, some two hundred mebibytes; asked again, it reads it again."""
    if _detector.cache_info().currsize:
        _detector().unload_language_models()
        _detector.cache_clear()


@functools.cache
def _detector() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        raise MaeseError("DEP-01", package="lingua-language-detector", extra="data") from None
    import lingua

    codes = ["es", *FOREIGN, *OTHER_SCRIPTS]
    chosen = [one for one in lingua.Language.all() if one.iso_code_639_1.name.lower() in codes]
    return LanguageDetectorBuilder.from_languages(*chosen).build()
