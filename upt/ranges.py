"""The ranges that settings may lie in, by the words that a message has for them, and kinds of settings that have one.

A kind is an annotation: `steps: Count = 4` of a Config's field (upt/run/typed.py checks it) or of an inline setting of
a reward or an advantage (upt/groups/variants.py). Where this file is out of reach, write what a kind stands for:
`beta: Annotated[float, "above 0"] = 1.0`. NaN and infinities are in no range.
"""

import sys
from collections.abc import Callable
from typing import Annotated

RANGES: dict[str, Callable] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "0 (greedy) or at least 0.001": lambda x: x == 0 or x >= 0.001,
    "0 (off) or above 1": lambda x: x == 0 or x > 1,
    "from 0.001 to 0.999, or 1": lambda x: 0.001 <= x <= 0.999 or x == 1,
    "at most 1000": lambda x: x <= 1000,
    "at most 65536": lambda x: x <= 65536,
    "at most 1000000": lambda x: x <= 10**6,
    "at most 2^31 - 1": lambda x: x < 2**31,
    "from 0 to 2^63 - 1": lambda x: 0 <= x < 2**63,
    "a name or a path": lambda text: text.strip() != "",
    "one or more": lambda values: len(values) > 0,
}

Count = Annotated[int, "at least 1", "at most 2^31 - 1"]
Number = Annotated[int, "at least 0", "at most 2^31 - 1"]
Few = Annotated[int, "at least 1", "at most 65536"]  # of what each costs time or memory: samples of a question, a rank
Seed = Annotated[int, "from 0 to 2^63 - 1"]  # numpy takes none below 0, the sampling noise 64 bits
Amount = Annotated[float, "at least 0"]
Weight = Annotated[float, "at least 0", "at most 1000"]
Positive = Annotated[float, "above 0"]
Share = Annotated[float, "from 0 to 1"]
Rate = Annotated[float, "from 0 to 1"]  # of learning; above 1 it is 1e5 for 1e-5
Nucleus = Annotated[float, "above 0 and at most 1"]
Temperature = Annotated[float, "0 (greedy) or at least 0.001"]  # logits over less overflow
Name = Annotated[str, "a name or a path"]


def ranges_of(annotation) -> list[str]:
    """The ranges of an annotation, in words: a value has to lie in all of them."""
    marks = getattr(annotation, "__metadata__", ())
    return [mark for mark in marks if isinstance(mark, str) and mark in RANGES]


def range_of(annotation) -> str | None:
    """The same on one line; None where there is none."""
    return " and ".join(ranges_of(annotation)) or None


def outside(value, annotation) -> str | None:
    """What a value of the right type should have been, in words; None where it is in the annotation's ranges."""
    ranges = ranges_of(annotation)
    if ranges and isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        return "a finite number"
    return next((range for range in ranges if not RANGES[range](value)), None)
