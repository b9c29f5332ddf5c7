"""The model's attention, under one name in transformers: packed rows, pictures' windows, and plain forward passes.

Every layer of the language model calls `attend`. Given a layout (a keyword that `Policy.hidden` hands down), it is the
layout that computes; here are those of packed rows, `[prompt | y_1 | ... | y_G]` one behind the other in one sequence
without padding, each response seeing its prompt and itself:

    Varlen    bf16 and fp16 on a GPU: one variable-length call of flash attention
    Padded    elsewhere: two calls of `scaled_dot_product_attention`, of all prompts and of all responses

Without one it is transformers' own `sdpa`, so that `model.generate()` and any forward of a user's own stay what they
are. The vision tower's layers call `attend_windows`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from upt.errors import PolicyError

NAME, WINDOWS = "upt", "upt_flash"
HALF = (torch.bfloat16, torch.float16)
SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11

Span = tuple[int, int]  # the first place in a sequence, and the one behind the last


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    """Attention of one layer: query (B, Hq, L, D), key and value of Hkv heads; ((B, L, Hq, D), None).

    With a layout, `layout(layer, query, key, value, scaling)` decides who sees whom, and key and value are what the
    cache's `update` has answered, if there is a cache. Without, the mask does.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return layout(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model) -> None:
    """Have the layers of a transformers model call `attend`."""
    model.set_attn_implementation(NAME)
    # cuDNN's attention plans anew for every length, at decoding every token, and its backward pass with a mask has
    # given NaN on an H100 (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)


# ------------------------------------------------------------------------------------------------ pictures


def attend_windows(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
    """Attention of a picture's patches within their window: query, key, value (1, H, N, D); ((1, N, H, D), None).

    The windows of all pictures lie one behind the other, cut at `cu_seq_lens_q`, the longest of `max_length_q` patches.
    """
    if query.is_cuda and query.dtype in HALF:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (N, H, D)
        cuts = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen(query, key, value, *cuts, scaling, causal=False)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    windows = [x.split(lengths, 2) for x in (query, key, value)]  # each (1, H, n, D)
    found = [None] * len(lengths)
    for length in sorted({*lengths}):
        same = [i for i, n in enumerate(lengths) if n == length]
        of = (torch.cat([x[i] for i in same]) for x in windows)  # (W, H, n, D)
        outs = scaled_dot_product_attention(*of, scale=scaling).transpose(1, 2)  # (W, n, H, D)
        for i, out in zip(same, outs, strict=True):
            found[i] = out
    return torch.cat(found)[None], None


AttentionInterface.register(WINDOWS, attend_windows)


def install_windows(visual) -> None:
    """Have the layers of a Qwen model's vision tower call `attend_windows`, once each.

    Transformers loops over the windows unless the attention's name has "flash" in it, and its public way of naming one
    looks such a name up among packages to install. Raises PolicyError where the tower does not take the name.
    """
    visual.config._attn_implementation = WINDOWS
    used = {module.config._attn_implementation for module in visual.modules() if hasattr(module, "config")}
    if used != {WINDOWS} or not is_flash_attention_requested(visual.config):
        raise PolicyError(
            f"transformers {transformers.__version__} does not let the vision tower's attention be named (it uses "
            f"{', '.join(map(str, used))}); install one of the range in requirements.txt"
        )


# ------------------------------------------------------------------------------------------------ gathering rows


@dataclass
class Gather:
    """Rows of a tensor by an index in which rows may be there several times, and -1 stands for padding.

    Autograd's own backward pass of such an index adds with threads or atomics in a race, so that rounding changes from
    run to run. Here `copies` holds, for every number of copies c that there is, the n rows that are there c times and
    the places (n, c) of their copies, and the backward pass sums over the second axis, half types in float32.
    """

    index: torch.Tensor  # (M,)
    copies: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, index: torch.Tensor) -> "Gather":
        order = index.argsort(stable=True)
        order = order[index[order] >= 0]
        rows, counts = index[order].unique_consecutive(return_counts=True)
        several = counts.repeat_interleave(counts)
        copies = [(rows[counts == c], order[several == c].view(-1, c)) for c in counts.unique().tolist()]
        return cls(index.clamp(min=0), copies)

    def to(self, device: torch.device) -> "Gather":
        index, *flat = transfer([self.index, *(part for pair in self.copies for part in pair)], device)
        return Gather(index, [*zip(flat[::2], flat[1::2], strict=True)])

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (M, ...)."""
        return _Gathered.apply(rows, self)


def transfer(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one type on a device, as views of one transfer that the host does not wait for."""
    if device.type == "cpu":
        return list(parts)
    flat = torch.cat([part.flatten() for part in parts]).pin_memory().to(device, non_blocking=True)
    views = flat.split([part.numel() for part in parts])
    return [view.view(part.shape) for view, part in zip(views, parts, strict=True)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gather):
        ctx.gather, ctx.size = gather, len(rows)
        return rows.index_select(0, gather.index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exact = torch.float32 if grad.dtype in HALF else grad.dtype
        total = grad.new_zeros(ctx.size, *grad.shape[1:])
        for rows, places in ctx.gather.copies:
            found = grad.index_select(0, places.flatten()).unflatten(0, places.shape)
            total.index_copy_(0, rows, found.sum(1, dtype=exact).to(grad.dtype))
        return total, None


# ------------------------------------------------------------------------------------------------ packed rows


def packed(
    prompts: Sequence[Span], responses: Sequence[Sequence[Span]], device: torch.device, dtype: torch.dtype
) -> "Varlen | Padded":
    """The layout of rows in one sequence: prompts[b] and responses[b] are the places of row b's prompt and responses.

    Responses without a place are left out. All places from 0 on belong to one of them, in this order.
    """
    if device.type != "cuda" or dtype not in HALF:
        return Padded(prompts, responses, device)
    check_varlen(device)
    return Varlen(prompts, responses, device)


class Varlen:
    """Sequences `prompt` and `prompt + y_i` of keys behind each other, to which the queries are laid as they stand."""

    def __init__(self, prompts: Sequence[Span], responses: Sequence[Sequence[Span]], device: torch.device):
        queries, keys, index = [0], [0], []
        self.longest_query = self.longest_key = 0
        for prompt, several in zip(prompts, responses, strict=True):
            for own in (prompt, *(span for span in several if span[0] < span[1])):
                index += range(*prompt)
                index += range(*own) if own is not prompt else ()
                queries.append(own[1])
                keys.append(len(index))
                self.longest_query = max(self.longest_query, own[1] - own[0])
                self.longest_key = max(self.longest_key, keys[-1] - keys[-2])
        self.gather = Gather.of(torch.tensor(index)).to(device)
        self.queries, self.keys = transfer([torch.tensor(cut, dtype=torch.int32) for cut in (queries, keys)], device)

    def __call__(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """query (1, Hq, N, D), key and value (1, Hkv, N, D) to (1, N, Hq, D)."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (N, H, D)
        cuts = (self.queries, self.keys, self.longest_query, self.longest_key)
        return varlen(query.contiguous(), self.gather(key), self.gather(value), *cuts, scaling, causal=True)[None]


def varlen(query, key, value, queries, keys, longest_query, longest_key, scaling, causal: bool) -> torch.Tensor:
    """Flash attention of sequences behind each other: query (N, Hq, D), key and value (M, Hkv, D) to (N, Hq, D).

    `queries` and `keys` (int32) are where the sequences start and end. With `causal` the last query of a sequence sees
    all its keys, the one before it all but the last, and so on.
    """
    heads = {"enable_gqa": True}
    if not SHARES_HEADS:
        repeat, heads = query.shape[1] // key.shape[1], {}
        key, value = (states.repeat_interleave(repeat, 1) for states in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(
        query, key, value, queries, keys, longest_query, longest_key, scale=scaling, window_size=window, **heads
    )


@lru_cache
def check_varlen(device: torch.device) -> None:
    """Raise PolicyError unless the device's flash attention gives what `Padded` gives, where queries are fewer."""
    draw = torch.Generator().manual_seed(0)
    prompts, responses = [(0, 5), (9, 12)], [[(5, 8), (8, 9)], [(12, 14)]]
    states = [torch.randn(1, heads, 14, 64, generator=draw).bfloat16() for heads in (4, 2, 2, 4)]
    found = []
    for kind, dtype in ((Varlen, torch.bfloat16), (Padded, torch.float32)):
        *inputs, weight = (x.to(device, dtype) for x in states)
        inputs = [x.requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = kind(prompts, responses, device)(0, *inputs, scaling=0.125)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, weight.transpose(1, 2))])
    worst = max((ours - exact).abs().max().item() for ours, exact in zip(*found, strict=True))
    if not worst < 0.05:  # bf16 is off by 0.01, another alignment by 1
        raise PolicyError(
            f"flash attention of torch {torch.__version__} on {device} is off by {worst:.2g} for fewer queries than "
            "keys; install another torch of the range in requirements.txt, or give --dtype fp32"
        )


class Padded:
    """Prompts padded to (B, P), and responses to (R, T) with the keys of their prompts before their own.

    Each is padded with others of up to twice its length only, and these are one call.
    """

    def __init__(self, prompts: Sequence[Span], responses: Sequence[Sequence[Span]], device: torch.device):
        nothing = (0, 0)
        pairs = [(nothing, prompt) for prompt in prompts]  # of each sequence what it sees before itself, and itself
        pairs += [(prompt, own) for prompt, several in zip(prompts, responses, strict=True) for own in several]
        parts = {}
        for before, (start, end) in pairs:
            if start < end:
                kind = (before == nothing, (end - start).bit_length())
                parts.setdefault(kind, []).append((before, (start, end)))
        self.calls, queries, keys = [], [], []  # of each call the sizes, and the mask: none where causal says it all
        for part in parts.values():
            before, own = (_padded(spans) for spans in zip(*part, strict=True))  # (R, P), (R, T)
            (R, P), T = before.shape, own.shape[1]
            queries.append(own.flatten())
            keys.append(torch.cat([before, own], 1).flatten())
            seen = (before >= 0)[:, None].expand(-1, T, -1)
            causal = torch.ones(T, T, dtype=torch.bool).tril().expand(R, -1, -1)
            mask = torch.cat([seen, causal], 2)[:, None].to(device) if P else None  # (R, 1, T, P + T)
            self.calls.append((R, T, P + T, mask))
        queries = torch.cat(queries)
        places = (queries >= 0).nonzero()[:, 0]
        back = places[queries[places].argsort()]  # where the sequence's places lie in the padded ones
        self.queries, self.keys, self.back = (Gather.of(index).to(device) for index in (queries, torch.cat(keys), back))

    def __call__(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """query (1, Hq, N, D), key and value (1, Hkv, N, D) to (1, N, Hq, D)."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (N, H, D)
        queries = self.queries(query).split([R * T for R, T, *_ in self.calls])
        keys, values = (self.keys(x).split([R * S for R, _, S, _ in self.calls]) for x in (key, value))
        found = []
        for (R, T, S, mask), *states in zip(self.calls, queries, keys, values, strict=True):
            q, k, v = (x.unflatten(0, (R, n)).transpose(1, 2) for x, n in zip(states, (T, S, S), strict=True))
            if q.is_cuda:  # of fewer heads and with a mask, it has only a kernel that stores all scores
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            causal = mask is None
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=True)
            found.append(out.transpose(1, 2).flatten(0, 1))
        return self.back(torch.cat(found))[None]


def _padded(spans: Sequence[Span]) -> torch.Tensor:
    """The places of spans as (len(spans), longest), with -1 behind them."""
    places = torch.full((len(spans), max(end - start for start, end in spans)), -1)
    for row, (start, end) in zip(places, spans, strict=True):
        row[: end - start] = torch.arange(start, end)
    return places
