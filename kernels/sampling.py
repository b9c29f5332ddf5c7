"""Sampling with counter-based noise: a token depends on its logits, its row and its position, on nothing else.

The token is the one with the largest z / T + Gumbel noise (the Gumbel-max rule), which draws from softmax(z / T)
without sorting or normalising it. The noise is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011): its key is the row, a 64-bit hash of (step, uid, index), its counter the vocabulary entry, the token's
position and the seed. So the same row draws the same noise in any batch, on any number of processes, in any order.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch

from kernels.dispatch import use_triton

MASK = 0xFFFFFFFF
COUNTERS = 2**15  # of Philox that the reference works on at once: a cache holds them


def row_id(step: int, uid: str, index: int) -> int:
    """A 64-bit key for one response of a step, as a signed integer so that it fits int64 tensors."""
    digest = blake2b(f"{step}\n{index}\n{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    row_ids: torch.Tensor,
    position: int | torch.Tensor,
    banned: Sequence[int] = (),
    statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    """One token a row, (R,) int64, from softmax(logits / temperature) cut to top-k and top-p, and its log-probability.

    logits (R, V) in bf16, fp16 or fp32 and of any strides, row_ids (R,) int64 from `row_id`; `position` of the token in
    its response, or (R,) int64 or int32, one of each row, modulo 2^32. temperature 0 is greedy; top_k 0 and top_p 1 cut
    nothing. The tokens `banned` are never drawn. Top-k keeps the k likeliest tokens, top-p then the smallest set of the
    likeliest whose probability among those reaches top_p; tokens that tie with the last one stay.

    The log-probability, (R,) float32 in nats, is that under the whole softmax(logits / temperature), nothing cut or
    banned; at temperature 0 under softmax(logits). With `statistics` also the entropy of that distribution and
    logsumexp - mean over the vocabulary of logits / temperature (self-certainty).
    The seed counts modulo 2^64. In Triton nothing is read on the host, and `banned` is copied to the GPU once: a CUDA
    graph can capture every call but the first. Raises ValueError when shapes disagree, a setting is out of its range or
    all tokens are banned; on a CPU also for a row without a finite logit or with a nan, whose token on a GPU has
    log-probability nan.
    """
    banned = [int(token) for token in banned]
    each = isinstance(position, torch.Tensor) and position.dim() > 0
    position = position if each else int(position)
    shaped = logits.dim() == 2 and logits.shape[1] > 0 and row_ids.shape == logits.shape[:1]
    if not (shaped and logits.is_floating_point() and row_ids.dtype == torch.int64):
        raise ValueError(
            f"expected floating-point logits (R, V) and row_ids (R,) int64; got {tuple(logits.shape)} {logits.dtype}, "
            f"{tuple(row_ids.shape)} {row_ids.dtype}"
        )
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0, not {temperature=}, {top_p=}, {top_k=}"
        )
    if each and (position.shape != row_ids.shape or position.dtype not in (torch.int64, torch.int32)):
        found = f"{tuple(position.shape)} {position.dtype}"
        raise ValueError(f"expected a position or ({len(row_ids)},) of them in int64 or int32, not {found}")
    if not each and not 0 <= position <= MASK:
        raise ValueError(f"expected 0 <= position < 2^32, not {position}")
    if bad := [token for token in banned if not 0 <= token < logits.shape[1]]:
        raise ValueError(f"banned token {bad[0]} is not in the vocabulary of {logits.shape[1]}")
    if len(set(banned)) == logits.shape[1]:
        raise ValueError(f"all {logits.shape[1]} tokens are banned")
    logits = logits.detach()
    if use_triton(logits):
        from kernels import sampling_triton

        found = sampling_triton.sample(logits, temperature, top_p, top_k, seed, row_ids, position, banned)
        return found if statistics else found[:2]
    logits = logits.float()
    if logits.device.type == "cpu" and len(logits) and not logits.amax(-1).isfinite().all():
        raise ValueError("a row of logits has a nan or no finite value: the model's weights or inputs are broken")
    scores = logits / temperature if temperature else logits
    allowed = scores
    if banned:
        allowed = scores.index_fill(1, torch.tensor(banned, device=scores.device), float("-inf"))
    if temperature == 0:
        token = allowed.argmax(-1)
    else:
        allowed = allowed.masked_fill(allowed < smallest_kept(allowed, top_p, top_k), float("-inf"))
        token = (allowed + gumbel(row_ids, position, allowed.shape[-1], seed)).argmax(-1)
    logp = scores.log_softmax(-1)
    logprob = logp.gather(1, token[:, None])[:, 0]
    if not statistics:
        return token, logprob
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    return token, logprob, entropy, -logp.mean(-1)


def smallest_kept(scores: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The smallest score (R, 1) that top-k and top-p keep."""
    floor = scores.new_full((len(scores), 1), float("-inf"))
    if 0 < top_k < scores.shape[-1]:
        floor = scores.topk(top_k).values[:, -1:]
    if top_p < 1:
        ordered = scores.sort(descending=True).values
        p = ordered.masked_fill(ordered < floor, float("-inf")).softmax(-1)
        kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True)  # the likeliest token is always kept
        floor = torch.maximum(floor, ordered.gather(-1, kept - 1))
    return floor


def philox(key: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Philox 4x32-10: four 32-bit words, as int64, for a 64-bit key and four counter words that broadcast."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap modulo 2^64, so that all but the sign extension of their upper halves is right; of c1 and
        # c3 nobody looks at more than 32 bits.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 ^ c1 ^ k0).bitwise_and_(MASK), p1, (p0 >> 32 ^ c3 ^ k1).bitwise_and_(MASK), p0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1 & MASK, c2, c3 & MASK]


def noise_words(
    rows: torch.Tensor, position: int | torch.Tensor, size: int, seed: int = 0, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """The 32-bit words (R, size) behind the noise of rows (R,) at one token position, or at one of each row (R,)."""
    block = torch.arange((size + 3) // 4, device=rows.device)
    found = torch.empty(len(rows), len(block), 4, dtype=dtype, device=rows.device)
    position, low, high = (torch.zeros_like(rows) + word for word in (position, seed & MASK, seed >> 32 & MASK))
    some = max(1, COUNTERS // max(1, len(block)))
    for start in range(0, len(rows), some):
        part = slice(start, start + some)
        counter = (block, *(word[part, None] for word in (position, low, high)))
        for i, word in enumerate(philox(rows[part, None], counter)):
            found[part, :, i] = word
    return found.flatten(1)[:, :size]


def gumbel(rows: torch.Tensor, position: int | torch.Tensor, size: int, seed: int = 0) -> torch.Tensor:
    """Gumbel noise (R, size) in float32 for rows (R,) int64 at one token position, or at one of each row (R,)."""
    return to_gumbel(noise_words(rows, position, size, seed, torch.float32))


def to_gumbel(words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise in float32 from 32-bit words: -log(-log(1 - u)) with u = (word + 1/2) / 2^32, always finite.

    Large noise, which decides the draw, comes from small u, where float32 has its finest steps. Words in float32 are
    overwritten.
    """
    uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
