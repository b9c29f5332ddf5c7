"""The runs of a folder, a line each: when, on what, with which reward, what came of it.

    python -m eval.runs                         # all under runs/, the latest last
    python -m eval.runs runs/ablate --sort mean
    python -m eval.runs --sort reward --reverse

From manifests, summaries and logs alone. `mean` and `greedy` are held-out accuracy in per cent, before → after.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from eval.report import collect
from upt.errors import SettingError, ShardError, suggest_path
from upt.run import cli
from upt.run.locking import is_held
from upt.run.typed import Typed

COLUMNS = ("when", "run", "data", "model", "reward", "advantage", "seed", "steps", "mean", "greedy", "state")


@dataclass
class Config(Typed):
    folder: tyro.conf.Positional[Path] = Path("runs")
    """where to look, folders in it included"""
    sort: Literal[*COLUMNS] = "when"
    """the column to sort by; of scores the one after training, or the last"""
    reverse: bool = False
    """the other way round"""


def folders(path: Path) -> list[Path]:
    """Every folder of a training run at or under a path; not what lies inside of runs. Raises SettingError."""
    if not path.is_dir():
        raise SettingError(f"{path}: no such folder; give the one that runs are in{suggest_path(path)}")
    if collect.is_run(path) and not any(path.glob("round-*")):
        return [path]
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return [found for below in inside for found in folders(below)]


def row_of(folder: Path, name: str) -> dict:
    """What the table says of a run, by column; scores as [before, …, latest]."""
    run = collect.overview(folder, name)
    config = run["config"]
    return {
        "when": (folder / "manifest.json").stat().st_mtime,
        "run": name,
        **{column: config.get(column) for column in ("data", "model", "reward", "advantage", "seed")},
        "steps": run["steps"],
        **{score: [value for _, value in run["held_out"].get(score, ())] for score in ("mean", "greedy")},
        "state": state(folder, run),
    }


def state(folder: Path, run: dict) -> str:
    """finished, running or stopped, and the first alarm that a policy may have collapsed."""
    planned = run["config"]["steps"]
    if run["finished"]:
        said = "finished" if run["steps"] == planned else f"ended at {run['steps']} of {planned}"
    else:
        said = f"{'running' if is_held(folder) else 'stopped'} at {run['steps']} of {planned}"
    return said + (f", collapse? at {run['collapse'][0] + 1}" if run["collapse"] else "")


def key(column: str):
    """By which a row is sorted; what is not there goes first."""

    def of(row: dict):
        value = row[column]
        value = (value or [None])[-1] if column in ("mean", "greedy") else value
        return value is not None, value

    return of


def cells(row: dict) -> list[str]:
    shown = row | {"when": time.strftime("%Y-%m-%d %H:%M", time.localtime(row["when"]))}
    for score in ("mean", "greedy"):
        shown[score] = " → ".join(f"{100 * x:.1f}" for x in row[score][:: max(len(row[score]) - 1, 1)])
    return ["" if shown[column] is None else str(shown[column]) for column in COLUMNS]


def table(rows: list[dict]) -> str:
    """The rows as aligned text."""
    lines = [COLUMNS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(config: Config) -> list[dict]:
    """Print the table and return its rows."""
    rows, broken = [], []
    for folder in folders(config.folder):
        try:
            rows.append(row_of(folder, str(folder.relative_to(config.folder)) if folder != config.folder else "."))
        except (ShardError, KeyError, TypeError) as error:
            broken.append(f"{folder} is left out: {error}")
    rows.sort(key=key(config.sort), reverse=config.reverse)
    print(table(rows) if rows else f"no runs in {config.folder}; make train begins one")
    print(*broken, sep="\n", end="\n" * bool(broken))
    return rows


if __name__ == "__main__":
    cli.launch(main, Config)
