"""Seconds of one training step on one GPU, by part, from products, bytes moved and kernels launched.

    seconds(sizes, CARDS["h100"], Work(questions=512, group_size=10, ...), slots=256)

Weights are in bf16, or in 4 bits and made bf16 for every pass. Rates are shares of a card's data sheet, the same for
every card, so figures are good to perhaps a third. Parts add up: within a CUDA graph one kernel runs after the other.
"""

from dataclasses import dataclass

from upt.model import TARGETS
from upt.reckoning.memory import MOST_TOKENS, PREFILL_TOKENS, resident_prompts
from upt.reckoning.sizes import Sizes, adapted, kv_bytes, lora_parameters, weight_bytes


@dataclass(frozen=True)
class Card:
    """By its maker's data sheet: GiB of memory, dense bf16 TFLOP/s without sparsity, TB/s of memory bandwidth."""

    memory: int
    tflops: float
    bandwidth: float


CARDS = {
    "l4": Card(24, 121, 0.30),
    "rtx4090": Card(24, 165, 1.01),
    "a6000": Card(48, 155, 0.77),
    "l40s": Card(48, 362, 0.86),
    "a100": Card(80, 312, 2.04),
    "h100": Card(80, 989, 3.35),  # SXM
    "h200": Card(141, 989, 4.80),
}
CONTEXT = 1.5  # GiB of a card that CUDA's context, the driver and error correction take
# Shares of the data sheet that are reached: assumptions, until `bench.fullsize` has run on a GPU. Of products 550 of an
# H100's 989 TFLOP/s. Of attention a little less than the 35 % that FlashAttention-2 reaches there by the abstract of
# arXiv 2407.08608. Of copies four fifths of the bandwidth.
PRODUCTS, ATTENTION, COPIES = 550 / 989, 0.30, 0.80
# Kernels of a decoding step, counted on Slots.eager_step of Qwen2.5-VL: of a layer 39 and its attention's four; of an
# adapter two products and the copy that torch.addmm begins with.
LAUNCHES, LAUNCHES_PER_LAYER, LAUNCHES_PER_ADAPTER = 63, 43, 3
LAUNCHES_PER_DEQUANTISED = 3  # of a 4-bit matrix: its scales, their offset, the weights
GAP = 2.5e-6  # seconds between two kernels of a CUDA graph, from the end of one to the full speed of the next; assumed
BYTES = 2  # of a bf16 number
SAMPLING_PASSES = 20  # over a row of logits: the search for the nucleus, the statistics, the draw


@dataclass(frozen=True)
class Work:
    """One step: what is sampled, in mean and longest tokens, and how it is trained on."""

    questions: int = 512
    group_size: int = 10
    prompt_tokens: int = 1000  # of the mean prompt, its picture included
    image_tokens: int = 960  # of these the picture's
    response_tokens: int = 600  # of the mean response
    max_new_tokens: int = 2048  # of the longest
    minibatches: int = 4
    reference: bool = True  # whether a KL term needs the reference's log-probabilities
    checkpointing: bool = True
    lora_rank: int = 64
    lora_targets: tuple[str, ...] = TARGETS
    quantize: str | None = None
    update_tokens: int = MOST_TOKENS  # of a micro-batch

    @property
    def responses(self) -> int:
        return self.questions * self.group_size

    @property
    def trained_tokens(self) -> int:
        """Tokens of all packed rows, each prompt once: questions (P + G R)."""
        return self.questions * (self.prompt_tokens + self.group_size * self.response_tokens)

    @property
    def forwards(self) -> tuple[float, float]:
        """Passes over the rows without a backward pass, and passes through layers that lead to one.

        Without: old log-probabilities for all minibatches but the first, and the reference. With: the forward pass and
        its recomputation. A backward pass through frozen weights, for activations only, costs one forward pass more.
        """
        before = 1 - 1 / self.minibatches + (1 if self.reference else 0)
        return before, 1 + (1 if self.checkpointing else 0)

    @property
    def equivalents(self) -> float:
        """All of it in forward passes: 0.75 + 1 + 2 + 1 = 4.75 with four minibatches, a KL term and checkpointing."""
        return sum(self.forwards) + 1


def pairs(queries: float, keys: float) -> float:
    """Query-key pairs of causal attention over `queries` tokens behind `keys` others."""
    return queries * (keys + queries / 2)


def dequantising(sizes: Sizes, card: Card, work: Work, passes: float) -> float:
    """Seconds in which `passes` through the layers read 4-bit weights and write them in bf16, from where they are used
    as others are; 0 where the weights are in bf16."""
    moved = weight_bytes(sizes, BYTES, work.quantize) - weight_bytes(sizes, BYTES) + 2 * BYTES * sizes.matrices
    return passes * moved / (card.bandwidth * 1e12 * COPIES) if work.quantize else 0.0


# ------------------------------------------------------------------------------------------------ rollout


def tower_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """2 FLOP a parameter and patch, and attention: 4 W a pair of patches, in windows but for the `full` layers."""
    vision = sizes.vision
    patches = work.image_tokens * vision.merge
    seen = vision.full * patches + (vision.depth - vision.full) * min(patches, vision.window or patches)
    products = 2 * vision.parameters * patches / PRODUCTS
    attention = 4 * vision.width * patches * seen / ATTENTION
    return work.questions * (products + attention) / (card.tflops * 1e12)


def prefill_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """Each prompt once: 2 FLOP a parameter and token, and 4 H d a pair of tokens in each layer."""
    products = 2 * sizes.matrices * work.prompt_tokens / PRODUCTS
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * pairs(work.prompt_tokens, 0) / ATTENTION
    passes = work.questions * work.prompt_tokens / PREFILL_TOKENS
    return work.questions * (products + attention) / (card.tflops * 1e12) + dequantising(sizes, card, work, passes)


def decoding_steps(work: Work, slots: int) -> float:
    """Steps until a queue is empty: all tokens over the slots, and the tail of a longest response that came last."""
    tail = max(0, work.max_new_tokens - work.response_tokens)
    return work.responses * work.response_tokens / slots + tail


def decoding_step(sizes: Sizes, card: Card, work: Work, slots: int) -> dict[str, float]:
    """Seconds of one decoding step by part, all slots taken: gaps between kernels, weights, KV and logits.

    Weights are read, or multiplied by the slots' tokens, whichever takes longer. A prompt's keys are read once for all
    slots of its group; a response in a slot is half as long as it will be, on average over tokens.
    """
    rate, copies = card.tflops * 1e12 * PRODUCTS, card.bandwidth * 1e12 * COPIES
    lora = lora_parameters(sizes, work.lora_rank, work.lora_targets) if work.lora_rank else 0
    layers = len(adapted(sizes, work.lora_targets)) if lora else 0
    kernels = LAUNCHES + LAUNCHES_PER_LAYER * sizes.layers + LAUNCHES_PER_ADAPTER * layers
    kernels += LAUNCHES_PER_DEQUANTISED * sizes.layers * len(sizes.layer) if work.quantize else 0
    read = sizes.matrices + lora + sizes.head
    prompts = min(resident_prompts(slots, work.questions, work.group_size), slots) * work.prompt_tokens
    kv = kv_bytes(sizes, BYTES) * (prompts + slots * work.response_tokens / 2)
    return {
        "gaps between kernels": kernels * GAP,
        **({"dequantising": dequantising(sizes, card, work, 1)} if work.quantize else {}),
        "reading weights": BYTES * read / copies,
        "products": 2 * read * slots / rate,
        "reading KV": kv / copies,
        "sampling": SAMPLING_PASSES * slots * sizes.vocab * BYTES / copies,
    }


def decoding_seconds(sizes: Sizes, card: Card, work: Work, slots: int) -> float:
    parts = decoding_step(sizes, card, work, slots)
    weights = max(parts.pop("reading weights"), parts.pop("products"))
    return decoding_steps(work, slots) * (weights + sum(parts.values()))


# ------------------------------------------------------------------------------------------------ update


def products_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """The frozen layers: 2 FLOP a parameter, token and forward equivalent."""
    return 2 * sizes.matrices * work.trained_tokens * work.equivalents / (card.tflops * 1e12 * PRODUCTS)


def attention_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """4 H d FLOP a pair and layer; a backward pass makes five products where a forward pass makes two."""
    P, R, G = work.prompt_tokens, work.response_tokens, work.group_size
    seen = work.questions * (pairs(P, 0) + G * pairs(R, P))
    passes = sum(work.forwards) + 2.5
    return 4 * sizes.layers * sizes.heads * sizes.head_dim * seen * passes / (card.tflops * 1e12 * ATTENTION)


def adapter_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """LoRA's products beside the frozen layers' own, in bf16: multiplied or moved, whichever takes longer.

    A forward pass reads each adapted layer's input, copies its output, and reads and writes that where the product is
    added: 2 bytes x (i + 4 o). A backward pass reads the output's gradient for A's and for B's, reads the input, and
    writes and adds the input's gradient: 2 x (5 i + 2 o), with twice the products. The reference goes without.
    """
    if not work.lora_rank:
        return 0.0
    layers = adapted(sizes, work.lora_targets)
    passes = sum(work.forwards) - (1 if work.reference else 0)
    products = 2 * lora_parameters(sizes, work.lora_rank, work.lora_targets) * (passes + 2)
    moved = BYTES * sum(passes * (i + 4 * o) + 5 * i + 2 * o for i, o in layers)
    return work.trained_tokens * max(
        products / (card.tflops * 1e12 * PRODUCTS), moved / (card.bandwidth * 1e12 * COPIES)
    )


def elementwise_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """Norms, rotation, activation and sums, each of which reads and writes memory.

    Bytes a token and layer: two norms in float32 of 34 D each, two sums of 6 D, rotation of 20 (H + K) d, the
    activation and its product 10 I. A backward pass moves twice as much.
    """
    heads = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    moved = 80 * sizes.hidden + 20 * heads + 10 * sizes.intermediate
    passes = sum(work.forwards) + 2
    return work.trained_tokens * sizes.layers * passes * moved / (card.bandwidth * 1e12 * COPIES)


def head_seconds(sizes: Sizes, card: Card, work: Work) -> float:
    """linear_logprob: 2 V D FLOP a response token and pass, and as many for the gradient that the last one forms."""
    before, _ = work.forwards
    flops = 2 * sizes.head * work.responses * work.response_tokens * (before + 2)
    return flops / (card.tflops * 1e12 * PRODUCTS)


# ------------------------------------------------------------------------------------------------ a step


def seconds(sizes: Sizes, card: Card, work: Work, slots: int) -> dict[str, dict[str, float]]:
    """{"rollout": {part: seconds}, "update": {part: seconds}} of one step."""
    passes = work.trained_tokens / work.update_tokens * work.equivalents
    return {
        "rollout": {
            "vision tower": tower_seconds(sizes, card, work),
            "prefill": prefill_seconds(sizes, card, work),
            "decoding": decoding_seconds(sizes, card, work, slots),
        },
        "update": {
            "frozen layers": products_seconds(sizes, card, work),
            **({"dequantising": dequantising(sizes, card, work, passes)} if work.quantize else {}),
            "attention": attention_seconds(sizes, card, work),
            "LoRA": adapter_seconds(sizes, card, work),
            "norms and sums": elementwise_seconds(sizes, card, work),
            "head": head_seconds(sizes, card, work),
        },
    }
