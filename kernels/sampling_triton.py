"""Sampling in Triton: one program a row, one pass over its logits. Top-k and top-p first find the smallest logit kept.

That search halves the interval of float32 bit patterns, which order like the numbers, until one is left: no sort.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.dispatch import on
from kernels.logprob_triton import LN_2, LOG2_E, absorb, merged

BLOCK = 2048  # logits a program holds at once
WARPS = 16  # there are few rows in decoding: each gets many threads


def sample(logits, temperature, top_p, top_k, seed, row_ids, position, banned) -> tuple[torch.Tensor, ...]:
    """As in sampling.py: token, log-probability, entropy, self-certainty."""
    count, size = logits.shape
    position = position.contiguous() if isinstance(position, torch.Tensor) else position
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprob, entropy, certainty = torch.empty(3, count, dtype=torch.float32, device=logits.device)
    cut = temperature > 0 and (0 < top_k < size or top_p < 1)
    floor = floors(logits, temperature, top_p, top_k, banned) if cut else None
    if count:
        with on(logits):
            sample_kernel[(count,)](
                logits, _on_device(tuple(banned), logits.device), floor, row_ids.contiguous(), token, logprob, entropy,
                certainty, logits.stride(0), logits.stride(1), size, 1 / temperature if temperature else 1.0, position,
                seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, BANS=len(banned), CUT=cut, GREEDY=temperature == 0,
                EACH=isinstance(position, torch.Tensor), BLOCK=_block(size), num_warps=WARPS,
            )  # fmt: skip
    return token, logprob, entropy, certainty


def floors(logits, temperature, top_p, top_k, banned) -> torch.Tensor:
    """The smallest logit that top-k and top-p keep in each row, (R,) int32 in the order of `ordered_bits`."""
    count, size = logits.shape
    floor = torch.empty(count, dtype=torch.int32, device=logits.device)
    if count:
        with on(logits):
            floor_kernel[(count,)](
                logits, _on_device(tuple(banned), logits.device), floor, logits.stride(0), logits.stride(1), size,
                1 / temperature, top_p, top_k if top_k < size else 0, BANS=len(banned),
                BITS=16 if logits.dtype == torch.bfloat16 else 32, BLOCK=_block(size), num_warps=WARPS,
            )  # fmt: skip
    return floor


def _block(size: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(size)))


@lru_cache(maxsize=64)
def _on_device(banned: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The banned tokens where the kernel finds them; copied once, not at every token."""
    return torch.tensor(banned or (-1,), dtype=torch.int64, device=device)


@triton.jit
def block_at(start, logits, bans, step, size, BANS: tl.constexpr, BLOCK: tl.constexpr):
    """Places of a block in the vocabulary, whether they are in it, whether they may be drawn, and their logits."""
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    allowed = inside
    for n in tl.static_range(BANS):
        allowed = allowed & (at != tl.load(bans + n))
    z = tl.load(logits + at.to(tl.int64) * step, mask=inside, other=float("-inf")).to(tl.float32)
    return at, inside, allowed, z


@triton.jit
def ordered_bits(z):
    """float32 -> int32 that orders alike; -0 like 0."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass(logits, bans, step, size, scale, top, above, BANS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many allowed tokens have ordered bits of at least `above`, or the sum of their exp((z - top) * scale)."""
    found = tl.zeros([BLOCK], tl.float32)  # every lane for itself; they meet once
    for start in range(0, size, BLOCK):
        _, _, allowed, z = block_at(start, logits, bans, step, size, BANS, BLOCK)
        weight = 1.0 if COUNT else tl.exp((z - top) * scale)
        found += tl.where(allowed & (ordered_bits(z) >= above), weight, 0.0)
    return tl.sum(found, 0)


@triton.jit
def search(
    logits, bans, step, size, scale, top, least, wanted,
    BANS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest bits, not below `least`, at which the mass above is still as much as wanted."""
    found = tl.full([], -(2**31), tl.int64)
    for n in range(BITS):
        candidate = found + (tl.full([], 1, tl.int64) << (31 - n))
        above = tl.maximum(candidate, least).to(tl.int32)
        if mass(logits, bans, step, size, scale, top, above, BANS, COUNT, BLOCK) >= wanted:
            found = candidate
    return tl.maximum(found, least)


@triton.jit
def floor_kernel(
    logits, bans, floor, stride, step, size, scale, top_p, top_k,
    BANS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    scale, top_p = tl.cast(scale, tl.float32), tl.cast(top_p, tl.float32)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        _, _, allowed, z = block_at(start, logits, bans, step, size, BANS, BLOCK)
        tops = tl.maximum(tops, tl.where(allowed, z, float("-inf")))
    top = tl.max(tops, 0)
    least = tl.full([], -(2**31), tl.int64)
    if top_k > 0:
        least = search(logits, bans, step, size, scale, top, least, top_k, BANS, True, BITS, BLOCK)
    if top_p < 1:
        whole = mass(logits, bans, step, size, scale, top, least.to(tl.int32), BANS, False, BLOCK)
        least = search(logits, bans, step, size, scale, top, least, top_p * whole, BANS, False, BITS, BLOCK)
    tl.store(floor + row, least.to(tl.int32))


@triton.jit
def gumbel(words):
    """As `to_gumbel` of sampling.py. -log(1 - u) for small u by its series: the difference would lose its digits."""
    u = tl.minimum((words.to(tl.float32) + 0.5) * (1 / 4294967296), 1 - 1 / 16777216)
    series = u / 7
    for n in tl.static_range(6, 1, -1):
        series = u * (1 / n + series)
    return -tl.log(tl.where(u < 0.0625, u * (1 + series), -tl.log(1 - u)))


@triton.jit
def noise_words(key, block, position, seed_low, seed_high):
    """Words (4 * len(block),) in the order of the vocabulary: entry v is word v % 4 of counter v // 4."""
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(
        key, block, zero + position.to(tl.int32), zero + seed_low.to(tl.int32), zero + seed_high.to(tl.int32)
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit(do_not_specialize=["position", "seed_low", "seed_high"])
def sample_kernel(
    logits, bans, floor, row_ids, token, logprob, entropy, certainty, stride, step, size, scale,
    position, seed_low, seed_high,
    BANS: tl.constexpr, CUT: tl.constexpr, GREEDY: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    key = tl.load(row_ids + row)
    if EACH:
        position = tl.load(position + row)
    scale = tl.cast(scale, tl.float32)
    top = tl.full([BLOCK // 4], float("-inf"), tl.float32)
    weights, weighted, total = tl.zeros_like(top), tl.zeros_like(top), tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        at, inside, allowed, z = block_at(start, logits, bans, step, size, BANS, BLOCK)
        total += tl.where(inside, z, 0.0)
        fours = tl.reshape(z, (BLOCK // 4, 4))
        top, weights, weighted = absorb(fours, at, None, top, weights, weighted, scale * LOG2_E)
        if CUT:
            allowed = allowed & (ordered_bits(z) >= tl.load(floor + row))
        score = z * scale
        if not GREEDY:
            score += gumbel(noise_words(key, start // 4 + tl.arange(0, BLOCK // 4), position, seed_low, seed_high))
        score = tl.where(allowed, score, float("-inf"))
        chosen = tl.where(score > best, at, chosen)
        best = tl.maximum(score, best)
    found = tl.min(tl.where(best == tl.max(best, 0), chosen, size), 0)  # of equal scores the first token
    top, weights, weighted = merged(top, weights, weighted, scale * LOG2_E)
    log_sum = tl.log(weights)
    tl.store(token + row, found.to(tl.int64))
    tl.store(logprob + row, (tl.load(logits + found.to(tl.int64) * step).to(tl.float32) - top) * scale - log_sum)
    tl.store(entropy + row, log_sum - weighted * LN_2 / weights)
    tl.store(certainty + row, top * scale + log_sum - tl.sum(total, 0) / size * scale)
