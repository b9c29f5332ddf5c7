"""The policy: a vision-language model with a LoRA adapter, and the packed forward pass over groups (packing.py).

One set of weights serves every role. The policy is the model with its adapter on; the reference is the same model with
the adapter off (`with policy.reference():`). The vision tower, the embeddings and the head are frozen, so an image is
encoded once and its features are shared by sampling and by every later pass over its question.

    policy = Policy.load("models/tiny")
    policy.add_lora(rank=16, alpha=32)
    prompts, dropped = policy.encode(questions, prompts.template("think-boxed"))
    for batch in pack(prompts, responses, budget=16384):
        logprob, entropy = policy.logprobs(batch)
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from kernels import linear_logprob
from upt.data.views import shown
from upt.errors import PolicyError
from upt.files import publish, write_whole, writing
from upt.model import TARGETS, opening
from upt.model.devices import DTYPES, checked_device, checked_dtype
from upt.model.families import FAMILIES, Family, Features
from upt.model.folders import check_adapter
from upt.model.lora import fuse, merged
from upt.model.opening import calm, check_fit, load_weights, loading, model_config, open_adapter
from upt.model.origin import BASE, check_base, origin_of
from upt.model.packing import Packed, Prompt, Row, layout
from upt.reckoning.memory import PIXEL_VALUES_AT_ONCE


class Policy:
    """A model with its processor and adapter. Build it with `Policy.load`."""

    def __init__(self, model, tokenizer, family: Family, cache_bytes=0, origin: dict | None = None):
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.origin = origin  # which model an adapter of it belongs to (origin.py); None: nobody knows
        self.cache_bytes, self.cache = cache_bytes, OrderedDict()
        self.fitted = {}  # token budgets (memory.py) and the share for slots (decoding.py) that were lowered
        self.positions = lru_cache(maxsize=256)(self._positions)
        self.told = False  # in how many slots it samples
        self.model.eval().requires_grad_(False)
        family.install(self.base)

    @classmethod
    def load(
        cls,
        name: str,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        gradient_checkpointing: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        feature_cache_gib: float = 0,
        any_base: bool = False,
        quantize: str | None = None,
    ) -> "Policy":
        """Load a snapshot folder or hub id of one of FAMILIES (families.py): Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

        adapter: a PEFT adapter that is merged into the weights, so that it is part of the starting model.
        dtype: `bf16`, `fp32` or `auto` (bf16 on a GPU, fp32 on a CPU). gradient_checkpointing: None turns it on on a
        GPU. min_pixels, max_pixels: image area after resizing, None keeps the snapshot's. feature_cache_gib: copies of
        image features kept, in the CPU's memory, beyond the call that made them, for small sets. It costs bit-exact
        resuming: an image's features depend in their last bits on the batch they were computed in. any_base: take an
        adapter that was made for another model. quantize: `nf4` for 4-bit weights (opening.py) in the language model's
        linear layers, computing in `dtype`; an adapter is merged first, in float32 in the CPU's memory.
        Raises PolicyError for a folder or id that is not there or is not of these families, for a model that lacks a
        tensor, and for an adapter that does not fit it.
        """
        device = checked_device(device)
        on_gpu, dtype = device.type == "cuda", checked_dtype(dtype, device)
        if quantize not in (None, "nf4"):
            raise PolicyError(f"quantize must be nf4 or None, not {quantize!r}")
        config = model_config(name)
        family_class = FAMILIES[config.model_type]
        origin = origin_of(name)
        if adapter is not None:  # before the weights, which may take minutes
            check_adapter(adapter)
            check_base(adapter, origin, any_base, say=False)
            check_fit(config, adapter, name)
        model = load_weights(name, config, "auto" if quantize else DTYPES[dtype])
        if not quantize:
            model = model.to(device)
        with calm(), loading(f"the model {name}"):
            family = family_class(name, min_pixels, max_pixels)
        if origin["fingerprint"] is None:  # of a hub id, the weights are here only now
            origin = origin_of(name)
        if adapter is not None:
            check_base(adapter, origin, any_base)
            (model, _), origin = merged(open_adapter(model, adapter), wide=bool(quantize)), origin_of(name, adapter)
        if quantize:
            model = opening.quantize(model, family_class.adapter_layers, DTYPES[dtype], device)
        if on_gpu if gradient_checkpointing is None else gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with loading(f"the tokenizer of {name}"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = opening.processors_template(name)
        if tokenizer.chat_template is None:
            raise PolicyError(f"{name} has no chat template: use an instruction-tuned model")
        policy = cls(model, tokenizer, family, int(feature_cache_gib * 2**30), origin)
        if family.image_token(config) not in policy.tokens(policy.chat([("user", "?")], True)):
            raise PolicyError(f"{name}: its tokenizer lacks the placeholder of pictures; fetch all its files")
        return policy

    # ------------------------------------------------------------------------------------------------ the adapter

    @property
    def base(self):
        """The transformers model, with the LoRA layers in it if there are any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def quantized(self) -> bool:
        """Whether the language model has 4-bit weights."""
        return getattr(self.base, "is_loaded_in_4bit", False)

    def add_lora(self, rank: int = 16, alpha: int = 32, targets: Sequence[str] = TARGETS, seed: int = 0) -> None:
        """Put a fresh, trainable LoRA adapter on the language model's linear layers named in `targets`."""
        pattern = self.family.targeted(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, task_type="CAUSAL_LM")
        with torch.random.fork_rng(), calm():
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config)
        fuse(self.model)

    def load_adapter(self, folder: str | Path, any_base: bool = False) -> None:
        """Open a saved adapter, trainable and not merged, with the weights exactly as they were saved.

        It takes the place of the adapter that is there. Raises PolicyError, and leaves that one, for an adapter that
        does not fit the model or, without `any_base`, was made for another one.
        """
        check_adapter(folder)
        check_fit(self.base.config, folder, self.base.name_or_path, self.family.adapter_layers)
        if self.origin:
            check_base(folder, self.origin, any_base)
        bare = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self.model = open_adapter(bare, folder, trainable=True)
        fuse(self.model)

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
        """Write the adapter in PEFT's layout, and which model it belongs to, if its weights have a fingerprint.

        `PeftModel.from_pretrained(model, folder)` opens it too.
        """
        if not isinstance(self.model, PeftModel):
            raise PolicyError("there is no adapter to save: call add_lora or load_adapter first")
        with writing(folder):
            self.model.save_pretrained(folder)
            publish(folder)
        if self.origin and self.origin["fingerprint"]:
            write_whole(Path(folder) / BASE, [json.dumps(self.origin, indent=1).encode()])

    def merge(self) -> float | None:
        """Merge the adapter into the weights, for good.

        Returns how far rounding has put them off, as a share of the adapter's change (lora.py), None where there is no
        adapter. Raises PolicyError for 4-bit weights, which a merge would round once more.
        """
        if self.quantized:
            raise PolicyError(
                "an adapter is not merged into 4-bit weights, which would round it away: save the adapter and merge it "
                "into the full model, Policy.load(MODEL, adapter=ADAPTER).export(DIR)"
            )
        if not isinstance(self.model, PeftModel):
            return None
        self.model, error = merged(self.model)
        self.origin = None  # nobody knows these weights until they are written
        return error

    def export(self, folder: str | Path) -> float | None:
        """Merge the adapter, if there is one, and write a full snapshot with its processor. Returns and raises as
        `merge` does."""
        error = self.merge()
        with writing(folder), calm():
            for part in (self.model, self.tokenizer, self.family.image_processor):
                part.save_pretrained(folder)
            publish(folder)
        weights = origin_of(str(folder))
        if self.origin and self.origin["adapter"] and self.origin["fingerprint"]:  # an adapter made for it fits this
            record = self.origin | {"weights": weights["fingerprint"]}
            write_whole(Path(folder) / BASE, [json.dumps(record, indent=1).encode()])
        else:
            self.origin = weights
        return error

    # ------------------------------------------------------------------------------------------------- the prompts

    @torch.no_grad()
    def encode(self, questions: Iterable, template: str, max_tokens: int | None = None) -> tuple[list, dict[str, int]]:
        """Questions to prompts with their image features; (prompts, {uid: tokens} of those over max_tokens).

        Where a question has a view, its prompt has a twin, and the longer of the two counts.
        """
        prompts, dropped = [], {}
        pending, pending_size = [], 0
        for question in questions:
            encoded = [self.encode_one(one, template) for one in shown(question)]
            longest = max(len(prompt.ids) for prompt, _, _ in encoded)
            if max_tokens is not None and longest > max_tokens:
                dropped[question.uid] = longest
                continue
            prompt, *twins = (prompt for prompt, _, _ in encoded)
            if twins:
                prompt.twin = twins[0]
            prompts.append(prompt)
            for seen, pixels, key in encoded:
                if pixels is not None:
                    pending.append((seen, pixels, key))
                    pending_size += pixels.numel()
                if pending_size > PIXEL_VALUES_AT_ONCE:
                    self.see(pending)
                    pending, pending_size = [], 0
        if pending:
            self.see(pending)
        return prompts, dropped

    def plain(self, text: str) -> str:
        """Text that cannot open a turn or announce an image: without special tokens, even within one another."""
        images = self.tokenizer.convert_ids_to_tokens(self.family.never_sampled(self.base.config))
        special, found = dict.fromkeys([*self.tokenizer.all_special_tokens, *filter(None, images)]), None
        while found != text:
            found = text
            for token in special:
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

    def tokens(self, text: str, opens: bool = False) -> list[int]:
        """The token ids of a text; of one that opens a prompt with the BOS token, where the tokenizer has it there."""
        bos = self.tokenizer.bos_token
        written = bos is not None and text.startswith(bos)  # by the chat template
        return self.tokenizer(text, add_special_tokens=opens and not written)["input_ids"]

    def tokenize(self, question, template: str) -> list[int]:
        """The token ids of a question's prompt, with one placeholder for its image."""
        text = template.replace("{question}", self.ask(question))
        return self.tokens(self.chat([("user", text)], question.image is not None), opens=True)

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
            features, pixels = self.family.look(image)
        else:
            self.cache.move_to_end(key)
        return self.place(question.uid, ids, features), pixels, key

    def place(self, uid: str, ids: list[int], features: Features | None) -> Prompt:
        """A prompt from token ids whose one image placeholder, if any, is widened to the image's features."""
        if features is None:
            return Prompt(uid, ids, self.family.positions(self.base, len(ids), 0, None), None)
        image_id = self.family.image_token(self.base.config)
        at = ids.index(image_id)
        ids = ids[:at] + [image_id] * features.places + ids[at + 1 :]
        return Prompt(uid, ids, self.positions(len(ids), at, features.places, features.grid), features)

    def _positions(self, length: int, at: int, places: int, grid: tuple[int, ...]) -> torch.Tensor:
        return self.family.positions(self.base, length, at, Features(places, grid))

    def see(self, pending: list[tuple[Prompt, torch.Tensor, bytes | None]]) -> None:
        """Run the vision tower over several images and give each prompt its features."""
        features = [prompt.features for prompt, _, _ in pending]
        self.family.encode(self.base, [pixels for _, pixels, _ in pending], features)
        for of in features:
            of.to_host()
        if self.cache_bytes:
            for of, (_, _, key) in zip(features, pending, strict=True):
                layers = tuple(layer.clone() for layer in of.deepstack)
                self.cache[key] = replace(of, embeds=of.embeds.clone(), deepstack=layers)
        size = sum((1 + len(f.deepstack)) * f.embeds.nbytes for f in self.cache.values())
        while size > self.cache_bytes:
            _, old = self.cache.popitem(last=False)
            size -= (1 + len(old.deepstack)) * old.embeds.nbytes

    # ------------------------------------------------------------------------------------------------- the forward

    def hidden(self, ids, positions, layout=None, prompts: Sequence[Prompt] = (), cache=None, mask=None):
        """Last hidden states (B, L, D) of token ids (B, L) at positions (axes, B, L).

        `layout` computes the attention (attention.py). `prompts`, in the order in which their placeholders stand in
        `ids`, give the image features that replace them; leave them out where there is no image in this part of the
        sequence. Each layer's keys and values go through `cache.update(keys, values, layer)`, which may answer with
        what it likes, to the layout. Without a layout, mask (B, 1, L, K) is true where a query may look.
        """
        features = [prompt.features for prompt in prompts if prompt.features is not None]
        return self.family.hidden(self.base, ids, positions, layout, mask, features, cache)

    def packed(self, batch: Sequence[Row]) -> tuple[Packed, torch.Tensor]:
        """A batch as one sequence of N tokens on the policy's device, and its last hidden states (1, N, D)."""
        found = layout(batch, self.device, self.base.dtype)
        return found, self.hidden(found.ids, found.positions, found.attention, [row.prompt for row in batch])

    def logprobs(self, batch: Sequence[Row], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy, in nats, of every response token of a batch: float32 (N,), (N,).

        Tokens come in the order of the rows, of the responses in a row, of the tokens in a response. Differentiable
        with respect to the adapter unless gradients are off. Checkpointing needs `policy.model.train()`.
        """
        found, hidden = self.packed(batch)
        return linear_logprob(found.predicting(hidden), self.base.lm_head.weight, found.targets, temperature)
