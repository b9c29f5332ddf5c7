"""The decoding loop: one prefill a prompt, its KV cache handed to its responses, then token by token.

It runs inside HF `generate` (`custom_generate`), which sets up the stopping criteria; a token and what is recorded of
its distribution come from one kernel (kernels/sampling.py), whose noise is keyed by row and token position, so a
response does not change with the batch it was sampled in. Finished responses leave the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from kernels import sample
from upt.errors import PolicyError
from upt.model.packing import Prompt
from upt.model.policy import Policy


@dataclass
class Sampled:
    """One response: token ids with the stop token, and what was seen of each token's distribution."""

    ids: list[int]
    logprobs: list[float]
    entropy: float
    self_certainty: float
    finish: str


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
    config,
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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(len(prompts[0].positions), len(prompts), length, dtype=torch.long)
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
        banned=policy.family.never_sampled(base.config),
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
    axes = len(prompts[0].positions)
    positions = kwargs["position_ids"][-axes:]  # HF may put the text positions before the three of M-RoPE
    seen = kwargs.get("attention_mask")
    seen = torch.ones_like(input_ids) if seen is None else seen
    seen = seen.bool()  # (B, P)
    causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=device).tril()
    # A padding query sees itself, so that no row of the softmax is empty.
    mask = (causal & seen[:, None, :] | torch.eye(seen.shape[1], dtype=torch.bool, device=device))[:, None]
    cache = DynamicCache(config=model.config)
    hidden = policy.hidden(input_ids, positions, None, prompts, cache, mask)[:, -1]
    following = positions.amax((0, 2)) + 1  # position of the next token, (B,)
    tokens = input_ids  # what the logits processors and stopping criteria see
    if suffixes is not None:
        owners = torch.tensor([b for b, several in enumerate(suffixes) for _ in several], device=device)
        flat = [suffix for several in suffixes for suffix in several]
        cache = share(model, cache, owners)
        hidden, seen, following = _extend(policy, cache, seen[owners], following[owners], flat, axes)
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
        try:
            token, logprob, entropy, certainty = draw(logits, row_ids=keys, position=position)
        except ValueError as error:
            fix = "if this was trained, start from an earlier checkpoint with a lower --learning-rate"
            raise PolicyError(f"nothing can be sampled: {error}; {fix}") from error
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
        place = (following + position).expand(axes, -1)[..., None]
        hidden = policy.hidden(token[:, None], place, cache=cache, mask=seen[:, None, None])[:, -1]

    stopped = torch.isin(ids.gather(1, lengths[:, None] - 1)[:, 0], stop_ids).tolist()
    means = [(values.sum(1) / lengths).tolist() for values in (entropies, certainties)]
    return [
        Sampled(
            ids[r, :n].tolist(), logprobs[r, :n].tolist(), means[0][r], means[1][r], "stop" if stopped[r] else "length"
        )
        for r, n in enumerate(lengths.tolist())
    ]


def _extend(policy, cache, seen, following, suffixes, axes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    place = (following[:, None] + live.cumsum(1) - 1).expand(axes, -1, -1)
    hidden = policy.hidden(ids, place, cache=cache, mask=mask[:, None])[:, -1]
    return hidden, seen, following + live.sum(1)
