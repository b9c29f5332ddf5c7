"""Asking as functions: questions that the model writes, which of them are kept, and the data set that they become."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets

from upt.data.marks import PLACEHOLDER
from upt.data.questions import Question, Questions
from upt.files import write_whole
from upt.groups import filters, shards
from upt.groups.stats import markdown
from upt.groups.votes import abstentions, majority_share
from upt.model.policy import Policy
from upt.prompts import asking as text_that_asks
from upt.prompts import template
from upt.run import progress
from upt.run.settings import Rollout
from upt.run.team import ALONE, Team
from upt.stages import sampling


def shown(policy: Policy, question, prompt: str) -> Question:
    """What the model is shown, to be encoded with the template "{question}", where it is to ask."""
    text = prompt.replace("{question}", policy.ask(question))
    return Question(question.uid, text, None, question.image, None)


def sample_shards(
    policy, folder: Path, wanted: list[dict], read, bad: dict[str, str], config: Rollout, title: str, check, team: Team
) -> list[dict]:
    """A group of responses to each question, those left out whose prompt is too long or whose row is bad.

    `wanted` says of each question what its group has to be about ({"uid", …}), `read(rows)` gives some questions, their
    prompts, and why others are left out by uid; it adds bad rows to `bad`, to which those that other processes meet are
    added here. A shard that is there already and is about its questions is read instead.
    """
    found, per_shard = [], config.questions_per_step
    with progress.bar(total=len(wanted) * config.group_size, desc=title, unit="response") as bar:

        def tick(responses: int) -> None:
            progress.advance(bar, responses, team)
            check()

        for number, start in enumerate(range(0, len(wanted), per_shard)):
            path, rows = shards.shard_path(folder, number), range(start, min(start + per_shard, len(wanted)))

            def sample(rows: list[int], number=number) -> list[tuple[dict | str | None, str | None]]:
                """Of each row its group, or why it is left out; and what is bad about it."""
                questions, prompts, left_out = read(rows)
                batch = sampling.Batch(questions, prompts)
                groups = sampling.rollout(policy, batch, number, config, folder, tick) if prompts else []
                by_uid = left_out | {group["uid"]: group for group in groups}
                uids = [wanted[row]["uid"] for row in rows]
                return [(by_uid.get(uid), bad.get(uid)) for uid in uids]

            groups = team.once(shards.read_complete, path)
            if groups is not None and not is_about(groups, wanted[rows.start : rows.stop]):
                print(f"{path} is about other questions: sampled again", file=sys.stderr)
                groups = None
            if groups is not None:
                bar.update(sum(len(group["responses"]) for group in groups))
            else:
                groups = []
                for row, (group, reason) in zip(rows, team.spread(sample, rows), strict=True):
                    uid = wanted[row]["uid"]
                    if reason is not None:
                        bad[uid] = reason
                    if isinstance(group, str):
                        print(f"left out {uid}: {group}", file=sys.stderr)
                    elif group is not None:
                        groups.append(group)
                if groups:
                    team.once(shards.write_shard, path, groups)
            found += groups
    return found


def is_about(groups: list[dict], wanted: list[dict]) -> bool:
    """Whether groups are about these questions, in this order; some may be missing."""
    rest = iter(wanted)
    return all(any(all(group[name] == q[name] for name in q) for q in rest) for group in groups)


def encode(policy, questions: list, instead: list, around: str, config) -> tuple[list, list, dict[str, str]]:
    """Questions whose prompts fit, their prompts, made from what is shown in their place, and why others do not."""
    prompts, too_long = policy.encode(instead, around, config.max_prompt_tokens)
    left_out = {uid: f"prompt of {tokens} tokens is over --max-prompt-tokens" for uid, tokens in too_long.items()}
    return [question for question in questions if question.uid not in too_long], prompts, left_out


def ask(policy: Policy, questions: Questions, config, check=lambda: None, team: Team = ALONE) -> list[dict]:
    """Groups of the texts in which the model asks, a group for each source question. `check` may raise, to stop."""
    prompt = text_that_asks(config.mode, config.ask_prompt)

    def read(rows: list[int]) -> tuple[list, list, dict[str, str]]:
        found = questions.get(rows)
        unseen = {q.uid: "it has no picture to ask about" for q in found if q.image is None}
        found = [q for q in found if q.uid not in unseen]
        instead = [shown(policy, question, prompt) for question in found]
        fitting, prompts, left_out = encode(policy, found, instead, "{question}", config)
        return fitting, prompts, unseen | left_out

    length = config.ask_max_new_tokens or config.max_new_tokens
    settings = replace(config, group_size=config.per_image, max_new_tokens=length)
    wanted = [{"uid": uid} for uid in questions.uids]
    return sample_shards(policy, config.out / "asked", wanted, read, questions.bad, settings, "asking", check, team)


def answer(policy: Policy, candidates: list[dict], config, check=lambda: None, team: Team = ALONE) -> dict[str, dict]:
    """Groups of responses to candidates, by uid. `check` may raise, to stop."""

    def read(rows: list[int]) -> tuple[list, list, dict[str, str]]:
        chosen = [candidates[row] for row in rows]
        found = [Question(c["uid"], c["question"], None, picture(config, c["image"]), None) for c in chosen]
        return encode(policy, found, found, template(config.prompt), config)

    wanted = [{"uid": c["uid"], "question": c["question"]} for c in candidates]
    groups = sample_shards(policy, config.out / "answered", wanted, read, {}, config, "answering", check, team)
    return {group["uid"]: group for group in groups}


def picture(config, image: str | None):
    """A candidate's picture, from where the asking stage left it."""
    return None if image is None else shards.open_image(config.out / "asked", image)


def question_in(text: str) -> str:
    """The question in a text: without thoughts, a lead-in or "Question:", quotation marks, bold type, image marks."""
    text = PLACEHOLDER.sub(" ", text.rpartition("</think>")[2]).strip()
    text = re.sub(r"(?<!\S)\*\*(?=\S)(.*?\S)\*\*(?![\w*])", r"\1", text)
    text = re.split(r"(?i)\bquestion(?: ?\d+)?\*{0,2} ?:", text)[-1]
    text = " ".join(text.removeprefix("**").split())
    while lead := re.match(
        r"(?i)(?:sure|certainly|of course|okay|here(?:'s| is)[\w ]*\b(?:one|question))\b ?[.,:!] ", text
    ):
        text = text[lead.end() :]
    quoted = re.fullmatch("([\"'“`])(.*)([\"'”`])", text)
    return quoted[2].strip() if quoted and quoted[1] + quoted[3] in ('""', "''", "“”", "``") else text


def candidates_of(groups: list[dict], config) -> list[dict]:
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


def judge_answers(candidates: list[dict], groups: dict[str, dict], config) -> None:
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


def write(candidates: list[dict], summary: dict, config) -> None:
    """The kept questions as parquet with a card, and provenance.jsonl with all of them."""
    kept = [candidate for candidate in candidates if candidate["kept"]]
    lines = (json.dumps(candidate) + "\n" for candidate in candidates)
    write_whole(config.out / "provenance.jsonl", (line.encode() for line in lines))
    columns = {
        "images": [[] if c["image"] is None else [_stored(config.out / "asked" / c["image"])] for c in kept],
        "problem": ["<image>" * (c["image"] is not None) + c["question"] for c in kept],
        "uid": [c["uid"] for c in kept],
    }
    features = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    features = datasets.Features(features | {"uid": datasets.Value("string")})
    content = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(content)
    write_whole(config.out / "data" / "train-00000-of-00001.parquet", [content.getvalue()])
    write_whole(config.out / "README.md", [card(summary, config).encode()])


def _stored(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": None}


def counts(candidates: list[dict], sources: int, config) -> dict:
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


def card(summary: dict, config) -> str:
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
