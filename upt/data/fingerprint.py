"""What a data set holds, in digests, so that a run notices when its data has changed under it.

Each column has a digest over all rows, and each row one over its columns but the answers, which label-free training
never reads. No picture is decoded: of bytes, and of files that a cell names, the size and the content enter, of more
than 1 MiB 16 pieces of 64 KiB, the first of them at the start, the last at the end, the others evenly between. Where a
set lies and how its files are called does not enter.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from upt.data.chat import ASSISTANT, USER, turns
from upt.data.columns import ANSWER, FOLDER, QUESTION, pick, unwritten
from upt.data.marks import take_out
from upt.data.pictures import held, local
from upt.data.questions import BadRow, Questions

PIECE, PIECES = 64 << 10, 16  # bytes, and how many of them are looked at; all of what is not larger
BATCH = 1000  # rows
ANSWERS = "answers"  # what the column of gold answers is called here
FILE = re.compile(r"[^\0\n]{1,500}")  # what could name one


def of_questions(questions: Questions) -> dict:
    """{"count": rows, "columns": {name: digest}, "names": [uid of each row], "digests": [digest of each row]}."""
    rows = ({} for _ in questions.uids) if questions.stored is None else questions.stored()
    return fingerprint(zip(questions.uids, rows, strict=True))


def of_files(paths: Iterable[Path]) -> dict:
    """The same of files, a row each."""
    return fingerprint((path.name, {"content": of_file(path)}) for path in paths)


def fingerprint(named: Iterable[tuple[str, dict]]) -> dict:
    """The same of rows with their names."""
    columns, names, digests = {"uid": blake2b(digest_size=8)}, [], []
    for name, row in named:
        whole = blake2b(digest_size=6)
        for column, cell in [("uid", name), *sorted(row.items())]:
            text = json.dumps(cell, sort_keys=True, default=str).encode() + b"\n"
            columns.setdefault(column, blake2b(digest_size=8)).update(text)
            if column != ANSWERS:
                whole.update(column.encode() + b":" + text)
        names.append(name)
        digests.append(whole.hexdigest())
    found = {column: digest.hexdigest() for column, digest in columns.items()}
    return {"count": len(names), "columns": found, "names": names, "digests": digests}


def difference(then: dict, now: dict) -> str | None:
    """How the data of two fingerprints differs: rows, columns, and the first row that does; None if it does not.

    Answers are left out: `same_answers` tells. Of `then` names and digests of rows may be missing.
    """
    old, new = ({name: of["columns"][name] for name in of["columns"] if name != ANSWERS} for of in (then, now))
    if then["count"] == now["count"] and old == new:
        return None
    said = [f"{now['count']} rows, there were {then['count']}"] if now["count"] != then["count"] else []
    said += [f"column {name!r} is gone" for name in old.keys() - new.keys()]
    said += [f"column {name!r} is new" for name in new.keys() - old.keys()]
    if now["count"] == then["count"]:
        said += [f"column {name!r} differs" for name in old if name in new and old[name] != new[name]]
    rows = zip(then.get("digests", ()), now["digests"])  # without those of `then`, no row is named
    first = next((i for i, (one, two) in enumerate(rows) if one != two), min(then["count"], now["count"]))
    was, here = (of.get("names", [])[first : first + 1] for of in (then, now))
    if was == here:
        said += [f"first in {name}" for name in here]
    else:
        said += [f"row {first + 1} was {name}" for name in was] + [f"row {first + 1} is {name}" for name in here]
    return ", ".join(said)


def same_answers(then: dict, now: dict) -> bool:
    return then["columns"].get(ANSWERS) == now["columns"].get(ANSWERS)


# ------------------------------------------------------------------------------------------------------------- cells


def rows_of(table: datasets.Dataset, chosen: list[int], folder: Path | None) -> Iterator[dict]:
    """Some rows of a table, as JSON can hold them; pictures by their digests. Paths lie in `folder`, or in FOLDER.

    Columns of answers, read or not, are together under ANSWERS, and so are the replies in chats.
    """
    names, table = table.column_names, table.with_format("arrow")
    answers = {name for name in names if name == ANSWERS or pick([name], ANSWER)}
    chats = [name for name in names if pick([name], QUESTION)]
    for start in range(0, len(chosen), BATCH):
        for cells in zip(*table[chosen[start : start + BATCH]].columns, strict=True):
            row = dict(zip(names, cells, strict=True))
            own = row.pop(FOLDER, None)  # of a text file, whose cells are JSON
            where = folder if own is None else Path(json.loads(own.as_py()) if own.is_valid else ".")
            found = {name: of_cell(cell, where, own is not None) for name, cell in row.items()}
            golds = {name: found.pop(name) for name in names if name in answers}
            for name in chats:
                found[name], replies = without_replies(found[name])
                golds |= {name: replies} if replies else {}
            yield found | ({ANSWERS: golds} if golds else {})


def without_replies(cell) -> tuple[object, list]:
    """A chat, as `of_cell` gives it, without what the assistant says after the last question, and that.

    Other cells are as they were.
    """
    chat = turns(cell)
    last = max((i for i, turn in enumerate(chat or ()) if turn.role in USER), default=None)
    if last is None:
        return cell, []
    replies = [turn for turn in chat[last + 1 :] if turn.role in ASSISTANT]
    return chat[: last + 1] + [turn for turn in chat[last + 1 :] if turn.role not in ASSISTANT], replies


def of_cell(cell: pa.Scalar, folder: Path | None, is_json: bool):
    """A cell as JSON can hold it, bytes and files that it names by their digests; `is_json`: it is a text of JSON."""
    try:
        return plain(json.loads(cell.as_py()) if is_json and cell.is_valid else cell, folder)
    except RecursionError:  # nested too deeply, which no row is read with
        return str(cell)


def plain(cell, folder: Path | None):
    cell = unwrapped(cell)
    if isinstance(cell, memoryview):
        return of_bytes(cell)
    if isinstance(cell, dict):
        found = {name: plain(value, folder) for name, value in cell.items()}
        return found["bytes"] if found.get("bytes") is not None else found  # the path beside bytes is only a name
    if isinstance(cell, list):
        return [plain(value, folder) for value in cell]
    if isinstance(cell, str) and turns(cell):  # a chat, as CSV has it
        return plain(unwritten(cell), folder)
    return of_text(cell, folder) if isinstance(cell, str) and folder is not None else cell


def of_text(text: str, folder: Path) -> str | list[str]:
    """A text, with the digests of files that its marks or a list in it name; of a path to a file the digest alone."""
    if digest := of_named(text, folder):
        return digest
    names = [*take_out(text)[1].paths]
    if text[:1] in ("[", "{"):  # as CSV has them
        with suppress(BadRow):
            names += [name for name in held("", text) if isinstance(name, str)]
    return [text, *found] if (found := [*filter(None, (of_named(name, folder) for name in names))]) else text


def of_named(name: str, folder: Path) -> str | None:
    """The digest of the file that is called so; None if there is none."""
    if FILE.fullmatch(name):
        with suppress(OSError, ValueError):
            path = os.path.join(folder, local(name))
            if os.path.isfile(path):  # asked of most texts, and much faster than a Path
                return of_file(path)
    return None


def unwrapped(cell):
    """An Arrow scalar as Python's, but for what is in it, and without copying bytes: few of them are looked at."""
    if isinstance(cell, pa.ExtensionScalar):
        cell = cell.value
    if not isinstance(cell, pa.Scalar):
        return cell
    if not cell.is_valid:
        return None
    if isinstance(cell, pa.StructScalar):
        return dict(cell.items())
    if isinstance(cell, pa.ListScalar):
        return [*cell]
    if pa.types.is_binary(cell.type) or pa.types.is_large_binary(cell.type):
        return memoryview(cell.as_buffer())
    return cell.as_py()


def of_bytes(content: memoryview) -> str:
    return of_pieces(pa.BufferReader(content), len(content))


def of_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return of_pieces(file, os.fstat(file.fileno()).st_size)


def of_pieces(file: BinaryIO, size: int) -> str:
    """The digest of what is in a file, by its size and all of it, or PIECES of it."""
    digest = blake2b(digest_size=8)
    if size <= PIECE * PIECES:
        digest.update(file.read())
    else:
        for i in range(PIECES):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return f"{size}:{digest.hexdigest()}"
