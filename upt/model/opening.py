"""From files to a model and its adapter, with every tensor in its place.

Transformers gives tensors that a snapshot lacks random values, and PEFT loads of an adapter what happens to fit: the
score of another model would be printed as this one's. Here each is a PolicyError that names the tensors.
"""

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE as CHAT_TEMPLATE
from transformers.utils import cached_file, logging

from upt import hub
from upt.errors import PolicyError
from upt.model.families import FAMILIES
from upt.model.folders import ADAPTER, MERGE, check_model, check_pickles, listed, tensors
from upt.model.origin import snapshot_folder

BLOCKS = (64, 32)  # 4-bit numbers to a scale
PREFIX = "base_model.model."  # of the names in an adapter's file


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever libraries raise about files that they can't use into a PolicyError about `what`."""
    try:
        yield
    except (PolicyError, KeyboardInterrupt, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, tokenizers, json and torch have no common parent
        said = " ".join((str(error).strip() or "nothing more").split())[:300]
        raise PolicyError(f"{what} cannot be loaded: {type(error).__name__}: {said}; fetch or make it again") from error


@contextmanager
def calm() -> Iterator[None]:
    """Without the warnings of libraries about each other and, where it can't redraw itself, without a progress bar."""
    bars = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    if bars:
        logging.enable_progress_bar()


def model_config(name: str):
    """The configuration of a snapshot or hub id.

    Raises PolicyError if it is not there, not of a known family, or has its weights as pickles.
    """
    check_model(name)
    try:
        if snapshot_folder(name) is None and (why := hub.why_unreachable(name, "model")):
            raise OSError(why)
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"cannot read the model {name!r}{'' if Path(name).is_dir() else ', which is no folder here'}: {error}\n"
            f"Give a snapshot folder or a hub id of one of {', '.join(FAMILIES)}; without a network, "
            f"fetch it elsewhere (`hf download {name} --local-dir DIR`) and give the folder."
        ) from error
    if config.model_type not in FAMILIES:
        raise PolicyError(f"{name} is a {config.model_type} model; supported are {', '.join(FAMILIES)}")
    FAMILIES[config.model_type].check(config, name)
    if packed := getattr(config, "quantization_config", None):
        method = packed.get("quant_method") or "quantization_config in its config.json"
        raise PolicyError(f"{name} is quantised already ({method}): give the full model, and --quantize nf4 for 4 bits")
    if folder := snapshot_folder(name):
        check_pickles(name, folder)
    return config


def processors_template(name: str) -> str | None:
    """The chat template that some snapshots keep with their processor and not with their tokenizer."""
    file = cached_file(name, CHAT_TEMPLATE, _raise_exceptions_for_missing_entries=False)
    return file and json.loads(Path(file).read_text("utf-8"))["chat_template"]


def load_weights(name: str, config, dtype: torch.dtype | str):
    """The transformers model of a snapshot folder or hub id, on the CPU, in `dtype` or, with `auto`, that of its files.

    Names tensors that it has no place for, on stderr. Raises PolicyError for tensors that are missing or of other
    shapes. A head that is tied to the embeddings is not.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report says in a table what is said below
    try:
        with calm(), loading(f"the model {name}"):
            model, found = AutoModelForImageTextToText.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,  # a pickle can carry code
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # raises without naming any
            )
    finally:
        logging.set_verbosity(level)
    if missing := sorted(found["missing_keys"]):
        raise PolicyError(f"the model {name} lacks tensors: {listed(missing)}; fetch or make it again")
    if odd := [f"{key} is {tuple(has)}, not {tuple(wants)}" for key, has, wants in sorted(found["mismatched_keys"])]:
        fix = "fetch its weights and its config.json together again"
        raise PolicyError(
            f"the model {name} has tensors of other shapes than its config.json says: {listed(odd)}; {fix}"
        )
    if unused := sorted(found["unexpected_keys"]):
        print(f"the model {name} has tensors that its architecture does not use: {listed(unused)}", file=sys.stderr)
    return model


def quantize(model, layers: str, dtype: torch.dtype, device: torch.device):
    """The model on `device`, the linear layers below the modules that the pattern `layers` names in 4 bits, the rest
    in `dtype`, in which all of it computes.

    NF4 with double quantisation (QLoRA, arXiv 2305.14314). The layers go to the device one by one, as the whole model
    need not fit there, and each is rounded once, from the type that it has here. Raises PolicyError for rows that
    blocks of one scale do not fit in.
    """
    from bitsandbytes import nn

    kind = {"compress_statistics": True, "quant_type": "nf4"}
    for name, full in [*model.named_modules()]:
        if not (isinstance(full, torch.nn.Linear) and re.match(rf"{layers}\.", name)):
            continue
        # On a CPU bitsandbytes 0.50 takes wrong scales for blocks that run from one row into the next.
        block = next((size for size in BLOCKS if full.in_features % size == 0), None)
        if block is None:
            raise PolicyError(
                f"{name} of {model.name_or_path} has rows of {full.in_features} numbers, and 4 bits need a multiple of "
                f"{BLOCKS[-1]}: leave --quantize out"
            )
        packed = nn.Linear4bit(
            full.in_features, full.out_features, full.bias is not None, compute_dtype=dtype, device="meta", **kind
        )
        weight = nn.Params4bit(full.weight.data, requires_grad=False, blocksize=block, module=packed, **kind)
        packed.weight = weight.to(device)  # which rounds it
        packed.weight.quant_state.dtype = dtype  # which it is dequantised to
        packed.bias = full.bias
        # Else a pass without gradients computes in bf16 on some CPUs, and packs the weights anew, in place, in an order
        # that dequantising them (lora.py) does not expect.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    for parameter in model.parameters():
        if not isinstance(parameter, nn.Params4bit):
            parameter.data = parameter.data.to(device, dtype)
    model.is_loaded_in_4bit = True  # for PEFT
    return model.to(device)


def lora_config(folder: Path) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout = 0.0  # the policy that is trained is the one that answers
    return config


def check_fit(config, adapter: Path | str, name: str, layers: str | None = None) -> None:
    """Raise PolicyError unless an adapter's tensors are exactly those of the LoRA layers that it asks for.

    `config` is the model's configuration, `name` what it is called. `layers` is a pattern of the modules that may get
    an adapter; None: any that it can be merged into. Nothing is loaded but the adapter's own file.
    """
    folder = Path(adapter).expanduser()
    with calm(), loading(f"the adapter {adapter}"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(deepcopy(config), attn_implementation="sdpa")
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        layered = PeftModel(model, lora_config(folder))
        needed = get_peft_model_state_dict(layered, save_embedding_layers=False)
    needed = {key: tuple(tensor.shape) for key, tensor in needed.items()}
    given = {key: shape for key, (_, shape, *_) in tensors(folder / ADAPTER).items()}
    unplaced, missing = sorted({*given} - {*needed}), sorted({*needed} - {*given})
    if unplaced or missing:
        parts = [f"the model has no place for {listed(unplaced)}"] * bool(unplaced)
        parts += [f"the adapter lacks {listed(missing)}"] * bool(missing)
        raise PolicyError(
            f"the adapter {adapter} does not fit {name}: {', and '.join(parts)}; it may be cut short, or made for "
            f"another model or by an older transformers, whose layers had other names: {MERGE}"
        )
    if odd := [f"{key} is {given[key]}, not {shape}" for key, shape in sorted(needed.items()) if given[key] != shape]:
        raise PolicyError(
            f"the adapter {adapter} does not fit {name}: {listed(odd)}; give the model that it was made for"
        )
    modules = {key.removeprefix(PREFIX).split(".lora_")[0] for key in given}
    if layers and (outside := sorted(name for name in modules if not re.match(layers, name))):
        raise PolicyError(
            f"the adapter {adapter} has layers outside the language model ({listed(outside)}), and an image is encoded "
            "once, for policy and reference; start from it merged instead: --adapter"
        )
    ends = [name for name in modules if name.endswith("lm_head") or "embed" in name.rpartition(".")[2]]
    if tied and ends:
        raise PolicyError(
            f"the adapter {adapter} has a layer on {listed(ends)}, and in {name} embeddings and head are one: merged "
            "into one it would change the other; train one without it"
        )
    with loading(f"the adapter {adapter}"), safe_open(folder / ADAPTER, "pt") as file:
        if broken := [key for key in sorted(given) if not file.get_tensor(key).float().isfinite().all()]:
            raise PolicyError(
                f"the adapter {adapter} has values that are not finite, in {listed(broken)}; take an earlier one"
            )


def open_adapter(model, adapter: Path | str, trainable: bool = False) -> PeftModel:
    """A transformers model with an adapter on it, whose fit was checked; frozen unless `trainable`."""
    folder = Path(adapter).expanduser()
    with calm(), loading(f"the adapter {adapter}"):
        return PeftModel.from_pretrained(model, str(folder), config=lora_config(folder), is_trainable=trainable)
