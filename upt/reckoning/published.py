"""Published configurations, as far as sizes depend on them: what config.json of these hub ids says.

`head_dim` is there where it is not hidden_size / num_attention_heads by rule, so for Qwen3-VL.
"""

QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14}
QWEN2_5_VISION |= {"fullatt_block_indexes": [7, 15, 23, 31]}
QWEN3_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16}
QWEN3_VISION |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}

CONFIGS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151_936,
        },
        "vision_config": QWEN2_5_VISION | {"out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152_064,
        },
        "vision_config": QWEN2_5_VISION | {"out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        },
        "vision_config": QWEN3_VISION | {"out_hidden_size": 4096},
        "tie_word_embeddings": False,
    },
}  # fmt: skip
