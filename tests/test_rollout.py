"""Rollouts: the same tokens in any batch, log-probabilities that the trainer agrees with, valid shards."""

import json
from dataclasses import replace

import pytest
import torch

import rollout
from kernels import row_id
from upt import data
from upt.groups import shards
from upt.model import decoding
from upt.model.packing import pack
from upt.model.policy import Policy
from upt.prompts import template
from upt.stages import sampling


@pytest.fixture(scope="module")
def policy(tiny) -> Policy:
    return Policy.load(tiny, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts(policy):
    """32 prompts of several lengths."""
    found, _ = policy.encode(data.load("shapes", "train", 0, limit=32), template("think-boxed"))
    assert len({len(prompt.ids) for prompt in found}) > 2
    return found


def config(tiny, **settings) -> rollout.Config:
    return rollout.Config(model=tiny, **{"max_new_tokens": 24} | settings).resolve()


def tokens(found) -> list[list[list[int]]]:
    return [[response.ids for response in group] for group in found]


def test_256_responses_do_not_depend_on_the_batch(policy, prompts, tiny):
    settings = config(tiny, group_size=8, max_new_tokens=12)
    together = sampling.sample_groups(policy, prompts, 5, settings)
    some = replace(settings, slots=64)
    few = replace(settings, slots=7)
    ones = [
        decoding.generate(policy, [prompt], [row_id(5, prompt.uid, g)], settings)[0].ids
        for prompt in prompts
        for g in range(8)
    ]
    assert tokens(sampling.sample_groups(policy, prompts, 5, some)) == tokens(together)
    assert tokens(sampling.sample_groups(policy, prompts, 5, few)) == tokens(together)
    assert ones == [ids for group in tokens(together) for ids in group]
    assert len({tuple(ids) for ids in ones}) > 200  # they are 256 draws, not one


def test_bf16_share_that_differs_between_batches_is_small(tiny, record_property):
    policy = Policy.load(tiny, dtype="bf16", device="cpu")
    prompts, _ = policy.encode(data.load("shapes", "train", 0, limit=16), template("think-boxed"))
    settings = config(tiny, group_size=4)
    together = tokens(sampling.sample_groups(policy, prompts, 0, settings))
    single = tokens(sampling.sample_groups(policy, prompts, 0, replace(settings, slots=1)))
    pairs = [(a, b) for one, two in zip(together, single) for a, b in zip(one, two)]
    share = sum(a != b for a, b in pairs) / len(pairs)
    record_property("bf16_share_that_differs", share)
    print(f"bf16: {share:.1%} of {len(pairs)} responses differ between batch sizes")
    assert share < 0.5


def test_noise_changes_with_seed_step_and_index(policy, prompts, tiny):
    settings = config(tiny, group_size=4)
    few = prompts[:4]
    base = tokens(sampling.sample_groups(policy, few, 0, settings))
    assert tokens(sampling.sample_groups(policy, few, 0, settings)) == base
    assert tokens(sampling.sample_groups(policy, few, 1, settings)) != base
    assert tokens(sampling.sample_groups(policy, few, 0, replace(settings, seed=1))) != base
    assert tokens(sampling.sample_groups(policy, few[::-1], 0, settings))[::-1] == base
    fewer = tokens(sampling.sample_groups(policy, few, 0, replace(settings, group_size=2)))
    assert fewer == [group[:2] for group in base]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_logprobs_taken_while_sampling_are_the_trainers(snapshots, family):
    policy = Policy.load(snapshots[family], dtype="fp32", device="cpu")
    prompts, _ = policy.encode(data.load("shapes", "train", 0, limit=6), template("boxed"))
    settings = config(snapshots[family], group_size=3, temperature=0.8, top_p=0.9, top_k=50)
    found = sampling.sample_groups(policy, prompts, 0, settings)
    for batch in pack(prompts, tokens(found), 10_000):
        with torch.no_grad():
            logprob, entropy = policy.logprobs(batch, 0.8)
        at = 0
        for row in batch:
            for g, i in row.owners:
                response = found[g][i]
                count = len(response.ids)
                torch.testing.assert_close(torch.tensor(response.logprobs), logprob[at : at + count], atol=1e-4, rtol=0)
                assert response.entropy == pytest.approx(float(entropy[at : at + count].mean()), abs=1e-4)
                at += count


def test_greedy_is_hf_greedy(policy, tiny):
    questions = data.load("shapes", "train", 0, limit=4)
    prompts, _ = policy.encode(questions, template("boxed"))
    found = sampling.sample_groups(policy, prompts, 0, config(tiny, group_size=1, temperature=0.0))
    for question, prompt, (response,) in zip(questions, prompts, found):
        seen = policy.family.image_processor(images=[question.image], return_tensors="pt")
        ids = torch.tensor([prompt.ids])
        types = (ids == policy.base.config.image_token_id).int()
        vision = [policy.base.config.image_token_id, policy.base.config.video_token_id]
        vision += [policy.base.config.vision_start_token_id, policy.base.config.vision_end_token_id]
        out = policy.base.generate(
            ids, **seen, mm_token_type_ids=types, max_new_tokens=24, do_sample=False, suppress_tokens=vision
        )
        assert out[0, len(prompt.ids) :].tolist()[: len(response.ids)] == response.ids


def test_stop_and_length(policy, prompts, tiny):
    found = [r for group in sampling.sample_groups(policy, prompts, 0, config(tiny, group_size=8)) for r in group]
    eos = policy.tokenizer.eos_token_id
    for response in found:
        assert len(response.logprobs) == len(response.ids) <= 24
        if response.finish == "stop":
            assert response.ids[-1] == eos
        else:
            assert len(response.ids) == 24 and response.ids[-1] != eos
        assert eos not in response.ids[:-1]
    assert {r.finish for r in found} == {"stop", "length"}


def test_image_tokens_are_never_sampled(tiny, prompts):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    config_ = policy.base.config
    banned = {
        config_.image_token_id,
        config_.video_token_id,
        config_.vision_start_token_id,
        config_.vision_end_token_id,
    }
    head = torch.nn.Linear(64, policy.base.lm_head.weight.shape[0])  # one that wants nothing else
    torch.nn.init.zeros_(head.weight)
    head.bias.data.zero_()[list(banned)] = 50.0
    policy.base.lm_head = head
    for temperature in (1.0, 0.0):
        found = sampling.sample_groups(policy, prompts[:4], 0, config(tiny, group_size=2, temperature=temperature))
        assert not banned & {token for group in found for r in group for token in r.ids}


def test_each_prompt_is_prefilled_once(policy, prompts, tiny, monkeypatch):
    shapes_seen = []
    real = Policy.hidden
    monkeypatch.setattr(
        Policy,
        "hidden",
        lambda self, ids, *args, **kwargs: shapes_seen.append(tuple(ids.shape)) or real(self, ids, *args, **kwargs),
    )
    sampling.sample_groups(policy, prompts[:4], 0, config(tiny, group_size=8))
    assert shapes_seen[0] == (1, sum(len(p.ids) for p in prompts[:4]))
    later = [rows for rows, width in shapes_seen[1:]]
    assert all(width == 1 for _, width in shapes_seen[1:]) and later[0] <= 32
    assert later == sorted(later, reverse=True) and later[-1] < later[0]  # finished rows take no part any more


def test_schedule_goes_through_every_question_each_epoch():
    steps = [sampling.schedule(10, 3, 7, step) for step in range(6)]
    assert all(len(set(rows)) == 3 for rows in steps)
    assert len(set(sum(steps[:3], []))) == 9 and len(set(sum(steps[3:], []))) == 9
    assert steps[0] != steps[3] and steps[0] == sampling.schedule(10, 3, 7, 0) != sampling.schedule(10, 3, 8, 0)
    assert sorted(sampling.schedule(4, 32, 0, 5)) == [0, 1, 2, 3]


def test_main_writes_shards_and_goes_on(tiny, tmp_path, capsys):
    settings = dict(model=tiny, out=tmp_path / "r", questions_per_step=3, group_size=2, max_new_tokens=8)
    rollout.main(rollout.Config(steps=2, **settings))
    first = {path.name: path.read_bytes() for path in shards.list_shards(tmp_path / "r")}
    assert len(first) == 2
    for _, groups in shards.ShardReader(tmp_path / "r").shards():
        assert [len(group["responses"]) for group in groups] == [2, 2, 2]
        assert all(shards.open_image(tmp_path / "r", group["image"]).size == (84, 84) for group in groups)
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["stage"] == "rollout" and manifest["config"]["group_size"] == 2
    # A shard that is missing or damaged is made again, the others are kept, more steps are added.
    shards.shard_path(tmp_path / "r", 0).unlink()
    shards.shard_path(tmp_path / "r", 1).write_text("{not json")
    rollout.main(rollout.Config(steps=3, **settings))
    again = {path.name: path.read_bytes() for path in shards.list_shards(tmp_path / "r")}
    assert len(again) == 3 and {name: again[name] for name in first} == first
    assert "step-000001.jsonl" in capsys.readouterr().err
    with pytest.raises(ValueError, match="group_size"):
        rollout.main(rollout.Config(steps=2, **settings | {"group_size": 4}))


def test_prompts_over_the_limit_are_dropped_and_counted(policy, tiny, prompts, capsys):
    lengths = sorted(len(prompt.ids) for prompt in prompts)
    settings = config(tiny, limit=32, questions_per_step=32, max_prompt_tokens=lengths[16])
    questions = data.load("shapes", "train", 0, limit=32)
    batch = sampling.step_batch(policy, questions, 0, settings)
    over = sum(n > lengths[16] for n in lengths)
    assert over and len(batch.prompts) == 32 - over == len(batch.questions) and len(batch.left_out) == over
    assert all("over --max-prompt-tokens" in reason for reason in batch.left_out.values())
    none = sampling.step_batch(policy, questions, 0, replace(settings, max_prompt_tokens=5))
    assert not none.prompts and len(none.left_out) == 32


def test_settings_are_checked(tiny):
    with pytest.raises(ValueError, match="--group-size"):
        config(tiny, group_size=0)
    with pytest.raises(ValueError, match="top-p"):
        config(tiny, top_p=0.0)
    preset = rollout.Config(model=tiny, preset="mm-upt").resolve()
    assert (preset.group_size, preset.temperature, preset.top_p, preset.prompt) == (10, 0.7, 0.99, "boxed")
    assert preset.max_new_tokens == 32 and preset.min_pixels is None  # the tiny model's own
    real = rollout.Config(data="geoqa", preset="mm-upt").resolve()
    assert (real.max_prompt_tokens, real.min_pixels, real.max_pixels) == (2048, 262144, 1204224)
    assert real.questions_per_step == 512 and real.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert rollout.Config(model=tiny, preset="mm-upt", group_size=4).resolve().group_size == 4
