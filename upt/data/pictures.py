"""What a cell holds of pictures: bytes, a path, a data URL, base64, or any of these in a mapping or a list."""

import base64
import binascii
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, unquote_to_bytes

from upt.data.columns import IMAGE, is_nothing, unwritten
from upt.data.images import first_line, starts_as_image
from upt.data.marks import EXTENSIONS
from upt.data.questions import BadRow

# What a mapping calls its picture, in the order in which they count: of datasets, TRL, OpenAI's and Anthropic's parts.
_KEYS = ("bytes", "path", "image", "url", "image_url", "base64", "data", "source", "file_name", "image_path")
_MEDIA = r"(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac|ogg|m4a|aac|opus)"
_OTHER = r"\.(?:svg|hei[cf]|ico|eps|psd|jxl|raw|dng|tga|dcm)"  # pictures, though none that can be read
_SHOWN = r"(?:image|img|pic|picture|photo|figure|fig|diagram|screenshot|thumbnail)s?"
_REMOTE = re.compile(r"(?!file|data)[a-z][a-z0-9+.-]+://", re.I)
_PATH = re.compile(rf"[^\n<>\"|]{{1,400}}(?:{EXTENSIONS}|{_OTHER})(?:[?#]\S*)?", re.I)
_VIDEO_PATH = re.compile(rf"[^\n<>\"|]{{1,400}}\.{_MEDIA}(?:[?#]\S*)?|data:(?:video|audio)/.*", re.I)
_ADDRESS = re.compile(rf"https?://\S*/{_SHOWN}(?:[/?#]\S*)?", re.I)  # no ending says it, but a part of the address
_IMAGE_COLUMN = re.compile(rf"(?:.*[\W_])?{_SHOWN}(?:[\W_\d].*)?", re.I)
_DATA_URL = re.compile(r"data:(?:image/|application/octet-stream|;base64)", re.I)
_HEAD = 64  # characters of base64 that show what it holds
_DEEP, _WIDE = 8, 64  # how far a cell that is not read is looked into


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
        by_lower = {str(key).lower(): value for key, value in cell.items() if not is_nothing(value)}
        own = next((by_lower[key] for key in (*_KEYS, *IMAGE) if key in by_lower), None)
        own = likely(cell) if own is None else own
        if by_lower and own == [] and not any(str(key).lower() in _KEYS for key in cell):
            raise BadRow(uid, f"neither image bytes nor a path to a file: a mapping of {', '.join(map(str, cell))}")
        return held(uid, own)
    raise BadRow(uid, f"neither image bytes nor a path to a file: {str(cell)[:80]!r}")


def leaves(cell, deep: int = _DEEP) -> Iterator[bytes | str]:
    """The texts and bytes in a cell, however nested; of what is very deep or long, those at the start."""
    cell = unwritten(cell)
    if isinstance(cell, bytes | str):
        yield cell
    elif isinstance(cell, dict | list | tuple) and deep:
        if isinstance(cell, dict):  # beside bytes a path is only a name
            cell = [cell["bytes"]] if not is_nothing(cell.get("bytes")) else cell.values()
        for part in islice(cell, _WIDE):
            yield from leaves(part, deep - 1)


def likely(cell, name: str = "") -> list[bytes | str]:
    """What looks like pictures in a cell of a column, called `name`, that is not read as pictures."""
    of_images = _IMAGE_COLUMN.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)) is not None
    return [leaf for leaf in leaves(cell) if _looks_like_one(leaf, of_images)]


def has_video(cell) -> bool:
    """Whether a cell names a file of video or audio."""
    return any(isinstance(leaf, str) and _VIDEO_PATH.fullmatch(leaf.strip()[:500]) for leaf in leaves(cell))


def _looks_like_one(leaf: bytes | str, of_images: bool) -> bool:
    if isinstance(leaf, bytes):
        return starts_as_image(leaf[:16])
    text = leaf.strip()
    head = text[:500]
    if _DATA_URL.match(text) or _ADDRESS.fullmatch(head) or (of_images and _REMOTE.match(head)) or _is_base64(text):
        return True
    return "![" not in head and all(_PATH.fullmatch(part.strip()) for part in head.split("|"))


def same(uid: str, one: bytes | str, two: bytes | str) -> bool:
    """Whether two are one picture: the same bytes, a name beside bytes, an address beside a file, or one's path the
    end of the other's. Of bytes the shorter are taken for the head of the longer, as a survey has only heads."""
    contents = [content if isinstance(content, bytes) else _inline(uid, content) for content in (one, two)]
    if None not in contents:
        return contents[0].startswith(contents[1]) or contents[1].startswith(contents[0])
    if contents != [None, None] or bool(_REMOTE.match(one)) != bool(_REMOTE.match(two)):
        return True
    paths = [PurePosixPath(local(path).replace("\\", "/")).parts for path in (one, two)]
    length = min(map(len, paths))
    return paths[0][-length:] == paths[1][-length:]


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
