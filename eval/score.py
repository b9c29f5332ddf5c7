r"""Score saved responses to a benchmark as its owners do, without a model.

    python -m eval.score --benchmark mathvision --data DIR --responses answers.jsonl --out scores.jsonl

Responses are JSONL, a line each with `id` and `response`, and `sample` where a question has several; other fields, such
as extractions and verdicts of other programs, are not read. Each line of the output is {"id", "sample", "key",
"correct", "method"}: the extracted answer, the verdict, how the answer was found. Printed are accuracy by category and,
as the last line, one JSON object.

`--protocol ours` asks instead whether vote keys are equal (answers.py), and prints how often the two disagree; `key` is
then the vote key, null for a response that names no answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from answers import answer_key, vote_key
from eval import mathvision
from shards import write_whole
from stats import markdown

BENCHMARKS = {"mathvision": mathvision}


@dataclass
class Config:
    benchmark: Literal["mathvision"]
    """whose questions and protocol"""
    data: Path
    """folder in the owners' layout"""
    responses: Path
    """JSONL with id and response"""
    out: Path
    """JSONL to write, a line for each response"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""


def read_responses(path: Path) -> Iterator[tuple[str, int, str]]:
    """(id, sample, text) of every line. Raises ValueError naming the line. A response of null is an empty one."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, sample = row["response"], int(row.get("sample", 0))
                if not isinstance(text, str | None):
                    raise TypeError(f"the response is {type(text).__name__}, not text")
                yield str(row["id"]), sample, text or ""
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is no response: {error!r}; expected id and response") from None


def scored(config: Config) -> list[dict]:
    """A row for each response: id, sample, key, correct, method, and `other`, the other protocol's verdict."""
    benchmark = BENCHMARKS[config.benchmark]
    questions = benchmark.questions(config.data)
    rows, seen = [], set()
    for uid, sample, text in read_responses(config.responses):
        if uid not in questions:
            raise ValueError(f"{config.responses}: no question of {config.data} has the id {uid!r}")
        if (uid, sample) in seen:
            raise ValueError(f"{config.responses}: two responses to question {uid!r} with sample {sample}")
        seen.add((uid, sample))
        question = questions[uid]
        answer, method = benchmark.extract(text)
        key = vote_key(text, question.choices)
        official = benchmark.is_right(question, answer)
        ours = key is not None and key == answer_key(question.gold, question.choices)
        row = {"id": uid, "sample": sample, "key": answer, "correct": official, "method": method, "other": ours}
        if config.protocol == "ours":
            row |= {"key": key, "correct": ours, "method": "none" if key is None else "vote key", "other": official}
        rows.append(row | question.categories)
    if not rows:
        raise ValueError(f"{config.responses} holds no response")
    return rows


def breakdown(rows: list[dict], categories: tuple[str, ...]) -> str:
    """Accuracy of all and by category, in per cent, as a Markdown table."""
    found = [("", "", "responses", "accuracy"), ("all", "", *_share(rows))]
    for category in categories:
        for value in sorted({row[category] for row in rows}):
            found.append((category, value, *_share([row for row in rows if row[category] == value])))
    return markdown(found)


def _share(rows: list[dict]) -> tuple[str, str]:
    return str(len(rows)), f"{100 * sum(row['correct'] for row in rows) / len(rows):.2f}"


def main(config: Config) -> dict:
    """Score, write `out`, print the tables; returns the object of the last line."""
    rows = scored(config)
    fields = ("id", "sample", "key", "correct", "method")
    lines = (json.dumps({name: row[name] for name in fields}, ensure_ascii=False) + "\n" for row in rows)
    write_whole(config.out, (line.encode(errors="replace") for line in lines))
    print(f"{config.benchmark}, {config.protocol} protocol, {config.responses}\n")
    print(breakdown(rows, BENCHMARKS[config.benchmark].CATEGORIES), end="\n\n")
    correct, other = (sum(row[name] for row in rows) for name in ("correct", "other"))
    disagree = sum(row["correct"] != row["other"] for row in rows)
    names = ("official", "ours") if config.protocol == "official" else ("ours", "official")
    print(f"{names[0]} {correct / len(rows):.2%}, {names[1]} {other / len(rows):.2%}, {disagree} verdicts differ")
    result = {
        "benchmark": config.benchmark, "protocol": config.protocol, "n": len(rows), "correct": correct,
        "accuracy": correct / len(rows), "disagree": disagree,
        "methods": {m: sum(row["method"] == m for row in rows) for m in sorted({row["method"] for row in rows})},
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
