"""The GRPO loss in Triton: one program a response, which leaves its loss, its statistics and its gradient.

What an aggregation divides by is known only when all responses are counted, so losses and gradients are formed without
it; it enters as one factor, from the same sums as the statistics.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.common import ESTIMATORS, FARTHEST, LARGEST
from kernels.dispatch import on

BLOCK = 512  # tokens at once
SUMS = ("loss", "clip_low", "clip_high", "dual_clip", "ratio", "kl", "tokens", "used")


def grpo_loss(
    logprob, old_logprob, advantage, mask, ref_logprob, lengths, weight, aggregation, max_length,
    clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator,
):  # fmt: skip
    """As in loss.py."""
    settings = (
        aggregation, max_length, float(clip_low), float(clip_high), float(dual_clip), ratio_level, float(kl_coef),
        kl_estimator,
    )  # fmt: skip
    loss, sums = _GrpoLoss.apply(logprob, old_logprob, advantage, mask, ref_logprob, lengths, weight, settings)
    stats = dict(zip(SUMS, sums.unbind()))
    del stats["loss"], stats["used"]
    if ref_logprob is None:
        del stats["kl"]
    return loss, stats


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprob, old, advantage, mask, reference, lengths, weight, settings):
        aggregation, max_length, clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator = settings
        count = logprob.shape[0] if lengths is None else lengths.shape[0]
        ctx.dtype = logprob.dtype
        logprob, old, advantage = logprob.contiguous(), old.contiguous(), advantage.contiguous()
        mask = None if mask is None else mask.contiguous()
        reference = None if reference is None else reference.contiguous()
        lengths = None if lengths is None else lengths.to(logprob.device).contiguous()
        weight = None if weight is None else weight.to(logprob.device).contiguous()
        ends = None if lengths is None else lengths.cumsum(0)
        gradient = torch.zeros(logprob.shape, dtype=torch.float32, device=logprob.device)
        partial = torch.empty(count, len(SUMS), dtype=torch.float32, device=logprob.device)
        if count:
            with on(logprob):
                grpo_kernel[(count,)](
                    logprob, old, advantage, mask, reference, weight, lengths, ends, gradient, partial,
                    logprob.shape[-1], clip_low, clip_high, dual_clip, kl_coef, LARGEST, FARTHEST,
                    PER_TOKEN=advantage.shape != (count,), PACKED=lengths is not None, MASKED=mask is not None,
                    WEIGHTED=weight is not None, PER_LENGTH=weight is None and aggregation == "sequence",
                    SEQUENCE_RATIO=ratio_level == "sequence",
                    ESTIMATOR=0 if reference is None else 1 + ESTIMATORS.index(kl_estimator), BLOCK=BLOCK,
                )  # fmt: skip
        sums = partial.sum(0)  # (8,), in a fixed order
        loss, tokens, used = sums[0], sums[SUMS.index("tokens")], sums[SUMS.index("used")]
        if weight is not None:
            factor = torch.ones_like(loss)
        elif aggregation == "token":
            factor = 1 / tokens.clamp(min=1)
        else:
            factor = 1 / (used.clamp(min=1) * (1 if aggregation == "sequence" else max_length))
        ctx.save_for_backward(gradient, factor)
        ctx.mark_non_differentiable(sums)
        return loss * factor, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        gradient, factor = ctx.saved_tensors
        return (gradient * (grad * factor)).to(ctx.dtype), None, None, None, None, None, None, None


@triton.jit
def expm1(x, LESS_X: tl.constexpr):
    """exp(x) - 1, or exp(x) - 1 - x, without cancellation: near 0 by its series x + x^2/2 (1 + x/3 (1 + x/4 (...)))."""
    series = 1 + x / 10
    for n in tl.static_range(9, 2, -1):
        series = 1 + x / n * series
    series = 0.5 * x * x * series
    if LESS_X:
        return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1 - x)
    return tl.where(tl.abs(x) < 0.5, series + x, tl.exp(x) - 1)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def grpo_kernel(
    logprob, old, advantage, mask, reference, weight, lengths, ends, gradient, partial,
    size, clip_low, clip_high, dual_clip, kl_coef, largest, farthest,
    PER_TOKEN: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    PER_LENGTH: tl.constexpr, SEQUENCE_RATIO: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    response = tl.program_id(0).to(tl.int64)
    if PACKED:
        length = tl.load(lengths + response)
        begin = tl.load(ends + response) - length
        length = tl.where(begin < 0, 0, tl.minimum(length, size - begin))  # whatever lengths are: not outside
    else:
        length = size
        begin = response * size
    tokens, logratio_sum = 0.0, 0.0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = at < length
        if MASKED:
            seen = seen & (tl.load(mask + begin + at, mask=seen, other=0) != 0)
        tokens += tl.sum(seen.to(tl.float32), 0)
        if SEQUENCE_RATIO:
            logratio = tl.load(logprob + begin + at, mask=seen, other=0.0).to(tl.float32)
            logratio -= tl.load(old + begin + at, mask=seen, other=0.0).to(tl.float32)
            logratio_sum += tl.sum(logratio, 0)
    divisor = tl.maximum(tokens, 1.0)
    w = tl.load(weight + response).to(tl.float32) if WEIGHTED else 1.0
    if PER_LENGTH:
        w = w / divisor
    loss, low, high, dual, ratio_sum, kl_sum, pull_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        seen = inside
        if MASKED:
            seen = seen & (tl.load(mask + begin + at, mask=inside, other=0) != 0)
        new = tl.load(logprob + begin + at, mask=seen, other=0.0).to(tl.float32)
        logratio = new - tl.load(old + begin + at, mask=seen, other=0.0).to(tl.float32)
        if SEQUENCE_RATIO:
            logratio = tl.where(seen, logratio_sum / divisor, 0.0)
        if PER_TOKEN:
            a = tl.load(advantage + begin + at, mask=seen, other=0.0).to(tl.float32)
        else:
            a = tl.where(seen, tl.load(advantage + response).to(tl.float32), 0.0)
        ratio = tl.exp(smaller(logratio, largest))
        over_one = expm1(smaller(logratio, largest), False)
        plain = -a * ratio
        clipped = -a * smaller(larger(ratio, 1 - clip_low), 1 + clip_high)
        bound = clipped > plain
        value = larger(plain, clipped)
        over = seen & (a < 0) & (value > -a * dual_clip) & (dual_clip > 0)
        value = tl.where(over, -a * dual_clip, value)
        pull = tl.where(bound | over | (logratio > largest), 0.0, plain) * w  # d loss / d logratio
        low += tl.sum((bound & (a < 0)).to(tl.float32), 0)
        high += tl.sum((bound & (a > 0)).to(tl.float32), 0)
        dual += tl.sum(over.to(tl.float32), 0)
        ratio_sum += tl.sum(over_one, 0)
        if ESTIMATOR > 0:
            difference = tl.load(reference + begin + at, mask=seen, other=0.0).to(tl.float32) - new
            if ESTIMATOR == 1:
                kl, slope = -difference, tl.full([BLOCK], 1.0, tl.float32)
            elif ESTIMATOR == 2:
                kl, slope = 0.5 * difference * difference, -difference
            else:
                nearer = smaller(difference, farthest)
                kl, slope = expm1(nearer, True), tl.where(difference > farthest, 0.0, -expm1(nearer, False))
            kl = tl.where(seen, kl, 0.0)
            kl_sum += tl.sum(kl, 0)
            wanted = seen & (kl_coef > 0)  # else only measured: 0 times what is not finite would be nan
            value += tl.where(wanted, kl_coef * kl, 0.0)
            direct = tl.where(wanted, kl_coef * slope, 0.0) * w
        else:
            direct = tl.zeros([BLOCK], tl.float32)
        loss += tl.sum(value * w, 0)
        if SEQUENCE_RATIO:
            pull_sum += tl.sum(pull, 0)
        else:
            direct += pull
        tl.store(gradient + begin + at, direct, mask=inside)
    if SEQUENCE_RATIO:  # every token moves the common ratio by 1 / tokens of its own
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < length
            seen = inside
            if MASKED:
                seen = seen & (tl.load(mask + begin + at, mask=inside, other=0) != 0)
            tl.debug_barrier()  # what other threads have stored
            direct = tl.load(gradient + begin + at, mask=inside, other=0.0)
            direct += tl.where(seen, pull_sum / divisor, 0.0)
            tl.store(gradient + begin + at, direct, mask=inside)
    partial += response * 8
    tl.store(partial, loss)
    tl.store(partial + 1, low)
    tl.store(partial + 2, high)
    tl.store(partial + 3, dual)
    tl.store(partial + 4, ratio_sum)
    tl.store(partial + 5, kl_sum)
    tl.store(partial + 6, tokens)
    tl.store(partial + 7, tl.minimum(tokens, 1.0))
