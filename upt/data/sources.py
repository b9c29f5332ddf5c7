"""One data set from files or from the hub: parquet in the hub's schema, or JSONL with image paths.

Splits: `train`, `validation` and `test` can always be asked for, and `train` never shares a row with the other two.
A missing `test` is the `validation` split and the other way round. With neither, both are the same 5 % of `train`,
chosen by a hash of the uid, and `train` is the rest; a set without `train` divides `validation` (else `test`) so.

Uids: `<label>/<split>/<row number>`, the label being the set's name, the last part of the hub id or the folder's name,
wherever the folder lies. A column `uid`, `id` or `pid` counts instead if its values are unique over all splits in use.

A row that can't be used raises `BadRow` and is kept in `Questions.bad`; a set without one good row is a `DataError`.
Gold answers reach `Question.gold` and nothing else.
"""

import json
import logging
import os
import re
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import snapshot_download

from upt.data.fingerprint import rows_of
from upt.data.names import ALIASES, NAMED, SHAPES, SPLITS
from upt.data.questions import Question, Questions
from upt.data.rows import ANSWER, BROKEN, CHOICES, FOLDER, IMAGE, QUESTION, UID, first_line, gold_of, pick, question_of
from upt.errors import TROUBLE, DataError, suggest, suggest_path, trouble

ELSEWHERE = "HF_DATASETS_CACHE=DIR before the command puts the cache elsewhere"
HELD_OUT = 0.05  # share of the rows, in a set that has but one split


def load_set(name: str, split: str, limit: int | None) -> Questions:
    """The questions of one split of one set that lies in files or on the hub, as `load` in mixture.py says."""
    if split not in SPLITS:
        raise DataError(f"no split {split!r}: ask for {', '.join(SPLITS)}{suggest(split, ALIASES)}")

    label, folder, found = _find(name)
    tables = _by_split(label, found)
    uids_of = _uids(label, tables)
    source, chosen, note = _choose(split, uids_of)
    table, chosen, uids = tables[source].with_format("arrow"), chosen[:limit], uids_of[source]
    columns = [pick(table.column_names, names) for names in (QUESTION, ANSWER, CHOICES)]
    where = f"data set {label!r}, split {split!r}"
    if columns[0] is None and len(table) and BROKEN not in table.column_names:
        have, want = ", ".join(name for name in table.column_names if name != FOLDER), ", ".join(QUESTION)
        raise DataError(f"{where}: no column for the question among {have}. Rename one to any of {want}")

    def read(i: int) -> Question:
        return question_of(uids[chosen[i]], _dicts(table[chosen[i]])[0], columns, folder)

    answers = _column(table, columns[1])
    has_gold = any(gold_of(answers[i]) is not None for i in chosen)
    pictured = _pictured(table)
    pictures = sum(pictured[i] for i in chosen)
    questions = Questions(label, split, [uids[i] for i in chosen], read, has_gold, note, pictures)
    questions.stored = lambda: rows_of(table, chosen, folder)
    if next(iter(questions), None) is None:
        kinds = Counter(reason.split(":")[0] for reason in questions.bad.values()).most_common()
        counts = ", ".join(f"{count} × {kind}" for kind, count in kinds) or "two rows are needed to hold one out"
        raise DataError(f"{where}: none of its {len(chosen)} rows is good: {counts}. {questions.report_bad() or ''}")
    return questions


# ---- where the rows are: tables of `datasets` by the split names that a set uses itself, "" where it names none


def _find(name: str) -> tuple[str, Path | None, dict[str, datasets.Dataset]]:
    """A name, hub id or path → the set's label, its folder, its tables."""
    repo = NAMED.get(name, name)
    path = Path(os.path.abspath(os.path.expanduser(name)))  # unlike `resolve`, keeps the name of a linked folder
    is_file = path.suffix in (".parquet", ".jsonl")
    if name not in NAMED and path.is_dir():
        return path.name, path, _folder(path)
    if is_file and path.is_file():
        return path.stem, path.parent, _files([path], path.parent)
    if is_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        known = f"neither shapes, {', '.join(NAMED)}, nor a hub id like org/name"
        near = suggest(name, [SHAPES, *NAMED]) or suggest_path(name)
        weight = "; a weight needs several sets: a:3,b:1" if re.search(r":[\d.]+$", name) else ""
        raise DataError(
            f"{name!r} is {known}, nor a folder, .parquet or .jsonl file that exists{weight}; give one as DATA={near}"
        )
    label = {hub_id: short for short, hub_id in NAMED.items()}.get(repo, repo.split("/")[1])
    try:  # the copy in the hub cache first, so that a cached set needs no network
        snapshot = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
        return label, snapshot, _folder(snapshot)
    except (OSError, ValueError) as error:  # not cached; cached in part or in another format; not an id at all
        cached = f" (the copy in the cache: {error})" if isinstance(error, DataError) else ""
    fetch = f"Fetch it where there is a network:  hf download --repo-type dataset {repo} --local-dir DIR  then give "
    fix = fetch + "that copy:  DATA=/path/to/DIR  (any folder of parquet, or of JSONL with image paths)"
    path_too = "" if name in NAMED else "there is no such folder, and "
    what = f"{path_too}{repo} is not in the cache and did not come from the hub{cached}"
    return label, None, _load_dataset(what, fix, repo)


def _folder(folder: Path) -> dict[str, datasets.Dataset]:
    """A folder of parquet or of JSONL, however deep."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".parquet", ".jsonl") and path.is_file()]
    paths = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    if (folder / "asked").is_dir() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder}: synthesize.py has not finished these questions; give its command again to go on")
    kinds, card = sorted({path.suffix for path in paths}), folder / "README.md"
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
        raise DataError(f"{folder} has {' and '.join(kinds) or 'neither .parquet nor .jsonl'}: give a folder with one")
    return _files(paths, folder)


def _files(paths: list[Path], folder: Path) -> dict[str, datasets.Dataset]:
    """Parquet or JSONL files by the split that their names, or else their folders, say: `data/train-00000.parquet`."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        parts = reversed(path.relative_to(folder).with_suffix("").parts)
        words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
        groups.setdefault(next((word for word in words if word in ALIASES), ""), []).append(path)
    if paths[0].suffix == ".jsonl":
        return {split: _jsonl(files) for split, files in groups.items()}
    tables = {}
    for split, files in groups.items():
        patterns = [re.sub(r"([*?[])", r"[\1]", str(file)) for file in files]  # `datasets` takes names for patterns
        what = f"{folder}: unreadable parquet among {', '.join(file.name for file in files)}"
        tables[split] = _load_dataset(what, "Fetch it again", "parquet", data_files=patterns)["train"]
    return tables


def _jsonl(paths: list[Path]) -> datasets.Dataset:
    """A table whose cells are JSON. The JSON reader of `datasets` gives up a whole file for one broken line."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) | {FOLDER: str(path.parent)}  # a TypeError if this is no object
            except (ValueError, TypeError, RecursionError) as error:
                row = {FOLDER: "", BROKEN: f"not a JSON object: line {number} of {path.name}: {first_line(error)}"}
            rows.append({key: json.dumps(cell) for key, cell in row.items()})
    keys = dict.fromkeys(key for row in rows for key in row)
    return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})


def _load_dataset(what: str, fix: str, *args, **options) -> dict[str, datasets.Dataset]:
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


def _dicts(rows: pa.Table) -> list[dict]:
    """Rows as they are stored, so that an image is bytes or a path and nobody but `decode` decodes it."""
    jsonl = FOLDER in rows.column_names
    return [{k: json.loads(v) if jsonl and v else v for k, v in row.items()} for row in rows.to_pylist()]


def _column(table: datasets.Dataset, name: str | None) -> list:
    if name is None:
        return [None] * len(table)
    columns = [column for column in (name, FOLDER) if column in table.column_names]
    return [row.get(name) for row in _dicts(table.select_columns(columns).with_format("arrow")[:])]


def _pictured(table: datasets.Dataset) -> list[bool]:
    """Which rows have something in one of the columns of pictures; none is read, let alone decoded."""
    found = np.zeros(len(table), dtype=bool)
    for column in table.column_names:
        if column.lower() in IMAGE:
            parts = [_filled(chunk) for chunk in table.data.column(column).chunks]
            found |= np.concatenate(parts) if parts else found
    return found.tolist()


def _filled(cells: pa.Array) -> np.ndarray:
    """Which cells hold anything: null, "", an empty list and, in our JSON, their like hold nothing."""
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        filled = pc.greater(pc.list_value_length(cells), 0)
    elif pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        nothing = pa.array(["", "null", '""', "[]", None], cells.type)
        filled = pc.invert(pc.is_in(cells, value_set=nothing))
    else:
        filled = pc.is_valid(cells)
    return np.asarray(pc.fill_null(filled, False))


# ---- which rows are asked for


def _by_split(label: str, found: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Tables by train, validation, test. Of `test` and `testmini` the first counts; one unnamed split is train."""
    names = {split: next((alias for alias in aliases if alias in found), None) for split, aliases in SPLITS.items()}
    unknown = [name for name in found if name not in ALIASES]
    if names["train"] is None and len(unknown) == 1:
        names["train"] = unknown[0]
    if set(names.values()) == {None}:
        raise DataError(f"data set {label!r}: its splits {', '.join(found)} are none of {', '.join(ALIASES)}")
    if unused := [name or "files without a split in their name" for name in found if name not in names.values()]:
        logging.getLogger(__name__).warning("data set %s: not used: %s", label, ", ".join(unused))
    return {split: found[name] for split, name in names.items() if name is not None}


def _uids(label: str, tables: dict[str, datasets.Dataset]) -> dict[str, list[str]]:
    plain = {split: [f"{label}/{split}/{i:06d}" for i in range(len(table))] for split, table in tables.items()}
    own = {}
    for split, table in tables.items():
        values = _column(table, pick(table.column_names, UID))
        own[split] = [p if v in (None, "") else str(v) for p, v in zip(plain[split], values, strict=True)]
    every = [uid for uids in own.values() for uid in uids]
    return own if len(set(every)) == len(every) else plain


def _choose(split: str, uids_of: dict[str, list[str]]) -> tuple[str, list[int], str]:
    """The split to read from, the rows of it, and a word on both, by the rules at the top of this file."""
    base = next(s for s in SPLITS if s in uids_of)  # what is trained on
    wanted = {"train": ("train",), "validation": ("validation", "test"), "test": ("test", "validation")}
    sources = {s: next((w for w in wanted[s] if w in uids_of), base) for s in SPLITS}
    source, uids = sources[split], uids_of[sources[split]]
    if source != base or base not in (sources["validation"], sources["test"]):
        return source, list(range(len(uids))), "" if source == split else f"its {source} split, for want of {split}"
    # A number in [0, 1) from each uid. The smallest are held out: at least one row, and never all of them.
    hashes = [int(blake2b(uid.encode(errors="replace"), digest_size=8).hexdigest(), 16) / 2**64 for uid in uids]
    count = max(min(max(sum(h < HELD_OUT for h in hashes), 1), len(uids) - 1), 0)
    held = set(sorted(range(len(uids)), key=hashes.__getitem__)[:count])
    if split == "train":
        return source, [i for i in range(len(uids)) if i not in held], f"without {count} rows held out by uid hash"
    return source, sorted(held), f"held out of {len(uids)} {source} rows by uid hash"
