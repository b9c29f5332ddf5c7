"""Reward variants on the same saved groups: what they would reward, and how well that tells right from wrong.

COLUMNS below defines each figure. A response is right if its key is that of gold; groups without gold stay out of the
diagnostics and are counted. Shards are streamed; of a response only numbers are kept.
"""

import io
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upt.answers import answer_key
from upt.errors import ShardError
from upt.files import write_whole
from upt.groups import shards
from upt.groups.stats import (
    TIE,
    Groups,
    auc,
    average,
    direction,
    markdown,
    pearson,
    reward_accuracy,
    top_correctness,
    write_csv,
)
from upt.groups.votes import abstentions, counts, majority_key
from upt.run import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 8  # of p(m) in the figure; for 8 responses each value of p(m) is its own bin

# --- what is read -----------------------------------------------------------------------------------------------------


class Votes:
    """Of each group the vote and, where there is gold, what is right; arrays once all groups are in."""

    def __init__(self):
        self.sizes, self.share, self.unique, self.vote = array("l"), array("d"), array("b"), array("d")
        self.graded, self.right, self.of_majority = array("b"), array("b"), array("b")
        self.abstained = 0

    def add(self, group: dict) -> None:
        keys = [response["key"] for response in group["responses"]]
        graded = group["gold"] is not None
        gold = answer_key(group["gold"], group["choices"]) if graded else None
        count, m = counts(keys), majority_key(keys)
        most = max(count.values(), default=0)
        tied = [key == gold for key, n in count.items() if n == most]
        self.sizes.append(len(keys))
        self.share.append(most / len(keys))
        self.unique.append(m is not None)
        self.vote.append(sum(tied) / len(tied) if tied else 0.0)
        self.graded.append(graded)
        self.right.extend([key is not None and key == gold for key in keys])
        self.of_majority.extend([key is not None and key == m for key in keys])
        self.abstained += abstentions(keys)

    def close(self) -> None:
        self.groups = Groups(np.array(self.sizes))
        self.share, self.vote = np.array(self.share), np.array(self.vote)
        for name in ("unique", "graded", "right", "of_majority"):
            setattr(self, name, np.array(getattr(self, name), dtype=bool))

    def spurious(self, confident: float) -> np.ndarray:
        """Groups in which a majority of at least this share is wrong."""
        return self.graded & self.unique & (self.share >= confident - TIE) & (self.vote == 0)

    def summary(self, confident: float) -> dict:
        """What the data are like, whatever the reward: counts, and shares from 0 to 1."""
        groups, keep = self.groups.only(self.graded)
        right = groups.sum(self.right[keep])
        return {
            "groups": len(self.groups.sizes),
            "responses": int(self.groups.sizes.sum()),
            "without gold": int((~self.graded).sum()),
            "majority share": float(self.share.mean()),
            "abstentions": self.abstained / int(self.groups.sizes.sum()),
            "right responses": average(self.right[keep]),
            "right majorities": average(self.vote[self.graded]),
            "mixed groups": average((right > 0) & (right < groups.sizes)),
            "spurious majorities": average(self.spurious(confident)[self.graded]),
        }


SUMMARY = {
    "without gold": "groups left out of all that follows `abstentions` and of the diagnostics",
    "majority share": "p(m), the share of the most frequent answer, mean over groups",
    "abstentions": "responses without an answer",
    "right majorities": "groups whose most frequent answer is right, tied answers sharing the vote",
    "mixed groups": "groups with right and wrong responses",
    "spurious majorities": "groups whose majority is wrong and has p(m) >= `--confident`",
}


class Scores:
    """Rewards and advantages of one variant, called `label`. A skipped group has zeros.

    `reward_of` takes a group and returns G rewards, or None to skip it; `advantage_of` turns them into advantages.
    """

    def __init__(
        self,
        label: str,
        reward_of: Callable,
        advantage_of: Callable,
        needs_judge: bool = False,
        needs_gold: bool = False,
        needs_view: bool = False,
    ):
        self.label, self.reward_of, self.advantage_of = label, reward_of, advantage_of
        self.needs_judge, self.needs_gold, self.needs_view = needs_judge, needs_gold, needs_view
        self.r, self.A, self.skipped = array("d"), array("d"), array("b")

    def lacks(self, group: dict) -> str | None:
        """What the group does not have and the variant needs, and what to do about it."""
        if self.needs_judge and not all("judge" in response for response in group["responses"]):
            return "a judge's scores; make them with `python judge.py --rollouts DIR --out JUDGED` and compare on those"
        if self.needs_gold and group["gold"] is None:
            return "gold answers; sample from data that have them, or leave this variant out"
        if self.needs_view and group["image"] is not None and shards.view_of(group) is None:
            return "two views of the picture; sample with `--view faded`, or leave this variant out"
        return None

    def add(self, group: dict) -> None:
        r = self.reward_of(group)
        self.skipped.append(r is None)
        nothing = [0.0] * len(group["responses"])
        self.r.extend(nothing if r is None else r)
        self.A.extend(nothing if r is None else self.advantage_of(r))

    def close(self) -> None:
        self.r, self.A, self.skipped = np.array(self.r), np.array(self.A), np.array(self.skipped, dtype=bool)


def read(folder: Path, scores: list[Scores], strict: bool) -> tuple[Votes, list[Scores], dict[str, float]]:
    """One pass over the shards: the votes, the scores, and the seconds spent on reading and on scoring.

    A variant that a group cannot serve is an error if `strict`, else it is left out and named.
    """
    votes, seconds = Votes(), {"reading": 0.0, "scoring": 0.0}
    clock = time.perf_counter()
    for group in progress.bar(shards.ShardReader(folder), desc="scoring", unit="group"):
        begun = time.perf_counter()
        seconds["reading"] += begun - clock
        for score in [*scores]:
            if missing := score.lacks(group):
                text = f"{score.label} needs {missing} (group {group['uid']} of {folder})"
                if strict:
                    raise ShardError(text)
                print(f"left out: {text}", file=sys.stderr)
                scores = [other for other in scores if other is not score]
        votes.add(group)
        for score in scores:
            score.add(group)
        clock = time.perf_counter()
        seconds["scoring"] += clock - begun
    for part in (votes, *scores):
        part.close()
    return votes, scores, seconds


# --- what is reported -------------------------------------------------------------------------------------------------

COLUMNS = {  # name: (factor when printed, 100 for a percentage; definition)
    "signal": (100, "groups that are not skipped and whose rewards differ"),
    "skipped": (100, "groups that the variant skips; they stay out of what follows but for `to spurious`"),
    "mean": (1, "of the rewards of all responses"),
    "std": (1, "of the rewards of all responses"),
    "label acc": (100, "pseudo-label accuracy: right ones among the responses of the highest reward; in a group"
     " equal rewards all responses have it, so there it is what a draw would get"),
    "label acc, signal": (100, "the same over groups with signal, the only ones that train"),
    "reward acc": (100, "reward accuracy: responses with [r above the group's mean] = [right]; in a group of equal "
     "rewards the mean over all responses takes its place, which for 0/1 rewards gives [r = right]"),
    "AUC": (1, "probability that a right response has a higher reward than a wrong one, all responses pooled"),
    "AUC in group": (1, "the same within each group that has right and wrong responses, mean over groups"),
    "right way": (100, "groups with right and wrong responses whose mean advantage is higher for the right ones"),
    "no way": (100, "such groups in which the two means are equal"),
    "to spurious": (100, "groups, skipped ones too, where a spurious majority has more than the mean advantage"),
}  # fmt: skip
UNGRADED = ("signal", "skipped", "mean", "std")


def statistics(score: Scores, votes: Votes, confident: float) -> dict[str, float | None]:
    """One value for each of COLUMNS; those that need gold are None without it."""
    groups, keep = votes.groups.only(~score.skipped)
    r = score.r[keep]
    overall = average(r)
    row = dict.fromkeys(COLUMNS) | {
        "signal": float(groups.differ(r).sum() / len(score.skipped)),
        "skipped": float(score.skipped.mean()),
        "mean": overall,
        "std": float(r.std()) if len(r) else None,
    }
    groups, keep = votes.groups.only(votes.graded & ~score.skipped)
    if not len(groups.sizes):
        return row
    r, A, right = score.r[keep], score.A[keep], votes.right[keep]
    top, way = top_correctness(r, right, groups), direction(A, right, groups)
    # The majority is pushed up if its advantage is above the group's mean; its members can differ under some rewards.
    above = votes.groups.sum((score.A - votes.groups.mean(score.A)[votes.groups.index]) * votes.of_majority) > TIE
    return row | {
        "label acc": average(top),
        "label acc, signal": average(top[groups.differ(r)]),
        "reward acc": reward_accuracy(r, right, groups, overall),
        "AUC": average(auc(r, right, Groups([len(r)]))),
        "AUC in group": average(auc(r, right, groups)),
        "right way": average(way > 0),
        "no way": average(way == 0),
        "to spurious": average((votes.spurious(confident) & above)[votes.graded]),
    }


def correlations(scores: list[Scores], groups: Groups) -> dict[str, list[list[float | None]]]:
    """Pearson matrices over responses, {"reward": …, "advantage": …}.

    Rewards: over the groups that both variants score. Advantages, less the group's mean: over all groups, skipped ones
    with their zeros, since that is what an update sees.
    """
    centred = [score.A - groups.mean(score.A)[groups.index] for score in scores]
    kept = [~score.skipped[groups.index] for score in scores]
    both = [[a & b for b in kept] for a in kept]
    return {
        "reward": [
            [pearson(a.r[both[i][j]], b.r[both[i][j]]) for j, b in enumerate(scores)] for i, a in enumerate(scores)
        ],
        "advantage": [[pearson(a, b) for b in centred] for a in centred],
    }


def cell(value: float | None, factor: float = 1) -> str:
    return "–" if value is None else f"{value:.3f}" if factor == 1 else f"{factor * value:.1f}"


def report(summary: dict, table: dict[str, dict], matrices: dict) -> tuple[str, str]:
    """The main table and the whole report as Markdown."""
    columns = [name for name in COLUMNS if name in UNGRADED or summary["without gold"] < summary["groups"]]
    rows = [[label, *(cell(row[name], COLUMNS[name][0]) for name in columns)] for label, row in table.items()]
    heads = [f"{name} %" if COLUMNS[name][0] == 100 else name for name in columns]
    main_table = markdown([["reward variant", *heads], *rows])
    facts = [
        [name, str(value) if isinstance(value, int) else f"{cell(value, 100)} %", SUMMARY.get(name, "")]
        for name, value in summary.items()
        if value is not None
    ]
    parts = ["# Reward variants on the same responses", main_table]
    parts.append("\n".join(f"- **{name}**: {COLUMNS[name][1]}" for name in columns))
    parts += ["## The responses", markdown([["", "", ""], *facts])]
    for of, note in (
        ("reward", "responses of groups that both variants score"),
        ("advantage", "less the group's mean; all responses, those of skipped groups with 0"),
    ):
        rows = [[label, *map(cell, row)] for label, row in zip(table, matrices[of], strict=True)]
        parts += [f"## Correlation of the {of}s", f"Pearson, {note}.", markdown([["", *table], *rows])]
    return main_table, "\n\n".join(parts) + "\n"


def figure(scores: list[Scores], votes: Votes) -> "Figure":
    """Counts by p(m), then for each variant the mean reward of right and of wrong responses by p(m)."""
    from matplotlib.figure import Figure

    index = votes.groups.index
    bins = np.clip(np.ceil(votes.share * BINS - TIE).astype(int) - 1, 0, BINS - 1)[index]
    parts = {"right": votes.graded[index] & votes.right, "wrong": votes.graded[index] & ~votes.right}
    parts |= {} if votes.graded.all() else {"without gold": ~votes.graded[index]}
    colours = {"right": "tab:green", "wrong": "tab:red", "without gold": "tab:gray"}
    columns = min(4, len(scores) + 1)
    lines = -(-(len(scores) + 1) // columns)
    page = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    axes = page.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    x, floor = (np.arange(BINS) + 1) / BINS, np.zeros(BINS)
    for name, part in parts.items():
        count = np.bincount(bins[part], minlength=BINS)
        axes[0].bar(x, count, 0.8 / BINS, floor, color=colours[name], label=name)
        floor = floor + count
    axes[0].set_title("responses", fontsize=9)
    axes[0].legend(fontsize=8)
    for axis, score in zip(axes[1:], scores):
        for name, part in parts.items():
            part = part & ~score.skipped[index]
            count = np.bincount(bins[part], minlength=BINS)
            some = count > 0
            total = np.bincount(bins[part], score.r[part], BINS)
            axis.plot(x[some], total[some] / count[some], "o-", ms=3, color=colours[name])
        axis.set_title(score.label[:48], fontsize=9)
    for axis in axes[: len(scores) + 1]:
        axis.grid(alpha=0.3)
    for axis in axes[len(scores) + 1 :]:
        axis.axis("off")
    page.supxlabel(f"p(m), upper end of {BINS} bins", fontsize=9)
    page.supylabel("mean reward", fontsize=9)
    return page


def write(folder: Path, votes: Votes, scores: list[Scores], confident: float) -> tuple[str, dict]:
    """Write the tables and the figure to `folder`; returns the main table and all numbers."""
    summary = votes.summary(confident)
    table = {score.label: statistics(score, votes, confident) for score in scores}
    matrices = correlations(scores, votes.groups)
    main_table, text = report(summary, table, matrices)
    write_whole(folder / "variants.md", [text.encode()])
    write_csv(folder / "variants.csv", [["variant", *COLUMNS], *([v, *row.values()] for v, row in table.items())])
    rows = [[of, v, *row] for of, matrix in matrices.items() for v, row in zip(table, matrix, strict=True)]
    write_csv(folder / "correlation.csv", [["of", "variant", *table], *rows])
    picture = io.BytesIO()
    figure(scores, votes).savefig(picture, format="png", dpi=110, metadata={"Software": None})
    write_whole(folder / "reward-by-share.png", [picture.getvalue()])
    return main_table, {"data": summary, "variants": table, "correlation": matrices}
