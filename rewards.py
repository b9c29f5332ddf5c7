"""Stage 3: vote keys -> rewards -> advantages. Pure functions on the plain group record, and a table of them.

    p(a) = c(a) / G            share of the G responses whose vote key is a; abstentions (key None) stay in G
    r_i  = REWARDS[name]       e.g. majority: 1 if a_i is the group's unique most frequent key, else 0
    r_i -= lam_fmt             where the response is not well-formed (any variant; lam_fmt = 0 by default)
    r_i  = clip(r_i, 0, 1)     with clip=True (any variant), as released code does
    A_i  = ADVANTAGES[name]    e.g. group-norm: (r_i - mean r) / (std r + eps); see kernels/advantage.py

A group is skipped, so that it enters no loss, where its variant returns None (confident-majority) or where its
majority share max_a p(a) is outside [min_share, max_share] (any variant; [0, 1] by default): its rewards and
advantages are 0 whatever the estimator, and the group carries "skipped": true.

Departures from the papers: agreement is equality of vote keys, hence an equivalence relation, where the released codes
of 2505.22453 and 2603.21289 grade pairs; a tie of the vote has no winner unless `ties="first"`; an abstention cannot
win a vote. Sums are exactly rounded (fsum) in float64, so the order of the responses changes no bit.

A variant is one function and one row of a table; its keyword arguments are its settings and can be given inline, as in
"gated-frequency(threshold=.9,lam_fmt=.5)" or "energy(beta=2)". In a notebook: REWARDS["mine"] = lambda group: [...];
from a file of your own: --reward my_rewards.py:mine.

    python rewards.py --rollouts runs/a/rollouts --reward majority --advantage group-norm --out runs/a/rewards
"""

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import upt  # noqa: F401 - first, so that `kernels` is ours (upt/kernel_names.py)
from kernels.advantage import ADVANTAGES, mean_of
from upt import answers
from upt.errors import DataError, SettingError, ShardError
from upt.groups import manifests, scoring, shards, variants
from upt.groups.novelty import novelty
from upt.groups.variants import band
from upt.groups.votes import counts, keys_of, majority_key, majority_share
from upt.ranges import Amount, Count, Name, Positive, Seed, Share
from upt.run import cli, metrics
from upt.run.locking import alone
from upt.run.typed import Typed

# --- rewards by vote: group -> G floats -------------------------------------------------------------------------------


def majority(group: dict, *, ties: Literal["none", "first"] = "none") -> list[float]:
    """r_i = 1 if a_i = m else 0, in {0, 1}; no unique m: 0 for all. 2505.22453 (MM-UPT), 2504.16084 (TTRL).

    `ties="first"` lets the tied key that appears first win, as the released code does.
    """
    m = majority_key(group, ties)
    return [float(m is not None and key == m) for key in keys_of(group)]


def frequency(group: dict, *, gamma: Positive = 1.0) -> list[float]:
    """r_i = p(a_i)^gamma, in [0, 1]; an abstention earns 0. 2603.21289 §3.1, where gamma = 1.

    gamma > 1 sharpens it towards `majority`, gamma < 1 tempers it: rare answers lose less.
    """
    keys, c = keys_of(group), counts(group)
    return [(c.get(key, 0) / len(keys)) ** gamma for key in keys]


def gated_frequency(group: dict, *, threshold: Share = 0.85) -> list[float]:
    """p(m) > threshold: 1 if a_i = m else 0; otherwise, or with no unique m, p(a_i). In [0, 1].

    Released code of 2603.21289: a group that all but agrees is pushed the rest of the way.
    """
    gate = majority_key(group) is not None and majority_share(group) > threshold
    return majority(group) if gate else frequency(group)


def confident_majority(group: dict, *, tau: Share = 0.5) -> list[float] | None:
    """`majority` where there is a unique m with p(m) >= tau, else None: the group is skipped. In {0, 1}. 2505.21444."""
    confident = majority_key(group) is not None and majority_share(group) >= tau
    return majority(group) if confident else None


def dirichlet(group: dict, *, alpha: Positive = 1.0, beta: Positive = 22.0, delta: float = 0.06) -> list[float]:
    """r_i = C sigmoid(beta (log pi(a_i) - log max_a pi(a) + delta)), in [0, 1); an abstention earns 0.

    pi(a) = (c(a) + alpha) / (n + alpha A) for the A different keys of the n responses that answer, and the confidence
    C = 1 - H(pi) / log A, or 1 where A = 1. Released code of 2603.21289. C is one factor for all of the group: under
    group-norm it cancels wherever it is above 0; the other advantages grow with it.
    """
    c = counts(group)
    A, total = len(c), sum(c.values()) + alpha * len(c)
    pi = {key: (n + alpha) / total for key, n in c.items()}
    # 1 - H(pi) / log A as the divergence from uniform over log A, which is exactly 0 where all counts are equal.
    divergence = math.fsum(pi[key] * math.log((n + alpha) * A / total) for key, n in c.items())
    confidence = max(0.0, divergence / math.log(A)) if A > 1 else 1.0
    top = math.log(max(pi.values(), default=1.0))
    earned = {key: confidence * _sigmoid(beta * (math.log(p) - top + delta)) for key, p in pi.items()}
    return [earned.get(key, 0.0) for key in keys_of(group)]


def semantic_entropy(group: dict) -> list[float]:
    """0 for all if no two answers agree, else p(a_i); in [0, 1]. 2504.05812 (EMPO).

    Read literally also where there is a single answer: it agrees with no other, and earns 0.
    """
    return frequency(group) if max(counts(group).values(), default=0) > 1 else [0.0] * len(group["responses"])


def continuous_consistency(
    group: dict, *, power: Amount = 0.7, penalty: Share = 0.1, words: Positive = 6
) -> list[float]:
    """r_i = p(a_i)^power (1 - penalty clip((w_i - words) / words, 0, 1)), in [0, 1]; an abstention earns 0. 2511.16672.

    w_i is how many words, parted by white space, response i has before its answer.
    """
    r = []
    for response, p in zip(group["responses"], frequency(group), strict=True):
        w = len(answers.before_answer(response["text"]).split())
        r.append(p and p**power * (1 - penalty * min(max((w - words) / words, 0.0), 1.0)))
    return r


def scrl(group: dict, *, tau_pos: Share = 0.375, margin: Share = 0.125, tau_low: Share = 0.125) -> list[float]:
    """r_i = 1 for a trusted majority, -1 for rare, unsure answers and for abstentions, else 0. 2603.19880 (SCRL).

    The majority is trusted where its share is at least `tau_pos` and more than `margin` above the second's (0 if there
    is none), so a tie has none. An answer is rare where its share is below `tau_low`, which by default takes G > 8, and
    unsure where the mean entropy of its responses is at least that of all G. As the released code's binary form has it;
    its script runs a continuous one. Only differences count: {0, 1, 2} gives the same advantages.
    """
    keys, c = keys_of(group), counts(group)
    entropy = [response["entropy"] for response in group["responses"]]
    top, second, *_ = [*sorted(c.values(), reverse=True), 0, 0]
    # Shares are compared as one quotient each: .8 - .7 is above .1 in floating point, 1 / 10 is not.
    trusted = top / len(keys) >= tau_pos and (top - second) / len(keys) > margin
    earned = {None: -1.0}
    for a, n in c.items():
        # Exactly rounded means, so that equal ones compare as equal.
        of_a = statistics.mean(h for h, key in zip(entropy, keys, strict=True) if key == a)
        unsure = of_a >= statistics.mean(entropy)
        earned[a] = 1.0 if trusted and n == top else -1.0 if n / len(keys) < tau_low and unsure else 0.0
    return [earned[key] for key in keys]


def evol(group: dict, *, ngram: Count = 5) -> list[float]:
    """r_i = .5 + nu_i / 2 in [.5, 1] where a_i = m, -1 + nu_i / 2 in [-1, -.5] for other answers, -1 for abstentions.

    nu_i in [0, 1] is how novel what response i says before its answer is among the responses of the same answer
    (upt/groups/novelty.py): by shared runs of `ngram` characters, which asks for no second model, where 2509.15194
    (EVOL-RL) has the cosine of embeddings from a server. The paper takes all answers but m as one class, and half of
    its novelty is the distance to the nearest response of any answer. A tie has no m, so novelty alone tells its
    responses apart. Only differences count: 1 more for all, -1 becoming 0, gives the same advantages.
    """
    keys, m = keys_of(group), majority_key(group)
    r = [-1.0] * len(keys)
    for a in counts(group):
        places = [i for i, key in enumerate(keys) if key == a]
        texts = [answers.before_answer(group["responses"][i]["text"]) for i in places]
        for i, nu in zip(places, novelty(texts, ngram), strict=True):
            r[i] = (0.5 if a == m else -1.0) + nu / 2
    return r


def two_view(group: dict) -> list[float]:
    """r_i = 1 if a_i = m else 0, in {0, 1}, where m alone has the largest 2 p(a) q(a) / (p(a) + q(a)); none: 0 for all.

    p(a) and q(a) are the shares of an answer among the responses to the two views of the picture (`--view`), so an
    answer to one of them only has 0. A question without a picture looks the same in both, p = q: `majority`. After
    2511.01191 (Self-Harmony), whose other view is a question in other words.
    """
    if group.get("image") is None:
        return majority(group)
    views: dict[str | None, list] = {}
    for response in group["responses"]:
        views.setdefault(response.get("view"), []).append(response["key"])
    if len(views) != 2:
        raise ShardError(
            f"{group.get('uid')}: its responses saw {len(views)} view of the picture, and this reward compares two; "
            "sample them with --view faded"
        )
    p, q = ({a: Fraction(n, len(keys)) for a, n in counts(keys).items()} for keys in views.values())
    harmonic = {a: 2 * p[a] * q[a] / (p[a] + q[a]) for a in p if a in q}
    top = max(harmonic.values(), default=None)
    leaders = [a for a, mean in harmonic.items() if mean == top]
    return [float(leaders == [key]) for key in keys_of(group)]


# --- rewards from a judge's scores ------------------------------------------------------------------------------------


def _sigmoid(x: float) -> float:
    e = math.exp(-abs(x))  # the exponent is never positive, so nothing overflows
    return (1.0 if x >= 0 else e) / (1 + e)


def g(s: float, lam_pos: float = 0.2, lam_neg: float = 0.2, t_h: float = 0.95, t_l: float = 0.40,
      tau_h: Positive = 0.02, tau_l: Positive = 0.05) -> float:  # fmt: skip
    """1 + lam_pos sigmoid((s - t_h) / tau_h) - lam_neg sigmoid((t_l - s) / tau_l), the judge's modulation of a reward.

    In (1 - lam_neg, 1 + lam_pos), and never falling in the score s. 2603.21289 §3.2.
    """
    return 1 + lam_pos * _sigmoid((s - t_h) / tau_h) - lam_neg * _sigmoid((t_l - s) / tau_l)


def _judge_scores(group: dict) -> list[float | None]:
    """s_i, None where the judgement could not be parsed."""
    if any("judge" not in response for response in group["responses"]):
        raise ShardError(
            f"{group.get('uid')}: no judge scores, which this reward needs; judge it: "
            "python judge.py --rollouts DIR --out JUDGED, then use JUDGED"
        )
    return [response["judge"]["score"] for response in group["responses"]]


def judged(group: dict, *, base: Literal["frequency", "gated-frequency"] = "frequency", threshold: Share = 0.85,
           unparsed: Literal["neutral", "zero"] = "neutral", lam_fmt: Amount = 0.5,
           lam_pos: Amount = 0.2, lam_neg: Share = 0.2, t_h: Share = 0.95, t_l: Share = 0.40,
           tau_h: Positive = 0.02, tau_l: Positive = 0.05) -> list[float]:  # fmt: skip
    """r_i = base_i g(s_i), in [0, 1 + lam_pos); the paper's default takes off lam_fmt = .5. 2603.21289 §3.2-3.3.

    `base` is p(a_i) as printed, or the gated one of the released code, to which `threshold` belongs. A judgement that
    could not be parsed leaves the base as it is (g = 1), or counts as s = 0 (unparsed="zero", as released).
    """
    r = frequency(group) if base == "frequency" else gated_frequency(group, threshold=threshold)
    scores = [0.0 if s is None and unparsed == "zero" else s for s in _judge_scores(group)]
    modulation = [1.0 if s is None else g(s, lam_pos, lam_neg, t_h, t_l, tau_h, tau_l) for s in scores]
    return [r_i * g_i for r_i, g_i in zip(r, modulation, strict=True)]  # lam_fmt is common: bind_reward applies it


def judge_only(group: dict, *, unparsed: Literal["neutral", "zero"] = "neutral") -> list[float]:
    """r_i = s_i, in [0, 1]: the unstable ablation of 2603.21289, without the vote.

    A judgement that could not be parsed gets the mean of the group's others, so that it pulls nowhere (0 if there are
    none), or 0 with unparsed="zero".
    """
    scores = _judge_scores(group)
    parsed = [s for s in scores if s is not None]
    other = mean_of(parsed) if parsed and unparsed == "neutral" else 0.0
    return [other if s is None else s for s in scores]


# --- rewards from the sampling distribution: the answers play no part -------------------------------------------------


def self_certainty(group: dict) -> list[float]:
    """r_i = mean over tokens t of logsumexp(z_t) - mean_v z_t, in [log V, inf). 2505.19590 (Intuitor).

    Like the entropy, taken from the record: the sampling pass computes it, before truncation. The paper's KL divergence
    from uniform is this less log V, a constant that cancels in every advantage.
    """
    return [response["self_certainty"] for response in group["responses"]]


def negative_entropy(group: dict) -> list[float]:
    """r_i = - mean over tokens t of H(softmax z_t), in [-log V, 0]. 2505.22660 (RENT)."""
    return [-response["entropy"] for response in group["responses"]]


# --- rewards to compare with ------------------------------------------------------------------------------------------


def supervised(group: dict) -> list[float]:
    """r_i = 1 if response i is graded right against gold, else 0: the upper bound (GRPO, 2402.03300). Needs labels."""
    if group.get("gold") is None:
        raise DataError(
            f"{group.get('uid')}: no gold answer, which `supervised` needs; use data with labels, or majority"
        )
    gold, choices = group["gold"], group.get("choices")
    return [float(bool(answers.is_correct(response["text"], gold, choices))) for response in group["responses"]]


def random(group: dict, *, seed: Seed = 0) -> list[float]:
    """r_i = a fair coin, in {0, 1}: the control that must not help (after 2506.10947).

    The coin is a hash of (seed, step, uid, i), so neither the order of the groups nor the process matters.
    """
    tags = [json.dumps([seed, group["step"], group["uid"], i]) for i in range(len(group["responses"]))]
    return [float(hashlib.sha256(tag.encode()).digest()[0] & 1) for tag in tags]


judged.needs_judge = judge_only.needs_judge = supervised.needs_gold = two_view.needs_view = True
scrl.needs_sampler = self_certainty.needs_sampler = negative_entropy.needs_sampler = True

REWARDS: dict[str, Callable[..., list[float] | None]] = {
    "majority": majority,
    "frequency": frequency,
    "gated-frequency": gated_frequency,
    "confident-majority": confident_majority,
    "dirichlet": dirichlet,
    "semantic-entropy": semantic_entropy,
    "continuous-consistency": continuous_consistency,
    "scrl": scrl,
    "evol": evol,
    "two-view": two_view,
    "judged": judged,
    "judge-only": judge_only,
    "self-certainty": self_certainty,
    "negative-entropy": negative_entropy,
    "supervised": supervised,
    "random": random,
}


# --- by name ----------------------------------------------------------------------------------------------------------


def needs_judge(variant: str) -> bool:
    """Whether a variant reads judge scores. A function of your own says so: `mine.needs_judge = True`."""
    return bool(getattr(variants.find("reward", REWARDS, variant), "needs_judge", False))


def needs_gold(variant: str) -> bool:
    """Whether a variant reads gold answers. A function of your own says so: `mine.needs_gold = True`."""
    return bool(getattr(variants.find("reward", REWARDS, variant), "needs_gold", False))


def needs_view(variant: str) -> bool:
    """Whether a variant compares two views of a picture. A function of your own says so: `mine.needs_view = True`."""
    return bool(getattr(variants.find("reward", REWARDS, variant), "needs_view", False))


def needs_sampler(variant: str) -> bool:
    """Whether a variant reads the sampling distribution. One of your own says so: `mine.needs_sampler = True`."""
    return bool(getattr(variants.find("reward", REWARDS, variant), "needs_sampler", False))


def bind_reward(variant: str, **settings) -> Callable[[dict], list[float] | None]:
    """The function group -> G rewards, or None to skip it, that `variant` names: a row of REWARDS or FILE.py:NAME.

    Settings, those in COMMON too, are given inline or as arguments, and checked here; `run_seed` is the run's seed, for
    variants that draw.
    """
    return scoring.bind_reward(REWARDS, variant, **settings)


def bind_advantage(estimator: str, **settings) -> Callable[[list[float]], list[float]]:
    """The function G rewards -> G advantages that `estimator` names, checked at start-up. G = 1 gives 0 under each."""
    return scoring.bind_advantage(ADVANTAGES, estimator, **settings)


def reward(group: dict, variant: str, **settings) -> list[float]:
    """r_1 … r_G of one group, G zeros if it is skipped. `variant` is a name of REWARDS or FILE.py:NAME.

    Settings, those in COMMON too, are given inline or as arguments.
    """
    r = bind_reward(variant, **settings)(group)
    return [0.0] * len(group["responses"]) if r is None else r


def advantage(rewards: list[float], estimator: str, **settings) -> list[float]:
    """A_1 … A_G from r_1 … r_G, in float64. `estimator` is a name of ADVANTAGES, settings inline or as arguments."""
    return bind_advantage(estimator, **settings)(rewards)


def score(groups: Iterable[dict], reward: str, advantage: str, seed: int = 0, **settings) -> list[dict]:
    """Copies of the groups with `reward` and `advantage` in each response; see upt/groups/scoring.py.

    `seed` is the run's, for variants that draw; `settings` are the reward's.
    """
    return scoring.score(groups, bind_reward(reward, run_seed=seed, **settings), bind_advantage(advantage))


# Settings of this and earlier stages that may change on resuming.
FREE = ("rollouts", "out", "steps", "device", "any_base")


@dataclass
class Config(Typed):
    rollouts: Path
    """folder of rollout shards (judged ones too)"""
    out: Path
    """folder for the scored shards; another one than --rollouts"""
    reward: Name = "majority"
    """a name of REWARDS, settings inline: 'gated-frequency(threshold=.9)'; or FILE.py:NAME"""
    advantage: Name = "group-norm"
    """a name of ADVANTAGES, settings inline: 'energy(beta=2)'; or FILE.py:NAME"""
    min_share: Share = 0
    """skip groups whose majority share is below this"""
    max_share: Share = 1
    """skip groups whose majority share is above this"""
    seed: Seed | None = None
    """seed of variants that draw; default: the seed of the rollouts' manifest"""


def _score_shards(config: Config, paths: list[Path], seed: int) -> Iterator[dict]:
    """Score shard by shard, keeping those that are complete; yields the scored groups."""
    for path in paths:
        target = config.out / path.name
        if shards.is_complete(target, source=path):
            groups = shards.read_shard(target)
        else:
            groups = score(shards.read_shard(path), config.reward, config.advantage, seed, **band(config))
            shards.write_shard(target, groups)
        yield from groups
        del groups  # one shard in memory: this one must be gone before the next is read


@alone
def main(config: Config) -> dict[str, float]:
    """Score a folder of shards into another; returns the summary that it prints."""
    config = replace(config, rollouts=shards.stage_folder(config.rollouts))
    if config.out.resolve() == config.rollouts.resolve():
        raise SettingError(f"--out is --rollouts ({config.out}); scored shards need a folder of their own")
    # A misspelt name fails before anything is written.
    reward_of, _ = bind_reward(config.reward, **band(config)), bind_advantage(config.advantage)
    reader = shards.ShardReader(config.rollouts)
    paths = reader.paths
    # So does one that the shards cannot serve, without a judge's scores, gold, or two views of a picture.
    shown = (group for group in reader if group.get("image") or not needs_view(config.reward))
    reward_of(next(shown, next(iter(reader))))
    source = manifests.read(config.rollouts) if (config.rollouts / "manifest.json").exists() else {}
    seed = config.seed if config.seed is not None else source.get("seed")
    if seed is None:
        seed = 0
        print(f"{config.rollouts} records no seed, using --seed 0", file=sys.stderr)
    # The rollouts may move or grow by further steps, what they are may not: a folder's scores have one origin.
    settings = asdict(config) | {"seed": seed, "rollouts_manifest": manifests.origin(source, FREE)}
    for role in ("reward", "advantage"):
        if digest := variants.source_digest(settings[role]):
            settings[f"{role}_file"] = digest  # a function of one's own may change between two runs of this stage
    if manifests.check(config.out, "rewards", settings, ignore=FREE) is None:
        identity = {"model": source.get("model"), "adapter": source.get("adapter")}
        manifests.write(config.out, stage="rewards", config=settings, seed=seed, **identity)
    shards.link_images(config.rollouts, config.out)
    how = f"reward {config.reward}, advantage {config.advantage}"
    print(f"scoring {len(paths)} shards of {config.rollouts}: {how}, into {config.out}", file=sys.stderr)
    totals = metrics.summary(_score_shards(config, paths, seed))
    print(f"{config.out}: {config.reward}, {config.advantage}, seed {seed}")
    for name, value in totals.items():
        print(f"  {name:<18}{value:>10}" if isinstance(value, int) else f"  {name:<18}{value:>10.4f}")
    return totals


if __name__ == "__main__":
    cli.launch(main, Config)
