"""The loop: a model improves itself on images and questions without labels.

For each step:
    rollout      G responses to each question (rollout.py)
    judge        scores of a frozen copy of the model, where the reward asks for them (judge.py)
    reward       what the responses say of each other, by default agreement with their majority (rewards.py)
    advantage    from the rewards of one group
    update       PPO-clip on the LoRA adapter, in minibatches, each gradient summed over micro-batches
    log, save    metrics.jsonl, the shard with rewards and advantages, a checkpoint every few steps
and before and after all steps an evaluation on held-out questions (eval/heldout.py).

The recipe is MM-UPT's (arXiv 2505.22453), with these departures: LoRA in place of full weights; old log-probabilities
come from the trainer's own forward pass, since the sampler's are of a cut distribution; responses whose advantage is 0
are left out of the backward pass when there is no KL term, which changes no gradient; a step in which no group carries
a signal makes no update. `gold` is logged as a diagnostic and never trained on, unless the reward is `supervised`.
`--algorithm sft` is the simplest baseline (LMSI, arXiv 2210.11610): cross-entropy on well-formed responses, weighted
by their rewards, hence with `majority` on the majority's.

    python train_upt.py --data shapes --model models/tiny --reward majority --out runs/x
    python train_upt.py --from-shards runs/scored --out runs/y     # the same update from the output of the stages

The same command again goes on where it was stopped. What a run leaves in OUT: adapter/ (PEFT), summary.json,
metrics.jsonl, rollouts/ (shards), checkpoints/. With `--rounds` the model also writes itself questions (evolve.py).
"""

import json
import math
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import answers
import data
import evolve
import health
import judge
import mixture
import presets
import rewards
import rollout
import runs
import shards
import synthesize
from eval import heldout
from eval.follow import Followed
from policy import TARGETS, Policy
from runs import Clock, Stopped
from settings import STORED, claim, jsonable, prepare
from update import update


@dataclass
class Config(judge.Settings, synthesize.Settings, rollout.Config):
    """Settings left at None take the preset's value, else the default for the model (see presets.py)."""

    out: Path = Path("runs/train")
    """folder of the run"""
    resume: bool = False
    """take every setting from the run in --out and go on with it"""
    from_shards: Path | None = None
    """train on these scored (or sampled) shards, one step each, instead of sampling"""
    init_adapter: str | None = None
    """PEFT adapter to go on training, of whatever rank; judge and reference are the model without it"""
    rounds: int = 0
    """rounds of asking and training on what was asked, --steps each (see evolve.py); 0: train on --data alone"""
    synthesize: Literal["in-context", "direct"] | None = None
    """how a round asks: from the picture and its question, or from the picture alone"""
    own_share: float | None = None
    """share of a step's questions that the model wrote; None: all questions of a round count alike"""
    gpus: int = 1
    """processes; more than one is not supported yet"""
    reward: str | None = None
    """a name of rewards.py or FILE.py:NAME; settings go inline: judged(lam_pos=.4,t_h=.9)"""
    min_share: float = 0.0
    """skip groups whose majority has a smaller share of the responses"""
    max_share: float = 1.0
    """skip groups whose majority has a larger share of the responses"""
    advantage: str | None = None
    """advantage estimator: group-norm, mean, rloo, energy, energy-centred"""
    algorithm: Literal["grpo", "sft"] = "grpo"
    """sft: cross-entropy on the well-formed responses, weighted by their rewards"""
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
    feature_cache_gib: float = 0.0
    """keep image features from step to step, up to this much memory"""
    save_every: int = 10
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints to keep; the last one that is known to be healthy is kept besides"""
    stop_on_collapse: bool = False
    """end the run at the first alarm (see health.py), with the last healthy checkpoint's adapter"""
    select: Literal["last", "label-free"] = "last"
    """label-free: keep all checkpoints and end with the one whose answers say most about their questions"""
    eval_data: str | None = None
    """data set of the held-out evaluation; None: --data, of a mixture its first set"""
    eval_split: str = "test"
    """split of the held-out evaluation"""
    eval_questions: int | None = None
    """held-out questions; 0: no evaluation"""
    eval_samples: int = 8
    """samples for each held-out question, k"""
    eval: tuple[str, ...] = ()
    """benchmarks to follow during training, NAME=FOLDER each (names as in eval/run.py)"""
    eval_every: int = 0
    """steps between two looks at them; 0: none"""
    eval_limit: int = 64
    """questions of each benchmark, the same every time"""

    def resolve(self) -> "Config":
        super().resolve()
        if self.gpus != 1:
            raise ValueError(f"--gpus {self.gpus}: a run uses one process so far; leave it at 1")
        if self.reward == STORED and not self.from_shards:
            raise ValueError("the reward 'stored' is that of scored shards: give them as --from-shards")
        if self.reward != STORED:
            rewards.bind_reward(self.reward, run_seed=self.seed, **rewards.band(self))
            rewards.bind_advantage(self.advantage)
        self.check_judge()
        evolve.check(self)
        several = self.from_shards is None and mixture.is_mixture(self.data)
        if (several or self.rounds) and data.ALIASES.get(self.split) != "train":
            raise ValueError(f"--split {self.split}: sets are mixed for training on their train split only")
        if self.temperature == 0 or self.group_size < 2:
            raise ValueError("training needs samples that differ: a temperature above 0 and a group size of 2 or more")
        for name in ("eval_samples", "eval_limit", "save_every", "keep", "lora_rank", "lora_alpha", "update_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if bool(self.eval) != (self.eval_every > 0):
            raise ValueError("--eval NAME=FOLDER and --eval-every N follow a benchmark together: give both or neither")
        if self.eval_questions < 0:
            raise ValueError(f"--eval-questions must be 0 (no evaluation) or more, not {self.eval_questions}")
        if not 1 <= self.minibatches <= self.questions_per_step:
            raise ValueError(f"--minibatches must be from 1 to questions-per-step ({self.questions_per_step})")
        if self.from_shards and (self.stop_on_collapse or self.select != "last"):
            raise ValueError("signals of --from-shards are the shards' own: leave --stop-on-collapse and --select out")
        if self.reward == STORED and rewards.band(self):
            raise ValueError("--min-share and --max-share change rewards: give --reward or --advantage besides")
        return self

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is made after so many steps, interruptions apart."""
        return step % self.save_every == 0 or step == self.steps


def check_questions(questions, held_out, config: Config) -> None:
    """Say what the data cannot give, and refuse what cannot work without gold."""
    if questions is not None:
        if rewards.needs_gold(config.reward) and not questions.has_gold:
            raise ValueError(
                f"--reward {config.reward} needs gold answers, and {config.data} has none; use a label-free reward"
            )
        if questions.weights:
            print(mixture.shares(questions, config.questions_per_step))
        if config.questions_per_step > len(questions):
            print(f"{config.data} has {len(questions)} questions: that many a step, not {config.questions_per_step}")
    for source in filter(None, (questions, held_out)):
        print(source.describe())


def sampled(
    policy, questions, step: int, config: Config, clock: Clock, check
) -> tuple[list, list[dict], dict[str, str]]:
    """Prompts and groups of a step, and what was left out. A shard that a stopped run left is used as it is."""
    folder = config.out / "rollouts"
    path = shards.shard_path(folder, step)
    with clock("data"):
        batch = rollout.step_batch(policy, questions, step, config)
        if not batch.prompts:
            return [], [], batch.left_out
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


def rewarded(policy: Policy, prompts: list, groups: list[dict], config: Config, clock: Clock, check) -> list[dict]:
    """The groups with rewards and advantages, judged first where the reward asks for it."""
    if rewards.needs_judge(config.reward) and not all("judge" in r for g in groups for r in g["responses"]):
        with clock("judge"):
            groups = judge.judge(policy, prompts, groups, config, config.prompt, config.seed, check)
    return rewards.score(groups, config.reward, config.advantage, config.seed, **rewards.band(config))


def targets(groups: list[dict], style: str) -> list[dict]:
    """The groups with, as advantage, each response's weight in cross-entropy: its reward, 0 if it is ill-formed."""

    def target(response: dict) -> float:
        return max(0.0, response["reward"]) if answers.keeps_format(response["text"], style) else 0.0

    return [group | {"responses": [r | {"advantage": target(r)} for r in group["responses"]]} for group in groups]


def learning_rate_factor(n: int, warmup: int, total: int) -> float:
    """Linear over the first `warmup` updates, then along a cosine from 1 to 0.1."""
    if n < warmup:
        return (n + 1) / (warmup + 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, (n - warmup) / max(1, total - warmup)))) / 2


def train(
    policy: Policy, questions: data.Questions | None, followed: Followed, config: Config, clock: Clock, check
) -> dict:
    """All steps of the loop, from the latest checkpoint if there is one; how it ended (see `finish`).

    Raises `Stopped` after saving its state.
    """
    folder = config.out / "checkpoints"
    latest = runs.checkpoints(folder)[-1:]
    if latest:
        policy.load_adapter(latest[0] / "adapter")
    elif not config.init_adapter:
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
    step, looked = start, {}  # the latter waits where a step is left out

    def save(step: int) -> None:
        runs.save_checkpoint(folder, step, policy, optimizer, schedule, clock.seconds)
        # Checkpoint s is the policy that samples step s, so the latest one is known to be healthy a step later.
        healthy = next((row["step"] for row in metrics.rows if row["alarms"]), step)
        keep = config.keep if config.select == "last" else config.steps
        runs.prune_checkpoints(folder, keep, config.saves, healthy)

    with tqdm(range(start, config.steps), initial=start, total=config.steps, desc="training", unit="step") as bar:
        for step in bar:
            before = dict(clock.seconds)
            try:
                check()
                if config.eval_every and step % config.eval_every == 0:
                    with clock("benchmarks"):
                        looked = {"benchmarks": followed(policy, config, check)}
                if paths:
                    prompts, groups, left_out = stored(policy, paths[step], config, clock)
                else:
                    prompts, groups, left_out = sampled(policy, questions, step, config, clock, check)
                if config.reward != STORED and groups:
                    groups = rewarded(policy, prompts, groups, config, clock, check)
            except Stopped:
                save(step)  # nothing of this step has touched the adapter yet
                raise
            for uid, reason in left_out.items():
                bar.write(f"left out {uid}: {reason}", file=sys.stderr)
            if not groups:
                bar.write(
                    f"step {step + 1}/{config.steps}: left out, none of its questions can be used", file=sys.stderr
                )
                continue
            if config.algorithm == "sft":
                groups = targets(groups, config.prompt)
            if not paths:
                shards.write_shard(shards.shard_path(config.out / "rollouts", step), groups)
            measure_kl = config.kl_coef == 0 and config.kl_every > 0 and step % config.kl_every == 0
            rate = schedule.get_last_lr()[0]
            with clock("update"):
                stats = update(policy, optimizer, schedule, prompts, groups, config, measure_kl)
            extra = {"learning_rate": rate, "left_out": len(left_out), **looked}
            looked = {}
            bar.write(
                f"step {step + 1}/{config.steps}: {metrics.write(step, groups, stats, clock.since(before), extra)}"
            )
            if config.stop_on_collapse and metrics.rows[-1]["alarms"]:
                bar.write(f"step {step + 1}: stopped by --stop-on-collapse, {' '.join(metrics.rows[-1]['alarms'])}")
                break
            if config.saves(step + 1):
                save(step + 1)
    return finish(policy, config, metrics.rows)


def finish(policy: Policy, config: Config, rows: list[dict]) -> dict:
    """Write the adapter that the run ends with and put it on the policy; which one it is and the run's alarms."""
    alarms = {row["step"]: row["alarms"] for row in rows if row["alarms"]}
    folders = {runs.step_of(path): path for path in runs.checkpoints(config.out / "checkpoints")}
    folders = {step: path for step, path in folders.items() if config.saves(step)}
    chosen = made = rows[-1]["step"] + 1 if rows else 0
    if config.select == "label-free" and folders:
        chosen = health.best_checkpoint(rows, sorted(folders))
    elif config.stop_on_collapse and alarms:
        healthy = [step for step in folders if step < min(alarms)]
        chosen = max(healthy, default=made)
        if not healthy:
            print("no checkpoint is from before the alarm, so the last one stays; lower --save-every", file=sys.stderr)
    if chosen != made:
        policy.load_adapter(folders[chosen] / "adapter")
    if config.select == "label-free" or chosen != made:
        print(f"ends with the adapter after {chosen} of {made} steps")
    policy.save(config.out / "adapter")
    return {"steps": made, "adapter_step": chosen, "alarms": alarms}


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


def starting_policy(config: Config) -> Policy:
    """The model that the run starts from: --adapter is merged into it, in OUT/start, --init-adapter put on it."""
    options = {name: getattr(config, name) for name in ("dtype", "device", "min_pixels", "max_pixels")}
    model, start = config.model, config.out / "start"
    if config.adapter:
        if not (config.out / "manifest.json").exists():  # left by a command that never came to be a run
            shutil.rmtree(start, ignore_errors=True)
        if not start.exists():
            draft = config.out / ".start.partial"
            Policy.load(model, adapter=config.adapter, **options).export(draft)
            draft.rename(start)
        model = str(start)
    options |= {"feature_cache_gib": config.feature_cache_gib}
    policy = Policy.load(model, gradient_checkpointing=config.gradient_checkpointing, **options)
    if config.init_adapter:
        policy.load_adapter(config.init_adapter)
    return policy


def main(config: Config) -> dict:
    """Run the loop and return its summary; stopped by a signal, it saves its state and exits with 128 + the signal."""
    config = prepare(config)
    clock = Clock()
    with clock("setup"):
        questions = None if config.from_shards else data.load(config.data, config.split, config.seed, config.limit)
        where = config.eval_data or config.data
        held_out = data.load(where, config.eval_split, config.seed) if config.eval_questions else None
        check_questions(questions, held_out, config)
        if questions is not None and rewards.needs_gold(config.reward):
            questions = questions.with_gold()
        followed = Followed(config.eval, config.eval_limit)
        if config.rounds:
            return evolve.evolve(config, main)
        policy = starting_policy(config)
        claim(config)
    with runs.stop_on_signal() as check:
        try:
            summary = {"before": scored(policy, held_out, "before", config, clock, check)} if held_out else {}
            summary["end"] = train(policy, questions, followed, config, clock, check)
            if held_out:
                summary["after"] = scored(policy, held_out, "after", config, clock, check)
            if config.eval:
                summary["benchmarks"] = followed.curves(policy, config, clock, check)
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
    for name, curve in summary.get("benchmarks", {}).items():
        print(f"{name} by steps: " + ", ".join(f"{step} {100 * value:.1f}" for step, value in curve.items()))
    print(f"adapter in {config.out / 'adapter'}, summary in {config.out / 'summary.json'}")
    return summary


if __name__ == "__main__":
    main(tyro.cli(Config))
