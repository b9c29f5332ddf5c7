"""The keys and values of decoding, stored where rows can share them, for attention.py and its Triton form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

ROWS = 16  # of a tile


class Places:
    """Which of `count` places of a part every row looks at; rows of one place are served together.

    Made on the host; `set` puts in others when rows change. `of_row` and `tiles` stay where they are in memory, as a
    CUDA graph needs it. Raises ValueError for a place that is not in -1 .. count - 1; -1 stands for none.

    of_row (R,) int64: the place of a row.
    tiles (`tile_count`, 1 + ROWS) int32: a place, and rows that look at it, in any order; -1 stands for none.
    And for the reference, made when it asks:
    members (n, G) int64: the rows of the first n places, which are all that are used; what is left over holds 0.
    slot (R,) int64: where in members.flatten() a row stands. idle: the rows that look at no place, None if all do.
    """

    def __init__(self, of_row: Sequence[int], count: int, device: torch.device | str = "cpu"):
        self.count = count
        self.of_row = torch.empty(len(of_row), dtype=torch.int64, device=device)
        self.tiles = torch.empty(tile_count(len(of_row), count), 1 + ROWS, dtype=torch.int32, device=device)
        self.set(of_row)

    def set(self, of_row: Sequence[int]) -> None:
        """As many rows as before, at other places."""
        if len(of_row) != len(self.of_row) or not all(-1 <= place < self.count for place in of_row):
            raise ValueError(f"expected {len(self.of_row)} places in -1 .. {self.count - 1}, not {list(of_row)}")
        self.__dict__.pop("grouped", None)
        self.rows_of = members = [[] for _ in range(max(of_row, default=-1) + 1)]
        for row, place in enumerate(of_row):
            if place >= 0:
                members[place].append(row)
        starts = [(place, start) for place, rows in enumerate(members) for start in range(0, len(rows), ROWS)]
        tiles = [[place, *members[place][start : start + ROWS]] for place, start in starts]
        self.tiles.copy_(table(tiles + [[]] * (len(self.tiles) - len(tiles)), 1 + ROWS, -1))
        self.of_row.copy_(torch.tensor(of_row))

    @cached_property
    def grouped(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """members, slot and idle."""
        group, device = max(map(len, self.rows_of), default=0), self.of_row.device
        slot = {row: place * group + i for place, rows in enumerate(self.rows_of) for i, row in enumerate(rows)}
        idle = [row for row in range(len(self.of_row)) if row not in slot]
        slots = torch.tensor([slot.get(row, 0) for row in range(len(self.of_row))], dtype=torch.int64, device=device)
        members = table(self.rows_of, group, 0).to(device)
        return members, slots, torch.tensor(idle, device=device) if idle else None


def table(rows: list[list[int]], width: int, filler: int) -> torch.Tensor:
    filled = [row + [filler] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), width)


def tile_count(rows: int, places: int) -> int:
    """How many tiles suffice, however the rows are distributed over the places."""
    used = min(rows, places)
    return used + (rows - used) // ROWS


@dataclass(frozen=True)
class Part:
    """Keys and values of n places, each with room for L tokens."""

    keys: torch.Tensor  # (n, Hkv, L, D)
    values: torch.Tensor  # (n, Hkv, L, D)
    lengths: torch.Tensor  # (n,) int32 or int64: tokens in use, 0 .. L; what lies beyond may hold anything, also nan
    places: Places | None = None  # None: row r looks at place r, and n >= R
