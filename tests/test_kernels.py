"""The kernels against closed forms and float64."""

import math

import pytest
import torch

from kernels import grpo_loss, kl_divergence, linear_logprob, response_weights, row_id, sample
from kernels.sampling import gumbel, philox, to_gumbel

FULL = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ linear_logprob


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprob_and_its_gradient(chunk, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    weight, ids, scale = torch.randn(37, 16, dtype=torch.float64), torch.randint(37, (23,)), torch.randn(23)
    logprob, entropy = linear_logprob(hidden, weight, ids, temperature, chunk)
    expected = (hidden @ weight.T / temperature).log_softmax(-1)
    torch.testing.assert_close(logprob.double(), expected.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    mine = torch.autograd.grad((scale * logprob).sum(), hidden)[0]
    theirs = torch.autograd.grad((scale * expected.gather(1, ids[:, None])[:, 0]).sum(), hidden)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_linear_logprob_keeps_its_gradient_near_certainty():
    # p(y) = 1 - 1e-9 or so: onehot - p must not cancel to zero.
    hidden = torch.tensor([[21.0, 0.0]], requires_grad=True)
    weight = torch.eye(2)
    logprob, _ = linear_logprob(hidden, weight, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    torch.testing.assert_close(gradient, torch.tensor([[math.exp(-21), -math.exp(-21)]]), rtol=1e-4, atol=0)


def test_linear_logprob_never_holds_more_than_a_chunk(monkeypatch):
    sizes = []
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(tuple((r := real(a, b)).shape)) or r)
    linear_logprob(torch.randn(50, 8), torch.randn(99, 8), torch.zeros(50, dtype=torch.long), chunk=16)
    assert max(rows for rows, columns in sizes if columns == 99) == 16


def test_linear_logprob_refuses():
    hidden, weight, ids = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, ids, 0.0)
    with pytest.raises(ValueError, match="frozen"):
        linear_logprob(hidden, weight.requires_grad_(), ids)
    with pytest.raises(ValueError, match=r"\(V, D\)"):
        linear_logprob(hidden, weight[:, :2], ids)


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
    keys = {row_id(s, t, u, i) for s in (0, 1) for t in (0, 11) for u in ("a", "a\n1") for i in (0, 1)}
    assert len(keys) == 16 and all(-(2**63) <= key < 2**63 for key in keys)
    assert row_id(0, 1, "a", 2) == row_id(0, 1, "a", 2)


def test_noise_does_not_depend_on_the_batch():
    rows = torch.tensor([row_id(0, 0, "u", i) for i in range(5)])
    noise = gumbel(rows, 3, 50)
    assert torch.equal(gumbel(rows[2:3], 3, 50)[0], noise[2])
    assert torch.equal(gumbel(rows, 3, 17), noise[:, :17])
    assert not torch.equal(gumbel(rows, 4, 50), noise)
    assert noise.isfinite().all()


def test_noise_is_finite_and_exact_at_its_ends():
    noise = to_gumbel(torch.tensor([0, 1, 2**31, FULL - 1, FULL]))
    assert noise.isfinite().all()
    assert float(noise[0]) == pytest.approx(-math.log(-math.log1p(-(0.5 * 2.0**-32))), rel=1e-6)  # 22.9
    assert float(noise[2]) == pytest.approx(-math.log(math.log(2)), rel=1e-6)
    assert noise[0] > noise[1] > noise[2] > noise[3]


def test_a_banned_token_of_a_large_vocabulary_is_never_drawn():
    logits = torch.zeros(64, 152_064)
    logits[:, ::2] = float("-inf")
    rows = torch.tensor([row_id(0, 0, "u", i) for i in range(64)])
    tokens = [sample(logits, rows, position) for position in range(3)]
    assert all((token % 2 == 1).all() for token in tokens) and len(torch.cat(tokens).unique()) > 185


def chi_squared(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_samples_follow_the_distribution():
    size, draws = 40, 20_000
    torch.manual_seed(0)
    logits = torch.randn(size)
    rows = torch.tensor([row_id(0, 0, "u", i) for i in range(draws)])
    for temperature in (1.0, 0.7):
        tokens = sample(logits.expand(draws, -1), rows, 0, temperature)
        statistic = chi_squared(torch.bincount(tokens, minlength=size), (logits / temperature).softmax(-1))
        assert statistic < 72  # 39 degrees of freedom: exceeded with probability 0.001


def test_top_k_and_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rows = torch.tensor([row_id(0, 0, "u", i) for i in range(4000)])

    def seen(**cut):
        return sorted(set(sample(logits.expand(len(rows), -1), rows, 0, **cut).tolist()))

    assert seen() == [0, 1, 2, 3]
    assert seen(top_k=2) == [0, 1]
    assert seen(top_p=0.69) == [0, 1]
    assert seen(top_p=0.71) == [0, 1, 2]
    assert seen(top_p=0.01) == [0]
    assert seen(temperature=0.0) == [0]
    kept = sample(logits.expand(len(rows), -1), rows, 0, top_k=2)
    assert abs((kept == 0).float().mean() - 4 / 7) < 0.03


# ------------------------------------------------------------------------------------------------------------ loss


def tensors(*lists):
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


def one(logratio, advantage, **settings):
    """The loss of a single token with a given log ratio, and its statistics."""
    logprob, old, a, weight = tensors([logratio], [0.0], [advantage], [1.0])
    loss, stats = grpo_loss(logprob, old, a, weight, torch.tensor([0]), **settings)
    return float(loss), {name: float(value) for name, value in stats.items()}


def test_clip():
    assert one(math.log(1.1), 2.0)[0] == pytest.approx(-2.2)
    assert one(math.log(1.5), 2.0)[0] == pytest.approx(-2.4)  # clipped at 1.2
    assert one(math.log(1.5), 2.0, clip_high=0.3)[0] == pytest.approx(-2.6)
    assert one(math.log(0.5), 2.0)[0] == pytest.approx(-1.0)  # a lower ratio of a good token is not clipped
    assert one(math.log(0.5), -2.0)[0] == pytest.approx(1.6)  # clipped at 0.8
    assert one(math.log(0.5), -2.0, clip_low=0.4)[0] == pytest.approx(1.2)
    assert one(math.log(9), -2.0)[0] == pytest.approx(18)
    assert one(math.log(9), -2.0, dual_clip=3.0)[0] == pytest.approx(6)
    assert one(math.log(1.5), 2.0)[1] == pytest.approx({"clip_low": 0, "clip_high": 1, "ratio": 0.5})
    assert one(math.log(0.5), -2.0)[1]["clip_low"] == 1
    assert one(math.log(9), -2.0, dual_clip=3.0)[1]["dual_clip"] == 1


def test_kl():
    difference = math.log(2.0)  # the policy's log-probability is log 2 above the reference's
    logprob, reference = tensors([difference], [0.0])
    assert float(kl_divergence(logprob, reference, "k1")) == pytest.approx(difference)
    assert float(kl_divergence(logprob, reference, "k2")) == pytest.approx(difference**2 / 2)
    assert float(kl_divergence(logprob, reference, "k3")) == pytest.approx(0.5 - 1 + difference)
    old, advantage, weight = tensors([difference], [0.0], [1.0])
    loss, stats = grpo_loss(logprob, old, advantage, weight, torch.tensor([0]), reference, kl_coef=0.1)
    assert float(loss) == pytest.approx(0.1 * (difference - 0.5)) and float(stats["kl"]) == pytest.approx(
        difference - 0.5
    )


def test_sequence_ratio_is_the_geometric_mean():
    # Two responses: log ratios (0.1, 0.3) and (-0.2). GSPO's ratios are e^0.2 and e^-0.2.
    logprob, old, advantage, weight = tensors([0.1, 0.3, -0.2], [0.0] * 3, [1.0, 1.0, 1.0], [0.25, 0.25, 0.5])
    owner = torch.tensor([0, 0, 1])
    loss, _ = grpo_loss(logprob, old, advantage, weight, owner, ratio_level="sequence", clip_high=1.0, clip_low=1.0)
    assert float(loss) == pytest.approx(-(0.5 * math.exp(0.2) + 0.5 * math.exp(-0.2)))


def test_on_policy_gradient_is_reinforce():
    logprob, advantage, weight = tensors([-1.0, -2.0, -0.5], [1.0, -0.5, 2.0], [0.2, 0.3, 0.5])
    logprob.requires_grad_()
    loss, _ = grpo_loss(logprob, logprob.detach(), advantage, weight, torch.tensor([0, 0, 1]))
    (gradient,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(gradient, -weight * advantage)


def test_response_weights():
    lengths = torch.tensor([2, 6, 0])  # the third is masked
    assert response_weights(lengths).tolist() == pytest.approx([1 / 8, 1 / 8, 0])
    assert response_weights(lengths, "sequence").tolist() == pytest.approx([1 / 4, 1 / 12, 0])
    assert response_weights(lengths, "dr-grpo", 10).tolist() == pytest.approx([1 / 20, 1 / 20, 0])
    with pytest.raises(ValueError, match="aggregation"):
        response_weights(lengths, "mean")
