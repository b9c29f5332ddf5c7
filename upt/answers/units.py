r"""Units behind a number: which words are dropped there.

A unit is dropped where it can be nothing else. Single letters can be more (5m is five times m, AB = 2h, 6s^2), and so
can a few pairs of letters (2mg is two times m times g): they are units only where they are set upright, as in
`5\text{ m}`, or, the pairs, behind a blank, as in `5 mg`. latex.py marks those as `\unitm` and `\unitmg`. Case counts
in short units: 3CM is three times the segment CM.
"""

import re

LETTERS = "mgshLlNJWVACKTF"  # units of one letter, where they are set upright
PAIRS = ("mg", "ms", "mi", "yd", "lb", "hr")  # units of two letters that are products without a blank before them

_SHORT = "mm|cm|dm|km|kg|m[lL]|ft|in|oz|lbs|hrs|mins?|secs?|rad|deg|mol|mph|km?ph|kmh|[kM]?Hz|k?Pa|kN|kJ|k[WV]|kWh"
_WORDS = (
    r"(?i:percent|degrees?|radians?|units?|(?:centi|milli|deci|kilo)?met(?:er|re)s?|inch(?:es)?|foot|feet|yards?|miles?"
    r"|(?:milli|kilo)?grams?|pounds?|ounces?|ton(?:ne)?s?|(?:milli)?lit(?:er|re)s?|gallons?|seconds?|minutes?|hours?"
    r"|days?|weeks?|months?|years?|newtons?|joules?|watts?|volts?|amps?|ohms?|dollars?|usd|rmb|cents?|euros?|yuan|yen"
    r"|people|students|ways|times|pieces|sides)"
)
_CJK = (
    "(?:平方|立方)?(?:毫米|厘米|分米|千米|米)|平方公里|公里|里|毫升|升|千克|公斤|克|吨|度|元钱?|块钱?|角|分钟?|秒钟?|小时"
    "|千米/时|牛顿?|伏特?|安培?|欧姆?|焦耳?|瓦特?|帕|赫兹?|摄氏度"
    "|时|天|周|个月|年|岁|个|人|名|只|条|件|张|本|支|块|次|种|倍"
    "|棵|辆|台|颗|朵|页|票|户|座|双|个?单位|平方单位|円|個|枚|원|개"
)
_UNIT = (
    rf"(?:(?i:square|sq|cubic|cu) ?)?(?:\\unit[A-Za-z]+|\\Omega|%|\"|°(?: [CF])?|{_SHORT}|{_WORDS}|{_CJK})"
    r"(?: \^ (?:- )?[1-4])?(?: (?i:squared|cubed))?"
)
# Beside a unit, a letter is one too: km/h, g/cm^3.
_UNITS = re.compile(rf"(?:[gmLN] / )?{_UNIT}(?: (?:(?:/|\*|per) )?(?:{_UNIT}|(?<=/ )(?:[hsL]|hr)(?: \^ [1-4])?))*")
_WITH_LETTERS = re.compile(_UNITS.pattern.replace(r"\\unit[A-Za-z]+", rf"\\unit[A-Za-z]+|[{LETTERS}]"))
_NAMED = re.compile(f"{_SHORT}|{_WORDS}|(?i:square|sq|cubic|cu)")
_SHORTENED = {
    "millimeter": "mm", "centimeter": "cm", "kilometer": "km", "meter": "m", "milligram": "mg", "kilogram": "kg",
    "gram": "g", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h",
}  # fmt: skip
_MEASURE = re.compile(r"(?:mm|cm|dm|m|km|mg|g|kg|s|min|h|day|week|month|year)(?:\^[23])?")
MAX_TOKENS = 20  # a longer tail is no unit


def is_unit(token: str) -> bool:
    """Whether a word can be nothing but a unit, whatever stands around it."""
    return _NAMED.fullmatch(token) is not None


def are_units(tokens: list[str], letters: bool = False) -> bool:
    """Whether tokens behind a number are units of measure and nothing else; `letters`: single letters count too.

    Grouping does not matter, `12 (cm)` and `cm^{2}`, but every bracket must close.
    """
    if len(tokens) > MAX_TOKENS or tokens.count("(") != tokens.count(")"):
        return not tokens
    tail = " ".join(token for token in tokens if token not in "{}().")
    return not tail or (_WITH_LETTERS if letters else _UNITS).fullmatch(tail) is not None


def measure(unit: str) -> str:
    """A unit of length, area, volume, mass or time in its short form, '' for any other text."""
    text = re.sub(r"[ {}().]|\\unit", "", unit.lower()).removesuffix("s") or unit
    for long, short in [("metre", "meter"), *_SHORTENED.items()]:
        text = text.replace(long, short)
    text = re.sub(r"^(?:square|sq)(.*)", r"\1^2", re.sub(r"^(?:cubic|cu)(.*)", r"\1^3", text))
    return text if _MEASURE.fullmatch(text) else ""
