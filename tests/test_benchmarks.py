"""We-Math, MathVerse, LogicVista and DynaMath: rules by cases, and their figures on result sets counted by hand."""

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import dynamath, logicvista, mathverse, score, wemath
from eval.benchmark import NAMES, Question, benchmark, lettered
from tests.test_score import HOSTILE

SHARED = Path(os.environ.get("UPT_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))


def scored(name: str, folder: Path, responses, **settings) -> dict:
    """The summary of responses: a dict or a list of rows."""
    path = folder / "answers" / "a.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(responses))
    return score.score(score.Config(name, str(folder), path, folder / "out" / "s.jsonl", **settings))


def correct(folder: Path) -> dict[str, bool]:
    return {row["id"]: row["correct"] for row in map(json.loads, (folder / "out" / "s.jsonl").open())}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. 300, 400;B. 400, 300; C. No", ("300, 400", "400, 300", "No")),
        ("(A) Yes (B) No", ("Yes", "No")),
        ("\nA:40°\nB:60°", ("40°", "60°")),
        ("(A) + (B) - (C) * (D) /", ("+", "-", "*", "/")),
        ("A) x. B is so B) y", ("x. B is so", "y")),
        ("B. 5; C. 7", ()),
        ("A. alone", ()),
        ("AB. 5 CB. 7", ()),
        ("", ()),
    ],
)
def test_options_are_read_from_text(text, options):
    assert lettered(text) == options


@pytest.mark.parametrize("name", NAMES)
def test_the_owners_files_are_read_and_gold_is_right(name):
    if not (SHARED / name).exists():
        pytest.skip("the owners' files are not on this machine")
    bench = benchmark(name)
    questions = [question for split in bench.questions(SHARED / name).values() for question in split]
    assert len(questions) == {"mathvision": 3142, "mathverse": 120, "mathvista": 1000, "wemath": 120, "logicvista": 64,
                              "dynamath": 63}[name]  # fmt: skip
    for question in questions:
        assert set(question.categories) == set(bench.categories) and all(question.categories.values())
        gold = question.gold.lower() if name == "mathvision" else question.gold
        assert gold and bench.is_right(question, gold)
        if name != "mathvista" or not question.choices:  # there the nearest choice counts
            assert not bench.is_right(question, "surely not this")
        if question.choices and name != "mathvista" and len(question.gold) == 1:
            assert ord(question.gold) - ord("A") < max(len(question.choices), 5)


# ---------------------------------------------------------------------------------------------------------- We-Math


def we_math(folder: Path, problems: dict[str, str]) -> list[dict]:
    """Questions of problems and responses to them, right as said: of "110" both steps are, the whole is not."""
    rows, number = [], 0
    for problem, rights in problems.items():
        kind = problem.split("_")[0]
        for part, right in zip([*map(str, range(1, len(rights))), "multi"], rights, strict=True):
            number += 1
            rows.append({
                "ID": problem, "key": f"{kind}_{part}", "question number": number, "question": "How long?",
                "option": "A. 1; B. 2; C. 3", "answer": "B", "image_path": "a.png",
                "response": "<Answer>: <<B>>" if right == "1" else "<Answer>: <<C>>",
            })  # fmt: skip
    (folder / "testmini.json").write_text(json.dumps([{k: v for k, v in r.items() if k != "response"} for r in rows]))
    return rows


PROBLEMS = {
    "2steps_1": "111",  # mastered
    "2steps_2": "101",  # strictly learnt by rote, loosely mastered
    "2steps_3": "001",  # learnt by rote
    "2steps_4": "110",  # not generalized
    "2steps_5": "010",  # knowledge is lacking
    "3steps_1": "1100",  # the same
    "3steps_2": "1111",  # mastered
    "3steps_3": "0011",  # strictly learnt by rote, loosely mastered
}


def test_four_dimensional_metrics_by_hand(tmp_path):
    rows = we_math(tmp_path, PROBLEMS)
    found = scored("wemath", tmp_path, rows)
    # IG 1, IK 2; strict: CM 2, RM 3; loose: CM 4, RM 1; of 8 problems.
    ratios = {"IK": 2 / 8, "IG": 1 / 8}
    assert found["metrics"] == {
        "problems": 8,
        "incomplete": 0,
        "strict": {"score": 1 - (0.5 + 3 + 2) / 8, **ratios, "CM": 2 / 8, "RM": 3 / 5},
        "loose": {"score": 1 - (0.5 + 1 + 2) / 8, **ratios, "CM": 4 / 8, "RM": 1 / 5},
    }
    steps = {name: (of["n"], of["accuracy"]) for name, of in found["categories"]["steps"].items()}
    assert steps == {"one": (19, 12 / 19), "two": (5, 3 / 5), "three": (3, 2 / 3)}
    assert "| strict RM | 60.00 |" in score.report(found) and "| loose score | 56.25 |" in score.report(found)


def test_problems_without_all_verdicts_are_left_out_and_samples_are_summed(tmp_path):
    rows = we_math(tmp_path, {"2steps_1": "111", "2steps_2": "110"})
    found = scored("wemath", tmp_path, rows[:-1])["metrics"]
    assert (found["problems"], found["incomplete"], found["strict"]["score"]) == (1, 1, 1.0)
    assert found["strict"]["RM"] == 0 and scored("wemath", tmp_path, rows[3:])["metrics"]["strict"]["RM"] is None
    again = [row | {"sample": 1, "response": "<Answer>: <<C>>"} for row in rows]
    found = scored("wemath", tmp_path, rows + again)["metrics"]
    assert found["problems"] == 4 and found["strict"]["score"] == 1 - (0.5 + 2) / 4
    assert scored("wemath", tmp_path, rows[:2])["metrics"] == {"problems": 0, "incomplete": 1}


@pytest.mark.parametrize(
    ("response", "answer", "method"),
    [
        ("<Thought process>: <<C>> <Answer>: <<B>>.", "B", "answer"),
        ("Answer: B. 2", "B", "answer"),
        ("Answer A, no, Answer: Because", "B", "answer"),  # as the owners' rule has it
        ("C is too long. Answer: none", "", "none"),
        ("B. It is 2", "B", "letter"),
        ("As we see, it is 2", "A", "first"),  # as the owners' rule has it
        (r"As we see, \boxed{C}", "C", "box"),
        (r"Answer: \boxed{\text{B}}", "B", "box"),
        (r"\boxed{3}", "C", "box"),  # the text of option C
        ("b", "", "none"),
        ("", "", "none"),
    ],
)
def test_we_maths_letter(tmp_path, response, answer, method):
    we_math(tmp_path, {"2steps_1": "111"})
    question = wemath.BENCHMARK.by_id(tmp_path)["2steps_1/2steps_multi"]
    assert wemath.extract(response, question) == (answer, method)


def test_we_maths_rows_by_id_or_number(tmp_path):
    we_math(tmp_path, {"2steps_1": "111"})
    found = scored("wemath", tmp_path, [{"id": "2steps_1/2steps_1", "response": "B"}, {"id": 2, "response": "B"}])
    assert found["correct"] == 2 and set(correct(tmp_path)) == {"2steps_1/2steps_1", "2steps_1/2steps_2"}


# -------------------------------------------------------------------------------------------------------- MathVerse


def verse(index: int, version: str, answer: str, question: str = "Find x.") -> dict:
    kind = "multi-choice" if "Choices:" in question else "free-form"
    return {
        "sample_index": str(index), "problem_index": "1", "problem_version": version, "question": question,
        "image": "" if version == "Text Only" else "images_version_1-4/image_1.png", "answer": answer,
        "question_type": kind, "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
        "query_cot": f"Reason first. {question}",
    }  # fmt: skip


CHOICE = "Find x.\nChoices:\nA:40°\nB:60°"


@pytest.mark.parametrize(
    ("gold", "question", "response", "answer", "right"),
    [
        ("B", CHOICE, r"\boxed{B}", "B", True),
        ("B", CHOICE, "so the angle is 60°.", "B", True),
        ("B", CHOICE, "The answer is A.", "A", False),
        ("14", "Find x.", r"\boxed{14\text{ cm}}", r"14\text{ cm}", True),
        ("14", "Find x.", "L = √205. The final answer is approximately 14 cm.", "14", True),
        ("14", "Find x.", "So L = 13.9 cm", "13.9", False),
        ("f(x)=-x^2-2x+1", "Find f.", "The answer is: f(x) = -x^2 - 2x + 1", "f(x) = -x^2 - 2x + 1", True),
        ("(-2, 1]", "Find x.", r"\boxed{(-2,1]}", "(-2,1]", True),
        ("(-2, 1]", "Find x.", r"\boxed{(-2,1)}", "(-2,1)", False),
        ("14", "Find x.", "I can't tell.", "", False),
    ],
)
def test_mathverses_answers(tmp_path, gold, question, response, answer, right):
    (tmp_path / "testmini.json").write_text(json.dumps([verse(1, "Text Lite", gold, question)]))
    asked = mathverse.BENCHMARK.by_id(tmp_path)["1"]
    found = mathverse.extract(response, asked)[0]
    assert found == answer and mathverse.is_right(asked, found) is right


@pytest.mark.parametrize("response", ["B", "(B)", "So the answer is (B) 60°.", r"\boxed{60^\circ}", "So it is 60°."])
def test_choices_that_stand_in_the_picture(tmp_path, response):
    """The question of the version Vision Only is empty; the owners have its text, for the evaluation, elsewhere."""
    row = verse(1, "Vision Only", "B", "") | {"question_type": "multi-choice", "question_for_eval": CHOICE}
    (tmp_path / "testmini.json").write_text(json.dumps([row, {**row, "sample_index": "2", "question_for_eval": ""}]))
    questions = mathverse.BENCHMARK.by_id(tmp_path)
    assert questions["1"].choices == ("40°", "60°") and mathverse.extract(response, questions["1"])[0] == "B"
    assert mathverse.extract("The answer is (B).", questions["2"]) == ("B", "letter")
    assert not mathverse.is_right(questions["2"], "60°")


def test_mathverse_by_version_and_its_two_files(tmp_path):
    (tmp_path / "testmini.json").write_text(json.dumps([verse(1, "Text Lite", "5"), verse(2, "Vision Only", "5")]))
    (tmp_path / "testmini_text_only.json").write_text(json.dumps([verse(1, "Text Only", "7")]))
    rows = [verse(1, "Text Lite", "5"), verse(2, "Vision Only", "5"), verse(1, "Text Only", "7")]
    answers = [r"\boxed{5}", r"\boxed{6}", r"\boxed{7}"]
    found = scored("mathverse", tmp_path, [row | {"response": text} for row, text in zip(rows, answers, strict=True)])
    assert correct(tmp_path) == {"1": True, "2": False, "Text Only/1": True}
    assert {k: v["accuracy"] for k, v in found["categories"]["problem_version"].items()} == {
        "Text Lite": 1.0, "Text Only": 1.0, "Vision Only": 0.0,
    }  # fmt: skip
    (tmp_path / "testmini.json").unlink()  # with one file alone, its numbers are ids
    assert scored("mathverse", tmp_path, [{"id": 1, "response": r"\boxed{7}"}])["correct"] == 1
    assert "in place of the owners' large model" in found["extraction"]


# ------------------------------------------------------------------------------------------------------- LogicVista


def logic(answer: str, skill: str = "inductive") -> dict:
    return {"imagename": "v1_0.png", "question": "Which?", "answer": answer, "skill": [skill], "capability": ["ocr"]}


@pytest.mark.parametrize(
    ("response", "answer", "method"),
    [
        (r"\boxed{C, A}", "A, C", "box"),
        (r"\boxed{AC}", "A, C", "box"),
        (r"\boxed{A and C}", "A, C", "box"),
        (r"\boxed{\text{C}}", "C", "box"),
        (" A ", "A", "letters"),
        ("(C), (A)", "A, C", "letters"),
        ("A, C and D.", "A, C, D", "letters"),
        ("Options: A and C", "A, C", "letters"),
        ("A and B look alike, B is round. So the answers are A and C.", "A, C", "letters"),
        ("They rotate. The correct answer is **B, D**.", "B, D", "letters"),
        ("Row by row the dot moves. The answer is (E).", "E", "letter"),
        ("They would all require the same effort", "", "none"),
        ("3", "3", "letters"),
        (r"\boxed{I}", "I", "box"),
        ("The third row is filled, so it is 3.", "3", "last"),
        ("", "", "none"),
    ],
)
def test_logicvistas_letters(response, answer, method):
    question = Question("v1_0", "Which?", "A, C", (), "v1_0.png", {}, "letters")
    assert logicvista.extract(response, question) == (answer, method)
    assert logicvista.is_right(question, answer) is (answer == "A, C")


def test_logicvista_by_skill_in_both_layouts(tmp_path):
    rows = {"v1_0": logic("C"), "v1_1": logic("C, A"), "v1_2": logic("D", "spatial"), "v1_3": logic("A, B", "spatial")}
    (tmp_path / "dataset.json").write_text(json.dumps(rows))
    texts = {"v1_0": " C ", "v1_1": "A, C", "v1_2": "The answer is B", "v1_3": "A"}
    found = scored("logicvista", tmp_path, {uid: {"answer": text, "reasoning": "none"} for uid, text in texts.items()})
    assert correct(tmp_path) == {"v1_0": True, "v1_1": True, "v1_2": False, "v1_3": False}  # A alone is not A, B
    assert {k: v["accuracy"] for k, v in found["categories"]["skill"].items()} == {"inductive": 1.0, "spatial": 0.0}
    boxed = [{"id": uid, "response": rf"\boxed{{{text}}}"} for uid, text in texts.items()]
    assert scored("logicvista", tmp_path, boxed, protocol="ours")["accuracy"] == 0.5
    prompted = {uid: {"answer": f"Is it A or B? The answer is D. ASSISTANT: {text}"} for uid, text in texts.items()}
    scored("logicvista", tmp_path, prompted)
    assert correct(tmp_path) == {"v1_0": True, "v1_1": True, "v1_2": False, "v1_3": False}
    with pytest.raises(
        ValueError, match="v1_0 is no response: it has no 'response'"
    ):  # the questions, whose answers are gold
        scored("logicvista", tmp_path, rows)


# --------------------------------------------------------------------------------------------------------- DynaMath


def dyna(answer: str, kind: str = "float", level: str = "high school", question: str = "How long?") -> dict:
    row = {"question": question, "answer": answer, "image": "image/a.png", "answer_type": kind}
    return row | {"subject": "algebra", "level": level}


@pytest.mark.parametrize(
    ("gold", "kind", "response", "answer", "right"),
    [
        ("2.0944", "float", '{"solution": "…", "short answer": "2.094"}', "2.094", True),
        ("2.0944", "float", '{"short answer": 2.0956}', "2.0956", False),  # off by more than 0.001
        ("2.0944", "float", "```json\n{'short answer': '2.0950'}\n```", "2.0950", True),
        ("6.2832", "float", '{"short answer": "2π"}', "2π", True),
        ("24", "float", '{"short answer": "24.0 cm"}', "24.0 cm", True),
        ("24", "float", r"4 sides of 6: \boxed{24}", "24.0", True),
        ("24", "float", r"4 sides of 6: \boxed{\text{about } 24 cm}", "24", True),
        ("0.5", "float", '{"short answer": "1/2"}', "1/2", False),  # a first word that Python reads as no float
        ("6.2832", "float", '{"short answer": "2\\u03c0"}', "2π", True),
        ("2.0944", "float", r"\boxed{\frac{2\pi}{3}}", "2.0943951023931957", True),
        ("24", "float", "The answer is 24.", "24", True),
        ("24", "float", '{"short answer": "1e999"}', "1e999", False),
        ("24", "float", '{"short answer": "unknown"}', "unknown", False),
        ("B", "multiple choice", '{"short answer": "B"}', "B", True),
        ("B", "multiple choice", '{"short answer": "(B) No"}', "(B) No", True),
        ("B", "multiple choice", '{"short answer": "No (B)"}', "No (B)", False),  # gold is behind three characters
        ("B", "multiple choice", "The answer is (B).", "B", True),
        ("B", "multiple choice", '{"short answer": "A"}', "A", False),
        ("x = 0", "text", '{"short answer": "The line x = 0"}', "The line x = 0", True),
        ("Nov", "text", "We look.\nThe answer is: Nov", "Nov", True),
        ("Nov", "text", "We look.\nIt is Nov.", "It is Nov", True),
        ("Nov", "text", "Nov rises, but\nDec more.", "Dec more", False),
        ("49", "single answer", "49", "49", True),
        ("24", "float", "", "", False),
    ],
)
def test_dynamaths_answers_by_type(gold, kind, response, answer, right):
    question = dynamath.question("1", dyna(gold, kind), "dataset")
    found = dynamath.extract(response, question)[0]
    assert found == answer and dynamath.is_right(question, found) is right


def test_worst_case_over_variants_by_hand(tmp_path):
    for variant, golds in ((1, ("1", "2", "3")), (2, ("4", "5", "6"))):
        rows = {"1": dyna(golds[0]), "2": dyna(golds[1]), "3": dyna(golds[2], level="undergraduate")}
        (tmp_path / f"dataset{variant}.json").write_text(json.dumps(rows))
    # Question 1 is right in both variants, 2 in one of them, 3 in none.
    said = {"1/1": "1", "1/2": "4", "2/1": "2", "2/2": "0", "3/1": "0", "3/2": "0"}
    found = scored("dynamath", tmp_path, {uid: {"response": {"short answer": text}} for uid, text in said.items()})
    assert found["metrics"] == {
        "variants": 2, "incomplete": 0, "questions": 3, "average": 3 / 6, "worst": 1 / 3, "robustness": (1 / 3) / 0.5,
        "level": {
            "high school": {"average": 3 / 4, "worst": 1 / 2}, "undergraduate": {"average": 0.0, "worst": 0.0},
        },
        "subject": {"algebra": {"average": 3 / 6, "worst": 1 / 3}},
    }  # fmt: skip
    del said["1/2"]
    by_field = [{"id": u[0], "variant": int(u[2]), "response": rf"\boxed{{{text}}}"} for u, text in said.items()]
    found = scored("dynamath", tmp_path, by_field)["metrics"]
    assert (found["questions"], found["incomplete"], found["worst"]) == (2, 1, 0.0) and found["robustness"] == 0.0
    with pytest.raises(ValueError, match="has the id '1'"):  # which variant it is is not said
        scored("dynamath", tmp_path, [{"id": "1", "response": "1"}])
    (tmp_path / "dataset2.json").unlink()
    assert scored("dynamath", tmp_path, {"1": {"response": {"short answer": "1"}}})["metrics"]["worst"] == 1.0


def test_a_float_question_needs_a_number(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"1": dyna("long")}))
    with pytest.raises(ValueError, match="dataset.json:1 is no DynaMath question: .*'long'; fetch"):
        dynamath.BENCHMARK.questions(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_text_is_scored_in_a_worker_thread(name, tmp_path):
    """A question of each type is answered by every hostile text, through eval.score."""
    if not (SHARED / name).exists():
        pytest.skip("the owners' files are not on this machine")
    kinds = {(q.answer_type, bool(q.choices)): q.id for q in benchmark(name).by_id(SHARED / name).values()}
    texts = [*HOSTILE, "Answer" * 10**5, '{"short answer": "' + "\\" * 10**5, "answers are A, B, " * 10**5]
    rows = [{"id": uid, "sample": n, "response": text} for uid in kinds.values() for n, text in enumerate(texts)]
    path, found = tmp_path / "a.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = score.Config(name, str(SHARED / name), path, tmp_path / "s.jsonl")
    worker = threading.Thread(target=lambda: found.append(score.score(config)), daemon=True)
    worker.start()
    worker.join(240)  # seconds; the longest takes about ten
    assert found and found[0]["n"] == len(rows)


FRAGMENTS = [
    "\\boxed{", "}", "{", "(", ")", "[", "]", "$", "\\", "\\frac", "\\sqrt", "\\text{", "^{", "^", "9", "9" * 50, "1e9",
    "1/0", ",", ".", "-", "=", "**", "\n", " ", "is ", "the answer is ", "Answer", "Answer: ", "A", "(B)", " C.", "and",
    "not ", "π", "°", "%", "\x00", "\u202e", "\ud800", '"short answer": "', "'", '"', "Therefore, ", "yes",
    "two", "<answer>", "</answer>", "inf", "nan", "in 2019", "7 of 9", "```", "<<", ">>", "a" * 300,
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join))
def test_no_text_of_such_pieces_crashes(text):
    for bench, question in ASKED:
        answer, method = bench.extract(text, question)
        assert isinstance(answer, str) and isinstance(method, str)
        assert bench.is_right(question, answer) in (True, False)


def asked(**changed) -> Question:
    plain = Question("1", "Are there fewer cars?", "B", ("5", "7 cm"), "", {"subject": ("x",)})
    return plain._replace(**changed)


ASKED = [(benchmark(name), asked()) for name in NAMES] + [
    (benchmark("mathvision"), asked(gold="7", choices=())),
    (benchmark("mathverse"), asked(gold="(-2, 1]", choices=())),
    (benchmark("mathvista"), asked(gold="7", choices=(), answer_type="integer")),
    (benchmark("mathvista"), asked(gold="1.2", choices=(), answer_type="float", precision=1)),
    (benchmark("mathvista"), asked(gold="[1, 2]", choices=(), answer_type="list")),
    (benchmark("mathvista"), asked(gold="No", choices=("Yes", "No"))),
    (benchmark("logicvista"), asked(gold="A, B", choices=(), answer_type="letters")),
    (benchmark("dynamath"), asked(gold="2.0944", choices=(), answer_type="float")),
    (benchmark("dynamath"), asked(gold="x = 0", choices=(), answer_type="text")),
    (benchmark("dynamath"), asked(answer_type="multiple choice")),
]
