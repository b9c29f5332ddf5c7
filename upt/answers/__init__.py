"""From a response to its vote key, and from a key to a verdict."""

from upt.answers.extraction import before_answer, extract_answer, is_well_formed, keeps_format
from upt.answers.grading import Grade, grade, is_correct
from upt.answers.keys import answer_key, value_of, vote_key
from upt.answers.latex import MAX_CHARS

__all__ = [
    "MAX_CHARS",
    "Grade",
    "answer_key",
    "before_answer",
    "extract_answer",
    "grade",
    "is_correct",
    "is_well_formed",
    "keeps_format",
    "value_of",
    "vote_key",
]
