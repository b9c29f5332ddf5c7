"""The policy and what is done with it: packed log-probabilities, decoding, updates of its adapter."""

import lazy_loader

from upt.errors import PolicyError

# The linear layers of the language model that get an adapter.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={
        "decoding",
        "devices",
        "families",
        "folders",
        "opening",
        "packing",
        "policy",
        "room",
        "targets",
        "update",
    },
    submod_attrs={
        "packing": ["Prompt", "Row"],
        "devices": ["checked_device"],
        "opening": ["model_config"],
        "policy": ["Policy"],
        "room": ["check_room"],
        "targets": ["check_targets"],
    },
)
__all__ += ["PolicyError", "TARGETS"]
