"""Attention of decoding: every row has one query token and looks at several parts of keys, merged by log-sum-exp.

A part whose keys several rows share, such as the prompt of a group, is stored once and read once for all of them:

    prompts = Part(prompt_keys, prompt_values, prompt_lengths, Places(prompt_of_row, count, device))
    own = Part(keys, values, lengths)  # row r looks at place r
    out = decode_attention(query, [prompts, own])

With query q, head size D, and s_j = scale q.k_j of the keys j of one part, a part leaves m = max s_j, the sum
S = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j. The softmax over all parts together is then
sum_p exp(m_p - M) o_p / sum_p exp(m_p - M) S_p with M = max m_p.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch

from kernels.dispatch import use_triton
from kernels.parts import Part


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
    scaled = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
    found = [part for part in (attended(scaled, part) for part in parts) if part]
    if not found:
        return torch.zeros_like(scaled, dtype=query.dtype)
    sums, _ = reduce(merged, found)
    # The largest weight of a row is exp(0), so that only rows without keys have a sum below 1.
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1)).view(query.shape).to(query.dtype)


Sums = tuple[torch.Tensor, torch.Tensor]  # o and S side by side (R, Hkv, rep, D + 1), m (R, Hkv, rep, 1)


def merged(one: Sums, other: Sums) -> Sums:
    top = torch.maximum(one[1], other[1])
    weight, weight_of_other = (one[1] - top).exp_(), (other[1] - top).exp_()
    return torch.addcmul(one[0] * weight, other[0], weight_of_other), top


def attended(scaled: torch.Tensor, part: Part) -> Sums | None:
    """What one part leaves for scaled queries (R, Hq, D); None if it has no key."""
    places, heads = part.places, part.keys.shape[1]
    queries = scaled.unflatten(1, (heads, -1))  # (R, Hkv, rep, D)
    rep, size = queries.shape[2], len(queries)
    if places is not None:
        size, group = places.members.shape
        queries = queries.index_select(0, places.members.flatten()).unflatten(0, (size, group)).transpose(1, 2)
    lengths = part.lengths[:size].tolist()
    if not (longest := max(lengths, default=0)):
        return None
    # As three dimensions: matmul would first find out that it is a bmm.
    keys, values = (t[:size, :, :longest].flatten(0, 1).to(scaled.dtype) for t in (part.keys, part.values))
    weights = torch.bmm(queries.reshape(size * heads, -1, scaled.shape[-1]), keys.mT)  # (n Hkv, G rep, longest)
    if min(lengths) < longest:
        unused = beyond(part.lengths[:size], longest)[:, None, None]
        weights.unflatten(0, (size, heads)).masked_fill_(unused, -math.inf)
    top = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)  # -inf - -inf would be nan
    weights.sub_(top).exp_()
    found = torch.cat([torch.bmm(weights, values), weights.sum(-1, keepdim=True), top], -1)
    if places is None:
        found = found.unflatten(0, (size, heads))
    else:
        found = found.view(size, heads, group, rep, -1).transpose(1, 2).flatten(0, 1).index_select(0, places.slot)
        if places.idle is not None:
            found[places.idle] = found.new_tensor([0.0] * (found.shape[-1] - 1) + [torch.finfo(found.dtype).min])
    return found[..., :-1], found[..., -1:]


def beyond(lengths: torch.Tensor, room: int) -> torch.Tensor:
    """(n, room): whether a token's place is behind those in use."""
    return torch.arange(room, device=lengths.device) >= lengths[:, None]


def cleared(part: Part) -> Part:
    """The part with 0 for all values that are not in use."""
    unused = beyond(part.lengths, part.values.shape[2])[:, None, :, None]
    return Part(part.keys, part.values.masked_fill(unused, 0.0), part.lengths, part.places)
