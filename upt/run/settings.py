"""The settings that several scripts share, a dataclass a group: `--help` shows them so, and each Config takes some.

A field's string is its line in `--help`. Fields left at None take the preset's value, else the default for the model
(upt/run/presets.py). Typed may be given as strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from upt import prompts
from upt.data import names
from upt.errors import SettingError, suggest
from upt.groups import filters
from upt.model import TARGETS
from upt.model.folders import check_adapter, check_model
from upt.model.origin import check_base, origin_of
from upt.run import presets


def hidden(default):
    """A field that is no flag of the command line."""
    return field(default=default, metadata={"hidden": True})


class Typed:
    """What each script's Config is: fields are checked by their types, and paths may be given as strings.

    At a shell the command line is read by type; in a notebook this is where a wrong one is found.
    """

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            hint = hints[f.name]
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
            setattr(self, f.name, typed(f.name, getattr(self, f.name), kinds))


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    NoneType: "None",
}


def typed(name: str, value, kinds: Sequence):
    """A setting as one of the types `kinds`. Raises SettingError for a value that is of none."""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if isinstance(value, bool) and bool not in kinds:
        pass
    elif value in choices or isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type))):
        return value
    elif isinstance(value, str) and Path in kinds:
        return Path(value).expanduser()
    elif isinstance(value, Path) and str in kinds:
        return str(value)
    elif isinstance(value, int) and float in kinds:
        return value
    elif isinstance(value, list | tuple) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    wanted = [
        *map(str, choices),
        *(WORDS.get(kind, "a list") for kind in kinds if get_origin(kind) is not Literal),
    ]
    near = suggest(value, choices) if isinstance(value, str) else ""
    raise SettingError(f"{name} is {value!r}: expected {' or '.join(wanted)}{near}")


def at_least(config, least: int, *names: str) -> None:
    """Raise SettingError for the first of these settings that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise SettingError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(config, name)}")


@dataclass
class Data:
    """Where the questions come from."""

    data: str | None = None
    """shapes (the default), geoqa, geometry3k, mmr1, a hub id, a local folder or JSONL file; several: a,b or a:3,b:1"""
    split: str = "train"
    """split of the data to sample from"""
    limit: int | None = None
    """use the first N questions of the split only"""


@dataclass
class Model:
    """What answers them, and how it is loaded."""

    model: str | None = None
    """snapshot folder or hub id; None: models/tiny for shapes, Qwen/Qwen2.5-VL-7B-Instruct for anything else"""
    adapter: str | None = None
    """PEFT adapter to start from"""
    any_base: bool = False
    """take an adapter although it was made for another model"""
    min_pixels: int | None = None
    """smallest image area after resizing, in pixels"""
    max_pixels: int | None = None
    """largest image area after resizing, in pixels"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""

    def loading(self, *but: str) -> dict:
        """What `Policy.load` takes besides the model's name, without what is named."""
        names = {field.name for field in fields(Model)} - {"model", *but}
        return {name: getattr(self, name) for name in names}


@dataclass
class Sampling:
    """How responses are sampled."""

    questions_per_step: int | None = None
    """questions in one step, capped by the data"""
    group_size: int | None = None
    """responses to each question, G"""
    temperature: float | None = None
    """sampling temperature; 0 is greedy"""
    top_p: float | None = None
    """nucleus: keep the likeliest tokens until their probability reaches this"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 keeps all"""
    max_new_tokens: int | None = None
    """longest response, in tokens"""
    prompt: str | None = None
    """boxed, think-boxed, or a file with {question} in it"""
    max_prompt_tokens: int | None = None
    """longer prompts are dropped and counted, never cut"""
    rollout_tokens: int | None = None
    """token budget of one decoding batch, prompts and responses together"""


@dataclass
class Run:
    """Where a run goes, and how far."""

    preset: Literal["mm-upt", "self-judge", "self-judge-code"] | None = None
    """a paper's recipe and its prompt style"""
    out: Path = Path("runs/rollouts")
    """folder to write to"""
    seed: int | None = None
    """order of the questions, sampling noise, adapter initialisation and the pictures of shapes"""
    steps: int | None = None
    """steps to make (one shard each)"""
    round: int = hidden(0)
    """round of a self-evolving run (stages/rounds.py)"""


@dataclass
class Rollout(Run, Sampling, Model, Data, Typed):
    """What every script has that samples responses."""

    def resolve(self) -> "Rollout":
        """Fill in what was left open and check what can be checked. Raises SettingError with what to change."""
        presets.fill(self)
        at_least(self, 1, "steps", "questions_per_step", "group_size", "max_new_tokens", "rollout_tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise SettingError(
                f"sampling needs temperature >= 0, 0 < top-p <= 1 and top-k >= 0, not {self.temperature}, "
                f"{self.top_p}, {self.top_k}"
            )
        prompts.template(self.prompt)
        check_adapter(self.adapter, "--adapter ")
        check_model(self.model)
        if self.adapter is not None:
            check_base(self.adapter, origin_of(self.model), self.any_base, say=False)
        if self.device not in ("auto", "cpu"):
            from upt.model.policy import checked_device  # brings torch, which a mistake need not wait for

            checked_device(self.device)
        return self

    def turn(self, step: int) -> int:
        """What keys a step's noise: the steps of two rounds lie far apart."""
        return step + (self.round << 20)


@dataclass
class Judge:
    """How responses are judged."""

    judge_mode: Literal["text", "logit"] | None = None
    """text: sample written judgements and read their grades; logit: read one score from the next token"""
    judge_prompt: str | None = None
    """judge, judge-tiny, or a file with {question} and {response} in it"""
    judge_prefix: str | None = None
    """logit mode: what the answer starts with, up to the digit"""
    judge_repeats: int | None = None
    """text mode: judgements of each response, averaged"""
    judge_temperature: float = 1.0
    """text mode: sampling temperature"""
    judge_top_p: float = 0.9
    """text mode: nucleus"""
    judge_max_new_tokens: int | None = None
    """text mode: longest judgement, in tokens"""
    judge_tokens: int | None = None
    """token budget of one batch; scores do not depend on it"""

    def check_judge(self) -> None:
        """Raise SettingError for settings that cannot work, with what to change."""
        at_least(self, 1, "judge_repeats", "judge_max_new_tokens", "judge_tokens")
        if self.judge_temperature < 0 or not 0 < self.judge_top_p <= 1:
            raise SettingError(
                f"judging needs a temperature >= 0 and 0 < top-p <= 1, not {self.judge_temperature}, {self.judge_top_p}"
            )
        prompts.judge_turns(self.judge_prompt)


@dataclass
class Asking:
    """How the model asks questions of its own, and which are kept."""

    per_image: int = 1
    """questions to write from each source question and its picture, k"""
    filters: str = "all"
    """which of these are kept: all, none, or names of upt/groups/filters.py with commas between them"""
    ask_prompt: str | None = None
    """what asks for a question: a name in prompts/ or a file; None: ask-in-context or ask-direct"""
    ask_max_new_tokens: int | None = None
    """longest question, in tokens; None: as long as a response"""
    min_agreement: float = 0.25
    """filter agreement: the majority's least share of the responses to a question"""
    max_agreement: float = 0.99
    """filter agreement: its largest share"""
    max_abstentions: float = 0.5
    """filter abstention: largest share of responses without an answer"""

    def check_asking(self, mode: str) -> None:
        """Raise SettingError for settings that cannot work, with what to change. Sampling settings are filled in."""
        at_least(self, 1, "per_image")
        if self.ask_max_new_tokens is not None:
            at_least(self, 1, "ask_max_new_tokens")
        if self.temperature == 0 and self.per_image > 1:
            raise SettingError(
                "--temperature 0 writes the same question again: give a temperature above 0, or --per-image 1"
            )
        if not 0 <= self.min_agreement <= self.max_agreement <= 1 or not 0 <= self.max_abstentions <= 1:
            raise SettingError("shares go from 0 to 1: --min-agreement <= --max-agreement, and --max-abstentions")
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

    rounds: int = 0
    """rounds of asking and training on what was asked, --steps each; 0: train on --data alone"""
    synthesize: Literal["in-context", "direct"] | None = None
    """how a round asks: from the picture and its question, or from the picture alone"""
    own_share: float | None = None
    """share of a step's questions that the model wrote; None: all questions of a round count alike"""

    def check_rounds(self) -> None:
        """Raise SettingError for settings of rounds that do not go together, with what to change."""
        if bool(self.rounds) != bool(self.synthesize) or self.rounds < 0:
            raise SettingError("--rounds N and --synthesize in-context or direct go together: give both or neither")
        if not self.rounds:
            asking = [field for field in fields(Asking) if getattr(self, field.name) != field.default]
            if asking or self.own_share is not None:
                name = asking[0].name if asking else "own_share"
                flag = f"--{name.replace('_', '-')}"
                raise SettingError(f"{flag} is for the questions that --rounds makes; leave it out here")
            return
        self.check_asking(self.synthesize)
        if self.adapter or self.from_shards:
            raise SettingError(
                "--rounds trains one adapter on questions: no --from-shards, and --init-adapter for --adapter"
            )
        self.check_parts()

    def check_parts(self) -> None:
        """The same for what a round's data set is put together from."""
        share = self.own_share
        if share is not None and not (0.001 <= share <= 0.999 or share == 1):
            raise SettingError(f"--own-share goes from 0.001 to 0.999, or is 1, not {share}")
        several = names.is_mixture(self.data)
        if several and (share is not None or names.parts(self.data)[0][1] is not None):
            raise SettingError(f"--rounds with several data sets takes neither weights nor --own-share: {self.data}")
        for flag, name in (("--out", str(self.out / "questions")), *([] if several else [("--data", self.data)])):
            if names.parts(name) != [(name, None)]:
                raise SettingError(f"{flag} {name}: a comma or a number behind a colon cannot be mixed; rename it")


@dataclass
class Reward:
    """What a response earns, and what becomes of it."""

    reward: str | None = None
    """a name of rewards.py or FILE.py:NAME; settings go inline: judged(lam_pos=.4,t_h=.9)"""
    advantage: str | None = None
    """advantage estimator: group-norm, mean, rloo, energy, energy-centred"""
    min_share: float = 0.0
    """skip groups whose majority has a smaller share of the responses"""
    max_share: float = 1.0
    """skip groups whose majority has a larger share of the responses"""


@dataclass
class Update:
    """How the adapter is updated."""

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


@dataclass
class Evaluation:
    """What is measured on held-out questions, and on benchmarks."""

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
