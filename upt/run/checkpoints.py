"""Checkpoints of a run.

A checkpoint is a folder `step-000010` with the adapter, the optimizer, the scheduler, the random state and the step to
go on with. It is written whole under a temporary name and then renamed, so one that exists is complete, and it gives
back every tensor bit for bit.
"""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from upt.errors import ShardError

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
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=False)
    except Exception as error:  # of pickle, of zip files, of the disk
        fix = "remove that checkpoint to go on from the one before it"
        raise ShardError(f"{path}: its state cannot be read ({type(error).__name__}: {error}); {fix}") from error
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    random.setstate(state["random"]["python"])
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    return state["step"], state["seconds"]
