"""What is followed during training, every --eval-every steps of train_upt.py.

Benchmarks: greedy accuracy on the same few questions every time (--eval). The run's held-out questions: the scores of
eval/heldout.py, with the questions and the noise of before.json and after.json; with every answer they are kept in
OUT/held-out/step-000024.json, the policy after 24 steps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval import heldout
from eval.benchmark import NAMES, Benchmark, Question, benchmark, folder_of
from eval.run import respond, select
from upt.errors import SettingError, suggest
from upt.files import known_json, write_whole
from upt.run import records
from upt.run.settings import Rollout
from upt.run.team import ALONE, Team

if TYPE_CHECKING:
    from upt.data import Questions
    from upt.model import Policy


class Followed:
    """The first questions of some benchmarks, read once, and the run's held-out questions if it has some.

    `specs` are NAME=FOLDER, or NAME=HUB_ID. Raises SettingError for what is not, or a benchmark that is not there.
    """

    def __init__(self, specs: Sequence[str], limit: int, held_out: "Questions | None" = None, team: Team = ALONE):
        self.held_out, self.team = held_out, team
        self.parts: dict[str, tuple[Benchmark, Path, list[Question]]] = {}
        for spec in specs:
            name, _, source = spec.partition("=")
            if name not in NAMES or not source:
                raise SettingError(
                    f"--eval {spec}: give NAME=FOLDER, NAME being one of {', '.join(NAMES)}{suggest(name, NAMES)}"
                )
            if name in self.parts:
                raise SettingError(f"--eval names {name} twice: give one folder for it")
            bench, folder = benchmark(name), team.in_turn(folder_of, source)
            self.parts[name] = bench, folder, select(bench, folder, limit=limit)[1]

    def __call__(self, policy: "Policy", config: Rollout, tick: Callable[[int], None]) -> dict[str, float]:
        """Accuracy by benchmark. Of `config`, the prompt style, lengths and the seed are used."""
        greedy, found = replace(config, temperature=0.0, group_size=1), {}
        for name, (bench, folder, questions) in self.parts.items():
            rows, left_out = respond(policy, bench, folder, questions, greedy, tick, self.team)
            if not rows:
                raise SettingError(f"--eval {name}: none of its {len(questions)} questions can be asked: {left_out}")
            asked = {question.id: question for question in questions}
            right = [bench.is_right(asked[r["id"]], bench.extract(r["response"], asked[r["id"]])[0]) for r in rows]
            found[name] = sum(right) / len(right)
        return found

    def at(self, step: int, policy: "Policy", config, clock, check: Callable) -> dict[str, dict[str, float]]:
        """What the line of a step in metrics.jsonl says of the policy before the step's update, by what was asked.

        The held-out scores at step 0 are those of before.json.
        """
        found = {}
        if self.parts:
            with clock("benchmarks"):
                found["benchmarks"] = self(policy, config, check)
        if self.held_out is not None and step > 0:
            with clock("held_out"):
                count, samples, folder = config.eval_questions, config.eval_samples, config.out / heldout.FOLDER
                scores = heldout.evaluate(policy, self.held_out, config, count, samples, check, self.team, folder)
                path = folder / f"step-{step:06d}.json"
                self.team.once(write_whole, path, [json.dumps(scores).encode()])
            found["held_out"] = {name: scores[name]["value"] for name in heldout.BY_STEP if name in scores}
        return found

    def curves(self, policy: "Policy", config, clock, check: Callable) -> dict[str, dict[str, float]]:
        """{benchmark: {steps: accuracy}} of a run: what its metrics.jsonl has, and the policy as it is now as `end`."""
        path, seen = config.out / "benchmarks.json", {}
        end = self.team.once(known_json, path)
        if end is None:
            with clock("benchmarks"):
                end = self(policy, config, check)
            self.team.once(write_whole, path, [json.dumps(end).encode()])
        for row in records.steps(config.out):
            if "benchmarks" in row:
                seen[str(row["step"])] = row["benchmarks"]
        seen["end"] = end
        return {name: {step: found[name] for step, found in seen.items()} for name in self.parts}
