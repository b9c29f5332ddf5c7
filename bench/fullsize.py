"""One step of the loop at full size, with our kernels and without: sampled tokens per second, seconds, peak memory.

The model has the real configuration of its namesake and random weights, made on the device: nothing is downloaded. Its
prompts have a random picture; it never means to stop, so all responses reach the limit, but for chance.

    python -m bench.fullsize --model qwen2.5-vl-7b-random --save

    kernels    the loop as it is: Triton on a GPU
    eager      the same loop with log_softmax over whole logits, softmax and multinomial in their place

Rollout is the vision tower, prefill and sampling; update is forward, backward, clipping and AdamW on the LoRA adapter,
with alternating advantages. Each way trains the responses that it sampled. The first step of either is not timed.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, strftime
from typing import Literal
from unittest.mock import patch

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_upt
from bench.cases import naive_linear
from bench.loop import hardware
from upt import data
from upt.errors import SettingError
from upt.files import write_whole
from upt.model import policy, update
from upt.model.families import Qwen
from upt.prompts import template
from upt.ranges import Count
from upt.reckoning.published import CONFIGS
from upt.run import cli
from upt.run.typed import Typed
from upt.stages import sampling
from upt.warmup import tiny

PIXELS = 28  # a token of the language model is a square of this side in the picture

MODELS = {
    "qwen2.5-vl-7b-random": CONFIGS["Qwen/Qwen2.5-VL-7B-Instruct"],
    "qwen2.5-vl-3b-random": CONFIGS["Qwen/Qwen2.5-VL-3B-Instruct"],
    "tiny-random": {  # to try this script without a GPU
        "text_config": {
            "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 1024,
        },
        "vision_config": {
            "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1],
            "out_hidden_size": 256, "patch_size": 14,
        },
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass
class Config(Typed):
    model: Literal["qwen2.5-vl-7b-random", "qwen2.5-vl-3b-random", "tiny-random"] = "qwen2.5-vl-7b-random"
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


def build(config: Config, device: str) -> policy.Policy:
    """The model with random weights, a small tokenizer with Qwen's special tokens, and a fresh adapter."""
    published = MODELS[config.model]
    language, tied = published["text_config"], published["tie_word_embeddings"]
    tokenizer = tiny.make_tokenizer([template("think-boxed")])
    token_id = tokenizer.convert_tokens_to_ids
    size = language["hidden_size"] // language["num_attention_heads"]  # of a head
    sections = [size // 8, size * 3 // 16, size * 3 // 16]
    architecture = Qwen2_5_VLConfig(
        text_config=language
        | {
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        },
        vision_config=published["vision_config"],
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pixels = config.image_tokens * PIXELS**2
    with TemporaryDirectory() as folder:
        Qwen2VLImageProcessorPil().save_pretrained(folder)
        family = Qwen(folder, pixels, pixels)
    found = policy.Policy(model, tokenizer, family)
    found.add_lora(64, 128)
    return found


def eager_linear(hidden, weight, ids, temperature=1.0):
    logprob = naive_linear(hidden, weight, ids, temperature)
    return logprob, torch.zeros_like(logprob).detach()


def eager_sample(logits, temperature, row_ids, position, banned, statistics, **cut):
    """Without cutting, which this benchmark does not do; the same four results."""
    scores = logits.float() / temperature
    allowed = scores.index_fill(1, torch.tensor(banned, device=scores.device), float("-inf"))
    token = torch.multinomial(allowed.softmax(-1), 1)
    logp = scores.log_softmax(-1)
    return token[:, 0], logp.gather(1, token)[:, 0], -(logp.exp() * logp).sum(-1), -logp.mean(-1)


WAYS = {
    "kernels": {},
    "eager": {"upt.model.policy.linear_logprob": eager_linear, "upt.model.decoding.sample": eager_sample},
}


class Loop:
    """One policy, its questions and its optimizer."""

    def __init__(self, config: Config, device: str):
        self.config, self.device, self.policy = config, device, build(config, device)
        height, width = config.image_tokens // 32 * PIXELS, 32 * PIXELS
        noise = torch.randint(256, (config.questions, height, width, 3), dtype=torch.uint8)
        self.questions = [
            data.Question(f"full/{i}", "How many?", None, image=Image.fromarray(noise[i].numpy()), gold=None)
            for i in range(config.questions)
        ]
        self.settings = train_upt.Config(
            model=config.model, temperature=1.0, top_p=1.0, seed=0, group_size=config.group_size, minibatches=1,
            max_new_tokens=config.max_new_tokens, slots=config.slots,
            update_tokens=config.update_tokens, kl_coef=0.0, clip_low=0.2, clip_high=0.2, dual_clip=0.0,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.policy.trainable(), 1e-5, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0)
        self.clock()

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def peak_gb(self) -> float | None:
        """The most memory held since the last call."""
        if self.device != "cuda":
            return None
        found = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return found

    def step(self, number: int) -> dict[str, float | None]:
        self.peak_gb()
        start = self.clock()
        with torch.no_grad():
            prompts, _ = self.policy.encode(self.questions, template("think-boxed"))
            sampled = sampling.sample_groups(self.policy, prompts, number, self.settings)
        middle, rollout_gb = self.clock(), self.peak_gb()
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
        update.update(self.policy, self.optimizer, self.schedule, prompts, groups, self.settings, measure_kl=False)
        end = self.clock()
        tokens = sum(len(s.ids) for group in sampled for s in group)
        return {
            "rollout_s": middle - start,
            "tokens_per_second": tokens / (middle - start),
            "update_s": end - middle,
            "rollout_peak_gb": rollout_gb,
            "update_peak_gb": self.peak_gb(),
            "prompt_tokens": len(prompts[0].ids),
            "tokens": tokens,
        }


def main(config: Config) -> dict:
    """Measure, print the table and return what `--save` writes."""
    if config.image_tokens % 32:
        raise SettingError(f"--image-tokens must be a multiple of 32, not {config.image_tokens}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else hardware()
    loop, steps = Loop(config, device), {}
    parameters = sum(p.numel() for p in loop.policy.model.parameters())
    print(f"{config.model}: {parameters / 1e9:.2f} billion parameters on {machine}", file=sys.stderr)
    for way, replaced in WAYS.items():
        with ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(patch(name, function))
            try:
                steps[way] = [loop.step(number) for number in range(config.steps + 1)][1:]
            except Exception as error:  # a failure of one is a result beside the other's
                steps[way] = f"{type(error).__name__}: {error}".splitlines()[0]
        loop.optimizer.zero_grad()
    result = {
        "date": strftime("%Y-%m-%d"),
        "hardware": machine,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "triton")},
        "config": asdict(config),
        "parameters": parameters,
        "steps": steps,
    }
    print(table(result))
    if config.save:
        path = Path(__file__).parent / f"results/fullsize-{config.model}-{result['date']}-{device}.json"
        write_whole(path, [json.dumps(result, indent=1).encode()])
    if isinstance(steps["kernels"], str):
        raise SystemExit(f"the loop with our kernels failed: {steps['kernels']}")
    return result


def table(result: dict) -> str:
    """The fastest step of either way."""
    lines = [f"{'':10}{'rollout s':>11}{'tok/s':>9}{'peak GB':>9}{'update s':>10}{'peak GB':>9}"]
    for way, steps in result["steps"].items():
        if isinstance(steps, str):
            lines.append(f"{way:10}{steps}")
            continue
        best = min(steps, key=lambda step: step["rollout_s"] + step["update_s"])
        gb = [f"{best[name]:9.1f}" if best[name] else f"{'-':>9}" for name in ("rollout_peak_gb", "update_peak_gb")]
        figures = f"{best['rollout_s']:11.2f}{best['tokens_per_second']:9.0f}{gb[0]}{best['update_s']:10.2f}{gb[1]}"
        lines.append(f"{way:10}{figures}")
    return "\n".join([*lines, result["hardware"], str(result["versions"])])


if __name__ == "__main__":
    cli.launch(main, Config)
