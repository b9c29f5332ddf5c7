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


def guess_or_demonstrate(item: shapes.Item, prompt: str, rng: random.Random, share: float, wrong: float) -> str:
    """A response as of a hasty pupil: in a `share` of cases a guess without reasoning, else the steps.

    A share `wrong` of the guesses is any plausible number.
    """
    if rng.random() >= share:
        return demonstrate(item, prompt)
    return guess(item, prompt, wrong_guess(item, rng) if rng.random() < wrong else item.gold)
