"""Files that are whole or not there."""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from upt.errors import ShardError


def read_json(path: Path | str, fix: str = "remove it, and the command that wrote it makes it again"):
    """What a JSON file holds. Raises ShardError, ending in `fix`, for one that is none."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ShardError(f"{path}: not JSON ({error}); {fix}") from error


def write_whole(path: Path | str, chunks: Iterable[bytes]) -> None:
    """Write `chunks` to `path` so that a crash at any moment leaves the old file, the new one or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
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
