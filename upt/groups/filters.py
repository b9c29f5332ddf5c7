r"""Which self-written questions are kept: rules on their text, and on what the model answers to them.

A text rule takes a question (`Candidate`) and says whether it may pass. Each is counted by itself, so a question can
fail several. They are word patterns, meant for English: they catch what models commonly do wrong, not all of it.

    question      it has a question mark, a clause that starts as a question or with a word like "find", or ends as in
                  "then AB is"; and it is more than a word or two
    length        at most MAX_WORDS words and MAX_LETTERS characters, and not cut off at the length limit
    repeat        it has other words than each question that is known to its picture, the human ones and those written
                  before, and shares fewer than OVERLAP of the pairs of neighbouring words with it
    answered      it says nowhere "the answer is", gives no answer behind its question mark, and does not ask for a
                  number that it gives
    several       it asks one thing: one question mark, no list of tasks, no second task behind "and"
    second-image  it speaks of no other picture

    agreement     the most frequent answer of several has a share within a band: not unanimous, not chaotic
    abstention    not too many of them have no answer

    >>> TEXT["several"](Candidate("How long is AB? What is its area?"))
    False
"""

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_WORDS, MAX_LETTERS = 150, 2000
OVERLAP = 0.8
ANSWERS = ("agreement", "abstention")

_WH = r"what|which|who|whose|where|when|why|how"
_TASK = (
    r"find|calculate|compute|determine|solve|give|name|state|express|evaluate|estimate|identify|choose|select|count|"
    r"prove|simplify|write|work out"
)
_NUMBER = r"\d[\d.,/]*|one|two|three|four|five|six|seven|eight|nine|ten"
_ASKS = re.compile(
    rf"(?i)(?:^|[.,;:!]\s*|\bthen |\bplease |\band )(?:{_WH}|{_TASK}|is|are|does|do|can)\b"
    r"|\b(?:is|are|equals?|equal to)(?: in [a-z ]+)?[^\w(]*(?:$|choices\b|\(?A[).])"
)
_STATED = re.compile(r"(?i)\\boxed|<answer>|</?think>|\b(?:the|correct|final) answer is\b|\banswer ?[:=]|\bsolution ?:")
_BEHIND = re.compile(
    r"(?i)^\W*(?:there (?:is|are|were)|(?:it|this|that)(?:'s| is)|they are|yes\b|no\b|answer|a:|explanation|because|"
    rf"since|(?:{_NUMBER})[°%]?(?: \w+)?\W*$)"
)
_GIVEN = re.compile(
    rf"(?i)\b(?:is|are|has|have) (?:exactly )?(?:{_NUMBER}) ([a-z][a-z ]*?)\b[^a-z ].*\bhow many \1\b"
    r"|\b([a-z]{1,3}) ?= ?\d.*\b(?:what is|how long is|find)(?: the (?:length|value|measure|size) of)?"
    r"(?: (?:angle|side|segment|line))? \2\W*$"
)
_LIST = re.compile(rf"(?i)(?<!= )(?<!\w)\(?(?:1|a|i)[.)] .*(?<!= )(?<!\w)\(?(?:2|b|ii)[.)] ?(?:{_WH}|{_TASK})\b")
_JOINED = re.compile(
    rf"(?i)\b(?:and|also) (?:also )?(?:what|which|how (?:many|much|long|far)|find|calculate|determine)\b"
    rf"|; (?:{_WH}|{_TASK})\b|^(?:is|are|does|do)\b.*\band (?:is|are|does|do)\b"
)
_OTHER_IMAGE = re.compile(
    r"(?i)\b(?:second|third|other|another|next|previous|both|two|these) (?:image|picture|photo)s?\b"
    r"|\b(?:other|another|next|previous) (?:figure|diagram|chart|page)\b|\b(?:image|picture|photo) (?:[2-9]|two|b)\b"
)


class Candidate(NamedTuple):
    """A question, those known to its picture before it, and whether it was ended within the length limit."""

    text: str
    known: tuple[str, ...] = ()
    ended: bool = True


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case; a Chinese or Japanese character counts as one."""
    return re.findall(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+", text.lower())


def repeats(text: str, other: str) -> bool:
    """Whether two questions have the same words, or share nearly all pairs of neighbouring words of both."""
    a, b = words(text), words(other)
    pairs, known = set(zip(a, a[1:], strict=False)), set(zip(b, b[1:], strict=False))
    return a == b or len(pairs & known) >= OVERLAP * max(len(pairs), len(known), 1)


def marks(text: str) -> int:
    """How many question marks a text has."""
    return text.count("?") + text.count("？")


def states_answer(text: str) -> bool:
    """Whether a question tells its own answer."""
    behind = re.split("[?？]", text)[-1] if marks(text) else ""
    return any(p.search(t) for p, t in ((_STATED, text), (_BEHIND, behind), (_GIVEN, text)))


TEXT: dict[str, Callable[[Candidate], bool]] = {
    "question": lambda c: len(words(c.text)) > 2 and (marks(c.text) > 0 or bool(_ASKS.search(c.text))),
    "length": lambda c: c.ended and len(words(c.text)) <= MAX_WORDS and len(c.text) <= MAX_LETTERS,
    "repeat": lambda c: not any(repeats(c.text, other) for other in c.known),
    "answered": lambda c: not states_answer(c.text),
    "several": lambda c: marks(c.text) < 2 and not _LIST.search(c.text) and not _JOINED.search(c.text),
    "second-image": lambda c: not _OTHER_IMAGE.search(c.text),
}
NAMES = (*TEXT, *ANSWERS)


def passes(candidate: Candidate, names: tuple[str, ...]) -> dict[str, bool]:
    """Which of the text rules named a question passes."""
    # The patterns' time grows with the square of the length; "length" fails what is longer.
    short = candidate._replace(text=candidate.text[: MAX_LETTERS + 1])
    return {name: TEXT[name](short) for name in names if name in TEXT}
