"""Were a run's alarms right, and its label-free choice of a checkpoint? (upt/run/health.py; labels enter here only.)

A run has lost if its held-out mean after training is over a point below that before, and gained if over a point above.
The choice is among the checkpoints that were scored: those of --eval-every and the last. Its regret is how much higher
the held-out mean of the best of them is. Where all of them are worse than the base, a choice without regret is a loss
still: the table counts the choices that are below the base.

Another rule on runs that are there, `Mine` being a class like health.Watch and `choose` a function like
health.best_checkpoint:

    from bench import alarms, making
    runs = making.finished("runs/results/long/runs", watch=Mine, choose=choose)
    print(alarms.table({"long": runs}))
"""

from collections.abc import Callable, Sequence

from upt.groups.stats import average, markdown
from upt.run import health

MOVED = 0.01  # of the held-out mean, from which a run counts as one that has lost or gained


def replay(
    rows: Sequence[dict], steps: Sequence[int], watch=health.Watch, choose: Callable = health.best_checkpoint
) -> tuple[dict[int, list[str]], int]:
    """The alarms of a run by step, and its choice among the checkpoints after `steps`, from rows of metrics.jsonl."""
    watch, seen = watch(), []
    for row in rows:
        seen.append(row | {"alarms": watch.add(row) if row["groups"] else []})
    alarms = {row["step"]: health.collapses(row) for row in seen if health.collapses(row)}
    return alarms, choose(seen, sorted(steps))


def series(run: dict, name: str) -> dict[int, float]:
    """A held-out score of a run by the steps that were made before it, from 0 to all."""
    between = {int(step): scores[name] for step, scores in run["by_step"].items()}
    return {0: run["before"][name]["value"], **between, run["steps"]: run["after"][name]["value"]}


def verdict(run: dict) -> dict:
    """What became of a run's held-out mean, and what its choice cost: shares, not points.

    {"moved", "alarm", "below", "regret", "beside last"}; the last two are None of a run that was not scored between.
    """
    mean = series(run, "mean")
    made = {step: value for step, value in mean.items() if step > 0}
    chosen = made[run["chosen"]]
    found = {"moved": mean[run["steps"]] - mean[0], "alarm": bool(run["alarms"]), "below": chosen < mean[0]}
    found |= {"regret": None, "beside last": None}
    if run["by_step"]:
        found |= {"regret": max(made.values()) - chosen, "beside last": chosen - mean[run["steps"]]}
    return found


def row(name: str, runs: Sequence[dict]) -> tuple[str, ...]:
    """A line of the table."""
    found = [verdict(run) for run in runs]
    lost, gained = [v for v in found if v["moved"] < -MOVED], [v for v in found if v["moved"] > MOVED]
    warned = (f"{sum(v['alarm'] for v in part)} of {len(part)}" for part in (lost, gained))
    regrets = [100 * v["regret"] for v in found if v["regret"] is not None]
    beside = average([100 * v["beside last"] for v in found if v["beside last"] is not None])
    cells = (
        ("–", "–", "–") if not regrets else (f"{average(regrets):.1f}", f"{max(regrets):.1f}", f"{beside + 0.0:+.1f}")
    )
    return name, str(len(runs)), *warned, *cells, f"{sum(v['below'] for v in found)} of {len(found)}"


def table(studies: dict[str, Sequence[dict]]) -> str:
    """Lines for studies by name, given their runs, and for all together."""
    head = ("runs of", "runs", "alarm where lost", "alarm where gained")
    head += ("regret of the choice, mean", "worst", "choice less last, mean", "choice below the base")
    whole = [run for runs in studies.values() for run in runs]
    return markdown([head, *(row(f"`{name}`", runs) for name, runs in studies.items()), row("all", whole)])
