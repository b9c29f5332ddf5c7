"""What a run logs of its steps, and the time that it took."""

import json
import math
import resource
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.advantage import mean_of
from upt.answers import answer_key
from upt.files import write_whole, writing
from upt.groups.votes import abstentions, distinct, keys_of, majority_share
from upt.run import health, records


class Clock:
    """Seconds spent in each stage: `with clock("rollout"): …`. Those of a stage inside another count there alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start - inside

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        return {stage: s - earlier.get(stage, 0.0) for stage, s in self.seconds.items() if s > earlier.get(stage, 0.0)}


def peak_memory_gib() -> float:
    """Peak memory so far, in GiB: of the GPU where there is one, else of the process."""
    import torch  # here: stages that load no model use this file, too

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """metrics.jsonl, one line a step. Lines of steps that a resumed run does again are dropped first.

    `own`: the run samples its responses itself, so that sampler and trainer have to agree. `writes`: this process does.
    `tell(row, groups)` is called with every line after it is written.
    """

    def __init__(
        self, path: Path, start: int, own: bool = True, writes: bool = True, tell: Callable = lambda row, groups: None
    ):
        self.path, self.writes, self.tell = path, writes, tell
        self.rows = [row for row in records.steps(path.parent) if row["step"] < start]
        if writes:
            write_whole(path, [f"{json.dumps(row)}\n".encode() for row in self.rows])
        self.watch = health.Watch([row for row in self.rows if row.get("groups")], own)

    def leave_out(self, step: int, extra: dict) -> None:
        """Append the line of a step none of whose questions could be used: it has no group."""
        bad = health.nonfinite_in_a_row(self.rows)
        row = {"step": step, "groups": 0, "nonfinite_in_a_row": bad} | extra | {"alarms": []}
        self._append(row, [])

    def write(self, step: int, groups: list[dict], update: dict, seconds: dict, extra: dict) -> str:
        """Append the metrics of a step and return its status line."""
        responses = [response for group in groups for response in group["responses"]]
        tokens = sum(len(r["token_ids"]) for r in responses)
        row = {
            "step": step,
            **summary(groups),
            "entropy": sum(r["entropy"] for r in responses) / len(responses),
            "self_certainty": sum(r["self_certainty"] for r in responses) / len(responses),
            "length": tokens / len(responses),
            "cutoff_share": sum(r["finish"] == "length" for r in responses) / len(responses),
            **health.signals(groups),
            **judged(responses),
            **update,
            "tokens_per_second": tokens / seconds["rollout"] if "rollout" in seconds else None,
            "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(),
            **extra,
        }
        row |= graded([group for group in groups if group["gold"] is not None])  # a diagnostic, never trained on
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row["alarms"] = self.watch.add(row)
        self._append(row, groups)
        return status(row)

    def _append(self, row: dict, groups: list[dict]) -> None:
        self.rows.append(row)
        if not self.writes:
            return
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.tell(row, groups)


def judged(responses: list[dict]) -> dict[str, float]:
    """Mean score of the judgements that could be read, and how many could not; nothing where nothing was judged."""
    verdicts = [response["judge"] for response in responses if "judge" in response]
    scores = [verdict["score"] for verdict in verdicts if verdict["score"] is not None]
    mean = sum(scores) / len(scores) if scores else None
    return {"judge_score": mean, "unparsed": sum(not verdict["parsed"] for verdict in verdicts)} if verdicts else {}


def graded(groups: list[dict]) -> dict[str, float]:
    """`accuracy`, the share of responses whose key is that of gold, and `pass`, the share of groups with such a one.

    An abstention is never right. Without groups there is neither.
    """
    if not groups:
        return {}
    golds = [(answer_key(group["gold"], group["choices"]), group["responses"]) for group in groups]
    right = [[r["key"] is not None and r["key"] == gold for r in responses] for gold, responses in golds]
    return {"accuracy": sum(map(sum, right)) / sum(map(len, right)), "pass": sum(map(any, right)) / len(right)}


REMARKS = {  # by what counts, and in words what was counted
    "left_out": ("LEFT OUT", "question", ""),
    "nonfinite": ("NONFINITE", "update", ": not made"),
    "no_signal": ("no signal for", "update", ": not made"),
    "skipped": ("skipped", "group", ""),
    "unparsed": ("UNPARSED", "judgement", ""),
}


def status(row: dict) -> str:
    """The status line of a step."""
    parts = [
        f"reward {row['reward_mean']:.3f}",
        f"majority {row['majority_share']:.3f}",
        f"entropy {row['entropy']:.3f}",
        f"length {row['length']:.1f}",
        f"clipped {row['clip_low'] + row['clip_high']:.3f}",
    ]
    if row.get("judge_score") is not None:
        parts.append(f"judge {row['judge_score']:.3f}")
    parts += [f"{name} {100 * value:.1f}" for name, value in row.get("benchmarks", {}).items()]
    held_out = row.get("held_out", {})
    parts += [f"held-out {name} {100 * held_out[name]:.1f}" for name in ("mean", "greedy") if name in held_out]
    if row.get("kl") is not None:
        parts.append(f"kl {row['kl']:.4f}")
    if row.get("logprob_gap_mean") is not None:
        parts.append(f"gap {row['logprob_gap_mean']:.1e} (max {row['logprob_gap_max']:.1e})")
    if row["tokens_per_second"] is not None:
        parts.append(f"{row['tokens_per_second']:.0f} tok/s")
    parts.append(f"{row['peak_memory_gib']:.1f} GiB")
    for name, (before, what, after) in REMARKS.items():
        if count := row.get(name):
            parts.append(f"{before} {count} {what}{'s' * (count != 1)}{after}")
    if "gap" in row["alarms"]:
        parts.append("GAP: sampler and trainer disagree")
    elif health.is_apart(row):
        parts.append("off-policy samples")
    if alarms := [name for name in row["alarms"] if name not in ("nonfinite", "gap")]:  # which have words of their own
        parts.append(f"COLLAPSE? {' '.join(alarms)}")
    return ", ".join(parts)


def summary(groups: Iterable[dict]) -> dict[str, float]:
    """What the scores of some groups look like, in one pass over them and without labels.

    groups, skipped, responses (counts); signal: share of groups whose rewards are not all equal; majority_share and
    distinct: means over groups; abstention_share: of all responses; reward_mean and reward_std (population) over the
    responses of groups that were not skipped, 0 if there are none.
    """
    n = skipped = responses = signal = different = abstained = 0
    shares, r = array("d"), array("d")
    for n, group in enumerate(groups, 1):  # noqa: B007
        row = [response["reward"] for response in group["responses"]]
        keys = keys_of(group)
        responses += len(keys)
        signal += min(row) != max(row)
        different += distinct(keys)
        abstained += abstentions(keys)
        shares.append(majority_share(keys))
        if group.get("skipped"):
            skipped += 1
        else:
            r.extend(row)
    if n == 0:
        raise ValueError("no groups to sum up")
    mu = mean_of(r) if r else 0.0
    return {
        "groups": n,
        "skipped": skipped,
        "responses": responses,
        "signal": signal / n,
        "majority_share": math.fsum(shares) / n,
        "distinct": different / n,
        "abstention_share": abstained / responses,
        "reward_mean": mu,
        "reward_std": math.sqrt(math.fsum((r_i - mu) ** 2 for r_i in r) / max(len(r), 1)),
    }
