"""Checkpoints of a run.

A checkpoint is a folder `step-000010`:
    adapter/                 as PEFT writes it
    optimizer.safetensors    what AdamW keeps of every parameter: "0.exp_avg" and so on, by its place in the list
    state.json               all else: step, settings of the optimizer, schedule, seconds, random state
Nothing of it is a pickle: opening one runs no code of whoever wrote it. It is written whole under a temporary name and
then renamed, so one that exists is complete, and it gives back every tensor bit for bit.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from upt.errors import ShardError
from upt.files import publish

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
        kept = optimizer.state_dict()
        tensors = {f"{i}.{name}": value for i, of in kept["state"].items() for name, value in of.items()}
        save_file(tensors, draft / "optimizer.safetensors")
        publish(draft)
        state = {
            "step": step,
            "optimizer": kept["param_groups"],
            "schedule": schedule.state_dict(),
            "seconds": dict(seconds),
            "random": random_state(),
        }
        (draft / "state.json").write_text(json.dumps(state))
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
    if not (path / "state.json").exists() and (path / "state.pt").exists():
        raise ShardError(
            f"{path}/state.pt, of an earlier version, is a pickle, which can run code and is not opened: check out the "
            f"code that wrote it to go on, or train its adapter further, --init-adapter {path}/adapter --out ANOTHER"
        )
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        tensors = load_file(path / "optimizer.safetensors")
        kept: dict[int, dict] = {}
        for name, value in tensors.items():
            place, _, name = name.partition(".")
            kept.setdefault(int(place), {})[name] = value
        optimizer.load_state_dict({"state": kept, "param_groups": state["optimizer"]})
        schedule.load_state_dict(state["schedule"])
        set_random_state(state["random"])
        return state["step"], state["seconds"]
    except Exception as error:  # of JSON, safetensors, torch and the disk, which have no common parent
        fix = "remove that checkpoint to go on from the one before it"
        raise ShardError(f"{path}: its state cannot be read ({type(error).__name__}: {error}); {fix}") from error


def random_state() -> dict:
    """The state of Python's, NumPy's and torch's random generators, as JSON can hold it."""
    name, words, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, words.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }


def set_random_state(state: dict) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
