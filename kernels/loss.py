"""The clipped policy-gradient loss on token log-probabilities, with its statistics.

Responses come packed, tokens (N,) in the order of `lengths` (R,), or padded, (R, T) with a mask.
"""

import torch

from kernels.common import ESTIMATORS, FARTHEST, LARGEST
from kernels.dispatch import use_triton

AGGREGATIONS = ("token", "sequence", "dr-grpo")


def response_weights(lengths: torch.Tensor, aggregation: str = "token", max_length: int | None = None) -> torch.Tensor:
    """The weight in the loss of every token of a response, (R,) float32, for responses of `lengths` (R,) tokens.

    `token`: 1 / all tokens, so that tokens count alike (DAPO, arXiv 2503.14476). `sequence`: 1 / (R * length), the
    mean over responses of the mean over their tokens (GRPO, arXiv 2402.03300 eq. 3). `dr-grpo`: 1 / (R * max_length),
    so that a long response is not diluted (arXiv 2503.20783). A response of length 0 is masked and counts for nothing.
    Weights are taken over a whole minibatch: the loss does not depend on how it is split into micro-batches.
    """
    _check_aggregation(aggregation, max_length)
    used = lengths > 0
    count = used.sum().clamp(min=1)
    if aggregation == "token":
        return used / lengths.sum().clamp(min=1)
    return used / (count * (lengths.clamp(min=1) if aggregation == "sequence" else max_length))


def grpo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    aggregation: str = "token",
    max_length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    ratio_level: str = "token",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO-clip over response tokens. Differentiable with respect to `logprob`; forward and backward are one pass.

    logprob, old_logprob, ref_logprob and mask (R, T), true at response tokens; or packed (N,), with `lengths` (R,)
    int64, which sum to N, and a mask if there is more to leave out. What is masked may hold anything. advantage (R,),
    or one a token, of the shape of logprob; where both shapes are the same, one a response.

    ratio rho = exp(logprob - old_logprob), or with ratio_level `sequence` its geometric mean over the response (GSPO,
    arXiv 2507.18071 eq. 7). Loss: sum of weight * max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), capped for
    A < 0 at -A * dual_clip where dual_clip > 0 (arXiv 1912.09729 eq. 5), plus kl_coef * weight * KL(policy, ref) by
    the estimator k1, k2 or k3 (http://joschu.net/blog/kl-approx.html). weight (R,) is that of each token of a response,
    by default `response_weights` of these responses; for a micro-batch give those of its minibatch. A log-ratio above
    80 counts as 80, a difference in k3 above 20 as 20 (`kl_divergence`). Only logprob gets a gradient.

    Returns the loss and sums over tokens: `clip_low`, `clip_high`, `dual_clip` (tokens clipped so), `ratio` (of
    rho - 1), `tokens` and, with a reference, `kl`. No sum depends on the order in which threads finish.
    Raises ValueError for shapes that disagree, settings out of range, names that it does not know, and kl_coef without
    ref_logprob; whether `lengths` on a GPU sum to N is not looked at: tokens beyond N or beyond the sum are left out.
    """
    _check_aggregation(aggregation, max_length if weight is None else 1)
    if not (0 <= clip_low <= 1 and clip_high >= 0 and (dual_clip == 0 or dual_clip > 1)):
        raise ValueError(
            f"expected 0 <= clip_low <= 1, clip_high >= 0 and dual_clip 0 or above 1, not {clip_low=}, {clip_high=}, "
            f"{dual_clip=}"
        )
    if mask is not None and mask.is_floating_point():
        raise ValueError(f"mask must be bool or integer, not {mask.dtype}: give mask.bool()")
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level must be token or sequence, not {ratio_level!r}")
    _check_kl(kl_coef, kl_estimator, ref_logprob)
    count = _count(logprob, lengths)
    for name, tensor in {"old_logprob": old_logprob, "mask": mask, "ref_logprob": ref_logprob}.items():
        if tensor is not None and tensor.shape != logprob.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(logprob.shape)} as logprob")
    if advantage.shape not in ((count,), logprob.shape):
        raise ValueError(
            f"advantage is {tuple(advantage.shape)}, expected ({count},), one a response, or {tuple(logprob.shape)}"
        )
    if weight is not None and weight.shape != (count,):
        raise ValueError(f"weight is {tuple(weight.shape)}, expected ({count},), one a response")
    old_logprob, advantage = old_logprob.detach(), advantage.detach()
    ref_logprob = None if ref_logprob is None else ref_logprob.detach()
    weight = None if weight is None else weight.detach()
    if use_triton(logprob):
        from kernels import loss_triton

        return loss_triton.grpo_loss(
            logprob, old_logprob, advantage, mask, ref_logprob, lengths, weight, aggregation, max_length,
            clip_low, clip_high, dual_clip, ratio_level, kl_coef, kl_estimator,
        )  # fmt: skip
    owner = _owner(logprob, lengths)
    seen = torch.ones_like(owner, dtype=torch.bool) if mask is None else mask.flatten().bool()
    logprob = logprob.flatten().to(torch.promote_types(logprob.dtype, torch.float32))
    logratio = torch.where(seen, logprob - old_logprob.flatten(), 0.0)
    tokens = torch.zeros(count, dtype=torch.int64, device=owner.device).index_add(0, owner, seen.long())  # (R,)
    if ratio_level == "sequence":
        mean = logratio.new_zeros(count).index_add(0, owner, logratio) / tokens.clamp(min=1)  # (R,)
        logratio = mean.index_select(0, owner)  # the backward pass of mean[owner] would add with threads in a race
    weight = response_weights(tokens, aggregation, max_length) if weight is None else weight
    weight = torch.where(seen, weight.to(logprob.dtype)[owner], 0.0)
    advantage = advantage.flatten() if advantage.shape != (count,) else advantage[owner]
    advantage = torch.where(seen, advantage, 0.0)
    ratio = logratio.clamp(max=LARGEST).exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    cap = -advantage * dual_clip
    over = (advantage < 0) & (loss > cap) & (dual_clip > 0)
    bound = clipped > plain
    stats = {
        "clip_low": bound & (advantage < 0),
        "clip_high": bound & (advantage > 0),
        "dual_clip": over,
        "ratio": torch.where(seen, torch.expm1(logratio.detach().clamp(max=LARGEST)), 0.0),
        "tokens": tokens,
    }
    stats = {name: value.sum(dtype=loss.dtype) for name, value in stats.items()}
    loss = (weight * torch.where(over, cap, loss)).sum()
    if ref_logprob is not None:
        kl = kl_divergence(torch.where(seen, logprob, 0.0), torch.where(seen, ref_logprob.flatten(), 0.0), kl_estimator)
        stats["kl"] = kl.detach().sum()
        if kl_coef:
            loss = loss + kl_coef * (weight * kl).sum()
    return loss, stats


def sft_loss(
    logprob: torch.Tensor,
    target: torch.Tensor,
    ref_logprob: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor,
    weight: torch.Tensor,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted cross-entropy, sum of weight * target * -logprob, `target` (R,) being each response's reward.

    At ratio 1 its gradient is that of `grpo_loss` with the advantage `target`. Packed (N,) and otherwise as there.
    """
    _check_kl(kl_coef, kl_estimator, ref_logprob)
    count = _count(logprob, lengths)
    for name, tensor in {"target": target, "weight": weight}.items():
        if tensor.shape != (count,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected ({count},), one a response")
    if ref_logprob is not None and ref_logprob.shape != logprob.shape:
        raise ValueError(f"ref_logprob is {tuple(ref_logprob.shape)}, expected {tuple(logprob.shape)} as logprob")
    owner = _owner(logprob, lengths)
    loss, stats = ((weight * target)[owner] * -logprob).sum(), {}
    if ref_logprob is not None:
        kl = kl_divergence(logprob, ref_logprob, kl_estimator)
        stats["kl"] = kl.detach().sum()
        if kl_coef:
            loss = loss + kl_coef * (weight[owner] * kl).sum()
    return loss, stats


def rollout_weights(old_logprob: torch.Tensor, sampled_logprob: torch.Tensor, cap: float = 2.0) -> torch.Tensor:
    """Truncated importance weights min(exp(old_logprob - sampled_logprob), cap), one a token, without a gradient.

    They weigh for a sampler whose probabilities are not the trainer's, whatever the reason: other kernels, rounding, an
    older policy (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; TRL's `token_truncate`, verl's
    `rollout_is: token`). Multiply advantages by them, one a token: both branches of `grpo_loss`'s maximum and its dual
    clip are proportional to A, so this multiplies the token's loss and leaves the KL term as it is, as both of these
    libraries do. With ratio_level `sequence` a response's loss is then multiplied by the mean of its tokens' weights.
    """
    return (old_logprob - sampled_logprob).detach().exp().clamp(max=cap)


def kl_divergence(logprob: torch.Tensor, ref_logprob: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """Estimate KL(policy, reference) at each sampled token, in nats: k1 unbiased, k2 low variance, k3 both and >= 0.

    k3 is exp(d) - 1 - d with d = ref_logprob - logprob. In float32 it overflows from d = 89 on, and the square of its
    gradient from d = 45 on. So d counts as 20 at most, as in verl: a token beyond that has the value there, 4.9e8, and
    no gradient. It is none of the policy's own: of these, d > x has a probability of exp(-x) or less, here 2e-9.
    """
    difference = ref_logprob - logprob
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(max=FARTHEST)
        return torch.expm1(difference) - difference
    raise ValueError(f"kl_estimator must be k1, k2 or k3, not {estimator!r}")


def _count(logprob: torch.Tensor, lengths: torch.Tensor | None) -> int:
    """How many responses there are."""
    if logprob.dim() != (2 if lengths is None else 1) or not logprob.is_floating_point():
        raise ValueError(
            f"expected logprob (R, T) without lengths, or (N,) with lengths (R,); got {tuple(logprob.shape)} "
            f"{logprob.dtype} {'without' if lengths is None else 'with'} lengths"
        )
    if lengths is None:
        return len(logprob)
    if lengths.dim() != 1 or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected lengths (R,) int64, got {tuple(lengths.shape)} {lengths.dtype}")
    if lengths.device.type == "cpu" and (int(lengths.sum()) != len(logprob) or (lengths < 0).any()):
        raise ValueError(f"lengths must be >= 0 and sum to the {len(logprob)} tokens; they sum to {int(lengths.sum())}")
    return len(lengths)


def _owner(logprob: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The response of each token, (N,) or (R * T,)."""
    responses = torch.arange(_count(logprob, lengths), device=logprob.device)
    if lengths is None:
        return responses.repeat_interleave(logprob.shape[1])
    return responses.repeat_interleave(lengths.to(logprob.device), output_size=len(logprob))


def _check_aggregation(aggregation: str, max_length: int | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be token, sequence or dr-grpo, not {aggregation!r}")
    if aggregation == "dr-grpo" and (max_length is None or max_length < 1):
        raise ValueError(f"dr-grpo divides by the longest response allowed: give max_length >= 1, not {max_length}")


def _check_kl(kl_coef: float, kl_estimator: str, ref_logprob: torch.Tensor | None) -> None:
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator must be k1, k2 or k3, not {kl_estimator!r}")
    if not kl_coef >= 0 or (kl_coef and ref_logprob is None):
        raise ValueError(f"kl_coef must be >= 0, and needs ref_logprob if it is not 0; it is {kl_coef}")
