"""Stage 3: vote keys -> rewards -> advantages. Pure functions on the plain group record, and two tables of them.

    p(a) = c(a) / G            share of the G responses whose vote key is a; abstentions (key None) stay in G
    r_i  = REWARDS[name]       e.g. majority: 1 if a_i is the group's unique most frequent key, else 0
    r_i -= lam_fmt             where the response is not well-formed (any variant; lam_fmt = 0 by default)
    A_i  = ADVANTAGES[name]    e.g. group-norm: (r_i - mean r) / (std r + eps)

Departures from the papers: agreement is equality of vote keys, hence an equivalence relation, where the released codes
of 2505.22453 and 2603.21289 grade pairs; a tie of the vote has no winner unless `ties="first"`; an abstention cannot
win a vote. Sums are exactly rounded (fsum) in float64, so the order of the responses changes no bit.

A variant is one function and one row of a table; its keyword arguments are its settings and can be given inline, as in
"gated-frequency(threshold=.9,lam_fmt=.5)" or "energy(beta=2)". In a notebook: REWARDS["mine"] = lambda group: [...]

    python rewards.py --rollouts runs/a/rollouts --reward majority --advantage group-norm --out runs/a/rewards
"""

import ast
import functools
import hashlib
import inspect
import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import answers
import shards


def _keys(group_or_keys) -> list:
    if isinstance(group_or_keys, dict):
        return [response["key"] for response in group_or_keys["responses"]]
    return list(group_or_keys)


def counts(group_or_keys) -> dict[str, int]:
    """c(a) for each key a, in order of first appearance; abstentions are no key."""
    c: dict[str, int] = {}
    for key in _keys(group_or_keys):
        if key is not None:
            c[key] = c.get(key, 0) + 1
    return c


def majority_key(group_or_keys, ties: str = "none") -> str | None:
    """m, the most frequent key. None if all abstain, or if several tie (ties="first": the one that appears first)."""
    if ties not in ("none", "first"):
        raise ValueError(f"ties is {ties!r}, expected 'none' or 'first'")
    c = counts(group_or_keys)
    top = max(c.values(), default=0)
    leaders = [key for key, n in c.items() if n == top]
    return leaders[0] if len(leaders) == 1 or (leaders and ties == "first") else None


def majority_share(group_or_keys) -> float:
    """max_a c(a) / G, ties included; 0 if all abstain."""
    keys = _keys(group_or_keys)
    return max(counts(keys).values(), default=0) / max(len(keys), 1)


def distinct(group_or_keys) -> int:
    """How many different keys the group has; abstentions are no key."""
    return len(counts(group_or_keys))


def abstentions(group_or_keys) -> int:
    """How many responses have no vote key."""
    return sum(key is None for key in _keys(group_or_keys))


# --- rewards: group -> G floats ---------------------------------------------------------------------------------------


def majority(group: dict, *, ties: str = "none") -> list[float]:
    """r_i = 1 if a_i = m else 0, in {0, 1}; no unique m: 0 for all. 2505.22453 (MM-UPT), 2504.16084 (TTRL).

    `ties="first"` lets the tied key that appears first win, as the released code does.
    """
    m = majority_key(group, ties)
    return [float(m is not None and key == m) for key in _keys(group)]


def frequency(group: dict) -> list[float]:
    """r_i = p(a_i), in [0, 1]; an abstention earns 0. 2603.21289 §3.1."""
    keys, c = _keys(group), counts(group)
    return [c.get(key, 0) / len(keys) for key in keys]


def gated_frequency(group: dict, *, threshold: float = 0.85) -> list[float]:
    """p(m) > threshold: 1 if a_i = m else 0; otherwise, or with no unique m, p(a_i). In [0, 1].

    Released code of 2603.21289: a group that all but agrees is pushed the rest of the way.
    """
    gate = majority_key(group) is not None and majority_share(group) > threshold
    return majority(group) if gate else frequency(group)


def supervised(group: dict) -> list[float]:
    """r_i = 1 if response i is graded right against gold, else 0: the upper bound (GRPO, 2402.03300). Needs labels."""
    if group.get("gold") is None:
        raise ValueError(
            f"{group.get('uid')}: no gold answer, which `supervised` needs; use data with labels, or majority"
        )
    gold, choices = group["gold"], group.get("choices")
    return [float(bool(answers.is_correct(response["text"], gold, choices))) for response in group["responses"]]


def random(group: dict, *, seed: int = 0) -> list[float]:
    """r_i = a fair coin, in {0, 1}: the control that must not help (after 2506.10947).

    The coin is a hash of (seed, step, uid, i), so neither the order of the groups nor the process matters.
    """
    tags = [json.dumps([seed, group["step"], group["uid"], i]) for i in range(len(group["responses"]))]
    return [float(hashlib.sha256(tag.encode()).digest()[0] & 1) for tag in tags]


REWARDS: dict[str, Callable[..., list[float]]] = {
    "majority": majority,
    "frequency": frequency,
    "gated-frequency": gated_frequency,
    "supervised": supervised,
    "random": random,
}


# --- advantages: G rewards -> G floats --------------------------------------------------------------------------------


def _mean(r: list[float]) -> float:
    # Rounding may put the mean of equal rewards one ulp beside them; a group without signal must get exactly 0.
    return min(max(math.fsum(r) / len(r), min(r)), max(r))


def mean(rewards: list[float]) -> list[float]:
    """A_i = r_i - mean r. Dr. GRPO, 2503.20783."""
    mu = _mean(rewards)
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


# --- by name ----------------------------------------------------------------------------------------------------------


def parse_variant(spec: str) -> tuple[str, dict]:
    """ "gated-frequency(threshold=.9,lam_fmt=.5)" -> ("gated-frequency", {"threshold": 0.9, "lam_fmt": 0.5}).

    Syntax only, the same for rewards and advantages; values are Python literals.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", spec, re.DOTALL)
    if not match:
        raise ValueError(f"{spec!r} is no variant; write name or name(setting=value,...), e.g. 'majority(lam_fmt=.5)'")
    try:
        call = ast.parse(f"f({(match[2] or '').strip()})", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{spec!r}: cannot read its settings ({error}); write name(setting=value,...)") from error
    keywords = call.keywords if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else [None]
    names = {keyword and keyword.arg for keyword in keywords}
    if None in names or call.args or len(names) < len(keywords):
        raise ValueError(f"{spec!r}: each setting needs its name, once; write name(setting=value,...)")
    settings = {}
    for keyword in keywords:
        try:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            value = ast.unparse(keyword.value)
            raise ValueError(f"{spec!r}: {keyword.arg}={value} is no number or quoted string") from error
    return match[1], settings


def _fits(value, default) -> bool:
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return not isinstance(default, str) or isinstance(value, str)


def _bind(kind: str, table: dict, spec: str, settings: dict, also: dict) -> tuple[Callable, dict]:
    """The function that `spec` names and its settings in full. `also`: settings that the whole table has."""
    name, inline = parse_variant(spec)
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}; there are: {', '.join(table)}")
    parameters = [*inspect.signature(table[name]).parameters.values()][1:]  # the first is the group or the rewards
    known = also | {p.name: p.default for p in parameters if p.default is not p.empty}
    for setting, value in [*settings.items(), *inline.items()]:
        if setting not in known:
            raise ValueError(f"{kind} {name!r} has no setting {setting!r}; it has: {', '.join(known) or 'none'}")
        if not _fits(value, known[setting]):
            raise ValueError(f"{kind} {name!r}: {setting} is {value!r}, expected the like of {known[setting]!r}")
    twice = sorted({*settings} & {*inline})
    if twice:
        raise ValueError(f"{kind} {spec!r}: {', '.join(twice)} given inline and as an argument; give it once")
    return table[name], known | settings | inline


def _floats(values, size: int, what: str) -> list[float]:
    values = [*map(float, values)]
    if len(values) != size or not all(map(math.isfinite, values)):
        raise ValueError(f"{what}: {values!r:.200}, expected {size} finite numbers")
    return values


def bind_reward(variant: str, *, run_seed: int | None = None, **settings) -> Callable[[dict], list[float]]:
    """The function group -> G rewards that `variant` names; name and settings are checked here, once, at start-up.

    `run_seed` becomes the setting `seed` of a variant that draws (`random`), unless that is set explicitly.
    """
    function, bound = _bind("reward", REWARDS, variant, settings, {"lam_fmt": 0.0})
    explicit = "seed" in settings or "seed" in parse_variant(variant)[1]
    if run_seed is not None and "seed" in bound and not explicit:
        bound["seed"] = run_seed
    lam_fmt = bound.pop("lam_fmt")  # applied here, once, for every variant; a variant may declare its own default
    function = functools.partial(function, **bound)

    def reward_of(group: dict) -> list[float]:
        r = function(group)
        if lam_fmt:
            ill_formed = [not answers.is_well_formed(response["text"]) for response in group["responses"]]
            r = [r_i - lam_fmt * bad for r_i, bad in zip(r, ill_formed, strict=True)]
        return _floats(r, len(group["responses"]), f"reward {variant!r} of {group.get('uid')}")

    return reward_of


def bind_advantage(estimator: str, **settings) -> Callable[[list[float]], list[float]]:
    """The function G rewards -> G advantages that `estimator` names, checked at start-up. G = 1 gives 0 under each."""
    function, bound = _bind("advantage", ADVANTAGES, estimator, settings, {})

    def advantage_of(rewards: list[float]) -> list[float]:
        rewards = _floats(rewards, len(rewards), f"rewards for {estimator!r}")
        if len(rewards) < 2:
            return [0.0] * len(rewards)
        return _floats(function(rewards, **bound), len(rewards), f"advantage {estimator!r}")

    return advantage_of


def reward(group: dict, variant: str, **settings) -> list[float]:
    """r_1 … r_G of one group. `variant` is a name of REWARDS, settings inline or as arguments.

    `lam_fmt` (every variant, default 0) is subtracted where the response's text is not well-formed.
    """
    return bind_reward(variant, **settings)(group)


def advantage(rewards: list[float], estimator: str, **settings) -> list[float]:
    """A_1 … A_G from r_1 … r_G, in float64. `estimator` is a name of ADVANTAGES, settings inline or as arguments."""
    return bind_advantage(estimator, **settings)(rewards)


def score(groups: Iterable[dict], reward: str, advantage: str, seed: int = 0) -> list[dict]:
    """Copies of the groups with `reward` and `advantage` in each response; every other field stays what it was.

    Groups that were scored before get the new values in the copies. `seed` is the run's, for variants that draw.
    """
    reward_of, advantage_of = bind_reward(reward, run_seed=seed), bind_advantage(advantage)
    scored = []
    for group in groups:
        r = reward_of(group)
        rows = zip(group["responses"], r, advantage_of(r), strict=True)
        scored.append({**group, "responses": [{**row, "reward": r_i, "advantage": A_i} for row, r_i, A_i in rows]})
    return scored


def summary(groups: Iterable[dict]) -> dict[str, float]:
    """What the scores of some groups look like, in one pass over them and without labels.

    groups, responses (counts); signal: share of groups whose rewards are not all equal; majority_share and distinct:
    means over groups; abstention_share: of all responses; reward_mean and reward_std (population) over all responses.
    """
    n = signal = different = abstained = 0
    shares, r = array("d"), array("d")
    for n, group in enumerate(groups, 1):  # noqa: B007
        row = [response["reward"] for response in group["responses"]]
        keys = _keys(group)
        signal += min(row) != max(row)
        different += distinct(keys)
        abstained += abstentions(keys)
        shares.append(majority_share(keys))
        r.extend(row)
    if n == 0:
        raise ValueError("no groups to sum up")
    mu = _mean(r)
    return {
        "groups": n,
        "responses": len(r),
        "signal": signal / n,
        "majority_share": math.fsum(shares) / n,
        "distinct": different / n,
        "abstention_share": abstained / len(r),
        "reward_mean": mu,
        "reward_std": math.sqrt(math.fsum((r_i - mu) ** 2 for r_i in r) / len(r)),
    }


FREE = ("rollouts", "out", "steps", "device")  # settings of this and earlier stages that may change on resuming


@dataclass
class Config:
    rollouts: Path
    """Folder of rollout shards (judged ones too)."""
    out: Path
    """Folder for the scored shards; another one than --rollouts."""
    reward: str = "majority"
    """A name of REWARDS, settings inline: 'gated-frequency(threshold=.9)'."""
    advantage: str = "group-norm"
    """A name of ADVANTAGES, settings inline: 'energy(beta=2)'."""
    seed: int | None = None
    """Seed of variants that draw; default: the seed of the rollouts' manifest."""


def _score_shards(config: Config, paths: list[Path], seed: int) -> Iterator[dict]:
    """Score shard by shard, keeping those that are complete; yields the scored groups."""
    for path in paths:
        target = config.out / path.name
        if shards.is_complete(target, source=path):
            groups = shards.read_shard(target)
        else:
            groups = score(shards.read_shard(path), config.reward, config.advantage, seed)
            shards.write_shard(target, groups)
        yield from groups
        del groups  # one shard in memory: this one must be gone before the next is read


def main(config: Config) -> dict[str, float]:
    """Score a folder of shards into another; returns the summary that it prints."""
    if config.out.resolve() == config.rollouts.resolve():
        raise ValueError(f"--out is --rollouts ({config.out}); scored shards need a folder of their own")
    bind_reward(config.reward), bind_advantage(config.advantage)  # a misspelt name fails before anything is written
    paths = shards.ShardReader(config.rollouts).paths
    source = shards.read_manifest(config.rollouts) if (config.rollouts / "manifest.json").exists() else {}
    seed = config.seed if config.seed is not None else source.get("seed")
    if seed is None:
        seed = 0
        print(f"{config.rollouts} records no seed, using --seed 0", file=sys.stderr)
    # The rollouts may move or grow by further steps, what they are may not: a folder's scores have one origin.
    origin = {name: source.get(name) for name in ("stage", "seed", "model", "adapter")}
    origin["config"] = {name: value for name, value in source.get("config", {}).items() if name not in FREE}
    settings = asdict(config) | {"seed": seed, "rollouts_manifest": origin}
    if shards.check_manifest(config.out, settings, ignore=FREE) is None:
        identity = {"model": source.get("model"), "adapter": source.get("adapter")}
        shards.write_manifest(config.out, stage="rewards", config=settings, seed=seed, **identity)
    shards.link_images(config.rollouts, config.out)
    totals = summary(_score_shards(config, paths, seed))
    print(f"{config.out}: {config.reward}, {config.advantage}, seed {seed}")
    for name, value in totals.items():
        print(f"  {name:<18}{value:>10}" if isinstance(value, int) else f"  {name:<18}{value:>10.4f}")
    return totals


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
