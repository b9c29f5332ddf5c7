"""Whether a run has room on the GPU that it will use, told before its model is loaded (formulas: upt/reckoning)."""

import sys
from collections.abc import Sequence

import torch

from upt.model.policy import checked_device, model_config
from upt.reckoning.memory import PHASES, fits
from upt.reckoning.sizes import VISIONS


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can be taken now, with what torch holds and nobody uses."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(settings, phases: Sequence[str] = PHASES) -> None:
    """Say on stderr what a run of these phases needs of the GPU's free memory; on a CPU nothing.

    `settings` is a Config that is filled in. Raises SettingError for a run that cannot fit, with settings that would.
    """
    device = checked_device(settings.device)
    if device.type != "cuda":
        return
    config = model_config(settings.model)
    if config.model_type not in VISIONS:  # a family of the user's own
        print(f"what a {config.model_type} model needs of the GPU's memory is not reckoned", file=sys.stderr)
        return
    print(fits(config.to_dict(), settings, free_bytes(device), phases), file=sys.stderr)
