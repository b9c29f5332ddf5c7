"""Questions by name, hub id or local path, of one set or of several as one.

    load("shapes", seed=0)              drawn on the spot, as is shapes-hard: needs no file and no network
    load("geoqa"), load("geometry3k"), load("mmr1")
    load("org/name", "test")            any data set of the hub; a copy in the hub cache is used as it is
    load("~/data/mine")                 a folder of parquet, JSONL, JSON or CSV, or of save_to_disk; or one file
    load("shapes,runs/questions")       several as one, also by weight: shapes:3,runs/questions:1

Without weights every question of every set counts alike: an epoch is all of them in a new order. With weights each set
has its own epochs, and every step takes from each its part, in whole questions and at least one.

Held-out splits (`validation`, `test`) are those of the first set. A uid that an earlier set has is written `2:uid`
where the second set has it too. splits.py says what splits and uids a set has.
"""

from dataclasses import replace
from pathlib import Path

from upt.data import shapes, sources
from upt.data.names import ALIASES, EMBEDDED, is_mixture, parts
from upt.data.questions import BadRow, Question, Questions
from upt.errors import DataError


def load(name_or_path: str | Path, split: str = "train", seed: int = 0, limit: int | None = None) -> Questions:
    """The questions of one split. Decodes pictures only until one row is found good.

    `seed` chooses the pictures of the embedded sets and changes no other. `limit` keeps the first so many rows, of each
    set where there are several. Raises `DataError` if there is no such set, no question column, or no good row.
    """
    name, split = str(name_or_path), ALIASES.get(split, split)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: give a number of rows from 1, or None for all of them")
    if is_mixture(name):
        named = parts(name)
        if split == "train":
            return mix([(load(part, split, seed, limit), weight) for part, weight in named])
        name = named[0][0]
    if name in EMBEDDED:
        made = shapes.questions(split, seed, limit, name)
        note = "; ".join(filter(None, (f"seed {seed}", sources.first_of(len(made.uids), shapes.SIZES[split]))))
        drawn = Questions(name, split, list(made.uids), made.__getitem__, True, note, len(made.uids))
        drawn.stored = made.stored
        return drawn
    return sources.load_set(name, split, limit)


def mix(sets: list[tuple[Questions, float | None]]) -> Questions:
    """The questions of several sets, one set after the other, with the weights that sampling draws them by."""
    rows, uids, seen = [], [], set()
    for number, (questions, _) in enumerate(sets, start=1):
        rows += [(questions, i) for i in range(len(questions))]
        uids += [f"{number}:{uid}" if uid in seen else uid for uid in questions.uids]
        seen.update(questions.uids)

    def read(k: int) -> Question:
        questions, i = rows[k]
        try:
            return replace(questions[i], uid=uids[k])
        except BadRow as bad:
            raise BadRow(uids[k], bad.reason) from bad

    every = [questions for questions, _ in sets]
    note = " + ".join(f"{len(q)} of {q.name}" + (f" ({q.note})" if q.note else "") for q in every)
    name, has_gold = ",".join(q.name for q in every), any(q.has_gold for q in every)
    mixed = Questions(name, every[0].split, uids, read, has_gold, note, sum(q.pictures for q in every))
    mixed.stored = lambda: (row for q in every for row in q.stored())
    if sets[0][1] is not None:
        mixed.weights = [(len(questions), weight) for questions, weight in sets]
    return mixed


def shares(questions: Questions, per_step: int) -> str:
    """What a step takes from each set, for the start of a run. Raises DataError as `quotas` does."""
    names = questions.name.split(",")
    counts = quotas(per_step, questions.weights)
    return "a step takes " + " + ".join(f"{n} of {name}" for n, name in zip(counts, names, strict=False))


def quotas(per_step: int, weights: list[tuple[int, float]]) -> list[int]:
    """How many of a step's questions each set of (size, weight) gives: at least one, the others by weight.

    Raises DataError for a set that is too small for its part, and for more sets than questions.
    """
    if per_step < len(weights):
        raise DataError(f"--questions-per-step {per_step} is less than the {len(weights)} data sets that are mixed")
    total = sum(weight for _, weight in weights)
    found = [1] * len(weights)
    for _ in range(per_step - len(weights)):
        lacking = [per_step * weight / total - count for (_, weight), count in zip(weights, found, strict=True)]
        found[lacking.index(max(lacking))] += 1
    for number, ((size, _), count) in enumerate(zip(weights, found, strict=True), start=1):
        if count > size:
            raise DataError(
                f"a step takes {count} questions from data set {number} of the mixture, which has {size}: lower its "
                f"weight or --questions-per-step ({per_step})"
            )
    return found
