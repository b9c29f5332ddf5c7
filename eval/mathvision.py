r"""MATH-Vision (arXiv 2402.14804): questions in the owners' layout, and answers scored by the rule of their repository.

The rule, from github.com/mathllm/MATH-V (evaluation/), in our words and our code. A response is narrowed step by step:
to a letter at its start or end, to the number behind the last "is", to the last box or what follows "the answer is",
to what follows "="; units and layout are dropped. What is left has to equal the option letter, the option's text or the
answer of the question: as text, or as a number after rounding to two places. Numbers are read by our own parser where
the owners' code evaluates LaTeX as Python, so that no text can run, hang or crash. Accuracy is given by subject and
level.

Folder: `test.jsonl`, `testmini.jsonl`, `images/`; hub: MathLLMs/MathVision. Responses: JSONL of `id`, `response`.
"""

import re
from decimal import Decimal
from fractions import Fraction

from eval.benchmark import Benchmark, Question, gold_of, picture, texts_of
from upt.answers import MAX_CHARS, value_of

CATEGORIES = ("subject", "level")

# A bare letter, and perhaps more, on the first line; or at the end of a sentence.
_LETTER_FIRST = re.compile(r"\A(?:([A-E])|\(([A-E])\)(?: \2)?)\n")
_LETTER_LAST = re.compile(r" (?:([A-E])|\(([A-E])\))\.\Z")
_INTRODUCTIONS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_DROPPED = (
    " ", r"\,", "\n", r"\text", r"\mbox", r"\left", r"\right", "$", r"\!", r"\%", r"^{\circ}", r"^\circ", "{m}^3",
    "m^3", "{units}", "units", "{km}", "km",
)  # fmt: skip

_SPELLINGS = (
    (r"+\infty", r"\infty"), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), ("bmatrix", "pmatrix"), ("{.", "{0."),
)  # fmt: skip


# What that parser reads as a number, and where it stops reading.
_EXPRESSION = re.compile(
    r"(?:[0-9.+\-/^(){}|~\s]|(?<=[0-9]),(?=[0-9]{3})|\*(?!\*)"
    r"|\\(?:[dt]?frac(?=\{)|sqrt(?:\[[0-9]\])?|pi|times|cdot|infty|displaystyle|q?quad)(?![a-z]))*"
)
_ENDED = re.compile(r"(?<!\[[0-9])\]|['&_]|\.(?![0-9])")


def question(key: str | None, row: dict, split: str) -> Question:
    return Question(
        id=str(row["id"]),
        text=row["question"],
        gold=gold_of(row["answer"]),
        choices=texts_of(row["options"]),
        image=picture(row, "decoded_image", "image"),
        categories={name: (str(row[name]),) for name in CATEGORIES},
    )


def prompt(question: Question) -> str:
    """The owners' style: step by step, a box at the end, of a choice only the letter in it."""
    options = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCDE", question.choices, strict=False))
    letter = ", only the letter of the right choice in it" if options else ""
    return f"Solve the problem step by step and put your answer in one \\boxed{{}}{letter}.\n{question.text}{options}"


def extract(response: str, question: Question) -> tuple[str, str]:
    """What the rule takes for the answer, in lower case, and how it was found.

    That is by letter, number, phrase or box; of what is left, `bare` is an answer and nothing else, `text` is not.
    """
    text, method = response.strip(), "text"
    if letters := [m[1] or m[2] for m in (_LETTER_FIRST.match(text), _LETTER_LAST.search(text)) if m]:
        text, method = min(letters), "letter"
    tail = text.rpartition("is ")[2].rstrip(".")
    if _is_float(tail):
        text, method = tail, "number"
    if "oxed{" in text:
        text, method = text[text.rindex("oxed{") :] if text.count("oxed{") > 1 else text, "box"
    else:
        for phrase in _INTRODUCTIONS:
            for spelling in (phrase, phrase.capitalize()):
                if spelling in text:
                    text = text.rpartition(spelling)[2].strip().partition("\n")[0].partition(". ")[0]
                    method = "phrase"
    text = _stripped(text)
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    text = text.rstrip(".").lstrip(":").strip()
    if method == "text" and (text in tuple("abcde") or text in map(_stripped, question.choices) or _rounded(text)):
        method = "bare"
    return text, method


def _stripped(text: str) -> str:
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if 0 <= start < end:
        text = text[start + len("oxed{") : end]
    closing, opening = text.find("}"), text.find("{")
    if closing >= 0 and not 0 <= opening < closing:  # the box's own brace: what follows is no part of it
        text = text[:closing]
    text = text.rpartition("=")[2].rpartition(r"\approx")[2].replace("∞", r"\infty").replace("\\\\", "\\")
    text = text.replace(r"\$", "")
    for piece in _DROPPED:
        text = text.replace(piece, "")
    for other, same in _SPELLINGS:
        text = text.replace(other, same)
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", "0" + text if text.startswith(".") else text)
    return r"\frac{1}{2}" if text == "0.5" else re.sub(r"\A(-?\d+)/(-?\d+)\Z", r"\\frac{\1}{\2}", text)


def is_right(question: Question, answer: str) -> bool:
    """Whether an extracted answer is the question's: its letter, the text of that option, or its value."""
    letter = question.gold if question.choices else ""
    place = ord(letter) - ord("A") if len(letter) == 1 else -1
    option = question.choices[place] if 0 <= place < len(question.choices) else ""
    return _equal(question.gold, answer) or _equal(option, answer)


def _equal(gold: str, answer: str) -> bool:
    gold, answer = gold.lower().strip(), answer.strip()
    if not gold or not answer:
        return False
    return gold == answer or (_rounded(gold) is not None and _rounded(gold) == _rounded(answer))


def _rounded(text: str) -> tuple | None:
    """Values to two places of a number, or of a list and its bracket; 1:4 is a quotient. A unit makes it text."""
    if len(text) > MAX_CHARS:
        return None
    text = text.replace("$", "").replace(":", "/").strip()
    listed = len(text) > 2 and (text[0] + text[-1]) in ("()", "[]") and "," in text
    values = [_value(part) for part in (text[1:-1].split(",") if listed else [text])]
    try:
        return None if None in values else (listed and text[0], *(round(float(value), 2) for value in values))
    except OverflowError:
        return None


def _value(text: str) -> Fraction | Decimal | None:
    """The value of an expression as the owners' parser takes it: up to a bracket too many, and of plain signs alone."""
    text = re.sub(r"([0-9])\s*(?=\\frac)", r"\1*", _ENDED.split(text, maxsplit=1)[0])  # 1\frac{1}{2} is a product there
    opened = 0
    for i, sign in enumerate(text):
        opened += (sign in "({") - (sign in ")}")
        if opened < 0:
            text = text[:i]
            break
    return value_of(text) if _EXPRESSION.fullmatch(text) else None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


BENCHMARK = Benchmark(
    title="MATH-Vision",
    files=("test.jsonl", "testmini.jsonl"),
    categories=CATEGORIES,
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
    owners_use_a_model=False,
    unfound=("text",),
)
