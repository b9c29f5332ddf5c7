"""Runs examples/trl_multinode/train.py and records what its reward got and gave, a file a process in $RECORD.

Where torchvision is missing, with a processor that looks at no video. The random model answers nothing, so each
completion is given an answer by its length.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer, Qwen2_5_VLProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import upt.trl  # noqa: E402
from upt.model.families import Qwen  # noqa: E402


class Processor(Qwen2_5_VLProcessor):
    get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

    @classmethod
    def from_pretrained(cls, name, **settings):
        tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(Qwen(name).image_processor, tokenizer, chat_template=tokenizer.chat_template)


label_free = upt.trl.label_free


def recorded(*arguments, **settings):
    reward = label_free(*arguments, **settings)
    file = Path(os.environ["RECORD"]) / f"{os.environ.get('RANK', '0')}.jsonl"

    def recorded_reward(prompts, completions, trainer_state, completion_ids, image, **columns):
        texts = [f"{said[-1]['content']} \\boxed{{{len(said[-1]['content']) % 3}}}" for said in completions]
        columns |= {"trainer_state": trainer_state, "completion_ids": completion_ids, "image": image}
        earned = reward(prompts=prompts, completions=texts, **columns)
        call = {"step": trainer_state.global_step, "texts": texts, "rewards": earned}
        call["prompts"] = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
        call["tokens"], call["sizes"] = [*map(len, completion_ids)], [of.size for of in image]
        with open(file, "a") as log:
            log.write(json.dumps(call) + "\n")
        return earned

    recorded_reward.__name__ = reward.__name__
    return recorded_reward


transformers.AutoProcessor.from_pretrained = Processor.from_pretrained
upt.trl.label_free = recorded
runpy.run_path(str(ROOT / "examples/trl_multinode/train.py"), run_name="__main__")
