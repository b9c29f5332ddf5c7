"""Makes what a study asks for, and writes down what came of it (bench/studies.py has the list of studies).

    bases        OUT/base-<name>-<seed>, by warmup.py, one for each seed
    commands     for each seed, one after the other, with {seed}, {base} and {out}, the folder of the study
    sweeps       OUT/<study>/<sweep>, by ablate.py: rewards x seeds
    scores       of every run, and of its base, on another data set, where the study names one
    record       <study>.json: what was run, where and when, and of each run the scores, alarms and seconds

All with one thread a process, since rounding depends on their number, several processes at a time. The same again goes
on: what a command has printed lies in a file of its own once it has ended well, and finished runs are kept.
"""

import csv
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import ablate
import warmup
from bench import alarms
from bench.processor import processor
from upt.compare import sweep
from upt.errors import RunsFailed, SettingError
from upt.files import read_json
from upt.groups import manifests
from upt.run import cli, health
from upt.run.stopping import stop_on_signal

ORIGIN = ("fingerprint", "git_commit", "dirty", "versions", "machine", "threads", "date")


@dataclass(frozen=True)
class Sweep:
    """Training with each of some rewards and each seed, by one command of ablate.py."""

    rewards: str
    flags: str = ""
    """settings of train_upt.py besides the study's"""
    name: str = ""
    """what tells its runs from those of the study's other sweeps"""
    data: str = "shapes"

    def label(self, variant: str) -> str:
        return f"`{variant}`" + (f", {self.name}" if self.name else "")


@dataclass(frozen=True)
class Study:
    """What is run to answer a question, and the tables that it fills: name -> function of study and records."""

    name: str
    base: str = ""
    sweeps: Sequence[Sweep] = ()
    tables: dict[str, Callable] = field(default_factory=dict)
    figures: dict[str, Callable] = field(default_factory=dict)
    steps: int | None = None
    flags: str = ""
    """settings of train_upt.py for all sweeps"""
    commands: Sequence[str] = ()
    also: str = ""
    """a data set that base and runs are scored on besides their own"""
    found: Callable | None = None
    """what else the record holds: a function of the study's folder and the seeds"""
    uses: Sequence[str] = ()
    """studies whose runs stand in its tables too"""


@dataclass(frozen=True)
class Place:
    """Where things are made, for which seeds, and how many at a time."""

    out: Path
    seeds: int
    jobs: int
    bases: dict[str, str]
    """flags of warmup.py by the name of a base"""

    def base(self, study: Study, seed: int | str = "{seed}") -> Path:
        return self.out / f"base-{study.base}-{seed}"

    def sweep(self, study: Study, of: Sweep) -> Path:
        return self.out / study.name / (of.name or "runs").replace(" ", "-")

    def filled(self, text: str, study: Study, seed: int | str = "{seed}") -> str:
        """A text with {base}, {out} and {seed} filled in."""
        given = {"base": self.base(study), "out": self.out / study.name}
        for name, value in given.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text.replace("{seed}", str(seed))


# ------------------------------------------------------------------------------------------------------------- making


def make(study: Study, place: Place) -> None:
    """All that a study needs. Raises RunsFailed, after what could be made, for what could not."""
    folder, seeds = place.out / study.name, range(place.seeds)
    for seed in seeds:
        check_base(place.base(study, seed), place.bases[study.base], seed)
    missing = [seed for seed in seeds if not (place.base(study, seed) / "warmup.json").is_file()]
    warm = [f"warmup.py --out {place.base(study, seed)} --seed {seed} {place.bases[study.base]}" for seed in missing]
    run(warm, place.out, place.jobs)
    for command in study.commands:
        run([place.filled(command, study, seed) for seed in seeds], folder, place.jobs)
    failed = []
    for of in study.sweeps:
        try:
            ablate.main(ablate.Config(
                rewards=of.rewards, data=place.filled(of.data, study), model=str(place.base(study)), steps=study.steps,
                seeds=place.seeds, jobs=place.jobs, threads=1, out=place.sweep(study, of),
                train=f"{study.flags} {of.flags}".strip(),
            ))  # fmt: skip
        except RunsFailed as error:
            failed.append(str(error))
    if study.also:
        run(scoring(study, place), folder, place.jobs)
    if failed:
        raise RunsFailed("; ".join(failed))


def check_base(folder: Path, flags: str, seed: int) -> None:
    """Raise SettingError for a base that other settings made than the ones that are asked for."""
    if (folder / "warmup.json").is_file():
        wanted = cli.parse(warmup.Config, shlex.split(flags) + ["--seed", str(seed)])
        made = read_json(folder / "warmup.json", "remove the folder, and it is made again").get("config", {})
        if differ := manifests.differences(made, asdict(wanted), ("out",)):
            said = ", ".join(f"{name} {there} there, {now} now" for name, (there, now) in differ.items())
            raise SettingError(f"{folder} is a base of other settings: {said}; move it away, or give another --out")


def scoring(study: Study, place: Place) -> list[str]:
    """The commands that score finished runs, and the base of each seed, on the study's other data set."""
    found, per_seed = [], {}
    for of in study.sweeps:
        for path in sorted(place.sweep(study, of).glob("*/seed-*/summary.json")):
            found.append(f"-m eval.heldout --run {path.parent} --data {study.also} --out {path.parent}/also.json")
            settings = read_json(path)["config"]
            per_seed[settings["seed"]] = (
                f"--eval-questions {settings['eval_questions']} --eval-samples {settings['eval_samples']}"
            )
    bases = [
        f"-m eval.heldout --model {place.base(study, seed)} --seed {seed} --data {study.also} {much} "
        f"--out {place.out / study.name}/also-{seed}.json"
        for seed, much in sorted(per_seed.items())
    ]
    return bases + found


def run(commands: Sequence[str], folder: Path, jobs: int) -> None:
    """Run those commands of Python that have not ended well before, or whose --out is gone, `jobs` at a time.

    Raises RunsFailed for those that failed, after all, and `Stopped` on SIGINT or SIGTERM.
    """
    logs = {command: folder / f"{hashlib.sha256(command.encode()).hexdigest()[:12]}.log" for command in commands}
    made = {command: Path(re.search(r"--out (\S+)", command)[1]) for command in commands}
    waiting = [command for command in commands if not (logs[command].exists() and made[command].exists())]
    active, failed = {}, []
    folder.mkdir(parents=True, exist_ok=True)
    with stop_on_signal(folder) as look:
        try:
            while waiting or active:
                look()
                while waiting and len(active) < jobs:
                    command = waiting.pop(0)
                    active[command] = begun(command, logs[command].with_suffix(".part"))
                for command, process in [*active.items()]:
                    if process.poll() is not None:
                        del active[command]
                        draft = logs[command].with_suffix(".part")
                        if process.returncode == 0:
                            draft.rename(logs[command])
                        else:
                            failed.append(f"python {command}: its output is in {draft}")
                            print(f"FAILED python {command}\n{sweep.last_lines(draft)}", file=sys.stderr)
                time.sleep(sweep.POLL)
        finally:
            sweep.stop(active.values())
    if failed:
        raise RunsFailed("; ".join(failed))


def begun(command: str, log: Path) -> subprocess.Popen:
    """A command of Python in a process of its own, with one thread."""
    print(f"python {command}", file=sys.stderr)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *shlex.split(command)], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- recording


def record(study: Study, place: Place, complete: bool, old: dict | None = None) -> dict:
    """What the finished runs of a study say. Where nothing was made since the record `old`, its origin stays.

    `complete`: all that the study needs has been made.
    """
    folder, runs, planned = place.out / study.name, [], 0
    for of in study.sweeps:
        made = {(one["label"], one["seed"]): one for one in finished(place.sweep(study, of))}
        for variant in ablate.parse(of.rewards, None):
            found = [made.get((sweep.slug(variant.label), seed)) for seed in range(place.seeds)]
            runs += [one | {"label": of.label(variant.label)} for one in found if one]
            planned += place.seeds
    if study.also:
        for one in runs:
            one["also"] = other_scores(folder / f"also-{one['seed']}.json", Path(one["folder"]) / "also.json")
    marks = [*folder.glob("*.log"), *folder.glob("*/*/seed-*/summary.json")]
    latest = max((path.stat().st_mtime for path in marks), default=0.0)
    bases = {seed: place.base(study, seed) for seed in range(place.seeds)}
    bases = {seed: base for seed, base in bases.items() if (base / "warmup.json").is_file()}
    origin = {
        "fingerprint": {seed: manifests.fingerprint(base) for seed, base in bases.items()},
        **manifests.commit(),
        "versions": manifests.versions(),
        "machine": processor(),
        "threads": 1,
        "date": datetime.fromtimestamp(latest, UTC).date().isoformat(),
    }
    if old and old["latest"] == latest:
        origin = {name: old[name] for name in ORIGIN}
    whole = {
        "study": study.name,
        "command": f"python -m bench.studies --only {study.name} --seeds {place.seeds}",
        "base": {"name": study.base, "flags": place.bases[study.base]},
        "steps": study.steps,
        "flags": study.flags,
        "sweeps": [asdict(of) for of in study.sweeps],
        "commands": study.commands,
        "seeds": place.seeds,
        "planned": planned,
        "complete": complete,
        "latest": latest,
        **origin,
        "runs": runs,
        **(study.found(folder, range(place.seeds)) if study.found else {}),
    }
    return json.loads(json.dumps(whole))  # as it is read again: keys are strings


def finished(folder: Path | str, watch=health.Watch, choose: Callable = health.best_checkpoint) -> list[dict]:
    """The finished runs of a sweep, seed by seed: scores, alarms and label-free choice (bench/alarms.py), seconds."""
    found = []
    for path in sorted(Path(folder).glob("*/seed-*/summary.json"), key=lambda path: (path.parts[-2], path.parts[-3])):
        summary, config = read_json(path), read_json(path)["config"]
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        by_step = {row["step"]: row["held_out"] for row in rows if "held_out" in row}
        made = summary["end"]["steps"]
        raised, chosen = alarms.replay(rows, [*by_step, made], watch, choose)
        found.append({
            "label": path.parts[-3],
            "seed": config["seed"],
            "folder": str(path.parent),
            "steps": made,
            "before": values(summary["before"]),
            "after": values(summary["after"]),
            "by_step": by_step,
            "alarms": raised,
            "chosen": chosen,
            "seconds": sum(summary["seconds"].values()),
        })  # fmt: skip
    return found


def values(scores: dict) -> dict:
    """Held-out scores without their intervals over questions."""
    kinds = {kind: {name: of[name] for name in ("mean", "greedy")} for kind, of in scores.get("kinds", {}).items()}
    found = {name: {"value": scores[name]["value"]} for name in sweep.SCORES if name in scores}
    return found | {"kinds": {kind: {n: s["value"] for n, s in of.items()} for kind, of in kinds.items()}}


def other_scores(before: Path, after: Path) -> dict:
    """A base's scores and a run's on the study's other data set; nothing while one of the two is missing."""
    if not (before.is_file() and after.is_file()):
        return {}
    return {"before": values(read_json(before)), "after": values(read_json(after))}


def judged(folder: Path, seeds: Sequence[int]) -> dict[str, list[dict]]:
    """What the judge's scores tell of right and wrong, by reward, mode and seed: tables of upt/compare/offline.py."""
    found = []
    for mode in ("logit", "text"):
        for seed in seeds:
            path = folder / f"compared-{mode}-{seed}" / "variants.csv"
            rows = [*csv.DictReader(path.read_text().splitlines())] if path.is_file() else []
            for row in rows:
                if row["variant"] != "frequency":
                    label = f"`{row['variant']}`, {mode} mode"
                elif mode == "logit":
                    label = "`frequency`"
                else:  # it reads no judgement: the same again
                    continue
                scores = {name: float(row[name]) for name in ("AUC", "AUC in group", "label acc")}
                found.append({"label": label, "seed": seed} | scores)
    return {"judged": found}


def written(folder: Path, seeds: Sequence[int]) -> dict[str, list[dict]]:
    """The counts of the questions that the model wrote, by seed."""
    paths = [folder / f"in-context-{seed}" / "summary.json" for seed in seeds]
    return {"written": [read_json(path) for path in paths if path.is_file()]}
