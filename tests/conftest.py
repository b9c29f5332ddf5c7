"""Fixtures that several test files share: tiny random models of the three families, in the layout of a hub snapshot."""

import json
import os
import signal
import threading

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

# Whoever starts the tests may have some signals ignored (nohup, a script's `&`), and processes inherit that.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def tokenizer():
    from upt.data import shapes
    from upt.prompts import template
    from upt.warmup import demonstrations, tiny

    items = shapes.questions("warmup", 0, 200)
    texts = [template(prompt).replace("{question}", i.question) for i in items for prompt in demonstrations.STYLES]
    return tiny.make_tokenizer(texts + [demonstrations.demonstrate(item, "think-boxed") for item in items])


def _config(family: str, tokenizer):
    import transformers

    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.2}
    if family == "qwen2_vl":
        config_class = transformers.Qwen2VLConfig
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        config_class = transformers.Qwen2_5_VLConfig
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    else:
        config_class = transformers.Qwen3VLConfig
        text |= {"head_dim": 16}
        vision |= {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        vision |= {"num_position_embeddings": 256}
    return config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def snapshots(tokenizer, tmp_path_factory) -> dict:
    """A folder with a random model of each family, {family: path}; treated like the embedded model's defaults."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(_config(family, tokenizer))
        with torch.no_grad():  # scores that differ, so that a wrong position or mask shows
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=280 * 280).save_pretrained(folder)
        (folder / "warmup.json").write_text(json.dumps({"judging": {}}))
        found[family] = str(folder)
    return found


@pytest.fixture(scope="session")
def tiny(snapshots) -> str:
    """A random Qwen2.5-VL snapshot."""
    return snapshots["qwen2_5_vl"]


@pytest.fixture
def caches(tmp_path_factory, monkeypatch):
    """Own, empty caches of data sets and no network, whatever the machine has."""
    import datasets
    import huggingface_hub

    home = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return home


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """A finished run of three steps; the second was scored."""
    import train_upt

    folder = tmp_path_factory.mktemp("report") / "runs" / "a"
    settings = {"steps": 3, "questions_per_step": 3, "group_size": 4, "max_new_tokens": 6, "reward": "random"}
    settings |= {"eval_questions": 4, "eval_samples": 2, "eval_every": 2, "lora_rank": 2, "lora_alpha": 4}
    train_upt.main(train_upt.Config(model=tiny, out=folder, seed=0, device="cpu", **settings))
    return folder
