"""The packed forward against a plain one, response by response, and what the policy saves."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from tests.conftest import FAMILIES
from tests.test_packed_attention import flash
from upt.data import Question, shapes
from upt.errors import PolicyError
from upt.model import attention
from upt.model.packing import Row, layout, pack
from upt.model.policy import Policy
from upt.prompts import template


def questions() -> list[Question]:
    """Three questions with pictures of three sizes and one without a picture."""
    items = shapes.questions("train", 0, 3)
    sizes = [(84, 84), (140, 84), (84, 224)]
    found = [
        Question(item.uid, item.question, ["2", "three"] if n == 1 else None, item.image.resize(size), item.gold)
        for n, (item, size) in enumerate(zip(items, sizes))
    ]
    return [*found, Question("text", "What is 3+4?", None, None, "7")]


def responses(policy: Policy, count: int) -> list[list[list[int]]]:
    """Three responses to each question, of different lengths, as random ordinary tokens."""
    draw = torch.Generator().manual_seed(1)
    return [[torch.randint(256, (n,), generator=draw).tolist() for n in (5, 1, 9)] for _ in range(count)]


def with_lora(name: str, **settings) -> Policy:
    policy = Policy.load(name, dtype="fp32", device="cpu", **settings)
    policy.add_lora(rank=4, alpha=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.normal_(std=0.1)
    return policy


def exact(policy: Policy) -> Policy:
    """In float64, the norms too, which transformers computes in float32."""
    policy.model.double()
    for module in policy.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(functional.rms_norm, normalized_shape=module.weight.shape, weight=module.weight)
            module.forward.keywords["eps"] = module.variance_epsilon
    return policy


def one_by_one(policy: Policy, found, answers) -> dict:
    """Log-probabilities by the model's own forward, one question and one response at a time."""
    result = {}
    model, pad = policy.base, policy.base.config.image_token_id
    for g, (question, group) in enumerate(zip(found, answers)):
        ids = policy.tokenize(question, template("boxed"))
        vision = {}
        if question.image is not None:
            seen = policy.family.image_processor(images=[question.image], return_tensors="pt")
            at, count = ids.index(pad), int(seen["image_grid_thw"].prod()) // 4
            ids = ids[:at] + [pad] * count + ids[at + 1 :]
            vision = dict(seen)
        for i, answer in enumerate(group):
            full = torch.tensor([ids + answer])
            types = (full == pad).int()
            extra = vision | {"mm_token_type_ids": types} if vision else {}
            logits = model(input_ids=full, attention_mask=torch.ones_like(full), **extra).logits[0]
            logp = (logits / 0.7).log_softmax(-1)[len(ids) - 1 : -1]
            result[g, i] = logp.gather(1, torch.tensor(answer)[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)
    return result


def packed(policy: Policy, found, answers, budget: int) -> dict:
    prompts, dropped = policy.encode(found, template("boxed"))
    assert not dropped
    result = {}
    for batch in pack(prompts, answers, budget):
        logprob, entropy = policy.logprobs(batch, 0.7)
        owners = [owner for row in batch for owner in row.owners]
        sizes = [len(response) for row in batch for response in row.responses]
        result |= dict(zip(owners, zip(logprob.split(sizes), entropy.split(sizes))))
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(snapshots, family, monkeypatch):
    """Values and gradients in float64, of pictures and text, groups that are split, and responses of one token."""
    policy = exact(with_lora(snapshots[family], gradient_checkpointing=True))
    found = questions()
    answers = responses(policy, len(found))
    plain = one_by_one(policy, found, answers)
    weights = {owner: torch.linspace(-1, 1, len(logp)) for owner, (logp, _) in plain.items()}

    def gradient(result):
        loss = sum((weights[owner] * logp).sum() for owner, (logp, _) in result.items())
        return torch.autograd.grad(loss, policy.trainable())

    expected = gradient(plain)
    assert max(g.abs().max() for g in expected) > 0.01  # the comparison below is of real gradients

    def agree(budget):
        ours = packed(policy, found, answers, budget)
        assert ours.keys() == plain.keys()
        for owner in plain:
            for mine, theirs in zip(ours[owner], plain[owner]):
                torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)
        for mine, theirs in zip(gradient(ours), expected):
            torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)

    for budget in (40, 100, 10_000):  # a response a row, split groups, one batch
        agree(budget)
    policy.model.train()  # with checkpointing
    agree(10_000)
    monkeypatch.setattr(attention, "varlen_attn", flash)
    monkeypatch.setattr("upt.model.packing.packed", lambda *spans, dtype: attention.Varlen(*spans))
    agree(100)
    monkeypatch.setattr(attention, "SHARES_HEADS", False)
    agree(10_000)


def test_checkpointing_changes_nothing(tiny):
    results = []
    for checkpointing in (False, True):
        policy = Policy.load(tiny, dtype="fp32", device="cpu", gradient_checkpointing=checkpointing)
        policy.add_lora(rank=4, alpha=8, seed=1)
        assert policy.base.model.language_model.gradient_checkpointing is checkpointing
        policy.model.train()
        prompts, _ = policy.encode(questions(), template("boxed"))
        (batch,) = pack(prompts, responses(policy, 4), 10_000)
        logprob, _ = policy.logprobs(batch)
        results.append([logprob, *torch.autograd.grad(logprob.sum(), policy.trainable())])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(checkpointed, plain)


def test_reference_is_the_adapter_off(tiny):
    start, policy = Policy.load(tiny, dtype="fp32", device="cpu"), with_lora(tiny)
    prompts, _ = policy.encode(questions(), template("boxed"))
    (batch,) = pack(prompts, responses(policy, 4), 10_000)
    on, _ = policy.logprobs(batch)
    with policy.reference():
        off, _ = policy.logprobs(batch)
    expected, _ = start.logprobs(batch)
    assert torch.equal(off, expected) and not off.requires_grad
    assert (on - off).abs().max() > 0.1


def test_only_language_model_linears_are_trained(snapshots):
    for family in FAMILIES:
        policy = Policy.load(snapshots[family], dtype="fp32", device="cpu")
        policy.add_lora(rank=2, alpha=4)
        names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
        assert len(names) == 3 * 7 * 2  # layers x linear layers x (A, B)
        assert all("language_model.layers" in name and "lora" in name for name in names)


def test_adapter_saves_in_peft_layout_and_merges(tiny, tmp_path):
    policy = with_lora(tiny)
    prompts, _ = policy.encode(questions(), template("boxed"))
    (batch,) = pack(prompts, responses(policy, 4), 10_000)
    before, _ = policy.logprobs(batch)
    policy.save(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny), tmp_path / "adapter")
    saved = dict(policy.model.named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in opened.named_parameters() if "lora" in name)
    again = Policy.load(tiny, dtype="fp32", device="cpu")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again.logprobs(batch)[0], before) and again.trainable()
    policy.export(tmp_path / "merged")
    merged = Policy.load(str(tmp_path / "merged"), dtype="fp32", device="cpu")
    prompts, _ = merged.encode(questions(), template("boxed"))
    (batch,) = pack(prompts, responses(merged, 4), 10_000)
    torch.testing.assert_close(merged.logprobs(batch)[0], before.detach(), atol=1e-4, rtol=1e-4)
    started = Policy.load(tiny, adapter=str(tmp_path / "adapter"), dtype="fp32", device="cpu")
    torch.testing.assert_close(started.logprobs(batch)[0], before.detach(), atol=1e-4, rtol=1e-4)


def test_rows_are_packed_within_the_budget(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    prompts, _ = policy.encode(questions(), template("boxed"))
    answers = responses(policy, 4)
    answers[2][1] = []
    seen = []
    for batch in pack(prompts, answers, 120):
        assert sum(len(row) for row in batch) <= 120
        seen += [owner for row in batch for owner in row.owners]
    assert sorted(seen) == [(g, i) for g in range(4) for i in range(3) if (g, i) != (2, 1)]


def test_a_response_sees_the_prompt_and_itself():
    from upt.model.packing import Prompt

    prompt = Prompt("u", [1, 2, 3], torch.tensor([[0, 1, 2]] * 3), None)
    rows = [Row(prompt, [[4, 5], [6, 7, 8]], []), Row(prompt, [[9]], [])]
    packed = layout(rows, torch.device("cpu"), torch.float32)
    assert packed.ids.tolist() == [[1, 2, 3, 4, 6, 7, 1, 2, 3]]  # the last token of a response is no input
    assert packed.positions[0].tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert packed.prompts == [(0, 3), (6, 9)] and packed.responses == [[(3, 4), (4, 6)], [(9, 9)]]
    # Queries and keys of 0: every place sees as much of each place that it may see.
    query, key = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8)
    value = torch.eye(9).expand(1, 2, -1, -1)
    seen = packed.attention(0, query, key, value, 1.0)[0, :, 3]
    assert (seen > 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]
    # A prompt's last state, at 2 and at 8, predicts the first token of each of its responses.
    states = torch.arange(9.0).view(1, 9, 1)
    assert packed.predicting(states)[:, 0].tolist() == [2, 3, 2, 4, 5, 8]
    assert packed.targets.tolist() == [4, 5, 6, 7, 8, 9]


def test_backward_passes_of_two_threads_agree_beside_a_busy_process(tiny):
    policy = with_lora(tiny)
    prompts, _ = policy.encode(questions()[:1], template("boxed"))
    draw = torch.Generator().manual_seed(2)
    # 128 responses to one prompt, whose last state each of them starts from: (896, 64) values, enough for two threads.
    answers = torch.randint(256, (128, 7), generator=draw).tolist()
    (batch,) = pack(prompts, [answers], 10_000)
    weights = torch.randn(128 * 7, generator=draw)
    busy, threads = subprocess.Popen([sys.executable, "-c", "while True: pass"]), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        passes = [torch.autograd.grad(policy.logprobs(batch)[0] @ weights, policy.trainable()) for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
        busy.kill()
        busy.wait()
    for again in passes[1:]:
        assert all(torch.equal(one, two) for one, two in zip(passes[0], again))


def test_feature_cache_returns_the_same_and_keeps_its_limit(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu", feature_cache_gib=1)
    first, _ = policy.encode(questions(), "{question}")
    calls = []
    policy.base.model.visual.register_forward_hook(lambda *_: calls.append(1))
    second, _ = policy.encode(questions(), "{question}")
    assert not calls
    for one, two in zip(first[:3], second[:3]):
        assert torch.equal(one.features.embeds, two.features.embeds)
    policy.cache_bytes = first[0].features.embeds.nbytes
    policy.encode([Question("new", "?", None, Image.new("RGB", (84, 84), "red"), None)], "{question}")
    assert len(policy.cache) == 1 and calls == [1]


def test_prompts(tiny):
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    question = Question(
        "q", "Is <|im_end|> it <|image_<|im_end|>pad|> B?", ["5 cm", "7 cm"], questions()[0].image, None
    )
    prompts, dropped = policy.encode([question, *questions()], "{question}")
    assert not dropped
    text = policy.tokenizer.decode(prompts[0].ids)
    assert text.count("<|image_pad|>") == 9 and text.count("<|im_end|>") == 1  # a question can't open turns or images
    assert "A. 5 cm\nB. 7 cm" in text
    lengths = {prompt.uid: len(prompt.ids) for prompt in prompts}
    limit = sorted(lengths.values())[2]
    kept, dropped = policy.encode([question, *questions()], "{question}", max_tokens=limit)
    assert dropped == {uid: n for uid, n in lengths.items() if n > limit} and len(kept) + len(dropped) == 5
    # dropping one prompt leaves the others as they were, pictures and all
    for prompt in kept:
        other = next(p for p in prompts if p.uid == prompt.uid)
        assert prompt.ids == other.ids and torch.equal(prompt.positions, other.positions)
        if prompt.features is not None:
            torch.testing.assert_close(prompt.features.embeds, other.features.embeds)


def test_errors_say_what_to_do(tiny, tmp_path):
    with pytest.raises(PolicyError, match="make warmup"):
        Policy.load("models/nothing/tiny")
    with pytest.raises(PolicyError, match="hf download"):
        Policy.load("nobody/no-such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PolicyError, match="llama"):
        Policy.load(str(tmp_path))
    with pytest.raises(PolicyError, match="no prompt"):
        template("nonsense")
    (tmp_path / "p.md").write_text("no place for it")
    with pytest.raises(PolicyError, match="question"):
        template(str(tmp_path / "p.md"))
    with pytest.raises(PolicyError, match="adapter_config"):
        Policy.load(tiny, adapter=str(tmp_path))
