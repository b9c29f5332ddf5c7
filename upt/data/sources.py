"""Questions by name, hub id or local path. Pictures are decoded when a question is asked for, not before.

    load("shapes", seed=0)              drawn on the spot: needs no file and no network
    load("geoqa"), load("geometry3k"), load("mmr1")
    load("org/name", "test")            any data set of the hub; a copy in the hub cache is used as it is
    load("~/data/mine")                 a folder of parquet in the hub schema, or of JSONL with image paths; or one file
    load("shapes,runs/questions")       several as one, also by weight: shapes:3,runs/questions:1 (mixture.py)

Splits: `train`, `validation` and `test` can always be asked for, and `train` never shares a row with the other two.
A missing `test` is the `validation` split and the other way round. With neither, both are the same 5 % of `train`,
chosen by a hash of the uid, and `train` is the rest; a set without `train` divides `validation` (else `test`) so.

Uids: `<label>/<split>/<row number>`, the label being the set's name, the last part of the hub id or the folder's name,
wherever the folder lies. A column `uid`, `id` or `pid` counts instead if its values are unique over all splits in use.

A row that can't be used raises `BadRow` and is kept in `Questions.bad`; a set without one good row is a `DataError`.
Gold answers reach `Question.gold` and nothing else.
"""

import ast
import copy
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps

GEOQA, GEOMETRY3K, MMR1 = "leonardPKU/GEOQA_R1V_Train_8K", "hiyouga/geometry3k", "MMR1/MMR1-Math-RL-Data-v0"
NAMED = {"geoqa": GEOQA, "geometry3k": GEOMETRY3K, "mmr1": MMR1}
HELD_OUT = 0.05  # share of the rows, in a set that has but one split
MAX_PIXELS = 50_000_000  # read from the header, before a decompression bomb is unpacked
MIN_SIDE, MAX_ASPECT = 2, 200  # pixels, and long to short side: beyond these the Qwen image processors refuse
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: Pillow runs Ghostscript on it

# Of several names, the first that a set has is used.
QUESTION = ("problem", "question", "query", "prompt", "text")
ANSWER = ("answer", "solution", "gold", "label", "final_answer", "ground_truth")
CHOICES = ("choices", "options")
IMAGE = ("decoded_image", "images", "image", "img", "image_path")  # beside `decoded_image`, `image` is only a name
UID = ("uid", "id", "pid")
TRAIN, VALIDATION = ("train", "training"), ("validation", "valid", "val", "dev")
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": ("test", "testing", "eval", "evaluation", "testmini")}
ALIASES = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
# Qwen's own tokens too: in a question's text they would be counted as places for visual features.
PLACEHOLDER = re.compile(r"[ \t]*(?:<image ?\d*>|<\|(?:vision_start|image_pad|vision_end)\|>)[ \t]*", re.I)
FOLDER, BROKEN = "__folder__", "__broken__"  # our columns beside those of JSONL: where a line is from, what ails it


class DataError(ValueError):
    """A data set can't be used: what was wrong, what was found, what to type."""


class BadRow(ValueError):
    """One row can't be used. `reason` reads `kind` or `kind: detail`."""

    def __init__(self, uid: str, reason: str):
        super().__init__(f"{uid}: {reason}")
        self.uid, self.reason = uid, reason


@dataclass(frozen=True, eq=False)
class Question:
    """One question as the model sees it, and the gold answer for diagnostics. Compared by identity."""

    uid: str
    question: str  # without image placeholders
    choices: list[str] | None  # the option texts in order A, B, …
    image: Image.Image | None  # RGB; None for a text-only question
    gold: str | None
    kind: str | None = None  # kind of question, where the set has several


class Questions:
    """The questions of one split. `read(i)` gives what question i is made of, or raises `BadRow`; `note` goes along."""

    def __init__(self, name: str, split: str, uids: list[str], read: Callable, has_gold: bool, note: str):
        self.name, self.split, self.uids, self.has_gold, self.note = name, split, uids, has_gold, note
        self.bad: dict[str, str] = {}  # uid → reason, of the rows met so far
        self.weights: list[tuple[int, float]] | None = None  # (rows, weight) of sets that are drawn by weight
        self._read, self._blind, self._labelled = read, False, False

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, i: int) -> Question:
        try:
            q = self._read(i)
            if self._labelled and q.gold is None:
                raise BadRow(q.uid, "no gold answer")
            return Question(q.uid, q.question, q.choices, q.image, None if self._blind else q.gold, q.kind)
        except BadRow as bad:
            self.bad[bad.uid] = bad.reason
            raise

    def __iter__(self) -> Iterator[Question]:
        return (question for i in range(len(self)) for question in self.get([i]))

    def get(self, indices: Iterable[int]) -> list[Question]:
        """The good questions among these rows, in this order; the others are recorded in `bad`."""
        found = []
        for i in indices:
            with suppress(BadRow):
                found.append(self[i])
        return found

    def without_gold(self) -> "Questions":
        """The same questions with every gold None."""
        blind = copy.copy(self)
        blind.bad, blind.has_gold, blind._blind = dict(self.bad), False, True
        return blind

    def with_gold(self) -> "Questions":
        """The same questions, of which those without gold are bad rows."""
        labelled = copy.copy(self)
        labelled.bad, labelled._labelled = dict(self.bad), True
        return labelled

    def describe(self) -> str:
        """One line for the start of a run: how many questions, which rows of the set, whether there is gold."""
        no_gold = "" if self.has_gold else "no gold answers: label-free metrics only"
        return "; ".join(filter(None, (f"{self.name}/{self.split}: {len(self)} questions", self.note, no_gold)))

    def report_bad(self, show: int = 3) -> str | None:
        """One line on the bad rows met so far, the first few by uid and reason; None if there are none."""
        shown = [f"{uid} ({reason})" for uid, reason in list(self.bad.items())[:show]]
        more = [f"and {len(self.bad) - show} more"] if len(self.bad) > show else []
        counted = f"{self.name}/{self.split}: {len(self.bad)} of {len(self)} rows skipped: "
        return counted + "; ".join(shown + more) if self.bad else None


def load(name_or_path: str | Path, split: str = "train", seed: int = 0, limit: int | None = None) -> Questions:
    """The questions of one split. Decodes pictures only until one row is found good.

    `seed` chooses the pictures of `shapes` and changes no other set. `limit` keeps the first so many rows.
    Raises `DataError` if there is no such set, no question column, or no good row.
    """
    name, split = str(name_or_path), ALIASES.get(split, split)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: give a number of rows from 1, or None for all of them")
    import mixture  # here, since it is made of sets that this function loads

    if mixture.is_mixture(name):
        return mixture.load(name, split, seed, limit)
    if name == "shapes":
        import shapes

        made = shapes.questions(split, seed, limit)
        return Questions(name, split, list(made.uids), made.__getitem__, True, f"seed {seed}")
    if split not in SPLITS:
        raise DataError(f"no split {split!r}: ask for {', '.join(SPLITS)}")

    label, folder, found = _find(name)
    tables = _by_split(label, found)
    uids_of = _uids(label, tables)
    source, chosen, note = _choose(split, uids_of)
    table, chosen, uids = tables[source].with_format("arrow"), chosen[:limit], uids_of[source]
    columns = [_pick(table.column_names, names) for names in (QUESTION, ANSWER, CHOICES)]
    where = f"data set {label!r}, split {split!r}"
    if columns[0] is None and len(table) and BROKEN not in table.column_names:
        have, want = ", ".join(name for name in table.column_names if name != FOLDER), ", ".join(QUESTION)
        raise DataError(f"{where}: no column for the question among {have}. Rename one to any of {want}")

    def read(i: int) -> Question:
        return _question(uids[chosen[i]], _dicts(table[chosen[i]])[0], columns, folder)

    answers = _column(table, columns[1])
    has_gold = any(_gold(answers[i]) is not None for i in chosen)
    questions = Questions(label, split, [uids[i] for i in chosen], read, has_gold, note)
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
        weight = "; a weight needs several sets: a:3,b:1" if re.search(r":[\d.]+$", name) else ""
        raise DataError(
            f"{name!r} is {known}, nor a folder, .parquet or .jsonl file that exists{weight}. Give one as DATA="
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
                row = {FOLDER: "", BROKEN: f"not a JSON object: line {number} of {path.name}: {_line(error)}"}
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
        raise DataError(f"{what}: {_line(error.__cause__ if wrapped else error)}. {fix}") from error


def _line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _dicts(rows: pa.Table) -> list[dict]:
    """Rows as they are stored, so that an image is bytes or a path and nobody but `decode` decodes it."""
    jsonl = FOLDER in rows.column_names
    return [{k: json.loads(v) if jsonl and v else v for k, v in row.items()} for row in rows.to_pylist()]


def _column(table: datasets.Dataset, name: str | None) -> list:
    if name is None:
        return [None] * len(table)
    columns = [column for column in (name, FOLDER) if column in table.column_names]
    return [row.get(name) for row in _dicts(table.select_columns(columns).with_format("arrow")[:])]


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
        values = _column(table, _pick(table.column_names, UID))
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


def _pick(columns: list[str], names: tuple[str, ...]) -> str | None:
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


# ---- what a row says


def _question(uid: str, row: dict, columns: list[str | None], folder: Path | None) -> Question:
    said, gold, choices = (row.get(column) for column in columns)
    text = PLACEHOLDER.sub(" ", said if isinstance(said, str) else "").encode(errors="ignore").decode().strip()
    if row.get(BROKEN) or not text:
        raise BadRow(uid, row.get(BROKEN) or "no question text")
    image = _image(uid, row, folder)
    if image is None and PLACEHOLDER.search(said):
        raise BadRow(uid, "no image where the text announces one")
    return Question(uid, text, _choices(uid, choices), image, _gold(gold))


def _gold(value) -> str | None:
    text = "" if value is None or value != value else str(value)  # a missing number is NaN, which differs from itself
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.I | re.S)
    return (tags[-1] if tags else text).strip() or None


def _choices(uid: str, value) -> list[str] | None:
    """A list, a mapping from letter to text, or either of them written as JSON or Python → the texts in order."""
    for parse in (json.loads, ast.literal_eval):
        if isinstance(value, str) and value.strip():
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = parse(value)
    if isinstance(value, dict):
        value = [value[letter] for letter in sorted(value)]
    if value and not isinstance(value, list | tuple):
        raise BadRow(uid, f"choices are no list: {str(value)[:40]!r}")
    return [str(text) for text in value or [] if text is not None] or None


def _image(uid: str, row: dict, folder: Path | None) -> Image.Image | None:
    lower = {column.lower(): value for column, value in row.items()}
    value = next((lower[name] for name in IMAGE if lower.get(name) not in (None, "", [])), None)
    stored = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if len(stored) > 1:
        raise BadRow(uid, f"several images are not supported: {len(stored)} in this row")
    content = stored[0] if stored else None
    if isinstance(content, dict):
        content = content.get("path") if content.get("bytes") is None else content["bytes"]
    if content is None or isinstance(content, bytes):
        return None if content is None else decode(uid, content)
    path = str(content)[:80]
    if folder is None or not isinstance(content, str) or "\0" in content:
        raise BadRow(uid, f"neither image bytes nor a path to a file: {path!r}")
    try:
        # In the hub cache the files of a snapshot are links to `blobs`, beside `snapshots`.
        root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
        file = (Path(row.get(FOLDER, folder)) / content).resolve()
        if not file.is_relative_to(root):
            raise BadRow(uid, f"image path outside the data folder: {path}")
        if not file.is_file():
            raise BadRow(uid, f"missing image file: {path}")
        content = file.read_bytes()
    except (OSError, RuntimeError) as error:  # too long a name, links in a circle, no permission
        raise BadRow(uid, f"unreadable image path: {path}: {_line(error)}") from error
    return decode(uid, content)


def decode(uid: str, content: bytes) -> Image.Image:
    """Encoded bytes → an RGB picture, upright by its EXIF orientation, what is transparent turned white."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadRow(uid, f"over the pixel limit: {width} × {height} > {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise BadRow(uid, f"image shape not supported: {width} × {height}")
        image = ImageOps.exif_transpose(image)  # from here on all of the file is read, `open` reads but its header
        if image.mode.startswith("I"):  # 16 bits of grey, which `convert("RGB")` would clip to white
            image = image.convert("I").point(lambda grey: grey / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadRow:
        raise
    except Exception as error:  # decoders meet damaged bytes with nearly anything, struct.error and SyntaxError too
        kinds = {Image.DecompressionBombError: "over the pixel limit", Image.UnidentifiedImageError: "not an image"}
        kind = "truncated image" if "truncated" in str(error).lower() else "undecodable image"
        raise BadRow(uid, f"{kinds.get(type(error), kind)}: {_line(error)}") from error
