r"""Rules that find the final answer of a free-text response, for benchmarks whose owners let a large model do it.

A response is read once (`read`); sentences that call something incorrect are left out. Each function tries its rules in
order and gives what the first one found and its name, or "none".

    letter   the response is one · its box is one · the last after "answer is" or "correct option is" · the last after
             "answer", "option" or "choice" · the only one in brackets
    chosen   the response is a choice's text · a letter · a choice behind "the answer is" · yes or no: the word at the
             start, else no if the first sentence negates or compares the other way round than the question · the last
             choice named · one equal to the last number
    number   the value of the box · the first behind the last "the answer is" · the last in bold but in headings · the
             last of the last sentence that concludes · that of "There are 3 …" at the start · the last

Time is linear in the text, of which only the last MAX_CHARS characters are read.
"""

import re
from typing import NamedTuple

from answers import extract_answer, value_of

MAX_CHARS = 50_000
LETTERS = "ABCDEFGH"

_ANSWER = r"(?:answer|option|choice)(?: to the question)?"
_STATED = re.compile(rf"(?i)\b(?:the (?:final |correct )?{_ANSWER}(?: is|:)|answer:)|\\boxed")
_LETTER = re.compile(
    rf"(?i:\b{_ANSWER}(?: is| would be| should be|:)?:? ?\*{{0,2}}(?:(?:option|choice) )?)\(?([A-H])\b\)?(?!['’]s|-)"
)
_CONCLUDED = re.compile(
    r"(?i:\b(?:answer|correct (?:option|choice))(?: to the question)?(?: is|:):?)\*{0,2}[ \n]?\*{0,2}"
    r"(?i:(?:option|choice) )?(?:\(([A-H])\)|([A-H])(?=[.,;:)*\n]|$))"
)
_ALONE = re.compile(r"(?:\\(?:text|mathrm|textbf)\{)?\(?([A-Ha-h])\)?\}?\.?")
_PLAIN = {ord("$"): None, ord("−"): "-"}
_BRACKETED = re.compile(r"\( ?([A-H]) ?\)|\*\*([A-H])[.)*:]")
_INCORRECT = re.compile(r"(?i)\b(?:is|are) (?:also )?(?:incorrect|wrong|not correct)\b")
_NEGATED = re.compile(r"(?i)\b(?:not|no|cannot)\b|n't\b")
_COMPARED = {"fewer": -1, "less": -1, "smaller": -1, "more": 1, "greater": 1, "larger": 1}
_CONCLUDES = re.compile(r"(?i)(?:therefore|so|thus|hence|in conclusion|this means)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?]) |\n")
_BOLD = re.compile(r"\*\*([^*]{1,200})\*\*")
_HEADING = re.compile(r"(?i)(?:step|part|figure|question|\d+[.)]) ?\b|.*:\s*$")
_DIGITS = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])-?\.[0-9]+")
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_COUNT = re.compile(rf"(?i)there (?:is|are|was|were) ([0-9]+|{'|'.join(_NAMES)})\b(?!\.[0-9])")
_WORD = re.compile(rf"(?i)\b(?:{'|'.join(_NAMES)})\b")


class Reading(NamedTuple):
    """A response made ready: `text` is its sentences, one a line."""

    text: str
    sentences: list[str]


def read(response: str) -> Reading:
    text = response[-MAX_CHARS:].translate(_PLAIN)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
    sentences = [part for part in sentences if not _INCORRECT.search(part)]
    return Reading("\n".join(sentences), sentences)


def letter(reading: Reading, letters: str = LETTERS) -> tuple[str, str]:
    """The one of `letters` that a response names as its answer, "" for none, and the rule."""
    text = reading.text
    if (alone := _ALONE.fullmatch(extract_answer(text) or text)) and alone[1].upper() in letters:
        return alone[1].upper(), "letter"
    if concluded := [found for pair in _CONCLUDED.findall(text) if (found := pair[0] or pair[1]) in letters]:
        return concluded[-1], "letter"
    if stated := [found for found in _LETTER.findall(text) if found in letters]:
        return stated[-1], "letter"
    bracketed = {found for pair in _BRACKETED.findall(text) for found in pair if found and found in letters}
    if len(bracketed) == 1:
        return bracketed.pop(), "bracket"
    return "", "none"


def chosen(reading: Reading, choices: tuple[str, ...], question: str) -> tuple[int | None, str]:
    """The place of the choice that a response takes, None for none, and the rule."""
    text, sentences = reading
    if text in choices:
        return choices.index(text), "exact"
    found, method = letter(reading, LETTERS[: len(choices)])
    if found:
        return LETTERS.index(found), method
    for said in statements(text, 150):
        if named := _named(said, choices):
            return named[0], "stated"
    lowered = [choice.lower() for choice in choices]
    if set(lowered) == {"yes", "no"} and sentences:
        if first := re.match(r"\W{0,9}(yes|no)\b", text.lower()):
            return lowered.index(first[1]), "polarity"
        if not _named(text, choices):
            denies = _NEGATED.search(sentences[0]) or _compared(sentences[0]) * _compared(question) < 0
            return lowered.index("no" if denies else "yes"), "polarity"
    for sentence in reversed(sentences):
        if named := _named(sentence, choices):
            return named[-1], "named"
    if values := numbers(text):
        last = [float(values[-1])]
        equal = [place for place, choice in enumerate(choices) if [float(value) for value in numbers(choice)] == last]
        if len(equal) == 1:
            return equal[0], "value"
    return None, "none"


def number(reading: Reading) -> tuple[str, str]:
    """The number that a response gives for its answer, in decimals, "" for none, and the rule."""
    text, sentences = reading
    if (boxed := extract_answer(text)) and (value := value_of(boxed)) is not None:
        return str(int(value) if value == int(value) else float(value)), "box"
    for said in statements(text, 200):
        said = said.lstrip("\n ").partition("\n")[0]
        if values := numbers(said.rpartition("=")[2]):
            return values[0], "stated"
    bolds = [bold for bold in _BOLD.findall(text) if not _HEADING.match(bold)]
    if values := [values[-1] for bold in bolds if (values := numbers(bold))]:
        return values[-1], "bold"
    for sentence in reversed(sentences):
        if _CONCLUDES.match(sentence) and (values := numbers(sentence.rpartition("=")[2]) or numbers(sentence)):
            return values[-1], "conclusion"
    if sentences and (count := _COUNT.match(sentences[0])):
        return numbers(count[1])[0], "count"
    for sentence in reversed(sentences):
        if values := numbers(sentence):
            return values[-1], "last"
    return "", "none"


def statements(text: str, width: int) -> list[str]:
    """What follows "the answer is" and its like, so many characters each, the last first."""
    return [text[match.end() : match.end() + width] for match in reversed(list(_STATED.finditer(text))[-20:])]


def numbers(text: str) -> list[str]:
    """Numbers of a text in digits; if there are none, those in words."""
    found = [found.replace(",", "") for found in _DIGITS.findall(text)]
    return found or [str(_NAMES.index(word.lower())) for word in _WORD.findall(text)]


def _compared(text: str) -> int:
    """1 if a text says more, -1 if it says fewer, 0 for neither or both."""
    return sum({_COMPARED.get(word, 0) for word in re.findall(r"[a-z]+", text.lower())})


def _named(text: str, choices: tuple[str, ...]) -> list[int]:
    """Places of the choices that a text names, in its order; a choice within a longer one is not named there."""
    text, found = text.lower(), []
    for place, choice in enumerate(choices):
        wanted = choice.lower().strip().rstrip(".")
        if wanted:
            pattern = rf"(?<![\w.]){re.escape(wanted)}(?!\w|\.[0-9])"
            found += [(match.start(), -match.end(), place) for match in re.finditer(pattern, text)]
    found.sort()
    outermost, reached = [], -1
    for _, end, place in found:
        if -end > reached:
            outermost.append(place)
            reached = -end
    return outermost
