"""Seconds to judge one group: its candidates behind one shared prefix, beside calls of the model on whole prompts.

    shared     judging.judge on the group: the picture encoded once, the prompt up to the candidate computed once
    separate   the plain way: for each candidate its whole prompt with the picture through the transformers model
    batched    the same prompts, padded, in one call of the transformers model, the picture encoded for each of them

All three start from the picture and end with the score of `logit` mode; the three take turns, and the largest
difference between their scores is printed beside the times. Text mode is timed as shared beside separate calls of
HF's own `generate` with the same sampling settings; it draws other tokens, so only times are compared.

    python -m bench.judging --save        # prints a table, writes bench/results/judging-<date>-<device>.json
"""

import json
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, strftime

import torch

from bench.loop import hardware
from upt import data, stages
from upt.answers import keeps_format
from upt.files import write_whole
from upt.model.policy import Policy
from upt.prompts import judge_turns, template
from upt.ranges import Count, Name, Seed
from upt.run import cli, presets
from upt.run.settings import Judge, Rollout
from upt.run.typed import Typed


@dataclass
class Config(Typed):
    model: Name = "models/tiny"
    """snapshot folder of a Qwen2.5-VL"""
    prompt: Name = "judge-tiny"
    """judge prompt"""
    groups: Count = 15
    """groups to judge, one at a time"""
    group_size: Count = 8
    """candidates in a group"""
    judge_max_new_tokens: Count = 16
    """text mode: tokens of every judgement"""
    seed: Seed = 0
    """questions and candidates"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N"""
    save: bool = False
    """write bench/results/judging-<date>-<device>.json"""


class Separate:
    """The judge as one would write it with transformers alone: whole prompts, no shared prefix."""

    def __init__(self, policy: Policy, settings: Judge):
        self.policy, self.settings = policy, settings
        self.turns = judge_turns(settings.judge_prompt)
        self.digits = [policy.tokens(str(d))[0] for d in range(10)]

    def inputs(self, question, texts: list[str], lead: str) -> dict:
        policy = self.policy
        seen = dict(policy.family.image_processor(images=[question.image] * len(texts), return_tensors="pt"))
        image = policy.base.config.image_token_id
        count = int(seen["image_grid_thw"][0].prod()) // policy.family.image_processor.merge_size**2
        rows = []
        for text in texts:
            turns = [
                (role, part.replace("{question}", question.question).replace("{response}", text))
                for role, part in self.turns
            ]
            ids = policy.tokens(policy.chat(turns, True) + lead)
            at = ids.index(image)
            rows.append(ids[:at] + [image] * count + ids[at + 1 :])
        width = max(map(len, rows))
        ids = torch.tensor([[policy.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        seen |= {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).int()}
        return {name: value.to(policy.device) for name, value in seen.items()}

    @torch.no_grad()
    def scores(self, question, texts: list[str]) -> list[float]:
        seen = self.inputs(question, texts, self.settings.judge_prefix)
        logits = self.policy.base(**seen, logits_to_keep=1).logits[:, -1, self.digits]
        return (logits.float().softmax(-1) @ torch.arange(10.0, device=logits.device) / 9).tolist()

    def write(self, question, texts: list[str]) -> None:
        n = self.settings.judge_max_new_tokens
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": self.settings.judge_top_p, "top_k": 0}
        self.policy.base.generate(**self.inputs(question, texts, ""), max_new_tokens=n, **sampling)


def main(config: Config) -> dict:
    """Measure, print the table and return what `--save` writes."""
    known = presets.TINY | {"judge_prompt": config.prompt, "judge_max_new_tokens": config.judge_max_new_tokens}
    settings = Judge(**{name: value for name, value in known.items() if name.startswith("judge")})
    policy = Policy.load(config.model, device=config.device)
    drawn = Rollout(model=config.model, seed=config.seed, group_size=config.group_size, top_p=0.9)
    drawn.resolve()
    separate, times, difference = Separate(policy, settings), {}, 0.0

    def timed(name: str, call, *arguments):
        wait = torch.cuda.synchronize if policy.device.type == "cuda" else lambda: None
        wait()
        start = perf_counter()
        result = call(*arguments)
        wait()
        times.setdefault(name, []).append(perf_counter() - start)
        return result

    def one_by_one(call, question, texts: list[str]) -> list:
        return [call(question, [text]) for text in texts]

    def shared(question, group: dict, mode: str) -> list[float]:
        settings.judge_mode = mode
        prompts, _ = policy.encode([question], template("boxed"))
        judged = stages.judging.judge(policy, prompts, [group], settings, "think-boxed", config.seed)
        return [response["judge"]["score"] for response in judged[0]["responses"]]

    for number, question in enumerate(data.load("shapes", "validation", config.seed, limit=config.groups + 2)):
        prompts, _ = policy.encode([question], template("think-boxed"))
        sampled = stages.sampling.sample_groups(policy, prompts, 0, drawn)[0]
        texts = [policy.tokenizer.decode(s.ids, skip_special_tokens=True) for s in sampled]
        texts = [text if keeps_format(text, "think-boxed") else f"<think>{text}</think>\\boxed{{0}}" for text in texts]
        group = {"uid": question.uid, "step": 0, "question": question.question, "choices": None}
        group["responses"] = [{"text": text} for text in texts]
        if number == 2:  # two groups to warm up
            times.clear()
        ours = timed("shared", shared, question, group, "logit")
        ones = timed("separate", one_by_one, separate.scores, question, texts)
        batch = timed("batched", separate.scores, question, texts)
        difference = max(difference, *(abs(a - b) for other in (sum(ones, []), batch) for a, b in zip(ours, other)))
        timed("text, shared", shared, question, group, "text")
        timed("text, separate", one_by_one, separate.write, question, texts)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    result = {
        "config": asdict(config),
        "seconds": medians,
        "ratio": {name: medians[name] / medians["shared"] for name in ("separate", "batched")}
        | {"text": medians["text, separate"] / medians["text, shared"]},
        "largest_difference": difference,
        "hardware": hardware() if policy.device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "runs": times,
    }
    for name, seconds in medians.items():
        print(f"{name:16}{1000 * seconds:9.1f} ms a group of {config.group_size}")
    print("beside shared: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratio"].items()))
    print(f"largest difference of a score {difference:.1e}; {result['hardware']}, {result['versions']}")
    if config.save:
        path = Path(__file__).parent / f"results/judging-{strftime('%Y-%m-%d')}-{policy.device.type}.json"
        write_whole(path, [json.dumps(result, indent=1).encode()])
    return result


if __name__ == "__main__":
    cli.launch(main, Config)
