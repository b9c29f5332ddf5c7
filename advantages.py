"""Advantages: the G rewards of a group -> G floats in float64. Pure functions, and a table of them.

Sums are exactly rounded (fsum), so the order of the responses changes no bit. Every function is given G >= 2 rewards;
bound by name they give a group of one 0.
"""

import math
from collections.abc import Callable, Sequence

import variants


def mean_of(r: Sequence[float]) -> float:
    """The arithmetic mean, within [min r, max r] also after rounding."""
    # Rounding may put the mean of equal rewards one ulp beside them; a group without signal must get exactly 0.
    return min(max(math.fsum(r) / len(r), min(r)), max(r))


def mean(rewards: list[float]) -> list[float]:
    """A_i = r_i - mean r. Dr. GRPO, 2503.20783."""
    mu = mean_of(rewards)
    return [r - mu for r in rewards]


def group_norm(rewards: list[float], *, eps: float = 1e-6) -> list[float]:
    """A_i = (r_i - mean r) / (std r + eps), sample std (n - 1). GRPO, 2402.03300."""
    centred = mean(rewards)
    std = math.sqrt(math.fsum(d * d for d in centred) / (len(rewards) - 1))
    return [d / (std + eps) if d else 0.0 for d in centred]


def rloo(rewards: list[float]) -> list[float]:
    """A_i = r_i - mean of the other rewards = (r_i - mean r) G / (G - 1). 2402.14740."""
    return [d * len(rewards) / (len(rewards) - 1) for d in mean(rewards)]


def energy(rewards: list[float], *, beta: float = 1.0) -> list[float]:
    """A_i = beta r_i - logsumexp_j(beta r_j) <= 0. 2603.21289 §3.3, as printed.

    The log-probability of response i under the distribution that the rewards induce on the group, so exp(A) sums to 1.
    Every response is pushed down, the best the least; a group of equal rewards gets -log G each, not 0.
    """
    x = [beta * r for r in rewards]
    top = max(x)
    log_sum = math.log(math.fsum(math.exp(v - top) for v in x))  # of the shifted sum, which lies in [1, G]
    return [(v - top) - log_sum for v in x]


def energy_centred(rewards: list[float], *, beta: float = 1.0) -> list[float]:
    """A_i = beta (r_i - mean r): what the released code of 2603.21289 computes.

    There the printed energy enters a GRPO step that subtracts the group's mean. logsumexp is the same number for all i
    and cancels, leaving centred rewards: of mixed sign, and 0 for a group of equal rewards. `energy` and this train
    differently, so both are kept.
    """
    return [beta * d for d in mean(rewards)]


ADVANTAGES: dict[str, Callable[..., list[float]]] = {
    "group-norm": group_norm,
    "mean": mean,
    "rloo": rloo,
    "energy": energy,
    "energy-centred": energy_centred,
}


def bind_advantage(estimator: str, **settings) -> Callable[[list[float]], list[float]]:
    """The function G rewards -> G advantages that `estimator` names, checked at start-up. G = 1 gives 0 under each."""
    function, bound = variants.bind("advantage", ADVANTAGES, estimator, settings)

    def advantage_of(rewards: list[float]) -> list[float]:
        rewards = variants.finite(rewards, len(rewards), f"rewards for {estimator!r}")
        if len(rewards) < 2:
            return [0.0] * len(rewards)
        return variants.finite(function(rewards, **bound), len(rewards), f"advantage {estimator!r}")

    return advantage_of
