"""A model that writes its own exercises: rounds of asking and training (`train_upt.py --rounds R --synthesize MODE`).

For each round r = 1 … R:
    ask      the model as it now is writes questions to the pictures of the data    OUT/round-01/questions
    train    --steps of the loop on the data and these questions                    OUT/round-01/run
The rounds train one and the same adapter, so that it fits the model that the first one started from, and reference and
judge are that model throughout. Each round's training is a run of its own, with its own schedule of the learning rate.

Every part is a folder that goes on where it was stopped, and so does the whole. It leaves OUT/adapter, the last
round's, and OUT/summary.json: scores before and after all rounds, and of every round its filters' counts and its
scores. A round none of whose questions is kept trains on the data alone. `--limit` is of the data and of the questions;
of the latter, as of every set without splits, 5 % are held out. More rounds may follow: --rounds 3 goes on from two.
Until a round is done, OUT has to stay where it is.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from upt import data
from upt.errors import SettingError
from upt.files import known_json, read_json, write_whole, writing
from upt.groups import manifests
from upt.groups.stats import markdown
from upt.model.opening import model_config
from upt.run.resuming import claim, jsonable
from upt.run.settings import Asking, Rollout
from upt.run.team import ALONE, Team


def evolve(config, train: Callable, ask: Callable, taken: dict[str, dict], team: Team = ALONE) -> dict:
    """All rounds; returns the summary. `config` is a resolved train_upt.Config, `train(config)` makes a run of one.
    `taken` are the fingerprints of its data.

    `ask(**settings)` writes a data set of questions; the settings are those of synthesize.Config.

    Raises DataError for a share of its own questions that leaves more to --data than it has.
    """
    if config.own_share not in (None, 1):
        size = len(data.load(config.data, config.split, config.seed, config.limit))
        data.quotas(config.questions_per_step, [(size, 1 - config.own_share), (sys.maxsize, config.own_share)])
    model_config(config.model)  # raises PolicyError for a model that is not there
    team.once(begin, config, taken)
    rounds, adapter = [], config.init_adapter
    for number in range(1, config.rounds + 1):
        print(f"round {number} of {config.rounds}", file=sys.stderr)
        folder = config.out / f"round-{number:02d}"
        counts = asked(config, number, adapter, folder / "questions", ask, team)
        defaults = {field.name: field.default for field in fields(Asking)}
        run = replace(config, rounds=0, synthesize=None, own_share=None, resume=False, round=number, **defaults)
        run.out, run.init_adapter = folder / "run", adapter
        run.data, run.eval_data = mixed(config, folder / "questions", counts["kept"]), config.eval_data or config.data
        measured = config.out / f"round-{number - 1:02d}" / "run" / "after.json"
        team.once(take_scores, measured, run.out / "before.json")
        rounds.append({"questions": counts} | trained(run, train, team))
        adapter = str(run.out / "adapter")
    summary = {"rounds": rounds, "config": jsonable(config)}
    summary |= {name: rounds[i][name] for name, i in (("before", 0), ("after", -1)) if name in rounds[i]}
    team.once(finish, adapter, summary, config.out)
    return summary


def take_scores(source: Path, target: Path) -> None:
    """What was true after a round is true before the next."""
    if source.is_file():
        write_whole(target, [source.read_bytes()])


def finish(adapter: str, summary: dict, out: Path) -> None:
    with writing(out / "adapter"):
        shutil.copytree(adapter, out / "adapter", dirs_exist_ok=True)
    write_whole(out / "summary.json", [json.dumps(summary, indent=1).encode()])


def begin(config, taken: dict[str, dict]) -> None:
    """Write the manifest of the run, or in the one that is there that rounds were added.

    Raises SettingError for fewer rounds than it says.
    """
    claim(config, taken)
    manifest = manifests.read(config.out)
    begun = manifest["config"]["rounds"]
    if config.rounds < begun:
        raise SettingError(f"--rounds {config.rounds}: the run in {config.out} has {begun}; give as many, or more")
    manifest["config"]["rounds"] = config.rounds
    write_whole(config.out / "manifest.json", [json.dumps(manifest, indent=1).encode()])


def trained(run, train: Callable, team: Team) -> dict:
    """The summary of a round's run, which is made first unless it is there, without its settings."""
    path = run.out / "summary.json"
    summary = team.once(known_json, path) or train(run)
    return {name: value for name, value in summary.items() if name not in ("config", "warmup")}


def asked(config, number: int, adapter: str | None, folder: Path, ask: Callable, team: Team) -> dict:
    """The filters' counts of a round's questions, which are written first unless they are there."""
    if not team.once((folder / "summary.json").is_file):
        shared = {field.name for of in (Rollout, Asking) for field in fields(of)}
        shared -= {"out", "preset", "steps", "adapter", "round", "view"}
        settings = {name: getattr(config, name) for name in shared}
        ask(**settings | {"mode": config.synthesize, "adapter": adapter, "round": number, "out": folder})
    return read_json(folder / "summary.json")


def mixed(config, folder: Path, kept: int) -> str:
    """The data set of a round: the data, and the questions in `folder` where some were kept.

    With fewer of these than their share of a step all questions count alike, which is said.
    """
    if not kept:
        return config.data
    if config.own_share is None:
        return f"{config.data},{folder}"
    if config.own_share == 1:
        return str(folder)
    share, count = config.own_share, len(data.load(folder, limit=config.limit))
    if count < share * config.questions_per_step:
        print(f"only {count} questions of its own: all questions count alike, without --own-share", file=sys.stderr)
        return f"{config.data},{folder}"
    return f"{config.data}:{1 - share:.6f},{folder}:{share:.6f}"


def table(rounds: list[dict]) -> str:
    """A line for each round: questions kept of those written, and held-out scores after it."""
    names = ("mean", "greedy", "maj", "pass")
    rows = [("round", "questions kept", *names)]
    for number, scores in enumerate([rounds[0].get("before", {}), *(r.get("after", {}) for r in rounds)]):
        counts = rounds[number - 1]["questions"] if number else None
        kept = f"{counts['kept']} of {counts['candidates']}" if counts else ""
        cells = [f"{100 * scores[name]['value']:.1f}" if name in scores else "" for name in names]
        rows.append((str(number), kept, *cells))
    return markdown(rows)
