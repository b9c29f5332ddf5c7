"""The manifest of a stage's folder: schema, stage, config, seed, versions, git commit, model and adapter fingerprint.

What a stage makes has one origin: a folder goes on with the settings that its manifest holds, or is refused.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime
from importlib import metadata
from itertools import count
from pathlib import Path

from upt.errors import ShardError, suggest_path
from upt.files import write_whole
from upt.groups.shards import SCHEMA, list_shards

PACKAGES = ("torch", "transformers", "peft", "triton", "datasets", "numpy")
MODEL_FILES = (".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".pt", ".pth")
MIB = 1 << 20
FOREIGN = {"_file": "file", "_code": "function"}  # ends of settings that are digests of what others wrote
BEGUN = {  # what a stage leaves in a folder before its manifest, or where it writes none
    "train": ("fingerprint.json", "before.json", "start/base.json"),
    "rollout": ("fingerprint.json",),
    "synthesize": ("fingerprint.json",),
    "eval": ("*/responses.jsonl",),
    "ablate": ("*/seed-*", "table.md", "variants.md"),
    "warmup": ("warmup.json", ".warmup.json"),
}
LOGS = ("log.txt", "*.log", "*.out", "*.err")  # which may be in a folder before anything is begun there
SHOWN = 3  # of the files in a folder that is somebody else's


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None  # code copied to a machine without git: the manifest says null
    return done.stdout.strip() if done.returncode == 0 else None


def fingerprint(path_or_id: Path | str) -> str:
    """A model's or adapter's identity: "sha256:<hex>" of a local folder, "hub:<id>" of anything else.

    Enter the digest, per file with a suffix of MODEL_FILES and in order of name: the name relative to the folder, the
    size, and the content; of files over 64 MiB only the first and the last MiB, so 16 GB of weights take no time.
    Where the folder lies does not enter, nor does warmup.json, which holds how long things took.
    """
    root = Path(path_or_id).expanduser()
    if not root.is_dir():
        if root.is_absolute() or str(path_or_id).startswith((".", "~")):
            raise FileNotFoundError(f"{path_or_id}: no such model folder")
        return f"hub:{path_or_id}"
    found = [path for path in sorted(root.rglob("*")) if path.name.endswith(MODEL_FILES)]
    files = {path.relative_to(root): path for path in found if path.name != "warmup.json"}
    if not files:
        raise ShardError(f"{path_or_id}: no model files ({', '.join(MODEL_FILES)}) in this folder")
    digest = hashlib.sha256()
    for name, path in files.items():
        size = path.stat().st_size
        with open(path, "rb") as file:
            content = file.read(64 * MIB if size <= 64 * MIB else MIB)
            if size > 64 * MIB:
                file.seek(-MIB, os.SEEK_END)
                content += file.read(MIB)
        digest.update(json.dumps([name.as_posix(), size, hashlib.sha256(content).hexdigest()]).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on; None for what is not installed."""
    installed = {package.name: package.version for package in metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed.get(name) for name in PACKAGES}


def commit() -> dict[str, str | bool | None]:
    """The git commit of the code, and whether tracked files differ from it (`dirty`); null without git."""
    found = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if found else None
    return {"git_commit": found, "dirty": None if changes is None else changes != ""}


def write(
    folder: Path | str, *, stage: str, config: dict, seed: int | None, model, adapter=None, data=None, machine=None
) -> None:
    """Write folder/manifest.json. `model` and `adapter` are a path, a hub id, None, or the entry of an earlier stage's
    manifest. `data` is what resuming.keep_data gives, `machine` what it is begun on, where that is known."""

    def identity(which: Path | str | dict | None) -> dict | None:
        carried = which is None or isinstance(which, dict)
        return which if carried else {"name": str(which), "fingerprint": fingerprint(which)}

    manifest = {
        "schema": SCHEMA,
        "stage": stage,
        "begun": datetime.now().astimezone().isoformat(timespec="seconds"),
        **({} if machine is None else {"machine": machine}),
        "config": config,
        "seed": seed,
        "versions": versions(),
        **commit(),
        "model": identity(model),
        "adapter": identity(adapter),
        "data": data,
    }
    text = json.dumps(manifest, indent=2, allow_nan=False, default=str)  # a Path becomes its string
    write_whole(Path(folder) / "manifest.json", [text.encode() + b"\n"])


def read(folder: Path | str) -> dict:
    """The manifest of a stage's folder; ShardError if it is absent, unreadable or of another schema."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ShardError(f"{path}: no such file; expected a folder that a stage wrote with --out{suggest_path(folder)}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); run the stage again into a new --out") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ShardError(f"{path}: schema is not {SCHEMA!r}; check out the code that wrote it, or use another --out")
    kinds = {"stage": str, "config": dict, "seed": int | None, "model": dict | None, "adapter": dict | None}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name, ...), kind):
            raise ShardError(f"{path}: no usable {name!r} in it; bring back the file that the stage wrote")
    return manifest


def begun(folder: Path | str) -> float:
    """When the manifest of a folder was first written, in seconds since 1970; the file's time where it does not say."""
    path = Path(folder) / "manifest.json"
    try:
        return datetime.fromisoformat(json.loads(path.read_text("utf-8"))["begun"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def origin(manifest: dict, free: Iterable[str]) -> dict:
    """What the shards under a manifest are, for a later stage to remember, without the settings that may change."""
    kept = {name: manifest.get(name) for name in ("stage", "seed", "model", "adapter")}
    return kept | {"config": {name: value for name, value in manifest.get("config", {}).items() if name not in free}}


def sampled_by(manifest: dict) -> dict:
    """The rollout stage's manifest of shards that later stages may have added to."""
    while "rollouts_manifest" in (manifest.get("config") or {}):
        manifest = manifest["config"]["rollouts_manifest"]
    return manifest


def check(folder: Path | str, stage: str, config: dict, ignore: Iterable[str] = ()) -> dict | None:
    """May this config go on in this folder? None: the folder is fresh. The manifest: same stage and config, go on.

    ShardError names the other stage, or each field that differs, old and new, or the model or adapter whose files have
    changed since. Fields in `ignore` (paths, devices) are not compared.
    """
    folder = Path(folder)
    check_owner(folder)
    if not (folder / "manifest.json").exists():
        if list_shards(folder):
            raise ShardError(f"{folder}: shards of unknown settings (no manifest.json there); use another --out")
        check_own(folder, stage)
        return None
    check_stage(folder, stage)
    manifest = read(folder)
    if differ := differences(manifest["config"], config, ignore):
        said = [
            f"{name}: the {FOREIGN[name[-5:]]} has changed"
            if name[-5:] in FOREIGN
            else f"{name}: {there!r} there, {now!r} now"
            for name, (there, now) in differ.items()
            if name[-5:] not in FOREIGN or name[:-5] not in differ  # another one has other contents
        ]
        fix = "use another --out, or the settings that are there"
        raise ShardError(f"{folder} was written with other settings: {'; '.join(said)}; {fix}")
    check_files(folder, manifest, {role: config.get(role) for role in ("model", "adapter")})
    return manifest


def check_stage(folder: Path | str, stage: str) -> None:
    """ShardError for a folder that holds the output of another stage; one without a manifest holds none."""
    folder = Path(folder)
    if (folder / "manifest.json").exists() and (found := read(folder)["stage"]) != stage:
        raise ShardError(f"{folder} holds the output of the stage {found}, not of {stage}: use another --out")


def check_own(folder: Path | str, stage: str) -> None:
    """ShardError for a folder that is somebody else's: another stage's, or with files or runs in it and none begun.

    Hidden files and logs may be there, and folders of other stages, as of rollouts that a run is to train on.
    """
    folder = Path(folder)
    check_stage(folder, stage)
    patterns = ("manifest.json", *BEGUN.get(stage, ()))
    if not folder.is_dir() or any(path for pattern in patterns for path in folder.glob(pattern)):
        return
    others = [path for path in sorted(folder.iterdir()) if not _may_stay(path)]
    if others:
        names = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in others[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise ShardError(
            f"{folder} holds {names}{more}, which no {stage} stage has left there: give a new folder, such as "
            f"--out {_new(folder, inside=any(_stage(path) for path in others))}"
        )


def _new(folder: Path, inside: bool) -> Path:
    """A folder that is not there: inside of one that holds runs, else beside it."""
    base = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    if inside and not os.path.lexists(base := folder / "new"):
        return base
    return next(path for n in count(2) if not os.path.lexists(path := Path(f"{base}-{n}")))


def _stage(folder: Path) -> str | None:
    """Whose output a folder holds."""
    try:
        return read(folder)["stage"]
    except ShardError:
        return None


def _may_stay(path: Path) -> bool:
    """Whether a new stage may write beside this: see `check_own`."""
    if path.name.startswith(".") or any(path.match(pattern) for pattern in LOGS):
        return True
    if not path.is_dir():
        return False
    if (stage := _stage(path)) is not None:
        return stage != "train"
    return not any(inside.is_file() and not inside.name.startswith(".") for inside in path.rglob("*"))


def check_owner(folder: Path) -> None:
    """ShardError for the rollouts of a training run, which it takes up as its own: only the run writes there."""
    there = folder.resolve()
    run = there.parent
    if there.name == "rollouts" and (run / "manifest.json").is_file() and read(run)["stage"] == "train":
        raise ShardError(f"{folder} belongs to the training run in {run}; give another --out")


def differences(old: dict, new: dict, ignore: Iterable[str] = ()) -> dict[str, tuple]:
    """{setting: (old, new)} of those that differ between a manifest's config and another one.

    One that is not there, as an older version had none, is None.
    """
    new = json.loads(json.dumps(new, default=str))  # as JSON: tuples are lists there
    pairs = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new} - {*ignore})}
    return {name: (there, now) for name, (there, now) in pairs.items() if there != now}


def check_files(folder: Path | str, manifest: dict, used: dict[str, str | None]) -> None:
    """ShardError if a model or adapter of the manifest has other files now. Another name is the caller's choice, and a
    folder that is gone is for the loading code to report."""
    for role, name in used.items():
        entry = manifest.get(role)
        if entry and name == entry["name"] and Path(name).expanduser().is_dir():
            if entry["fingerprint"] != fingerprint(name):
                raise ShardError(
                    f"{folder} was made with other files of the {role} {name}; bring those back, or use another folder"
                )
