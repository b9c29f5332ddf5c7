"""Makes what a study asks for, and writes down what came of it (bench/studies.py has the list of studies).

    bases        OUT/base-<name>-<seed>, by warmup.py, one for each seed
    commands     for each seed, one after the other, with {seed}, {base} and {out}, the folder of the study
    sweeps       OUT/<study>/<sweep>, by ablate.py: rewards x seeds
    scores       of every run, and of its base, on another data set, where the study names one
    pictures     by a command of their own, into OUT/<study>/pictures
    record       <study>.json: what was run, where and when, and of each run the scores, alarms and seconds

All with one thread a process, since rounding depends on their number, several processes at a time. The same again goes
on: what a command has printed lies in a file of its own once it has ended well, and finished runs are kept.
"""

import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import ablate
import train_upt
import warmup
from bench import alarms
from upt.compare import sweep
from upt.errors import RunsFailed, SettingError
from upt.files import read_json
from upt.groups import manifests
from upt.run import cli, health
from upt.run.machine import processor
from upt.run.stopping import stop_on_signal

THREADS = 1


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
    pictures: str = ""
    """a command, after all runs"""
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

    def filled(self, text: str, study: Study, seed: int | str = "{seed}", quote: Callable = shlex.quote) -> str:
        """A text, by default a command, with {base}, {out} and {seed} filled in."""
        given = {"base": self.base(study, seed), "out": self.out / study.name}
        for name, value in given.items():
            text = text.replace(f"{{{name}}}", quote(str(value)))
        return text.replace("{seed}", str(seed))

    def mark(self, study: Study, seed: int) -> str:
        """What tells the base of a seed from one that was made anew."""
        return manifests.fingerprint(self.base(study, seed))


# ------------------------------------------------------------------------------------------------------------- making


def check(study: Study, place: Place) -> None:
    """Raise SettingError for a reward, a flag or a base that would be met only after hours."""
    for of in study.sweeps:
        ablate.parse(of.rewards, None)
        cli.parse(train_upt.Config, ablate.split_words(f"{study.flags} {of.flags}"))
    for seed in range(place.seeds):
        check_base(place.base(study, seed), place.bases[study.base], seed)


def make(study: Study, place: Place) -> None:
    """All that a study needs. Raises RunsFailed, after what could be made, for what could not."""
    folder, seeds = place.out / study.name, range(place.seeds)
    missing = [seed for seed in seeds if not (place.base(study, seed) / "warmup.json").is_file()]
    warm = "warmup.py --out {base} --seed {seed} " + place.bases[study.base]
    run({place.filled(warm, study, seed): "" for seed in missing}, place.out, place.jobs)
    marks = {seed: place.mark(study, seed) for seed in seeds}
    for command in study.commands:
        run({place.filled(command, study, seed): marks[seed] for seed in seeds}, folder, place.jobs)
    failed = []
    for of in study.sweeps:
        try:
            ablate.main(ablate.Config(
                rewards=of.rewards, data=place.filled(of.data, study, quote=str), model=str(place.base(study)),
                steps=study.steps, seeds=place.seeds, jobs=place.jobs, threads=THREADS, out=place.sweep(study, of),
                train=f"{study.flags} {of.flags}".strip(),
            ))  # fmt: skip
        except RunsFailed as error:
            failed.append(str(error))
    if study.also:
        run(scoring(study, place, marks), folder, place.jobs)
    if failed:
        raise RunsFailed("; ".join(failed))
    if study.pictures:
        run({place.filled(study.pictures, study): marks[0]}, folder, 1)


def check_base(folder: Path, flags: str, seed: int) -> None:
    """Raise SettingError for a base that other settings made than the ones that are asked for."""
    if (folder / "warmup.json").is_file():
        wanted = cli.parse(warmup.Config, shlex.split(flags) + ["--seed", str(seed)])
        made = read_json(folder / "warmup.json", "remove the folder, and it is made again").get("config", {})
        if differ := manifests.differences(made, asdict(wanted), ("out",)):
            said = ", ".join(f"{name} {there} there, {now} now" for name, (there, now) in differ.items())
            raise SettingError(f"{folder} is a base of other settings: {said}; move it away, or give another --out")


def scoring(study: Study, place: Place, marks: dict[int, str]) -> dict[str, str]:
    """The commands that score finished runs, and the base of each seed, on the study's other data set, as run takes
    them."""
    bases, found = {}, {}
    score = f"-m eval.heldout --data {study.also}"
    for of in study.sweeps:
        for path in sorted(place.sweep(study, of).glob("*/seed-*/summary.json")):
            settings, run_folder = read_json(path)["config"], shlex.quote(str(path.parent))
            seed = settings["seed"]
            much = f"--eval-questions {settings['eval_questions']} --eval-samples {settings['eval_samples']}"
            base = f"{score} --model {{base}} --seed {{seed}} {much} --out {{out}}/also-{{seed}}.json"
            bases[place.filled(base, study, seed)] = marks[seed]
            found[f"{score} --run {run_folder} --out {run_folder}/also.json"] = marks[seed]
    return bases | found


def run(commands: dict[str, str], folder: Path, jobs: int) -> None:
    """Run those commands of Python that have not ended well before, or whose --out is gone, `jobs` at a time.

    commands: {command: what else its output depends on}; where that has changed, it is run again.
    Raises RunsFailed for those that failed, after all, and `Stopped` on SIGINT or SIGTERM.
    """
    logs, made = {}, {}
    for command, mark in commands.items():
        words = shlex.split(command)
        logs[command] = folder / f"{hashlib.sha256(f'{command} {mark}'.encode()).hexdigest()[:12]}.log"
        made[command] = Path(words[words.index("--out") + 1])
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
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- recording


def record(study: Study, place: Place, complete: bool, old: dict | None = None) -> dict:
    """What the finished runs of a study say. Where nothing was made since the record `old`, its machine stays.

    `complete`: all that the study needs has been made.
    """
    folder, runs, planned = place.out / study.name, [], 0
    for of in study.sweeps:
        made = {(one["label"], one["seed"]): one for one in finished(place.sweep(study, of))}
        for variant in ablate.parse(of.rewards, None):
            found = [made.get((sweep.slug(variant.label), seed)) for seed in range(place.seeds)]
            runs += [one | {"label": of.label(variant.label)} for one in found if one]
            planned += place.seeds
    for one in runs:
        run_folder = Path(one.pop("folder"))
        if study.also:
            one["also"] = other_scores(folder / f"also-{one['seed']}.json", run_folder / "also.json")
    marks = [*folder.glob("*.log"), *folder.glob("*/*/seed-*/summary.json")]
    latest = max((path.stat().st_mtime for path in marks), default=0.0)
    whole = {
        "study": study.name,
        "command": f"python -m bench.studies --only {study.name} --seeds {place.seeds}",
        "base": {"name": study.base, "flags": place.bases[study.base]},
        "steps": study.steps,
        "flags": study.flags,
        "sweeps": [asdict(of) for of in study.sweeps],
        "also": study.also,
        "commands": study.commands,
        "seeds": place.seeds,
        "planned": planned,
        "complete": complete,
        "latest": latest,
        "date": datetime.fromtimestamp(latest, UTC).date().isoformat(),
        "machine": old["machine"] if old and old["latest"] == latest else processor(),
        "threads": THREADS,
        **origin(folder, place.seeds),
        "runs": runs,
        **(study.found(folder, range(place.seeds)) if study.found else {}),
    }
    return json.loads(json.dumps(whole))  # as it is read again: keys are strings


def origin(folder: Path, seeds: int) -> dict:
    """Model by seed, commits and versions, as the manifests of all that was made in a study's folder name them.

    Where they name several, all of them are there.
    """
    prints, commits = {seed: set() for seed in range(seeds)}, set()
    packages = {name: set() for name in ("torch", "transformers")}
    for path in folder.rglob("manifest.json"):
        manifest = read_json(path)
        if manifest["seed"] not in prints or not manifest["model"]:
            continue
        prints[manifest["seed"]].add(manifest["model"]["fingerprint"])
        commits.add((manifest["git_commit"], manifest["dirty"]))
        for name, found in packages.items():
            found.add(manifest["versions"][name])
    return {
        "fingerprint": {seed: " and ".join(sorted(found)) for seed, found in prints.items() if found},
        "commits": sorted(f"{commit}{' and changes' if dirty else ''}" for commit, dirty in commits),
        "versions": {name: sorted(found) for name, found in packages.items()},
    }


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
                # A field is empty where no group has both right and wrong responses.
                scores = {name: float(row[name]) for name in ("AUC", "AUC in group", "label acc") if row[name]}
                found.append({"label": label, "seed": seed} | scores)
    return {"judged": found}


def written(folder: Path, seeds: Sequence[int]) -> dict[str, list[dict]]:
    """The counts of the questions that the model wrote, by seed."""
    paths = [folder / f"in-context-{seed}" / "summary.json" for seed in seeds]
    return {"written": [read_json(path) for path in paths if path.is_file()]}
