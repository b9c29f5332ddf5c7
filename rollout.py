"""Stage 1: sample G responses to each question and write them as shards of groups.

For each step:
    1. take the step's questions, in an order fixed by the seed
    2. encode them, each image once; prompts over the limit are dropped and counted
    3. batch by a token budget, longest prompts first
    4. prefill each prompt once, hand its KV cache to its G responses
    5. sample token by token, with the token's log-probability; finished responses leave the batch
    6. write one shard of groups

The loop in 4 and 5 runs inside HF `generate` (`custom_generate`), which sets up the stopping criteria; a token and what
is recorded of its distribution come from one kernel (kernels/sampling.py). Its noise depends on seed, round, step, uid,
index and token position only, so a response does not change with the batch it was sampled in. Where a step's shard
exists already, it is kept: the same command again goes on.

    python rollout.py --data shapes --model models/tiny --steps 4 --out runs/rollouts
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from tyro.conf import Suppress

import data
import presets
import shards
from answers import vote_key
from kernels import row_id, sample
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
class Sampled:
    """One response: token ids with the stop token, and what was seen of each token's distribution."""

    ids: list[int]
    logprobs: list[float]
    entropy: float
    self_certainty: float
    finish: str


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


# ------------------------------------------------------------------------------------------------------- decoding


class GroupLayer(DynamicLayer):
    """One layer's KV cache, grown in blocks of `BLOCK` tokens instead of being copied at every token."""

    BLOCK = 64

    @classmethod
    def share(cls, prefilled: DynamicLayer, owners: torch.Tensor) -> "GroupLayer":
        """The cache of B prompts handed to R rows, row r continuing prompt owners[r]: (R, H, P + BLOCK, D)."""
        layer, length = cls(), prefilled.get_seq_length()
        layer.lazy_initialization(prefilled.keys, prefilled.values)
        layer.length = length
        layer.keys, layer.values = (
            cls._room(states[..., :length, :][owners]) for states in (prefilled.keys, prefilled.values)
        )
        return layer

    @classmethod
    def _room(cls, states: torch.Tensor, extra: int = 0) -> torch.Tensor:
        size, heads, length, dim = states.shape
        wider = states.new_empty(size, heads, length + max(cls.BLOCK, extra), dim)
        wider[..., :length, :] = states
        return wider

    def update(self, key_states, value_states, *args, **kwargs):
        added = key_states.shape[-2]
        if self.length + added > self.keys.shape[-2]:
            self.keys, self.values = self._room(self.keys, added), self._room(self.values, added)
        self.keys[..., self.length : self.length + added, :] = key_states
        self.values[..., self.length : self.length + added, :] = value_states
        self.length += added
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length


def share(model, prefilled: DynamicCache, owners: torch.Tensor) -> DynamicCache:
    """The cache of B prompts handed to R rows, row r continuing prompt owners[r]."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GroupLayer.share(layer, owners) for layer in prefilled.layers]
    return cache


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    config: Config,
    suffixes: Sequence[Sequence[list[int]]] | None = None,
) -> list[Sampled]:
    """Sample len(rows) / len(prompts) responses to each prompt through HF generate; rows are keys from `row_id`.

    With `suffixes`, suffixes[b] being the ways in which prompt b goes on (token ids, not empty), every one of them gets
    an equal share of the rows; the prompts are prefilled once all the same. Of `config`, temperature, top_p, top_k,
    seed (None: 0) and max_new_tokens are used.
    """
    tokenizer, base = policy.tokenizer, policy.base
    stops = base.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    vision = [
        getattr(base.config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(3, len(prompts), length, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        start = length - len(prompt.ids)  # padded on the left, so that every response starts at the same column
        ids[b, start:] = torch.tensor(prompt.ids)
        mask[b, start:] = 1
        positions[:, b, start:] = prompt.positions
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted({tokenizer.eos_token_id, *stops} - {None}),
        pad_token_id=pad,
        do_sample=False,  # our own loop samples; everything that would change the scores is off
        repetition_penalty=1.0,
    )
    draw = partial(
        sample,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed or 0,
        banned=[token for token in vision if token is not None],
        statistics=True,
    )
    policy.model.eval()
    return base.generate(
        ids.to(policy.device),
        attention_mask=mask.to(policy.device),
        position_ids=positions.to(policy.device),
        generation_config=settings,
        custom_generate=partial(_decode, policy=policy, prompts=prompts, rows=rows, draw=draw, suffixes=suffixes),
    )


def _decode(
    model,
    input_ids,
    *,
    logits_processor,
    stopping_criteria,
    generation_config,
    policy,
    prompts,
    rows,
    draw,
    suffixes,
    **kwargs,
) -> list[Sampled]:
    """The decoding loop: one prefill a prompt, then one token a step for the responses that are still open."""
    device, count = input_ids.device, len(rows)
    positions = kwargs["position_ids"][-3:]  # HF may put the text positions before the three of M-RoPE
    seen = kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids) if seen is None else seen
    seen = seen.bool()  # (B, P)
    causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=device).tril()
    # A padding query sees itself, so that no row of the softmax is empty.
    mask = (causal & seen[:, None, :] | torch.eye(seen.shape[1], dtype=torch.bool, device=device))[:, None]
    cache = DynamicCache(config=model.config)
    hidden = policy.hidden(input_ids, positions, mask, prompts, cache)[:, -1]
    following = positions.amax((0, 2)) + 1  # position of the next token, (B,)
    tokens = input_ids  # what the logits processors and stopping criteria see
    if suffixes is not None:
        owners = torch.tensor([b for b, several in enumerate(suffixes) for _ in several], device=device)
        flat = [suffix for several in suffixes for suffix in several]
        cache = share(model, cache, owners)
        hidden, seen, following = _extend(policy, cache, seen[owners], following[owners], flat)
        tokens = tokens[owners]
    owners = torch.arange(len(hidden), device=device).repeat_interleave(count // len(hidden))
    cache = share(model, cache, owners)
    hidden, seen, following, tokens = hidden[owners], seen[owners], following[owners], tokens[owners]
    keys = torch.tensor(rows, device=device)
    open_rows = torch.arange(count, device=device)
    shape = (count, generation_config.max_new_tokens)
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    logprobs, entropies, certainties = (torch.zeros(shape, device=device) for _ in range(3))
    lengths = torch.full((count,), shape[1], device=device)
    stop_ids = torch.tensor(generation_config.eos_token_id, device=device)
    for position in range(shape[1]):
        logits = logits_processor(tokens, model.lm_head(hidden))  # (R, V); we set no processor
        token, logprob, entropy, certainty = draw(logits, row_ids=keys, position=position)
        ids[open_rows, position] = token
        logprobs[open_rows, position] = logprob
        entropies[open_rows, position] = entropy
        certainties[open_rows, position] = certainty
        tokens = torch.cat([tokens, token[:, None]], 1)
        done = stopping_criteria(tokens, None)
        if done.any():
            lengths[open_rows[done]] = position + 1
            if done.all():
                break
            left = (~done).nonzero()[:, 0]
            open_rows, keys, tokens, seen = open_rows[left], keys[left], tokens[left], seen[left]
            token, following = token[left], following[left]
            cache.batch_select_indices(left)
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
        place = (following + position).expand(3, -1)[..., None]
        hidden = policy.hidden(token[:, None], place, seen[:, None, None], cache=cache)[:, -1]

    stopped = torch.isin(ids.gather(1, lengths[:, None] - 1)[:, 0], stop_ids).tolist()
    means = [(values.sum(1) / lengths).tolist() for values in (entropies, certainties)]
    return [
        Sampled(
            ids[r, :n].tolist(), logprobs[r, :n].tolist(), means[0][r], means[1][r], "stop" if stopped[r] else "length"
        )
        for r, n in enumerate(lengths.tolist())
    ]


def _extend(policy, cache, seen, following, suffixes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the suffixes, one a row and padded on the left, behind the prompts in `cache`: hidden, seen, following."""
    width, total = max(map(len, suffixes)), seen.shape[1] + max(map(len, suffixes))
    ids = torch.zeros(len(suffixes), width, dtype=torch.long)
    live = torch.zeros(len(suffixes), width, dtype=torch.bool)
    for r, suffix in enumerate(suffixes):
        ids[r, width - len(suffix) :] = torch.tensor(suffix)
        live[r, width - len(suffix) :] = True
    ids, live = ids.to(seen.device), live.to(seen.device)
    seen = torch.cat([seen, live], 1)  # (R, P + width)
    own = torch.ones(width, total, dtype=torch.bool, device=seen.device)
    mask = own.tril(total - width) & seen[:, None, :] | own.tril(total - width).triu(total - width)
    place = (following[:, None] + live.cumsum(1) - 1).expand(3, -1, -1)
    hidden = policy.hidden(ids, place, mask[:, None], cache=cache)[:, -1]
    return hidden, seen, following + live.sum(1)


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
