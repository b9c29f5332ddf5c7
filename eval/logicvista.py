r"""LogicVista (arXiv 2407.04973): five kinds of logical reasoning in pictures, answered by one letter or several.

The owners let a large model extract the letters (github.com/Yijia-Xiao/LogicVista, eval/). Here rules do, so scores
come close to published ones without being them: the letters of the box, or of the whole response, or of the last
"answer is" that lists several (A, C and D); else the one letter that `letter` (eval/extraction.py) finds. As theirs,
the answer is right if its letters, sorted, are exactly gold's. Accuracy is given by skill and capability.

Folder: `dataset.json`, {id: question}, `images/`. Responses: the owners' {id: {"answer": text}}, or JSON or JSONL of
`id` and `response`.
"""

import re

from eval.benchmark import Benchmark, Question, gold_of, picture, plain_response
from eval.extraction import letter, number, read
from upt.answers import answer_key, extract_answer

_SIGN = "[A-Z0-9]"  # most are letters to H, one question has numbers for its choices
_SIGNS = rf"\(?{_SIGN}\)?(?:(?:,? (?:and|&) |, ?|; ?)\(?{_SIGN}\)?)*"
_ALONE = re.compile(rf"(?i:(?:options?|choices?|answers?):? )?({_SIGNS})\.?")
_STATED = re.compile(rf"(?i:\b(?:answers?|options?|choices?)(?: is| are|:)+) ?\*{{0,2}}({_SIGNS})\*{{0,2}}(?=[.\s]|$)")


def question(key: str | None, row: dict, split: str) -> Question:
    capability = row.get("broad_capability") or row["capability"]
    return Question(
        id=str(key if key is not None else row["id"]),
        text=row["question"],
        gold=_listed(gold_of(row["answer"])),
        choices=(),
        image=picture(row, "imagename", "image"),
        categories={"skill": tuple(row["skill"]), "capability": tuple(capability)},
        answer_type="letters",
    )


def response(key: str | None, row: dict) -> tuple[str, str | None]:
    """(id, text) of a response: `response`, or the `answer` of the owners' files, behind the prompt if it is in it."""
    if "response" in row:
        return plain_response(key, row)
    if "imagename" in row:
        raise KeyError("response")  # a question, whose answer is gold
    return plain_response(key, row | {"response": (row["answer"] or "").rpartition("ASSISTANT:")[2]})


def prompt(question: Question) -> str:
    return f"{question.text}\nAnswer with the letter of the right choice, or with all of them if several are right."


def extract(response: str, question: Question) -> tuple[str, str]:
    """The letters that a response gives, as `A, C`, "" for none, and the rule that found them."""
    reading = read(response)
    boxed = extract_answer(reading.text)
    if boxed and (key := answer_key(boxed, multi=True)) and re.fullmatch(f"[A-Z]+|{_SIGN}", key.upper()):
        return ", ".join(key.upper()), "box"
    text = reading.text.upper() if len(reading.text) == 1 else reading.text
    if len(text) < 100 and (alone := _ALONE.fullmatch(text)):
        return _listed(alone[1]), "letters"
    if (stated := _STATED.findall(reading.text)) and len(_listed(stated[-1])) > 1:
        return _listed(stated[-1]), "letters"
    found, method = letter(reading)
    return (found, method) if found else number(reading)


def is_right(question: Question, answer: str) -> bool:
    """Whether the letters are exactly gold's."""
    return answer != "" and answer == question.gold


def _listed(text: str) -> str:
    return ", ".join(sorted(set(re.findall(rf"\b{_SIGN}\b", text.upper()))))


BENCHMARK = Benchmark(
    title="LogicVista",
    files=("dataset.json",),
    categories=("skill", "capability"),
    question=question,
    extract=extract,
    is_right=is_right,
    prompt=prompt,
    response=response,
)
