"""One process a folder: a lock that the system takes back when its process ends, however it ends.

@alone
def main(config): ...        holds config.out while it works
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path

from upt.errors import FolderInUse
from upt.files import check_folder, writing
from upt.run import processes

LOCK = ".lock"
TRIES, LOOKS, PAUSE = 50, 3, 0.01  # to enter a folder that others let go, that others look at; seconds between two


def alone(main: Callable) -> Callable:
    """`main(config, …)` with the folder config.out held until it returns or raises. Raises as `holding` does.

    Of several processes of a run the first one holds it for all.
    """

    @wraps(main)
    def held(config, *others, **named):
        if processes.rank():
            return main(config, *others, **named)
        with holding(config.out):
            return main(config, *others, **named)

    return held


@contextmanager
def holding(*folders: Path) -> Iterator[None]:
    """Inside, no other process that holds folders can have these, nor another call in this process.

    They are made where they are not there, and are gone again if nothing was written to them. Where the file system
    has no locks, as some network ones, this is said and the work goes on. Raises FolderInUse, at once, and
    StorageError for a folder that cannot be written to.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_held(Path(folder)))
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    check_folder(folder)
    made, path = [], folder / LOCK
    try:
        with writing(path):
            file = _entered(folder, made)
        try:
            yield
        finally:
            if file is not None:
                path.unlink(missing_ok=True)  # before the lock goes: afterwards it could be another's
                file.close()
    finally:
        for path in made:
            with suppress(OSError):  # there is something in it
                path.rmdir()


def _entered(folder: Path, made: list[Path]):
    """Make a folder and lock it: what `_locked` gives. The folders that were not there are added to `made`."""
    for left in reversed(range(TRIES)):
        made += [path for path in (folder, *folder.parents) if path not in made and not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _locked(folder / LOCK)
        except (FileNotFoundError, FileExistsError):  # another process lets it go, and removes it meanwhile
            if not left:
                raise
            time.sleep(PAUSE)


def _locked(path: Path):
    """The open file of a lock that is ours now, which says who has it; None where there are no locks."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # closed in a process that is started from here
        try:
            _take(file)
        except BlockingIOError:
            file.seek(0)
            said = file.read()
            file.close()
            raise FolderInUse(f"{path.parent} is in use by {_holder(said)}, or give another --out") from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            print(f"{path.parent}: no lock here ({error.strerror}), so let one process alone write to it",
                  file=sys.stderr)  # fmt: skip
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # whoever had it has removed it after it was opened here
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"}, file)
    file.flush()
    return file


def _take(file) -> None:
    """Lock a file. Raises BlockingIOError if somebody else holds it for longer than `is_held` does to look."""
    for left in reversed(range(LOOKS)):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(PAUSE)


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder now, as far as locks tell."""
    try:
        with open(folder / LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or there are no locks
        return False
    return False


def _holder(said: str) -> str:
    """Who holds a lock, by what its file says, and how to end that."""
    try:
        pid, host, since = (json.loads(said)[name] for name in ("pid", "host", "since"))
    except (ValueError, TypeError, KeyError):  # it is being written
        return "another process: wait for it"
    if host != socket.gethostname():
        return f"process {pid} on {host} since {since}: wait for it, or stop it there (kill {pid})"
    if pid == os.getpid():
        return f"this very process, {pid}, since {since}: wait for that call"
    return f"process {pid} on this machine ({host}) since {since}: wait for it, or stop it (kill {pid})"
