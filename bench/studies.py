"""Everything that docs/results.md and README.md show, made again: `make results`.

STUDIES below is the list: what is asked, from which base, with which rewards, and which tables it fills. For each
study in turn bench/making.py makes what is missing under OUT, one thread a process, and bench/results/<study>.json is
written; bench/tables.py then puts the tables and figures of all records into the pages. The same command goes on where
it was stopped. Until a study is complete again, a record that is complete stays.

    python -m bench.studies                       # all of it: hours on two cores
    python -m bench.studies --only rewards,long
    python -m bench.studies --fill                # run nothing: pages from the records alone
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import curves, making, tables
from bench.front_page import write
from bench.making import Place, Study, Sweep
from rewards import REWARDS, needs_gold, needs_judge, needs_view
from upt.errors import RunsFailed, SettingError, Stopped, suggest
from upt.files import check_folder, read_json, write_whole
from upt.ranges import Count, Name
from upt.run import cli
from upt.run.locking import holding
from upt.run.typed import Typed

PAGES = ("README.md", "docs/results.md")

BASES = {  # flags of warmup.py; --seed is each run's
    "plain": "",
    "longer": "--answer-steps 450",
    "weak": "--answer-steps 150 --judge-steps 0",
    "manners": "--guess-steps 160",
}

VIEW = "--view faded"
PLAIN = [name for name in REWARDS if not needs_view(name) and name != "scrl"]
# With 8 responses an answer is rare, as scrl has it, only above its default.
EVERY = [*PLAIN, "scrl(tau_low=.2)", "frequency(gamma=2)", "frequency(gamma=.5)"]
LABEL_FREE = [label for label in EVERY if label != "random" and not needs_judge(label) and not needs_gold(label)]
LONG = "majority frequency judged frequency@energy-centred"
LONG_STEPS = (0, 48, 96, 144, 192, 240)
JUDGE = "--rewards 'frequency judge-only judged(lam_fmt=0)'"
ALT = (
    "Three panels by training step, a line for each of four rewards: right answers among eight samples, pass@8, and "
    "entropy of the samples; means over seeds, their range as a band."
)

STUDIES = [
    Study(
        "rewards",
        base="plain",
        flags="--eval-every 24",
        sweeps=[Sweep(" ".join(EVERY)), Sweep("two-view", VIEW, name="faded")],
        pictures="-m bench.front_page --run {out}/runs/majority/seed-0 --out {out}/pictures",
        tables={
            "front": tables.front,
            "rewards": tables.after,
            "rewards-gain": tables.gain("`majority`"),
            "kinds": tables.by_kind("`majority`"),
        },
    ),
    Study(
        "long",
        base="plain",
        steps=240,
        flags="--eval-every 24 --questions-per-step 32",
        sweeps=[
            Sweep(f"{LONG} majority(max_share=.95) confident-majority"),
            Sweep("majority", "--kl-coef 0", name="no KL"),
        ],
        tables={
            "long-curves": tables.picture("long.png", ALT),
            "long-gain": tables.gain("`majority`"),
            **{f"long-{name}": tables.by_step(name, LONG_STEPS) for name in tables.NAMES},
        },
        figures={"long.png": curves.by_step([f"`{label}`" for label in LONG.split()])},
    ),
    Study(
        "weak",
        base="weak",
        steps=24,
        flags="--eval-every 12 --questions-per-step 32",
        sweeps=[Sweep(" ".join([*LABEL_FREE, "random", "supervised"]))],
        tables={"weak": tables.after, "weak-gain": tables.gain("`majority`")},
    ),
    Study(
        "advantages",
        base="plain",
        flags="--eval-every 24",
        sweeps=[
            Sweep("frequency@energy frequency@energy-centred frequency@rloo frequency@mean"),
            Sweep("majority", "--algorithm sft", name="sft"),
        ],
        uses=["rewards"],
        tables={"advantages": tables.after, "advantages-gain": tables.gain("`frequency`", "rewards")},
    ),
    Study(
        "manners",
        base="manners",
        flags="--eval-every 24",
        sweeps=[Sweep("majority random supervised")],
        tables={"manners": tables.after, "manners-gain": tables.gain("`majority`")},
    ),
    Study(
        "hard",
        base="longer",
        flags="--eval-every 24",
        sweeps=[Sweep("majority frequency supervised random", data="shapes-hard")],
        also="shapes",
        tables={
            "front-hard": tables.front,
            "hard": tables.after,
            "hard-gain": tables.gain("`majority`"),
            "hard-kinds": tables.by_kind("`majority`"),
            "hard-easy": tables.elsewhere,
        },
    ),
    Study(
        "judge",
        base="plain",
        commands=[
            "rollout.py --data shapes --split test --steps 8 --model {base} --seed {seed} --out {out}/rollouts-{seed}",
            "judge.py --rollouts {out}/rollouts-{seed} --judge-mode logit --out {out}/logit-{seed}",
            "judge.py --rollouts {out}/rollouts-{seed} --judge-mode text --judge-repeats 4 --out {out}/text-{seed}",
            f"ablate.py --rollouts {{out}}/logit-{{seed}} {JUDGE} --out {{out}}/compared-logit-{{seed}}",
            f"ablate.py --rollouts {{out}}/text-{{seed}} {JUDGE} --out {{out}}/compared-text-{{seed}}",
        ],
        found=making.judged,
        tables={"judge": tables.judged},
    ),
    Study(
        "questions",
        base="plain",
        commands=["synthesize.py --data shapes --model {base} --seed {seed} --out {out}/in-context-{seed}"],
        flags="--eval-every 24 --eval-data shapes",
        sweeps=[
            Sweep("majority", data="{out}/in-context-{seed}", name="in-context"),
            Sweep("majority", data="shapes,{out}/in-context-{seed}", name="original and in-context"),
        ],
        found=making.written,
        uses=["rewards"],
        tables={"questions": tables.gain("`majority`", "rewards"), "questions-filters": tables.filters},
    ),
    Study(
        "four-bits",
        base="plain",
        flags="--eval-every 24",
        sweeps=[Sweep("majority", "--quantize nf4", name="nf4")],
        uses=["rewards"],
        tables={"four-bits": tables.gain("`majority`", "rewards")},
    ),
    Study(
        "health",
        uses=["rewards", "long", "weak", "advantages", "manners", "hard", "questions"],
        tables={"health": tables.health},
    ),
]


@dataclass
class Config(Typed):
    only: Name | None = None
    """studies, with commas between them; None: all"""
    fill: bool = False
    """run nothing: fill the pages from the records that are there"""
    seeds: Count = 3
    """seeds 0, 1, … of base and training"""
    jobs: Count = 2
    """processes at a time, of one thread each"""
    out: Path = Path("runs/results")
    """folder for bases and runs"""
    root: Path = Path(".")
    """folder with README.md, docs/ and bench/results/"""


def select(only: str | None, studies: Sequence[Study]) -> list[Study]:
    """The studies that are asked for, in order of the list. Raises SettingError for a name that is none."""
    known = [study.name for study in studies]
    named = known if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in named if name not in known]:
        raise SettingError(
            f"--only {only}: {unknown[0]!r} is no study; give names among {', '.join(known)}"
            f"{suggest(unknown[0], known)}"
        )
    return [study for study in studies if study.name in named]


def keep(study: Study, place: Place, complete: bool, root: Path) -> None:
    """Write the record of a study, unless that would replace a complete one by one that has less."""
    path = root / "bench/results" / f"{study.name}.json"
    old = read_json(path) if path.is_file() else None
    if old and old["complete"] and (not complete or place.seeds < old["seeds"]):
        print(f"{path} stays until the study is complete again, of {old['seeds']} seeds or more", file=sys.stderr)
        return
    record = making.record(study, place, complete, old)
    if complete or record["runs"]:
        write_whole(path, [json.dumps(record, indent=1).encode(), b"\n"])
    for picture in (place.out / study.name / "pictures").glob("*.png") if complete else ():
        write_whole(root / "docs" / picture.name, [picture.read_bytes()])


def fill(root: Path, studies: Sequence[Study] = STUDIES) -> None:
    """Put the tables and figures of all records into the pages. Raises FolderInUse while another process does."""
    changed = False
    with holding(root / "bench/results"):
        paths = {study.name: root / "bench/results" / f"{study.name}.json" for study in studies}
        records = {name: read_json(path) for name, path in paths.items() if path.is_file()}
        found = tables.rendered(studies, records)
        for page in PAGES:
            text = (root / page).read_text()
            if (filled := tables.fill(text, found)) != text:
                write_whole(root / page, [filled.encode()])
                print(f"filled {root / page}")
                changed = True
        for study in studies:
            for name, figure in study.figures.items() if study.name in records else ():
                write(figure(records[study.name]), root / "docs" / name)
    if not changed:
        print(f"{' and '.join(str(root / page) for page in PAGES)} have these tables already")


def main(config: Config, studies: Sequence[Study] = STUDIES, bases: dict[str, str] = BASES) -> None:
    """Make what is missing and fill the pages. Raises RunsFailed, after all studies, for what could not be made."""
    check_folder(config.out)
    if config.only and config.fill:
        raise SettingError("--only with --fill: --fill fills every table; leave one of them out")
    chosen = [study for study in select(config.only, studies) if study.base and not config.fill]
    place = Place(config.out, config.seeds, config.jobs, bases)
    for study in chosen:
        making.check(study, place)
    failed = []
    for study in chosen:
        print(f"\n{study.name}", file=sys.stderr)
        complete, stopped = True, None
        with holding(config.out):
            try:
                making.make(study, place)
            except RunsFailed as error:
                failed.append(f"{study.name}: {error}")
                complete = False
            except Stopped as error:
                complete, stopped = False, error
            keep(study, place, complete, config.root)
        fill(config.root, studies)
        if stopped:
            raise stopped
    fill(config.root, studies)
    if failed:
        raise RunsFailed("; ".join(failed))


if __name__ == "__main__":
    cli.launch(main, Config)
