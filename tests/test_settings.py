"""Settings: each is of its type and in its range before anything is loaded, and what is written can be written."""

import errno
import importlib
import inspect
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import rewards
import train_upt
from kernels.advantage import ADVANTAGES
from upt import files
from upt.data import names
from upt.errors import DataError, PolicyError, SettingError, StorageError, UserError
from upt.model import folders
from upt.ranges import RANGES, Count, Nucleus, Share, outside, range_of
from upt.run import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = "train_upt rollout judge rewards synthesize warmup ablate".split()
SCRIPTS += [f"eval.{name}" for name in "run score compare heldout synthetic".split()]
SCRIPTS += [f"bench.{name}" for name in "loop fullsize judging kernels studies threads front_page".split()]
FREE_TEXT = {"judge_prefix", "train"}  # may be empty
FREE_NUMBERS = {"delta"}  # an offset, of either sign


def config_of(script: str):
    return importlib.import_module(script).Config


def parts_of(hint) -> list:
    """The annotations that a hint is put together from, itself included."""
    inner = [] if get_origin(hint) in (Literal, Annotated) else get_args(hint)
    inside = parts_of(get_args(hint)[0]) if get_origin(hint) is Annotated else []
    return [hint, *(part for arg in inner for part in parts_of(arg)), *(p for p in inside if get_args(p))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_and_every_name_has_a_range(script):
    config = config_of(script)
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        bare = {part for part in parts_of(hints[field.name]) if part in (int, float, str)}
        assert not bare or field.name in FREE_TEXT, f"{script}: {field.name} is {hints[field.name]}"
        marks = [mark for part in parts_of(hints[field.name]) for mark in getattr(part, "__metadata__", ())]
        assert all(mark in RANGES for mark in marks if isinstance(mark, str)), marks  # a slip would check nothing


@pytest.mark.parametrize("function", [*rewards.REWARDS.values(), *ADVANTAGES.values()], ids=lambda f: f.__name__)
def test_every_inline_number_has_a_range(function):
    for name, setting in [*inspect.signature(function).parameters.items()][1:]:
        number = isinstance(setting.default, int | float) and not isinstance(setting.default, bool)
        assert not number or name in FREE_NUMBERS or range_of(setting.annotation), name


NAN, INF = float("nan"), float("inf")
REFUSED = [  # script, setting, value, what is said
    ("train_upt", "steps", 0, "--steps must be at least 1, not 0"),
    ("train_upt", "steps", np.True_, "steps is True: expected a whole number"),
    ("train_upt", "steps", np.float64(4), "steps is 4.0: expected a whole number"),
    ("train_upt", "limit", -5, "--limit must be at least 1"),
    ("train_upt", "seed", -1, "--seed must be from 0 to 2.63 - 1, not -1"),
    ("train_upt", "seed", 2**63, "--seed must be from 0 to 2.63 - 1"),
    ("train_upt", "max_grad_norm", -0.1, "--max-grad-norm must be at least 0, not -0.1"),
    ("train_upt", "max_grad_norm", INF, "--max-grad-norm must be a finite number, not inf"),
    ("train_upt", "weight_decay", NAN, "--weight-decay must be a finite number, not nan"),
    ("train_upt", "learning_rate", np.float32("nan"), "--learning-rate must be a finite number"),
    ("train_upt", "learning_rate", 1e5, "--learning-rate must be from 0 to 1"),
    ("train_upt", "kl_coef", 10**400, "--kl-coef must be a finite number"),
    ("train_upt", "dual_clip", 1.0, "--dual-clip must be 0 .off. or above 1, not 1.0"),
    ("train_upt", "clip_low", 1.2, "--clip-low must be from 0 to 1"),
    ("train_upt", "clip_high", -0.2, "--clip-high must be at least 0"),
    ("train_upt", "rollout_cap", 0.5, "--rollout-cap must be at least 1, not 0.5"),
    ("train_upt", "rollout_cap", INF, "--rollout-cap must be a finite number"),
    ("train_upt", "rollout_correction", "sequence", "expected none or truncated"),
    ("train_upt", "top_p", 0, "--top-p must be above 0 and at most 1"),
    ("train_upt", "top_k", -2, "--top-k must be at least 0"),
    ("train_upt", "temperature", 1e-30, "--temperature must be 0 .greedy. or at least 0.001"),
    ("train_upt", "own_share", 0.0, "--own-share must be from 0.001 to 0.999, or 1"),
    ("train_upt", "rounds", -1, "--rounds must be at least 0"),
    ("train_upt", "feature_cache_gib", -1, "--feature-cache-gib must be at least 0"),
    ("train_upt", "feature_cache_gib", 1e300, "--feature-cache-gib must be at most 1000000"),
    ("train_upt", "kl_coef", 1e308, "--kl-coef must be at most 1000, not 1e.308"),
    ("train_upt", "weight_decay", 1e4, "--weight-decay must be at most 1000"),
    ("train_upt", "group_size", 10**9, "--group-size must be at most 65536, not 1000000000"),
    ("train_upt", "eval_samples", 10**6, "--eval-samples must be at most 65536"),
    ("train_upt", "lora_rank", 10**6, "--lora-rank must be at most 65536"),
    ("train_upt", "lora_alpha", 0, "--lora-alpha must be above 0"),
    ("train_upt", "max_new_tokens", 10**12, r"--max-new-tokens must be at most 2.31 - 1"),
    ("train_upt", "top_k", 2**31, r"--top-k must be at most 2.31 - 1"),
    ("eval.run", "n", 10**7, "--n must be at most 65536"),
    ("train_upt", "eval_limit", 0, "--eval-limit must be at least 1"),
    ("train_upt", "data", "", "--data must be a name or a path, not ''"),
    ("train_upt", "model", "  ", "--model must be a name or a path"),
    ("train_upt", "out", "", "out is '': expected a path"),
    ("train_upt", "lora_targets", [], "--lora-targets must be one or more"),
    ("train_upt", "lora_targets", ["q_proj", 3], "lora_targets is 3: expected a text"),
    ("train_upt", "eval", [""], "--eval must be a name or a path"),
    ("judge", "judge_top_p", 1.01, "--judge-top-p must be above 0 and at most 1"),
    ("rewards", "max_share", 1.5, "--max-share must be from 0 to 1"),
    ("synthesize", "max_abstentions", -0.5, "--max-abstentions must be from 0 to 1"),
    ("warmup", "guess_wrong", 1.1, "--guess-wrong must be from 0 to 1"),
    ("warmup", "asking", -1, "--asking must be at least 0"),
    ("ablate", "jobs", 0, "--jobs must be at least 1"),
    ("ablate", "rewards", [], "--rewards must be a name or a path"),
    ("ablate", "confident", 1.2, "--confident must be from 0 to 1"),
    ("eval.run", "n", 0, "--n must be at least 1"),
    ("eval.heldout", "eval_questions", 0, "--eval-questions must be at least 1"),
    ("eval.compare", "seed", -3, "--seed must be from 0"),
    ("bench.loop", "trl_accumulation", (1, 0), "--trl-accumulation must be at least 1"),
    ("bench.kernels", "pairs", 0, "--pairs must be at least 1"),
    ("bench.studies", "jobs", 0, "--jobs must be at least 1"),
]


@pytest.mark.parametrize("script, name, value, said", REFUSED, ids=[f"{s}-{n}-{v!r:.20}" for s, n, v, _ in REFUSED])
def test_a_value_out_of_its_range_is_refused_with_what_it_has_to_be(script, name, value, said):
    needed = {"rewards": dict(rollouts="r", out="o"), "eval.compare": dict(a="a", b="b")}
    with pytest.raises(SettingError, match=said):
        config_of(script)(**needed.get(script, {}) | {name: value})


def test_what_stands_for_a_value_is_taken_and_ends_of_ranges_are_in():
    config = train_upt.Config(
        steps=np.int64(4), temperature=np.float32(0.5), gradient_checkpointing=np.True_, seed=2**63 - 1, dual_clip=0,
        max_grad_norm=0, learning_rate=0, clip_low=1.0, min_share=1, data=Path("a"), adapter=Path("b"), out="c",
        lora_targets=["q_proj"], eval=(Path("x=y"),), from_shards="~/d", init_adapter=Path("e"), prompt=Path("f"),
    )  # fmt: skip
    assert (config.steps, type(config.steps)) == (4, int) and (config.temperature, config.out) == (0.5, Path("c"))
    assert (config.data, config.adapter, config.eval, config.prompt) == ("a", "b", ("x=y",), "f")
    assert config.gradient_checkpointing is True and config.from_shards == Path("~/d").expanduser()
    assert [outside(value, Nucleus) for value in (1, 1e-9, 0, 2)] == [None, None, *["above 0 and at most 1"] * 2]
    assert outside(1, Count) is None and outside(-0.0, Share) is None and outside(7, int) is None


def test_a_setting_changed_later_is_checked_when_it_is_used(tiny):
    config = train_upt.Config(model=tiny)
    config.steps, config.clip_low = 0, 3
    with pytest.raises(SettingError, match="--steps must be at least 1"):
        train_upt.main(config)


@pytest.mark.parametrize(
    "name, said",
    [
        ("step", "step is no setting; did you mean 'steps'"),
        ("lr", "lr is no setting; it is called learning_rate here"),
        ("num_generations", "it is called group_size here"),
        ("vllm_importance_sampling_cap", "it is called rollout_cap here"),
        ("zzz", "zzz is no setting; --help of the script lists them"),
    ],
)
def test_a_name_that_is_no_setting_in_a_notebook(name, said):
    with pytest.raises(SettingError, match=said):
        train_upt.Config(**{name: 4})


@pytest.mark.parametrize("low, high", [("min_share", "max_share"), ("min_agreement", "max_agreement")])
def test_limits_the_wrong_way_round(low, high):
    said = f"--{low} 0.6 is above --{high} 0.5: lower the one or raise the other".replace("_", "-")
    with pytest.raises(SettingError, match=said):
        train_upt.Config(**{low: 0.6, high: 0.5})
    train_upt.Config(**{low: 0.5, high: 0.5})


@pytest.mark.parametrize(
    "limits, said",
    [
        ({"min_pixels": 2000, "max_pixels": 1000}, "--min-pixels 2000 is above --max-pixels 1000"),
        ({"min_pixels": 10**6}, "--min-pixels 1000000 is above --max-pixels 78400 .the snapshot's own."),
        ({"max_pixels": 2000}, "--min-pixels 3136 .the snapshot's own. is above --max-pixels 2000"),
        ({"max_pixels": 783}, "--max-pixels 783: one token of a picture takes 28 x 28 pixels: give 784 or more"),
    ],
)
def test_limits_of_pictures_that_no_picture_can_keep(tiny, limits, said):
    with pytest.raises(UserError, match=said):
        train_upt.Config(model=tiny, **limits).resolve()


def test_limits_of_pictures_that_can_be_kept(tiny, tmp_path):
    train_upt.Config(model=tiny, min_pixels=3136, max_pixels=3136).resolve()
    folders.check_pixels("org/name", None, 784)  # of a hub id nothing is known yet
    with pytest.raises(UserError, match="--min-pixels 262144 is above --max-pixels 1000"):  # the default for others
        train_upt.Config(data="geoqa", max_pixels=1000).resolve()
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16, "merge_size": 2, "min_pixels": 4096}')
    with pytest.raises(PolicyError, match="32 x 32 pixels: give 1024"):
        folders.check_pixels(str(tmp_path), None, 1000)
    with pytest.raises(PolicyError, match="--min-pixels 4096 .the snapshot's own. is above --max-pixels 2048"):
        folders.check_pixels(str(tmp_path), None, 2048)


@pytest.mark.parametrize("script", ["train_upt", "rollout", "eval.run", "eval.heldout"])
def test_a_response_longer_than_the_model_has_positions(tiny, script):
    data = {"data": "x"} if script == "eval.run" else {}
    with pytest.raises(PolicyError, match=f"--max-new-tokens 2049: {tiny} has positions for 2048 tokens in all"):
        config_of(script)(model=tiny, max_new_tokens=2049, **data).resolve()
    config_of(script)(model=tiny, max_new_tokens=2048, **data).resolve()


def test_an_adapter_that_goes_on_training_keeps_its_settings(tiny, tmp_path):
    from upt.model import Policy

    adapter = str(tmp_path / "adapter")
    policy = Policy.load(tiny, device="cpu")
    policy.add_lora(3, 5, ("down_proj", "q_proj"))
    policy.save(adapter)

    def resolved(**given):
        return train_upt.Config(model=tiny, init_adapter=adapter, **given).resolve()

    for given, said in (
        ({"lora_rank": 4}, f"--lora-rank 4: the adapter {adapter} has 3, and keeps it; leave it out"),
        ({"lora_alpha": 64}, "--lora-alpha 64: .* has 5,"),
        ({"lora_targets": ["q_proj"]}, "--lora-targets q_proj: .* has q_proj down_proj,"),
    ):
        with pytest.raises(SettingError, match=said):
            resolved(**given)
    kept = resolved()
    assert (kept.lora_rank, kept.lora_alpha, kept.lora_targets) == (3, 5, ("q_proj", "down_proj"))
    assert kept.resolve() == kept == resolved(lora_rank=3, lora_alpha=5, lora_targets=("q_proj", "down_proj"))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_lora_targets_are_layers_of_the_language_model(snapshots, family, monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.delattr(AutoModelForImageTextToText, "from_pretrained")  # no weight is read

    def resolved(*targets: str):
        return train_upt.Config(model=snapshots[family], lora_targets=targets).resolve()

    resolved("self_attn.q_proj", "down_proj")
    for target, said in (
        ("q_prj", "there is no such linear layer.*has q_proj, k_proj, v_proj.*did you mean 'q_proj'"),
        ("blocks.0.attn.qkv", r"visual\.blocks\.0\.attn\.qkv stays frozen"),
        ("lm_head", "lm_head stays frozen"),
        ("proj", r"visual\.\S+\.proj stays frozen"),  # the end of a name's part is no name
        ("input_layernorm", "there is no such linear layer"),
        ("(q|k)_proj", "there is no such linear layer"),
    ):
        with pytest.raises(SettingError, match=said):
            resolved("v_proj", target)


@pytest.mark.parametrize(
    "targets, layers",
    [
        (("layers.0.self_attn.q_proj",), {"layers.0.self_attn.q_proj"}),
        (
            ("v_proj", "1.self_attn.k_proj"),
            {f"layers.{i}.self_attn.v_proj" for i in range(3)} | {"layers.1.self_attn.k_proj"},
        ),
        (("model.language_model.layers.2.mlp.up_proj",), {"layers.2.mlp.up_proj"}),
    ],
)
def test_every_target_that_is_taken_gets_its_layers(tiny, targets, layers):
    from upt.model import Policy

    config = train_upt.Config(model=tiny, lora_targets=targets).resolve()
    policy = Policy.load(tiny, device="cpu")
    policy.add_lora(2, 4, config.lora_targets)
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".language_model.")[1].split(".lora_")[0] for name in trained} == layers


@pytest.mark.parametrize(
    "reward, said",
    [
        ("judged(lam_pos=-3)", "lam_pos is -3, expected a number at least 0"),
        ("judged(lam_neg=1.5)", "lam_neg is 1.5, expected a number from 0 to 1"),
        ("judged(tau_h=-.02)", "tau_h is -0.02, expected a number above 0"),
        ("judged(t_l=1e999)", "t_l is inf, expected a number from 0 to 1"),
        ("judged(lam_fmt=-1)", "lam_fmt is -1, expected a number at least 0"),
        ("confident-majority(tau=7)", "tau is 7, expected a number from 0 to 1"),
        ("gated-frequency(threshold=True)", "threshold is True, expected a number from 0 to 1"),
        ("dirichlet(beta=0)", "beta is 0, expected a number above 0"),
        ("dirichlet(delta=1e999)", "delta is inf, expected the like of 0.06"),
        ("continuous-consistency(penalty=2)", "penalty is 2, expected a number from 0 to 1"),
        ("random(seed=-1)", "seed is -1, expected a whole number from 0 to 2.63 - 1"),
        ("random(seed=2.5)", "seed is 2.5, expected a whole number from 0 to 2.63 - 1"),
        ("evol(ngram=3.0)", "ngram is 3.0, expected a whole number at least 1 and at most 2.31 - 1"),
        ("scrl(tau_pos=2)", "tau_pos is 2, expected a number from 0 to 1"),
        ("majority(max_share=-.5)", "max_share is -0.5, expected a number from 0 to 1"),
    ],
)
def test_inline_settings_have_ranges_too(reward, said):
    with pytest.raises(SettingError, match=said):
        rewards.bind_reward(reward)


@pytest.mark.parametrize(
    "estimator, said",
    [("energy(beta=0)", "beta is 0, expected a number above 0"), ("group-norm(eps=-1e-6)", "eps is -1e-06")],
)
def test_inline_settings_of_advantages_have_ranges_too(estimator, said):
    with pytest.raises(SettingError, match=said):
        rewards.bind_advantage(estimator)


@pytest.mark.parametrize("weights", ["a:0,b:1", "a:-1,b:2", f"a:{'9' * 400},b:1"])
def test_weights_of_a_mixture_are_above_0_and_finite(weights):
    with pytest.raises(DataError, match="weights are above 0"):
        names.parts(weights)


def test_refused_values_wait_for_nothing_heavy():
    code = """
import sys, ablate, judge, rewards, train_upt, warmup
from eval import heldout, score
refused = 0
for config, settings in (
    (train_upt, {"dual_clip": 0.5}), (train_upt, {"seed": -1}), (train_upt, {"step": 4}), (warmup, {"asking": -1}),
    (train_upt, {"reward": "judged(tau_h=0)"}), (train_upt, {"max_pixels": 3}), (ablate, {"jobs": 0}),
    (judge, {"judge_top_p": 2}), (heldout, {"limit": 0}), (heldout, {"out": "."}), (train_upt, {"model": "nope"}),
):
    try:
        config.main(config.Config(**settings))
    except ValueError:
        refused += 1
print(refused, sorted({"torch", "transformers", "peft", "datasets", "pyarrow"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "11 []\n", done.stdout + done.stderr


def test_an_empty_path_at_a_shell_is_not_the_current_folder():
    for arguments in (["--out", ""], ["--out="], ["--from-shards", "", "--steps", "1"]):
        with pytest.raises(UserError, match=f"{arguments[0].strip('=')} is empty: give a path"):
            cli.parse(train_upt.Config, arguments)


# ------------------------------------------------------------------------------------------------ where it is written


@pytest.mark.parametrize(
    "script, settings",
    [
        ("train_upt", {}),
        ("rollout", {}),
        ("judge", {"rollouts": "r"}),
        ("rewards", {"rollouts": "r"}),
        ("synthesize", {}),
        ("warmup", {}),
        ("ablate", {}),
        ("eval.run", {"data": "d", "benchmark": "mathvision"}),
        ("bench.studies", {}),
        ("bench.front_page", {}),
    ],
)
def test_a_file_where_a_folder_is_needed_is_met_at_the_start(tiny, tmp_path, script, settings):
    (tmp_path / "file").write_text("")
    module = importlib.import_module(script)
    own = {"model": tiny} if "model" in {field.name for field in fields(module.Config)} else {}
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(StorageError, match=rf"--out {out}: {tmp_path}/file is no folder.*give another --out"):
            module.main(module.Config(out=out, **own | settings))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "script, settings",
    [
        ("eval.heldout", {}),
        ("eval.compare", {"a": "a", "b": "b"}),
        ("eval.score", {"benchmark": "mathvision", "data": "d", "responses": "r"}),
    ],
)
def test_a_folder_where_a_file_is_needed_is_met_at_the_start(tiny, tmp_path, script, settings):
    module = importlib.import_module(script)
    own = {"model": tiny} if script == "eval.heldout" else {}
    with pytest.raises(StorageError, match=f"--out {tmp_path} is a folder, and a file is needed"):
        module.main(module.Config(out=tmp_path, **own | settings))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"{tmp_path}/file is no folder"):
        module.main(module.Config(out=tmp_path / "file" / "scores.json", **own | settings))


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # a test may run as root
    with pytest.raises(StorageError, match=f"--out {tmp_path}/a/b: {tmp_path} may not be written to; give another"):
        files.check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


class Silent(Exception):
    """What libraries in other languages raise: no errno."""


@pytest.mark.parametrize(
    "error, said",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left on the disk; what was written before is whole",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left in your quota of the disk.*same command again"),
        (OSError(errno.EACCES, "Permission denied", "x"), "permission denied: give another path, or change the perm"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only: give another path"),
        (OSError(errno.EEXIST, "File exists", "x"), "something of that name is in the way"),
        (Silent("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left on the"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "no space left on the disk"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_cannot_be_written_says_why_and_what_to_do(tmp_path, error, said):
    with pytest.raises(StorageError, match=f"{tmp_path}/file: {said}"):
        with files.writing(tmp_path / "file"):
            raise error
    if isinstance(error, OSError) and error.errno:
        assert said.split(".*")[0] in cli.one_line(error)


def test_a_full_disk_is_known_by_the_room_that_is_left(tmp_path, monkeypatch):
    def fails():
        with files.writing(tmp_path / "no" / "state"):
            raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room, so it is something else
        fails()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4096}))
    with pytest.raises(StorageError, match="no/state: no space left on the disk"):
        fails()


@contextmanager
def no_file_over(size: int):
    """A limit of the operating system that stands for a full disk: the writer meets it in the middle of a file."""
    before, as_it_was = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # of a module first imported here it would be cut short, and stay so
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = as_it_was


def test_a_run_whose_disk_is_full_goes_on_once_there_is_room(tiny, tmp_path):
    small = dict(questions_per_step=2, group_size=2, max_new_tokens=4, reward="random", eval_questions=0, limit=8)
    config = train_upt.Config(model=tiny, steps=1, out=tmp_path / "run", **small | {"lora_rank": 16})
    with no_file_over(50_000), pytest.raises(StorageError, match="adapter: no larger files may.*same command again"):
        train_upt.main(config)
    assert not (tmp_path / "run/summary.json").exists() and not [*(tmp_path / "run/checkpoints").glob("step-*")]
    assert (tmp_path / "run/rollouts/step-000000.jsonl").is_file()  # what is whole is kept
    train_upt.main(config)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size > 50_000


def test_a_file_cut_short_by_a_full_disk_leaves_the_old_one(tmp_path):
    files.write_whole(tmp_path / "a.json", [b"old"])
    with no_file_over(1000), pytest.raises(StorageError, match="a.json: no larger files may be written here"):
        files.write_whole(tmp_path / "a.json", [b"x" * 5000])
    assert (tmp_path / "a.json").read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1
