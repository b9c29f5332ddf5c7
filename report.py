"""A page on a run, to be opened in a browser: what was run, curves, every group of every step, what training changed.

    python report.py runs/train                     # runs/train/report.html
    python report.py runs/a runs/b --out both.html  # side by side
    python report.py runs/ablate                    # all runs of a comparison
    python report.py runs/train --watch             # again and again while the run goes on

train_upt.py makes it at the end of a run. The page asks nothing of any server. Pictures stay where the run has them,
so keep the page in its place; with --embed they are in the page, which can then be sent to somebody.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from eval import report
from upt import show
from upt.errors import SettingError
from upt.files import check_file
from upt.ranges import Count
from upt.run import cli
from upt.run.locking import is_held
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], "one or more"]] = (Path("runs/train"),)
    """folders of runs, or a folder of runs"""
    out: Path | None = None
    """HTML file to write; None: report.html in the run's folder, of several in the folder that all are in"""
    embed: bool = False
    """put the pictures into the page"""
    watch: bool = False
    """make the page again while the run goes on, until it has ended; the page in a browser follows"""
    every: Count = 20
    """seconds between two pages of --watch"""


def wait(config: Config) -> dict[Path, str]:
    """The runs, {folder: name}, once there are some in each path."""
    said = None
    while True:
        try:
            return report.collect.named(config.runs)
        except SettingError as error:
            if not config.watch:
                raise
            if said != str(error):
                print(f"{error}; looking again every {config.every} s", file=sys.stderr)
                said = str(error)
            time.sleep(config.every)


def make(config: Config) -> bool:
    """Write the page; whether a process still works on one of its runs."""
    runs = wait(config)
    tables = [table for path in config.runs for table in report.collect.tables_in(path)]
    running = [run for run in runs if is_held(run)]
    between = {*config.runs, *map(report.collect.whole, runs)}  # a comparison, or rounds, may be between two runs
    going = bool(running) or any(map(is_held, between))
    refresh = config.every if config.watch and going else 0
    title = report.collect.title(config.runs, runs)
    report.page.write(runs, config.out, title, config.embed, refresh, tables, running)
    return going


def main(config: Config) -> Path:
    """Write the page and return where it is."""
    config = replace(config)
    for path in config.runs:
        if path.is_file():
            raise SettingError(f"{path} is a file; give the folder of a run, as {path.parent}")
    config.out = config.out or report.page.place(config.runs)
    check_file(config.out)
    while make(config) and config.watch:
        print(show.printable(f"{config.out}: as of {time.strftime('%H:%M:%S')}"))
        time.sleep(config.every)
    print(show.printable(f"the page is {config.out}, {config.out.stat().st_size / 1e6:.1f} MB"))
    return config.out


if __name__ == "__main__":
    cli.launch(main, Config)
