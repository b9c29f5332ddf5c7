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
import train_upt
from bench import estimate
from bench.kernels import peak
from kernels import linear_logprob, logprob
from tests.conftest import FAMILIES
from upt.errors import PolicyError, SettingError
from upt.model import TARGETS, Policy, policy, room
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
    return get_peft_model(model.requires_grad_(False), adapter), sizes_of(config)


def hidden(model, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (N, D) of one causal row of token ids (N,)."""
    base = model.get_base_model()
    place = torch.arange(len(ids)).expand(3, 1, -1)
    embeds = base.get_input_embeddings()(ids[None])
    return base.model.language_model(inputs_embeds=embeds, position_ids=place, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(("family", "dtype"), [("qwen2_5_vl", torch.bfloat16), ("qwen3_vl", torch.float32)])
def test_activations_take_what_autograd_and_the_allocator_count(family, dtype):
    model, sizes = measured(family, dtype)
    demand = Demand(lora_rank=8, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    ids, count, frozen = torch.randint(300, (512,)), 512, {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, kept = {}, []

    def saved(tensor):
        kept.append(tensor)  # or its place could be given to another
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        hidden(model, ids)
    found = sum(size for at, size in storages.items() if at not in frozen) / count
    assert 4 * memory.saved_bytes(sizes, demand, keys=1) == pytest.approx(found, rel=0.03)  # besides: the last norm
    kept.clear()

    def update():
        head = model.get_base_model().lm_head.weight
        linear_logprob(hidden(model, ids), head, ids, chunk=64)[0].sum().backward()
        model.zero_grad()

    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        token, _ = memory.update_bytes(sizes, replace(demand, gradient_checkpointing=checkpointing), keys=1)
        assert token == pytest.approx(peak(update) / count, rel=0.1)


@pytest.mark.parametrize(("family", "dtype"), [("qwen2_5_vl", torch.bfloat16), ("qwen3_vl", torch.float32)])
def test_passes_without_gradients_take_what_the_allocator_counts(family, dtype, monkeypatch):
    model, sizes = measured(family, dtype)
    model.to(dtype).eval()  # the adapter as well, as it samples
    ids = torch.randint(300, (512,))
    grid = torch.tensor([[1, 24, 24]])
    values = torch.randn(576, sizes.vision.patch_values).to(dtype)
    with torch.no_grad():
        forward = peak(lambda: hidden(model, ids))
        tower = peak(lambda: model.get_base_model().model.visual(values, grid_thw=grid, return_dict=True))
    assert memory.forward_bytes(sizes, 512, dtype.itemsize) == pytest.approx(forward, rel=0.1)
    monkeypatch.setattr(memory, "PIXEL_VALUES_AT_ONCE", values.numel())
    assert memory.tower_bytes(sizes, 0, dtype.itemsize) == pytest.approx(tower + values.nbytes, rel=0.15)


def test_bounds_that_other_files_set():
    assert memory.LOGITS_AT_ONCE == 4 * logprob.GPU_ELEMENTS  # of float32
    assert memory.PIXEL_VALUES_AT_ONCE == policy.PIXEL_VALUES_AT_ONCE


# ---------------------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("free", "questions", "group", "expected"),
    [
        # A slot takes 10, a prompt 3, of which ceil(slots / G) + 1 are there, but no more than there are questions.
        (10**9, 512, 8, 256),
        (10**9, 512, 10, 250),  # whole groups
        (10**9, 4, 8, 32),  # no more than responses
        (2 * 80 + 3 * 3 + 1, 512, 8, 16),  # 16 slots: 160 for them, 9 for three prompts
        (2 * 80 + 3 * 3 - 1, 512, 8, 8),  # one byte short: 15, which is one whole group
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
    assert found.slots == 250 and found.tokens == 16_384
    assert found.phases["rollout"]["weights"] == weights
    assert found.phases["rollout"]["adapter"] == 14 * lora  # float32 weights and moments, a bf16 copy
    assert found.phases["update"]["adapter"] == 18 * lora  # and float32 gradients
    assert found.phases["rollout"]["KV"] == kv * (250 * 2048 + 26 * 2048)
    assert found.needs == sum(found.phases["rollout"].values()) > sum(found.phases["update"].values())
    # A layer saves 322 kB a token and its input 7 kB: 5 to 7 GB at 8,192 tokens.
    smaller = fits(CONFIGS[SEVEN], settings(update_tokens=8192), 78.5 * GIB)
    assert smaller.tokens == 8192 and 5e9 < smaller.phases["update"]["activations"] < 7e9
    alone = fits(CONFIGS[SEVEN], settings(lora_rank=None), 78.5 * GIB, ["rollout"])
    assert {*alone.phases} == {"rollout"} and "adapter" not in alone.phases["rollout"]
    double = fits(CONFIGS[SEVEN], settings(dtype="fp32"), 139 * GIB)
    assert double.phases["rollout"]["weights"] == 2 * weights


def test_the_line_says_how_much_of_how_much():
    line = str(fits(CONFIGS[SEVEN], settings(), 78.5 * GIB))
    assert line.startswith("needs about 49.7 of 78.5 GiB free: rollout 49.7 (weights 15.4, adapter 2.1, KV 30.")
    assert "(250 slots)" in line and "; update 29.7 (weights 15.4, adapter 2.7, activations 11.2 (16,384 tok" in line


@pytest.mark.parametrize("free", [9, 12, 18, 22.5])
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
        least |= {"dtype": "bf16", "gradient_checkpointing": True}
        least |= {} if "init_adapter" in changed else {"lora_rank": 8}
        with pytest.raises(SettingError):
            fits(CONFIGS[model], SimpleNamespace(**vars(given) | least), free * GIB, phases)
        return
    for offer in offers:
        words = iter(offer.split())
        typed = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words, words, strict=True)}
        assert typed.keys() <= {*vars(given), "dtype", "gradient_checkpointing"}
        assert not ("init_adapter" in changed and typed.keys() & {"lora_rank", "model"})
        typed |= {name: int(value) for name, value in typed.items() if value.isdigit()}
        typed |= {"gradient_checkpointing": True} if "gradient_checkpointing" in typed else {}
        fits(CONFIGS[typed.get("model", model)], SimpleNamespace(**vars(given) | typed), free * GIB, phases)


def test_judging_by_itself_and_its_own_advice():
    given = SimpleNamespace(model=SEVEN, judge_mode="logit", judge_tokens=65_536, dtype="auto", adapter=None)
    with pytest.raises(SettingError, match="give --judge-tokens 16384, or --model Qwen/Qwen2.5-VL-3B-Instruct$"):
        fits(CONFIGS[SEVEN], given, 22.5 * GIB, ["judging"])
    given.judge_tokens = 16_384
    assert {*fits(CONFIGS[SEVEN], given, 22.5 * GIB, ["judging"]).phases} == {"judging"}
    text = SimpleNamespace(**vars(given) | {"judge_mode": "text"})
    assert fits(CONFIGS[SEVEN], text, 78 * GIB, ["judging"]).phases["judging"]["KV of a batch"] == 57_344 * 16_384


@pytest.fixture
def gpu(monkeypatch):
    """Makes `check_room` meet a GPU with so many bytes free; all else stays on the CPU."""

    def having(free: int) -> None:
        monkeypatch.setattr(room, "checked_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)

    return having


def test_a_run_says_what_it_needs_before_it_loads_or_is_refused(tiny, tmp_path, gpu, monkeypatch, capsys):
    small = dict(
        model=tiny, questions_per_step=2, group_size=2, max_new_tokens=4, eval_questions=0, lora_rank=2, steps=1
    )
    gpu(8 * GIB)
    train_upt.main(train_upt.Config(**small, out=tmp_path / "run"))
    assert re.search(r"^needs about \d\.\d of 8\.0 GiB free: rollout .*; update ", capsys.readouterr().err, re.M)
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
    assert loaded == []


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
    assert step["gaps between kernels"] == pytest.approx(2403 * 2.5e-6)
    # 26 prompts of 1,000 tokens, 250 responses half as long as they will be, over four fifths of 3.35 TB/s
    assert step["reading KV"] == pytest.approx(57_344 * (26_000 + 75_000) / 2.68e12)
    # 3.07 M response tokens x 2 x 545 M x (old and reference 1.75, forward, gradient)
    assert seconds.head_seconds(sizes, h100, work) == pytest.approx(22.8, abs=0.1)
    parts = seconds.seconds(sizes, h100, work, 256)
    assert sum(parts["rollout"].values()) == pytest.approx(230, rel=0.05)


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
    for line in ("Qwen/Qwen2.5-VL-7B-Instruct: 8.29 billion parameters", "needs about 49.7 of 78.5 GiB", "250 slots"):
        assert line in told
    assert re.search(r"^limit: frozen layers of the update \(\d+%\); decoding by ", told, re.M)
    assert told.endswith("not measured\n")
    for model in (tiny, f"{tiny}/config.json"):
        estimate.main(estimate.Config(model=model, card="4"))
        assert "4 GiB at the rates of rtx4090" in capsys.readouterr().out
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
        ({"card": "rtx4090"}, "Qwen2.5-VL-7B-Instruct does not fit, even in its smallest batches: .* give --max-new-"),
    ],
)
def test_mistakes_of_the_command(given, said):
    with pytest.raises((SettingError, PolicyError), match=said):
        estimate.main(estimate.Config(**given))


def test_nothing_heavy_is_needed():
    code = "import sys, bench.estimate as e; e.main(e.Config()); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr
