"""What a run made and how it was trained, for those who evaluate it (`--run`)."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from upt import model
from upt.errors import SettingError, ShardError, suggest_path
from upt.groups import manifests
from upt.model.folders import CONFIG, lora_of
from upt.model.origin import made_for, where_it_fits

if TYPE_CHECKING:
    from upt.model import Policy


class Trained(NamedTuple):
    """A run's folder, its model, its adapter, and the settings that its manifest holds."""

    folder: Path
    model: str
    adapter: str
    settings: dict


def trained(path: Path) -> Trained:
    """What lies in the folder of a run, or in one of its checkpoints or adapters.

    The model is the one that the adapter belongs to: where the run started from a merged adapter, OUT/start.
    Raises SettingError for a run without an adapter, ShardError for what is no run.
    """
    folder, manifest = run_folder(path)
    adapter = path if (path / "adapter_config.json").is_file() else path / "adapter"
    if not adapter.is_dir():
        if (folder / "adapter").is_dir():
            raise SettingError(f"--run {path} holds no adapter: give the folder of the run, {folder}")
        made = sorted(folder.glob("checkpoints/step-*"))
        instead = f"or give its latest checkpoint, {made[-1]}" if made else "or give --model and --adapter"
        raise SettingError(
            f"{path} has no adapter yet: let the run end (where it was stopped, the command that began it goes on), "
            f"{instead}"
        )
    settings, start = manifest["config"], folder / "start"
    if settings.get("adapter") and not start.is_dir():
        how = ", dtype='fp32', device='cpu'" if settings.get("quantize") else ""
        made = f"Policy.load({settings['model']!r}, adapter={settings['adapter']!r}{how}).export({str(start)!r})"
        raise SettingError(f"{start} is gone, the model that the run started from; make it again by {made}")
    return Trained(folder, str(start) if start.is_dir() else settings["model"], str(adapter), settings)


def taken_from_run(config) -> Trained:
    """What `--run` of a Config brings; its model and adapter are put there. Raises as `trained` does, and SettingError
    where they were given, too."""
    if config.model or config.adapter:
        raise SettingError("--run brings its own model and adapter: leave --model and --adapter out")
    found = trained(config.run)
    config.model, config.adapter = found.model, found.adapter
    return found


def run_folder(path: Path) -> tuple[Path, dict]:
    """The folder of the run that a folder is, or is in, with its manifest."""
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "manifest.json").is_file():
            manifest = manifests.read(folder)
            if manifest["stage"] == "train":
                for name in ("model", "data"):
                    if not isinstance(manifest["config"].get(name), str):
                        fix = "bring back the file that the run wrote, or give --model and --adapter"
                        raise ShardError(f"{folder / 'manifest.json'}: no usable {name!r} in its config; {fix}")
                return folder, manifest
    raise SettingError(f"--run {path}: {_instead(path)}")


def _instead(path: Path) -> str:
    """What a folder is that is no run's, and what to give."""
    if (path / CONFIG).is_file():
        base = made_for(path)
        model = where_it_fits(path, base) or base["name"] or "ITS_MODEL"
        fix = f"ask or evaluate it by --model {model} --adapter {path}"
        return f"an adapter by itself, such as an export, and no run: {fix}"
    if (path / "config.json").is_file():
        return f"a model by itself, such as an export, and no run: ask or evaluate it by --model {path}"
    inside = sorted(log.parent for depth in ("*", "*/*") for log in path.glob(f"{depth}/metrics.jsonl"))
    one = f", such as {inside[0]}, one of {len(inside)} in it" if inside else suggest_path(path)
    return f"no run of train_upt.py there; give the folder that was its --out{one}"


def take(config, settings: dict, names: dict[str, str]) -> None:
    """Fill in a Config's fields {its name: the run's} that were left at their defaults."""
    for name, of_run in names.items():
        if getattr(config, name) == getattr(type(config), name) and settings.get(of_run) is not None:
            setattr(config, name, settings[of_run])


def load_policy(config, **known) -> "Policy":
    """The policy of a Config; with `run` as it was in training, so that its numbers are those of training.

    An adapter by itself is merged into the weights, which rounds them. `known` is how much is asked at a time, for
    `check_room`. Raises SettingError for a model that does not fit on the GPU.
    """
    if config.run is not None:
        known["lora_rank"], _, known["lora_targets"] = lora_of(config.adapter)
    model.check_room(config, ["rollout"], **known)
    if config.run is None:
        return model.Policy.load(config.model, **config.loading())
    policy = model.Policy.load(config.model, **config.loading("adapter", "any_base"))
    policy.load_adapter(config.adapter, config.any_base)
    return policy
