"""Compile every Triton kernel to machine code, without a GPU: registers, spills and shared memory of what ships.

The launch functions run on tensors without data at full size, and what they launch, with its block sizes, is compiled
for sm_80 (A100) and sm_90 (H100, H200) instead of being run. A spilled register fails.

    python -m bench.compile
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import upt  # noqa: F401 - first, so that `kernels` is ours (upt/kernel_names.py)
from kernels import advantage, advantage_triton, attention_triton, logprob_triton, loss_triton, sampling_triton
from kernels.parts import Part, Places

TARGETS = (80, 90)
MODULES = (logprob_triton, advantage_triton, attention_triton, loss_triton, sampling_triton)
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
DECODERS = (  # heads, key heads and head size of the 7B, of the 3B and of Qwen3-VL-8B, and of other kinds
    (28, 4, 128, torch.bfloat16), (16, 2, 128, torch.bfloat16), (32, 8, 128, torch.bfloat16),
    (28, 4, 128, torch.float32), (12, 2, 80, torch.float16), (14, 2, 64, torch.bfloat16), (32, 2, 256, torch.bfloat16),
)  # fmt: skip


class Recorder:
    """Stands in for a kernel: a launch is noted instead of made."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **settings):
            named = dict(zip(self.kernel.arg_names, args)) | settings
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            self.launches.append((self.kernel, named, options))

        return launch


def source(kernel, named: dict) -> ASTSource:
    """What Triton's launcher would compile for these arguments, with its specialisation on 1 and on multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def launches() -> list[tuple]:
    """(kernel, arguments, options) of every launch that full-size calls make, each variant once."""
    found: list[tuple] = []
    with ExitStack() as stack:
        for module in MODULES:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, Recorder(kernel, found)))
        call_all()
    return found


def call_all() -> None:
    """Every call at full size that launches another variant of a kernel, on tensors without data."""
    rows, vocabulary, device = 8192, 152_064, "meta"
    ids, row = torch.zeros(rows, dtype=torch.long, device=device), torch.zeros(rows, device=device)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    strided = torch.empty(rows, 262_143 * 2, device=device)[:, ::2]  # fp32, the widest
    for z in (logits, strided):
        logprob_triton.rows(z, ids, 0.7, None)
        logprob_triton.gradient(z, ids, 0.7, row, row, row, row, torch.empty_like(z))
        for top_p, top_k in ((1.0, 0), (0.9, 50)):
            sampling_triton.sample(z, 0.7, top_p, top_k, 0, ids, 3, range(5))
    sampling_triton.sample(logits, 0.0, 1.0, 0, 0, ids, 3, ())
    sampling_triton.sample(logits, 0.7, 0.99, 0, 0, ids, ids, range(5))  # a position a row
    full = torch.empty(512, vocabulary, device=device)
    for narrow in (torch.bfloat16, torch.float32):
        logprob_triton.rows(full, ids[:512], 0.7, full.view(narrow)[:, :vocabulary])
    for estimator in advantage.ADVANTAGES:
        advantage_triton.advantage(torch.zeros(512, 8, device=device), estimator, None)
    advantage_triton.advantage(row, "group-norm", ids)
    mask = torch.ones(512, 16, dtype=torch.bool, device=device)
    padded = (mask, None, None, "sequence", None), ("sequence", "token")
    packed = (None, ids[:512], row[:512], "token", None), ("token", "sequence")
    for (mask, lengths, weight, aggregation, limit), levels in (padded, packed):
        logprob = row.view(512, 16) if lengths is None else row
        for level in levels:
            settings = (aggregation, limit, 0.2, 0.2, 3.0, level, 0.1, "k3")
            loss_triton.grpo_loss(logprob, logprob, row[:512], mask, logprob, lengths, weight, *settings)
    for reference, weight in ((None, None), (row, row[:512])):  # an advantage a token, as rollout_weights makes them
        settings = ("token", None, 0.2, 0.2, 3.0, "token", 0.1 if reference is not None else 0.0, "k3")
        loss_triton.grpo_loss(row, row, row, None, reference, ids[:512], weight, *settings)
    for heads, kv_heads, dim, dtype in DECODERS:
        stores = [torch.empty(n, kv_heads, 2048, dim, dtype=dtype, device=device) for n in (27, 256)]
        prompts, own = (Part(store, store, ids[: len(store)]) for store in stores)
        prompts = replace(prompts, places=Places([r // 10 for r in range(256)], 27, device))
        query = torch.empty(256, heads, 1, dim, dtype=dtype, device=device)[:, :, 0]
        attention_triton.decode_attention(query, [prompts, own], dim**-0.5)


def resources(compiled, capability: int) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a compiled kernel, as the assembler reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill", report)
    if not registers or not spilled:
        raise RuntimeError(f"the assembler's report is not understood:\n{report}")
    return {
        "registers": max(map(int, registers)),
        "spilled": sum(map(int, spilled)),
        "shared": compiled.metadata.shared,
    }


def variants() -> list[tuple]:
    """(name, source, options, description) of what has to be compiled, each once."""
    found = {}
    for kernel, named, options in launches():
        code = source(kernel, named)
        types = [kind for kind in code.signature.values() if kind.startswith("*")]
        chosen = [i for (i,) in code.constants if kernel.params[i].is_constexpr]
        flags = [f"{kernel.arg_names[i]}={code.constants[(i,)]}" for i in chosen]
        key = (kernel.fn.__name__, str(code.signature), str(code.constants), str(code.attrs))
        found[key] = (kernel.fn.__name__, code, options, ", ".join([types[0], *flags]))
    return list(found.values())


def measure(code: ASTSource, options: dict, capability: int) -> dict[str, int]:
    return resources(triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options), capability)


def main() -> int:
    """Print the table; returns how many compilations spill."""
    todo = [(*variant, capability) for variant in variants() for capability in TARGETS]
    print(f"triton {triton.__version__}\n{'kernel':18}{'arch':>6}{'registers':>11}{'spilled':>9}{'shared':>8}  variant")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda job: measure(job[1], job[2], job[4]), todo))
    for (name, _, _, description, capability), numbers in zip(todo, found, strict=True):
        figures = f"{numbers['registers']:11}{numbers['spilled']:9}{numbers['shared']:8}"
        print(f"{name:18}{capability:6}{figures}  {description}")
    spilling = sum(numbers["spilled"] > 0 for numbers in found)
    print(f"{len(todo) // len(TARGETS)} variants, {spilling} with spilled registers")
    return spilling


if __name__ == "__main__":
    sys.exit(main() > 0)
