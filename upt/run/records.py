"""What a run has written, read again: the lines of its steps, and its answers to held-out questions."""

import json
from pathlib import Path

from upt.errors import ShardError, in_words
from upt.files import known_json
from upt.groups import shards

HELD_OUT = "held-out"  # folder with the pictures of held-out questions, and with what was answered during training
CURVES = {  # name in metrics.jsonl: what it is called above a curve
    "accuracy": "right samples",
    "majority_share": "majority share",
    "reward_mean": "reward",
    "entropy": "entropy, nats",
    "length": "length, tokens",
    "kl": "KL to the start, nats",
    "logprob_gap_mean": "|Δ log p| of sampler and trainer, nats",
    "signal": "groups with a signal",
    "abstention_share": "abstentions",
    "judge_score": "judge's score",
    "grad_norm": "gradient norm",
}
# Of a held-out question: whether its greedy answer was right before training, and after it.
MOVES = {"gained": (False, True), "lost": (True, False), "kept": (True, True), "missed": (False, False)}


def steps(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, one a step, without one that is being written or was cut off.

    Raises ShardError for a line that is no record of a step.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    fix = "mend the line, or move the file away: the log then begins where the run goes on"
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            rows += [_step(line)] if line.strip() else []
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ShardError(f"{path}: a line is no record of a step (line {i}: {in_words(error)}); {fix}") from error
    return rows


def _step(line: bytes) -> dict:
    row = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)  # what is not finite was not measured
    if type(row["step"]) is not int:
        raise ValueError(f"its step is {row['step']!r:.20}")
    return row


def shards_of(folder: Path, config: dict) -> tuple[Path, dict[int, Path], str]:
    """Where a run's groups lie, the shard of each step, and what is to be said of it.

    With --from-shards they were read from elsewhere, one shard a step, and stay there.
    """
    if not config.get("from_shards"):
        home = folder / "rollouts"
        return home, by_step(home), ""
    given = Path(config["from_shards"])  # relative to where the run was started, which may be above its folder
    home = next((at for at in (given, *(up / given for up in folder.parents)) if shards.list_shards(at)), given)
    found = dict(enumerate(shards.list_shards(home)[: config["steps"]]))
    if not found:
        return home, {}, f"The groups of this run are those of {given}, which is not there any more."
    said = "rewards and advantages are those that it holds; the run may have given others."
    return home, found, f"The groups of this run were read from {given}; {said}"


def by_step(folder: Path) -> dict[int, Path]:
    """The shards of a folder by step."""
    return {int(path.stem.removeprefix("step-")): path for path in shards.list_shards(folder)}


def answers(path: Path) -> dict[str, dict]:
    """The rows of held-out scores by uid, each with its `responses`, the greedy one first.

    None of a file that is not there, or from before answers were kept.
    """
    return {row["uid"]: row for row in (known_json(path) or {}).get("rows", ()) if row.get("responses")}


def move(before: dict, after: dict) -> str | None:
    """What became of a question's greedy answer, a name of MOVES; None without gold."""
    verdicts = before["responses"][0]["correct"], after["responses"][0]["correct"]
    return next((name for name, of in MOVES.items() if of == verdicts), None)
