"""Rows of a table as they are stored, so that an image is bytes or a path and nobody but `decode` decodes it."""

import json
from collections.abc import Iterator
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from upt.data.columns import FOLDER

HEAD = 16  # bytes of a picture that a survey sees: enough to know one by
BATCH = 1000  # rows


def row_at(table: datasets.Dataset, i: int) -> dict:
    """One row, whole."""
    return _parsed(table.with_format("arrow")[i : i + 1].to_pylist()[0])


def column(table: datasets.Dataset, name: str | None) -> list:
    """The cells of a column; None for each row where there is no such column."""
    if name is None:
        return [None] * len(table)
    names = [name for name in (name, FOLDER) if name in table.column_names]
    return [row.get(name) for row in survey(table.select_columns(names))]


def survey(table: datasets.Dataset) -> Iterator[dict]:
    """All rows in order, of what is stored as bytes but the first HEAD: no picture is read, let alone decoded."""
    for start in range(0, len(table), BATCH):
        part = table.with_format("arrow")[start : start + BATCH]
        columns = [[cell for chunk in part.column(name).chunks for cell in _light(chunk)] for name in part.column_names]
        for cells in zip(*columns, strict=True):
            yield _parsed(dict(zip(part.column_names, cells, strict=True)))


def can_hold_pictures(table: datasets.Dataset, name: str) -> bool:
    """Whether texts or bytes are among what a column is made of."""
    kind = str(table.data.schema.field(name).type)
    return "string" in kind or "binary" in kind


def _parsed(row: dict) -> dict:
    """A row of a table that `files.py` made from a text file, whose cells are JSON; any other row as it is."""
    return {name: json.loads(cell) if cell else cell for name, cell in row.items()} if FOLDER in row else row


def _light(cells: pa.Array) -> list:
    kind = cells.type
    if isinstance(cells, pa.ExtensionArray):
        return _light(cells.storage)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        parts = iter(_light(cells.flatten()))
        return [None if n is None else list(islice(parts, n)) for n in pc.list_value_length(cells).to_pylist()]
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [field.name for field in kind]
        rows = zip(*map(_light, cells.flatten()), strict=True)
        return [dict(zip(names, row)) if there else None for there, row in zip(cells.is_valid().to_pylist(), rows)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.binary_slice(cells, 0, HEAD).to_pylist()
    return cells.to_pylist()
