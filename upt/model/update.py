"""The update: PPO-clip, or cross-entropy, on the adapter from the scored groups of one step.

It is made in minibatches, each of which sums its gradient over micro-batches. Skipped groups take no part. Of several
processes each sums over groups of its own, of a loss that is normalised over those of all; then the sums are added up.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import torch

from kernels import grpo_loss, kl_divergence, response_weights, rollout_weights, sft_loss
from upt.errors import PolicyError
from upt.model.memory import fitting
from upt.model.packing import pack
from upt.model.policy import Policy
from upt.model.room import update_tokens
from upt.run.team import ALONE, Team

COUNTS = ("nonfinite", "no_signal")


def minibatches(groups: list[dict], config) -> list[list[int]]:
    """The places of the groups of each minibatch, in order: as many in each, or one more; one minibatch at least."""
    kept = [i for i, group in enumerate(groups) if not group.get("skipped")]
    count = max(1, min(config.minibatches, len(kept)))
    cuts = [len(kept) * part // count for part in range(count + 1)]
    return [kept[start:end] for start, end in pairwise(cuts)]


def tokens_of(group: dict) -> int:
    """Tokens of a group's prompt and its responses: what it costs."""
    return group["prompt_tokens"] + sum(len(response["token_ids"]) for response in group["responses"])


def owners(groups: list[dict], homes: list[int], config, team: Team) -> list[int]:
    """The rank of the process that updates on each group: at `homes`, its rank so far, if the tokens of a minibatch are
    evenly shared then."""
    found = list(homes)
    for part in minibatches(groups, config):
        tokens = [tokens_of(groups[i]) for i in part]
        for i, rank in zip(part, team.even(tokens, [homes[i] for i in part]), strict=True):
            found[i] = rank
    return found


def update(
    policy: Policy,
    optimizer,
    schedule,
    prompts: list,
    groups: list[dict],
    config,
    measure_kl: bool,
    in_a_row: int = 0,
    team: Team = ALONE,
) -> dict:
    """One step's updates of the adapter; returns their statistics, averaged over the minibatches; COUNTS are
    how many of the updates were not made, since something was not finite or nothing carried a signal.

    `groups` are those of the step, of all processes, `prompts` their prompts, None for those of another process.
    `config` has the loss settings of train_upt.Config. With `measure_kl` the KL to the reference is measured before
    each update, without touching it; with a kl_coef it is part of the loss and measured anyway. `in_a_row` updates
    before this step were not finite, one after the other; `nonfinite_in_a_row` says so of the end of this step.
    What `disagreement` says is of the policy before the step's first update, from forward passes that are made anyway.
    """

    def fit(work: Callable, *args):
        def within(budget: int):
            return work(policy, *args, replace(config, update_tokens=budget))

        return fitting(policy, "--update-tokens", budget, within)

    budget = config.update_tokens or update_tokens(policy, optimizer, config)
    policy.model.train()
    parts = [([prompts[i] for i in part], [groups[i] for i in part]) for part in minibatches(groups, config)]
    # In the first minibatch the policy has not moved yet: its own detached log-probabilities are the old ones.
    olds = [None] * len(parts)
    if config.algorithm == "grpo":
        olds[1:] = team.here(lambda: [fit(_logprobs, *part) for part in parts[1:]])
    steps, apart = [], [torch.zeros(0)]
    for number, (part, old) in enumerate(zip(parts, olds, strict=True)):

        def look(part=part, old=old) -> tuple[dict, torch.Tensor]:
            kl = {"kl": fit(kl_to_reference, *part)} if measure_kl else {}
            found, difference = fit(accumulate, *part, old)
            return kl | found, difference

        told = team.together(look)
        stats = {name: sum(found[name] for found, _ in told) for name in told[0][0]}
        stats["ratio"] += 1  # from which it is counted
        # Cross-entropy is at temperature 1, and only in the first minibatch of the policy that sampled.
        if config.algorithm == "grpo" or (number == 0 and config.temperature == 1):
            apart += [difference for _, difference in told]
        add_gradients(policy, team)
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
    advance(schedule, config.minibatches - len(parts))  # it counts on as many
    sums = {name: sum(s[name] for s in steps) for name in steps[0]}
    means = {name: value if name in COUNTS else value / len(steps) for name, value in sums.items()}
    if not parts[0][0]:
        means |= {name: None for name in means if name == "kl"}  # of no token
    return means | disagreement(torch.cat(apart), config) | {"nonfinite_in_a_row": in_a_row}


def add_gradients(policy: Policy, team: Team) -> None:
    """Sum the gradients over the processes, of which some may have none; where none has any, there is none."""
    parameters = policy.trainable()
    if team.size == 1 or not any(team.together(lambda: any(p.grad is not None for p in parameters))):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    team.add([parameter.grad for parameter in parameters])


def check_same(policy: Policy, step: int, team: Team) -> None:
    """Raise PolicyError unless all processes have the same adapter, to the bit."""
    if team.size == 1:
        return
    found = team.together(digest, policy)
    if apart := [rank for rank in range(team.size) if found[rank] != found[0]]:
        raise PolicyError(
            f"after {step} steps process {apart[0]} has another adapter than process 0: the cards, or their links, "
            "do not compute alike. This checkpoint was not written; the same command goes on from the one before "
            "it, and with --gpus 1 by one process"
        )


def digest(policy: Policy) -> str:
    """A digest of the adapter's numbers."""
    found = sha256()
    for parameter in policy.trainable():
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def accumulate(
    policy: Policy, prompts: list, groups: list[dict], old: dict | None, config
) -> tuple[dict[str, float], torch.Tensor]:
    """Sum the gradient of one minibatch's loss over the micro-batches of this process, those with a prompt.

    Returns the loss and its statistics, its part of them where others have theirs, and of each token that was looked
    at, (N,) on the CPU, by how much its old log-probability is above the one that it was sampled with. `ratio` is by
    how much the mean is above 1. `old` holds the log-probabilities from before the step by (group, response), of these
    groups; None: the policy's own, as it has not moved since or the loss has no ratio.
    """
    policy.model.zero_grad()  # of a try that ran out of memory
    lengths = torch.tensor([[_used_length(r, config) for r in g["responses"]] for g in groups])  # (B, G)
    weights = response_weights(lengths.flatten(), config.aggregation, config.max_new_tokens).view_as(lengths)
    count = max(1, int(lengths.sum()))
    here = [i for i, prompt in enumerate(prompts) if prompt is not None]
    prompts, groups, weights = [prompts[i] for i in here], [groups[i] for i in here], weights[here]
    totals = {"loss": 0.0, "ratio": 0.0, "clip_low": 0.0, "clip_high": 0.0, "dual_clip": 0.0}
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
    """Mean over all response tokens of the estimated KL from the policy as it is to the reference, in nats.

    Of the groups of this process, those with a prompt, their part of it.
    """
    total, responses = 0.0, [[r["token_ids"] for r in g["responses"]] for g in groups]
    count = sum(len(ids) for several in responses for ids in several)
    responses = [several for prompt, several in zip(prompts, responses, strict=True) if prompt is not None]
    for batch in pack([prompt for prompt in prompts if prompt is not None], responses, config.update_tokens):
        logprob, _ = policy.logprobs(batch, config.temperature)
        with policy.reference():
            reference, _ = policy.logprobs(batch, config.temperature)
        total += kl_divergence(logprob, reference, config.kl_estimator).sum().item()
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
    found, here = {}, [i for i, prompt in enumerate(prompts) if prompt is not None]
    prompts, groups = [prompts[i] for i in here], [groups[i] for i in here]
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
