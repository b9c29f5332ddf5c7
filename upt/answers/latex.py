"""LaTeX tokens: what an answer says, without how it is set. Layout and fonts go, shorthands are spelled out.

Model text is hostile until proven otherwise: every rule here is linear in the text's length.
"""

import re
import unicodedata

from upt.answers.units import LETTERS, PAIRS

MAX_CHARS = 2000  # a longer answer is not taken apart: its text is its key

# A table and not unicodedata.normalize on the answer: that is quadratic on runs of combining marks, and x² becomes x2.
_UNICODE = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*range(0xFF01, 0xFFE7), *range(0x1D400, 0x1D800))}
_UNICODE |= {c: None for c in (*range(9), *range(14, 32), 0x7F, 0xAD, 0x200B, 0x2060, 0xFEFF)}  # invisible
_UNICODE |= {c: None for c in range(0xD800, 0xE000)}  # lone surrogates can't be written to a shard
_UNICODE |= dict(zip(map(ord, "−–⁄∕÷×·⋅∙。、’‘′º˚【】“”„«»「」"), "--///****.,'''°°[]" + '"' * 7, strict=True))
for _i, _c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉"):
    _UNICODE[ord(_c)] = f"{'^_'[_i // 10]}{{{_i % 10}}}"
for _c, _i, _j in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True):
    _UNICODE[ord(_c)] = rf"\frac{{{_i}}}{{{_j}}}"
for _c in (
    "√sqrt πpi 𝜋pi ∠angle △triangle ∞infty ±pm ∅emptyset ≈approx ≤le ≥ge ≠ne ∪cup ∩cap ∈in ⊥perp ∥parallel ≅cong ∼sim "
    "αalpha βbeta γgamma δdelta εepsilon θtheta λlambda μmu ρrho σsigma φphi ωomega"
).split():
    _UNICODE[ord(_c[0])] = f"\\{_c[1:]} "
_ALIASES = {
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\degree": "°", r"\degrees": "°", r"\circ": "°", r"\%": "%",
    r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\simeq": r"\approx", r"\lt": "<", r"\gt": ">", "pi": r"\pi",
    r"\mid": "|", r"\vert": "|", r"\lvert": "|", r"\rvert": "|", r"\varphi": r"\phi", r"\varepsilon": r"\epsilon",
    r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and", "或": "or", "或者": "or", "和": "and", "与": "and",
    "及": "and", "且": "and",
}  # fmt: skip
_FONT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname|[mh]box|emph|underline"
    r"|f?box(?:ed)?)"
)
_LAYOUT = re.compile(
    rf"[$~`€£¥\"]|{_FONT}|\\(?:[\s,;:!>()\[\]$&]|left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad|rm|bf)?"
)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without blanks: 选项A is a word and a letter
_TOKEN = re.compile(
    r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\\[A-Za-z]+|\\[\s\S]?"
    rf"|[{_CJK}]+|(?:(?![{_CJK}])[^\W\d_])+|\S"
)
_NUMBER = re.compile(r"[0-9]|\.[0-9]")
_THOUSANDS = r"[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})+"
_UPRIGHT = r"\\(?:text(?:rm|normal)?|mathrm|mbox)\s*\{([^{}]*)\}"
_UNIT_WORD = re.compile(rf"(?<![A-Za-z\\])([{LETTERS}]|{'|'.join(PAIRS)})(?![A-Za-z])")
_COMMANDS = (
    "[dtc]?frac|sqrt|pi|text|mathrm|left|right|cdot|times|angle|circ|theta|alpha|beta|triangle|le|ge|pm|infty|overline"
)
_TWICE_ESCAPED = re.compile(rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))")
# (what a text must contain for the rule to be tried, pattern, replacement), in this order
_REWRITES = [(hint, re.compile(pattern), new) for hint, pattern, new in (
    ("\\", rf"(?<=[0-9)}}/°])(?:[\s~]|\\[,;:! ])*{_UPRIGHT}",  # 5\text{ m}
     lambda match: " " + _UNIT_WORD.sub(r" \\unit\1 ", match[1]) + " "),
    ("\\", rf"{_FONT}\s*\{{([^{{}}]*)\}}", r" \1 "),  # \text{ cm}
    ("**", r"(?<=[0-9)])\*\*(?=[0-9(-])|(?<=[A-Za-z])\*\*(?=[0-9])", "^"), ("**", r"\*\*", ""),  # a power, or bold
    ("nswer", r"(?i)^\s?(?:the )?(?:(?:final|correct) )?answer ?(?:is\b|:|=)", ""),
    ("答案", r"^\s?(?:故|所以|因此|最终|正确)*答案(?:应该)?[是为选]?\s?[:,]?", ""),
    ("about ", r"(?i)^about (?=[0-9.$\\])", ""), ("pprox", r"(?i)^approx(?:imately|\.)? ?(?=[0-9.$\\])", ""),
    ("约", r"^大?约[为是]?", ""),
    (" ", rf"(?<=[0-9)}}]) ({'|'.join(PAIRS)})(?![A-Za-z])", r" \\unit\1 "),  # 5 mg, but not 5mg
    (" m/s", r"(?<=[0-9)}]) m/s(?![A-Za-z])", r" \\unitm/\\units "),
    ("m", r"(?<=[0-9} ][cdkm]m)([23])(?![0-9.A-Za-z])", r"^{\1}"),  # cm2
    (">", r">\s?=", r" \\ge "), ("<", r"<\s?=|=\s?<", r" \\le "), ("!", r"!\s?=", r" \\ne "),
    ("^", r"\^\s?\{?\s?(?:\\circ(?![A-Za-z])|\\degrees?|°|o(?![A-Za-z]))\s?\}?", "°"),
    # 1,000 and 1{,}000 and 1\,000 -> 1000; but what fills a bracket alone is a list: (100,200)
    (",", rf"((?:[(\[]|\\\{{|^\{{){_THOUSANDS}(?:[)\]]|\\?\}}))|(?<![0-9.,]){_THOUSANDS}(?![0-9]|,[0-9])",
     lambda match: match[1] or re.sub("[^0-9]", "", match[0])),
    ("overline", r"\\overline\s?\{\s?([A-Z]'?\s?[A-Z]'?)\s?\}", r" \1 "),  # the segment AB
    ("sqrt", r"(?<![A-Za-z\\])sqrt", r"\\sqrt"), ("frac", r"\\[dtc]frac", r"\\frac"),
    ("frac", r"\\frac\s*([0-9]|(?<=\s)[A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}"),  # \frac12, \frac1{2}
    ("frac", r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),  # \frac{1}2
    ("sqrt", r"(\\sqrt(?![A-Za-z])(?:\[[^\[\]]*\])?)\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\1{\2}"),  # \sqrt12 means 12
    ("^", r"\^\s*([+-]?[0-9]+|[A-Za-z])", r"^{\1}"), ("_", r"_\s*([0-9]+|[A-Za-z])", r"_{\1}"),
    ("^", r"(\^\{[^{}]*\})\s*(?=[0-9])", r"\1*"),  # 2^{3}5^{2} is a product
    ("frac", r"(?<![0-9.}])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"(\1+\2/\3)"),  # 1\frac{1}{2}
    ("/", r"(?<![0-9.,/{])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9/]|\.[0-9])", r"(\1+\2/\3)"),  # 1 1/2
)]  # fmt: skip


def clean(answer: str) -> str:
    """The text in plain characters: LaTeX in place of symbols, nothing invisible, single blanks."""
    text = answer.replace("\frac", "\\frac")  # a \frac once printed unescaped: MATH-Vision's gold has form feeds
    return " ".join(text.translate(_UNICODE).split())


def tokenize(text: str) -> list[str]:
    """Tokens of what a cleaned answer says, without how it is set."""
    if "\\\\" in text and "\\begin" not in text:  # there, two backslashes end a row
        text = _TWICE_ESCAPED.sub(r"\\", text)
    for hint, pattern, new in _REWRITES:
        if hint in text:
            text = pattern.sub(new, text)
    tokens = [_ALIASES.get(token, token) for token in _TOKEN.findall(text) if not _LAYOUT.fullmatch(token)]
    if len(tokens) > 2 and tokens[0] == tokens[-1] == "'":
        tokens = tokens[1:-1]
    while tokens and tokens[-1] in (".", ",", ";", "*", "\\\\"):
        tokens.pop()
    return tokens


def is_number(token: str) -> bool:
    return _NUMBER.match(token) is not None


def text_key(tokens: list[str]) -> str | None:
    """The tokens as text, case-folded; None if there is none."""
    out, before = [], ""
    for token in tokens[1:] if tokens[:1] == ["+"] else tokens:
        shown = token.removeprefix(r"\unit") or token
        # Between single letters a blank means nothing (3 a b = 3ab), but it parts words, commands and numbers.
        words = shown[0].isalpha() and before[-1:].isalpha() and max(len(shown), len(before)) > 1
        out.append(" " * (words or (is_number(shown) and is_number(before))))
        out.append(shown if shown[0] == "\\" else shown.casefold())
        before = shown
    return "".join(out) or None
