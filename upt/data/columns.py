"""What the columns of data sets are called. Of several names the first that a set has is used.

Case and signs don't count: `imageUrl`, `Image URL` and `image_url` are one name.
"""

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_lowercase

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
VIDEO = (
    "videos", "video", "video_path", "video_paths", "video_url", "video_file", "audios", "audio", "audio_path",
    "audio_paths", "audio_url", "audio_file",
)  # fmt: skip
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
    """columns A, B, … or option1, option2, … with the text of an option each, where there is no column of choices"""
    pictures: tuple[str, ...]
    """of these the first that holds something counts, and what others hold of other pictures"""
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
        known |= {*_all(names, UID)}
        others = tuple(name for name in names if name not in known)
        return cls(question, answer, choices, letters, pictures, numbered, files, videos, others)


def _lettered(names: Sequence[str]) -> tuple[str, ...]:
    """Columns `A`, `B`, … or `option_a`, `option_b`, … or `option1`, `option2`, … without a gap; at least two."""
    by_letters = {_letters(name): name for name in names}
    from_0, from_1 = ([str(i) for i in range(start, start + 26)] for start in (0, 1))
    for lead in ("option", "choice", "opt", ""):
        for signs in (ascii_lowercase, from_0, from_1) if lead else (ascii_lowercase,):
            found = [*takewhile(lambda name: name, (by_letters.get(lead + sign) for sign in signs))]
            if len(found) > 1:
                return tuple(found)
    return ()


def is_nothing(cell) -> bool:
    """Whether a cell is empty: null, "", an empty list or mapping, NaN (a missing number, unequal to itself)."""
    return cell is None or cell in ("", [], {}) or (isinstance(cell, float) and cell != cell)


_ITEM = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+(?:\.\d*)?", re.S)


def unwritten(cell):
    """A list, a mapping or bytes from their text in JSON, Python or numpy, as CSV has it; every other cell as it is."""
    text = cell.strip() if isinstance(cell, str) else ""
    if text[:1] + text[-1:] == "[]" and len(items := _ITEM.findall(text)) > 1 and not _ITEM.sub("", text[1:-1]).strip():
        return [ast.literal_eval(item) if item[0] in "\"'" else item for item in items]  # numpy's, without commas
    if text[:1] + text[-1:] in ("[]", "{}") or text[:2] in ("b'", 'b"'):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return parse(text)
    return cell
