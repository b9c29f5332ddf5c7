"""Advantages: the rewards of a group -> as many floats. The reference, in float64, and its form for tensors.

The functions of the table take one group of G >= 2 rewards; a group of one gets 0 under each estimator. Sums are
exactly rounded (fsum), so the order of the responses changes no bit.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import torch


def mean_of(r: Sequence[float]) -> float:
    """The arithmetic mean, within [min r, max r] also after rounding."""
    # Rounding may put the mean of equal rewards one ulp beside them; a group without signal must get exactly 0.
    return min(max(math.fsum(r) / len(r), min(r)), max(r))


def mean(rewards: list[float]) -> list[float]:
    """A_i = r_i - mean r. Dr. GRPO, 2503.20783."""
    mu = mean_of(rewards)
    return [r - mu for r in rewards]


def group_norm(rewards: list[float], *, eps: Annotated[float, "at least 0"] = 1e-6) -> list[float]:
    """A_i = (r_i - mean r) / (std r + eps), sample std (n - 1). GRPO, 2402.03300."""
    centred = mean(rewards)
    std = math.sqrt(math.fsum(d * d for d in centred) / (len(rewards) - 1))
    return [d / (std + eps) if d else 0.0 for d in centred]


def rloo(rewards: list[float]) -> list[float]:
    """A_i = r_i - mean of the other rewards = (r_i - mean r) G / (G - 1). 2402.14740."""
    return [d * len(rewards) / (len(rewards) - 1) for d in mean(rewards)]


def energy(rewards: list[float], *, beta: Annotated[float, "above 0"] = 1.0) -> list[float]:
    """A_i = beta r_i - logsumexp_j(beta r_j) <= 0. 2603.21289 §3.3, as printed.

    The log-probability of response i under the distribution that the rewards induce on the group, so exp(A) sums to 1.
    Every response is pushed down, the best the least; a group of equal rewards gets -log G each, not 0.
    """
    x = [beta * r for r in rewards]
    top = max(x)
    log_sum = math.log(math.fsum(math.exp(v - top) for v in x))  # of the shifted sum, which lies in [1, G]
    return [(v - top) - log_sum for v in x]


def energy_centred(rewards: list[float], *, beta: Annotated[float, "above 0"] = 1.0) -> list[float]:
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


def group_advantage(
    rewards: "torch.Tensor", estimator: str = "group-norm", group_ids: "torch.Tensor | None" = None, **settings: float
) -> "torch.Tensor":
    """Advantages of many groups at once, of the shape of `rewards`; float32, or float64 for float64 rewards.

    rewards (B, G), a group a row; or (N,) with group_ids (N,) int64, equal for the members of a group, which may be of
    any sizes and in any order. `estimator` is a name of ADVANTAGES, `settings` are its own (eps, beta). In float64
    inside: one launch on a GPU for the names in advantage_triton.ESTIMATORS, for others the table's function, group by
    group on the CPU. Raises ValueError for what it does not know and for shapes that disagree; rewards that are
    not finite give nan in their group.
    """
    import torch  # rewards.py uses this module without it

    from kernels.dispatch import use_triton

    if estimator not in ADVANTAGES:
        raise ValueError(f"no advantage is called {estimator!r}; there are: {', '.join(ADVANTAGES)}")
    function = ADVANTAGES[estimator]
    known = {name: p.default for name, p in [*inspect.signature(function).parameters.items()][1:]}
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"advantage {estimator!r} has no setting {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    if rewards.dim() != (2 if group_ids is None else 1) or (group_ids is not None and group_ids.shape != rewards.shape):
        found = tuple(rewards.shape), None if group_ids is None else tuple(group_ids.shape)
        raise ValueError(f"expected rewards (B, G), or (N,) with group_ids (N,); got {found[0]}, {found[1]}")
    if group_ids is not None and group_ids.dtype != torch.int64:
        raise ValueError(f"group_ids must be int64, not {group_ids.dtype}")
    if not (settings.get("eps", 0.0) >= 0 and math.isfinite(settings.get("beta", 1.0))):
        raise ValueError(f"expected eps >= 0 and a finite beta, not {settings}")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if use_triton(rewards):
        from kernels import advantage_triton

        if estimator in advantage_triton.ESTIMATORS:
            return advantage_triton.advantage(rewards, estimator, group_ids, **known | settings)
    flat = rewards.flatten().tolist()
    size = rewards.shape[-1]
    names = [i // size for i in range(len(flat))] if group_ids is None else group_ids.tolist()
    members: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    found = [0.0] * len(flat)
    for places in members.values():
        group = [flat[i] for i in places]
        if not all(map(math.isfinite, group)):
            values = [math.nan] * len(group)
        else:
            values = function(group, **settings) if len(group) > 1 else [0.0]
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return torch.tensor(found, dtype=dtype, device=rewards.device).view(rewards.shape)
