"""Group advantages in Triton: one launch for any of ESTIMATORS, dense or ragged groups."""

import torch
import triton
import triton.language as tl

from kernels.dispatch import on

ESTIMATORS = ("group-norm", "mean", "rloo", "energy", "energy-centred")  # names of ADVANTAGES that the kernel knows
ROWS, COLUMNS = 16, 64  # responses a program answers for, and others it looks at at once


def advantage(
    rewards: torch.Tensor, estimator: str, group_ids: torch.Tensor | None, eps: float = 1e-6, beta: float = 1.0
) -> torch.Tensor:
    """As `group_advantage`. In ragged groups every program looks through all responses for the members of its own."""
    rewards, count = rewards.contiguous(), rewards.numel()
    out = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if not count:
        return out
    with on(rewards):
        advantage_kernel[(triton.cdiv(count, ROWS),)](
            rewards, rewards if group_ids is None else group_ids.contiguous(), out, count, rewards.shape[-1],
            eps, beta, estimator, group_ids is not None, ROWS, COLUMNS,
        )  # fmt: skip
    return out


@triton.jit
def advantage_kernel(
    rewards, group_ids, out, count, size, eps, beta,
    ESTIMATOR: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * ROWS
    row = begin + tl.arange(0, ROWS)
    r = tl.load(rewards + row, mask=row < count, other=0.0).to(tl.float64)
    if RAGGED:
        group = tl.load(group_ids + row, mask=row < count, other=0)
        first, last = 0, count
    else:  # the groups that these rows are of
        group = row // size
        first, last = begin // size * size, tl.minimum(count, ((begin + ROWS - 1) // size + 1) * size)
    n, total = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    low, high = tl.full([ROWS], float("inf"), tl.float64), tl.full([ROWS], float("-inf"), tl.float64)
    for start in range(first, last, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        theirs = tl.load(rewards + at, mask=at < last, other=0.0).to(tl.float64)[None, :]
        their_group = tl.load(group_ids + at, mask=at < last, other=0) if RAGGED else at // size
        same = (group[:, None] == their_group[None, :]) & (at < last)[None, :]
        n += tl.sum(same.to(tl.float64), 1)
        total += tl.sum(tl.where(same, theirs, 0.0), 1)
        low = tl.minimum(low, tl.min(tl.where(same, theirs, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(same, theirs, float("-inf")), 1))
    # Rounding may put the mean of equal rewards beside them; a group without signal must get exactly 0.
    mean = tl.minimum(tl.maximum(total / n, low), high)
    spread = tl.zeros([ROWS], tl.float64)  # sum of squares, or of exponentials
    if (ESTIMATOR == "group-norm") | (ESTIMATOR == "energy"):
        for start in range(first, last, COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            theirs = tl.load(rewards + at, mask=at < last, other=0.0).to(tl.float64)[None, :]
            their_group = tl.load(group_ids + at, mask=at < last, other=0) if RAGGED else at // size
            same = (group[:, None] == their_group[None, :]) & (at < last)[None, :]
            if ESTIMATOR == "group-norm":
                term = (theirs - mean[:, None]) * (theirs - mean[:, None])
            else:
                term = tl.exp(beta * theirs - tl.maximum(beta * high, beta * low)[:, None])
            spread += tl.sum(tl.where(same, term, 0.0), 1)
    if ESTIMATOR == "mean":
        value = r - mean
    elif ESTIMATOR == "group-norm":
        value = tl.where(r == mean, 0.0, (r - mean) / (tl.sqrt(spread / tl.maximum(n - 1, 1.0)) + eps))
    elif ESTIMATOR == "rloo":
        value = (r - mean) * n / tl.maximum(n - 1, 1.0)
    elif ESTIMATOR == "energy":
        value = beta * r - tl.maximum(beta * high, beta * low) - tl.log(spread)
    else:
        tl.static_assert(ESTIMATOR == "energy-centred", "no such estimator")
        value = beta * (r - mean)
    # 0 * rewards: nan where any reward of the group is not finite, whatever the estimator made of it.
    value = tl.where(n == 1, 0.0, value) + 0.0 * total
    tl.store(out + row, value.to(out.dtype.element_ty), mask=row < count)
