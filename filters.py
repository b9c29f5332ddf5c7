r"""Which self-written questions are kept: rules on their text, and on what the model answers to them.

A text rule takes a question (`Candidate`) and says whether it may pass; it sees the source question and those written
before for the same picture. Each is counted by itself, so a question can fail several.

    question      it asks or tells to find something, and is more than a word or two
    length        at most MAX_WORDS words, and not cut off at the length limit
    repeat        it is neither its source nor another question to the picture, once case and punctuation are gone, and
                  shares fewer than OVERLAP of the pairs of neighbouring words with them
    answered      it does not state an answer
    several       it asks one thing
    second-image  it needs no picture but its own

    agreement     the most frequent answer of several has a share within a band: not unanimous, not chaotic
    abstention    not too many of them have no answer

    >>> TEXT["several"](Candidate("How long is AB? What is its area?", "", (), True))
    False
"""

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_WORDS = 80
OVERLAP = 0.8
ANSWERS = ("agreement", "abstention")

_ASKS = re.compile(
    r"(?i)\b(?:what|which|how|who|whose|where|when|why|is|are|was|were|does|do|did|can|could|will|would|find|calculate|"
    r"compute|determine|solve|give|name|state|express|evaluate|estimate|identify|choose|select|count|prove)\b"
)
_STATED = re.compile(r"(?i)\\boxed|<answer>|</?think>|\b(?:the )?(?:correct |final )?answer(?: is\b| ?:)|\bsolution ?:")
_MARKED = re.compile(r"(?m)(?:^|[\s;])(?:\(?(?:[2-9]|ii+|iv)[.)]|\(?[b-d]\)) ?(?=[A-Z])")
_JOINED = re.compile(r"(?i)[,;]? \band (?:also )?(?:what|which|how (?:many|much|long|far)|find|calculate|determine)\b")
_OTHER_IMAGE = re.compile(
    r"(?i)\b(?:second|other|another|next|previous|first|last|both|two|these|following) (?:images?|pictures?|figures?|"
    r"photos?|diagrams?|charts?)\b|\b(?:image|picture|figure|photo|diagram|chart) (?:[2-9]|two|b)\b"
)


class Candidate(NamedTuple):
    """A question, its source's text, the questions written before it for the same picture, whether it was ended."""

    text: str
    source: str
    others: tuple[str, ...]
    ended: bool


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def repeats(text: str, other: str) -> bool:
    """Whether two questions have the same words, or share nearly all pairs of neighbouring words of both."""
    a, b = words(text), words(other)
    pairs, known = set(zip(a, a[1:], strict=False)), set(zip(b, b[1:], strict=False))
    return a == b or len(pairs & known) >= OVERLAP * max(len(pairs), len(known), 1)


TEXT: dict[str, Callable[[Candidate], bool]] = {
    "question": lambda c: len(words(c.text)) > 2 and ("?" in c.text or bool(_ASKS.search(c.text))),
    "length": lambda c: c.ended and len(c.text.split()) <= MAX_WORDS,
    "repeat": lambda c: not any(repeats(c.text, other) for other in (c.source, *c.others) if other),
    "answered": lambda c: not _STATED.search(c.text),
    "several": lambda c: c.text.count("?") < 2 and not _MARKED.search(c.text) and not _JOINED.search(c.text),
    "second-image": lambda c: not _OTHER_IMAGE.search(c.text),
}
NAMES = (*TEXT, *ANSWERS)
