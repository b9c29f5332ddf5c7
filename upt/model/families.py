"""What differs between families of vision-language models, behind one small interface.

`Family` says what the rest of the code asks of a family; `Qwen` answers for Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Another
family is one more class and its row in FAMILIES. A family is expected to be a transformers model with
`model.language_model` and `lm_head`, whose images become embeddings in place of one placeholder token, repeated.
What `Family` answers itself holds for a plain language model, which counts its tokens on one axis.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from upt.errors import PolicyError
from upt.model import attention


@dataclass
class Features:
    """What the vision tower makes of one image: embeddings (n, D) and, for Qwen3-VL, one (n, D) per deepstack layer.

    They lie in the CPU's memory, pinned if there is a GPU, and go to the model's device for the passes that need them.
    """

    places: int  # n, placeholder tokens that the image takes in a prompt
    grid: tuple[int, ...] = ()  # what the family's positions depend on
    embeds: torch.Tensor | None = None
    deepstack: tuple[torch.Tensor, ...] = ()

    def to_host(self) -> None:
        """Bring them there; on a CPU they are there."""
        self.embeds, *deepstack = (_on_host(seen) for seen in (self.embeds, *self.deepstack))
        self.deepstack = tuple(deepstack)


def _on_host(seen: torch.Tensor) -> torch.Tensor:
    return torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True).copy_(seen) if seen.is_cuda else seen


def joined(seen: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Several images' (n, D) as one tensor of the device and type of `like`; the host does not wait for it."""
    return torch.cat([of.to(like.device, non_blocking=True) for of in seen]).to(like.dtype)


class Family(ABC):
    """One family; `model` is always the transformers model, with the LoRA layers in it if there are any."""

    adapter_layers = r".*language_model\.layers\..*"  # modules that may get an adapter, before the target's name

    @staticmethod
    def check(config, name: str) -> None:
        """Raise PolicyError for a configuration that the packed forward pass does not serve."""
        if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
            raise PolicyError(f"{name} uses sliding-window attention, which packed rows do not support")

    @classmethod
    def may_adapt(cls, layer: str) -> bool:
        """Whether a module, by its whole name, is one of those that may get an adapter."""
        return re.fullmatch(rf"{cls.adapter_layers}\..+", layer) is not None

    @classmethod
    def targeted(cls, targets: Sequence[str]) -> str:
        """The pattern of the whole names of such modules that end in one of `targets`, the last parts of a name."""
        return rf"(?={cls.adapter_layers}\.)(.*\.)?({'|'.join(map(re.escape, targets))})"

    @abstractmethod
    def __init__(self, name: str, min_pixels: int | None, max_pixels: int | None):
        """Load the image processor of a snapshot or hub id into `self.image_processor`; None keeps its own limits."""

    def install(self, model) -> None:
        """Have the model's layers compute their attention in attention.py."""
        attention.install(model)

    @abstractmethod
    def area_limits(self) -> dict[str, int]:
        """`min_pixels` and `max_pixels`, between which an image's area lies after resizing."""

    def image_token(self, config) -> int:
        """The id of the placeholder token."""
        return config.image_token_id

    def never_sampled(self, config) -> list[int]:
        """Ids of tokens that announce or hold an image; a response can't contain them."""
        return [self.image_token(config)]

    @abstractmethod
    def look(self, image: Image.Image) -> tuple[Features, torch.Tensor]:
        """Features without embeddings yet, and the pixels that `encode` takes."""

    @abstractmethod
    def encode(self, model, pixels: Sequence[torch.Tensor], features: Sequence[Features]) -> None:
        """Run the vision tower over several images and fill in their embeddings, wherever it leaves them."""

    def positions(self, model, length: int, at: int, features: Features | None) -> torch.Tensor:
        """Positions (axes, length) of a prompt whose image, if any, starts at token `at`; they depend on nothing else.

        A response goes on from the largest position, the same on every axis.
        """
        return torch.arange(length)[None]

    def embeds(self, model, ids, features: Sequence[Features]) -> torch.Tensor:
        """Embeddings (B, L, D) of ids (B, L), `features` in place of the placeholders, in order of the rows."""
        embeds = model.get_input_embeddings()(ids)
        if features:
            where = ids == self.image_token(model.config)  # (B, L)
            embeds = embeds.masked_scatter(where[..., None], joined([f.embeds for f in features], embeds))
        return embeds

    def hidden(self, model, ids, positions, layout, mask, features: Sequence[Features], cache, **extra) -> torch.Tensor:
        """Last hidden states (B, L, D) of ids (B, L) at positions (axes, B, L), with the attention of `layout`.

        Without a layout, mask (B, 1, L, K) is true where a query may look. `features`, in order of the rows, replace
        the placeholders in `ids`; empty where there are none. `extra` is what a family's language model takes besides.
        """
        if layout is not None:
            mask = ids.new_zeros(1, 1, 1, 1)  # for none: transformers makes one unless there is one of four axes
        return model.model.language_model(
            inputs_embeds=self.embeds(model, ids, features),
            attention_mask=mask,
            position_ids=positions if len(positions) > 1 else positions[0],
            past_key_values=cache,
            use_cache=cache is not None,
            layout=layout,
            **extra,
        ).last_hidden_state


class Qwen(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions on three axes (M-RoPE), and deepstack layers in the last."""

    def __init__(self, name: str, min_pixels: int | None = None, max_pixels: int | None = None):
        # The families share this processor. Its PIL form is there with and without torchvision and gives the same
        # pixels in both cases; the automatic classes ask for torchvision in some versions.
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}  # of areas, though the names speak of edges
        size = dict(self.image_processor.size) | {name: limit for name, limit in limits.items() if limit is not None}
        self.image_processor.size = type(self.image_processor.size)(**size)

    def install(self, model) -> None:
        super().install(model)
        attention.install_windows(model.model.visual)

    def area_limits(self) -> dict[str, int]:
        size = self.image_processor.size
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    def never_sampled(self, config) -> list[int]:
        names = ("image", "video", "vision_start", "vision_end")
        ids = [getattr(config, f"{name}_token_id", None) for name in names]
        return [token for token in ids if token is not None]

    def look(self, image: Image.Image) -> tuple[Features, torch.Tensor]:
        seen = self.image_processor(images=[image], return_tensors="pt")
        grid = tuple(seen["image_grid_thw"][0].tolist())  # patches in time, height, width
        places = grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
        return Features(places, grid), seen["pixel_values"]

    def encode(self, model, pixels: Sequence[torch.Tensor], features: Sequence[Features]) -> None:
        visual = model.model.visual
        grids = torch.tensor([f.grid for f in features])
        values = torch.cat([*pixels]).to(model.device, visual.dtype)
        seen = visual(values, grid_thw=grids.to(model.device), return_dict=True)
        sizes = [f.places for f in features]
        embeds = seen.pooler_output.split(sizes)
        layers = [layer.split(sizes) for layer in getattr(seen, "deepstack_features", None) or ()]
        for i, of in enumerate(features):
            of.embeds, of.deepstack = embeds[i], tuple(layer[i] for layer in layers)

    def positions(self, model, length: int, at: int, features: Features | None) -> torch.Tensor:
        if features is None:
            return torch.arange(length).expand(3, -1)
        kinds = torch.zeros(1, length, dtype=torch.long)
        kinds[0, at : at + features.places] = 1
        ids, grid = kinds * self.image_token(model.config), torch.tensor([features.grid])
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        return positions[:, 0]

    def hidden(self, model, ids, positions, layout, mask, features: Sequence[Features], cache) -> torch.Tensor:
        extra = {}
        if features and features[0].deepstack:
            layers = zip(*(f.deepstack for f in features), strict=True)
            deepstack = [joined(layer, model.get_input_embeddings().weight) for layer in layers]
            extra = {"visual_pos_masks": ids == self.image_token(model.config), "deepstack_visual_embeds": deepstack}
        return super().hidden(model, ids, positions, layout, mask, features, cache, **extra)


FAMILIES: dict[str, type[Family]] = {"qwen2_vl": Qwen, "qwen2_5_vl": Qwen, "qwen3_vl": Qwen}  # by model_type
