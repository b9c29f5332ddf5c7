"""From files to a model and its adapter, with every tensor in its place.

Transformers gives tensors that a snapshot lacks random values, and PEFT loads of an adapter what happens to fit: the
score of another model would be printed as this one's. Here each is a PolicyError that names the tensors.
"""

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
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from upt.errors import PolicyError
from upt.model.folders import ADAPTER, MERGE, listed, tensors

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


def load_weights(name: str, config, dtype: torch.dtype):
    """The transformers model of a snapshot folder or hub id; names tensors that it has no place for, on stderr.

    Raises PolicyError for tensors that are missing or of other shapes. A head that is tied to the embeddings is not.
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
