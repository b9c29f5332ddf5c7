"""Where the time of a step goes on a CPU: shares of a rollout and of an update by kind of operation.

    OMP_NUM_THREADS=1 python -m bench.profile

One step of the loop on the embedded model, as in bench/loop.py, under PyTorch's profiler: time spent in operations
themselves, not in Python between them.
"""

import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile

from bench import loop
from bench.sides import Ours
from upt.model import update
from upt.run import cli
from upt.stages import steps

KINDS = {  # the first whose word is in an operation's name
    "attention": ("scaled_dot_product", "bmm"),
    "linear layers": ("aten::mm", "addmm"),
    "noise": ("bitwise", "shift", "argmax"),
}


def shares(found: profile) -> dict[str, float]:
    """Share of the time by kind of operation, and what is left of them as `other`."""
    total: Counter = Counter()
    for event in found.key_averages():
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        total[kind] += event.self_cpu_time_total
    return {kind: total[kind] / sum(total.values()) for kind in (*KINDS, "other")}


def main(config: loop.Config) -> dict[str, dict[str, float]]:
    """Print the shares of both halves of a step and return them."""
    result = {}

    def profiled(part: str, function):
        def call(*args, **settings):
            with profile(activities=[ProfilerActivity.CPU]) as found:
                answer = function(*args, **settings)
            result[part] = shares(found)
            return answer

        return call

    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, Path(folder) / "run")
        for number in range(config.warmup):
            ours.step(number)
        with (
            patch.object(steps, "sampled", profiled("rollout", steps.sampled)),
            patch.object(update, "update", profiled("update", update.update)),
        ):
            ours.step(config.warmup)
    for part, found in result.items():
        print(f"{part:8}", ", ".join(f"{kind} {share:.0%}" for kind, share in found.items()))
    return result


if __name__ == "__main__":
    cli.launch(main, loop.Config)
