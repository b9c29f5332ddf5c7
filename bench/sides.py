"""The sides of bench/loop.py, each of which makes one step at a time: ours, TRL's `GRPOTrainer`, HF `generate`."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import datasets
import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PrinterCallback,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)

import rewards
import train_upt
from bench.memory import Resident
from upt import data
from upt.answers import vote_key
from upt.groups import shards
from upt.model import update
from upt.model.policy import Policy
from upt.prompts import template
from upt.run.metrics import Clock, Metrics
from upt.run.team import ALONE
from upt.stages import sampling, steps


@dataclass(frozen=True)
class Shape:
    questions: int
    group_size: int
    side: int | None = None  # of a picture in pixels; None: as it is drawn
    new_tokens: int | None = None  # of every response; None: until it stops, at most as many as train_upt.py has
    reward: str = "majority"


SHAPES = {"short": Shape(32, 8), "pictures": Shape(4, 16, 19 * 28, 64, "random")}


class Ours:
    """Our loop, as `train_upt.train` runs it; `config` is a Config of bench/loop.py."""

    def __init__(self, config, folder: Path):
        c = train_upt.Config(model=config.model, out=folder, seed=config.seed, device="cpu", minibatches=1)
        c.questions_per_step, c.group_size = config.questions, config.group_size
        shape = SHAPES[config.shape]
        if shape.side:
            c.min_pixels = c.max_pixels = shape.side**2
        c.max_new_tokens, c.reward = shape.new_tokens, shape.reward
        self.config = c.resolve()
        self.questions = data.load(c.data, c.split, c.seed)
        self.policy = Policy.load(c.model, device="cpu", min_pixels=c.min_pixels, max_pixels=c.max_pixels)
        if shape.new_tokens:
            never_stop(self.policy)
        self.policy.add_lora(c.lora_rank, c.lora_alpha, c.lora_targets, c.seed)
        adapter = self.policy.trainable()
        self.optimizer = torch.optim.AdamW(adapter, c.learning_rate, weight_decay=c.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0)
        folder.mkdir(parents=True)
        self.metrics = Metrics(folder / "metrics.jsonl", 0)
        self.prompts: list[list[int]] = []  # token ids of the latest step's prompts

    def step(self, number: int) -> dict[str, float]:
        c, start, clock = self.config, perf_counter(), Clock()
        found = steps.sampled(self.policy, self.questions, number, c, clock, lambda *_: None, ALONE)
        prompts = [*found.prompts.values()]
        groups = rewards.score(found.groups, c.reward, c.advantage, c.seed)
        shards.write_shard(shards.shard_path(c.out / "rollouts", number), groups)
        middle = perf_counter()
        stats = update.update(self.policy, self.optimizer, self.schedule, prompts, groups, c, measure_kl=False)
        self.metrics.write(number, groups, stats, clock.seconds, {"left_out": len(found.left_out)})
        end, self.prompts = perf_counter(), [prompt.ids for prompt in prompts]
        responses = [response for group in groups for response in group["responses"]]
        trained = sum(response["advantage"] != 0 for response in responses)
        return record(start, middle, end, sum(len(r["token_ids"]) for r in responses), len(responses), trained)


def never_stop(policy: Policy) -> None:
    """Make the placeholder of pictures, which is never sampled, the token that ends a response."""
    token = policy.base.config.image_token_id
    policy.base.generation_config.eos_token_id = token
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(token)


class Processor(Qwen2_5_VLProcessor):
    get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])  # video needs torchvision


def plain(ours: Ours) -> tuple:
    """The transformers model that we start from, and its processor, with our side's pictures and stop tokens."""
    policy = ours.policy
    model = AutoModelForImageTextToText.from_pretrained(
        ours.config.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = policy.base.generation_config.eos_token_id
    images, tokenizer = copy.deepcopy((policy.family.image_processor, policy.tokenizer))
    limits = policy.family.area_limits()
    images.size = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
    return model, Processor(images, tokenizer, chat_template=tokenizer.chat_template)


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]


class Generate:
    """A rollout by HF `generate`, of the questions of our side's steps."""

    def __init__(self, ours: Ours):
        self.ours, self.prompts = ours, []
        self.model, self.processor = plain(ours)
        c = ours.config
        self.settings = GenerationConfig(
            do_sample=True,
            temperature=c.temperature,
            top_k=0,
            max_new_tokens=c.max_new_tokens,
            num_return_sequences=c.group_size,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            suppress_tokens=[self.model.config.image_token_id],
            disable_compile=True,
        )

    def step(self, number: int) -> dict[str, float]:
        c, ours, tokenizer = self.ours.config, self.ours, self.processor.tokenizer
        rows = sampling.schedule(len(ours.questions), c.questions_per_step, c.seed, number)
        asked = ours.questions.get(rows)
        pictures = [question.image for question in asked]
        texts = [template(c.prompt).replace("{question}", question.question) for question in asked]
        texts = [ours.policy.chat([("user", text)], with_image=True) for text in texts]
        start = perf_counter()
        inputs = self.processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
        found = self.model.generate(**inputs, generation_config=self.settings)
        ids = found[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(ids, skip_special_tokens=True)
        end = perf_counter()
        self.prompts = unpadded(inputs["input_ids"], inputs["attention_mask"])
        stopped = (ids == self.settings.eos_token_id).cumsum(1)
        tokens = int((stopped == 0).sum() + (stopped.amax(1) > 0).sum())  # with the stop token
        return record(start, end, end, tokens, len(ids), 0)


class Turns(TrainerCallback):
    """Times the trainer's steps. Before each of them every one of `others`, our side first, makes a step."""

    def __init__(self, others: dict[str, Ours | Generate], copies: int):
        self.others, self.copies = others, copies  # of a prompt in the trainer's batch
        self.steps, self.other_steps = [], {name: [] for name in others}
        self.start, self.middle, self.batch, self.resident = 0.0, 0.0, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.resident = Resident() if sys.platform == "linux" else None
        self.turn()

    def turn(self):
        for name, other in self.others.items():
            self.other_steps[name].append(other.step(len(self.steps)))
        self.start = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        end, mask = perf_counter(), self.batch["completion_mask"]
        self.steps.append(record(self.start, self.middle, end, int(mask.sum()), len(mask), len(mask)))
        theirs = unpadded(self.batch["prompt_ids"], self.batch["prompt_mask"])
        for other in self.others.values():
            if theirs != [ids for ids in other.prompts for _ in range(self.copies)]:
                raise RuntimeError("the sides were given different prompts: the comparison would mean nothing")
        if state.global_step < state.max_steps:
            self.turn()


def record(start: float, middle: float, end: float, tokens: int, responses: int, trained: int) -> dict[str, float]:
    """One step of one side: seconds, sampled tokens, their mean number, the share of responses in the update."""
    seconds = {"seconds": end - start, "rollout": middle - start, "update": end - middle}
    return seconds | {"tokens": tokens, "length": tokens / responses, "trained": trained / responses}


def run_trl(ours: Ours, accumulation: int, steps: int, others: dict[str, Ours | Generate] | None = None) -> Turns:
    """Train with TRL for some steps, in our side's settings; it takes turns with the others."""
    from trl import GRPOConfig, GRPOTrainer  # not in requirements.txt

    c, turns = ours.config, Turns(others or {}, ours.config.group_size)

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            turns.batch = super()._generate_and_score_completions(inputs)
            turns.middle = perf_counter()
            return turns.batch

    def reward(completions, **kwargs) -> list[float]:
        responses = [{"key": vote_key(turn[0]["content"])} for turn in completions]
        starts = range(0, len(responses), c.group_size)
        groups = [{"step": len(turns.steps), "uid": i, "responses": responses[i : i + c.group_size]} for i in starts]
        return [value for group in groups for value in rewards.REWARDS[c.reward](group)]

    def examples(batch: dict) -> dict:
        asked = [questions[row] for row in batch["row"]]
        prompts = [[{"role": "user", "content": wording.replace("{question}", q.question)}] for q in asked]
        return {"prompt": prompts, "image": [q.image for q in asked]}

    wording, size = template(c.prompt), c.questions_per_step * c.group_size
    order = [sampling.schedule(len(ours.questions), c.questions_per_step, c.seed, step) for step in range(steps)]
    questions = ours.questions.get(row for rows in order for row in rows)
    dataset = datasets.Dataset.from_dict({"row": range(len(questions))}).with_transform(examples)
    # TRL's defaults are ours already: one iteration, dapo loss (the mean over tokens), group-scaled rewards, clip 0.2,
    # beta 0, top-p 1, gradient norm 1, fused AdamW.
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    slow_off = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "shuffle_dataset": False}
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
        **(slow_off | quiet),
    )
    model, processor = plain(ours)
    lora = copy.deepcopy(ours.policy.model.peft_config["default"])
    trainer = Timed(model, reward, settings, dataset, processing_class=processor, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()
    return turns
