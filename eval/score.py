r"""Score saved responses to a benchmark as its owners do, without a model.

    python -m eval.score --benchmark mathvision --data DIR --responses answers.jsonl --out scores.jsonl

Responses are JSONL, a line each with `id` and `response`, and `sample` where a question has several; or the files of
the benchmark's own repository, as its module says. Other fields, such as extractions and verdicts of other programs,
are not read. A line of the output is {"id", "sample", "key", "correct", "method", "vote_key", "categories"}: the
extracted answer, the verdict, the rule that found the answer. Beside it, `<out>.summary.json` holds the figures and how
they came about: extractor, versions and, for responses of eval.run, model, prompt style, pixel limits and sampling.
Printed are accuracy by category, the benchmark's further figures and, as the last line, one JSON object.

`--protocol ours` asks whether vote keys are equal (upt/answers); `key` is then the vote key, null for a response
that names no answer. How often the two disagree is printed in either case.

`--extractor model --model M` has a model read the responses in which no rule finds an answer (prompts/extract.md); what
it gives is scored like a boxed answer, and counted as `model`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from eval.benchmark import NAMES, Benchmark, Question, benchmark, folder_of, rows
from upt import model
from upt.answers import answer_key, vote_key
from upt.errors import DataError, SettingError, in_words
from upt.files import check_file, write_whole
from upt.groups import manifests
from upt.groups.stats import FEW_NOTE, counted, markdown
from upt.model.folders import check_adapter
from upt.ranges import Name
from upt.run import cli
from upt.run.typed import Typed

FIELDS = ("id", "sample", "key", "correct", "method", "vote_key", "categories")


@dataclass
class Config(Typed):
    benchmark: Literal[*NAMES]
    """whose questions and protocol"""
    data: Name
    """folder in the owners' layout, or hub id"""
    responses: Path
    """JSONL with id and response, or the owners' JSON"""
    out: Path
    """JSONL to write, a line for each response"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""
    extractor: Literal["rules", "model"] = "rules"
    """model: a model reads what the rules found no answer in"""
    model: Name | None = None
    """snapshot folder or hub id of that model"""
    adapter: Name | None = None
    """its PEFT adapter"""
    any_base: bool = False
    """take it although it was made for another model"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N"""


def read_responses(path: Path, bench: Benchmark) -> Iterator[tuple[str, int, str]]:
    """(id, sample, text) of every response; null is an empty text. Raises ValueError naming the place."""
    for where, key, row in rows(path):
        try:
            if not isinstance(row, dict):
                raise TypeError(f"it is {type(row).__name__}, not an object with fields")
            uid, text = bench.response(key, row)
            sample = row.get("sample", 0)
            if type(sample) is not int:
                raise TypeError(f"the sample is {sample!r}, not a whole number")
            if not isinstance(text, str | None):
                raise TypeError(f"the response is {type(text).__name__}, not text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where} is no response: {in_words(error)}; expected an object with id and response"
            ) from None
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
            example = next(iter(questions.values())).id
            raise DataError(
                f"{config.responses}: no question of {config.data} has the id {uid!r}; ids there read like {example!r}"
            )
        question = questions[uid]
        if not question.gold:
            raise DataError(
                f"{config.responses}: the owners publish no answer to question {uid!r}; score another split"
            )
        if (question.id, sample) in seen:
            raise DataError(f"{config.responses}: two responses to question {uid!r} with sample {sample}; keep one")
        seen.add((question.id, sample))
        row = {"id": question.id, "sample": sample, "categories": question.categories}
        found.append(row | verdict(bench, question, text))
        if is_missing(found[-1]):
            unread.append((found[-1], question, text))
    if not found:
        raise DataError(f"{config.responses} holds no response; give the file that eval.run wrote, or your own")
    if config.extractor == "model" and unread:
        from eval import extractor  # torch is loaded for this alone

        policy = policy or extractor.load(config)
        for (row, question, _), answer in zip(unread, extractor.read(policy, unread), strict=True):
            read = None if answer is None else verdict(bench, question, rf"\boxed{{{answer}}}")
            if read and not is_missing(read):
                row |= read | {"method": "model"}
    return found


def breakdown(scored: list[dict], categories: tuple[str, ...]) -> dict[str, dict[str, dict]]:
    """Responses and accuracy by the values of each category: {category: {value: {"n", "accuracy"}}}."""
    found = {}
    for category in categories:
        values = sorted({value for row in scored for value in row["categories"][category]})
        found[category] = {value: share([r for r in scored if value in r["categories"][category]]) for value in values}
    return found


def share(scored: list[dict]) -> dict:
    return {"n": len(scored), "accuracy": sum(row["correct"] for row in scored) / len(scored)}


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


def check_extractor(config: Config) -> None:
    """Raise UserError for a model that cannot read, whether or not the rules leave it anything."""
    if config.model is None:
        raise SettingError("--extractor model needs the model that is to read: give --model")
    check_adapter(config.adapter, "--adapter ")
    model.model_config(config.model)
    model.checked_device(config.device)


def score(config: Config, policy=None, asked: dict | None = None) -> dict:
    """Score the responses, write `out` and its summary; returns the summary.

    `policy`: see `verdicts`. `asked` goes into the summary: what eval.run knows of the questions besides.
    """
    config = replace(config)
    check_file(config.out)
    if config.extractor == "model" and policy is None:
        check_extractor(config)
    if config.out.resolve() == config.responses.resolve():
        raise DataError(f"--out {config.out} would replace the responses: give another file")
    bench = benchmark(config.benchmark)
    questions = bench.by_id(folder_of(config.data))
    scored = verdicts(config, bench, questions, policy)
    for row in scored:
        if config.protocol == "official":
            row |= {"key": row["answer"], "correct": row["official"]}
        else:
            method = "model" if row["method"] == "model" else "vote key"
            row |= {"key": row["vote_key"], "correct": row["ours"]}
            row["method"] = method if row["vote_key"] is not None else "none"
    methods = Counter(row["method"] for row in scored)
    summary = {
        "benchmark": config.benchmark,
        "protocol": config.protocol,
        "extractor": config.extractor,
        "questions": len({row["id"] for row in scored}),
        "of_questions": len({question.id for question in questions.values()}),
        **share(scored),
        "correct": sum(row["correct"] for row in scored),
        "accuracies": {name: sum(row[name] for row in scored) / len(scored) for name in ("official", "ours")},
        "disagree": sum(row["official"] != row["ours"] for row in scored),
        "methods": dict(sorted(methods.items())),
        "unread": sum(methods[name] for name in (bench.unfound if config.protocol == "official" else ("none",))),
        "metrics": bench.metrics(scored, questions),
        "categories": breakdown(scored, bench.categories),
        "extraction": extraction(config, bench),
        "extractor_model": None if config.extractor == "rules" else identity(config),
        "versions": manifests.versions(),
        "responses": made_by(config),
        **(asked or {}),
    }
    lines = (json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False) + "\n" for row in scored)
    write_whole(config.out, (line.encode(errors="replace") for line in lines))
    write_whole(summary_of(config.out), [json.dumps(summary, indent=1).encode()])
    return summary


def report(summary: dict) -> str:
    """The figures of a summary as Markdown, shares in per cent."""
    title = benchmark(summary["benchmark"]).title
    found = [("", "", "responses", "accuracy"), ("all", "", counted(summary["n"]), f"{100 * summary['accuracy']:.2f}")]
    for category, values in summary["categories"].items():
        found += [(category, value, counted(of["n"]), f"{100 * of['accuracy']:.2f}") for value, of in values.items()]
    parts = [f"{title}, {summary['protocol']} protocol; {summary['extraction']}", markdown(found)]
    parts += [FEW_NOTE] * any(row[2].endswith("*") for row in found)
    if summary["metrics"]:
        parts.append(markdown([("figure", "value"), *figures(summary["metrics"])]))
    both = ", ".join(f"{name} {100 * value:.2f}" for name, value in summary["accuracies"].items())
    counts = f"{summary['questions']} of {summary['of_questions']} questions have a response"
    unread = f"in {summary['unread']} of {summary['n']} responses no answer was found"
    return "\n\n".join([*parts, f"{both}; {summary['disagree']} verdicts differ\n{counts}; {unread}"])


def last_line(summary: dict) -> dict:
    """The part of a summary that is printed as one line of JSON."""
    longer = ("categories", "versions", "responses", "extractor_model")
    return {name: value for name, value in summary.items() if name not in longer}


def summary_of(out: Path) -> Path:
    """Where the summary of a score file lies."""
    return out.with_name(f"{out.stem}.summary.json")


def extraction(config: Config, bench: Benchmark) -> str:
    """In words, how answers are found in the responses."""
    by_model = config.extractor == "model"
    if config.protocol == "ours":
        return "answers are vote keys" + ", where there is none of what a model reads" * by_model
    stand_in = " in place of the owners' large model" if bench.owners_use_a_model else ""
    return f"answers extracted by rules{stand_in}" + ", where they find none by a model" * by_model


def made_by(config: Config) -> dict | None:
    """How responses of eval.run were made: the manifest beside them. None for any other responses."""
    folder = config.responses.parent
    if config.responses.name != "responses.jsonl" or not (folder / "manifest.json").is_file():
        return None
    manifest = manifests.read(folder)
    return manifest if manifest["stage"] == "eval" else None


def identity(config: Config) -> dict | None:
    """Names and fingerprints of the model that extracts and of its adapter."""
    named = {"model": config.model, "adapter": config.adapter}
    return {role: {"name": name, "fingerprint": manifests.fingerprint(name)} for role, name in named.items() if name}


def main(config: Config) -> dict:
    """Score, print the tables and, as the last line, one JSON object, which is returned."""
    summary = score(config)
    result = last_line(summary)
    print(f"{report(summary)}\n{json.dumps(result)}")
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
