"""The embedded model before it has learnt anything: a tokenizer of its own and a Qwen2.5-VL of 1.5 M parameters."""

import json

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen's tokenizer (its splitting rules and special tokens) with a vocabulary of its own, about 400 tokens."""
    raw = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=512, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    raw.train_from_iterator(texts, trainer)
    learnt = json.loads(raw.to_str())["model"]
    vocab = {token: index for token, index in learnt["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: index for index, token in enumerate(sorted(vocab, key=vocab.get))}
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
    )


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 1.5 M parameters with random weights."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        # A small base, so that neighbouring places of a 3 x 3 grid of visual tokens are told apart.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 3,
        "intermediate_size": 256,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [2],
        "initializer_range": 0.05,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def make_processor() -> Qwen2VLImageProcessorPil:
    """From 3 x 3 to 16 x 16 visual tokens; the pictures of `shapes` are used as they are."""
    return Qwen2VLImageProcessorPil(min_pixels=84 * 84, max_pixels=448 * 448)
