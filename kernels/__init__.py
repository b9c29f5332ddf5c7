"""The numeric kernels of the loop. Each is a Triton kernel and a plain PyTorch reference behind one function.

    from kernels import linear_logprob, sample
    logprob, entropy = linear_logprob(hidden, lm_head.weight, ids, temperature=0.7)

    selective_log_softmax, linear_logprob               log-probability and entropy, from logits or a frozen head
    sample, row_id                                      tokens by counter-based noise
    decode_attention, Part, Places                      attention of decoding over keys that rows share
    group_advantage                                     rewards -> advantages
    grpo_loss, sft_loss, response_weights, rollout_weights, kl_divergence

CUDA tensors take Triton, others the reference; UPT_KERNELS forces either (see dispatch.py). Names are imported when
they are first used: rewards.py takes its advantages from here and must not wait for torch. All other names, get_kernel
for one, are those of Hugging Face's package `kernels`, if it is installed (see namesake.py).
"""

import os
import sys
from importlib import import_module
from types import ModuleType

from kernels.namesake import Namesake

MODULES = {
    "selective_log_softmax": "logprob",
    "linear_logprob": "logprob",
    "group_advantage": "advantage",
    "grpo_loss": "loss",
    "sft_loss": "loss",
    "kl_divergence": "loss",
    "response_weights": "loss",
    "rollout_weights": "loss",
    "sample": "sampling",
    "row_id": "sampling",
    "decode_attention": "attention",
    "Part": "parts",
    "Places": "parts",
}
__all__ = list(MODULES)
OURS = list(__path__)
NAMESAKE = Namesake(__name__)
__path__[:] = OURS + NAMESAKE.folders

# Triton reads TRITON_INTERPRET while it is imported, which transformers and PEFT do: this is the last moment to set it.
if os.environ.get("UPT_KERNELS") == "triton" and "triton" not in sys.modules:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])


def __getattr__(name: str):
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    return NAMESAKE.attribute(name)


def stand_for(theirs: ModuleType) -> None:
    """Look for what is not ours in `theirs`, a package of this name that was imported before."""
    NAMESAKE.adopt(theirs)
    __path__[:] = OURS + NAMESAKE.folders
