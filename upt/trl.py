"""Our rewards in TRL: `label_free("majority", group_size=8)` is a function for GRPOTrainer's reward_funcs.

    from trl import GRPOConfig, GRPOTrainer
    from upt.trl import label_free

    args = GRPOConfig(num_generations=8, ...)
    GRPOTrainer(model, reward_funcs=[label_free("majority", group_size=8)], args=args, train_dataset=data)

TRL calls a reward in every process, with the completions of that process, and a group may lie on several of them. So
the texts of all processes are gathered, each group is scored once, in the process that has its first completion, and
every process returns what its own completions earned. TRL puts the G completions of a prompt one after the other, in
the order of the processes. What fails in one process is an error in all of them, so that none waits for another.

A reward gets a group as docs/runs.md has it, with less in it: `schema`, `step`, `uid` (a hash of the prompt),
`question`, `choices`, `gold` where the reward needs it, `image` None; of a response `text`, `key` and `token_ids`.
There are no `logprobs`, `finish`, `entropy`, `self_certainty` and `prompt_tokens`.

Columns that are read, beside `prompt`: `choices`, a list of options or None, by which a letter and its option are one
vote; `solution` or `answer`, for `supervised` only; `image` or `images`, for a judge only. The trainer logs
majority_share, distinct_answers and abstention_share, means over groups. examples/trl_multinode/ is a whole script.
"""

import json
import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import groupby
from numbers import Real

import rewards
from upt import answers
from upt.errors import DataError, SettingError, UserError
from upt.groups import votes
from upt.groups.shards import SCHEMA
from upt.groups.stats import average
from upt.run.team import Team

GOLD = ("solution", "answer")
INSTEAD = "take 'majority', 'frequency' or another that reads answers alone"
LOGGED = {
    "majority_share": votes.majority_share,
    "distinct_answers": votes.distinct,
    "abstention_share": lambda group: votes.abstentions(group) / len(group["responses"]),
}


def label_free(
    reward: str, group_size: int, judge: Callable[[dict], Sequence[float | None]] | None = None, seed: int = 0
) -> Callable[..., list[float]]:
    """A reward function for TRL's GRPOTrainer, with the name of the reward.

    reward: a name of rewards.REWARDS, settings inline, or FILE.py:NAME. group_size: num_generations of GRPOConfig.
    judge: a group in, G scores in [0, 1] out, None where a judgement can't be read; for `judged` and `judge-only`. It
    gets the group without gold, and as `image` the PIL picture of its prompt (of `images` the first), or None. seed: of
    rewards that draw. A group that the reward skips gets 0 for all, so that its advantages are 0.
    Raises SettingError for a reward that takes what TRL does not hand over. The function raises DataError for
    completions that are no text or no whole groups, SettingError for a judge or a reward that fails; where that
    happened in another process, Elsewhere.
    """
    reward_of = rewards.bind_reward(reward, run_seed=seed)
    if type(group_size) is not int or group_size < 2:
        raise SettingError(f"group_size={group_size!r}: a vote takes two responses or more; give num_generations")
    if rewards.needs_sampler(reward):
        raise SettingError(
            f"reward {reward!r} reads the sampling distribution, which TRL does not hand over: {INSTEAD}"
        )
    if rewards.needs_view(reward):
        raise SettingError(f"reward {reward!r} compares two views of a picture, and TRL shows one: {INSTEAD}")
    if rewards.needs_judge(reward) and judge is None:
        raise SettingError(
            f"reward {reward!r} reads a judge's scores: give judge=, a function from a group to its G scores, or take "
            "'frequency', which they modulate"
        )

    def score(group: dict, picture) -> list[float]:
        if judge is not None:
            for response, s in zip(group["responses"], scores_of(judge, group, picture), strict=True):
                response["judge"] = {"score": s, "parsed": s is not None}
        r = reward_of(group)
        return [0.0] * group_size if r is None else r

    def label_free_reward(
        prompts, completions, completion_ids=None, trainer_state=None, log_metric=None, **columns
    ) -> list[float]:
        from accelerate import PartialState  # here: it loads torch

        team = Team(PartialState().process_index, PartialState().num_processes)
        parts = team.together(rows_of, prompts, completions, completion_ids, columns)
        start = sum(map(len, parts[: team.rank]))
        step = trainer_state.global_step if trainer_state else 0
        groups = grouped([row for part in parts for row in part], group_size, step)
        firsts = [(group, i * group_size - start) for i, group in enumerate(groups)]
        own = [(group, first) for group, first in firsts if 0 <= first < len(prompts)]
        scored = team.together(lambda: [score(group, picture_of(columns, first)) for group, first in own])
        for name, measure in LOGGED.items() if log_metric else ():
            log_metric(name, average([measure(group) for group in groups]))
        return [r for part in scored for of_group in part for r in of_group][start : start + len(prompts)]

    label_free_reward.__name__ = reward
    return label_free_reward


def rows_of(prompts: Sequence, completions: Sequence, completion_ids: Sequence | None, columns: dict) -> list[dict]:
    """What is gathered of each completion. `text` is None of one that is none, for `grouped` to say which."""
    nothing = [None] * len(prompts)
    gold = next((columns[name] for name in GOLD if name in columns), nothing)
    choices = columns.get("choices", nothing)
    rows = []
    for prompt, said, ids, options, right in zip(
        prompts, completions, completion_ids or nothing, choices, gold, strict=True
    ):
        identity = json.dumps(prompt, default=seen, sort_keys=True)
        rows.append(
            {
                "uid": blake2b(identity.encode(), digest_size=8).hexdigest(),
                "question": text_of(prompt),
                "choices": options,
                "gold": right,
                "response": {"text": text_of(said)} | ({} if ids is None else {"token_ids": [*map(int, ids)]}),
            }
        )
    return rows


def seen(of) -> str:
    """What tells a PIL picture in a prompt from another one."""
    if not hasattr(of, "tobytes"):
        return repr(of)
    return f"{getattr(of, 'size', None)} {blake2b(of.tobytes(), digest_size=16).hexdigest()}"


def text_of(said) -> str | None:
    """The text of a prompt or completion: a string, or the last message of a chat, of which pictures are left out."""
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content")
        if isinstance(said, list):
            said = "".join(part.get("text") or "" for part in said)
    return said if isinstance(said, str) else None


def picture_of(columns: dict, i: int):
    """The picture of completion `i` of this process, in the columns that TRL reads; None where there is none."""
    if "images" in columns:
        several = columns["images"][i]
        return several[0] if several else None
    return columns["image"][i] if "image" in columns else None


def grouped(rows: Sequence[dict], group_size: int, step: int) -> list[dict]:
    """Rows of all processes as groups of `group_size`. Raises DataError."""
    if none := [i for i, row in enumerate(rows) if row["response"]["text"] is None]:
        raise DataError(f"completion {none[0]} is neither a text nor a chat whose last message has one")
    give = "give label_free group_size = num_generations of GRPOConfig, and num_generations_eval the same"
    groups = []
    for start in range(0, len(rows), group_size):
        members = rows[start : start + group_size]
        if len(members) < group_size or len({row["uid"] for row in members}) > 1:
            raise DataError(
                f"completions {start} to {start + len(members) - 1} of {len(rows)} are no {group_size} answers to one "
                f"prompt: {give}"
            )
        first = members[0]
        responses = [row["response"] for row in members]
        for response in responses:
            response["key"] = answers.vote_key(response["text"], first["choices"])
        shared = {name: first[name] for name in ("uid", "question", "choices", "gold")}
        groups.append({"schema": SCHEMA, "step": step, "image": None, **shared, "responses": responses})
    # A batch may have a prompt twice, side by side, if the data has; that all prompts have, it can't.
    times = math.gcd(*(len([*same]) for _, same in groupby(group["uid"] for group in groups)))
    if times > 1:
        raise DataError(
            f"every prompt has {times * group_size} completions here, or a multiple, and group_size is {group_size}: "
            f"{give}; or take out the questions that the data has twice"
        )
    return groups


def scores_of(judge: Callable, group: dict, picture) -> list[float | None]:
    """A judge's scores of a group. Raises SettingError for one that fails, or gives anything else."""
    try:
        scores = judge({name: value for name, value in group.items() if name != "gold"} | {"image": picture})
        given = [*scores]
    except UserError:
        raise
    except Exception as error:
        raise SettingError(f"the judge fails on {group['uid']}: {type(error).__name__}: {error}") from error
    size = len(group["responses"])
    if len(given) != size or not all(s is None or (isinstance(s, Real) and 0 <= s <= 1) for s in given):
        raise SettingError(
            f"the judge gives {str(given)[:200]} for {group['uid']}: give {size} scores from 0 to 1, None where a "
            "judgement can't be read"
        )
    return [None if s is None else float(s) for s in given]
