"""Attention of decoding in Triton: a pass over the keys of each part, then one that merges what the passes left.

A program takes the queries of up to ROWS rows that share a place, in all heads that share a key head, and reads a
stretch of that place's keys once for all of them. It leaves its attention and the log-sum-exp of its scores, to base 2.
Grids come from shapes only; a program without keys returns at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.dispatch import on
from kernels.logprob_triton import LOG2_E
from kernels.parts import ROWS, Part

STRETCH = 512  # keys that a program reads, at most
PROGRAMS = 512  # stretches get shorter, down to SHORTEST, until there are as many
SHORTEST = 64
LOADED = 2**13  # bytes of keys, and as many of values, that a program takes at once: three times both fit into an SM
MERGED = 8  # stretches whose results the merge holds at once


def decode_attention(query: torch.Tensor, parts: Sequence[Part], scale: float) -> torch.Tensor:
    """As in attention.py."""
    rows, heads, dim = query.shape
    out = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    grids = [_grid(query, part) for part in parts]
    stretches = sum(count for _, _, (_, _, count) in grids)
    partial = torch.empty(stretches, rows, heads, dim, dtype=torch.float32, device=query.device)
    log_sum = torch.full((stretches, rows, heads), float("-inf"), device=query.device)
    # The interpreter multiplies bf16 matrices wrongly.
    exact = query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    first = 0
    with on(query):
        for part, (stretch, queries, grid) in zip(parts, grids, strict=True):
            if grid[2]:
                part_kernel[grid](
                    query, part.keys, part.values, part.lengths, part.places and part.places.tiles, partial[first:],
                    log_sum[first:], *query.stride(), *part.keys.stride(), *part.values.stride(),
                    part.lengths.stride(0), rows, heads, part.keys.shape[2], scale, REP=heads // part.keys.shape[1],
                    ROWS=ROWS if part.places else 1, TILED=part.places is not None, STRETCH=stretch, QUERIES=queries,
                    BLOCK=_block(query), DIM=dim, WIDTH=_width(dim), EXACT=exact,
                    num_warps=8 if queries * _width(dim) > 2**13 or query.dtype == torch.float32 else 4, num_stages=3,
                )  # fmt: skip
                first += grid[2]
        merge_kernel[(rows, heads)](
            partial, log_sum, out, rows * heads, heads, stretches, MANY=triton.next_power_of_2(max(stretches, 1)),
            MERGED=MERGED, DIM=dim, WIDTH=_width(dim), num_warps=1,
        )  # fmt: skip
    return out


def _grid(query: torch.Tensor, part: Part) -> tuple[int, int, tuple[int, int, int]]:
    """Keys and queries of a program, and how many programs there are: (tiles, key heads, stretches)."""
    kv_heads, room = part.keys.shape[1:3]
    tiles, rows = (len(part.places.tiles), ROWS) if part.places else (len(query), 1)
    of_tile = rows * query.shape[1] // kv_heads
    # What registers hold; a product of float32 is three products of parts.
    most = 16 if query.dtype == torch.float32 else max(16, min(128, 2**14 // _width(query.shape[2])))
    queries = min(most, max(16, triton.next_power_of_2(of_tile)))  # tl.dot takes no fewer than 16
    tiles *= triton.cdiv(of_tile, queries)
    stretch = STRETCH
    while stretch > SHORTEST and tiles * kv_heads * triton.cdiv(room, stretch) < PROGRAMS:
        stretch //= 2
    return stretch, queries, (tiles, kv_heads, triton.cdiv(room, stretch))


def _width(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _block(query: torch.Tensor) -> int:
    """Keys at once."""
    return max(16, min(64, LOADED // (_width(query.shape[2]) * query.element_size())))


@triton.jit
def part_kernel(
    query, keys, values, lengths, tiles, partial, log_sum, q_row, q_head, q_step, k_place, k_head, k_token, k_step,
    v_place, v_head, v_token, v_step, lengths_step, rows, heads, room, scale,
    REP: tl.constexpr, ROWS: tl.constexpr, TILED: tl.constexpr, STRETCH: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (ROWS * REP + QUERIES - 1) // QUERIES
    tile, kv_head, stretch = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)  # a row of the tile and a head of the group
    if TILED:
        tiles += tile * (1 + ROWS)
        place = tl.load(tiles).to(tl.int64)
        if place < 0:
            return
        row = tl.load(tiles + 1 + m // REP, mask=m < ROWS * REP, other=-1)
        asked = row >= 0
    else:
        place = tile.to(tl.int64)
        row = tile + tl.zeros([QUERIES], tl.int32)
        asked = m < REP
    begin = stretch * STRETCH
    end = tl.minimum(tl.minimum(tl.load(lengths + place * lengths_step).to(tl.int32), room), begin + STRETCH)
    if begin >= end:
        return
    head = kv_head * REP + m % REP
    d = tl.arange(0, WIDTH)
    q = tl.load(
        query + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :] * q_step,
        mask=asked[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    n = tl.arange(0, BLOCK)
    keys += place * k_place + kv_head.to(tl.int64) * k_head + begin.to(tl.int64) * k_token
    values += place * v_place + kv_head.to(tl.int64) * v_head + begin.to(tl.int64) * v_token
    keys += n[:, None] * k_token + d[None, :] * k_step
    values += n[:, None] * v_token + d[None, :] * v_step
    steepness = tl.cast(scale, tl.float32) * LOG2_E
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        live = start + n < end
        mask = live[:, None] & (d < DIM)[None, :]
        k, v = tl.load(keys, mask, 0.0), tl.load(values, mask, 0.0)
        if EXACT:
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, k.T, input_precision="tf32x3") * steepness
        score = tl.where(live[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
        kept = tl.exp2(top - new)
        total = total * kept + tl.sum(weight, 1)
        sums = tl.dot(weight.to(v.dtype), v, sums * kept[:, None], input_precision="tf32x3")
        top = new
        keys += BLOCK * k_token
        values += BLOCK * v_token
    at = (stretch * rows + row).to(tl.int64) * heads + head
    tl.store(partial + at[:, None] * DIM + d[None, :], sums / total[:, None], asked[:, None] & (d < DIM)[None, :])
    tl.store(log_sum + at, top + tl.log2(total), asked)


@triton.jit
def merge_kernel(
    partial, log_sum, out, stride, heads, stretches,
    MANY: tl.constexpr, MERGED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)  # of a row and head
    d, every = tl.arange(0, WIDTH), tl.arange(0, MANY)
    top = tl.max(tl.load(log_sum + at + every.to(tl.int64) * stride, every < stretches, float("-inf")), 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no keys at all: -inf - -inf would be nan
    total = tl.zeros([MERGED], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in range(0, stretches, MERGED):
        s = start + tl.arange(0, MERGED)
        own = tl.load(log_sum + at + s.to(tl.int64) * stride, s < stretches, float("-inf"))
        weight = tl.exp2(own - top)
        total += weight
        mask = (own != float("-inf"))[:, None] & (d < DIM)[None, :]  # others have written nothing
        o = tl.load(partial + (at + s.to(tl.int64) * stride)[:, None] * DIM + d[None, :], mask, 0.0)
        sums += tl.sum(weight[:, None] * o, 0)
    total = tl.sum(total, 0)
    value = sums / tl.where(total == 0, 1.0, total)
    tl.store(out + at * DIM + d, value.to(out.dtype.element_ty), d < DIM)
