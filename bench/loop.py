"""Seconds per training step: our loop beside TRL's `GRPOTrainer`, in one process on the CPU, taking turns step by step.

Both train the same tiny Qwen2.5-VL from the same weights on `shapes`, without labels, in float32: the same questions
and pictures (the prompts' token ids are compared at every step), G, temperature, longest response, LoRA, AdamW and
constant learning rate; reward 1 for agreement with the group's majority, normalised in the group; loss averaged over
tokens, no KL, one update a step; sampling through HF generate.

    python -m bench.loop --save                      # prints a table, writes bench/results/loop-<date>-cpu.json
    python -m bench.loop --shape pictures --save     # loop-pictures-<date>-cpu.json

    short      pictures of 9 tokens; responses of at most 32, which stop by themselves after some 15
    pictures   the same pictures enlarged to 361 tokens, for prompts of about 400; G = 16; responses of exactly 64

In `pictures` nothing stops: the stop token of every side is the placeholder of pictures, which no side ever samples.
What comes behind an answer has no majority to agree with, so there the reward is a fair coin on both sides, and nearly
all responses are trained on.

Rollout is everything before the update: reading the pictures, sampling, decoding the text, vote keys, rewards,
advantages. Update is forward, backward, clipping, AdamW, metrics. Loading, checkpoints and evaluation are not timed.
`HF generate` is a rollout alone, of the same prompts by the model without an adapter: preparing the pictures,
`generate(num_return_sequences=G)`, decoding the text. It is given the other sides' turns, and trains nothing.

Peak memory is what a process of each side's own holds at most in its first two steps, above what it held when all was
loaded: resident pages by Linux's count, so with what the allocator keeps for later.

What helps us: responses whose advantage is 0 are left out of our update, which changes no gradient (`trained` is the
share left in). What helps TRL: its pictures are drawn before the step; it writes nothing, we write pictures, the shard
as sampled and as scored, and metrics; its gradient checkpointing, on by default, is off; the fastest of several numbers
of micro-batches is used. TRL and HF generate have the plain transformers model with `sdpa` attention. TRL can also
sample through vLLM, which needs a GPU and is left out. The samples differ: `length`, the mean response in tokens,
should be alike.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import strftime
from typing import Literal

import torch

from bench.memory import Resident, in_own_process
from bench.sides import SHAPES, Generate, Ours, run_trl
from upt.errors import SettingError
from upt.files import write_whole
from upt.ranges import Count, Name, Number, Seed
from upt.run import cli
from upt.run.machine import processor
from upt.run.typed import Typed

MEMORY_STEPS = 2  # the second is made with the optimizer's state


@dataclass
class Config(Typed):
    """What is measured. Everything not listed is the default of train_upt.py for the model."""

    model: Name = "models/tiny"
    """snapshot folder of a Qwen2.5-VL"""
    shape: Literal["short", "pictures"] = "short"
    """short prompts and responses, or pictures of 361 tokens with responses of 64"""
    steps: Count = 10
    """timed steps on each side"""
    warmup: Number = 2
    """steps on each side before the clock counts"""
    questions: Count | None = None
    """questions in one step; None: 32, with pictures 4"""
    group_size: Count | None = None
    """responses to each question, G; None: 8, with pictures 16"""
    trl_accumulation: tuple[Count, ...] = (1, 4)
    """numbers of micro-batches in a step to try for TRL; the fastest is measured"""
    seed: Seed = 0
    """order of the questions, pictures, adapters and sampling"""
    save: bool = False
    """write bench/results/loop-<date>-cpu.json, with pictures loop-pictures-<date>-cpu.json"""

    def resolve(self) -> "Config":
        """A copy with the shape's numbers. Raises SettingError for micro-batches that don't come out even."""
        shape = SHAPES[self.shape]
        size = {name: getattr(self, name) or getattr(shape, name) for name in ("questions", "group_size")}
        if bad := [n for n in self.trl_accumulation if math.prod(size.values()) % n]:
            raise SettingError(
                f"--trl-accumulation {bad[0]} does not divide questions x group size, the responses of a step"
            )
        return replace(self, **size)


def summarise(steps: list[dict]) -> dict[str, float]:
    """Seconds are medians over steps, tokens are those of the responses, per second of the whole step."""
    seconds = [step["seconds"] for step in steps]
    medians = {part: statistics.median(step[part] for step in steps) for part in ("seconds", "rollout", "update")}
    means = {name: statistics.mean(step[name] for step in steps) for name in ("tokens", "length", "trained")}
    rates = {
        "tokens_per_second": means["tokens"] / statistics.mean(seconds),
        "sampled_per_second": means["tokens"] / statistics.mean(step["rollout"] for step in steps),
    }
    return medians | means | rates | {"fastest": min(seconds), "slowest": max(seconds)}


def peak_memory(config: Config, side: str, accumulation: int) -> int:
    """Bytes that a side holds at most in its first steps, above what it held when all was loaded.

    Called in a process of its own: memory that another side has left behind would be taken again, and not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, Path(folder) / "run")
        if side == "TRL":
            return run_trl(ours, accumulation, MEMORY_STEPS).resident.above()
        one = ours if side == "upt" else Generate(ours)
        resident = Resident()
        for number in range(MEMORY_STEPS):
            one.step(number)
        return resident.above()


def hardware() -> str:
    return f"{processor()}, {torch.get_num_threads()} threads"


def table(result: dict) -> str:
    head = f"{'':12}{'s/step':>8}{'min..max':>13}{'rollout':>9}{'sampled/s':>11}{'update':>8}{'tok/s':>8}{'length':>8}"
    lines = [f"{head}{'trained':>9}{'peak MB':>9}"]
    for name, s in result["sides"].items():
        whole = f"{s['seconds']:8.3f}{s['fastest']:7.2f}..{s['slowest']:4.2f}"
        update, rate, share = f"{s['update']:8.3f}", f"{s['tokens_per_second']:8.0f}", f"{s['trained']:9.0%}"
        if not s["update"]:  # a rollout alone
            whole, update, rate, share = f"{'-':>8}{'-':>13}", f"{'-':>8}", f"{'-':>8}", f"{'-':>9}"
        memory = f"{s['peak_mb']:9.0f}" if s["peak_mb"] is not None else f"{'-':>9}"
        rollout = f"{s['rollout']:9.3f}{s['sampled_per_second']:11.0f}"
        lines.append(f"{name:12}{whole}{rollout}{update}{rate}{s['length']:8.1f}{share}{memory}")
    for name, ratio in (("TRL", result["ratio"]), ("HF generate", result["generate_ratio"])):
        lines.append(f"{name} / upt: " + ", ".join(f"{part} {value:.2f}" for part, value in ratio.items()))
    tried = (f"{seconds:.2f} s a step in {n} micro-batches" for n, seconds in result["trl_tried"].items())
    versions = (f"{name} {number}" for name, number in result["versions"].items())
    lines += [f"TRL tried: {', '.join(tried)}", ", ".join([result["hardware"], "float32", *versions])]
    return "\n".join(lines) + "\nload average {:.2f} before, {:.2f} after".format(*result["load"])


def ratios(other: dict, ours: dict, parts: tuple[str, ...]) -> dict[str, float]:
    """How many times ours the other side takes; memory that was not measured is left out."""
    return {part: other[part] / ours[part] for part in parts if ours[part] and other[part]}


def main(config: Config) -> dict:
    """Measure, print the table and return what `--save` writes."""
    if find_spec("trl") is None:
        sys.exit("TRL is not installed: pip install -r requirements-bench.txt")
    config, before, tried = config.resolve(), os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, Path(folder) / "run")
        for n in config.trl_accumulation:
            tried[n] = summarise(run_trl(ours, n, config.warmup + 3).steps[config.warmup :])["seconds"]
        fastest = min(tried, key=tried.get)
        others = {"upt": ours, "HF generate": Generate(ours)}
        turns = run_trl(ours, fastest, config.warmup + config.steps, others)
    load = [before, os.getloadavg()[0]]
    steps = {"upt": turns.other_steps["upt"], "TRL": turns.steps, "HF generate": turns.other_steps["HF generate"]}
    steps = {name: of[config.warmup :] for name, of in steps.items()}
    sides = {name: summarise(of) for name, of in steps.items()}
    for name, side in sides.items():
        peak = in_own_process(peak_memory, config, name, fastest) if sys.platform == "linux" else None
        side["peak_mb"] = peak and peak / 1e6
    result = {
        "config": asdict(config) | {"max_new_tokens": ours.config.max_new_tokens},
        "prompt_tokens": statistics.mean(map(len, ours.prompts)),
        "sides": sides,
        "ratio": ratios(sides["TRL"], sides["upt"], ("seconds", "rollout", "update", "peak_mb")),
        "generate_ratio": ratios(sides["HF generate"], sides["upt"], ("rollout", "peak_mb")),
        "trl_tried": tried,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "load": load,
        "steps": steps,
    }
    print(table(result))
    if config.save:
        shape = "" if config.shape == "short" else f"{config.shape}-"
        path = Path(__file__).parent / f"results/loop-{shape}{strftime('%Y-%m-%d')}-cpu.json"
        write_whole(path, [json.dumps(result, indent=1).encode()])
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
