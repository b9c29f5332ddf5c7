"""Label-free health signals by hand, the rule on made-up runs, and the choice of a checkpoint."""

import math

import pytest

from tests.test_shards import make_group
from upt.run import health
from upt.run.metrics import Metrics

LOG2 = math.log(2)


def test_signals_by_hand():
    # Two questions of other answers, each unanimous: an answer says which question it was, one bit.
    told = health.signals([make_group(keys="aa"), make_group(keys="bb")])
    assert told == pytest.approx({"unanimous": 1, "answer_entropy": LOG2, "information": LOG2})
    # The same answer to both, and coins for both, say nothing.
    assert health.signals([make_group(keys="aa")] * 2) == {"unanimous": 1, "answer_entropy": 0, "information": 0}
    coins = health.signals([make_group(keys="ab")] * 2)
    assert coins == pytest.approx({"unanimous": 0, "answer_entropy": LOG2, "information": 0})
    # Answers a a a b and b b b a: H(a) = log 2 and H(a | x) = log 4 - 3/4 log 3.
    mixed = health.signals([make_group(keys="aaab"), make_group(keys="bbba")])
    assert mixed["information"] == pytest.approx(LOG2 - (math.log(4) - 0.75 * math.log(3)))
    # An abstention is no answer, and a group with one is not unanimous.
    silent = health.signals([make_group(keys=("a", None)), make_group(keys=(None, None))])
    assert silent == {"unanimous": 0, "answer_entropy": 0, "information": 0}


def row(step: int, **changed) -> dict:
    usual = {"majority_share": 0.6, "entropy": 0.3, "answer_entropy": 2.8, "information": 1.6, "length": 20.0}
    return {"step": step, "abstention_share": 0.0, "kl": None} | usual | changed


@pytest.mark.parametrize(
    "alarm, changed",
    [
        ("majority", {"majority_share": 0.985, "information": 1.8}),
        ("entropy", {"entropy": 0.029}),
        ("answers", {"answer_entropy": 1.9}),
        ("information", {"information": 1.35}),  # .85 of 1.6 is 1.36
        ("agreement", {"majority_share": 0.54}),
        ("split", {"majority_share": 0.57, "entropy": 0.25}),  # .85 of .3 is .255
        ("hollow", {"majority_share": 0.76, "information": 1.63}),  # up by .16 and .03: a fifth of .16 is .032
        ("abstentions", {"abstention_share": 0.21}),
        ("length", {"length": 9.0}),
        ("length", {"length": 41.0}),
        ("kl", {"kl": 0.6}),
    ],
)
def test_every_alarm_is_raised_by_its_own_signal(alarm, changed):
    watch = health.Watch()
    assert [watch.add(row(step)) for step in range(20)] == [[]] * 20
    raised = [watch.add(row(20 + step, **changed)) for step in range(health.WINDOW)]
    assert raised[-1] == [alarm]
    # Taking the same rows up again after a stop changes nothing.
    again = health.Watch([row(step) for step in range(20)])
    assert [again.add(row(20 + step, **changed)) for step in range(health.WINDOW)] == raised


def test_alarms_wait_for_two_windows_and_use_means():
    watch = health.Watch()
    early = [watch.add(row(step, entropy=0.3 if step < 5 else 0.0)) for step in range(10)]
    assert early[:9] == [[]] * 9 and early[9] == ["entropy"]
    watch = health.Watch([row(step) for step in range(20)])
    # One step of five without any entropy leaves four fifths of it.
    assert watch.add(row(20, entropy=0.0)) == []


def test_the_best_window_counts_from_the_first_one_on():
    watch = health.Watch([row(step) for step in range(5)])
    alarms = [watch.add(row(5 + step, information=1.0)) for step in range(5)]
    assert alarms == [[]] * 4 + [["information"]]


def test_gentle_gains_raise_no_alarm():
    watch = health.Watch()
    for step in range(60):
        f = step / 60
        gain = row(
            step, majority_share=0.45 + 0.4 * f, entropy=0.3 - 0.2 * f, information=1.6 + 0.4 * f, length=15 + 4 * f
        )
        assert watch.add(gain) == []


def test_the_checkpoint_with_most_information_is_chosen_among_the_healthy():
    rows = [row(step, information=1 + step / 30 if step < 20 else 1.0, alarms=[]) for step in range(30)]
    assert health.best_checkpoint(rows, [10, 20, 30]) == 20
    rows[20]["alarms"] = ["length"]  # of what the checkpoint after 20 steps sampled
    assert health.best_checkpoint(rows, [10, 20, 30]) == 10  # 1.27 over its window, against 1.0
    for r in rows:
        r["alarms"] = ["length"]
    assert health.best_checkpoint(rows, [10, 20, 30]) == 20
    flat = [row(step, alarms=[]) for step in range(30)]
    assert health.best_checkpoint(flat, [10, 20, 30]) == 30


def test_a_gap_between_sampler_and_trainer_is_an_alarm_at_once():
    gaps = (None, 0.0, 1e-6, 0.04, 0.1, 0.11)
    watch = health.Watch()
    assert [watch.add(row(n, logprob_gap_mean=gap)) for n, gap in enumerate(gaps)] == [[]] * 5 + [["gap"]]
    assert watch.add(row(6)) == []
    assert health.Watch(own=False).add(row(0, logprob_gap_mean=1.0)) == []  # shards may be another policy's
    rows = [row(n, alarms=["gap"] if n == 2 else []) for n in range(4)]
    assert health.unhealthy_from(rows) == math.inf  # it says nothing of the policy


@pytest.mark.parametrize(
    "own, gap, said",
    [
        (True, {}, ["clipped 0.000", "0.5 GiB"]),
        (True, {"logprob_gap_mean": None, "logprob_gap_max": None}, ["clipped 0.000", "0.5 GiB"]),
        (True, {"logprob_gap_mean": 2e-7, "logprob_gap_max": 3.1e-6}, ["gap 2.0e-07 (max 3.1e-06)", "0.5 GiB"]),
        (True, {"logprob_gap_mean": 0.25, "logprob_gap_max": 4.0}, ["0.5 GiB", "GAP: sampler and trainer disagree"]),
        (False, {"logprob_gap_mean": 0.25, "logprob_gap_max": 4.0}, ["0.5 GiB", "off-policy samples"]),
    ],
)
def test_a_status_line_shows_the_gap(tmp_path, monkeypatch, own, gap, said):
    monkeypatch.setattr("upt.run.metrics.peak_memory_gib", lambda: 0.5)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, own)
    group = make_group(keys="aab")
    for response in group["responses"]:
        response |= {"reward": 1.0, "advantage": 0.0}
    line = metrics.write(0, [group], {"clip_low": 0.0, "clip_high": 0.0} | gap, {}, {})
    assert line.split(", ")[-2:] == said and "COLLAPSE" not in line


def test_a_status_line_shows_alarms_and_counts(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    group = make_group(keys="aab")
    for response, score in zip(group["responses"], (0.5, 1.0, None)):
        response |= {"reward": 1.0, "advantage": 0.0, "judge": {"score": score, "parsed": score is not None}}
    update = {"clip_low": 0.0, "clip_high": 0.0, "nonfinite": 0, "no_signal": 1}
    lines = [metrics.write(step, [group], update, {}, {"left_out": 0}) for step in range(12)]
    assert "judge 0.750" in lines[0] and "no signal for 1 update: not made, UNPARSED 1 judgement" in lines[0]
    assert "COLLAPSE" not in lines[-1]
    for response in group["responses"]:
        response["key"] = "a"
    lines = [metrics.write(12 + step, [group], update, {}, {"left_out": 0}) for step in range(5)]
    assert lines[-1].endswith("COLLAPSE? majority answers hollow")
    assert Metrics(tmp_path / "metrics.jsonl", 16).rows == metrics.rows[:16]
