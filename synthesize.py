r"""The model writes its own training questions (MM-UPT, arXiv 2505.22453), without labels.

    1. ask      have the model write k questions from each source question and its picture
                in-context   the picture and its question, and ask for a new, different one
                direct       the picture alone
    2. filter   rules on the text of a question (filters.py)
    3. answer   sample responses to those that are left, and keep the ones whose majority has a share within a band and
                whose abstentions are few: neither trivial nor beyond the model (filters.py, too)
    4. write    a data set like any other: parquet in the hub's schema with a card, and provenance.jsonl, a line for
                each candidate, kept or not: its uid, source, mode, prompt, picture, sampled text, the question in it,
                whether it passed each filter, the majority's share and that of abstentions

No gold exists for these questions, and none is written. The filters are ours; `--filters none` keeps all that is not
empty. Shards of what was asked and answered lie in OUT/asked and OUT/answered; the same command again goes on from the
last whole one, and ends with the same bytes.

    python synthesize.py --data shapes --mode in-context --per-image 2 --out runs/questions
    python train_upt.py --data runs/questions --model models/tiny --out runs/evolved
"""

import io
import json
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import datasets
import tyro
from tqdm import tqdm
from tyro.conf import Suppress

import data
import filters
import rollout
import runs
import shards
from policy import PROMPTS, Policy, PolicyError
from stats import markdown
from votes import abstentions, majority_share

FREE = ("out", "device", "rollout_tokens", "steps")


@dataclass
class Settings:
    """How questions are asked for and which are kept."""

    per_image: int = 1
    """questions to write from each source question and its picture, k"""
    filters: str = "all"
    """which of these are kept: all, none, or names of filters.py with commas between them"""
    ask_prompt: str | None = None
    """what asks for a question: a name in prompts/ or a file; None: ask-in-context or ask-direct"""
    ask_max_new_tokens: int | None = None
    """longest question, in tokens; None: as long as a response"""
    min_agreement: float = 0.25
    """filter agreement: the majority's least share of the responses to a question"""
    max_agreement: float = 0.99
    """filter agreement: its largest share"""
    max_abstentions: float = 0.5
    """filter abstention: largest share of responses without an answer"""

    def check_asking(self, mode: str) -> None:
        """Raise ValueError for settings that cannot work, with what to change. Sampling settings are filled in."""
        if self.per_image < 1:
            raise ValueError(f"--per-image must be at least 1, not {self.per_image}")
        if self.ask_max_new_tokens is not None and self.ask_max_new_tokens < 1:
            raise ValueError(f"--ask-max-new-tokens must be at least 1, not {self.ask_max_new_tokens}")
        if self.temperature == 0 and self.per_image > 1:
            raise ValueError(
                "--temperature 0 writes the same question again: give a temperature above 0, or --per-image 1"
            )
        if not 0 <= self.min_agreement <= self.max_agreement <= 1 or not 0 <= self.max_abstentions <= 1:
            raise ValueError("shares go from 0 to 1: --min-agreement <= --max-agreement, and --max-abstentions")
        if "agreement" in self.chosen() and (self.temperature == 0 or self.group_size < 2):
            raise ValueError(
                "the filter agreement needs several samples: --temperature above 0 and --group-size 2 or more"
            )
        asking(mode, self.ask_prompt)

    def chosen(self) -> tuple[str, ...]:
        """The filters by name, in the order of filters.NAMES. Raises ValueError for a name that is none."""
        if self.filters in ("all", "none"):
            return filters.NAMES if self.filters == "all" else ()
        named = [name.strip() for name in self.filters.split(",")]
        if unknown := [name for name in named if name not in filters.NAMES]:
            wanted = f"all or none by itself, or names among {', '.join(filters.NAMES)}"
            raise ValueError(f"--filters {self.filters}: {unknown[0]!r} is no filter; give {wanted}")
        return tuple(name for name in filters.NAMES if name in named)


@dataclass
class Config(Settings, rollout.Config):
    """Settings left at None take the default for the model (see presets.py)."""

    mode: Literal["in-context", "direct"] = "in-context"
    """in-context: the model sees the picture and its question; direct: the picture alone"""
    out: Path = Path("runs/questions")
    """folder of the data set to write"""
    preset: Suppress[None] = None
    steps: Suppress[int | None] = None

    def resolve(self) -> "Config":
        super().resolve()
        self.check_asking(self.mode)
        return self


def asking(mode: str, name: str | None = None) -> str:
    """The text that asks for a question. In context, `{question}` stands for the source question.

    `name` is one in prompts/ or a file; None is this mode's own. Raises PolicyError for one that is not for `mode`.
    """
    name = name or f"ask-{mode}"
    path = PROMPTS / f"{name}.md"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise PolicyError(f"no prompt {name!r}: give the name of a file in prompts/, or a path, as --ask-prompt")
    text = path.read_text(encoding="utf-8").strip()
    if ("{question}" in text) != (mode == "in-context"):
        wanted = "needs {question}, the source question" if mode == "in-context" else "shows no {question}"
        raise PolicyError(f"{path}: a prompt for --mode {mode} {wanted}")
    return text


def prompt_digest(mode: str, name: str | None) -> str:
    """Digest of the text that asks, so that a run notices when the file has changed."""
    return sha256(asking(mode, name).encode()).hexdigest()[:16]


def shown(policy: Policy, question, prompt: str) -> data.Question:
    """What the model is shown, to be encoded with the template "{question}", where it is to ask."""
    text = prompt.replace("{question}", policy.ask(question))
    return data.Question(question.uid, text, None, question.image, None)


def sample_shards(policy, folder: Path, wanted: list[dict], read, config: rollout.Config, title: str, check) -> list:
    """A group of responses to each question, those left out whose prompt is too long or whose row is bad.

    `wanted` says of each question what its group has to be about ({"uid", …}), `read(rows)` gives some questions and
    their prompts. A shard that is there already and is about its questions is read instead.
    """
    found, per_shard = [], config.questions_per_step
    with tqdm(total=len(wanted) * config.group_size, desc=title, unit="response") as bar:

        def tick(responses: int) -> None:
            bar.update(responses)
            check()

        for number, start in enumerate(range(0, len(wanted), per_shard)):
            path, rows = shards.shard_path(folder, number), range(start, min(start + per_shard, len(wanted)))
            groups = shards.read_shard(path) if shards.is_complete(path) else None
            if groups is not None and not is_about(groups, wanted[rows.start : rows.stop]):
                print(f"{path} is about other questions: sampled again", file=sys.stderr)
                groups = None
            if groups is not None:
                bar.update(sum(len(group["responses"]) for group in groups))
            else:
                questions, prompts = read(rows)
                batch = rollout.Batch(questions, prompts)
                groups = rollout.rollout(policy, batch, number, config, folder, tick) if prompts else []
                if groups:
                    shards.write_shard(path, groups)
            found += groups
    return found


def is_about(groups: list[dict], wanted: list[dict]) -> bool:
    """Whether groups are about these questions, in this order; some may be missing."""
    rest = iter(wanted)
    return all(any(all(group[name] == q[name] for name in q) for q in rest) for group in groups)


def encode(policy, questions: list, instead: list, template: str, config) -> tuple[list, list]:
    """Questions whose prompts fit, and the prompts, made from what is shown in their place."""
    prompts, too_long = policy.encode(instead, template, config.max_prompt_tokens)
    for uid, tokens in too_long.items():
        print(f"left out {uid}: prompt of {tokens} tokens is over --max-prompt-tokens", file=sys.stderr)
    return [question for question in questions if question.uid not in too_long], prompts


def ask(policy: Policy, questions: data.Questions, config: Config, check=lambda: None) -> list[dict]:
    """Groups of the texts in which the model asks, a group for each source question. `check` may raise, to stop."""
    prompt = asking(config.mode, config.ask_prompt)

    def read(rows: range) -> tuple[list, list]:
        found = [q for q in questions.get(rows) if _has_picture(q)]
        return encode(policy, found, [shown(policy, q, prompt) for q in found], "{question}", config)

    length = config.ask_max_new_tokens or config.max_new_tokens
    settings = replace(config, group_size=config.per_image, max_new_tokens=length)
    wanted = [{"uid": uid} for uid in questions.uids]
    return sample_shards(policy, config.out / "asked", wanted, read, settings, "asking", check)


def _has_picture(question: data.Question) -> bool:
    if question.image is None:
        print(f"left out {question.uid}: it has no picture to ask about", file=sys.stderr)
    return question.image is not None


def answer(policy: Policy, candidates: list[dict], config: Config, check=lambda: None) -> dict[str, dict]:
    """Groups of responses to candidates, by uid. `check` may raise, to stop."""

    def read(rows: range) -> tuple[list, list]:
        chosen = candidates[rows.start : rows.stop]
        found = [data.Question(c["uid"], c["question"], None, picture(config, c["image"]), None) for c in chosen]
        return encode(policy, found, found, policy.template(config.prompt), config)

    wanted = [{"uid": c["uid"], "question": c["question"]} for c in candidates]
    groups = sample_shards(policy, config.out / "answered", wanted, read, config, "answering", check)
    return {group["uid"]: group for group in groups}


def picture(config: Config, image: str | None):
    """A candidate's picture, from where the asking stage left it."""
    return None if image is None else shards.open_image(config.out / "asked", image)


def question_in(text: str) -> str:
    """The question in a text: without thoughts, a lead-in or "Question:", quotation marks, bold type, image marks."""
    text = data.PLACEHOLDER.sub(" ", text.rpartition("</think>")[2]).strip()
    text = re.sub(r"(?<!\S)\*\*(?=\S)(.*?\S)\*\*(?![\w*])", r"\1", text)
    text = re.split(r"(?i)\bquestion(?: ?\d+)?\*{0,2} ?:", text)[-1]
    text = " ".join(text.removeprefix("**").split())
    while lead := re.match(
        r"(?i)(?:sure|certainly|of course|okay|here(?:'s| is)[\w ]*\b(?:one|question))\b ?[.,:!] ", text
    ):
        text = text[lead.end() :]
    quoted = re.fullmatch("([\"'“`])(.*)([\"'”`])", text)
    return quoted[2].strip() if quoted and quoted[1] + quoted[3] in ('""', "''", "“”", "``") else text


def candidates_of(groups: list[dict], config: Config) -> list[dict]:
    """A candidate for each text: uid, source, question, and which text filters it passes."""
    known: dict[str, list[str]] = {}  # the questions of each picture: the human ones, then those written to it
    for group in groups:
        options = "".join(f" {chr(ord('A') + i)}. {choice}" for i, choice in enumerate(group["choices"] or ()))
        known.setdefault(group["image"] or group["uid"], []).extend((group["question"], group["question"] + options))
    found = []
    for group in groups:
        others = known[group["image"] or group["uid"]]
        for i, response in enumerate(group["responses"]):
            text = question_in(response["text"])
            candidate = filters.Candidate(text, tuple(others), response["finish"] == "stop")
            others.append(text)
            found.append(
                {
                    "uid": f"{group['uid']}/{config.mode}-{i}",
                    "source": group["uid"],
                    "source_question": group["question"],
                    "mode": config.mode,
                    "prompt": config.ask_prompt or f"ask-{config.mode}",
                    "image": group["image"],
                    "text": response["text"],
                    "question": text,
                    "filters": filters.passes(candidate, config.chosen()),
                }
            )
    return found


def judge_answers(candidates: list[dict], groups: dict[str, dict], config: Config) -> None:
    """Add to candidates `majority_share`, `abstention_share` and whether they pass the filters on answers.

    One without responses, since its prompt was too long, gets `unanswered` instead.
    """
    for candidate in candidates:
        group = groups.get(candidate["uid"])
        if group is None:
            candidate["unanswered"] = "prompt over --max-prompt-tokens"
            continue
        share, silent = majority_share(group), abstentions(group) / len(group["responses"])
        candidate |= {"majority_share": share, "abstention_share": silent}
        passed = {
            "agreement": config.min_agreement <= share <= config.max_agreement,
            "abstention": silent <= config.max_abstentions,
        }
        candidate["filters"] |= {name: passed[name] for name in config.chosen() if name in passed}


def is_kept(candidate: dict) -> bool:
    """Whether a question is not empty, could be answered where it had to be, and passed every filter."""
    return candidate["question"] != "" and "unanswered" not in candidate and all(candidate["filters"].values())


def write(candidates: list[dict], summary: dict, config: Config) -> None:
    """The kept questions as parquet with a card, and provenance.jsonl with all of them."""
    kept = [candidate for candidate in candidates if candidate["kept"]]
    lines = (json.dumps(candidate) + "\n" for candidate in candidates)
    shards.write_whole(config.out / "provenance.jsonl", (line.encode() for line in lines))
    columns = {
        "images": [[] if c["image"] is None else [_stored(config.out / "asked" / c["image"])] for c in kept],
        "problem": ["<image>" * (c["image"] is not None) + c["question"] for c in kept],
        "uid": [c["uid"] for c in kept],
    }
    features = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    features = datasets.Features(features | {"uid": datasets.Value("string")})
    content = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(content)
    shards.write_whole(config.out / "data" / "train-00000-of-00001.parquet", [content.getvalue()])
    shards.write_whole(config.out / "README.md", [card(summary, config).encode()])


def _stored(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": None}


def counts(candidates: list[dict], sources: int, config: Config) -> dict:
    """Source questions, candidates, those kept, and for each filter how many fail it of how many it has seen."""
    seen = {name: [c["filters"][name] for c in candidates if name in c["filters"]] for name in config.chosen()}
    return {
        "sources": sources,
        "asked": len({c["source"] for c in candidates}),
        "candidates": len(candidates),
        "empty": sum(c["question"] == "" for c in candidates),
        "unanswered": sum("unanswered" in c for c in candidates),
        "kept": sum(c["kept"] for c in candidates),
        "filters": {name: {"seen": len(passed), "failed": len(passed) - sum(passed)} for name, passed in seen.items()},
    }


def table(summary: dict) -> str:
    """How many candidates each filter has seen, and how many failed it."""
    if not summary["filters"]:
        return "No filters."
    rows = [(name, str(of["seen"]), str(of["failed"])) for name, of in summary["filters"].items()]
    return markdown([("filter", "seen", "failed"), *rows])


def card(summary: dict, config: Config) -> str:
    """README.md of the data set: what it is made from, by which model and filters, with what counts."""
    model = f"`{config.model}`" + (f" with the adapter `{config.adapter}`" if config.adapter else "")
    return f"""---
tags: [synthetic, visual-question-answering]
---
# Questions that a model wrote

{summary["kept"]} questions to the pictures of `{config.data}` ({config.split}), written by {model}: mode {config.mode},
{config.per_image} from each source question, temperature {config.temperature}, seed {config.seed}. There are no
answers: nobody wrote any.

{table(summary)}

{summary["asked"]} of {summary["sources"]} source questions could be used. Of {summary["candidates"]} texts
{summary["empty"]} were empty, and {summary["unanswered"]} were too long to be answered.
provenance.jsonl has a line for each text, kept or not, with what each filter says of it (true: passed).
Pictures and source questions are under the terms of the source.
"""


def main(config: Config) -> dict:
    """Ask, filter, answer, write; returns the counts."""
    config = replace(config).resolve()
    questions = data.load(config.data, config.split, config.seed, config.limit)
    print(questions.describe(), file=sys.stderr)
    questions = questions.without_gold()
    if questions.weights:
        raise ValueError(f"--data {config.data}: weights are for training; leave them out")
    settings = asdict(config)
    if config.ask_prompt:
        settings["ask_prompt_file"] = prompt_digest(config.mode, config.ask_prompt)
    shards.check_manifest(config.out, settings, ignore=FREE)
    options = {name: getattr(config, name) for name in ("adapter", "dtype", "device", "min_pixels", "max_pixels")}
    policy = Policy.load(config.model, **options)
    shards.write_manifest(
        config.out, stage="synthesize", config=settings, seed=config.seed, model=config.model, adapter=config.adapter
    )
    with runs.stop_on_signal() as check:
        try:
            candidates = candidates_of(ask(policy, questions, config, check), config)
            if set(config.chosen()) & set(filters.ANSWERS):
                left = [candidate for candidate in candidates if is_kept(candidate)]
                judge_answers(left, answer(policy, left, config, check), config)
        except runs.Stopped as stopped:
            print(f"stopped by {stopped}; the same command goes on from {config.out}", file=sys.stderr)
            raise SystemExit(128 + getattr(signal.Signals, str(stopped))) from None
    for candidate in candidates:
        candidate["kept"] = is_kept(candidate)
    summary = counts(candidates, len(questions), config)
    write(candidates, summary, config)
    shards.write_whole(config.out / "summary.json", [json.dumps(summary, indent=1).encode()])
    print(table(summary))
    print(f"{summary['kept']} of {summary['candidates']} questions kept in {config.out}")
    if missing := summary["sources"] - summary["asked"]:
        why = "unusable rows, no picture, or too long a prompt"
        print(f"{missing} of {summary['sources']} source questions were left out: {why}", file=sys.stderr)
        print(questions.report_bad() or "", file=sys.stderr)
    if summary["unanswered"]:
        print(f"{summary['unanswered']} questions are too long to be answered, and not kept", file=sys.stderr)
    if not summary["kept"]:
        print("no question was kept: see provenance.jsonl for the reasons, and --filters", file=sys.stderr)
    return summary


if __name__ == "__main__":
    main(tyro.cli(Config))
