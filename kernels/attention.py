"""Attention of decoding: every row has one query token and looks at several parts of keys, merged by log-sum-exp.

A part whose keys several rows share, such as the prompt of a group, is stored once and read once for all of them:

    prompts = Part(prompt_keys, prompt_values, prompt_lengths, Places(prompt_of_row, count, device))
    own = Part(keys, values, lengths)  # row r looks at place r
    out = decode_attention(query, [prompts, own])

With query q and s_j = scale q.k_j of the keys j of one part, a part leaves its own attention o_p and the log-sum-exp
l_p = log sum_j exp(s_j). The attention to all parts is then sum_p exp(l_p - l) o_p with l = log sum_p exp(l_p).
"""

import math
from collections.abc import Sequence

import torch

from kernels.dispatch import use_triton
from kernels.parts import Part

FEW = 8  # queries of one place below which single products are faster than the fused function


@torch.no_grad()
def decode_attention(query: torch.Tensor, parts: Sequence[Part], scale: float | None = None) -> torch.Tensor:
    """softmax(scale query.keys) values over the keys of all parts that a row looks at: (R, Hq, D) in query's type.

    query (R, Hq, D) of any strides, in bf16, fp16, fp32 or fp64 as the keys and values; Hq is a multiple of Hkv, and
    query head h reads key head h // (Hq / Hkv). `scale` is D^-1/2 unless given. Sums are in float32, in float64 for
    float64. A row without keys gives 0. No gradient. In Triton nothing is read on the host and all shapes come from
    those of the arguments, so that a CUDA graph can capture the call. Raises ValueError when shapes or types disagree.
    """
    rows, heads, dim = query.shape
    if not parts:
        raise ValueError("expected at least one part of keys")
    for part in parts:
        count, kv_heads, _, width = part.keys.shape
        known = part.places.count == count and len(part.places.of_row) == rows if part.places else count >= rows
        if not known or width != dim or heads % kv_heads or part.keys.shape != part.values.shape:
            raise ValueError(
                f"a part of keys {tuple(part.keys.shape)} and values {tuple(part.values.shape)} does not fit "
                f"queries {tuple(query.shape)} or its places; see Part"
            )
        if part.lengths.shape != (count,) or not query.dtype == part.keys.dtype == part.values.dtype:
            raise ValueError(
                f"expected ({count},) lengths and one type of queries, keys and values, not "
                f"{tuple(part.lengths.shape)}; {query.dtype}, {part.keys.dtype}, {part.values.dtype}"
            )
    scale = dim**-0.5 if scale is None else scale
    if use_triton(query):
        from kernels import attention_triton

        return attention_triton.decode_attention(query, parts, scale)
    out = reference(query, parts, scale)
    if math.isnan(out.sum()):  # 0 times a nan beyond a length; rare, and looking is cheaper than clearing every time
        out = reference(query, [cleared(part) for part in parts], scale)
    return out


def reference(query: torch.Tensor, parts: Sequence[Part], scale: float) -> torch.Tensor:
    """As `decode_attention`, where no value beyond a length is nan or infinite."""
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    found = [part for part in (attended(wide, part, scale) for part in parts) if part]
    if not found:
        return torch.zeros_like(wide, dtype=query.dtype)
    out, lse = found[0]
    for other, lse_of_other in found[1:]:
        out = torch.lerp(out, other, torch.sigmoid(lse_of_other - lse))
        lse = torch.logaddexp(lse, lse_of_other)
    return out.view(query.shape).to(query.dtype)


def attended(query: torch.Tensor, part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The attention to one part alone for queries (R, Hq, D), and its log-sum-exp: (R, Hkv, rep, D), (R, Hkv, rep, 1).

    A row without keys in this part has 0 and the smallest number. None if there is no key at all.
    """
    places, heads = part.places, part.keys.shape[1]
    queries = query.unflatten(1, (heads, -1))  # (R, Hkv, rep, D)
    rep, size = queries.shape[2], len(queries)
    if places is not None:
        members, slots, idle = places.grouped
        size, group = members.shape
        queries = queries.index_select(0, members.flatten()).unflatten(0, (size, group))
        queries = queries.transpose(1, 2).flatten(2, 3)  # (n, Hkv, G rep, D)
    lengths = part.lengths[:size].tolist()
    if not (longest := max(lengths, default=0)):
        return None
    mask, least = None, torch.finfo(query.dtype).min
    if (shortest := min(lengths)) < longest:
        unused = beyond(part.lengths[:size].clamp(min=1), longest)  # a softmax over nothing would be nan
        mask = query.new_zeros(unused.shape).masked_fill_(unused, -math.inf)[:, None, None]
    keys, values = (t[:size, :, :longest].to(query.dtype) for t in (part.keys, part.values))
    out, lse = softmax_sums(queries, keys, values, mask, scale)
    if not shortest:
        empty = (part.lengths[:size] == 0)[:, None, None, None]
        out, lse = out.masked_fill(empty, 0.0), lse.masked_fill(empty, least)
    if places is not None:
        out, lse = (
            found.unflatten(2, (group, rep)).transpose(1, 2).flatten(0, 1).index_select(0, slots)
            for found in (out, lse)
        )
        if idle is not None:
            out[idle], lse[idle] = 0.0, least
    return out, lse


def softmax_sums(query, keys, values, mask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (n, H, M, D) to keys and values (n, H, L, D), and its log-sum-exp (n, H, M, 1).

    mask (n, 1, 1, L) is added to the scores. For many queries on a CPU it is the function behind torch's
    scaled_dot_product_attention, called by itself because that keeps the log-sum-exp.
    """
    if query.shape[2] >= FEW and query.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse[..., None]
    count, heads = query.shape[:2]
    query, keys, values = (states.flatten(0, 1) for states in (query, keys, values))  # as a matmul would find out
    scores = torch.bmm(query * scale, keys.mT).unflatten(0, (count, heads))
    scores = scores if mask is None else scores.add_(mask)
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.bmm(scores.sub_(lse).exp_().flatten(0, 1), values)
    return out.unflatten(0, (count, heads)), lse


def beyond(lengths: torch.Tensor, room: int) -> torch.Tensor:
    """(n, room): whether a token's place is behind those in use."""
    return torch.arange(room, device=lengths.device) >= lengths[:, None]


def cleared(part: Part) -> Part:
    """The part with 0 for all that is not in use."""
    unused = beyond(part.lengths, part.values.shape[2])[:, None, :, None]
    keys, values = (states.masked_fill(unused, 0.0) for states in (part.keys, part.values))
    return Part(keys, values, part.lengths, part.places)
