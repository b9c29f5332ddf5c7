"""What a benchmark is: questions in its owners' layout, their rule, and how they ask. One module each fills it in.

benchmark("mathvista").questions(folder)       by split, from JSON, JSONL or the hub's parquet
benchmark("mathvista").extract(response, question), .is_right(question, answer)
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from upt.data.choices import lettered as lettered
from upt.errors import DataError, in_words

NAMES = ("mathvision", "mathverse", "mathvista", "wemath", "logicvista", "dynamath")


class Question(NamedTuple):
    """One question of a benchmark.

    `gold` is the owners' answer, "" where they publish none; `choices` the texts of A, B, … if there are any.
    """

    id: str
    text: str
    gold: str
    choices: tuple[str, ...]
    image: str | bytes  # a path inside the folder, an encoded picture, or "" for a question in text alone
    categories: dict[str, tuple[str, ...]]
    answer_type: str = "text"
    precision: int = 0  # decimals of a float
    problem: str = ""  # what the question is a part or a variant of
    query: str = ""  # how the owners' files word the whole prompt, where they do
    alias: str = ""  # what the owners call it, where that is one question of several files

    @property
    def multi(self) -> bool:
        """Whether several letters can be the answer."""
        return self.answer_type == "letters"


def gold_of(value) -> str:
    """The owners' answer as text, "" where they publish none."""
    return "" if value is None else str(value)


def texts_of(values) -> tuple[str, ...]:
    """Options as texts; () for none. Raises TypeError for what is no list."""
    if not isinstance(values, list | None):
        raise TypeError(f"the options are {type(values).__name__}, not a list")
    return tuple(map(str, values or ()))


def plain_response(key: str | None, row: dict) -> tuple[str, str | None]:
    """(id, text) of a response: its `id` or `pid`, or the key that it stands under."""
    if (uid := row.get("id", row.get("pid", key))) is None:
        raise KeyError("id")
    return str(uid), row["response"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its owners' protocol. Docstrings of the modules state the rules and where they are from."""

    title: str
    files: tuple[str, ...]
    """the owners' files of questions, as patterns"""
    categories: tuple[str, ...]
    """what accuracy is broken down by"""
    question: Callable[[str | None, dict, str], Question]
    """(key, row, split) to a question; KeyError, TypeError or ValueError for what is none"""
    extract: Callable[[str, Question], tuple[str, str]]
    """the answer that a response gives, "" for none, and the rule that found it; any text in bounded time"""
    is_right: Callable[[Question, str], bool]
    """the owners' comparison of an extracted answer with gold"""
    prompt: Callable[[Question], str]
    """the question as the owners have it asked"""
    unfound: tuple[str, ...] = ("none",)
    """methods of `extract` that say that no rule found an answer"""
    response: Callable[[str | None, dict], tuple[str, str | None]] = plain_response
    """(key, row) of a file of responses to (id, text); KeyError or TypeError for what is none"""
    metrics: Callable[[list[dict], dict[str, Question]], dict] = lambda rows, questions: {}
    """further figures of rows with `id`, `sample` and `correct`, nested dicts of shares and counts"""
    owners_use_a_model: bool = True
    """whether the owners extract answers by a large model, so that rules are a stand-in"""
    choices_in_text: bool = False
    """whether `text` names the choices already"""
    variants: bool = False
    """whether the files are variants of the same questions, all to be asked, and not splits"""

    def questions(self, folder: Path, pictures: bool = False) -> dict[str, list[Question]]:
        """Questions by split, from the owners' files or else the hub's parquet.

        With `pictures`, parquet counts for a split whose other pictures are not all there; without, none are read.
        Raises FileNotFoundError for a folder without questions, ValueError naming the row that is none.
        """
        files = [file for pattern in self.files for file in sorted(folder.glob(pattern))]
        tables = [file for file in sorted(folder.rglob("*.parquet")) if ".cache" not in file.parts]
        if not files and not tables:
            raise FileNotFoundError(f"{folder} has no {self.files[0]} and no parquet: give {self.title}'s data folder")
        found = self._read(files, folder, pictures)
        whole = [all(has_picture(folder, question) for question in found[split]) for split in found]
        if tables and (not files or (pictures and not all(whole))):
            stored = self._read(tables, folder, pictures)
            keep = {split for split, complete in zip(found, whole, strict=True) if complete}
            found |= {split: questions for split, questions in stored.items() if split not in keep}
        return found

    def _read(self, files: list[Path], folder: Path, pictures: bool) -> dict[str, list[Question]]:
        found: dict[str, dict[str, Question]] = {}
        for file in files:
            # A part of a split in parquet is called test-00000-of-00002; variants may lie in folders of their own.
            split, inner = file.stem.partition("-0")[0], file.parent.relative_to(folder)
            split = inner.name if self.variants and inner.name and file.suffix == ".json" else split
            of_split = found.setdefault(split, {})
            for where, key, row in rows(file, pictures):
                try:
                    if not isinstance(row, dict):
                        raise TypeError(f"it is {type(row).__name__}, not an object with fields")
                    question = self.question(key, row, split)
                    if not isinstance(question.text, str):
                        raise TypeError(f"its text is {type(question.text).__name__}")
                    if file.suffix != ".parquet" and isinstance(question.image, str) and question.image:
                        question = question._replace(image=str(inner / question.image))
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(
                        f"{where} is no {self.title} question: {in_words(error)}; fetch the file again"
                    ) from None
                if question.id in of_split:
                    raise DataError(f"{where}: the id {question.id!r} was there before; remove one of the two")
                of_split[question.id] = question
        if files and not any(found.values()):
            raise DataError(f"{folder}: no question in {', '.join(file.name for file in files)}; fetch the files again")
        return {split: list(questions.values()) for split, questions in found.items() if questions}

    def by_id(self, folder: Path) -> dict[str, Question]:
        """The questions of all splits by id, and by alias where that is unique; of equal ids the first counts."""
        every = [question for questions in self.questions(folder).values() for question in questions]
        aliases = Counter(question.alias for question in every if question.alias)
        found = {question.alias: question for question in every if aliases[question.alias] == 1}
        return found | {question.id: question for question in reversed(every)}


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name, one of NAMES."""
    return import_module(f"eval.{name}").BENCHMARK


def folder_of(name: str | Path) -> Path:
    """A folder as it is, or the local copy of a hub data set, fetched if it is not in the cache.

    Raises ValueError for what is neither, or cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise DataError(f"there is no folder {path}: give the benchmark's data folder, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:  # the hub first, which fetches what a copy in the cache lacks
        return Path(snapshot_download(str(name), repo_type="dataset"))
    except Exception as error:  # offline, gated, missing: the hub's errors have no common parent
        with suppress(OSError, ValueError):
            return Path(snapshot_download(str(name), repo_type="dataset", local_files_only=True))
        raise DataError(f"{name} is no folder here and did not come from the hub: {error}. Fetch it where there is a "
                         f"network: hf download --repo-type dataset {name} --local-dir DIR") from error  # fmt: skip


def picture_path(folder: Path, question: Question) -> Path:
    """Where a picture lies: at its path in the folder, in its `images`, or in the folder above, as owners have it."""
    places = [folder / question.image, folder / "images" / question.image, folder.parent / question.image]
    return next((path for path in places if path.is_file()), places[0])


def has_picture(folder: Path, question: Question) -> bool:
    """Whether a question's picture is there, or it has none."""
    return isinstance(question.image, bytes) or not question.image or picture_path(folder, question).is_file()


def grouped(rows: list[dict], questions: dict[str, Question]) -> tuple[list[dict[str, bool]], int]:
    """Verdicts by id of every problem (`Question.problem`) and sample that has all of them, and how many have not."""
    parts, verdicts = defaultdict(set), defaultdict(dict)
    for question in questions.values():
        parts[question.problem].add(question.id)
    for row in rows:
        verdicts[row["sample"], questions[row["id"]].problem][row["id"]] = row["correct"]
    whole = [found for (_, problem), found in verdicts.items() if found.keys() == parts[problem]]
    return whole, len(verdicts) - len(whole)


def rows(file: Path, pictures: bool = True) -> Iterator[tuple[str, str | None, dict]]:
    """(where it stands, key, row) of parquet, JSONL, a JSON list, or a JSON object of rows by key.

    The key is None but for the last. Without `pictures`, columns of parquet that hold them are left out. Raises
    ValueError for what is none of these, FileNotFoundError for what is no file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: give a JSONL or JSON file")
    if file.suffix == ".parquet":
        yield from _table(file, pictures)
        return
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]  # by \n alone
    objects = all(line[0] == "{" and line.rstrip()[-1] == "}" for _, line in lines)
    if file.suffix == ".jsonl" or (len(lines) > 1 and objects):
        for number, line in lines:
            yield f"{file}:{number}", None, _parsed(f"{file}:{number}", line)
        return
    whole = _parsed(str(file), text)
    if not isinstance(whole, dict | list):
        raise DataError(f"{file} holds {type(whole).__name__}, expected a JSON list or object of rows")
    for key, row in whole.items() if isinstance(whole, dict) else enumerate(whole):
        yield f"{file}:{key}", key if isinstance(whole, dict) else None, row


def _table(file: Path, pictures: bool) -> Iterator[tuple[str, None, dict]]:
    import pyarrow.parquet  # here, for it takes its time to import

    try:
        schema = pyarrow.parquet.read_schema(file)
        bare = [field.name for field in schema if "bytes" not in str(field.type)]
        table = pyarrow.parquet.read_table(file, columns=None if pictures else bare)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet: {error}; fetch it again") from None
    for number, row in enumerate(table.to_pylist()):
        yield f"{file}:{number}", None, row


def picture(row: dict, *names: str) -> str | bytes:
    """The picture of a row, from the first of these columns that has one: its path or its bytes, "" for none."""
    value = next((row[name] for name in names if row.get(name)), "")
    if isinstance(value, dict):  # as parquet of the hub holds it
        value = value.get("bytes") or value.get("path") or ""
    return value


def _parsed(where: str, text: str):
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}; mend the line, or fetch the file again") from None


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
