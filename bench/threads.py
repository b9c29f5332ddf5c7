"""What waiting threads cost on a shared machine: one update of the embedded model, in quiet and beside a busy process.

Idle OpenMP threads spin before they sleep. In quiet that saves waking them; where another process wants the core, they
take it from it and wait for it in turn. Each setting is measured in a process of its own, since it is read when torch
is loaded: the time of an update (the median of several), with as many threads as there are cores, alone and beside one
process that keeps one core busy.

    python -m bench.threads
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from upt.groups.stats import markdown
from upt.ranges import Count, Name
from upt.run import cli
from upt.run.typed import Typed

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# The first is that of libgomp: neither variable as `import upt` would set it.
SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": ""},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = "while True: pass"


@dataclass
class Config(Typed):
    model: Name = "models/tiny"
    """the embedded model"""
    updates: Count = 7
    """updates to time, after one that is not"""


def measure(config: Config) -> float:
    """Median seconds of an update, here and now."""
    import torch

    import train_upt
    from upt import data, stages
    from upt.model import Policy, update

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = train_upt.Config(model=config.model, device="cpu", steps=1, advantage="mean").resolve()
    policy = Policy.load(settings.model, device="cpu")
    policy.add_lora(settings.lora_rank, settings.lora_alpha, settings.lora_targets, 0)
    optimizer, schedule = update.optimizer_of(policy, settings)
    batch = stages.sampling.step_batch(policy, data.load("shapes"), 0, settings)
    sampled = stages.sampling.sample_groups(policy, batch.prompts, 0, settings)
    groups = [
        {
            "responses": [
                {"token_ids": s.ids, "logprobs": s.logprobs, "finish": s.finish, "advantage": (-1.0) ** i}
                for i, s in enumerate(group)
            ]
        }
        for group in sampled
    ]
    seconds = []
    for _ in range(config.updates + 1):
        start = perf_counter()
        update.update(policy, optimizer, schedule, batch.prompts, groups, settings, measure_kl=False)
        seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:])


def timed(config: Config, environment: dict[str, str], beside: bool) -> float:
    """The same in a process with other variables, alone or beside a busy one."""
    variables = {name: value for name, value in os.environ.items() if name not in (*NAMES, "OMP_NUM_THREADS")}
    variables |= environment
    if environment.get("GOMP_SPINCOUNT") == "":  # none at all, and `upt` is to set none
        variables["OMP_WAIT_POLICY"] = ""
        del variables["GOMP_SPINCOUNT"]
    code = f"from bench.threads import Config, measure; print(measure(Config({config.model!r}, {config.updates})))"
    busy = subprocess.Popen([sys.executable, "-c", BUSY]) if beside else None
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=variables, capture_output=True, text=True
        )
    finally:
        if busy:
            busy.kill()
            busy.wait()
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def main(config: Config) -> dict[str, dict[str, float]]:
    """Measure every setting; prints a table and returns its seconds."""
    found = {}
    for name, environment in SETTINGS.items():
        found[name] = {when: timed(config, environment, when == "beside") for when in ("quiet", "beside")}
        print(f"{name}: {found[name]['quiet']:.2f} s, {found[name]['beside']:.2f} s", file=sys.stderr)
    rows = [[name, f"{of['quiet']:.2f} s", f"{of['beside']:.2f} s"] for name, of in found.items()]
    print(markdown([["waiting threads", "in quiet", "beside a busy process"], *rows]))
    return found


if __name__ == "__main__":
    cli.launch(main, Config)
