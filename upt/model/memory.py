"""A packed pass that runs out of memory is begun again with fewer tokens at once; only its rounding changes."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from upt.errors import PolicyError
from upt.run import progress

Found = TypeVar("Found")


def fitting(policy, flag: str, budget: int, work: Callable[[int], Found]) -> Found:
    """`work(budget)`, begun again with half the budget for as long as the device runs out of memory.

    `budget` is what the setting `flag` gives, in tokens of one forward pass. A budget that is lowered is said, and kept
    in `policy.fitted` for later calls. `work` has to undo what it had done before it ran out. Raises PolicyError where
    one token is too many, which means a single response with its prompt.
    """
    budget = fits = min(budget, policy.fitted.get(flag, budget))
    while True:
        try:
            found = work(fits)
            break
        except torch.cuda.OutOfMemoryError as error:
            if fits == 1:
                raise PolicyError(
                    f"out of memory with one response at a time ({flag} 1): {'. '.join(str(error).split('. ')[:2])}; "
                    "shorten --max-new-tokens or --max-prompt-tokens, lower --max-pixels, or take a smaller model"
                ) from None
        # Here, behind the handler: within it the exception holds the tensors of the pass.
        fits //= 2
        gc.collect()
        torch.cuda.empty_cache()
    if fits < budget:
        policy.fitted[flag] = fits
        progress.say(f"out of memory with {flag} {budget}: going on with {fits}, which changes rounding only")
    return found
