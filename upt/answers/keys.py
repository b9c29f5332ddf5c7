r"""Answers: find the final answer of a response, turn it into a vote key, grade it against gold.

A **vote key** is a canonical string. Two answers agree when their keys are equal; votes and rewards compare nothing
else, so agreement is an equivalence relation. Pairwise graders can't promise that: they hold 50 % = 50 and
50 % = 0.5, but not 50 = 0.5. From a response to its key:

    extract_answer   the last \boxed{} or <answer>…</answer>
    _tokens          LaTeX tokens: layout and fonts gone, shorthands spelled out, \frac12 -> \frac{1}{2}
    choices given    the option's letter                                         B
    a number         exact reduced fraction; units, % and a leading "x =" gone   3/2
    a closed form    that fraction if rational, else 12 significant digits       1.41421356237
    a list           the keys of its parts in order; those of a set sorted       (1, 2)   {1, 2}
    anything else    its tokens, case-folded                                     only green

Model text is hostile until proven otherwise: no `eval`, no regular expression that can backtrack far, a bound on
everything that is computed. No public function raises or hangs, whatever the text, and all work in any thread.

    >>> vote_key(r"<think>…</think> so \boxed{x = 1\frac12\text{ cm}}")
    '3/2'
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from string import ascii_uppercase
from typing import NamedTuple

from upt.answers.closed_forms import MAX_DEPTH, MAX_DIGITS, is_number, leading_value, number_key
from upt.answers.verifier import verifier

MAX_CHARS = 2000  # a longer answer is not taken apart: its text is its key

# ------------------------------------------------------------------------------------------------ extraction

# A backslash takes the next character with it (\{ is no brace), unless it begins \boxed.
_BOX_PART = re.compile(r"(?<=\\)boxed\s*\{|\\(?!boxed)[\s\S]|[{}]")
_FLAT_BOX = re.compile(r"\\boxed\s*\{([^{}\\]*)\}")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def _find_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last balanced box lies (the one that opens last), else that of the last answer tags.

    One pass, linear.
    """
    last = text.rfind("\\boxed")
    if last >= 0:
        if match := _FLAT_BOX.match(text, last):  # what nearly every response ends with, without a scan
            return match.span(1)
        opened, best = [], (-1, -1)
        for part in _BOX_PART.finditer(text):
            if part[0] == "}" and opened:
                best = max(best, (opened.pop(), part.start()))
            elif part[0][0] in "b{":
                opened.append(part.end() if part[0][0] == "b" else -1)
        if best[0] >= 0:
            return best
    start, found = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            start, found = None, (start, tag.start())
    return found


def _find_answer(text: str) -> str | None:
    span = _find_span(text)
    return None if span is None else text[slice(*span)]


def extract_answer(text: str, choices: Sequence[str] | None = None) -> str | None:
    r"""The answer string of a whole response: its last balanced `\boxed{}`, else its last `<answer>…</answer>`.

    Of nested boxes the innermost counts; a box cut off by the length limit doesn't. None if there is nothing, if the
    last box is empty, or if `text` is no string. `choices` has no say here: extraction and keying are called alike.
    """
    found = _find_answer(text) if isinstance(text, str) else None
    return (found.strip(" \t\r\n") or None) if found is not None else None


def before_answer(text: str) -> str:
    r"""What a response says before the `\boxed{` or `<answer>` whose content `extract_answer` gives.

    All of the text where that finds nothing; "" if `text` is no string. Linear time.
    """
    if not isinstance(text, str) or extract_answer(text) is None:
        return text if isinstance(text, str) else ""
    start = _find_span(text)[0]
    return text[: text.rfind("\\boxed" if text[start - 1] == "{" else "<", 0, start)]


def is_well_formed(text: str) -> bool:
    r"""True if the whole response reads `<think>…</think>…\boxed{…}…` (format term of arXiv 2603.21289).

    The language of fullmatch(`<think>.*</think>.*\\boxed\{.*\}.*`) with dot matching newlines, found in linear time.
    """
    if not isinstance(text, str) or not text.startswith("<think>"):
        return False
    end = len("<think>")
    for mark in ("</think>", "\\boxed{", "}"):
        start = text.find(mark, end)
        if start < 0:
            return False
        end = start + len(mark)
    return True


def keeps_format(text: str, prompt: str) -> bool:
    """Whether a response has the format that a prompt style asks for.

    "think-boxed": it is well-formed. Any other style: it has an answer.
    """
    return is_well_formed(text) if prompt == "think-boxed" else extract_answer(text) is not None


# ------------------------------------------------------------------------------------------------ LaTeX tokens

# A table and not unicodedata.normalize on the answer: that is quadratic on runs of combining marks, and x² becomes x2.
_UNICODE = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*range(0xFF01, 0xFFE7), *range(0x1D400, 0x1D800))}
_UNICODE |= {c: None for c in (*range(9), *range(14, 32), 0x7F, 0xAD, 0x200B, 0x2060, 0xFEFF)}  # invisible
_UNICODE |= {c: None for c in range(0xD800, 0xE000)}  # lone surrogates can't be written to a shard
_UNICODE |= dict(zip(map(ord, "−–⁄∕÷×·⋅∙。’′º˚"), "--///****.''°°", strict=True))
for _i, _c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉"):
    _UNICODE[ord(_c)] = f"{'^_'[_i // 10]}{{{_i % 10}}}"
for _c, _i, _j in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True):
    _UNICODE[ord(_c)] = rf"\frac{{{_i}}}{{{_j}}}"
for _c in ("√sqrt", "πpi", "𝜋pi", "∠angle", "△triangle", "∞infty", "±pm", "∅emptyset", "≈approx", "≤le", "≥ge",
           "≠ne", "∪cup", "∩cap", "∈in"):  # fmt: skip
    _UNICODE[ord(_c[0])] = f"\\{_c[1:]} "
_ALIASES = {
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\degree": "°", r"\degrees": "°", r"\circ": "°", r"\%": "%",
    r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\simeq": r"\approx", r"\lt": "<", r"\gt": ">", "pi": r"\pi",
}  # fmt: skip
_FONT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname|[mh]box|emph|underline"
    r"|f?box(?:ed)?)"
)
_LAYOUT = re.compile(
    rf"[$~`€£¥]|{_FONT}|\\(?:[\s,;:!>()\[\]\\$&]|left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad|rm|bf)?"
)
_TOKEN = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\\[A-Za-z]+|\\[\s\S]?|[^\W\d_]+|\S")
_THOUSANDS = r"[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})+"
# (what a text must contain for the rule to be tried, pattern, replacement), in this order
_REWRITES = [(hint, re.compile(pattern), new) for hint, pattern, new in (
    ("\\", rf"{_FONT}\s*\{{([^{{}}]*)\}}", r" \1 "),  # \text{ cm}
    ("nswer", r"(?i)^(?:the )?(?:(?:final|correct) )?answer ?(?:is\b|:|=)", ""),
    ("**", r"(?<=[0-9)])\*\*(?=[0-9(-])", "^"), ("**", r"\*\*", ""),  # a power, else Markdown
    ("^", r"\^\s?\{?\s?(?:\\circ(?![A-Za-z])|\\degrees?|°|o(?![A-Za-z]))\s?\}?", "°"),
    # 1,000 and 1{,}000 and 1\,000 -> 1000; but what fills a bracket alone is a list: (100,200)
    (",", rf"((?:[(\[]|\\\{{|^\{{){_THOUSANDS}(?:[)\]]|\\?\}}))|(?<![0-9.,]){_THOUSANDS}(?![0-9]|,[0-9])",
     lambda match: match[1] or re.sub("[^0-9]", "", match[0])),
    ("overline", r"\\overline\s?(?=\{\s?[A-Z]'?\s?[A-Z])", ""),  # the segment AB
    ("sqrt", r"(?<![A-Za-z\\])sqrt", r"\\sqrt"), ("frac", r"\\[dtc]frac", r"\\frac"),
    ("frac", r"\\frac\s*([0-9]|(?<=\s)[A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}"),  # \frac12, \frac1{2}
    ("frac", r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),  # \frac{1}2
    ("sqrt", r"(\\sqrt(?![A-Za-z])(?:\[[^\[\]]*\])?)\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\1{\2}"),  # \sqrt12 means 12
    ("^", r"\^\s*([+-]?[0-9]+|[A-Za-z])", r"^{\1}"), ("_", r"_\s*([0-9]+|[A-Za-z])", r"_{\1}"),
    ("^", r"(\^\{[^{}]*\})\s*(?=[0-9])", r"\1*"),  # 2^{3}5^{2} is a product
    ("frac", r"(?<![0-9.}])([0-9]+)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"(\1+\2/\3)"),  # 1\frac{1}{2}
    ("/", r"(?<![0-9.,/{])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9./])", r"(\1+\2/\3)"),  # 1 1/2
)]  # fmt: skip


def _clean(answer: str) -> str:
    text = answer.replace("\frac", "\\frac")  # a \frac once printed unescaped: MATH-Vision's gold has form feeds
    return " ".join(text.translate(_UNICODE).split())


def value_of(text: str, rest: str | None = None) -> Fraction | Decimal | None:
    """Value of a number or closed form. What follows it must begin with `rest`; None: nothing may follow."""
    value, tail = leading_value(_tokens(_clean(text))) if len(text) <= MAX_CHARS else (None, [])
    return value if not tail or tail[0] == rest else None


def _tokens(text: str) -> list[str]:
    """Tokens of what a cleaned answer says, without how it is set. Time is linear in its length."""
    for hint, pattern, new in _REWRITES:
        if hint in text:
            text = pattern.sub(new, text)
    tokens = [_ALIASES.get(token, token) for token in _TOKEN.findall(text) if not _LAYOUT.fullmatch(token)]
    while tokens and tokens[-1] in (".", ",", ";", "*", '"'):
        tokens.pop()
    return tokens


# ------------------------------------------------------------------------------------------------ keys

_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_RELATIONS = ("=", r"\approx", r"\in")
_NOT_IN_NAMES = re.compile(r"[0-9+\-*/^<>!]|\\(?:frac|sqrt|pi|pm|le|ge|ne|infty|cup|cap|\{)(?![A-Za-z])")
_PLAIN_NUMBER = re.compile(  # single blanks only: several \s* in a row would backtrack
    r"\$?\s?([+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*|/[1-9][0-9]*)?|\.[0-9]+))\s?(?:\\?%)?\s?\$?"
)


def _split(tokens: list[str], separators: tuple[str, ...]) -> list[list[str]]:
    """Parts between the separators that stand in no bracket."""
    parts, depth = [[]], 0
    for token in tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _is_bracket(tokens: list[str]) -> bool:
    """True if the first token's bracket closes with the last, whatever their kinds: [1, 2) is an interval."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth <= 0:
            return 0 < i == len(tokens) - 1
    return False


def _is_name(tokens: list[str]) -> bool:
    r"""True for x, f(x), S_{1}, \angle ABC, the area: what a person writes in front of "= 5"."""
    name = re.sub(r"_ \{[^{}]*\}", "", " ".join(tokens))
    return not _NOT_IN_NAMES.search(name) and any(c.isalpha() for c in name)


def _text_key(tokens: list[str]) -> str | None:
    out, before = [], ""
    for token in tokens[1:] if tokens[:1] == ["+"] else tokens:
        # Between single letters a blank means nothing (3 a b = 3ab), but it parts words, commands and numbers.
        words = token[0].isalpha() and before[-1:].isalpha() and max(len(token), len(before)) > 1
        out.append(" " * (words or (is_number(token) and is_number(before))))
        out.append(token if token[0] == "\\" else token.casefold())
        before = token
    return "".join(out) or None


def _key(tokens: list[str], depth: int = 0) -> str | None:
    """Key of an answer without choices: a list by its parts, else a number, else text."""
    if not tokens or depth > MAX_DEPTH:
        return _text_key(tokens)
    parts = _split(tokens, (",", ";"))
    if len(parts) > 1 and all(parts):
        return ", ".join(_key(part, depth + 1) or "" for part in parts)
    sides, relations = _split(tokens, _RELATIONS), [token for token in tokens if token in _RELATIONS]
    if len(sides) > 1 and all(sides):
        named = next((i for i, side in enumerate(sides[:-1]) if not _is_name(side)), len(sides) - 1)
        if named == len(sides) - 1:
            return _key(sides[-1], depth + 1)
        keys = [number_key(side) for side in sides[named:]]
        if keys[0] and (len(set(keys)) == 1 or relations[named] == r"\approx"):
            return keys[0]  # 1/2 = 0.5; the exact value of \sqrt{2} \approx 1.41
    if tokens[0] in _OPENING and _is_bracket(tokens):
        parts = _split(tokens[1:-1], (",", ";"))
        keys = [_key(part, depth + 1) or "" for part in parts]
        if tokens[0] == r"\{" or (tokens[0] == "{" and len(parts) > 1):
            return "{" + ", ".join(sorted(set(keys))) + "}"
        if len(parts) > 1 and all(parts):
            return tokens[0] + ", ".join(keys) + tokens[-1]
        if tokens[0] in "({":
            return keys[0] or None
    return number_key(tokens) or _text_key(tokens)


_LABEL_WORDS = ("the", "option", "options", "choice", "choices", "answer")
_LABEL_FILLER = (*_LABEL_WORDS, *"()[]{}.:,;/&", r"\{", r"\}", "and", "or")


def _only_letters(tokens: list[str], letters: str) -> str:
    """Sorted option letters of an answer that names nothing else (B, (b), Option B, A and C, AC), else ''."""
    named = [token for token in tokens if token.casefold() not in _LABEL_FILLER]
    if len(named) == 1 and named[0].isupper() and len(set(named[0])) == len(named[0]):
        named = list(named[0])
    known = all(len(name) == 1 and name.upper() in letters for name in named)
    return "".join(sorted({name.upper() for name in named})) if known else ""


def _labelled(tokens: list[str], letters: str) -> tuple[str, list[str]]:
    """Letter and text of `B. text`, `(B) text`, `B: text`, `Option B text`; ('', tokens) if no label leads."""
    start = next((i for i, token in enumerate(tokens) if token.casefold() not in _LABEL_WORDS), 0)
    bracket = tokens[start : start + 1] in (["("], ["["])
    letter, *rest = tokens[start + bracket :] or [""]
    marked = bool(rest) and (rest[0] in (")", "]", ".", ":") or rest[0][0] == ".")  # B.5: the dot went to the number
    while rest and rest[0] in (")", "]", ".", ":"):
        del rest[0]
    if len(letter) != 1 or letter.upper() not in letters or not (marked or (start and not bracket)):
        return "", tokens
    return ("", tokens) if rest and rest[0].casefold() in ("and", "or", "&", ",", "=") else (letter.upper(), rest)


@lru_cache(maxsize=1024)
def _option_keys(choices: tuple[str, ...]) -> tuple[list[str | None], list[str | None]]:
    """Text key and key of each option; a label of the option's own ("B. 5" in second place) is not part of it."""
    options = [
        _labelled(_tokens(_clean(option)[:MAX_CHARS]), letter)[1] for letter, option in zip(ascii_uppercase, choices)
    ]
    return [_text_key(tokens) for tokens in options], [_key(tokens) for tokens in options]


def _choice_key(tokens: list[str], choices: tuple[str, ...], multi: bool) -> str | None:
    letters = ascii_uppercase[: len(choices)]
    if len(tokens) == 1 and tokens[0] in tuple(letters):
        return tokens[0]
    texts, keys = _option_keys(choices)
    # The exact text comes before other letters (an option may read "AC" or "a"), the key after (5 m and 5 cm share it).
    if (text := _text_key(tokens)) and text in texts:
        return letters[texts.index(text)]
    if found := _only_letters(tokens, letters):
        return found if multi or len(found) == 1 else None
    if label := _labelled(tokens, letters)[0]:
        return label
    key = _key(tokens)
    return letters[keys.index(key)] if key and keys.count(key) == 1 else None


def answer_key(answer: str, choices: Sequence[str] | None = None, multi: bool = False) -> str | None:
    r"""Vote key of a bare answer, such as a gold label; a box, answer tags or $…$ around it are taken off.

    1. With `choices` (option texts in the order A, B, …): the letter of the option that the answer names by letter or
       by text; with `multi` the sorted letters, for which `choices` may be absent. An answer that names no option, or
       two without `multi`, or that fits two options equally, abstains: None.
    2. LaTeX layout, fonts, a leading `name =`, a full stop, and behind a number degree signs, % and units are dropped;
       commas before groups of exactly three digits separate thousands.
    3. Integers, decimals, fractions, mixed numbers: the reduced fraction. Percent is a unit: 50 % is 50.
    4. Closed forms in roots and π: that fraction where the value is rational, else 12 significant digits.
    5. Lists, tuples and intervals keep order; braced sets are sorted and drop repetitions.
    6. All else (words; names of points, angles, segments; formulas in variables) is case-folded text.

    int and float are read as they print; another non-string, or an answer of no content, gives None. Never raises.
    """
    if type(answer) in (int, float):
        answer = str(Decimal(answer)) if type(answer) is int else repr(answer)  # str() refuses 4300 digits
    if not isinstance(answer, str):
        return None
    options = tuple(map(str, choices)) if isinstance(choices, (list, tuple)) else ()
    if not options and (plain := _PLAIN_NUMBER.fullmatch(answer.strip())):
        digits = plain[1].replace(",", "")
        if len(digits) <= MAX_DIGITS:
            return str(Fraction(digits))
        if digits.lstrip("+-").isdecimal():  # exact without int(), which is quadratic in the digits
            return "-" * (digits[0] == "-") + digits.lstrip("+-0") if digits.strip("+-0") else "0"
    found = _find_answer(answer)
    text = _clean(answer if found is None else found)
    if len(text) > MAX_CHARS:
        return None if options else text.casefold()
    tokens = _tokens(text)
    if options:
        return _choice_key(tokens, options, multi)
    return (multi and _only_letters(tokens, ascii_uppercase)) or _key(tokens)


def vote_key(text: str, choices: Sequence[str] | None = None, multi: bool = False) -> str | None:
    """Vote key of a whole response: `answer_key` of its `extract_answer`. None is an abstention. Never raises."""
    answer = extract_answer(text)
    return None if answer is None else answer_key(answer, choices, multi)


# ------------------------------------------------------------------------------------------------ grading

MAX_VERIFIED = 200  # characters of an answer that math_verify gets to see


class Grade(NamedTuple):
    """Two verdicts on one answer; `verifier` is None where math_verify was not asked or did not answer in time."""

    key: bool
    verifier: bool | None

    @property
    def correct(self) -> bool:
        return self.key or bool(self.verifier)

    @property
    def disagree(self) -> bool:
        return self.verifier is not None and self.verifier != self.key


def grade(text: str, gold: str, choices: Sequence[str] | None = None, multi: bool = False) -> Grade:
    """Grade a response against gold by key and by math_verify; for evaluation only, never for training.

    math_verify is asked where there are no choices (it would hold wrong options for right) and both answers are short.
    Text can neither make it raise nor hang. Raises ModuleNotFoundError if math_verify is not installed.
    """
    key, gold_key, answer = vote_key(text, choices, multi), answer_key(gold, choices, multi), extract_answer(text)
    by_key = key is not None and key == gold_key
    reference = extract_answer(str(gold)) or str(gold)
    if choices or multi or key is None or gold_key is None or max(len(answer), len(reference)) > MAX_VERIFIED:
        return Grade(by_key, None)
    return Grade(by_key, verifier(reference, answer))


def is_correct(text: str, gold: str, choices: Sequence[str] | None = None, multi: bool = False) -> bool:
    """True if the response's answer equals gold by key or, where there are no choices, by math_verify; see `grade`."""
    return grade(text, gold, choices, multi).correct
