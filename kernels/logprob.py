"""Log-probability and entropy of chosen tokens, from logits or straight from hidden states and a frozen head.

Everything is formed from the gaps d = (z - max z) / T, taken in float32 before the division, so that logits of 1e4 cost
no digits and a logit of -inf is a token of probability 0. Per row:

    S = sum_v exp(d_v),   log p(y) = d_y - log S,   H = log S - sum_v exp(d_v) d_v / S
    1 - p(y) = sum_{v != y} exp(d_v) / S

The last is what onehot(y) - p has at the target: by subtraction it loses every digit near p(y) = 1.

`linear_logprob` uses that under LoRA the head is frozen. The gradient of a log-probability with respect to its hidden
state is then one vector, d log p(y) / dh = (1/T) W^T (onehot(y) - p). It is formed chunk by chunk in the forward pass
and saved, (N, D); the backward pass of any loss of the log-probabilities is a scaling of its rows. No tensor of more
than `chunk` x V logits exists at any time, and no gradient of the head is ever formed.
"""

import math
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from kernels.common import Rows
from kernels.dispatch import use_triton

# Logits held at once by default: so many rows that reading the head again for every chunk costs little beside the
# product, on a GPU 512 of Qwen2.5's vocabulary, 311 MB.
CPU_ELEMENTS = 2**21
GPU_ELEMENTS = 80 * 2**20
CACHED_ELEMENTS = 2**19  # what eager PyTorch goes over several times at once, so that it stays in a CPU's cache
CONVERTED_ROWS = 2048  # rows of a bf16 or fp16 head that are there in float32 at once, on a CPU


def selective_log_softmax(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float = 1.0,
    in_place: bool = False,
    statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    """log softmax(logits / temperature) at `ids`, and the entropy of that distribution, in one pass over the logits.

    logits (N, V) in bf16, fp16, fp32 or fp64 and of any strides, ids (N,) int64 in [0, V). Returns (N,), (N,) in nats,
    float32 (float64 for float64 logits); with `statistics` also logsumexp and mean over the vocabulary of
    logits / temperature.
    The log-probability is differentiable; the others are values without a gradient. Neither pass stores the softmax.
    With `in_place` the backward pass writes the gradient over the logits, which saves their size in memory: nothing
    else may need them, and the graph can be gone through once only.
    Raises ValueError when shapes disagree, temperature is not positive or logits to write over are expanded. An id
    outside the vocabulary is an error where that can be seen without waiting for the device; on a GPU its
    log-probability is nan.
    """
    if logits.dim() != 2 or ids.shape != logits.shape[:1] or logits.shape[1] < 1:
        raise ValueError(f"expected logits (N, V) and ids (N,); got {tuple(logits.shape)}, {tuple(ids.shape)}")
    if in_place and any(step == 0 < size - 1 for step, size in zip(logits.stride(), logits.shape)):
        raise ValueError("in_place needs logits of their own memory, not expanded ones: use in_place=False or .clone()")
    _check(logits, ids, logits.shape[1], temperature)
    logits = logits if torch.is_grad_enabled() else logits.detach()
    found = _SelectiveLogSoftmax.apply(logits, ids, float(temperature), in_place)
    return found if statistics else found[:2]


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    needs_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at `ids`, and the entropy of that distribution.

    hidden (N, D) of any floating type, weight (V, D) of the same type and without gradient, ids (N,) int64 in [0, V);
    `chunk` rows of logits are held at once, by default 8 MiB of them, on a GPU 320 MiB.
    Returns (N,), (N,) in nats, float32 (float64 for float64 states).
    The log-probability is differentiable with respect to `hidden`; the entropy is a value without a gradient. Without
    gradients (torch.no_grad) values are the same to the bit and the second product is not made. Rows that `needs_grad`,
    (N,) bool, leaves out skip it too, and get a gradient of 0; they are computed in other chunks than the rest, for
    which the product may round differently.
    Logits are float32 whatever the type of the head: rounded to bf16 they would be off by up to 0.4 per cent.
    Raises ValueError when shapes disagree, temperature is not positive or the head would need a gradient.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden (N, D), weight (V, D), ids (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(ids.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: convert one of them")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("the head must be frozen: call weight.requires_grad_(False)")
    if needs_grad is not None and (needs_grad.shape != ids.shape or needs_grad.dtype != torch.bool):
        raise ValueError(
            f"needs_grad must be bool {tuple(ids.shape)}, not {needs_grad.dtype} {tuple(needs_grad.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, not {chunk}")
    _check(hidden, ids, weight.shape[0], temperature)
    chunk = chunk or default_chunk(weight)
    hidden = hidden if torch.is_grad_enabled() else hidden.detach()  # a Function is not told
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits
        return _LinearLogprob.apply(hidden, weight, ids, float(temperature), chunk, needs_grad)


def default_chunk(weight: torch.Tensor) -> int:
    """Rows of logits held at once for a head (V, D), a multiple of 128 where that many fit."""
    rows = (GPU_ELEMENTS if weight.is_cuda else CPU_ELEMENTS) // weight.shape[0]
    return max(1, rows // 128 * 128 or rows)


def _check(values: torch.Tensor, ids: torch.Tensor, size: int, temperature: float) -> None:
    if not values.is_floating_point() or ids.dtype != torch.int64:
        raise ValueError(f"expected floating-point values and int64 ids, got {values.dtype} and {ids.dtype}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite to have log-probabilities, not {temperature}")
    if size < 1:
        raise ValueError("the vocabulary is empty")
    if ids.device.type == "cpu" and len(ids) and not 0 <= ids.min() <= ids.max() < size:
        found = f"{ids.min().item()} to {ids.max().item()}"
        raise ValueError(f"ids must be in [0, {size}), found {found}: leave masked tokens out or give them any id")


# ------------------------------------------------------------------------------------------------ gradients


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, temperature, in_place):
        rows = _rows(logits, ids, temperature)
        logsumexp = rows.top / temperature + rows.log_sum
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, ids, rows.top, rows.log_sum, rows.others)
            ctx.temperature, ctx.in_place, ctx.spent = temperature, in_place, False
        ctx.mark_non_differentiable(rows.entropy, logsumexp, rows.mean)
        return rows.logprob, rows.entropy, logsumexp, rows.mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.spent:
            raise RuntimeError("selective_log_softmax(in_place=True) has overwritten its logits: backward works once")
        logits, ids, *rows = ctx.saved_tensors
        out = logits.detach() if ctx.in_place else torch.empty_like(logits)
        ctx.spent = ctx.in_place
        _gradient(logits, ids, ctx.temperature, *rows, grad, out)
        if ctx.in_place:  # Triton's writes go unseen: who else has saved the logits shall get autograd's error
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, chunk, needs_grad):
        count = hidden.shape[0]
        logprob = torch.empty(count, dtype=_result_type(hidden), device=hidden.device)
        entropy = torch.empty_like(logprob)
        trained = needs_grad.nonzero()[:, 0] if needs_grad is not None and ctx.needs_input_grad[0] else None
        size = 0 if not ctx.needs_input_grad[0] else count if trained is None else len(trained)
        jacobian = hidden.new_empty(size, hidden.shape[1])  # (trained rows, D)
        saved = 0
        for part, with_grad in _parts(count, chunk, trained, needs_grad, ctx.needs_input_grad[0]):
            logits = _logits(hidden[part], weight)  # (n, V)
            # The gradient takes the place of the logits: in a narrower type, of the first half of each row.
            replaced = logits.view(weight.dtype)[:, : weight.shape[0]] if with_grad else None
            rows = _rows(logits, ids[part], temperature, replaced)
            logprob[part], entropy[part] = rows.logprob, rows.entropy
            if with_grad:
                torch.mm(replaced, weight, out=jacobian[saved : saved + len(replaced)]).mul_(rows.factor[:, None])
                saved += len(replaced)
            del logits, replaced  # before the next chunk's
        ctx.save_for_backward(jacobian, trained)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        jacobian, trained = ctx.saved_tensors
        if trained is None:
            return jacobian * grad[:, None].to(jacobian.dtype), None, None, None, None, None
        found = jacobian.new_zeros(ctx.shape)
        found[trained] = jacobian * grad[trained, None].to(jacobian.dtype)
        return found, None, None, None, None, None


def _parts(count, chunk, trained, needs_grad, with_grad) -> Iterator[tuple[slice | torch.Tensor, bool]]:
    """The rows in chunks, each with whether it gets a gradient."""
    if trained is None:
        yield from ((slice(start, start + chunk), with_grad) for start in range(0, count, chunk))
        return
    yield from ((part, True) for part in trained.split(chunk) if len(part))
    yield from ((part, False) for part in (~needs_grad).nonzero()[:, 0].split(chunk) if len(part))


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T in float32, or float64 for float64, not rounded to a narrower type on the way."""
    if weight.dtype == _result_type(weight):
        return torch.mm(hidden, weight.T)
    if weight.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    hidden = hidden.float()
    for part, found in zip(weight.split(CONVERTED_ROWS), logits.split(CONVERTED_ROWS, 1)):
        torch.mm(hidden, part.float().T, out=found)
    return logits


def _result_type(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ the two passes


def _rows(logits, ids, temperature, replaced=None) -> Rows:
    """Statistics of logits (n, V) at ids (n,).

    With `replaced`, (n, V), the rows of onehot - p are written there up to `Rows.factor`: factor * replaced is the
    gradient of log p. It may share the memory of the logits, which are used up.
    """
    if use_triton(logits):
        from kernels import logprob_triton

        return logprob_triton.rows(logits, ids, temperature, replaced)
    dtype, found = _result_type(logits), []
    for part in _cached(logits):
        z, target = logits[part], ids[part, None]
        top = z.amax(-1, keepdim=True).to(dtype)
        mean = z.mean(-1, dtype=dtype) / temperature if replaced is None else top[:, 0]  # there nobody asks for it
        gap = z.to(dtype) - top
        if temperature != 1:
            gap.div_(temperature)
        own_gap = gap.gather(-1, target)[:, 0]
        own = own_gap.exp()
        weight = torch.exp(gap, out=z if replaced is not None and z.dtype == dtype else None)
        others = weight.scatter_(-1, target, 0.0).sum(-1)
        total = others + own
        weighted = gap.mul_(weight).sum(-1)
        if weighted.isnan().any():  # from a logit of -inf: it has weight 0, and 0 * -inf is nan
            weighted = gap.nansum(-1)
        weighted += torch.special.xlogy(own, own)
        log_sum, factor = total.log(), -1 / (total * temperature)
        if replaced is not None:
            weight.scatter_(-1, target, -others[:, None])
            if replaced.dtype != dtype:  # not normalised, the row could leave the range of fp16
                replaced[part] = weight.div_(-total[:, None]).to(replaced.dtype)  # a copy: it shares memory with z
                factor = torch.full_like(total, 1 / temperature)
        entropy = log_sum - weighted / total
        found.append(Rows(own_gap - log_sum, entropy, top[:, 0], log_sum, others / total, mean, factor))
    return Rows(*map(torch.cat, zip(*found, strict=True)))


def _gradient(logits, ids, temperature, top, log_sum, others, grad, out) -> None:
    """Write grad (n,) times (onehot - p) / T into `out` (n, V), which may be the logits themselves."""
    if use_triton(logits):
        from kernels import logprob_triton

        return logprob_triton.gradient(logits, ids, temperature, top, log_sum, others, grad, out)
    for part in _cached(logits):
        scale = (grad[part].to(top.dtype) / temperature)[:, None]
        p = logits[part].to(top.dtype) - top[part, None]
        if temperature != 1:
            p.div_(temperature)
        p.sub_(log_sum[part, None]).exp_().mul_(-scale)
        out[part] = p.scatter_(-1, ids[part, None], scale * others[part, None])


def _cached(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows. On a CPU eager PyTorch goes over each several times, so it has to stay in the cache."""
    step = len(logits) or 1 if logits.is_cuda else max(1, CACHED_ELEMENTS // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits) or 1, step))
