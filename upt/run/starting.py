"""How a run starts: from which model, and what it says of itself before its first step.

`config` is a train_upt.Config throughout.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upt import model
from upt.run.team import Team

if TYPE_CHECKING:
    from upt.model import Policy


def plan(config, questions) -> str:
    """One line on what the run will do."""
    source = f"the shards of {config.from_shards}" if questions is None else questions.describe()
    count = config.questions_per_step if questions is None else min(config.questions_per_step, len(questions))
    much = f"{config.steps} steps of {count} questions x {config.group_size} responses"
    rounds = f"{config.rounds} rounds of " if config.rounds else ""
    how = (
        f"reward {config.reward}, advantage {config.advantage}"
        if config.algorithm == "grpo"
        else f"cross-entropy weighted by the reward {config.reward}"
    )
    start = config.init_adapter or config.adapter
    what = config.model + (f" with {start}" if start else "")
    return f"training {what} on {source}: {how}, {rounds}{much}{means(config.quantize, config.gpus)}, into {config.out}"


def means(quantize: str | None, gpus: int | None) -> str:
    """ ", with 4-bit weights, on 2 processes": how a run is made, as far as it is not in the usual way."""
    weights = ", with 4-bit weights" if quantize == "nf4" else ""
    return weights + (f", on {gpus} processes" if gpus and gpus > 1 else "")


def starting_policy(config, judges: bool, team: Team) -> "Policy":
    """The model that the run starts from: --adapter is merged into it, in OUT/start, --init-adapter put on it.

    `judges`: the run needs room for judging, too.
    """
    samples = config.from_shards is None or config.eval_questions or config.eval
    model.check_room(config, ["update", *["rollout"] * bool(samples), *["judging"] * judges])
    options, name, start = config.loading("adapter"), config.model, config.out / "start"
    if config.adapter:
        team.once(make_start, config, start)
        name = str(start)
    options |= {"feature_cache_gib": config.feature_cache_gib}
    options |= {"gradient_checkpointing": config.gradient_checkpointing}
    policy = team.here(partial(model.Policy.load, name, **options))
    if config.init_adapter:
        policy.load_adapter(config.init_adapter, config.any_base)
    return policy


def make_start(config, start: Path) -> None:
    """Write the model with --adapter merged into it, unless it is there."""
    if not (config.out / "manifest.json").exists():  # left by a command that never came to be a run
        shutil.rmtree(start, ignore_errors=True)
    if not start.exists():
        draft, options = config.out / ".start.partial", config.loading()
        if config.quantize:  # rounded once, to 4 bits; the full weights need not fit on the device
            options |= {"quantize": None, "dtype": "fp32", "device": "cpu"}
        model.Policy.load(config.model, **options).export(draft)
        draft.rename(start)
