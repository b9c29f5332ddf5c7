"""The loop: a model improves itself on images and questions without labels.

For each step:
    rollout      G responses to each question (upt/stages/sampling.py)
    judge        scores of a frozen copy of the model, where the reward asks for them (upt/stages/judging.py)
    reward       what the responses say of each other, by default agreement with the majority (rewards.py)
    advantage    from the rewards of one group
    update       PPO-clip on the LoRA adapter, in minibatches, each gradient summed over micro-batches
    log, save    metrics.jsonl, the shard with rewards and advantages, a checkpoint every few steps
and before and after all steps, and every few with --eval-every, an evaluation on held-out questions (eval/heldout.py).

The recipe is MM-UPT's (arXiv 2505.22453), with these departures: LoRA in place of full weights; old log-probabilities
come from the trainer's own forward pass, since the sampler's are of a cut distribution; responses whose advantage is 0
are left out of the backward pass when there is no KL term, which changes no gradient; a step in which no group carries
a signal makes no update. `gold` is logged as a diagnostic and never trained on, unless the reward is `supervised`.
`--algorithm sft` is the simplest baseline (LMSI, arXiv 2210.11610): cross-entropy on well-formed responses, weighted
by their rewards, hence with `majority` on the majority's.

    python train_upt.py --data shapes --model models/tiny --reward majority --out runs/x
    python train_upt.py --from-shards runs/scored --out runs/y     # the same update from the output of the stages

The same command again goes on where it was stopped. What a run leaves in OUT: adapter/ (PEFT), summary.json,
metrics.jsonl, rollouts/ (shards), checkpoints/. With `--rounds` the model also writes itself questions
(upt/stages/rounds.py).
"""

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import rewards
import synthesize
from eval import heldout
from eval.follow import Followed
from eval.report import page
from upt import data, model, prompts, run, stages
from upt.data import names, views
from upt.errors import Diverged, SettingError, Stopped, StorageError
from upt.files import known_json, read_json, write_whole, writing
from upt.groups import manifests, scoring, shards, variants
from upt.model.folders import check_adapter
from upt.model.origin import check_base, origin_of
from upt.ranges import Count, Name
from upt.run import cli, health, progress, tracking
from upt.run.locking import alone
from upt.run.metrics import Clock, Metrics, peak_memory_gib
from upt.run.resuming import STORED, claim, fingerprints, jsonable, prepare
from upt.run.settings import Evaluation, Judge, Reward, Rollout, Rounds, Tracking, Update
from upt.run.stopping import stop_on_signal
from upt.run.team import Team, assemble

if TYPE_CHECKING:
    from upt.model import Policy
    from upt.stages.sampling import Step


@dataclass
class Config(Tracking, Evaluation, Update, Rounds, Judge, Reward, Rollout):
    """Settings left at None take the preset's value, else the default for the model (see upt/run/presets.py)."""

    out: Path = Path("runs/train")
    """folder of the run"""
    resume: bool = False
    """take every setting from the run in --out and go on with it"""
    from_shards: Path | None = None
    """train on these scored (or sampled) shards, one step each, instead of sampling"""
    init_adapter: Name | None = None
    """PEFT adapter to go on training, with its rank, alpha and layers; judge and reference are the model without it"""
    feature_cache_gib: Annotated[float, "at least 0", "at most 1000000"] = 0.0
    """keep image features from step to step, up to this much of the CPU's memory"""
    save_every: Count = 10
    """steps between checkpoints"""
    keep: Count = 2
    """checkpoints to keep; the last one that is known to be healthy is kept besides"""
    stop_on_collapse: bool = False
    """end the run at the first alarm (see upt/run/health.py), with the last healthy checkpoint's adapter"""
    select: Literal["last", "label-free"] = "last"
    """label-free: keep all checkpoints and end with the one whose answers say most about their questions"""

    def resolve(self) -> "Config":
        if self.adapter and self.init_adapter:
            raise SettingError("--adapter merges an adapter, --init-adapter goes on training it: give one of them")
        if self.init_adapter is not None:
            check_adapter(self.init_adapter, "--init-adapter ")
            self.keep_lora(self.init_adapter)
        super().resolve()
        if self.reward == STORED and not self.from_shards:
            raise SettingError("the reward 'stored' is that of scored shards: give them as --from-shards")
        if self.reward != STORED:
            reward_of = rewards.bind_reward(self.reward, run_seed=self.seed, **variants.band(self))
            scoring.try_out(reward_of, rewards.bind_advantage(self.advantage))
            if rewards.needs_view(self.reward) and self.view is None:
                raise SettingError(
                    f"--reward {self.reward} compares the answers to two views of a picture: sample with --view faded"
                )
        self.check_judge()
        self.check_correction()
        tracking.checked(self.track)
        if self.init_adapter is not None:
            check_base(self.init_adapter, origin_of(self.model), self.any_base, say=False)
        self.check_rounds()
        if self.rounds and rewards.needs_gold(self.reward):
            raise SettingError(
                f"--rounds makes questions without gold, which --reward {self.reward} needs; use another reward"
            )
        several = self.from_shards is None and names.is_mixture(self.data)
        if (several or self.rounds) and names.ALIASES.get(self.split) != "train":
            raise SettingError(f"--split {self.split}: sets are mixed for training on their train split only")
        if self.temperature == 0 or self.group_size < 2:
            raise SettingError("training needs samples that differ: --temperature above 0, a group size of 2 or more")
        if self.eval and not self.eval_every:
            raise SettingError("--eval NAME=FOLDER follows a benchmark: say how often, --eval-every N")
        if self.eval_every and not self.eval and not self.eval_questions:
            raise SettingError(
                f"--eval-every {self.eval_every} has nothing to look at: give --eval-questions above 0 or "
                "--eval NAME=FOLDER, or leave it out"
            )
        if self.minibatches > self.questions_per_step:
            raise SettingError(
                f"--minibatches {self.minibatches}: from 1 to --questions-per-step ({self.questions_per_step})"
            )
        if self.from_shards and (self.stop_on_collapse or self.select != "last"):
            raise SettingError("signals of --from-shards are the shards' own: no --stop-on-collapse, no --select")
        if self.reward == STORED and variants.band(self):
            raise SettingError("--min-share and --max-share change rewards: give --reward or --advantage besides")
        if self.init_adapter is None and self.lora_targets != model.TARGETS:
            model.check_targets(self.model, self.lora_targets)  # brings torch, so last
        return self

    def files(self) -> dict[str, str]:
        """Digests of the files that decide on rewards and judgements, for the manifest."""
        found = {}
        for role in ("reward", "advantage"):
            if digest := variants.source_digest(getattr(self, role) or STORED):
                found[f"{role}_file"] = digest
        # A row that a notebook has put into the table.
        mine = rewards.REWARDS.get(variants.parse_variant(self.reward or STORED)[0])
        if inspect.isfunction(mine) and mine.__module__ != rewards.__name__:
            found["reward_code"] = variants.code_digest(mine)
        if self.reward not in (None, STORED) and rewards.needs_judge(self.reward):
            found["judge_prompt_file"] = prompts.judge_digest(self.judge_prompt)
        if self.rounds and self.ask_prompt:
            found["ask_prompt_file"] = prompts.asking_digest(self.synthesize, self.ask_prompt)
        if self.init_adapter:
            found["init_adapter_file"] = manifests.fingerprint(self.init_adapter)
        return found

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is made after so many steps, interruptions apart."""
        return step % self.save_every == 0 or step == self.steps


def load_questions(config: Config) -> tuple["data.Questions | None", "data.Questions | None"]:
    """Those to train on, None with --from-shards, and the held-out ones, None where nothing is evaluated."""
    questions = None if config.from_shards else data.load(config.data, config.split, config.seed, config.limit)
    where = config.eval_data or config.data
    return questions, data.load(where, config.eval_split, config.seed) if config.eval_questions else None


def check_questions(questions, held_out, config: Config) -> None:
    """Say what the data cannot give, and refuse what cannot work without gold."""
    if questions is not None:
        if rewards.needs_gold(config.reward) and not questions.has_gold:
            raise SettingError(
                f"--reward {config.reward} needs gold answers, and {config.data} has none; use a label-free reward"
            )
        if questions.weights:
            print(data.shares(questions, config.questions_per_step))
        if config.view and (without := views.without_view(questions, config.view)):
            print(without)
        if config.questions_per_step > len(questions):
            print(f"{config.data} has {len(questions)} questions: that many a step, not {config.questions_per_step}")
    print(run.starting.plan(config, questions))
    if held_out is not None:
        print(f"held out: {held_out.describe()}")


def rewarded(policy: "Policy", found: "Step", config: Config, clock: Clock, check, team: Team) -> list[dict]:
    """The groups with rewards and advantages, judged first where the reward asks for it."""

    def judge(groups: list[dict]) -> list[dict]:
        prompts = [found.prompts[group["uid"]] for group in groups]
        return stages.judging.judge(policy, prompts, groups, config, config.prompt, config.seed, check)

    groups = found.groups
    if rewards.needs_judge(config.reward) and not all("judge" in r for g in groups for r in g["responses"]):
        with clock("judge"):
            # Where they were sampled, and not evenly by tokens: there lie the features of their pictures.
            groups = team.spread(judge, groups, found.homes)
    # By one process: what draws or hashes may come out otherwise in another.
    score = partial(rewards.score, **variants.band(config))
    with clock("reward"):
        return team.once(score, groups, config.reward, config.advantage, config.seed)


def train(
    policy: "Policy",
    questions: "data.Questions | None",
    followed: Followed,
    config: Config,
    clock: Clock,
    check,
    team: Team,
    tell: Callable[[dict, list[dict]], None],
) -> dict:
    """All steps of the loop, from the latest checkpoint if there is one; how it ended (see upt/run/ending.py).

    Raises `Stopped` after saving its state.
    """
    folder = config.out / "checkpoints"
    latest = team.once(run.checkpoints.checkpoints, folder)[-1:]
    if latest:
        policy.load_adapter(latest[0] / "adapter")
    elif not config.init_adapter:
        policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    optimizer, schedule = model.update.optimizer_of(policy, config)
    start = 0
    if latest:
        start, clock.seconds = run.checkpoints.load_checkpoint(latest[0], optimizer, schedule)
        print(f"going on after step {start} of {config.steps}")
    metrics = team.in_turn(Metrics, config.out / "metrics.jsonl", start, config.from_shards is None, team.first, tell)
    paths = shards.list_shards(config.from_shards) if config.from_shards else None

    def write(step: int) -> None:
        with writing(folder / f"step-{step:06d}"):
            run.checkpoints.save_checkpoint(folder, step, policy, optimizer, schedule, clock.seconds)
        # Checkpoint s is the policy that samples step s, so the latest one is known to be healthy a step later.
        healthy = min(step, health.unhealthy_from(metrics.rows))
        keep = config.keep if config.select == "last" else config.steps
        run.checkpoints.prune_checkpoints(folder, keep, config.saves, healthy)

    def save(step: int) -> None:
        model.update.check_same(policy, step, team)
        team.once(write, step)

    def leave_out(step: int, left_out: int, looked: dict) -> None:
        progress.say(f"step {step + 1}/{config.steps}: left out, none of its questions can be used", file=sys.stderr)
        model.update.advance(schedule, config.minibatches)
        metrics.leave_out(step, {"left_out": left_out} | looked)
        if config.saves(step + 1):
            save(step + 1)

    run.ending.check_finite(policy, config, metrics.rows)
    left, told_of = range(start, config.steps), {}
    if sampled_before := team.once(stages.steps.sampled_before, config.out, left):
        first, last = sampled_before[0], sampled_before[-1]
        which = f"step {first}" if first == last else f"steps {first} to {last}"
        print(f"{which} had been sampled: the shards are used as they are")
    with progress.bar(left, initial=start, total=config.steps, desc="training", unit="step") as bar:
        for step in bar:
            before = dict(clock.seconds)
            try:
                team.together(check)
                due = config.eval_every and step % config.eval_every == 0
                looked = followed.at(step, policy, config, clock, check) if due else {}
                if paths:
                    found = team.here(stages.steps.stored, policy, paths[step], config, clock, team)
                else:
                    found = stages.steps.sampled(policy, questions, step, config, clock, check, team)
                groups, left_out = found.groups, found.left_out
                if config.reward != STORED and groups:
                    groups = rewarded(policy, found, config, clock, check, team)
            except Stopped:
                save(step)  # nothing of this step has touched the adapter yet
                raise
            for uid, reason in left_out.items():
                if uid not in told_of:
                    progress.say(f"left out {uid}: {reason}", file=sys.stderr)
            told_of |= left_out
            if not groups:
                leave_out(step, len(left_out), looked)
                continue
            if config.algorithm == "sft":
                groups = stages.steps.targets(groups, config.prompt)
            if not paths:
                team.once(shards.write_shard, shards.shard_path(config.out / "rollouts", step), groups)
            measure_kl = config.kl_coef == 0 and config.kl_every > 0 and step % config.kl_every == 0
            rate = schedule.get_last_lr()[0]
            with clock("update"):
                bad = health.nonfinite_in_a_row(metrics.rows)
                pictures = config.from_shards or config.out / "rollouts"
                own = team.here(stages.steps.placed, policy, found, groups, pictures, config, team)
                stats = model.update.update(policy, optimizer, schedule, own, groups, config, measure_kl, bad, team)
            extra = {"learning_rate": rate, "left_out": len(left_out), **looked}
            extra["peak_memory_gib"] = max(team.together(peak_memory_gib))
            progress.say(
                f"step {step + 1}/{config.steps}: {metrics.write(step, groups, stats, clock.since(before), extra)}"
            )
            if config.stop_on_collapse and (alarms := health.collapses(metrics.rows[-1])):
                progress.say(f"step {step + 1}: stopped by --stop-on-collapse, {' '.join(alarms)}")
                break
            if config.saves(step + 1) or health.has_diverged(metrics.rows):
                save(step + 1)
            run.ending.check_finite(policy, config, metrics.rows)
    return run.ending.finish(policy, config, metrics.rows, team)


def write_questions(**settings) -> dict:
    """What a round asks with: synthesize.py, given its settings."""
    return synthesize.main(synthesize.Config(**settings))


def is_finished(config: Config) -> bool:
    """Whether the run in --out has ended; of rounds, as many as are asked for, or with --resume were begun."""
    summary = known_json(config.out / "summary.json")
    if summary is None or not (config.out / "adapter" / "adapter_config.json").is_file():
        return False
    begun = manifests.read(config.out)["config"].get("rounds", 0) if config.resume else 0
    return len(summary.get("rounds", ())) == (config.rounds or begun)


def logged(out: Path) -> int:
    """How many steps stand in the log of a run, or in those of its rounds."""
    logs = (*out.glob("metrics.jsonl"), *out.glob("round-*/run/metrics.jsonl"))
    return sum(log.read_bytes().count(b"\n") for log in logs)


def show(out: Path, since: int = 0) -> None:
    """Write the page on a run that has made more than `since` steps, or has none yet, and say where it is."""
    made, path = logged(out), out / page.NAME
    if made > (since if path.is_file() else 0) and not page.at_end(out):
        return
    if path.is_file():
        print(f"what happened, to be opened in a browser: {path}")


@contextmanager
def shown_if_stopped(out: Path, team: Team):
    """Inside, what ends a run early leaves a page on the steps that it has made, where there is room for one.

    Several processes make it where all of them come to the end: of an error the others do not wait for the first one.
    """
    since = logged(out)
    try:
        yield
    except StorageError:
        raise
    except (Stopped, Diverged):
        team.once(show, out, since)
        raise
    except Exception:
        if team.size == 1:
            show(out, since)
        raise


@alone
def main(config: Config, on_step: Callable[[dict, list[dict]], None] | None = None) -> dict:
    """Run the loop and return its summary, of a finished run as summary.json has it. Stopped by a signal, it saves its
    state and raises `Stopped`.

    `on_step(row, groups)` is called after every step, with its line of metrics.jsonl and its groups; what it raises
    ends the run.
    """
    config = prepare(config)
    team, clock = assemble(config.device), Clock()
    if finished := team.once(is_finished, config):
        print(f"the run in {config.out} is finished: nothing more is trained")
    with clock("setup"):
        questions, held_out = team.in_turn(load_questions, config)
        if not finished:
            check_questions(questions, held_out, config)
        supervised = questions is not None and rewards.needs_gold(config.reward)
        taken = team.once(fingerprints, questions, held_out, config, supervised)
        if supervised:
            questions = questions.with_gold()
    if finished:
        summary = read_json(config.out / "summary.json")
    else:
        followed = Followed(config.eval, config.eval_limit, held_out, team)
        with shown_if_stopped(config.out, team):
            if config.rounds:
                summary = stages.rounds.evolve(config, partial(main, on_step=on_step), write_questions, taken, team)
            else:
                summary = learn(config, questions, held_out, followed, taken, clock, team, on_step)
    for source in filter(None, (questions, held_out)):
        if bad := source.report_bad():
            print(bad, file=sys.stderr)
    if "rounds" in summary:
        print(stages.rounds.table(summary["rounds"]))
    elif held_out:
        print(heldout.table({name: read_json(config.out / f"{name}.json") for name in ("before", "after")}))
    for name, curve in summary.get("benchmarks", {}).items():
        print(f"{name} by steps: " + ", ".join(f"{step} {100 * value:.1f}" for step, value in curve.items()))
    print(f"adapter in {config.out / 'adapter'}, summary in {config.out / 'summary.json'}")
    team.once(show, config.out, logged(config.out) if finished else 0)
    return summary


def learn(
    config: Config,
    questions: "data.Questions | None",
    held_out: "data.Questions | None",
    followed: Followed,
    taken: dict[str, dict],
    clock: Clock,
    team: Team,
    on_step: Callable[[dict, list[dict]], None] | None,
) -> dict:
    """Evaluate, train, evaluate; the summary, which is written at the end. `taken` are the data's fingerprints."""
    with clock("setup"):
        judges = config.reward != STORED and rewards.needs_judge(config.reward)
        policy = run.starting.starting_policy(config, judges, team)
        team.once(claim, config, taken, policy.device)
        told = tracking.Listeners(config, on_step, team.first)
    with stop_on_signal(config.out) as check, closing(told):
        summary = {}
        if held_out:
            summary["before"] = heldout.scored(policy, held_out, "before", config, clock, check, team)
            told.scores(summary["before"], 0)
        summary["end"] = train(policy, questions, followed, config, clock, check, team, told.step)
        if held_out:
            summary["after"] = heldout.scored(policy, held_out, "after", config, clock, check, team)
            told.scores(summary["after"], summary["end"]["steps"])
        if config.eval:
            summary["benchmarks"] = followed.curves(policy, config, clock, check)
    summary |= {name: heldout.without_rows(summary[name]) for name in ("before", "after") if name in summary}
    warmup = Path(config.model) / "warmup.json"
    if warmup.is_file():
        summary["warmup"] = read_json(warmup, "make the model again")
    summary |= {"config": jsonable(config), "seconds": clock.seconds}
    team.once(write_whole, config.out / "summary.json", [json.dumps(summary, indent=1).encode()])
    return summary


if __name__ == "__main__":
    cli.launch(main, Config, finished=is_finished)
