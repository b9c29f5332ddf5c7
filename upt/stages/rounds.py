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

import data
import mixture
import rewards
import shards
import synthesize
from policy import model_config
from settings import claim, jsonable
from stats import markdown


def check(config) -> None:
    """Raise ValueError for settings of a train_upt.Config that rounds do not work with, with what to change."""
    if config.adapter and config.init_adapter:
        raise ValueError("--adapter merges an adapter, --init-adapter goes on training it: give one of them")
    if config.init_adapter and not (Path(config.init_adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"--init-adapter {config.init_adapter}: no PEFT adapter there (adapter_config.json is missing)"
        )
    if bool(config.rounds) != bool(config.synthesize) or config.rounds < 0:
        raise ValueError("--rounds N and --synthesize in-context or direct go together: give both or neither")
    if not config.rounds:
        asking = [field for field in fields(synthesize.Settings) if getattr(config, field.name) != field.default]
        if asking or config.own_share is not None:
            name = asking[0].name if asking else "own_share"
            raise ValueError(f"--{name.replace('_', '-')} is for the questions that --rounds makes; leave it out here")
        return
    config.check_asking(config.synthesize)
    if rewards.needs_gold(config.reward):
        raise ValueError(
            f"--rounds makes questions without gold, which --reward {config.reward} needs; use another reward"
        )
    if config.adapter or config.from_shards:
        raise ValueError("--rounds trains one adapter on questions: no --from-shards, and --init-adapter for --adapter")
    check_data(config)


def check_data(config) -> None:
    """The same for what a round's data set is put together from."""
    share = config.own_share
    if share is not None and not (0.001 <= share <= 0.999 or share == 1):
        raise ValueError(f"--own-share goes from 0.001 to 0.999, or is 1, not {share}")
    several = mixture.is_mixture(config.data)
    if several and (share is not None or mixture.parts(config.data)[0][1] is not None):
        raise ValueError(f"--rounds with several data sets takes neither weights nor --own-share: {config.data}")
    for flag, name in (("--out", str(config.out / "questions")), *([] if several else [("--data", config.data)])):
        if mixture.parts(name) != [(name, None)]:
            raise ValueError(f"{flag} {name}: a comma or a number behind a colon cannot be mixed; use another name")


def evolve(config, train: Callable) -> dict:
    """All rounds; returns the summary. `config` is a resolved train_upt.Config, `train` makes a run of one.

    Raises DataError for a share of its own questions that leaves more to --data than it has.
    """
    if config.own_share not in (None, 1):
        size = len(data.load(config.data, config.split, config.seed, config.limit))
        mixture.quotas(config.questions_per_step, [(size, 1 - config.own_share), (sys.maxsize, config.own_share)])
    model_config(config.model)  # raises PolicyError for a model that is not there
    claim(config)
    keep_rounds(config)
    rounds, adapter = [], config.init_adapter
    for number in range(1, config.rounds + 1):
        print(f"round {number} of {config.rounds}", file=sys.stderr)
        folder = config.out / f"round-{number:02d}"
        counts = asked(config, number, adapter, folder / "questions")
        defaults = {field.name: field.default for field in fields(synthesize.Settings)}
        run = replace(config, rounds=0, synthesize=None, own_share=None, resume=False, round=number, **defaults)
        run.out, run.init_adapter = folder / "run", adapter
        run.data, run.eval_data = mixed(config, folder / "questions", counts["kept"]), config.eval_data or config.data
        measured = config.out / f"round-{number - 1:02d}" / "run" / "after.json"
        if measured.is_file():  # what was true after a round is true before the next
            shards.write_whole(run.out / "before.json", [measured.read_bytes()])
        rounds.append({"questions": counts} | trained(run, train))
        adapter = str(run.out / "adapter")
    shutil.copytree(adapter, config.out / "adapter", dirs_exist_ok=True)
    summary = {"rounds": rounds, "config": jsonable(config)}
    summary |= {name: rounds[i][name] for name, i in (("before", 0), ("after", -1)) if name in rounds[i]}
    shards.write_whole(config.out / "summary.json", [json.dumps(summary, indent=1).encode()])
    print(table(rounds))
    print(f"adapter in {config.out / 'adapter'}, summary in {config.out / 'summary.json'}")
    return summary


def keep_rounds(config) -> None:
    """Write down in the manifest that rounds were added. Raises ValueError for fewer than it says."""
    manifest = shards.read_manifest(config.out)
    begun = manifest["config"]["rounds"]
    if config.rounds < begun:
        raise ValueError(f"--rounds {config.rounds}: the run in {config.out} has {begun}; give as many, or more")
    manifest["config"]["rounds"] = config.rounds
    shards.write_whole(config.out / "manifest.json", [json.dumps(manifest, indent=1).encode()])


def trained(run, train: Callable) -> dict:
    """The summary of a round's run, which is made first unless it is there, without its settings."""
    path = run.out / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else train(run)
    return {name: value for name, value in summary.items() if name not in ("config", "warmup")}


def asked(config, number: int, adapter: str | None, folder: Path) -> dict:
    """The filters' counts of a round's questions, which are written first unless they are there."""
    if not (folder / "summary.json").is_file():
        names = {field.name for field in fields(synthesize.Config)} - {"out", "preset", "steps", "adapter", "round"}
        shared = {name: getattr(config, name) for name in names if hasattr(config, name)}
        settings = {"mode": config.synthesize, "adapter": adapter, "round": number, "out": folder}
        synthesize.main(synthesize.Config(**shared | settings))
    return json.loads((folder / "summary.json").read_text())


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
