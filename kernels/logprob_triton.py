"""The passes of logprob.py in Triton: one program a row forward, one a block of a row backward."""

import torch
import triton
import triton.language as tl

from kernels.common import Rows
from kernels.dispatch import on

BLOCK = 4096  # logits a program holds at once: 16 a thread
WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def rows(logits: torch.Tensor, ids: torch.Tensor, temperature: float, replaced: torch.Tensor | None) -> Rows:
    """As in logprob.py: every logit is read once, and once more where it is replaced."""
    count, size = logits.shape
    found = Rows(*torch.empty(len(Rows._fields), count, dtype=torch.float32, device=logits.device))
    if not count:
        return found
    with on(logits):
        # The same kernel with and without a gradient, so that the values are the same to the bit.
        rows_kernel[(count,)](
            logits, ids, *found, logits.stride(0), logits.stride(1), ids.stride(0), size, 1 / temperature, _block(size),
            _block(size) * logits.element_size() // 16, num_warps=WARPS,  # a lane takes 16 bytes at a time
        )  # fmt: skip
        if replaced is not None:
            replace_kernel[(count,)](
                logits, ids, found.top, found.log_sum, found.others, replaced, logits.stride(0), logits.stride(1),
                ids.stride(0), replaced.stride(0), replaced.stride(1), size, 1 / temperature, _block(size),
                num_warps=WARPS,
            )  # fmt: skip
    return found


def gradient(logits, ids, temperature, top, log_sum, others, grad, out) -> None:
    """As in logprob.py: one read and one write; a row whose `grad` is 0 is not read."""
    count, size = logits.shape
    if not count:
        return
    with on(logits):
        gradient_kernel[(count * triton.cdiv(size, _block(size)),)](
            logits, ids, top, log_sum, others, grad, out, logits.stride(0), logits.stride(1), ids.stride(0),
            grad.stride(0), out.stride(0), out.stride(1), size, 1 / temperature, _block(size), num_warps=WARPS,
        )  # fmt: skip


def _block(size: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(size)))


@triton.jit
def gaps(z, base, scale):
    """(z - base) * scale, kept finite: its weight is 0 by then, and 0 times it is summed. A nan stays one."""
    return tl.maximum((z - base) * scale, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absorb(z, at, target, top, total, weighted, scale):
    """Take logits z (L, K) into L online softmaxes: running max, sum of weights and weighted sum of gaps, (L,) each.

    Gaps are (z - top) * scale and weights 2^gap. The logit whose place `at` is `target`, if there is one, counts for
    the max but not for the sums.
    """
    new = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far: -inf - -inf would be nan
    shift = gaps(top, base, scale)
    kept = tl.exp2(shift)
    gap = gaps(z, base[:, None], scale)
    weight = tl.exp2(gap)
    if target is not None:
        weight = tl.where(at == target, 0.0, weight)
    weighted = kept * (weighted + shift * total) + tl.sum(weight * gap, 1)
    return new, kept * total + tl.sum(weight, 1), weighted


@triton.jit
def merged(top, total, weighted, scale):
    """One online softmax of many."""
    new = tl.max(top, 0)
    shift = gaps(top, tl.where(new == float("-inf"), 0.0, new), scale)
    kept = tl.exp2(shift)
    return new, tl.sum(kept * total, 0), tl.sum(kept * (weighted + shift * total), 0)


@triton.jit
def rows_kernel(
    logits, ids, logprob, entropy, top_out, log_sum_out, others_out, mean_out, factor_out,
    stride, step, ids_step, size, scale, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(ids + row * ids_step)
    scale = tl.cast(scale, tl.float32)
    steepness = scale * LOG2_E
    # Every lane goes its own way through the row, a few neighbouring logits at a time; threads meet only at the end.
    top = tl.full([LANES], float("-inf"), tl.float32)
    others, weighted, total = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    WIDTH: tl.constexpr = BLOCK // LANES
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        z = tl.load(logits + at.to(tl.int64) * step, mask=at < size, other=float("-inf")).to(tl.float32)
        if start + BLOCK <= size:
            total += tl.sum(z, 1)
        else:
            total += tl.sum(tl.where(at < size, z, 0.0), 1)
        if (target >= start) & (target < start + BLOCK):
            top, others, weighted = absorb(z, at, target, top, others, weighted, steepness)
        else:
            top, others, weighted = absorb(z, at, None, top, others, weighted, steepness)
    top, others, weighted = merged(top, others, weighted, steepness)
    # An id outside the vocabulary reads nothing and gives nan.
    known = (target >= 0) & (target < size)
    own = tl.load(logits + target * step, mask=known, other=float("nan")).to(tl.float32)
    gap = (own - top) * scale
    weight = tl.exp(gap)
    weighted = weighted * LN_2 + tl.where(weight > 0, weight * gap, 0.0)
    log_sum = tl.log(others + weight)
    others = others / (others + weight)
    tl.store(logprob + row, gap - log_sum)
    tl.store(entropy + row, log_sum - weighted * tl.exp(-log_sum))
    tl.store(top_out + row, top)
    tl.store(log_sum_out + row, log_sum)
    tl.store(others_out + row, others)
    tl.store(mean_out + row, tl.sum(total, 0) / size * scale)
    tl.store(factor_out + row, scale)


@triton.jit
def onehot_less_p(z, start, at, target, top, log_sum, others, scale, BLOCK: tl.constexpr):
    """onehot - p of the block of logits z that begins at `start`."""
    value = -tl.exp2((z - top) * (scale * LOG2_E) - log_sum * LOG2_E)
    if (target >= start) & (target < start + BLOCK):
        value = tl.where(at == target, others, value)
    return value


@triton.jit
def replace_kernel(
    logits, ids, top, log_sum, others, out,
    stride, step, ids_step, out_stride, out_step, size, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    target = tl.load(ids + row * ids_step)
    top, log_sum, others = tl.load(top + row), tl.load(log_sum + row), tl.load(others + row)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at.to(tl.int64) * step, mask=at < size, other=float("-inf")).to(tl.float32)
        value = onehot_less_p(z, start, at, target, top, log_sum, others, tl.cast(scale, tl.float32), BLOCK)
        # `out` may be the same memory in a narrower type: it is written only where all threads have read.
        tl.debug_barrier()
        tl.store(out + at.to(tl.int64) * out_step, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def gradient_kernel(
    logits, ids, top, log_sum, others, grad, out,
    stride, step, ids_step, grad_step, out_stride, out_step, size, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    at = start + tl.arange(0, BLOCK)
    place = out + row * out_stride + at.to(tl.int64) * out_step
    scale = tl.cast(scale, tl.float32)
    pull = tl.load(grad + row * grad_step).to(tl.float32) * scale
    if pull == 0:
        tl.store(place, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < size)
    else:
        target = tl.load(ids + row * ids_step)
        z = tl.load(logits + row * stride + at.to(tl.int64) * step, mask=at < size, other=float("-inf")).to(tl.float32)
        of_row = tl.load(top + row), tl.load(log_sum + row), tl.load(others + row)
        value = pull * onehot_less_p(z, start, at, target, of_row[0], of_row[1], of_row[2], scale, BLOCK)
        tl.store(place, value.to(out.dtype.element_ty), mask=at < size)
