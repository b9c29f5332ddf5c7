"""The groups of a step of training, sampled now or read from shards, and which process updates on them."""

from pathlib import Path

from upt import answers
from upt.groups import shards
from upt.model import update
from upt.run.team import Team
from upt.stages.sampling import Step, prompts_of, sample_step


def sampled_before(out: Path, steps: range) -> list[int]:
    """Those of some steps, counted from 1, whose shards a stopped run left in its folder."""
    return [step + 1 for step in steps if shards.shard_path(out / "rollouts", step).exists()]


def sampled(policy, questions, step: int, config, clock, check, team: Team) -> Step:
    """The groups of a step. A shard that a stopped run left is used as it is."""
    folder = config.out / "rollouts"
    path = shards.shard_path(folder, step)
    known = team.once(shards.read_complete, path)
    found = sample_step(policy, questions, step, config, folder, team, known, check, clock)
    if found.groups and found.groups != known:
        with clock("rollout"):
            team.once(shards.write_shard, path, found.groups)
    return found


def stored(policy, path: Path, config, clock, team: Team) -> Step:
    """The groups of a shard that the stages wrote."""
    with clock("data"):
        groups = shards.read_shard(path)
        homes = [i % team.size for i in range(len(groups))]
        own = [group for group, home in zip(groups, homes, strict=True) if home == team.rank]
        prompts = prompts_of(policy, own, config.from_shards, config)
    return Step(groups, {}, homes, {prompt.uid: prompt for prompt in prompts})


def placed(policy, found: Step, groups: list[dict], folder: Path, config, team: Team) -> list:
    """A prompt for each group that this process updates on, None for those of others: their tokens are shared evenly.

    A group that was sampled elsewhere is encoded again.
    """
    owners = update.owners(groups, found.homes, config, team)
    own = [group for group, owner in zip(groups, owners, strict=True) if owner == team.rank]
    moved = [group for group in own if group["uid"] not in found.prompts]
    prompts = found.prompts | {p.uid: p for p in prompts_of(policy, moved, folder, config)}
    return [prompts[g["uid"]] if owner == team.rank else None for g, owner in zip(groups, owners, strict=True)]


def targets(groups: list[dict], style: str) -> list[dict]:
    """The groups with, as advantage, each response's weight in cross-entropy: its reward, 0 if it is ill-formed."""

    def target(response: dict) -> float:
        return max(0.0, response["reward"]) if answers.keeps_format(response["text"], style) else 0.0

    return [group | {"responses": [r | {"advantage": target(r)} for r in group["responses"]]} for group in groups]
