"""Statistics of many groups at once, on flat arrays of their responses; intervals over seeds; tables of such numbers.

r and A are float arrays, `right` is a boolean one, all of shape (N,) with the responses in order of their groups.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from upt.files import write_whole

FEW = 30  # questions below which a row of a table is marked
FEW_NOTE = f"* fewer than {FEW}: chance decides as much as the model"
TIE = 1e-12  # means closer than this are equal but for rounding


class Groups:
    """Sums and the like over the responses of each group, all groups at once."""

    def __init__(self, sizes: np.ndarray):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.index = np.repeat(np.arange(len(self.sizes)), self.sizes)  # the group of each response

    def sum(self, x: np.ndarray) -> np.ndarray:
        return np.bincount(self.index, x, len(self.sizes))

    def mean(self, x: np.ndarray) -> np.ndarray:
        return self.sum(x) / self.sizes

    def max(self, x: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(x, self.starts) if len(x) else x

    def differ(self, x: np.ndarray) -> np.ndarray:
        """Whether the values of a group are not all the same."""
        return self.max(x) != -self.max(-x)

    def only(self, mask: np.ndarray) -> tuple["Groups", np.ndarray]:
        """These groups alone, and the mask of their responses."""
        return Groups(self.sizes[mask]), mask[self.index]


def average(x: np.ndarray) -> float | None:
    """The mean; None, and not NaN, of nothing."""
    return float(np.mean(x)) if len(x) else None


def auc(r: np.ndarray, right: np.ndarray, groups: Groups) -> np.ndarray:
    """Of each group with right and wrong responses: P(r_right > r_wrong) + P(r_right = r_wrong) / 2."""
    from scipy.stats import rankdata  # here: scipy takes half a second to import

    level = np.unique(r, return_inverse=True)[1]
    # One ranking of (group, reward) holds those of all groups, each shifted by the responses before it.
    rank = rankdata(groups.index * (level.max(initial=0) + 1) + level) - groups.starts[groups.index]
    n = groups.sum(right)
    pairs = n * (groups.sizes - n)
    return ((groups.sum(rank * right) - n * (n + 1) / 2)[pairs > 0]) / pairs[pairs > 0]


def top_correctness(r: np.ndarray, right: np.ndarray, groups: Groups) -> np.ndarray:
    """Of each group: the share of right ones among the responses of the highest reward."""
    top = r == groups.max(r)[groups.index]
    return groups.sum(top & right) / groups.sum(top)


def reward_accuracy(r: np.ndarray, right: np.ndarray, groups: Groups, overall: float) -> float | None:
    """Share of responses that the reward takes for what they are.

    It takes a response for right if its reward is above the group's mean or, in a group of equal rewards, above
    `overall`, the mean over all groups. For 0/1 rewards this is TTRL's reward accuracy (2504.16084): [r = correct].
    """
    bar = np.where(groups.differ(r), groups.mean(r), overall)[groups.index]
    return average((r > bar + TIE) == right)


def direction(A: np.ndarray, right: np.ndarray, groups: Groups) -> np.ndarray:
    """Of each group with right and wrong responses, the sign of (mean A of the right - mean A of the wrong)."""
    n = groups.sum(right)
    mixed = (n > 0) & (n < groups.sizes)
    right_sum = groups.sum(A * right)[mixed]
    wrong_sum = groups.sum(A * ~right)[mixed]
    gap = right_sum / n[mixed] - wrong_sum / (groups.sizes - n)[mixed]
    return np.where(np.abs(gap) <= TIE, 0, np.sign(gap))


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """The correlation; None where one of the two is constant or there is nothing."""
    if not len(x) or np.ptp(x) <= TIE or np.ptp(y) <= TIE:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def t_interval(x) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % t-interval over independent runs; None for the latter of a single run."""
    from scipy.stats import t as student

    x = np.asarray(x, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    return float(x.mean()), float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))


def counted(n: int) -> str:
    """How many questions a row of a table is of, marked where they are few; FEW_NOTE says what the mark means."""
    return f"{n}{'*' * (n < FEW)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first being its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def write_csv(path: Path, rows: Sequence[Sequence]) -> None:
    """Write rows whole, the first being the head."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # None becomes an empty field
    write_whole(path, [text.getvalue().encode()])
