"""Decoding at full size: milliseconds a step and tokens per second in 64, 128 and 256 slots, beside HF `generate`.

    python -m bench.decoding --save      # the 7B's configuration, random weights (bench/random_model.py)

All slots are filled at once, G to a prompt of some 1,000 tokens with a picture, and draw the same number of tokens.

    upt            as a run does it: one CUDA graph a step, a prompt's keys stored once for its group
    HF generate    as many rows with prompts of as many text tokens, dynamic cache, sdpa, the same weights and adapter
    no graph       as upt, its kernels launched one by one
    copied keys    as upt, but a row's keys are copied from its prompt for PyTorch's own attention, at every step

`floor` is the time to read the weights and the keys and values, a prompt's once, at the bandwidth of a copy on the same
card; `reckoned` is what upt/reckoning says of a step. `same` is the share of tokens that are the ones of upt: all of
them without the graph, most with another attention, whose rounding differs. A row is printed and saved when it is done.
"""

from collections import deque
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bench import random_model
from bench.kernels import copy_gb_s
from bench.random_model import LORA_RANK, attempt, clock, make_room, peak_gb, replaced, shown
from kernels import row_id, sample
from upt.errors import SettingError
from upt.model.lora import sampling
from upt.model.slots import Job, Slots
from upt.model.slots import Sizes as Room
from upt.prompts import template
from upt.ranges import Count
from upt.reckoning.seconds import BYTES, Card, Work, decoding_step
from upt.reckoning.sizes import Sizes, kv_bytes, lora_parameters, sizes_of
from upt.run import cli
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    model: random_model.Named = "qwen2.5-vl-7b-random"
    """whose configuration"""
    slots: tuple[Count, ...] = (64, 128, 256)
    """responses at a time, multiples of the group size"""
    group_size: Count = 8
    """responses to a prompt"""
    image_tokens: Count = 960
    """tokens of the picture in a prompt, a multiple of 32; the text adds some tens"""
    new_tokens: Count = 128
    """tokens of every response, at least 2"""
    save: bool = False
    """write bench/results/decoding-<model>-<date>-<device>.json"""


def copied_keys(query: torch.Tensor, parts, scale: float) -> torch.Tensor:
    """`decode_attention` by PyTorch's own, of keys and values that are copied for each row: (R, Hq, D)."""
    keys, values, seen = [], [], []
    for part in parts:
        place = part.places.of_row if part.places else torch.arange(len(query), device=query.device)
        length = part.lengths[place.clamp(min=0)].masked_fill(place < 0, 0)
        used = torch.arange(part.keys.shape[2], device=query.device) < length[:, None]  # (R, L)
        seen.append(used)
        for found, states in ((keys, part.keys), (values, part.values)):
            found.append(states[place.clamp(min=0)].masked_fill(~used[:, None, :, None], 0))
    mask, keys, values = torch.cat(seen, 1), torch.cat(keys, 2), torch.cat(values, 2)
    mask = mask | ~mask.any(1, keepdim=True)  # a softmax over nothing, of an idle slot, would be nan
    # With one query a row, the query heads of a KV head are to PyTorch so many queries of one head.
    queries = query.unflatten(1, (keys.shape[1], -1))  # (R, Hkv, rep, D)
    return scaled_dot_product_attention(queries, keys, values, mask[:, None, None], scale=scale).flatten(1, 2)


def floor_ms(sizes: Sizes, slots: int, prompts: int, prompt_tokens: int, new_tokens: int, gb_s: float) -> float:
    """Milliseconds to read in bf16 what a step has to: weights, prompts' keys and values, those of half a response."""
    read = BYTES * (sizes.matrices + sizes.head + lora_parameters(sizes, LORA_RANK))
    return (read + kv_bytes(sizes, BYTES) * (prompts * prompt_tokens + slots * new_tokens / 2)) / gb_s / 1e6


def reckoned_ms(sizes: Sizes, card: Card, config: Config, slots: int, prompt_tokens: int) -> float:
    """Milliseconds of a step by the formulas of upt/reckoning, from the card's data sheet."""
    work = Work(
        questions=slots // config.group_size,
        group_size=config.group_size,
        prompt_tokens=prompt_tokens,
        response_tokens=config.new_tokens,
        max_new_tokens=config.new_tokens,
        lora_rank=LORA_RANK,
    )
    parts = decoding_step(sizes, card, work, slots)
    weights = max(parts.pop("reading weights"), parts.pop("products"))
    return 1000 * (weights + sum(parts.values()))


class Times(LogitsProcessor):
    """When each token was about to be drawn."""

    def __init__(self, device: str):
        self.device, self.seen = device, []

    def __call__(self, ids, scores):
        self.seen.append(clock(self.device))
        return scores


class Decoding:
    """One policy and its prompts, each of which is decoded in several ways."""

    def __init__(self, config: Config, device: str):
        self.config, self.device = config, device
        self.policy = random_model.build(config.model, config.image_tokens, device)
        asked = random_model.questions(max(config.slots) // config.group_size, config.image_tokens)
        self.prompts, _ = self.policy.encode(asked, template("think-boxed"))
        self.banned = self.policy.family.never_sampled(self.policy.base.config)
        self.policy.model.eval()

    def ours(self, slots: int) -> tuple[dict, torch.Tensor]:
        """The row of a number of slots, and the tokens (slots, new_tokens) that were drawn."""
        c, prompts = self.config, self.prompts[: slots // self.config.group_size]
        keys = [row_id(0, prompt.uid, g) for prompt in prompts for g in range(c.group_size)]
        numbers = torch.arange(slots).view(len(prompts), -1).tolist()
        jobs = deque(Job(prompt, [rows]) for prompt, rows in zip(prompts, numbers, strict=True))
        longest = max(len(prompt.ids) for prompt in prompts)
        room = Room(slots, len(prompts), longest, c.new_tokens, axes=len(prompts[0].positions))
        draw = partial(sample, temperature=1.0, top_p=1.0, top_k=0, seed=0, banned=self.banned, statistics=True)
        start = clock(self.device)
        state = Slots(self.policy, room, keys, draw, stops=self.banned[:1])
        built = clock(self.device)
        state.refill(jobs)
        filled = clock(self.device)
        for _ in range(c.new_tokens - 1):
            state.step()
        end = clock(self.device)
        if not (state.lengths[:slots] == c.new_tokens).all() or not state.logprobs[:slots].isfinite().all():
            raise RuntimeError("not all rows have all their tokens, or a log-probability is not finite")
        row = {"setup_s": built - start, "prefill_s": filled - built}
        return row | {"ms": 1000 * (end - filled) / (c.new_tokens - 1)}, state.ids[:slots].cpu()

    def generate(self, slots: int) -> dict:
        """The same of HF `generate`."""
        times = Times(self.device)
        ids = torch.randint(min(self.banned), (slots, len(self.prompts[0].ids)), device=self.device)
        settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=self.config.new_tokens,
            suppress_tokens=self.banned,
            eos_token_id=self.banned[0],
            pad_token_id=self.policy.tokenizer.pad_token_id,
            disable_compile=True,
        )
        start = clock(self.device)
        self.policy.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([times]),
        )
        row = {"setup_s": None, "prefill_s": times.seen[0] - start}
        return row | {"ms": 1000 * (times.seen[-1] - times.seen[0]) / (len(times.seen) - 1)}


WAYS = {
    "upt": {},
    "HF generate": {},
    "no graph": {"upt.model.slots.Slots.capture": lambda slots: None},
    "copied keys": {"upt.model.slots.decode_attention": copied_keys},
}


@torch.no_grad()
def measured(decoding: Decoding, way: str, slots: int, drawn: dict[int, torch.Tensor]) -> dict:
    """One row of the table; `drawn` keeps the tokens of upt, by the number of slots."""
    make_room(decoding.device)
    with sampling(decoding.policy.model), replaced(WAYS[way]):
        if way == "HF generate":
            row = decoding.generate(slots)
        else:
            row, tokens = decoding.ours(slots)
            if way == "upt":
                drawn[slots] = tokens
            row["same"] = (tokens == drawn[slots]).float().mean().item() if slots in drawn else None
    return row | {"tokens_per_second": 1000 * slots / row["ms"], "peak_gb": peak_gb(decoding.device)}


def line(row: dict) -> str:
    start = f"{row['way']:12}{row['slots']:6}"
    if "error" in row:
        return f"{start}  {row['error']}"
    columns = (("ms", 9, 2), ("tokens_per_second", 9, 0), ("floor_ms", 9, 2), ("reckoned_ms", 10, 2))
    columns += (("prefill_s", 11, 2), ("setup_s", 9, 2), ("peak_gb", 9, 1), ("same", 7, 2))
    return start + "".join(shown(row.get(name), width, digits) for name, width, digits in columns)


HEAD = f"{'':12}{'slots':>6}{'ms/step':>9}{'tok/s':>9}{'floor':>9}{'reckoned':>10}{'prefill s':>11}{'setup s':>9}"
HEAD += f"{'peak GB':>9}{'same':>7}"


def main(config: Config) -> dict:
    """Measure, print a line for each way and number of slots, and return what `--save` writes."""
    if bad := [slots for slots in config.slots if slots % config.group_size]:
        raise SettingError(f"--slots {bad[0]} is no multiple of --group-size {config.group_size}: give one that is")
    if config.new_tokens < 2:
        raise SettingError("--new-tokens 1: the first token comes with the prompt, so there is no step; give 2 or more")
    device = random_model.present()
    decoding, rows, drawn = Decoding(config, device), [], {}
    sizes, card = sizes_of(random_model.MODELS[config.model]), random_model.card(device)
    bandwidth = copy_gb_s() if device == "cuda" else None
    if bandwidth:
        print(f"a copy moves {bandwidth:,.0f} GB/s", flush=True)
    print(HEAD, flush=True)
    length = len(decoding.prompts[0].ids)
    for way in WAYS:
        for slots in config.slots:
            row = attempt(partial(measured, decoding, way, slots, drawn))
            if bandwidth:
                prompts = slots // config.group_size
                row["floor_ms"] = floor_ms(sizes, slots, prompts, length, config.new_tokens, bandwidth)
            if card:
                row["reckoned_ms"] = reckoned_ms(sizes, card, config, slots, length)
            rows.append({"way": way, "slots": slots} | row)
            print(line(rows[-1]), flush=True)
            found = {"prompt_tokens": length, "copy_gb_s": bandwidth, "rows": rows}
            result = random_model.report("decoding", asdict(config), device, **found)
    if ours := [row["error"] for row in rows if row["way"] == "upt" and "error" in row]:
        raise SystemExit(f"our decoding failed: {ours[0]}")
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
