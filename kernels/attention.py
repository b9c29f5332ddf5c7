"""Attention of decoding: every row has one query token and looks at several parts of keys, merged by log-sum-exp.

A part whose keys several rows share, such as the prompt of a group, is stored once and read once for all of them:

    prompts = Part(prompt_keys, prompt_values, prompt_lengths, Places(prompt_of_row, count, device))
    own = Part(keys, values, lengths)  # row r looks at place r
    out = decode_attention(query, [prompts, own])

With query q, head size D, and s_j = scale q.k_j of the keys j of one part, a part leaves m = max s_j, the sum
S = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j. The softmax over all parts together is then
sum_p exp(m_p - M) o_p / sum_p exp(m_p - M) S_p with M = max m_p.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.dispatch import use_triton

ROWS = 16  # of a tile


class Places:
    """Which of `count` places of a part every row looks at; rows of one place are served together.

    Made on the host; `set` puts in others when rows change. `of_row` and `tiles` stay where they are in memory, as a
    CUDA graph needs it. Raises ValueError for a place that is not in -1 .. count - 1; -1 stands for none.

    of_row (R,) int64: the place of a row.
    tiles (`tile_count`, 1 + ROWS) int32: a place, and rows that look at it, in any order; -1 stands for none.
    members (n, G) int64: the rows of the first n places, which are all that are used; what is left over holds 0.
    rank (R,) int64: where a row stands among the members of its place. idle: whether a row looks at none.
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
        members: dict[int, list[int]] = {}
        rank = [0] * len(of_row)
        for row, place in enumerate(of_row):
            if place >= 0:
                rank[row] = len(members.setdefault(place, []))
                members[place].append(row)
        tiles = [
            [place, *rows[start : start + ROWS]]
            for place, rows in sorted(members.items())
            for start in range(0, len(rows), ROWS)
        ]
        tiles += [[]] * (len(self.tiles) - len(tiles))
        self.tiles.copy_(torch.tensor([tile + [-1] * (1 + ROWS - len(tile)) for tile in tiles]).view(-1, 1 + ROWS))
        self.of_row.copy_(torch.tensor(of_row))
        self.idle = min(of_row, default=0) < 0
        width = max(map(len, members.values()), default=1)
        table = [members.get(place, []) for place in range(max(members, default=-1) + 1)]
        table = torch.tensor([rows + [0] * (width - len(rows)) for rows in table], dtype=torch.int64).view(-1, width)
        self.members, self.rank = table.to(self.of_row.device), torch.tensor(rank, device=self.of_row.device)


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


@torch.no_grad()
def decode_attention(query: torch.Tensor, parts: Sequence[Part], scale: float | None = None) -> torch.Tensor:
    """softmax(scale query.keys) values over the keys of all parts that a row looks at: (R, Hq, D) in query's type.

    query (R, Hq, D) of any strides, in bf16, fp16, fp32 or fp64 as the keys and values; Hq is a multiple of Hkv, and
    query head h reads key head h // (Hq / Hkv). `scale` is D^-1/2 unless given. Sums are in float32, in float64 for
    float64. A row without keys gives 0. No gradient. In Triton nothing is read on the host and all shapes come from
    those of the arguments, so that a CUDA graph can capture the call. Raises ValueError when shapes or types disagree.
    """
    rows, heads, dim = query.shape
    if not parts:
        raise ValueError("expected at least one part of keys")
    for part in parts:
        count, kv_heads, _, width = part.keys.shape
        known = part.places.count == count and len(part.places.of_row) == rows if part.places else count >= rows
        if not known or width != dim or heads % kv_heads or part.keys.shape != part.values.shape:
            raise ValueError(
                f"a part of keys {tuple(part.keys.shape)} and values {tuple(part.values.shape)} does not fit "
                f"queries {tuple(query.shape)} or its places; see Part"
            )
        if part.lengths.shape != (count,) or not query.dtype == part.keys.dtype == part.values.dtype:
            raise ValueError(
                f"expected ({count},) lengths and one type of queries, keys and values, not "
                f"{tuple(part.lengths.shape)}; {query.dtype}, {part.keys.dtype}, {part.values.dtype}"
            )
    scale = dim**-0.5 if scale is None else scale
    if use_triton(query):
        from kernels import attention_triton

        return attention_triton.decode_attention(query, parts, scale)
    out = reference(query, parts, scale)
    if math.isnan(out.sum()):  # 0 times a nan beyond a length; rare, and looking is cheaper than clearing every time
        out = reference(query, [cleared(part) for part in parts], scale)
    return out


def reference(query: torch.Tensor, parts: Sequence[Part], scale: float) -> torch.Tensor:
    """As `decode_attention`, where no value beyond a length is nan or infinite."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(wide) * scale
    found = [part_attention(scaled, part) for part in parts if part.keys.shape[2]]
    found = [triple for triple in found if triple]
    if not found:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    if len(found) == 1:
        top, total, out = found[0]
    else:
        tops, totals, outs = zip(*found)
        top = torch.stack(tops)
        weights = (top - top.amax(0)).exp_()
        total = sum(weight * total for weight, total in zip(weights, totals))
        out = sum(weight * out for weight, out in zip(weights, outs))
    # A sum has a summand exp(0), so that only rows without keys are below 1.
    return (out / total.clamp(min=1)).view(query.shape).to(query.dtype)


def part_attention(scaled: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """m, S (R, Hkv, rep, 1) and o (R, Hkv, rep, D) of one part for scaled queries (R, Hq, D); None without any key."""
    places, heads = part.places, part.keys.shape[1]
    rows = scaled.unflatten(1, (heads, -1))  # (R, Hkv, rep, D)
    count = len(rows) if places is None else len(places.members)
    if not count:
        return None
    shortest, longest = map(int, part.lengths[:count].aminmax())
    if not longest:
        return None
    queries = rows
    if places is not None:
        head = torch.arange(heads, device=rows.device)
        queries = rows[places.members[:, None, :], head[None, :, None]].flatten(2, 3)  # (n, Hkv, G rep, D)
    keys, values = (t[:count, :, :longest].to(scaled.dtype) for t in (part.keys, part.values))
    weights = queries @ keys.mT  # (n, Hkv, G rep, longest)
    if shortest < longest:
        weights.masked_fill_(beyond(part.lengths[:count], longest)[:, None], -math.inf)
    top = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)  # -inf - -inf would be nan
    weights.sub_(top).exp_()
    found = top, weights.sum(-1, keepdim=True), weights @ values
    if places is None:
        return found
    shape = (-1, rows.shape[2])
    at = places.of_row.clamp(min=0)[:, None], head, places.rank[:, None]
    top, total, out = (t.unflatten(2, shape)[at] for t in found)
    if places.idle:
        nowhere = (places.of_row < 0)[:, None, None, None]
        top.masked_fill_(nowhere, torch.finfo(top.dtype).min)
        total.masked_fill_(nowhere, 0.0)
        out.masked_fill_(nowhere, 0.0)
    return top, total, out


def beyond(lengths: torch.Tensor, room: int) -> torch.Tensor:
    """(n, 1, room): whether a place in the room is behind the tokens in use."""
    return torch.arange(room, device=lengths.device) >= lengths[:, None, None]


def cleared(part: Part) -> Part:
    """The part with 0 for all values that are not in use."""
    unused = beyond(part.lengths, part.values.shape[2]).mT[:, None]  # (n, 1, L, 1)
    return Part(part.keys, part.values.masked_fill(unused, 0.0), part.lengths, part.places)
