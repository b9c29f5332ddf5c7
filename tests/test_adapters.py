"""Adapters and snapshots that are not what they are taken for: every tensor has its place, every layer its tensor, and
an adapter belongs to the weights that it was made for."""

import json
import shutil
from pathlib import Path

import huggingface_hub.file_download
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from upt.errors import PolicyError
from upt.model.folders import check_adapter
from upt.model.origin import fingerprint_of_tensors, origin_of
from upt.model.policy import Policy
from upt.run.settings import Rollout

IDS = torch.tensor([[5, 6, 7, 8]])
FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.base(input_ids=IDS).logits


def load(name: str, **options) -> Policy:
    return Policy.load(name, dtype="fp32", device="cpu", **options)


def filled(model, seed: int = 0):
    """A PEFT model or policy whose adapter does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def policy(tiny) -> Policy:
    """A policy with an adapter, for the tests that leave it as it is."""
    policy = load(tiny)
    policy.add_lora(2, 4, ("q_proj", "v_proj"))
    filled(policy.model)
    return policy


@pytest.fixture
def adapter(policy, tmp_path) -> Path:
    policy.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change) -> None:
    """Let `change(tensors)` give the tensors of an adapter or snapshot."""
    file = next(folder.glob("*model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


def configure(folder: Path, name: str = "adapter_config.json", **settings) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | settings))


# ------------------------------------------------------------------------------------------------ tensors and layers


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_value(value: float):
    def change(tensors):
        tensors[FIRST][0, 3] = value
        return tensors

    return change


UNFIT = {
    "older transformers": (
        renamed("model.language_model.layers", "model.layers"),
        "no place for base_model.model.model.layers.0",
    ),
    "another class": (
        renamed("model.language_model.layers", "language_model.model.layers"),
        "no place for .*language_model.model.layers.0",
    ),
    "no prefix": (renamed("base_model.model.", ""), "no place for model.language_model.layers.0"),
    "its name within": (renamed("lora_A.weight", "lora_A.default.weight"), "no place for .*lora_A.default.weight"),
    "layers counted from one": (
        renamed("layers.2", "layers.3"),
        "no place for .*layers.3.*, and the adapter lacks .*layers.2",
    ),
    "other modules": (renamed("v_proj", "o_proj"), "no place for .*o_proj.*, and the adapter lacks .*v_proj"),
    "half": (without("v_proj"), "the adapter lacks .*v_proj.lora_A.weight, .*and 3 more"),
    "one layer missing": (without("layers.1."), "the adapter lacks .*layers.1.*and 1 more"),
    "no B": (without("lora_B"), "the adapter lacks .*lora_B.weight"),
    "one tensor missing": (without(FIRST), f"the adapter lacks {FIRST};"),
    "weights of the model": (
        lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(3, 64)},
        "no place for base_model.model.lm_head.weight;",
    ),
    "another rank": (
        lambda tensors: {name: torch.cat([t, t], int("_B" in name)) for name, t in tensors.items()},
        r"q_proj.lora_A.weight is \(4, 64\), not \(2, 64\)",
    ),
    "another width": (
        lambda tensors: tensors | {FIRST: torch.zeros(2, 32)},
        r"layers.0.self_attn.q_proj.lora_A.weight is \(2, 32\), not \(2, 64\)",
    ),
    "transposed": (lambda tensors: tensors | {FIRST: tensors[FIRST].T}, r"is \(64, 2\), not \(2, 64\)"),
    "NaN": (with_value(float("nan")), f"not finite, in {FIRST}"),
    "infinite": (with_value(float("inf")), f"not finite, in {FIRST}"),
    "empty": (lambda tensors: {}, "holds no tensor"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_adapter_that_does_not_fit_is_refused_and_the_one_that_is_there_stays(tiny, policy, adapter, kind):
    change, said = UNFIT[kind]
    rewrite(adapter, change)
    before = logits(policy)
    with pytest.raises(PolicyError, match=said) as refusal:
        policy.load_adapter(adapter)
    assert str(adapter) in str(refusal.value) and "; " in str(refusal.value)  # where, and what to do
    assert torch.equal(logits(policy), before) and policy.trainable()
    with pytest.raises(PolicyError, match=said):
        load(tiny, adapter=str(adapter), any_base=True)  # insisting is on the base, not on parts


def test_every_family_takes_its_adapter_and_no_others(snapshots, tmp_path):
    for family, name in snapshots.items():
        policy = load(name)
        policy.add_lora(2, 4)
        filled(policy.model)
        policy.save(tmp_path / family)
        again = load(name)
        again.load_adapter(tmp_path / family)
        assert torch.equal(logits(again), logits(policy))
    with pytest.raises(PolicyError, match="made for .*qwen3_vl.*not for .*qwen2_5_vl"):
        load(snapshots["qwen2_5_vl"], adapter=tmp_path / "qwen3_vl")


# ---------------------------------------------------------------------------------------------- kinds of adapters


def by_peft(tiny: str, folder: Path, config_class=LoraConfig, **settings):
    """An adapter as PEFT or TRL save it, and the model with it on."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = filled(get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny), config_class(**settings))).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "use_rslora": True},
        {"r": 2, "use_dora": True},
        {"r": 2, "lora_dropout": 0.3},
        {"r": 2, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}},
        {"r": 2, "layers_to_transform": [0, 2], "task_type": None},
        {"r": 2, "init_lora_weights": "gaussian", "target_modules": "all-linear", "exclude_modules": ".*visual.*"},
    ],
    ids=lambda settings: list(settings)[1],
)
def test_other_kinds_of_lora_answer_as_in_peft(tiny, tmp_path, settings):
    with torch.no_grad():
        expected = by_peft(tiny, tmp_path, **settings)(input_ids=IDS).logits
    policy = load(tiny)
    start = logits(policy)
    policy.load_adapter(tmp_path)
    policy.model.train()  # in which dropout would be felt
    torch.testing.assert_close(logits(policy), expected, atol=1e-5, rtol=1e-5)
    assert (start - expected).abs().max() > 1e-3
    with policy.reference():
        assert torch.equal(logits(policy), start)
    torch.testing.assert_close(logits(load(tiny, adapter=tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_layers_on_the_vision_tower_are_merged_or_refused(tiny, tmp_path):
    model = by_peft(tiny, tmp_path, r=2, target_modules="all-linear")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(load(tiny, adapter=tmp_path)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(PolicyError, match=r"outside the language model \(model.visual.blocks.0.attn.proj.*--adapter"):
        load(tiny).load_adapter(tmp_path)


def test_a_layer_on_a_tied_head_is_refused(tiny, tmp_path):
    model = by_peft(tiny, tmp_path, r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(PolicyError, match="no place for .*lm_head.base_layer.weight"):
        load(tiny, adapter=tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(PolicyError, match="a layer on lm_head, and .* embeddings and head are one"):
        load(tiny, adapter=tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]; merge it with PEFT"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"of_a_later_peft": {"x": 1}}, "of_a_later_peft"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.* changed the weights of the model itself"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"peft_type": "PREFIX_TUNING"}, "no LoRA adapter but PREFIX_TUNING"),
        ({"peft_type": None}, "no LoRA adapter but None"),
        ({"lora_alpha": 0}, "adapter_config.json has lora_alpha = 0, not a finite number above 0; save or fetch"),
        ({"lora_alpha": -16}, "lora_alpha = -16"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": "16"}, "lora_alpha = '16'"),
        ({"alpha_pattern": {"q_proj": 0.0}}, r"alpha_pattern\['q_proj'\] = 0.0, not a finite number"),
        ({"r": 0}, "r = 0, not a whole number of 1 or more"),
        ({"r": 2.0}, "r = 2.0, not a whole"),
        ({"rank_pattern": {"v_proj": True}}, r"rank_pattern\['v_proj'\] = True"),
        ({"rank_pattern": [2]}, r"rank_pattern = \[2\], no numbers by layer"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path = 5, no name"),
        ({"target_modules": ["c_attn"]}, "c_attn.*not found"),
        ({"target_modules": r"model\.layers\.\d+\.(q|v)_proj"}, "not found"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused(tiny, policy, adapter, settings, said):
    configure(adapter, **settings)
    with pytest.raises(PolicyError, match=said):
        policy.load_adapter(adapter)
    with pytest.raises(PolicyError, match=said):
        load(tiny, adapter=adapter)


def test_an_adapter_of_another_method_is_refused_before_anything_is_loaded(tiny, tmp_path):
    by_peft(tiny, tmp_path, IA3Config, feedforward_modules=[])
    with pytest.raises(PolicyError, match=f"--adapter {tmp_path} is no LoRA adapter but IA3"):
        Rollout(model=tiny, adapter=str(tmp_path)).resolve()


def test_files_that_are_no_adapter(adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for content in (b"", b"cut", pointer, whole[:100], (2).to_bytes(8, "little") + b"[]"):
        weights.write_bytes(content)
        with pytest.raises(PolicyError, match="adapter_model.safetensors is no safetensors file; .*git lfs pull"):
            check_adapter(adapter)
    weights.write_bytes(whole[:-4])
    with pytest.raises(PolicyError, match=f"has {len(whole) - 4} bytes in place of {len(whole)}"):
        check_adapter(adapter)
    weights.rename(adapter / "elsewhere")
    with pytest.raises(PolicyError, match="adapter_model.safetensors is missing; save or fetch it again"):
        check_adapter(adapter)
    for content in ("{", "[]", '"x"'):
        config.write_text(content)
        with pytest.raises(PolicyError, match="cannot be loaded: adapter_config.json"):
            check_adapter(adapter)


def header_changed(folder: Path, change) -> None:
    """Let `change(header)` alter an adapter's table of tensors, and leave their bytes."""
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[end:])


def test_a_table_of_tensors_that_does_not_fit_its_bytes(policy, adapter):
    def swap(header):
        other = FIRST.replace("lora_A", "lora_B").replace("q_proj", "v_proj")
        assert header[FIRST]["shape"] != header[other]["shape"]
        one, two = header[FIRST], header[other]
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]

    header_changed(adapter, swap)
    with pytest.raises(PolicyError, match=f"the adapter {adapter} cannot be loaded: .*fetch or make it again"):
        policy.load_adapter(adapter)
    for place in ([-8, 0], [8, 0], [0.0, 512.0]):
        header_changed(adapter, lambda header, place=place: header[FIRST].update(data_offsets=place))
        with pytest.raises(PolicyError, match="is no safetensors file"):
            check_adapter(adapter)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_tensors_that_are_no_real_numbers(adapter, dtype):
    rewrite(adapter, lambda tensors: tensors | {FIRST: tensors[FIRST].to(dtype)})
    with pytest.raises(PolicyError, match=f"{FIRST} is (BOOL|I8|I64|C64), not one of F64, F32, F16, BF16"):
        check_adapter(adapter)
    header_changed(adapter, lambda header: header[FIRST].update(dtype="Q3"))
    with pytest.raises(PolicyError, match=f"{FIRST} is Q3, not one of"):
        check_adapter(adapter)


def test_a_pickled_adapter_is_not_opened_and_the_command_given_converts_it(tiny, policy, adapter):
    weights, pickled = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    torch.save(load_file(weights), pickled)
    weights.unlink()
    with pytest.raises(PolicyError, match="a pickle, which can carry code") as refusal:
        load(tiny, adapter=adapter)
    exec(str(refusal.value).split('python -c "')[1].rstrip('"'), {})
    torch.testing.assert_close(logits(load(tiny, adapter=adapter)), logits(policy), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------ the model it was made for


def copy(name: str, folder: Path, change=None) -> str:
    shutil.copytree(name, folder)
    if change:
        rewrite(folder, change)
    return str(folder)


def nudged(tensors: dict) -> dict:
    """The same model after a little more training."""
    return {n: t + 1e-3 if n.endswith("layers.1.mlp.up_proj.weight") else t for n, t in tensors.items()}


def test_an_adapter_is_refused_on_other_weights_by_name_and_taken_by_any_base(tiny, policy, adapter, tmp_path):
    record = json.loads((adapter / "base.json").read_text())
    assert record == {"name": tiny, "fingerprint": origin_of(tiny)["fingerprint"], "adapter": None}
    other = copy(tiny, tmp_path / "other", nudged)
    said = (
        f"the adapter {adapter} was made for {tiny} .weights .*, not for {other} .*give --model {tiny}, or .*--any-base"
    )
    with pytest.raises(PolicyError, match=said):
        load(other, adapter=adapter)
    with pytest.raises(PolicyError, match=said):
        load(other).load_adapter(adapter)
    with pytest.raises(PolicyError, match=said):
        Rollout(model=other, adapter=str(adapter)).resolve()
    insisted = load(other)
    insisted.load_adapter(adapter, any_base=True)
    assert not torch.equal(logits(insisted), logits(policy))
    insisted.save(tmp_path / "again")  # from now on it is the other one's
    assert json.loads((tmp_path / "again" / "base.json").read_text())["name"] == other
    load(other, adapter=adapter, any_base=True)
    assert Rollout(model=other, adapter=str(adapter), any_base=True).resolve().loading()["any_base"] is True
    rewrite(tmp_path / "other", lambda tensors: load_file(Path(tiny) / "model.safetensors"))
    load(other, adapter=adapter)  # its weights are those again


def test_a_model_that_changed_in_its_place_is_another(tiny, policy, tmp_path):
    place = copy(tiny, tmp_path / "m")
    there = load(place)
    there.add_lora(2, 4)
    there.save(tmp_path / "a")
    rewrite(tmp_path / "m", nudged)
    with pytest.raises(PolicyError, match=f"made for {place} .weights (.{{8}})., not for {place} .weights (?!\\1)"):
        load(place, adapter=tmp_path / "a")


def test_a_copy_is_the_same_model(tiny, adapter, tmp_path, monkeypatch, capsys):
    AutoModelForImageTextToText.from_pretrained(tiny).save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    for file in Path(tiny).glob("*token*"):
        shutil.copy(file, tmp_path / "shards")
    for file in ("preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(Path(tiny) / file, tmp_path / "shards")
    (tmp_path / "shards" / "README.md").write_text("a copy")
    (tmp_path / "shards" / "chat_template.jinja").write_text("{{ messages }}<|image_pad|>")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 2
    load(str(tmp_path / "shards"), adapter=adapter)
    hub = tmp_path / "hub" / "models--org--vlm"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny, hub / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert origin_of("org/vlm") == origin_of(tiny) | {"name": "org/vlm"}
    assert origin_of("org/other")["fingerprint"] is None and origin_of("no id at all")["fingerprint"] is None
    Rollout(model="org/vlm", adapter=str(adapter)).resolve()
    assert "cannot be checked" not in capsys.readouterr().err


def test_an_adapter_from_elsewhere_is_held_against_the_model_that_it_names(tiny, adapter, tmp_path, capsys):
    (adapter / "base.json").unlink()
    load(tiny, adapter=adapter)  # PEFT wrote down where the model lies
    assert "cannot be checked" not in capsys.readouterr().err
    other = copy(tiny, tmp_path / "other", nudged)
    with pytest.raises(PolicyError, match=f"was made for {tiny} .*not for {other}"):
        load(other, adapter=adapter)
    for named, said in (("org/gone", "the weights of org/gone are not here"), (None, "it names no model")):
        configure(adapter, base_model_name_or_path=named)
        load(other, adapter=adapter)
        line = f"whether {adapter} was made for {other} cannot be checked: {said}"
        assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"name": 3, "fingerprint": "x", "adapter": null}', '{"name": "x"}']
)
def test_a_damaged_base_json_is_named(tiny, adapter, content):
    (adapter / "base.json").write_text(content)
    with pytest.raises(ValueError, match="base.json.*: without the file nothing is compared"):
        load(tiny, adapter=adapter)
    load(tiny, adapter=adapter, any_base=True)


@pytest.mark.parametrize("fingerprint", [None, "", 5, "abc"])
def test_a_base_json_without_a_fingerprint_is_not_taken_for_weights_that_are_not_here(tiny, adapter, fingerprint):
    configure(adapter, "base.json", fingerprint=fingerprint)
    with pytest.raises(PolicyError, match="base.json lacks a fingerprint of weights, so nothing .*--any-base"):
        Rollout(model=tiny, adapter=str(adapter)).resolve()
    (adapter / "base.json").unlink()
    (adapter / "base.json").mkdir()
    with pytest.raises(PolicyError, match="base.json is no file; .*--any-base"):
        Rollout(model=tiny, adapter=str(adapter)).resolve()


def test_an_adapter_of_weights_without_a_fingerprint_says_nothing_of_them(tiny, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "origin", policy.origin | {"fingerprint": None})  # as of a snapshot in pickles
    policy.save(tmp_path)
    assert not (tmp_path / "base.json").exists()
    policy.load_adapter(tmp_path)


def test_an_adapter_of_a_merged_start_belongs_to_the_merge(tiny, adapter, tmp_path):
    start = load(tiny, adapter=adapter)
    start.add_lora(2, 4)
    filled(start.model, seed=1)
    start.save(tmp_path / "second")
    record = json.loads((tmp_path / "second" / "base.json").read_text())
    assert record["name"] == tiny and record["adapter"]["name"] == str(adapter)
    said = f"for {tiny} .*with {adapter} merged into it, not for {tiny} .*; make that by Policy.load(.*).export"
    with pytest.raises(PolicyError, match=said):
        load(tiny, adapter=tmp_path / "second")
    again = load(tiny, adapter=adapter)
    again.load_adapter(tmp_path / "second")
    assert torch.equal(logits(again), logits(start))
    load(tiny, adapter=adapter).export(tmp_path / "start")  # beside the adapter, as in a run
    with pytest.raises(PolicyError, match=f"give --model {tmp_path / 'start'}, or"):
        load(tiny, adapter=tmp_path / "second")
    exported = load(str(tmp_path / "start"))
    exported.load_adapter(tmp_path / "second")
    assert torch.equal(logits(exported), logits(start))
    exported.save(tmp_path / "third")
    assert json.loads((tmp_path / "third" / "base.json").read_text()) == record
    with pytest.raises(PolicyError, match="not for"):  # the first belongs to the bare model
        load(str(tmp_path / "start"), adapter=adapter)
    rewrite(tmp_path / "start", nudged)  # no longer what the merge gave
    with pytest.raises(PolicyError, match=f"not for {tmp_path / 'start'}"):
        load(str(tmp_path / "start")).load_adapter(tmp_path / "second")


def test_what_is_exported_is_a_model_of_its_own(tiny, adapter, tmp_path):
    policy = load(tiny)
    policy.load_adapter(adapter)
    policy.export(tmp_path / "merged")
    policy.add_lora(2, 4)
    policy.save(tmp_path / "further")
    load(str(tmp_path / "merged"), adapter=tmp_path / "further")
    with pytest.raises(PolicyError, match=f"made for {tmp_path / 'merged'} .*not for {tiny}"):
        load(tiny, adapter=tmp_path / "further")


def test_a_fingerprint_is_of_the_tensors(tmp_path, monkeypatch):
    def of(*parts: dict) -> str:
        for number, part in enumerate(parts):
            save_file(part, tmp_path / f"{number}.safetensors")
        return fingerprint_of_tensors(*(tmp_path / f"{number}.safetensors" for number in range(len(parts))))

    a, b = torch.arange(6.0), torch.ones(2, 3)
    whole = of({"a": a, "b": b})
    assert whole == of({"b": b, "a": a}) == of({"a": a}, {"b": b}) == of({"b": b}, {"a": a})
    changed = a.clone()
    changed[3] += 1
    others = [{"a": changed, "b": b}, {"a": b, "b": a}, {"a": a}, {"a": a, "c": b}, {"a": a.view(2, 3), "b": b}]
    others += [{"a": a.double(), "b": b}, {"a": a.int(), "b": b}]
    assert len({whole, *(of(other) for other in others)}) == 1 + len(others)
    monkeypatch.setattr("upt.model.origin.WHOLE", 16)
    monkeypatch.setattr("upt.model.origin.END", 8)  # of 24 bytes: two of six values at either end
    ends = of({"a": a})
    for place, seen in enumerate([True, True, False, False, True, True]):
        changed = a.clone()
        changed[place] += 1
        assert (of({"a": changed}) != ends) is seen


# ------------------------------------------------------------------------------------------------ whole snapshots


def norm(name: str) -> str:
    keys = load_file(Path(name) / "model.safetensors")
    return next(k for k in keys if k.endswith("norm.weight") and "layers" not in k and "visual" not in k)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_snapshot_that_lacks_a_tensor_is_refused_with_its_name(snapshots, family, tmp_path):
    lacking = {
        "the last norm": (without(norm(snapshots[family])), "lacks tensors: model.language_model.norm.weight; fetch"),
        "the embeddings": (without("embed_tokens"), "embed_tokens.weight"),
        "a layer": (without("layers.1."), r"layers.1.input_layernorm.weight, .* and \d+ more"),
        "biases of the vision tower": (without("attn.qkv.bias"), "visual.blocks.0.attn.qkv.bias"),
    }
    for number, (change, said) in enumerate(lacking.values()):
        with pytest.raises(PolicyError, match=said):
            load(copy(snapshots[family], tmp_path / str(number), change))


def test_a_snapshot_of_other_shapes_is_refused_and_unused_tensors_are_said(tiny, tmp_path, capsys):
    key = norm(tiny)
    with pytest.raises(PolicyError, match=r"language_model.norm.weight is \(32,\), not \(64,\); fetch its weights"):
        load(copy(tiny, tmp_path / "narrow", lambda tensors: tensors | {key: torch.ones(32)}))
    more = load(copy(tiny, tmp_path / "more", lambda tensors: tensors | {"mtp.head": torch.ones(3)}))
    assert torch.equal(logits(more), logits(load(tiny)))
    assert capsys.readouterr().err.splitlines() == [
        f"the model {tmp_path / 'more'} has tensors that its architecture does not use: mtp.head"
    ]


def test_a_tied_head_may_be_absent_an_untied_one_may_not(tiny, tmp_path):
    tied = load(tiny)
    assert tied.base.lm_head.weight is tied.base.get_input_embeddings().weight  # and the file has one of them
    folder = Path(copy(tiny, tmp_path / "untied"))
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    configure(folder, "config.json", tie_word_embeddings=False, text_config=text)
    with pytest.raises(PolicyError, match="lacks tensors: lm_head.weight; fetch or make it again"):
        load(str(folder))
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tied.base.lm_head.weight.detach() + 1})
    assert not torch.equal(logits(load(str(folder))), logits(tied))


def test_a_shard_that_is_missing_or_a_pointer_is_named(tiny, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(tiny).save_pretrained(folder, max_shard_size="300KB")
    second = sorted(folder.glob("model-*"))[1]
    content = second.read_bytes()
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(PolicyError, match=f"{second.name} is no safetensors file; .*git lfs pull"):
        load(str(folder))
    second.unlink()
    with pytest.raises(PolicyError, match=f"lacks {second.name} of model.safetensors.index.json; fetch"):
        Rollout(model=str(folder)).resolve()
    second.write_bytes(content)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PolicyError, match="index.json is no index of weights"):
        load(str(folder))


def test_a_snapshot_of_pickles_is_refused(tiny, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    torch.save(AutoModelForImageTextToText.from_pretrained(tiny).state_dict(), folder / "pytorch_model.bin")
    load(str(folder))  # beside safetensors it is not opened
    (folder / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="weights in pytorch_model.bin, a pickle, .*use_safetensors=False.*save_pret"):
        load(str(folder))


def test_an_adapter_in_the_models_own_folder_is_not_put_on_it_unasked(tiny, adapter, tmp_path):
    folder = copy(tiny, tmp_path / "both")
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(PolicyError, match="holds an adapter beside the model: move it"):
        load(folder)
