"""The loop: a model improves itself on images and questions without labels.

For each step:
    rollout      G responses to each question (rollout.py)
    reward       what the responses say of each other, by default agreement with their majority (rewards.py)
    advantage    from the rewards of one group
    update       PPO-clip on the LoRA adapter, in minibatches, each gradient summed over micro-batches
    log, save    metrics.jsonl, the shard with rewards and advantages, a checkpoint every few steps
and before and after all steps an evaluation on held-out questions (eval/heldout.py).

The recipe is MM-UPT's (arXiv 2505.22453), with these departures: LoRA in place of full weights; old log-probabilities
come from the trainer's own forward pass, since the sampler's are of a cut distribution; responses whose advantage is 0
are left out of the backward pass when there is no KL term, which changes no gradient; a step in which no group carries
a signal makes no update. `gold` is logged as a diagnostic and never trained on, unless the reward is `supervised`.

    python train_upt.py --data shapes --model models/tiny --reward majority --out runs/x
    python train_upt.py --from-shards runs/scored --out runs/y     # the same update from the output of the stages

The same command again goes on where it was stopped. What a run leaves in OUT: adapter/ (PEFT), summary.json,
metrics.jsonl, rollouts/ (shards), checkpoints/.
"""

import json
import math
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import data
import presets
import rewards
import rollout
import runs
import shards
from eval import heldout
from kernels import grpo_loss, response_weights
from policy import TARGETS, Policy, model_config, pack
from runs import Clock, Stopped

STORED = "stored"  # the rewards and advantages that the shards carry
FREE = ("out", "device", "resume", "keep", "save_every")  # settings that may change when a run goes on


@dataclass
class Config(rollout.Config):
    """Settings left at None take the preset's value, else the default for the model (see presets.py)."""

    out: Path = Path("runs/train")
    """folder of the run"""
    resume: bool = False
    """take every setting from the run in --out and go on with it"""
    from_shards: Path | None = None
    """train on these scored (or sampled) shards, one step each, instead of sampling"""
    gpus: int = 1
    """processes; more than one is not supported yet"""
    reward: str | None = None
    """reward variant, with settings: "frequency" or "gated-frequency(threshold=.9)" (see rewards.py)"""
    advantage: str | None = None
    """advantage estimator: group-norm, mean, rloo, energy, energy-centred"""
    minibatches: int | None = None
    """updates in one step; the step's questions are split among them"""
    update_tokens: int | None = None
    """token budget of one micro-batch; the step does not depend on it"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate"""
    warmup_steps: int | None = None
    """updates in which the learning rate rises; it then falls along a cosine to a tenth"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    clip_low: float | None = None
    """the ratio is clipped below at 1 - clip_low"""
    clip_high: float | None = None
    """the ratio is clipped above at 1 + clip_high"""
    dual_clip: float | None = None
    """cap on the loss of a negative advantage, as a multiple of it; 0: none"""
    aggregation: Literal["token", "sequence", "dr-grpo"] = "token"
    """how token losses are averaged"""
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence: one ratio for a response (GSPO)"""
    kl_coef: float | None = None
    """weight of KL(policy, reference) in the loss"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimator of that KL"""
    kl_every: int = 0
    """with kl_coef 0, measure the KL every N steps for the log; 0: never"""
    mask_truncated: bool = False
    """leave responses that were cut at the length limit out of the loss"""
    lora_rank: int | None = None
    """rank of the adapter"""
    lora_alpha: int | None = None
    """its scale is alpha / rank"""
    lora_targets: tuple[str, ...] = TARGETS
    """linear layers of the language model that get an adapter"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass; None: on a GPU only"""
    save_every: int = 10
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints to keep"""
    eval_split: str = "test"
    """split of the held-out evaluation"""
    eval_questions: int | None = None
    """held-out questions; 0: no evaluation"""
    eval_samples: int = 8
    """samples for each held-out question, k"""

    def resolve(self) -> "Config":
        super().resolve()
        if self.gpus != 1:
            raise ValueError(f"--gpus {self.gpus}: a run uses one process so far; leave it at 1")
        if self.reward.startswith("judged"):
            raise ValueError(
                f"the reward {self.reward!r} needs the judge, which is not part of this version; "
                f"add --reward frequency to train with the other settings of the preset {self.preset}"
            )
        if self.reward != STORED:
            rewards.bind_reward(self.reward, run_seed=self.seed), rewards.bind_advantage(self.advantage)
        if self.temperature == 0 or self.group_size < 2:
            raise ValueError("training needs samples that differ: a temperature above 0 and a group size of 2 or more")
        if not 1 <= self.minibatches <= self.questions_per_step:
            raise ValueError(f"--minibatches must be from 1 to questions-per-step ({self.questions_per_step})")
        return self


def prepare(config: Config) -> Config:
    """The settings of a run in full, checked against what is in its folder, and its manifest written."""
    if config.resume:
        if not (config.out / "manifest.json").is_file():
            raise ValueError(f"--resume: there is no run in {config.out}; start one by leaving --resume out")
        known = shards.read_manifest(config.out)["config"]
        config = replace(config, **{name: _typed(name, value) for name, value in known.items()}, out=config.out)
    if config.from_shards:
        adopt(config)
    config.resolve()
    model_config(config.model)  # before anything is written
    settings = jsonable(config)
    if shards.check_manifest(config.out, settings, ignore=FREE) is None:
        shards.write_manifest(
            config.out, stage="train", config=settings, seed=config.seed, model=config.model, adapter=config.adapter
        )
    return config


def adopt(config: Config) -> None:
    """Take from the shards' manifest how they were sampled, and use their own advantages unless a reward is given."""
    manifest = shards.read_manifest(config.from_shards)
    sampling = manifest["config"].get("rollouts_manifest", manifest)["config"]
    for field in fields(rollout.Config):
        if field.name in sampling and (getattr(config, field.name) is None or field.name == "data"):
            setattr(config, field.name, sampling[field.name])
    count = len(shards.ShardReader(config.from_shards).paths)
    if config.steps is None or config.steps > count or "steps" in sampling:
        config.steps = min(config.steps or count, count)
    if manifest["stage"] != "rollout" and config.reward is None:
        config.reward = STORED


def check_questions(questions, held_out, config: Config) -> None:
    """Say what the data cannot give, and refuse what cannot work without gold."""
    if questions is not None:
        if config.reward.startswith("supervised") and not questions.has_gold:
            raise ValueError(
                f"--reward supervised needs gold answers, and {config.data} has none; use a label-free reward"
            )
        if config.questions_per_step > len(questions):
            print(f"{config.data} has {len(questions)} questions: that many a step, not {config.questions_per_step}")
    if held_out is not None and not held_out.has_gold:
        print(f"{config.data} has no gold answers: the evaluation shows label-free metrics only")


def jsonable(config: Config) -> dict:
    """The settings as they are stored in JSON."""
    return json.loads(json.dumps(asdict(config), default=str))


def _typed(name: str, value):
    """A stored setting as the Config holds it."""
    if name in ("from_shards", "out") and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------ the update


def update(policy: Policy, optimizer, schedule, prompts: list, groups: list[dict], config: Config, kl: bool) -> dict:
    """One step's updates of the adapter from scored groups; returns their statistics, averaged over the minibatches.

    With `kl` the reference's log-probabilities are computed too: for the loss if kl_coef is above 0, else for the log.
    """
    policy.model.train()
    size = -(-len(groups) // config.minibatches)
    parts = [slice(start, start + size) for start in range(0, len(groups), size)]
    # With one minibatch the policy has not moved yet: its own detached log-probabilities are the old ones.
    olds = [_old_logprobs(policy, prompts[p], groups[p], config) if len(parts) > 1 else None for p in parts]
    steps = []
    for part, old in zip(parts, olds, strict=True):
        stats = accumulate(policy, prompts[part], groups[part], old, config, kl)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable(), config.max_grad_norm).item()
        stats |= {"grad_norm": norm, "nonfinite": 0, "no_signal": 0}
        if not any(p.grad is not None for p in policy.trainable()):
            stats["no_signal"] = 1
        elif not (math.isfinite(stats["loss"]) and math.isfinite(norm)):
            stats["nonfinite"] = 1
        else:
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        steps.append(stats)
    counts = ("nonfinite", "no_signal")
    return {n: sum(s[n] for s in steps) / (1 if n in counts else len(steps)) for n in steps[0]}


def accumulate(policy: Policy, prompts, groups, old, config: Config, kl: bool) -> dict[str, float]:
    """Sum the gradient of one minibatch's loss over its micro-batches; the statistics of the loss."""
    lengths = torch.tensor([[_used_length(r, config) for r in g["responses"]] for g in groups])  # (B, G)
    weights = response_weights(lengths.flatten(), config.aggregation, config.max_new_tokens).view_as(lengths)
    tokens = max(1, int(lengths.sum()))
    totals = {"loss": 0.0, "ratio": 1.0, "clip_low": 0.0, "clip_high": 0.0, "dual_clip": 0.0}
    totals |= {"kl": 0.0} if kl else {}
    for batch in pack(prompts, _trained(groups, config, kl), config.update_tokens):
        owners = [owner for row in batch for owner in row.owners]
        sizes = torch.tensor([len(response) for row in batch for response in row.responses])

        def spread(values, sizes=sizes):  # one value a response -> one a token, (N,)
            return torch.as_tensor(values, dtype=torch.float32).repeat_interleave(sizes).to(policy.device)

        reference = None
        if kl:
            with policy.reference():
                reference, _ = policy.logprobs(batch, config.temperature)
        logprob, _ = policy.logprobs(batch, config.temperature)  # (N,)
        loss, stats = grpo_loss(
            logprob,
            logprob.detach() if old is None else torch.cat([old[owner] for owner in owners]),
            spread([groups[g]["responses"][i]["advantage"] for g, i in owners]),
            spread([weights[owner] for owner in owners]),
            torch.arange(len(sizes)).repeat_interleave(sizes).to(policy.device),
            reference,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio_level=config.ratio_level,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
        )
        loss.backward()
        totals["loss"] += loss.item()
        for name, value in stats.items():  # means over all tokens; those left out have ratio 1 and are not clipped
            totals[name] += value.item() / tokens
    return totals


def _used_length(response: dict, config: Config) -> int:
    cut = config.mask_truncated and response["finish"] == "length"
    return 0 if cut else len(response["token_ids"])


def _trained(groups: list[dict], config: Config, kl: bool) -> list[list[list[int]]]:
    """The token ids of the responses that can have a gradient; an empty list in place of the others."""
    return [
        [r["token_ids"] if _used_length(r, config) and (kl or r["advantage"] != 0) else [] for r in group["responses"]]
        for group in groups
    ]


@torch.no_grad()
def _old_logprobs(policy: Policy, prompts, groups, config: Config) -> dict[tuple[int, int], torch.Tensor]:
    """Log-probabilities of every response's tokens under the policy as it is now, by (group, response)."""
    found = {}
    for batch in pack(prompts, _trained(groups, config, kl=True), config.update_tokens):
        logprob, _ = policy.logprobs(batch, config.temperature)
        owners = [owner for row in batch for owner in row.owners]
        sizes = [len(response) for row in batch for response in row.responses]
        found |= dict(zip(owners, logprob.split(sizes), strict=True))
    return found


# -------------------------------------------------------------------------------------------------------- the loop


def sampled(
    policy, questions, step: int, config: Config, clock: Clock, check
) -> tuple[list, list[dict], dict[str, str]]:
    """Prompts and groups of a step, and what was left out. A shard that a stopped run left is used as it is."""
    folder = config.out / "rollouts"
    path = shards.shard_path(folder, step)
    with clock("data"):
        batch = rollout.step_batch(policy, questions, step, config)
        if shards.is_complete(path):
            groups = shards.read_shard(path)
            if [group["uid"] for group in groups] == [prompt.uid for prompt in batch.prompts]:
                return batch.prompts, groups, batch.left_out
    with clock("rollout"):
        groups = rollout.rollout(policy, batch, step, config, folder, check)
        shards.write_shard(path, groups)
    return batch.prompts, groups, batch.left_out


def stored(policy, path: Path, config: Config, clock: Clock) -> tuple[list, list[dict], dict[str, str]]:
    """Prompts and groups of a shard that the stages wrote."""
    with clock("data"):
        groups = shards.read_shard(path)
        questions = [
            data.Question(
                uid=group["uid"],
                question=group["question"],
                choices=group["choices"],
                image=None if group["image"] is None else shards.open_image(config.from_shards, group["image"]),
                gold=group["gold"],
            )
            for group in groups
        ]
        prompts, _ = policy.encode(questions, policy.template(config.prompt))
    return prompts, groups, {}


def learning_rate_factor(n: int, warmup: int, total: int) -> float:
    """Linear over the first `warmup` updates, then along a cosine from 1 to 0.1."""
    if n < warmup:
        return (n + 1) / (warmup + 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, (n - warmup) / max(1, total - warmup)))) / 2


def train(policy: Policy, questions: data.Questions | None, config: Config, clock: Clock, check) -> None:
    """All steps of the loop, from the latest checkpoint if there is one. Raises `Stopped` after saving its state."""
    folder = config.out / "checkpoints"
    latest = runs.checkpoints(folder)[-1:]
    if latest:
        policy.load_adapter(latest[0] / "adapter")
    else:
        policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    optimizer = torch.optim.AdamW(
        policy.trainable(), config.learning_rate, (0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )
    updates = config.steps * config.minibatches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: learning_rate_factor(n, config.warmup_steps, updates)
    )
    start = 0
    if latest:
        start, clock.seconds = runs.load_checkpoint(latest[0], optimizer, schedule)
    metrics = runs.Metrics(config.out / "metrics.jsonl", start)
    paths = shards.list_shards(config.from_shards) if config.from_shards else None
    step = start

    def save(step: int) -> None:
        runs.save_checkpoint(folder, step, policy, optimizer, schedule, clock.seconds, config.keep)

    with tqdm(range(start, config.steps), initial=start, total=config.steps, desc="training", unit="step") as bar:
        for step in bar:
            before = dict(clock.seconds)
            try:
                check()
                if paths:
                    prompts, groups, left_out = stored(policy, paths[step], config, clock)
                else:
                    prompts, groups, left_out = sampled(policy, questions, step, config, clock, check)
            except Stopped:
                save(step)  # nothing of this step has touched the adapter yet
                raise
            if config.reward != STORED:
                groups = rewards.score(groups, config.reward, config.advantage, config.seed)
            if not paths:
                shards.write_shard(shards.shard_path(config.out / "rollouts", step), groups)
            kl = config.kl_coef > 0 or (config.kl_every > 0 and step % config.kl_every == 0)
            rate = schedule.get_last_lr()[0]
            with clock("update"):
                stats = update(policy, optimizer, schedule, prompts, groups, config, kl)
            extra = {"learning_rate": rate, "left_out": len(left_out)}
            bar.write(
                f"step {step + 1}/{config.steps}: {metrics.write(step, groups, stats, clock.since(before), extra)}"
            )
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save(step + 1)
    policy.save(config.out / "adapter")


def scored(policy: Policy, questions: data.Questions, name: str, config: Config, clock: Clock, check) -> dict:
    """Held-out scores before or after training, measured once for a run and kept in OUT/<name>.json."""
    path = config.out / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    count = min(config.eval_questions, len(questions))
    with (
        clock(f"eval_{name}"),
        tqdm(total=count * (1 + config.eval_samples), desc=f"held-out, {name}", unit="response") as bar,
    ):

        def tick(responses: int) -> None:
            bar.update(responses)
            check()

        scores = heldout.evaluate(policy, questions, config, count, config.eval_samples, tick)
    shards.write_whole(path, [json.dumps(scores).encode()])
    return scores


def main(config: Config) -> dict:
    """Run the loop and return its summary; stopped by a signal, it saves its state and exits with 128 + the signal."""
    config = prepare(config)
    clock = Clock()
    with clock("setup"):
        questions = None if config.from_shards else data.load(config.data, config.split, config.seed, config.limit)
        held_out = data.load(config.data, config.eval_split, config.seed) if config.eval_questions else None
        check_questions(questions, held_out, config)
        policy = Policy.load(
            config.model,
            adapter=config.adapter,
            dtype=config.dtype,
            device=config.device,
            gradient_checkpointing=config.gradient_checkpointing,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
    with runs.stop_on_signal() as check:
        try:
            summary = {"before": scored(policy, held_out, "before", config, clock, check)} if held_out else {}
            train(policy, questions, config, clock, check)
            if held_out:
                summary["after"] = scored(policy, held_out, "after", config, clock, check)
        except Stopped as stopped:
            print(f"stopped by {stopped}; the same command goes on from {config.out}", file=sys.stderr)
            raise SystemExit(128 + getattr(signal.Signals, str(stopped))) from None
    if presets.is_tiny(config.model):
        summary["warmup"] = json.loads((Path(config.model) / "warmup.json").read_text())
    summary |= {"config": jsonable(config), "seconds": clock.seconds}
    shards.write_whole(config.out / "summary.json", [json.dumps(summary, indent=1).encode()])
    for source in filter(None, (questions, held_out)):
        if bad := source.report_bad():
            print(bad, file=sys.stderr)
    if held_out:
        print(heldout.table({name: summary[name] for name in ("before", "after")}))
    print(f"adapter in {config.out / 'adapter'}, summary in {config.out / 'summary.json'}")
    return summary


if __name__ == "__main__":
    main(tyro.cli(Config))
