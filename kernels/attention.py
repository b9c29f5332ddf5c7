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
from functools import reduce

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
        members: list[list[int]] = [[] for _ in range(max(of_row, default=-1) + 1)]
        for row, place in enumerate(of_row):
            if place >= 0:
                members[place].append(row)
        starts = [(place, start) for place, rows in enumerate(members) for start in range(0, len(rows), ROWS)]
        tiles = [[place, *members[place][start : start + ROWS]] for place, start in starts]
        self.tiles.copy_(table(tiles + [[]] * (len(self.tiles) - len(tiles)), 1 + ROWS, -1))
        self.of_row.copy_(torch.tensor(of_row))
        group = max(map(len, members), default=0)
        slot = {row: place * group + i for place, rows in enumerate(members) for i, row in enumerate(rows)}
        idle = [row for row, place in enumerate(of_row) if place < 0]
        device = self.of_row.device
        self.members = table(members, group, 0).to(device)
        self.slot = torch.tensor([slot.get(row, 0) for row in range(len(of_row))], dtype=torch.int64, device=device)
        self.idle = torch.tensor(idle, device=device) if idle else None


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
    scaled = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
    found = [part for part in (attended(scaled, part) for part in parts) if part]
    if not found:
        return torch.zeros_like(scaled, dtype=query.dtype)
    sums, _ = reduce(merged, found)
    # The largest weight of a row is exp(0), so that only rows without keys have a sum below 1.
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1)).view(query.shape).to(query.dtype)


Sums = tuple[torch.Tensor, torch.Tensor]  # o and S side by side (R, Hkv, rep, D + 1), m (R, Hkv, rep, 1)


def merged(one: Sums, other: Sums) -> Sums:
    top = torch.maximum(one[1], other[1])
    weight, weight_of_other = (one[1] - top).exp_(), (other[1] - top).exp_()
    return torch.addcmul(one[0] * weight, other[0], weight_of_other), top


def attended(scaled: torch.Tensor, part: Part) -> Sums | None:
    """What one part leaves for scaled queries (R, Hq, D); None if it has no key."""
    places, heads = part.places, part.keys.shape[1]
    queries = scaled.unflatten(1, (heads, -1))  # (R, Hkv, rep, D)
    rep, size = queries.shape[2], len(queries)
    if places is not None:
        size, group = places.members.shape
        queries = queries.index_select(0, places.members.flatten()).unflatten(0, (size, group)).transpose(1, 2)
    lengths = part.lengths[:size].tolist()
    if not (longest := max(lengths, default=0)):
        return None
    # As three dimensions: matmul would first find out that it is a bmm.
    keys, values = (t[:size, :, :longest].flatten(0, 1).to(scaled.dtype) for t in (part.keys, part.values))
    weights = torch.bmm(queries.reshape(size * heads, -1, scaled.shape[-1]), keys.mT)  # (n Hkv, G rep, longest)
    if min(lengths) < longest:
        unused = beyond(part.lengths[:size], longest)[:, None, None]
        weights.unflatten(0, (size, heads)).masked_fill_(unused, -math.inf)
    top = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)  # -inf - -inf would be nan
    weights.sub_(top).exp_()
    found = torch.cat([torch.bmm(weights, values), weights.sum(-1, keepdim=True), top], -1)
    if places is None:
        found = found.unflatten(0, (size, heads))
    else:
        found = found.view(size, heads, group, rep, -1).transpose(1, 2).flatten(0, 1).index_select(0, places.slot)
        if places.idle is not None:
            found[places.idle] = found.new_tensor([0.0] * (found.shape[-1] - 1) + [torch.finfo(found.dtype).min])
    return found[..., :-1], found[..., -1:]


def beyond(lengths: torch.Tensor, room: int) -> torch.Tensor:
    """(n, room): whether a token's place is behind those in use."""
    return torch.arange(room, device=lengths.device) >= lengths[:, None]


def cleared(part: Part) -> Part:
    """The part with 0 for all values that are not in use."""
    unused = beyond(part.lengths, part.values.shape[2])[:, None, :, None]
    return Part(part.keys, part.values.masked_fill(unused, 0.0), part.lengths, part.places)
