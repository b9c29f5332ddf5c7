"""Stage 2: a frozen judge scores every response. It is the model as it was before training, adapter off.

For each group:
    1. a response that breaks the required format scores 0 and is not judged
    2. the others share one judge prompt up to the candidate, image included, which is prefilled once
    3. text mode: k written judgements are sampled, each read for three grades in [0, 1]:
           score = .5 answer + .3 reasoning + .2 grounding, averaged over the judgements that can be read
       logit mode: no judgement is written; after a fixed prefix the next token's distribution p over the digits gives
           score = sum_d p(d) d / 9, so that judging costs one prefill
    4. a judgement that cannot be read is counted and stored as a null score; what it is worth is the reward's choice

After arXiv 2603.21289 §3.2, whose judge writes. The logit mode is ours, and so are the prompts (prompts/judge.md). The
judge sees the image, the question and the candidate, never `gold`.

    python judge.py --rollouts runs/rollouts --out runs/judged                      # by the model that sampled them
    python rewards.py --rollouts runs/judged --reward judged --out runs/scored
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import answers
import data
import decoding
import presets
import rollout
import shards
from kernels import row_id
from policy import PROMPTS, Policy, PolicyError, Prompt, layout, pack, packed_mask

WEIGHTS = {"answer": 0.5, "reasoning": 0.3, "grounding": 0.2}
TURN = re.compile(r"^\[(user|assistant)\]\n", re.M)
JSON_OBJECT = re.compile(r"\{[^{}]*\}")
BOXED_NUMBER = re.compile(r"(\d{0,3}\.?\d{1,9})(?:/(\d{1,3}))?")
FREE = ("rollouts", "out", "device", "judge_tokens")  # settings that may change when judging goes on


@dataclass
class Settings:
    """How responses are judged. Settings left at None take the default for the model (see presets.py)."""

    judge_mode: Literal["text", "logit"] | None = None
    """text: sample written judgements and read their grades; logit: read one score from the next token"""
    judge_prompt: str | None = None
    """judge, judge-tiny, or a file with {question} and {response} in it"""
    judge_prefix: str | None = None
    """logit mode: what the answer starts with, up to the digit"""
    judge_repeats: int | None = None
    """text mode: judgements of each response, averaged"""
    judge_temperature: float = 1.0
    """text mode: sampling temperature"""
    judge_top_p: float = 0.9
    """text mode: nucleus"""
    judge_max_new_tokens: int | None = None
    """text mode: longest judgement, in tokens"""
    judge_tokens: int | None = None
    """token budget of one batch; scores do not depend on it"""

    def check_judge(self) -> None:
        """Raise ValueError for settings that cannot work, with what to change."""
        for name in ("judge_repeats", "judge_max_new_tokens", "judge_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.judge_temperature < 0 or not 0 < self.judge_top_p <= 1:
            raise ValueError(
                f"judging needs a temperature >= 0 and 0 < top-p <= 1, not {self.judge_temperature}, {self.judge_top_p}"
            )
        template(self.judge_prompt)


# ---------------------------------------------------------------------------------------------------- the prompt


def template(name: str) -> list[tuple[str, str]]:
    """The (role, text) turns of a judge prompt: one from prompts/ by name, or a file.

    A file is one user turn, unless lines `[user]` and `[assistant]` divide it into several.
    """
    path = PROMPTS / f"{name}.md"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise PolicyError(
            f"no judge prompt {name!r}: give judge, judge-tiny, or a file with {{question}}, {{response}}"
        )
    text = path.read_text(encoding="utf-8").strip()
    first, *rest = TURN.split(text)
    turns = [*zip(rest[::2], rest[1::2], strict=True)]
    if first.strip():
        turns.insert(0, ("user", first))
    if text.count("{question}") < 1 or text.count("{response}") != 1:
        raise PolicyError(f"{path}: a judge prompt needs {{question}}, and {{response}} exactly once")
    if text.index("{question}") > text.index("{response}"):
        raise PolicyError(f"{path}: {{question}} must stand before {{response}}, so that candidates share it")
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise PolicyError(f"{path}: turns must go user, assistant, …, user")
    return [(role, part.strip()) for role, part in turns]


def prompt_digest(name: str) -> str:
    """SHA-256 of a judge prompt's turns: a file of that name may change between two runs."""
    return hashlib.sha256(json.dumps(template(name)).encode()).hexdigest()


def frame(policy: Policy, turns: Sequence[tuple[str, str]], question, with_image: bool) -> tuple[list[int], str]:
    """The token ids that all candidates of a question share, and the text that follows each of them."""
    before, after = policy.chat(turns, with_image).split("{response}")
    asked = policy.ask(question)
    return policy.tokens(before.replace("{question}", asked)), after.replace("{question}", asked)


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
    # A row's last token is not an input, so each suffix gets one more, standing for the digit to come.
    rows = [[[*suffix, 0] for suffix in several] for several in suffixes]
    for batch in pack(prefixes, rows, budget):
        ids, positions, segment, sources, _ = (part.to(policy.device) for part in layout(batch))
        hidden = policy.hidden(ids, positions, packed_mask(segment), [row.prompt for row in batch])
        ends = torch.tensor([len(response) for row in batch for response in row.responses]).cumsum(0) - 1
        last = hidden.flatten(0, 1)[sources[ends.to(policy.device)]]  # (N, D)
        p = (last @ policy.base.lm_head.weight[digits].T).float().softmax(-1)  # (N, 10)
        for (b, i), score in zip([owner for row in batch for owner in row.owners], (p @ values).tolist(), strict=True):
            scores[b][i] = min(max(score, 0.0), 1.0)  # rounding
        tick(sum(len(row.responses) for row in batch))
    return scores


def written(
    policy: Policy, prefixes, suffixes, rows: Sequence[Sequence[int]], seed: int, settings: Settings, tick: Callable
) -> list[list[list[str]]]:
    """Sampled judgements: for each prefix a list with the k texts of each of its suffixes.

    rows[b], with the seed, keys the noise of prefix b's judgements, k for each suffix.
    """
    config = rollout.Config(temperature=settings.judge_temperature, top_p=settings.judge_top_p, seed=seed)
    config.max_new_tokens, k = settings.judge_max_new_tokens, settings.judge_repeats
    texts = [[] for _ in prefixes]
    todo = [(b, i) for b, several in enumerate(suffixes) for i in range(len(several))]
    while todo:
        longest = count = 0
        for b, i in todo:
            longest = max(longest, len(prefixes[b].ids) + len(suffixes[b][i]) + config.max_new_tokens)
            if count and k * (count + 1) * longest > settings.judge_tokens:
                break
            count += 1
        batch, todo = todo[:count], todo[count:]
        asked = sorted({b for b, _ in batch})
        sampled = decoding.generate(
            policy,
            [prefixes[b] for b in asked],
            [row for b, i in batch for row in rows[b][k * i : k * (i + 1)]],
            config,
            [[suffixes[b][i] for owner, i in batch if owner == b] for b in asked],
        )
        said = iter(policy.tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True))
        for b, _ in batch:
            texts[b].append([next(said) for _ in range(k)])
        tick(len(batch))
    return texts


def judge(
    policy: Policy,
    prompts: Sequence[Prompt],
    groups: list[dict],
    settings: Settings,
    style: str,
    seed: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Copies of the groups with `judge` in each response: its score in [0, 1] or null, and whether it was parsed.

    prompts[b] is any encoded prompt of group b's question, for the features of its image. `style` is the prompt style
    whose format the responses must keep. Text mode adds the judgements, how many of them could be read, and their mean
    grades. The adapter is off. `tick(n)` is called after every n judged responses.
    """
    turns, text_mode = template(settings.judge_prompt), settings.judge_mode == "text"
    lead = "" if text_mode else settings.judge_prefix
    prefixes, suffixes, rows, owners = [], [], [], []
    verdicts = [[{"score": 0.0, "parsed": True} for _ in group["responses"]] for group in groups]
    for b, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        kept = [i for i, r in enumerate(group["responses"]) if answers.keeps_format(r["text"], style)]
        if kept:
            question = data.Question(group["uid"], group["question"], group["choices"], image=None, gold=None)
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
            judged = [[_read(repeats) for repeats in several] for several in texts]
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


def _read(texts: list[str]) -> dict:
    """What k written judgements of one response come to: mean grades over those that can be read."""
    grades = [found for text in texts if (found := parse(text)) is not None]
    names = [name for name in (*WEIGHTS, "score") if grades and all(name in g for g in grades)]
    means = {name: math.fsum(g[name] for g in grades) / len(grades) for name in names}
    return {"score": None} | means | {"parsed": bool(grades), "read": len(grades), "judgements": texts}


# ---------------------------------------------------------------------------------------------------- the stage


@dataclass
class Config(Settings):
    """Flags of the stage. The settings of the judge's model are those of the rollouts where they are left at None."""

    rollouts: Path = Path("runs/rollouts")
    """folder of rollout shards"""
    out: Path = Path("runs/judged")
    """folder for the judged shards; another one than --rollouts"""
    model: str | None = None
    """snapshot folder or hub id; None: the model that sampled the rollouts"""
    adapter: str | None = None
    """PEFT adapter of the judge; None: the one that the sampling started from, if --model is left out too"""
    seed: int | None = None
    """noise of written judgements"""
    prompt: str | None = None
    """prompt style whose format the responses must keep: think-boxed, or any other for a box alone"""
    min_pixels: int | None = None
    """smallest image area after resizing, in pixels"""
    max_pixels: int | None = None
    """largest image area after resizing, in pixels"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""


def resolve(config: Config) -> tuple[Config, dict]:
    """The settings in full, what was left open taken from the rollouts' manifest, and where the shards come from."""
    config = replace(config)
    if config.out.resolve() == config.rollouts.resolve():
        raise ValueError(f"--out is --rollouts ({config.out}); judged shards need a folder of their own")
    manifest = shards.read_manifest(config.rollouts)
    rollouts = shards.sampled_by(manifest)
    sampling = rollouts.get("config") or {}
    names = ("model", "adapter", "seed", "prompt", "min_pixels", "max_pixels")
    for name in names if config.model is None else names[2:]:
        if getattr(config, name) is None:
            setattr(config, name, sampling.get(name))
    if config.model is None:
        raise ValueError(f"the manifest of {config.rollouts} names no model: say which one is to judge, --model M")
    shards.check_files(config.rollouts, rollouts, {"model": config.model, "adapter": config.adapter})
    presets.fill(config)
    config.check_judge()
    return config, shards.origin(manifest, rollout.FREE)


def pictured(policy: Policy, groups: list[dict], folder: Path) -> list[Prompt]:
    """Prompts of the groups' questions, for the features of their images."""
    questions = [
        data.Question(
            group["uid"],
            group["question"],
            group["choices"],
            None if group["image"] is None else shards.open_image(folder, group["image"]),
            None,  # the judge never sees gold
        )
        for group in groups
    ]
    return policy.encode(questions, policy.template("boxed"))[0]


def main(config: Config) -> dict[str, float]:
    """Judge a folder of shards into another; returns the summary that it prints."""
    config, origin = resolve(config)
    paths = shards.ShardReader(config.rollouts).paths
    settings = json.loads(json.dumps(asdict(config), default=str))
    settings |= {"judge_prompt_file": prompt_digest(config.judge_prompt), "rollouts_manifest": origin}
    fresh = shards.check_manifest(config.out, settings, ignore=FREE) is None
    options = {name: getattr(config, name) for name in ("adapter", "dtype", "device", "min_pixels", "max_pixels")}
    policy = Policy.load(config.model, **options)
    if fresh:
        identity = {"model": config.model, "adapter": config.adapter}
        shards.write_manifest(config.out, stage="judge", config=settings, seed=config.seed, **identity)
    shards.link_images(config.rollouts, config.out)
    scores, unparsed = [], 0
    for path in tqdm(paths, desc="judging", unit="shard"):
        target = config.out / path.name
        if not shards.is_complete(target, source=path):
            groups = shards.read_shard(path)
            prompts = pictured(policy, groups, config.rollouts)
            shards.write_shard(target, judge(policy, prompts, groups, config, config.prompt, config.seed))
        verdicts = [response["judge"] for group in shards.read_shard(target) for response in group["responses"]]
        scores += [verdict["score"] for verdict in verdicts if verdict["score"] is not None]
        unparsed += sum(not verdict["parsed"] for verdict in verdicts)
    mean = math.fsum(scores) / len(scores) if scores else None
    shown = "none" if mean is None else f"{mean:.3f}"
    print(f"{config.out}: {len(scores) + unparsed} responses judged, mean score {shown}, {unparsed} unparsed")
    return {"responses": len(scores) + unparsed, "score_mean": mean, "unparsed": unparsed}


if __name__ == "__main__":
    main(tyro.cli(Config))
