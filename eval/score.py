r"""Score saved responses to a benchmark as its owners do, without a model.

    python -m eval.score --benchmark mathvision --data DIR --responses answers.jsonl --out scores.jsonl

Responses are JSONL, a line each with `id` and `response`, and `sample` where a question has several; or one JSON object
{id: {"response": …}}, as MathVista's. Other fields, such as extractions and verdicts of other programs, are not read.
Each line of the output is {"id", "sample", "key", "correct", "method"}: the extracted answer, the verdict, how the
answer was found. Printed are accuracy by category and, as the last line, one JSON object.

`--protocol ours` asks instead whether vote keys are equal (answers.py), and prints how often the two disagree; `key` is
then the vote key, null for a response that names no answer.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from answers import answer_key, vote_key
from eval import mathvision, mathvista
from eval.questions import rows
from shards import write_whole
from stats import markdown

BENCHMARKS = {"mathvision": mathvision, "mathvista": mathvista}


@dataclass
class Config:
    benchmark: Literal["mathvision", "mathvista"]
    """whose questions and protocol"""
    data: Path
    """folder in the owners' layout"""
    responses: Path
    """JSONL with id and response, or JSON by id"""
    out: Path
    """JSONL to write, a line for each response"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""


def read_responses(path: Path) -> Iterator[tuple[str, int, str]]:
    """(id, sample, text) of every response; null is an empty text. Raises ValueError naming the place."""
    for where, key, row in rows(path):
        try:
            uid = row.get("id", row.get("pid", key))
            if uid is None:
                raise KeyError("id")
            text, sample = row["response"], int(row.get("sample", 0))
            if not isinstance(text, str | None):
                raise TypeError(f"the response is {type(text).__name__}, not text")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where} is no response: {error!r}; expected id and response") from None
        yield str(uid), sample, text or ""


def scored(config: Config) -> list[dict]:
    """A row for each response: id, sample, key, correct, method, and `other`, the other protocol's verdict."""
    benchmark = BENCHMARKS[config.benchmark]
    questions = benchmark.questions(config.data)
    found, seen = [], set()
    for uid, sample, text in read_responses(config.responses):
        if uid not in questions:
            raise ValueError(f"{config.responses}: no question of {config.data} has the id {uid!r}")
        if (uid, sample) in seen:
            raise ValueError(f"{config.responses}: two responses to question {uid!r} with sample {sample}")
        seen.add((uid, sample))
        question = questions[uid]
        answer, method = benchmark.extract(text, question)
        key = vote_key(text, question.choices)
        official = benchmark.is_right(question, answer)
        ours = key is not None and key == answer_key(question.gold, question.choices)
        row = {"id": uid, "sample": sample, "key": answer, "correct": official, "method": method, "other": ours}
        if config.protocol == "ours":
            row |= {"key": key, "correct": ours, "method": "none" if key is None else "vote key", "other": official}
        found.append(row | question.categories)
    if not found:
        raise ValueError(f"{config.responses} holds no response")
    return found


def breakdown(responses: list[dict], categories: tuple[str, ...]) -> str:
    """Accuracy of all and by category, in per cent, as a Markdown table."""
    found = [("", "", "responses", "accuracy"), ("all", "", *_share(responses))]
    for category in categories:
        for value in sorted({value for row in responses for value in row[category]}):
            found.append((category, value, *_share([row for row in responses if value in row[category]])))
    return markdown(found)


def _share(responses: list[dict]) -> tuple[str, str]:
    return str(len(responses)), f"{100 * sum(row['correct'] for row in responses) / len(responses):.2f}"


def main(config: Config) -> dict:
    """Score, write `out`, print the tables; returns the object of the last line."""
    responses = scored(config)
    fields = ("id", "sample", "key", "correct", "method")
    lines = (json.dumps({name: row[name] for name in fields}, ensure_ascii=False) + "\n" for row in responses)
    write_whole(config.out, (line.encode(errors="replace") for line in lines))
    print(f"{config.benchmark}, {config.protocol} protocol, {config.responses}\n")
    print(breakdown(responses, BENCHMARKS[config.benchmark].CATEGORIES), end="\n\n")
    count, methods = len(responses), Counter(row["method"] for row in responses)
    correct, other = (sum(row[name] for row in responses) for name in ("correct", "other"))
    disagree = sum(row["correct"] != row["other"] for row in responses)
    names = ("official", "ours") if config.protocol == "official" else ("ours", "official")
    print(f"{names[0]} {correct / count:.2%}, {names[1]} {other / count:.2%}, {disagree} verdicts differ")
    result = {
        "benchmark": config.benchmark, "protocol": config.protocol, "n": count, "correct": correct,
        "accuracy": correct / count, "disagree": disagree, "methods": dict(sorted(methods.items())),
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
