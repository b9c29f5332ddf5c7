"""Stage 2: a frozen judge scores every response. It is the model as it was before training, adapter off.

For each group:
    1. a response that breaks the required format scores 0 and is not judged
    2. the others share one judge prompt up to the candidate, image included, which is prefilled once
    3. text mode: k written judgements are sampled, each read for three grades in [0, 1]:
           score = .5 answer + .3 reasoning + .2 grounding, averaged over the judgements that can be read
       logit mode: no judgement is written; after a fixed prefix the next token's distribution p over the digits gives
           score = sum_d p(d) d / 9, so that judging costs one prefill
    4. a judgement that cannot be read is counted and stored as a null score; what it is worth is the reward's choice

After arXiv 2603.21289 §3.2, whose judge writes. The logit mode is ours, and so are the prompts (prompts/judge.md). The
judge sees the image, the question and the candidate, never `gold`.

    python judge.py --rollouts runs/rollouts --out runs/judged                      # by the model that sampled them
    python rewards.py --rollouts runs/judged --reward judged --out runs/scored
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import rollout
from upt import model, prompts, stages
from upt.errors import SettingError
from upt.groups import manifests, shards
from upt.ranges import Name, Seed
from upt.run import cli, presets, progress
from upt.run.locking import alone
from upt.run.settings import Judge, Model
from upt.run.stopping import stop_on_signal
from upt.run.team import assemble
from upt.run.typed import Typed

FREE = (
    "rollouts",
    "out",
    "device",
    "gpus",
    "judge_tokens",
    "any_base",
)  # settings that may change when judging goes on


@dataclass
class Config(Judge, Model, Typed):
    """Flags of the stage. The settings of the judge's model are those of the rollouts where they are left at None."""

    rollouts: Path = Path("runs/rollouts")
    """folder of rollout shards"""
    out: Path = Path("runs/judged")
    """folder for the judged shards; another one than --rollouts"""
    model: Name | None = None
    """snapshot folder or hub id; None: the model that sampled the rollouts"""
    adapter: Name | None = None
    """PEFT adapter of the judge; None: the one that the sampling started from, if --model is left out too"""
    seed: Seed | None = None
    """noise of written judgements"""
    prompt: Name | None = None
    """prompt style whose format the responses must keep: think-boxed, or any other for a box alone"""


def resolve(config: Config) -> tuple[Config, dict]:
    """The settings in full, what was left open taken from the rollouts' manifest, and where the shards come from."""
    config = replace(config)
    config.rollouts = shards.stage_folder(config.rollouts)
    if config.out.resolve() == config.rollouts.resolve():
        raise SettingError(f"--out is --rollouts ({config.out}); judged shards need a folder of their own")
    shards.ShardReader(config.rollouts)  # raises ShardError where there are none
    manifest = manifests.read(config.rollouts)
    rollouts = manifests.sampled_by(manifest)
    sampling = rollouts.get("config") or {}
    names = ("model", "adapter", "seed", "prompt", "min_pixels", "max_pixels", "quantize")
    for name in names if config.model is None else names[2:]:
        if getattr(config, name) is None:
            setattr(config, name, sampling.get(name))
    if config.model is None:
        raise SettingError(f"the manifest of {config.rollouts} names no model: say which one is to judge, --model M")
    manifests.check_files(config.rollouts, rollouts, {"model": config.model, "adapter": config.adapter})
    presets.fill(config)
    config.check()
    config.check_judge()
    config.check_loading()
    return config, manifests.origin(manifest, rollout.FREE)


def sampled_with(rollouts: Path) -> dict[str, int]:
    """How many responses a question has, and how long question and response may be, as far as the manifest says."""
    sampling = manifests.sampled_by(manifests.read(rollouts)).get("config") or {}
    names = ("questions_per_step", "group_size", "max_prompt_tokens", "max_new_tokens")
    return {name: sampling[name] for name in names if isinstance(sampling.get(name), int)}


@alone
def main(config: Config) -> dict[str, float]:
    """Judge a folder of shards into another; returns the summary that it prints."""
    config, origin = resolve(config)
    team = assemble(config.device)
    paths = shards.ShardReader(config.rollouts).paths
    settings = json.loads(json.dumps(asdict(config), default=str))
    settings |= {"judge_prompt_file": prompts.judge_digest(config.judge_prompt), "rollouts_manifest": origin}
    fresh = manifests.check(config.out, "judge", settings, ignore=FREE) is None
    how = f"{config.judge_mode} mode, prompt {config.judge_prompt}"
    print(
        f"judging {len(paths)} shards of {config.rollouts} by {config.model}: {how}, into {config.out}", file=sys.stderr
    )
    model.check_room(config, ["judging"], **sampled_with(config.rollouts))
    policy = team.here(partial(model.Policy.load, config.model, **config.loading()))

    def claim() -> None:
        if fresh:
            identity = {"model": config.model, "adapter": config.adapter}
            manifests.write(config.out, stage="judge", config=settings, seed=config.seed, **identity)
        shards.link_images(config.rollouts, config.out)

    team.once(claim)
    scores, unparsed, pictures = [], 0, []
    with stop_on_signal(config.out) as check:

        def judge(groups: list[dict]) -> list[dict]:
            seen = stages.judging.pictured(policy, groups, config.rollouts)
            return stages.judging.judge(policy, seen, groups, config, config.prompt, config.seed, check)

        for path in progress.bar(paths, desc="judging", unit="shard"):
            team.together(check)
            target = config.out / path.name
            if not team.once(shards.is_complete, target, path):
                groups = shards.read_shard(path)
                costs, homes = map(model.update.tokens_of, groups), [i % team.size for i in range(len(groups))]
                judged = team.spread(judge, groups, team.even([*costs], homes))
                team.once(shards.write_shard, target, judged)
            done = shards.read_shard(target)
            pictures += [group["image"] is not None for group in done]
            verdicts = [response["judge"] for group in done for response in group["responses"]]
            scores += [verdict["score"] for verdict in verdicts if verdict["score"] is not None]
            unparsed += sum(not verdict["parsed"] for verdict in verdicts)
    mean = math.fsum(scores) / len(scores) if scores else None
    shown = "none" if mean is None else f"{mean:.3f}"
    of = f"{len(scores) + unparsed} responses to {len(pictures)} questions judged, {sum(pictures)} with a picture"
    print(f"{config.out}: {of}; mean score {shown}, {unparsed} unparsed")
    return {"responses": len(scores) + unparsed, "score_mean": mean, "unparsed": unparsed}


if __name__ == "__main__":
    cli.launch(main, Config)
