"""The packed update at full size: forward and backward of micro-batches of 8,192 and 16,384 tokens, by attention.

    python -m bench.update --save        # the 7B's configuration, random weights (bench/random_model.py)

A row is a prompt of some 1,000 tokens with a picture and G responses, 8,192 tokens in all. The loss is the sum of the
responses' log-probabilities; checkpointing is on, as in a run.

    upt       as a run does it: on a GPU one variable-length call of flash attention a layer
    padded    what takes its place elsewhere: two calls of PyTorch's attention, prompts and responses padded
    dense     one call with a mask of all tokens by all tokens, keys and values repeated for their query heads

`apart` is the largest difference of a log-probability from upt's. Seconds are the fastest of several times after a
first one that is not timed; peak memory is of all tensors. A row is printed and saved when it is done.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import random_model
from bench.random_model import attempt, clock, make_room, peak_gb, replaced, shown
from upt.errors import SettingError
from upt.model.attention import Padded, Span
from upt.model.packing import Row
from upt.model.policy import Policy
from upt.prompts import template
from upt.ranges import Count
from upt.run import cli
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    model: random_model.Named = "qwen2.5-vl-7b-random"
    """whose configuration"""
    tokens: tuple[Count, ...] = (8192, 16384)
    """tokens of a micro-batch, multiples of those of a row"""
    row_tokens: Count = 8192
    """tokens of a row, a prompt with its responses"""
    group_size: Count = 8
    """responses to a prompt"""
    image_tokens: Count = 960
    """tokens of the picture in a prompt, a multiple of 32; the text adds some tens"""
    repeats: Count = 2
    """timed passes of each way"""
    save: bool = False
    """write bench/results/update-<model>-<date>-<device>.json"""


class Dense:
    """The layout of packed rows (upt/model/attention.py) as a mask of all tokens by all tokens."""

    def __init__(self, prompts: Sequence[Span], responses: Sequence[Sequence[Span]], device: torch.device):
        size = max(end for several in [prompts, *responses] for _, end in several)
        self.mask = torch.zeros(size, size, dtype=torch.bool, device=device)
        for prompt, several in zip(prompts, responses, strict=True):
            for own in (prompt, *several):
                self.mask[slice(*own), slice(*prompt)] = True
                self.mask[slice(*own), slice(*own)] = True
        self.mask = self.mask.tril()

    def __call__(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """query (1, Hq, N, D), key and value (1, Hkv, N, D) to (1, N, Hq, D)."""
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        return scaled_dot_product_attention(query, key, value, self.mask, scale=scaling).transpose(1, 2)


def always(layout: type) -> dict:
    """This layout in the place of the one that a device gets."""
    return {"upt.model.packing.packed": lambda prompts, responses, device, dtype: layout(prompts, responses, device)}


WAYS = {"upt": {}, "padded": always(Padded), "dense": always(Dense)}


def rows_of(policy: Policy, config: Config) -> list[Row]:
    """As many rows as the largest micro-batch has, of `row_tokens` tokens less what G does not divide."""
    count = max(config.tokens) // config.row_tokens
    asked = random_model.questions(count, config.image_tokens)
    prompts, _ = policy.encode(asked, template("think-boxed"))
    length = (config.row_tokens - len(prompts[0].ids)) // config.group_size + 1  # the last token is no input
    if length < 2:
        raise SettingError(
            f"--row-tokens {config.row_tokens} has no room for {config.group_size} responses behind a prompt of "
            f"{len(prompts[0].ids)} tokens: give more"
        )
    text = min(policy.family.never_sampled(policy.base.config))  # ids below are no placeholders
    responses = torch.randint(text, (count, config.group_size, length)).tolist()
    owners = [[(g, i) for i in range(config.group_size)] for g in range(count)]
    return [Row(*row) for row in zip(prompts, responses, owners, strict=True)]


def measured(policy: Policy, batch: list[Row], way: str, config: Config, device: str, first: dict) -> dict:
    """One row of the table; `first` keeps the log-probabilities of upt, by the number of tokens."""
    make_room(device)
    passes = []
    with replaced(WAYS[way]):
        for _ in range(config.repeats + 1):
            start = clock(device)
            logprob, _ = policy.logprobs(batch)
            middle = clock(device)
            logprob.sum().backward()
            passes.append({"forward_s": middle - start, "backward_s": clock(device) - middle})
            logprob = logprob.detach().cpu()
            for parameter in policy.trainable():
                parameter.grad = None
    tokens = sum(map(len, batch))
    if way == "upt":
        first[tokens] = logprob
    best = min(passes[1:], key=lambda seconds: sum(seconds.values()))
    apart = (logprob - first[tokens]).abs().max().item() if tokens in first else None
    return best | {"tokens_per_second": tokens / sum(best.values()), "peak_gb": peak_gb(device), "apart": apart}


def line(row: dict) -> str:
    start = f"{row['way']:8}{row['tokens']:8,}"
    if "error" in row:
        return f"{start}  {row['error']}"
    columns = (("forward_s", 11, 2), ("backward_s", 12, 2), ("tokens_per_second", 9, 0), ("peak_gb", 9, 1))
    return start + "".join(shown(row[name], width, digits) for name, width, digits in (*columns, ("apart", 10, 5)))


HEAD = f"{'':8}{'tokens':>8}{'forward s':>11}{'backward s':>12}{'tok/s':>9}{'peak GB':>9}{'apart':>10}"


def main(config: Config) -> dict:
    """Measure, print a line for each way and number of tokens, and return what `--save` writes."""
    if bad := [tokens for tokens in config.tokens if tokens % config.row_tokens]:
        raise SettingError(f"--tokens {bad[0]} is no multiple of --row-tokens {config.row_tokens}: give one that is")
    device = random_model.present()
    policy, found, first = random_model.build(config.model, config.image_tokens, device), [], {}
    rows = rows_of(policy, config)
    policy.model.train()  # or nothing is checkpointed
    print(HEAD, flush=True)
    for way in WAYS:
        for tokens in config.tokens:
            batch = rows[: tokens // config.row_tokens]
            row = attempt(partial(measured, policy, batch, way, config, device, first))
            found.append({"way": way, "tokens": sum(map(len, batch))} | row)
            print(line(found[-1]), flush=True)
            result = random_model.report("update", asdict(config), device, rows=found)
    if ours := [row["error"] for row in found if row["way"] == "upt" and "error" in row]:
        raise SystemExit(f"our update failed: {ours[0]}")
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
