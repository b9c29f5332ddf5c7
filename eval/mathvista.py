r"""MathVista (arXiv 2310.02255): questions in the owners' layout, and answers scored by the rule of their repository.

The owners let a large model extract the answer from a response. Here rules do (eval/extraction.py), so scores come
close to published ones without being them. What is extracted is then compared as theirs is
(github.com/lupantech/MathVista, evaluation/): a choice by its text, what is none of the choices standing for the one
with the fewest edits; an integer cut off, a float rounded to the question's precision, a list as text. A response
without an answer is wrong unless the nearest choice is right.

A question with choices is answered by one (`chosen`), one with a list by the last in brackets, all others by a number.

Folder: `testmini.json` or `test.json`, {pid: question}, and `images/`; hub: AI4Math/MathVista. Responses: {pid:
{"response": …}}.
"""

import re

from eval.benchmark import Benchmark, Question, gold_of, picture, texts_of
from eval.extraction import LETTERS, MAX_CHARS, chosen, number, read

_LIST = re.compile(r"\[[^\[\]]{0,500}\]")


def question(key: str | None, row: dict, split: str) -> Question:
    metadata = row["metadata"]
    categories = {name: (row[name],) for name in ("question_type", "answer_type")}
    categories |= {"task": (metadata["task"],), "skills": tuple(metadata["skills"])}
    return Question(
        id=str(row["pid"]),
        text=row["question"] + (f" (Unit: {row['unit']})" if row.get("unit") else ""),
        gold=gold_of(row.get("answer")),  # of the split `test` the owners keep the answers
        choices=texts_of(row["choices"]),
        image=picture(row, "decoded_image", "image"),
        categories=categories,
        answer_type=row["answer_type"],
        precision=int(row["precision"] or 0),
        query=row.get("query") or "",
    )


def prompt(question: Question) -> str:
    """Hint, question, choices, as the owners' queries have them: the form of the answer is said first."""
    if question.query:
        return question.query
    decimals = f"a decimal number of {question.precision} decimal place{'s' * (question.precision != 1)}"
    wanted = {"integer": "a whole number", "float": decimals, "list": "a list, such as [1, 2, 3]"}
    form, options = wanted.get(question.answer_type, "the final value"), ""
    if question.choices:
        form = "the letter of the right option, such as A, B, C or D"
        named = (f"({letter}) {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
        options = "\n".join(["", "Choices:", *named])
    return f"Hint: End your answer with {form}.\nQuestion: {question.text}{options}"


def extract(response: str, question: Question) -> tuple[str, str]:
    """The answer that a response gives to the question, "" for none, and the rule that found it."""
    if question.answer_type == "list" and not question.choices:
        found = _LIST.findall(response[-MAX_CHARS:])
        return (found[-1], "list") if found else ("", "none")
    reading = read(response)
    if not question.choices:
        return number(reading)
    place, method = chosen(reading, question.choices, question.text)
    return "" if place is None else question.choices[place], method


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


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


BENCHMARK = Benchmark(
    title="MathVista",
    files=("testmini.json", "test.json"),
    categories=("question_type", "answer_type", "task", "skills"),
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
)
