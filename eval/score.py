r"""Score saved responses to a benchmark as its owners do, without a model.

    python -m eval.score --benchmark mathvision --data DIR --responses answers.jsonl --out scores.jsonl

Responses are JSONL, a line each with `id` and `response`, and `sample` where a question has several; or the files of
the benchmark's own repository, as its module says. Other fields, such as extractions and verdicts of other programs,
are not read. A line of the output is {"id", "sample", "key", "correct", "method", "vote_key", "categories"}: the
extracted answer, the verdict, the rule that found the answer. Beside it, `<out>.summary.json` holds the figures and how
they came about: extractor, versions and, for responses of eval.run, model, prompt style, pixel limits and sampling.
Printed are accuracy by category, the benchmark's further figures and, as the last line, one JSON object.

`--protocol ours` asks instead whether vote keys are equal (answers.py); `key` is then the vote key, null for a response
that names no answer. How often the two disagree is printed in either case.

`--extractor model --model M` has a model read the responses in which no rule finds an answer (prompts/extract.md); what
it gives is scored like a boxed answer, and counted as `model`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import shards
from answers import answer_key, vote_key
from eval.benchmark import Benchmark, Question, benchmark, folder_of, rows
from stats import markdown

FIELDS = ("id", "sample", "key", "correct", "method", "vote_key", "categories")


@dataclass
class Config:
    benchmark: Literal["mathvision", "mathverse", "mathvista", "wemath", "logicvista", "dynamath"]
    """whose questions and protocol"""
    data: str
    """folder in the owners' layout, or hub id"""
    responses: Path
    """JSONL with id and response, or the owners' JSON"""
    out: Path
    """JSONL to write, a line for each response"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""
    extractor: Literal["rules", "model"] = "rules"
    """model: a model reads what the rules found no answer in"""
    model: str | None = None
    """snapshot folder or hub id of that model"""
    adapter: str | None = None
    """its PEFT adapter"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""


def read_responses(path: Path, bench: Benchmark) -> Iterator[tuple[str, int, str]]:
    """(id, sample, text) of every response; null is an empty text. Raises ValueError naming the place."""
    for where, key, row in rows(path):
        try:
            uid, text = bench.response(key, row)
            sample = int(row.get("sample", 0))
            if not isinstance(text, str | None):
                raise TypeError(f"the response is {type(text).__name__}, not text")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where} is no response: {error!r}; expected id and response") from None
        yield uid, sample, text or ""


def verdict(bench: Benchmark, question: Question, text: str) -> dict:
    """What both protocols make of a response: answer, method, official, vote_key, ours."""
    answer, method = bench.extract(text, question)
    key = vote_key(text, question.choices, question.multi)
    return {
        "answer": answer,
        "method": method,
        "official": bench.is_right(question, answer),
        "vote_key": key,
        "ours": key is not None and key == answer_key(question.gold, question.choices, question.multi),
    }


def verdicts(config: Config, bench: Benchmark, questions: dict[str, Question], policy=None) -> list[dict]:
    """A row for each response: id, sample, categories and what `verdict` gives. Raises ValueError naming the place.

    `policy` is the model of `--extractor model`, loaded here if it is None.
    """

    def is_missing(found: dict) -> bool:
        return found["method"] in bench.unfound if config.protocol == "official" else found["vote_key"] is None

    found, seen, unread = [], set(), []
    for uid, sample, text in read_responses(config.responses, bench):
        if uid not in questions:
            raise ValueError(f"{config.responses}: no question of {config.data} has the id {uid!r}")
        question = questions[uid]
        if (question.id, sample) in seen:
            raise ValueError(f"{config.responses}: two responses to question {uid!r} with sample {sample}")
        seen.add((question.id, sample))
        row = {"id": question.id, "sample": sample, "categories": question.categories}
        found.append(row | verdict(bench, question, text))
        if is_missing(found[-1]):
            unread.append((found[-1], question, text))
    if not found:
        raise ValueError(f"{config.responses} holds no response")
    if config.extractor == "model" and unread:
        from eval import extractor  # torch is loaded for this alone

        policy = policy or extractor.load(config)
        for (row, question, _), answer in zip(unread, extractor.read(policy, unread), strict=True):
            read = None if answer is None else verdict(bench, question, rf"\boxed{{{answer}}}")
            if read and not is_missing(read):
                row |= read | {"method": "model"}
    return found


def breakdown(scored: list[dict], categories: tuple[str, ...]) -> str:
    """Accuracy of all and by category, in per cent, as a Markdown table."""
    found = [("", "", "responses", "accuracy"), ("all", "", *_share(scored))]
    for category in categories:
        for value in sorted({value for row in scored for value in row["categories"][category]}):
            found.append((category, value, *_share([row for row in scored if value in row["categories"][category]])))
    return markdown(found)


def _share(scored: list[dict]) -> tuple[str, str]:
    return str(len(scored)), f"{100 * sum(row['correct'] for row in scored) / len(scored):.2f}"


def figures(metrics: dict, name: str = "") -> list[tuple[str, str]]:
    """(name, value) of every figure in nested dicts, shares in per cent."""
    found = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            found += figures(value, f"{name}{key} ")
        else:
            shown = "undefined" if value is None else f"{100 * value:.2f}" if isinstance(value, float) else str(value)
            found.append((f"{name}{key}", shown))
    return found


def score(config: Config, policy=None) -> dict:
    """Score the responses, write `out` and its summary, print the tables; returns the object of the last line."""
    if config.extractor == "model" and policy is None and config.model is None:
        raise ValueError("--extractor model needs the model that is to read: give --model")
    bench = benchmark(config.benchmark)
    questions = bench.by_id(folder_of(config.data))
    scored = verdicts(config, bench, questions, policy)
    official = config.protocol == "official"
    for row in scored:
        found = {"key": row["answer"], "correct": row["official"]}
        if not official:
            by_model = row["method"] == "model"
            method = "none" if row["vote_key"] is None else "model" if by_model else "vote key"
            found = {"key": row["vote_key"], "correct": row["ours"], "method": method}
        row |= found
    count, correct = len(scored), sum(row["correct"] for row in scored)
    result = {
        "benchmark": config.benchmark,
        "protocol": config.protocol,
        "extractor": config.extractor,
        "n": count,
        "questions": len({row["id"] for row in scored}),
        "correct": correct,
        "accuracy": correct / count,
        "disagree": sum(row["official"] != row["ours"] for row in scored),
        "methods": dict(sorted(Counter(row["method"] for row in scored).items())),
        "metrics": bench.metrics(scored, questions),
    }
    lines = (json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) + "\n" for row in scored)
    shards.write_whole(config.out, (line.encode(errors="replace") for line in lines))
    summary = result | {"rules": rules(config, bench), "versions": shards.versions(), "responses_of": made_by(config)}
    shards.write_whole(summary_of(config.out), [json.dumps(summary, indent=1).encode()])

    print(f"{bench.title}, {config.protocol} protocol, {config.responses}; {rules(config, bench)}\n")
    print(breakdown(scored, bench.categories), end="\n\n")
    if result["metrics"]:
        print(markdown([("figure", "value"), *figures(result["metrics"])]), end="\n\n")
    both = {name: f"{sum(row[name] for row in scored) / count:.2%}" for name in ("official", "ours")}
    order = ("official", "ours") if official else ("ours", "official")
    print(f"{', '.join(f'{name} {both[name]}' for name in order)}, {result['disagree']} verdicts differ")
    print(json.dumps(result))
    return result


def summary_of(out: Path) -> Path:
    """Where the summary of a score file lies."""
    return out.with_name(f"{out.stem}.summary.json")


def rules(config: Config, bench: Benchmark) -> str:
    """In words, how answers are found in the responses."""
    if config.protocol == "ours":
        found = "answers are vote keys"
    else:
        theirs = " in place of the owners' large model" if bench.owners_use_a_model else " of the owners"
        found = f"answers extracted by rules{theirs}"
    return found + (", where they find none by a model" if config.extractor == "model" else "")


def made_by(config: Config) -> dict | None:
    """How responses of eval.run were made: the manifest beside them. None for any other responses."""
    folder = config.responses.parent
    if not (folder / "manifest.json").is_file():
        return None
    manifest = shards.read_manifest(folder)
    return manifest if manifest["stage"] == "eval" else None


def main(config: Config) -> dict:
    return score(config)


if __name__ == "__main__":
    main(tyro.cli(Config))
