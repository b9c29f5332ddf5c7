"""Stage 1: sample G responses to each question and write them as shards of groups.

For each step:
    1. take the step's questions, in an order fixed by the seed
    2. encode them, each image once; prompts over the limit are dropped and counted
    3. batch by a token budget, longest prompts first
    4. prefill each prompt once, hand its KV cache to its G responses
    5. sample token by token, with the token's log-probability; finished responses leave the batch
    6. write one shard of groups

The loop in 4 and 5 is decoding.py. Its noise depends on seed, round, step, uid, index and token position only, so a
response does not change with the batch it was sampled in. Where a step's shard exists already, it is kept: the same
command again goes on.

    python rollout.py --data shapes --model models/tiny --steps 4 --out runs/rollouts
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Suppress

import data
import presets
import shards
from answers import vote_key
from decoding import Sampled, generate
from kernels import row_id
from mixture import quotas, shares
from policy import Policy, Prompt, model_config

FREE = ("out", "steps", "device")  # settings that may change when sampling goes on


@dataclass
class Config:
    """Settings left at None take the preset's value, else the default for the model (see presets.py)."""

    data: str | None = None
    """shapes (the default), geoqa, geometry3k, mmr1, a hub id, a local folder or JSONL file; several: a,b or a:3,b:1"""
    model: str | None = None
    """snapshot folder or hub id; None: models/tiny for shapes, Qwen/Qwen2.5-VL-7B-Instruct for anything else"""
    adapter: str | None = None
    """PEFT adapter to start from"""
    preset: Literal["mm-upt", "self-judge", "self-judge-code"] | None = None
    """a paper's recipe and its prompt style"""
    out: Path = Path("runs/rollouts")
    """folder to write to"""
    split: str = "train"
    """split of the data to sample from"""
    limit: int | None = None
    """use the first N questions of the split only"""
    seed: int | None = None
    """order of the questions, sampling noise, adapter initialisation and the pictures of shapes; None: 0"""
    steps: int | None = None
    """steps to make (one shard each)"""
    questions_per_step: int | None = None
    """questions in one step, capped by the data"""
    group_size: int | None = None
    """responses to each question, G"""
    temperature: float | None = None
    """sampling temperature; 0 is greedy"""
    top_p: float | None = None
    """nucleus: keep the likeliest tokens until their probability reaches this"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 keeps all"""
    max_new_tokens: int | None = None
    """longest response, in tokens"""
    prompt: str | None = None
    """boxed, think-boxed, or a file with {question} in it"""
    max_prompt_tokens: int | None = None
    """longer prompts are dropped and counted, never cut"""
    min_pixels: int | None = None
    """smallest image area after resizing, in pixels; None: for models/tiny as its processor says"""
    max_pixels: int | None = None
    """largest image area after resizing, in pixels; None: for models/tiny as its processor says"""
    rollout_tokens: int | None = None
    """token budget of one decoding batch, prompts and responses together"""
    round: Suppress[int] = 0
    """round of a self-evolving run (evolve.py)"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def __post_init__(self):
        self.out = self.out and Path(self.out)

    def resolve(self) -> "Config":
        """Fill in what was left open and check what can be checked. Raises ValueError with what to change."""
        presets.fill(self)
        for name in ("steps", "questions_per_step", "group_size", "max_new_tokens", "rollout_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"sampling needs temperature >= 0, 0 < top-p <= 1 and top-k >= 0, not {self.temperature}, "
                f"{self.top_p}, {self.top_k}"
            )
        Policy.template(self.prompt)
        return self

    def turn(self, step: int) -> int:
        """What keys a step's noise: the steps of two rounds lie far apart."""
        return step + (self.round << 20)


@dataclass
class Batch:
    """The questions of one step that can be used, their prompts, and what was left out by uid and reason."""

    questions: list
    prompts: list[Prompt]
    left_out: dict[str, str] = field(default_factory=dict)


def schedule(size: int, per_step: int, seed: int, step: int, round: int = 0) -> list[int]:
    """The rows of one step: every epoch, of every round, is a fresh permutation, cut into whole steps."""
    per_step = min(per_step, size)
    epoch, turn = divmod(step, size // per_step)
    order = np.random.default_rng([seed, epoch, round] if round else [seed, epoch]).permutation(size)
    return order[turn * per_step : (turn + 1) * per_step].tolist()


def step_rows(questions: data.Questions, per_step: int, seed: int, step: int, round: int = 0) -> list[int]:
    """The rows of one step; of a mixture by weight, each set's part of them. Raises DataError if one is too small."""
    if questions.weights is None:
        return schedule(len(questions), per_step, seed, step, round)
    rows, first = [], 0
    for (size, _), count in zip(questions.weights, quotas(per_step, questions.weights), strict=True):
        rows += [first + row for row in schedule(size, count, seed, step, round)]
        first += size
    # Shuffled, so that every minibatch is a mixture.
    return np.random.default_rng([seed, step, round, len(rows)]).permutation(rows).tolist()


def step_batch(policy: Policy, questions: data.Questions, step: int, config: Config) -> Batch:
    """Load and encode the questions of one step; none may be left when all are bad or over the limit."""
    rows = step_rows(questions, config.questions_per_step, config.seed, step, config.round)
    found = questions.get(rows)
    prompts, too_long = policy.encode(found, policy.template(config.prompt), config.max_prompt_tokens)
    left_out = {
        questions.uids[row]: questions.bad[questions.uids[row]] for row in rows if questions.uids[row] in questions.bad
    }
    limit = config.max_prompt_tokens
    left_out |= {uid: f"prompt of {n} tokens is over --max-prompt-tokens {limit}" for uid, n in too_long.items()}
    return Batch([q for q in found if q.uid not in too_long], prompts, left_out)


def sample_groups(
    policy: Policy, prompts: Sequence[Prompt], step: int, config: Config, tick: Callable[[int], None] = lambda n: None
) -> list[list[Sampled]]:
    """G responses to each prompt, in the order of the prompts. `tick(n)` is called after every n finished responses."""
    G, found = config.group_size, [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    while order:
        tokens = G * (len(prompts[order[0]].ids) + config.max_new_tokens)
        count = max(1, config.rollout_tokens // tokens)
        batch, order = order[:count], order[count:]
        rows = [row_id(step, prompts[i].uid, g) for i in batch for g in range(G)]
        sampled = generate(policy, [prompts[i] for i in batch], rows, config)
        for place, i in enumerate(batch):
            found[i] = sampled[place * G : (place + 1) * G]
        tick(len(rows))
    return found


def rollout(policy, batch: Batch, step: int, config: Config, folder: Path, tick=lambda n: None) -> list[dict]:
    """The groups of one step as records (see shards.py), pictures written under `folder`. Gradients are off."""
    groups = []
    with ThreadPoolExecutor() as pool:  # the disk works while the model samples
        pictures = pool.map(lambda q: None if q.image is None else shards.save_image(folder, q.image), batch.questions)
        sampled = sample_groups(policy, batch.prompts, config.turn(step), config, tick)
    for question, picture, prompt, responses in zip(batch.questions, pictures, batch.prompts, sampled, strict=True):
        texts = policy.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        groups.append(
            {
                "schema": shards.SCHEMA,
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
                    for text, r in zip(texts, responses, strict=True)
                ],
            }
        )
    return groups


def main(config: Config) -> None:
    config = replace(config).resolve()
    questions = data.load(config.data, config.split, config.seed, limit=config.limit)
    folder = Path(config.out)
    model_config(config.model)
    shards.check_manifest(folder, asdict(config), ignore=FREE)
    print(questions.describe(), file=sys.stderr)
    if questions.weights:
        print(shares(questions, config.questions_per_step), file=sys.stderr)
    policy = Policy.load(
        config.model,
        adapter=config.adapter,
        dtype=config.dtype,
        device=config.device,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )
    shards.write_manifest(
        folder, stage="rollout", config=asdict(config), seed=config.seed, model=config.model, adapter=config.adapter
    )
    for step in range(config.steps):
        path = shards.shard_path(folder, step)
        if shards.is_complete(path):
            continue
        batch = step_batch(policy, questions, step, config)
        for uid, reason in batch.left_out.items():
            print(f"left out {uid}: {reason}", file=sys.stderr)
        if not batch.prompts:
            print(f"step {step} is left out: none of its questions can be used", file=sys.stderr)
            continue
        with tqdm(total=len(batch.prompts) * config.group_size, desc=f"step {step}", unit="response") as bar:
            shards.write_shard(path, rollout(policy, batch, step, config, folder, bar.update))
    print(f"{len(shards.ShardReader(folder).paths)} shards of groups in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Config))
