"""What a reference and its Triton form have in common, below both of them."""

from typing import NamedTuple

import torch

ESTIMATORS = ("k1", "k2", "k3")  # of the divergence, see kl_divergence
FARTHEST = 20.0  # k3: a reference log-probability further above the policy's counts as so far, and has no gradient
LARGEST = 80.0  # a log-ratio above it counts as it: exp stays finite, and so do gradients of what is clipped


class Rows(NamedTuple):
    """What one pass over logits (n, V) leaves of each row: (n,) in float32, or in float64 if the logits are.

    S is the sum of exp((z - max z) / T), y the token asked for, see logprob.py.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    top: torch.Tensor  # max z
    log_sum: torch.Tensor  # log S
    others: torch.Tensor  # 1 - p(y)
    mean: torch.Tensor  # mean over v of z / T
    factor: torch.Tensor  # of what replaces the logits, which is onehot(y) - p up to it
