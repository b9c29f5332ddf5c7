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


def rows(folder: Path, pattern: str, expected: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of every JSON list, object by id or JSONL file that matches, in the order of their names.

    Raises FileNotFoundError where there is none, ValueError for what is no JSON.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{folder} has no {pattern}: expected {expected} there")
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".jsonl":  # by \n alone: a string may hold other line ends
            numbered = enumerate(text.split("\n"), 1)
            found = ((number, _parsed(f"{file}:{number}", line)) for number, line in numbered if line.strip())
        else:
            whole = _parsed(str(file), text)
            found = whole.items() if isinstance(whole, dict) else enumerate(whole)
        for key, row in found:
            yield f"{file}:{key}", row


def _parsed(where: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
