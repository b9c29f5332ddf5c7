"""Judge as functions: the scores that the frozen model gives to responses (judge.py says how they are made)."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kernels import row_id
from upt import answers
from upt.data.questions import Question
from upt.errors import PolicyError
from upt.groups.shards import open_image
from upt.model import decoding
from upt.model.memory import fitting
from upt.model.packing import Prompt, pack
from upt.model.policy import Policy
from upt.prompts import judge_turns, template
from upt.run.settings import Judge, Rollout

WEIGHTS = {"answer": 0.5, "reasoning": 0.3, "grounding": 0.2}
JSON_OBJECT = re.compile(r"\{[^{}]*\}")
BOXED_NUMBER = re.compile(r"(\d{0,3}\.?\d{1,9})(?:/(\d{1,3}))?")


def frame(policy: Policy, turns: Sequence[tuple[str, str]], question, with_image: bool) -> tuple[list[int], str]:
    """The token ids that all candidates of a question share, and the text that follows each of them."""
    before, after = policy.chat(turns, with_image).split("{response}")
    asked = policy.ask(question)
    return policy.tokens(before.replace("{question}", asked), opens=True), after.replace("{question}", asked)


# ---------------------------------------------------------------------------------------------------- the scores


def parse(text: str) -> dict[str, float] | None:
    """The grades of a written judgement and their weighted `score`, all in [0, 1]; None if they cannot be read.

    The last JSON object that has all of answer, reasoning and grounding counts, else the last one with a `score`, else
    the last box, with a number (`.8`, `4/5`). A grade outside [0, 1] makes the judgement unreadable.
    """
    found = []
    for match in JSON_OBJECT.finditer(text):
        try:
            value = json.loads(match[0])
        except (ValueError, RecursionError):
            continue
        found.append({name: _grade(value[name]) for name in (*WEIGHTS, "score") if name in value})
    for names in (WEIGHTS, ("score",)):
        for grades in reversed(found):
            if all(name in grades for name in names):
                if any(grades[name] is None for name in names):
                    return None
                if names is WEIGHTS:
                    return {name: grades[name] for name in WEIGHTS} | {
                        "score": math.fsum(weight * grades[name] for name, weight in WEIGHTS.items())
                    }
                return {"score": grades["score"]}
    boxed = answers.extract_answer(text)
    number = BOXED_NUMBER.fullmatch(boxed or "")
    score = _grade(float(number[1]) / float(number[2] or 1)) if number and float(number[2] or 1) else None
    return None if score is None else {"score": score}


def _grade(value) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= 1 else None


@torch.no_grad()
def logit_scores(
    policy: Policy, prefixes: Sequence[Prompt], suffixes: Sequence[Sequence[list[int]]], budget: int, tick: Callable
) -> list[list[float]]:
    """sum_d p(d) d / 9 after each suffix, p being the next-token distribution over the digits 0 to 9.

    suffixes[b] are the ways in which prefix b goes on, token ids each; a list of as many floats for each prefix.
    """
    digits = [policy.tokens(str(d)) for d in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise PolicyError("logit mode needs a tokenizer with one token for each digit; use --judge-mode text")
    digits = torch.tensor(digits, device=policy.device)[:, 0]
    values = torch.arange(10, device=policy.device) / 9
    scores = [[math.nan] * len(several) for several in suffixes]

    def score_within(budget: int) -> None:
        # A row's last token is not an input, so each suffix gets one more, standing for the digit to come.
        rows = [
            [[*suffix, 0] if math.isnan(found) else [] for suffix, found in zip(*pair, strict=True)]
            for pair in zip(suffixes, scores, strict=True)
        ]
        for batch in pack(prefixes, rows, budget):
            packed, hidden = policy.packed(batch)
            ends = torch.tensor([len(response) for row in batch for response in row.responses]).cumsum(0) - 1
            last = packed.predicting(hidden)[ends.to(policy.device)]  # (N, D)
            p = (last @ policy.base.lm_head.weight[digits].T).float().softmax(-1)  # (N, 10)
            owners = [owner for row in batch for owner in row.owners]
            for (b, i), found in zip(owners, (p @ values).tolist(), strict=True):
                scores[b][i] = min(max(found, 0.0), 1.0)  # rounding
            tick(len(owners))

    fitting(policy, "--judge-tokens", budget, score_within)
    return scores


def written(
    policy: Policy, prefixes, suffixes, rows: Sequence[Sequence[int]], seed: int, settings: Judge, tick: Callable
) -> list[list[list[str]]]:
    """Sampled judgements: for each prefix a list with the k texts of each of its suffixes.

    rows[b], with the seed, keys the noise of prefix b's judgements, k for each suffix.
    """
    config = Rollout(temperature=settings.judge_temperature, top_p=settings.judge_top_p, seed=seed)
    config.max_new_tokens, k = settings.judge_max_new_tokens, settings.judge_repeats
    sampled = decoding.generate(
        policy, prefixes, [row for several in rows for row in several], config, suffixes, lambda n: tick(n / k)
    )
    said = iter(policy.tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True))
    return [[[next(said) for _ in range(k)] for _ in several] for several in suffixes]


def judge(
    policy: Policy,
    prompts: Sequence[Prompt],
    groups: list[dict],
    settings: Judge,
    style: str,
    seed: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Copies of the groups with `judge` in each response: its score in [0, 1] or null, and whether it was parsed.

    prompts[b] is any encoded prompt of group b's question, for the features of its image. `style` is the prompt style
    whose format the responses must keep. Text mode adds the judgements, how many of them could be read, and their mean
    grades. The adapter is off. `tick(n)` is called after every n judged responses.
    """
    turns, text_mode = judge_turns(settings.judge_prompt), settings.judge_mode == "text"
    lead = "" if text_mode else settings.judge_prefix
    prefixes, suffixes, rows, owners = [], [], [], []
    verdicts = [[{"score": 0.0, "parsed": True} for _ in group["responses"]] for group in groups]
    for b, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        kept = [i for i, r in enumerate(group["responses"]) if answers.keeps_format(r["text"], style)]
        if kept:
            question = Question(group["uid"], group["question"], group["choices"], image=None, gold=None)
            ids, after = frame(policy, turns, question, prompt.features is not None)
            texts = [policy.plain(group["responses"][i]["text"]) for i in kept]
            prefixes.append(policy.place(group["uid"], ids, prompt.features))
            suffixes.append([policy.tokens(text + after + lead) for text in texts])
            k = settings.judge_repeats
            uid = f"judge/{group['uid']}"
            rows.append([row_id(group["step"], uid, i * k + n) for i in kept for n in range(k)])
            owners.append([(b, i) for i in kept])
    policy.model.eval()
    with policy.reference():
        if text_mode:
            texts = written(policy, prefixes, suffixes, rows, seed, settings, tick)
            judged = [[read(repeats) for repeats in several] for several in texts]
        else:
            scores = logit_scores(policy, prefixes, suffixes, settings.judge_tokens, tick)
            judged = [[{"score": score, "parsed": True} for score in several] for several in scores]
        for places, found in zip(owners, judged, strict=True):
            for (b, i), verdict in zip(places, found, strict=True):
                verdicts[b][i] = verdict
    return [
        group | {"responses": [r | {"judge": v} for r, v in zip(group["responses"], several, strict=True)]}
        for group, several in zip(groups, verdicts, strict=True)
    ]


def read(texts: list[str]) -> dict:
    """What k written judgements of one response come to: mean grades over those that can be read."""
    grades = [found for text in texts if (found := parse(text)) is not None]
    names = [name for name in (*WEIGHTS, "score") if grades and all(name in g for g in grades)]
    means = {name: math.fsum(g[name] for g in grades) / len(grades) for name in names}
    return {"score": None} | means | {"parsed": bool(grades), "read": len(grades), "judgements": texts}


def pictured(policy: Policy, groups: list[dict], folder: Path) -> list[Prompt]:
    """Prompts of the groups' questions, for the features of their images."""
    questions = [
        Question(
            group["uid"],
            group["question"],
            group["choices"],
            None if group["image"] is None else open_image(folder, group["image"]),
            None,  # the judge never sees gold
        )
        for group in groups
    ]
    return policy.encode(questions, template("boxed"))[0]
