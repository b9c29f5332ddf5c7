"""The tables of docs/results.md and README.md, from the records of bench/results/, and their places in the pages.

    <!-- table: NAME -->
    what a study of bench/studies.py says of NAME, and a line on where it comes from
    <!-- end -->

A table is a function of its study and of all records by name.
"""

import re
from collections.abc import Callable, Sequence

from bench import alarms
from upt.compare import sweep
from upt.errors import DataError, suggest
from upt.groups.stats import markdown, t_interval

PLACE = re.compile(r"(<!-- table: (\S+) -->\n)(?:(?!<!-- table).)*?(<!-- end -->)", re.S)
NAMES = ("mean", "greedy", "maj", "pass", "length", "entropy")
GOLD = NAMES[:4]
LESS = ("mean", "pass")  # in which runs are told apart
TITLES = {"maj": "maj@8", "pass": "pass@8"}


# --------------------------------------------------------------------------------------------------- filling the pages


def rendered(studies: Sequence, records: dict[str, dict]) -> dict[str, str]:
    """Every table by name, as it stands in a page."""
    found = {}
    for study in studies:
        parts = [name for name in (study.name, *study.uses) if name in records]
        for name, table in study.tables.items():
            if study.name in parts or (parts and not study.base):
                found[name] = f"{table(study, records)}\n\n{source(study, records, parts)}\n"
            else:
                needed = study.name if study.base else ",".join(study.uses)
                found[name] = f"*Not measured yet: `python -m bench.studies --only {needed}`.*\n"
    return found


def fill(page: str, tables: dict[str, str]) -> str:
    """A page with its tables in their places. Raises DataError for a place of a table that there is not, or without
    end."""
    if len(PLACE.findall(page)) != len(starts := re.findall("<!-- table.*", page)):
        raise DataError(f"a table's place is not <!-- table: NAME --> … <!-- end -->, among {', '.join(starts)}")

    def filled(match: re.Match) -> str:
        head, name, end = match.groups()
        if name not in tables:
            raise DataError(f"<!-- table: {name} -->: no study fills such a table{suggest(name, tables)}")
        return f"{head}\n{tables[name]}\n{end}"

    return PLACE.sub(filled, page)


def source(study, records: dict[str, dict], parts: Sequence[str]) -> str:
    """Where a table's numbers come from, on a line."""
    others = [f"`{name}`{so_far(records[name])}" for name in parts if name != study.name]
    if study.name not in records:
        missing = [f"`{name}`" for name in study.uses if name not in parts]
        words = f"; {', '.join(missing)} not measured yet" if missing else ""
        return f"From the records of {', '.join(others)}{words}."
    record = records[study.name]
    prints = [found.removeprefix("sha256:")[:8] for found in record["fingerprint"].values()]
    base = " ".join(f"python warmup.py {record['base']['flags']}".split())
    versions = ", ".join(f"{name} {' and '.join(record['versions'][name])}" for name in ("torch", "transformers"))
    said = [f"`{record['command']}`" + (f" with the runs of {', '.join(others)}" if others else "")]
    if not record["complete"]:
        said.append(so_far(record).strip(" ()"))
    said.append(f"bases {', '.join(prints)} by `{base} --seed S`")
    said += [f"{record['threads']} thread a run", record["date"], record["machine"], versions]
    return "; ".join(said) + "."


def so_far(record: dict) -> str:
    """How much of a study there is, of one that is not complete."""
    return "" if record["complete"] else f" ({len(record['runs'])} of {record['planned']} runs so far)"


# ---------------------------------------------------------------------------------------------------------- the tables


def grouped(runs: Sequence[dict]) -> dict[str, dict[int, dict]]:
    """{label: {seed: run}}, as upt/compare/sweep.py takes them."""
    found: dict[str, dict[int, dict]] = {}
    for run in runs:
        found.setdefault(run["label"], {})[run["seed"]] = run
    return found


def after(study, records) -> str:
    """Scores after training."""
    return sweep.score_table(sweep.compare(grouped(records[study.name]["runs"])), "after", NAMES)


def gain(than: str, study_of: str | None = None) -> Callable:
    """What training gains, paired by seed; and, of mean and pass, by how much less than the runs `than`.

    Those are the study's own, or another's, whose row then comes first. Pairs are of one and the same base.
    """

    def table(study, records) -> str:
        others, own = records.get(study_of or study.name, {"runs": []}), records[study.name]
        bases = (of.get("fingerprint", {}).items() for of in (others, own))
        same = {int(seed) for seed, _ in set.intersection(*map(set, bases))}
        reference = {run["seed"]: run for run in others["runs"] if run["label"] == than and run["seed"] in same}
        runs = grouped(own["runs"]) if study_of is None else {than: reference} | grouped(own["runs"])
        gains = sweep.compare({label: of for label, of in runs.items() if of})
        names = [name for name in NAMES if name != "length"]
        rows = [("reward", "seeds", *names, *(f"{name}, less {than}'s" for name in LESS))]
        for label, of in runs.items():
            pairs = [(run, reference[seed]) for seed, run in of.items() if seed in reference and label != than]
            less = [[last(run, name) - last(other, name) for run, other in pairs] for name in LESS]
            cells = [sweep.cell(gains[label]["gain"].get(name), name, "+") for name in names] if of else []
            cells += [sweep.cell(t_interval(values), name, "+") if values else "" for name, values in zip(LESS, less)]
            rows += [(label, str(len(of)), *cells)] if of else []
        return markdown(rows)

    return table


def last(run: dict, name: str) -> float:
    """A held-out score after all steps."""
    return alarms.series(run, name)[run["steps"]]


def elsewhere(study, records) -> str:
    """Scores on the study's other data set, and what training has changed of them."""
    runs = [run | run["also"] for run in records[study.name]["runs"] if run["also"]]
    found = sweep.compare(grouped(runs))
    return f"{sweep.score_table(found, 'after', GOLD)}\n\n{sweep.score_table(found, 'gain', GOLD)}"


FRONT = {
    "before training": "base",
    "gain, **label-free** (`majority`)": "`majority`",
    "gain, with labels (`supervised`)": "`supervised`",
    "gain, control (`random` rewards)": "`random`",
}


def front(study, records) -> str:
    """README's table: the base, and what the default reward, the upper bound and the control gain."""
    found = sweep.compare(grouped(records[study.name]["runs"]))
    rows = [("", *(TITLES.get(name, name) for name in GOLD))]
    for words, label in FRONT.items():
        if label in found:
            what, sign = ("after", "") if label == "base" else ("gain", "+")
            rows.append((words, *(sweep.cell(found[label][what].get(name), name, sign) for name in GOLD)))
    return markdown(rows)


def by_step(name: str, steps: Sequence[int]) -> Callable:
    """A held-out score by the steps that were made before it: a line for each reward."""

    def table(study, records) -> str:
        rows = [("reward", "seeds", *(f"{name} at {step}" for step in steps))]
        for label, runs in grouped(records[study.name]["runs"]).items():
            curves = [alarms.series(run, name) for run in runs.values()]
            cells = []
            for step in steps:
                there = [curve[step] for curve in curves if step in curve]
                cells.append(sweep.cell(t_interval(there) if there else None, name))
            rows.append((label, str(len(runs)), *cells))
        return markdown(rows)

    return table


def by_kind(label: str) -> Callable:
    """Mean and greedy accuracy by kind of question before training with a reward, and what is gained."""

    def table(study, records) -> str:
        runs = [run for run in records[study.name]["runs"] if run["label"] == label]
        rows = [("kind", *(f"{name}, {when}" for name in ("mean", "greedy") for when in ("before", "gain")))]
        for kind in runs[0]["after"]["kinds"] if runs else ():
            cells = []
            for name in ("mean", "greedy"):
                old, new = ([run[when]["kinds"][kind][name] for run in runs] for when in ("before", "after"))
                moved = [after - before for before, after in zip(old, new, strict=True)]
                cells += [sweep.cell(t_interval(old), name), sweep.cell(t_interval(moved), name, "+")]
            rows.append((kind, *cells))
        return markdown(rows)

    return table


def judged(study, records) -> str:
    """How well rewards tell right from wrong responses of the base, over seeds."""
    found: dict[str, list[dict]] = {}
    for row in records[study.name]["judged"]:
        found.setdefault(row["label"], []).append(row)
    rows = [("reward on the same groups", "seeds", "AUC", "AUC within groups", "label accuracy")]
    for label, of in found.items():
        cells = []
        for name, digits, factor in (("AUC", 3, 1), ("AUC in group", 3, 1), ("label acc", 1, 100)):
            there = [row[name] for row in of if name in row]
            cells.append(sweep.interval(t_interval(there) if there else None, digits, factor))
        rows.append((label, str(len(of)), *cells))
    return markdown(rows)


def filters(study, records) -> str:
    """What became of the questions that the model wrote, all seeds together."""
    counts = records[study.name]["written"]
    rows = [("filter", "seen", "failed")]
    for name in counts[0]["filters"] if counts else ():
        rows.append((f"`{name}`", *(f"{sum(c['filters'][name][of] for c in counts):,}" for of in ("seen", "failed"))))
    kept = (f"{sum(c[name] for c in counts):,}" for name in ("kept", "candidates"))
    return markdown([*rows, ("kept", "{} of {}".format(*kept), "")])


def health(study, records) -> str:
    """bench/alarms.py on the runs without labels of all studies that it uses."""
    runs = {name: records[name]["runs"] for name in study.uses if name in records}
    return alarms.table({name: [run for run in of if "supervised" not in run["label"]] for name, of in runs.items()})


def picture(path: str, alt: str) -> Callable:
    """A figure of the study's, which stands in the page as soon as it can be drawn."""
    return lambda study, records: f"![{alt}]({path})"
