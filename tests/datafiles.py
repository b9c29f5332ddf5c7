"""Data sets in files, for tests: pictures, JSONL, parquet."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from upt.data import Question, load


def picture(colour="red", size=(40, 30), kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def plain(n, start=0, **more):
    return [{"problem": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(start, start + n)]


def only(folder: Path, row: dict) -> Question:
    """The question that one row gives, in a set of its own."""
    jsonl(folder / "train.jsonl", [row])
    return load(folder)[0]
