"""The kernels against closed forms, worked out by hand: each case through the reference and through Triton."""

import math
from functools import partial
from itertools import product

import pytest
import torch

from kernels import (
    group_advantage,
    grpo_loss,
    kl_divergence,
    linear_logprob,
    response_weights,
    rollout_weights,
    row_id,
    sample,
    selective_log_softmax,
    sft_loss,
)
from kernels.sampling import gumbel, philox, to_gumbel

FULL = 0xFFFFFFFF


@pytest.fixture(params=["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where tensors are to live, with UPT_KERNELS set to what is under test."""
    gpu = torch.cuda.is_available()
    if request.param == "triton" and gpu or request.param == "cuda" and not gpu:
        pytest.skip("Triton runs on the GPU where there is one, elsewhere in its interpreter")
    monkeypatch.setenv("UPT_KERNELS", "reference" if request.param == "reference" else "triton")
    return "cuda" if request.param == "cuda" else "cpu"


# ------------------------------------------------------------------------------------------------ linear_logprob


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprob_and_its_gradient(chunk, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    weight, ids, scale = torch.randn(37, 16, dtype=torch.float64), torch.randint(37, (23,)), torch.randn(23)
    logprob, entropy = linear_logprob(hidden, weight, ids, temperature, chunk)
    expected = (hidden @ weight.T / temperature).log_softmax(-1)
    torch.testing.assert_close(logprob, expected.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    assert not entropy.requires_grad
    mine = torch.autograd.grad((scale * logprob).sum(), hidden)[0]
    theirs = torch.autograd.grad((scale * expected.gather(1, ids[:, None])[:, 0]).sum(), hidden)[0]
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_of_the_references(temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64)
    logits, ids = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (5,))
    assert torch.autograd.gradcheck(lambda h: linear_logprob(h, weight, ids, temperature, 2)[0], (hidden,))
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, ids, temperature)[0], (logits,))
    logprob, old, ref = (-torch.rand(3, 6, dtype=torch.float64) for _ in range(3))
    advantage, mask = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), torch.rand(3, 6) < 0.7
    for level, kl in product(("token", "sequence"), ("k1", "k2", "k3")):
        ways = {"ratio_level": level, "kl_coef": 0.3, "kl_estimator": kl, "dual_clip": 1.4}
        loss = partial(lambda ways, x: grpo_loss(x, old, advantage, mask, ref, **ways)[0], ways)
        assert torch.autograd.gradcheck(loss, (logprob.clone().requires_grad_(),))


def test_selective_log_softmax_of_three_tokens(device):
    # p = (1/2, 1/4, 1/4) at temperature 1; squared and normalised, (2/3, 1/6, 1/6), at temperature 1/2.
    logits = torch.tensor([[0.5, 0.25, 0.25]] * 2, device=device).log().requires_grad_()
    ids = torch.tensor([0, 2], device=device)
    for temperature, p in ((1.0, (1 / 2, 1 / 4, 1 / 4)), (0.5, (2 / 3, 1 / 6, 1 / 6))):
        logprob, entropy, logsumexp, mean = selective_log_softmax(logits, ids, temperature, statistics=True)
        assert logprob.tolist() == pytest.approx([math.log(p[0]), math.log(p[2])])
        assert entropy.tolist() == pytest.approx([-sum(q * math.log(q) for q in p)] * 2)
        assert logsumexp.tolist() == pytest.approx([math.log(3 / 8) if temperature == 0.5 else 0.0] * 2, abs=1e-6)
        assert mean.tolist() == pytest.approx([-5 / 3 * math.log(2) / temperature] * 2)
        (gradient,) = torch.autograd.grad((logprob * torch.tensor([2.0, 1.0], device=device)).sum(), logits)
        rows = [[2 * (1 - p[0]), -2 * p[1], -2 * p[2]], [-p[0], -p[1], 1 - p[2]]]
        torch.testing.assert_close(gradient.cpu(), torch.tensor(rows) / temperature)


def test_selective_log_softmax_at_the_ends(device):
    inf = float("inf")
    logits = torch.tensor([[1e4, -1e4, 1e4 - 1, -inf], [-inf, -1e4, -inf, -inf]], device=device, requires_grad=True)
    logprob, entropy = selective_log_softmax(logits, torch.tensor([2, 1], device=device))
    p = 1 / (1 + math.e)  # of the second of two logits one apart
    assert logprob.tolist() == pytest.approx([math.log(p), 0.0])
    assert entropy.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p), 0.0], abs=1e-7)
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[p - 1, 0, 1 - p, 0], [0.0, 0, 0, 0]]))


def test_overwriting_the_logits_gives_the_same_gradient(device):
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0)).to(device)
    ids, found = torch.tensor([1, 2, 3, 10], device=device), []
    for in_place in (False, True):
        mine = logits.clone().requires_grad_()
        selective_log_softmax(mine, ids, 0.7, in_place)[0].sum().backward()
        found.append(mine.grad.clone())
        assert torch.equal(mine.detach(), mine.grad if in_place else logits)
    assert torch.equal(*found)


def test_rows_without_a_gradient_skip_the_second_product(device, monkeypatch):
    rows, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: rows.append(a.shape) or real(a, b, **more))
    hidden, weight = torch.randn(6, 3, device=device, requires_grad=True), torch.randn(5, 3, device=device)
    ids = torch.arange(6, device=device) % 5
    needs = torch.tensor([True, False, False, True, False, True], device=device)
    part, _ = linear_logprob(hidden, weight, ids, needs_grad=needs)
    assert sorted(tuple(shape) for shape in rows) == [(3, 3), (3, 3), (3, 5)]
    whole, _ = linear_logprob(hidden, weight, ids)
    torch.testing.assert_close(part, whole)
    (mine,), (all_,) = torch.autograd.grad(part.sum(), hidden), torch.autograd.grad(whole.sum(), hidden)
    torch.testing.assert_close(mine, all_ * needs[:, None])
    rows.clear()
    with torch.no_grad():
        old, _ = linear_logprob(hidden, weight, ids)
    assert torch.equal(old, whole) and [tuple(shape) for shape in rows] == [(6, 3)]


def test_linear_logprob_keeps_its_gradient_near_certainty(device):
    # p(y) = 1 - 1e-9 or so: onehot - p must not cancel to zero.
    hidden = torch.tensor([[21.0, 0.0]], device=device, requires_grad=True)
    weight = torch.eye(2, device=device)
    logprob, _ = linear_logprob(hidden, weight, torch.tensor([0], device=device))
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[math.exp(-21), -math.exp(-21)]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_logprob_of_a_narrow_head(device, dtype, count):
    # Logits of about +-8: rounded to bf16 they would be off by 0.03. The head is taken in two parts on a CPU.
    torch.manual_seed(0)
    hidden, weight = (8 * torch.randn(count, 16)).to(dtype), (torch.randn(2100, 16) / 4).to(dtype)
    ids = torch.tensor([2099, 0, 2048, 2047, 5])[:count]
    exact = hidden.double().requires_grad_()
    expected = (exact @ weight.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    mine = hidden.to(device).requires_grad_()
    logprob, _ = linear_logprob(mine, weight.to(device), ids.to(device))
    torch.testing.assert_close(logprob.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprob.sum(), mine)
    assert gradient.dtype == dtype and (gradient.cpu().double() - slope).norm() < 0.01 * slope.norm()


def test_autocast_rounds_no_logits(device):
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(5, 8, device=device), torch.randn(20, 8, device=device), torch.arange(5)
    expected = linear_logprob(hidden, weight, ids.to(device))[0]
    with torch.autocast(device, torch.bfloat16):
        found = linear_logprob(hidden.requires_grad_(), weight, ids.to(device))[0]
    assert torch.equal(found, expected)


def test_no_gradient_of_a_gradient(device):
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    logprob, _ = selective_log_softmax(logits, torch.tensor([1, 2], device=device))
    (gradient,) = torch.autograd.grad(logprob.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_linear_logprob_never_holds_more_than_a_chunk(device, monkeypatch):
    sizes, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **more: sizes.append(tuple((r := real(*a, **more)).shape)) or r)
    ids = torch.zeros(50, dtype=torch.long, device=device)
    linear_logprob(torch.randn(50, 8, device=device), torch.randn(99, 8, device=device), ids, chunk=16)
    assert [rows for rows, columns in sizes if columns == 99] == [16, 16, 16, 2]


def test_linear_logprob_refuses():
    hidden, weight, ids = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, ids, 0.0)
    with pytest.raises(ValueError, match="frozen"):
        linear_logprob(hidden, weight.requires_grad_(), ids)
    with pytest.raises(ValueError, match=r"\(V, D\)"):
        linear_logprob(hidden, weight[:, :2], ids)
    with pytest.raises(ValueError, match="convert one of them"):
        linear_logprob(hidden.double(), weight, ids)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 5\), found 0 to 5"):
        linear_logprob(hidden, weight.detach(), torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="needs_grad must be bool"):
        linear_logprob(hidden, weight.detach(), ids, needs_grad=torch.ones(3))
    with pytest.raises(ValueError, match=r"logits \(N, V\)"):
        selective_log_softmax(torch.zeros(2, 3, 4), ids[:2])
    with pytest.raises(ValueError, match="int64 ids"):
        selective_log_softmax(torch.zeros(3, 4), ids.int())
    with pytest.raises(ValueError, match="not expanded ones"):
        selective_log_softmax(torch.zeros(1, 4).expand(3, 4), ids, in_place=True)


# ------------------------------------------------------------------------------------------------ group_advantage


def test_group_advantage_by_hand(device):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], device=device)
    std, both = math.sqrt(1 / 3), math.log(2 + 2 * math.e)
    expected = {
        "mean": [0.5, -0.5],
        "group-norm": [0.5 / (std + 1e-6), -0.5 / (std + 1e-6)],
        "rloo": [2 / 3, -2 / 3],
        "energy": [1 - both, -both],
        "energy-centred": [0.5, -0.5],
    }
    for estimator, (one, zero) in expected.items():
        found = group_advantage(rewards, estimator).tolist()
        assert found[0] == pytest.approx([one, zero, zero, one])
        assert found[1] == pytest.approx([-math.log(4) if estimator == "energy" else 0.0] * 4)
    assert group_advantage(rewards, "energy-centred", beta=2.0)[0].tolist() == pytest.approx([1, -1, -1, 1])
    found = group_advantage(rewards, "group-norm", eps=0.5)[0, 0]
    assert float(found) == pytest.approx(0.5 / (std + 0.5))


def test_ragged_groups_in_any_order(device):
    # Groups a = (1, 0, 2), b = (5), c = (0, 4), mixed.
    rewards = torch.tensor([0.0, 1.0, 5.0, 0.0, 4.0, 2.0], device=device)
    ids = torch.tensor([9, -4, 70, -4, 9, -4], device=device)
    assert group_advantage(rewards, "mean", ids).tolist() == pytest.approx([-2, 0, 0, -1, 2, 1])
    assert group_advantage(rewards, "rloo", ids).tolist() == pytest.approx([-4, 0, 0, -1.5, 4, 1.5])
    assert group_advantage(rewards[:0], "mean", ids[:0]).shape == (0,)


def test_group_advantage_refuses(device):
    rewards = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="no advantage is called 'median'"):
        group_advantage(rewards, "median")
    with pytest.raises(ValueError, match="'mean' has no setting 'beta'"):
        group_advantage(rewards, "mean", beta=2.0)
    with pytest.raises(ValueError, match=r"rewards \(B, G\)"):
        group_advantage(rewards, "mean", torch.zeros(6, dtype=torch.long, device=device))


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # The known answers of the authors' Random123 library, philox4x32-10.
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (FULL,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    words = philox(torch.tensor([key]), tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in words) == expected


def test_row_ids_depend_on_all_parts():
    keys = {row_id(t, u, i) for t in (0, 1, 11) for u in ("a", "a\n1") for i in (0, 1, 11)}
    assert len(keys) == 18 and all(-(2**63) <= key < 2**63 for key in keys)
    assert row_id(1, "a", 2) == row_id(1, "a", 2)


def test_noise_does_not_depend_on_the_batch():
    rows = torch.tensor([row_id(0, "u", i) for i in range(5)])
    noise = gumbel(rows, 3, 50)
    assert torch.equal(gumbel(rows[2:3], 3, 50)[0], noise[2])
    assert torch.equal(gumbel(rows, 3, 17), noise[:, :17])
    assert not torch.equal(gumbel(rows, 4, 50), noise)
    assert not torch.equal(gumbel(rows, 3, 50, seed=1), noise)
    assert not torch.equal(gumbel(rows, 3, 50, seed=2**32), noise)
    assert noise.isfinite().all()


def test_noise_is_finite_and_exact_at_its_ends():
    noise = to_gumbel(torch.tensor([0, 1, 2**31, FULL - 1, FULL]))
    assert noise.isfinite().all()
    assert float(noise[0]) == pytest.approx(-math.log(-math.log1p(-(0.5 * 2.0**-32))), rel=1e-6)  # 22.9
    assert float(noise[2]) == pytest.approx(-math.log(math.log(2)), rel=1e-6)
    assert noise[0] > noise[1] > noise[2] > noise[3]


PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "position": 0}


def draw(logits, count, device, **ways):
    """`count` tokens from one row of logits, each of a row id of its own."""
    rows = torch.tensor([row_id(0, "u", i) for i in range(count)], device=device)
    return sample(logits.to(device).expand(count, -1), row_ids=rows, **(PLAIN | ways))


def test_an_impossible_token_of_a_large_vocabulary_is_never_drawn():
    logits = torch.zeros(1, 152_064)
    logits[:, ::2] = float("-inf")
    tokens = [draw(logits, 64, "cpu", position=position)[0] for position in range(3)]
    assert all((token % 2 == 1).all() for token in tokens) and len(torch.cat(tokens).unique()) > 185


def test_banned_tokens_are_not_drawn_but_count_in_the_log_probability(device):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for temperature, top_k, expected in ((1.0, 0, {1, 3}), (1.0, 1, {1}), (0.0, 0, {1})):
        token, logprob = draw(logits, 12, device, banned=[0, 2], temperature=temperature, top_k=top_k)
        assert set(token.tolist()) == expected
        assert logprob.tolist() == pytest.approx([float(logits[0, t]) for t in token.tolist()])


def chi_squared(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture
def fewer(request):
    """Whether the kernels run in the interpreter, which takes some milliseconds a row."""
    return request.node.callspec.params["device"] == "triton"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_distribution(device, temperature, fewer):
    if fewer and temperature != 1:
        pytest.skip("one temperature is enough there: tests/test_triton.py compares token by token")
    # 7 and 39 degrees of freedom: chi squared exceeds 24 and 72 with probability 0.001.
    size, draws, limit = (8, 300, 24) if fewer else (40, 20_000, 72)
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).clamp(min=-0.5)  # no rare token
    p = (logits[0] / temperature).softmax(-1)
    token, logprob = draw(logits, draws, device, temperature=temperature)
    assert chi_squared(torch.bincount(token.cpu(), minlength=size), p) < limit
    torch.testing.assert_close(logprob.cpu(), p.log()[token.cpu()], atol=1e-6, rtol=1e-5)


def test_top_k_and_top_p(device, fewer):
    if fewer:
        pytest.skip("too slow there: tests/test_triton.py compares with the reference token by token")
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def seen(**cut):
        token, logprob = draw(logits, 300, device, **cut)
        # Of the whole distribution, whatever is cut.
        temperature = cut.get("temperature") or 1.0
        expected = (logits[0] / temperature).log_softmax(-1)[token.cpu()]
        torch.testing.assert_close(logprob.cpu(), expected, atol=1e-6, rtol=1e-5)
        return sorted(set(token.tolist()))

    assert seen() == [0, 1, 2, 3]
    assert seen(top_k=2) == [0, 1]
    assert seen(top_p=0.69) == [0, 1]
    assert seen(top_p=0.71) == [0, 1, 2]
    assert seen(top_p=0.01) == [0]
    assert seen(top_k=3, top_p=0.77) == [0, 1]  # (4 + 3) / 9 = 0.778
    assert seen(top_k=3, top_p=0.79) == [0, 1, 2]
    assert seen(temperature=0.0) == [0]
    assert seen(temperature=0.5, top_p=0.82) == [0, 1]  # (16 + 9) / 30 = 0.833
    ties = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    assert set(draw(ties, 300, device, top_k=2)[0].tolist()) == {0, 1, 2, 3}  # ties with the last stay
    kept, _ = draw(logits, 4000, device, top_k=2)
    assert abs((kept == 0).float().mean() - 4 / 7) < 0.03


def test_statistics_of_the_distribution_sampled_from(device):
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    _, _, entropy, certainty = draw(logits, 2, device, statistics=True, top_k=1)
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 2)
    assert certainty.tolist() == pytest.approx([5 / 3 * math.log(2)] * 2)


def test_a_position_for_each_row(device):
    # A row's token and what is told of it are those of its own position; -1 counts as 2^32 - 1.
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)).to(device)
    rows = torch.tensor([row_id(0, "u", i) for i in (0, 0, 1)], device=device)
    positions, alone = [3, 700, 2**32 - 1], []
    for r, position in enumerate(positions):
        alone.append(sample(logits[r : r + 1], row_ids=rows[r : r + 1], **PLAIN | {"position": position}))
    for dtype, last in ((torch.int64, 2**32 - 1), (torch.int32, -1)):
        given = torch.tensor([[3, 9], [700, 9], [last, 9]], dtype=dtype, device=device)[:, 0]  # of any stride
        found = sample(logits, row_ids=rows, **PLAIN | {"position": given})
        assert all(torch.equal(mine, torch.cat(theirs)) for mine, theirs in zip(found, zip(*alone), strict=True))


def test_noise_of_a_position_for_each_row_is_bit_equal():
    rows = torch.tensor([row_id(0, "u", i) for i in range(40)])
    positions = torch.arange(40) // 2 * 10**8
    for size in (1, 30, 4001):  # the last in several parts
        noise = gumbel(rows, positions, size, seed=5)
        for r in (0, 1, 38, 39):
            assert torch.equal(noise[r], gumbel(rows[r : r + 1], int(positions[r]), size, seed=5)[0])


def test_sample_refuses():
    logits, rows = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    for wrong, message in (
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"banned": [5]}, "banned token 5 is not in the vocabulary of 5"),
        ({"banned": [4, 0, 1, 2, 3, 0]}, "all 5 tokens are banned"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"position": -1}, "expected 0 <= position < 2\\^32, not -1"),
        ({"position": 2**32}, "position < 2"),
        ({"position": rows[:1]}, r"expected a position or \(2,\) of them"),
        ({"position": torch.zeros(2)}, "int64 or int32, not .* torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(logits, row_ids=rows, **(PLAIN | wrong))
    with pytest.raises(ValueError, match=r"row_ids \(R,\)"):
        sample(logits, row_ids=rows[:1], **PLAIN)
    for value in (math.nan, -math.inf):
        broken = logits.clone()
        broken[1] = value
        with pytest.raises(ValueError, match="a row of logits has a nan or no finite value"):
            sample(broken, row_ids=rows, **PLAIN)


# ------------------------------------------------------------------------------------------------------------ loss


def tensors(device, *lists):
    return [torch.tensor(values, device=device) for values in lists]


def one(device, logratio, advantage, **settings):
    """The loss of a single token with a given log ratio, and its statistics."""
    logprob, old, a = tensors(device, [[logratio]], [[0.0]], [advantage])
    loss, stats = grpo_loss(logprob, old, a, **settings)
    return float(loss), {name: float(value) for name, value in stats.items()}


def test_clip(device):
    assert one(device, math.log(1.1), 2.0)[0] == pytest.approx(-2.2)
    assert one(device, math.log(1.5), 2.0)[0] == pytest.approx(-2.4)  # clipped at 1.2
    assert one(device, math.log(1.5), 2.0, clip_high=0.3)[0] == pytest.approx(-2.6)
    assert one(device, math.log(0.5), 2.0)[0] == pytest.approx(-1.0)  # a lower ratio of a good token is not clipped
    assert one(device, math.log(0.5), -2.0)[0] == pytest.approx(1.6)  # clipped at 0.8
    assert one(device, math.log(0.5), -2.0, clip_low=0.4)[0] == pytest.approx(1.2)
    assert one(device, math.log(9), -2.0)[0] == pytest.approx(18)
    assert one(device, math.log(9), -2.0, dual_clip=3.0)[0] == pytest.approx(6)
    none = {"clip_low": 0, "clip_high": 0, "dual_clip": 0, "tokens": 1}
    assert one(device, math.log(1.5), 2.0)[1] == pytest.approx(none | {"clip_high": 1, "ratio": 0.5})
    assert one(device, math.log(0.5), -2.0)[1] == pytest.approx(none | {"clip_low": 1, "ratio": -0.5})
    assert one(device, math.log(9), -2.0, dual_clip=3.0)[1] == pytest.approx(none | {"dual_clip": 1, "ratio": 8})


def test_what_is_clipped_or_only_measured_may_overflow(device):
    logprob, old, reference = tensors(device, [[0.0, 0.0]], [[-500.0, 0.0]], [[500.0, 0.0]])
    for advantage, settings, expected, slopes in (
        (1.0, {}, -0.6 - 0.5, [0, -0.5]),  # 1.2, clipped, and 1
        (-1.0, {"dual_clip": 3.0}, 1.5 + 0.5, [0, 0.5]),
        (-1.0, {}, math.exp(80) / 2, [0, 0.5]),  # not clipped: counted as e^80, without a slope
        (0.0, {}, 0, [0, 0]),
    ):
        mine, given = logprob.clone().requires_grad_(), torch.tensor([advantage], device=device)
        loss, _ = grpo_loss(mine, old, given, None, reference, **settings)
        (gradient,) = torch.autograd.grad(loss, mine)
        assert float(loss.detach()) == pytest.approx(expected) and gradient[0].tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_reaches_the_loss(device, which):
    pair = tensors(device, [[-1.0, -2.0]], [[-1.0, -2.0]])
    pair[which][0, 1] = math.nan
    assert grpo_loss(*pair, torch.ones(1, device=device))[0].isnan()


def test_only_the_log_probability_gets_a_gradient(device):
    logprob, old, advantage = tensors(device, [[-1.0, -2.0]], [[-1.5, -2.0]], [1.0])
    parts = [part.requires_grad_() for part in (logprob, old, advantage)]
    grpo_loss(*parts)[0].backward()
    assert logprob.grad is not None and old.grad is None and advantage.grad is None


def test_kl(device):
    difference = math.log(2.0)  # the policy's log-probability is log 2 above the reference's
    logprob, reference, advantage = tensors(device, [[difference]], [[0.0]], [0.0])
    expected = {"k1": difference, "k2": difference**2 / 2, "k3": 0.5 - 1 + difference}
    for estimator, kl in expected.items():
        assert float(kl_divergence(logprob, reference, estimator)) == pytest.approx(kl)
        ways = {"kl_coef": 0.1, "kl_estimator": estimator}
        loss, stats = grpo_loss(logprob, logprob, advantage, None, reference, **ways)
        assert float(loss) == pytest.approx(0.1 * kl) and float(stats["kl"]) == pytest.approx(kl)


def test_a_small_kl_keeps_its_digits(device):
    # k3 = d^2 / 2 to first order; exp(d) - 1 - d by subtraction is off by a tenth here.
    logprob, reference, advantage = tensors(device, [[0.0]], [[2e-4]], [0.0])
    _, stats = grpo_loss(logprob, logprob, advantage, None, reference)
    assert float(stats["kl"]) == pytest.approx(2e-8, rel=2e-3)


@pytest.mark.parametrize(
    "difference, kl, slope",  # of the reference's log-probability to the policy's; with respect to the latter
    [
        (math.log(2.0), 1 - math.log(2.0), -1.0),
        (-1000.0, 999.0, 1.0),
        (19.0, math.expm1(19) - 19, -math.expm1(19)),
        (1000.0, math.expm1(20) - 20, 0.0),  # counts as 20, where e^20 - 21 = 485,165,174
    ],
)
def test_k3_and_its_gradient_stay_finite(device, difference, kl, slope):
    logprob, reference, advantage = tensors(device, [[-1.0]], [[difference - 1]], [0.0])
    logprob.requires_grad_()
    loss, stats = grpo_loss(logprob, logprob, advantage, None, reference, kl_coef=0.1)
    loss.backward()
    assert float(stats["kl"]) == pytest.approx(kl, rel=1e-5) and float(loss) == pytest.approx(0.1 * kl, rel=1e-5)
    assert float(logprob.grad) == pytest.approx(0.1 * slope, rel=1e-5)


def test_rollout_weights(device):
    # Tokens sampled with probabilities 1/2 and 1/5, which are 1/4 and 4/5 to the trainer: half, and four times.
    old, sampled = tensors(device, [[math.log(0.25), math.log(0.8)]], [[math.log(0.5), math.log(0.2)]])
    for cap, expected in ((2.0, [0.5, 2.0]), (8.0, [0.5, 4.0]), (1.0, [0.5, 1.0])):
        assert rollout_weights(old, sampled, cap)[0].tolist() == pytest.approx(expected)
    assert rollout_weights(old + 1000, sampled)[0].tolist() == [2, 2]
    assert rollout_weights(old - 1000, sampled)[0].tolist() == [0, 0]
    w = rollout_weights(old.requires_grad_(), sampled)
    assert not w.requires_grad
    logprob = old.detach().requires_grad_()
    loss, _ = grpo_loss(logprob, old, w)  # A = 1, on policy
    loss.backward()
    assert float(loss) == pytest.approx(-(0.5 + 2) / 2) and logprob.grad[0].tolist() == pytest.approx([-0.25, -1.0])
    # One ratio for the response: its loss has the mean of the weights, and each token half of the gradient.
    logprob = old.detach().requires_grad_()
    loss, _ = grpo_loss(logprob, old, w, ratio_level="sequence")
    loss.backward()
    assert float(loss) == pytest.approx(-1.25) and logprob.grad[0].tolist() == pytest.approx([-0.625, -0.625])
    # A = -1 at ratios 1/2 and 4: the first token's loss is clipped to 0.8, the second's to the dual clip's 3, and the
    # KL to the reference, 0.1 * (1 + 3) / 2, has no weight.
    apart = torch.tensor([[math.log(0.5), math.log(4.0)]], device=device)
    kl = {"kl_coef": 0.1, "kl_estimator": "k1"}
    here = old.detach() + apart
    reference = here - torch.tensor([[1.0, 3.0]], device=device)
    loss, stats = grpo_loss(here, old, -w, None, reference, dual_clip=3.0, **kl)
    assert float(loss) == pytest.approx((0.5 * 0.8 + 2 * 3) / 2 + 0.2)
    assert float(stats["clip_low"]) == float(stats["dual_clip"]) == 1


def test_the_loss_is_read_backwards_without_a_race(device):
    """`mean[owner]` would read one value for all tokens of a response: its backward pass is a parallel scatter."""
    logprob = torch.zeros(6, device=device, requires_grad=True)
    loss, _ = grpo_loss(
        logprob, torch.zeros(6, device=device), torch.ones(2, device=device),
        lengths=torch.tensor([4, 2], device=device), ratio_level="sequence",
    )  # fmt: skip
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        seen.add(node.name())
        left += [after for after, _ in node.next_functions if after is not None]
    assert len(seen) > 1 and "IndexBackward0" not in seen and "GatherBackward0" not in seen


def test_sequence_ratio_is_the_geometric_mean(device):
    # Two responses: log ratios (0.1, 0.3) and (-0.2). GSPO's ratios are e^0.2 and e^-0.2.
    logprob, old, advantage, weight = tensors(device, [0.1, 0.3, -0.2], [0.0] * 3, [1.0, 1.0], [0.25, 0.5])
    lengths = torch.tensor([2, 1], device=device)
    ways = {"lengths": lengths, "weight": weight, "ratio_level": "sequence", "clip_high": 1.0, "clip_low": 1.0}
    loss, _ = grpo_loss(logprob.requires_grad_(), old, advantage, **ways)
    assert float(loss.detach()) == pytest.approx(-(0.5 * math.exp(0.2) + 0.5 * math.exp(-0.2)))
    (gradient,) = torch.autograd.grad(
        loss, logprob
    )  # a token moves its response's ratio by half of what it moves itself
    assert gradient.tolist() == pytest.approx([-0.25 * math.exp(0.2)] * 2 + [-0.5 * math.exp(-0.2)])


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [("token", [1 / 3] * 3), ("sequence", [1 / 4, 1 / 4, 1 / 2]), ("dr-grpo", [1 / 20] * 3)],
)
def test_on_policy_gradient_is_reinforce(device, aggregation, weights):
    # Padded: responses of two tokens, of one and of none, what is masked being nan.
    nan = float("nan")
    logprob, advantage = tensors(device, [[-1.0, -2.0], [-0.5, nan], [nan, nan]], [2.0, -0.5, 7.0])
    mask = torch.tensor([[True, True], [True, False], [False, False]], device=device)
    loss, stats = grpo_loss(
        logprob.requires_grad_(), logprob.detach(), advantage, mask, aggregation=aggregation, max_length=10
    )
    (gradient,) = torch.autograd.grad(loss, logprob)
    a, b, c = weights
    assert gradient.flatten().tolist() == pytest.approx([-2 * a, -2 * b, 0.5 * c, 0, 0, 0])
    assert float(loss) == pytest.approx(-2 * a - 2 * b + 0.5 * c) and int(stats["tokens"]) == 3


def test_packed_and_padded_agree(device):
    logprob, old = tensors(device, [[-1.0, -2.0, -0.3], [-0.5, 0.0, 0.0]], [[-1.1, -1.6, -0.3], [-0.9, 0.0, 0.0]])
    (advantage,) = tensors(device, [1.0, -1.0])
    mask = torch.tensor([[True, True, True], [True, False, False]], device=device)
    padded, sums = grpo_loss(logprob, old, advantage, mask)
    packed, same = grpo_loss(logprob[mask], old[mask], advantage, lengths=torch.tensor([3, 1], device=device))
    assert float(padded) == pytest.approx(float(packed))
    assert {k: float(v) for k, v in sums.items()} == pytest.approx({k: float(v) for k, v in same.items()})


def test_sft_has_the_gradient_of_the_loss_at_ratio_one():
    logprob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    ways = {"lengths": torch.tensor([2, 1]), "weight": torch.tensor([0.2, 0.5])}
    target = torch.tensor([1.0, 0.25])
    mine, _ = sft_loss(logprob, target, **ways)
    theirs, _ = grpo_loss(logprob, logprob.detach(), target, **ways)
    (a,), (b,) = torch.autograd.grad(mine, logprob), torch.autograd.grad(theirs, logprob)
    torch.testing.assert_close(a, b)
    assert a.tolist() == pytest.approx([-0.2, -0.2, -0.125])


def test_response_weights():
    lengths = torch.tensor([2, 6, 0])  # the third is masked
    assert response_weights(lengths).tolist() == pytest.approx([1 / 8, 1 / 8, 0])
    assert response_weights(lengths, "sequence").tolist() == pytest.approx([1 / 4, 1 / 12, 0])
    assert response_weights(lengths, "dr-grpo", 10).tolist() == pytest.approx([1 / 20, 1 / 20, 0])
    with pytest.raises(ValueError, match="aggregation"):
        response_weights(lengths, "mean")


def test_grpo_loss_refuses():
    x, a = torch.zeros(2, 3), torch.zeros(2)
    for wrong, message in (
        ({"aggregation": "mean"}, "aggregation must be"),
        ({"aggregation": "dr-grpo"}, "give max_length"),
        ({"ratio_level": "group"}, "ratio_level must be"),
        ({"kl_estimator": "k4"}, "kl_estimator must be"),
        ({"mask": torch.ones(2, 2).bool()}, r"mask is \(2, 2\), expected \(2, 3\)"),
        ({"weight": torch.ones(3)}, r"weight is \(3,\), expected \(2,\)"),
        ({"lengths": torch.tensor([3, 3])}, r"or \(N,\) with lengths"),
        ({"aggregation": "dr-grpo", "max_length": 0}, "max_length >= 1, not 0"),
        ({"kl_coef": 0.1}, "needs ref_logprob"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"mask": torch.ones(2, 3)}, r"give mask.bool\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_loss(x, x, a, **wrong)
    for lengths in ([3, 2], [7, -1]):
        with pytest.raises(ValueError, match="lengths must be >= 0 and sum to the 6 tokens"):
            grpo_loss(x.flatten(), x.flatten(), a, lengths=torch.tensor(lengths))
    packed = {"lengths": torch.tensor([3, 3]), "weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"target is \(3,\), expected \(2,\)"):
        sft_loss(x.flatten(), torch.zeros(3), **packed)
    with pytest.raises(ValueError, match=r"ref_logprob is \(1,\), expected \(6,\)"):
        sft_loss(x.flatten(), a, torch.zeros(1), **packed)
    with pytest.raises(ValueError, match="advantage is"):
        grpo_loss(x, x, torch.zeros(3))
