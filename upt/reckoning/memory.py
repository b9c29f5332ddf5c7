"""Bytes of a run on one GPU, by phase and part; how many slots and tokens fit; and refusing a run that cannot.

    found = fits(config, settings, free_bytes)      # raises SettingError with what would fit
    print(found)        # needs about 52.0 of 78.5 GiB free: pictures 19.4 (weights 15.4, ...); rollout 52.0 (...); ...

Phases follow one another, so the largest is what a run needs:

    pictures   weights + adapter + the vision tower over one batch of pictures
    rollout    weights + adapter + KV and logits of the slots + a prefill
    judging    the same for written judgements; in logit mode weights + adapter + one packed forward pass
    update     weights + adapter with gradients + activations of one micro-batch

A prompt's keys and values lie there once, however many slots continue it; a slot has room for the longest response.
Of 4-bit weights one matrix at a time is there in full. Features of pictures wait in the CPU's memory. b stands for the
bytes of a number: 2 in bf16, 4 in float32. The formulas of activations were checked on a CPU with the allocator's own
counts (tests/test_reckoning.py). The engine asks the same functions for its slots and budgets, with what is free by
then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil

from upt.errors import SettingError
from upt.model import TARGETS
from upt.reckoning.published import CONFIGS
from upt.reckoning.sizes import Sizes, adapted, feature_bytes, kv_bytes, lora_parameters, sizes_of, weight_bytes
from upt.run.typed import flag

GIB = 2**30
USABLE = 0.92  # of free memory; the rest goes to libraries' workspaces and to gaps between blocks
MOST_SLOTS, MOST_TOKENS = 256, 16_384  # beyond, throughput hardly grows: products are bound by arithmetic by then
PREFILL_TOKENS = 8192  # prompt tokens that go through the model at once, unless one prompt alone has more
PIXEL_VALUES_AT_ONCE = 2**25  # preprocessed pixel values given to the vision tower at once: 128 MiB in float32
LOGITS_AT_ONCE = 80 * 2**22  # bytes, of linear_logprob's chunk on a GPU
STEP = 256  # a token budget is a multiple of this, where it is above the longest row
PHASES = ("rollout", "update")
# Settings that may be lowered to make a run fit, in the order in which they are offered, and how far.
LEAST = {"max_new_tokens": 256, "max_prompt_tokens": 512, "lora_rank": 8}
LEAST |= {"judge_tokens": 4096, "judge_max_new_tokens": 256}
BUDGETS = {"logit": "judge_tokens", "text": "judge_max_new_tokens"}  # what decides on the memory of judging


@dataclass(frozen=True)
class Demand:
    """The settings that memory depends on, by the names they have in a Config, and what torch offers.

    No rank: there is no adapter.
    """

    questions_per_step: int = 1
    group_size: int = 1
    view: str | None = None  # a question is two prompts, each of half of its responses
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 2048
    slots: int = MOST_SLOTS  # a bound: fewer where they don't fit
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = TARGETS
    update_tokens: int = MOST_TOKENS  # a bound: a micro-batch has fewer where they don't fit
    gradient_checkpointing: bool = True
    judge_mode: str = "logit"
    judge_tokens: int = 65_536
    judge_max_new_tokens: int = 1024
    judge_repeats: int = 1
    dtype: str = "bf16"
    quantize: str | None = None
    shares_heads: bool = True  # flash attention reads a key for several heads; else they are repeated (torch 2.11)

    @classmethod
    def of(cls, settings) -> "Demand":
        """Of a Config whose settings are filled in; what it lacks or leaves to the device is as on a GPU."""
        given = {f.name: getattr(settings, f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value not in (None, "auto")})

    @property
    def views(self) -> int:
        return 1 if self.view is None else 2

    @property
    def bytes_each(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def row(self) -> int:
        """Tokens of the longest row: the longest prompt and response, whose last token is no input."""
        return self.max_prompt_tokens + self.max_new_tokens - 1

    @property
    def keys_per_token(self) -> float:
        """Keys gathered for each query of a packed row: P for the prompt and P + R a response, over P + G R, for the G
        responses of one view."""
        P, R, G = self.max_prompt_tokens, self.max_new_tokens, self.group_size // self.views
        return (P + G * (P + R)) / (P + G * R)


@dataclass(frozen=True)
class Reckoned:
    """What a run needs: {phase: {part: bytes}}, of `free` bytes."""

    phases: dict[str, dict[str, int]]
    free: int
    slots: dict[str, int]  # of each phase that samples
    tokens: int  # of a micro-batch
    features: int  # bytes of the CPU's memory, where the pictures' features wait, if they fill their prompts

    @property
    def needs(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def fits(self) -> bool:
        return self.needs <= USABLE * self.free

    def __str__(self) -> str:
        told = []
        for phase, parts in self.phases.items():
            slots = self.slots.get(phase)
            counts = {
                "KV": f" ({slots} slot{'s' if slots != 1 else ''})",
                "activations": f" ({self.tokens:,} tokens)",
            }
            listed = ", ".join(f"{part} {gib(size)}{counts.get(part, '')}" for part, size in parts.items())
            told.append(f"{phase} {gib(sum(parts.values()))} ({listed})")
        host = f"pictures' features at most {gib(self.features)} GiB of the CPU's memory"
        return f"needs about {gib(self.needs)} of {gib(self.free)} GiB free: {'; '.join(told)}; {host}"


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

    slot_bytes is what one takes (see there), prompt_bytes what a resident prompt takes, kv_bytes times the longest one.
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


def adapter_bytes(parameters: int, bytes_each: int = 2, moments: bool = False, gradients: bool = False) -> int:
    """LoRA's weights in float32, Adam's two moments, gradients; on a bf16 base the bf16 copy that it computes with."""
    return parameters * (4 + 8 * moments + 4 * gradients + (2 if bytes_each == 2 else 0))


def forward_bytes(hidden: int, intermediate: int, tokens: int, bytes_each: int = 2) -> int:
    """The most that a forward pass without gradients holds at once, in the MLP: 3 I for silu(gate), up and up with
    LoRA's part of it, 5 D for the residual stream and its normed state in two types."""
    return bytes_each * tokens * (3 * intermediate + 5 * hidden)


def prefill_bytes(hidden: int, intermediate: int, longest: int, bytes_each: int = 2, deepstack: int = 0) -> int:
    """The same over the prompts that are prefilled at once, with the features of their pictures."""
    tokens = max(PREFILL_TOKENS, longest)
    return forward_bytes(hidden, intermediate, tokens, bytes_each) + bytes_each * tokens * (1 + deepstack) * hidden


def slot_bytes(kv: int, new: int, vocab: int) -> int:
    """A slot's keys and values, `kv` bytes a token but the response's last one, which is fed to nothing; its float32
    logits."""
    return kv * max(1, new - 1) + 4 * vocab


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


def saved_bytes(sizes: Sizes, demand: Demand) -> float:
    """What autograd saves of one token in one layer, for a backward pass into LoRA and the layer's input.

    Norms: their input in float32, and 1/rms. Adapted layers: their inputs, two normed states and the MLP's product,
    each saved once for all that read it, and A's outputs. Attention: queries, outputs, gathered keys and values, a
    float32 logsumexp a head. MLP: gate, silu(gate), up. Frozen weights save no inputs of their own.
    """
    b, D, inner = demand.bytes_each, sizes.hidden, sizes.intermediate
    queries, heads = sizes.heads * sizes.head_dim, sizes.heads + sizes.kv_heads
    norms = 2 * (4 * D + 4)
    if sizes.head_norms:
        norms += heads * (4 * sizes.head_dim + 4)
    layers = adapted(sizes, demand.lora_targets) if demand.lora_rank else []
    lora = b * (2 * D + inner + demand.lora_rank * len(layers) / sizes.layers) if layers else 0
    kv_heads = sizes.kv_heads if demand.shares_heads else sizes.heads
    attention = b * (2 * queries + 2 * demand.keys_per_token * kv_heads * sizes.head_dim) + 4 * sizes.heads
    return norms + lora + attention + 3 * b * inner


def update_bytes(sizes: Sizes, demand: Demand) -> tuple[float, int]:
    """Bytes of a micro-batch's activations: of each of its tokens, and whatever their number.

    With checkpointing a token's state at every layer is kept, without it what all layers save. The most is there either
    as the gradient leaves the head: 24 D for the last norm's float32 copies and what linear_logprob saves
    (kernels/logprob.py); or within a layer: what it saves when it is computed again, two gradients on their way through
    the MLP, 4 D for the state's own. Fixed is linear_logprob's chunk of logits, of which there is never more.
    """
    b, D = demand.bytes_each, sizes.hidden
    saved = saved_bytes(sizes, demand)
    kept, again = (sizes.layers * b * D, saved) if demand.gradient_checkpointing else (sizes.layers * saved, 0)
    return kept + max(24 * D, again + 2 * b * sizes.intermediate + 4 * D), LOGITS_AT_ONCE


# ------------------------------------------------------------------------------------------------ a run


def sampled(
    sizes: Sizes, demand: Demand, left: float, prompt: int, new: int, group_size: int, most: int = MOST_SLOTS
) -> tuple[int, dict[str, int]]:
    """How many slots, `most` of them, fit into `left` bytes, and what they take by part: for responses of `new` tokens
    to prompts of `prompt`."""
    b, questions, vision = demand.bytes_each, demand.questions_per_step, sizes.vision
    kv = kv_bytes(sizes, b)
    prefill = prefill_bytes(sizes.hidden, sizes.intermediate, prompt, b, vision.deepstack)
    slot = slot_bytes(kv, new, sizes.vocab)
    slots = slots_that_fit(left - prefill, slot, kv * prompt, questions, group_size, most)
    logits = 4 * slots * sizes.vocab
    cache = slots * slot - logits + resident_prompts(slots, questions, group_size) * kv * prompt
    return slots, {"KV": cache, "logits": logits, "prefill": prefill}


def reckon(sizes: Sizes, demand: Demand, free_bytes: float, phases: Sequence[str] = PHASES) -> Reckoned:
    """What a run of these phases needs, with the most slots and tokens that fit in USABLE of `free_bytes`."""
    b, P, R, G = demand.bytes_each, demand.max_prompt_tokens, demand.max_new_tokens, demand.group_size
    prompts = demand.views * demand.questions_per_step
    lora = lora_parameters(sizes, demand.lora_rank, demand.lora_targets) if demand.lora_rank else 0
    weights, trained = {"weights": weight_bytes(sizes, b, demand.quantize)}, "update" in phases
    held = weights | ({"adapter": adapter_bytes(lora, b, moments=trained)} if lora else {})
    found, slots, tokens = {"pictures": held | {"tower": tower_bytes(sizes, P, b)}}, {}, 0
    unpacked = {"one layer in full": b * max(i * o for i, o in sizes.layer.values())} if demand.quantize else {}
    held, weights = held | unpacked, weights | unpacked
    left = USABLE * free_bytes - sum(held.values())
    if "rollout" in phases:
        asked = replace(demand, questions_per_step=prompts)
        slots["rollout"], parts = sampled(sizes, asked, left, P, R, G // demand.views, demand.slots)
        found["rollout"] = held | parts
    if "judging" in phases and demand.judge_mode == "text":  # a prompt of all the responses that are judged with it
        judgements = G * demand.judge_repeats
        slots["judging"], parts = sampled(sizes, demand, left, P + G * R, demand.judge_max_new_tokens, judgements)
        found["judging"] = held | parts
    elif "judging" in phases:
        at_once = max(demand.judge_tokens, demand.row)
        found["judging"] = held | {"pass": forward_bytes(sizes.hidden, sizes.intermediate, at_once, b)}
    if trained:
        held = weights | {"adapter": adapter_bytes(lora, b, moments=True, gradients=True)}
        token, fixed = update_bytes(sizes, demand)
        room = USABLE * free_bytes - sum(held.values())
        tokens = tokens_that_fit(room, token, fixed, demand.row, demand.update_tokens)
        found["update"] = held | {"activations": int(tokens * token), "logits": fixed}
    return Reckoned(found, int(free_bytes), slots, tokens, prompts * feature_bytes(sizes, P, b))


def fits(config: dict, settings, free_bytes: float, phases: Sequence[str] = PHASES, **known) -> Reckoned:
    """What a run needs of `free_bytes`; `config` is the model's config.json, `settings` a Config that is filled in.

    `known` are fields of Demand that the settings lack, or have for something else. Raises SettingError for a run that
    does not fit with one slot and one row at a time, with the settings that would.
    """
    sizes, demand = sizes_of(config), replace(Demand.of(settings), **known)
    found = reckon(sizes, demand, free_bytes, phases)
    if found.fits:
        return found
    judging = BUDGETS[demand.judge_mode] if "judging" in phases else None
    lowered = [name for name in LEAST if getattr(settings, name, None)]
    lowered = [name for name in lowered if name not in BUDGETS.values() or name == judging]
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
    packed = replace(lean, quantize="nf4")
    ways = [[replace(demand, dtype="bf16")], [replace(demand, gradient_checkpointing=True)]]
    ways += [*(halved(demand, [name]) for name in lowered), [replace(demand, quantize="nf4")]]
    leaner, more = ([[start], *(halved(start, [name]) for name in lowered)] for start in (lean, packed))
    together, most = ([halved(start, lowered)] for start in (lean, packed))
    for several in (ways, leaner, together, more, most):
        if found := [other for way in several for other in _first(way, sizes, fitting)]:
            break
    offers = [typed(demand, other) for other in found]
    for name, of in others.items():
        if of.parameters < sizes.parameters:
            fits_with = _first([demand, replace(demand, quantize="nf4")], of, fitting)
            offers += [f"--model {name} {typed(demand, other)}".rstrip() for other in fits_with]
    return offers


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
    names = ("dtype", "gradient_checkpointing", "quantize", *LEAST)
    changed = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(demand, name)}
    dropped = " (longer prompts are left out)" if "max_prompt_tokens" in changed else ""
    return " ".join(f"{flag(name)} {value}" for name, value in changed.items()) + dropped
