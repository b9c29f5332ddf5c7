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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from eval import heldout
from upt import data, model, prompts, warmup
from upt.data import shapes
from upt.errors import SettingError
from upt.files import write_whole
from upt.ranges import Count, Few, Number, Rate, Seed, Share
from upt.run import cli, presets
from upt.run.locking import alone
from upt.run.settings import Rollout
from upt.run.typed import Typed
from upt.warmup.demonstrations import MODES, STYLES, demonstrate, demonstrate_mixed, poor_candidate

SAMPLING = ("temperature", "top_p", "group_size", "max_new_tokens", "prompt", "max_prompt_tokens")


@dataclass
class Config(Typed):
    out: Path = Path("models/tiny")
    """folder to write the snapshot to"""
    seed: Seed = 0
    """initial weights and demonstrations"""
    questions: Count | None = None
    """labelled questions, used over and over where there are more lessons; None: a new one for each lesson"""
    clean_steps: Number = 300
    """updates on right demonstrations"""
    mixed_steps: Number = 160
    """updates on demonstrations of mixed quality"""
    asking: Number = 4
    """pictures to ask about in one update of the mixed phase, besides the questions to answer"""
    batch: Count = 32
    """questions in one update"""
    learning_rate: Rate = 4e-3
    """peak of the clean phase, for Muon; AdamW takes half of it, and the vision tower's first layer a tenth of that"""
    mixed_learning_rate: Rate = 6e-4
    """peak of the mixed phase, for AdamW"""
    guess_share: Share = 0.5
    """share of quick guesses in the mixed phase"""
    guess_wrong: Share = 0.6
    """share of quick guesses that are any plausible number instead of the right one"""
    eval_questions: Count = 256
    """validation questions for the scores after each phase"""
    eval_samples: Few = 2
    """samples for each of them"""


@alone
def main(config: Config) -> dict:
    """Train, write the snapshot and its scores; returns the scores by phase."""
    config = replace(config)
    if config.clean_steps + config.mixed_steps == 0:
        raise SettingError("--clean-steps 0 and --mixed-steps 0 teach nothing: give one of them some updates")
    lessons, muon, tiny = warmup.lessons, warmup.muon, warmup.tiny
    started = time.perf_counter()
    updates = f"{config.clean_steps} + {config.mixed_steps} updates, some minutes"
    print(f"making the tiny model in {config.out}, with labels: {updates}", flush=True)
    answered = config.batch * (config.clean_steps + config.mixed_steps)
    total = min(answered + config.asking * config.mixed_steps, config.questions or 2**31)
    items = list(shapes.questions("warmup", config.seed, total))
    validation = data.load("shapes", "validation", config.seed, limit=config.eval_questions)
    rng, rng_asking = random.Random(f"warmup/{config.seed}"), random.Random(f"warmup/asking/{config.seed}")
    texts = [prompts.template(style).replace("{question}", item.question) for item in items[:2000] for style in STYLES]
    texts += [demonstrate(item, style) for item in items[:2000] for style in STYLES]
    asked = prompts.judge_turns(presets.TINY["judge_prompt"])[-1][1]
    texts += ["by eye user assistant", "\\boxed{9/9} \\boxed{0/9}", asked, *map(prompts.asking, MODES)] * 2000
    tokenizer = tiny.make_tokenizer(texts)
    with TemporaryDirectory() as folder:
        tiny.make_model(tokenizer, config.seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tiny.make_processor().save_pretrained(folder)
        policy = model.Policy.load(folder, dtype="fp32", device="cpu")

    def clean(n: int):
        style = STYLES[n % 4 == 0]
        return lessons.with_question(
            policy, lessons.lesson(policy, items[n], style, demonstrate(items[n], style)), items[n]
        )

    def mixed(n: int):
        item, style = items[n], STYLES[n % 4 == 0]
        made = lessons.lesson(policy, item, style, demonstrate_mixed(item, style, rng, config))
        return lessons.add_verdicts(policy, made, item, poor_candidate(item, rng)) if style == "think-boxed" else made

    def asking(n: int):
        item = items[(answered + n) % len(items)]
        # A picture that has one question only is to get it again: upt/groups/filters.py knows a repetition.
        other, second = (shapes.ask_else(item, rng_asking) or item.question for _ in range(2))
        mode, first = ("in-context", other) if n % 2 else ("direct", item.question)
        return lessons.asking_lesson(policy, item, mode, [first, second])

    def batches(first: int, steps: int, make: Callable, asked: int = 0) -> Iterator[list]:
        for step in range(first, first + steps):
            answering = [make(n % len(items)) for n in range(step * config.batch, (step + 1) * config.batch)]
            yield answering + [asking(n) for n in range((step - first) * asked, (step - first + 1) * asked)]

    sampling = Rollout(model=presets.TINY_MODEL, seed=config.seed, **{k: presets.TINY[k] for k in SAMPLING})

    def score() -> dict:
        return heldout.evaluate(policy, validation, sampling, len(validation), config.eval_samples)

    network, scores = policy.model.requires_grad_(True), {}
    optimizers = muon.muon_and_adamw(network, config.learning_rate)
    # The clean phase ends while there is still something to learn, and the mixed one goes on with it.
    lessons.train(policy, batches(0, config.clean_steps, clean), config.clean_steps, optimizers, 0.25, "clean")
    scores["clean"] = score()
    optimizers = [muon.adamw([{"params": list(network.parameters()), "lr": config.mixed_learning_rate}])]
    mixture = batches(config.clean_steps, config.mixed_steps, mixed, config.asking)
    lessons.train(policy, mixture, config.mixed_steps, optimizers, 0.0, "mixed")
    scores["mixed"] = score()
    network.requires_grad_(False)
    (config.out / "warmup.json").unlink(missing_ok=True)  # until the new one is whole, there is no warmed-up model
    policy.export(config.out)
    report = {name: heldout.without_rows(found) for name, found in scores.items()} | {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "seconds": time.perf_counter() - started,
    }
    write_whole(config.out / "warmup.json", [json.dumps(report, indent=1).encode()])
    print("The clean phase teaches to answer in steps. The mixed phase adds hasty guesses, and scores fall as they are")
    print("meant to: label-free training starts there.")
    print(heldout.table({f"{name} phase": score for name, score in scores.items()}))
    print(f"{config.out}: {len(validation)} validation questions, {report['seconds']:.0f} s")
    return scores


if __name__ == "__main__":
    cli.launch(main, Config)
