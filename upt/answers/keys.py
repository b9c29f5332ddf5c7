r"""Vote keys: one canonical string for all spellings of an answer.

Two answers agree when their keys are equal; votes and rewards compare nothing else, so agreement is an equivalence
relation. Pairwise graders can't promise that: they hold 50 % = 50 and 50 % = 0.5, but not 50 = 0.5. From a response to
its key:

    extract_answer   the last \boxed{} or <answer>…</answer>                                        extraction.py
    tokenize         LaTeX tokens: layout and fonts gone, shorthands spelled out                    latex.py
    choices given    the option's letter                                         B                  choices.py
    a number         exact reduced fraction; units, % and a leading "x =" gone   3/2                closed_forms.py
    a closed form    that fraction if rational, else 12 significant digits       1.41421356237      closed_forms.py
    a formula        its terms and their factors in one order                    x^{2}-2*x          algebra.py
    several values   the set of them, however they are joined                    {2, 3}
    a tuple          the keys of its parts in order                              (1, 2)
    anything else    its tokens, case-folded                                     only green

A wrong merge is worse than a missed one, for it rewards wrong answers: what can be read in two ways stays text.

Model text is hostile until proven otherwise: no `eval`, no regular expression that can backtrack far, a bound on
everything that is computed. No public function raises or hangs, whatever the text, and all work in any thread.

    >>> vote_key(r"<think>…</think> so \boxed{x = 1\frac12\text{ cm}}")
    '3/2'
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from upt.answers import closed_forms
from upt.answers.choices import choice_key, only_letters
from upt.answers.closed_forms import MAX_DIGITS
from upt.answers.extraction import extract_answer, find_answer
from upt.answers.latex import MAX_CHARS, clean, tokenize
from upt.answers.structure import key_of

_PLAIN_NUMBER = re.compile(  # single blanks only: several \s* in a row would backtrack
    r"\$?\s?([+-]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*|/[1-9][0-9]*)?|\.[0-9]+))\s?(?:\\?%)?\s?\$?"
)


def answer_key(answer: str, choices: Sequence[str] | None = None, multi: bool = False) -> str | None:
    r"""Vote key of a bare answer, such as a gold label; a box, answer tags or $…$ around it are taken off.

    1. With `choices` (option texts in the order A, B, …): the letter of the option that the answer names by letter, by
       text or by both; with `multi` the sorted letters, for which `choices` may be absent. An answer that names no
       option, or two without `multi`, or that fits two options equally, abstains: None.
    2. LaTeX layout, fonts, a leading `name =`, a full stop, and behind a number degree signs, % and units are dropped;
       commas before groups of exactly three digits separate thousands. A single letter behind a number is a unit only
       where it is set upright (units.py).
    3. Integers, decimals, fractions, mixed numbers: the reduced fraction. Percent is a unit: 50 % is 50.
    4. Closed forms in roots and π: that fraction where the value is rational, else 12 significant digits.
    5. Formulas in symbols: their terms and factors in one order (algebra.py).
    6. Several values (2, 3; x=2 or x=3; \{3, 2\}; \pm 2): the set of them. Values of several unknowns are a tuple in
       the order of their names. Tuples, intervals and lists of words keep order.
    7. Equations that say more than a value, inequalities and matrices: their sides or cells in one order.
    8. All else (words; names of points, angles, segments) is case-folded text.

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
    found = find_answer(answer)
    text = clean(answer if found is None else found)
    if len(text) > MAX_CHARS:
        return None if options else text.casefold()
    tokens = tokenize(text)
    if options:
        return choice_key(tokens, options, multi)
    return (multi and "or" not in tokens and only_letters(tokens)) or key_of(tokens)


def vote_key(text: str, choices: Sequence[str] | None = None, multi: bool = False) -> str | None:
    """Vote key of a whole response: `answer_key` of its `extract_answer`. None is an abstention. Never raises."""
    answer = extract_answer(text)
    return None if answer is None else answer_key(answer, choices, multi)


def value_of(text: str, rest: str | None = None) -> Fraction | Decimal | None:
    """Value of a number or closed form. What follows it must begin with `rest`; None: nothing may follow."""
    return closed_forms.value_of(tokenize(clean(text)), rest) if len(text) <= MAX_CHARS else None
