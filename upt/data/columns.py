"""What the columns of data sets are called. Of several names the first that a set has is used.

Case and signs don't count: `imageUrl`, `Image URL` and `image_url` are one name.
"""

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from string import ascii_uppercase

QUESTION = ("problem", "question", "query", "prompt", "text", "messages", "conversations")  # a text, or turns of a chat
ANSWER = (
    "answer", "solution", "gold", "label", "final_answer", "ground_truth", "answerkey", "answer_key", "correct_answer",
    "correct_option", "answer_idx", "answer_index", "completion", "reward_model",
)  # fmt: skip
CHOICES = ("choices", "options", "option", "choice")
# Beside `decoded_image`, `image` is only a name.
IMAGE = (
    "decoded_image", "images", "image", "img", "image_path", "image_paths", "img_path", "img_paths", "image_file",
    "image_files", "image_bytes", "image_base64", "image_url", "image_urls", "img_url", "imgs", "picture", "pictures",
    "picture_path", "photo", "photos",
)  # fmt: skip
FILE_NAME = ("file_name", "filename", "image_file_name")  # imagefolder's; a picture only where a picture is named
NUMBERED = re.compile(r"(?:image|img|picture|photo)_?\d+", re.I)
VIDEO = ("videos", "video")
UID = ("uid", "id", "pid")
FOLDER, BROKEN = "__folder__", "__broken__"  # our columns beside those of text files: where a row is from, what ails it


def pick(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` that a set has as a column, as the set spells it; None for none."""
    return next(iter(_all(columns, names)), None)


def _all(columns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    by_letters = {_letters(column): column for column in columns}
    return tuple(by_letters[_letters(name)] for name in names if _letters(name) in by_letters)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


@dataclass(frozen=True)
class Columns:
    """Which columns of a set say what."""

    question: str | None
    answer: str | None
    choices: str | None
    letters: tuple[str, ...]
    """columns A, B, … with the text of an option each, where there is no column of choices"""
    pictures: tuple[str, ...]
    """of these the first that holds something counts"""
    numbered: tuple[str, ...]
    """image_0, image_1, …: all of them count"""
    files: tuple[str, ...]
    videos: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Columns":
        question, answer, choices = (pick(names, of) for of in (QUESTION, ANSWER, CHOICES))
        letters = () if choices else _lettered(names)
        pictures, files, videos = (_all(names, of) for of in (IMAGE, FILE_NAME, VIDEO))
        numbered = tuple(sorted(name for name in names if NUMBERED.fullmatch(name)))
        known = {question, answer, choices, *letters, *pictures, *files, *videos, *numbered, FOLDER, BROKEN}
        known |= {*_all(names, QUESTION), *_all(names, ANSWER), *_all(names, UID)}
        others = tuple(name for name in names if name not in known)
        return cls(question, answer, choices, letters, pictures, numbered, files, videos, others)


def _lettered(names: Sequence[str]) -> tuple[str, ...]:
    """Columns `A`, `B`, … or `option_a`, `option_b`, …, from the first letter on without a gap; at least two."""
    by_lower = {name.lower(): name for name in names if len(name) > 1} | {name: name for name in names}
    for pattern in ("{}", "option_{}", "choice_{}"):
        found = []
        for letter in ascii_uppercase:
            name = by_lower.get(pattern.format(letter if pattern == "{}" else letter.lower()))
            if name is None:
                break
            found.append(name)
        if len(found) > 1:
            return tuple(found)
    return ()


def is_nothing(cell) -> bool:
    """Whether a cell is empty: null, "", an empty list or mapping, NaN (a missing number, unequal to itself)."""
    return cell is None or cell in ("", [], {}) or (isinstance(cell, float) and cell != cell)


def unwritten(cell):
    """A list or a mapping from its text in JSON or Python, as CSV has it; every other cell as it is."""
    text = cell.strip() if isinstance(cell, str) else ""
    if text[:1] + text[-1:] in ("[]", "{}"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return parse(text)
    return cell
