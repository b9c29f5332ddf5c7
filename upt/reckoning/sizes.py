"""The sizes of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, from its config.json as a dict: no weight is read or made.

    sizes = sizes_of(json.loads(Path("config.json").read_text()))
    weight_bytes(sizes), weight_bytes(sizes, quantize="nf4")       # of bf16, of 4 bits
    kv_bytes(sizes), lora_parameters(sizes, 64)

Symbols: D hidden size, H and K query and KV heads of d, I the MLP's width, V the vocabulary, r the adapter's rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from upt.errors import PolicyError
from upt.model import TARGETS

# What the families' configurations leave out where it is the usual.
VISION = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "patch_size": 14, "depth": 32}
VISIONS = {
    "qwen2_vl": VISION | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584},
    "qwen2_5_vl": VISION | {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112},
    "qwen3_vl": VISION | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}


@dataclass(frozen=True)
class Vision:
    """The vision tower: it takes patches of a picture and gives one token of the language model for `merge` of them."""

    parameters: int
    width: int
    depth: int
    intermediate: int
    full: int  # layers in which a patch sees its whole picture, and not only a window of it
    window: int  # patches in a window; 0: there are none
    merge: int
    patch_values: int  # of a patch, as preprocessed: colours x pictures in time x area
    deepstack: int  # feature layers besides the last


@dataclass(frozen=True)
class Sizes:
    """What memory and time depend on. `layer` has the linear layers of one layer by name, (in, out) each."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    head_norms: bool  # Qwen3's RMSNorm of each head's queries and keys
    layer: dict[str, tuple[int, int]]
    biases: int  # bias parameters of one layer
    vision: Vision

    @property
    def matrices(self) -> int:
        """Parameters that a token is multiplied by in all layers, the head apart."""
        return self.layers * sum(i * o for i, o in self.layer.values())

    @property
    def head(self) -> int:
        """Parameters of the LM head, V D; where it is tied they are the embeddings'."""
        return self.vocab * self.hidden

    @property
    def language(self) -> int:
        """Parameters of the language model: embeddings, layers with two norms each, the last norm, an untied head."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        inner = self.matrices + self.layers * (self.biases + norms) + self.hidden
        return inner + self.head * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.language + self.vision.parameters


def sizes_of(config: dict) -> Sizes:
    """The sizes that a config.json speaks of. Raises PolicyError for another family or one that lacks a size."""
    family = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if family not in VISIONS:
        raise PolicyError(f"a {family} model cannot be reckoned; give a config.json of one of {', '.join(VISIONS)}")
    text = config.get("text_config") or config  # older files have the language model's settings at the top
    try:
        return _sizes(family, text, config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise PolicyError(
            f"a config.json of {family} without usable sizes ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _sizes(family: str, text: dict, config: dict) -> Sizes:
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    newer = family == "qwen3_vl"
    head_dim = text.get("head_dim", 128) if newer else hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    biases = (queries + 2 * keys + hidden) * bool(text.get("attention_bias")) if newer else queries + 2 * keys
    return Sizes(
        layers=text["num_hidden_layers"],
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        head_norms=newer,
        layer=layer,
        biases=biases,
        vision=_vision(family, VISIONS[family] | config["vision_config"]),
    )


def _vision(family: str, c: dict) -> Vision:
    """Patch embedding, blocks of attention and MLP, mergers: after transformers' modeling files of the families."""
    older = family == "qwen2_vl"
    width = c["embed_dim"] if older else c["hidden_size"]
    inner = int(width * c["mlp_ratio"]) if older else c["intermediate_size"]
    out = c["hidden_size"] if older else c["out_hidden_size"]
    values = c["in_channels"] * c["temporal_patch_size"] * c["patch_size"] ** 2
    merge, gated = c["spatial_merge_size"] ** 2, family == "qwen2_5_vl"
    norm = width if gated else 2 * width  # RMSNorm has a weight, LayerNorm a bias besides
    attention = 4 * width * width + 4 * width
    mlp = 3 * width * inner + 2 * inner + width if gated else 2 * width * inner + inner + width
    wide = merge * width
    merger = wide * wide + wide + wide * out + out
    count = values * width + c["depth"] * (2 * norm + attention + mlp) + norm + merger
    deepstack = len(c["deepstack_visual_indexes"]) if family == "qwen3_vl" else 0
    if family == "qwen3_vl":
        count += width + c["num_position_embeddings"] * width + deepstack * (2 * wide + merger)
    return Vision(
        parameters=count,
        width=width,
        depth=c["depth"],
        intermediate=inner,
        full=len(c["fullatt_block_indexes"]) if gated else c["depth"],
        window=(c["window_size"] // c["patch_size"]) ** 2 if gated else 0,
        merge=merge,
        patch_values=values,
        deepstack=deepstack,
    )


def weight_bytes(sizes: Sizes, bytes_each: int = 2, quantize: str | None = None) -> int:
    """Bytes of all weights. With `nf4` a number of the layers' matrices takes half a byte, each 64 of them a byte of
    scale, and 256 such scales a float32 of their own (double quantisation)."""
    packed = sizes.matrices if quantize else 0
    return bytes_each * (sizes.parameters - packed) + packed // 2 + packed // 64 + packed // 64 // 256 * 4


def adapted(sizes: Sizes, targets: Sequence[str] = TARGETS) -> list[tuple[int, int]]:
    """(in, out) of every linear layer whose name ends in one of `targets`, as PEFT takes them: of those with LoRA."""
    names = {f"layers.{i}.{name}": shape for i in range(sizes.layers) for name, shape in sizes.layer.items()}
    return [shape for name, shape in names.items() if any(f".{name}".endswith(f".{target}") for target in targets)]


def lora_parameters(sizes: Sizes, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """A (r, in) and B (out, r) of every adapted layer: r (in + out)."""
    return rank * sum(i + o for i, o in adapted(sizes, targets))


def kv_bytes(sizes: Sizes, bytes_each: int = 2) -> int:
    """Bytes of one token in the KV cache: a key and a value of K d numbers in every layer."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * bytes_each


def feature_bytes(sizes: Sizes, places: int, bytes_each: int = 2) -> int:
    """Bytes of a picture's features: D numbers for each token of it, and as many for each deepstack layer."""
    return (1 + sizes.vision.deepstack) * places * sizes.hidden * bytes_each
