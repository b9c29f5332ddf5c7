"""A run's model to serve: its adapter merged into a snapshot, or the adapter alone, with a model card.

    python export.py --run runs/train --out exports/mine                   # a merged snapshot, in bf16 where that does
    python export.py --run runs/train --out exports/mine --dtype fp32
    python export.py --run runs/train --out exports/lora --adapter-only

    merge     the base, in --dtype, with the adapter's product added to it
    write     weights, config, tokenizer, processor; of the base, its other small files and its terms
    check     the folder is opened again, and every tensor compared with what was to be written
    card      README.md: base, data, reward, steps, scores, prompt, versions, licence, what to type

All of it happens in .NAME.partial beside --out, which is then renamed: a folder of that name is whole and checked.

Merging rounds. A bf16 weight has 8 binary digits, and early updates change it by less than half of the last one: how
far that puts the weights off is measured, as a share of the adapter's change, and written in the card. Where it is more
than half of it the snapshot is written in float32, unless --dtype says what to write.
"""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import upt  # noqa: F401 - first, so that `kernels` is ours (upt/kernel_names.py)
from upt import hub, model
from upt.errors import PolicyError, SettingError
from upt.files import check_folder, read_json, write_whole, writing
from upt.model.folders import ADAPTER, check_adapter, is_hub_id
from upt.model.origin import check_base, origin_of, snapshot_folder
from upt.ranges import Name
from upt.run import card, cli, trained
from upt.run.locking import holding
from upt.run.typed import Typed

if TYPE_CHECKING:
    from upt.model import Policy

OURS = ("base.json", "warmup.json")  # of ours, about the base
TERMS = ("LICENSE", "NOTICE")  # how files begin that go wherever the weights go
SMALL = (".json", ".jinja", ".txt")  # files of a snapshot besides its weights
LIMITS = "the area of a picture"


@dataclass
class Config(Typed):
    run: Path
    """folder of a finished run, or one of its checkpoints or adapters"""
    out: Path
    """a folder that is not there yet, or empty"""
    adapter_only: bool = False
    """write the PEFT adapter, for a server that takes adapters, in place of a merged snapshot"""
    dtype: Literal["bf16", "fp32"] | None = None
    """of the merged weights; None: bf16, or fp32 where rounding to bf16 would lose too much of what was learned"""
    device: Name = "cpu"
    """where they are merged"""
    any_base: bool = False
    """take the adapter although it was made for another model"""


def copy_rest(folder: Path, out: Path) -> None:
    """Copy a base's small files that a processor or a server may want and that are not written anew, and its terms."""
    for path in sorted(folder.iterdir()):
        small = path.suffix in SMALL and "index" not in path.name and path.name not in OURS
        if small or path.name.startswith(TERMS):
            shutil.copyfile(path, out / path.name)
    nested = out / "processor_config.json"
    if nested.is_file():  # its pixel limits are the base's, and would go before those in preprocessor_config.json
        settings = read_json(nested, "fetch the model again")
        settings.pop("image_processor", None)
        nested.write_text(json.dumps(settings, indent=2) + "\n")


def digests(tensors: dict) -> dict[str, str]:
    import torch

    def digest(tensor: torch.Tensor) -> str:
        held = tensor.detach().cpu().contiguous().reshape(-1)
        return f"{tuple(tensor.shape)} {tensor.dtype} {blake2b(held.view(torch.uint8).numpy()).hexdigest()}"

    return {name: digest(tensor) for name, tensor in tensors.items()}


def check(out: Path, meant: dict, opened: dict) -> None:
    """Raise PolicyError unless what was opened of an export is what was meant, part by part."""
    if odd := [name for name in {**meant, **opened} if meant.get(name) != opened.get(name)]:
        raise PolicyError(
            f"{out} was written and opens, but not as what was written: {odd[0]} differs; look at the disk, and export "
            "again"
        )


def main(config: Config) -> dict:
    """Write the folder; returns {"out", "dtype", "error"}: of an adapter alone the dtype is None, and error is how far
    rounding to bf16 puts the weights off (None: not measured)."""
    check_folder(config.out)
    if config.out.is_dir() and any(config.out.iterdir()):
        raise SettingError(f"--out {config.out} has files in it: give a new folder")
    out = config.out.resolve()
    draft = out.with_name(f".{out.name}.partial")
    found = trained.trained(config.run)
    with holding(draft):  # which another export into --out would need, too
        folder = draft / "export"
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was killed
        try:
            with writing(config.out):
                folder.mkdir()
                fetch_terms(found.settings["model"])
                dtype, error = (adapter if config.adapter_only else snapshot)(found, config, folder)
                text = card.card(found, dtype, error)
                write_whole(folder / card.NAME, [text.encode()])
                folder.replace(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        draft.rmdir()  # where it was there before
    print(f"{f'{dtype} snapshot' if dtype else 'adapter'} with its card in {config.out}")
    if error is not None and error > card.OFF:
        print(card.rounding(dtype, error), file=sys.stderr)
    return {"out": str(config.out), "dtype": dtype, "error": error}


def limits_of(found: trained.Trained) -> dict[str, int | None]:
    """Between which a picture's area was kept in training; the exported processor does, too."""
    return {name: found.settings.get(name) for name in ("min_pixels", "max_pixels")}


def fetch_terms(base: str) -> None:
    """Bring the card and the licence of a hub id beside its weights in the cache, which are loaded without them."""
    folder = snapshot_folder(base)
    if folder is None or not is_hub_id(base):
        return
    why = hub.fetch(base, folder.name, [card.NAME, *(f"{name}*" for name in TERMS)])
    if why and not card.terms(base):
        print(f"the licence of {base} is not known, and is missing in the card: {why}", file=sys.stderr)


def adapter(found: trained.Trained, config: Config, folder: Path) -> tuple[None, None]:
    """Copy the adapter, write the processor beside it, and open both again."""
    from safetensors.torch import load_file

    check_adapter(found.adapter)
    check_base(found.adapter, origin_of(found.model), config.any_base)
    base = model.model_config(found.model)
    family_class = model.families.FAMILIES[base.model_type]
    family = family_class(found.model, **limits_of(found))
    shutil.copytree(found.adapter, folder, dirs_exist_ok=True)
    family.image_processor.save_pretrained(folder)
    check_adapter(folder)
    model.opening.check_fit(base, folder, found.model, family_class.adapter_layers)
    meant, opened = (digests(load_file(Path(of) / ADAPTER)) for of in (found.adapter, folder))
    limits = (of.area_limits() for of in (family, family_class(str(folder))))
    check(config.out, *(of | {LIMITS: area} for of, area in zip((meant, opened), limits, strict=True)))
    return None, None


def snapshot(found: trained.Trained, config: Config, folder: Path) -> tuple[str, float | None]:
    """Write the merged weights with all that belongs to them, and open them again.

    Returns their dtype, and how far rounding to bf16 puts them off, None where that was not tried.
    """
    dtype = config.dtype or "bf16"
    policy, error = merged(found, config, dtype)
    if config.dtype is None and error > card.OFF:
        dtype = "fp32"
        del policy  # two of them need not fit
        policy, _ = merged(found, config, dtype)
    if base := snapshot_folder(found.settings["model"]) or snapshot_folder(found.model):
        copy_rest(base, folder)
    policy.export(folder)
    meant = contents(policy)
    del policy
    check(config.out, meant, contents(model.Policy.load(str(folder), dtype=dtype, device=config.device)))
    return dtype, None if config.dtype == "fp32" else error


def merged(found: trained.Trained, config: Config, dtype: str) -> tuple["Policy", float]:
    """The model in `dtype` with the adapter merged into it, and how far rounding has put its weights off."""
    policy = model.Policy.load(found.model, dtype=dtype, device=config.device, **limits_of(found))
    policy.load_adapter(found.adapter, config.any_base)
    return policy, policy.merge()


def contents(policy: "Policy") -> dict:
    """What a snapshot holds, to be compared."""
    return {
        **digests(policy.base.state_dict()),
        "the tokenizer": policy.tokenizer.get_vocab(),
        "the chat template": policy.tokenizer.chat_template,
        LIMITS: policy.family.area_limits(),
    }


if __name__ == "__main__":
    cli.launch(main, Config)
