"""Where a data set lies, and its files as tables: parquet, `save_to_disk`, JSONL, JSON, CSV, a set of the hub.

Tables are those of `datasets`, by the split names that a set uses itself, "" where it names none. Of a text file each
cell is kept as JSON, with the folder that the row is from: columns may hold cells of several types, and a line that
can't be read spoils no other.
"""

import csv
import io
import json
import logging
import os
import re
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import datasets
from huggingface_hub import snapshot_download

from upt import hub
from upt.data.columns import BROKEN, FOLDER, QUESTION, pick
from upt.data.images import first_line
from upt.data.names import ALIASES, EMBEDDED, NAMED
from upt.errors import TROUBLE, DataError, suggest, suggest_path, trouble

Tables = dict[str, datasets.Dataset]

TABLES, TEXTS = (".parquet", ".jsonl"), (".csv", ".tsv", ".json")  # TEXTS count in a folder without TABLES
SUFFIXES = (*TABLES, *TEXTS)
ABOUT = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "summary.json", "manifest.json",
    "fingerprint.json",
)  # fmt: skip
FORMS = "parquet, JSONL, JSON or CSV with image paths"
ELSEWHERE = "HF_DATASETS_CACHE=DIR before the command puts the cache elsewhere"


def find(name: str) -> tuple[str, Path | None, Tables]:
    """A name, hub id or path → the set's label, its folder, its tables."""
    repo = NAMED.get(name, name)
    path = Path(os.path.abspath(os.path.expanduser(name)))  # unlike `resolve`, keeps the name of a linked folder
    is_file = path.suffix.lower() in SUFFIXES
    if name not in NAMED and path.is_dir():
        return path.name, path, _folder(path)
    if is_file and path.is_file():
        return path.stem, path.parent, _files([path], path.parent)
    if path.is_file() and not is_file:
        kind = f"a {path.suffix} file" if path.suffix else "a file without an ending"
        raise DataError(f"{name}: {kind} is not read as data; give {', '.join(SUFFIXES)}, or a folder of these")
    if is_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        known = f"neither {', '.join([*EMBEDDED, *NAMED])}, nor a hub id like org/name"
        near = suggest(name, [*EMBEDDED, *NAMED]) or suggest_path(name)
        weight = "; a weight needs several sets: a:3,b:1" if re.search(r":[\d.]+$", name) else ""
        raise DataError(f"{name!r} is {known}, nor a folder or file that exists{weight}; give one as DATA={near}")
    label = {hub_id: short for short, hub_id in NAMED.items()}.get(repo, repo.split("/")[1])
    try:  # the copy in the hub cache first, so that a cached set needs no network
        snapshot = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
        return label, snapshot, _folder(snapshot)
    except (OSError, ValueError) as error:  # not cached; cached in part or in another format; not an id at all
        cached = f" (the copy in the cache: {error})" if isinstance(error, DataError) else ""
    what = f"{repo} is not in the cache and did not come from the hub{cached}"
    fix = f"Fetch it where there is a network:  hf download --repo-type dataset {repo} --local-dir DIR  then give "
    fix += "that copy:  DATA=/path/to/DIR  (any folder of parquet, or of JSONL with image paths)"
    is_path = name not in NAMED and path.parent.is_dir()  # by its looks
    if is_path:
        what = f"{name}: no such folder or file{suggest_path(name)}; nor does the hub give it"
        fix = f"Give a folder, a file, a hub id, or one of {', '.join([*EMBEDDED, *NAMED])}"
    elif name not in NAMED:
        what = f"there is no such folder, and {what}"
    if why := hub.why_unreachable(repo, "dataset"):
        raise DataError(f"{what}: {'it does not answer' if is_path else why}. {fix}")
    return label, None, _load_dataset(what, fix, repo)


# ---- folders


def _folder(folder: Path) -> Tables:
    """A folder that `save_to_disk` wrote, or of files of one kind, however deep."""
    if (folder / "asked").is_dir() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder}: synthesize.py has not finished these questions; give its command again to go on")
    if saved := _saved(folder):
        return saved
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    paths = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    tables = [path for path in paths if path.suffix.lower() in TABLES]
    texts = [path for path in paths if path.suffix.lower() in TEXTS and path.name not in ABOUT]
    if tables and texts:
        unused = ", ".join(str(path.relative_to(folder)) for path in texts[:5]) + ", …" * (len(texts) > 5)
        logging.getLogger(__name__).warning("%s: not used beside %s files: %s", folder, tables[0].suffix, unused)
    paths = tables or texts
    kinds, card = sorted({path.suffix.lower().replace("tsv", "csv") for path in paths}), folder / "README.md"
    if ".parquet" in kinds and card.exists() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.M):
        # The card says which file is which split and how many rows there are: a copy fetched in part is found out.
        fix = "Fetch the rest, or give a folder of one configuration, or remove README.md to take the files as they are"
        # `datasets` tells the caches of such folders apart by the folder's last name alone, whatever lies in them.
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [card, *paths]]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / blake2b(repr(files).encode(), digest_size=12).hexdigest()
        return _load_dataset(f"{folder} is not what its README.md says", fix, str(folder), cache_dir=str(cache))
    inside = [path for path in paths if path.suffix == ".parquet" and path.is_relative_to(folder / "data")]
    if inside and len(kinds) == 2:  # as for the hub's library, JSONL beside `data` is something else
        return _files(inside, folder)
    if len(kinds) != 1:
        has = " and ".join(kinds) or f"neither .parquet nor .jsonl, nor {', '.join(TEXTS)}"
        raise DataError(f"{folder} has {has}: give a folder with one, or one of the files, of {FORMS}")
    return _files(paths, folder)


def _saved(folder: Path) -> Tables | None:
    """What `save_to_disk` of `datasets` wrote, as one set, as a dict of splits, or a folder a split; else None."""
    parts = [folder] if _is_saved(folder) else [path for path in sorted(folder.iterdir()) if _is_saved(path)]
    tables: Tables = {}
    for part in parts:
        try:
            loaded = datasets.load_from_disk(str(part))
        except Exception as error:  # a missing or damaged file is an error of pyarrow's, or any other
            why = f"{part} is no whole folder of save_to_disk: {first_line(error)}"
            raise DataError(f"{why}. Save the set again, or give parquet:  dataset.to_parquet(...)") from error
        split = "" if part == folder else _split_of(part, folder) or part.name
        tables |= loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
    return tables or None


def _is_saved(folder: Path) -> bool:
    whole = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return whole or (folder / "dataset_dict.json").is_file()


def _split_of(path: Path, folder: Path) -> str:
    """The split that a file's name, or else its folders', says: `data/train-00000.parquet`; "" for none."""
    parts = reversed(path.relative_to(folder).with_suffix("").parts)
    words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((word for word in words if word in ALIASES), "")


def _files(paths: list[Path], folder: Path) -> Tables:
    """Files of one kind by the split that they are of."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_split_of(path, folder), []).append(path)
    if paths[0].suffix.lower() != ".parquet":
        rows: dict[str, list[dict]] = {}
        for split, files in groups.items():
            for file in files:
                for own, found in _rows(file).items():
                    rows.setdefault(own or split, []).extend(found)
        return {split: _table(found) for split, found in rows.items()}
    tables = {}
    for split, files in groups.items():
        patterns = [re.sub(r"([*?[])", r"[\1]", str(file)) for file in files]  # `datasets` takes names for patterns
        what = f"{folder}: unreadable parquet among {', '.join(file.name for file in files)}"
        tables[split] = _load_dataset(what, "Fetch it again", "parquet", data_files=patterns)["train"]
    return tables


def _load_dataset(what: str, fix: str, *args, **options) -> Tables:
    """`datasets.load_dataset`, whose many kinds of error (gated, missing, offline, damaged) become one."""
    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{what}: there are no rows, as when synthesize.py kept no question") from error
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)  # says nothing; its cause does
        cause = error.__cause__ if wrapped else error
        raise DataError(_of_the_disk(cause) or f"{what}: {first_line(cause)}. {fix}") from error


def _of_the_disk(error: BaseException) -> str | None:
    """What to say where not the data is at fault but the disk, on which `datasets` keeps tables even of local files."""
    cache, file = Path(datasets.config.HF_DATASETS_CACHE), getattr(error, "filename", None)
    if getattr(error, "errno", None) not in TROUBLE:  # a network's errors have numbers, too
        return f"the cache {cache}: {error}; {ELSEWHERE}" if "disk space" in str(error) else None
    if file is None or Path(file).is_relative_to(cache):
        return f"the cache {cache} cannot be written: {trouble(error)}; {ELSEWHERE}"
    return f"{file}: {trouble(error)}"


# ---- text files

_WHAT = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
_WHAT |= {type(None): "null"}


def _table(rows: list[dict]) -> datasets.Dataset:
    keys = dict.fromkeys(key for row in rows for key in row)
    return datasets.Dataset.from_dict(
        {key: [json.dumps(row[key]) if key in row else None for row in rows] for key in keys}
    )


def _rows(path: Path) -> dict[str, list[dict]]:
    """The rows of a text file by the split that it names itself, "" for none."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if path.suffix.lower() == ".jsonl":
            return {"": _lines(path, content)}
        if path.suffix.lower() == ".json":
            return _json(path, content)
        return {"": _csv(path, content.decode())}
    except OSError as error:
        raise DataError(f"{path} can't be read: {trouble(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}. Save it as UTF-8") from error


def _is_json(content: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        json.loads(content)
        return True
    return False


def _lines(path: Path, content: bytes) -> list[dict]:
    """JSONL. The JSON reader of `datasets` gives up a whole file for one broken line."""
    rows = []
    if content.lstrip()[:1] == b"[" and b"\n" in content.strip() and _is_json(content):
        raise DataError(f"{path} is one list of JSON over several lines. Rename it to {path.stem}.json")
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row, why = json.loads(line), ""
            if not isinstance(row, dict):
                why = f'{_WHAT[type(row)]}, where an object was expected, as in {{"problem": …}}'
        except (ValueError, RecursionError) as error:
            why = first_line(error)
        if why:
            rows.append({FOLDER: "", BROKEN: f"not a JSON object: line {number} of {path.name}: {why}"})
        else:
            rows.append(row | {FOLDER: str(path.parent)})
    return rows


def _json(path: Path, content: bytes) -> dict[str, list[dict]]:
    """A list of rows; an object of rows by key, of columns, or of splits; or one list of rows among other things."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        lines = _lines(path, content)
        if len(lines) > 1 and BROKEN not in lines[0]:  # JSONL by another name
            return {"": lines}
        raise DataError(f"{path} is no JSON: {first_line(error)}") from error
    found = {"": whole} if isinstance(whole, list) else _of_object(whole) if isinstance(whole, dict) else None
    if found is None or not all(isinstance(row, dict) for rows in found.values() for row in rows):
        what = _WHAT[type(whole)] + (f" of {', '.join(list(whole)[:5])}" if isinstance(whole, dict) else "")
        what = "a list of other things than objects" if isinstance(whole, list) else what
        raise DataError(
            f'{path} holds {what}: expected a list of rows, [{{"problem": …}}, …], or such a list under "data"'
        )
    return {split: [row | {FOLDER: str(path.parent)} for row in rows] for split, rows in found.items()}


def _of_object(whole: dict) -> dict[str, list] | None:
    values = list(whole.values())
    if values and all(key.lower() in ALIASES and isinstance(rows, list) for key, rows in whole.items()):
        return {key.lower(): rows for key, rows in whole.items()}
    if pick(list(whole), QUESTION):  # columns, or pandas' mapping from row to cell of each
        columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in values]
        same = all(isinstance(cells, list) for cells in columns) and len({*map(len, columns)}) == 1
        return {"": [dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)]} if same else None
    if all(isinstance(row, dict) for row in values):
        return {"": values}
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    return {"": lists[0]} if len(lists) == 1 else None


def _csv(path: Path, text: str) -> list[dict]:
    """CSV with a header, parted by what the header has most of: comma, semicolon, tab or |."""
    csv.field_size_limit(2**31 - 1)  # a picture in base64 is longer than the 131,072 characters of the default
    first = text.lstrip("\r\n ").partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=first.count), strict=True)
    rows: list[dict] = []
    try:
        header = [name.strip() for name in next(filter(any, lines), [])]
        if len({*header}) < len(header):
            raise DataError(f"{path}: its header names a column twice: {', '.join(header)[:200]}. Rename one")
        for cells in lines:
            if not any(cells):
                continue
            if len(cells) != len(header):
                why = f"not a row of the table: line {lines.line_num} of {path.name}: {len(cells)} cells, the header "
                rows.append({FOLDER: "", BROKEN: f"{why}has {len(header)}"})
                continue
            filled = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
            rows.append(dict.fromkeys(header) | filled | {FOLDER: str(path.parent)})
    except csv.Error as error:
        raise DataError(f"{path}: line {lines.line_num} is no CSV: {first_line(error)}") from error
    return rows
