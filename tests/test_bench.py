"""The benchmark beside TRL: its arithmetic, and one small run of both sides (without TRL, only the first)."""

import json

import pytest
import torch

from bench import cases, fullsize, judging, kernels, loop


def test_summary_of_three_steps():
    steps = [
        loop.record(0.0, r, r + u, tokens, 4, 3) for r, u, tokens in ((1.0, 4.0, 40), (3.0, 1.0, 60), (2.0, 7.0, 80))
    ]
    found = loop.summarise(steps)
    assert (found["seconds"], found["fastest"], found["slowest"]) == (5.0, 4.0, 9.0)
    assert (found["rollout"], found["update"]) == (2.0, 4.0)
    assert (found["length"], found["trained"], found["tokens_per_second"]) == (15.0, 0.75, 10.0)


def test_both_sides_run_on_the_same_prompts(tiny, capsys):
    pytest.importorskip("trl")
    config = loop.Config(model=tiny, steps=2, warmup=0, questions=2, group_size=2, trl_accumulation=(1,))
    result = json.loads(json.dumps(loop.main(config)))
    for steps in result["steps"].values():
        assert len(steps) == 2 and all(step["tokens"] >= 4 and step["seconds"] > step["rollout"] > 0 for step in steps)
    upt, trl = result["sides"].values()
    assert result["ratio"]["seconds"] == trl["seconds"] / upt["seconds"]
    assert "TRL / upt: seconds" in capsys.readouterr().out


def test_other_prompts_on_the_two_sides_stop_the_run(tiny, monkeypatch):
    pytest.importorskip("trl")
    step = loop.Ours.step
    monkeypatch.setattr(loop.Ours, "step", lambda self, number: step(self, number + 1))
    config = loop.Config(model=tiny, steps=1, warmup=0, questions=2, group_size=2, trl_accumulation=(1,))
    with pytest.raises(RuntimeError, match="different prompts"):
        loop.main(config)


def test_judging_behind_a_shared_prefix_gives_the_scores_of_whole_prompts(tiny, capsys):
    result = json.loads(json.dumps(judging.main(judging.Config(model=tiny, groups=2, judge_max_new_tokens=4))))
    assert 0 < result["largest_difference"] < 1e-4  # other kernels, other rounding; the same scores
    assert all(len(result["runs"][name]) == 2 and seconds > 0 for name, seconds in result["seconds"].items())
    assert result["ratio"]["separate"] == result["seconds"]["separate"] / result["seconds"]["shared"]
    assert "beside shared: separate" in capsys.readouterr().out


def test_peak_memory_of_a_call():
    def form():
        held = torch.empty(10**6)  # 4 MB
        for _ in range(3):
            torch.empty(2 * 10**6)  # 8 MB, gone before the next
        return held

    assert kernels.peak(form) == pytest.approx(12e6, rel=0.01)


def test_memory_counts_the_gradient_whatever_ran_before():
    leaf = torch.randn(1000, 1000, requires_grad=True)
    form = cases.there_and_back(lambda x: x.exp().sum(), leaf, torch.ones(()))
    assert [kernels.peak(form) for _ in range(2)] == [pytest.approx(8e6, rel=0.01)] * 2  # the result and the gradient


def test_shapes_that_cannot_be_read():
    with pytest.raises(ValueError, match="expected tokens x vocabulary x hidden size, as 512x8192x512, not '4x100'"):
        kernels.main(kernels.Config(shapes=("4x100",), device="cpu"))


def test_the_kernels_beside_naive_forms_of_the_same_result(capsys, monkeypatch):
    monkeypatch.setattr(cases, "CPU_DECODING", ((6, 3, 10, 4, 4, 2, 8),))
    config = kernels.Config(shapes=("24x300x16",), pairs=3, device="cpu")
    result = json.loads(json.dumps(kernels.main(config)))
    (found,) = result["results"]
    assert found["shape"] == {"N": 24, "V": 300, "D": 16}
    jobs = {(row["job"], row["form"]): row for row in found["rows"]}
    assert all(row["ms"] > 0 and row["extra_mb"] >= 0 for row in found["rows"])
    assert all(row["ratio"] == 1 for (_, form), row in jobs.items() if form == "naive")
    assert "linear_logprob forward + backward" in capsys.readouterr().out
    # What is timed has to be the same job: the forms' results agree.
    hidden, weight, ids = torch.randn(24, 16), torch.randn(300, 16), torch.randint(300, (24,))
    ours = cases.linear_logprob(hidden, weight, ids)[0]
    torch.testing.assert_close(ours, cases.naive_linear(hidden, weight, ids), atol=1e-5, rtol=1e-5)
    rewards = torch.rand(5, 8)
    torch.testing.assert_close(cases.group_advantage(rewards, "group-norm"), cases.naive_advantage(rewards))
    x, old, reference = (-torch.rand(3, 7) for _ in range(3))
    advantage, mask = torch.randn(3), torch.rand(3, 7) < 0.7
    loss, _ = cases.grpo_loss(x, old, advantage, mask, reference, kl_coef=0.01)
    torch.testing.assert_close(loss, cases.naive_loss(x, old, advantage, mask, reference))
    decoding = cases.cases((24, 300, 16), "cpu")[-1]()
    torch.testing.assert_close(decoding.forms["naive"](), decoding.forms[cases.OURS](), atol=1e-5, rtol=1e-5)
    assert decoding.job == "decode_attention 6 rows of 2 x 10 + 4 keys"


def test_the_full_size_check_at_a_small_size(capsys):
    config = fullsize.Config("tiny-random", questions=2, group_size=2, image_tokens=32, max_new_tokens=5, steps=1)
    result = json.loads(json.dumps(fullsize.main(config)))
    printed = capsys.readouterr().out
    for way in ("kernels", "eager"):
        (step,) = result["steps"][way]
        assert 2 * 2 <= step["tokens"] <= 2 * 2 * 5 and step["prompt_tokens"] > 32 and step["update_s"] > 0
        assert f"\n{way} " in printed
