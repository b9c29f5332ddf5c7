"""The options of a question: what a cell of `choices` says, and the labels that the set gives them itself."""

import ast
import json
import re
from contextlib import suppress
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

from upt.data.columns import is_nothing, unwritten
from upt.data.marks import Marks, take_out
from upt.data.pictures import likely
from upt.data.questions import BadRow

_LABEL, _TEXT = ("label", "labels", "key", "letter", "id"), ("text", "texts", "value", "content", "option")
_LINE = re.compile(r"\s*(?:\(([A-Za-z]|\d{1,2})\)|([A-Za-z])[).:、．：]|(\d{1,2})(?:[)、．]|[.:](?=\s)))\s*(.*)")
_LEAD = re.compile(r"\A\s*(?:(?:answer )?choices|options|选项)\s*[:：]\s*", re.I)


class Options(NamedTuple):
    """Texts in order A, B, …; the set's own labels in the same order where they are others than these letters."""

    texts: list[str]
    labels: list[str] | None = None
    marks: Marks = Marks()


def options_of(uid: str, cell) -> Options | None:
    """The options in a cell: a list of texts, of {label, text} or of {letter: text}; {label: […], text: […]}; {letter:
    text}; any of these written as JSON or Python; lettered lines. None for none. Raises BadRow for anything else."""
    cell = unwritten(cell)
    for parse in (json.loads, ast.literal_eval):
        if isinstance(cell, str) and cell.strip():
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                cell = parse(cell.strip())
    if is_nothing(cell) or (isinstance(cell, str) and not cell.strip()):
        return None
    pairs = _pairs(cell)
    if pairs is None:
        raise BadRow(uid, f"choices are no list, mapping or lettered lines: {str(cell)[:40]!r}")
    while pairs and _is_missing(pairs[-1][1]):
        pairs.pop()
    if any(label is None and _is_missing(text) for label, text in pairs):
        raise BadRow(uid, f"choices have a gap, which letters cannot skip: {str(cell)[:40]!r}")
    pairs = [(label, text) for label, text in pairs if not _is_missing(text)]
    if likely(cell) or any(likely(text) for _, text in pairs):
        raise BadRow(uid, "choices that are pictures are not supported")
    if any(isinstance(text, bytes | dict | list | tuple) for _, text in pairs):
        raise BadRow(uid, "choices that are no texts are not supported")
    if len(pairs) > len(ascii_uppercase):
        raise BadRow(uid, f"more choices than letters: {len(pairs)}")
    if len(pairs) == 1:
        raise BadRow(uid, f"choices are one option only: {str(cell)[:40]!r}")
    texts, marks = [], Marks()
    for _, text in pairs:
        clean, of_text = take_out(str(text))
        if of_text.numbers and not clean:
            raise BadRow(uid, "choices that are pictures are not supported")
        texts.append(clean if of_text.numbers else str(text))
        marks = marks + of_text if of_text.numbers else marks
    labels = [str(label).strip() for label, _ in pairs if label is not None]
    if len({*labels}) < len(labels):
        raise BadRow(uid, f"choices share a label: {', '.join(labels)[:80]}")
    own = len(labels) == len(texts) and [*map(str.upper, labels)] != [*ascii_uppercase[: len(labels)]]
    return Options(texts, labels if own else None, marks) if texts else None


def _is_missing(text) -> bool:
    return text is None or text != text  # NaN, which is unequal to itself


def _pairs(cell) -> list[tuple] | None:
    """(label or None, text) of each option; None for what is no list of options."""
    if isinstance(cell, str):
        return _lines(cell)
    if isinstance(cell, dict):
        by_lower = {str(key).lower(): value for key, value in cell.items()}
        label, text = (next((by_lower[key] for key in keys if key in by_lower), None) for keys in (_LABEL, _TEXT))
        if isinstance(text, list | tuple):
            labels = label if isinstance(label, list | tuple) else [None] * len(text)
            return [*zip(labels, text, strict=True)] if len(labels) == len(text) else None
        return sorted(cell.items(), key=lambda item: (len(str(item[0])), str(item[0])))
    if isinstance(cell, list | tuple):
        if len(cell) == 1 and isinstance(cell[0], str) and (lettered_lines := _lines(cell[0])):
            return lettered_lines
        pairs = [_pair(option) for option in cell]
        return None if None in pairs else pairs
    return None


def _pair(option) -> tuple | None:
    if not isinstance(option, dict):
        return (None, option)
    by_lower = {str(key).lower(): value for key, value in option.items()}
    label, text = (next((key for key in keys if key in by_lower), None) for keys in (_LABEL, _TEXT))
    if text is not None:
        return (by_lower[label] if label else None, by_lower[text])
    return next(iter(option.items())) if len(option) == 1 else None


def _lines(text: str) -> list[tuple[str, str]] | None:
    """Options from `A. 5\\nB. 6`, a line each, or `(A) 5 (B) 6`; None where a text has no two that are lettered."""
    text = _LEAD.sub("", text).strip()
    lines = [_LINE.fullmatch(line) for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(lines):
        return [(line[1] or line[2] or line[3], line[4].strip().rstrip(";,")) for line in lines]
    for letters in (ascii_uppercase, ascii_lowercase):
        if re.match(rf"\(?{letters[0]}[).:]", text) and (texts := lettered(text, letters)):
            return [*zip(letters, texts)]
    return None


def lettered(text: str, letters: str = "ABCDEFGH") -> tuple[str, ...]:
    """The options of a text that names them A, B, …, as in `A. 5; B. 7`, `(A) 5 (B) 7`, `A:5\\nB:7`; () for none."""
    starts, at = [], 0
    for letter in letters:
        mark = re.compile(rf"(?:^|(?<=[\s;,]))\(?{letter}[).:]").search(text, at)
        if not mark:
            break
        starts.append(mark.span())
        at = mark.end()
    if len(starts) < 2:
        return ()
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return tuple(text[start:end].strip(" \t\r\n;") for (_, start), end in zip(starts, ends, strict=True))
