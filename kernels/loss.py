"""The clipped policy-gradient loss on token log-probabilities, with its statistics."""

import torch


def response_weights(lengths: torch.Tensor, aggregation: str = "token", max_length: int | None = None) -> torch.Tensor:
    """The weight in the loss of every token of a response, (R,) float32, for responses of `lengths` (R,) tokens.

    `token`: 1 / all tokens, so that tokens count alike (DAPO, arXiv 2503.14476). `sequence`: 1 / (R * length), the
    mean over responses of the mean over their tokens (GRPO, arXiv 2402.03300 eq. 3). `dr-grpo`: 1 / (R * max_length),
    so that a long response is not diluted (arXiv 2503.20783). A response of length 0 is masked and counts for nothing.
    Weights are taken over a whole minibatch: the loss does not depend on how it is split into micro-batches.
    """
    used = lengths > 0
    count = max(1, int(used.sum()))
    if aggregation == "token":
        return used / max(1, int(lengths.sum()))
    if aggregation == "sequence":
        return used / (count * lengths.clamp(min=1))
    if aggregation == "dr-grpo":
        if max_length is None:
            raise ValueError("dr-grpo divides by the longest response allowed: give max_length")
        return used / (count * max_length)
    raise ValueError(f"aggregation must be token, sequence or dr-grpo, not {aggregation!r}")


def grpo_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    owner: torch.Tensor,
    ref_logprob: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    ratio_level: str = "token",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO-clip over response tokens; all tensors (N,) float32 but owner, (N,) int64, the response of each token.

    ratio rho = exp(logprob - old_logprob), or with ratio_level `sequence` its geometric mean over the response (GSPO,
    arXiv 2507.18071 eq. 7). Loss: sum of weight * max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), capped for
    A < 0 at -A * dual_clip where dual_clip > 0 (arXiv 1912.09729 eq. 5), plus kl_coef * weight * KL(policy, ref) by
    the estimator k1, k2 or k3 (http://joschu.net/blog/kl-approx.html). Returns the loss and sums over tokens:
    `clip_low`, `clip_high`, `dual_clip` (tokens clipped so), `ratio` (of rho - 1) and, with a reference, `kl`.
    """
    logratio = logprob - old_logprob
    if ratio_level == "sequence":
        size = int(owner.max()) + 1 if len(owner) else 0
        ones = torch.ones_like(logratio)
        total = logratio.new_zeros(size).index_add(0, owner, logratio)
        length = logratio.new_zeros(size).index_add(0, owner, ones)
        logratio = (total / length.clamp(min=1))[owner]
    elif ratio_level != "token":
        raise ValueError(f"ratio_level must be token or sequence, not {ratio_level!r}")
    ratio = logratio.exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    with torch.no_grad():
        bound = clipped > plain
        stats = {
            "clip_low": (bound & (advantage < 0)).sum(),
            "clip_high": (bound & (advantage > 0)).sum(),
            "ratio": (ratio - 1).sum(),
        }
    if dual_clip > 0:
        cap = -advantage * dual_clip
        over = (advantage < 0) & (loss > cap)
        loss = torch.where(over, cap, loss)
        stats["dual_clip"] = over.sum()
    loss = (weight * loss).sum()
    if ref_logprob is not None:
        kl = kl_divergence(logprob, ref_logprob, kl_estimator)
        stats["kl"] = kl.detach().sum()
        loss = loss + kl_coef * (weight * kl).sum()
    return loss, stats


def sft_loss(
    logprob: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted cross-entropy, sum of weight * target * -logprob; tensors (N,), `target` being each response's reward.

    At ratio 1 its gradient is that of `grpo_loss` with the advantage `target`. KL and returned sums as there.
    """
    loss, stats = (weight * target * -logprob).sum(), {}
    if ref_logprob is not None:
        kl = kl_divergence(logprob, ref_logprob, kl_estimator)
        stats["kl"] = kl.detach().sum()
        loss = loss + kl_coef * (weight * kl).sum()
    return loss, stats


def kl_divergence(logprob: torch.Tensor, ref_logprob: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """Estimate KL(policy, reference) at each sampled token, in nats: k1 unbiased, k2 low variance, k3 both and >= 0."""
    difference = ref_logprob - logprob
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(difference) - difference
    raise ValueError(f"kl_estimator must be k1, k2 or k3, not {estimator!r}")
