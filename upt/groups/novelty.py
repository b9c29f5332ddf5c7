"""Novelty: how far a text is from other texts, by the short runs of characters that they share."""

import itertools
import statistics
from collections.abc import Sequence


def similarity(a: set[str], b: set[str]) -> float:
    """The Jaccard index |a & b| / |a | b| of two sets of n-grams: in [0, 1], symmetric, 1 where they are equal."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def novelty(texts: Sequence[str], ngram: int = 5) -> list[float]:
    """nu_i in [0, 1]: 1 less the mean similarity of text i to the others, scaled so that the least is 0, the largest 1.

    1/2 for all where none is more novel than another: a single text, two, or all alike. The n-grams are of `ngram`
    characters; a shorter text is one of its own. Characters serve every language, and the text alone counts, however
    it was split into tokens. Time: linear in the texts for their n-grams, then one intersection of sets for each pair.
    """
    grams = [{text[k : k + ngram] for k in range(max(1, len(text) - ngram + 1))} for text in texts]
    near: list[list[float]] = [[] for _ in texts]
    for i, j in itertools.combinations(range(len(texts)), 2):
        s = similarity(grams[i], grams[j])
        near[i].append(s)
        near[j].append(s)
    # The exactly rounded mean: equal ones come out equal, whatever the order of the texts, and scaling keeps them so.
    far = [1 - statistics.mean(s) if s else 0.0 for s in near]
    least, spread = min(far, default=0.0), max(far, default=0.0) - min(far, default=0.0)
    return [(f - least) / spread if spread > 1e-12 else 0.5 for f in far]
