"""What a run has written, read again: the lines of its steps, and its answers to held-out questions."""

import json
from pathlib import Path

from upt.errors import ShardError, in_words
from upt.files import known_json

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
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    fix = "mend the line, or move the file away: the log then begins where the run goes on"
    try:
        rows = [json.loads(line) for line in lines if line]
        for row in rows:
            int(row["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path}: a line is no record of a step ({in_words(error)}); {fix}") from error
    return rows


def answers(path: Path) -> dict[str, dict]:
    """The rows of held-out scores by uid, each with its `responses`, the greedy one first.

    None of a file that is not there, or from before answers were kept.
    """
    return {row["uid"]: row for row in (known_json(path) or {}).get("rows", ()) if row.get("responses")}


def move(before: dict, after: dict) -> str | None:
    """What became of a question's greedy answer, a name of MOVES; None without gold."""
    verdicts = before["responses"][0]["correct"], after["responses"][0]["correct"]
    return next((name for name, of in MOVES.items() if of == verdicts), None)
