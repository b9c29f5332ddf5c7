"""Stage 1: sample G responses to each question and write them as shards of groups.

For each step:
    1. take the step's questions, in an order fixed by the seed
    2. encode them, each image once; prompts over the limit are dropped and counted
    3. batch by a token budget, longest prompts first
    4. prefill each prompt once, hand its KV cache to its G responses
    5. sample token by token, with the token's log-probability; finished responses leave the batch
    6. write one shard of groups

The steps are functions of upt/stages/sampling.py, the loop in 4 and 5 is upt/model/decoding.py. Its noise depends on
seed, round, step, uid, index and token position only, so a response does not change with the batch it was sampled in.
Where a step's shard exists already, it is kept: the same command again goes on.

    python rollout.py --data shapes --model models/tiny --steps 4 --out runs/rollouts
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

from upt import data, model, stages
from upt.data import views
from upt.groups import manifests, shards
from upt.run import cli, progress
from upt.run.locking import alone
from upt.run.resuming import check_data, keep_data
from upt.run.settings import Rollout
from upt.run.stopping import stop_on_signal
from upt.run.team import Team, assemble

FREE = ("out", "steps", "device", "gpus", "any_base")  # settings that may change when sampling goes on


@dataclass
class Config(Rollout):
    """Settings left at None take the preset's value, else the default for the model (see upt/run/presets.py)."""


@alone
def main(config: Config) -> None:
    """Sample the steps whose shards are not there yet."""
    config = replace(config).resolve()
    team = assemble(config.device)
    questions = team.in_turn(data.load, config.data, config.split, config.seed, config.limit)
    folder = config.out
    model.model_config(config.model)  # raises PolicyError for a model that is not there
    manifests.check(folder, "rollout", asdict(config), ignore=FREE)
    taken = {"data": team.once(data.fingerprint.of_questions, questions)}
    check_data(folder, taken)
    much = f"{config.steps} steps of {min(config.questions_per_step, len(questions))} x {config.group_size} responses"
    print(f"sampling {config.model} on {questions.describe()}: {much}, into {folder}", file=sys.stderr)
    if questions.weights:
        print(data.shares(questions, config.questions_per_step), file=sys.stderr)
    if config.view and (without := views.without_view(questions, config.view)):
        print(without, file=sys.stderr)
    model.check_room(config, ["rollout"])
    policy = team.here(partial(model.Policy.load, config.model, **config.loading()))
    identity = {"seed": config.seed, "model": config.model, "adapter": config.adapter}

    def claim() -> None:
        manifests.write(folder, stage="rollout", config=asdict(config), data=keep_data(folder, taken), **identity)

    team.once(claim)
    paths = [shards.shard_path(folder, step) for step in range(config.steps)]
    there = team.once(lambda: [shards.is_complete(path) for path in paths])
    with stop_on_signal(folder) as check:
        for step, complete in enumerate(there):
            if not complete:
                team.together(check)
                sample(policy, questions, step, config, check, team)
    print(f"{len(shards.ShardReader(folder).paths)} shards of groups in {folder}")


def sample(policy, questions, step: int, config: Config, check, team: Team) -> None:
    """Write the shard of one step. `check` may raise, to stop."""
    count = min(config.questions_per_step, len(questions))
    with progress.bar(total=count * config.group_size, desc=f"step {step}", unit="response") as bar:

        def tick(responses: int) -> None:
            progress.advance(bar, responses, team)
            check()

        found = stages.sampling.sample_step(policy, questions, step, config, config.out, team, tick=tick)
    for uid, reason in found.left_out.items():
        print(f"left out {uid}: {reason}", file=sys.stderr)
    if found.groups:
        team.once(shards.write_shard, shards.shard_path(config.out, step), found.groups)
    else:
        print(f"step {step} is left out: none of its questions can be used", file=sys.stderr)


if __name__ == "__main__":
    cli.launch(main, Config)
