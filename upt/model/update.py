"""The update: PPO-clip, or cross-entropy, on the adapter from the scored groups of one step.

It is made in minibatches, each of which sums its gradient over micro-batches. Skipped groups take no part.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from kernels import grpo_loss, kl_divergence, response_weights, rollout_weights, sft_loss
from upt.model.memory import fitting
from upt.model.packing import pack
from upt.model.policy import Policy

COUNTS = ("nonfinite", "no_signal")


def update(
    policy: Policy, optimizer, schedule, prompts: list, groups: list[dict], config, measure_kl: bool, in_a_row: int = 0
) -> dict:
    """One step's updates of the adapter; returns their statistics, averaged over the minibatches; COUNTS are
    how many of the updates were not made, since something was not finite or nothing carried a signal.

    `config` has the loss settings of train_upt.Config. With `measure_kl` the KL to the reference is measured before
    each update, without touching it; with a kl_coef it is part of the loss and measured anyway. `in_a_row` updates
    before this step were not finite, one after the other; `nonfinite_in_a_row` says so of the end of this step.
    What `disagreement` says is of the policy before the step's first update, from forward passes that are made anyway.
    """

    def fit(work: Callable, *args):
        def within(budget: int):
            return work(policy, *args, replace(config, update_tokens=budget))

        return fitting(policy, "--update-tokens", config.update_tokens, within)

    policy.model.train()
    kept = [i for i, group in enumerate(groups) if not group.get("skipped")]
    prompts, groups = [prompts[i] for i in kept], [groups[i] for i in kept]
    count = max(1, min(config.minibatches, len(groups)))
    cuts = [len(groups) * part // count for part in range(count + 1)]
    parts = [slice(*cut) for cut in pairwise(cuts)]
    # In the first minibatch the policy has not moved yet: its own detached log-probabilities are the old ones.
    olds = [None] * count
    if config.algorithm == "grpo":
        olds[1:] = [fit(_logprobs, prompts[part], groups[part]) for part in parts[1:]]
    steps, apart = [], [torch.zeros(0)]
    for number, (part, old) in enumerate(zip(parts, olds, strict=True)):
        stats = {"kl": fit(kl_to_reference, prompts[part], groups[part])} if measure_kl else {}
        found, difference = fit(accumulate, prompts[part], groups[part], old)
        stats |= found
        # Cross-entropy is at temperature 1, and only in the first minibatch of the policy that sampled.
        if config.algorithm == "grpo" or (number == 0 and config.temperature == 1):
            apart.append(difference)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable(), config.max_grad_norm or math.inf).item()
        stats |= {"grad_norm": norm, "nonfinite": 0, "no_signal": 0}
        if all(p.grad is None for p in policy.trainable()):
            stats["no_signal"] = 1
        elif not (math.isfinite(stats["loss"]) and math.isfinite(norm)):
            stats["nonfinite"] = 1
            in_a_row += 1
        else:
            optimizer.step()
            in_a_row = 0
        optimizer.zero_grad()
        advance(schedule)
        steps.append(stats)
    advance(schedule, config.minibatches - count)  # it counts on as many
    sums = {name: sum(s[name] for s in steps) for name in steps[0]}
    means = {name: value if name in COUNTS else value / len(steps) for name, value in sums.items()}
    if not groups:
        means |= {name: None for name in means if name == "kl"}  # of no token
    return means | disagreement(torch.cat(apart), config) | {"nonfinite_in_a_row": in_a_row}


def accumulate(
    policy: Policy, prompts: list, groups: list[dict], old: dict | None, config
) -> tuple[dict[str, float], torch.Tensor]:
    """Sum the gradient of one minibatch's loss over its micro-batches.

    Returns the loss and its statistics, and of each token that was looked at, (N,) on the CPU, by how much its old
    log-probability is above the one that it was sampled with. `old` holds the log-probabilities from before the step
    by (group, response); None: the policy's own, as it has not moved since or the loss has no ratio.
    """
    policy.model.zero_grad()  # of a try that ran out of memory
    lengths = torch.tensor([[_used_length(r, config) for r in g["responses"]] for g in groups])  # (B, G)
    weights = response_weights(lengths.flatten(), config.aggregation, config.max_new_tokens).view_as(lengths)
    count = max(1, int(lengths.sum()))
    totals = {"loss": 0.0, "ratio": 1.0, "clip_low": 0.0, "clip_high": 0.0, "dual_clip": 0.0}
    totals |= {"kl": 0.0} if config.kl_coef > 0 else {}
    kl = {"kl_coef": config.kl_coef, "kl_estimator": config.kl_estimator}
    temperature = config.temperature if config.algorithm == "grpo" else 1.0
    apart = [torch.zeros(0)]
    for batch in pack(prompts, _trained(groups, config), config.update_tokens):
        owners = [owner for row in batch for owner in row.owners]
        sizes = torch.tensor([len(response) for row in batch for response in row.responses])

        reference = None
        if config.kl_coef > 0:
            with policy.reference():
                reference, _ = policy.logprobs(batch, temperature)
        logprob, _ = policy.logprobs(batch, temperature)  # (N,)
        before = logprob.detach() if old is None else torch.cat([old[owner] for owner in owners])
        responses = [groups[g]["responses"][i] for g, i in owners]
        sampled = torch.tensor([p for r in responses for p in r["logprobs"]], dtype=torch.float32)  # (N,)
        sampled = sampled.to(policy.device)
        apart.append((before - sampled).cpu())
        advantage = torch.tensor([r["advantage"] for r in responses], dtype=torch.float32).to(policy.device)  # (R,)
        weight = torch.stack([weights[owner] for owner in owners])  # (R,)
        per_response = {"lengths": sizes.to(policy.device), "weight": weight.to(policy.device)}
        if config.rollout_correction == "truncated":
            of_token = advantage.repeat_interleave(per_response["lengths"], output_size=len(logprob))  # (N,)
            advantage = of_token * rollout_weights(before, sampled, config.rollout_cap)
        if config.algorithm == "sft":
            loss, stats = sft_loss(logprob, advantage, reference, **per_response, **kl)
        else:
            loss, stats = grpo_loss(
                logprob,
                before,
                advantage,
                ref_logprob=reference,
                **per_response,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                ratio_level=config.ratio_level,
                **kl,
            )
        loss.backward()
        totals["loss"] += loss.item()
        for name in totals.keys() & stats.keys():  # means over all tokens; those left out have ratio 1, not clipped
            totals[name] += stats[name].item() / count
    return totals, torch.cat(apart)


def disagreement(apart: torch.Tensor, config) -> dict[str, float | None]:
    """How far trainer and sampler are from each other, over tokens (N,) whose log-probabilities are `apart`.

    logprob_gap_mean and logprob_gap_max, in nats. With rollout_correction `truncated` also rollout_weight_mean, the
    mean weight of a token, and rollout_capped_share, the share of those that were cut down to the cap. None: no token.
    """
    corrected = config.rollout_correction == "truncated"
    names = ["logprob_gap_mean", "logprob_gap_max"] + ["rollout_weight_mean", "rollout_capped_share"] * corrected
    if not len(apart):
        return dict.fromkeys(names)
    values = [apart.abs().mean(), apart.abs().max()]
    if corrected:
        weight = apart.exp()
        values += [weight.clamp(max=config.rollout_cap).mean(), (weight > config.rollout_cap).float().mean()]
    return dict(zip(names, torch.stack(values).tolist(), strict=True))


@torch.no_grad()
def kl_to_reference(policy: Policy, prompts: list, groups: list[dict], config) -> float:
    """Mean over all response tokens of the estimated KL from the policy as it is to the reference, in nats."""
    total, count = 0.0, 0
    for batch in pack(prompts, [[r["token_ids"] for r in g["responses"]] for g in groups], config.update_tokens):
        logprob, _ = policy.logprobs(batch, config.temperature)
        with policy.reference():
            reference, _ = policy.logprobs(batch, config.temperature)
        total += kl_divergence(logprob, reference, config.kl_estimator).sum().item()
        count += len(logprob)
    return total / max(1, count)


def _used_length(response: dict, config) -> int:
    cut = config.mask_truncated and response["finish"] == "length"
    unused = config.algorithm == "sft" and not response["advantage"]
    return 0 if cut or unused else len(response["token_ids"])


def _trained(groups: list[dict], config) -> list[list[list[int]]]:
    """The token ids of the responses that can have a gradient; an empty list in place of the others."""
    pulled = config.kl_coef > 0  # towards the reference, whatever the advantage; under sft only what is trained on
    return [
        [r["token_ids"] if _used_length(r, config) and (pulled or r["advantage"]) else [] for r in group["responses"]]
        for group in groups
    ]


@torch.no_grad()
def _logprobs(policy: Policy, prompts: list, groups: list[dict], config) -> dict[tuple[int, int], torch.Tensor]:
    """Log-probabilities of the tokens that will be trained on, under the policy as it is now, by (group, response)."""
    found = {}
    for batch in pack(prompts, _trained(groups, config), config.update_tokens):
        logprob, _ = policy.logprobs(batch, config.temperature)
        owners = [owner for row in batch for owner in row.owners]
        sizes = [len(response) for row in batch for response in row.responses]
        found |= dict(zip(owners, logprob.split(sizes), strict=True))
    return found


# ------------------------------------------------------------------------------------------------ optimizer, schedule


def optimizer_of(policy: Policy, config) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on the adapter, and the schedule of its learning rate over all updates of a run."""
    optimizer = torch.optim.AdamW(
        policy.trainable(), config.learning_rate, (0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )
    updates = config.steps * config.minibatches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: learning_rate_factor(n, config.warmup_steps, updates)
    )
    return optimizer, schedule


def advance(schedule: torch.optim.lr_scheduler.LambdaLR, updates: int = 1) -> None:
    """Take the schedule further by so many updates, made or not."""
    with warnings.catch_warnings():  # of torch, that the optimizer has not moved
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(updates):
            schedule.step()


def learning_rate_factor(n: int, warmup: int, total: int) -> float:
    """Linear over the first `warmup` updates, then along a cosine from 1 to 0.1."""
    if n < warmup:
        return (n + 1) / (warmup + 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, (n - warmup) / max(1, total - warmup)))) / 2
