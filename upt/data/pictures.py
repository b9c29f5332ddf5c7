"""What a cell holds of pictures: bytes, a path, a data URL, base64, or any of these in a mapping or a list."""

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from upt.data.columns import is_nothing, unwritten
from upt.data.images import first_line, starts_as_image
from upt.data.marks import EXTENSIONS
from upt.data.questions import BadRow

# What a mapping calls its picture, in the order in which they count: of datasets, TRL, OpenAI's and Anthropic's parts.
_KEYS = ("bytes", "path", "image", "url", "image_url", "base64", "data", "source", "file_name", "image_path")
_REMOTE = re.compile(r"(?!file|data)[a-z][a-z0-9+.-]+://", re.I)
_PATH = re.compile(rf"[^\n<>\"|]{{1,400}}{EXTENSIONS}(?:\?[^\s]*)?", re.I)
_DATA_URL = re.compile(r"data:(?:image/|application/octet-stream|;base64)", re.I)
_HEAD = 64  # characters of base64 that show what it holds


def held(uid: str, cell) -> list[bytes | str]:
    """The pictures of a cell, each as bytes or as the text that says where it is. Raises BadRow for anything else."""
    cell = unwritten(cell)
    if is_nothing(cell):
        return []
    if isinstance(cell, bytes):
        return [cell]
    if isinstance(cell, str):
        return [cell.strip()] if cell.strip() else []
    if isinstance(cell, list | tuple):
        return [picture for part in cell for picture in held(uid, part)]
    if isinstance(cell, dict):
        by_lower = {str(key).lower(): value for key, value in cell.items()}
        if not any(key in by_lower for key in _KEYS) and any(not is_nothing(value) for value in cell.values()):
            raise BadRow(uid, f"neither image bytes nor a path to a file: a mapping of {', '.join(map(str, cell))}")
        return held(uid, next((by_lower[key] for key in _KEYS if not is_nothing(by_lower.get(key))), None))
    raise BadRow(uid, f"neither image bytes nor a path to a file: {str(cell)[:80]!r}")


def looks_like_one(cell) -> bool:
    """Whether a cell of a column that is not read as pictures holds what looks like one."""
    cell = unwritten(cell)
    if isinstance(cell, bytes):
        return starts_as_image(cell[:16])
    if isinstance(cell, str):
        text = cell.strip()
        return bool(_DATA_URL.match(text) or _PATH.fullmatch(text[:500])) or _is_base64(text)
    if isinstance(cell, dict):
        return any(looks_like_one(cell.get(key)) for key in _KEYS)
    return isinstance(cell, list | tuple) and any(looks_like_one(part) for part in cell[:8])


def _is_base64(text: str) -> bool:
    head = re.sub(r"\s", "", text[: 2 * _HEAD])[:_HEAD]
    whole = len(head) == _HEAD and re.fullmatch(r"[\w+/-]+", head, re.ASCII)
    return bool(whole) and starts_as_image(base64.b64decode(_standard(head)))


def _standard(text: str) -> str:
    """Base64 in its usual letters, padded; some write - and _ and leave the padding out."""
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    return text + "=" * (-len(text) % 4)


def local(picture: str) -> str:
    """The path in a text that says where a picture is: file:// is taken off."""
    return unquote(picture[7:]) if picture[:7].lower() == "file://" else picture


class Files:
    """Where the files of a set may lie: paths start at a row's own folder and end in the set's.

    `folder` is None for a set that came from the hub and has no folder here.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._names: dict[Path, set[str]] = {}
        if folder is not None:
            # In the hub cache the files of a snapshot are links to `blobs`, beside `snapshots`.
            self.root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()

    def read(self, uid: str, picture: bytes | str, base: str | None) -> bytes:
        """The encoded bytes of a picture that `held` found. `base` is the folder that its path starts at."""
        if isinstance(picture, bytes):
            return picture
        if (inline := _inline(uid, picture)) is not None:
            return inline
        file = self._path(uid, picture, base)
        try:
            file = file.resolve()
            if not file.is_relative_to(self.root):
                raise BadRow(uid, f"image path outside the data folder: {picture[:80]}")
            if not file.is_file():
                raise BadRow(uid, f"missing image file: {picture[:80]}")
            return file.read_bytes()
        except (OSError, RuntimeError) as error:  # too long a name, links in a circle, no permission
            raise BadRow(uid, f"unreadable image path: {picture[:80]}: {first_line(error)}") from error

    def check(self, uid: str, picture: bytes | str, base: str | None) -> None:
        """Raise BadRow where a look at the folder's list of names shows that `read` would; opens nothing."""
        if isinstance(picture, bytes) or _is_inline(picture):
            return
        file = self._path(uid, picture, base)
        if file.parent not in self._names:
            try:
                self._names[file.parent] = {path.name for path in file.parent.iterdir()}
            except (OSError, RuntimeError):
                self._names[file.parent] = set()
        if file.name not in self._names[file.parent]:
            self.read(uid, picture, base)  # says why; names may differ where a file system takes them for one

    def _path(self, uid: str, picture: str, base: str | None) -> Path:
        if _REMOTE.match(picture):
            raise BadRow(uid, f"picture on the web, which is not fetched: {picture[:80]}: download it, give its path")
        path = local(picture)
        if self.folder is None or "\0" in path:
            raise BadRow(uid, f"neither image bytes nor a path to a file: {picture[:80]!r}")
        return Path(base or self.folder) / path


def _is_inline(text: str) -> bool:
    return text[:5].lower() == "data:" or _is_base64(text)


def _inline(uid: str, text: str) -> bytes | None:
    """The bytes in a data URL or in base64; None for a text that is neither."""
    if not _is_inline(text):
        return None
    body, is_base64 = text, True
    if text[:5].lower() == "data:":
        head, _, body = text.partition(",")
        is_base64 = head.lower().endswith(";base64")
    try:
        return base64.b64decode(_standard(unquote(body)), validate=True) if is_base64 else unquote_to_bytes(body)
    except binascii.Error as error:
        raise BadRow(uid, f"undecodable base64: {text[:40]!r}: {first_line(error)}") from error
