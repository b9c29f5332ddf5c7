"""Errors that a user can mend. A script prints them in one line and exits with 2; a notebook sees them raised."""

import errno
import json
import os
import re
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


class StorageError(UserError):
    """A file or folder can't be written: no room, no permission, something else in its place."""


class FolderInUse(UserError):
    """Another process is writing to a folder."""


class Diverged(UserError):
    """Loss or gradient of a run are not finite any more, update after update; its state has been saved."""


class Elsewhere(UserError):
    """Another process of the run has failed, of what was a ValueError there.

    `trace` is its traceback, `expected` whether that was an error which a user can mend.
    """

    def __init__(self, text: str, trace: str, expected: bool):
        super().__init__(text)
        self.trace, self.expected = trace, expected


class Broken(RuntimeError):
    """The same, of any other error."""

    def __init__(self, text: str, trace: str, expected: bool):
        super().__init__(text)
        self.trace, self.expected = trace, expected


class Lost(UserError):
    """Another process of the run has ended without a word."""


class RunsFailed(RuntimeError):
    """Some of the runs of a comparison failed; their logs have been shown."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal and has saved its state. `signal` is the signal's number."""

    def __init__(self, signal: int, name: str):
        super().__init__(f"stopped by {name}")
        self.signal = signal


ROOM = "what was written before is whole: make room and give the same command again; a run goes on where it was"
TROUBLE = {  # what to make of an error of the operating system
    errno.ENOSPC: f"no space left on the disk; {ROOM}",
    errno.EDQUOT: f"no space left in your quota of the disk; {ROOM}",
    errno.EFBIG: f"no larger files may be written here (ulimit -f); {ROOM}",
    errno.EACCES: "permission denied: give another path, or change the permissions (ls -ld shows them)",
    errno.EPERM: "not permitted: give another path, or change the permissions (ls -ld shows them)",
    errno.EROFS: "the disk is read-only: give another path",
    errno.EEXIST: "something of that name is in the way: move it, or give another path",
    errno.ENOTDIR: "a file stands where a folder has to be: move it, or give another path",
    errno.EISDIR: "a folder stands where a file has to be: give the path of a file",
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter path",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n 4096)",
}


def trouble(error: BaseException) -> str | None:
    """What the operating system refused and what to do, of an OSError or what a library made of one; None of others."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"(?:os error |Errno )(\d+)", str(error))):  # of Rust, of shutil
        number = int(found[1])
    return TROUBLE.get(number, os.strerror(number) if isinstance(number, int) else None)


def in_words(error: BaseException) -> str:
    """What an error says of a record, for a message about it: a KeyError says but a name, a parser but a place."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return f"not JSON ({error})"
    return str(error) or type(error).__name__


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
