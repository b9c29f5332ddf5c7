"""Whether a folder holds what it should, a model or an adapter, asked before anything is loaded."""

from pathlib import Path

from upt.errors import PolicyError, suggest_path


def check_model(name: str) -> None:
    """Raise PolicyError for a folder that is not there or holds no model; what is no path may be a hub id."""
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~", "models/")) and not path.is_dir():
        hint = "run `make warmup` to make it" if path.name == "tiny" else "check the path"
        raise PolicyError(f"there is no model folder {name}: {hint}, or give a hub id{suggest_path(name)}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PolicyError(f"{name} holds no model (config.json is missing); give a snapshot's folder, or a hub id")


def check_adapter(folder: Path | str | None, setting: str = "") -> None:
    """Raise PolicyError for what should be a folder with a PEFT adapter and is not; `setting` opens the message."""
    if folder is not None and not (Path(folder).expanduser() / "adapter_config.json").is_file():
        path = Path(folder).expanduser()
        meant = [p for p in (path / "adapter", path.parent) if (p / "adapter_config.json").is_file()]
        near = f"; did you mean {str(meant[0])!r}?" if meant else suggest_path(folder)
        if (path.parent / "manifest.json").is_file() and not path.exists():
            near = f"; the run in {path.parent} has left none so far"
        raise PolicyError(f"{setting}{folder}: no PEFT adapter there (no adapter_config.json){near}")
