"""The numeric kernels of the loop, each a plain PyTorch function."""

from kernels.logprob import linear_logprob
from kernels.loss import grpo_loss, kl_divergence, response_weights, sft_loss
from kernels.sample import row_id, sample

__all__ = ["grpo_loss", "kl_divergence", "linear_logprob", "response_weights", "row_id", "sample", "sft_loss"]
