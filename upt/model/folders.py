"""Whether a folder holds what it should, a model or an adapter, asked before anything is loaded."""

import json
import re
from pathlib import Path

from upt.errors import PolicyError, suggest_path

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
EDGES = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))  # of areas: newer and older names


def check_model(name: str) -> None:
    """Raise PolicyError for a folder that is not there or holds no model; what reads org/name may be a hub id."""
    path = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~", "models/")) or not re.fullmatch(HUB_ID, name)
    if is_path and not path.is_dir():
        hint = "run `make warmup` to make it" if path.name == "tiny" else "check the path"
        raise PolicyError(f"there is no model folder {name}: {hint}, or give a hub id, org/name{suggest_path(name)}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PolicyError(f"{name} holds no model (config.json is missing); give a snapshot's folder, or a hub id")


def check_pixels(name: str, least: int | None, most: int | None) -> None:
    """Raise PolicyError for limits of an image's area, in pixels, that no picture can keep.

    None stands for the snapshot's own limit, which is known of a folder alone.
    """
    try:
        own = json.loads((Path(name).expanduser() / "preprocessor_config.json").read_text("utf-8"))
        size = own.get("size") or {}
        own_least, own_most = (size.get(edge, own.get(old)) for edge, old in EDGES)
        side = own.get("patch_size", 14) * own.get("merge_size", 2)
    except (OSError, ValueError, AttributeError, TypeError):  # a hub id, or a file that the loading code says more of
        own_least, own_most, side = None, None, 28
    of_least = "" if least is not None else " (the snapshot's own)"
    of_most = "" if most is not None else " (the snapshot's own)"
    least, most = least or own_least, most or own_most
    if most is not None and most < side**2:
        needs = f"one token of a picture takes {side} x {side} pixels: give {side**2} or more"
        raise PolicyError(f"--max-pixels {most}{of_most}: {needs}")
    if None not in (least, most) and least > most:
        fix = "lower the one or raise the other"
        raise PolicyError(f"--min-pixels {least}{of_least} is above --max-pixels {most}{of_most}: {fix}")


def check_adapter(folder: Path | str | None, setting: str = "") -> None:
    """Raise PolicyError for what should be a folder with a PEFT adapter and is not; `setting` opens the message."""
    if folder is not None and not (Path(folder).expanduser() / "adapter_config.json").is_file():
        path = Path(folder).expanduser()
        meant = [p for p in (path / "adapter", path.parent) if (p / "adapter_config.json").is_file()]
        near = f"; did you mean {str(meant[0])!r}?" if meant else suggest_path(folder)
        if (path.parent / "manifest.json").is_file() and not path.exists():
            near = f"; the run in {path.parent} has left none so far"
        raise PolicyError(f"{setting}{folder}: no PEFT adapter there (no adapter_config.json){near}")
