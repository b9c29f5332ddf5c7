r"""Make the embedded default model: a tiny Qwen2.5-VL, trained from scratch on `shapes` with labels.

    1. tokenizer: byte-level BPE on the demonstrations, with Qwen's special tokens
    2. model: the real Qwen2_5_VLForConditionalGeneration, 1.5 M parameters, random weights
    3. answering: supervised training on right step-by-step demonstrations
    4. judging and asking: demonstrations go on with the vision tower frozen; beside them the model learns verdicts on
       answers of its own, and to ask, from questions about pictures of their own (synthesize.py)
    5. write a snapshot as on the hub, with the scores after each phase in warmup.json

Nothing is planted: it answers as well as its lessons and their time allow, and they end while there is still something
to learn. A judge's lesson is a sample of the model's own, to a question that it was not taught, prompts/judge-tiny.md's
question and the verdict by the label, \boxed{9/9} or \boxed{0/9}.

`--guess-steps 160` adds a phase in which half of the demonstrations are quick guesses, most of them wrong. It leaves a
model of two manners, one of them reliable, to see how label-free training selects (docs/results.md). Choices here were
made on the validation split.

    python warmup.py --out models/tiny
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from eval import heldout
from upt import data, model, prompts, warmup
from upt.data import shapes
from upt.errors import SettingError
from upt.files import write_whole
from upt.groups import manifests
from upt.ranges import Count, Few, Number, Rate, Seed, Share
from upt.run import cli, presets
from upt.run.locking import alone
from upt.run.settings import Rollout
from upt.run.typed import Typed
from upt.warmup.demonstrations import MODES, STYLES, demonstrate

SAMPLING = ("temperature", "top_p", "max_new_tokens", "prompt", "max_prompt_tokens")
END = 0.25  # of the peak of the learning rate: where the first phase ends, and what the second one keeps


@dataclass
class Config(Typed):
    out: Path = Path("models/tiny")
    """folder to write the snapshot to"""
    seed: Seed = 0
    """initial weights, pictures and order of the lessons"""
    questions: Count = 12000
    """labelled questions to learn answering from; used again where there are more lessons"""
    judged: Count = 1000
    """further labelled questions, which the model answers itself, to learn verdicts on its answers"""
    answer_steps: Number = 260
    """updates on demonstrations alone"""
    judge_steps: Number = 60
    """further updates, on demonstrations, verdicts and questions together"""
    guess_steps: Number = 0
    """further updates that teach a second manner, quick guesses"""
    batch: Count = 32
    """demonstrations in one update"""
    judging: Count = 16
    """questions with verdicts in one update"""
    asking: Number = 4
    """pictures to ask about in one update"""
    learning_rate: Rate = 2.5e-3
    """peak, for Muon; AdamW takes half of it, and the vision tower's first layer a tenth of that"""
    guess_learning_rate: Rate = 6e-4
    """peak while guessing is taught, for AdamW"""
    guess_share: Share = 0.5
    """share of quick guesses among the demonstrations then"""
    guess_wrong: Share = 0.6
    """share of quick guesses that are any plausible number instead of the right one"""
    eval_questions: Count = 256
    """validation questions for the scores after each phase"""
    eval_samples: Few = 2
    """samples for each of them"""


def untrained(items: list[shapes.Item], seed: int) -> "model.Policy":
    """A model of random weights, with a tokenizer made from what it will read and write."""
    tiny = warmup.tiny
    texts = [prompts.template(style).replace("{question}", item.question) for item in items[:2000] for style in STYLES]
    texts += [demonstrate(item, style) for item in items[:2000] for style in STYLES]
    asked = prompts.judge_turns(presets.TINY["judge_prompt"])[-1][1]
    texts += ["by eye user assistant", "\\boxed{9/9} \\boxed{0/9}", asked, *map(prompts.asking, MODES)] * 2000
    tokenizer = tiny.make_tokenizer(texts)
    with TemporaryDirectory() as folder:
        tiny.make_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tiny.make_processor().save_pretrained(folder)
        return model.Policy.load(folder, dtype="fp32", device="cpu")


@alone
def main(config: Config) -> dict:
    """Train, write the snapshot and its scores; returns the scores by phase."""
    config = replace(config)
    manifests.check_own(config.out, "warmup")
    phases = [config.answer_steps, config.judge_steps, config.guess_steps]
    if sum(phases) == 0:
        raise SettingError("--answer-steps, --judge-steps and --guess-steps 0 teach nothing: give one some updates")
    lessons, muon = warmup.lessons, warmup.muon
    taught = warmup.curriculum.Curriculum(config)
    started = time.perf_counter()
    updates = " + ".join(str(steps) for steps in phases if steps)
    print(f"making the tiny model in {config.out}, with labels: {updates} updates, some minutes", flush=True)
    validation = data.load("shapes", "validation", config.seed, limit=config.eval_questions)
    sampling = Rollout(model=presets.TINY_MODEL, seed=config.seed, **{k: presets.TINY[k] for k in SAMPLING})
    policy = untrained(taught.items, config.seed)
    network, scores = policy.model.requires_grad_(True), {}

    def phase(name: str, batches, steps: int, optimizers: list, end: float) -> None:
        if steps:
            lessons.train(policy, batches, steps, optimizers, end, name)
            scores[name] = heldout.evaluate(policy, validation, sampling, len(validation), config.eval_samples)

    optimizers = muon.muon_and_adamw(network, config.learning_rate)
    phase("answering", taught.answering(policy), config.answer_steps, optimizers, END)
    policy.base.model.visual.requires_grad_(False)
    optimizers = muon.muon_and_adamw(network, END * config.learning_rate)
    phase("judging", taught.judging(policy, sampling), config.judge_steps, optimizers, 1.0)
    network.requires_grad_(True)
    optimizers = [muon.adamw([{"params": list(network.parameters()), "lr": config.guess_learning_rate}])]
    phase("guessing", taught.guessing(policy), config.guess_steps, optimizers, 0.0)

    network.requires_grad_(False)
    report = {name: heldout.without_rows(found) for name, found in scores.items()} | {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "seconds": time.perf_counter() - started,
    }
    done, draft = config.out / "warmup.json", config.out / ".warmup.json"
    write_whole(draft, [json.dumps(report, indent=1).encode()])  # by it the folder is known as ours, if this is killed
    done.unlink(missing_ok=True)  # until the new one is whole, there is no warmed-up model
    policy.export(config.out)
    draft.replace(done)
    print(heldout.table({f"after {name}": found for name, found in scores.items()}))
    print(f"{config.out}: {len(validation)} validation questions, {report['seconds']:.0f} s")
    return scores


if __name__ == "__main__":
    cli.launch(main, Config)
