"""Slots: tokens as if every response were decoded alone, steps as few as refilling allows, buffers that never move."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import row_id
from tests.test_rollout import config
from upt import data
from upt.errors import PolicyError
from upt.model import decoding, slots
from upt.model.policy import Policy
from upt.prompts import template


@pytest.fixture(scope="module")
def policy(tiny) -> Policy:
    """With an adapter that has moved, so that it counts."""
    found = Policy.load(tiny, dtype="fp32", device="cpu")
    found.add_lora(4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.trainable():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found.base.generation_config.eos_token_id = list(range(0, len(found.tokenizer), 6))  # lengths that differ
    return found


@pytest.fixture(scope="module")
def prompts(policy):
    found, _ = policy.encode(data.load("shapes", "train", 0, limit=6), template("think-boxed"))
    asked = data.Question("text", "How many sides does a square have?", None, image=None, gold=None)
    return [*found, *policy.encode([asked], template("boxed"))[0]]


def keys(prompts, count: int) -> list[int]:
    return [row_id(3, prompt.uid, g) for prompt in prompts for g in range(count)]


@pytest.fixture(scope="module")
def alone(policy, prompts, tiny) -> dict:
    """Of every prompt five responses of at most 12 tokens, each sampled by itself."""
    one = config(tiny, max_new_tokens=12, slots=1)
    return {key: decoding.generate(policy, [prompt], [key], one)[0] for prompt in prompts for key in keys([prompt], 5)}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The number of slots of every step."""
    found, real = [], slots.Slots.eager_step
    monkeypatch.setattr(slots.Slots, "eager_step", lambda self, count: found.append(count) or real(self, count))
    return found


@settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_tokens_are_those_of_decoding_one_at_a_time(policy, prompts, tiny, alone, data):
    order = data.draw(st.permutations(range(len(prompts))), label="order")[: data.draw(st.integers(1, 7))]
    count, width = data.draw(st.integers(1, 5), label="rows"), data.draw(st.integers(1, 40), label="slots")
    chosen = [prompts[i] for i in order]
    found = decoding.generate(policy, chosen, keys(chosen, count), config(tiny, max_new_tokens=12, slots=width))
    for key, response in zip(keys(chosen, count), found, strict=True):
        assert response.ids == alone[key].ids and response.finish == alone[key].finish
        assert response.logprobs == pytest.approx(alone[key].logprobs, abs=1e-4)
        assert response.entropy == pytest.approx(alone[key].entropy, abs=1e-4)
        assert response.self_certainty == pytest.approx(alone[key].self_certainty, abs=1e-3)


def test_lengths_differ_so_that_refilling_is_tested(alone):
    assert len({len(response.ids) for response in alone.values()}) > 4
    assert {response.finish for response in alone.values()} == {"stop", "length"}


def test_a_long_response_holds_one_slot(policy, prompts, tiny, alone, steps):
    rows = keys(prompts, 5)
    decoding.generate(policy, prompts, rows, config(tiny, max_new_tokens=12, slots=4))
    lengths = [len(alone[key].ids) for key in rows]
    # The first token comes from the prompt. A slot that becomes idle is filled before the next step but for a token.
    assert len(steps) <= math.ceil(sum(lengths) / 4) + max(lengths)
    batches = [max(lengths[i : i + 4]) - 1 for i in range(0, len(lengths), 4)]
    assert len(steps) < sum(batches)
    assert max(steps) == 4 and steps[-1] < 4  # with nothing left to start, fewer take part


def test_buffers_stay_where_they_are(policy, prompts, tiny, monkeypatch):
    seen = []

    def addresses(state) -> dict[str, int]:
        tensors = {name: value for name, value in vars(state).items() if torch.is_tensor(value) and name != "written"}
        stores = {"prompts": state.prompts.both, "own": state.own.both}
        return {name: tensor.data_ptr() for name, tensor in (tensors | stores).items()}

    real = slots.Slots.step
    monkeypatch.setattr(slots.Slots, "step", lambda self: seen.append(addresses(self)) or real(self))
    decoding.generate(policy, prompts, keys(prompts, 5), config(tiny, max_new_tokens=12, slots=6))
    assert len(seen) > 20 and len(seen[0]) > 15
    assert all(found == seen[0] for found in seen)


@pytest.fixture
def short_of_memory(policy, monkeypatch):
    """Memory runs out in some calls of Slots.<method> that have more than 3 slots."""
    monkeypatch.setattr(policy, "fitted", {})

    def within(method: str, turns: int) -> list[int]:
        real, tried = getattr(slots.Slots, method), []

        def call(self, *args):
            tried.append(self.sizes.slots)
            if self.sizes.slots > 3 and len(tried) % turns == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, *args)

        monkeypatch.setattr(slots.Slots, method, call)
        return tried

    return within


@pytest.mark.parametrize(("method", "turns"), [("step", 9), ("prefill", 3), ("shrink", 1)])
def test_out_of_memory_goes_on_with_half_the_slots(
    policy, prompts, tiny, alone, short_of_memory, capsys, method, turns
):
    tried, done = short_of_memory(method, turns), []
    rows, settings = keys(prompts, 5), config(tiny, max_new_tokens=12, slots=12)
    found = decoding.generate(policy, prompts, rows, settings, tick=done.append)
    assert [response.ids for response in found] == [alone[key].ids for key in rows]
    assert sum(done) == len(rows)
    halves = capsys.readouterr().out.count("out of memory with")
    assert halves >= 1 and {*tried} >= {12, 6} and policy.fitted == {"--slots": 0.5**halves}


def test_after_running_out_slots_follow_the_memory_that_there_was(policy, prompts, tiny, monkeypatch, steps):
    rows, settings = keys(prompts, 5), config(tiny, max_new_tokens=12, slots=12)
    slot, prompt = slots.bytes_of(policy, slots.Sizes(12, 7, max(len(p.ids) for p in prompts), 12, 3))
    monkeypatch.setattr(decoding, "HOST_BYTES", 12 * slot + 6 * prompt)  # 12 slots, in groups of 5: 2 x 3 prompts
    for share, most in ((1.0, 12), (0.5, 5)):
        steps.clear()
        monkeypatch.setattr(policy, "fitted", {"--slots": share})
        decoding.generate(policy, prompts, rows, settings)
        assert max(steps) == most


def test_one_slot_that_does_not_fit_is_an_error(policy, prompts, tiny, monkeypatch):
    def never(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slots.Slots, "step", never)
    monkeypatch.setattr(policy, "fitted", {})
    with pytest.raises(PolicyError, match="one response at a time: .* --max-new-tokens"):
        decoding.generate(policy, prompts, keys(prompts, 5), config(tiny, max_new_tokens=12, slots=12))


def test_one_small_group_does_not_make_room_for_more_prompts(policy, prompts):
    few, many = [slots.Job(prompts[0], [[0]]), *(slots.Job(p, [list(range(5))]) for p in prompts)], 12
    assert decoding._sizes(policy, few, 12, many).places == 2 * math.ceil(many / 5)


def test_nothing_to_sample_is_nothing(policy, tiny):
    assert decoding.generate(policy, [], [], config(tiny)) == []
    assert decoding.generate(policy, [], [], config(tiny), suffixes=[]) == []


def test_moving_slots_copies_a_layer_at_a_time():
    store = slots.Store(3, 4, 2, 5, 6, torch.zeros(1))
    store.both.copy_(torch.arange(store.both.numel()).view_as(store.both))
    before, sizes = store.both.clone(), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "index.Tensor" in str(function):
                sizes.append(out.numel())
            return out

    with Sizes():
        store.move(torch.tensor([3, 2]), torch.tensor([0, 1]))
    assert torch.equal(store.both[:, :, :2], before[:, :, [3, 2]]) and torch.equal(
        store.both[:, :, 2:], before[:, :, 2:]
    )
    assert max(sizes) == 2 * 2 * 2 * 5 * 6  # keys and values of two slots in one layer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_on_a_gpu_graphs_draw_what_single_steps_draw(snapshots, monkeypatch, device):
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    policy = Policy.load(snapshots["qwen2_5_vl"], dtype="fp32", device=device)
    policy.add_lora(4, 8)
    policy.base.generation_config.eos_token_id = list(range(0, len(policy.tokenizer), 6))
    found, _ = policy.encode(data.load("shapes", "train", 0, limit=16), template("think-boxed"))
    settings = config(snapshots["qwen2_5_vl"], max_new_tokens=24, slots=32)
    used, real = [], slots.Slots.step
    monkeypatch.setattr(slots.Slots, "step", lambda self: used.append(self.count in self.graphs) or real(self))
    captured = decoding.generate(policy, found, keys(found, 8), settings)
    assert all(used)
    used.clear()
    monkeypatch.setattr(slots.Slots, "capture", lambda self: None)
    plain = decoding.generate(policy, found, keys(found, 8), settings)
    assert not any(used) and [r.ids for r in plain] == [r.ids for r in captured]


class Forbidden(TorchDispatchMode):
    """Notes what a CUDA graph can't hold: reading a value on the host, and shapes that depend on values."""

    WORDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.found += [str(function) for word in self.WORDS if word in str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_step_reads_nothing_on_the_host(snapshots, family, monkeypatch):
    monkeypatch.setenv("UPT_KERNELS", "triton")  # the references of a CPU may look
    policy = Policy.load(snapshots[family], dtype="fp32", device="cpu")
    policy.add_lora(4, 8)
    prompts, _ = policy.encode(data.load("shapes", "train", 0, limit=2), template("think-boxed"))
    seen, real = [], slots.Slots.step

    def step(self):
        with Forbidden() as mode:
            real(self)
        seen.append(mode)

    monkeypatch.setattr(slots.Slots, "step", step)
    decoding.generate(policy, prompts, keys(prompts, 2), config(snapshots[family], max_new_tokens=3, top_p=0.9))
    assert seen and all(mode.count > 50 and not mode.found for mode in seen)
