"""Is a run still healthy? Signals that need no label, a rule that warns, and a choice of checkpoint by them.

Of the groups of one step, keys a, questions x:
    unanimous       share of the groups in which all responses agree
    answer_entropy  H(a), nats: how varied the answers are over all questions of the step
    information     H(a) - mean over x of H(a | x), nats: how much an answer says about its question, the mutual
                    information that RIM maximises (Krause et al., "Discriminative clustering by regularized
                    information maximization", NIPS 2010). Agreement raises it only as long as questions keep
                    different answers; a model that answers everything alike has 0.
Abstentions are no keys. Besides these, a step's metrics hold majority_share, entropy, length, abstention_share, kl.

The rule looks at means over the last WINDOW steps, once there are two windows, beside those of the run's first window:
    majority      majority_share >= 0.98: nothing is left to vote on
    entropy       token entropy under a tenth of the first window's
    answers       answer_entropy under 0.7 of the first window's: the same few answers to everything
    information   under 0.85 of the best window so far
    agreement     majority_share under the first window's by 0.05: groups come apart
    split         token entropy under 0.85 of the first window's and majority_share under it by 0.02: surer of each
                  token, and yet less agreed
    hollow        majority_share up by 0.15 or more since the first window, information by less than a fifth of that:
                  groups agree more and more, but their answers say no more about the questions
    abstentions   abstention_share 0.2 above the first window's
    length        under half or over twice the first window's
    kl            mean KL to the starting model over 0.5 nats a token (where it is measured)
Each is an alarm, and none is proof: a wrong majority that stays varied takes labels to see. The numbers were chosen on
102 runs of the embedded model, most of them without a KL term; how often they were right on others: docs/results.md.

Two alarms do not wait for windows:
    nonfinite     loss or gradient of an update were not finite, so that it was not made
    gap           logprob_gap_mean over GAP: the trainer gives a sampled token another probability than the sampler did
After NONFINITE of the first one after the other a run ends, with `Diverged`. The second is about the programs, not the
policy: it is for samples of the run's own, since shards may come from another policy.

GAP is above what others report of dense models in bf16 that are sampled by another engine, 0.005 to 0.04 nats
(huggingface/trl#6789, ServiceNow/Fast-LLM#525), and about where tests of NeMo RL fail, a mean exp(gap) of 1.05 or 1.1.
With this code it has not been measured on a GPU yet. In float32 on a CPU the mean is under 1e-6.
"""

import math
from collections import Counter
from collections.abc import Sequence

from upt.groups import votes

WINDOW = 5
NONFINITE = 5  # updates in a row
GAP = 0.1  # nats a token
SIGNALS = ("majority_share", "entropy", "answer_entropy", "information", "abstention_share", "length", "kl")


def signals(groups: Sequence[dict]) -> dict[str, float]:
    """unanimous, answer_entropy and information of the groups of one step."""
    found = [votes.counts(group) for group in groups]
    pooled = Counter()
    for c in found:
        pooled.update(c)
    within = math.fsum(_entropy(c) for c in found) / len(found)
    unanimous = sum(len(c) == 1 and not votes.abstentions(group) for c, group in zip(found, groups, strict=True))
    entropy = _entropy(pooled)
    return {
        "unanimous": unanimous / len(found),
        "answer_entropy": entropy,
        "information": max(0.0, entropy - within),
    }


def _entropy(counts: dict[str, int]) -> float:
    total = sum(counts.values())
    return -math.fsum(c / total * math.log(c / total) for c in counts.values()) if total else 0.0


class Watch:
    """Applies the rule to the metrics of a run, step by step; `rows` are the steps that were made before.

    `own`: the run samples its responses itself.
    """

    def __init__(self, rows: Sequence[dict] = (), own: bool = True):
        self.own = own
        self.rows: list[dict] = []  # of the present window
        self.seen = 0
        self.first: dict[str, float] = {}
        self.best = 0.0
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> list[str]:
        """Take in the metrics of one more step; the names of the alarms that they raise."""
        self.rows = [*self.rows[-WINDOW + 1 :], row]
        self.seen += 1
        now = window(self.rows)
        if self.seen == WINDOW:
            self.first = now
        if self.seen >= WINDOW:
            self.best = max(self.best, now["information"])
        at_once = ["nonfinite"] if row.get("nonfinite") else []
        at_once += ["gap"] if self.own and is_apart(row) else []
        if self.seen < 2 * WINDOW:
            return at_once
        first = self.first
        rise = now["majority_share"] - first["majority_share"]
        alarms = {
            "majority": now["majority_share"] >= 0.98,
            "entropy": now["entropy"] < 0.1 * first["entropy"],
            "answers": now["answer_entropy"] < 0.7 * first["answer_entropy"],
            "information": now["information"] < 0.85 * self.best,
            "agreement": rise < -0.05,
            "split": rise < -0.02 and now["entropy"] < 0.85 * first["entropy"],
            "hollow": rise >= 0.15 and now["information"] - first["information"] < 0.2 * rise,
            "abstentions": now["abstention_share"] > first["abstention_share"] + 0.2,
            "length": not 0.5 * first["length"] <= now["length"] <= 2 * first["length"],
            "kl": now.get("kl", 0.0) > 0.5,
        }
        return at_once + [name for name, raised in alarms.items() if raised]


def collapses(row: dict) -> list[str]:
    """A step's alarms that are about the policy: `gap` is about the programs."""
    return [name for name in row["alarms"] if name != "gap"]


def is_apart(row: dict) -> bool:
    """Whether the metrics of a step say that sampler and trainer are further from each other than rounding brings."""
    return (row.get("logprob_gap_mean") or 0.0) > GAP


def nonfinite_in_a_row(rows: Sequence[dict]) -> int:
    """How many of the last updates were not finite, one after the other."""
    return rows[-1].get("nonfinite_in_a_row", 0) if rows else 0


def has_diverged(rows: Sequence[dict]) -> bool:
    """Whether so many of them were not that the run stops."""
    return nonfinite_in_a_row(rows) >= NONFINITE


def window(rows: Sequence[dict]) -> dict[str, float]:
    """Means of the signals over some steps; one that none of them measured is left out."""
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in SIGNALS}
    return {name: math.fsum(seen) / len(seen) for name, seen in values.items() if seen}


def unhealthy_from(rows: Sequence[dict]) -> float:
    """The step from which on a run is not known to be healthy: that of the first alarm, else infinity.

    An update that was not finite was not made, so it counts only while it is followed by no other update.
    """
    found = min((row["step"] for row in rows if set(collapses(row)) - {"nonfinite"}), default=math.inf)
    for row in reversed(rows):
        if not row.get("nonfinite_in_a_row"):
            break
        found = min(found, row["step"])
    return found


def best_checkpoint(rows: Sequence[dict], steps: Sequence[int]) -> int:
    """Which of the checkpoints after `steps` steps to end with, by the metrics of all steps and without labels.

    The one of highest `information`, over the window of steps up to the one that it sampled (of the last checkpoint
    there is none: up to the one that led to it), among those from before the first alarm (among all, if there are none
    such). Ties go to the later one.
    """
    by_step = {row["step"]: row for row in rows}
    at = {n: n if n in by_step else n - 1 for n in steps}
    healthy = [n for n in steps if n < unhealthy_from(rows)] or steps

    def information(n: int) -> float:
        seen = [by_step[s] for s in range(at[n] - WINDOW + 1, at[n] + 1) if s in by_step]
        return window(seen).get("information", 0.0) if seen else 0.0

    return max(healthy, key=lambda n: (information(n), n))
