"""The bookkeeping of a run: its checkpoints, its metrics, the time it took and how it is stopped.

A checkpoint is a folder `step-000010` with the adapter, the optimizer, the scheduler, the random state and the step to
go on with. It is written whole under a temporary name and then renamed, so one that exists is complete, and it gives
back every tensor bit for bit.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import health
import rewards
from answers import answer_key
from shards import write_whole

CHECKPOINT = re.compile(r"step-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint goes on with: how many were made before it."""
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def save_checkpoint(folder: Path, step: int, policy, optimizer, schedule, seconds: dict[str, float]) -> None:
    """Write the state as it is before `step`, unless that was done already."""
    path = folder / f"step-{step:06d}"
    if not path.exists():
        draft = folder / f".{path.name}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        policy.save(draft / "adapter")
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "seconds": dict(seconds),
            "random": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        }
        torch.save(state, draft / "state.pt")
        for file in draft.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.replace(draft, path)


def prune_checkpoints(folder: Path, keep: int, planned: Callable[[int], bool], healthy: int) -> None:
    """Remove all but the latest `keep` checkpoints and the latest one of fewer than `healthy` steps.

    `planned(step)` is false of those that an interruption left; they go as soon as they are not the latest, so that
    what is kept does not depend on interruptions.
    """
    found = checkpoints(folder)
    regular = [path for path in found if planned(step_of(path))]
    spared = [path for path in regular if step_of(path) < healthy][-1:]
    for path in found:
        if path not in {*regular[-max(1, keep) :], *spared, found[-1]}:
            shutil.rmtree(path)


def load_checkpoint(path: Path, optimizer, schedule) -> tuple[int, dict[str, float]]:
    """Put optimizer, scheduler and random generators back; the step to go on with and the seconds spent before it.

    The adapter is opened apart from it, by `Policy.load_adapter(path / "adapter")`.
    """
    # The file is this run's own and holds Python's random state, which is more than bare tensors.
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=False)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    random.setstate(state["random"]["python"])
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    return state["step"], state["seconds"]


class Stopped(Exception):
    """The run was asked to stop; the message is the signal's name."""


@contextmanager
def stop_on_signal() -> Iterator[Callable]:
    """Inside, SIGINT and SIGTERM ask the run to stop; a second one stops it at once.

    Yields a function that raises `Stopped` once a signal has come; call it where stopping is safe. Off the main thread,
    where Python handles no signals, it never raises.
    """
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("stopping at the next safe point; once more to stop at once", file=sys.stderr)

    def check(*_) -> None:
        if asked:
            raise Stopped(signal.Signals(asked[0]).name)

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, ask) for number in handled]
    try:
        yield check
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)


class Clock:
    """Seconds spent in each stage: `with clock("rollout"): …`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        return {stage: s - earlier.get(stage, 0.0) for stage, s in self.seconds.items() if s > earlier.get(stage, 0.0)}


def peak_memory_gib() -> float:
    """Peak memory so far, in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """metrics.jsonl, one line a step. Lines of steps that a resumed run does again are dropped first."""

    def __init__(self, path: Path, start: int):
        self.path = path
        # What follows the last line break was cut off when a run was killed; its step is done again.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        self.rows = [row for line in lines if (row := json.loads(line))["step"] < start]
        write_whole(path, [f"{json.dumps(row)}\n".encode() for row in self.rows])
        self.watch = health.Watch(self.rows)

    def write(self, step: int, groups: list[dict], update: dict, seconds: dict, extra: dict) -> str:
        """Append the metrics of a step and return its status line."""
        responses = [response for group in groups for response in group["responses"]]
        tokens = sum(len(r["token_ids"]) for r in responses)
        row = {
            "step": step,
            **rewards.summary(groups),
            "entropy": sum(r["entropy"] for r in responses) / len(responses),
            "self_certainty": sum(r["self_certainty"] for r in responses) / len(responses),
            "length": tokens / len(responses),
            "cutoff_share": sum(r["finish"] == "length" for r in responses) / len(responses),
            **health.signals(groups),
            **judged(responses),
            **update,
            **extra,
            "tokens_per_second": tokens / seconds["rollout"] if "rollout" in seconds else None,
            "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(),
        }
        if all(group["gold"] is not None for group in groups):  # a diagnostic, never trained on
            row["accuracy"] = accuracy(groups)
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row["alarms"] = self.watch.add(row)
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return status(row)


def judged(responses: list[dict]) -> dict[str, float]:
    """Mean score of the judgements that could be read, and how many could not; nothing where nothing was judged."""
    verdicts = [response["judge"] for response in responses if "judge" in response]
    scores = [verdict["score"] for verdict in verdicts if verdict["score"] is not None]
    mean = sum(scores) / len(scores) if scores else None
    return {"judge_score": mean, "unparsed": sum(not verdict["parsed"] for verdict in verdicts)} if verdicts else {}


def accuracy(groups: list[dict]) -> float:
    """Share of responses whose key is that of their group's gold. An abstention is never right."""
    golds = [(answer_key(group["gold"], group["choices"]), group["responses"]) for group in groups]
    right = [r["key"] is not None and r["key"] == gold for gold, responses in golds for r in responses]
    return sum(right) / len(right)


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
    if row.get("kl") is not None:
        parts.append(f"kl {row['kl']:.4f}")
    if row["tokens_per_second"] is not None:
        parts.append(f"{row['tokens_per_second']:.0f} tok/s")
    parts.append(f"{row['peak_memory_gib']:.1f} GiB")
    parts += [
        f"{name} {row[key]}"
        for name, key in (
            ("LEFT OUT", "left_out"),
            ("NONFINITE", "nonfinite"),
            ("no signal", "no_signal"),
            ("skipped", "skipped"),
            ("UNPARSED", "unparsed"),
        )
        if row.get(key)
    ]
    if row["alarms"]:
        parts.append(f"COLLAPSE? {' '.join(row['alarms'])}")
    return ", ".join(parts)
