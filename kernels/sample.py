"""Sampling with counter-based noise: a token depends on its logits, its row and its position, on nothing else.

The noise is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its key is the row,
a 64-bit hash of (seed, step, uid, index); its counter is the token's position and the vocabulary entry. So the same
row draws the same noise in any batch, on any number of processes, in any order.
"""

from hashlib import blake2b

import torch

MASK = 0xFFFFFFFF


def row_id(seed: int, step: int, uid: str, index: int) -> int:
    """A 64-bit key for one response, as a signed integer so that it fits int64 tensors."""
    digest = blake2b(f"{seed}\n{step}\n{index}\n{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def philox(key: torch.Tensor, counter: tuple[torch.Tensor | int, ...]) -> list[torch.Tensor]:
    """Philox 4x32-10: four 32-bit words, as int64, for a 64-bit key and four counter words that broadcast."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap modulo 2^64, so their upper halves are right once the sign extension is masked off.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def gumbel(rows: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Gumbel noise (R, size) in float32 for rows (R,) int64 at one token position."""
    blocks = torch.arange((size + 3) // 4, device=rows.device)
    words = philox(rows[:, None], (blocks[None, :], torch.zeros_like(rows)[:, None] + position, 0, 0))
    return to_gumbel(torch.stack(words, -1).flatten(1)[:, :size])


def to_gumbel(words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise in float32 from 32-bit words: -log(-log(1 - u)) with u = (word + 1/2) / 2^32, always finite.

    Large noise, which decides the draw, comes from small u, where float32 has its finest steps.
    """
    uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    position: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> torch.Tensor:
    """One token a row, (R,) int64, from softmax(logits / temperature) cut to top-k and top-p, by the Gumbel-max rule.

    logits (R, V) float32, rows (R,) int64 from `row_id`, position of the token in its response. temperature 0 is
    greedy; top_k 0 and top_p 1 cut nothing. Top-p keeps the smallest set of likeliest tokens whose probability
    reaches top_p, after top-k.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the likeliest token is never outside
        scores = scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return (scores + gumbel(rows, position, scores.shape[-1])).argmax(-1)
