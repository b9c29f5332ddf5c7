r"""We-Math (arXiv 2407.01284): problems of two or three steps, each step also asked as a question of its own.

The rule, from github.com/We-Math/We-Math (evaluation/), in our words and our code. The answer is what follows the last
"Answer" of the response, all of it where there is no such word: signs <>:. are dropped, and the first character is the
letter, if it is one of A to H. One departure, since their prompt asks for that word and others do not: a box counts
where that word is missing or gives no letter. Accuracy is given by steps; one-step questions are the steps of problems.

Each problem is then put into one of four, from its steps and its whole, strict / loose:

    RM  rote memorization              the whole right, though a step is wrong / though all steps are wrong
    CM  complete mastery               the whole right, and all steps are / and a step is
    IG  inadequate generalization      the whole wrong, though all steps are right
    IK  insufficient knowledge         the whole wrong, and a step is too

    score = 1 - (IG / 2 + RM + IK) / problems

IG, IK and CM are shares of all problems, RM is a share of RM + CM. The owners divide by their 525 problems; here it is
by the problems whose questions were all answered, the same number for a full set.

Folder: `testmini.json`, `2steps/`, `3steps/`; hub: We-Math/We-Math. Responses: a JSON list of the owners' rows with
`response`, or JSONL of `id` (`2steps_1/2steps_multi`: the row's ID and key, or its question number) and `response`.
"""

import re
from collections import Counter

from eval.benchmark import Benchmark, Question, gold_of, grouped, lettered, picture
from eval.extraction import LETTERS
from upt.answers import answer_key, extract_answer

_SIGNS = re.compile(r"[<>:.]")


def question(key: str | None, row: dict, split: str) -> Question:
    kind, part = row["key"].split("_")  # 2steps_1, 3steps_multi
    steps = {"2steps": "two", "3steps": "three"}[kind] if part == "multi" else "one"
    return Question(
        id=f"{row['ID']}/{row['key']}",
        alias=str(row["question number"]),
        text=row["question"],
        gold=gold_of(row["answer"]),
        choices=lettered(row["option"]),
        image=picture(row, "image_path", "image"),
        categories={"steps": (steps,)},
        problem=row["ID"],
    )


def response(key: str | None, row: dict) -> tuple[str, str | None]:
    """(id, text) of a response in the owners' layout, or with `id`."""
    return str(row["id"]) if "id" in row else f"{row['ID']}/{row['key']}", row["response"]


def prompt(question: Question) -> str:
    """The owners' style: a short thought and the option, each after its mark and in double angle brackets."""
    options = "; ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
    return (
        "Solve this multiple-choice question: think it through in a few words, then name the right option.\n"
        f"Question: {question.text}\nOption: {options}\n"
        "Write both between double angle brackets, in this form:\n"
        "<Thought process>: <<your thought process>>\n<Answer>: <<your option>>"
    )


def extract(response: str, question: Question) -> tuple[str, str]:
    """The letter that a response gives, "" for none, and the rule that found it."""
    _, mark, tail = response.rpartition("Answer")
    text = _SIGNS.sub("", tail.strip()[:1000]).strip()
    letter = text[0] if text and text[0] in LETTERS else ""
    alone = not re.match(r"\w|[^\S\n]+[a-z]", text[1:])  # and not the start of a sentence
    if letter and (mark or alone):
        return letter, "answer" if mark else "letter"
    if (boxed := extract_answer(response)) and (key := answer_key(boxed, question.choices)):
        return key, "box"
    return letter, "first" if letter else "none"


def is_right(question: Question, answer: str) -> bool:
    """Whether the letter is gold's."""
    return answer == question.gold


def metrics(rows: list[dict], questions: dict[str, Question]) -> dict:
    """The four-dimensional metrics and the score, strict and loose, as shares; None where nothing divides.

    Of several samples, those of equal number are taken together and their counts summed. `incomplete` counts problems
    without a verdict on every question; they are left out.
    """
    whole, incomplete = grouped(rows, questions)
    counts = Counter(problems=len(whole), incomplete=incomplete)
    for found in whole:
        solved = next(right for uid, right in found.items() if uid.endswith("multi"))
        steps = [right for uid, right in found.items() if not uid.endswith("multi")]
        counts["IG"] += not solved and all(steps)
        counts["IK"] += not solved and not all(steps)
        for name, mastered in (("strict", all(steps)), ("loose", any(steps))):
            counts["CM", name] += solved and mastered
            counts["RM", name] += solved and not mastered
    result = {"problems": counts["problems"], "incomplete": counts["incomplete"]}
    for name in ("strict", "loose") if counts["problems"] else ():
        n, ig, ik = counts["problems"], counts["IG"], counts["IK"]
        cm, rm = counts["CM", name], counts["RM", name]
        result[name] = {"score": 1 - (ig / 2 + rm + ik) / n, "IK": ik / n, "IG": ig / n, "CM": cm / n}
        result[name]["RM"] = rm / (rm + cm) if rm + cm else None
    return result


BENCHMARK = Benchmark(
    title="We-Math",
    files=("testmini.json",),
    categories=("steps",),
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
    owners_use_a_model=False,
    unfound=("first", "none"),
    response=response,
    metrics=metrics,
)
