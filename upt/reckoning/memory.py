"""Bytes of a run on one GPU, by phase and part; how many slots and tokens fit; and refusing a run that cannot.

    found = fits(config, settings, free_bytes)      # raises SettingError with what would fit
    print(found)        # needs about 49.7 of 78.5 GiB free: rollout 49.7 (weights 15.4, ...); update 29.7 (...)

Phases follow one another, so the largest is what a run needs:

    rollout    weights + adapter + KV + logits + prefill or vision tower, whichever takes more
    judging    weights + adapter + KV of one batch, or its packed forward pass
    update     weights + adapter with gradients + activations of one micro-batch

A prompt's keys and values lie there once, however many slots continue it; a slot has room for the longest response.
Features of pictures wait in the CPU's memory. b stands for the bytes of a number: 2 in bf16, 4 in float32. The formulas
of activations were checked on a CPU with the allocator's own counts (tests/test_reckoning.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil

from upt.errors import SettingError
from upt.model import TARGETS
from upt.reckoning.published import CONFIGS
from upt.reckoning.sizes import Sizes, adapted, feature_bytes, kv_bytes, lora_parameters, sizes_of
from upt.run.typed import flag

GIB = 2**30
USABLE = 0.92  # of free memory; the rest goes to libraries' workspaces and to gaps between blocks
MOST_SLOTS, MOST_TOKENS = 256, 16_384  # beyond, throughput hardly grows: products are bound by arithmetic by then
PREFILL_TOKENS = 8192  # prompts prefilled at once, unless one alone is longer
PIXEL_VALUES_AT_ONCE = 2**25  # of Policy.encode
LOGITS_AT_ONCE = 80 * 2**22  # bytes, of linear_logprob's chunk on a GPU
STEP = 256  # a token budget is a multiple of this, where it is above the longest row
PHASES = ("rollout", "update")
# Settings that may be lowered to make a run fit, in the order in which they are offered, and how far.
LEAST = {"max_new_tokens": 256, "max_prompt_tokens": 512, "lora_rank": 8, "judge_tokens": 4096}


@dataclass(frozen=True)
class Demand:
    """The settings that memory depends on, by the names they have in a Config. No rank: there is no adapter."""

    questions_per_step: int = 1
    group_size: int = 1
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 2048
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = TARGETS
    update_tokens: int = MOST_TOKENS  # a bound: a micro-batch has no more, and fewer where they don't fit
    gradient_checkpointing: bool = True
    judge_mode: str = "logit"
    judge_tokens: int = 65_536
    dtype: str = "bf16"

    @classmethod
    def of(cls, settings) -> "Demand":
        """Of a Config whose settings are filled in; what it lacks or leaves to the device is as on a GPU."""
        given = {f.name: getattr(settings, f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value not in (None, "auto")})

    @property
    def bytes_each(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def row(self) -> int:
        """Tokens of the longest row: the longest prompt and response, whose last token is no input."""
        return self.max_prompt_tokens + self.max_new_tokens - 1

    @property
    def keys_per_token(self) -> float:
        """Keys gathered for each query of a packed row: P for the prompt and P + R a response, over P + G R."""
        P, R, G = self.max_prompt_tokens, self.max_new_tokens, self.group_size
        return (P + G * (P + R)) / (P + G * R)


@dataclass(frozen=True)
class Reckoned:
    """What a run needs: {phase: {part: bytes}}, of `free` bytes, with so many slots and tokens in a micro-batch."""

    phases: dict[str, dict[str, int]]
    free: int
    slots: int
    tokens: int

    @property
    def needs(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def fits(self) -> bool:
        return self.needs <= USABLE * self.free

    def __str__(self) -> str:
        slots = "1 slot" if self.slots == 1 else f"{self.slots} slots"
        counts = {"KV": f" ({slots})", "activations": f" ({self.tokens:,} tokens)"}
        told = []
        for phase, parts in self.phases.items():
            listed = ", ".join(f"{part} {gib(size)}{counts.get(part, '')}" for part, size in parts.items())
            told.append(f"{phase} {gib(sum(parts.values()))} ({listed})")
        return f"needs about {gib(self.needs)} of {gib(self.free)} GiB free: {'; '.join(told)}"


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


# ------------------------------------------------------------------------------------------------ what fits


def resident_prompts(slots: int, questions: int, group_size: int) -> int:
    """Prompts whose keys are there at once: twice the groups that fill the slots, so that a few long responses, each
    with a prompt of its own, don't keep others from the idle slots."""
    return min(questions, 2 * ceil(slots / group_size))


def slots_that_fit(
    free_bytes: float, slot_bytes: int, prompt_bytes: int, questions: int, group_size: int, most: int = MOST_SLOTS
) -> int:
    """Slots to sample in: at most `most` and one a response, whole groups where one fits, at least 1.

    slot_bytes is what one takes, kv_bytes times the longest response with its logits; prompt_bytes what a resident
    prompt takes, kv_bytes times the longest prompt.
    """

    def needed(slots: int) -> int:
        return slots * slot_bytes + resident_prompts(slots, questions, group_size) * prompt_bytes

    most = min(most, questions * group_size)
    slots = next((n for n in range(most, 1, -1) if needed(n) <= free_bytes), 1)
    return slots - slots % group_size if slots > group_size else slots


def tokens_that_fit(
    free_bytes: float, token_bytes: float, fixed_bytes: int, longest: int, most: int = MOST_TOKENS
) -> int:
    """Token budget of a micro-batch: at most `most`, at least the longest row, which has to go in whole.

    token_bytes and fixed_bytes: see `update_bytes`.
    """
    tokens = min(most, int((free_bytes - fixed_bytes) / token_bytes))
    return max(longest, tokens - tokens % STEP)


# ------------------------------------------------------------------------------------------------ parts


def adapter_bytes(sizes: Sizes, demand: Demand, gradients: bool) -> int:
    """LoRA in float32, as PEFT keeps it: weights, Adam's moments, gradients; on a bf16 base a bf16 copy to sample."""
    each = 4 + 8 + (4 if gradients else 0) + (2 if demand.bytes_each == 2 else 0)
    return each * lora_parameters(sizes, demand.lora_rank, demand.lora_targets)


def forward_bytes(sizes: Sizes, tokens: int, bytes_each: int = 2) -> int:
    """The most that a forward pass without gradients holds at once, in the MLP: 4 I for silu(gate), up, LoRA's part of
    it and their sum, 5 D for the residual stream and its normed state in two types."""
    return bytes_each * tokens * (4 * sizes.intermediate + 5 * sizes.hidden)


def tower_bytes(sizes: Sizes, longest: int, bytes_each: int = 2) -> int:
    """The same of the vision tower over one batch of `Policy.encode`, a picture of `longest` tokens above its limit.

    Of width W a patch holds 3 W of queries, keys and values and nine float32 tensors of W while positions turn them;
    or 4 W + 3 I in the MLP.
    """
    vision = sizes.vision
    patches = PIXEL_VALUES_AT_ONCE // vision.patch_values + longest * vision.merge
    turning = (36 + 3 * bytes_each) * vision.width
    mlp = bytes_each * (4 * vision.width + 3 * vision.intermediate)
    return patches * (max(turning, mlp) + bytes_each * vision.patch_values)


def saved_bytes(sizes: Sizes, demand: Demand, keys: float) -> float:
    """What autograd saves of one token in one layer, for a backward pass into LoRA and the layer's input.

    Norms: their input in float32, and 1/rms. Adapted layers: the input, which PEFT casts to float32 for each of them,
    and A's output. Attention: queries, outputs, `keys` keys and values, a float32 logsumexp a head. MLP: gate, silu
    (gate), up. Frozen weights save no inputs of their own.
    """
    b, D, inner = demand.bytes_each, sizes.hidden, sizes.intermediate
    queries, heads = sizes.heads * sizes.head_dim, sizes.heads + sizes.kv_heads
    norms = 2 * (4 * D + 4)
    if sizes.head_norms:
        norms += heads * (4 * sizes.head_dim + 4)
    layers = adapted(sizes, demand.lora_targets) if demand.lora_rank else []
    casts = 4 * sum(i for i, _ in layers) / sizes.layers
    if b == 4:  # nothing to cast: states that several layers share are saved once
        casts = 4 * (2 * D + inner)
    lora = casts + 4 * demand.lora_rank * len(layers) / sizes.layers
    attention = b * (2 * queries + 2 * keys * sizes.kv_heads * sizes.head_dim) + 4 * sizes.heads
    return norms + lora + attention + 3 * b * inner


def update_bytes(sizes: Sizes, demand: Demand, keys: float | None = None) -> tuple[float, int]:
    """Bytes of a micro-batch's activations: of each of its tokens, and whatever their number.

    With checkpointing a token's state at every layer, and what one layer saves when it is computed again; without, what
    all save. Besides, 8 I for two gradients on their way through the MLP, and the gradient that linear_logprob saves
    (kernels/logprob.py): 4 D, on a bf16 base 16 D with the last norm's float32 copies. Fixed is linear_logprob's chunk
    of logits, of which there is never more.
    """
    saved = saved_bytes(sizes, demand, demand.keys_per_token if keys is None else keys)
    kept = sizes.layers * saved
    if demand.gradient_checkpointing:
        kept = saved + sizes.layers * demand.bytes_each * sizes.hidden
    last = (4 if demand.bytes_each == 4 else 16) * sizes.hidden
    return kept + 8 * sizes.intermediate + last, LOGITS_AT_ONCE


# ------------------------------------------------------------------------------------------------ a run


def reckon(sizes: Sizes, demand: Demand, free_bytes: float, phases: Sequence[str] = PHASES) -> Reckoned:
    """What a run of these phases needs, with the most slots and tokens that fit in USABLE of `free_bytes`."""
    b, room = demand.bytes_each, USABLE * free_bytes
    questions, G = demand.questions_per_step, demand.group_size
    slots, tokens, found = 0, 0, {}
    held = {"weights": b * sizes.parameters}
    if demand.lora_rank:
        held["adapter"] = adapter_bytes(sizes, demand, gradients=False)
    at_once = max(PREFILL_TOKENS, demand.max_prompt_tokens)
    tower = tower_bytes(sizes, demand.max_prompt_tokens, b)
    passes = max(tower, forward_bytes(sizes, at_once, b) + feature_bytes(sizes, at_once, b))
    kv = kv_bytes(sizes, b)
    if "rollout" in phases:
        slot, prompt, logits = kv * demand.max_new_tokens, kv * demand.max_prompt_tokens, b * sizes.vocab
        slots = slots_that_fit(room - sum(held.values()) - passes, slot + logits, prompt, questions, G)
        cache = slots * slot + resident_prompts(slots, questions, G) * prompt
        found["rollout"] = held | {"KV": cache, "logits": slots * logits, "prefill and tower": passes}
    if "judging" in phases and demand.judge_mode == "text":
        found["judging"] = held | {"KV of a batch": kv * demand.judge_tokens, "prefill and tower": passes}
    elif "judging" in phases:
        found["judging"] = held | {"pass and tower": max(tower, forward_bytes(sizes, demand.judge_tokens, b))}
    if "update" in phases:
        held = {"weights": held["weights"], "adapter": adapter_bytes(sizes, demand, gradients=True)}
        token, fixed = update_bytes(sizes, demand)
        most = min(demand.update_tokens, MOST_TOKENS)
        tokens = tokens_that_fit(room - sum(held.values()), token, fixed, demand.row, most)
        found["update"] = held | {"activations": int(tokens * token), "logits": fixed}
    return Reckoned(found, int(free_bytes), slots, tokens)


def fits(config: dict, settings, free_bytes: float, phases: Sequence[str] = PHASES) -> Reckoned:
    """What a run needs of `free_bytes`; `config` is the model's config.json, `settings` a Config that is filled in.

    Raises SettingError for a run that does not fit with one slot and one row at a time, with the settings that would.
    """
    sizes, demand = sizes_of(config), Demand.of(settings)
    found = reckon(sizes, demand, free_bytes, phases)
    if found.fits:
        return found
    lowered = [name for name in LEAST if getattr(settings, name, None)]
    lowered = [name for name in lowered if name != "judge_tokens" or "judging" in phases]
    others = {name: sizes_of(other) for name, other in CONFIGS.items()}
    if getattr(settings, "init_adapter", None):  # it keeps its rank, and fits this model alone
        lowered, others = [name for name in lowered if name != "lora_rank"], {}
    if getattr(settings, "adapter", None):
        others = {}
    offers = advice(sizes, demand, lowered, others, lambda *other: reckon(*other, free_bytes, phases).fits)
    fix = f"give {', or '.join(offers)}" if offers else "no setting makes it fit: take a GPU with more memory"
    raise SettingError(
        f"{settings.model} does not fit, even in its smallest batches: it {found}; {USABLE:.0%} of what is free can be "
        f"used; {fix}"
    )


def advice(
    sizes: Sizes,
    demand: Demand,
    lowered: Sequence[str],
    others: dict[str, Sizes],
    fitting: Callable[[Sizes, Demand], bool],
) -> list[str]:
    """What to type so that a run fits: settings of which each does by itself, else several together; smaller models.

    `lowered` are names in LEAST, each of which is halved until it does; `others` are models by name.
    """
    lean = replace(demand, dtype="bf16", gradient_checkpointing=True)
    ways = [[replace(demand, dtype="bf16")], [replace(demand, gradient_checkpointing=True)]]
    ways += [halved(demand, [name]) for name in lowered]
    together = [lean, *halved(lean, lowered)]
    found = [other for way in ways for other in _first(way, sizes, fitting)] or _first(together, sizes, fitting)
    smaller = [name for name, of in others.items() if of.parameters < sizes.parameters and fitting(of, demand)]
    return [typed(demand, other) for other in found] + [f"--model {name}" for name in smaller]


def _first(way: Sequence[Demand], sizes: Sizes, fitting: Callable[[Sizes, Demand], bool]) -> list[Demand]:
    """The first of these demands that fits, in a list; [] where none does."""
    return next(([other] for other in way if fitting(sizes, other)), [])


def halved(demand: Demand, names: Sequence[str]) -> list[Demand]:
    """The demand with these settings halved, again and again, until each is at its least value in LEAST."""
    values = {name: getattr(demand, name) for name in names}
    lower = replace(demand, **{name: min(v, max(LEAST[name], v // 2)) for name, v in values.items()})
    return [] if lower == demand else [lower, *halved(lower, names)]


def typed(demand: Demand, other: Demand) -> str:
    """What is to be typed for `other` in place of `demand`."""
    names = ("dtype", "gradient_checkpointing", *LEAST)
    changed = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(demand, name)}
    dropped = " (longer prompts are left out)" if "max_prompt_tokens" in changed else ""
    return " ".join(f"{flag(name)} {value}" for name, value in changed.items()) + dropped
