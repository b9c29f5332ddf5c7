"""What a step does with skipped groups, with cross-entropy, with a judge; how a collapsing run ends."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewards
import rollout
from tests.test_train import SMALL, adapter, run, same
from train_upt import Config, main
from upt import answers, data
from upt.errors import SettingError, Stopped
from upt.groups import shards
from upt.model import update
from upt.model.policy import Policy
from upt.run import checkpoints, health, presets
from upt.stages import sampling, steps


def keyed(monkeypatch, keys=lambda text: str(len(text) % 3)):
    """A random model keeps no format and gives no answers: make keys of its text, and call every text well-formed."""
    monkeypatch.setattr(sampling, "vote_key", lambda text, choices=None: keys(text))
    monkeypatch.setattr(answers, "keeps_format", lambda text, prompt: True)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def step(tiny, tmp_path, **settings):
    """A policy with an adapter, and the prompts and groups of a step with random rewards."""
    config = Config(model=tiny, out=tmp_path, **SMALL | {"steps": 1, "update_tokens": 2048} | settings).resolve()
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    policy.add_lora(2, 4)
    batch = sampling.step_batch(policy, data.load("shapes", "train", 0), 0, config)
    groups = sampling.rollout(policy, batch, 0, config, tmp_path)
    return config, policy, batch.prompts, rewards.score(groups, "random", config.advantage, 0)


def gradients(policy) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in policy.trainable()]
    policy.model.zero_grad()
    return found


# ------------------------------------------------------------------------------------------------ skipped groups


@pytest.mark.parametrize("advantage", ["group-norm", "energy"])
def test_skipped_groups_take_no_part_in_the_update(tiny, tmp_path, monkeypatch, advantage):
    config, policy, prompts, groups = step(tiny, tmp_path, advantage=advantage, kl_coef=0.1)
    seen = []
    real = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda batch, *rest: seen.extend(batch) or real(batch, *rest))
    optimizer = torch.optim.SGD(policy.trainable(), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    start = [p.detach().clone() for p in policy.trainable()]
    groups[1] |= {"skipped": True}
    update.update(policy, optimizer, schedule, prompts, groups, config, False)
    assert {row.prompt.uid for row in seen} == {g["uid"] for i, g in enumerate(groups) if i != 1}
    moved = [p.detach().clone() for p in policy.trainable()]
    # The same without that group at all.
    for p, value in zip(policy.trainable(), start):
        p.data.copy_(value)
    rest = [0, 2, 3]
    update.update(policy, optimizer, schedule, [prompts[i] for i in rest], [groups[i] for i in rest], config, False)
    assert all(torch.equal(a, b) for a, b in zip(moved, policy.trainable()))
    assert any(not torch.equal(a, b) for a, b in zip(start, moved))


def test_a_band_skips_groups_and_counts_them(tiny, tmp_path, monkeypatch):
    keyed(monkeypatch)
    out = run(tiny, tmp_path / "r", steps=3, reward="majority", min_share=0.4, max_share=0.6)
    groups = list(shards.ShardReader(out / "rollouts"))
    skipped = [group.get("skipped", False) for group in groups]
    assert skipped == [not 0.4 <= rewards.majority_share(group) <= 0.6 for group in groups] and len({*skipped}) == 2
    assert all(r["advantage"] == 0 for g in groups if g.get("skipped") for r in g["responses"])
    assert [row["skipped"] for row in metrics(out)] == [sum(skipped[4 * i : 4 * i + 4]) for i in range(3)]
    inline = run(tiny, tmp_path / "i", steps=3, reward="majority(min_share=.4,max_share=.6)")
    assert same(out, inline)


def test_a_step_whose_groups_are_all_skipped_changes_nothing(tiny, tmp_path, capfd):
    out = run(tiny, tmp_path / "r", steps=1, reward="confident-majority(tau=1)", advantage="energy", kl_coef=0.5)
    assert all(float(value.abs().max()) == 0 for name, value in adapter(out).items() if "lora_B" in name)
    assert "skipped 4" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------ sampler and trainer


def still(policy, rate: float = 0.0):
    """An optimizer of that rate, which does not decay, and a schedule for it."""
    optimizer = torch.optim.SGD(policy.trainable(), rate)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)


def set_adapter(policy, size: float):
    """The adapter's output weights at random, of that standard deviation; 0: the policy is the reference."""
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=torch.Generator().manual_seed(0))


def sampled_by_another(groups: list[dict], factor: float, only=lambda g, i: True) -> list[dict]:
    """The groups as a sampler would leave them whose tokens have `factor` times the probabilities."""
    return [
        group
        | {
            "responses": [
                r | {"logprobs": [p + math.log(factor) * only(g, i) for p in r["logprobs"]]}
                for i, r in enumerate(group["responses"])
            ]
        }
        for g, group in enumerate(groups)
    ]


def test_the_gap_is_that_of_the_policy_before_the_step(tiny, tmp_path, monkeypatch):
    config, policy, prompts, groups = step(tiny, tmp_path, minibatches=2, advantage="mean")
    used = [(g, i) for g, group in enumerate(groups) for i, r in enumerate(group["responses"]) if r["advantage"]]
    unused = [(g, i) for g in range(4) for i in range(4) if (g, i) not in used]
    assert len(used) > 4 and len(unused) > 0
    tokens = [len(groups[g]["responses"][i]["token_ids"]) for g, i in used]
    passes, real = [], policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda batch, *rest: passes.append(len(batch)) or real(batch, *rest))
    # The second minibatch, too, is held against the policy that sampled, far as the first update moves it.
    stats = update.update(policy, *still(policy, 10.0), prompts, groups, config, False)
    assert stats["logprob_gap_max"] < 1e-4 and abs(stats["ratio"] - 1) > 1e-3
    assert len(passes) == 3  # one for each minibatch, and one for the second's old log-probabilities
    set_adapter(policy, 0.0)
    # The last response has e times the probability to its sampler: a gap of 1 nat a token.
    for factor in (math.e, 1 / math.e):
        other = sampled_by_another(groups, factor, lambda g, i: (g, i) == used[-1])
        stats = update.update(policy, *still(policy), prompts, other, config, False)
        assert stats["logprob_gap_max"] == pytest.approx(1, abs=1e-4)
        assert stats["logprob_gap_mean"] == pytest.approx(tokens[-1] / sum(tokens), abs=1e-4)
        assert not any(name.startswith("rollout_") for name in stats)
    # What the update leaves out is not looked at; where it leaves out everything, there is no gap to tell.
    other = sampled_by_another(groups, math.e, lambda g, i: (g, i) in unused)
    assert update.update(policy, *still(policy), prompts, other, config, False)["logprob_gap_max"] < 1e-4
    skipped = [group | {"skipped": True} for group in groups]
    assert update.update(policy, *still(policy), prompts, skipped, config, False)["logprob_gap_mean"] is None


def test_cross_entropy_has_a_gap_where_its_temperature_is_the_samplers(tiny, tmp_path):
    for temperature, minibatches in ((1.0, 1), (1.0, 2), (0.7, 1)):
        settings = dict(algorithm="sft", temperature=temperature, minibatches=minibatches)
        config, policy, prompts, groups = step(tiny, tmp_path / f"{temperature}-{minibatches}", **settings)
        groups = [g | {"responses": [r | {"advantage": 1.0} for r in g["responses"]]} for g in groups]
        # To the sampler of the last two questions, tokens have e times the probability.
        other = sampled_by_another(groups, math.e, lambda g, i: g > 1)
        gap = update.update(policy, *still(policy), prompts, other, config, False)["logprob_gap_max"]
        if temperature == 1:
            assert gap == pytest.approx(1 if minibatches == 1 else 0, abs=1e-4)  # the first minibatch's alone
        else:
            assert gap is None


def test_a_rollout_correction_weighs_the_loss_and_not_the_kl(tiny, tmp_path):
    config, policy, prompts, groups = step(tiny, tmp_path, advantage="mean", kl_coef=0.5)
    set_adapter(policy, 0.1)  # away from the reference, so that the KL has a gradient
    with torch.no_grad():  # samples of this policy
        for group, prompt in zip(groups, prompts):
            batch = next(update.pack([prompt], [[r["token_ids"] for r in group["responses"]]], 100_000))
            logprob = policy.logprobs(batch, config.temperature)[0].split([len(r) for r in batch[0].responses])
            for response, values in zip(group["responses"], logprob, strict=True):
                response["logprobs"] = values.tolist()
    idle = [g | {"responses": [r | {"advantage": 0.0} for r in g["responses"]]} for g in groups]
    corrected = replace(config, rollout_correction="truncated")

    def gradient(groups, config):
        stats, apart = update.accumulate(policy, prompts, groups, None, config)
        return gradients(policy), update.disagreement(apart, config)

    both, pull = gradient(groups, config)[0], gradient(idle, config)[0]
    assert max(float(p.abs().max()) for p in pull) > 1e-4 < max(float((b - p).abs().max()) for b, p in zip(both, pull))
    for factor, cap, weight, capped in ((1.0, 2.0, 1, 0), (2.0, 2.0, 0.5, 0), (0.25, 2.0, 2, 1), (0.25, 8.0, 4, 0)):
        mine, stats = gradient(sampled_by_another(groups, factor), replace(corrected, rollout_cap=cap))
        assert stats["rollout_weight_mean"] == pytest.approx(weight, rel=1e-4)
        assert stats["rollout_capped_share"] == capped
        for ours, whole, kl in zip(mine, both, pull, strict=True):
            torch.testing.assert_close(ours, weight * (whole - kl) + kl, atol=1e-5, rtol=1e-3)
    # Off, the sampler's log-probabilities are read for the gap alone.
    mine, _ = gradient(sampled_by_another(groups, 0.25), config)
    assert all(torch.equal(a, b) for a, b in zip(mine, both))


def test_shards_of_another_policy_are_said_and_can_be_weighed(tiny, tmp_path, capfd):
    sampling = dict(model=tiny, steps=1, questions_per_step=4, group_size=4, max_new_tokens=12)
    rollout.main(rollout.Config(out=tmp_path / "rollouts", **sampling))
    path = shards.shard_path(tmp_path / "rollouts", 0)
    shards.write_shard(path, sampled_by_another(shards.read_shard(path), 0.25))
    settings = dict(from_shards=tmp_path / "rollouts", minibatches=2, steps=1)
    plain = run(tiny, tmp_path / "plain", **settings)
    said = capfd.readouterr().out
    (row,) = metrics(plain)
    assert row["logprob_gap_mean"] == pytest.approx(math.log(4), abs=1e-3) and row["alarms"] == []
    assert "gap 1.4e+00 (max 1.4e+00)" in said and "off-policy samples" in said and "GAP" not in said
    weighed = run(tiny, tmp_path / "weighed", rollout_correction="truncated", **settings)
    (weighed_row,) = metrics(weighed)
    assert (weighed_row["rollout_weight_mean"], weighed_row["rollout_capped_share"]) == (2.0, 1.0)
    # Every weight is 2: twice the loss.
    assert weighed_row["loss"] == pytest.approx(2 * row["loss"], rel=1e-3) and not same(plain, weighed)
    again = main(Config(out=tmp_path / "weighed", resume=True))
    assert again["config"]["rollout_correction"] == "truncated"


@pytest.mark.parametrize(
    "mistake, said",
    [
        ({"rollout_cap": 3.0}, "--rollout-cap 3.0 is for .* --rollout-correction truncated; give both"),
        ({"rollout_correction": "truncated", "algorithm": "sft"}, "--algorithm sft makes none: leave one of them out"),
    ],
)
def test_a_correction_with_nothing_to_correct(tiny, tmp_path, mistake, said):
    with pytest.raises(SettingError, match=said):
        Config(model=tiny, out=tmp_path, **SMALL | mistake).resolve()


# ------------------------------------------------------------------------------------------------ cross-entropy


def test_sft_is_cross_entropy_on_the_rewarded_well_formed_responses(tiny, tmp_path):
    config, policy, prompts, groups = step(tiny, tmp_path, algorithm="sft", temperature=0.7)
    for group in groups:
        for i, response in enumerate(group["responses"]):
            response["reward"] = (1.0, 1.0, 0.0, 0.5)[i]
            if i != 1:
                response["text"] = "<think>x</think>\\boxed{1}"
    groups = steps.targets(groups, "think-boxed")
    assert [[r["advantage"] for r in g["responses"]] for g in groups] == [[1.0, 0.0, 0.0, 0.5]] * len(groups)
    stats, _ = update.accumulate(policy, prompts, groups, None, config)
    mine = gradients(policy)
    trained = [(b, g["responses"][i]["token_ids"], w) for b, g in enumerate(groups) for i, w in ((0, 1.0), (3, 0.5))]
    total = sum(len(ids) for _, ids, _ in trained)
    nll = 0.0
    for b, ids, w in trained:
        batch = next(update.pack([prompts[b]], [[ids]], 10_000))
        logprob, _ = policy.logprobs(batch, 1.0)  # at temperature 1, whatever the sampling's
        loss = -w * logprob.sum() / total
        loss.backward()
        nll += loss.item()
    assert stats["loss"] == pytest.approx(nll, rel=1e-5)
    for ours, theirs in zip(mine, gradients(policy)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert max(float(g.abs().max()) for g in mine) > 1e-3


def test_sft_runs_with_minibatches_and_kl(tiny, tmp_path, monkeypatch):
    keyed(monkeypatch)
    settings = dict(steps=1, reward="majority", algorithm="sft", minibatches=2)
    plain, pulled = run(tiny, tmp_path / "a", **settings), run(tiny, tmp_path / "b", kl_coef=5.0, **settings)
    assert metrics(plain)[0]["loss"] > 0 and not same(plain, pulled)
    groups = list(shards.ShardReader(plain / "rollouts"))
    for group in groups:
        assert [r["advantage"] for r in group["responses"]] == rewards.majority(group)


# ------------------------------------------------------------------------------------------------ the judge in the loop


def test_judging_is_label_blind_and_only_where_the_reward_asks(tiny, tmp_path, monkeypatch):
    keyed(monkeypatch)
    settings = dict(steps=2, reward="judged(lam_fmt=0,t_h=.5,tau_h=.1)", advantage="energy")
    plain = run(tiny, tmp_path / "plain", **settings)
    assert all("judge" in r for g in shards.ShardReader(plain / "rollouts") for r in g["responses"])
    assert not same(plain, run(tiny, tmp_path / "frequency", **settings | {"reward": "frequency"}))
    assert not any("judge" in r for g in shards.ShardReader(tmp_path / "frequency/rollouts") for r in g["responses"])
    real = data.load
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: real(*args, **kwargs).without_gold())
    assert same(plain, run(tiny, tmp_path / "blind", **settings))


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_run_from_end_to_end_and_say_what_they_set(tiny, tmp_path, monkeypatch, capsys, preset):
    keyed(monkeypatch)
    main(Config(model=tiny, out=tmp_path / "r", preset=preset, steps=1, questions_per_step=2, max_new_tokens=8,
                eval_questions=0, lora_rank=2, lora_alpha=4))  # fmt: skip
    said = capsys.readouterr().out.splitlines()[0]
    recipe = presets.PRESETS[preset]
    assert said.startswith(f"preset {preset}: ") and f"reward {recipe['reward']}" in said
    assert f"advantage {recipe['advantage']}" in said and "kl_coef 0.01" in said and "clip_low 0.2" in said
    assert "questions_per_step" not in said and "max_prompt_tokens" not in said  # given, and left to the tiny model
    assert metrics(tmp_path / "r")[0]["groups"] == 2


# ------------------------------------------------------------------------------------------------ how a run ends


def sicken(monkeypatch, at: int, alarm: str = "entropy"):
    monkeypatch.setattr(health.Watch, "add", lambda self, row: [alarm] if row["step"] >= at else [])


def test_a_collapsing_run_ends_with_its_last_healthy_checkpoint(tiny, tmp_path, monkeypatch, capfd):
    healthy = run(tiny, tmp_path / "healthy", steps=6, save_every=2, keep=9)
    sicken(monkeypatch, at=4)
    on = run(tiny, tmp_path / "on", steps=6, save_every=1, keep=1)
    assert "COLLAPSE? entropy" in capfd.readouterr().out
    # The latest and, besides, the last one without an alarm before it.
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(on / "checkpoints")] == [3, 6]
    stop = dict(steps=6, save_every=2, stop_on_collapse=True, keep=1)
    out = tmp_path / "stop"
    summary = main(Config(model=tiny, out=out, **SMALL | stop | {"eval_questions": 2, "eval_samples": 2}))
    # The checkpoint after 4 steps is the policy that sampled step 4, which raised the alarm.
    assert summary["end"] == {"steps": 5, "adapter_step": 2, "alarms": {4: ["entropy"]}}
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (healthy / "checkpoints/step-000002" / name).read_bytes()
    # What was evaluated is what was kept.
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    policy.load_adapter(out / "adapter")
    held_out = data.load("shapes", "test", 0)
    from eval import heldout

    config = Config(model=tiny, out=out, **SMALL | stop).resolve()
    assert heldout.without_rows(heldout.evaluate(policy, held_out, config, 2, 2)) == summary["after"]
    again = main(Config(model=tiny, out=out, **SMALL | stop | {"eval_questions": 2, "eval_samples": 2}))
    assert json.dumps(again["end"]) == json.dumps(summary["end"]) and (out / "report.html").is_file()


def test_a_checkpoint_is_chosen_without_labels(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "best_checkpoint", lambda rows, steps: steps[1])
    out = run(tiny, tmp_path / "r", steps=3, save_every=1, keep=1, select="label-free")
    found = checkpoints.checkpoints(out / "checkpoints")
    assert [checkpoints.step_of(path) for path in found] == [1, 2, 3]
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (found[1] / name).read_bytes() != (found[2] / name).read_bytes()
    end = json.loads((out / "summary.json").read_text())["end"]
    assert (end["steps"], end["adapter_step"]) == (3, 2)


def test_an_interruption_leaves_no_checkpoint_to_choose(tiny, tmp_path, monkeypatch):
    settings = dict(steps=4, save_every=2, select="label-free")
    whole = run(tiny, tmp_path / "whole", **settings)
    real, calls = sampling.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(sampling, "generate", interrupted)
    with pytest.raises(Stopped):
        run(tiny, tmp_path / "cut", **settings)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path / "cut/checkpoints")] == [2, 3]
    cut = run(tiny, tmp_path / "cut", **settings)
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(cut / "checkpoints")] == [2, 4]
    assert same(cut, whole)


def test_training_on_the_evaluated_split_is_said(tiny, tmp_path, capsys):
    sampling = dict(model=tiny, split="test", steps=1, questions_per_step=2, group_size=2, max_new_tokens=6)
    rollout.main(rollout.Config(out=tmp_path / "rollouts", **sampling))
    settings = SMALL | {"questions_per_step": 2, "eval_questions": 2, "eval_samples": 2}
    for split, said in (("test", True), ("validation", False)):
        main(Config(from_shards=tmp_path / "rollouts", out=tmp_path / split, eval_split=split, **settings))
        assert ("not held-out" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    "mistake", [{"stop_on_collapse": True}, {"select": "label-free"}, {"reward": "stored", "min_share": 0.2}]
)
def test_shards_have_no_health_and_a_stored_reward_no_band(tiny, tmp_path, mistake):
    config = Config(model=tiny, out=tmp_path, from_shards=tmp_path, **SMALL | {"steps": 1} | mistake)
    with pytest.raises(ValueError, match="--stop-on-collapse|--min-share"):
        config.resolve()


def test_kept_features_change_nothing(tiny, tmp_path):
    settings = dict(steps=3, limit=4)  # every question comes up in every step
    plain = run(tiny, tmp_path / "plain", **settings)
    seen = []
    real = Policy.see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "see", lambda self, pending: seen.extend(pending) or real(self, pending))
        assert same(plain, run(tiny, tmp_path / "kept", feature_cache_gib=0.1, **settings))
    assert len(seen) == 4


def test_the_band_is_given_once(tiny, tmp_path):
    config = Config(model=tiny, out=tmp_path, **SMALL | {"steps": 1, "reward": "majority(min_share=.2)"})
    config.resolve()
    with pytest.raises(ValueError, match="min_share"):
        replace(config, min_share=0.3).resolve()
