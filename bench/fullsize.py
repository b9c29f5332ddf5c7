"""One step of the loop at full size, with our kernels and without: sampled tokens per second, seconds, peak memory.

The model has the real configuration of its namesake and random weights (bench/random_model.py). Its prompts have a
random picture, and all responses reach the limit.

    python -m bench.fullsize --model qwen2.5-vl-7b-random --save

    kernels    the loop as it is: Triton on a GPU
    eager      the same loop with log_softmax over whole logits, and softmax and a draw, in their place
    reckoned   what upt/reckoning says of such a step on this card

Rollout is the vision tower, prefill and sampling; update is forward, backward, clipping and AdamW on the LoRA adapter,
with alternating advantages. Each way trains the responses that it sampled; `gap` is the mean and the largest difference
of a token's log-probability between sampler and trainer, in nats. The first step of either is not timed. A step is
printed and saved when it is done.
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch

import train_upt
from bench import random_model
from bench.cases import naive_linear
from bench.random_model import LORA_RANK, attempt, clock, peak_gb, replaced, shown
from upt.model import update
from upt.prompts import template
from upt.ranges import Count
from upt.reckoning.memory import Demand, reckon
from upt.reckoning.seconds import Card, Work, seconds
from upt.reckoning.sizes import sizes_of
from upt.run import cli
from upt.run.typed import Typed
from upt.stages import sampling


@dataclass
class Config(Typed):
    model: random_model.Named = "qwen2.5-vl-7b-random"
    """whose configuration"""
    questions: Count = 16
    """questions in a step"""
    group_size: Count = 8
    """responses to each"""
    image_tokens: Count = 960
    """tokens of the picture in a prompt, a multiple of 32; the text adds some tens"""
    max_new_tokens: Count = 256
    """tokens of every response"""
    steps: Count = 2
    """timed steps of either way"""
    slots: Count | None = None
    """responses that are sampled at a time; None: as many as there is memory for"""
    update_tokens: Count = 16_384
    """token budget of one micro-batch"""
    save: bool = False
    """write bench/results/fullsize-<model>-<date>-<device>.json"""


def eager_linear(hidden, weight, ids, temperature=1.0):
    logprob = naive_linear(hidden, weight, ids, temperature)
    return logprob, torch.zeros_like(logprob).detach()


def eager_sample(logits, temperature, row_ids, position, banned, statistics, **cut):
    """Without cutting, which this benchmark does not do; the same four results. A CUDA graph can capture it."""
    scores = logits.float() / temperature
    allowed = scores.clone()
    for token in banned:
        allowed[:, token].fill_(float("-inf"))
    p = allowed.softmax(-1)
    token = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)  # of p, as multinomial draws it
    logp = scores.log_softmax(-1)
    return token[:, 0], logp.gather(1, token)[:, 0], -(logp.exp() * logp).sum(-1), -logp.mean(-1)


WAYS = {
    "kernels": {},
    "eager": {"upt.model.policy.linear_logprob": eager_linear, "upt.model.decoding.sample": eager_sample},
}


class Loop:
    """One policy, its questions and its optimizer."""

    def __init__(self, config: Config, device: str):
        self.config, self.device = config, device
        self.policy = random_model.build(config.model, config.image_tokens, device)
        self.questions = random_model.questions(config.questions, config.image_tokens)
        self.settings = train_upt.Config(
            model=config.model, temperature=1.0, top_p=1.0, seed=0, group_size=config.group_size, minibatches=1,
            max_new_tokens=config.max_new_tokens, slots=config.slots,
            update_tokens=config.update_tokens, kl_coef=0.0, clip_low=0.2, clip_high=0.2, dual_clip=0.0,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.policy.trainable(), 1e-5, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0)

    def step(self, number: int) -> dict[str, float | None]:
        peak_gb(self.device)
        start = clock(self.device)
        with torch.no_grad():
            prompts, _ = self.policy.encode(self.questions, template("think-boxed"))
            sampled = sampling.sample_groups(self.policy, prompts, number, self.settings)
        middle, rollout_gb = clock(self.device), peak_gb(self.device)
        signs = [(-1.0) ** i for i in range(self.config.group_size)]
        groups = [
            {
                "responses": [
                    {"token_ids": s.ids, "logprobs": s.logprobs, "finish": s.finish, "advantage": a}
                    for s, a in zip(group, signs)
                ]
            }
            for group in sampled
        ]
        args = (self.policy, self.optimizer, self.schedule, prompts, groups, self.settings)
        stats = update.update(*args, measure_kl=False)
        end = clock(self.device)
        tokens = sum(len(s.ids) for group in sampled for s in group)
        return {
            "rollout_s": middle - start,
            "tokens_per_second": tokens / (middle - start),
            "update_s": end - middle,
            "rollout_peak_gb": rollout_gb,
            "update_peak_gb": peak_gb(self.device),
            "gap_mean": stats["logprob_gap_mean"],
            "gap_max": stats["logprob_gap_max"],
            "prompt_tokens": len(prompts[0].ids),
            "tokens": tokens,
        }


def reckoned(config: Config, card: Card, memory: float, prompt_tokens: int) -> dict[str, float]:
    """A step by the formulas of upt/reckoning, on a card that has so many bytes of memory."""
    sizes = sizes_of(random_model.MODELS[config.model])
    demand = Demand(
        questions_per_step=config.questions,
        group_size=config.group_size,
        max_prompt_tokens=prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        lora_rank=LORA_RANK,
        update_tokens=config.update_tokens,
    )
    work = Work(
        questions=config.questions,
        group_size=config.group_size,
        prompt_tokens=prompt_tokens,
        image_tokens=config.image_tokens,
        response_tokens=config.max_new_tokens,
        max_new_tokens=config.max_new_tokens,
        minibatches=1,
        reference=False,
        lora_rank=LORA_RANK,
    )
    found = reckon(sizes, demand, memory)
    times = {phase: sum(parts.values()) for phase, parts in seconds(sizes, card, work, found.slots["rollout"]).items()}
    peaks = {f"{phase}_peak_gb": sum(parts.values()) / 1e9 for phase, parts in found.phases.items()}
    rate = work.responses * config.max_new_tokens / times["rollout"]
    return {"rollout_s": times["rollout"], "tokens_per_second": rate, "update_s": times["update"], **peaks}


COLUMNS = {  # width and digits
    "rollout_s": (11, 2), "tokens_per_second": (9, 0), "rollout_peak_gb": (9, 1), "update_s": (10, 2),
    "update_peak_gb": (9, 1), "gap_mean": (11, 5), "gap_max": (9, 4),
}  # fmt: skip
HEAD = f"{'':10}{'rollout s':>11}{'tok/s':>9}{'peak GB':>9}{'update s':>10}{'peak GB':>9}{'gap mean':>11}{'max':>9}"


def line(way: str, step: dict) -> str:
    if "error" in step:
        return f"{way:10}{step['error']}"
    return f"{way:10}" + "".join(shown(step.get(name), *size) for name, size in COLUMNS.items())


def main(config: Config) -> dict:
    """Measure, print a line for each timed step, and return what `--save` writes."""
    device = random_model.present()
    loop, card, steps = Loop(config, device), random_model.card(device), {}
    print(HEAD, flush=True)
    for way, functions in WAYS.items():
        steps[way] = []
        for number in range(config.steps + 1):
            with replaced(functions):
                step = attempt(partial(loop.step, number))
            loop.optimizer.zero_grad()
            if number or "error" in step:
                steps[way].append(step)
                print(line(way, step), flush=True)
            if card and "reckoned" not in steps and "error" not in step:
                memory = torch.cuda.mem_get_info()[1]
                steps["reckoned"] = [reckoned(config, card, memory, step["prompt_tokens"])]
                print(line("reckoned", steps["reckoned"][0]), flush=True)
            result = random_model.report("fullsize", asdict(config), device, steps=steps)
            if "error" in step:
                break
    if ours := [step["error"] for step in steps["kernels"] if "error" in step]:
        raise SystemExit(f"the loop with our kernels failed: {ours[0]}")
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
