"""Settings that belong together: defaults for the embedded model and for real ones, and the papers' recipes.

A setting is taken from the first of these that has it: the command line, the preset, the defaults for the model. With
the embedded tiny model a preset decides what a paper is about (reward, advantage, G, sampling, clip, KL, format);
image sizes, lengths, learning rate and questions a step stay those of the tiny model.
"""

import json
from pathlib import Path

from upt.data import names

ROOT = Path(__file__).parents[2]
TINY_MODEL = "models/tiny"  # in the current folder, else beside the scripts
TINY_WIDTH = 256  # hidden size up to which a model is one of ours
REAL_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"

COMMON = {
    "data": "shapes",
    "seed": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "group_size": 8,
    "reward": "majority",
    "advantage": "group-norm",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "kl_coef": 0.0,
    "judge_repeats": 1,
}
TINY = COMMON | {
    "steps": 48,
    "questions_per_step": 64,
    "minibatches": 1,
    "prompt": "think-boxed",
    "max_prompt_tokens": 512,
    "max_new_tokens": 32,
    "learning_rate": 2e-4,
    "kl_coef": 0.1,
    "warmup_steps": 3,
    "lora_rank": 32,
    "lora_alpha": 64,
    "eval_questions": 512,
    "judge_mode": "logit",
    "judge_prompt": "judge-tiny",
    "judge_prefix": "\\boxed{",
    "judge_max_new_tokens": 16,
    "judge_tokens": 8192,
}
REAL = COMMON | {
    "steps": 60,
    "questions_per_step": 512,
    "minibatches": 4,
    "prompt": "think-boxed",
    "max_prompt_tokens": 2048,
    "max_new_tokens": 2048,
    "min_pixels": 262144,
    "max_pixels": 1204224,
    "learning_rate": 1e-5,
    "warmup_steps": 3,
    "lora_rank": 64,
    "lora_alpha": 128,
    "eval_questions": 512,
    "judge_mode": "text",
    "judge_prompt": "judge",
    "judge_prefix": "Overall, as a digit from 0 for surely wrong to 9 for surely right: ",
    "judge_max_new_tokens": 1024,
    "judge_tokens": 65536,
}
# arXiv 2505.22453 (mm-upt) and 2603.21289: its equations (self-judge) and its released code (self-judge-code).
RECIPE = {"questions_per_step": 512, "minibatches": 4, "max_new_tokens": 2048, "learning_rate": 1e-5, "kl_coef": 0.01}
JUDGED = RECIPE | {
    "group_size": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "prompt": "think-boxed",
    "max_prompt_tokens": 1024,
}
PRESETS = {
    "mm-upt": RECIPE
    | {
        "group_size": 10,
        "temperature": 0.7,
        "top_p": 0.99,
        "reward": "majority",
        "advantage": "group-norm",
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "prompt": "boxed",
        "max_prompt_tokens": 2048,
        "min_pixels": 262144,
        "max_pixels": 1204224,
    },
    "self-judge": JUDGED | {"reward": "judged(lam_fmt=.5)", "advantage": "energy"},
    "self-judge-code": JUDGED
    | {
        "reward": "judged(base='gated-frequency',lam_fmt=.5,clip=True,unparsed='zero')",
        "advantage": "energy-centred",
    },
}
NOT_WITH_TINY = {
    "questions_per_step",
    "minibatches",
    "max_new_tokens",
    "max_prompt_tokens",
    "min_pixels",
    "max_pixels",
    "learning_rate",
}


def tiny_model() -> str:
    """Where the embedded model is: under the current folder or, for a notebook elsewhere, under the project's."""
    elsewhere = not Path(TINY_MODEL).is_dir() and (ROOT / TINY_MODEL).is_dir()
    return str(ROOT / TINY_MODEL) if elsewhere else TINY_MODEL


def is_tiny(model: str) -> bool:
    """Whether a snapshot folder holds the embedded model, a copy or an export of it: its config says how wide it is."""
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        return (config.get("text_config") or config).get("hidden_size", TINY_WIDTH + 1) <= TINY_WIDTH
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # a hub id, or nothing that can be loaded, which the loading code says


def update_tokens(model: str) -> int:
    """Token budget of a micro-batch on a CPU; on a GPU it comes from the free memory (upt/model/room.py)."""
    return 2048 if is_tiny(model) else 8192


def fill(config) -> None:
    """Fill every field of a Config that is None. Fields the Config doesn't have are passed over."""
    if config.model == TINY_MODEL:
        config.model = tiny_model()
    if config.model is None:
        name = config.data or "shapes"
        sets = [part for part, _ in names.parts(name)] if names.is_mixture(name) else [name]
        config.model = tiny_model() if {*sets} & {*names.EMBEDDED} else REAL_MODEL
    tiny = is_tiny(config.model)
    preset = PRESETS[config.preset] if getattr(config, "preset", None) else {}
    if tiny:
        preset = {name: value for name, value in preset.items() if name not in NOT_WITH_TINY}
    for name, value in {**(TINY if tiny else REAL), **preset}.items():
        if getattr(config, name, value) is None:
            setattr(config, name, value)
