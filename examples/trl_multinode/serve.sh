#!/usr/bin/env bash
# The node that samples: vLLM's own server, whose weights TRL replaces before each generation. Pictures are resized
# here as in train.py, by --mm-processor-kwargs: prompts that the trainer counted otherwise would not fit them.
set -euo pipefail
export VLLM_SERVER_DEV_MODE=1
exec vllm serve "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --data-parallel-size "${GPUS:-8}" \
    --dtype bfloat16 --max-model-len 8192 --gpu-memory-utilization 0.9 \
    --mm-processor-kwargs '{"min_pixels": 262144, "max_pixels": 1204224}' \
    --weight-transfer-config '{"backend": "nccl"}' \
    --logprobs-mode processed_logprobs --max-logprobs -1 --enable-scale-out "$@"
