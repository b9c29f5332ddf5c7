"""Group records on disk: one JSONL line per group, one shard per step.

    folder/manifest.json        where it all comes from (manifests.py)
    folder/step-000012.jsonl    one group per line (fields: GROUP_FIELDS and RESPONSE_FIELDS below)
    folder/images/<hash>.png    each picture once; a later stage's `images` is a link to the earlier stage's

Whatever lies here under its final name is whole (upt/files.py). A group is a plain dict. Fields beyond the schema are
kept as they are, so a stage adds what it likes; known fields are checked on writing and on reading. Floats round-trip
exactly: JSON gets the shortest decimal that reads back as the same double, and NaN and infinities, which JSON lacks,
are refused.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from upt.data.views import VIEWS
from upt.errors import ShardError, suggest_path
from upt.files import write_whole, writing

SCHEMA = "upt.group/1"
_SHARD_NAME = re.compile(r"step-(\d{6,})\.jsonl")
_AGAIN = "to regenerate this shard, run the stage that wrote it again with the same --out"
A_VIEW = f"a view ({', '.join(VIEWS)})"

# name: what is expected (see _CHECKS)
GROUP_FIELDS = {
    "uid": "a string",
    "step": "an integer >= 0",
    "question": "a string",
    "choices": "null or a list of strings",
    "image": "null or a relative path inside the folder",
    "gold": "null or a string",
    "prompt_tokens": "an integer >= 0",
    "responses": "a list that is not empty",
}
RESPONSE_FIELDS = {
    "text": "a string",
    "token_ids": "a list of integers >= 0",
    "logprobs": "a list of finite numbers",
    "finish": "'stop' or 'length'",
    "entropy": "a finite number",
    "self_certainty": "a finite number",
    "key": "null or a string",
    "view": f"null or {A_VIEW}",
    "judge": "an object with 'score' (null or a number from 0 to 1) and 'parsed' (true or false)",
    "reward": "a finite number",
    "advantage": "a finite number",
}
OPTIONAL = ("view", "judge", "reward", "advantage")  # of a rollout with --view; added after the rollout


def _finite(values: list) -> bool:
    # bool is an int to Python, not to us.
    if not all(issubclass(t, int | float) and t is not bool for t in {*map(type, values)}):
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an integer beyond a double
        return False


def _counts(values: list) -> bool:
    return not values or ({*map(type, values)} == {int} and min(values) >= 0)


def _inside(value) -> bool:
    path = PurePosixPath(value if isinstance(value, str) and "\0" not in value else "")
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _is_judge(value) -> bool:
    score = value.get("score", "") if isinstance(value, dict) and isinstance(value.get("parsed"), bool) else ""
    return score is None or (_finite([score]) and 0 <= score <= 1)


_CHECKS = {  # what is expected, in the words of the error message: whether a value is it
    "a string": lambda value: isinstance(value, str),
    "'stop' or 'length'": lambda value: isinstance(value, str) and value in ("stop", "length"),
    "a relative path inside the folder": _inside,
    "an integer >= 0": lambda value: type(value) is int and value >= 0,
    "a finite number": lambda value: _finite([value]),
    "a list that is not empty": lambda value: isinstance(value, list) and value != [],
    "a list of strings": lambda value: isinstance(value, list) and {*map(type, value)} <= {str},
    "a list of integers >= 0": lambda value: isinstance(value, list) and _counts(value),
    A_VIEW: lambda value: isinstance(value, str) and value in VIEWS,
    "a list of finite numbers": lambda value: isinstance(value, list) and _finite(value),
    "an object with 'score' (null or a number from 0 to 1) and 'parsed' (true or false)": _is_judge,
}


def _check_fields(record: dict, fields: dict[str, str], where: str) -> None:
    if not isinstance(record, dict):
        raise ShardError(f"{where} is {record!r:.60}, expected an object with the fields {', '.join(fields)}")
    for name, expected in fields.items():
        if name not in record:
            if name not in OPTIONAL:
                raise ShardError(f"{where}.{name} is missing, expected {expected}; add it where the rollout is written")
        elif record[name] is None and expected.startswith("null or "):
            pass
        elif not _CHECKS[expected.removeprefix("null or ")](record[name]):
            found = f"{where}.{name} is {record[name]!r:.60}, expected {expected}"
            raise ShardError(f"{found}; convert it (.tolist(), float(), int()) or mend the stage that computes it")


def validate(group: dict, where: str) -> None:
    """Raise ShardError unless `group` is a record of SCHEMA, complete at least up to what rollout writes.

    `where` opens the message: "path:line". Fields that are not in the tables are left alone.
    """
    schema = group.get("schema") if isinstance(group, dict) else SCHEMA
    if schema != SCHEMA:
        fix = "check out the code that wrote it, or run its stage again into a new --out"
        raise ShardError(f"{where}: group.schema is {schema!r:.60}, this code reads {SCHEMA!r}; {fix}")
    _check_fields(group, GROUP_FIELDS, f"{where}: group")
    for i, response in enumerate(group["responses"]):
        at = f"{where}: responses[{i}]"
        _check_fields(response, RESPONSE_FIELDS, at)
        n, m = len(response["token_ids"]), len(response["logprobs"])
        if n != m:
            raise ShardError(f"{at} has {n} token_ids and {m} logprobs, expected one each; keep the stop token in both")
    views = [response.get("view") for response in group["responses"]]
    half = len(views) // 2
    if any(views) and views != [None] * half + [views[-1]] * half:
        raise ShardError(
            f"{where}: the views of the responses are {views!r:.120}, expected null for the first half and one and the "
            "same for the second; leave the responses as the rollout wrote them"
        )


def view_of(group: dict) -> str | None:
    """The view in which the second half of a group saw its picture; None: all of it saw the picture as it is."""
    return group["responses"][-1].get("view")


def write_shard(path: Path | str, groups: Iterable[dict]) -> None:
    """Write validated groups as one shard, whole or not at all. An existing shard of that name is replaced."""

    def encoded() -> Iterator[bytes]:
        line = 0
        for line, group in enumerate(groups, 1):
            validate(group, f"{path}:{line}")
            try:
                # ASCII: a lone surrogate or a line separator in a model's text can neither fail nor split the line.
                text = json.dumps(group, allow_nan=False, separators=(",", ":"))
            except (TypeError, ValueError) as error:
                raise ShardError(f"{path}:{line}: {error}; JSON takes finite numbers, strings, lists, dicts") from error
            yield text.encode("ascii") + b"\n"
        if line == 0:
            raise ShardError(f"{path}: no group to write; a shard holds at least one")

    write_whole(path, encoded())


def _stream(path: Path) -> Iterator[dict]:
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON number")

    line = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                group = json.loads(raw.decode("utf-8"), parse_constant=refuse)
                validate(group, f"{path}:{line}")
            except (ValueError, RecursionError) as error:
                why = error if isinstance(error, ShardError) else f"{path}:{line}: not a JSON record ({error})"
                raise ShardError(f"{why}; {_AGAIN}") from error
            yield group
    if line == 0:
        raise ShardError(f"{path}:1: the shard is empty; {_AGAIN}")


def read_shard(path: Path | str) -> list[dict]:
    """All groups of a shard, validated. A bad line raises ShardError naming file and line."""
    return list(_stream(Path(path)))


def shard_path(folder: Path | str, step: int) -> Path:
    """folder/step-000012.jsonl"""
    return Path(folder) / f"step-{step:06d}.jsonl"


def list_shards(folder: Path | str) -> list[Path]:
    """The shards of a folder by step; anything else in it (temporary files, manifest, images) is not a shard."""
    folder = Path(folder)
    matches = [_SHARD_NAME.fullmatch(name) for name in os.listdir(folder)] if folder.is_dir() else []
    return [folder / match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1]))]


def read_complete(path: Path) -> list[dict] | None:
    """The groups of a shard; None where there is no complete one."""
    return read_shard(path) if is_complete(path) else None


def is_complete(path: Path | str, source: Path | str | None = None) -> bool:
    """Whether a resumed stage may keep this shard: it is there and each line is valid; if not, stderr says why.

    With `source`, the earlier stage's shard that this one was made from: also not older than it, because a shard that
    was regenerated upstream makes the ones derived from it stale. A shard that is merely absent is reported to nobody.
    """
    path = Path(path)
    if not path.exists():
        return False
    if source is not None and os.stat(path).st_mtime_ns < os.stat(source).st_mtime_ns:
        print(f"{path}: older than {source}, will be regenerated", file=sys.stderr)
        return False
    try:
        for _ in _stream(path):
            pass
    except ShardError as error:
        print(f"{error}; {path}: will be regenerated", file=sys.stderr)
        return False
    return True


def stage_folder(folder: Path | str) -> Path:
    """The folder of shards that `folder` is or, being a run's, holds as `rollouts`, which is said."""
    folder = Path(folder)
    inside = folder / "rollouts"
    if not list_shards(folder) and list_shards(inside):
        print(f"{folder} is a run: its shards are in {inside}", file=sys.stderr)
        return inside
    return folder


class ShardReader:
    """Streams a folder's groups in order of step, holding one line, or with `.shards()` one shard, at a time."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.paths = list_shards(folder)
        if not self.paths:
            near = suggest_path(folder)
            raise ShardError(
                f"{folder}: no shards (step-*.jsonl); make some with `python rollout.py --out {folder}`{near}"
            )

    def __iter__(self) -> Iterator[dict]:
        for path in self.paths:
            yield from _stream(path)

    def shards(self) -> Iterator[tuple[Path, list[dict]]]:
        for path in self.paths:
            yield path, read_shard(path)  # not bound to a name here, so that the caller alone keeps it alive


def save_image(folder: Path | str, image) -> str:
    """Store a PIL RGB image losslessly, once per content; returns the value of `image` for the record.

    The name is a hash of size and pixels, so it does not depend on the PNG encoder. Other modes are refused: what a
    transparent pixel looks like is decided where data is loaded.
    """
    if image.mode != "RGB":
        raise ShardError(f"image has mode {image.mode!r}, expected 'RGB'; convert it first: image.convert('RGB')")
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()
    relative = f"images/{digest[:24]}.png"
    target = Path(folder) / relative
    if not target.exists():
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # as lossless as level 6 and several times faster on photographs
        write_whole(target, [buffer.getvalue()])
    return relative


def open_image(folder: Path | str, relative: str):
    """The PIL RGB image of a record, loaded. A path that leads out of the folder is refused.

    `images` itself may be a link to another folder called `images` (see link_images); links below it may not leave it.
    """
    from PIL import Image

    folder = Path(folder)
    path, store = (folder / (relative if _inside(relative) else "..")).resolve(), (folder / "images").resolve()
    in_store = store.name == "images" and path.is_relative_to(store)
    if not (_inside(relative) and (in_store or path.is_relative_to(folder.resolve()))):
        raise ShardError(f"{relative!r} leads out of {folder}; expected a path such as images/0123abcd.png inside it")
    if not path.is_file():
        raise ShardError(f"{folder / relative}: no such picture; move the stage folders of a run together")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ShardError(f"{path}: no picture any more ({error}); {_AGAIN}") from error


def link_images(source_folder: Path | str, out_folder: Path | str) -> None:
    """Make `out_folder/images` lead to the pictures of an earlier stage, so that `image` stays as it was.

    A relative link, so the run's folder can be moved; where the file system has no links, the files are copied.
    """
    source, out = (Path(source_folder) / "images").resolve(), Path(out_folder) / "images"
    if not source.is_dir():
        return  # text-only questions
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if out.resolve() == source:
        return
    if out.is_symlink():
        if out.exists():
            raise ShardError(f"{out} leads to {out.resolve()}, not to {source}; use another --out or remove the link")
        out.unlink()  # dangling: the earlier stage was moved
    if not out.exists():
        try:
            # Relative to the real folder: a lexical path through a linked parent would lead elsewhere.
            out.symlink_to(os.path.relpath(source, out.parent.resolve()), target_is_directory=True)
            return
        except OSError as error:
            print(f"{out}: cannot be a link here ({error.strerror}), copying the pictures", file=sys.stderr)
    for picture in sorted(source.iterdir()):  # names are content hashes: what is there already is the same picture
        if picture.suffix == ".png" and not picture.name.startswith(".") and not (out / picture.name).exists():
            write_whole(out / picture.name, [picture.read_bytes()])
