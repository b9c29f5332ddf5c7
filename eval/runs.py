"""The runs of a folder, a line each: when, on what, with which reward, what came of it.

    python -m eval.runs                         # all under runs/, the latest last
    python -m eval.runs runs/ablate --sort mean
    python -m eval.runs --sort reward --reverse

From manifests, summaries and logs alone. `when` is when the run was begun; `mean` and `greedy` are
held-out accuracy in per cent, before → after, of a run in the making before → at its last evaluation. What is not there
is sorted last. On a terminal the lines are made to fit: what all runs share is said above, long values are shortened.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from upt.errors import SettingError, ShardError, in_words, suggest_path
from upt.files import known_json
from upt.groups import manifests
from upt.run import cli, health, records
from upt.run.locking import is_held
from upt.run.typed import Typed
from upt.show import printable

SETTINGS = ("data", "model", "reward", "advantage", "seed")
SCORES = ("mean", "greedy")
COLUMNS = ("when", "run", *SETTINGS, "steps", *SCORES, "state")
FLEXIBLE = ("run", "data", "model", "reward", "advantage", "state")  # columns that may be shortened
LEAST = 9  # characters that are left of them
UNBOUNDED = 10**6  # columns of what is no terminal
HEAD = 2**20  # bytes of a file of held-out scores, in which its rows begin


@dataclass
class Config(Typed):
    folder: tyro.conf.Positional[Path] = Path("runs")
    """where to look, folders in it included"""
    sort: Literal[*COLUMNS] = "when"
    """the column to sort by; of scores the one after training, or the last"""
    reverse: bool = False
    """the other way round"""


def folders(path: Path) -> Iterator[Path]:
    """Every folder of a training run at or under a path, of rounds the run of each; not what lies inside of runs."""
    seen = set()
    for here, inside, files in os.walk(path, followlinks=True):
        real, folder = os.path.realpath(here), Path(here)
        inside[:] = sorted(name for name in inside if not name.startswith(".")) if real not in seen else []
        if real not in seen and "manifest.json" in files and is_run(folder):
            inside[:] = [name for name in inside if (folder / name / "run" / "manifest.json").is_file()]
            if not inside:
                yield folder
        seen.add(real)


def is_run(folder: Path) -> bool:
    """Whether a manifest is that of a training run, or cannot be read and lies beside the log of one."""
    try:
        return manifests.read(folder)["stage"] == "train"
    except ShardError:
        return (folder / "metrics.jsonl").is_file()


def row_of(folder: Path, name: str) -> dict:
    """What the table says of a run, by column; scores as [before, latest]. Why it cannot be read is its state."""
    row = dict.fromkeys(COLUMNS) | {"when": manifests.begun(folder), "run": name}
    row |= {score: [] for score in SCORES}
    try:
        config = manifests.read(folder)["config"]
        row |= {column: config.get(column) for column in SETTINGS} | {"model": model_of(config)}
        row |= finished(folder, config["steps"]) or unfinished(folder, config["steps"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        row["state"] = f"unreadable: {in_words(error)}".replace(f"{folder}/", "")
    return row


def model_of(config: dict) -> str | None:
    """The model, with how it was loaded and by how many processes where that is not as usual."""
    how = [config["quantize"]] if config.get("quantize") else []
    how += [f"{config['gpus']} processes"] if config.get("gpus", 1) > 1 else []
    return config.get("model") and config["model"] + (f" ({', '.join(how)})" if how else "")


def finished(folder: Path, planned: int) -> dict | None:
    """Steps, scores and state by a run's summary; None where there is none yet."""
    summary = known_json(folder / "summary.json")
    if summary is None:
        return None
    end = summary.get("end", {})
    made, scores = end.get("steps", planned), [summary.get(when, {}) for when in ("before", "after")]
    said = "finished" if made == planned else f"ended at {made} of {planned}"
    found = {name: [of[name]["value"] for of in scores if name in of] for name in SCORES}
    return {"steps": made, "state": said + alarm(end.get("alarms", {}))} | found


def unfinished(folder: Path, planned: int) -> dict:
    """The same by its log: running, stopped, or diverged."""
    rows = records.steps(folder)
    made = rows[-1]["step"] + 1 if rows else 0
    said = "running" if is_held(folder) else "stopped"
    if health.has_diverged(rows):
        said = "diverged"
    before = scores_in(folder / "before.json")
    later = [row["held_out"] for row in rows if row.get("held_out")][-1:]
    found = {name: [of[name] for of in (before, *later) if name in of] for name in SCORES}
    return {
        "steps": made,
        "state": f"{said} at {made} of {planned}" + alarm({row["step"]: row.get("alarms", []) for row in rows}),
        **found,
    }


def scores_in(path: Path) -> dict[str, float]:
    """The scores in a file of held-out scores, whose rows, nearly all of it, come last and are not read."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        head, rows, _ = file.read(HEAD).partition('"rows":')
    scores = json.loads(head.rstrip(", ") + "}" if rows else head)
    return {name: scores[name]["value"] for name in SCORES if name in scores}


def alarm(alarms: dict) -> str:
    """The first alarm that a policy may have collapsed, among the names by step."""
    found = {int(step): health.collapses({"alarms": names}) for step, names in alarms.items()}
    first = min((step for step, names in found.items() if names), default=None)
    return "" if first is None else f", collapse? at {first + 1}: {' '.join(found[first])}"


# ------------------------------------------------------------------------------------------------------------ the table


def value(row: dict, column: str):
    """By what a row is sorted: a number, or the numbers and words of a text; None for what is not there."""
    found = (row[column] or [None])[-1] if column in SCORES else row[column]
    if column in ("when", "seed", "steps", *SCORES) or found is None:
        return found
    parts = re.split(r"(\d+)", str(found).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]  # seed-2 before seed-10


def ordered(rows: list[dict], column: str, reverse: bool) -> list[dict]:
    """The rows by a column, those without a value last."""
    there = [row for row in rows if value(row, column) is not None]
    there.sort(key=lambda row: value(row, column), reverse=reverse)
    return there + [row for row in rows if value(row, column) is None]


def cells(row: dict) -> list[str]:
    at = time.localtime(row["when"])
    this_year = at.tm_year == time.localtime().tm_year
    shown = row | {"when": time.strftime("%m-%d %H:%M" if this_year else "%Y-%m-%d", at)}
    shown |= {score: " → ".join(f"{100 * x:.1f}" for x in row[score]) for score in SCORES}
    return ["" if shown[name] is None else printable(" ".join(str(shown[name]).split())) for name in COLUMNS]


def table(rows: list[dict], width: int = UNBOUNDED) -> str:
    """The rows as aligned text, in lines of `width` characters as far as that can be."""
    columns = [*zip(COLUMNS, *map(cells, rows))]
    widths = [max(map(len, column)) for column in columns]
    gaps, said = 2 * (len(columns) - 1), ""
    if sum(widths) + gaps > width and len(rows) > 1:
        alike = [column for column in columns if column[0] in SETTINGS and len({*column[1:]}) == 1]
        said = "all: " + ", ".join(f"{column[0]} {column[1]}" for column in alike) + "\n" if alike else ""
        columns = [column for column in columns if column not in alike]
        widths = [max(map(len, column)) for column in columns]
        gaps = 2 * (len(columns) - 1)
    flexible = [i for i, column in enumerate(columns) if column[0] in FLEXIBLE]
    while sum(widths) + gaps > width:
        widest = max(flexible, key=widths.__getitem__)
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    lines = ("  ".join(shorter(cell, room).ljust(room) for cell, room in zip(line, widths)) for line in zip(*columns))
    return said + "\n".join(line.rstrip() for line in lines)


def shorter(text: str, width: int) -> str:
    """The start and the end of a text that is too long."""
    end = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[-end:]}"


def main(config: Config) -> list[dict]:
    """Print the table and return its rows. Raises SettingError for a folder that is not there."""
    top = config.folder
    if not top.is_dir() and top != Config.folder:
        raise SettingError(f"{top}: no such folder; give the one that runs are in{suggest_path(top)}")
    found = (row_of(folder, str(folder.relative_to(top)) if folder != top else folder.name) for folder in folders(top))
    rows = ordered([*found], config.sort, config.reverse)
    width = shutil.get_terminal_size((UNBOUNDED, 0)).columns
    print(table(rows, width) if rows else f"no runs in {top}: make train begins one in runs/train")
    return rows


if __name__ == "__main__":
    cli.launch(main, Config)
