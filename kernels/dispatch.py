"""Which implementation does a job: Triton for CUDA tensors, the PyTorch reference for all others.

The environment variable UPT_KERNELS forces either: `auto` (the default), `triton` or `reference`. With `triton`, CPU
tensors go through Triton's interpreter, which is slow and meant for tests. float64 always takes the reference: the
Triton kernels compute in float32, and float64 is what they are checked against.
"""

import os

import torch

MODES = ("auto", "triton", "reference")


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the job on `tensor` goes to Triton. Raises ValueError for an unknown mode, RuntimeError if it cannot."""
    mode = os.environ.get("UPT_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"UPT_KERNELS is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "reference" or tensor.dtype == torch.float64 or (mode == "auto" and not tensor.is_cuda):
        return False
    if not tensor.is_cuda:
        import triton

        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "UPT_KERNELS=triton on CPU tensors needs Triton's interpreter, which has to be chosen before triton is "
                "imported: set TRITON_INTERPRET=1 in the environment too"
            )
    return True


def on(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which kernels are launched on the tensor's own device, which need not be the current one."""
    return torch.cuda.device_of(tensor)
