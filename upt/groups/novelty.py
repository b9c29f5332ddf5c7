"""Novelty: how far a text is from other texts, by the short runs of characters that they share."""

import itertools
from collections.abc import Sequence
from fractions import Fraction


def similarity(a: set[str], b: set[str]) -> Fraction:
    """The Jaccard index |a & b| / |a | b| of two sets of n-grams: in [0, 1], symmetric, 1 where they are equal."""
    shared = len(a & b)
    return Fraction(shared, len(a) + len(b) - shared) if a or b else Fraction(1)


def novelty(texts: Sequence[str], ngram: int = 5) -> list[float]:
    """nu_i in [0, 1]: 1 less the mean similarity of text i to the others, scaled so that the least is 0, the largest 1.

    1/2 for all where none is more novel than another: a single text, two, or all alike. The n-grams are of `ngram`
    characters; a shorter text is one of its own. Characters serve every language, and the text alone counts, however
    it was split into tokens. Time: linear in the texts for their n-grams, then one intersection of sets for each pair.
    """
    grams = [{text[k : k + ngram] for k in range(max(1, len(text) - ngram + 1))} for text in texts]
    # Fractions, since scaling would blow a rounding error up to the whole of [0, 1] where all are equally far.
    far = [Fraction(0)] * len(texts)  # summed over the others, which scales to the same as the mean
    for i, j in itertools.combinations(range(len(texts)), 2):
        distance = 1 - similarity(grams[i], grams[j])
        far[i] += distance
        far[j] += distance
    least, most = min(far, default=0), max(far, default=0)
    return [float((f - least) / (most - least)) if most > least else 0.5 for f in far]
