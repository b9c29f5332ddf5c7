r"""DynaMath (arXiv 2411.00836): seed questions, each in several variants, so that luck and memory show.

The rule, from github.com/DynaMath/DynaMath (evaluation/), in our words and our code. The owners ask for JSON whose
"short answer" is the answer, and without it take the last line; for other responses a rule comes in between
(eval/extraction.py): the box, a number in decimals, else by the question's type the letter or the number that `letter`
or `number` finds. An answer is right by type:

    float             its first word within 0.001 of gold; what stands before π in it is multiplied by π
    multiple choice   the letter, or gold's letter among the first three characters
    any other         gold occurs in the answer as text

Where every variant of a seed question was answered: `average` is the share of right answers, `worst` the share of seed
questions that are right in all variants, `robustness` = worst / average; all of it by subject and level too.

Folder: `dataset.json`, {number: question}, `image/`; hub: DynaMath/DynaMath_Sample, whose files `sample1` to `sample10`
are variants. Ids are `12` in the first, `12/3` for variant 3 of question 12 in the second; a row of responses may have
`variant` instead. Responses: the owners' {number: {"response": {"short answer": …}}}, or JSON or JSONL of `id` and
`response`.
"""

import json
import math
import re
from collections import Counter, defaultdict

from eval.benchmark import Benchmark, Question, gold_of, grouped, lettered, picture, plain_response
from eval.extraction import letter, number, numbers, read, statements
from upt.answers import extract_answer, value_of

TOLERANCE = 0.001
_SHORT = re.compile(r"[\"']short answer[\"']\s*:\s*(?:\"((?:[^\"\\]|\\.)*)\"|'([^'\n]*)'|([^\s\",}]+))", re.IGNORECASE)
_CHOICES = re.compile(r"(?i)\bchoices?\s*:")


def question(key: str | None, row: dict, split: str) -> Question:
    seed, variant = str(row["id"] if key is None else key), re.search(r"\d+$", split)
    text, kind = row["question"], row["answer_type"]
    gold = gold_of(row["answer"] if "answer" in row else row["ground_truth"])
    if kind == "float":
        float(gold)  # a ValueError where it is no number
    return Question(
        id=f"{seed}/{variant[0]}" if variant else seed,
        alias=seed,
        text=text,
        gold=gold,
        choices=lettered(_CHOICES.split(text)[-1]) if kind == "multiple choice" else (),
        image=picture(row, "decoded_image", "image"),
        categories={"subject": (row["subject"],), "level": (row.get("level") or row["knowledge_level"],)},
        answer_type=kind,
        problem=seed,
    )


def response(key: str | None, row: dict) -> tuple[str, str | None]:
    """(id, text) of a response. An object, as the owners' files have it, is its short answer."""
    if isinstance(text := row["response"], dict):
        text = json.dumps(text, ensure_ascii=False)
    uid, text = plain_response(key, row | {"response": text})
    return f"{uid}/{row['variant']}" if "variant" in row else uid, text


def prompt(question: Question) -> str:
    """The owners' style: JSON with a solution and a short answer."""
    form = {
        "float": "a number with three decimal places",
        "multiple choice": "only the letter of the option, such as A, B, C or D",
    }.get(question.answer_type, "a few words")
    return (
        f"## Question\n{question.text}\n## How to answer\nGive one JSON object with two keys: 'solution' for the "
        f"steps, and 'short answer' for the result alone, {form}. For example:\n"
        '{\n    "solution": "[the steps]",\n    "short answer": "[the result]"\n}'
    )


def extract(response: str, question: Question) -> tuple[str, str]:
    """The short answer that a response gives, "" for none, and the rule that found it."""
    if found := list(_SHORT.finditer(response)):
        quoted, single, bare = found[-1].groups()
        return (_unescaped(quoted) if quoted is not None else single or bare or "").strip(), "json"
    reading = read(response)
    if boxed := extract_answer(reading.text):
        return _decimal(boxed) if question.answer_type == "float" else boxed, "box"
    if question.answer_type == "multiple choice":
        return letter(reading)
    if question.answer_type == "float":
        return number(reading)
    for said in statements(reading.text, 200):
        if said := said.strip(" \n*:").partition("\n")[0].rstrip(".*"):
            return said, "stated"
    last = response.strip().rpartition("\n")[2].rstrip(".")
    return last, "last line" if last else "none"


def _unescaped(text: str) -> str:
    try:
        return json.loads(f'"{text}"')
    except ValueError:
        return text


def _decimal(answer: str) -> str:
    """A number as the rule can read it; an answer that is none stays what it is."""
    value = value_of(answer)
    if value is None:
        return next(iter(numbers(answer)), answer)
    try:
        return str(float(value))
    except OverflowError:
        return answer


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is right by the rule for the question's type."""
    if question.answer_type == "float":
        word = answer if answer.isdigit() else answer.partition(" ")[0]
        try:
            value = float(word.partition("π")[0]) * (math.pi if "π" in word else 1)
        except ValueError:
            return False
        return abs(value - float(question.gold)) <= TOLERANCE
    if question.answer_type == "multiple choice":
        return answer == question.gold or (len(answer) > 1 and question.gold in answer[:3])
    return question.gold in answer


def metrics(rows: list[dict], questions: dict[str, Question]) -> dict:
    """Average and worst-case accuracy over variants, of all and by category. Samples of equal number go together.

    `incomplete` counts seed questions without a verdict on every variant; they are left out.
    """
    whole, incomplete = grouped(rows, questions)
    groups: dict[tuple[str, str], list[list[bool]]] = defaultdict(list)
    for found in whole:
        groups["all", ""].append(list(found.values()))
        for name, values in questions[next(iter(found))].categories.items():
            groups[name, values[0]].append(list(found.values()))
    variants = Counter(question.problem for question in {id(q): q for q in questions.values()}.values())
    result: dict = {"variants": max(variants.values(), default=0), "incomplete": incomplete}
    for (name, value), seeds in sorted(groups.items()):
        average = sum(sum(seed) / len(seed) for seed in seeds) / len(seeds)
        worst = sum(map(all, seeds)) / len(seeds)
        figures = {"average": average, "worst": worst}
        if name == "all":
            robustness = worst / average if average else None
            result |= {"questions": len(seeds), **figures, "robustness": robustness}
        else:
            result.setdefault(name, {})[value] = figures
    return result


BENCHMARK = Benchmark(
    title="DynaMath",
    files=("dataset*.json", "trial*/dataset.json", "10trials/trial*/dataset.json"),
    categories=("subject", "level"),
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
    choices_in_text=True,
    response=response,
    metrics=metrics,
    variants=True,
)
