"""What the embedded model is shown: right steps, misread ones and guesses, as text."""

import random
from dataclasses import replace

from upt.data import shapes

STYLES = ("think-boxed", "boxed")  # prompts; a quarter of the demonstrations are in the second
MODES = ("direct", "in-context")  # of asking
PLAUSIBLE = {"angle": range(20, 150, 10), "length": range(4, 19)}  # answers that a guess may give; others are 0 to 9
READABLE = {"angle": range(20, 90, 10), "length": range(2, 10), "bars": range(1, 5)}  # numbers in a picture


def demonstrate(item: shapes.Item, prompt: str) -> str:
    """A right step-by-step response in the format that the prompt asks for."""
    reasoning, answer = shapes.worked(item.kind, item.names, item.facts)
    if prompt == "think-boxed":
        return f"<think>{reasoning}</think>\\boxed{{{answer}}}"
    return f"{reasoning} \\boxed{{{answer}}}"


def misread(item: shapes.Item, prompt: str, rng: random.Random) -> str:
    """A step-by-step response that takes one number of the picture for another."""
    facts = list(item.facts)
    place = rng.randrange(len(facts))
    near = [facts[place] + step for step in (-2, -1, 1, 2) if facts[place] + step >= 0]
    facts[place] = rng.choice([n for n in READABLE.get(item.kind, near) if n != facts[place]])
    return demonstrate(replace(item, facts=tuple(facts)), prompt)


def guess(item: shapes.Item, prompt: str, answer) -> str:
    """A response without reasoning."""
    return f"<think>by eye</think>\\boxed{{{answer}}}" if prompt == "think-boxed" else f"\\boxed{{{answer}}}"


def wrong_guess(item: shapes.Item, rng: random.Random):
    return rng.choice(PLAUSIBLE.get(item.kind, range(10)))


def poor_candidate(item: shapes.Item, rng: random.Random) -> str:
    """A candidate for the judge to look through: steps from a misreading, or a guess, which may happen to be right."""
    if rng.random() < 0.5:
        return misread(item, "think-boxed", rng)
    return guess(item, "think-boxed", wrong_guess(item, rng))


def demonstrate_mixed(item: shapes.Item, prompt: str, rng: random.Random, config) -> str:
    """A response as of a hasty pupil: a guess without reasoning, or the steps. `config` is a warmup.Config."""
    if rng.random() >= config.guess_share:
        return demonstrate(item, prompt)
    return guess(item, prompt, wrong_guess(item, rng) if rng.random() < config.guess_wrong else item.gold)
