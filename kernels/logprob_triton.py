"""The passes of logprob.py in Triton: one program a row forward, one a block of a row backward."""

import torch
import triton
import triton.language as tl

from kernels.dispatch import on
from kernels.logprob import Rows

BLOCK = 4096  # logits a program holds at once: 16 a thread
WARPS = 8


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
            num_warps=WARPS,
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
        gradient_kernel[(count, triton.cdiv(size, _block(size)))](
            logits, ids, top, log_sum, others, grad, out, logits.stride(0), logits.stride(1), ids.stride(0),
            grad.stride(0), out.stride(0), out.stride(1), size, 1 / temperature, _block(size), num_warps=WARPS,
        )  # fmt: skip


def _block(size: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(size)))


@triton.jit
def absorb(z, inside, top, total, weighted, scale, dropped):
    """Take logits z into the running max, sum of weights and weighted sum of gaps of an online softmax.

    Weights are exp((z - top) * scale), gaps the exponent. `dropped` entries count for the max but not for the sums.
    """
    new = tl.maximum(top, tl.max(tl.where(inside, z, float("-inf")), 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row of -inf so far: -inf - -inf would be nan
    shift = tl.where(top == float("-inf"), 0.0, (top - base) * scale)
    gap = tl.where(z == float("-inf"), -1e30, (z - base) * scale)  # its weight is 0, and 0 * -inf would be nan
    weight = tl.where(inside & (dropped == 0), tl.exp(gap), 0.0)
    weighted = tl.exp(shift) * (weighted + shift * total) + tl.sum(weight * gap, 0)
    total = tl.exp(shift) * total + tl.sum(weight, 0)
    return new, total, weighted


@triton.jit
def rows_kernel(
    logits, ids, logprob, entropy, top_out, log_sum_out, others_out, mean_out, factor_out,
    stride, step, ids_step, size, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(ids + row * ids_step)
    top, others, weighted, total = float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at.to(tl.int64) * step, mask=at < size, other=0.0).to(tl.float32)
        total += tl.sum(z, 0)
        top, others, weighted = absorb(z, at < size, top, others, weighted, scale, (at == target).to(tl.int32))
    # An id outside the vocabulary reads nothing and gives nan.
    known = (target >= 0) & (target < size)
    own = tl.load(logits + target * step, mask=known, other=float("nan")).to(tl.float32)
    gap = (own - top) * scale
    weight = tl.exp(gap)
    weighted += tl.where(weight > 0, weight * gap, 0.0)
    log_sum = tl.log(others + weight)
    others = others / (others + weight)
    tl.store(logprob + row, gap - log_sum)
    tl.store(entropy + row, log_sum - weighted * tl.exp(-log_sum))
    tl.store(top_out + row, top)
    tl.store(log_sum_out + row, log_sum)
    tl.store(others_out + row, others)
    tl.store(mean_out + row, total / size * scale)
    tl.store(factor_out + row, scale)


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
        value = tl.where(at == target, others, -tl.exp((z - top) * scale - log_sum))
        # `out` may be the same memory in a narrower type: it is written only where all threads have read.
        tl.debug_barrier()
        tl.store(out + at.to(tl.int64) * out_step, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def gradient_kernel(
    logits, ids, top, log_sum, others, grad, out,
    stride, step, ids_step, grad_step, out_stride, out_step, size, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = out + row * out_stride + at.to(tl.int64) * out_step
    pull = tl.load(grad + row * grad_step).to(tl.float32) * scale
    if pull == 0:
        tl.store(place, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < size)
    else:
        target = tl.load(ids + row * ids_step)
        z = tl.load(logits + row * stride + at.to(tl.int64) * step, mask=at < size, other=float("-inf"))
        p = tl.exp((z.to(tl.float32) - tl.load(top + row)) * scale - tl.load(log_sum + row))
        value = tl.where(at == target, tl.load(others + row), -p) * pull
        tl.store(place, value.to(out.dtype.element_ty), mask=at < size)
