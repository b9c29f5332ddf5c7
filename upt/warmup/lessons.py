"""What the embedded model is taught, as token ids with weights, and the supervised loop over it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from upt import prompts
from upt.answers import vote_key
from upt.data import shapes
from upt.model.packing import Prompt, Row
from upt.model.policy import Policy
from upt.prompts import judge_turns
from upt.run import presets, progress
from upt.run.settings import Rollout
from upt.stages import asking, judging
from upt.stages.sampling import sample_groups

QUESTION_WEIGHT = 0.05  # of a question's tokens in the loss
VERDICT_WEIGHT = 0.3  # of a verdict's tokens in the loss
AT_ONCE = 128  # questions that are answered at a time


@dataclass
class Lesson:
    """A prompt, its picture, and responses to it with the weight of each of their tokens in the loss."""

    prompt: Prompt
    pixels: torch.Tensor
    responses: list[list[int]]
    weights: list[list[float]]


def lesson(policy: Policy, item: shapes.Item, style: str, text: str) -> Lesson:
    """A question in the prompt style `style`, answered by `text`."""
    prompt, pixels, _ = policy.encode_one(item, prompts.template(style))
    response = [*policy.tokens(text), policy.tokenizer.eos_token_id]
    return Lesson(prompt, pixels, [response], [[1.0] * len(response)])


def with_question(policy: Policy, made: Lesson, item: shapes.Item) -> Lesson:
    """A lesson in which the question has to be foreseen, too, from the picture before it."""
    ids, start = made.prompt.ids, made.prompt.ids.index(policy.tokens("<|vision_end|>")[0]) + 1
    prompt = replace(made.prompt, ids=ids[:start], positions=made.prompt.positions[:, :start])
    asked = len(policy.tokens(item.question))
    weights = [QUESTION_WEIGHT] * asked + [0.0] * (len(ids) - start - asked) + made.weights[0]
    return Lesson(prompt, made.pixels, [ids[start:] + made.responses[0]], [weights])


def own_answers(policy: Policy, items: Sequence[shapes.Item], sampling: Rollout) -> list[list[list[int]]]:
    """The token ids of G samples of the policy for each question, those left out that were cut off."""
    found = []
    for start in range(0, len(items), AT_ONCE):
        encoded, _ = policy.encode(items[start : start + AT_ONCE], prompts.template(sampling.prompt))
        for responses in sample_groups(policy, encoded, start // AT_ONCE, sampling):
            found.append([r.ids for r in responses if r.finish == "stop"])
    return found


def verdicts(policy: Policy, item: shapes.Item, candidates: list[list[int]]) -> Lesson:
    """A question with candidates for an answer, none of them taught, each followed by its verdict as a judge gives it.

    Prompt and candidate are what the judge's prompt starts with.
    """
    prompt, pixels, _ = policy.encode_one(item, prompts.template("think-boxed"))
    _, ask = judging.frame(policy, judge_turns(presets.TINY["judge_prompt"]), item, True)
    ask = policy.tokens(ask)[1:]  # its first token closes the candidate's turn, as the last of a response does
    responses, weights = [], []
    for candidate in candidates:
        right = vote_key(policy.tokenizer.decode(candidate, skip_special_tokens=True)) == item.gold
        verdict = [*policy.tokens(f"\\boxed{{{9 * right}/9}}"), policy.tokenizer.eos_token_id]
        responses.append(candidate + ask + verdict)
        weights.append([0.0] * (len(candidate) + len(ask)) + [VERDICT_WEIGHT] * len(verdict))
    return Lesson(prompt, pixels, responses, weights)


def asking_lesson(policy: Policy, item: shapes.Item, mode: str, texts: list[str]) -> Lesson:
    """The picture, in context with its question, answered by each of the questions `texts`."""
    made = asking.shown(policy, item, prompts.asking(mode))
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
    bar = progress.bar(lessons, desc=label, unit="step", total=steps)
    for step, batch in enumerate(bar):
        policy.see([(lesson.prompt, lesson.pixels, None) for lesson in batch])
        rows = [Row(lesson.prompt, lesson.responses, []) for lesson in batch]
        packed, hidden = policy.packed(rows)
        logits = packed.predicting(hidden) @ model.lm_head.weight.T
        weights = torch.tensor([w for lesson in batch for response in lesson.weights for w in response])
        losses = torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 10 == 9:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if bar.disable and step % 50 == 49:
            progress.say(f"{label}: update {step + 1} of {steps}, loss {loss.item():.3f}")
    model.eval()
