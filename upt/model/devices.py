"""On which device a model runs, and in which type it computes."""

import re

import torch

from upt.errors import PolicyError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def checked_dtype(name: str, device: torch.device) -> str:
    """`bf16` or `fp32`; of `auto` the one for a device. Raises PolicyError for another one."""
    if name not in (known := ["auto", *DTYPES]):
        raise PolicyError(f"dtype must be one of {', '.join(known)}, not {name!r}")
    return name if name != "auto" else "bf16" if device.type == "cuda" else "fp32"


def checked_device(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`. Raises PolicyError for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise PolicyError(f"--device {name}: no such kind of device; give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not count:
        build = "" if torch.version.cuda else f"; torch {torch.__version__} is a build without CUDA"
        raise PolicyError(f"--device {name}: torch sees no CUDA device{build}; give --device cpu, or leave it out")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PolicyError(f"--device {name}: there are {count} CUDA devices, from cuda:0 to cuda:{count - 1}")
    return device
