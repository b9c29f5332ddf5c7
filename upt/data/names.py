"""What names stand for: data sets of the hub, splits, and several sets with commas between them.

`a,b` has the questions of both sets, `a:3,b:1` three of a to one of b in every step (mixture.py).
"""

import math
import os
import re

from upt.errors import DataError

EMBEDDED = ("shapes", "shapes-hard")  # drawn on the spot (shapes.py), for the embedded model
NAMED = {
    "geoqa": "leonardPKU/GEOQA_R1V_Train_8K",
    "geometry3k": "hiyouga/geometry3k",
    "mmr1": "MMR1/MMR1-Math-RL-Data-v0",
}
TRAIN, VALIDATION = ("train", "training"), ("validation", "valid", "val", "dev")
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": ("test", "testing", "eval", "evaluation", "testmini")}
ALIASES = {alias: split for split, aliases in SPLITS.items() for alias in aliases}


def is_mixture(name: str) -> bool:
    """Whether a name stands for several data sets: commas in what is no path that exists."""
    return "," in name and not os.path.exists(os.path.expanduser(name))


def parts(name: str) -> list[tuple[str, float | None]]:
    """The sets of a mixture with their weights, None for all of them where none is given. Raises DataError."""
    pattern = re.compile(r"(.*?)(?::(-?\d*\.?\d+))?", re.DOTALL)  # a name and perhaps a number behind a colon
    found = [pattern.fullmatch(part.strip()).groups() for part in name.split(",")]
    weights = [float(weight) for _, weight in found if weight is not None]
    if not all(part for part, _ in found):
        raise DataError(f"{name!r}: a data set is missing beside a comma; write a,b or a:3,b:1")
    if 0 < len(weights) < len(found):
        raise DataError(f"{name!r}: give a weight to every data set (a:3,b:1), or to none (a,b)")
    if not all(0 < weight < math.inf for weight in weights):
        raise DataError(f"{name!r}: weights are above 0; leave out a set that is not wanted")
    return [(part, weight) for (part, _), weight in zip(found, weights or [None] * len(found), strict=True)]
