"""Ask a model a benchmark's questions and score what it answers.

For each benchmark:
    1. read its questions in the owners' layout, from a folder or the hub, of the split with most pictures
    2. word the prompts: the owners' style, a paper's, or a template of your own
    3. sample, one prefill a question; responses.jsonl grows by whole questions
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from eval import score
from eval.benchmark import NAMES, Benchmark, Question, benchmark, folder_of, has_picture, picture_path
from upt import data, prompts, stages
from upt.errors import Lost, SettingError, ShardError
from upt.files import write_whole, writing
from upt.groups import manifests
from upt.groups.stats import markdown
from upt.ranges import Count, Few, Name, Temperature
from upt.run import cli, presets, progress, trained
from upt.run.locking import alone, holding
from upt.run.settings import Rollout, hidden
from upt.run.team import ALONE, Team, assemble

if TYPE_CHECKING:
    from upt.model import Policy

STEP = -1  # the step that keys the sampling noise, as in eval/heldout.py
AT_ONCE = 128  # responses sampled between two writes
TOO_LONG = "prompt too long"  # in place of how a response ended
SHOWN = 5  # of the questions that are left out
# What may change when a run goes on.
FREE = ("out", "device", "gpus", "slots", "protocol", "extractor", "pixels", "any_base")
FROM_RUN = ("prompt", "max_new_tokens", "max_prompt_tokens", "min_pixels", "max_pixels", "dtype", "quantize")


@dataclass
class Config(Rollout):
    """Settings left at None are those of --run, else the defaults for the model (see upt/run/presets.py)."""

    benchmark: Literal[*NAMES, "all"] = "all"
    """which questions; all: every benchmark that has a folder of its name in --data"""
    data: Name | None = None
    """folder in the owners' layout, or hub id; with all, the folder of the benchmarks' folders"""
    out: Path = Path("runs/benchmarks")
    """folder to write to; with all, there is a folder for each benchmark in it"""
    run: Path | None = None
    """a training run, or a checkpoint of one: its model, adapter, prompt, lengths and pixel limits are taken"""
    adapter: Name | None = None
    """PEFT adapter"""
    prompt: Name | None = None
    """official (the owners' style), mm-upt, self-judge, boxed, think-boxed, or a file with {question} in it"""
    split: Name | None = None
    """file of questions, such as test; None: the one with most pictures"""
    max_prompt_tokens: Count | None = None
    """questions with longer prompts count as answered wrong"""
    limit: Count | None = None
    """the first K questions only"""
    n: Few = 1
    """responses to each question"""
    temperature: Temperature = 0.0
    """sampling temperature; 0 is greedy"""
    protocol: Literal["official", "ours"] = "official"
    """official: the owners' rule; ours: equality of vote keys"""
    extractor: Literal["rules", "model"] = "rules"
    """model: the model itself reads what the rules found no answer in"""
    preset: None = hidden(None)
    steps: Count | None = hidden(None)
    questions_per_step: Count | None = hidden(None)
    group_size: Few | None = hidden(None)
    view: None = hidden(None)

    def resolve(self) -> "Config":
        if self.data is None:
            raise SettingError("--data is missing: a benchmark's folder or hub id; for all, the folder of theirs")
        if self.n > 1 and self.temperature == 0:
            raise SettingError(f"--n {self.n} at temperature 0 gives the same response each time: give --temperature 1")
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
        folder, _, _, settings = trained.taken_from_run(self)
        if self.run.absolute() != folder.absolute() and self.out.absolute().is_relative_to(self.run.absolute()):
            raise SettingError(f"--out {self.out} is in a checkpoint, which may be removed: give another (OUT=)")
        trained.take(self, settings, {name: name for name in FROM_RUN})


# ------------------------------------------------------------------------------------------------ questions


def select(
    bench: Benchmark, folder: Path, split: str | None = None, limit: int | None = None
) -> tuple[str, list[Question]]:
    """The questions to ask, the first `limit` of a split, and its name; "all" where the files are variants.

    Without `split` it is the one with most pictures, of equal ones that which lacks fewest. Questions whose answer the
    owners keep are left out. Raises ValueError for a split that is not there, FileNotFoundError where nothing can be
    asked.
    """
    splits = bench.questions(folder, pictures=True)
    if split is not None and split not in splits:
        raise SettingError(f"{folder} has no {split} among its files of questions, which are {', '.join(splits)}")
    if bench.variants and split is None:
        splits = {"all": [question for questions in splits.values() for question in questions]}
        splits["all"].sort(key=lambda q: [int(part) for part in re.findall(r"\d+", q.id)])  # seed by seed

    def fitness(name: str) -> tuple:
        there = [question for question in splits[name] if question.gold and has_picture(folder, question)]
        return sum(question.image != "" for question in there), len(there) / len(splits[name]), len(there)

    split = split or max(splits, key=fitness)
    found = [question for question in splits[split] if question.gold]
    if not found:
        raise SettingError(f"{folder}: the owners publish no answers to {split}; give another --split")
    if not any(has_picture(folder, question) for question in found[:limit]):
        raise FileNotFoundError(f"{folder} has none of the pictures of {split}: {found[0].image} is expected in it")
    return split, found[:limit]


def ask(bench: Benchmark, folder: Path, question: Question, style: str) -> data.Question:
    """A question as the model gets it. Raises data.BadRow for a picture that is missing or broken."""
    image = question.image
    if isinstance(image, str) and image:
        if Path(image).is_absolute() or ".." in Path(image).parts or not has_picture(folder, question):
            raise data.BadRow(question.id, f"missing image file: {image}")
        image = picture_path(folder, question).read_bytes()
    elif not image and data.PLACEHOLDER.search(question.text):
        raise data.BadRow(question.id, "no image where the text announces one")
    text = bench.prompt(question) if style == "official" else question.text
    text = data.PLACEHOLDER.sub(" ", text).strip() or "Answer the question in the picture."
    choices = None if style == "official" or bench.choices_in_text else list(question.choices)
    return data.Question(question.id, text, choices or None, data.decode(question.id, image) if image else None, None)


def template(style: str) -> str:
    """The template around a question; of the owners' style, whose prompt is whole, the question alone."""
    return "{question}" if style == "official" else prompts.template(style)


# ------------------------------------------------------------------------------------------------ responses


def respond(
    policy: "Policy",
    bench: Benchmark,
    folder: Path,
    questions: Sequence[Question],
    settings: Rollout,
    tick: Callable[[int], None] = lambda n: None,
    team: Team = ALONE,
) -> tuple[list[dict], dict[str, str]]:
    """Rows of responses to some questions (see responses.jsonl in `main`), and what was left out by id and reason.

    `settings.group_size` responses each; `settings.prompt` may be "official". `tick(n)` is called for every n of them.
    """

    def responses(part: list[Question]) -> list[tuple[list[dict], str | None, int]]:
        """Of each question its rows; why it was left out; the tokens of its prompt where these are too many, else 0."""
        asked, left_out = [], {}
        for question in part:
            try:
                asked.append(ask(bench, folder, question, settings.prompt))
            except data.BadRow as bad:
                left_out[question.id] = bad.reason
        encoded, too_long = policy.encode(asked, template(settings.prompt), settings.max_prompt_tokens)
        sampled = stages.sampling.sample_groups(policy, encoded, STEP, settings, tick)
        groups = {prompt.uid: group for prompt, group in zip(encoded, sampled, strict=True)}
        tick((len(part) - len(encoded)) * settings.group_size)
        return [
            (
                [] if q.id in left_out else rows_of(policy, q.id, groups.get(q.id), settings),
                left_out.get(q.id),
                too_long.get(q.id, 0),
            )
            for q in part
        ]

    found, missing = [], {}
    for question, (rows, reason, tokens) in zip(questions, team.spread(responses, questions), strict=True):
        found += rows
        if reason is not None:
            missing[question.id] = reason
        if tokens:
            what = f"prompt of {tokens} tokens is over --max-prompt-tokens {settings.max_prompt_tokens}"
            print(f"{question.id}: {what}, counts as wrong", file=sys.stderr)
    return found, missing


def rows_of(policy: "Policy", uid: str, group: list | None, settings: Rollout) -> list[dict]:
    """The rows of one question's responses; of one whose prompt is too long, which has no group, empty ones."""
    rows = [
        {"id": uid, "sample": i, "response": "", "finish": TOO_LONG, "tokens": 0} for i in range(settings.group_size)
    ]
    for row, r in zip(rows, group or ()):
        text = policy.tokenizer.decode(r.ids, skip_special_tokens=True)
        row |= {"response": text, "finish": r.finish, "tokens": len(r.ids)}
    return rows


def answered(path: Path, n: int) -> set[str]:
    """Ids with all their responses in a file that a stopped run left; what else is in it is removed."""
    if not path.exists():
        return set()
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):  # the rest was cut off
        try:
            found.setdefault(json.loads(line)["id"], []).append(line + "\n")
        except (ValueError, KeyError, TypeError):
            raise SettingError(f"{path}:{number} is no response: remove the line to ask its question again") from None
    whole = {uid: lines for uid, lines in found.items() if len(lines) == n}
    write_whole(path, ("".join(lines).encode() for lines in whole.values()))
    return set(whole)


def answer(
    policy: "Policy", bench: Benchmark, folder: Path, questions: list[Question], config: Config, out: Path, team: Team
) -> dict[str, str]:
    """Append the responses that are still missing to out/responses.jsonl; what was left out, by id and reason."""
    path, per_turn = out / "responses.jsonl", max(1, AT_ONCE // config.n) * team.size
    done, missing = team.once(answered, path, config.n), {}
    todo = [question for question in questions if question.id not in done]
    total = len(questions) * config.n
    with progress.bar(total=total, initial=total - len(todo) * config.n, desc=bench.title, unit="response") as bar:
        tick = partial(progress.advance, bar, team=team)
        for start in range(0, len(todo), per_turn):
            rows, left_out = respond(policy, bench, folder, todo[start : start + per_turn], config, tick, team)
            missing |= left_out
            team.once(append, path, rows)
    for uid, reason in list(missing.items())[:SHOWN]:
        print(f"left out {uid}: {reason}", file=sys.stderr)
    if len(missing) > SHOWN:
        print(f"and {len(missing) - SHOWN} more of {len(questions)} questions", file=sys.stderr)
    return missing


def append(path: Path, rows: list[dict]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------ runs


class Job(NamedTuple):
    """One benchmark of a run: what is asked, where it goes, and the settings that its manifest holds."""

    name: str
    folder: Path
    questions: list[Question]
    out: Path
    settings: dict


def pictured(job: Job) -> int:
    """How many of the questions of a job have a picture that is there."""
    return sum(question.image != "" and has_picture(job.folder, question) for question in job.questions)


def prepare(name: str, source: str, config: Config, out: Path) -> Job:
    """A job whose folder is fresh or holds the same job's responses; raises ShardError otherwise."""
    folder = folder_of(source)
    split, questions = select(benchmark(name), folder, config.split, config.limit)
    known = asdict(config) | {"benchmark": name, "data": source, "split": split}
    unused = ("run", "preset", "steps", "questions_per_step", "group_size", "view")
    asked = repr([(question.id, question.text, question.choices, question.query) for question in questions])
    digests = {"prompt_file": template(config.prompt), "questions_file": asked}
    digests = {key: sha256(text.encode(errors="replace")).hexdigest()[:16] for key, text in digests.items()}
    job = Job(name, folder, questions, out, {key: v for key, v in known.items() if key not in unused} | digests)
    if (out / "responses.jsonl").exists() and not (out / "manifest.json").exists():
        raise ShardError(f"{out} has responses of unknown settings (no manifest.json there); use another --out")
    manifests.check(out, "eval", job.settings, ignore=FREE)
    return job


def job_of(name: str, source: str, config: Config, out: Path) -> Job | str:
    """The same; of --benchmark all, why a benchmark is left out where it cannot be asked."""
    try:
        if config.benchmark == "all" and not Path(source).is_dir():
            raise FileNotFoundError(f"there is no folder {source}")
        return prepare(name, source, config, out)
    except (FileNotFoundError, ValueError) as error:
        if config.benchmark != "all" or isinstance(error, ShardError):
            raise
        return str(error)


def evaluate(policy: "Policy", job: Job, config: Config, team: Team) -> dict:
    """Responses and scores of one benchmark; the summary of eval.score, with what was left out."""
    bench, out, own = benchmark(job.name), job.out, {"model": config.model, "adapter": config.adapter}

    def claim() -> None:
        if not (out / "manifest.json").exists():
            pixels = {"pixels": policy.family.area_limits()}
            manifests.write(out, stage="eval", config=job.settings | pixels, seed=config.seed, **own)

    team.once(claim)
    left_out = answer(policy, bench, job.folder, job.questions, config, out, team)
    paths = out / "responses.jsonl", out / "scores.jsonl"
    settings = score.Config(job.name, str(job.folder), *paths, config.protocol, config.extractor, **own)
    rows = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    too_long = len({row["id"] for row in rows if row["finish"] == TOO_LONG})
    asked = {"split": job.settings["split"], "asked": len(job.questions)}
    return team.once(score.score, settings, policy, asked | {"left_out": len(left_out), "too_long": too_long})


def table(summaries: dict[str, dict]) -> str:
    """One line a benchmark: responses, accuracy by both protocols, and the figures that its owners give besides."""
    rows = [("benchmark", "responses", "official", "ours", "verdicts differ", "further figures")]
    for name, summary in summaries.items():
        found = score.figures(summary["metrics"])
        shown = [f"{key} {value}" for key, value in found if key in ("strict score", "loose score", "average", "worst")]
        both = [f"{100 * summary['accuracies'][protocol]:.2f}" for protocol in ("official", "ours")]
        title = benchmark(name).title + "*" * ("owners' large model" in summary["extraction"])
        rows.append((title, str(summary["n"]), *both, str(summary["disagree"]), ", ".join(shown)))
    return markdown(rows) + "\n\n* answers extracted by rules in place of the owners' large model"


def status(summary: dict) -> str:
    """What was asked, and what of it has no response."""
    parts = [f"{summary['asked']} questions of the split {summary['split']}"]
    parts += [f"{summary[name]} {name.replace('_', ' ')}" for name in ("left_out", "too_long") if summary[name]]
    return ", ".join(parts)


@alone
def main(config: Config) -> dict:
    """Run, score and print; returns the object of the last line: that of eval.score or, of all, one by name."""
    config = replace(config).resolve()
    team = assemble(config.device)
    every = config.benchmark == "all"
    wanted, jobs, missing, summaries = {config.benchmark: (config.data, config.out)}, [], {}, {}
    if every:
        manifests.check_own(config.out, "eval")
        root = Path(config.data).expanduser()
        wanted = {name: (str(root / name), config.out / name) for name in NAMES}
    for name, (source, out) in wanted.items():
        job = team.in_turn(job_of, name, source, config, out)
        if isinstance(job, Job):
            jobs.append(job)
        else:
            missing[name] = job
            print(f"{name} is left out: {job}", file=sys.stderr)
    if not jobs:
        raise SettingError(f"no benchmark runs from {config.data}: it needs folders such as {', '.join(NAMES[:2])} …")
    many = ", ".join(f"{len(job.questions)} questions of {job.name}, {pictured(job)} with a picture" for job in jobs)
    what = config.model + (f" with {config.adapter}" if config.adapter else "")
    print(
        f"asking {what} {many}: {config.n} responses each, prompt {config.prompt}, into {config.out}", file=sys.stderr
    )
    at_once = {"questions_per_step": max(1, AT_ONCE // config.n), "group_size": config.n}
    policy = team.here(partial(trained.load_policy, config, **at_once))
    try:
        for job in jobs:
            try:
                with ExitStack() as stack:
                    if every:  # of a single one it is --out itself, which is held
                        team.once(stack.enter_context, holding(job.out))
                    summaries[job.name] = evaluate(policy, job, config, team)
            except ValueError as error:  # such as that all pictures are broken; one is in every process
                if not every or isinstance(error, Lost):
                    raise
                missing[job.name] = str(error)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {config.out}", file=sys.stderr)
        raise
    result = {name: score.last_line(summary) for name, summary in summaries.items()}
    if not every:
        summary = summaries[config.benchmark]
        print(f"{score.report(summary)}\n{status(summary)}\n{json.dumps(result[config.benchmark])}")
        return result[config.benchmark]
    result = {"benchmarks": result, "missing": missing}
    team.once(write_whole, config.out / "summary.json", [json.dumps(result, indent=1).encode()])
    print(f"{table(summaries)}\n")
    for name, summary in summaries.items():
        print(f"{name}: {status(summary)}")
    for name, reason in missing.items():
        print(f"not run: {name} ({reason})")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
