"""Whether a run has room on the GPU that it will use, told before its model is loaded, and how much is left later on.

The formulas are those of upt/reckoning.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from upt.model.attention import SHARES_HEADS
from upt.model.devices import checked_device
from upt.model.opening import model_config
from upt.model.policy import Policy
from upt.reckoning.memory import PHASES, USABLE, Demand, adapter_bytes, fits, tokens_that_fit, update_bytes
from upt.reckoning.sizes import VISIONS, sizes_of
from upt.run import presets


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can be taken now, with what torch holds and nobody uses."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def room_left(device: torch.device) -> float:
    """Bytes that may still be taken on a GPU: the usable share of all that torch can have, less what is taken."""
    taken = torch.cuda.memory_allocated(device)
    return USABLE * (free_bytes(device) + taken) - taken


def check_room(settings, phases: Sequence[str] = PHASES, **known) -> None:
    """Say on stderr what a run of these phases needs of the GPU's free memory; on a CPU nothing.

    `settings` is a Config that is filled in, `known` what it lacks (`fits`). Raises SettingError for a run that cannot
    fit, with settings that would.
    """
    device = checked_device(settings.device)
    if device.type != "cuda":
        return
    config = model_config(settings.model)
    if config.model_type not in VISIONS:  # a family of the user's own
        print(f"what a {config.model_type} model needs of the GPU's memory is not reckoned", file=sys.stderr)
        return
    known |= {"shares_heads": SHARES_HEADS}
    gc.collect()  # a policy of an earlier round or call is a circle, and holds its memory until then
    print(fits(config.to_dict(), settings, free_bytes(device), phases, **known), file=sys.stderr)


def update_tokens(policy: Policy, optimizer: torch.optim.Optimizer, settings) -> int:
    """Token budget of a micro-batch where none is given: on a GPU what there is room for, else the model's default.

    `settings` is a Config that is filled in.
    """
    config = policy.base.config
    if policy.device.type != "cuda" or config.model_type not in VISIONS:
        return presets.update_tokens(settings.model)
    demand = replace(Demand.of(settings), shares_heads=SHARES_HEADS)
    parameters = sum(p.numel() for p in policy.trainable())
    taken = (12 if optimizer.state else 4) * parameters  # AdamW makes its moments in its first step
    coming = adapter_bytes(parameters, demand.bytes_each, moments=True, gradients=True) - taken
    return tokens_that_fit(
        room_left(policy.device) - coming, *update_bytes(sizes_of(config.to_dict()), demand), demand.row
    )
