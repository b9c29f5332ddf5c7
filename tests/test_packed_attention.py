"""Attention of packed rows and of pictures' windows against one sequence at a time, and of plain passes."""

import inspect
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import FAMILIES
from upt.data import Question, shapes
from upt.errors import PolicyError
from upt.model import attention
from upt.model.packing import Row, layout
from upt.model.policy import Policy

CPU = torch.device("cpu")
# Rows of a prompt and its responses, of one of which nothing is an input, and a row of a prompt alone.
PROMPTS, RESPONSES = [(0, 5), (15, 16), (18, 25)], [[(5, 8), (8, 8), (8, 15)], [(16, 18)], []]


def flash(query, key, value, queries, keys, longest_query, longest_key, *, scale, window_size, top=False, **heads):
    """Stands in for torch's variable-length attention, which needs a GPU: one sequence after the other."""
    cuts = [queries.tolist(), keys.tolist()]
    assert all(cut[0] == 0 and len(cut) == len(cuts[0]) for cut in cuts) and queries.dtype == keys.dtype == torch.int32
    assert [cut[-1] for cut in cuts] == [len(query), len(key)]
    found = []
    for (a, b), (c, d) in zip(*(zip(cut[:-1], cut[1:]) for cut in cuts)):
        assert 0 < b - a <= longest_query and 0 < d - c <= longest_key
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        mask = mask.tril(0 if top else d - c - (b - a)) if window_size == (-1, 0) else mask
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        found.append(scaled_dot_product_attention(q, k, v, mask, scale=scale, **heads).transpose(0, 1))
    return torch.cat(found)


def states(length: int, *heads: int, dtype=torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, length, 8, generator=draw, dtype=dtype).requires_grad_() for h in heads]


def by_rows(query, key, value, scaling: float) -> torch.Tensor:
    """Each place of PROMPTS and RESPONSES with the keys that it may see, written out."""
    mask = torch.zeros(25, 25, dtype=torch.bool)
    for prompt, several in zip(PROMPTS, RESPONSES):
        for start, end in (prompt, *several):
            for place in range(start, end):
                mask[place, prompt[0] : min(prompt[1], place + 1)] = True
                mask[place, start : place + 1] = True
    return scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("kind, shares_heads", [("Padded", True), ("Varlen", True), ("Varlen", False)])
def test_rows_see_their_prompt_and_themselves(kind, shares_heads, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", flash)
    monkeypatch.setattr(attention, "SHARES_HEADS", shares_heads)
    inputs = states(25, 4, 2, 2)
    ours = getattr(attention, kind)(PROMPTS, RESPONSES, CPU)(0, *inputs, 0.3)
    exact = by_rows(*inputs, 0.3)
    torch.testing.assert_close(ours, exact, atol=1e-14, rtol=1e-13)
    weight = torch.randn(exact.shape, dtype=exact.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, weight) for out in (ours, exact))):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-13)


def test_variable_length_attention_is_called_as_torch_has_it():
    found = inspect.signature(attention.varlen_attn).parameters
    assert [*found][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= {*found} and attention.SHARES_HEADS == ("enable_gqa" in found)


def test_a_flash_attention_of_another_alignment_is_refused(monkeypatch):
    check = attention.check_varlen.__wrapped__
    monkeypatch.setattr(attention, "varlen_attn", flash)
    check(CPU)
    monkeypatch.setattr(attention, "varlen_attn", partial(flash, top=True))
    with pytest.raises(PolicyError, match="--dtype fp32"):
        check(CPU)


def test_gathered_copies_are_summed():
    gather = attention.Gather.of(torch.tensor([1, 3, -1, 1, 0, 1]))
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0]], requires_grad=True)
    found = gather(rows)
    assert found[[0, 1, 3, 4, 5], 0].tolist() == [2, 8, 2, 1, 2]  # what stands at the padding is any row
    (gradient,) = torch.autograd.grad(found, rows, torch.tensor([[1.0], [2.0], [100.0], [4.0], [8.0], [16.0]]))
    assert gradient[:, 0].tolist() == [8, 1 + 4 + 16, 0, 2]
    # In bf16 256 + 1 is 256: the sum of the copies is rounded once.
    (gradient,) = torch.autograd.grad(
        gather(rows.bfloat16()), rows, torch.tensor([[256.0], [0.0], [0.0], [1.0], [0.0], [1.0]]).bfloat16()
    )
    assert gradient[1].item() == 258


def test_no_row_is_written_twice_in_a_backward_pass():
    for kind in (attention.Varlen, attention.Padded):
        made = kind(PROMPTS, RESPONSES, CPU)
        for gather in (made.gather,) if kind is attention.Varlen else (made.queries, made.keys, made.back):
            rows = torch.cat([rows for rows, _ in gather.copies])
            assert len(rows.unique()) == len(rows) == 25  # so no order of threads changes a sum


# ------------------------------------------------------------------------------------------------ in a model


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, snapshots) -> Policy:
    return Policy.load(snapshots[request.param], dtype="fp32", device="cpu")


def prompts_of(policy: Policy, *sizes) -> list:
    items = zip(shapes.questions("train", 0, len(sizes)), sizes)
    found = [Question(item.uid, item.question, None, item.image.resize(size), item.gold) for item, size in items]
    return policy.encode(found, "{question}")[0]


class Recording:
    """A cache that keeps what it is given, and answers with it."""

    def __init__(self):
        self.seen = {}

    def update(self, keys, values, layer):
        self.seen[layer] = (keys, values)
        return keys, values


@torch.no_grad()
def test_a_prompt_alone_leaves_its_keys_and_values_to_a_cache(policy):
    """Rows without responses, several in one sequence: keys and values are those of each prompt by itself."""
    prompts = prompts_of(policy, (84, 84), (140, 84))

    def filled(some):
        cache, made = Recording(), layout([Row(prompt, [], []) for prompt in some], CPU, torch.float32)
        return made, cache.seen, policy.hidden(made.ids, made.positions, made.attention, some, cache)

    made, seen, hidden = filled(prompts)
    assert sorted(seen) == [0, 1, 2] and made.responses == [[], []]
    for prompt, (start, end) in zip(prompts, made.prompts):
        _, alone, last = filled([prompt])
        torch.testing.assert_close(hidden[:, start:end], last, atol=1e-5, rtol=1e-4)
        for layer in alone:
            for together, single in zip(seen[layer], alone[layer]):
                torch.testing.assert_close(together[:, :, start:end], single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_plain_generate_of_the_model_minds_its_mask(policy):
    """Prompts of two lengths, padded on the left: greedy tokens, and logits under a mask, are those of each alone."""
    texts = [policy.tokens("How many red circles?"), policy.tokens("Is there a square in it, and which one is it?")]
    width, pad = max(map(len, texts)), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    assert mask.sum() < mask.numel()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = policy.base.generate(ids, attention_mask=mask, **options)[:, width:]
    logits = policy.base(input_ids=ids, attention_mask=mask).logits[:, -1]
    for text, tokens, last in zip(texts, together, logits):
        one = torch.tensor([text])
        alone = policy.base.generate(one, attention_mask=torch.ones_like(one), **options)[0, len(text) :]
        assert tokens.tolist() == alone.tolist()
        torch.testing.assert_close(last, policy.base(input_ids=one).logits[0, -1], atol=1e-4, rtol=1e-3)


class Count(TorchDispatchMode):
    """Counts attention's operators."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "attention" in str(function)
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_windows_of_one_length_are_one_call(policy):
    """The tower's features are transformers' own, from a call a layer and length of window, not one a window."""
    visual, sizes = policy.base.model.visual, [(84, 84), (140, 84), (84, 224), (84, 84), (84, 84), (84, 84)]
    with Count() as ours:
        found = prompts_of(policy, *sizes)
    visual.config._attn_implementation = "sdpa"
    try:
        with Count() as theirs:
            plain = prompts_of(policy, *sizes)
    finally:
        attention.install_windows(visual)
    for one, two in zip(found, plain):
        mine, other = ((of.embeds, *of.deepstack) for of in (one.features, two.features))
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert (ours.calls, theirs.calls > 10) == (2 * 3, True)  # layers, and lengths that occur in each


def test_a_tower_that_does_not_take_the_name_is_refused(policy):
    class Config:
        _attn_implementation = property(lambda self: "sdpa", lambda self, name: None)

    tower = torch.nn.Linear(1, 1)
    tower.config = Config()
    with pytest.raises(PolicyError, match="requirements.txt"):
        attention.install_windows(tower)


def test_a_saved_model_is_not_tied_to_this_attention(policy, tmp_path):
    policy.export(tmp_path)
    assert "upt" not in (tmp_path / "config.json").read_text()


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_packed_rows_and_windows_are_those_of_float32(snapshots):
    found = []
    for dtype in ("bf16", "fp32"):
        policy = Policy.load(snapshots["qwen2_5_vl"], dtype=dtype, device="cuda", gradient_checkpointing=False)
        prompts = prompts_of(policy, (84, 84), (140, 84))
        assert all(prompt.features.embeds.is_pinned() for prompt in prompts)
        rows = [
            Row(prompt, [[1, 2, 3], [4], [5, 6, 7, 8]], [(b, 0), (b, 1), (b, 2)]) for b, prompt in enumerate(prompts)
        ]
        policy.add_lora(4, 8)
        logprob, _ = policy.logprobs(rows)
        logprob.sum().backward()
        found.append([logprob.detach(), *(p.grad for p in policy.trainable())])
    for half, exact in zip(*found):
        assert (half - exact).norm() < 0.05 * exact.norm() + 1e-3
