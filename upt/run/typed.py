"""What each script's Config is: its fields are of their types and in their ranges (upt/ranges.py), or it is refused.

At a shell the command line is read by type; in a notebook this is where a wrong name or value is found.
"""

from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from upt.errors import SettingError, suggest
from upt.ranges import outside

# What TRL, verl and transformers call it.
ELSEWHERE = {
    "lr": "learning-rate", "num-generations": "group-size", "n": "group-size", "per-device-train-batch-size":
    "questions-per-step", "batch-size": "questions-per-step", "train-batch-size": "questions-per-step", "max-steps":
    "steps", "num-train-steps": "steps", "beta": "kl-coef", "kl-loss-coef": "kl-coef", "epsilon": "clip-low",
    "epsilon-high": "clip-high", "max-completion-length": "max-new-tokens", "max-response-length": "max-new-tokens",
    "max-prompt-length": "max-prompt-tokens", "model-name-or-path": "model", "dataset-name": "data", "dataset": "data",
    "output-dir": "out", "save-steps": "save-every", "lora-r": "lora-rank", "loss-type": "aggregation", "reward-funcs":
    "reward", "resume-from-checkpoint": "resume", "adv-estimator": "advantage", "vllm-importance-sampling-correction":
    "rollout-correction", "vllm-importance-sampling-mode": "rollout-correction", "vllm-importance-sampling-cap":
    "rollout-cap", "vllm-importance-sampling-clip-max": "rollout-cap", "rollout-is": "rollout-correction",
    "rollout-is-threshold": "rollout-cap", "rollout-tokens": "slots", "importance-sampling-level": "ratio-level",
}  # fmt: skip
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    NoneType: "None",
}
PAIRS = (("min_pixels", "max_pixels"), ("min_share", "max_share"), ("min_agreement", "max_agreement"))


class Typed:
    """A Config's base class. Strings, paths and numbers of numpy's are taken for what they stand for."""

    def __new__(cls, *values, **settings):
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise SettingError(f"{name} is no setting{meant(name, known) or '; --help of the script lists them'}")
        return super().__new__(cls)

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise SettingError for a value that is not of its type or not in its range, with what it has to be."""
        hints = get_type_hints(type(self), include_extras=True)
        for f in fields(self):
            setattr(self, f.name, typed(f.name, getattr(self, f.name), hints[f.name]))
        for low, high in PAIRS:
            least, most = getattr(self, low, None), getattr(self, high, None)
            if None not in (least, most) and least > most:
                fix = "lower the one or raise the other"
                raise SettingError(f"{flag(low)} {least} is above {flag(high)} {most}: {fix}")


def flag(name: str) -> str:
    """A field's name as a flag of the command line."""
    return f"--{name.replace('_', '-')}"


def meant(name: str, known: list[str]) -> str:
    """ "; it is called learning_rate here", "; did you mean 'steps'?" or "": what a wrong name may stand for."""
    other = ELSEWHERE.get(name.strip("-").replace("_", "-"), "")
    other = flag(other) if name.startswith("--") else other.replace("-", "_")
    return f"; it is called {other} here" if other in known else suggest(name, known)


def typed(name: str, value, hint):
    """A setting as its annotation wants it. Raises SettingError for a value that is of none of the types there."""
    if get_origin(hint) is Annotated and get_origin(get_args(hint)[0]) in (Union, UnionType):  # of what is positional
        hint = get_args(hint)[0]
    annotated = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in annotated]
    found = convert(name, value, kinds)
    for kind in annotated:
        if found is not None and (words := outside(found, kind)):
            raise SettingError(f"{flag(name)} must be {words}, not {value!r}")
    return found


def convert(name: str, value, kinds: list):
    """A value as one of the bare types `kinds`."""
    if getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        value = value.item()
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    of_tuple = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
    if isinstance(value, bool) and bool not in kinds:
        pass
    elif isinstance(value, str | Path) and Path in kinds and str(value).strip():
        return Path(value).expanduser()
    elif isinstance(value, Path) and str in kinds:
        return str(value)
    elif isinstance(value, list | tuple) and of_tuple:
        return tuple(typed(name, one, of_tuple) for one in value)
    elif value in choices or isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type))):
        return value
    elif isinstance(value, int) and float in kinds:
        return value
    wanted = [*map(str, choices)]
    wanted += [WORDS.get(kind, "a list") for kind in kinds if get_origin(kind) is not Literal]
    near = suggest(value, choices) if isinstance(value, str) else ""
    if callable(value) and name in ("reward", "advantage"):
        near = f"; give your function a name, rewards.{name.upper()}S['mine'] = it, or write FILE.py:NAME"
    raise SettingError(f"{name} is {value!r}: expected {' or '.join(wanted)}{near}")
