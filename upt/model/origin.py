"""Which model an adapter belongs to, asked before anything is loaded.

A model's identity is its weights: a copy under another name, in other shards or with another template is the same one.
Beside each adapter that a policy saves lies base.json, the model that it was made for:

    {"name": folder or hub id, "fingerprint": of its weights, "adapter": null}

`adapter` is {"name", "fingerprint"} where an adapter had been merged into the model. A snapshot that was written after
such a merge carries the same file, with the fingerprint of the merged "weights" besides: it has that identity too.
"""

import json
import os
import re
import sys
from hashlib import sha256
from pathlib import Path

from upt.errors import PolicyError
from upt.files import read_json
from upt.model.folders import ADAPTER, CONFIG, adapter_config, tensors, weight_files

BASE = "base.json"
WHOLE, END = 2**20, 2**16  # bytes of a tensor up to which all of it enters a fingerprint, and else of either end


def fingerprint_of_tensors(*files: Path) -> str:
    """ "sha256:<hex>" of the tensors in some safetensors files together, whichever is in which.

    Enter each tensor's name, dtype, shape and content; of one over 1 MiB the first and last 64 KiB, so that 16 GB of
    weights take a second.
    """
    digests = []
    for path in files:
        with open(path, "rb") as file:
            for name, (dtype, shape, start, end) in tensors(path).items():
                cuts = [(start, end)] if end - start <= WHOLE else [(start, start + END), (end - END, end)]
                digest = sha256(json.dumps([name, dtype, shape]).encode())
                for first, last in cuts:
                    file.seek(first)
                    digest.update(file.read(last - first))
                digests.append(digest.hexdigest())
    return f"sha256:{sha256(' '.join(sorted(digests)).encode()).hexdigest()}"


def snapshot_folder(name: str) -> Path | None:
    """Where the files of a snapshot are: its folder, or that of a hub id in the cache; None if they are not here."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def origin_of(name: str, adapter: Path | str | None = None) -> dict:
    """The identity of a model, with `adapter` merged into it: {"name", "fingerprint", "adapter"}, as in base.json.

    The fingerprint is None where the weights are not here, or are no safetensors files.
    """
    folder = snapshot_folder(name)
    files = weight_files(folder) if folder else []
    here = files and all(file.is_file() for file in files)
    origin = {"name": str(name), "fingerprint": fingerprint_of_tensors(*files) if here else None, "adapter": None}
    if adapter is not None:
        path = Path(adapter).expanduser()
        digest = sha256((path / CONFIG).read_bytes() + fingerprint_of_tensors(path / ADAPTER).encode())
        return origin | {"adapter": {"name": str(adapter), "fingerprint": f"sha256:{digest.hexdigest()}"}}
    if here and os.path.lexists(folder / BASE):
        merged = read_base(folder)
        if merged.pop("weights", None) == origin["fingerprint"]:  # they are still what the merge gave
            return merged
    return origin


def read_base(folder: Path) -> dict:
    """What base.json in a folder says. Raises PolicyError if it is damaged."""
    fix = "bring it back, or remove it: without the file nothing is compared, as with --any-base for an adapter"
    if not (folder / BASE).is_file():
        raise PolicyError(f"{folder / BASE} is no file; {fix}")
    record = read_json(folder / BASE, fix)
    try:
        parts = [record, record["adapter"]] if record["adapter"] else [record]
        named, digests = (all(isinstance(part[key], str) for part in parts) for key in ("name", "fingerprint"))
        digests = digests and all(part["fingerprint"].startswith("sha256:") for part in parts)
    except (KeyError, TypeError):
        named, digests = False, False
    if not named:
        raise PolicyError(f"{folder / BASE} does not name a model; {fix}")
    if not digests:
        raise PolicyError(f"{folder / BASE} lacks a fingerprint of weights, so nothing can be compared with it; {fix}")
    return record


def made_for(adapter: Path) -> dict:
    """The identity of the model that an adapter was made for: of base.json, else of the model that PEFT wrote down."""
    if os.path.lexists(adapter / BASE):
        return read_base(adapter)
    name = adapter_config(adapter).get("base_model_name_or_path")
    return origin_of(name) if name else {"name": None, "fingerprint": None, "adapter": None}


def check_base(adapter: Path | str, origin: dict, any_base: bool = False, say: bool = True) -> None:
    """Raise PolicyError for an adapter that was made for another model than `origin`, unless `any_base`.

    A name says nothing: snapshots move. Where the weights cannot be compared, a line on stderr is all, with `say`.
    """
    if any_base:
        return
    path = Path(adapter).expanduser()
    base = made_for(path)
    if unknown := [of["name"] for of in (base, origin) if of["fingerprint"] is None]:
        if say:
            why = f"the weights of {unknown[0]} are not here as safetensors" if unknown[0] else "it names no model"
            print(f"whether {adapter} was made for {origin['name']} cannot be checked: {why}", file=sys.stderr)
    elif not same(base, origin):
        fix = "give the model that it was made for"
        if fitting := where_it_fits(path, base):
            fix = f"give --model {fitting}"
        elif base["adapter"]:
            merged = f"Policy.load({base['name']!r}, adapter={base['adapter']['name']!r}).export(DIR)"
            fix = f"make that by {merged} and give --model DIR"
        raise PolicyError(
            f"the adapter {adapter} was made for {shown(base)}, not for {shown(origin)}; {fix}, or insist with "
            "--any-base (in a notebook any_base=True)"
        )


def same(one: dict, other: dict) -> bool:
    merged = [of["adapter"] and of["adapter"]["fingerprint"] for of in (one, other)]
    return one["fingerprint"] == other["fingerprint"] and merged[0] == merged[1]


def shown(origin: dict) -> str:
    weights = origin["fingerprint"].removeprefix("sha256:")[:8]
    merged = f" with {origin['adapter']['name']} merged into it" if origin["adapter"] else ""
    return f"{origin['name']} (weights {weights}){merged}"


def where_it_fits(adapter: Path, base: dict) -> str | None:
    """A folder or hub id that is here and has the identity `base`: as named, or the start of the adapter's run."""
    named = [] if base["adapter"] else [base["name"]]
    starts = [str(folder / "start") for folder in [*adapter.parents][:3]]
    return next((name for name in named + starts if snapshot_folder(name) and same(origin_of(name), base)), None)
