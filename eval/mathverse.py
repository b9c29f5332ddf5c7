r"""MathVerse (arXiv 2403.14624): a problem in up to six versions, which move what it says from text into the picture.

The owners let a large model extract the answer and judge whether it means the same as gold
(github.com/ZrrSkywalker/MathVerse, evaluation/). Here rules do both, so scores come close to published ones without
being them. Of a question with choices: the choice that `chosen` (eval/extraction.py) finds, by its letter. Of any
other: the box, else what follows the last "the answer is", else the number that `number` finds; it is right if its vote
key (upt/answers) is that of gold, so that units do not matter. Accuracy is given by problem version, subject and
subfield.

Folder: `testmini.json`, `testmini_text_only.json`, `images/`; hub: AI4Math/MathVerse. Responses: JSON or JSONL of
`sample_index` (or `id`) and `response`. The text-only file counts its samples anew, so its ids get the version's name:
`Text Only/1`, or plainly `1` where the folder has no other file. In the owners' files of results the response is called
`model_answer`, which is not read here: rename it.
"""

import re

from eval.benchmark import Benchmark, Question, gold_of, lettered, picture
from eval.extraction import LETTERS, chosen, letter, number, numbers, read, statements
from upt.answers import answer_key, extract_answer, value_of

TEXT_ONLY = "Text Only"
_CHOICES = re.compile(r"\bChoices?:")


def question(key: str | None, row: dict, split: str) -> Question:
    metadata = row["metadata"]
    index, version = str(row["sample_index"]), row["problem_version"]
    text = row.get("question_for_eval") or row["question"]  # in the version Vision Only the question has no text
    has_choices = row["question_type"] == "multi-choice"
    return Question(
        id=f"{version}/{index}" if version == TEXT_ONLY else index,
        alias=index,
        text=row["question"],
        gold=gold_of(row["answer"]),
        choices=lettered(_CHOICES.split(text)[-1]) if has_choices else (),
        image=picture(row, "image"),
        categories={
            "problem_version": (version,),
            "subject": (metadata["subject"],),
            "subfield": (metadata["subfield"],),
        },
        answer_type=row["question_type"],
        query=row.get("query_cot") or "",
    )


def response(key: str | None, row: dict) -> tuple[str, str | None]:
    """(id, text) of a response in the owners' layout, or with `id`."""
    if "id" in row:
        return str(row["id"]), row["response"]
    prefix = f"{TEXT_ONLY}/" if row.get("problem_version") == TEXT_ONLY else ""
    return f"{prefix}{row['sample_index'] if key is None else key}", row["response"]


def prompt(question: Question) -> str:
    """The owners' query that asks for reasoning first, as their files have it."""
    return question.query or f"Reason step by step, then end with the final answer.\nQuestion: {question.text}"


def extract(response: str, question: Question) -> tuple[str, str]:
    """A letter, or the answer as text; "" for none; and the rule that found it."""
    reading = read(response)
    if question.choices:
        place, method = chosen(reading, question.choices, question.text)
        return "" if place is None else LETTERS[place], method
    if question.answer_type == "multi-choice":  # its choices stand in the picture alone
        return letter(reading)
    if boxed := extract_answer(reading.text):
        return boxed, "box"
    for said in statements(reading.text, 200):
        said = said.strip(" \n*:").partition("\n")[0].rstrip(".")
        if said:
            found = numbers(said) if value_of(said) is None and "=" not in said else []
            return (found[0] if len(found) == 1 else said), "stated"
    return number(reading)


def is_right(question: Question, answer: str) -> bool:
    """Whether a letter is gold's, or an answer has gold's vote key."""
    if question.answer_type == "multi-choice":
        return answer == question.gold
    key = answer_key(answer)
    return key is not None and key == answer_key(question.gold)


BENCHMARK = Benchmark(
    title="MathVerse",
    files=("testmini.json", "testmini_text*only.json"),
    categories=("problem_version", "subject", "subfield"),
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
    choices_in_text=True,
    response=response,
)
