"""Files that are whole or not there, and what is said where they cannot be written."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from upt.errors import TROUBLE, ShardError, StorageError, UserError, trouble

FULL = 2**20  # bytes; whoever fails to write with less than this left has met a full disk, whatever it says


def read_json(path: Path | str, fix: str = "remove it, and the command that wrote it makes it again"):
    """What a JSON file holds. Raises ShardError, ending in `fix`, for one that is none."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ShardError(f"{path}: not JSON ({error}); {fix}") from error


def known_json(path: Path):
    """What a JSON file holds, None where there is none. Raises as `read_json` does."""
    return read_json(path) if path.is_file() else None


def check_folder(path: Path, setting: str = "--out") -> None:
    """Raise StorageError where `path` cannot be a folder that is written to. Nothing is made."""
    there = next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
    if not os.path.isdir(there):
        raise StorageError(f"{setting} {path}: {there} is no folder, and one is needed; give another {setting}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{setting} {path}: {there} may not be written to; give another {setting}")


def check_file(path: Path, setting: str = "--out") -> None:
    """Raise StorageError where `path` cannot be a file that is written. Nothing is made."""
    if os.path.isdir(path):
        raise StorageError(f"{setting} {path} is a folder, and a file is needed: give the path of one in it")
    check_folder(path.absolute().parent, setting)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """What fails inside for want of room or permission is a StorageError about `path`, whichever library was writing.

    A library may hide what the operating system told it, so the room that is left is looked at as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = trouble(error)
        there = next((part for part in Path(path).absolute().parents if part.is_dir()), Path("/"))
        if said is None and shutil.disk_usage(there).free < FULL:
            said = TROUBLE[errno.ENOSPC]
        if said is None:
            raise
        raise StorageError(f"{path}: {said}") from error


def publish(folder: Path | str) -> None:
    """Give the safetensors files in a folder the permissions of other new files: their library makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def write_whole(path: Path | str, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path` so that a crash at any moment leaves the old file, the new one or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is durable only once the folder is
        os.fsync(folder)
        os.close(folder)
