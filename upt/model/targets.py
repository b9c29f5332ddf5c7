"""Which layers of a model can get an adapter, told from its configuration alone: no weight is read or made."""

import re
from collections.abc import Sequence

import torch
from transformers import AutoModelForImageTextToText

from upt.errors import SettingError, suggest
from upt.model.families import FAMILIES
from upt.model.opening import model_config


def check_targets(name: str, targets: Sequence[str]) -> None:
    """Raise SettingError for the first of `targets` that names no linear layer of the language model, with those there.

    A target is the last part, or the last parts, of a layer's name: `q_proj`, `layers.0.self_attn.q_proj`.
    """
    config = model_config(name)
    with torch.device("meta"):
        bare = AutoModelForImageTextToText.from_config(config)
    layers = [layer for layer, module in bare.named_modules() if isinstance(module, torch.nn.Linear)]
    family = FAMILIES[config.model_type]
    served = [layer for layer in layers if family.may_adapt(layer)]
    known = list(dict.fromkeys(layer.rpartition(".")[2] for layer in served))
    for target in targets:
        pattern = family.targeted([target])
        if not any(re.fullmatch(pattern, layer) for layer in served):
            elsewhere = next((layer for layer in layers if f".{layer}".endswith(f".{target}")), None)
            why = f"{elsewhere} stays frozen" if elsewhere else "there is no such linear layer"
            raise SettingError(
                f"--lora-targets {target}: {why}; the language model of {name} has {', '.join(known)}"
                f"{suggest(target, known)}"
            )
