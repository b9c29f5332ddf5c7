"""What a step does with skipped groups, with cross-entropy, with a judge; how a collapsing run ends."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rewards
import rollout
from tests.test_train import SMALL, adapter, run, same
from train_upt import Config, main, targets
from upt import answers, data
from upt.errors import Stopped
from upt.groups import shards
from upt.model import update
from upt.model.policy import Policy
from upt.run import checkpoints, health, presets
from upt.stages import sampling


def keyed(monkeypatch, keys=lambda text: str(len(text) % 3)):
    """A random model keeps no format and gives no answers: make keys of its text, and call every text well-formed."""
    monkeypatch.setattr(sampling, "vote_key", lambda text, choices=None: keys(text))
    monkeypatch.setattr(answers, "keeps_format", lambda text, prompt: True)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def step(tiny, tmp_path, **settings):
    """A policy with an adapter, and the prompts and groups of a step with random rewards."""
    config = Config(model=tiny, out=tmp_path, **SMALL | {"steps": 1} | settings).resolve()
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


# ------------------------------------------------------------------------------------------------ cross-entropy


def test_sft_is_cross_entropy_on_the_rewarded_well_formed_responses(tiny, tmp_path):
    config, policy, prompts, groups = step(tiny, tmp_path, algorithm="sft", temperature=0.7)
    for group in groups:
        for i, response in enumerate(group["responses"]):
            response["reward"] = (1.0, 1.0, 0.0, 0.5)[i]
            if i != 1:
                response["text"] = "<think>x</think>\\boxed{1}"
    groups = targets(groups, "think-boxed")
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
    assert again["end"] == summary["end"]


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
