"""The online comparison of ablate.py: train with each reward and seed, compare held-out scores and training curves.

    for each seed, for each variant:
        train_upt.py in a process of its own, `jobs` at a time, output in OUT/<variant>/seed-S/log.txt
    after every finished run:
        table.md, table.csv    held-out scores after training and their gain over the base, mean over seeds with 95 %
                               t-intervals; the gain is paired: each run's score less its own base's
        curves.png             accuracy, entropy, length and majority share by step, mean and range over seeds

The runs of a seed share questions, sampling noise and initial adapter, and one evaluation of the base: the first of
them makes it, the others wait for it and take a copy. `{seed}` in the model, the data or a further setting is the run's
seed, so that each seed can have a base of its own. The same command goes on where it was stopped; finished runs are
kept. On a CPU rounding depends on the threads of a run, so compare runs made with the same `threads`.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upt.errors import RunsFailed, SettingError
from upt.files import write_whole
from upt.groups.stats import FEW, FEW_NOTE, counted, markdown, t_interval, write_csv
from upt.run import processes, progress, records
from upt.run.stopping import stop_on_signal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN = Path(__file__).parents[2] / "train_upt.py"
POLL = 0.5  # seconds between looks at the runs
LOG_LINES = 15  # of a failed run that are shown
OURS = ("data", "model", "steps", "reward", "advantage", "seed", "out", "resume", "from-shards")
SCORES = {  # name: factor when printed
    "greedy": 100, "mean": 100, "maj": 100, "pass": 100, "length": 1, "entropy": 1, "majority_share": 100,
    "abstentions": 100,
}  # fmt: skip
CURVES = {"accuracy": "accuracy of samples", "entropy": "entropy, nats", "length": "length, tokens",
          "majority_share": "majority share"}  # fmt: skip


@dataclass(eq=False)
class Run:
    """One training run of the comparison; `label` is its variant as the user wrote it."""

    label: str
    seed: int
    folder: Path
    flags: list[str] = field(repr=False)
    logged: int = 0
    """bytes of its log.txt from before it was started here"""

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def base(self) -> Path | None:
        """Its evaluation before training, if it has one that is its own."""
        path = self.folder / "before.json"
        return path if path.is_file() and (self.folder / "manifest.json").is_file() else None


def slug(label: str) -> str:
    """A variant's name as that of a folder."""
    return re.sub(r"[^\w.=@-]+", "-", label).strip("-.")


def plan(config, variants) -> list[Run]:
    """Every run of the comparison, seed by seed, with its command line."""
    extra = shlex.split(config.train)
    for flag in extra:
        if flag.startswith("--") and flag[2:].split("=")[0].replace("_", "-") in OURS:
            raise SettingError(f"{flag}: the runs differ in this or share it; use --rewards, --seeds, --out")
    slugs = {v.label: slug(v.label) for v in variants}
    if len({*slugs.values()}) < len(variants):
        raise SettingError(f"two of {', '.join(slugs)} would share a folder; write them apart, or use two --out")
    found = []
    for seed in range(config.seeds):
        shared = {"data": config.data, "model": config.model, "steps": config.steps, "seed": seed}
        shared = [part for name, x in shared.items() if x is not None for part in (f"--{name}", str(x))] + extra
        shared = [part.replace("{seed}", str(seed)) for part in shared]
        for v in variants:
            folder = config.out / slugs[v.label] / f"seed-{seed}"
            own = {"reward": v.reward, "advantage": v.advantage, "out": folder}
            flags = [part for name, x in own.items() if x is not None for part in (f"--{name}", str(x))]
            found.append(Run(v.label, seed, folder, flags + shared))
    return found


def share_base(run: Run, runs: list[Run]) -> bool:
    """Give a run the evaluation of its seed's base; whether there is one."""
    bases = [other.base for other in runs if other.seed == run.seed and other.base]
    if run.base is None:
        (run.folder / "before.json").unlink(missing_ok=True)  # of settings that nothing vouches for
        if bases:
            write_whole(run.folder / "before.json", [bases[0].read_bytes()])
    return bool(bases)


def start(run: Run, threads: int) -> subprocess.Popen:
    """Begin a run, or go on with it, in a process of its own that writes to its log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "log.txt"
    run.logged = path.stat().st_size if path.exists() else 0
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"}
    with open(path, "ab") as log:
        # In a session of its own: Ctrl-C reaches this process alone, which then asks each run once.
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *run.flags],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def stop(processes) -> None:
    """Ask the runs to stop and wait until they have saved their state; at once on a second signal."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def last_lines(path: Path) -> str:
    """The end of a log, indented."""
    lines = [line.rsplit("\r", 1)[-1] for line in path.read_text(errors="replace").split("\n")]  # a bar's last state
    return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-LOG_LINES:])


def reason(run: Run) -> str:
    """Why a run failed: the last error in its log since it was started, else the last line."""
    said = (run.folder / "log.txt").read_bytes()[run.logged :].decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].strip()


def execute(folder: Path, runs: list[Run], jobs: int, threads: int, steps: int, shares_base: bool, report) -> list[Run]:
    """Do the runs that are not finished and return those that failed; `report()` after each that finishes.

    Raises `Stopped` on SIGINT or SIGTERM, after all runs have stopped.
    """
    waiting, active, failed = [run for run in runs if not run.finished], {}, []
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", file=sys.stderr)
        report()

    def done() -> int:
        return sum(steps if run.finished else len(records.steps(run.folder)) for run in runs)

    bar = progress.bar(total=steps * len(runs), initial=done(), desc="training", unit="step")
    with stop_on_signal(folder) as look, bar:
        try:
            while waiting or active:
                look()
                for run in [*waiting]:
                    alone = all(other.seed != run.seed for other in active)
                    if len(active) < jobs and (not shares_base or share_base(run, runs) or alone):
                        waiting.remove(run)
                        active[run] = (start(run, threads), time.monotonic())
                        progress.say(f"started {run.name}", sys.stderr)
                for run, (process, begun) in [*active.items()]:
                    if process.poll() is None:
                        continue
                    del active[run]
                    took = f"after {(time.monotonic() - begun) / 60:.1f} min"
                    if process.returncode == 0 and run.finished:
                        progress.say(f"finished {run.name} {took}", sys.stderr)
                        report()
                    else:
                        failed.append(run)
                        log = run.folder / "log.txt"
                        progress.say(f"FAILED {run.name} {took}, exit status {process.returncode}; the end of {log}:\n"
                                  f"{last_lines(log)}", sys.stderr)  # fmt: skip
                bar.update(done() - bar.n)
                time.sleep(POLL)
        finally:
            stop([process for process, _ in active.values()])
    return failed


# --- results ----------------------------------------------------------------------------------------------------------


def compare(summaries: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """{label: {seed: summary.json}} -> {label: {"seeds": n, "after": {score: (mean, half)}, "gain": …}}.

    The first entry, "base", holds the scores before training in "after". `half` is None of a single seed.
    """

    def intervals(runs: list[dict], value) -> dict[str, tuple]:
        names = [name for name in SCORES if runs and all(name in run.get("before", ()) for run in runs)]
        return {name: t_interval([value(run, name) for run in runs]) for name in names}

    def before(run, name):
        return run["before"][name]["value"]

    def after(run, name):
        return run["after"][name]["value"]

    bases = {seed: run for found in summaries.values() for seed, run in found.items()}
    table = {"base": {"seeds": len(bases), "after": intervals([*bases.values()], before), "gain": {}}}
    for label, found in summaries.items():
        runs = [*found.values()]
        gain = intervals(runs, lambda run, name: after(run, name) - before(run, name))
        table[label] = {"seeds": len(runs), "after": intervals(runs, after), "gain": gain}
    return table


def cell(score: tuple[float, float | None] | None, name: str, sign: str = "") -> str:
    """A score's mean over seeds ± half of its interval, to the digits that it needs."""
    return interval(score, 3 if name == "entropy" else 1, SCORES[name], sign)


def interval(found: tuple[float, float | None] | None, digits: int, factor: float, sign: str = "") -> str:
    """A mean ± half of its interval, both times `factor`."""
    if found is None:
        return "–"
    # Rounded first, and + 0.0 makes -0.0 plain zero.
    mean, half = (None if x is None else round(factor * x, digits) + 0.0 for x in found)
    return f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def score_table(table: dict[str, dict], of: str, names: Sequence[str] = tuple(SCORES)) -> str:
    """The "after" or the "gain" of a comparison as Markdown, in those of the scores that it has."""
    names = [name for name in names if any(name in row["after"] for row in table.values())]
    sign = "+" if of == "gain" else ""
    rows = [
        [label, str(row["seeds"]), *(cell(row[of].get(name), name, sign) for name in names)]
        for label, row in table.items()
        if (label, of) != ("base", "gain")
    ]
    return markdown([["reward", "seeds", *names], *rows])


def report_table(table: dict[str, dict], about: str) -> str:
    """The comparison as Markdown: scores after training, then gains."""
    return "\n\n".join([
        "# Rewards compared by training", about,
        "Held-out scores in per cent, length in tokens, entropy in nats; eval/heldout.py says what they are. Mean over "
        "seeds ± half of its 95 % t-interval, which a single seed has not.",
        "## After training", score_table(table, "after"),
        "## Gain over the base, paired by seed", score_table(table, "gain"),
    ]) + "\n"  # fmt: skip


def csv_rows(table: dict[str, dict]) -> list[list]:
    """The comparison with full precision: shares from 0 to 1, an empty field for what there is not."""
    rows = [["reward", "seeds", *(f"{n}{part}" for n in SCORES for part in ("", "_half", "_gain", "_gain_half"))]]
    for label, row in table.items():
        cells = [x for n in SCORES for of in ("after", "gain") for x in row[of].get(n, (None, None))]
        rows.append([label, row["seeds"], *cells])
    return rows


def over_seeds(curves: list[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """Steps, and mean, least and greatest value of the curves that have one at the step: (3, steps)."""
    at: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    return steps, np.array([[np.mean(at[s]), min(at[s]), max(at[s])] for s in steps]).reshape(-1, 3).T


def look(i: int, count: int) -> dict:
    """Width and dashes of the i-th of some curves: later ones are thinner and have gaps of their own, so that one which
    coincides with an earlier shows both."""
    return {
        "lw": 1.2 + 2.4 * (1 - i / count) * (count > 1),
        "ls": "-" if i == 0 else (0, (2 + 2 * (i % 4), 1 + i % 3)),
    }


def figure(metrics: dict[str, list[list[dict]]]) -> "Figure":
    """Training curves of each variant: the mean over its runs, and their range as a band."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(10, 7), layout="constrained")
    axes = page.subplots(2, 2, sharex=True).ravel()
    for i, (label, runs) in enumerate(metrics.items()):
        colour = f"C{i % 10}"
        for axis, name in zip(axes, CURVES, strict=True):
            curves = [{row["step"] + 1: row[name] for row in run if row.get(name) is not None} for run in runs]
            steps, (mean, low, high) = over_seeds(curves)
            axis.plot(steps, mean, label=label if axis is axes[0] else None, color=colour, **look(i, len(metrics)))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    for axis, title in zip(axes, CURVES.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[2:]:
        axis.set_xlabel("step")
    if metrics:
        page.legend(loc="outside lower center", ncols=4, fontsize=9)
    return page


def write_results(config, runs: list[Run], about: str) -> dict[str, dict]:
    """Tables and figure of the runs that are finished; returns the table."""
    done = [run for run in runs if run.finished]
    summaries: dict[str, dict] = {run.label: {} for run in runs}
    metrics: dict[str, list] = {run.label: [] for run in done}
    for run in done:
        summaries[run.label][run.seed] = json.loads((run.folder / "summary.json").read_text())
        metrics[run.label].append(records.steps(run.folder))
    table = compare(summaries)
    measured = [run["before"] for of in summaries.values() for run in of.values() if "before" in run]
    if asked := {scores["questions"] for scores in measured if "questions" in scores}:
        about += f"; {counted(min(asked))} held-out questions" + (f" ({FEW_NOTE[2:]})" if min(asked) < FEW else "")
    picture = io.BytesIO()
    figure(metrics).savefig(picture, format="png", dpi=110, metadata={"Software": None})
    write_whole(config.out / "curves.png", [picture.getvalue()])
    write_whole(config.out / "table.md", [report_table(table, about).encode()])
    write_csv(config.out / "table.csv", csv_rows(table))
    return table


def main(config, variants, settings_of: Callable) -> dict[str, dict]:
    """Train and compare; returns the table. Raises RunsFailed, after all of them, if some runs failed.

    `settings_of(flags)` are the settings in full of a run with these flags. It raises if they are wrong, or not those
    of the run in its folder.
    """
    runs = plan(config, variants)
    settings = [settings_of(run.flags) for run in runs][0]
    import torch  # not before the settings are known to be right

    cores = processes.cores() // settings.gpus  # for each process of a run
    jobs = min(config.jobs or (1 if torch.cuda.is_available() else max(1, cores)), len(runs))
    threads = config.threads or max(1, cores // jobs)
    about = f"{config.data}, {config.model or settings.model}, {settings.steps} steps, {config.seeds} seeds"
    about += f"; settings besides: `{config.train}`" if config.train else ""
    print(f"{len(runs)} runs, {jobs} at a time with {threads} threads each: {about}", file=sys.stderr)

    def report() -> dict[str, dict]:
        return write_results(config, runs, about)

    failed = execute(config.out, runs, jobs, threads, settings.steps, settings.eval_questions > 0, report)
    if len(failed) < len(runs):  # else tables of an earlier command stay
        table = report()
        print((config.out / "table.md").read_text())
        print(f"table.md, table.csv and curves.png in {config.out}")
    if failed:
        why = "; ".join(f"{run.name}: {reason(run)}" for run in failed)
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed: {why}")
    return table
