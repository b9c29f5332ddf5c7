"""Sampling responses: the rows of all prompts go through a number of slots (slots.py), inside HF `generate`.

A token and what is recorded of its distribution come from one kernel (kernels/sampling.py), whose noise is keyed by row
and token position, so a response does not change with the slots that it is sampled in or with what is beside it.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import GenerationConfig

from kernels import sample
from kernels.dispatch import on
from upt.errors import PolicyError
from upt.model.lora import sampling
from upt.model.packing import Prompt
from upt.model.policy import Policy
from upt.model.room import room_left
from upt.model.slots import Job, Sizes, Slots, bytes_of
from upt.reckoning.memory import prefill_bytes, resident_prompts, slots_that_fit
from upt.run import progress

HOST_BYTES = 2**31  # for keys and values, on a CPU
UNSEEN = {"cpu": 1, "cuda": 8}  # steps between two looks at what has finished: a look makes a GPU wait


@dataclass
class Sampled:
    """One response: token ids with the stop token, and what was seen of each token's distribution."""

    ids: list[int]
    logprobs: list[float]
    entropy: float
    self_certainty: float
    finish: str


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    config,
    suffixes: Sequence[Sequence[list[int]]] | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Sampled]:
    """Sample len(rows) / len(prompts) responses to each prompt through HF generate; rows are keys from `row_id`.

    With `suffixes`, suffixes[b] being the ways in which prompt b goes on (token ids, not empty), every one of them gets
    an equal share of the rows; the prompts are prefilled once all the same. Of `config`, temperature, top_p, top_k,
    seed (None: 0), max_new_tokens and slots (None: as many as there is memory for) are used. `tick(n)` is called after
    every n finished responses.
    """
    if not prompts:
        return []
    tokenizer, base = policy.tokenizer, policy.base
    stops = base.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted({tokenizer.eos_token_id, *stops} - {None}),
        pad_token_id=pad,
        do_sample=False,  # our own loop samples; everything that would change the scores is off
        repetition_penalty=1.0,
    )
    how = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed or 0,
        "banned": policy.family.never_sampled(base.config),
        "statistics": True,
    }

    def draw(logits: torch.Tensor, **where) -> tuple[torch.Tensor, ...]:
        try:
            return sample(logits, **where, **how)
        except ValueError as error:
            raise _nothing(error) from error

    # What generate sets up does not depend on the prompts, which our loop takes itself, with their images.
    ids = torch.tensor([prompt.ids[-1:] for prompt in prompts], device=policy.device)  # (B, 1)
    policy.model.eval()
    with sampling(policy.model), on(base.lm_head.weight):
        return base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.zeros_like(ids).expand(len(prompts[0].positions), -1, -1),
            generation_config=settings,
            custom_generate=partial(
                _decode,
                policy=policy,
                jobs=_jobs(prompts, len(rows), suffixes),
                keys=rows,
                draw=draw,
                slots=config.slots,
                tick=tick,
            ),
        )


def _jobs(prompts: Sequence[Prompt], count: int, suffixes) -> list[Job]:
    """What is to be sampled: rows 0 to count - 1, in equal shares for all suffixes of all prompts."""
    suffixes = [[] for _ in prompts] if suffixes is None else suffixes
    branches = [max(1, len(several)) for several in suffixes]
    share, jobs, first = count // sum(branches), [], 0
    for prompt, several, n in zip(prompts, suffixes, branches, strict=True):
        jobs.append(Job(prompt, [list(range(first + i * share, first + (i + 1) * share)) for i in range(n)], several))
        first += n * share
    return jobs


def _decode(model, input_ids, *, generation_config, policy, jobs, keys, draw, slots, tick, **kwargs) -> list[Sampled]:
    """All rows of all jobs, longest prompts first, in half as many slots where memory runs out."""
    stops, new = generation_config.eos_token_id, generation_config.max_new_tokens
    jobs = sorted(jobs, key=lambda job: -len(job.prompt.ids))
    found: dict[int, Sampled] = {}
    while jobs:
        sizes = _sizes(policy, jobs, new, slots)
        if policy.device.type == "cuda" and not policy.told:
            progress.say(f"sampling in {sizes.slots} slots")
            policy.told = True
        state, tight = None, False
        try:
            state = Slots(policy, sizes, keys, draw, stops)
            _run(state, deque(jobs), tick)
        except torch.OutOfMemoryError as error:
            if sizes.slots == 1:
                fix = "give a smaller --max-new-tokens or --max-prompt-tokens, or take a smaller model"
                raise PolicyError(f"out of memory with one response at a time: {fix}") from error
            tight = True
        if tight:  # here, behind the handler: within it the exception holds what was being computed
            slots = sizes.slots // 2
            policy.fitted["--slots"] = policy.fitted.get("--slots", 1.0) / 2
            progress.say(f"out of memory with {sizes.slots} slots: going on with {slots}")
            if state:
                state.release()
        if state:
            _tell(state, tick)
            found |= _finished(state, stops)
        jobs = [job.without(found) for job in jobs]
        jobs = [job for job in jobs if any(job.rows)]
    return [found[row] for row in range(len(keys))]


def _run(state: Slots, jobs: deque[Job], tick: Callable[[int], None]) -> None:
    """Steps until all rows have finished."""
    count, unseen = sum(len(rows) for job in jobs for rows in job.rows), UNSEEN[state.policy.device.type]
    while True:
        state.refill(jobs)
        _tell(state, tick)
        if state.told == count:
            return
        for _ in range(unseen):
            state.step()


def _tell(state: Slots, tick: Callable[[int], None]) -> None:
    """Say how many more rows have finished."""
    if finished := len(state.done) - state.told:
        state.told += finished
        tick(finished)


def _finished(state: Slots, stops: Sequence[int]) -> dict[int, Sampled]:
    """What has been sampled to its end, by row."""
    if not state.done:
        return {}
    rows = torch.tensor(state.done)
    lengths, ids, logprobs, *sums = (
        noted.cpu()[rows] for noted in (state.lengths, state.ids, state.logprobs, state.entropy, state.certainty)
    )
    means = [(values / lengths).tolist() for values in sums]
    lengths, ids, logprobs = lengths.tolist(), ids.tolist(), logprobs.tolist()
    found = {}
    for i, (row, n) in enumerate(zip(state.done, lengths, strict=True)):
        if math.isnan(sum(logprobs[i][:n])):
            raise _nothing("a token's log-probability is nan")
        finish = "stop" if ids[i][n - 1] in stops else "length"
        found[row] = Sampled(ids[i][:n], logprobs[i][:n], means[0][i], means[1][i], finish)
    return found


def _nothing(why) -> PolicyError:
    fix = "if this was trained, start from an earlier checkpoint with a lower --learning-rate"
    return PolicyError(f"nothing can be sampled: {why}; {fix}")


def _sizes(policy: Policy, jobs: Sequence[Job], new: int, slots: int | None) -> Sizes:
    """Room for these jobs in `slots` slots; None, or where memory has run out: in no more than there is room for."""
    rows = [sum(map(len, job.rows)) for job in jobs]
    sizes = Sizes(
        slots=sum(rows),
        places=len(jobs),
        prompt=max(len(job.prompt.ids) for job in jobs),
        new=new,
        axes=len(jobs[0].prompt.positions),
        branches=max(len(job.rows) for job in jobs),
        suffix=max(len(suffix) for job in jobs for suffix in [[], *job.suffixes]),
    )
    share = policy.fitted.get("--slots", 1.0)  # of the memory that is free
    if slots is None or share < 1:
        slot, prompt = bytes_of(policy, sizes)
        fitting = slots_that_fit(share * _free(policy, jobs, sizes), slot, prompt, len(jobs), max(rows))
        slots = min(slots or fitting, fitting)
    slots = min(slots, sizes.slots)
    return replace(sizes, slots=slots, places=resident_prompts(slots, len(jobs), max(rows)))


def _free(policy: Policy, jobs: Sequence[Job], sizes: Sizes) -> float:
    """Bytes that slots may take: on a CPU the same whatever is free, so that a run can be repeated."""
    if policy.device.type == "cpu":
        return HOST_BYTES
    text, longest = policy.base.config.text_config, sizes.prompt + sizes.branches * sizes.suffix
    deepstack = max(len(job.prompt.features.deepstack) if job.prompt.features else 0 for job in jobs)
    each = policy.base.dtype.itemsize
    return room_left(policy.device) - prefill_bytes(text.hidden_size, text.intermediate_size, longest, each, deepstack)
