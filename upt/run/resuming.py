"""The settings of a run and its data: checked against the run that is in its folder, written down, and taken up again.

`config` is a train_upt.Config throughout.
"""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from upt import data
from upt.errors import DataError, SettingError, ShardError
from upt.files import read_json, write_whole
from upt.groups import manifests, shards, variants
from upt.run import presets
from upt.run.machine import machine
from upt.run.settings import Rollout
from upt.run.typed import flag

if TYPE_CHECKING:
    import torch

STORED = "stored"  # the rewards and advantages that the shards carry
# Settings that may change when a run goes on. The token budgets change the last bits of what follows.
FREE = ("out", "device", "resume", "keep", "save_every", "gradient_checkpointing", "feature_cache_gib")
FREE += ("gpus", "slots", "judge_tokens", "update_tokens", "rounds", "any_base", "track", "track_groups_every")


def prepare(config):
    """The settings of a run in full, checked against the run that is in its folder, if there is one."""
    config = replace(config)
    manifests.check_stage(config.out, "train")
    if config.resume:
        if not (config.out / "manifest.json").is_file():
            raise SettingError(f"--resume: there is no run in {config.out}; start one by leaving --resume out")
        config = resumed(config)
    elif config.from_shards:
        adopt(config)
    manifests.check_own(config.out, "train")
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
    """Raise ShardError if the folder holds a run of other settings; of one that made no step, with what to do.

    Likewise if it holds no run, but rollouts, which the run would take for its own.
    """
    out = config.out
    begun = [
        *(out / "rollouts").glob("step-*"),
        *shards.list_shards(out),
        *out.glob("checkpoints"),
        *out.glob("round-01"),
    ]
    try:
        manifests.check(out, "train", jsonable(config), ignore=FREE)
    except ShardError as error:
        if begun:
            raise
        raise ShardError(f"{error}; that run has not made a step, so its folder can be removed: rm -r {out}") from error
    if not (out / "manifest.json").exists() and not config.from_shards and shards.list_shards(out / "rollouts"):
        raise ShardError(
            f"{out / 'rollouts'} holds shards that another command sampled, and a run samples its own there; give "
            "another --out, or train on those shards: --from-shards"
        )


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
    raise SettingError(
        f"{config.out} holds {state} with {made} steps, over which its learning rate falls, and --steps says {asked}; "
        f"{first}to train its adapter further, on other questions: {further(config, asked - made)}"
    )


def further(config, steps: int) -> str:
    """The command that trains the adapter of a finished run for so many more steps, with the run's other settings.

    The next seed has another order of the questions, or other ones: the same would ask the first ones again.
    """
    known, out = manifests.read(config.out)["config"], config.out
    shown = [field.name for field in fields(config) if field.name in known and not field.metadata.get("hidden")]
    own = {name: _typed(name, known[name]) for name in shown if name not in ("init_adapter", "steps", "out")}
    usual = type(config)(**{name: own[name] for name in ("model", "data", "preset")})
    presets.fill(usual)
    usual = replace(usual, model=None, data=None, preset=None)  # so that these are named
    if own.pop("adapter"):
        own["model"] = str(out / "start")  # which that was merged into
    own |= {
        "init_adapter": str(out / "adapter"),
        "seed": own["seed"] + 1,
        "steps": steps,
        "out": out.with_name(f"{out.name}-further"),
    }
    words = ["python", "train_upt.py"]
    for name, value in own.items():
        if isinstance(value, bool) and value != getattr(usual, name):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None and value != getattr(usual, name):
            words += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def resumed(config):
    """The settings of the run in config.out; of those in FREE, the ones given now. Others given now are refused."""
    manifest, default = manifests.read(config.out)["config"], type(config)()
    own = {field.name for field in fields(config)} - {"out", "resume", "gpus"}  # of which there are as many as now
    known = {name: _typed(name, value) for name, value in manifest.items() if name in own}
    if known.get("quantize") is None and config.quantize == "none":  # which a run without 4 bits has not written down
        config = replace(config, quantize=None)
    given = {name for name in known if getattr(config, name) != getattr(default, name)}
    if other := [name for name in sorted(given - {*FREE}) if getattr(config, name) != known[name]]:
        if other == ["steps"]:
            refuse_steps(config, known["steps"], config.steps)
        raise SettingError(
            f"--resume takes {other[0]}={known[other[0]]!r} from the run in {config.out}, not "
            f"{getattr(config, other[0])!r}; leave --{other[0].replace('_', '-')} out, or use another --out"
        )
    for role in ("reward", "advantage"):
        if role not in given:
            refuse_code(role, known.get(role), config.out)
    return replace(config, **{name: value for name, value in known.items() if name not in given & {*FREE}})


def refuse_code(role: str, spec: str | None, folder: Path) -> None:
    """Raise SettingError for a variant that a folder's manifest names and that is code in a file, whoever wrote it."""
    if spec and variants.is_from_file(spec):
        raise SettingError(
            f"{folder}: its {role} is code in a file, {spec}, which is executed only where it is asked for: repeat it, "
            f"--{role} {spec!r}"
        )


def claim(config, taken: dict[str, dict], device: "torch.device | None" = None) -> None:
    """Write the manifests of a new run: of its folder, and of its rollouts, so that they are a stage's output too.

    `taken` are the fingerprints of its data; on `device` it begins.
    """
    settings = jsonable(config)
    identity = {"seed": config.seed, "model": config.model, "adapter": config.adapter}
    if not (config.out / "manifest.json").exists():
        if not config.from_shards and not config.rounds:
            sampling = {field.name: settings[field.name] for field in fields(Rollout)}
            manifests.write(config.out / "rollouts", stage="rollout", config=sampling, **identity)
        identity |= {"data": keep_data(config.out, taken), "machine": machine(device) if device else None}
        manifests.write(config.out, stage="train", config=settings, **identity)


def keep_data(folder: Path, taken: dict[str, dict]) -> dict[str, dict]:
    """Write the digests of all rows to folder/fingerprint.json; the rest, for the manifest."""
    write_whole(folder / "fingerprint.json", [json.dumps(taken).encode()])
    return {part: {name: of[name] for name in ("count", "columns")} for part, of in taken.items()}


def fingerprints(questions, held_out, config, supervised: bool) -> dict[str, dict]:
    """Those of the data that a run works on; `supervised`: its training reads answers.

    Raises DataError if they are not those of the run in its folder.
    """
    taken, graded = {}, ["shards", "held-out data"]
    if questions is not None:
        taken["training data"] = data.fingerprint.of_questions(questions)
        graded += ["training data"] * supervised
    else:
        taken["shards"] = data.fingerprint.of_files(shards.list_shards(config.from_shards)[: config.steps])
    if held_out is not None:
        taken["held-out data"] = data.fingerprint.of_questions(held_out)
    check_data(config.out, taken, graded)
    return taken


def check_data(folder: Path, taken: dict[str, dict], reads_answers: Iterable[str] = ()) -> None:
    """Raise DataError if data is not what the folder's manifest says, with what has changed.

    `taken` are fingerprints by what the data is for. Other answers are only said, but in the parts of `reads_answers`.
    """
    manifest = manifests.read(folder) if (folder / "manifest.json").is_file() else None
    if manifest is None:
        return
    if not manifest.get("data"):
        print(f"{folder} keeps no fingerprint of its data: whether that has changed is not checked", file=sys.stderr)
        return
    rows = read_json(folder / "fingerprint.json") if (folder / "fingerprint.json").is_file() else {}
    for part, now in taken.items():
        then = rows.get(part, {}) | manifest["data"].get(part, {})
        what = data.fingerprint.difference(then, now)
        if what is None and not data.fingerprint.same_answers(then, now):
            what = "the answers differ"
            if part not in reads_answers:
                print(f"{part}: {what} from when {folder} was begun; training does not read them", file=sys.stderr)
                continue
        if what:
            fix = "bring that data back, or use another --out"
            raise DataError(f"{folder} was begun with other {part}: {what}; {fix}")


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
    view = sampling.get("view")
    if config.view not in (None, view):
        seen = f"with --view {view}" if view else "without a view"
        raise SettingError(
            f"--view {config.view}: the responses in {config.from_shards} were sampled {seen}; leave it out"
        )
    for field in fields(Rollout):
        if field.name in sampling and getattr(config, field.name) is None:
            setattr(config, field.name, sampling[field.name])
    manifests.check_files(config.from_shards, rollouts, {"model": config.model, "adapter": config.adapter})
    if config.steps is None or config.steps > count:
        print(f"{config.from_shards} holds {count} shards: {count} steps")
        config.steps = count
    if manifest["stage"] == "rewards" and config.reward is None:
        config.reward = STORED
        if config.advantage is not None:
            config.reward = manifest["config"]["reward"]
            refuse_code("reward", config.reward, config.from_shards)
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
