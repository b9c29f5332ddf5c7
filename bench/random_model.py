"""What the benchmarks at full size share: models of real configurations with random weights, their prompts, a clock.

The weights are made on the device, so nothing is downloaded. A response never stops: the stop token is the placeholder
of pictures, which is never sampled.
"""

import gc
import json
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, strftime
from typing import Literal
from unittest.mock import patch

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.loop import hardware
from bench.sides import never_stop
from upt import data
from upt.errors import SettingError
from upt.files import write_whole
from upt.model.families import Qwen
from upt.model.policy import Policy
from upt.prompts import template
from upt.reckoning.published import CONFIGS
from upt.reckoning.seconds import CARDS, Card
from upt.warmup import tiny

SIDE = 28  # a token of the language model is a square of this side in the picture
WIDTH = 32  # of a picture, in tokens
LORA_RANK = 64

Named = Literal["qwen2.5-vl-7b-random", "qwen2.5-vl-3b-random", "tiny-random"]
MODELS = {
    "qwen2.5-vl-7b-random": CONFIGS["Qwen/Qwen2.5-VL-7B-Instruct"],
    "qwen2.5-vl-3b-random": CONFIGS["Qwen/Qwen2.5-VL-3B-Instruct"],
    "tiny-random": {  # to try the benchmarks without a GPU
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 1024,
        },
        "vision_config": {
            "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1],
            "out_hidden_size": 256, "patch_size": 14,
        },
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def build(name: str, image_tokens: int, device: str) -> Policy:
    """The model with random weights, a small tokenizer with Qwen's special tokens, and a fresh adapter."""
    if image_tokens % WIDTH:
        raise SettingError(f"--image-tokens must be a multiple of {WIDTH}, not {image_tokens}")
    published = MODELS[name]
    language, tied = published["text_config"], published["tie_word_embeddings"]
    tokenizer = tiny.make_tokenizer([template("think-boxed")])
    token_id = tokenizer.convert_tokens_to_ids
    size = language["hidden_size"] // language["num_attention_heads"]  # of a head
    sections = [size // 8, size * 3 // 16, size * 3 // 16]
    architecture = Qwen2_5_VLConfig(
        text_config=language
        | {
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        },
        vision_config=published["vision_config"],
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(architecture, dtype=dtype, attn_implementation="sdpa")
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pixels = image_tokens * SIDE**2
    with TemporaryDirectory() as folder:
        Qwen2VLImageProcessorPil().save_pretrained(folder)
        family = Qwen(folder, pixels, pixels)
    policy = Policy(model, tokenizer, family)
    never_stop(policy)
    policy.add_lora(LORA_RANK, 2 * LORA_RANK)
    parameters = sum(p.numel() for p in policy.model.parameters())
    print(f"{name}: {parameters / 1e9:.2f} billion parameters on {machine(device)}", flush=True)
    return policy


def questions(count: int, image_tokens: int) -> list[data.Question]:
    """Questions with pictures of noise."""
    size = (image_tokens // WIDTH * SIDE, WIDTH * SIDE, 3)
    pictures = (torch.randint(256, size, dtype=torch.uint8).numpy() for _ in range(count))
    return [
        data.Question(f"full/{i}", "How many?", None, image=Image.fromarray(picture), gold=None)
        for i, picture in enumerate(pictures)
    ]


# ------------------------------------------------------------------------------------------------- the measuring


def present() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else hardware()


def card(device: str) -> Card | None:
    """The data sheet of the GPU that is there, of those that are known (upt/reckoning/seconds.py)."""
    if device != "cuda":
        return None
    words = machine(device).lower().replace("rtx ", "rtx").replace("-", " ").split()
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    near = [card for name, card in CARDS.items() if name in words and abs(card.memory - gib) < 0.1 * card.memory]
    return near[0] if near and not {"pcie", "nvl"} & {*words} else None


def clock(device: str) -> float:
    """Seconds, when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def peak_gb(device: str) -> float | None:
    """The most GPU memory that tensors held since the last call."""
    if device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return found


def make_room(device: str) -> None:
    """Give back a GPU's memory that nobody uses, and count the most anew."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def replaced(functions: dict[str, Callable]) -> Iterator[None]:
    """Others in the place of functions, by their whole names."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch(name, function))
        yield


def attempt(measure: Callable[[], dict]) -> dict:
    """What is measured, or its error: a failure of one way is a result beside the others'."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def report(name: str, config: dict, device: str, **found) -> dict:
    """A benchmark's result with its date, device and versions; saved under bench/results where the config says so."""
    result = {
        "date": strftime("%Y-%m-%d"),
        "hardware": machine(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "triton")},
        "config": config,
        **found,
    }
    if config["save"]:
        where = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()) if device == "cuda" else device
        path = Path(__file__).parent / f"results/{name}-{config['model']}-{result['date']}-{where}.json"
        write_whole(path, [json.dumps(result, indent=1).encode()])
    return result


def shown(value: float | None, width: int, digits: int = 0) -> str:
    """A number of a table's column; - where there is none."""
    return f"{'-':>{width}}" if value is None else f"{value:{width},.{digits}f}"
