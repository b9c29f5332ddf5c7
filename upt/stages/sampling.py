"""Sampling as functions: the questions of a step, G responses to each, and their groups as records.

The loop over tokens is model/decoding.py. Its noise depends on seed, round, step, uid, index and token position only,
so a response does not change with the batch it was sampled in.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kernels import row_id
from upt.answers import vote_key
from upt.data.mixture import quotas
from upt.data.questions import Question, Questions
from upt.groups.shards import SCHEMA, open_image, save_image, view_of
from upt.model.decoding import Sampled, generate
from upt.model.packing import Prompt
from upt.model.policy import Policy
from upt.prompts import template
from upt.run.settings import Rollout
from upt.run.team import ALONE, Team


@dataclass
class Batch:
    """Questions of a step that can be used, their prompts, and what was left out by uid and reason."""

    questions: list
    prompts: list[Prompt]
    left_out: dict[str, str] = field(default_factory=dict)


def schedule(size: int, per_step: int, seed: int, step: int, round: int = 0) -> list[int]:
    """The rows of one step: every epoch, of every round, is a fresh permutation, cut into whole steps."""
    per_step = min(per_step, size)
    epoch, turn = divmod(step, size // per_step)
    order = np.random.default_rng([seed, epoch, round] if round else [seed, epoch]).permutation(size)
    return order[turn * per_step : (turn + 1) * per_step].tolist()


def step_rows(questions: Questions, per_step: int, seed: int, step: int, round: int = 0) -> list[int]:
    """The rows of one step; of a mixture by weight, each set's part of them. Raises DataError if one is too small."""
    if questions.weights is None:
        return schedule(len(questions), per_step, seed, step, round)
    rows, first = [], 0
    for (size, _), count in zip(questions.weights, quotas(per_step, questions.weights), strict=True):
        rows += [first + row for row in schedule(size, count, seed, step, round)]
        first += size
    # Shuffled, so that every minibatch is a mixture.
    return np.random.default_rng([seed, step, round, len(rows)]).permutation(rows).tolist()


def step_batch(
    policy: Policy, questions: Questions, step: int, config: Rollout, rows: list[int] | None = None
) -> Batch:
    """Load and encode the questions of one step, or of some of its rows; all may be bad or over the limit."""
    if rows is None:
        rows = step_rows(questions, config.questions_per_step, config.seed, step, config.round)
    found = [replace(question, view=config.view) for question in questions.get(rows)]
    prompts, too_long = policy.encode(found, template(config.prompt), config.max_prompt_tokens)
    left_out = {
        questions.uids[row]: questions.bad[questions.uids[row]] for row in rows if questions.uids[row] in questions.bad
    }
    limit = config.max_prompt_tokens
    left_out |= {uid: f"prompt of {n} tokens is over --max-prompt-tokens {limit}" for uid, n in too_long.items()}
    return Batch([q for q in found if q.uid not in too_long], prompts, left_out)


def sample_groups(
    policy: Policy, prompts: Sequence[Prompt], step: int, config: Rollout, tick: Callable[[int], None] = lambda n: None
) -> list[list[Sampled]]:
    """G responses to each prompt, in the order of the prompts. `tick(n)` is called after every n finished responses.

    Where prompts have twins the second half of a group answers the twin, and G is even.
    """
    G = config.group_size
    halves = [0, G // 2] if any(prompt.twin for prompt in prompts) else [0]
    seen = [prompt.seen_by(first, G) for prompt in prompts for first in halves]
    rows = [row_id(step, prompt.uid, g) for prompt in prompts for g in range(G)]
    sampled = generate(policy, seen, rows, config, tick=tick)
    return [sampled[start : start + G] for start in range(0, len(rows), G)]


def rollout(policy, batch: Batch, step: int, config: Rollout, folder: Path, tick=lambda n: None) -> list[dict]:
    """The groups of one step as records (see groups/shards.py), pictures written under `folder`. Gradients are off."""
    groups = []
    with ThreadPoolExecutor() as pool:  # the disk works while the model samples
        pictures = pool.map(lambda q: None if q.image is None else save_image(folder, q.image), batch.questions)
        sampled = sample_groups(policy, batch.prompts, config.turn(step), config, tick)
    for question, picture, prompt, responses in zip(batch.questions, pictures, batch.prompts, sampled, strict=True):
        texts = policy.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        groups.append(
            {
                "schema": SCHEMA,
                "uid": question.uid,
                "step": step,
                "question": question.question,
                "choices": question.choices,
                "image": picture,
                "gold": question.gold,
                "prompt_tokens": len(prompt.ids),
                "responses": [
                    {
                        "text": text,
                        "token_ids": r.ids,
                        "logprobs": r.logprobs,
                        "finish": r.finish,
                        "entropy": r.entropy,
                        "self_certainty": r.self_certainty,
                        "key": vote_key(text, question.choices),
                    }
                    | ({} if prompt.seen_by(i, len(texts)) is prompt else {"view": question.view})
                    for i, (text, r) in enumerate(zip(texts, responses, strict=True))
                ],
            }
        )
    return groups


@dataclass
class Step:
    """The groups of one step, of all processes; what was left out, by uid and reason.

    `homes` has the rank of the process that sampled each group, and `prompts` the prompts of those that are here by
    uid.
    """

    groups: list[dict]
    left_out: dict[str, str]
    homes: list[int]
    prompts: dict[str, Prompt]


def sample_step(
    policy: Policy,
    questions: Questions,
    step: int,
    config: Rollout,
    folder: Path,
    team: Team = ALONE,
    known: Sequence[dict] | None = None,
    tick: Callable[[int], None] = lambda n: None,
    clock: Callable = lambda stage: nullcontext(),
) -> Step:
    """Sample a step, each process its part of the questions. Pictures are written under `folder`, no shard is.

    `known` are groups of an earlier try at the step, which are taken as they are. `clock(stage)` times `data` and
    `rollout`.
    """
    rows = step_rows(questions, config.questions_per_step, config.seed, step, config.round)
    there, prompts = {group["uid"]: group for group in known or ()}, {}

    def sample(rows: list[int]) -> list[tuple[dict | str, bool]]:
        """Of each row its group, or why it is left out, and whether it is a bad one."""
        with clock("data"):
            batch = step_batch(policy, questions, step, config, rows)
        prompts.update((prompt.uid, prompt) for prompt in batch.prompts)
        tick(len(batch.left_out) * config.group_size)
        found = {uid: there[uid] for uid in prompts if uid in there}
        if len(found) < len(prompts):
            with clock("rollout"):
                found = {group["uid"]: group for group in rollout(policy, batch, step, config, folder, tick)}
        found |= batch.left_out
        return [(found[uid], uid in questions.bad) for uid in (questions.uids[row] for row in rows)]

    with clock("data" if known else "rollout"):  # the wait for the slowest is part of it
        told = team.spread(sample, rows)
    step_of = Step([], {}, [], prompts)
    for i, (row, (group, bad)) in enumerate(zip(rows, told, strict=True)):
        uid = questions.uids[row]
        if isinstance(group, dict):
            step_of.groups.append(group)
            step_of.homes.append(i % team.size)
        else:
            step_of.left_out[uid] = group
        if bad:
            questions.bad[uid] = group  # perhaps met by another process
    return step_of


def prompts_of(policy: Policy, groups: Sequence[dict], folder: Path, config: Rollout) -> list[Prompt]:
    """The prompts of groups, encoded again from their records and the pictures under `folder`."""
    questions = [
        Question(
            uid=group["uid"],
            question=group["question"],
            choices=group["choices"],
            image=None if group["image"] is None else open_image(folder, group["image"]),
            gold=group["gold"],
            view=view_of(group),
        )
        for group in groups
    ]
    return policy.encode(questions, template(config.prompt))[0]
