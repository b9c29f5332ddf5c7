"""Grading against gold, by key and by math_verify: for evaluation, never for training."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from upt.answers.extraction import extract_answer
from upt.answers.keys import answer_key, vote_key
from upt.answers.latex import clean, tokenize
from upt.answers.structure import symbols_of
from upt.answers.verifier import verifier

_NUMBER = re.compile(r"-?[0-9][0-9./]*")
SMALL = Fraction(1, 1000)
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

    math_verify is asked for what it is good at, two short expressions in the same letters: (x+1)^2 = x^2+2x+1. Of
    options, words, names, lists and relations keys are the better judge; it holds cat for act and 4g for 4.
    Text can neither make it raise nor hang. Raises ModuleNotFoundError if math_verify is not installed.
    """
    key, gold_key, answer = vote_key(text, choices, multi), answer_key(gold, choices, multi), extract_answer(text)
    by_key = key is not None and key == gold_key
    reference = extract_answer(str(gold)) or str(gold)
    if choices or multi or key is None or gold_key is None or max(len(answer), len(reference)) > MAX_VERIFIED:
        return Grade(by_key, None)
    letters, expected = (symbols_of(tokenize(clean(side))) for side in (answer, reference))
    asked = letters is not None and letters == expected and not (_is_small(key) or _is_small(gold_key))
    return Grade(by_key, verifier(reference, answer) if asked else None)


def _is_small(key: str) -> bool:
    """True for numbers that are so near to 0 that math_verify holds them for one another, as 1e-19 and 2e-19."""
    return _NUMBER.fullmatch(key) is not None and 0 < abs(Fraction(key)) < SMALL


def is_correct(text: str, gold: str, choices: Sequence[str] | None = None, multi: bool = False) -> bool:
    """True if the response's answer equals gold by key or, where there are no choices, by math_verify; see `grade`."""
    return grade(text, gold, choices, multi).correct
