"""How a number is written, and what it is worth: one grammar for labels and completions.

A label is a number and nothing else (`read_number`); in a completion text may follow the number or
stand before it (`first_number`). Values are exact fractions. Read are

    72   +4   -5   − 5   0018   18.   .5   minus 5     sign: - + U+2212, dashes, the word
    1,234,567.50   12,34,567   1_000                   commas between groups of digits
    1e3   2.0107e-06                                   exponents of up to four digits
    1/2   -2 1/2                                       fractions, mixed ones too
    $5   -$5   $-5   -5 €   US$5   USD 5               a currency on either side
    ($5)   (1,234.50)                                  accounting: brackets around it mean minus

Whatever would change the value of what stands before it makes the whole number unreadable instead
of another number (`_CONTINUES`, `_BEGUN`): a comma that groups no thousands (`3,5`, `1.234,50`), a
space that does (`1 234`), powers (`10^6`), ranges and differences, ratios and times (`5-7`,
`10 - 7`, `1:30`), a sign at the wrong place (`5-`, `--5`), a hyphen (`COVID-19`), a comma after 0
(`0,125`), number words (`5 million`, `five (5)`), `½`, a function's brackets (`f(5)`). A sum or
product is several numbers: of `10 + 8 = 18` the first counts. A per cent sign is a unit like
`dollars`: a completion `50%` is 50, and a label `50%` is not plain.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

TOLERANCE = Fraction(1, 10**6)
"""Two numbers are equal only if they are closer than this (docs/method.md, section 5)."""
RELATIVE_TOLERANCE = Fraction(1, 10**5)
"""And closer than this share of the label: six digits of it have to be right, also near 0."""

PLAINER = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-"}
"""To ASCII: full-width characters, as Asian input methods write them, and the minus sign."""

_SPACE = r"[^\S\r\n]"
_DASH = "[-\u2010\u2011\u2012\u2013\ufe63]"
_SYMBOLS = "$£¤¥฿\u20a0-\u20cf"
_SIGN = rf"(?:\+|{_DASH}|\b(?i:minus|negative)(?=[{_SYMBOLS}\d]|{_SPACE}))"
_CURRENCY = rf"(?:\b[A-Z]{{1,3}}[{_SYMBOLS}]|[{_SYMBOLS}]|\b[A-Z]{{3}}\b)"
_DIGITS = r"\d+(?:_\d+)*"
_WHOLE = rf"(?:(?!0)\d{{1,3}}(?:,\d{{3}})+|(?!0)\d{{1,2}}(?:,\d{{2}})+,\d{{3}}|{_DIGITS})"
_FRACTION = rf"(?:{_WHOLE}{_SPACE}+)?{_WHOLE}/{_WHOLE}"
_DECIMAL = rf"(?:{_WHOLE}(?:\.(?:{_DIGITS})?)?|(?<![a-zA-Z])\.{_DIGITS})(?:[eE][-+]?\d{{1,4}})?"
_MAGNITUDE = rf"(?:{_FRACTION}|{_DECIMAL})"

_NUMBER = re.compile(
    rf"(?:{_CURRENCY}{_SPACE}?)?\({_SPACE}?(?:{_CURRENCY}{_SPACE}?)?(?P<bracketed>{_MAGNITUDE})"
    rf"(?:{_SPACE}?{_CURRENCY})?{_SPACE}?\)"
    rf"|(?P<sign>{_SIGN})?{_SPACE}?(?:{_CURRENCY}{_SPACE}?)?(?P<inner_sign>{_SIGN})?{_SPACE}?"
    rf"(?P<magnitude>{_MAGNITUDE})(?:{_SPACE}?{_CURRENCY})?"
)
_CONTINUES = re.compile(
    r"\d|[^\s\da-zA-Z)+*=][^\s\da-zA-Z]{0,2}\d"  # 1,2345   3,5   5-7   1:30   10^{6}   1}{2
    rf"|\\?{_SPACE}\d{{3}}(?!\d)"  # 1 234
    rf"|{_SPACE}*[-/÷×·\u2013\u2219\u22c5xX]{_SPACE}*\d"  # 10 - 7   1 / 2   1.5 x 10^6
    rf"|{_SPACE}*\*{_SPACE}*10{_SPACE}?(?:[\^⁰¹²³⁴-⁻]|\*\*)|\*\*\d"  # 1.5 * 10^6   10**6
    rf"|\s?\^|[a-zA-Z]\d|{_SPACE}?[eE](?:\+|{_DASH})?\d|[dD][-+]\d|#[A-Z]"
    # 10^n   0x10   1.5 e3   1.5D+03   1.#INF
    r"|π|\s?\\(?:pi|sqrt|frac|times|cdot)"  # 2π
    rf"|{_DASH}(?=\s|$)"  # 5-
    rf"|{_SPACE}?(?i:hundred|thousand|million|billion|trillion|dozen|lakh|lacs?\b|crore)"
    rf"|{_SPACE}?(?:[kKMB]|bn|mn|tn)(?![a-zA-Z&])"  # 5M   5 k, but 5 M&Ms
    rf"|{_SPACE}(?:and|&){_SPACE}(?:(?:(?:an?|one|two|three){_SPACE})?(?:half|third|quarter)|\d+/\d)"
    rf"|{_SPACE}?\\?%{_SPACE}?\)"  # (5%)
)
_BEGUN = re.compile(
    r"[,;]\Z"  # ,5   &minus;5
    r"|(?:[√^±.\u02d7\u2014\u2015\u207b\u208b\u2796]|\\d?frac\{?|\\sqrt\{?"  # √2   ±5   —5
    r"|[a-zA-Z]/"  # #DIV/0!
    rf"|{_DASH}{_SPACE}?(?:\\[a-z]+\{{|[^\w\s]{{1,3}})?"  # -(5)   -**5**   -\boxed{{5}}
    rf"|(?:^|\s){_DASH}[a-zA-Z]{{1,4}}\.?){_SPACE}?\Z"  # -Rs. 5
)
_SPELLED = re.compile(  # five (5)
    r"(?i:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|teen|ty|hundred"
    r"|thousand|million)\s?\Z"
)


class Number(NamedTuple):
    """A number in a text: as it is written, without its commas, and its value."""

    text: str
    value: Fraction


def read_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else; None for any other text."""
    if len(text) < 20 and text.isascii() and text.isdecimal():  # nearly all, 20 times as fast
        return Fraction(int(text))
    text = text.translate(PLAINER).strip()
    match = _NUMBER.fullmatch(text)
    return None if match is None else _value(match)


def first_number(text: str) -> Number | None:
    """The first number of a text; None where it has none or the first one cannot be read."""
    text = text.translate(PLAINER)
    match = _NUMBER.search(text)
    return None if match is None else _number_in(text, match)


def only_number(text: str) -> Number | None:
    """The number of a text with words around it; None where it has none, several or an unreadable
    one."""
    text = text.translate(PLAINER)
    matches = list(_NUMBER.finditer(text))
    return _number_in(text, matches[0]) if len(matches) == 1 else None


def equal(label: Fraction, given: Fraction) -> bool:
    """Whether an answer is the label's number: within both tolerances, so that only 0 equals 0."""
    difference = abs(label - given)
    return difference == 0 or (
        difference < TOLERANCE and difference < RELATIVE_TOLERANCE * abs(label)
    )


def _number_in(text: str, match: re.Match[str]) -> Number | None:
    """The number of a match in a text, unless what stands around it gives it another value."""
    written, after = match.group().strip(), text[match.end() :]
    before = text[: match.end() - len(written)]
    begun = _BEGUN.search(before) or (match["bracketed"] and _SPELLED.search(before))
    follower = after.partition("\n")[0].lstrip()[:1]  # 2 ½, 5万
    more = _CONTINUES.match(after) or (follower.isnumeric() and not follower.isdecimal())
    glued = (match["bracketed"] or match["sign"]) and before[-1:].isalnum()  # f(5)   x-5
    value = None if begun or more or glued else _value(match)
    return None if value is None else Number(written.replace(",", ""), value)


def _value(match: re.Match[str]) -> Fraction | None:
    """The signed value of a match; None for two signs and for x / 0."""
    magnitude = match["bracketed"] or match["magnitude"]
    *whole, last = magnitude.replace(",", "").split()
    numerator, _, denominator = last.partition("/")
    divisor = Fraction(Decimal(denominator or 1))
    if (match["sign"] and match["inner_sign"]) or not divisor:
        return None
    value = Fraction(Decimal(numerator)) / divisor + sum(Fraction(Decimal(part)) for part in whole)
    sign = match["sign"] or match["inner_sign"] or ("-" if match["bracketed"] else "+")
    return value if sign == "+" else -value
