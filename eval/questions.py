"""What the benchmarks' modules share: a question, and reading its fields with errors that name the place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Question(NamedTuple):
    id: str
    text: str
    gold: str
    choices: tuple[str, ...]
    image: str
    categories: dict[str, tuple[str, ...]]
    answer_type: str = "text"
    precision: int = 0  # decimals of a float


def files_in(folder: Path, pattern: str, expected: str) -> list[Path]:
    """The files that match, in the order of their names. Raises FileNotFoundError where there is none."""
    if not (files := sorted(folder.glob(pattern))):
        raise FileNotFoundError(f"{folder} has no {pattern}: expected {expected} there")
    return files


def rows(file: Path) -> Iterator[tuple[str, str | None, dict]]:
    """(where it stands, key, row) of a JSONL file, a JSON list, or a JSON object of rows by key.

    The key is None but for the last. Raises ValueError for what is none of these.
    """
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix == ".jsonl":  # by \n alone: a string may hold other line ends
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file}:{number}", None, _parsed(f"{file}:{number}", line)
        return
    whole = _parsed(str(file), text)
    if not isinstance(whole, dict | list):
        raise ValueError(f"{file} holds {type(whole).__name__}, expected a JSON list or object of rows")
    for key, row in whole.items() if isinstance(whole, dict) else enumerate(whole):
        yield f"{file}:{key}", key if isinstance(whole, dict) else None, row


def _parsed(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
