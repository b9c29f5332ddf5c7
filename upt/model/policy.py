"""The policy: a Qwen vision-language model with a LoRA adapter, and the packed forward pass over groups.

One set of weights serves every role. The policy is the model with its adapter on; the reference is the same model with
the adapter off (`with policy.reference():`). The vision tower, the embeddings and the head are frozen, so an image is
encoded once and its features are shared by sampling and by every later pass over its question.

A group, a question with its G responses, is one row `[prompt | y_1 | ... | y_G]`: each response sees the prompt and
itself, has the positions it would have on its own, and the prompt is computed once instead of G times. A row longer
than the token budget is split into rows that each repeat the prompt.

    policy = Policy.load("models/tiny")
    policy.add_lora(rank=16, alpha=32)
    prompts, dropped = policy.encode(questions, policy.template("think-boxed"))
    for batch in pack(prompts, responses, budget=16384):
        logprob, entropy = policy.logprobs(batch)
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kernels import linear_logprob

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = Path(__file__).parent / "prompts"
PIXEL_VALUES_AT_ONCE = 2**25  # preprocessed pixel values given to the vision tower at once: 128 MiB in float32


class PolicyError(ValueError):
    """A model, adapter or prompt that cannot be used; the message says what to do."""


@dataclass
class Features:
    """What the vision tower makes of one image: embeddings (n, D) and, for Qwen3-VL, one (n, D) per deepstack layer."""

    grid: torch.Tensor  # (1, 3): patches in time, height, width
    embeds: torch.Tensor | None = None
    deepstack: tuple[torch.Tensor, ...] = ()


@dataclass
class Prompt:
    """An encoded question: token ids with the image's placeholders expanded, M-RoPE positions, image features."""

    uid: str
    ids: list[int]  # P tokens
    positions: torch.Tensor  # (3, P)
    features: Features | None


@dataclass
class Row:
    """A prompt and some of its responses; `owners` are their numbers (group, response)."""

    prompt: Prompt
    responses: list[list[int]]
    owners: list[tuple[int, int]]

    def __len__(self) -> int:
        # The last token of a response predicts nothing, so it is not an input.
        return len(self.prompt.ids) + sum(len(response) - 1 for response in self.responses)


def pack(prompts: Sequence[Prompt], responses: Sequence[Sequence[list[int]]], budget: int) -> Iterator[list[Row]]:
    """Micro-batches of rows, each batch of at most `budget` tokens with its padding, longest rows first.

    responses[g][i] are the token ids of response i to prompt g. A response that alone is over the budget gets a row
    and a batch of its own. Empty responses have no log-probability and are left out.
    """
    rows = []
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        row = None
        for i, response in enumerate(group):
            if not response:
                continue
            if row is None or len(row) + len(response) - 1 > budget:
                row = Row(prompt, [], [])
                rows.append(row)
            row.responses.append(list(response))
            row.owners.append((g, i))
    rows.sort(key=len, reverse=True)
    batch: list[Row] = []
    for row in rows:
        if batch and len(batch[0]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Policy:
    """A model with its processor and adapter. Build it with `Policy.load`."""

    def __init__(self, model, tokenizer, image_processor, min_pixels=None, max_pixels=None, cache_bytes=0):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.pixel_limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.cache_bytes, self.cache = cache_bytes, OrderedDict()
        self.positions = lru_cache(maxsize=256)(self._positions)
        self.model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        name: str,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
        gradient_checkpointing: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        feature_cache_gib: float = 0,
    ) -> "Policy":
        """Load a Qwen2-VL, Qwen2.5-VL or Qwen3-VL snapshot folder or hub id.

        adapter: a PEFT adapter that is merged into the weights, so that it is part of the starting model.
        dtype: `bf16`, `fp32` or `auto` (bf16 on a GPU, fp32 on a CPU). gradient_checkpointing: None turns it on on a
        GPU. min_pixels, max_pixels: image area after resizing, None keeps the snapshot's. feature_cache_gib: copies of
        image features kept beyond the call that made them, for small sets. It costs bit-exact resuming: an image's
        features depend in their last bits on the batch they were computed in.
        Raises PolicyError for a folder or id that is not there or is not of these families.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_gpu = torch.device(device).type == "cuda"
        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": torch.bfloat16 if on_gpu else torch.float32}
        if dtype not in dtypes:
            raise PolicyError(f"dtype must be one of {', '.join(dtypes)}, not {dtype!r}")
        config = model_config(name)
        model = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtypes[dtype], attn_implementation=attention
        ).to(device)
        if adapter is not None:
            model = _open_adapter(model, adapter).merge_and_unload()
        if on_gpu if gradient_checkpointing is None else gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:
            raise PolicyError(f"{name} has no chat template: use an instruction-tuned model")
        # The families share this processor. Its PIL form is there with and without torchvision and gives the same
        # pixels in both cases; the automatic classes ask for torchvision in some versions.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        return cls(model, tokenizer, image_processor, min_pixels, max_pixels, int(feature_cache_gib * 2**30))

    # ------------------------------------------------------------------------------------------------ the adapter

    @property
    def base(self):
        """The transformers model, with the LoRA layers in it if there are any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.base.device

    def add_lora(self, rank: int = 16, alpha: int = 32, targets: Sequence[str] = TARGETS, seed: int = 0) -> None:
        """Put a fresh, trainable LoRA adapter on the language model's linear layers named in `targets`."""
        pattern = rf".*language_model\.layers\..*\.({'|'.join(targets)})"
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config)

    def load_adapter(self, folder: str | Path) -> None:
        """Open a saved adapter, trainable and not merged, with the weights exactly as they were saved.

        It takes the place of the adapter that is there.
        """
        bare = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self.model = _open_adapter(bare, folder, is_trainable=True)

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The starting model: the adapter is off inside the block, and no gradient is kept."""
        with torch.no_grad():
            if not isinstance(self.model, PeftModel):
                yield
                return
            with self.model.disable_adapter():
                yield

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's layout; `PeftModel.from_pretrained(model, folder)` opens it."""
        if not isinstance(self.model, PeftModel):
            raise PolicyError("there is no adapter to save: call add_lora or load_adapter first")
        self.model.save_pretrained(folder)

    def export(self, folder: str | Path) -> None:
        """Merge the adapter into the weights, for good, and write a full snapshot with its processor."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    # ------------------------------------------------------------------------------------------------- the prompts

    @staticmethod
    def template(name: str) -> str:
        """The text of a prompt template: one from prompts/ by name, or a file. `{question}` stands for the question."""
        path = PROMPTS / f"{name}.md"
        path = path if path.is_file() else Path(name)
        if not path.is_file():
            others = ("judge", "ask-", "extract")  # prompts that are not put around a question
            known = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.md") if not p.stem.startswith(others)))
            raise PolicyError(f"no prompt {name!r}: give one of {known}, or the path of a file with {{question}} in it")
        text = path.read_text(encoding="utf-8").strip()
        if "{question}" not in text:
            raise PolicyError(f"{path} has no {{question}}: put it where the question is to stand")
        if "{response}" in text:
            raise PolicyError(f"{path} is a judge's prompt: give it as --judge-prompt")
        return text

    @torch.no_grad()
    def encode(self, questions: Iterable, template: str, max_tokens: int | None = None) -> tuple[list, dict[str, int]]:
        """Questions to prompts with their image features; (prompts, {uid: tokens} of those over max_tokens)."""
        prompts, dropped = [], {}
        pending, pending_size = [], 0
        for question in questions:
            prompt, pixels, key = self.encode_one(question, template)
            if max_tokens is not None and len(prompt.ids) > max_tokens:
                dropped[question.uid] = len(prompt.ids)
                continue
            prompts.append(prompt)
            if pixels is not None:
                pending.append((prompt, pixels, key))
                pending_size += pixels.numel()
                if pending_size > PIXEL_VALUES_AT_ONCE:
                    self.see(pending)
                    pending, pending_size = [], 0
        if pending:
            self.see(pending)
        return prompts, dropped

    def plain(self, text: str) -> str:
        """Text that cannot open a turn or announce an image: without special tokens, even within one another."""
        found = None
        while found != text:
            found = text
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text

    def ask(self, question) -> str:
        """A question's text with its options."""
        options = "".join(f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices or ()))
        return self.plain(question.question + options)

    def chat(self, turns: Sequence[tuple[str, str]], with_image: bool) -> str:
        """(role, text) turns as the model's chat template writes them, up to where its answer starts.

        The image, if there is one, opens the first turn.
        """
        content = [[{"type": "text", "text": text}] for _, text in turns]
        if with_image:
            content[0].insert(0, {"type": "image"})
        chat = [{"role": role, "content": parts} for (role, _), parts in zip(turns, content, strict=True)]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, question, template: str) -> list[int]:
        """The token ids of a question's prompt, with one placeholder for its image."""
        text = template.replace("{question}", self.ask(question))
        return self.tokens(self.chat([("user", text)], question.image is not None))

    def encode_one(self, question, template: str) -> tuple[Prompt, torch.Tensor | None, bytes | None]:
        """One prompt, its preprocessed pixels (None: no image, or its features are kept) and the image's cache key.

        The key is None where no features are kept.
        """
        ids, image = self.tokenize(question, template), question.image
        if image is None:
            return self.place(question.uid, ids, None), None, None
        key = None
        if self.cache_bytes:
            key = blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        features, pixels = self.cache.get(key), None
        if features is None:
            seen = self.image_processor(images=[image], return_tensors="pt", **self.pixel_limits)
            features, pixels = Features(seen["image_grid_thw"]), seen["pixel_values"]
        else:
            self.cache.move_to_end(key)
        return self.place(question.uid, ids, features), pixels, key

    def place(self, uid: str, ids: list[int], features: Features | None) -> Prompt:
        """A prompt from token ids whose one image placeholder, if any, is widened to the image's features."""
        if features is None:
            return Prompt(uid, ids, torch.arange(len(ids)).expand(3, -1), None)
        image_id = self.base.config.image_token_id
        at = ids.index(image_id)
        count = int(features.grid.prod()) // self.image_processor.merge_size**2
        ids = ids[:at] + [image_id] * count + ids[at + 1 :]
        return Prompt(uid, ids, self.positions(len(ids), at, tuple(features.grid[0].tolist())), features)

    def _positions(self, length: int, at: int, grid: tuple[int, int, int]) -> torch.Tensor:
        """M-RoPE positions (3, length) of a prompt whose image starts at token `at`; they depend on nothing else."""
        count = grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
        kinds = torch.zeros(1, length, dtype=torch.long)
        kinds[0, at : at + count] = 1
        ids = kinds * self.base.config.image_token_id
        positions, _ = self.base.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=torch.tensor([grid]))
        return positions[:, 0]

    def see(self, pending: list[tuple[Prompt, torch.Tensor, bytes | None]]) -> None:
        """Run the vision tower over several images and give each prompt its features."""
        visual = self.base.model.visual
        pixels = torch.cat([pixels for _, pixels, _ in pending]).to(self.device, visual.dtype)
        grids = torch.cat([prompt.features.grid for prompt, _, _ in pending])
        seen = visual(pixels, grid_thw=grids.to(self.device), return_dict=True)
        sizes = (grids.prod(-1) // visual.spatial_merge_size**2).tolist()
        embeds = seen.pooler_output.split(sizes)
        layers = [layer.split(sizes) for layer in getattr(seen, "deepstack_features", None) or ()]
        for i, (prompt, _, key) in enumerate(pending):
            prompt.features.embeds = embeds[i]
            prompt.features.deepstack = tuple(layer[i] for layer in layers)
            if self.cache_bytes:
                self.cache[key] = Features(
                    prompt.features.grid, embeds[i].clone(), tuple(layer[i].clone() for layer in layers)
                )
        size = sum((1 + len(f.deepstack)) * f.embeds.nbytes for f in self.cache.values())
        while size > self.cache_bytes:
            _, old = self.cache.popitem(last=False)
            size -= (1 + len(old.deepstack)) * old.embeds.nbytes

    # ------------------------------------------------------------------------------------------------- the forward

    def hidden(self, ids, positions, mask, prompts: Sequence[Prompt] = (), cache=None) -> torch.Tensor:
        """Last hidden states (B, L, D) of token ids (B, L) at positions (3, B, L).

        mask (B, 1, L, K) is true where a query may look. `prompts`, one for each row, give the image features that
        replace the placeholders in `ids`; leave them out where there is no image in this part of the sequence.
        """
        embeds = self.base.get_input_embeddings()(ids)
        seen = [prompt.features for prompt in prompts if prompt.features is not None]
        extra = {}
        if seen:
            where = ids == self.base.config.image_token_id  # (B, L)
            features = torch.cat([f.embeds for f in seen]).to(embeds)
            embeds = embeds.masked_scatter(where[..., None], features)
            if seen[0].deepstack:
                deepstack = [torch.cat(layer).to(embeds) for layer in zip(*(f.deepstack for f in seen), strict=True)]
                extra = {"visual_pos_masks": where, "deepstack_visual_embeds": deepstack}
        return self.base.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        ).last_hidden_state

    def logprobs(self, batch: Sequence[Row], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy, in nats, of every response token of a batch: float32 (N,), (N,).

        Tokens come in the order of the rows, of the responses in a row, of the tokens in a response. Differentiable
        with respect to the adapter unless gradients are off. Checkpointing needs `policy.model.train()`.
        """
        ids, positions, segment, sources, targets = (part.to(self.device) for part in layout(batch))
        hidden = self.hidden(ids, positions, packed_mask(segment), [row.prompt for row in batch])
        chosen = hidden.flatten(0, 1)[sources]  # (N, D)
        return linear_logprob(chosen, self.base.lm_head.weight, targets, temperature)


def layout(batch: Sequence[Row]) -> tuple[torch.Tensor, ...]:
    """Pack rows into tensors: ids (B, L), positions (3, B, L), segment (B, L), sources (N,), targets (N,).

    `segment` is 0 for the prompt, i for the i-th response, -1 for padding; `sources` are the places, in the flattened
    batch, whose hidden states predict the response tokens `targets`.
    """
    length = max(len(row) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    positions = torch.zeros(3, len(batch), length, dtype=torch.long)
    segment = torch.full((len(batch), length), -1)
    sources, targets = [], []
    for b, row in enumerate(batch):
        size = len(row.prompt.ids)
        flat, first = list(row.prompt.ids), int(row.prompt.positions.max()) + 1
        place, segments = [row.prompt.positions], [0] * size
        for number, response in enumerate(row.responses, 1):
            start = b * length + len(flat)
            sources += [b * length + size - 1, *range(start, start + len(response) - 1)]
            targets += response
            flat += response[:-1]
            segments += [number] * (len(response) - 1)
            place.append(torch.arange(first, first + len(response) - 1).expand(3, -1))
        ids[b, : len(flat)] = torch.tensor(flat)
        positions[:, b, : len(flat)] = torch.cat(place, 1)
        segment[b, : len(flat)] = torch.tensor(segments)
    return ids, positions, segment, torch.tensor(sources), torch.tensor(targets)


def packed_mask(segment: torch.Tensor) -> torch.Tensor:
    """The attention mask (B, 1, L, L) of packed rows: a token sees the prompt and what precedes it in its response."""
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding sees padding, so that no row of the softmax is empty.
    return ((query == key) | ((key == 0) & (query > 0))).tril()[:, None]


def model_config(name: str):
    """The configuration of a snapshot or hub id. Raises PolicyError if it is not there or not of a known family."""
    if name.startswith((".", "/", "~", "models/")) and not Path(name).is_dir():
        hint = "run `make warmup` to make it" if Path(name).name == "tiny" else "check the path"
        raise PolicyError(f"there is no model folder {name}: {hint}, or give a hub id")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"cannot read the model {name!r}: {error}\n"
            "Give a snapshot folder or a hub id of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family; without a network, "
            f"fetch it elsewhere (`hf download {name} --local-dir DIR`) and give the folder."
        ) from error
    if config.model_type not in FAMILIES:
        raise PolicyError(f"{name} is a {config.model_type} model; supported are {', '.join(FAMILIES)}")
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
        raise PolicyError(f"{name} uses sliding-window attention, which packed rows do not support")
    return config


def _open_adapter(model, folder: str | Path, **options):
    if not (Path(folder) / "adapter_config.json").is_file():
        raise PolicyError(f"{folder} holds no PEFT adapter (adapter_config.json is missing)")
    return PeftModel.from_pretrained(model, str(folder), **options)
