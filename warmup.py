"""Make the embedded default model: a tiny Qwen2.5-VL, trained from scratch on `shapes` with labels.

    1. tokenizer: byte-level BPE on the demonstrations, with Qwen's special tokens
    2. model: the real Qwen2_5_VLForConditionalGeneration, 1.5 M parameters, random weights
    3. clean phase: supervised training on step-by-step demonstrations that are right
    4. mixed phase: demonstrations of mixed quality, half of them quick guesses (30 % wrong), half step by step with
       some misreadings (8 %); the model learns both manners, and its samples disagree
    5. write a snapshot as on the hub, with the scores after both phases in warmup.json

Label-free training starts from the mixed model. What it can win back is the more reliable manner, not new sight, so
the score of the clean phase is kept beside it. Choices here were made on the validation split.

    python warmup.py --out models/tiny
"""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import presets
import rollout
import shapes
from eval import heldout
from policy import Policy, Row, layout
from shards import write_whole

STYLES = ("think-boxed", "boxed")  # prompts; a quarter of the demonstrations are in the second
DESCRIBE = "Describe the picture."
SAMPLING = ("temperature", "top_p", "group_size", "max_new_tokens", "prompt", "max_prompt_tokens")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass
class Config:
    out: Path = Path("models/tiny")
    """folder to write the snapshot to"""
    seed: int = 0
    """initial weights and demonstrations"""
    clean_steps: int = 400
    """updates on right demonstrations"""
    mixed_steps: int = 100
    """updates on demonstrations of mixed quality"""
    batch: int = 32
    """pictures in one update, each with two or three questions"""
    learning_rate: float = 2e-3
    """peak of the clean phase; the vision tower's first layer takes a tenth"""
    mixed_learning_rate: float = 6e-4
    """peak of the mixed phase"""
    guess_share: float = 0.5
    """share of quick guesses in the mixed phase"""
    guess_wrong: float = 0.3
    """share of quick guesses that are wrong"""
    misread: float = 0.08
    """share of step-by-step demonstrations, in the mixed phase, with one misread number"""
    eval_questions: int = 512
    """validation questions for the scores after each phase"""
    eval_samples: int = 4
    """samples for each of them"""


def demonstrate(item: shapes.Item, prompt: str, facts: tuple[int, ...] | None = None) -> str:
    """A step-by-step response in the format that the prompt asks for, from the facts as read (default: rightly)."""
    reasoning, answer = shapes.worked(item.kind, item.names, item.facts if facts is None else facts)
    if prompt == "think-boxed":
        return f"<think>{reasoning}</think>\\boxed{{{answer}}}"
    return f"{reasoning} \\boxed{{{answer}}}"


def demonstrate_mixed(item: shapes.Item, prompt: str, rng: random.Random, config: Config) -> str:
    """A response as of a hasty pupil: a guess without reasoning, or the steps, sometimes with a number misread."""
    if rng.random() < config.guess_share:
        step = 10 if item.kind == "angle" else 1
        answer = int(item.gold)
        if rng.random() < config.guess_wrong:
            answer = max(0, answer + step * rng.choice((-2, -1, 1, 2)))
        return f"<think>by eye</think>\\boxed{{{answer}}}" if prompt == "think-boxed" else f"\\boxed{{{answer}}}"
    facts = list(item.facts)
    if rng.random() < config.misread:
        index = rng.randrange(len(facts))
        facts[index] = max(0, facts[index] + (10 if item.kind == "angle" else 1) * rng.choice((-1, 1)))
    return demonstrate(item, prompt, tuple(facts))


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen's tokenizer (its splitting rules and special tokens) with a vocabulary of its own, about 400 tokens."""
    raw = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=512, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    raw.train_from_iterator(texts, trainer)
    learnt = json.loads(raw.to_str())["model"]
    vocab = {token: index for token, index in learnt["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: index for index, token in enumerate(sorted(vocab, key=vocab.get))}
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
    )


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 1.5 M parameters with random weights."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        # A small base, so that neighbouring places of a 3 x 3 grid of visual tokens are told apart.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 3,
        "intermediate_size": 256,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [2],
        "initializer_range": 0.05,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def lesson(policy: Policy, item: shapes.Item, response: str, style: str, describe: bool) -> tuple:
    """One picture's worth of supervision as a packed row: (row, pixels, which of its tokens are learnt).

    The picture is the row's prompt; its "responses" are the question followed by the response and, with `describe`,
    a request for a description followed by it.
    """
    prompt, pixels, _ = policy.encode_one(item, policy.template(style))
    cut = prompt.ids.index(policy.tokenizer.convert_tokens_to_ids("<|vision_end|>")) + 1
    row = Row(replace(prompt, ids=prompt.ids[:cut], positions=prompt.positions[:, :cut]), [], [])
    pairs, learnt = [(prompt.ids[cut:], response)], []
    if describe:
        asked = policy.tokenize(replace(item, question=DESCRIBE), "{question}")
        pairs.append((asked[asked.index(prompt.ids[cut - 1]) + 1 :], shapes.describe(item.scene)))
    for asked, text in pairs:
        answer = policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.tokenizer.eos_token_id]
        row.responses.append(asked + answer)
        learnt += [False] * len(asked) + [True] * len(answer)
    return row, pixels, learnt


def train(policy: Policy, lessons: Callable, steps: int, peak: float, batch: int, label: str) -> None:
    """Supervised training of all weights; `lessons(n)` is the n-th lesson."""
    model = policy.model
    model.requires_grad_(True).train()
    slow = [p for name, p in model.named_parameters() if "patch_embed" in name]
    rest = [p for name, p in model.named_parameters() if "patch_embed" not in name]
    groups = [{"params": rest, "lr": peak}, {"params": slow, "lr": 0.1 * peak}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    bar = tqdm(range(steps), desc=label, unit="step")
    for step in bar:
        rows, pixels, learnt = zip(*(lessons(step * batch + i) for i in range(batch)), strict=True)
        policy.see([(row.prompt, seen, None) for row, seen in zip(rows, pixels, strict=True)])
        ids, positions, mask, sources, targets = layout(rows)
        keep = torch.tensor([token for row in learnt for token in row])
        hidden = policy.hidden(ids, positions, mask, [row.prompt for row in rows])
        logits = hidden.flatten(0, 1)[sources[keep]] @ model.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits, targets[keep])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 10 == 9:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.requires_grad_(False).eval()


def main(config: Config) -> dict:
    """Train, write the snapshot and its scores; returns the scores by phase."""
    started = time.perf_counter()
    total = config.batch * (config.clean_steps + config.mixed_steps)
    items = list(shapes.questions("warmup", config.seed, total))
    validation = data.load("shapes", "validation", config.seed, limit=config.eval_questions)
    rng = random.Random(f"warmup/{config.seed}")
    texts = [Policy.template(style).replace("{question}", item.question) for item in items[:2000] for style in STYLES]
    texts += [demonstrate(item, style) for item in items[:2000] for style in STYLES]
    texts += [f"by eye user assistant {DESCRIBE} {shapes.describe(item.scene)}" for item in items[:500]]
    tokenizer = make_tokenizer(texts)
    with TemporaryDirectory() as folder:
        make_model(tokenizer, config.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # From 3 x 3 to 16 x 16 visual tokens; the pictures of `shapes` are used as they are.
        Qwen2VLImageProcessorPil(min_pixels=84 * 84, max_pixels=448 * 448).save_pretrained(folder)
        policy = Policy.load(folder, dtype="fp32", device="cpu")

    def style(n: int) -> str:
        return STYLES[n % 4 == 0]

    def clean(n: int) -> tuple:
        return lesson(policy, items[n], demonstrate(items[n], style(n)), style(n), describe=False)

    def mixed(n: int) -> tuple:
        item = items[config.batch * config.clean_steps + n]
        return lesson(policy, item, demonstrate_mixed(item, style(n), rng, config), style(n), describe=False)

    sampling = rollout.Config(model=presets.TINY_MODEL, seed=config.seed, **{k: presets.TINY[k] for k in SAMPLING})
    scores = {}
    phases = (
        ("clean", clean, config.clean_steps, config.learning_rate),
        ("mixed", mixed, config.mixed_steps, config.mixed_learning_rate),
    )
    for name, lessons, steps, peak in phases:
        train(policy, lessons, steps, peak, config.batch, name)
        scores[name] = heldout.evaluate(policy, validation, sampling, len(validation), config.eval_samples)
    policy.export(config.out)
    report = scores | {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "seconds": time.perf_counter() - started,
    }
    write_whole(config.out / "warmup.json", [json.dumps(report, indent=1).encode()])
    print(heldout.table({f"{name} phase": score for name, score in scores.items()}))
    print(f"{config.out}: {len(validation)} validation questions, {report['seconds']:.0f} s")
    return scores


if __name__ == "__main__":
    main(tyro.cli(Config))
