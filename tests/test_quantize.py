"""4-bit weights: which layers have them, that nothing but their rounding changes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes import nn
from peft.tuners import lora as peft_lora

import judge
from eval import heldout
from eval import run as benchmarks
from tests.conftest import FAMILIES
from tests.test_adapters import configure, copy, filled
from tests.test_policy import questions, responses
from tests.test_train import adapter, run, same
from train_upt import Config, main
from upt.errors import PolicyError, ShardError
from upt.groups.shards import read_shard
from upt.model import lora, opening
from upt.model.decoding import generate
from upt.model.packing import pack
from upt.model.policy import Policy
from upt.prompts import template
from upt.reckoning.sizes import sizes_of, weight_bytes
from upt.run.settings import Rollout
from upt.stages import judging


def load(name: str, **options) -> Policy:
    return Policy.load(name, dtype="fp32", device="cpu", **options)


def packed(policy: Policy) -> dict[str, nn.Linear4bit]:
    return {name: layer for name, layer in policy.base.named_modules() if isinstance(layer, nn.Linear4bit)}


def in_full(name: str, quantised: Policy) -> Policy:
    """The model in float32 with the weights that the quantised one stands for."""
    policy = load(name)
    with torch.no_grad():
        for layer, module in packed(quantised).items():
            weight = lora.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            policy.base.get_submodule(layer).weight.copy_(weight)
    return policy


def found(policy: Policy) -> list[torch.Tensor]:
    """Log-probabilities, loss and the adapter's gradients over some rows."""
    prompts, _ = policy.encode(questions(), template("think-boxed"))
    (batch,) = pack(prompts, responses(policy, len(prompts)), 10_000)
    logprob, entropy = policy.logprobs(batch)
    loss = -(logprob * torch.linspace(-1, 1, len(logprob))).mean()
    loss.backward()
    return [logprob.detach(), entropy.detach(), loss.detach(), *(p.grad for p in policy.trainable())]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_models_layers_are_in_4_bits_and_no_others(snapshots, family):
    policy = load(snapshots[family], quantize="nf4")
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert {*packed(policy)} == {f"model.language_model.layers.{i}.{name}" for i in range(3) for name in names}
    plain = load(snapshots[family])
    for name, tensor in plain.base.state_dict().items():
        if f"{name.removesuffix('.weight')}" not in packed(policy):
            assert torch.equal(tensor, policy.base.state_dict()[name]), name
    for layer in packed(policy).values():
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32


def test_bytes_are_those_that_are_reckoned(tiny):
    policy = load(tiny, quantize="nf4")
    held = sum(p.numel() * p.element_size() for p in policy.base.parameters())
    for layer in packed(policy).values():
        scales = layer.weight.quant_state
        held += scales.absmax.nbytes + scales.state2.absmax.nbytes
    sizes = sizes_of(json.loads((Path(tiny) / "config.json").read_text()))
    scales = sizes.matrices // 64
    assert weight_bytes(sizes, 4, "nf4") == 4 * (sizes.parameters - sizes.matrices) + 32 * scales + scales + 20
    # These 21 matrices have fewer than 256 scales each, and a float32 each; reckoned are 5, for 1,440 scales. Rows of
    # 96 numbers, of three matrices, have scales of 32: 288 bytes more.
    assert scales // 256 == 5 and held == weight_bytes(sizes, 4, "nf4") + 4 * (21 - 5) + 288
    assert weight_bytes(sizes, 2) == 2 * sizes.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_the_rounded_weights(snapshots, family):
    quantised = load(snapshots[family], quantize="nf4")
    full = in_full(snapshots[family], quantised)
    for policy in (quantised, full):
        policy.add_lora(rank=4, alpha=8)
        filled(policy.model)
    layer = quantised.base.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is lora.Linear4bit and {p.dtype for p in quantised.trainable()} == {torch.float32}
    for ours, theirs in zip(found(quantised), found(full), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    # With the adapter off it is the quantised model without one.
    ids = torch.tensor([[5, 6, 7, 8]])
    with quantised.reference():
        off = quantised.base(input_ids=ids).logits
    assert torch.equal(off, load(snapshots[family], quantize="nf4").base(input_ids=ids).logits)


def test_how_far_4_bits_are_from_full_weights(tiny, tmp_path):
    """Normally distributed weights are off by a tenth of their size, and what is computed with them by bounds that a
    wrong scale or code would break; three layers of 64 numbers average little out. Weights as small as those of real
    models: 0.4 / sqrt(64)."""
    name = copy(tiny, tmp_path / "model", lambda tensors: {k: v / 4 if is_layer(k) else v for k, v in tensors.items()})
    quantised, full = load(name, quantize="nf4"), load(name)
    rounded = in_full(name, quantised)
    for layer in packed(quantised):
        one, other = (policy.base.get_submodule(layer).weight for policy in (full, rounded))
        assert 0.085 < (one - other).norm() / one.norm() < 0.1, layer
    for policy in (quantised, full):
        policy.add_lora(rank=4, alpha=8)
        filled(policy.model)
    (logprob, entropy, loss, *gradient), (logprobs, entropies, losses, *gradients) = map(found, (quantised, full))
    assert 0.01 < (logprob - logprobs).abs().mean() < 0.15 * logprobs.std()
    assert (entropy - entropies).abs().mean() < 0.1 * entropies.mean() and (loss - losses).abs() < 0.1 * losses.abs()
    gradient, gradients = (torch.cat([part.flatten() for part in parts]) for parts in (gradient, gradients))
    assert (gradient - gradients).norm() < 0.3 * gradients.norm()


def is_layer(key: str) -> bool:
    """Whether a tensor of a snapshot is a weight matrix of the language model's layers."""
    return ".layers." in key and key.endswith("_proj.weight") and "visual" not in key


def test_peft_computes_the_same(tiny):
    policies = [load(tiny, quantize="nf4") for _ in range(2)]
    for policy in policies:
        policy.add_lora(rank=4, alpha=8)
        filled(policy.model)
    for layer in policies[1].model.modules():
        if type(layer) is lora.Linear4bit:
            layer.__class__ = peft_lora.Linear4bit
    for ours, theirs in zip(*map(found, policies), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("merged", [2**30, 0])
def test_responses_are_those_of_the_rounded_weights(tiny, merged, monkeypatch):
    monkeypatch.setattr(lora, "MERGED_BYTES", merged)  # whether the adapter is merged while sampling
    quantised = load(tiny, quantize="nf4")
    full, config = in_full(tiny, quantised), Rollout(max_new_tokens=8, temperature=1.0, top_p=1.0, seed=0)
    answers = []
    for policy in (quantised, full):
        policy.add_lora(rank=4, alpha=8)
        filled(policy.model)
        prompts, _ = policy.encode(questions(), template("think-boxed"))
        answers.append(generate(policy, prompts, range(8), config))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_an_adapter_is_saved_for_the_full_model_and_not_merged_into_4_bits(tiny, tmp_path):
    quantised = load(tiny, quantize="nf4")
    quantised.add_lora(rank=2, alpha=4)
    filled(quantised.model)
    quantised.save(tmp_path / "adapter")
    with pytest.raises(PolicyError, match=r"not merged into 4-bit weights.*save the adapter and merge it"):
        quantised.export(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    full = load(tiny)
    full.load_adapter(tmp_path / "adapter")  # it has the full model's identity
    again = load(tiny, quantize="nf4")
    again.load_adapter(tmp_path / "adapter")
    for ours, theirs in zip(found(quantised), found(again), strict=True):
        assert torch.equal(ours, theirs)


def test_a_merged_adapter_is_quantised_with_the_weights(tiny, tmp_path):
    full = load(tiny)
    full.add_lora(rank=2, alpha=4)
    filled(full.model)
    full.save(tmp_path / "adapter")
    quantised = load(tiny, adapter=str(tmp_path / "adapter"), quantize="nf4")
    full.export(tmp_path / "merged")
    expected = load(str(tmp_path / "merged"), quantize="nf4")
    assert packed(quantised) and quantised.origin["adapter"] and not list(quantised.trainable())
    for name, layer in packed(expected).items():
        assert torch.equal(packed(quantised)[name].weight.data, layer.weight.data), name


def test_it_is_merged_in_float32_whatever_computes(tiny, tmp_path):
    """In bf16 a small change would be gone before it is rounded to 4 bits."""
    name = copy(tiny, tmp_path / "model", lambda tensors: {key: of.bfloat16() for key, of in tensors.items()})
    configure(Path(name), "config.json", dtype="bfloat16")
    full = load(name)
    full.add_lora(rank=2, alpha=4)
    filled(full.model)
    for key, parameter in full.model.named_parameters():
        if "lora_B" in key:
            parameter.data *= 1e-2
    full.save(tmp_path / "adapter")
    quantised = Policy.load(name, adapter=str(tmp_path / "adapter"), dtype="bf16", device="cpu", quantize="nf4")
    full.export(tmp_path / "merged")
    expected = load(str(tmp_path / "merged"), quantize="nf4")
    for layer, module in packed(expected).items():
        assert torch.equal(packed(quantised)[layer].weight.data, module.weight.data), layer
    assert {of.dtype for of in quantised.base.parameters()} == {torch.bfloat16, torch.uint8}
    assert {of.compute_dtype for of in packed(quantised).values()} == {torch.bfloat16}
    quantised.add_lora(rank=2, alpha=4)
    quantised.save(tmp_path / "next")
    assert json.loads((tmp_path / "next" / "adapter_config.json").read_text())["base_model_name_or_path"] == name


def test_what_cannot_be_quantised_is_said(tiny, tmp_path):
    with pytest.raises(PolicyError, match="quantize must be nf4 or None, not 'int8'"):
        load(tiny, quantize="int8")
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.Linear(80, 64)})})
    layer.name_or_path = "narrow"
    with pytest.raises(
        PolicyError, match="layers.0 of narrow has rows of 80 numbers, and 4 bits need a multiple of 32"
    ):
        opening.quantize(layer, "layers", torch.float32, torch.device("cpu"))
    folder = copy(tiny, tmp_path / "awq")
    configure(Path(folder), "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(PolicyError, match=r"quantised already \(awq\): give the full model, and --quantize nf4"):
        load(folder)
    configure(Path(folder), "config.json", quantization_config={"bits": 4})
    with pytest.raises(PolicyError, match=r"quantised already \(quantization_config in its config.json\)"):
        load(folder)


# ---------------------------------------------------------------------------------------------------- whole runs

FOUR_BITS = {"steps": 2, "quantize": "nf4", "kl_coef": 0.1, "save_every": 1, "eval_questions": 4, "eval_samples": 2}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    return run(tiny, tmp_path_factory.mktemp("quantised") / "run", **FOUR_BITS)


def test_a_run_trains_and_goes_on_to_the_same_bits(tiny, trained, tmp_path):
    assert any(value.abs().max() > 0 for name, value in adapter(trained).items() if "lora_B" in name)
    assert not same(trained, run(tiny, tmp_path / "full", **FOUR_BITS | {"quantize": None}))
    stopped = tmp_path / "stopped"
    shutil.copytree(trained, stopped)
    for path in (stopped / "adapter", stopped / "checkpoints" / "step-000002"):
        shutil.rmtree(path)
    for name in ("summary.json", "after.json"):
        (stopped / name).unlink()
    main(Config(resume=True, out=stopped))
    assert same(trained, stopped)
    assert (stopped / "after.json").read_bytes() == (trained / "after.json").read_bytes()
    with pytest.raises(ShardError, match="quantize"):
        run(tiny, trained, **FOUR_BITS | {"quantize": None})


def test_a_run_is_scored_as_it_was_trained(trained, capsys):
    scores = heldout.main(heldout.Config(run=trained, eval_questions=4))
    rows = json.loads((trained / "after.json").read_text())["rows"]
    assert scores["rows"] == [row | {"image": None} for row in rows]  # scored again, pictures are not kept


@pytest.mark.parametrize("way", ["adapter", "init_adapter"])
def test_a_run_starts_from_an_adapter(tiny, trained, tmp_path, way):
    out = run(tiny, tmp_path / way, **FOUR_BITS | {"steps": 1, way: str(trained / "adapter"), "eval_questions": 0})
    assert not same(out, trained)
    if way == "adapter":  # merged in full, and quantised from there
        assert not json.loads((out / "start" / "config.json").read_text()).get("quantization_config")
        again = load(tiny, adapter=str(trained / "adapter"), quantize="nf4")  # as it is elsewhere, without a snapshot
        for name, layer in packed(load(str(out / "start"), quantize="nf4")).items():
            assert torch.equal(packed(again)[name].weight.data, layer.weight.data), name


def test_what_was_in_4_bits_can_be_opened_in_full(trained):
    for given, quantize in ((None, "nf4"), ("none", None), ("nf4", "nf4")):
        assert heldout.Config(run=trained, quantize=given).resolve().quantize == quantize
        assert benchmarks.Config(run=trained, data="x", quantize=given).resolve().quantize == quantize
        assert judge.resolve(judge.Config(rollouts=trained / "rollouts", quantize=given))[0].quantize == quantize


def test_a_run_is_judged_in_4_bits(tiny, tmp_path, monkeypatch):
    """By the judge that judge.py is by itself, and by one with the weights in full that the 4 bits stand for."""
    monkeypatch.setattr(judging.answers, "keeps_format", lambda text, style: True)  # else none would be judged
    out = run(tiny, tmp_path / "run", steps=1, quantize="nf4", reward="judged")
    in_full(tiny, load(tiny, quantize="nf4")).export(tmp_path / "model")

    def scores(folder: Path) -> list[float]:
        groups = read_shard(folder / "step-000000.jsonl")
        return [response["judge"]["score"] for group in groups for response in group["responses"]]

    for name, given in (
        ("nf4", {}),
        ("rounded", {"model": str(tmp_path / "model"), "quantize": "none"}),
        ("full", {"quantize": "none"}),
    ):
        judge.main(judge.Config(rollouts=out / "rollouts", out=tmp_path / name, **given))
    of_the_run = scores(out / "rollouts")
    assert len({*of_the_run}) > 4
    for name, same_as in (("nf4", True), ("rounded", True), ("full", False)):
        assert (scores(tmp_path / name) == pytest.approx(of_the_run, abs=1e-4)) is same_as, name
