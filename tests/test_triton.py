"""The Triton kernels against float64, on random shapes, types and strides, in poisoned and guarded memory.

Without a GPU they run in Triton's interpreter and are compiled, but not run, for sm_80 and sm_90.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import train_upt
from kernels import (
    group_advantage,
    grpo_loss,
    linear_logprob,
    logprob_triton,
    loss_triton,
    row_id,
    sample,
    sampling_triton,
    selective_log_softmax,
)
from kernels import sampling as reference_sampling
from kernels.advantage import ADVANTAGES
from kernels.dispatch import use_triton
from tests.guards import GUARD, Bounded, Guarded, checks
from tests.test_train import SMALL
from upt.groups import shards

DTYPES = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # relative rounding of a stored value


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setenv("UPT_KERNELS", "triton")
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the kernels run there, elsewhere in the interpreter")
    if request.param == "interpreter":
        Bounded(monkeypatch)
    for module in ("logprob_triton", "sampling_triton"):  # several blocks in small shapes
        monkeypatch.setattr(importlib.import_module(f"kernels.{module}"), "BLOCK", 128)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def guarded(monkeypatch):
    return Guarded(monkeypatch)


def surrounded(values: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of values (N, V) with nan on all sides, of the strides that `layout` names; and all of the memory."""
    rows, columns = values.shape
    if layout == "transposed":
        whole, inner = surrounded(values.T, "wide")[::-1]
        return inner.T, whole
    step = 3 if layout == "strided" else 1
    whole = torch.full((rows + 2, step * columns + GUARD), float("nan"), dtype=values.dtype, device=values.device)
    inner = whole[1:-1, 5 : 5 + step * columns : step] if layout != "tight" else whole.flatten()[7 : 7 + rows * columns]
    inner = inner if layout != "tight" else inner.view(rows, columns)
    inner.copy_(values)
    return inner, whole


@st.composite
def logit_cases(draw):
    rows, size = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 5, 127, 128, 129, 257, 300, 385]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logits = torch.randn(rows, size, generator=generator) * draw(st.sampled_from([0.1, 1.0, 20.0, 1e4]))
    dtype = draw(st.sampled_from([*DTYPES]))
    masked = torch.rand(rows, size, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    masked[:, : draw(st.sampled_from([0, 130]))] = True  # a whole block
    logits[masked] = draw(st.sampled_from([float("-inf"), torch.finfo(dtype).min]))  # either is in use
    logits[:, draw(st.integers(0, size - 1))] = 0.5  # no row is masked whole
    ids = torch.randint(size, (rows,), generator=generator)
    ids[0] = logits[0].argmax()
    grad = torch.randn(rows, generator=generator)
    grad[-1] = draw(st.sampled_from([0.0, 1.0]))
    logits = logits.to(dtype)
    layout = draw(st.sampled_from(["tight", "wide", "strided", "transposed"]))
    return logits, ids, grad, draw(st.sampled_from([1.0, 0.7, 2.5])), layout


def in_float64(logits, ids, temperature):
    """log p at ids, entropy, logsumexp, mean; logits in float64. A sum beyond float32 is -inf."""
    z = logits / temperature
    logp = z.log_softmax(-1)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    mean = logits.sum(-1).float().double() / (logits.shape[1] * temperature)
    return logp.gather(1, ids[:, None])[:, 0], entropy, z.logsumexp(-1), mean


def assert_close(found, expected, rounding=0.0, atol=2e-5):
    expected = expected.float().double()  # what float32 can hold: a mask of its minimum over T < 1 is -inf there
    torch.testing.assert_close(found.double(), expected, rtol=3e-6 + rounding, atol=atol)


# ------------------------------------------------------------------------------------------ selective_log_softmax


@given(case=logit_cases(), in_place=st.booleans())
@checks
def test_selective_log_softmax(device, guarded, case, in_place):
    logits, ids, grad, temperature, layout = case
    rounding = DTYPES[logits.dtype]
    exact = logits.double().requires_grad_()
    expected = in_float64(exact, ids, temperature)
    (slope,) = torch.autograd.grad(expected[0], exact, grad.double())
    inner, whole = surrounded(logits.to(device), layout)
    before = whole.clone()
    mine, ids = inner.detach().requires_grad_(), ids.to(device)
    found = selective_log_softmax(mine, ids, temperature, in_place, statistics=True)
    assert all(value.dtype == torch.float32 for value in found) and not any(v.requires_grad for v in found[1:])
    for value, wanted in zip(found, expected, strict=True):
        assert_close(value.detach().cpu(), wanted.detach())
    assert torch.equal(whole.nan_to_num(9.0), before.nan_to_num(9.0))  # the forward pass changes no logit
    (gradient,) = torch.autograd.grad(found[0], mine, grad.to(device))
    assert gradient.dtype == logits.dtype
    assert_close(gradient.cpu(), slope.masked_fill(slope.isnan(), 0.0), rounding, atol=2e-6 + 2.0**-24 * (rounding > 0))
    if in_place:
        assert gradient.data_ptr() == inner.data_ptr()
        inner.fill_(float("nan"))  # all that was written, then, was written inside
        assert whole.isnan().all()
    else:
        assert torch.equal(whole.nan_to_num(9.0), before.nan_to_num(9.0))
    guarded.check()


def test_shipped_blocks(device, monkeypatch):
    monkeypatch.setattr(logprob_triton, "BLOCK", 4096)
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5001, device=device).mul_(3), torch.tensor([5000, 17], device=device)
    logits[:, 5000] = 9.0  # the last value, in the second block, is one that counts
    mine = logits.clone().requires_grad_()
    logprob, entropy = selective_log_softmax(mine, ids)
    logprob.sum().backward()
    exact = logits.double().requires_grad_()
    expected = in_float64(exact, ids, 1.0)
    expected[0].sum().backward()
    assert_close(logprob.detach(), expected[0].detach())
    assert_close(entropy, expected[1].detach())
    assert_close(mine.grad, exact.grad, atol=1e-7)
    assert mine.grad.sum(1).abs().max() < 1e-5  # onehot - p: the parts of every row of a softmax's gradient cancel
    assert mine.grad.argmax(1).tolist() == ids.tolist()  # and only the token that was taken has a positive one


@pytest.mark.parametrize("size", [127, 128, 129, 255, 257])
def test_all_values_at_the_edge_of_a_block(device, size):
    logits, ids = torch.randn(2, size, generator=torch.Generator().manual_seed(0)), torch.tensor([0, size - 1])
    ids[1] = min(127, size - 1)  # the last of the first block
    mine, exact = logits.to(device).requires_grad_(), logits.double().requires_grad_()
    found, expected = selective_log_softmax(mine, ids.to(device), statistics=True), in_float64(exact, ids, 1.0)
    for value, wanted in zip(found, expected, strict=True):
        assert_close(value.detach().cpu(), wanted.detach())
    (gradient,), (slope,) = torch.autograd.grad(found[0].sum(), mine), torch.autograd.grad(expected[0].sum(), exact)
    assert_close(gradient.cpu(), slope)
    assert (gradient > 0).nonzero().tolist() == [[0, 0], [1, int(ids[1])]]  # onehot - p: positive at the tokens alone
    assert (gradient < 0).sum().item() == 2 * (size - 1)  # and negative at all others, on both sides of an edge


def test_a_second_backward_over_overwritten_logits_is_refused(device):
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    logprob, _ = selective_log_softmax(logits * 1, torch.tensor([1, 2], device=device), in_place=True)
    logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        logprob.sum().backward()


def test_an_id_outside_the_vocabulary_reads_nothing_and_gives_nan(device):
    """On a GPU nobody waits to look at the ids."""
    logits, ids = torch.randn(4, 9, device=device), torch.tensor([-1, 0, 8, 9], device=device)
    found = logprob_triton.rows(logits, ids, 1.0, None)
    assert found.logprob.isnan().tolist() == [True, False, False, True]


def test_who_else_needs_overwritten_logits_is_told(device):
    logits = torch.randn(1, 5, device=device, requires_grad=True)
    shifted = logits.exp()  # exp's gradient needs its result
    logprob, _ = selective_log_softmax(shifted, torch.tensor([2], device=device), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_what_has_no_value_is_nan(device):
    logits = torch.zeros(3, 9, device=device)
    logits[0], logits[1, 3] = float("-inf"), float("nan")
    logprob, entropy = selective_log_softmax(logits, torch.tensor([1, 2, 3], device=device))
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------ linear_logprob


@given(
    rows=st.integers(1, 9), width=st.integers(1, 40), size=st.sampled_from([2, 127, 128, 129, 300]),
    seed=st.integers(0, 99), dtype=st.sampled_from([*DTYPES]), temperature=st.sampled_from([1.0, 0.6]),
    chunk=st.sampled_from([None, 1, 4]), some=st.booleans(),
)  # fmt: skip
@checks
def test_linear_logprob(device, guarded, rows, width, size, seed, dtype, temperature, chunk, some):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width), torch.randn(size, width) / width**0.5
    hidden, weight, ids, grad = hidden.to(dtype), weight.to(dtype), torch.randint(size, (rows,)), torch.randn(rows)
    needs = torch.rand(rows) < 0.5 if some else None
    exact = hidden.double().requires_grad_()
    expected = in_float64(exact @ weight.double().T, ids, temperature)
    (slope,) = torch.autograd.grad(expected[0], exact, grad.double())
    mine, weight, ids = hidden.to(device).requires_grad_(), weight.to(device), ids.to(device)
    needs = None if needs is None else needs.to(device)
    logprob, entropy = linear_logprob(mine, weight, ids, temperature, chunk, needs)
    rounding = DTYPES[dtype]
    assert_close(logprob.detach().cpu(), expected[0].detach())
    assert_close(entropy.cpu(), expected[1].detach())
    (gradient,) = torch.autograd.grad(logprob, mine, grad.to(device))
    slope = slope if needs is None else slope * needs.cpu()[:, None]
    assert (gradient.cpu().double() - slope).norm() <= (1e-5 + 4 * rounding) * slope.norm() + 1e-5
    if not some:
        with torch.no_grad():
            again, _ = linear_logprob(mine, weight, ids, temperature, chunk)
        assert torch.equal(again, logprob)  # one numeric path for old, new and reference log-probabilities
    guarded.check()


def test_lengths_that_do_not_fit_touch_nothing_else(device, guarded):
    # On a GPU their sum is not looked at. Here the check is passed by, to see what the kernel does with them.
    x, advantage = torch.zeros(6, device=device).requires_grad_(), torch.ones(2, device=device)
    settings_ = ("token", None, 0.2, 0.2, 0.0, "token", 0.0, "k3")
    for lengths in ([2, 1], [7, -1], [-3, 9], [4, 9]):
        given_ = torch.tensor(lengths, device=device)
        loss, _ = loss_triton.grpo_loss(x, x.detach(), advantage, None, None, given_, None, *settings_)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all() and loss.isfinite()
    guarded.check()


@given(case=logit_cases(), narrow=st.sampled_from([*DTYPES]))
@checks
def test_the_gradient_takes_the_place_of_the_logits(device, case, narrow):
    logits, ids, _, temperature, _ = case
    size = logits.shape[1]
    exact = logits.double().requires_grad_()
    (slope,) = torch.autograd.grad(in_float64(exact, ids, temperature)[0].sum(), exact)
    whole = torch.full((len(logits) + 2, size), float("nan"), device=device)
    whole[1:-1] = logits.float()
    replaced = whole[1:-1].view(narrow)[:, :size]
    rest = whole[1:-1].view(narrow)[:, size:].clone()
    found = logprob_triton.rows(whole[1:-1], ids.to(device), temperature, replaced)
    gradient = (replaced.float() * found.factor[:, None]).cpu()
    assert_close(
        gradient,
        slope.masked_fill(slope.isnan(), 0.0),
        DTYPES[narrow],
        atol=2e-6 + 2.0**-24 * (narrow is not torch.float32),
    )
    assert whole[[0, -1]].isnan().all()
    assert torch.equal(whole[1:-1].view(narrow)[:, size:].view(torch.uint8), rest.view(torch.uint8))


# ----------------------------------------------------------------------------------------------- group_advantage


@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=7), seed=st.integers(0, 99), dense=st.booleans(),
    offset=st.sampled_from([0.0, 3.0]), estimator=st.sampled_from([*ADVANTAGES]),
)  # fmt: skip
@checks
def test_group_advantage(device, guarded, sizes, seed, dense, offset, estimator):
    torch.manual_seed(seed)
    if dense:
        rewards, ids = torch.rand(len(sizes), sizes[0], dtype=torch.float64), None
        rewards[:, 0], rewards[:, -1] = 0.0, 0.1
    else:
        ids = torch.cat([torch.full((size,), -7 * i) for i, size in enumerate(sizes)])  # 0 is one of them
        ids = ids[torch.randperm(len(ids))]
        rewards = torch.rand(len(ids), dtype=torch.float64)
        for name in ids.unique():
            members = (ids == name).nonzero()[:, 0]
            rewards[members[0]], rewards[members[-1]] = 0.0, 0.1
    rewards += offset
    expected = group_advantage(rewards, estimator, ids)  # float64: the reference
    found = group_advantage(rewards.float().to(device), estimator, None if ids is None else ids.to(device))
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-5, rtol=1e-5)
    guarded.check()


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_groups_without_signal(device, estimator):
    rewards = torch.full((3, 5), 0.1, device=device)
    expected = -torch.tensor(5.0).log() if estimator == "energy" else torch.tensor(0.0)
    found = group_advantage(rewards, estimator).cpu()
    assert torch.equal(found, expected.expand(3, 5)) or estimator == "energy"
    torch.testing.assert_close(found, expected.expand(3, 5))
    assert group_advantage(rewards[:, :1], estimator).tolist() == [[0.0]] * 3
    rewards[1, 2] = float("inf")
    assert group_advantage(rewards, estimator).isnan().any(1).tolist() == [False, True, False]


# ----------------------------------------------------------------------------------------------------- grpo_loss


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5), seed=st.integers(0, 99), packed=st.booleans(),
    masked=st.booleans(), per_token=st.booleans(), weighted=st.booleans(), reference=st.booleans(),
    aggregation=st.sampled_from(["token", "sequence", "dr-grpo"]), level=st.sampled_from(["token", "sequence"]),
    estimator=st.sampled_from(["k1", "k2", "k3"]), dual=st.sampled_from([0.0, 1.5]), far=st.sampled_from([1e-3, 1.0]),
)  # fmt: skip
@settings(checks, max_examples=60)
def test_grpo_loss(
    device, guarded, monkeypatch, lengths, seed, packed, masked, per_token, weighted, reference, aggregation, level,
    estimator, dual, far,
):  # fmt: skip
    monkeypatch.setattr(importlib.import_module("kernels.loss_triton"), "BLOCK", 16)
    torch.manual_seed(seed)
    count, longest = len(lengths), max(lengths) + 1
    size = torch.tensor(lengths)
    shape = (int(size.sum()),) if packed else (count, longest)
    logprob, difference, apart = -torch.rand(shape).double(), far * torch.randn(shape), far * torch.randn(shape)
    mask = (torch.rand(shape) < 0.8) if masked or not packed else None
    if not packed:
        mask &= torch.arange(longest) < size[:, None]
    parts = {
        "old_logprob": logprob + difference,
        "advantage": torch.randn(shape if per_token else count).double(),
        "ref_logprob": logprob + apart if reference else None,
        "weight": torch.rand(count).double() if weighted else None,
    }
    options = {
        "aggregation": aggregation, "max_length": 40, "ratio_level": level, "kl_estimator": estimator,
        "kl_coef": 0.3 if reference else 0.0,
        "dual_clip": dual, "clip_low": 0.2, "clip_high": 0.3, "lengths": size if packed else None,
    }  # fmt: skip
    exact = logprob.clone().requires_grad_()
    expected, sums = grpo_loss(exact, mask=mask, **parts, **options)
    (slope,) = torch.autograd.grad(3 * expected, exact)
    # The logs are far apart by less than float32 resolves: what reaches the kernel is their float32 values.
    if mask is not None:
        logprob[~mask] = float("nan")  # what is masked may hold anything
    flat = logprob.numel()
    mine = torch.full((flat + GUARD,), float("nan"), device=device)[:flat].view(shape).copy_(logprob).requires_grad_()
    there = {name: None if part is None else part.float().to(device) for name, part in parts.items()}
    options["lengths"] = size.to(device).repeat_interleave(2)[::2] if packed else None  # any strides
    loss, stats = grpo_loss(mine, mask=None if mask is None else mask.to(device), **there, **options)
    (gradient,) = torch.autograd.grad(3 * loss, mine)
    scale = max(1.0, float(sums["tokens"]))
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=1e-4, atol=2e-6)
    assert stats.keys() == sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(stats[name].cpu().double(), value.double(), rtol=1e-4, atol=1e-6 * scale)
    again, _ = grpo_loss(mine, mask=None if mask is None else mask.to(device), **there, **options)
    assert torch.equal(again, loss)
    guarded.check()


# -------------------------------------------------------------------------------------------------------- sample


@triton.jit
def noise_kernel(words, noise, key, position, low, high, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    drawn = sampling_triton.noise_words(key, 3 + tl.arange(0, BLOCK // 4), position, low, high)
    tl.store(words + at, drawn.to(tl.int64))
    tl.store(noise + at, sampling_triton.gumbel(drawn))


@pytest.mark.parametrize("seed", [0, -1, 123456789012345])
@pytest.mark.parametrize("key", [0, -1, 0x299F31D0A4093822])
def test_the_words_behind_the_noise_are_bit_equal(device, seed, key):
    words, noise = torch.empty(256, dtype=torch.int64, device=device), torch.empty(256, device=device)
    noise_kernel[(1,)](words, noise, key, 9, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, BLOCK=256)
    row = torch.tensor([key])
    expected = reference_sampling.noise_words(row, 9, 12 + 256, seed)[0, 12:]
    assert torch.equal(words.cpu(), expected)
    torch.testing.assert_close(noise.cpu(), reference_sampling.to_gumbel(expected), atol=1e-5, rtol=1e-6)


@triton.jit
def gumbel_kernel(words, noise, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(noise + at, sampling_triton.gumbel(tl.load(words + at).to(tl.uint32)))


def test_noise_at_the_ends(device):
    words = torch.tensor(
        [0, 1, 2, 1000, 2**20, 2**28 - 1, 2**28, 2**28 + 1, 2**31, 2**32 - 2**20, 2**32 - 2, 2**32 - 1]
    )
    words = torch.cat([words, torch.randint(2**32, (244,), generator=torch.Generator().manual_seed(0))])
    noise = torch.empty(256, device=device)
    gumbel_kernel[(1,)](words.to(device), noise, BLOCK=256)
    u = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    torch.testing.assert_close(noise.cpu().double(), exact, atol=2e-5, rtol=1e-5)


@given(
    case=logit_cases(), top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]), top_k=st.sampled_from([0, 1, 3, 50]),
    cold=st.booleans(), seed=st.integers(0, 2**40), position=st.integers(0, 3000), banned=st.sets(st.integers(0, 300)),
)  # fmt: skip
@settings(checks, max_examples=40)
def test_sample(device, guarded, case, top_p, top_k, cold, seed, position, banned):
    logits, _, _, temperature, layout = case
    temperature = 0.0 if cold else temperature
    banned = sorted(token for token in banned if token < logits.shape[1])[: min(3, logits.shape[1] - 1)]
    rows = torch.tensor([row_id(7, "u", i) for i in range(len(logits))])
    ways = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, position=position, banned=banned)
    inner, _ = surrounded(logits.to(device), layout)
    found = [part.cpu() for part in sample(inner, row_ids=rows.to(device), statistics=True, **ways)]
    guarded.check()
    z = logits.double() / (temperature or 1)
    allowed = z.index_fill(1, torch.tensor(banned, dtype=torch.long), float("-inf"))
    scores = allowed
    if temperature > 0:
        floor = reference_sampling.smallest_kept(allowed, top_p, top_k)
        scores = allowed.masked_fill(allowed < floor, float("-inf"))
        scores = scores + reference_sampling.gumbel(rows, position, z.shape[1], seed).double()
    if not torch.isneginf(allowed).all(1).any():
        token = found[0][:, None]
        assert allowed.gather(1, token).isfinite().all()  # nothing banned or impossible
        # The best score, but for ties within rounding: of the sum here, of the probabilities at the edge of top-p.
        chosen, best = scores.gather(1, token)[:, 0], scores.amax(1)
        tied = (best - chosen) <= 1e-5 * (1 + best.abs())
        p = allowed.softmax(-1)
        above = torch.where(allowed > allowed.gather(1, token), p, 0.0).sum(1)
        kept = torch.where(allowed >= reference_sampling.smallest_kept(allowed, 1.0, top_k), p, 0.0).sum(1)
        edge = (above / kept - top_p).abs() < 1e-5
        assert (tied | edge).all()
    exact = in_float64(logits.double(), found[0], temperature or 1.0)
    for value, wanted in zip(found[1:], (exact[0], exact[1], exact[2] - exact[3]), strict=True):
        assert_close(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 1), (1.0, 3), (1.0, 250), (0.9, 0), (0.5, 0), (0.8, 4)])
def test_the_smallest_logit_kept(device, dtype, top_p, top_k):
    logits = torch.randn(2, 257, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    logits[0, -1], logits[1, 0], logits[1, 128] = 9.0, 8.5, -0.0  # the likeliest is the last, the first
    banned = [int(logits[0, :-1].argmax()), 7]
    bits = sampling_triton.floors(logits.to(device), 0.7, top_p, top_k, banned).cpu()
    order = logits.float().view(torch.int32) ^ ((logits.float().view(torch.int32) >> 31) & 0x7FFFFFFF)
    allowed = logits.float().index_fill(1, torch.tensor(banned), float("-inf"))
    expected = allowed >= 0.7 * reference_sampling.smallest_kept(allowed / 0.7, top_p, top_k) - 1e-5
    assert torch.equal((order >= bits[:, None]) & allowed.isfinite(), expected & allowed.isfinite())


# ------------------------------------------------------------------------------------------- dispatch and machine code


def test_dispatch(monkeypatch):
    monkeypatch.delenv("UPT_KERNELS", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("UPT_KERNELS", "reference")
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("UPT_KERNELS", "triton")
    assert not use_triton(torch.zeros(1, dtype=torch.float64))
    if not torch.cuda.is_available():
        assert use_triton(torch.zeros(1))
    monkeypatch.setenv("UPT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="UPT_KERNELS is 'cuda', expected one of auto, triton, reference"):
        use_triton(torch.zeros(1))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def test_the_loop_runs_on_them(tiny, tmp_path, device, monkeypatch):
    """A step of training with the kernels samples the same tokens and makes the same update as with the references."""
    counted, homes = {}, {"rows": "logprob", "sample": "sampling", "floor": "sampling", "grpo": "loss"}
    for name, home in homes.items():
        module = importlib.import_module(f"kernels.{home}_triton")
        counted[name] = Counted(getattr(module, f"{name}_kernel"))
        monkeypatch.setattr(module, f"{name}_kernel", counted[name])
    settings = SMALL | {"questions_per_step": 2, "group_size": 2, "max_new_tokens": 6, "learning_rate": 1e-4}
    settings |= {"top_p": 0.9, "kl_coef": 0.1, "minibatches": 2, "steps": 1, "dtype": "fp32", "device": device}
    metrics, groups = {}, {}
    for way in ("triton", "reference"):
        monkeypatch.setenv("UPT_KERNELS", way)
        before = {name: kernel.launches for name, kernel in counted.items()}
        train_upt.main(train_upt.Config(model=tiny, out=tmp_path / way, **settings))
        used = {name for name, kernel in counted.items() if kernel.launches > before[name]}
        assert used == (set(counted) if way == "triton" else set())
        metrics[way] = json.loads((tmp_path / way / "metrics.jsonl").read_text())
        groups[way] = shards.read_shard(tmp_path / way / "rollouts" / "step-000000.jsonl")
    for mine, theirs in zip(*groups.values(), strict=True):
        for a, b in zip(mine["responses"], theirs["responses"], strict=True):
            assert a["token_ids"] == b["token_ids"]
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
            assert (a["entropy"], a["self_certainty"]) == pytest.approx((b["entropy"], b["self_certainty"]), abs=1e-4)
    for name in ("loss", "grad_norm", "kl", "ratio", "clip_low", "clip_high"):
        assert metrics["triton"][name] == pytest.approx(metrics["reference"][name], rel=1e-3, abs=1e-6), name
    assert metrics["triton"]["grad_norm"] > 0


def outside(code: str, **environment) -> subprocess.CompletedProcess:
    """Python code in a fresh process without the tests' choice of the interpreter."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "UPT_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU tensors")
def test_the_environment_variable_alone_chooses_the_interpreter():
    code = "import torch\nfrom kernels import group_advantage\nprint(group_advantage(torch.tensor([[0., 1.]]), 'mean'))"
    found = outside(code, UPT_KERNELS="triton")
    assert found.stdout.strip() == "tensor([[-0.5000,  0.5000]])", found.stderr
    late = outside("import triton\n" + code, UPT_KERNELS="triton")
    assert "set TRITON_INTERPRET=1 in the environment too" in late.stderr
    assert (
        "triton"
        not in outside("import sys, rewards\nprint([m for m in sys.modules if m in ('triton', 'torch')])").stdout
    )


def test_every_kernel_compiles_without_spilling():
    found = outside("from bench import compile\ncompile.main()")
    lines = found.stdout.strip().splitlines()
    assert lines and lines[-1].endswith(" variants, 0 with spilled registers"), found.stdout + found.stderr
    names = {line.split()[0].removesuffix("_kernel") for line in lines[2:-1]}
    assert names == {"rows", "replace", "gradient", "sample", "floor", "advantage", "grpo", "part", "merge"}
    print(found.stdout)
