"""Errors that a user can mend. A script prints them in one line and exits with 2; a notebook sees them raised."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

NEAR = 0.65  # of difflib's ratio, from which a name is worth suggesting


class UserError(ValueError):
    """What was wrong, what was found, what to type. The classes below say where."""


class SettingError(UserError):
    """A setting of a Config, or several that do not go together."""


class DataError(UserError):
    """A data set can't be used."""


class PolicyError(UserError):
    """A model, adapter, device or prompt can't be used."""


class ShardError(UserError):
    """A record, shard, picture or manifest can't be trusted, or belongs to other settings."""


class FolderInUse(UserError):
    """Another process is writing to a folder."""


class Diverged(UserError):
    """Loss or gradient of a run are not finite any more, update after update; its state has been saved."""


class RunsFailed(RuntimeError):
    """Some of the runs of a comparison failed; their logs have been shown."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal and has saved its state. `signal` is the signal's number."""

    def __init__(self, signal: int, name: str):
        super().__init__(f"stopped by {name}")
        self.signal = signal


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'majority'?" if one of `known` is near to `name`, else ""."""
    near = get_close_matches(name.lower(), list(known), 1, NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest_path(path: Path | str) -> str:
    """The same for a folder that is not there, among the folders beside it."""
    path = Path(os.path.expanduser(path))
    if path.exists() or not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], 1, NEAR)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
