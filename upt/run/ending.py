"""How a run ends: with which adapter, or not at all, since its updates are not finite any more."""

import sys
from typing import TYPE_CHECKING

from upt.errors import Diverged
from upt.run import checkpoints, health
from upt.run.team import ALONE, Team

if TYPE_CHECKING:
    from upt.model import Policy


def check_finite(policy: "Policy", config, rows: list[dict]) -> None:
    """Raise Diverged if the last updates were not finite, NONFINITE or more in a row, with what to go on from.

    `config` is a train_upt.Config, `rows` are the lines of metrics.jsonl.
    """
    if not health.has_diverged(rows):
        return
    found = checkpoints.checkpoints(config.out / "checkpoints")
    healthy = [path for path in found if checkpoints.step_of(path) < health.unhealthy_from(rows)]
    further = f"go on from its last healthy checkpoint, --init-adapter {healthy[-1]}/adapter" if healthy else ""
    wider = "" if policy.base.dtype.itemsize > 2 else f" or --dtype fp32 (now {config.dtype})"
    raise Diverged(
        f"the run in {config.out} has stopped at step {rows[-1]['step'] + 1} of {config.steps}: the last "
        f"{health.nonfinite_in_a_row(rows)} updates had a loss or gradient that is not finite, and were not made; "
        f"{further or 'start again'}, with a lower --learning-rate (now {config.learning_rate}){wider}, into "
        "another --out"
    )


def finish(policy: "Policy", config, rows: list[dict], team: Team = ALONE) -> dict:
    """Write the adapter that the run ends with and put it on the policy; which one it is and the run's alarms."""
    alarms = {row["step"]: row["alarms"] for row in rows if row["alarms"]}
    found = team.once(checkpoints.checkpoints, config.out / "checkpoints")
    folders = {checkpoints.step_of(path): path for path in found}
    folders = {step: path for step, path in folders.items() if config.saves(step)}
    chosen = made = rows[-1]["step"] + 1 if rows else 0
    if config.select == "label-free" and folders:
        chosen = health.best_checkpoint(rows, sorted(folders))
    elif config.stop_on_collapse and any(map(health.collapses, rows)):
        first = next(row["step"] for row in rows if health.collapses(row))
        healthy = [step for step in folders if step < first]
        chosen = max(healthy, default=made)
        if not healthy:
            print("no checkpoint is from before the alarm, so the last one stays; lower --save-every", file=sys.stderr)
    if chosen != made:
        policy.load_adapter(folders[chosen] / "adapter")
    if config.select == "label-free" or chosen != made:
        print(f"ends with the adapter after {chosen} of {made} steps")
    if rows and not any(row["groups"] and row.get("grad_norm") != 0 for row in rows):
        print("no step made an update: the adapter is as it was at the start", file=sys.stderr)
    team.once(policy.save, config.out / "adapter")
    return {"steps": made, "adapter_step": chosen, "alarms": alarms}
