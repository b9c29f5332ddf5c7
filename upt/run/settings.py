"""The settings that several scripts share, a dataclass a group: `--help` shows them so, and each Config takes some.

A field's string is its line in `--help`, its kind says what range it may lie in (upt/ranges.py). Fields left at None
take the preset's value, else the default for the model (upt/run/presets.py).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from upt import prompts
from upt.data import names
from upt.errors import SettingError, suggest
from upt.groups import filters
from upt.model import TARGETS
from upt.model.folders import check_adapter, check_length, check_model, check_pixels, lora_of
from upt.model.origin import check_base, origin_of
from upt.ranges import Amount, Count, Few, Name, Nucleus, Number, Positive, Rate, Seed, Share, Temperature, Weight
from upt.run import presets, processes
from upt.run.typed import Typed, flag


def hidden(default):
    """A field that is no flag of the command line."""
    return field(default=default, metadata={"hidden": True})


@dataclass
class Data:
    """Where the questions come from."""

    data: Name | None = None
    """shapes (the default), shapes-hard, geoqa, geometry3k, mmr1, a hub id, a folder or file (parquet, JSON(L), CSV:
    docs/data.md); several: a,b or a:3,b:1"""
    split: Name = "train"
    """split of the data to sample from"""
    limit: Count | None = None
    """use the first N questions of the split only"""


@dataclass
class Model:
    """What answers them, and how it is loaded."""

    model: Name | None = None
    """snapshot folder or hub id; None: models/tiny for shapes and shapes-hard, else Qwen/Qwen2.5-VL-7B-Instruct"""
    adapter: Name | None = None
    """PEFT adapter to start from"""
    any_base: bool = False
    """take an adapter although it was made for another model"""
    min_pixels: Count | None = None
    """smallest image area after resizing, in pixels"""
    max_pixels: Count | None = None
    """largest image area after resizing, in pixels"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    quantize: Literal["nf4", "none"] | None = None
    """nf4: 4-bit weights in the language model's linear layers, computing in --dtype; none: full weights; None: as the
    run or the rollouts have them, else full"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:N"""
    gpus: Count = 1
    """processes that share the work, a GPU each"""

    def check_loading(self) -> None:
        """Raise PolicyError for what cannot be loaded, as far as that can be told without loading anything."""
        if self.quantize == "none":  # by now nothing is taken from elsewhere
            self.quantize = None
        self.gpus = processes.check(self.gpus)
        check_adapter(self.adapter, "--adapter ")
        check_model(self.model)
        if self.adapter is not None:
            check_base(self.adapter, origin_of(self.model), self.any_base, say=False)
        check_pixels(self.model, self.min_pixels, self.max_pixels)
        for name in ("max_new_tokens", "judge_max_new_tokens", "ask_max_new_tokens"):
            check_length(self.model, flag(name), getattr(self, name, None))
        if self.device not in ("auto", "cpu"):
            from upt.model.devices import checked_device  # brings torch, which a mistake need not wait for

            checked_device(self.device)

    def loading(self, *but: str) -> dict:
        """What `Policy.load` takes besides the model's name, without what is named."""
        names = {field.name for field in fields(Model)} - {"model", "gpus", *but}
        return {name: getattr(self, name) for name in names}


@dataclass
class Sampling:
    """How responses are sampled."""

    questions_per_step: Count | None = None
    """questions in one step, capped by the data"""
    group_size: Few | None = None
    """responses to each question, G"""
    view: Literal["brighter", "faded", "scaled", "padded"] | None = None
    """how the second half of a group sees its picture (upt/data/views.py); None: as the first does"""
    temperature: Temperature | None = None
    """sampling temperature; 0 is greedy"""
    top_p: Nucleus | None = None
    """nucleus: keep the likeliest tokens until their probability reaches this"""
    top_k: Number = 0
    """keep the k likeliest tokens; 0 keeps all"""
    max_new_tokens: Count | None = None
    """longest response, in tokens"""
    prompt: Name | None = None
    """boxed, think-boxed, or a file with {question} in it"""
    max_prompt_tokens: Count | None = None
    """longer prompts are dropped and counted, never cut"""
    slots: Count | None = None
    """responses that are sampled at a time; None: as many as there is memory for, up to 256"""


@dataclass
class Run:
    """Where a run goes, and how far."""

    preset: Literal["mm-upt", "self-judge", "self-judge-code"] | None = None
    """a paper's recipe and its prompt style"""
    out: Path = Path("runs/rollouts")
    """folder to write to"""
    seed: Seed | None = None
    """order of the questions, sampling noise, adapter initialisation and the pictures of shapes and shapes-hard"""
    steps: Count | None = None
    """steps to make (one shard each)"""
    round: Number = hidden(0)
    """round of a self-evolving run (stages/rounds.py)"""


@dataclass
class Rollout(Run, Sampling, Model, Data, Typed):
    """What every script has that samples responses."""

    def resolve(self) -> "Rollout":
        """Fill in what was left open and check what can be checked. Raises SettingError with what to change."""
        presets.fill(self)
        self.check()
        prompts.template(self.prompt)
        if self.view and self.group_size % 2:
            raise SettingError(
                f"--view {self.view}: half of a group sees it, so --group-size has to be even, not {self.group_size}"
            )
        self.check_loading()
        return self

    def turn(self, step: int) -> int:
        """What keys a step's noise: the steps of two rounds lie far apart."""
        return step + (self.round << 20)


@dataclass
class Judge:
    """How responses are judged."""

    judge_mode: Literal["text", "logit"] | None = None
    """text: sample written judgements and read their grades; logit: read one score from the next token"""
    judge_prompt: Name | None = None
    """judge, judge-tiny, or a file with {question} and {response} in it"""
    judge_prefix: str | None = None
    """logit mode: what the answer starts with, up to the digit"""
    judge_repeats: Few | None = None
    """text mode: judgements of each response, averaged"""
    judge_temperature: Temperature = 1.0
    """text mode: sampling temperature"""
    judge_top_p: Nucleus = 0.9
    """text mode: nucleus"""
    judge_max_new_tokens: Count | None = None
    """text mode: longest judgement, in tokens"""
    judge_tokens: Count | None = None
    """logit mode: token budget of one batch; scores do not depend on it"""

    def check_judge(self) -> None:
        """Raise SettingError for settings that cannot work, with what to change."""
        prompts.judge_turns(self.judge_prompt)


@dataclass
class Asking:
    """How the model asks questions of its own, and which are kept."""

    per_image: Few = 1
    """questions to write from each source question and its picture, k"""
    filters: Name = "all"
    """which of these are kept: all, none, or names of upt/groups/filters.py with commas between them"""
    ask_prompt: Name | None = None
    """what asks for a question: a name in prompts/ or a file; None: ask-in-context or ask-direct"""
    ask_max_new_tokens: Count | None = None
    """longest question, in tokens; None: as long as a response"""
    min_agreement: Share = 0.25
    """filter agreement: the majority's least share of the responses to a question"""
    max_agreement: Share = 0.99
    """filter agreement: its largest share"""
    max_abstentions: Share = 0.5
    """filter abstention: largest share of responses without an answer"""

    def check_asking(self, mode: str) -> None:
        """Raise SettingError for settings that cannot work, with what to change. Sampling settings are filled in."""
        if self.temperature == 0 and self.per_image > 1:
            raise SettingError(
                "--temperature 0 writes the same question again: give a temperature above 0, or --per-image 1"
            )
        if "agreement" in self.chosen() and (self.temperature == 0 or self.group_size < 2):
            raise SettingError(
                "the filter agreement needs several samples: --temperature above 0 and --group-size 2 or more"
            )
        prompts.asking(mode, self.ask_prompt)

    def chosen(self) -> tuple[str, ...]:
        """The filters by name, in the order of filters.NAMES. Raises SettingError for a name that is none."""
        if self.filters in ("all", "none"):
            return filters.NAMES if self.filters == "all" else ()
        named = [name.strip() for name in self.filters.split(",")]
        if unknown := [name for name in named if name not in filters.NAMES]:
            wanted = f"all or none by itself, or names among {', '.join(filters.NAMES)}"
            near = suggest(unknown[0], [*filters.NAMES, "all", "none"])
            raise SettingError(f"--filters {self.filters}: {unknown[0]!r} is no filter; give {wanted}{near}")
        return tuple(name for name in filters.NAMES if name in named)


@dataclass
class Rounds(Asking):
    """Asking and training in turn."""

    rounds: Number = 0
    """rounds of asking and training on what was asked, --steps each; 0: train on --data alone"""
    synthesize: Literal["in-context", "direct"] | None = None
    """how a round asks: from the picture and its question, or from the picture alone"""
    own_share: Annotated[float, "from 0.001 to 0.999, or 1"] | None = None
    """share of a step's questions that the model wrote; None: all questions of a round count alike"""

    def check_rounds(self) -> None:
        """Raise SettingError for settings of rounds that do not go together, with what to change."""
        if bool(self.rounds) != bool(self.synthesize):
            raise SettingError("--rounds N and --synthesize in-context or direct go together: give both or neither")
        if not self.rounds:
            asking = [field for field in fields(Asking) if getattr(self, field.name) != field.default]
            if asking or self.own_share is not None:
                name = flag(asking[0].name if asking else "own_share")
                raise SettingError(f"{name} is for the questions that --rounds makes; leave it out here")
            return
        self.check_asking(self.synthesize)
        if self.adapter or self.from_shards:
            raise SettingError(
                "--rounds trains one adapter on questions: no --from-shards, and --init-adapter for --adapter"
            )
        self.check_parts()

    def check_parts(self) -> None:
        """The same for what a round's data set is put together from."""
        several = names.is_mixture(self.data)
        if several and (self.own_share is not None or names.parts(self.data)[0][1] is not None):
            raise SettingError(f"--rounds with several data sets takes neither weights nor --own-share: {self.data}")
        for setting, name in (("--out", str(self.out / "questions")), *([] if several else [("--data", self.data)])):
            if names.parts(name) != [(name, None)]:
                raise SettingError(f"{setting} {name}: a comma or a number behind a colon cannot be mixed; rename it")


@dataclass
class Reward:
    """What a response earns, and what becomes of it."""

    reward: Name | None = None
    """a name of rewards.py or FILE.py:NAME; settings go inline: judged(lam_pos=.4,t_h=.9)"""
    advantage: Name | None = None
    """advantage estimator: group-norm, mean, rloo, energy, energy-centred"""
    min_share: Share = 0.0
    """skip groups whose majority has a smaller share of the responses"""
    max_share: Share = 1.0
    """skip groups whose majority has a larger share of the responses"""


@dataclass
class Update:
    """How the adapter is updated."""

    algorithm: Literal["grpo", "sft"] = "grpo"
    """sft: cross-entropy on the well-formed responses, weighted by their rewards"""
    minibatches: Count | None = None
    """updates in one step; the step's questions are split among them"""
    update_tokens: Count | None = None
    """token budget of one micro-batch; None: on a GPU what there is room for, up to 16384. The step does not depend on
    it"""
    learning_rate: Rate | None = None
    """peak of AdamW's learning rate"""
    warmup_steps: Number | None = None
    """updates in which the learning rate rises; it then falls along a cosine to a tenth"""
    weight_decay: Weight = 0.01
    """AdamW's weight decay"""
    max_grad_norm: Amount = 1.0
    """gradients are scaled down to this norm; 0: not at all"""
    clip_low: Share | None = None
    """the ratio is clipped below at 1 - clip_low"""
    clip_high: Amount | None = None
    """the ratio is clipped above at 1 + clip_high"""
    dual_clip: Annotated[float, "0 (off) or above 1"] | None = None
    """cap on the loss of a negative advantage, as a multiple of it; above 1, or 0 for none"""
    aggregation: Literal["token", "sequence", "dr-grpo"] = "token"
    """how token losses are averaged"""
    ratio_level: Literal["token", "sequence"] = "token"
    """sequence: one ratio for a response (GSPO)"""
    rollout_correction: Literal["none", "truncated"] = "none"
    """truncated: a token's loss is multiplied by its probability before the step over the one it was sampled with"""
    rollout_cap: Annotated[float, "at least 1", "at most 1000"] = 2.0
    """largest such weight"""
    kl_coef: Weight | None = None
    """weight of KL(policy, reference) in the loss"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimator of that KL"""
    kl_every: Number = 0
    """with kl_coef 0, measure the KL every N steps for the log; 0: never"""
    mask_truncated: bool = False
    """leave responses that were cut at the length limit out of the loss"""
    lora_rank: Few | None = None
    """rank of the adapter"""
    lora_alpha: Positive | None = None
    """its scale is alpha / rank"""
    lora_targets: Annotated[tuple[Name, ...], "one or more"] = TARGETS
    """linear layers of the language model that get an adapter"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass; None: on a GPU only"""

    def check_correction(self) -> None:
        """Raise SettingError for a correction that has nothing to correct, with what to change."""
        if self.rollout_correction == "none" and self.rollout_cap != 2.0:
            raise SettingError(
                f"--rollout-cap {self.rollout_cap} is for the weights of --rollout-correction truncated; give both, or "
                "leave it out"
            )
        if self.rollout_correction != "none" and self.algorithm == "sft":
            raise SettingError(
                f"--rollout-correction {self.rollout_correction} weighs the samples of a policy gradient, and "
                "--algorithm sft makes none: leave one of them out"
            )

    def keep_lora(self, adapter: str) -> None:
        """Take the settings of an adapter that goes on training. Raises SettingError for others that were given."""
        rank, alpha, targets = lora_of(adapter)
        names = {target.rpartition(".")[2] for target in self.lora_targets}
        for setting, given, own, differs in (
            ("--lora-rank", self.lora_rank, rank, self.lora_rank not in (None, rank)),
            ("--lora-alpha", self.lora_alpha, alpha, self.lora_alpha not in (None, alpha)),
            (
                "--lora-targets",
                " ".join(self.lora_targets),
                " ".join(targets),
                self.lora_targets != TARGETS and names != {*targets},
            ),
        ):
            if differs:
                raise SettingError(f"{setting} {given}: the adapter {adapter} has {own}, and keeps it; leave it out")
        self.lora_rank, self.lora_alpha = rank, alpha
        if self.lora_targets == TARGETS:
            self.lora_targets = targets


@dataclass
class Evaluation:
    """What is measured on held-out questions, and on benchmarks."""

    eval_data: Name | None = None
    """data set of the held-out evaluation; None: --data, of a mixture its first set"""
    eval_split: Name = "test"
    """split of the held-out evaluation"""
    eval_questions: Number | None = None
    """held-out questions; 0: no evaluation"""
    eval_samples: Few = 8
    """samples for each held-out question, k"""
    eval: tuple[Name, ...] = ()
    """benchmarks to follow during training, NAME=FOLDER each (names as in eval/run.py)"""
    eval_every: Number = 0
    """steps between two looks at them and at the held-out questions; 0: none"""
    eval_limit: Count = 64
    """questions of each benchmark, the same every time"""


@dataclass
class Tracking:
    """Where a run is told of besides its folder."""

    track: Name | None = None
    """trackers, with commas between them: tensorboard, wandb, trackio, mlflow"""
    track_groups_every: Count = 10
    """steps between two looks at a few groups, with their pictures"""
