"""What a data set holds, before anything is trained on it; no model is loaded.

    python check_data.py --data geoqa
    python check_data.py --data path/to/folder --split test --limit 1000 --out check.html

Every row of a split is read as training would read it; `--split test` has the held-out ones. Printed: rows and
pictures, sizes, lengths, options, gold, repeated questions, and the rows that cannot be used, by reason. The page has
five questions with their pictures; it goes to runs/data-geoqa.html.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import median

from upt import data, show
from upt.files import check_file, write_whole
from upt.ranges import Name, Seed
from upt.run import cli, progress
from upt.run.settings import Data
from upt.run.typed import Typed

EXAMPLES = 5
NAMED = 3  # rows of a reason


@dataclass
class Config(Data, Typed):
    data: Name = "shapes"
    """as in train_upt.py"""
    seed: Seed = 0
    """of the questions that are drawn, as in train_upt.py"""
    out: Path | None = None
    """HTML file for the examples; None: runs/data-NAME.html"""


@dataclass
class Found:
    """What was seen of some questions."""

    rows: int
    bad: dict[str, str]
    """uid: reason"""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """width and height of the pictures, pixels"""
    lengths: list[int] = field(default_factory=list)
    """of the questions, characters"""
    options: Counter = field(default_factory=Counter)
    """how many questions have so many options; 0: none"""
    kinds: Counter = field(default_factory=Counter)
    gold: int = 0
    repeated: int = 0
    """questions that were there before, with the same picture"""


def look(questions: "data.Questions") -> Found:
    """Read every row once."""
    found, seen = Found(len(questions), questions.bad), set()
    for i in progress.bar(range(len(questions)), desc="reading", unit="row"):
        for q in questions.get([i]):
            found.lengths.append(len(q.question))
            found.options[len(q.choices or ())] += 1
            found.kinds.update([q.kind] if q.kind else [])
            found.gold += q.gold is not None
            if q.image is not None:
                found.sizes.append(q.image.size)
            picture = b"" if q.image is None else q.image.tobytes()
            same = sha256(repr((q.question, q.choices)).encode("utf-8", "replace") + picture).digest()
            found.repeated += same in seen
            seen.add(same)
    return found


def spread(values: Sequence[float]) -> str:
    return f"{min(values)} to {max(values)}, median {median(values):g}"


def lines(found: Found) -> list[str]:
    """What is printed, a line for each thing."""
    good, counts = len(found.lengths), sorted(found.options.items())
    said = [f"rows: {found.rows}, of which {good} can be used"]
    said.append(f"pictures: {len(found.sizes)} of {good} questions have one")
    if found.sizes:
        widths, heights = zip(*found.sizes)
        said.append(f"picture sizes: {spread(widths)} pixels wide, {spread(heights)} high")
    said.append(f"question lengths: {spread(found.lengths)} characters")
    said.append("options: " + ", ".join(f"{n} questions with {k or 'none'}" for k, n in counts))
    said.append(f"gold: {found.gold} of {good} questions have an answer")
    if found.kinds:
        said.append("kinds: " + ", ".join(f"{kind} {n}" for kind, n in found.kinds.most_common()))
    if found.repeated:
        said.append(f"repeated: {found.repeated} questions were there before, with the same picture")
    reasons: dict[str, list[str]] = {}
    for uid, reason in found.bad.items():
        kind, _, which = reason.partition(": ")
        reasons.setdefault(kind, []).append(f"{uid}: {which}" if which else uid)
    for kind, rows in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
        more = f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        said.append(f"cannot be used: {len(rows)}, {kind} ({'; '.join(rows[:NAMED])}{more})")
    return said


def examples(questions: "data.Questions") -> list["data.Question"]:
    """The first questions that can be used, spread over the set."""
    found, step = [], max(1, len(questions) // EXAMPLES)
    for start in range(0, len(questions), step):
        good = next((q for i in range(start, min(start + step, len(questions))) for q in questions.get([i])), None)
        if good is not None and len(found) < EXAMPLES:
            found.append(good)
    return found


def page(name: str, said: list[str], found: list["data.Question"]) -> str:
    """Some questions and what was said of their set, as HTML."""
    cards = []
    for q in found:
        gold = ("gold: ", q.gold) if q.gold else ("no gold",)
        cards.append(show.card(q.uid, q.question, q.choices, show.embedded(q.image), "", gold))
    return show.page(name, said, cards)


def page_path(name: str, split: str) -> Path:
    """Where the page of a data set goes, by the name or path that was given; of `.` by its folder's own name."""

    def word(text: str) -> str:
        return re.sub(r"[^\w.-]+", "-", text).strip(".-")[-100:]

    known = word(name) or word(os.path.basename(os.path.abspath(name)))
    parts = ["data", known, "" if split == "train" else word(split)]
    return Path("runs", "-".join(filter(None, parts)) + ".html")


def main(config: Config) -> Found:
    """Read, print and write the page; returns what was seen. Raises DataError for what is no data set."""
    config = replace(config)
    out = config.out or page_path(config.data, config.split)
    check_file(out)
    questions = data.load(config.data, config.split, config.seed, config.limit)
    described = questions.describe()
    print(show.printable(described))
    found, some = look(questions), examples(questions)
    said = lines(found)
    print(show.printable("\n".join(said)))
    write_whole(out, [page(questions.name, [described, *said], some).encode("utf-8", "replace")])
    print(f"{len(some)} of them, to be opened in a browser: {out}")
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
