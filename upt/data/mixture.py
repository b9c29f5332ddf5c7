"""Several data sets as one: `a,b` has the questions of both, `a:3,b:1` three of a to one of b in every step.

Without weights every question of every set counts alike: an epoch is all of them in a new order. With weights each set
has its own epochs, and every step takes from each its part, in whole questions and at least one.

Held-out splits (`validation`, `test`) are those of the first set. A uid that an earlier set has is written `2:uid`
where the second set has it too.
"""

import os
import re
from dataclasses import replace

import data


def is_mixture(name: str) -> bool:
    """Whether a name stands for several data sets: commas in what is no path that exists."""
    return "," in name and not os.path.exists(os.path.expanduser(name))


def parts(name: str) -> list[tuple[str, float | None]]:
    """The sets of a mixture with their weights, None for all of them where none is given. Raises DataError."""
    pattern = re.compile(r"(.*?)(?::(-?\d*\.?\d+))?", re.DOTALL)  # a name and perhaps a number behind a colon
    found = [pattern.fullmatch(part.strip()).groups() for part in name.split(",")]
    weights = [float(weight) for _, weight in found if weight is not None]
    if not all(part for part, _ in found):
        raise data.DataError(f"{name!r}: a data set is missing beside a comma; write a,b or a:3,b:1")
    if 0 < len(weights) < len(found):
        raise data.DataError(f"{name!r}: give a weight to every data set (a:3,b:1), or to none (a,b)")
    if not all(weight > 0 for weight in weights):
        raise data.DataError(f"{name!r}: weights are above 0; leave out a set that is not wanted")
    return [(part, weight) for (part, _), weight in zip(found, weights or [None] * len(found), strict=True)]


def load(name: str, split: str, seed: int, limit: int | None) -> data.Questions:
    """The questions of a mixture; `limit` is for each set. Raises DataError as `data.load` does."""
    named = parts(name)
    if split != "train":
        return data.load(named[0][0], split, seed, limit)
    return mix([(data.load(part, split, seed, limit), weight) for part, weight in named])


def mix(sets: list[tuple[data.Questions, float | None]]) -> data.Questions:
    """The questions of several sets, one set after the other, with the weights that rollout.py draws them by."""
    rows, uids, seen = [], [], set()
    for number, (questions, _) in enumerate(sets, start=1):
        rows += [(questions, i) for i in range(len(questions))]
        uids += [f"{number}:{uid}" if uid in seen else uid for uid in questions.uids]
        seen.update(questions.uids)

    def read(k: int) -> data.Question:
        questions, i = rows[k]
        try:
            return replace(questions[i], uid=uids[k])
        except data.BadRow as bad:
            raise data.BadRow(uids[k], bad.reason) from bad

    every = [questions for questions, _ in sets]
    note = " + ".join(f"{len(q)} of {q.name}" + (f" ({q.note})" if q.note else "") for q in every)
    name, has_gold = ",".join(q.name for q in every), any(q.has_gold for q in every)
    mixed = data.Questions(name, every[0].split, uids, read, has_gold, note)
    if sets[0][1] is not None:
        mixed.weights = [(len(questions), weight) for questions, weight in sets]
    return mixed


def shares(questions: data.Questions, per_step: int) -> str:
    """What a step takes from each set, for the start of a run. Raises DataError as `quotas` does."""
    names = questions.name.split(",")
    counts = quotas(per_step, questions.weights)
    return "a step takes " + " + ".join(f"{n} of {name}" for n, name in zip(counts, names, strict=False))


def quotas(per_step: int, weights: list[tuple[int, float]]) -> list[int]:
    """How many of a step's questions each set of (size, weight) gives: at least one, the others by weight.

    Raises DataError for a set that is too small for its part, and for more sets than questions.
    """
    if per_step < len(weights):
        raise data.DataError(
            f"--questions-per-step {per_step} is less than the {len(weights)} data sets that are mixed"
        )
    total = sum(weight for _, weight in weights)
    found = [1] * len(weights)
    for _ in range(per_step - len(weights)):
        lacking = [per_step * weight / total - count for (_, weight), count in zip(weights, found, strict=True)]
        found[lacking.index(max(lacking))] += 1
    for number, ((size, _), count) in enumerate(zip(weights, found, strict=True), start=1):
        if count > size:
            raise data.DataError(
                f"a step takes {count} questions from data set {number} of the mixture, which has {size}: lower its "
                f"weight or --questions-per-step ({per_step})"
            )
    return found
