"""From a response to its vote key, and from a key to a verdict."""

from upt.answers.keys import (
    MAX_CHARS,
    Grade,
    answer_key,
    before_answer,
    extract_answer,
    grade,
    is_correct,
    is_well_formed,
    keeps_format,
    value_of,
    vote_key,
)

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
