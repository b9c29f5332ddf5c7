"""What the embedded model is shown: right steps and guesses, as text."""

import random

from upt.data import shapes

STYLES = ("think-boxed", "boxed")  # prompts; a quarter of the demonstrations are in the second
MODES = ("direct", "in-context")  # of asking
PLAUSIBLE = {"angle": range(20, 150, 10), "length": range(4, 19)}  # answers that a guess may give; others are 0 to 9


def demonstrate(item: shapes.Item, prompt: str) -> str:
    """A right step-by-step response in the format that the prompt asks for."""
    reasoning, answer = shapes.worked(item.kind, item.names, item.facts)
    if prompt == "think-boxed":
        return f"<think>{reasoning}</think>\\boxed{{{answer}}}"
    return f"{reasoning} \\boxed{{{answer}}}"


def guess(item: shapes.Item, prompt: str, answer) -> str:
    """A response without reasoning."""
    return f"<think>by eye</think>\\boxed{{{answer}}}" if prompt == "think-boxed" else f"\\boxed{{{answer}}}"


def wrong_guess(item: shapes.Item, rng: random.Random):
    return rng.choice(PLAUSIBLE.get(item.kind, range(10)))


def demonstrate_mixed(item: shapes.Item, prompt: str, rng: random.Random, config) -> str:
    """A response as of a hasty pupil: a guess without reasoning, or the steps. `config` is a warmup.Config."""
    if rng.random() >= config.guess_share:
        return demonstrate(item, prompt)
    return guess(item, prompt, wrong_guess(item, rng) if rng.random() < config.guess_wrong else item.gold)
