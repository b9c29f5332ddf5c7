"""Whether a folder holds what it should, a model or an adapter, asked before anything is loaded."""

import json
import re
from pathlib import Path

from upt.errors import PolicyError, suggest_path
from upt.model import TARGETS
from upt.ranges import Count, Positive, outside

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
HEADER = 100 * 2**20  # bytes, the format's own limit
SHOWN = 3  # tensors named in a message
# Of adapter_config.json, what leaves an adapter plain LoRA whatever it says. Anything else that is set may put tensors
# or forward passes of its own into the model.
PLAIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "eva_config"}
PLAIN |= {"inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"}
PLAIN |= {"use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core"}
PLAIN |= {"qalora_group_size", "init_lora_weights"}
RANK = 8  # and alpha, in PEFT, where adapter_config.json has none
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other initialisations change the model's own weights
MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained), where it was made, and give that as --model"
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
EDGES = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))  # of areas: newer and older names


def is_hub_id(name: str) -> bool:
    """Whether a model's name is no folder here and reads as one of the hub, org/name."""
    is_path = name.startswith((".", "/", "~", "models/")) or Path(name).expanduser().is_dir()
    return not is_path and re.fullmatch(HUB_ID, name) is not None


def check_model(name: str) -> None:
    """Raise PolicyError for a folder that is not there or holds no whole model; what reads org/name may be a hub id."""
    path = Path(name).expanduser()
    if not path.is_dir() and not is_hub_id(name):
        hint = "run `make warmup` to make it" if path.name == "tiny" else "check the path"
        raise PolicyError(f"there is no model folder {name}: {hint}, or give a hub id, org/name{suggest_path(name)}")
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        fix = "give a snapshot's folder, or a hub id"
        if (path / CONFIG).is_file():
            fix = f"it is an adapter, so give its base as --model, and --adapter {name}"
        raise PolicyError(f"{name} holds no model (config.json is missing); {fix}")
    if (path / CONFIG).is_file():  # transformers would put it on the model unasked
        raise PolicyError(f"{name} holds an adapter beside the model: move it to a folder of its own, for --adapter")
    if missing := [file.name for file in weight_files(path) if not file.is_file()]:
        raise PolicyError(f"{name} lacks {listed(missing)} of {WEIGHTS}.index.json; fetch the model again")


def check_pickles(name: str, folder: Path) -> None:
    """Raise PolicyError for a snapshot in `folder` whose weights are pickles and nothing else, with how to convert."""
    if not weight_files(folder) and (pickled := sorted(folder.glob("pytorch_model*.bin"))):
        load = f"AutoModelForImageTextToText.from_pretrained({name!r}, use_safetensors=False)"
        raise PolicyError(
            f"the model {name} has its weights in {pickled[0].name}, a pickle, which can carry code, and such are not "
            f"opened; if you trust its source, convert it where it was made, {load}.save_pretrained(DIR), and give DIR"
        )


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


def check_length(name: str, setting: str, tokens: int | None) -> None:
    """Raise PolicyError for a response of more tokens than a model has positions, where its config.json is here."""
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text("utf-8"))
        most = (config.get("text_config") or config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):  # a hub id, or a file that the loading code says more of
        return
    if isinstance(most, int) and tokens is not None and tokens > most:
        raise PolicyError(f"{setting} {tokens}: {name} has positions for {most} tokens in all; give fewer")


def check_adapter(folder: Path | str | None, setting: str = "") -> None:
    """Raise PolicyError for what should be a folder with a LoRA adapter and is not; `setting` opens the message.

    Whether it fits a model: `check_base` in origin.py, and `check_fit` in opening.py.
    """
    if folder is None:
        return
    path, where = Path(folder).expanduser(), f"{setting}{folder}"
    if not (path / CONFIG).is_file():
        meant = [p for p in (path / "adapter", path.parent) if (p / CONFIG).is_file()]
        near = f"; did you mean {str(meant[0])!r}?" if meant else suggest_path(folder)
        if (path.parent / "manifest.json").is_file() and not path.exists():
            near = f"; the run in {path.parent} has left none so far"
        raise PolicyError(f"{where}: no PEFT adapter there (no {CONFIG}){near}")
    config = adapter_config(path)
    if config.get("peft_type") != "LORA":
        raise PolicyError(f"{where} is no LoRA adapter but {config.get('peft_type')}; {MERGE}")
    if config.get("init_lora_weights") not in STARTS:
        how = config["init_lora_weights"]
        raise PolicyError(f"{where}: its start ({how!r}) changed the weights of the model itself; {MERGE}")
    for name, value in config.items():
        if name not in PLAIN and value and value != "none":
            raise PolicyError(f"{where}: only plain LoRA can be opened, and {CONFIG} has {name} = {value!r}; {MERGE}")
    if not (path / ADAPTER).is_file():
        pickled = path / "adapter_model.bin"
        fix = "save or fetch it again"
        if pickled.is_file():
            load, save = f"torch.load('{pickled}', weights_only=True)", f"save_file(x, '{path / ADAPTER}')"
            code = f'python -c "import torch; from safetensors.torch import save_file; x = {load}; {save}"'
            fix = f"adapter_model.bin is a pickle, which can carry code; if you trust its source: {code}"
        raise PolicyError(f"{where}: {ADAPTER} is missing; {fix}")
    check_values(config, where)
    found = tensors(path / ADAPTER)
    if not found:
        raise PolicyError(f"{where}: {ADAPTER} holds no tensor; save or fetch it again")
    if odd := [f"{key} is {dtype}" for key, (dtype, *_) in sorted(found.items()) if dtype not in FLOATS]:
        raise PolicyError(f"{where}: {listed(odd)}, not one of {', '.join(FLOATS)}; save it again in one of these")


def lora_of(folder: Path | str) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha and the last parts of the names of its layers, of an adapter that was checked."""
    path = Path(folder).expanduser()
    config = adapter_config(path)
    names = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors(path / ADAPTER)}
    ordered = sorted(names, key=lambda name: (TARGETS.index(name) if name in TARGETS else len(TARGETS), name))
    return config.get("r", RANK), config.get("lora_alpha", RANK), tuple(ordered)


def check_values(config: dict, where: str) -> None:
    """Raise PolicyError for values of adapter_config.json that PEFT takes and that can be no adapter's."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str | None):
        raise PolicyError(f"{where}: {CONFIG} has base_model_name_or_path = {name!r}, no name; write it anew, or null")
    for kind, setting, pattern in ((Count, "r", "rank_pattern"), (Positive, "lora_alpha", "alpha_pattern")):
        of_layers = config.get(pattern) or {}
        if not isinstance(of_layers, dict):
            raise PolicyError(f"{where}: {CONFIG} has {pattern} = {of_layers!r}, no numbers by layer; fetch it again")
        values = {f"{pattern}[{layer!r}]": value for layer, value in of_layers.items()}
        for key, value in (values | {setting: config.get(setting, RANK)}).items():
            number = isinstance(value, int if kind is Count else int | float) and not isinstance(value, bool)
            if not number or outside(value, kind):
                wanted = "a whole number of 1 or more" if kind is Count else "a finite number above 0"
                raise PolicyError(f"{where}: {CONFIG} has {key} = {value!r}, not {wanted}; save or fetch it again")


def adapter_config(folder: Path) -> dict:
    """What adapter_config.json says. Raises PolicyError if it is none."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        if isinstance(config, dict):
            return config
        said = f"it holds {type(config).__name__}, not settings"
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        said = f"not JSON, {error}"
    raise PolicyError(f"the adapter {folder} cannot be loaded: {CONFIG}: {said}; save or fetch it again")


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---------------------------------------------------------------------------------------------------- weights on disk


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """{name: (dtype, shape, where it starts and ends in the file)} of a safetensors file.

    Raises PolicyError for a file that is none, or is cut short.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, HEADER)))
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        if any(not 0 <= start <= end or isinstance(start + end, float) for start, end in spans.values()):
            raise ValueError("places that are none")
        found = {
            name: (header[name]["dtype"], tuple(header[name]["shape"]), 8 + length + start, 8 + length + end)
            for name, (start, end) in spans.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "fetch or make it again (of a few hundred bytes, it is a pointer of Git LFS: git lfs pull)"
        raise PolicyError(f"{path.parent} cannot be loaded: {path.name} is no safetensors file; {hint}") from error
    size, whole = path.stat().st_size, max((end for *_, end in found.values()), default=8 + length)
    if size != whole:
        raise PolicyError(
            f"{path.parent} cannot be loaded: {path.name} has {size} bytes in place of {whole}; fetch or make it again"
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a snapshot's weights from; [] where they are no safetensors files."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return []
    try:
        return [folder / name for name in sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{index} is no index of weights ({error!r}); fetch the model again") from error
