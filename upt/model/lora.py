"""LoRA layers with fewer operations than PEFT's own forward, equal to it to rounding, and their form while sampling.

PEFT multiplies the low-rank product by its scale, adds it to the layer's output and, where the weights are bf16,
converts the layer's input to float32 first. Here the product is added in one operation and in the type of the weights;
the adapter itself, its gradients and its optimizer stay in float32. Small float32 weights on a CPU get the low-rank
product themselves, W + s B A, which leaves one product with the input where there were three. 4-bit weights are
dequantised for each pass; what is above then holds of the type that they compute in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

MERGED_BYTES = 2**30  # on a CPU, the most that merged copies of the adapted weights may take while sampling
SMALL = 2**20  # numbers in a weight that is merged in training, where each layer's copy stays until the backward pass


class Fused:
    """PEFT's LoRA layer on a linear layer, with the forward pass described above.

    A mixin in front of PEFT's own class, to which saving, loading, merging and switching off are left.
    """

    def plain(self) -> str | None:
        """The one active adapter if it is a product of two matrices and nothing else."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        off = self.disable_adapters or self.merged
        if off or len(names) != 1 or names[0] in self.lora_variant or self.lora_B[names[0]].bias is not None:
            return None
        return names[0] if isinstance(self.lora_dropout[names[0]], torch.nn.Identity) else None

    def factors(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (r, in) and B (out, r) in `dtype`, and the scale of their product."""
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return A.to(dtype), B.to(dtype), self.scaling[name]

    @property
    def computes_in(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    @property
    def numbers(self) -> int:
        """In its weight."""
        return self.base_layer.in_features * self.base_layer.out_features

    def full_weight(self) -> torch.Tensor:
        """W (out, in) in the type that the layer computes in. Not `weight`, which is PEFT's for whoever reads it."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        name = None if args or kwargs else self.plain()
        if name is None:
            return super().forward(x, *args, **kwargs)
        if x.device.type == "cpu" and self.computes_in == torch.float32 and self.numbers <= SMALL:
            return Merged.apply(x, self.full_weight(), self.base_layer.bias, *self.factors(name, torch.float32))
        return added(x, self.base_layer, *self.factors(name, x.dtype))


class Linear(Fused, lora.Linear):
    """On weights in full."""


FUSED = {lora.Linear: (torch.nn.Linear, Linear)}  # PEFT's class: the layers that it has to be on, and ours

if is_bnb_4bit_available():
    from bitsandbytes import functional, nn

    class Linear4bit(Fused, lora.Linear4bit):
        """On 4-bit weights."""

        @property
        def computes_in(self) -> torch.dtype:
            return self.base_layer.compute_dtype

        def full_weight(self) -> torch.Tensor:
            packed = self.base_layer.weight
            return functional.dequantize_4bit(packed.data, packed.quant_state)

    FUSED[lora.Linear4bit] = (nn.Linear4bit, Linear4bit)


class Merged(torch.autograd.Function):
    """x (..., in) through the weight W + s B A and the bias; gradients for x, A and B."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        merged = torch.addmm(weight, B, A, alpha=scale)
        ctx.save_for_backward(x, merged, A, B)
        ctx.scale = scale
        return linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, merged, A, B = ctx.saved_tensors
        grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, out), (N, in)
        of_x = (grad @ merged).view_as(x) if ctx.needs_input_grad[0] else None
        of_A = ((grad @ B).mul_(ctx.scale)).T @ rows
        of_B = grad.T @ (rows @ A.T).mul_(ctx.scale)
        return of_x, None, None, of_A, of_B, None


def added(x: torch.Tensor, base_layer, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """base_layer(x) + scale * x A^T B^T for x (..., in)."""
    base = base_layer(x)
    low = x.reshape(-1, x.shape[-1]) @ A.T  # (N, r)
    return torch.addmm(base.reshape(-1, base.shape[-1]), low, B.T, alpha=scale).view_as(base)


def fuse(model: torch.nn.Module) -> None:
    """Make PEFT's LoRA layers on plain and on 4-bit linear layers in `model` ours."""
    for layer in model.modules():
        base_class, fused_class = FUSED.get(type(layer), (None, None))
        if fused_class and type(layer.base_layer) is base_class:
            layer.__class__ = fused_class


def merged(model: PeftModel, wide: bool = False) -> tuple[torch.nn.Module, float]:
    """The model with its adapter merged into its weights, for good, and how far rounding has put these off.

    That is |made - meant| / |meant| over all adapted weights, of the change that was made and the one meant: 0 without
    rounding, 1 if nothing of it is left, more if rounding adds to it. With `wide` the sums are kept in float32.
    """
    off = size = 0.0
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, lora.LoraLayer):
                base = layer.get_base_layer().float() if wide else layer.get_base_layer()
                before = base.weight.to(torch.float32, copy=True)
                meant = layer.get_delta_weight(*layer.active_adapters).float()
                layer.merge()
                off += (base.weight.float() - before - meant).square().sum().item()
                size += meant.square().sum().item()
    return model.unload(), (off / size) ** 0.5 if size else 0.0


@contextmanager
def sampling(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, where nothing is trained, the active adapter takes part as cheaply as it can.

    On a CPU in float32 it is merged into copies of the weights, as long as these fit in `MERGED_BYTES`. In half types
    merging would round early updates away: their change of a weight is smaller than half of its last digit. There, and
    on a GPU, the factors are kept in the type of the weights. What is trained is as it was, to the bit, afterwards.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Fused) and layer.plain()]
    wide = all(layer.computes_in == torch.float32 and layer.base_layer.weight.device.type == "cpu" for layer in layers)
    merge = wide and sum(4 * layer.numbers for layer in layers) <= MERGED_BYTES
    try:
        with torch.no_grad():
            for layer in layers:
                A, B, scale = layer.factors(layer.plain(), layer.computes_in)
                if merge:
                    merged = torch.addmm(layer.full_weight(), B, A, alpha=scale)
                    layer.forward = partial(linear, weight=merged, bias=layer.base_layer.bias)
                else:
                    layer.forward = partial(added, base_layer=layer.base_layer, A=A, B=B, scale=scale)
        yield
    finally:
        for layer in layers:  # memory may have run out before all of them had theirs
            vars(layer).pop("forward", None)
