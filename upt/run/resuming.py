"""The settings of a run: checked against the run that is in its folder, written down, and taken up again.

`config` is a train_upt.Config throughout.
"""

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from upt.errors import SettingError, ShardError
from upt.groups import manifests, shards, variants
from upt.run import presets
from upt.run.settings import Rollout

STORED = "stored"  # the rewards and advantages that the shards carry
# Settings that may change when a run goes on. The token budgets change the last bits of what follows.
FREE = ("out", "device", "resume", "keep", "save_every", "gradient_checkpointing", "feature_cache_gib")
FREE += ("rollout_tokens", "judge_tokens", "update_tokens", "rounds", "any_base")


def prepare(config):
    """The settings of a run in full, checked against the run that is in its folder, if there is one."""
    config = replace(config)
    if config.resume:
        if not (config.out / "manifest.json").is_file():
            raise SettingError(f"--resume: there is no run in {config.out}; start one by leaving --resume out")
        config = resumed(config)
    elif config.from_shards:
        adopt(config)
    recipe = {
        name: value for name, value in presets.PRESETS.get(config.preset, {}).items() if getattr(config, name) is None
    }
    config.resolve()
    if recipe := [f"{name} {value}" for name, value in recipe.items() if getattr(config, name) == value]:
        print(f"preset {config.preset}: {', '.join(recipe)}")
    check_steps(config)
    check_settings(config)
    return config


def check_settings(config) -> None:
    """Raise ShardError if the folder holds a run of other settings; of one that made no step, with what to do."""
    out = config.out
    begun = [
        *(out / "rollouts").glob("step-*"),
        *shards.list_shards(out),
        *out.glob("checkpoints"),
        *out.glob("round-01"),
    ]
    try:
        manifests.check(out, jsonable(config), ignore=FREE)
    except ShardError as error:
        if begun or manifests.read(out)["stage"] != "train":
            raise
        raise ShardError(f"{error}; that run has not made a step, so its folder can be removed: rm -r {out}") from error


def check_steps(config) -> None:
    """Raise SettingError if the number of steps alone is another than that of the run in the folder."""
    if not (config.out / "manifest.json").is_file():
        return
    differ = manifests.differences(manifests.read(config.out)["config"], jsonable(config), FREE)
    if [*differ] == ["steps"]:
        refuse_steps(config, *differ["steps"])


def refuse_steps(config, made: int, asked: int) -> None:
    """Raise SettingError for another number of steps than that of the run in the folder, with how to train further."""
    if asked < made:
        fix = "leave --steps out, or use another --out"
        raise SettingError(f"{config.out} holds a run of {made} steps, not {asked}: {fix}")
    state, first = "a run that was planned", f"let it end, --steps {made}; "
    if (config.out / "summary.json").is_file():
        state, first = "a finished run", ""
    steps, further = asked - made, f"--init-adapter {config.out / 'adapter'}"
    if config.adapter:
        further += f" --model {config.out / 'start'}"  # which it was merged into
    raise SettingError(
        f"{config.out} holds {state} with {made} steps, over which its learning rate falls, and --steps says "
        f"{asked}; {first}to train its adapter further: {further} --steps {steps} --out ANOTHER "
        f"(make train STEPS={steps} OUT=ANOTHER ARGS='{further}')"
    )


def resumed(config):
    """The settings of the run in config.out; of those in FREE, the ones given now. Others given now are refused."""
    manifest, default = manifests.read(config.out)["config"], type(config)()
    own = {field.name for field in fields(config)} - {"out", "resume"}
    known = {name: _typed(name, value) for name, value in manifest.items() if name in own}
    given = {name for name in known if getattr(config, name) != getattr(default, name)}
    if other := [name for name in sorted(given - {*FREE}) if getattr(config, name) != known[name]]:
        if other == ["steps"]:
            refuse_steps(config, known["steps"], config.steps)
        raise SettingError(
            f"--resume takes {other[0]}={known[other[0]]!r} from the run in {config.out}, not "
            f"{getattr(config, other[0])!r}; leave --{other[0].replace('_', '-')} out, or use another --out"
        )
    return replace(config, **{name: value for name, value in known.items() if name not in given & {*FREE}})


def claim(config) -> None:
    """Write the manifests of a new run: of its folder, and of its rollouts, so that they are a stage's output too."""
    settings = jsonable(config)
    identity = {"seed": config.seed, "model": config.model, "adapter": config.adapter}
    if not (config.out / "manifest.json").exists():
        if not config.from_shards and not config.rounds:
            sampling = {field.name: settings[field.name] for field in fields(Rollout)}
            manifests.write(config.out / "rollouts", stage="rollout", config=sampling, **identity)
        manifests.write(config.out, stage="train", config=settings, **identity)


def adopt(config) -> None:
    """Take from the shards' manifest how they were sampled; use their own advantages unless others are asked for."""
    config.from_shards = shards.stage_folder(config.from_shards)
    count = len(shards.ShardReader(config.from_shards).paths)  # raises ShardError where there are none
    manifest = manifests.read(config.from_shards)
    rollouts = manifests.sampled_by(manifest)
    sampling = rollouts.get("config")
    if not sampling or "model" not in sampling:
        raise SettingError(
            f"the manifest of {config.from_shards} does not say how the shards were sampled; score them again"
        )
    if sampling.get("split") == config.eval_split and config.eval_questions != 0:
        print(
            f"{config.from_shards} was sampled from the split {config.eval_split}, which is evaluated too: the scores "
            "after training are not held-out ones; sample another split, or give another --eval-split",
            file=sys.stderr,
        )
    for field in fields(Rollout):
        if field.name in sampling and getattr(config, field.name) is None:
            setattr(config, field.name, sampling[field.name])
    manifests.check_files(config.from_shards, rollouts, {"model": config.model, "adapter": config.adapter})
    if config.steps is None or config.steps > count:
        print(f"{config.from_shards} holds {count} shards: {count} steps")
        config.steps = count
    if manifest["stage"] == "rewards" and config.reward is None:
        config.reward = STORED if config.advantage is None else manifest["config"]["reward"]
        if config.advantage is not None:
            for name in ("min_share", "max_share"):
                if name not in variants.band(config):
                    setattr(config, name, manifest["config"].get(name, getattr(config, name)))


def jsonable(config) -> dict:
    """The settings as they are stored in JSON, with digests of the files that decide on what comes of them."""
    return json.loads(json.dumps(asdict(config), default=str)) | config.files()


def _typed(name: str, value):
    """A stored setting as the Config holds it."""
    if name in ("from_shards", "out") and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
