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
_UNICODE |= dict(zip(map(ord, "−–—⁄∕÷×·⋅∙。、∶’‘′º˚【】"), "---///****.,:'''°°[]", strict=True))
_UNICODE |= dict.fromkeys(map(ord, "“”„«»「」"), '"')
_UNICODE |= {0x2460 + i: f"({i + 1})" for i in range(20)}  # ①
for _c, _i, _j in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True):
    _UNICODE[ord(_c)] = rf"\frac{{{_i}}}{{{_j}}}"
_UNICODE[ord("℃")] = "°C"
for _c in (
    "√sqrt πpi 𝜋pi ∠angle △triangle ≌cong ∽sim …dots ΩOmega ∞infty ±pm ∅emptyset ≈approx ≤le ≥ge ≠ne ∪cup ∩cap ∈in "
    "⊥perp ∥parallel ≅cong ∼sim →to "
    "αalpha βbeta γgamma δdelta εepsilon θtheta λlambda μmu ρrho σsigma φphi ωomega"
).split():
    _UNICODE[ord(_c[0])] = f"\\{_c[1:]} "
_ALIASES = {
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\degree": "°", r"\degrees": "°", r"\%": "%",
    r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\simeq": r"\approx", r"\lt": "<", r"\gt": ">", "pi": r"\pi",
    r"\ldots": r"\dots", r"\cdots": r"\dots", r"\mid": "|", r"\vert": "|", r"\lvert": "|", r"\rvert": "|",
    r"\varphi": r"\phi", r"\varepsilon": r"\epsilon", r"\prime": "'",
    r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and", "或": "or", "或者": "or", "和": "and", "与": "and",
    "及": "and", "且": "and",
}  # fmt: skip
_OF_VECTORS = {name: means for name, means in _ALIASES.items() if means != "*"}
_FONT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname|[mh]box|emph|underline"
    r"|f?box(?:ed)?)"
)
_LAYOUT = re.compile(
    rf"[$~`€£¥]|{_FONT}|\\(?:[\s,;:!>()\[\]$&]|left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad|rm|bf)?"
)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without blanks: 选项A is a word and a letter
_TOKEN = re.compile(
    r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\\[A-Za-z]+|\\[\s\S]?"
    rf"|[{_CJK}]+|(?:(?![{_CJK}])[^\W\d_])+|\S"
)
_NUMBER = re.compile(r"[0-9]|\.[0-9]")
_SCRIPTS = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+|[₊₋]?[₀-₉]+")
_BELOW = "₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹₊₋₀₁₂₃₄₅₆₇₈₉", "+-0123456789+-0123456789")
_THOUSANDS = re.compile(
    r"\\[()\[\]]|[(\[]|[)\]]|\\[{}]"  # brackets, but for those of formulas
    r"|(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})+(?![0-9]|,[0-9])"
)
_SPACE = r"(?:[\s~$]|\\[,;:! ])*"
_UPRIGHT = r"\\(?:text(?:rm|normal)?|mathrm|mbox)\s*\{([^{}]*)\}"
_UNIT_WORD = re.compile(rf"(?<![A-Za-z\\])([{LETTERS}]|{'|'.join(PAIRS)})(?![A-Za-z])")
_UNIT_MARK = r" \\unit\1 "
_VALUE = r"[-+.0-9$\\]"
# What a sentence may say the value of; other words may turn its sense: half of it is 5.
_NAMED = (
    "(?:(?:total|surface|shaded|maximum|minimum) )?(?:answer|result|value|area|perimeter|volume|length|width|height"
    "|radius|diameter|circumference|angle|slope|distance|sum|difference|product|quotient|mean|median|mode|average|probability"
    "|number|total|price|cost|speed|time|age|ratio)"
)
_NAMED_CJK = (
    "(?:结果|值|面积|周长|体积|长度?|宽度?|高|半径|直径|角度|斜率|距离|和|差|积|商|平均数|中位数|众数|概率|速度|时间)"
)
_COMMANDS = (
    "[dtc]?frac|sqrt|pi|text|mathrm|left|right|cdot|times|angle|circ|theta|alpha|beta|triangle|le|ge|pm|infty|overline"
)
_TWICE_ESCAPED = re.compile(rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))")
# (what a text must contain for the rule to be tried, pattern, replacement), in this order
_REWRITES = [(hint, re.compile(pattern), new) for hint, pattern, new in (
    ("~", r"(?<=[0-9°%])\s?~\s?(?=-?[0-9])", r" \\sim "),  # a range
    ("~", r"(?<![\w}{\\$°%])~(?=[A-Za-z(])", r"\\neg "),
    ("\\", rf"(?<=[0-9)}}/°])(?:[\s~]|\\[,;:! ])*{_UPRIGHT}",  # 5\text{ m}
     lambda match: f" {match[1] if '(' in match[1] else _UNIT_WORD.sub(_UNIT_MARK, match[1])} "),
    ("\\", rf"{_FONT}\s*\{{([^{{}}]*)\}}", r" \1 "),  # \text{ cm}
    ("**", r"(?<=[0-9)])\*\*(?=[0-9(-])|(?<=[A-Za-z])\*\*(?=[0-9])", "^"), ("**", r"\*\*", ""),  # a power, or bold
    ("*", r"(?<![\w*)}])\*([^*\n]+)\*(?![\w*({\\])", r" \1 "),  # italics
    ('"', r'"([^"]*)"', r" \1 "),
    ("...", r"\.{3,}", r" \\dots "),
    ("nswer", r"(?i)^\s?(?:the )?(?:(?:final|correct) )?answer ?(?:is\b ?:?|:|=)", ""),
    ("答案", r"^\s?(?:故|所以|因此|最终|正确)*答案(?:应该)?[是为选]?\s?[:,]?", ""),
    ("about ", r"(?i)^about (?=[0-9.$\\])", ""), ("pprox", r"(?i)^approx(?:imately|\.)? ?(?=[0-9.$\\])", ""),
    ("约", r"^大?约[为是]?", ""),
    (" is ", rf"(?i)^(?:the )?(?:[a-z]|it|{_NAMED}(?: of [a-z ]{{1,30}})?) is (?={_VALUE})", ""),  # the area is 24
    (":", rf"(?i)^(?:the )?{_NAMED} ?: ?(?={_VALUE})", ""), ("", rf"^{_NAMED_CJK}[为是](?={_VALUE})", ""),
    (" ", rf"(?<=[0-9)}}]) ({'|'.join(PAIRS)})(?![A-Za-z])", r" \\unit\1 "),  # 5 mg, but not 5mg
    ("m/s", r"(?<=[0-9)}])\s?m/s(?![A-Za-z])", r" \\unitm/\\units "),
    ("10", r"(?<=[0-9])\s?[xX]\s?(?=10\s?\^)", "*"),  # 3x10^8
    ("m", r"(?<=[0-9} ][cdkm]m)([23])(?![0-9.A-Za-z])", r"^{\1}"),  # cm2
    ("->", r"-+>", r" \\to "), (">", r">\s?=", r" \\ge "), ("<", r"<\s?=|=\s?<", r" \\le "), ("!=", r"\s!=", r" \\ne "),
    ("not", r"\\not\s?=", r" \\ne "), ("not", r"\\not\s?\\in(?![A-Za-z])", r" \\notin "),
    ("//", r"(?<=[A-Z])\s?//\s?(?=[A-Z])", r" \\parallel "),
    ("Delta", r"\\Delta\s?(?=[A-Z]{3})", r"\\triangle "), ("Δ", r"Δ\s?(?=[A-Z]{3})", r"\\triangle "),
    ("Δ", "Δ", r"\\Delta "),
    ("{", r"\\(angle|triangle)\s?\{\s?([A-Za-z]+)\s?\}", r"\\\1 \2 "),
    ("circ", r"(?<=[0-9}])\s?\\circ(?![A-Za-z])", "°"),
    ("^", r"\^\s?\{?\s?(?:\\circ(?![A-Za-z])|\\degrees?|°|o(?![A-Za-z]))\s?\}?", "°"),
    ("overline", r"\\overline\s?\{\s?([A-Z]'?\s?[A-Z]'?)\s?\}", r" \1 "),  # the segment AB
    ("sqrt", r"(?<![A-Za-z\\])sqrt", r"\\sqrt"), ("frac", r"\\[dtc]frac", r"\\frac"),
    ("frac", r"\\frac\s*([0-9]|(?<=\s)[A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}"),  # \frac12, \frac1{2}
    ("frac", r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),  # \frac{1}2
    ("sqrt", r"(\\sqrt(?![A-Za-z])(?:\[[^\[\]]*\])?)\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\1{\2}"),  # \sqrt12 means 12
    ("^", r"\^\s*([+-]?[0-9]+|[A-Za-z])", r"^{\1}"), ("_", r"_\s*([0-9]+|[A-Za-z])", r"_{\1}"),
    ("^", r"(\^\{[^{}]*\})\s*(?=[0-9])", r"\1*"),  # 2^{3}5^{2} is a product
    ("frac", rf"(?<![0-9.}}])([0-9]+){_SPACE}\\frac\s*\{{\s*([0-9]+)\s*\}}\s*\{{\s*([0-9]+)\s*\}}",
     r"(\1+\2/\3)"),  # 1\frac{1}{2}
    ("/", r"(?<![0-9.,/{])([0-9]+)\s+([1-9][0-9]*)/([0-9]+)(?![0-9/]|\.[0-9])", r"(\1+\2/\3)"),  # 1 1/2
)]  # fmt: skip


def clean(answer: str) -> str:
    """The text in plain characters: LaTeX in place of symbols, nothing invisible, single blanks."""
    text = answer.replace("\frac", "\\frac")  # a \frac once printed unescaped: MATH-Vision's gold has form feeds
    if not text.isascii():
        text = _SCRIPTS.sub(lambda match: f"{'_^'[match[0][-1] not in _BELOW]}{{{match[0].translate(_PLAIN)}}}", text)
    return " ".join(text.translate(_UNICODE).split())


def tokenize(text: str) -> list[str]:
    """Tokens of what a cleaned answer says, without how it is set."""
    if "\\\\" in text and "\\begin" not in text:  # there, two backslashes end a row
        text = _TWICE_ESCAPED.sub(r"\\", text)
    if "," in text:
        text = _without_thousands(text)
    for hint, pattern, new in _REWRITES:
        if hint in text:
            text = pattern.sub(new, text)
    # Of vectors there are two products.
    aliases = _OF_VECTORS if "\\vec" in text or "\\overrightarrow" in text else _ALIASES
    tokens = [aliases.get(token, token) for token in _TOKEN.findall(text) if not _LAYOUT.fullmatch(token)]
    if len(tokens) > 2 and tokens[0] == tokens[-1] == "'":
        tokens = tokens[1:-1]
    while tokens and (tokens[-1] in (".", ",", ";", "\\\\") or (tokens[-1] == "!" and _is_word(tokens[-2:-1]))):
        tokens.pop()
    if tokens and is_number(tokens[-1]):
        tokens[-1] = tokens[-1].removesuffix(".")
    return [] if {*tokens} == {r"\dots"} else tokens  # nothing said


def _without_thousands(text: str) -> str:
    """1,000 and 1{,}000 and 1\\,000 as 1000; in brackets a comma makes a list, (100,200)."""
    out, end, depth = [], 0, int(text[:1] == "{")
    for match in _THOUSANDS.finditer(text):
        found = match[0]
        depth += (found in ("(", "[", r"\{")) - (found in (")", "]", r"\}"))
        if found[0].isdigit() and depth <= 0:
            out += [text[end : match.start()], re.sub("[^0-9]", "", found)]
            end = match.end()
    return "".join([*out, text[end:]])


def _is_word(tokens: list[str]) -> bool:
    return bool(tokens) and len(tokens[0]) > 1 and tokens[0].isalpha()


def is_number(token: str) -> bool:
    return _NUMBER.match(token) is not None


_SMALL_WORDS = {*"no yes true false none up on in it is of or to at an as by so be if not and".split()}


def _folded(word: str) -> str:
    """A word without its capitals; symbols and names keep theirs: R and r, AA and Aa are different things."""
    plain = (len(word) > 2 and word[1:].islower()) or len(word) > 5 or word.lower() in _SMALL_WORDS
    return word.lower() if plain and word[0] != "\\" else word


def text_key(tokens: list[str]) -> str | None:
    """The tokens as text, words in small letters; None if there is none."""
    out, before = [], ""
    for token in tokens[1:] if tokens[:1] == ["+"] and len(tokens) > 1 else tokens:
        shown = token.removeprefix(r"\unit") or token
        # Between single letters a blank means nothing (3 a b = 3ab), but it parts words, commands and numbers.
        words = shown[0].isalpha() and before[-1:].isalpha() and max(len(shown), len(before)) > 1
        out.append(" " * (words or (is_number(shown) and is_number(before))))
        out.append(_folded(shown))
        before = shown
    return "".join(out) or None
