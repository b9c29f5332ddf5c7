r"""MathVista (arXiv 2310.02255): questions in the owners' layout, and answers scored by the rule of their repository.

The owners let a large model extract the answer from a response. Here rules do, so scores come close to published ones
without being them. What is extracted is then compared as theirs is (github.com/lupantech/MathVista, evaluation/): a
choice by its text, what is none of the choices standing for the one with the fewest edits; an integer cut off, a float
rounded to the question's precision, a list as text. A response without an answer is wrong unless the nearest choice is
right.

Rules, the first that finds something wins; sentences that call something incorrect are left out:

    choice   the response is one · its box is a letter · the last letter after "answer is" or "correct option is" · the
             last after "answer", "option" or "choice" · the only letter in brackets · a choice behind "the answer
             is" · yes or no: the word at the start, else no if the first sentence negates or compares the other way
             round than the question · the last choice named · one equal to the last number
    number   the value of the box · the first behind the last "the answer is" · the last in bold but in headings · the
             last of the last sentence that concludes · that of "There are 3 …" at the start · the last
    list     the last in brackets

Folder: `testmini.json` or `test.json`, {pid: question}; responses: {pid: {"response": …}}.
"""

import re
from pathlib import Path

from answers import extract_answer, value_of
from eval.questions import Question, files_in, rows

CATEGORIES = ("question_type", "answer_type", "task", "skills")
MAX_CHARS = 50_000  # of a longer response only the end is read

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
_LIST = re.compile(r"\[[^\[\]]{0,500}\]")
_DIGITS = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])-?\.[0-9]+")
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_COUNT = re.compile(rf"(?i)there (?:is|are|was|were) ([0-9]+|{'|'.join(_NAMES)})\b(?!\.[0-9])")
_WORD = re.compile(rf"(?i)\b(?:{'|'.join(_NAMES)})\b")


def questions(folder: Path) -> dict[str, Question]:
    """Questions by pid. Raises FileNotFoundError for an empty folder, ValueError for a row that is no question."""
    found: dict[str, Question] = {}
    for file in files_in(folder, "test*.json", "MathVista's testmini.json"):
        for where, _, row in rows(file):
            try:
                categories = {name: (row[name],) for name in CATEGORIES[:2]}
                categories |= {"task": (row["metadata"]["task"],), "skills": tuple(row["metadata"]["skills"])}
                choices, precision = tuple(map(str, row["choices"] or ())), int(row["precision"] or 0)
                question = Question(
                    str(row["pid"]), row["question"], str(row["answer"]), choices, row["image"], categories,
                    row["answer_type"], precision,
                )  # fmt: skip
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where} is no MathVista question with an answer: {error!r}") from None
            found.setdefault(question.id, question)
    return found


def extract(response: str, question: Question) -> tuple[str, str]:
    """The answer that a response gives to the question, "" for none, and the rule that found it."""
    text = response[-MAX_CHARS:].translate(_PLAIN)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
    sentences = [part for part in sentences if not _INCORRECT.search(part)]
    if question.choices:
        place, method = _choice("\n".join(sentences), sentences, question)
        return "" if place is None else question.choices[place], method
    if question.answer_type == "list":
        found = _LIST.findall(text)
        return (found[-1], "list") if found else ("", "none")
    return _number("\n".join(sentences), sentences)


def is_right(question: Question, answer: str) -> bool:
    """Whether an extracted answer equals the question's after the owners' normalisation."""
    if question.choices:
        nearest = min(question.choices, key=lambda choice: _edits(answer[:200], choice))
        return (answer if answer in question.choices else nearest) == question.gold
    try:
        if question.answer_type == "integer":
            return str(int(float(answer))) == question.gold
        if question.answer_type == "float":
            return str(round(float(answer), question.precision)) == question.gold
    except (ValueError, OverflowError):
        return False
    return answer == question.gold


def _choice(text: str, sentences: list[str], question: Question) -> tuple[int | None, str]:
    choices = question.choices
    letters = "ABCDEFGH"[: len(choices)]
    if text in choices:
        return choices.index(text), "exact"
    if (alone := _ALONE.fullmatch(extract_answer(text) or text)) and alone[1].upper() in letters:
        return letters.index(alone[1].upper()), "letter"
    if concluded := [letter for pair in _CONCLUDED.findall(text) if (letter := pair[0] or pair[1]) in letters]:
        return letters.index(concluded[-1]), "letter"
    if stated := [letter for letter in _LETTER.findall(text) if letter in letters]:
        return letters.index(stated[-1]), "letter"
    bracketed = {letter for pair in _BRACKETED.findall(text) for letter in pair if letter and letter in letters}
    if len(bracketed) == 1:
        return letters.index(bracketed.pop()), "bracket"
    for match in reversed(list(_STATED.finditer(text))[-20:]):
        if named := _named(text[match.end() : match.end() + 150], choices):
            return named[0], "stated"
    lowered = [choice.lower() for choice in choices]
    if set(lowered) == {"yes", "no"} and sentences:
        if first := re.match(r"\W{0,9}(yes|no)\b", text.lower()):
            return lowered.index(first[1]), "polarity"
        if not _named(text, choices):
            denies = _NEGATED.search(sentences[0]) or _compared(sentences[0]) * _compared(question.text) < 0
            return lowered.index("no" if denies else "yes"), "polarity"
    for sentence in reversed(sentences):
        if named := _named(sentence, choices):
            return named[-1], "named"
    if values := _numbers(text):
        last = [float(values[-1])]
        equal = [place for place, choice in enumerate(choices) if [float(value) for value in _numbers(choice)] == last]
        if len(equal) == 1:
            return equal[0], "value"
    return None, "none"


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


def _number(text: str, sentences: list[str]) -> tuple[str, str]:
    if (boxed := extract_answer(text)) and (value := value_of(boxed)) is not None:
        return str(int(value) if value == int(value) else float(value)), "box"
    for match in reversed(list(_STATED.finditer(text))[-20:]):
        said = text[match.end() : match.end() + 200].lstrip("\n ").partition("\n")[0]
        if values := _numbers(said.rpartition("=")[2]):
            return values[0], "stated"
    bolds = [bold for bold in _BOLD.findall(text) if not _HEADING.match(bold)]
    if values := [values[-1] for bold in bolds if (values := _numbers(bold))]:
        return values[-1], "bold"
    for sentence in reversed(sentences):
        if _CONCLUDES.match(sentence) and (values := _numbers(sentence.rpartition("=")[2]) or _numbers(sentence)):
            return values[-1], "conclusion"
    if sentences and (count := _COUNT.match(sentences[0])):
        return _numbers(count[1])[0], "count"
    for sentence in reversed(sentences):
        if values := _numbers(sentence):
            return values[-1], "last"
    return "", "none"


def _numbers(text: str) -> list[str]:
    """Numbers of a text in digits; if there are none, those in words."""
    found = [number.replace(",", "") for number in _DIGITS.findall(text)]
    return found or [str(_NAMES.index(word.lower())) for word in _WORD.findall(text)]


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
