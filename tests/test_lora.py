"""LoRA layers of our own: equal to PEFT's to rounding, merged or in half types while sampling, untouched by it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora

from upt.model import lora


def adapted(dtype=torch.float32, **settings):
    """A layer of 6 -> 5 with an adapter that counts, ours and PEFT's with the same weights."""
    found = []
    for quick in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5)).to(dtype)
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
        if quick:
            lora.fuse(model)
        found.append(model.eval())
    return found


def gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for name, p in model.named_parameters() if "lora_" in name)]


def test_a_layer_by_hand():
    model, _ = adapted()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.fill_(1)
        layer.lora_A["default"].weight.zero_()[0, 0] = 2  # A x = (2 x_0, 0)
        layer.lora_B["default"].weight.zero_()[4, 0] = 5  # B A x = (0, 0, 0, 0, 10 x_0), times alpha / r = 3
    assert model(torch.tensor([[1.0, 7, 7, 7, 7, 7]])).tolist() == [[1, 1, 1, 1, 31]]


@pytest.mark.parametrize("small", [lora.SMALL, 0])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_values_and_gradients_are_pefts(shape, small, monkeypatch):
    monkeypatch.setattr(lora, "SMALL", small)
    ours, theirs = adapted()
    assert type(ours.base_model.model[0]) is lora.Linear and type(theirs.base_model.model[0]) is peft_lora.Linear
    x = torch.randn(shape)
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_weights_keep_a_float32_adapter():
    ours, theirs = adapted(torch.bfloat16)
    x = torch.randn(3, 6).bfloat16()
    for found, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert ours.base_model.model[0].lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_kinds_of_adapters_are_left_to_peft(settings):
    ours, theirs = adapted(**settings)
    layer = ours.base_model.model[0]
    assert layer.plain() is None
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), theirs(x))
    with lora.sampling(ours):
        assert torch.equal(ours(x), theirs(x))


def test_off_merged_and_named():
    ours, theirs = adapted()
    x = torch.randn(3, 6)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), ours.base_model.model[0].base_layer(x))
    trained = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), trained)
    assert not torch.allclose(trained, torch.nn.functional.linear(x, torch.zeros(5, 6)))


def test_it_saves_and_merges_as_pefts(tmp_path):
    ours, theirs = adapted()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x = torch.randn(3, 6)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)(x), theirs(x))
    expected = ours(x)
    torch.testing.assert_close(ours.merge_and_unload()(x), expected)


@pytest.mark.parametrize("most", [2**30, 0])
def test_sampling_changes_nothing_that_is_trained(most, monkeypatch):
    monkeypatch.setattr(lora, "MERGED_BYTES", most)
    model, _ = adapted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    x = torch.randn(3, 6)
    outside = model(x)
    with lora.sampling(model), torch.no_grad():
        calls = []
        hook = model.base_model.model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(x), outside)
        assert len(calls) == (0 if most else 1)  # merged: the layer with its adapter is one product
        hook.remove()
    assert torch.equal(model(x), outside)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_half_types_are_not_merged():
    model, _ = adapted(torch.bfloat16)
    layer = model.base_model.model[0]
    with torch.no_grad():  # what is added is smaller than half of a weight's last digit
        layer.base_layer.weight.fill_(1)
        layer.base_layer.bias.zero_()
        layer.lora_A["default"].weight.zero_()[:, 0] = 1e-3
        layer.lora_B["default"].weight.fill_(0.1)
    x = torch.tensor([[1.0, -1, 1, -1, 1, -1]]).bfloat16()  # the weights' part is 0
    with lora.sampling(model), torch.no_grad():
        assert model(x).float().flatten().tolist() == pytest.approx([3 * 2 * 1e-3 * 0.1] * 5, rel=0.01)
    assert (layer.base_layer.weight + 6e-4).unique().tolist() == [1.0]


def test_sampling_that_runs_out_of_memory_leaves_the_layers_as_they_were(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    lora.fuse(model)
    real, made = lora.partial, []

    def second_fails(*args, **settings):
        made.append(1)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **settings)

    monkeypatch.setattr(lora, "partial", second_fails)
    with pytest.raises(torch.OutOfMemoryError), lora.sampling(model):
        pass
    assert len(made) == 2 and not any("forward" in vars(layer) for layer in model.modules())
