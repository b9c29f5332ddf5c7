"""Held-out accuracy of a policy, with 95 % bootstrap intervals over questions.

For each question one greedy response and k samples:
    greedy   share of greedy responses that are right
    mean     share of samples that are right
    maj      share of questions whose most frequent answer among the k is right (tied answers share the vote)
    pass     share of questions with a right answer among the k
and, without needing gold: majority_share, abstentions, length (tokens) and entropy (nats) of the samples. A set
without gold gets these only. `disagreement` is the share of responses on which key equality and math_verify differ,
of those that math_verify is asked about (see answers.grade).

    python -m eval.heldout --data shapes --model models/tiny --adapter runs/train/adapter
    python -m eval.heldout --run runs/train     # or a checkpoint of it; with the run's settings, hence its own scores
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upt import data, prompts, stages
from upt.answers import Grade, grade, vote_key
from upt.errors import DataError
from upt.files import check_file, known_json, write_whole
from upt.groups.shards import save_image
from upt.groups.stats import FEW, FEW_NOTE, counted
from upt.ranges import Count, Few, Name
from upt.run import cli, progress, records, trained
from upt.run.metrics import Clock
from upt.run.settings import Rollout, hidden
from upt.run.team import ALONE, Team, assemble

if TYPE_CHECKING:
    from upt.model import Policy

FOLDER = records.HELD_OUT
STEP = -1  # the step that keys the sampling noise of evaluation
QUESTIONS_AT_ONCE = 128
GOLD_METRICS = ("greedy", "mean", "maj", "pass")
NAMES = (*GOLD_METRICS, "length", "entropy", "majority_share", "abstentions")
BY_STEP = (*GOLD_METRICS, "entropy", "length")  # what a run keeps of its evaluations between its first and its last
FROM_RUN = "seed eval_samples temperature top_p top_k prompt max_new_tokens max_prompt_tokens slots".split()
FROM_RUN += "min_pixels max_pixels dtype quantize".split()


@dataclass
class Config(Rollout):
    run: Path | None = None
    """a training run, or a checkpoint of one: its model, adapter and settings are taken, and its held-out data"""
    split: Name | None = None
    """split of the data to evaluate on; None: that of --run, else test"""
    out: Path | None = None
    """JSON file to write the scores to; None: print only"""
    eval_questions: Count | None = None
    """number of questions; None: as the model's defaults say"""
    eval_samples: Few | None = None
    """samples for each question, k; None: as many as --run, else 8"""
    view: None = hidden(None)

    def resolve(self) -> "Config":
        if self.run is not None:
            settings = trained.taken_from_run(self).settings
            settings["data"] = settings.get("eval_data") or settings["data"]
            settings["eval_questions"] = settings.get("eval_questions") or None  # 0: the run had no evaluation
            names = {name: name for name in (*FROM_RUN, "data", "eval_questions")}
            trained.take(self, settings, names | {"split": "eval_split"})
        self.split = "test" if self.split is None else self.split
        self.eval_samples = 8 if self.eval_samples is None else self.eval_samples
        if self.out is not None:
            check_file(self.out)
        return super().resolve()


def interval(values, seed: int = 0, resamples: int = 2000) -> dict[str, float]:
    """Mean of one value per question with its 95 % percentile bootstrap interval: {"value", "low", "high"}."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def question_scores(greedy: list[Grade], samples: list[Grade], keys: list[str | None]) -> dict[str, float]:
    """The gold metrics of one question, by verdicts and the samples' vote keys; `disagreement` is over all of them."""
    right = [g.correct for g in samples]
    votes = Counter(key for key in keys if key is not None)
    asked = [g.disagree for g in greedy + samples if g.verifier is not None]
    # One response stands for its key: responses of equal keys are graded alike by key, and nearly always otherwise.
    by_key = dict(zip(keys, right, strict=True))
    most = max(votes.values(), default=0)
    tied = [by_key[key] for key, count in votes.items() if count == most]
    return {
        "greedy": float(np.mean([g.correct for g in greedy])),
        "mean": float(np.mean(right)),
        "maj": float(np.mean(tied)) if tied else 0.0,
        "pass": float(any(right)),
    } | ({"disagreement": float(np.mean(asked))} if asked else {})


def row_of(question, picture: str | None, greedy: list[str], samples: list[str], sampled: list) -> dict:
    """The scores of one question with what was asked and answered, from texts and the samples as they were sampled.

    Of `responses`, {"text", "key", "correct"}, the first is the greedy one; `correct` is None without gold.
    """
    texts, known = greedy + samples, question.gold is not None
    keys = [vote_key(text, question.choices) for text in texts]
    grades = [grade(text, question.gold, question.choices) if known else None for text in texts]
    votes, n = keys[len(greedy) :], len(greedy)
    row = {
        "uid": question.uid,
        "kind": question.kind,
        "question": question.question,
        "choices": question.choices,
        "gold": question.gold,
        "image": picture,
        "majority_share": max(Counter(key for key in votes if key is not None).values(), default=0) / len(samples),
        "abstentions": votes.count(None) / len(samples),
        "length": float(np.mean([len(r.ids) for r in sampled])),
        "entropy": float(np.mean([r.entropy for r in sampled])),
    }
    if known:
        row |= question_scores(grades[:n], grades[n:], votes)
    verdicts = [g.correct if known else None for g in grades]
    named = zip(texts, keys, verdicts, strict=True)
    return row | {"responses": [{"text": text, "key": key, "correct": right} for text, key, right in named]}


def evaluate(
    policy: "Policy",
    questions: "data.Questions",
    config: Rollout,
    count: int,
    samples: int,
    tick: Callable[[int], None] = lambda n: None,
    team: Team = ALONE,
    pictures: Path | None = None,
) -> dict:
    """Scores on the usable ones of the first `count` questions, and how many those are.

    {metric: {"value", "low", "high"}, "kinds": …, "questions": n, "graded": n, "too_long": n, "rows": …}; `too_long`
    counts prompts over the limit, which are left out, `rows` are single questions (see `row_of`). Their pictures are
    kept in the folder `pictures`, if one is given.
    """
    greedy_config = replace(config, temperature=0.0, group_size=1)
    sample_config = replace(config, group_size=samples)

    def answer(indices: list[int]) -> list[dict | int | str]:
        """Of each question its row; the tokens of its prompt where these are too many; why it cannot be used."""
        found = questions.get(indices)
        encoded, too_long = policy.encode(found, prompts.template(config.prompt), config.max_prompt_tokens)
        asked = [question for question in found if question.uid not in too_long]
        greedy = stages.sampling.sample_groups(policy, encoded, STEP, greedy_config, tick)
        sampled = stages.sampling.sample_groups(policy, encoded, STEP, sample_config, tick)
        texts = [
            [policy.tokenizer.batch_decode([r.ids for r in part], skip_special_tokens=True) for part in both]
            for both in zip(greedy, sampled, strict=True)
        ]
        kept = [None if pictures is None or q.image is None else save_image(pictures, q.image) for q in asked]
        rows = {
            q.uid: row_of(q, at, *said, part) for q, at, said, part in zip(asked, kept, texts, sampled, strict=True)
        }
        rows |= too_long | questions.bad
        return [rows[questions.uids[i]] for i in indices]

    rows, left_out, at_once = [], {}, QUESTIONS_AT_ONCE * team.size
    for start in range(0, min(count, len(questions)), at_once):
        indices = range(start, min(start + at_once, count, len(questions)))
        for i, row in zip(indices, team.spread(answer, indices), strict=True):
            uid = questions.uids[i]
            if isinstance(row, dict):
                rows.append(row)
            elif isinstance(row, int):
                left_out[uid] = row
            else:
                questions.bad[uid] = row  # met by another process
    if not rows:
        raise DataError(
            f"none of the first {count} questions of {questions.name} can be used: {len(left_out)} prompts are over "
            f"--max-prompt-tokens {config.max_prompt_tokens}; {questions.report_bad() or 'no row is bad'}"
        )
    graded = [row for row in rows if "greedy" in row]
    scores = {name: interval([row[name] for row in graded]) for name in GOLD_METRICS if graded}
    if compared := [row["disagreement"] for row in graded if "disagreement" in row]:
        scores["disagreement"] = interval(compared)
    scores |= {
        name: interval([row[name] for row in rows]) for name in ("length", "entropy", "majority_share", "abstentions")
    }
    scores["kinds"] = {}
    for kind in sorted({row["kind"] for row in graded if row["kind"] is not None}):
        found = [row for row in graded if row["kind"] == kind]
        means = {name: interval([row[name] for row in found]) for name in (*GOLD_METRICS[:2], "length")}
        scores["kinds"][kind] = {"questions": len(found)} | means
    if left_out:
        print(f"held out: {len(left_out)} prompts over --max-prompt-tokens are left out", file=sys.stderr)
    return scores | {"questions": len(rows), "graded": len(graded), "too_long": len(left_out), "rows": rows}


def scored(
    policy: "Policy", questions: "data.Questions", name: str, config, clock: Clock, check: Callable, team: Team
) -> dict:
    """Scores before or after training, by `name`, measured once for a run and kept in OUT/<name>.json.

    `config` is a train_upt.Config; `check` may raise, to stop.
    """
    path = config.out / f"{name}.json"
    if known := team.once(known_json, path):
        return known
    count = min(config.eval_questions, len(questions))
    with (
        clock(f"eval_{name}"),
        progress.bar(total=count * (1 + config.eval_samples), desc=f"held-out, {name}", unit="response") as bar,
    ):

        def tick(responses: int) -> None:
            progress.advance(bar, responses, team)
            check()

        pictures = config.out / FOLDER
        scores = evaluate(policy, questions, config, count, config.eval_samples, tick, team, pictures)
    print(f"held out, {name} training: {headline(scores)}")
    team.once(write_whole, path, [json.dumps(scores).encode()])
    return scores


def headline(scores: dict) -> str:
    """What matters most of some scores, on a line."""
    names = [name for name in (*GOLD_METRICS, "majority_share") if name in scores]
    return f"{scores['questions']} questions, " + ", ".join(
        f"{name.replace('_', ' ')} {100 * scores[name]['value']:.1f}" for name in names
    )


def table(columns: dict[str, dict]) -> str:
    """Scores side by side as aligned text, per cent but for length and entropy.

    With two columns or more, the difference of the last from the first, its interval paired by question.
    """
    first, last = list(columns.values())[0], list(columns.values())[-1]
    groups = {"": first} | {f"{kind} ": first["kinds"][kind] for kind in first["kinds"]}
    rows, few = [["", "n", *columns, *(["difference"] if len(columns) > 1 else [])]], False
    for prefix, of in groups.items():
        kind = prefix.strip() or None
        for name in NAMES if kind is None else GOLD_METRICS[:2]:
            if name not in of:
                continue
            n = of["graded"] if kind is None and name in GOLD_METRICS else of["questions"]
            few |= n < FEW
            scores = [c if kind is None else c["kinds"][kind] for c in columns.values()]
            cells = [cell(found[name], name) for found in scores]
            if len(columns) > 1:
                cells.append(cell(difference(first, last, name, kind), name, "+"))
            rows.append([prefix + name, counted(n), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, FEW_NOTE] if few else lines)


def difference(first: dict, last: dict, name: str, kind: str | None = None) -> dict[str, float]:
    """How much a score of the last is above that of the first, over the questions that both have.

    Without scores of single questions, of a run from before they were kept, there is no interval.
    """
    old, new = ({row["uid"]: row for row in of.get("rows", ()) if kind in (None, row["kind"])} for of in (first, last))
    pairs = [new[uid][name] - row[name] for uid, row in old.items() if name in row and name in new.get(uid, ())]
    if pairs:
        return interval(pairs)
    values = [(of if kind is None else of["kinds"][kind])[name]["value"] for of in (first, last)]
    return {"value": values[1] - values[0]}


def cell(score: dict[str, float], name: str, sign: str = "") -> str:
    """A value with its interval, to the digits that it needs."""
    scale, digits = {"entropy": (1, 3), "length": (1, 1)}.get(name, (100, 1))
    # Rounded first, and + 0.0 makes -0.0 plain zero: a sign is shown where the digits have one.
    shown = [round(scale * score[part], digits) + 0.0 for part in ("value", "low", "high") if part in score]
    value, *ends = (f"{number:{sign if number else ''}.{digits}f}" for number in shown)
    return f"{value} [{', '.join(ends)}]" if ends else value


def without_rows(scores: dict) -> dict:
    """Scores without those of single questions."""
    return {name: value for name, value in scores.items() if name != "rows"}


def main(config: Config) -> dict:
    config = replace(config).resolve()
    team = assemble(config.device)
    questions = team.in_turn(data.load, config.data, config.split, config.seed, config.limit)
    count, much = min(config.eval_questions, len(questions)), f"greedy and {config.eval_samples} samples each"
    what = f"{config.model}{f' with {config.adapter}' if config.adapter else ''}"
    print(f"evaluating {what} on {count} of {questions.describe()}: {much}", file=sys.stderr)
    at_once = {"questions_per_step": QUESTIONS_AT_ONCE, "group_size": config.eval_samples}
    policy = team.here(partial(trained.load_policy, config, **at_once))
    with progress.bar(total=count * (1 + config.eval_samples), desc="evaluating", unit="response") as bar:
        tick = partial(progress.advance, bar, team=team)
        scores = evaluate(policy, questions, config, count, config.eval_samples, tick, team)
    print(table({config.adapter or config.model: scores}))
    if bad := questions.report_bad():
        print(bad, file=sys.stderr)
    if config.out:
        team.once(write_whole, config.out, [json.dumps(scores, indent=1).encode()])
    return scores


if __name__ == "__main__":
    cli.launch(main, Config)
