"""The benchmarks at small sizes: their arithmetic, and that the same job is compared (TRL, where it is there)."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, decoding, fullsize, judging, kernels, loop, memory, profile, random_model, sides, update
from kernels import Part, Places, decode_attention
from upt.errors import SettingError
from upt.model.attention import Padded
from upt.reckoning.seconds import CARDS
from upt.reckoning.sizes import sizes_of

SEVEN = "qwen2.5-vl-7b-random"


def test_summary_of_three_steps():
    steps = [
        sides.record(0.0, r, r + u, tokens, 4, 3) for r, u, tokens in ((1.0, 4.0, 40), (3.0, 1.0, 60), (2.0, 7.0, 80))
    ]
    found = loop.summarise(steps)
    assert (found["seconds"], found["fastest"], found["slowest"]) == (5.0, 4.0, 9.0)
    assert (found["rollout"], found["update"]) == (2.0, 4.0)
    assert (found["length"], found["trained"], found["tokens_per_second"]) == (15.0, 0.75, 10.0)
    assert found["sampled_per_second"] == 30.0  # 180 tokens in 6 seconds of rollout


def test_both_sides_run_on_the_same_prompts(tiny, capsys, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(loop, "in_own_process", lambda function, *args: function(*args))  # saves three starts
    config = loop.Config(model=tiny, steps=2, warmup=0, questions=2, group_size=2, trl_accumulation=(1,))
    result = json.loads(json.dumps(loop.main(config)))
    assert all(len(steps) == 2 and all(step["tokens"] >= 4 for step in steps) for steps in result["steps"].values())
    for name in ("upt", "TRL"):
        assert all(step["seconds"] > step["rollout"] > 0 for step in result["steps"][name])
    upt, trl, generate = (result["sides"][name] for name in ("upt", "TRL", "HF generate"))
    assert result["ratio"]["seconds"] == trl["seconds"] / upt["seconds"]
    assert result["generate_ratio"]["rollout"] == generate["rollout"] / upt["rollout"]
    assert sys.platform != "linux" or all(side["peak_mb"] >= 0 for side in (upt, trl, generate))
    printed = capsys.readouterr().out
    assert "TRL / upt: seconds" in printed and "HF generate / upt: rollout" in printed


def test_pictures_of_361_tokens_and_responses_that_do_not_stop(tiny, tmp_path):
    config = loop.Config(model=tiny, shape="pictures", questions=1, group_size=6, trl_accumulation=(1,)).resolve()
    ours = sides.Ours(config, tmp_path / "run")
    generate = sides.Generate(ours)
    steps = [side.step(0) for side in (ours, generate)]
    assert [step["tokens"] for step in steps] == [6 * 64, 6 * 64]
    assert steps[0]["trained"] == 1  # by coins that differ, as they do for this seed
    assert ours.prompts == generate.prompts and ours.prompts[0].count(ours.policy.base.config.image_token_id) == 361
    _, processor = sides.plain(ours)  # as TRL is given it
    assert processor.tokenizer.eos_token_id == ours.policy.base.config.image_token_id


def test_a_response_of_generate_ends_with_its_stop_token(tiny, tmp_path):
    config = loop.Config(model=tiny, questions=1, group_size=2, trl_accumulation=(1,)).resolve()
    generate = sides.Generate(sides.Ours(config, tmp_path / "run"))
    stop, pad = generate.settings.eos_token_id, generate.settings.pad_token_id

    def answers(input_ids, **kwargs):
        return torch.cat([input_ids.repeat(2, 1), torch.tensor([[5, stop, pad, pad], [5, 6, 7, 8]])], 1)

    generate.model.generate = answers
    assert generate.step(0)["tokens"] == 2 + 4


def test_sizes_of_the_loop_are_those_of_the_shape_unless_given():
    given = loop.Config(shape="pictures", group_size=8).resolve()
    assert (given.questions, given.group_size) == (4, 8)
    assert (loop.Config().resolve().questions, loop.Config().resolve().group_size) == (32, 8)
    with pytest.raises(SettingError, match="--trl-accumulation 3 does not divide"):
        loop.Config(trl_accumulation=(1, 3)).resolve()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's count, which not all have")
def test_memory_that_was_held_and_is_gone_again():
    gc.collect()  # what is let go in between would be missing from what is counted
    resident = memory.Resident()
    del_me = bytearray(300 * 10**6)
    del del_me
    assert resident.above() == pytest.approx(300e6, rel=0.2)
    assert memory.Resident().above() < 50e6  # the count starts anew
    assert memory.in_own_process(os.getpid) != os.getpid()


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
    last = cases.cases((24, 300, 16), "cpu")[-1]()
    torch.testing.assert_close(last.forms["naive"](), last.forms[cases.OURS](), atol=1e-5, rtol=1e-5)
    assert last.job == "decode_attention 6 rows of 2 x 10 + 4 keys"


SMALL = {"group_size": 2, "image_tokens": 32}


def test_the_full_size_check_at_a_small_size(capsys):
    config = fullsize.Config("tiny-random", questions=2, max_new_tokens=5, steps=1, **SMALL)
    result = json.loads(json.dumps(fullsize.main(config)))
    printed = capsys.readouterr().out
    for way in ("kernels", "eager"):
        (step,) = result["steps"][way]
        assert step["tokens"] == 2 * 2 * 5 and step["prompt_tokens"] > 32 and step["update_s"] > 0
        assert 0 <= step["gap_mean"] <= step["gap_max"] < 1e-4  # in float32
        assert f"\n{way} " in printed


def test_what_fails_is_a_result_and_the_rest_goes_on(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("no room\nin several lines")

    monkeypatch.setitem(decoding.WAYS, "copied keys", {"upt.model.slots.decode_attention": broken})
    monkeypatch.setitem(decoding.WAYS, "HF generate", {"bench.decoding.Decoding.generate": broken})
    config = decoding.Config("tiny-random", slots=(2, 4), new_tokens=3, **SMALL)
    result = json.loads(json.dumps(decoding.main(config)))
    rows = {(row["way"], row["slots"]): row for row in result["rows"]}
    assert len(rows) == 8 and rows["HF generate", 4]["error"] == "OutOfMemoryError: no room"
    assert "copied keys      4  OutOfMemoryError: no room\n" in capsys.readouterr().out
    assert all(rows["no graph", slots]["same"] == 1 and rows["upt", slots]["ms"] > 0 for slots in (2, 4))
    monkeypatch.setitem(decoding.WAYS, "upt", {"upt.model.slots.decode_attention": broken})
    with pytest.raises(SystemExit, match="our decoding failed: OutOfMemoryError: no room"):
        decoding.main(config)


def test_decoding_beside_generate_and_copied_keys(capsys):
    result = decoding.main(decoding.Config("tiny-random", slots=(4,), new_tokens=4, **SMALL))
    rows = {row["way"]: row for row in result["rows"]}
    assert rows["copied keys"]["same"] == 1  # float32: no other rounding that matters
    assert all(row["tokens_per_second"] == pytest.approx(4000 / row["ms"]) for row in rows.values())
    with pytest.raises(SettingError, match="--slots 3 is no multiple of --group-size 2"):
        decoding.main(decoding.Config("tiny-random", slots=(3,), **SMALL))


def test_copied_keys_are_the_attention_of_decoding():
    states = [torch.randn(3, 2, 5, 8) for _ in range(4)]
    states[1][0, :, 4:] = states[2][0, :, 2:] = torch.nan  # not in use
    shared = Part(*states[:2], torch.tensor([4, 0, 5]), Places([0, 2, 0], 3))
    own = Part(*states[2:], torch.tensor([2, 1, 5]))
    query = torch.randn(3, 6, 8)
    found = decoding.copied_keys(query, [shared, own], 0.3)
    torch.testing.assert_close(found, decode_attention(query, [shared, own], 0.3))


def test_the_floor_of_a_step_by_hand():
    sizes = sizes_of(random_model.MODELS[SEVEN])
    # Qwen2.5-VL-7B: 28 layers of 2 x 3584^2 + 2 x 3584 x 512 + 3 x 3584 x 18944, a head of 152064 x 3584, LoRA of rank
    # 64 on all of them; 57344 bytes of keys and values a token.
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    lora = 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    read = 2 * (28 * (layer + lora) + 152064 * 3584) + 57344 * (8 * 1000 + 64 * 64)
    assert decoding.floor_ms(sizes, 64, 8, 1000, 128, gb_s=3000) == pytest.approx(1000 * read / 3000e9)
    config = decoding.Config(SEVEN)
    assert decoding.reckoned_ms(sizes, CARDS["h100"], config, 64, 1000) > decoding.floor_ms(
        sizes, 64, 8, 1000, 128, gb_s=3350
    )


def test_packed_update_with_a_dense_mask():
    prompts, responses = [(0, 5), (9, 12)], [[(5, 8), (8, 9)], [(12, 14)]]
    states = [torch.randn(1, heads, 14, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    found = [kind(prompts, responses, torch.device("cpu"))(0, *states, 0.4) for kind in (Padded, update.Dense)]
    torch.testing.assert_close(*found)


def test_the_update_by_attention_at_a_small_size(capsys):
    config = update.Config("tiny-random", tokens=(128, 256), row_tokens=128, repeats=1, **SMALL)
    result = json.loads(json.dumps(update.main(config)))
    assert [row["tokens"] for row in result["rows"] if row["way"] == "upt"] == pytest.approx([128, 256], abs=2)
    assert all(row["apart"] < 1e-4 and row["backward_s"] > 0 for row in result["rows"])
    assert len(result["rows"]) == 6 and "\ndense " in capsys.readouterr().out
    with pytest.raises(SettingError, match="--row-tokens 64 has no room for 2 responses"):
        update.main(update.Config("tiny-random", tokens=(64,), row_tokens=64, **SMALL))


@pytest.mark.parametrize(
    "name, gib, card",
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L4", 22.2, "l4"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100"),
        ("NVIDIA H200", 139.7, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, None),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA L40", 44.4, None),
    ],
)
def test_the_data_sheet_of_a_gpu(monkeypatch, name, gib, card):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    assert random_model.card("cuda") == CARDS.get(card) and random_model.card("cpu") is None


def test_a_step_as_reckoned_holds_its_weights_and_fits():
    found = fullsize.reckoned(fullsize.Config(SEVEN), CARDS["h100"], 80e9, 1000)
    weights = 2 * sizes_of(random_model.MODELS[SEVEN]).parameters / 1e9
    assert weights < found["rollout_peak_gb"] < 80 and weights < found["update_peak_gb"] < 80
    assert found["tokens_per_second"] * found["rollout_s"] == pytest.approx(16 * 8 * 256)


@pytest.mark.parametrize(
    "interpreter, parts, status, last",
    [
        ("false", [], 1, "== FAILED: tests decoding step update kernels"),
        ("true", ["update"], 0, r"== update: \d+ s"),
        ("true", ["updates"], 1, "== FAILED: updates"),
    ],
)
def test_parts_on_a_gpu_do_not_keep_one_another_from_running(interpreter, parts, status, last):
    script = Path(__file__).parents[1] / "bench/gpu.sh"
    env = os.environ | {"PYTHON": interpreter, "MODEL": "tiny-random"}
    done = subprocess.run(["bash", script, *parts], env=env, capture_output=True, text=True)
    assert done.returncode == status and re.fullmatch(last, done.stdout.splitlines()[-1])


def test_the_shares_of_a_step_add_up(tiny, capsys):
    found = profile.main(loop.Config(model=tiny, questions=2, group_size=2, warmup=1))
    assert {*found} == {"rollout", "update"}
    for shares in found.values():
        assert sum(shares.values()) == pytest.approx(1)
    # A random model never agrees with itself, so that its update has nothing to compute.
    assert found["rollout"]["linear layers"] > 0 and found["rollout"]["attention"] > 0
    assert "linear layers" in capsys.readouterr().out


def test_kinds_of_operations_by_hand():
    events = [("aten::mm", 3.0), ("aten::bmm", 1.0), ("aten::bitwise_xor", 1.0), ("aten::mul", 5.0)]
    made = [SimpleNamespace(key=name, self_cpu_time_total=time) for name, time in events]
    found = profile.shares(SimpleNamespace(key_averages=lambda: made))
    assert found == {"attention": 0.1, "linear layers": 0.3, "noise": 0.1, "other": 0.5}
