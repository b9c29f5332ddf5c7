"""Seconds per training step: our loop beside TRL's `GRPOTrainer`, in one process on the CPU, taking turns step by step.

Both train the same tiny Qwen2.5-VL from the same weights on `shapes`, without labels, in float32: the same questions
and pictures (the prompts' token ids are compared at every step), G, temperature, longest response, LoRA, AdamW and
constant learning rate; reward 1 for agreement with the group's majority, normalised in the group; loss averaged over
tokens, no KL, one update a step; sampling through HF generate.

    python -m bench.loop --save          # prints a table, writes bench/results/loop-<date>-cpu.json

Rollout is everything before the update: reading the pictures, sampling, decoding the text, vote keys, rewards,
advantages. Update is forward, backward, clipping, AdamW, metrics. Loading, checkpoints and evaluation are not timed.

What helps us: responses whose advantage is 0 are left out of our update, which changes no gradient (`trained` is the
share left in). What helps TRL: its pictures are drawn before the step; it writes nothing, we write pictures, the shard
as sampled and as scored, and metrics; its gradient checkpointing, on by default, is off; the fastest of several numbers
of micro-batches is used. TRL can also sample through vLLM, which needs a GPU and is left out. The samples differ:
`length`, the mean response in tokens, should be alike.
"""

import copy
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, strftime

import datasets
import torch
from transformers import PrinterCallback, Qwen2_5_VLProcessor, TrainerCallback

import rewards
import train_upt
from upt import data
from upt.answers import vote_key
from upt.errors import SettingError
from upt.files import write_whole
from upt.groups import shards
from upt.model import update
from upt.model.policy import Policy
from upt.prompts import template
from upt.ranges import Count, Name, Number, Seed
from upt.run import cli
from upt.run.metrics import Clock, Metrics
from upt.run.typed import Typed
from upt.stages import sampling


@dataclass
class Config(Typed):
    """What is measured. Everything not listed is the default of train_upt.py for the model."""

    model: Name = "models/tiny"
    """snapshot folder of a Qwen2.5-VL"""
    steps: Count = 10
    """timed steps on each side"""
    warmup: Number = 2
    """steps on each side before the clock counts"""
    questions: Count = 32
    """questions in one step"""
    group_size: Count = 8
    """responses to each question, G"""
    trl_accumulation: tuple[Count, ...] = (1, 4)
    """numbers of micro-batches in a step to try for TRL; the fastest is measured"""
    seed: Seed = 0
    """order of the questions, pictures, adapters and sampling"""
    save: bool = False
    """write bench/results/loop-<date>-cpu.json"""


class Ours:
    """Our loop, one step at a time, as `train_upt.train` runs it."""

    def __init__(self, config: Config, folder: Path):
        c = train_upt.Config(model=config.model, out=folder, seed=config.seed, device="cpu", minibatches=1)
        c.questions_per_step, c.group_size = config.questions, config.group_size
        self.config = c.resolve()
        self.questions = data.load(c.data, c.split, c.seed)
        self.policy = Policy.load(c.model, device="cpu")
        self.policy.add_lora(c.lora_rank, c.lora_alpha, c.lora_targets, c.seed)
        adapter = self.policy.trainable()
        self.optimizer = torch.optim.AdamW(adapter, c.learning_rate, weight_decay=c.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0)
        folder.mkdir(parents=True)
        self.metrics = Metrics(folder / "metrics.jsonl", 0)
        self.prompts: list[list[int]] = []  # token ids of the latest step's prompts

    def step(self, number: int) -> dict[str, float]:
        c, start, clock = self.config, perf_counter(), Clock()
        prompts, groups, left_out = train_upt.sampled(self.policy, self.questions, number, c, clock, lambda *_: None)
        groups = rewards.score(groups, c.reward, c.advantage, c.seed)
        shards.write_shard(shards.shard_path(c.out / "rollouts", number), groups)
        middle = perf_counter()
        stats = update.update(self.policy, self.optimizer, self.schedule, prompts, groups, c, measure_kl=False)
        self.metrics.write(number, groups, stats, clock.seconds, {"left_out": len(left_out)})
        end, self.prompts = perf_counter(), [prompt.ids for prompt in prompts]
        responses = [response for group in groups for response in group["responses"]]
        trained = sum(response["advantage"] != 0 for response in responses)
        return record(start, middle, end, sum(len(r["token_ids"]) for r in responses), len(responses), trained)


class Turns(TrainerCallback):
    """Times the trainer's steps. With `ours`, our side makes a step before each of them."""

    def __init__(self, ours: Ours | None):
        self.ours, self.steps, self.our_steps = ours, [], []
        self.start, self.middle, self.batch = 0.0, 0.0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.ours:
            self.our_steps.append(self.ours.step(len(self.steps)))
        self.start = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        end, mask = perf_counter(), self.batch["completion_mask"]
        self.steps.append(record(self.start, self.middle, end, int(mask.sum()), len(mask), len(mask)))
        if self.ours:
            rows = zip(self.batch["prompt_ids"], self.batch["prompt_mask"].bool())
            theirs = [ids[seen].tolist() for ids, seen in rows]
            if theirs != [ids for ids in self.ours.prompts for _ in range(self.ours.config.group_size)]:
                raise RuntimeError("the two sides were given different prompts: the comparison would mean nothing")
        if state.global_step < state.max_steps:
            self.on_train_begin(args, state, control)


def record(start: float, middle: float, end: float, tokens: int, responses: int, trained: int) -> dict[str, float]:
    """One step of one side: seconds, sampled tokens, their mean number, the share of responses in the update."""
    seconds = {"seconds": end - start, "rollout": middle - start, "update": end - middle}
    return seconds | {"tokens": tokens, "length": tokens / responses, "trained": trained / responses}


def run_trl(ours: Ours, accumulation: int, steps: int, alternate: bool = False) -> Turns:
    """Train with TRL for some steps, in our side's settings; with `alternate` the two sides take turns."""
    from trl import GRPOConfig, GRPOTrainer  # not in requirements.txt

    c, turns = ours.config, Turns(ours if alternate else None)

    class Processor(Qwen2_5_VLProcessor):
        get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])  # video needs torchvision

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            turns.batch = super()._generate_and_score_completions(inputs)
            turns.middle = perf_counter()
            return turns.batch

    def agreement(completions, **kwargs) -> list[float]:
        responses = [{"key": vote_key(turn[0]["content"])} for turn in completions]
        groups = [{"responses": responses[i : i + c.group_size]} for i in range(0, len(responses), c.group_size)]
        return [value for group in groups for value in rewards.majority(group)]

    def examples(batch: dict) -> dict:
        asked = [questions[row] for row in batch["row"]]
        prompts = [[{"role": "user", "content": wording.replace("{question}", q.question)}] for q in asked]
        return {"prompt": prompts, "image": [q.image for q in asked]}

    wording, size = template(c.prompt), c.questions_per_step * c.group_size
    order = [sampling.schedule(len(ours.questions), c.questions_per_step, c.seed, step) for step in range(steps)]
    questions = ours.questions.get(row for rows in order for row in rows)
    dataset = datasets.Dataset.from_dict({"row": range(len(questions))}).with_transform(examples)
    start = Policy.load(c.model, device="cpu")
    # TRL's defaults are ours already: one iteration, dapo loss (the mean over tokens), group-scaled rewards, clip 0.2,
    # beta 0, top-p 1, gradient norm 1, fused AdamW.
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "shuffle_dataset": False}
    settings = GRPOConfig(
        output_dir=str(c.out / "trl"),
        max_steps=steps,
        per_device_train_batch_size=size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_generations=c.group_size,
        max_completion_length=c.max_new_tokens,
        temperature=c.temperature,
        learning_rate=c.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=c.weight_decay,
        seed=c.seed,
        **(plain | quiet),
    )
    processor = Processor(start.family.image_processor, start.tokenizer, chat_template=start.tokenizer.chat_template)
    lora = copy.deepcopy(ours.policy.model.peft_config["default"])
    trainer = Timed(start.model, agreement, settings, dataset, processing_class=processor, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()
    return turns


def summarise(steps: list[dict]) -> dict[str, float]:
    """Seconds are medians over steps, tokens are those of the responses, per second of the whole step."""
    seconds = [step["seconds"] for step in steps]
    medians = {part: statistics.median(step[part] for step in steps) for part in ("seconds", "rollout", "update")}
    means = {name: statistics.mean(step[name] for step in steps) for name in ("tokens", "length", "trained")}
    rate = means["tokens"] / statistics.mean(seconds)
    return medians | means | {"fastest": min(seconds), "slowest": max(seconds), "tokens_per_second": rate}


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def table(result: dict) -> str:
    lines = [f"{'':12}{'s/step':>8}{'min..max':>13}{'rollout':>9}{'update':>8}{'tok/s':>8}{'length':>8}{'trained':>9}"]
    for name, s in result["sides"].items():
        lines.append(
            f"{name:12}{s['seconds']:8.3f}{s['fastest']:7.2f}..{s['slowest']:4.2f}{s['rollout']:9.3f}{s['update']:8.3f}"
            f"{s['tokens_per_second']:8.0f}{s['length']:8.1f}{s['trained']:9.0%}"
        )
    tried = (f"{seconds:.2f} s a step in {n} micro-batches" for n, seconds in result["trl_tried"].items())
    versions = (f"{name} {number}" for name, number in result["versions"].items())
    lines.append("TRL / upt: " + ", ".join(f"{part} {value:.2f}" for part, value in result["ratio"].items()))
    lines += [f"TRL tried: {', '.join(tried)}", ", ".join([result["hardware"], "float32", *versions])]
    return "\n".join(lines) + "\nload average {:.2f} before, {:.2f} after".format(*result["load"])


def main(config: Config) -> dict:
    """Measure, print the table and return what `--save` writes."""
    if find_spec("trl") is None:
        sys.exit("TRL is not installed: pip install -r requirements-bench.txt")
    if bad := [n for n in config.trl_accumulation if n < 1 or config.questions * config.group_size % n]:
        raise SettingError(
            f"--trl-accumulation {bad[0]} does not divide questions x group size, the responses of a step"
        )
    before, tried = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, Path(folder) / "run")
        for n in config.trl_accumulation:
            tried[n] = summarise(run_trl(ours, n, config.warmup + 3).steps[config.warmup :])["seconds"]
        turns = run_trl(ours, min(tried, key=tried.get), config.warmup + config.steps, alternate=True)
    steps = {"upt": turns.our_steps[config.warmup :], f"TRL {version('trl')}": turns.steps[config.warmup :]}
    upt, trl = sides = [summarise(side) for side in steps.values()]
    result = {
        "config": asdict(config) | {"max_new_tokens": ours.config.max_new_tokens},
        "sides": dict(zip(steps, sides, strict=True)),
        "ratio": {part: trl[part] / upt[part] for part in ("seconds", "rollout", "update")},
        "trl_tried": tried,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "load": [before, os.getloadavg()[0]],
        "steps": steps,
    }
    print(table(result))
    if config.save:
        path = Path(__file__).parent / f"results/loop-{strftime('%Y-%m-%d')}-cpu.json"
        write_whole(path, [json.dumps(result, indent=1).encode()])
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
