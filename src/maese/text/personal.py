"""Personal data inside a text: where an e-mail address, a telephone or a number of identity stands.

    find("Escribe a ana.gil@correo.es o llama al 91 234 56 78")    [("email", 10, 28), ("phone", 41, 53)]

Whatever carries a check digit is checked (DNI, NIE, CURP, RUT, card, IBAN), and a telephone needs a `+`, its usual
grouping or the word before it: a false alarm on every price teaches people to ignore the true ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Span = tuple[str, int, int]
Finder = Callable[[str], Iterator[tuple[int, int]]]

# Almost every text has neither of these, and is not looked at again.
WORTH_A_LOOK = re.compile(r"@|\d(?:[ .()-]{0,2}\d){6}|[A-Z]\d{6}[HMX]")

EMAIL = re.compile(
    r"(?<![\w.+%/-])[A-Za-z0-9](?:[\w.+%-]{0,63})@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-]|\.\w)"
)
# Reserved for examples (RFC 2606), or what their Spanish cousins are called; an icon@2x.png is no address either.
NOBODY = re.compile(
    r"(?i)^(?:git|usuario|user|username|tu|nombre|name|correo|email|e-mail|foo|bar)@|"
    r"@(?:[\w.-]*\.)?(?:example|ejemplo|dominio|domain|test|localhost|foo|bar|empresa|company)\.|"
    r"\.(?:png|jpe?g|svg|gif|webp|js|css|py|php|test|example|invalid|local|localhost)$"
)
EDGE, STOP = r"(?<![\w.,+/=-])", r"(?![\w/=-]|[.,:]\d)"
DNI = re.compile(rf"{EDGE}(\d{{8}}|\d{{1,2}}\.\d{{3}}\.\d{{3}})[ -]?([A-Z]){STOP}")
NIE = re.compile(rf"{EDGE}([XYZ])[ -]?(\d{{7}})[ -]?([A-Z]){STOP}")
CURP = re.compile(
    r"(?<!\w)[A-Z][AEIOUX][A-Z]{2}\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[HMX][A-Z]{5}[0-9A-Z]\d(?!\w)"
)
RUT = re.compile(rf"{EDGE}(\d{{1,2}}\.\d{{3}}\.\d{{3}}|\d{{7,8}})-([\dkK]){STOP}")
CARD = re.compile(
    rf"{EDGE}(?:\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?"
    rf"|3\d{{3}}([ -])\d{{6}}\2\d{{5}}|\d{{13,19}}){STOP}"
)
ISSUERS = re.compile(r"4|5[0-8]|6[0-9]|2[2-7]|3[04-9]")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
LENGTHS = "ES24 AD24 BR29 CR22 DE22 DO28 FR27 GB22 GT28 IT27 PT25 SV28"
IBAN_LENGTH = {each[:2]: int(each[2:]) for each in LENGTHS.split()}
DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])$")

SAYS_PHONE = re.compile(
    r"(?i)\b(?:tel(?:[ée]f(?:onos?)?|fs?)?|tlfno?|tfno|m[óo]vil|cel(?:ular)?|fax|whats?app|ll[áa]m[ae]\w*|phone|mobile)"
    r"\b[^\d\n]{0,24}$"
)
PHONE_ABROAD = re.compile(rf"{EDGE}(?:\+[1-9]\d{{0,2}}|00(?:34|5\d{{1,2}}) )(?:[ .-]?\(?\d{{1,4}}\)?){{2,6}}{STOP}")
# Groupings that hardly anything else has: 91 234 56 78, 612 34 56 78, (55) 1234-5678, 555-123-4567.
PHONE_AT_HOME = re.compile(
    rf"{EDGE}(?:[89]\d[ -]\d{{3}}[ -]\d{{2}}[ -]\d{{2}}|[6-9]\d{{2}}[ -]\d{{2}}[ -]\d{{2}}[ -]\d{{2}}"
    rf"|\(0?\d{{2,4}}\) ?\d{{3,4}}[ -]\d{{4}}|[2-9]\d{{2}}-\d{{3}}-\d{{4}}){STOP}"
)
# Groupings that prices and years share: only right after a word that says what they are.
PHONE_NAMED = re.compile(
    rf"{EDGE}(?:[6-9]\d{{2}}[ .-]?\d{{3}}[ .-]?\d{{3}}|\d{{2,3}}[ -]\d{{3,4}}[ -]\d{{4}}"
    rf"|9[ ]\d{{4}}[ -]\d{{4}}|\d{{10}}){STOP}"
)


def find(text: str) -> list[Span]:
    """Kind, start and end of each, in order: email, phone, dni, nie, curp, rut, card, iban."""
    if not WORTH_A_LOOK.search(text):
        return []
    found: list[Span] = []
    for kind, spans in FINDERS:
        for start, end in spans(text):
            if all(end <= other or start >= stop for _, other, stop in found):
                found.append((kind, start, end))
    return sorted(found, key=lambda span: span[1])


def hidden(text: str) -> str:
    """The text with what was found covered but for its first two characters: reports are passed around."""
    for _, start, end in reversed(find(text)):
        text = text[: start + 2] + "•" * (end - start - 2) + text[end:]
    return text


def _matches(pattern: re.Pattern[str], fits: Callable[[re.Match[str]], bool]) -> Finder:
    return lambda text: (m.span() for m in pattern.finditer(text) if fits(m))


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _email(m: re.Match[str]) -> bool:
    return not NOBODY.search(m.group())


def _dni(m: re.Match[str]) -> bool:
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(_digits(m.group(1))) % 23] == m.group(2)


def _nie(m: re.Match[str]) -> bool:
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(f"{'XYZ'.index(m.group(1))}{m.group(2)}") % 23] == m.group(3)


def _curp(m: re.Match[str]) -> bool:
    values = ["0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ".index(c) for c in m.group()]
    total = sum((18 - i) * value for i, value in enumerate(values[:17]))
    return values[17] == -total % 10


def _rut(m: re.Match[str]) -> bool:
    number = _digits(m.group(1))
    if DATE.match(number) or len(set(number)) == 1:
        return False
    total = sum(int(digit) * (2 + i % 6) for i, digit in enumerate(reversed(number)))
    return "0123456789K"[-total % 11] == m.group(2).upper()


def _card(m: re.Match[str]) -> bool:
    number = _digits(m.group())
    if not ISSUERS.match(number) or len(set(number)) == 1:
        return False
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(number))]
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for m in IBAN.finditer(text):
        # A word in capitals right after would be taken for one more group: the country says where to stop.
        length, end = IBAN_LENGTH.get(m.group()[:2], 0), m.end()
        if length:
            places = [i for i in range(*m.span()) if text[i] != " "]
            if len(places) < length:
                continue
            end = places[length - 1] + 1
        number = text[m.start() : end].replace(" ", "")
        if int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1:
            yield m.start(), end


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for m in PHONE_ABROAD.finditer(text):
        if 9 <= len(_digits(m.group()).lstrip("0")) <= 15:
            yield m.span()
    for m in PHONE_AT_HOME.finditer(text):
        yield m.span()
    for m in PHONE_NAMED.finditer(text):
        if len(_digits(m.group())) >= 9 and SAYS_PHONE.search(text[max(0, m.start() - 40) : m.start()]):
            yield m.span()


# The strictest first: the digits of an IBAN hold telephones.
FINDERS: tuple[tuple[str, Finder], ...] = (
    ("email", _matches(EMAIL, _email)),
    ("iban", _ibans),
    ("card", _matches(CARD, _card)),
    ("curp", _matches(CURP, _curp)),
    ("dni", _matches(DNI, _dni)),
    ("nie", _matches(NIE, _nie)),
    ("rut", _matches(RUT, _rut)),
    ("phone", _phones),
)
