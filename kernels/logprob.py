"""Log-probability and entropy of chosen tokens, straight from hidden states and a frozen head.

The head is frozen under LoRA, so the gradient of a token's log-probability with respect to its hidden state is one
vector, d log p(y) / dh = (1/T) W^T (onehot(y) - softmax(z/T)). It is formed chunk by chunk in the forward pass and
saved, (N, D); the backward pass of any loss of the log-probabilities is then a scaling of its rows. No tensor of more
than `chunk` x V logits exists at any time, and no gradient of the head is ever formed.
"""

import torch

CHUNK_ELEMENTS = 2**26  # logits held at once by default: 256 MiB in float32


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at `ids`, and the entropy of that distribution.

    hidden (N, D) of any floating type, weight (V, D) of the same type and without gradient, ids (N,) int64;
    `chunk` rows of logits are held at once (default: 2^26 elements in all). Returns float32 (N,), (N,), in nats.
    The log-probability is differentiable with respect to `hidden`; the entropy is a value without a gradient.
    Raises ValueError when shapes disagree, temperature is not positive or the head would need a gradient.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden (N, D), weight (V, D), ids (N,); got {tuple(hidden.shape)}, {tuple(weight.shape)}, "
            f"{tuple(ids.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to have log-probabilities, not {temperature}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("the head must be frozen: call weight.requires_grad_(False)")
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    return _LinearLogprob.apply(hidden, weight, ids, temperature, chunk)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, chunk):
        count = hidden.shape[0]
        logprob = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, D)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            target = ids[rows, None]
            logp = (hidden[rows] @ weight.T).float().div_(temperature)  # (chunk, V)
            logp.sub_(logp.logsumexp(-1, keepdim=True))
            logprob[rows] = logp.gather(-1, target)[:, 0]
            p = logp.exp()
            # A logit of -inf has p = 0 and adds nothing; 0 * -inf would add nan.
            entropy[rows] = -logp.clamp_(min=torch.finfo(torch.float32).min).mul_(p).sum(-1)
            if jacobian is not None:
                # onehot - p in float32, before any rounding. At the target it is the probability of all other tokens,
                # summed: 1 - p would lose every digit of it near p = 1.
                p.scatter_(-1, target, 0.0)
                others = p.sum(-1, keepdim=True)
                jacobian[rows] = (p.neg_().scatter_(-1, target, others).to(weight.dtype) @ weight).div_(temperature)
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, _):
        (jacobian,) = ctx.saved_tensors
        return (jacobian * grad_logprob[:, None].to(jacobian.dtype)), None, None, None, None
