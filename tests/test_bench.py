"""The benchmark beside TRL: its arithmetic, and one small run of both sides (without TRL, only the first)."""

import json

import pytest

from bench import judging, loop


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
