"""The recipes of docs/contributing.md, followed as they are written there: blocks are taken from the page and run."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import kernels
import rewards
import rollout
import train_upt
from kernels import advantage, advantage_triton, group_advantage
from tests.hubcache import make_hub_dataset
from tests.test_rewards import group_of
from upt import data
from upt.data import names, shapes
from upt.errors import PolicyError
from upt.model import families
from upt.model.packing import pack
from upt.model.policy import Policy
from upt.prompts import judge_turns, template
from upt.stages import judging, sampling

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/contributing.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(# (\S+?\.py)\b.*?)^```$", PAGE, re.M | re.S)


def block(file: str, about: str = "") -> str:
    """The one block for `file` in which `about` stands."""
    (found,) = [text for text, name in BLOCKS if name == file and about in text]
    return found


def follow(module, file: str, about: str = "") -> None:
    """Run a block where it says that it goes: in the module of that file."""
    assert Path(module.__file__) == ROOT / file
    exec(compile(block(file, about), f"docs/contributing.md: {file}", "exec"), vars(module))


@pytest.fixture(autouse=True)
def restored():
    """Modules and tables as they were before a block."""
    tables = (rewards.REWARDS, advantage.ADVANTAGES, names.NAMED, families.FAMILIES)
    before = [(of, dict(of)) for of in (*map(vars, (rewards, advantage, names, families)), *tables)]
    yield
    for of, known in before:
        for name in of.keys() - known.keys():
            del of[name]
        of.update(known)


def test_paths_on_the_page_exist():
    named = set(re.findall(r"\b(?:upt|eval|kernels|tests)/[\w/]+\.py", PAGE)) - {"eval/counting.py"}
    assert len(named) > 8 and all((ROOT / path).is_file() for path in named), named


def test_every_block_is_followed():
    assert [name for _, name in BLOCKS] == [
        "rewards.py",
        "kernels/advantage.py",
        "kernels/advantage.py",
        "kernels/advantage_triton.py",
        "upt/data/names.py",
        "eval/counting.py",
        "upt/model/families.py",
    ]
    assert PAGE.count("```python") == len(BLOCKS)


# ------------------------------------------------------------------------------------------------ rewards, advantages


def test_a_reward():
    follow(rewards, "rewards.py")
    group = group_of(["7", "7", "5", None, "5", "7", "9"])
    assert rewards.reward(group, "runner-up") == [1, 1, 0.5, 0, 0.5, 1, 0]
    turned = {**group, "responses": group["responses"][::-1]}  # no reward depends on the order of the responses
    assert rewards.reward(turned, "runner-up") == rewards.reward(group, "runner-up")[::-1]
    assert rewards.reward(group, "runner-up(credit=.3, lam_fmt=0)") == [1, 1, 0.3, 0, 0.3, 1, 0]
    scored, skipped = rewards.score([group, group_of([None, None])], "runner-up", "mean")
    assert [r["advantage"] for r in scored["responses"]] == pytest.approx(
        [r - 4 / 7 for r in (1, 1, 0.5, 0, 0.5, 1, 0)]
    )
    assert skipped["skipped"] and "skipped" not in scored
    with pytest.raises(ValueError, match="credit"):
        rewards.bind_reward("runner-up(credit='much')")
    rewards.runner_up.needs_judge = True
    assert rewards.needs_judge("runner-up") and not rewards.needs_gold("runner-up")


REWARDED = [[1.0, 0.0, 0.25, 0.5], [0.1, 0.1, 0.1, 0.1]]


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_an_advantage_without_a_kernel(monkeypatch, mode):
    follow(advantage, "kernels/advantage.py", "above_median")
    assert rewards.advantage(REWARDED[0], "above-median(scale=2)") == [1.25, -0.75, -0.25, 0.25]
    monkeypatch.setenv("UPT_KERNELS", mode)  # triton: what happens on a GPU
    found = group_advantage(torch.tensor(REWARDED), "above-median")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.625, -0.375, -0.125, 0.125], [0.0] * 4]))
    ids = torch.tensor([3, 5, 3, 5, 4])
    found = group_advantage(torch.tensor([1.0, 1.0, 0.0, 0.0, 9.0]), "above-median", ids, scale=4)
    assert found.tolist() == [2, 2, -2, -2, 0]


@pytest.fixture
def with_form(monkeypatch, tmp_path):
    """advantage_triton.py with the page's branch where the page says that it goes, in place of the module."""
    source, branch = Path(advantage_triton.__file__).read_text(), block("kernels/advantage_triton.py")
    where, name = re.search(r"above its last `(.*)`; (\"\S+\") in ESTIMATORS", branch).groups()
    before, _, after = source.rpartition(f"    {where}\n")
    changed = f"{before}{branch.partition(chr(10))[2]}    {where}\n{after}"
    (tmp_path / "form.py").write_text(changed.replace("ESTIMATORS = (", f"ESTIMATORS = ({name}, "))
    spec = importlib.util.spec_from_file_location("form", tmp_path / "form.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "form", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernels, "advantage_triton", module, raising=False)
    monkeypatch.setenv("UPT_KERNELS", "triton")
    return module


def test_an_advantage_with_a_kernel(with_form, monkeypatch):
    follow(advantage, "kernels/advantage.py", "range_norm")
    function, calls = advantage.ADVANTAGES["range-norm"], []
    expected = torch.tensor([function(group) for group in REWARDED])
    assert rewards.advantage([3.0, 1.0], "range-norm(eps=2)") == [0.25, -0.25]
    launch = with_form.advantage
    monkeypatch.setattr(with_form, "advantage", lambda *args, **own: calls.append(own) or launch(*args, **own))
    torch.testing.assert_close(group_advantage(torch.tensor(REWARDED), "range-norm"), expected)
    assert group_advantage(torch.tensor([[3.0, 1.0]]), "range-norm", eps=2.0).tolist() == [[0.25, -0.25]]
    assert calls == [{"eps": 1e-3}, {"eps": 2.0}]  # the kernel, with the function's own default
    both = group_advantage(torch.tensor(REWARDED, dtype=torch.float64), "group-norm").float()
    torch.testing.assert_close(group_advantage(torch.tensor(REWARDED), "group-norm"), both)


# ------------------------------------------------------------------------------------------------ data, benchmarks


def test_a_data_set_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    row = {"image": picture.getvalue(), "problem": "<image>How many?", "solution": "<answer> 3 </answer>"}
    (hub_id,) = re.findall(r'NAMED\["clevr"\] = "(.*)"', block("upt/data/names.py"))
    make_hub_dataset(tmp_path / "hub", hub_id, {"train": [row] * 4})
    with pytest.raises(data.DataError, match="neither shapes"):
        data.load("clevr", "train", 0)
    follow(names, "upt/data/names.py")
    questions = data.load("clevr", "train", 0)
    assert len(questions) == 3 and questions.has_gold  # one is held out
    (first, *_) = questions
    assert first.uid.startswith("clevr/train/00000") and first.question == "How many?" and first.image.size == (40, 30)


def test_a_benchmark(tmp_path):
    """In a copy of the code, so that the name stands in NAMES before any script is imported."""
    code, folder = tmp_path / "code", tmp_path / "counting"
    for package in ("eval", "upt", "kernels"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "eval/counting.py").write_text(block("eval/counting.py"))
    table = code / "eval/benchmark.py"
    table.write_text(table.read_text().replace("NAMES = (", 'NAMES = ("counting", '))
    folder.mkdir()
    rows = [{"id": uid, "question": "How many?", "answer": 12, "thing": thing} for uid, thing in ("aA", "bA", "cB")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"id": "a", "response": "5 and 7 are 12."}, {"id": "c", "response": "12? No: 13."}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    command = [sys.executable, "-m", "eval.score", "--benchmark", "counting", "--data", str(folder)]
    command += ["--responses", str(tmp_path / "said.jsonl"), "--out", str(tmp_path / "scores.jsonl")]
    done = subprocess.run(command, cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["n"], summary["correct"], summary["accuracy"]) == (2, 1, 0.5)
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").open()]
    assert [(row["id"], row["key"], row["correct"]) for row in scored] == [("a", "12", True), ("c", "13", False)]
    assert "Counting, official protocol" in done.stdout and scored[0]["categories"] == {"thing": ["A"]}


# ------------------------------------------------------------------------------------------------ a model family

# LLaVA's way of a chat: no special tokens of turns, and BOS left to the tokenizer.
CHAT = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tokenizer, tmp_path_factory) -> str:
    """A random LLaVA in the layout of a hub snapshot: CLIP and Llama, the chat template with the processor."""
    folder = tmp_path_factory.mktemp("llava")
    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    own.add_tokens(["<image>"], special_tokens=True)
    bos, image = own.convert_tokens_to_ids(["<s>", "<image>"])
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    own.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    text = {
        "model_type": "llama",
        "vocab_size": len(own),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "bos_token_id": bos,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 32,
    }
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # pictures that differ enough to matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0.0)
        model.model.multi_modal_projector.linear_2.weight.mul_(10)
    model.save_pretrained(folder)
    (folder / "warmup.json").write_text(json.dumps({"judging": {}}))
    return str(folder)


def chat(question) -> list[dict]:
    text = {"type": "text", "text": template("boxed").replace("{question}", question.question)}
    return [{"role": "user", "content": [*([{"type": "image"}] if question.image else []), text]}]


@pytest.fixture
def policy(llava) -> Policy:
    """The tiny LLaVA, loaded after nothing but the page's block."""
    with pytest.raises(PolicyError, match="is a llava model"):
        Policy.load(llava)
    follow(families, "upt/model/families.py")
    return Policy.load(llava, dtype="fp32", device="cpu")


@pytest.fixture
def asked(policy, llava) -> tuple[list, list]:
    """Four questions, the last without a picture, and what HF's own processor makes of them."""
    items = shapes.questions("train", 0, 3)
    sizes = [(84, 84), (140, 84), (84, 224)]
    found = [data.Question(q.uid, q.question, None, q.image.resize(n), None) for q, n in zip(items, sizes)]
    found.append(data.Question("text", "What is 3+4?", None, None, None))
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(llava),
        AutoTokenizer.from_pretrained(llava),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    texts = [processor.apply_chat_template(chat(q), add_generation_prompt=True) for q in found]
    seen = [dict(processor(text=text, images=q.image, return_tensors="pt")) for text, q in zip(texts, found)]
    return found, seen


def test_a_family_reads_prompts_as_its_own_processor_does(policy, asked):
    found, seen = asked
    prompts, dropped = policy.encode(found, template("boxed"))
    assert not dropped and [p.features.places if p.features else 0 for p in prompts] == [16, 16, 16, 0]
    for prompt, theirs in zip(prompts, seen):
        assert prompt.ids == theirs["input_ids"][0].tolist()
        assert prompt.ids[0] == policy.tokenizer.bos_token_id and prompt.positions.tolist() == [
            [*range(len(prompt.ids))]
        ]
    trick = data.Question("trick", "a <ima<image>ge> b <s>", None, found[0].image, None)
    assert policy.ask(trick) == "a  b "


def test_a_familys_packed_log_probabilities_are_the_plain_models(policy, asked):
    found, seen = asked
    policy.add_lora(rank=4, alpha=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.normal_(std=0.1)
    responses = [[torch.randint(256, (n,)).tolist() for n in (5, 1, 9)] for _ in found]
    prompts, _ = policy.encode(found, template("boxed"))
    ours = {}
    with torch.no_grad():
        for batch in pack(prompts, responses, 200):  # several rows in a batch, and groups that are split
            logprob, _ = policy.logprobs(batch)
            sizes = [len(response) for row in batch for response in row.responses]
            ours |= zip([owner for row in batch for owner in row.owners], logprob.split(sizes))
        assert len(ours) == 12
        for (g, i), logprob in ours.items():
            ids = torch.tensor([[*seen[g]["input_ids"][0].tolist(), *responses[g][i]]])
            vision = {"pixel_values": seen[g]["pixel_values"]} if "pixel_values" in seen[g] else {}
            logits = policy.base(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).logits[0]
            plain = logits.log_softmax(-1)[-len(responses[g][i]) - 1 : -1]
            plain = plain.gather(1, torch.tensor(responses[g][i])[:, None])[:, 0]
            torch.testing.assert_close(logprob, plain, atol=1e-5, rtol=0)


def test_a_familys_greedy_responses_are_hf_generates(policy, asked):
    found, seen = asked
    prompts, _ = policy.encode(found, template("boxed"))
    settings = rollout.Config(
        model=policy.base.name_or_path, group_size=2, temperature=0.0, max_new_tokens=16
    ).resolve()
    sampled = sampling.sample_groups(policy, prompts, 0, settings)
    for theirs, group in zip(seen, sampled):
        out = policy.base.generate(
            **theirs, max_new_tokens=16, do_sample=False, suppress_tokens=[policy.base.config.image_token_id]
        )
        for response in group:
            assert response.ids == out[0, theirs["input_ids"].shape[1] :].tolist()
    assert len({tuple(group[0].ids) for group in sampled}) == 4


def test_a_familys_judgements_are_the_plain_models(policy, asked):
    found, seen = asked
    prompts, _ = policy.encode(found, template("boxed"))
    texts = [r"\boxed{7}", r"It is \boxed{red}."]
    groups = [{"uid": q.uid, "question": q.question, "choices": None, "step": 0} for q in found]
    groups = [group | {"responses": [{"text": text} for text in texts]} for group in groups]
    settings = train_upt.Config(model=policy.base.name_or_path).resolve()
    judged = judging.judge(policy, prompts, groups, settings, "boxed", seed=0)
    digits, image = [policy.tokens(str(d))[0] for d in range(10)], policy.base.config.image_token_id
    for question, theirs, group in zip(found, seen, judged):
        turns = judge_turns(settings.judge_prompt)
        for response in group["responses"]:
            said = policy.chat(turns, question.image is not None).replace("{question}", question.question)
            before, after = said.replace("<image>", "<image>" * 16).split("{response}")  # candidates share the former
            after = policy.tokens(response["text"] + after + settings.judge_prefix)
            ids = torch.tensor([[*policy.tokenizer(before)["input_ids"], *after]])
            assert (ids == image).sum() == 16 * (question.image is not None)
            vision = {"pixel_values": theirs["pixel_values"]} if "pixel_values" in theirs else {}
            with torch.no_grad():
                p = policy.base(input_ids=ids, **vision).logits[0, -1, digits].softmax(-1)
            assert response["judge"]["score"] == pytest.approx(float(p @ torch.arange(10.0)) / 9, abs=1e-5)


def test_a_family_trains(llava, tmp_path):
    follow(families, "upt/model/families.py")
    small = {"questions_per_step": 2, "group_size": 4, "max_new_tokens": 8, "lora_rank": 2, "lora_alpha": 4}
    small |= {"steps": 2, "reward": "random", "eval_questions": 2, "eval_samples": 1}
    summary = train_upt.main(train_upt.Config(model=llava, out=tmp_path, **small))
    assert summary["end"]["steps"] == 2 and summary["after"]["graded"] == 2
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(step["grad_norm"] > 0 and step["ratio"] == pytest.approx(1) for step in steps)
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(adapter) == 3 * 7 * 2
    assert all("language_model.layers" in name for name in adapter)
    assert all(float(value.abs().max()) > 0 for name, value in adapter.items() if "lora_B" in name)
