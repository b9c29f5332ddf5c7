"""What a run needs: formulas against real models, caches and autograd's own counts; what fits, refusals, the tables."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import judge
import rollout
import synthesize
import train_upt
from bench import estimate
from bench.kernels import peak
from eval import heldout
from eval import run as eval_run
from kernels import linear_logprob, logprob
from tests.conftest import FAMILIES
from upt.errors import PolicyError, SettingError
from upt.model import TARGETS, Policy, attention, decoding, lora, room, slots, update
from upt.prompts import template
from upt.reckoning import memory, seconds
from upt.reckoning.memory import GIB, Demand, fits, slots_that_fit, tokens_that_fit
from upt.reckoning.published import CONFIGS
from upt.reckoning.sizes import feature_bytes, kv_bytes, lora_parameters, sizes_of

THREE, SEVEN, EIGHT = CONFIGS
ROOT = Path(__file__).parents[1]
MM_UPT = dict(questions_per_step=512, group_size=10, max_prompt_tokens=2048, max_new_tokens=2048, lora_rank=64)


def settings(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{"model": SEVEN} | MM_UPT | changed)


def config_of(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def bare(config: dict):
    """The transformers model of a config.json, without memory for its weights."""
    kind = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **kind))


# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_as_many_parameters_as_transformers_makes(name):
    sizes, model = sizes_of(CONFIGS[name]), bare(CONFIGS[name])
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.vision.parameters == sum(p.numel() for p in model.model.visual.parameters())
    assert round(sizes.parameters / 1e9, 2) == {THREE: 3.75, SEVEN: 8.29, EIGHT: 8.77}[name]  # as on their pages


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_all_families(snapshots, family):
    config = config_of(snapshots[family])
    assert sizes_of(config).parameters == sum(p.numel() for p in bare(config).parameters())
    untied = json.loads(json.dumps(config).replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    assert sizes_of(untied).parameters == sum(p.numel() for p in bare(untied).parameters())
    assert sizes_of(untied).parameters - sizes_of(config).parameters == 64 * config["text_config"]["vocab_size"]


def test_older_files_have_the_language_model_at_the_top_and_leave_out_the_usual():
    config = CONFIGS[THREE]
    flat = config | config["text_config"] | {"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}
    flat["vision_config"] |= {"intermediate_size": 3420}
    del flat["text_config"]
    assert sizes_of(flat) == sizes_of(config)


def test_what_cannot_be_reckoned_is_said():
    with pytest.raises(PolicyError, match="a llava model cannot be reckoned; give .* one of qwen2_vl, "):
        sizes_of({"model_type": "llava"})
    with pytest.raises(PolicyError, match="a list model cannot be reckoned"):
        sizes_of([])
    text = {key: value for key, value in CONFIGS[SEVEN]["text_config"].items() if key != "vocab_size"}
    with pytest.raises(PolicyError, match=r"without usable sizes \(KeyError: 'vocab_size'\); fetch it again"):
        sizes_of(CONFIGS[SEVEN] | {"text_config": text})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "mlp.down_proj"), ("layers.1.self_attn.o_proj", "up_proj")])
def test_adapters_have_as_many_parameters_as_peft_makes(snapshots, family, targets):
    found = Policy.load(snapshots[family])
    found.add_lora(6, 12, targets)
    assert lora_parameters(sizes_of(config_of(snapshots[family])), 6, targets) == sum(
        p.numel() for p in found.trainable()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_and_features_have_as_many_bytes_as_the_models(snapshots, family):
    from upt.data import shapes

    sizes, found = sizes_of(config_of(snapshots[family])), Policy.load(snapshots[family])
    (prompt,), _ = found.encode(shapes.questions("train", 0, 1), template("boxed"))
    seen = [prompt.features.embeds, *prompt.features.deepstack]
    assert feature_bytes(sizes, prompt.features.places, 4) == sum(part.nbytes for part in seen)
    assert sizes.vision.patch_values == found.family.look(shapes.questions("train", 0, 1)[0].image)[1].shape[1]
    cache = DynamicCache(config=found.base.config)
    with torch.no_grad():
        found.base.model.language_model(input_ids=torch.arange(5)[None], past_key_values=cache, use_cache=True)
    assert 5 * kv_bytes(sizes, 4) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_bytes_by_hand():
    sizes = {name: sizes_of(config) for name, config in CONFIGS.items()}
    assert [kv_bytes(of) for of in sizes.values()] == [36_864, 57_344, 147_456]  # 2 x layers x KV heads x 128 x 2
    # Rank 64 on the 7B, a layer: q and o 2 x 7168, k and v 2 x 4096, the MLP 3 x 22528 inputs and outputs.
    assert lora_parameters(sizes[SEVEN], 64) == 64 * 28 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert feature_bytes(sizes[EIGHT], 1000) == 1000 * 4096 * 2 * 4  # three deepstack layers besides


# ---------------------------------------------------------------------------------------------------- activations


def measured(family: str, dtype: torch.dtype):
    """A model of 4 layers with LoRA of rank 8, and its sizes; wide against what a token has besides."""
    config = CONFIGS[EIGHT if family == "qwen3_vl" else SEVEN]
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 300}
    text |= {"head_dim": 32} if family == "qwen3_vl" else {}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 192, "out_hidden_size": 128}
    vision |= {"deepstack_visual_indexes": [0]} if family == "qwen3_vl" else {"fullatt_block_indexes": [1]}
    config = config | {"text_config": text, "vision_config": config["vision_config"] | vision}
    torch.manual_seed(0)
    kind = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(config["model_type"], **kind), dtype=dtype, attn_implementation="sdpa"
    )
    pattern = rf".*language_model\.layers\..*({'|'.join(TARGETS)})"
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=pattern)
    model = get_peft_model(model.requires_grad_(False), adapter)
    lora.fuse(model)
    attention.install(model.get_base_model())
    return model, sizes_of(config)


class Flash(torch.autograd.Function):
    """Saves what torch's variable-length attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.clone()
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[1], len(query)))
        return out

    @staticmethod
    def backward(ctx, grad):
        _, key, value, *_ = ctx.saved_tensors
        return grad.clone(), torch.zeros_like(key), torch.zeros_like(value)


@pytest.fixture
def row(monkeypatch):
    """A prompt of 128 tokens and three responses of as many, packed as on a GPU: 896 keys for 512 queries."""
    monkeypatch.setattr(attention, "varlen_attn", lambda *states, **kwargs: Flash.apply(*states[:3]))
    return attention.Varlen([(0, 128)], [[(128, 256), (256, 384), (384, 512)]], torch.device("cpu"))


def hidden(model, ids: torch.Tensor, row) -> torch.Tensor:
    """Last hidden states (N, D) of token ids (N,) with the attention of a packed row."""
    base = model.get_base_model()
    return base.model.language_model(
        inputs_embeds=base.get_input_embeddings()(ids[None]),
        position_ids=torch.arange(len(ids)).expand(3, 1, -1),
        attention_mask=ids.new_zeros(1, 1, 1, 1),
        use_cache=False,
        layout=row,
    ).last_hidden_state[0]


@pytest.mark.parametrize(
    ("family", "dtype", "shares_heads"),
    [("qwen2_5_vl", torch.bfloat16, True), ("qwen3_vl", torch.float32, True), ("qwen3_vl", torch.bfloat16, False)],
)
def test_activations_take_what_autograd_and_the_allocator_count(family, dtype, shares_heads, row, monkeypatch):
    monkeypatch.setattr(attention, "SHARES_HEADS", shares_heads)
    monkeypatch.setattr(lora, "SMALL", 0)  # as on a GPU
    model, sizes = measured(family, dtype)
    demand = Demand(
        max_prompt_tokens=128,
        max_new_tokens=128,
        group_size=3,
        lora_rank=8,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        shares_heads=shares_heads,
    )
    assert demand.keys_per_token == 896 / 512
    ids, count, frozen = torch.randint(300, (512,)), 512, {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, kept = {}, []

    def saved(tensor):
        kept.append(tensor)  # or its place could be given to another
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        hidden(model, ids, row)
    found = sum(size for at, size in storages.items() if at not in frozen)
    found -= 2 * lora_parameters(sizes, 8) if dtype == torch.bfloat16 else 0  # the adapter's copy
    assert 4 * memory.saved_bytes(sizes, demand) == pytest.approx(found / count, rel=0.01)  # besides: angles
    kept.clear()

    def update():
        head = model.get_base_model().lm_head.weight
        linear_logprob(hidden(model, ids, row), head, ids, chunk=64)[0].sum().backward()
        model.zero_grad()

    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        token, _ = memory.update_bytes(sizes, replace(demand, gradient_checkpointing=checkpointing))
        assert token == pytest.approx(peak(update) / count, rel=0.1)


@pytest.mark.parametrize(("family", "dtype"), [("qwen2_5_vl", torch.bfloat16), ("qwen3_vl", torch.float32)])
def test_passes_without_gradients_take_what_the_allocator_counts(family, dtype, row, monkeypatch):
    model, sizes = measured(family, dtype)
    model.to(dtype).eval()  # the adapter as well, as it samples
    ids = torch.randint(300, (512,))
    grid = torch.tensor([[1, 24, 24]])
    values = torch.randn(576, sizes.vision.patch_values).to(dtype)
    with torch.no_grad():
        forward = peak(lambda: hidden(model, ids, row))
        with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):  # on some processors it repacks bf16
            tower = peak(lambda: model.get_base_model().model.visual(values, grid_thw=grid, return_dict=True))
    assert memory.forward_bytes(128, 384, 512, dtype.itemsize) == pytest.approx(forward, rel=0.1)
    monkeypatch.setattr(memory, "PIXEL_VALUES_AT_ONCE", values.numel())
    assert memory.tower_bytes(sizes, 0, dtype.itemsize) == pytest.approx(tower + values.nbytes, rel=0.15)


def test_a_bound_that_another_file_sets():
    assert memory.LOGITS_AT_ONCE == 4 * logprob.GPU_ELEMENTS  # of float32


# ---------------------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("free", "questions", "group", "expected"),
    [
        # A slot takes 10, a prompt 3, of which 2 ceil(slots / G) are there, but no more than there are questions.
        (10**9, 512, 8, 256),
        (10**9, 512, 10, 250),  # whole groups
        (10**9, 4, 8, 32),  # no more than responses
        (2 * 80 + 4 * 3, 512, 8, 16),  # 16 slots: 160 for them, 12 for four prompts
        (2 * 80 + 4 * 3 - 1, 512, 8, 8),  # one byte short: 15, which is one whole group
        (5 * 10 + 2 * 3, 512, 8, 5),  # less than a group
        (5 * 10 + 1 * 3, 1, 8, 5),  # one prompt is all there is
        (0, 512, 8, 1),
        (-5, 512, 8, 1),
    ],
)
def test_slots(free, questions, group, expected):
    assert slots_that_fit(free, 10, 3, questions, group) == expected


def test_token_budgets():
    assert tokens_that_fit(10**9, 100, 5000, longest=700) == 16_384
    assert tokens_that_fit(5000 + 100 * 1000, 100, 5000, longest=700) == 768  # of 1000, in steps of 256
    assert tokens_that_fit(5000 + 100 * 1000, 100, 5000, longest=900) == 900  # the longest row goes in whole
    assert tokens_that_fit(0, 100, 5000, longest=900) == 900
    assert tokens_that_fit(10**9, 100, 5000, longest=700, most=2048) == 2048


def test_memory_of_the_seven_by_hand():
    found = fits(CONFIGS[SEVEN], settings(), 78.5 * GIB)
    weights, lora, kv = 2 * 8_292_166_656, 161_480_704, 57_344
    assert found.slots == {"rollout": 250} and found.tokens == 16_384
    assert found.phases["rollout"]["weights"] == weights
    assert found.phases["rollout"]["adapter"] == 14 * lora  # float32 weights and moments, a bf16 copy
    assert found.phases["update"]["adapter"] == 18 * lora  # and float32 gradients
    assert found.phases["rollout"]["KV"] == kv * (250 * 2047 + 50 * 2048)  # a response's last token is fed to nothing
    assert found.phases["rollout"]["logits"] == 4 * 250 * 152_064
    assert found.needs == sum(found.phases["rollout"].values()) > sum(found.phases["update"].values())
    # States at 28 layers 200 kB a token, what one layer saves 214 kB (norms 29, inputs and A's outputs 53, attention
    # 18, MLP 114), two gradients 76 kB, the state's own 14 kB.
    smaller = fits(CONFIGS[SEVEN], settings(update_tokens=8192), 78.5 * GIB)
    assert smaller.tokens == 8192
    assert smaller.phases["update"]["activations"] / 8192 == pytest.approx(504_000, rel=0.01)
    # With two views a question is two prompts of 5 responses: 2 ceil(250 / 5) of them lie there, less room for slots.
    views = fits(CONFIGS[SEVEN], settings(view="faded", slots=240), 78.5 * GIB)
    assert views.slots == {"rollout": 240} and views.features == 2 * found.features
    assert views.phases["rollout"]["KV"] == kv * (240 * 2047 + 96 * 2048)
    alone = fits(CONFIGS[SEVEN], settings(lora_rank=None), 78.5 * GIB, ["rollout"])
    assert {*alone.phases} == {"pictures", "rollout"} and "adapter" not in alone.phases["rollout"]
    assert fits(CONFIGS[SEVEN], settings(slots=20), 78.5 * GIB).slots == {"rollout": 20}
    asked = fits(CONFIGS[SEVEN], settings(), 78.5 * GIB, ["rollout"])
    assert asked.phases["rollout"]["adapter"] == 6 * lora  # nothing is trained: no moments
    double = fits(CONFIGS[SEVEN], settings(dtype="fp32"), 139 * GIB)
    assert double.phases["rollout"]["weights"] == 2 * weights


def test_four_bits_by_hand():
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944)
    found = fits(CONFIGS[SEVEN], settings(quantize="nf4"), 22.5 * GIB)
    packed = matrices // 2 + matrices // 64 + 4 * (matrices // 64 // 256)  # numbers, scales, and scales of scales
    assert found.phases["rollout"]["weights"] == 2 * (8_292_166_656 - matrices) + packed
    assert 6.3 < found.phases["rollout"]["weights"] / GIB < 6.5
    assert found.phases["update"]["one layer in full"] == 2 * 3584 * 18_944
    assert "one layer in full" not in found.phases["pictures"]  # the tower stays as it is
    full = fits(CONFIGS[SEVEN], settings(), 22.5 * GIB)
    assert found.slots["rollout"] > 4 * full.slots["rollout"] and found.tokens > full.tokens
    with pytest.raises(SettingError, match="give .*--quantize nf4"):
        fits(CONFIGS[SEVEN], settings(), 14 * GIB)


def test_the_line_says_how_much_of_how_much():
    line = str(fits(CONFIGS[SEVEN], settings(), 78.5 * GIB))
    assert line.startswith("needs about 51.7 of 78.5 GiB free: pictures 19.5 (weights 15.4, adapter 2.1, tower 1.9); ")
    assert "; rollout 51.7 (weights 15.4, adapter 2.1, KV 32.8 (250 slots), logits 0.1, prefill 1.2); " in line
    assert "; update 26.2 (weights 15.4, adapter 2.7, activations 7.7 (16,384 tokens), logits 0.3); " in line
    # 512 pictures of 2,048 tokens of 3,584 numbers of 2 bytes
    assert line.endswith("; pictures' features at most 7.0 GiB of the CPU's memory")


@pytest.mark.parametrize("free", [9, 11, 12, 18, 22.5])
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(
    "changed",
    [{}, {"dtype": "fp32"}, {"gradient_checkpointing": False}, {"init_adapter": "a", "adapter": None}],
    ids=lambda changed: next(iter(changed), "as it is"),
)
def test_what_is_advised_fits(free, model, changed):
    given, phases = settings(model=model, judge_tokens=65_536, **changed), ["rollout", "judging", "update"]
    try:
        assert fits(CONFIGS[model], given, free * GIB, phases).needs <= 0.92 * free * GIB
        return
    except SettingError as error:
        said, fix = re.fullmatch(r"(.* does not fit, even in its smallest batches: .*); (.*)", str(error)).groups()
    assert said.startswith(f"{model} does not fit") and "92% of what is free can be used" in said
    offers = re.sub(r" \(longer prompts are left out\)", "", fix.removeprefix("give ")).split(", or ")
    if fix == "no setting makes it fit: take a GPU with more memory":
        least = {"max_new_tokens": 256, "max_prompt_tokens": 512, "judge_tokens": 4096}
        least |= {"dtype": "bf16", "gradient_checkpointing": True, "quantize": "nf4"}
        least |= {} if "init_adapter" in changed else {"lora_rank": 8}
        with pytest.raises(SettingError):
            fits(CONFIGS[model], SimpleNamespace(**vars(given) | least), free * GIB, phases)
        return
    for offer in offers:
        words = iter(offer.split())
        typed = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words, words, strict=True)}
        assert typed.keys() <= {*vars(given), "dtype", "gradient_checkpointing", "quantize"}
        assert not ("init_adapter" in changed and typed.keys() & {"lora_rank", "model"})
        typed |= {name: int(value) for name, value in typed.items() if value.isdigit()}
        typed |= {"gradient_checkpointing": True} if "gradient_checkpointing" in typed else {}
        fits(CONFIGS[typed.get("model", model)], SimpleNamespace(**vars(given) | typed), free * GIB, phases)


def test_four_bits_are_advised_with_what_else_it_takes():
    offers = r"; give --quantize nf4 --lora-rank 16, or --model Qwen/Qwen2.5-VL-3B-Instruct --quantize nf4$"
    with pytest.raises(SettingError, match=offers):
        fits(CONFIGS[SEVEN], settings(model=SEVEN), 11 * GIB)
    with pytest.raises(SettingError, match="; no setting makes it fit"):
        fits(CONFIGS[SEVEN], settings(model=SEVEN), 7 * GIB)


def test_judging_by_itself_and_its_own_advice():
    given = SimpleNamespace(model=SEVEN, judge_mode="logit", judge_tokens=65_536, dtype="auto", adapter=None)
    with pytest.raises(SettingError, match="give --judge-tokens 32768, or --quantize nf4, or --model "):
        fits(CONFIGS[SEVEN], given, 22.5 * GIB, ["judging"])
    given.judge_tokens = 32_768
    assert {*fits(CONFIGS[SEVEN], given, 22.5 * GIB, ["judging"]).phases} == {"pictures", "judging"}


def test_written_judgements_take_slots_whose_prompts_hold_all_responses():
    given = SimpleNamespace(model=SEVEN, judge_mode="text", judge_max_new_tokens=1024, judge_tokens=65_536)
    asked = {"questions_per_step": 512, "group_size": 8, "max_prompt_tokens": 1024, "max_new_tokens": 1000}
    found = fits(CONFIGS[SEVEN], given, 78 * GIB, ["judging"], **asked)
    count = found.slots["judging"]
    prompts = 2 * -(-count // 8)
    assert count % 8 == 0 and found.phases["judging"]["KV"] == 57_344 * (count * 1023 + prompts * 9024)
    assert f"({count} slots)" in str(found)
    once, twice = (fits(CONFIGS[SEVEN], given, 30 * GIB, ["judging"], **asked, judge_repeats=k) for k in (1, 2))
    assert once.slots["judging"] < twice.slots["judging"]  # as a prompt serves more of them
    few = asked | {"questions_per_step": 1, "group_size": 1, "max_new_tokens": 1, "max_prompt_tokens": 1}
    long = SimpleNamespace(**vars(given) | {"judge_max_new_tokens": 100_000})
    with pytest.raises(SettingError, match=r"; give --judge-max-new-tokens \d+, or --quantize nf4, or --model "):
        fits(CONFIGS[SEVEN], long, 22.5 * GIB, ["judging"], **few)


@pytest.fixture
def gpu(monkeypatch):
    """Makes room.py meet a GPU with so many bytes free, of which some are taken by now; all else stays on the CPU."""

    def having(free: int, taken: int = 0) -> None:
        monkeypatch.setattr(room, "checked_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - taken - 300, free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: taken + 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken)

    return having


def test_a_run_says_what_it_needs_before_it_loads_or_is_refused(tiny, tmp_path, gpu, monkeypatch, capsys):
    small = dict(
        model=tiny, questions_per_step=2, group_size=2, max_new_tokens=4, eval_questions=0, lora_rank=2, steps=1
    )
    gpu(8 * GIB)
    train_upt.main(train_upt.Config(**small, out=tmp_path / "run"))
    assert re.search(r"^needs about \d\.\d of 8\.0 GiB free: .*; rollout .*; update ", capsys.readouterr().err, re.M)
    loaded = []
    monkeypatch.setattr(Policy, "load", lambda *args, **kwargs: loaded.append(args))
    gpu(20 * 2**20)
    with pytest.raises(SettingError, match="does not fit, even in its smallest batches.* of 0.0 GiB free"):
        train_upt.main(train_upt.Config(**small, out=tmp_path / "other"))
    sampling = rollout.Config(model=tiny, questions_per_step=2, group_size=2, steps=1, out=tmp_path / "rollouts")
    with pytest.raises(SettingError, match="does not fit"):
        rollout.main(sampling)
    with pytest.raises(SettingError, match="does not fit"):
        judge.main(judge.Config(rollouts=tmp_path / "run/rollouts", out=tmp_path / "judged"))
    with pytest.raises(SettingError, match="does not fit"):
        synthesize.main(synthesize.Config(model=tiny, data="shapes", limit=2, out=tmp_path / "questions"))
    with pytest.raises(SettingError, match="does not fit.*adapter 0.0"):
        heldout.main(heldout.Config(run=tmp_path / "run", eval_questions=2))
    assert loaded == []


def test_what_is_asked_at_a_time_is_known(tiny, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(room, "checked_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(room, "free_bytes", lambda device: GIB)
    monkeypatch.setattr(room, "fits", lambda config, settings, free, phases, **known: found.append(known) or 1 / 0)
    scripts = [
        (heldout, {"eval_samples": 5}, {"questions_per_step": 128, "group_size": 5}),
        (eval_run, {"n": 3, "temperature": 1.0}, {"questions_per_step": 42, "group_size": 3}),
        (synthesize, {"per_image": 9, "limit": 2}, {"group_size": 9}),
    ]
    monkeypatch.setattr(eval_run, "prepare", lambda *args: eval_run.Job("mathvision", tmp_path, [], tmp_path, {}))
    for script, given, known in scripts:
        given |= {"data": str(tmp_path)} | {"benchmark": "mathvision"} if script is eval_run else {"data": "shapes"}
        given |= {} if script is heldout else {"out": tmp_path / script.__name__}
        with pytest.raises(ZeroDivisionError):
            script.main(script.Config(model=tiny, **given))
        assert found.pop() == known | {"shares_heads": attention.SHARES_HEADS}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_comes_to_the_slots_that_were_said(snapshots, family, gpu):
    from upt.data import shapes

    found = Policy.load(snapshots[family])
    prompts, _ = found.encode(shapes.questions("train", 0, 6), template("boxed"))
    longest = max(len(prompt.ids) for prompt in prompts)
    asked = dict(questions_per_step=6, group_size=4, max_prompt_tokens=longest, max_new_tokens=50, dtype="fp32")
    sizes, demand = sizes_of(config_of(snapshots[family])), Demand(**asked, lora_rank=4)
    jobs = [slots.Job(prompt, [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]]) for i, prompt in enumerate(prompts)]
    on_gpu = SimpleNamespace(device=torch.device("cuda"), base=found.base, fitted={})
    said = []
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts = memory.reckon(sizes, demand, 10 * GIB).phases["rollout"]
        free = int((sum(parts.values()) - (1 - share) * (parts["KV"] + parts["logits"])) / 0.92) + 1
        said.append(memory.reckon(sizes, demand, free).slots["rollout"])
        gpu(free, taken=parts["weights"] + parts["adapter"])
        assert decoding._sizes(on_gpu, jobs, 50, None).slots == said[-1]
    assert said[0] == 1 and said[-1] == 24 and len({*said}) >= 4


def test_a_token_budget_comes_from_the_memory_that_is_left(tiny, tmp_path, gpu, monkeypatch):
    given = SimpleNamespace(model=SEVEN, **MM_UPT, lora_targets=TARGETS, dtype="auto", update_tokens=None)
    parameter, base = (
        SimpleNamespace(numel=lambda: 161_480_704),
        SimpleNamespace(config=AutoConfig.for_model(**CONFIGS[SEVEN])),
    )
    policy = SimpleNamespace(device=torch.device("cuda"), base=base, trainable=lambda: [parameter])
    monkeypatch.setattr(room, "SHARES_HEADS", True)  # which torch 2.11 does not
    said = []
    for free in (22, 23.5, 25, 40, 80):
        said.append(memory.reckon(sizes_of(CONFIGS[SEVEN]), Demand.of(given), free * GIB).tokens)
        for state, held in (({}, 4), ({"of": "AdamW"}, 12)):  # before and after its first step
            gpu(int(free * GIB), taken=2 * 8_292_166_656 + held * 161_480_704)
            assert room.update_tokens(policy, SimpleNamespace(state=state), given) == said[-1]
    assert said[0] == 4095 < said[1] < said[2] < said[3] == said[4] == 16_384
    policy.device = torch.device("cpu")
    assert room.update_tokens(policy, SimpleNamespace(state={}), given) == 8192
    budgets, real = [], update.fitting
    monkeypatch.setattr(
        update, "fitting", lambda of, name, tokens, work: budgets.append(tokens) or real(of, name, tokens, work)
    )
    monkeypatch.setattr(update, "update_tokens", lambda policy, optimizer, config: 1234)
    small = dict(
        model=tiny, questions_per_step=2, group_size=2, max_new_tokens=4, eval_questions=0, lora_rank=2, steps=1
    )
    train_upt.main(train_upt.Config(**small, out=tmp_path / "left"))
    train_upt.main(train_upt.Config(**small, out=tmp_path / "given", update_tokens=567))
    assert budgets == [1234, 567]


def test_a_judge_in_the_loop_is_reckoned_too(tiny, tmp_path, gpu, monkeypatch):
    phases = []
    monkeypatch.setattr(train_upt.model, "check_room", lambda settings, of: phases.append({*of}) or 1 / 0)
    for reward, expected in (("judged", {"rollout", "judging", "update"}), ("majority", {"rollout", "update"})):
        with pytest.raises(ZeroDivisionError):
            train_upt.main(train_upt.Config(model=tiny, reward=reward, out=tmp_path / reward))
        assert phases[-1] == expected


def test_on_a_cpu_nothing_is_said_and_a_family_of_ones_own_is_no_mistake(tiny, gpu, capsys, monkeypatch):
    room.check_room(SimpleNamespace(model=tiny, device="cpu"))
    assert capsys.readouterr().err == ""
    gpu(GIB)
    monkeypatch.setattr(room, "model_config", lambda name: SimpleNamespace(model_type="llava"))
    room.check_room(SimpleNamespace(model="a/llava", device="cuda"))
    assert capsys.readouterr().err == "what a llava model needs of the GPU's memory is not reckoned\n"


# ---------------------------------------------------------------------------------------------------- seconds


def test_seconds_by_hand():
    work, sizes, h100 = seconds.Work(), sizes_of(CONFIGS[SEVEN]), seconds.CARDS["h100"]
    assert work.trained_tokens == 512 * 7000
    assert work.equivalents == 0.75 + 1 + 1 + 1 + 1  # old, reference, forward, recomputed, backward for activations
    assert replace(work, minibatches=1, reference=False, checkpointing=False).equivalents == 2
    # 3.584 M tokens x 2 x 6.525 B parameters x 4.75 over 550 TFLOP/s
    assert seconds.products_seconds(sizes, h100, work) == pytest.approx(404, abs=1)
    # 5120 responses of 600 in 256 slots, and 1448 more for the longest
    assert seconds.decoding_steps(work, 256) == 12_000 + 1448
    assert seconds.pairs(10, 0) == 50 and seconds.pairs(4, 10) == 48
    step = seconds.decoding_step(sizes, h100, work, 250)
    assert step["gaps between kernels"] == pytest.approx((63 + 28 * 43 + 196 * 3) * 2.5e-6)
    # 50 prompts of 1,000 tokens, 250 responses half as long as they will be, over four fifths of 3.35 TB/s
    assert step["reading KV"] == pytest.approx(57_344 * (50_000 + 75_000) / 2.68e12)
    # A layer's inputs are 40,448 wide in all and its outputs 49,664: 2.75 forward passes and a backward pass
    moved = 2 * 28 * (2.75 * (40_448 + 4 * 49_664) + 5 * 40_448 + 2 * 49_664)
    assert seconds.adapter_seconds(sizes, h100, work) == pytest.approx(512 * 7000 * moved / 2.68e12)
    wide = replace(work, lora_rank=1024)  # products take longer: 2.58 B parameters, a forward pass and two backward
    flops = 2 * 161_480_704 * 16 * (2.75 + 2)
    assert seconds.adapter_seconds(sizes, h100, wide) == pytest.approx(512 * 7000 * flops / 550e12)
    # 3.07 M response tokens x 2 x 545 M x (old and reference 1.75, forward, gradient)
    assert seconds.head_seconds(sizes, h100, work) == pytest.approx(22.8, abs=0.1)
    parts = seconds.seconds(sizes, h100, work, 256)
    assert sum(parts["rollout"].values()) == pytest.approx(216, rel=0.05)


def test_seconds_of_four_bits_by_hand():
    work, sizes, h100 = seconds.Work(), sizes_of(CONFIGS[SEVEN]), seconds.CARDS["h100"]
    packed = replace(work, quantize="nf4")
    # Each of 6.525 B numbers is read in 4.13 bits, written in 16 and read again, less 16 that bf16 reads anyway.
    one = 6.525e9 * (4.127 / 8 + 2) / 2.68e12
    assert seconds.dequantising(sizes, h100, packed, 1) == pytest.approx(one, rel=1e-3)
    assert seconds.decoding_step(sizes, h100, packed, 250)["dequantising"] == pytest.approx(one, rel=1e-3)
    update = seconds.seconds(sizes, h100, packed, 250)["update"]
    assert update["dequantising"] == pytest.approx(512 * 7000 / 16_384 * 4.75 * one, rel=1e-3)
    assert "dequantising" not in seconds.seconds(sizes, h100, work, 250)["update"]


def test_more_of_a_card_is_never_slower():
    work, sizes = seconds.Work(), sizes_of(CONFIGS[SEVEN])
    totals = []
    for name in ("l4", "rtx4090", "a100", "h100", "h200"):
        parts = seconds.seconds(sizes, seconds.CARDS[name], work, 100)
        totals.append(sum(sum(of.values()) for of in parts.values()))
    assert totals == sorted(totals, reverse=True)
    slots = [seconds.decoding_seconds(sizes, seconds.CARDS["h100"], work, n) for n in (1, 10, 100, 250)]
    assert slots == sorted(slots, reverse=True)


# ---------------------------------------------------------------------------------------------------- the command


def test_the_page_has_the_tables_that_the_command_prints(capsys):
    estimate.main(estimate.Config(tables=True))
    assert capsys.readouterr().out.strip() in (ROOT / "docs/scale.md").read_text()


def test_the_report(capsys, tiny):
    estimate.main(estimate.Config())
    told = capsys.readouterr().out
    for line in ("Qwen/Qwen2.5-VL-7B-Instruct: 8.29 billion parameters", "needs about 51.7 of 78.5 GiB", "250 slots"):
        assert line in told
    assert re.search(r"^limit: frozen layers of the update \(\d+%\); decoding by ", told, re.M)
    assert told.endswith("not measured\n") and "judging" not in told
    for mode, part in (("text", "KV"), ("logit", "pass")):
        estimate.main(estimate.Config(preset="self-judge", judge_mode=mode))
        judging = capsys.readouterr().out.partition("judging, GiB\n")[2].partition("\n\n")[0]
        assert part in judging and "weights" in judging
    for model in (tiny, f"{tiny}/config.json"):
        estimate.main(estimate.Config(model=model, card="4"))
        assert "4 GiB at the rates of rtx4090" in capsys.readouterr().out
    estimate.main(estimate.Config(card="24", quantize="nf4"))
    told = capsys.readouterr().out
    assert "8.29 billion parameters in nf4, rank 64" in told and "80 slots, 16,384 tokens in a micro-batch" in told
    assert re.search(r"^  weights +6\.4$", told, re.M) and re.search(r"^  one layer in full +0\.1$", told, re.M)
    assert "dequantising" in told
    small = estimate.Config(model="qwen3-8b", card="48", max_new_tokens=4096, group_size=4)
    estimate.main(small)
    assert "as KV has room for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "7bb"}, "--model 7bb: no such folder, file or snapshot in the cache; give 3b, 7b, .*mean '7b'"),
        ({"card": "h10"}, "--card h10: no such card; give l4, .*mean 'h100'"),
        ({"card": "2"}, "--card 2: no card has so little memory"),
        ({"response_tokens": 4096}, "--response-tokens 4096 is above --max-new-tokens 2048"),
        ({"prompt_tokens": 900}, "--image-tokens 960 is above --prompt-tokens 900"),
        ({"model": "qwen3-8b", "card": "l4"}, "Qwen3-VL-8B-Instruct does not fit, even in its .* give --lora-rank 32"),
    ],
)
def test_mistakes_of_the_command(given, said):
    with pytest.raises((SettingError, PolicyError), match=said):
        estimate.main(estimate.Config(**given))


def test_nothing_heavy_is_needed():
    code = "import sys, bench.estimate as e; e.main(e.Config()); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr
