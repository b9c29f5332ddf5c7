"""From groups to rewards and advantages: variants bound by name, and groups scored with them.

A reward is a function group -> G floats or None, an advantage one from G rewards to G floats (rewards.py has the
tables). What is common to all of them is applied here, once: lam_fmt, clip, the band of majority shares, and that
everything is finite.
"""

import functools
from collections.abc import Callable, Iterable

from upt import answers
from upt.errors import SettingError, UserError
from upt.groups import variants
from upt.groups.shards import SCHEMA
from upt.groups.variants import COMMON
from upt.groups.votes import majority_share

Table = dict[str, Callable]


def bind_reward(
    table: Table, variant: str, *, run_seed: int | None = None, **settings
) -> Callable[[dict], list[float] | None]:
    """The function group -> G rewards that `variant` names; name and settings are checked here, once, at start-up.

    It returns None for a group that is to be skipped. A function that does not say `needs_gold` gets groups without
    `gold`. `run_seed` becomes the setting `seed` of a variant that draws
    (`random`), unless that is set explicitly.
    """
    function, bound = variants.bind("reward", table, variant, settings, COMMON)
    explicit = "seed" in settings or "seed" in variants.parse_variant(variant)[1]
    if run_seed is not None and "seed" in bound and not explicit:
        bound["seed"] = run_seed
    # Applied here, once, for every variant; a variant may declare a default of its own.
    lam_fmt, clip, min_share, max_share = (bound.pop(name) for name in COMMON)
    if min_share > max_share:
        raise SettingError(
            f"reward {variant!r}: min_share is {min_share} and max_share {max_share}, expected min_share <= max_share"
        )
    blind = not getattr(function, "needs_gold", False)
    function = functools.partial(function, **bound)

    def called(group: dict) -> list[float] | None:
        try:
            return function({name: value for name, value in group.items() if name != "gold"} if blind else group)
        except (UserError, KeyboardInterrupt):
            raise
        except KeyError as error:
            if error.args != ("gold",):
                raise failed(group, error) from error
            name = variants.parse_variant(variant)[0].rpartition(":")[2]
            raise SettingError(
                f"reward {variant!r} reads group['gold'], which label-free training does not have: if it may, write "
                f"{name}.needs_gold = True behind the function"
            ) from None
        except Exception as error:
            raise failed(group, error) from error

    def failed(group: dict, error: Exception) -> SettingError:
        return SettingError(
            f"reward {variant!r} fails on {group.get('uid')}: {type(error).__name__}: {error}; it takes one group, a "
            "dict: group['responses'][i]['key'] and the like (docs/runs.md, A group)"
        )

    def reward_of(group: dict) -> list[float] | None:
        if not min_share <= majority_share(group) <= max_share or (r := called(group)) is None:
            return None
        r = variants.finite(r, len(group["responses"]), f"reward {variant!r} of {group.get('uid')}")
        if lam_fmt:
            r = [r_i - lam_fmt * (not answers.is_well_formed(row["text"])) for r_i, row in zip(r, group["responses"])]
        return [min(max(r_i, 0.0), 1.0) for r_i in r] if clip else r

    return reward_of


def try_out(reward_of: Callable, advantage_of: Callable) -> None:
    """Call both on a made-up group, so that a function which can't work on any fails before a model is loaded."""
    response = {
        "text": "<think>1 + 1 = 2</think>\\boxed{2}",
        "token_ids": [1, 2],
        "logprobs": [-0.5, -0.5],
        "finish": "stop",
        "entropy": 0.5,
        "self_certainty": 1.0,
        "judge": {"score": 0.5, "parsed": True},
    }
    group = {
        "schema": SCHEMA,
        "uid": "a trial group of 4 responses",
        "step": 0,
        "question": "What is 1 + 1?",
        "choices": None,
        "image": None,
        "gold": "2",
        "prompt_tokens": 8,
        "responses": [response | {"key": key} for key in ("2", "2", "3", None)],
    }
    try:
        r = reward_of(group)
    except SettingError as error:
        # Other errors may be about what the made-up group lacks, such as a picture.
        if isinstance(error.__cause__, AttributeError | NameError | None):
            raise
    else:
        advantage_of([0.0] * len(group["responses"]) if r is None else r)


def bind_advantage(table: Table, estimator: str, **settings) -> Callable[[list[float]], list[float]]:
    """The function G rewards -> G advantages that `estimator` names, checked at start-up. G = 1 gives 0 under each."""
    function, bound = variants.bind("advantage", table, estimator, settings)

    def advantage_of(rewards: list[float]) -> list[float]:
        rewards = variants.finite(rewards, len(rewards), f"rewards for {estimator!r}")
        if len(rewards) < 2:
            return [0.0] * len(rewards)
        return variants.finite(function(rewards, **bound), len(rewards), f"advantage {estimator!r}")

    return advantage_of


def score(groups: Iterable[dict], reward_of: Callable, advantage_of: Callable) -> list[dict]:
    """Copies of the groups with `reward` and `advantage` in each response; every other field stays what it was.

    Groups that were scored before get the new values in the copies. A skipped group carries `skipped` and zeros, under
    `energy` too.
    """
    scored = []
    for group in groups:
        r, responses = reward_of(group), group["responses"]
        zeros = [0.0] * len(responses)
        rows = zip(responses, zeros if r is None else r, zeros if r is None else advantage_of(r), strict=True)
        copy = {**group, "responses": [{**row, "reward": r_i, "advantage": A_i} for row, r_i, A_i in rows]}
        copy.pop("skipped", None)  # of an earlier scoring
        scored.append(copy | {"skipped": True} if r is None else copy)
    return scored
