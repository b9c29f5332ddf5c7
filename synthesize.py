r"""The model writes its own training questions (MM-UPT, arXiv 2505.22453), without labels.

    1. ask      have the model write k questions from each source question and its picture
                in-context   the picture and its question, and ask for a new, different one
                direct       the picture alone
    2. filter   rules on the text of a question (upt/groups/filters.py)
    3. answer   sample responses to those that are left, and keep the ones whose majority has a share within a band and
                whose abstentions are few: neither trivial nor beyond the model (filters, too)
    4. write    a data set like any other: parquet in the hub's schema with a card, and provenance.jsonl, a line for
                each candidate, kept or not: its uid, source, mode, prompt, picture, sampled text, the question in it,
                whether it passed each filter, the majority's share and that of abstentions

No gold exists for these questions, and none is written. The filters are ours; `--filters none` keeps all that is not
empty. Shards of what was asked and answered lie in OUT/asked and OUT/answered; the same command again goes on from the
last whole one, and ends with the same bytes.

    python synthesize.py --data shapes --mode in-context --per-image 2 --out runs/questions
    python train_upt.py --data runs/questions --model models/tiny --out runs/evolved
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from upt import data, model, prompts, stages
from upt.errors import SettingError
from upt.files import write_whole
from upt.groups import filters, manifests
from upt.ranges import Count
from upt.run import cli
from upt.run.locking import alone
from upt.run.resuming import check_data, keep_data
from upt.run.settings import Asking, Rollout, hidden
from upt.run.stopping import stop_on_signal
from upt.run.team import assemble

FREE = ("out", "device", "gpus", "slots", "steps", "any_base")


@dataclass
class Config(Asking, Rollout):
    """Settings left at None take the default for the model (see upt/run/presets.py)."""

    mode: Literal["in-context", "direct"] = "in-context"
    """in-context: the model sees the picture and its question; direct: the picture alone"""
    out: Path = Path("runs/questions")
    """folder of the data set to write"""
    preset: None = hidden(None)
    steps: Count | None = hidden(None)
    view: None = hidden(None)

    def resolve(self) -> "Config":
        super().resolve()
        self.check_asking(self.mode)
        return self


def checked(questions: data.Questions, config: Config) -> dict[str, dict]:
    """The data's fingerprint. Raises DataError if it is not that of the questions in the folder."""
    taken = {"data": data.fingerprint.of_questions(questions)}
    check_data(config.out, taken)
    return taken


@alone
def main(config: Config) -> dict:
    """Ask, filter, answer, write; returns the counts."""
    config, asking = replace(config).resolve(), stages.asking
    team = assemble(config.device)
    questions = team.in_turn(data.load, config.data, config.split, config.seed, config.limit)
    how = f"{config.mode}, {config.per_image} each, filters {config.filters}"
    print(f"asking {config.model} about {questions.describe()}: {how}, into {config.out}", file=sys.stderr)
    questions = questions.without_gold()
    if questions.weights:
        raise SettingError(f"--data {config.data}: weights are for training; leave them out")
    settings = asdict(config)
    if config.ask_prompt:
        settings["ask_prompt_file"] = prompts.asking_digest(config.mode, config.ask_prompt)
    manifests.check(config.out, "synthesize", settings, ignore=FREE)
    taken = team.once(checked, questions, config)
    model.check_room(config, ["rollout"], group_size=max(config.group_size, config.per_image))
    policy = team.here(partial(model.Policy.load, config.model, **config.loading()))
    identity = {"seed": config.seed, "model": config.model, "adapter": config.adapter}

    def claim() -> None:
        kept = keep_data(config.out, taken)
        manifests.write(config.out, stage="synthesize", config=settings, data=kept, **identity)

    team.once(claim)
    with stop_on_signal(config.out) as check:
        candidates = asking.candidates_of(asking.ask(policy, questions, config, check, team), config)
        if set(config.chosen()) & set(filters.ANSWERS):
            left = [candidate for candidate in candidates if asking.is_kept(candidate)]
            asking.judge_answers(left, asking.answer(policy, left, config, check, team), config)
    for candidate in candidates:
        candidate["kept"] = asking.is_kept(candidate)
    summary = asking.counts(candidates, len(questions), config)
    team.once(asking.write, candidates, summary, config)
    team.once(write_whole, config.out / "summary.json", [json.dumps(summary, indent=1).encode()])
    print(asking.table(summary))
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
    cli.launch(main, Config)
