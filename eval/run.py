"""Ask a model a benchmark's questions and score what it answers.

For each benchmark:
    1. read its questions in the owners' layout, from a folder or the hub, and choose the split that has pictures
    2. word the prompts: the owners' style, a paper's, or a template of your own
    3. sample by rollout.py, one prefill a question; responses.jsonl grows by whole questions
    4. score by the owners' rule (eval/score.py) into scores.jsonl and its summary

The same command again goes on where it was stopped. A question whose picture is missing or broken is left out and
named; one whose prompt is over --max-prompt-tokens counts as answered by nothing.

    python -m eval.run --benchmark mathvision --data MATH-V/data --model Qwen/Qwen2.5-VL-3B-Instruct --out runs/before
    python -m eval.run --benchmark all --data ROOT --run runs/train --out runs/after     # ROOT/mathvision, ROOT/wemath
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm
from tyro.conf import Suppress

import data
import presets
import rollout
import shards
from eval import score
from eval.benchmark import NAMES, Benchmark, Question, benchmark, folder_of
from policy import Policy
from stats import markdown

STEP = -1  # the step that keys the sampling noise, as in eval/heldout.py
AT_ONCE = 128  # responses sampled between two writes
SHOWN = 5  # of the questions that are left out
FREE = ("out", "device", "rollout_tokens", "protocol", "extractor", "pixels")  # may change when a run goes on
FROM_RUN = ("prompt", "max_new_tokens", "max_prompt_tokens", "min_pixels", "max_pixels")


@dataclass
class Config(rollout.Config):
    """Settings left at None are those of --run, else the defaults for the model (see presets.py)."""

    benchmark: Literal["mathvision", "mathverse", "mathvista", "wemath", "logicvista", "dynamath", "all"] = "all"
    """which questions; all: every benchmark that has a folder of its name in --data"""
    data: str | None = None
    """folder in the owners' layout, or hub id; with all, the folder of the benchmarks' folders"""
    out: Path = Path("runs/benchmarks")
    """folder to write to; with all, there is a folder for each benchmark in it"""
    run: Path | None = None
    """a training run, whose model, adapter, prompt, lengths and pixel limits are taken"""
    adapter: str | None = None
    """PEFT adapter"""
    prompt: str | None = None
    """official (the owners' style), mm-upt, self-judge, boxed, think-boxed, or a file with {question} in it"""
    split: str | None = None
    """file of questions, such as test; None: the largest whose pictures are all there"""
    limit: int | None = None
    """the first K questions only"""
    n: int = 1
    """responses to each question"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""
    extractor: Literal["rules", "model"] = "rules"
    """model: the model itself reads what the rules found no answer in"""
    preset: Suppress[None] = None
    steps: Suppress[int | None] = None
    questions_per_step: Suppress[int | None] = None
    group_size: Suppress[int | None] = None

    def resolve(self) -> "Config":
        if self.data is None:
            raise ValueError("--data is missing: a benchmark's folder or hub id; for all, the folder of their folders")
        if self.n < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"--n and --limit must be at least 1, not {self.n} and {self.limit}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"--n {self.n} at temperature 0 gives the same response each time: give --temperature 1")
        if self.run is not None:
            self._take_from_run()
        if self.prompt in presets.PRESETS:
            self.prompt = presets.PRESETS[self.prompt]["prompt"]
        style, self.group_size = self.prompt, self.n
        self.prompt = None if style == "official" else style
        super().resolve()
        self.prompt = style or self.prompt
        return self

    def _take_from_run(self) -> None:
        if self.model or self.adapter:
            raise ValueError("--run brings its own model and adapter: leave --model and --adapter out")
        of_run = shards.read_manifest(self.run)["config"]
        start = self.run / "start"  # what an adapter that the run started from was merged into
        self.model, self.adapter = str(start) if start.is_dir() else of_run["model"], str(self.run / "adapter")
        if not Path(self.adapter).is_dir():
            raise ValueError(f"{self.run} has no adapter yet: let the run end, or give --model and --adapter")
        for name in FROM_RUN:
            if getattr(self, name) is None:
                setattr(self, name, of_run[name])


# ------------------------------------------------------------------------------------------------ questions


def select(bench: Benchmark, folder: Path, split: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions to ask: those of one split, or of all files where these are variants; the first `limit`.

    Without `split`: of the splits whose pictures and answers are all there the largest, else the one with the most.
    Raises ValueError for a split that is not there, FileNotFoundError where no question can be asked.
    """
    splits = bench.questions(folder)
    if split is not None and split not in splits:
        raise ValueError(f"{folder} has no {split} among its files of questions, which are {', '.join(splits)}")
    if bench.variants and split is None:
        found = [question for questions in splits.values() for question in questions]
        found.sort(key=lambda q: [int(part) for part in re.findall(r"\d+", q.id)])  # variants of a question together
    else:
        usable = {name: sum(is_usable(folder, q) for q in questions) for name, questions in splits.items()}
        complete = [name for name in splits if usable[name] == len(splits[name])]
        found = splits[split or max(complete or splits, key=usable.get)]
    if not any(question.gold for question in found):
        raise ValueError(f"{folder}: the owners publish no answers to these questions; give another --split")
    if not any(is_usable(folder, question) for question in found):
        raise FileNotFoundError(f"{folder} has none of its pictures: {found[0].image} is expected in it")
    return found[:limit]


def is_usable(folder: Path, question: Question) -> bool:
    """Whether a question can be asked and scored: its picture is there or it has none, and its answer is known."""
    if not question.gold:
        return False
    return isinstance(question.image, bytes) or not question.image or picture_path(folder, question).is_file()


def picture_path(folder: Path, question: Question) -> Path:
    """Where a picture lies: at its path, or under `images`, which some owners' paths leave out."""
    path = folder / question.image
    return path if path.is_file() else folder / "images" / question.image


def ask(bench: Benchmark, folder: Path, question: Question, style: str) -> data.Question:
    """A question as the model gets it. Raises data.BadRow for a picture that is missing or broken."""
    image = question.image
    if isinstance(image, str) and image:
        if Path(image).is_absolute() or ".." in Path(image).parts or not picture_path(folder, question).is_file():
            raise data.BadRow(question.id, f"missing image file: {image}")
        image = picture_path(folder, question).read_bytes()
    text = bench.prompt(question) if style == "official" else question.text
    text = data.PLACEHOLDER.sub(" ", text).strip() or "Answer the question in the picture."
    choices = None if style == "official" or bench.choices_in_text else list(question.choices)
    return data.Question(question.id, text, choices or None, data.decode(question.id, image) if image else None, None)


def template(style: str) -> str:
    """The template around a question; of the owners' style, whose prompt is whole, the question alone."""
    return "{question}" if style == "official" else Policy.template(style)


# ------------------------------------------------------------------------------------------------ responses


def respond(
    policy: Policy,
    bench: Benchmark,
    folder: Path,
    questions: Sequence[Question],
    settings: rollout.Config,
    tick: Callable[[int], None] = lambda n: None,
) -> tuple[list[dict], dict[str, str]]:
    """Rows of responses to some questions (see responses.jsonl in `main`), and what was left out by id and reason.

    `settings.group_size` responses each; `settings.prompt` may be "official". `tick(n)` is called for every n of them.
    """
    asked, left_out = [], {}
    for question in questions:
        try:
            asked.append(ask(bench, folder, question, settings.prompt))
        except data.BadRow as bad:
            left_out[question.id] = bad.reason
    prompts, too_long = policy.encode(asked, template(settings.prompt), settings.max_prompt_tokens)
    groups = {
        prompt.uid: group
        for prompt, group in zip(prompts, rollout.sample_groups(policy, prompts, STEP, settings, tick), strict=True)
    }
    found = []
    for question in asked:
        for sample in range(settings.group_size):
            row = {"id": question.uid, "sample": sample, "response": "", "finish": "prompt too long", "tokens": 0}
            if question.uid in groups:
                r = groups[question.uid][sample]
                text = policy.tokenizer.decode(r.ids, skip_special_tokens=True)
                row |= {"response": text, "finish": r.finish, "tokens": len(r.ids)}
            found.append(row)
    tick((len(questions) - len(prompts)) * settings.group_size)
    for uid, tokens in too_long.items():
        limit = settings.max_prompt_tokens
        print(f"{uid}: prompt of {tokens} tokens is over --max-prompt-tokens {limit}, counts as wrong", file=sys.stderr)
    return found, left_out


def answered(path: Path, n: int) -> set[str]:
    """Ids with all their responses in a file that a stopped run left; what else is in it is removed."""
    if not path.exists():
        return set()
    rows: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # what follows the last line break was cut off
        rows.setdefault(json.loads(line)["id"], []).append(line + "\n")
    whole = {uid: lines for uid, lines in rows.items() if len(lines) == n}
    shards.write_whole(path, ("".join(lines).encode() for lines in whole.values()))
    return set(whole)


def answer(
    policy: Policy, bench: Benchmark, folder: Path, questions: list[Question], config: Config, out: Path
) -> None:
    """Append the responses that are still missing to out/responses.jsonl."""
    path, per_turn = out / "responses.jsonl", max(1, AT_ONCE // config.n)
    done, missing = answered(path, config.n), {}
    todo = [question for question in questions if question.id not in done]
    total = len(questions) * config.n
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=total, initial=total - len(todo) * config.n, desc=bench.title, unit="response") as bar,
    ):
        for start in range(0, len(todo), per_turn):
            rows, left_out = respond(policy, bench, folder, todo[start : start + per_turn], config, bar.update)
            missing |= left_out
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    for uid, reason in list(missing.items())[:SHOWN]:
        print(f"left out {uid}: {reason}", file=sys.stderr)
    if len(missing) > SHOWN:
        print(f"and {len(missing) - SHOWN} more of {len(questions)} questions", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ runs


def evaluate(policy: Policy, name: str, source: str, config: Config, out: Path) -> dict:
    """Responses and scores of one benchmark in `out`; what eval.score returns."""
    bench, folder = benchmark(name), folder_of(source)
    questions = select(bench, folder, config.split, config.limit)
    check(name, source, config, out)
    size = policy.image_processor.size  # of areas, though the names speak of edges
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]} | policy.pixel_limits
    settings = stored(name, source, config) | {"pixels": pixels}
    shards.write_manifest(
        out, stage="eval", config=settings, seed=config.seed, model=config.model, adapter=config.adapter
    )
    answer(policy, bench, folder, questions, config, out)
    paths = out / "responses.jsonl", out / "scores.jsonl"
    return score.score(score.Config(name, source, *paths, config.protocol, config.extractor), policy)


def stored(name: str, source: str, config: Config) -> dict:
    """The settings of one benchmark's run, with a digest of the template."""
    known = asdict(config) | {"benchmark": name, "data": source}
    digest = sha256(template(config.prompt).encode()).hexdigest()[:16]
    unused = ("run", "preset", "steps", "questions_per_step", "group_size")
    return {key: value for key, value in known.items() if key not in unused} | {"prompt_file": digest}


def check(name: str, source: str, config: Config, out: Path) -> None:
    """Raise ShardError if `out` holds responses that were made with other settings."""
    shards.check_manifest(out, stored(name, source, config), ignore=FREE)


def table(summaries: dict[str, dict]) -> str:
    """One line a benchmark: responses, accuracy, and the figures that its owners give besides."""
    rows = [("benchmark", "responses", "accuracy", "further figures")]
    for name, summary in summaries.items():
        found = score.figures(summary["metrics"])
        shown = [f"{key} {value}" for key, value in found if key in ("strict score", "loose score", "average", "worst")]
        rows.append((benchmark(name).title, str(summary["n"]), f"{100 * summary['accuracy']:.2f}", ", ".join(shown)))
    return markdown(rows)


def main(config: Config) -> dict:
    """Run, score and print; returns the object of the last line: that of eval.score or, of all, one by name."""
    config = replace(config).resolve()
    jobs, missing = {config.benchmark: (config.data, config.out)}, {}
    if config.benchmark == "all":
        root = Path(config.data).expanduser()
        jobs = {name: (str(root / name), config.out / name) for name in NAMES}
    for name, (source, out) in list(jobs.items()):
        try:
            select(benchmark(name), folder_of(source), config.split, config.limit)
            check(name, source, config, out)
        except (FileNotFoundError, ValueError) as error:
            if config.benchmark != "all" or isinstance(error, shards.ShardError):
                raise
            missing[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
            del jobs[name]
    if not jobs:
        raise ValueError(f"no benchmark can run from {config.data}: it needs folders such as {', '.join(NAMES[:2])} …")
    options = {name: getattr(config, name) for name in ("adapter", "dtype", "device", "min_pixels", "max_pixels")}
    policy = Policy.load(config.model, **options)
    summaries = {name: evaluate(policy, name, source, config, out) for name, (source, out) in jobs.items()}
    result = {name: score.last_line(summary) for name, summary in summaries.items()}
    if config.benchmark != "all":
        print(f"{score.report(summaries[config.benchmark])}\n{json.dumps(result[config.benchmark])}")
        return result[config.benchmark]
    result = {"benchmarks": result, "missing": missing}
    shards.write_whole(config.out / "summary.json", [json.dumps(result, indent=1).encode()])
    print(f"{table(summaries)}\n")
    for name, reason in missing.items():
        print(f"not run: {name} ({reason})")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
