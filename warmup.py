r"""Make the embedded default model: a tiny Qwen2.5-VL, trained from scratch on `shapes` with labels.

    1. tokenizer: byte-level BPE on the demonstrations, with Qwen's special tokens
    2. model: the real Qwen2_5_VLForConditionalGeneration, 1.5 M parameters, random weights
    3. clean phase: supervised training on step-by-step demonstrations that are right
    4. mixed phase: half of the demonstrations are quick guesses without reasoning, most of them wrong; the model
       learns both manners, and its samples disagree; it learns to judge, from right and wrong candidates, and to ask,
       from questions about pictures of their own (synthesize.py)
    5. write a snapshot as on the hub, with the scores after both phases in warmup.json

A judge's lesson is a candidate, prompts/judge-tiny.md's question and the verdict, \boxed{9/9} or \boxed{0/9}. It stands
behind the response that is taught anyway and behind a poor one, so it costs a few tokens and no picture. Candidates are
about as often right as the mixed model's own samples are: steps half of the time, guesses one time in four.

Label-free training starts from the mixed model. What it can win back is the more reliable manner, not new sight, so
the score of the clean phase is kept beside it. Choices here were made on the validation split.

    python warmup.py --out models/tiny
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
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
import judge
import presets
import rollout
import shapes
import synthesize
from answers import vote_key
from eval import heldout
from policy import Policy, Prompt, Row, layout, packed_mask
from shards import write_whole

STYLES = ("think-boxed", "boxed")  # prompts; a quarter of the demonstrations are in the second
MODES = ("direct", "in-context")  # of asking
PLAUSIBLE = {"angle": range(20, 150, 10), "length": range(4, 19)}  # answers that a guess may give; others are 0 to 9
READABLE = {"angle": range(20, 90, 10), "length": range(2, 10), "bars": range(1, 5)}  # numbers in a picture
SAMPLING = ("temperature", "top_p", "group_size", "max_new_tokens", "prompt", "max_prompt_tokens", "rollout_tokens")
QUESTION_WEIGHT = 0.05  # of a question's tokens in the clean phase
VERDICT_WEIGHT = 0.3  # of a verdict's tokens in the loss; from 0.1 to 1 it made little difference
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
    questions: int | None = None
    """labelled questions, used over and over where there are more lessons; None: a new one for each lesson"""
    clean_steps: int = 300
    """updates on right demonstrations"""
    mixed_steps: int = 160
    """updates on demonstrations of mixed quality"""
    asking: int = 4
    """pictures to ask about in one update of the mixed phase, besides the questions to answer"""
    batch: int = 32
    """questions in one update"""
    learning_rate: float = 4e-3
    """peak of the clean phase, for Muon; AdamW takes half of it, and the vision tower's first layer a tenth of that"""
    mixed_learning_rate: float = 6e-4
    """peak of the mixed phase, for AdamW"""
    guess_share: float = 0.5
    """share of quick guesses in the mixed phase"""
    guess_wrong: float = 0.6
    """share of quick guesses that are any plausible number instead of the right one"""
    eval_questions: int = 256
    """validation questions for the scores after each phase"""
    eval_samples: int = 2
    """samples for each of them"""


def demonstrate(item: shapes.Item, prompt: str) -> str:
    """A right step-by-step response in the format that the prompt asks for."""
    reasoning, answer = shapes.worked(item.kind, item.names, item.facts)
    if prompt == "think-boxed":
        return f"<think>{reasoning}</think>\\boxed{{{answer}}}"
    return f"{reasoning} \\boxed{{{answer}}}"


def misread(item: shapes.Item, prompt: str, rng: random.Random) -> str:
    """A step-by-step response that takes one number of the picture for another."""
    facts = list(item.facts)
    place = rng.randrange(len(facts))
    near = [facts[place] + step for step in (-2, -1, 1, 2) if facts[place] + step >= 0]
    facts[place] = rng.choice([n for n in READABLE.get(item.kind, near) if n != facts[place]])
    return demonstrate(replace(item, facts=tuple(facts)), prompt)


def guess(item: shapes.Item, prompt: str, answer) -> str:
    """A response without reasoning."""
    return f"<think>by eye</think>\\boxed{{{answer}}}" if prompt == "think-boxed" else f"\\boxed{{{answer}}}"


def wrong_guess(item: shapes.Item, rng: random.Random):
    return rng.choice(PLAUSIBLE.get(item.kind, range(10)))


def poor_candidate(item: shapes.Item, rng: random.Random) -> str:
    """A candidate for the judge to look through: steps from a misreading, or a guess, which may happen to be right."""
    if rng.random() < 0.5:
        return misread(item, "think-boxed", rng)
    return guess(item, "think-boxed", wrong_guess(item, rng))


def demonstrate_mixed(item: shapes.Item, prompt: str, rng: random.Random, config: Config) -> str:
    """A response as of a hasty pupil: a guess without reasoning, or the steps."""
    if rng.random() >= config.guess_share:
        return demonstrate(item, prompt)
    return guess(item, prompt, wrong_guess(item, rng) if rng.random() < config.guess_wrong else item.gold)


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


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/): momentum whose singular values are brought close to one.

    For matrices. Updates are scaled to the size of AdamW's, so that both take the same learning rate. torch.optim.Muon
    iterates in bfloat16, which takes a CPU ten times as long as float32 for matrices of this size, one at a time.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(average, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of each of (N, A, B) to about one, by five Newton-Schulz iterations."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


@dataclass
class Lesson:
    """A prompt, its picture, and responses to it with the weight of each of their tokens in the loss."""

    prompt: Prompt
    pixels: torch.Tensor
    responses: list[list[int]]
    weights: list[list[float]]


def lesson(policy: Policy, item: shapes.Item, style: str, text: str) -> Lesson:
    """A question in the prompt style `style`, answered by `text`."""
    prompt, pixels, _ = policy.encode_one(item, policy.template(style))
    response = [*policy.tokens(text), policy.tokenizer.eos_token_id]
    return Lesson(prompt, pixels, [response], [[1.0] * len(response)])


def with_question(policy: Policy, made: Lesson, item: shapes.Item) -> Lesson:
    """A lesson in which the question has to be foreseen, too, from the picture before it."""
    ids, start = made.prompt.ids, made.prompt.ids.index(policy.tokens("<|vision_end|>")[0]) + 1
    prompt = replace(made.prompt, ids=ids[:start], positions=made.prompt.positions[:, :start])
    asked = len(policy.tokens(item.question))
    weights = [QUESTION_WEIGHT] * asked + [0.0] * (len(ids) - start - asked) + made.weights[0]
    return Lesson(prompt, made.pixels, [ids[start:] + made.responses[0]], [weights])


def add_verdicts(policy: Policy, made: Lesson, item: shapes.Item, poor: str) -> Lesson:
    """A `think-boxed` lesson with a judge's verdict behind its response, and behind `poor`, which is not taught itself.

    Prompt and response are what the judge's prompt starts with, so the verdict takes a few tokens more and no picture.
    """
    end = policy.tokenizer.eos_token_id
    _, ask = judge.frame(policy, judge.template(presets.TINY["judge_prompt"]), item, True)
    ask = policy.tokens(ask)[1:]  # its first token closes the candidate's turn, as the last of a response does
    taught = [*zip(made.responses, made.weights, strict=True), ([*policy.tokens(poor), end], None)]
    responses, weights = [], []
    for response, weight in taught:
        right = vote_key(policy.tokenizer.decode(response)) == item.gold
        verdict = [*policy.tokens(f"\\boxed{{{9 * right}/9}}"), end]
        responses.append(response + ask + verdict)
        weights.append((weight or [0.0] * len(response)) + [0.0] * len(ask) + [VERDICT_WEIGHT] * len(verdict))
    return Lesson(made.prompt, made.pixels, responses, weights)


def asking_lesson(policy: Policy, item: shapes.Item, mode: str, texts: list[str]) -> Lesson:
    """The picture, in context with its question, answered by each of the questions `texts`."""
    made = synthesize.shown(policy, item, synthesize.asking(mode))
    prompt, pixels, _ = policy.encode_one(made, "{question}")
    responses = [[*policy.tokens(text), policy.tokenizer.eos_token_id] for text in texts]
    return Lesson(prompt, pixels, responses, [[1.0] * len(response) for response in responses])


def train(
    policy: Policy, lessons: Iterable[list[Lesson]], steps: int, optimizers: list, end: float, label: str
) -> None:
    """Supervised training of all weights, one update for each batch of `lessons`.

    Learning rates rise over 30 updates, stay, and fall along a line over the last 70 % to `end` times their peak.
    """
    if steps == 0:
        return

    def rate(step: int) -> float:
        return min(1, (step + 1) / min(30, steps), end + (1 - end) * (steps - step) / (0.7 * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model = policy.model.train()
    bar = tqdm(lessons, desc=label, unit="step", total=steps)
    for step, batch in enumerate(bar):
        policy.see([(lesson.prompt, lesson.pixels, None) for lesson in batch])
        ids, positions, segment, sources, targets = layout([Row(x.prompt, x.responses, []) for x in batch])
        hidden = policy.hidden(ids, positions, packed_mask(segment), [lesson.prompt for lesson in batch])
        logits = hidden.flatten(0, 1)[sources] @ model.lm_head.weight.T
        weights = torch.tensor([w for lesson in batch for response in lesson.weights for w in response])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 10 == 9:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def muon_and_adamw(model, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW at half its rate for the rest, at a twentieth for the vision tower's first layer."""
    named = dict(model.named_parameters())
    slow = [p for name, p in named.items() if "patch_embed" in name]
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    taken = {*slow, *matrices}
    rest = [p for p in named.values() if p not in taken]
    return [Muon(matrices, peak), adamw([{"params": rest, "lr": peak / 2}, {"params": slow, "lr": peak / 20}])]


def adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def main(config: Config) -> dict:
    """Train, write the snapshot and its scores; returns the scores by phase."""
    if min(config.eval_questions, config.eval_samples, config.batch, config.questions or 1) < 1:
        raise ValueError("--batch, --questions, --eval-questions and --eval-samples must be at least 1")
    started = time.perf_counter()
    answered = config.batch * (config.clean_steps + config.mixed_steps)
    total = min(answered + config.asking * config.mixed_steps, config.questions or 2**31)
    items = list(shapes.questions("warmup", config.seed, total))
    validation = data.load("shapes", "validation", config.seed, limit=config.eval_questions)
    rng, rng_asking = random.Random(f"warmup/{config.seed}"), random.Random(f"warmup/asking/{config.seed}")
    texts = [Policy.template(style).replace("{question}", item.question) for item in items[:2000] for style in STYLES]
    texts += [demonstrate(item, style) for item in items[:2000] for style in STYLES]
    asked = judge.template(presets.TINY["judge_prompt"])[-1][1]
    texts += ["by eye user assistant", "\\boxed{9/9} \\boxed{0/9}", asked, *map(synthesize.asking, MODES)] * 2000
    tokenizer = make_tokenizer(texts)
    with TemporaryDirectory() as folder:
        make_model(tokenizer, config.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # From 3 x 3 to 16 x 16 visual tokens; the pictures of `shapes` are used as they are.
        Qwen2VLImageProcessorPil(min_pixels=84 * 84, max_pixels=448 * 448).save_pretrained(folder)
        policy = Policy.load(folder, dtype="fp32", device="cpu")

    def clean(n: int) -> Lesson:
        style = STYLES[n % 4 == 0]
        return with_question(policy, lesson(policy, items[n], style, demonstrate(items[n], style)), items[n])

    def mixed(n: int) -> Lesson:
        item, style = items[n], STYLES[n % 4 == 0]
        made = lesson(policy, item, style, demonstrate_mixed(item, style, rng, config))
        return add_verdicts(policy, made, item, poor_candidate(item, rng)) if style == "think-boxed" else made

    def asking(n: int) -> Lesson:
        item = items[(answered + n) % len(items)]
        # A picture that has one question only is to get it again: filters.py knows a repetition.
        other, second = (shapes.ask_else(item, rng_asking) or item.question for _ in range(2))
        mode, first = ("in-context", other) if n % 2 else ("direct", item.question)
        return asking_lesson(policy, item, mode, [first, second])

    def lessons(first: int, steps: int, make: Callable[[int], Lesson], asked: int = 0) -> Iterator[list[Lesson]]:
        for step in range(first, first + steps):
            answering = [make(n % len(items)) for n in range(step * config.batch, (step + 1) * config.batch)]
            yield answering + [asking(n) for n in range((step - first) * asked, (step - first + 1) * asked)]

    sampling = rollout.Config(model=presets.TINY_MODEL, seed=config.seed, **{k: presets.TINY[k] for k in SAMPLING})

    def score() -> dict:
        return heldout.evaluate(policy, validation, sampling, len(validation), config.eval_samples)

    model, scores = policy.model.requires_grad_(True), {}
    optimizers = muon_and_adamw(model, config.learning_rate)
    # The clean phase ends while there is still something to learn, and the mixed one goes on with it.
    train(policy, lessons(0, config.clean_steps, clean), config.clean_steps, optimizers, 0.25, "clean")
    scores["clean"] = score()
    optimizers = [adamw([{"params": list(model.parameters()), "lr": config.mixed_learning_rate}])]
    lessons_mixed = lessons(config.clean_steps, config.mixed_steps, mixed, config.asking)
    train(policy, lessons_mixed, config.mixed_steps, optimizers, 0.0, "mixed")
    scores["mixed"] = score()
    model.requires_grad_(False)
    (config.out / "warmup.json").unlink(missing_ok=True)  # until the new one is whole, there is no warmed-up model
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
