"""What bench/kernels.py measures: each job of the kernels, in our form and in those that one would use instead."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import upt  # noqa: F401 - first, so that `kernels` is ours (upt/kernel_names.py)
from kernels import (
    Part,
    Places,
    decode_attention,
    group_advantage,
    grpo_loss,
    linear_logprob,
    row_id,
    sample,
    selective_log_softmax,
)

Forms = dict[str, Callable[[], object]]
OURS = "upt"
# Decoding: rows, rows of a prompt, tokens of a prompt and of a response, heads, key heads, head size.
CPU_DECODING = ((64, 8, 100, 16, 4, 2, 32), (256, 8, 100, 32, 4, 2, 32), (256, 16, 400, 64, 4, 2, 64))
GPU_DECODING = tuple((rows, 10, 1000, 600, 28, 4, 128) for rows in (60, 120, 250))


@dataclass
class Case:
    """One job at one shape. Its floor is the bytes it must move, or the products N x D x V it must make."""

    job: str
    forms: Forms
    bytes: float = 0
    products: float = 0
    tiny: bool = False  # what launches would take longer than: replayed from a CUDA graph


# ------------------------------------------------------------------------------------------------------ the forms


def naive_selective(logits, ids, temperature=1.0):
    return (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def naive_linear(hidden, weight, ids, temperature=1.0):
    return naive_selective(hidden @ weight.T, ids, temperature)


def naive_sample(logits, temperature, top_p):
    logits = logits.float() / temperature
    kept = logits
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = (p.cumsum(-1) - p > top_p).scatter(-1, order, p.cumsum(-1) - p > top_p)
        kept = logits.masked_fill(outside, float("-inf"))
    token = torch.multinomial(kept.softmax(-1), 1)
    return token, logits.log_softmax(-1).gather(-1, token)


def naive_advantage(rewards):
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-6)


def naive_loss(logprob, old, advantage, mask, reference):
    ratio, difference = torch.exp(logprob - old), reference - logprob
    advantage = advantage[:, None]
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = loss + 0.01 * (torch.exp(difference) - difference - 1)
    return (loss * mask).sum() / mask.sum()


def naive_decoding(query, keys, values):
    """Of keys that every row has a copy of, all of one length: no mask, the best case."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def there_and_back(logprob: Callable, leaf: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(logprob(leaf), leaf, grad)  # whose memory is free again after the call


def without_grad(function: Callable) -> Callable[[], object]:
    return torch.no_grad()(function)


def liger_linear(hidden, weight, ids):
    """- sum of log p: Liger's loss; its gradient has the sign and the scale that it wants."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, ids)


def cce_linear(hidden, weight, ids):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids, reduction="none", filter_eps=None)  # all of the gradient, as ours


def liger_selective(logits, ids):
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax(logits[None], ids[None], 1.0)  # of all rows but the last


def cases(shape: tuple[int, int, int], device: str) -> list[Callable[[], Case]]:
    """What is measured at a shape; each is built when its turn comes, so that only its tensors are there."""
    gpu = device == "cuda"
    count, size, width = shape
    dtype = torch.bfloat16 if gpu else torch.float32
    compiled = torch.compile if gpu else lambda function, **_: None
    generator = torch.Generator(device).manual_seed(0)

    def random(*of, dtype=dtype):
        return torch.randn(*of, dtype=dtype, device=device, generator=generator)

    def tokens(n):
        return torch.randint(size, (n,), device=device, generator=generator)

    def selective(backward: bool) -> Case:
        logits, ids, grad = random(count, size), tokens(count), random(count, dtype=torch.float32)
        leaf = logits.requires_grad_(backward)
        forms: Forms = {
            "naive": lambda z: naive_selective(z, ids),
            "compiled": compiled(lambda z: naive_selective(z, ids), dynamic=False),
            OURS: lambda z: selective_log_softmax(z, ids)[0],
        }
        if gpu and not backward:
            forms["liger"] = lambda z: liger_selective(z, ids)
        if backward:
            # A copy, because it is overwritten; the copy's time is part of what is measured.
            forms[f"{OURS}, in place, with a copy"] = lambda z: selective_log_softmax(z.clone(), ids, in_place=True)[0]
        forms = {name: form for name, form in forms.items() if form}
        run = {
            name: there_and_back(f, leaf, grad) if backward else without_grad(lambda f=f: f(logits))
            for name, f in forms.items()
        }
        return Case(
            f"selective_log_softmax {'forward + backward' if backward else 'forward'}", run,
            bytes=(3 if backward else 1) * logits.nbytes,
        )  # fmt: skip

    def in_place_backward() -> Case:
        from kernels import logprob_triton

        logits, ids, grad = random(count, size), tokens(count), random(count, dtype=torch.float32)
        rows = logprob_triton.rows(logits, ids, 1.0, None)
        saved = (logits, ids, 1.0, rows.top, rows.log_sum, rows.others)
        forms: Forms = {OURS: lambda: logprob_triton.gradient(*saved, grad, logits)}
        return Case("selective_log_softmax backward, in place", forms, bytes=2 * logits.nbytes)

    def linear(backward: bool) -> Case:
        hidden, weight, ids = random(count, width), random(size, width) / width**0.5, tokens(count)
        grad, one = random(count, dtype=torch.float32), torch.ones((), device=device)
        leaf = hidden.requires_grad_(backward)
        forms: Forms = {
            "naive": lambda h: naive_linear(h, weight, ids),
            "compiled": compiled(lambda h: naive_linear(h, weight, ids), dynamic=False),
            OURS: lambda h: linear_logprob(h, weight, ids)[0],
        }
        if gpu:
            for rows in (256, 1024):
                forms[f"{OURS}, chunk {rows}"] = lambda h, rows=rows: linear_logprob(h, weight, ids, chunk=rows)[0]
            forms["cce"] = lambda h: cce_linear(h, weight, ids)
            if backward:
                forms["liger (sum only)"] = lambda h: liger_linear(h, weight, ids)
        forms = {name: form for name, form in forms.items() if form}
        run = {
            name: there_and_back(f, leaf, one if "sum only" in name else grad)
            if backward
            else without_grad(lambda f=f: f(hidden))
            for name, f in forms.items()
        }
        return Case(f"linear_logprob {'forward + backward' if backward else 'no grad'}", run, products=1 + backward)

    def linear_backward() -> Case:
        hidden, weight, ids = random(count, width), random(size, width) / width**0.5, tokens(count)
        logprob, _ = linear_logprob(hidden.requires_grad_(), weight, ids)
        grad = random(count, dtype=torch.float32)
        forms: Forms = {OURS: lambda: torch.autograd.grad(logprob, hidden, grad, retain_graph=True)}
        return Case("linear_logprob backward alone", forms, bytes=2 * hidden.nbytes)

    def sampling(top_p: float, rows: int) -> Case:
        logits, ids = random(rows, size), torch.tensor([row_id(0, "bench", i) for i in range(rows)], device=device)
        ways = {"temperature": 0.7, "top_p": top_p, "top_k": 0, "seed": 0, "row_ids": ids, "position": 7}
        forms: Forms = {
            "naive": lambda: naive_sample(logits, 0.7, top_p),
            "compiled": compiled(lambda: naive_sample(logits, 0.7, top_p), dynamic=False),
            OURS: lambda: sample(logits, statistics=True, **ways),
        }
        forms = {name: form for name, form in forms.items() if form}
        return Case(f"sample {rows} rows, top-p {top_p}", forms, bytes=logits.nbytes)

    def advantage() -> Case:
        rewards = torch.rand(512, 8, device=device, generator=generator)
        forms: Forms = {
            "naive": lambda: naive_advantage(rewards),
            "compiled": compiled(lambda: naive_advantage(rewards), dynamic=False),
            OURS: lambda: group_advantage(rewards, "group-norm"),
        }
        return Case("group_advantage 512 x 8", {name: form for name, form in forms.items() if form}, tiny=True)

    def loss() -> Case:
        old, reference = (random(512, 256, dtype=torch.float32) for _ in range(2))
        leaf, given = random(512, 256, dtype=torch.float32).requires_grad_(), random(512, dtype=torch.float32)
        mask, one = torch.ones(512, 256, dtype=torch.bool, device=device), torch.ones((), device=device)
        ours = {"kl_coef": 0.01}
        forms: Forms = {
            "naive": lambda x: naive_loss(x, old, given, mask, reference),
            "compiled": compiled(lambda x: naive_loss(x, old, given, mask, reference), dynamic=False),
            OURS: lambda x: grpo_loss(x, old, given, mask, reference, **ours)[0],
        }
        run = {name: there_and_back(f, leaf, one) for name, f in forms.items() if f}
        return Case("grpo_loss 512 x 256, forward + backward", run, tiny=True)

    def decoding(rows: int, group: int, prompt: int, own: int, heads: int, kv_heads: int, dim: int) -> Case:
        query = random(rows, heads, dim)
        prompts = random(2, rows // group, kv_heads, prompt, dim)
        responses = random(2, rows, kv_heads, own, dim)
        whole = torch.cat([prompts.repeat_interleave(group, 1), responses], 3)
        lengths = [torch.full((len(t[0]),), t.shape[3], device=device) for t in (prompts, responses)]
        places = Places([row // group for row in range(rows)], rows // group, device)
        parts = [Part(*prompts, lengths[0], places), Part(*responses, lengths[1])]
        forms: Forms = {
            "naive": lambda: naive_decoding(query, *whole),
            OURS: lambda: decode_attention(query, parts),
        }
        forms = {name: without_grad(form) for name, form in forms.items()}
        job = f"decode_attention {rows} rows of {rows // group} x {prompt} + {own} keys"
        return Case(job, forms, bytes=prompts.nbytes + responses.nbytes, tiny=True)

    found = [lambda b=b: selective(b) for b in (False, True)] + [lambda b=b: linear(b) for b in (False, True)]
    found += [lambda p=p, n=n: sampling(p, n) for n in ((8, 128) if gpu else (64,)) for p in (1.0, 0.9)]
    found += [advantage, loss]
    found += [lambda d=d: decoding(*d) for d in (GPU_DECODING if gpu else CPU_DECODING)]
    return found + ([in_place_backward, linear_backward] if gpu else [])
