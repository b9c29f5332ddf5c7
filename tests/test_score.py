"""Scoring saved responses by the benchmarks' own rules: each rule by cases, and against the owners' verdicts."""

import json
import os
import threading
from pathlib import Path

import pytest

from eval import mathvision, mathvista, score
from eval.benchmark import Question, benchmark
from eval.mathvision import extract, is_right

SHARED = Path(os.environ.get("UPT_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))

# ---------------------------------------------------------------------------------------------------- MATH-Vision


@pytest.mark.parametrize(
    ("response", "answer", "method"),
    [
        (r"so \boxed{60}.", "60", "box"),
        (r"\boxed{1}, no: \boxed{2}", "2", "box"),
        (r"\boxed{(B)}", "b", "box"),
        (r"\boxed{36^\circ}", "36", "box"),
        (r"\boxed{$x^2$}", "x^2", "box"),
        (r"\boxed{7\%}", "7", "box"),
        (r"\boxed{\$34}", "34", "box"),
        (r"\boxed{(-1,+\infty)}", r"(-1,\infty)", "box"),
        (r"\boxed{\dfrac{x}{2}}", r"\frac{x}{2}", "box"),
        ("The answer is $B$.", "b", "phrase"),
        (r"\boxed{x = \frac{1}{2}}", r"\frac{1}{2}", "box"),
        (r"$\boxed{\text{red}}$", "{red}", "box"),  # the owners' rule keeps the braces
        ("We add them.\nThe correct option is (C).", "c", "letter"),
        ("It is D.", "d", "letter"),
        ("B\nBecause it is the longest.", "b", "letter"),
        ("(E) E\nBecause.", "e", "letter"),
        ("The sum is 12.50.", "12.50", "number"),
        ("The answer is 7 cm. That is all", "7cm", "phrase"),
        ("the answer should be: x = 3\nand so on", "3", "phrase"),
        (r"\boxed{7 and then nothing. x = 5", "5", "box"),  # cut off: the rule takes all of the text
        (r"\boxed{1/2}, no: \boxed{0.5}", r"\frac{1}{2}", "box"),
        (r"\boxed{\sqrt3 + {.5}}", r"\sqrt{3}+{0.5}", "box"),
        (r"\boxed{-3/4}", r"\frac{-3}{4}", "box"),
        (r"\boxed{.25}", "0.25", "box"),
        ("Two bikes", "twobikes", "text"),
        ("", "", "text"),
    ],
)
def test_extraction_by_the_owners_steps(response, answer, method):
    assert extract(response, asked("1")) == (answer, method)


def asked(gold, *choices):
    return Question("1", "?", gold, choices, "images/1.jpg", {"subject": ("algebra",), "level": ("1",)})


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (asked("60"), "60", True),
        (asked("60"), "60.004", True),  # two places
        (asked("60"), "60.006", False),
        (asked("0.33"), r"\frac{1}{3}", True),
        (asked(r"\frac{3}{4}"), "0.75", True),
        (asked("B", "5", "7"), "b", True),
        (asked("B", "5", "7"), "7.0", True),  # the value of option B
        (asked("B", "5", "7"), "5", False),
        (asked("A", r"$\frac{1}{4}$", "2"), "1:4", True),
        (asked("A", r"$11 \mathrm{~m}$", "2"), "11", False),  # a unit in the option makes it text
        (asked("A", r"$\frac{1}{4}$", "2"), r"\frac{1}{4}}.theansweris", True),  # what follows the box's end is nothing
        (asked("(1,2)"), "(1.001,2)", True),
        (asked("(1,2)"), "(2,1)", False),
        (asked("(1,2)"), "[1,2]", False),
        (asked("48"), "**48**", False),  # what the owners' parser does not take for a number …
        (asked("3.14"), "π", False),
        (asked("48"), "48;", False),
        (asked("48"), r"\mathbf{48}", False),
        (asked("48"), "48)", True),  # … and what it does
        (asked("48"), "48.because", True),
        (asked("3000"), "3,000", True),
        (asked("0.5"), r"1\frac{1}{2}", True),  # a product
        (asked("2"), r"\sqrt[3]{8}", True),
        (asked("A", "red", "blue"), "red", True),
        (asked("C", "A", "B"), "c", True),  # more letters than options
        (asked(""), "", False),
        (asked("1"), "9" * 5000, False),
    ],
)
def test_equality_by_the_owners_rule(question, answer, right):
    assert is_right(question, answer) is right


@pytest.mark.parametrize("name", ["InternLM-XComposer2-VL-CoT", "Qwen-VL-Max-CoT"])
def test_the_owners_verdicts_on_a_models_answers(name, tmp_path, capsys):
    data, responses = SHARED / "mathvision", SHARED / f"responses/mathvision/{name}.jsonl"
    if not responses.exists():
        pytest.skip("the owners' files are not on this machine")
    out = tmp_path / "scores.jsonl"
    result = score.main(score.Config("mathvision", data, responses, out))
    official = {row["id"]: row["correct"] for row in map(json.loads, responses.open())}
    mine = {row["id"]: row["correct"] for row in map(json.loads, out.open())}
    theirs = {row["response"]: row["model_answer"] for row in map(json.loads, responses.open())}
    assert sum(extract(text, asked("1"))[0] != answer for text, answer in theirs.items()) <= 3
    agreement = sum(mine[uid] == verdict for uid, verdict in official.items()) / len(official)
    assert len(mine) == result["n"] == 3040 and agreement == 1
    assert result["accuracy"] == pytest.approx(sum(official.values()) / 3040, abs=0.001)


# ------------------------------------------------------------------------------------------------------ MathVista


def vista(gold, *choices, kind="text", precision=0, text="?"):
    return Question("1", text, gold, choices, "images/1.jpg", {}, kind, precision)


YES_NO, FRUIT = vista("Yes", "Yes", "No"), vista("guava", "apple", "guava", "date")
DEGREES = vista("65°", "60°", "65°", "165°")


@pytest.mark.parametrize(
    ("question", "response", "answer", "method"),
    [
        (FRUIT, "guava", "guava", "exact"),
        (FRUIT, "First option A looks right. So the answer is (B).", "guava", "letter"),
        (FRUIT, "Choice (A) is incorrect because it is red. The choice must be (C)", "date", "bracket"),
        (FRUIT, "**B.** It has seeds", "guava", "bracket"),
        (FRUIT, "The answer is the guava, not the date.", "guava", "stated"),
        (FRUIT, "An apple is red. It looks like a date or a guava.", "guava", "named"),
        (FRUIT, "It is a plum.", "", "none"),
        (FRUIT, "An apple's answer is A's problem.", "apple", "named"),  # A's is no label
        (DEGREES, "So the angle must be 165°.", "165°", "named"),  # and not 65°
        (DEGREES, "I get 65.0 in degrees", "65°", "value"),
        (YES_NO, "No, there are none.", "No", "polarity"),
        (YES_NO, "The bird is not on the tree.", "No", "polarity"),
        (YES_NO, "The bird sits on the tree.", "Yes", "polarity"),
        (vista("No", "Yes", "No", text="Are there fewer cars than bikes?"), "There are more cars.", "No", "polarity"),
        (vista("No", "Yes", "No", text="Are there fewer cars than bikes?"), "There are fewer cars.", "Yes", "polarity"),
        (vista("7", kind="integer"), "5 + 2 = 7. The answer is 7 of 9.", "7", "stated"),
        (vista("7", kind="integer"), r"Of 12 we take 5, \boxed{\frac{14}{2}}", "7", "box"),
        (vista("1.2", kind="float", precision=1), r"\boxed{12 \times 10^{-1}}", "1.2", "box"),
        (vista("-3", kind="integer"), "The answer is −3.", "-3", "stated"),
        (vista("7", kind="integer"), "**Step 2: Count**\nSo the total is 7.", "7", "conclusion"),
        (vista("7", kind="integer"), "There are **7** of them, out of 9.", "7", "bold"),
        (vista("7", kind="integer"), "Therefore, it is 3 + 4 = 7. There were 8 before.", "7", "conclusion"),
        (vista("2", kind="integer"), "There are two bars above 5.", "2", "count"),
        (vista("1200", kind="integer"), "It sold 900 and then 1,200", "1200", "last"),
        (vista("three", kind="integer"), "three", "3", "last"),
        (vista("3", kind="integer"), "I can't tell", "", "none"),
        (vista("[1, 2]", kind="list"), "[0, 1] or [1, 2]", "[1, 2]", "list"),
    ],
)
def test_extraction_by_rules(question, response, answer, method):
    assert mathvista.extract(response, question) == (answer, method)


@pytest.mark.parametrize(
    "response",
    [
        "B", "B.", "(B)", "(b)", "b", r"\boxed{B}", r"So it is $\boxed{\text{B}}$.", "The answer is $B$.",
        "**Answer:** B",
        "Answer: B", "Answer:\nB", "<answer>B</answer>", "The answer is (B) guava. Unlike choice A, it is green.",
        "The answer is B. Option A is too small, and option C is dried.", "The answer is B, not option A.",
        "Answer: B\n\nExplanation: Option A is red, option C is small.",
    ],
)  # fmt: skip
def test_a_letter_in_any_form(response):
    assert mathvista.extract(response, FRUIT) == ("guava", "letter")
    assert mathvista.extract(response.replace(" guava", ""), vista("No", "Yes", "No")) == ("No", "letter")


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (FRUIT, "guava", True),
        (FRUIT, "guavas", True),  # the nearest choice
        (FRUIT, "dates", False),
        (vista("7", kind="integer"), "7.9", True),  # cut off
        (vista("7", kind="integer"), "8", False),
        (vista("1.2", kind="float", precision=1), "1.249", True),
        (vista("1.2", kind="float", precision=1), "1.26", False),
        (vista("7", kind="integer"), "", False),
        (vista("7", kind="integer"), "9" * 5000, False),
        (vista("[1, 2]", kind="list"), "[1, 2]", True),
    ],
)
def test_equality_after_normalisation(question, answer, right):
    assert mathvista.is_right(question, answer) is right


@pytest.mark.parametrize(("name", "least"), [("output_bard", 0.985), ("output_llava_llama_2_13b", 0.969)])
def test_rules_agree_with_the_owners_extraction(name, least, tmp_path, capsys):
    path = SHARED / f"responses/mathvista/{name}.json"
    if not path.exists():
        pytest.skip("the owners' files are not on this machine")
    out = tmp_path / "scores.jsonl"
    result = score.main(score.Config("mathvista", SHARED / "mathvista", path, out))
    official = {uid: row["true_false"] for uid, row in json.loads(path.read_text()).items()}
    mine = {row["id"]: row["correct"] for row in map(json.loads, out.open())}
    assert sum(mine[uid] == verdict for uid, verdict in official.items()) >= least * 1000
    assert result["accuracy"] == pytest.approx(sum(official.values()) / 1000, abs=0.02)
    assert "| task | geometry problem solving | 208 |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ eval.score


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"id": "1", "question": "<image1>", "options": [], "answer": "60", "level": 2, "subject": "arithmetic"},
        {"id": "2", "question": "<image1>", "options": ["5", "7"], "answer": "B", "level": 1, "subject": "algebra"},
    ]
    lines = [json.dumps(row | {"image": "images/1.jpg"}) for row in rows]
    (tmp_path / "testmini.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def scores(folder, *rows, **settings) -> dict:
    path = folder / "answers" / "a.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return score.main(score.Config("mathvision", folder, path, folder / "out" / "s.jsonl", **settings))


def test_rows_tables_and_the_last_line(folder, capsys):
    result = scores(
        folder, {"id": "1", "response": r"\boxed{60}"}, {"id": 2, "response": r"\boxed{5}"},
        {"id": "2", "sample": 1, "response": "The answer is (B)."}, {"id": "1", "sample": 1, "response": None},
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == result
    assert (result["n"], result["correct"], result["accuracy"]) == (4, 2, 0.5)
    assert "| subject | algebra | 2* | 50.00 |" in printed and "| level | 2 | 2* | 50.00 |" in printed
    # "The answer is (B)." has no box, so it has no vote key.
    assert "official 50.00, ours 25.00; 1 verdicts differ" in printed
    assert "2 of 2 questions have a response; in 1 of 4 responses no answer was found" in printed
    rows = [json.loads(line) for line in (folder / "out/s.jsonl").open()]
    assert rows[0] == {
        "id": "1", "sample": 0, "key": "60", "correct": True, "method": "box", "vote_key": "60",
        "categories": {"level": ["2"], "subject": ["arithmetic"]},
    }  # fmt: skip
    assert [row["correct"] for row in rows] == [True, False, True, False]
    ours = scores(folder, {"id": "2", "response": "The answer is (B)."}, {"id": "1", "response": r"\boxed{60.0}"},
                  protocol="ours")  # fmt: skip
    assert ours["correct"] == 1 and ours["methods"] == {"none": 1, "vote key": 1} and ours["disagree"] == 1


def test_responses_by_id_in_json(folder):
    path = folder / "a[1].json"
    path.write_text(json.dumps({"1": {"response": r"\boxed{60}"}, "x": {"pid": "2", "response": "B"}}))
    assert score.main(score.Config("mathvision", folder, path, folder / "s.jsonl"))["correct"] == 2
    path.write_text(json.dumps([{"response": "B"}]))
    with pytest.raises(ValueError, match=r"json:0 is no response: it has no 'id'"):
        list(score.read_responses(path, mathvision.BENCHMARK))
    path.write_text("5")
    with pytest.raises(ValueError, match="holds int, expected a JSON list or object"):
        list(score.read_responses(path, mathvision.BENCHMARK))


def test_files_as_people_have_them(folder):
    lines = [json.dumps({"id": "1", "response": r"\boxed{60}"}), json.dumps({"id": "2", "response": "B"})]
    path = folder / "a.json"  # lines of JSON by another name, with the mark that editors put in front
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert score.main(score.Config("mathvision", folder, path, folder / "s.scores"))["correct"] == 2
    path.write_bytes(lines[0].encode().replace(b"60", b"60 \xff"))  # a byte that is no UTF-8
    assert list(score.read_responses(path.rename(folder / "b.json.jsonl"), mathvision.BENCHMARK))[0][0] == "1"
    (folder / "b.json.jsonl").rename(folder / "answers.jsonl")  # beside the questions, it is not one of their files
    assert set(mathvision.BENCHMARK.questions(folder)) == {"test", "testmini"}
    line = json.dumps({"id": "1", "response": "a\u2028b\x85c"}, ensure_ascii=False)
    path.with_suffix(".jsonl").write_text(line + "\n", encoding="utf-8")
    assert len(list(score.read_responses(path.with_suffix(".jsonl"), mathvision.BENCHMARK))) == 1
    with pytest.raises(ValueError, match="would replace the responses"):
        path = path.with_suffix(".jsonl")
        score.main(score.Config("mathvision", folder, path, path))
    with pytest.raises(FileNotFoundError, match="is no file: give a JSONL or JSON file"):
        score.main(score.Config("mathvision", folder, folder, folder / "s.scores"))


def test_of_equal_ids_the_first_file_counts(folder):
    rows = [json.loads(line) for line in (folder / "testmini.jsonl").read_text().splitlines()]
    (folder / "testmini.jsonl").write_text(json.dumps(rows[0] | {"answer": "61"}) + "\n")
    assert scores(folder, {"id": "1", "response": r"\boxed{60}"})["correct"] == 1
    (folder / "testmini.jsonl").write_text(json.dumps(rows[0] | {"options": "AB"}) + "\n")
    with pytest.raises(
        ValueError, match="testmini.jsonl:1 is no MATH-Vision question: the options are str, not a list"
    ):
        scores(folder, {"id": "1", "response": "B"})


def test_what_is_said_of_the_extraction(folder):
    found = score.score(score.Config("mathvision", folder, written(folder, "B", "It is big"), folder / "s.scores"))
    assert found["extraction"] == "answers extracted by rules" and found["methods"] == {"bare": 1, "text": 1}
    assert (found["unread"], found["questions"], found["of_questions"]) == (1, 2, 2)
    for name in ("mathvista", "mathverse", "logicvista", "dynamath"):
        said = score.extraction(score.Config(name, folder, folder, folder), benchmark(name))
        assert said == "answers extracted by rules in place of the owners' large model"


def written(folder, *texts):
    path = folder / "w.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "response": text}) + "\n" for n, text in enumerate(texts, 1)))
    return path


def test_stored_extractions_and_verdicts_are_not_read(folder):
    stored = {"model_answer": "60", "extraction": "60", "prediction": "60", "correct": True, "true_false": True}
    assert scores(folder, {"id": "1", "response": r"\boxed{61}"} | stored)["correct"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"id": "1"}\n'], r"a.jsonl:1 is no response: it has no 'response'"),
        ([{"id": "1", "response": "1"}, "not json\n"], "a.jsonl:2 is no JSON"),
        (["[1]\n"], "a.jsonl:1 is no response: it is list, not an object"),
        ([{"id": "1", "response": ["1"]}], "the response is list, not text"),
        ([{"id": "7", "response": "1"}], "no question of .* has the id '7'; ids there read like '1'"),
        ([{"id": "1", "response": "1", "sample": 1.5}], "the sample is 1.5, not a whole number"),
        (['{"id": "1", "response": "1", "response": "2"}\n'], "the key 'response' is there twice"),
        ([{"id": "1", "response": "1"}] * 2, "two responses to question '1' with sample 0"),
        ([], "holds no response"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        scores(folder, *rows)
    assert not (folder / "out/s.jsonl").exists()


def test_bad_questions_are_refused(folder):
    (folder / "test.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:1 is no MATH-Vision question: it has no 'question'; fetch"):
        mathvision.BENCHMARK.questions(folder)
    with pytest.raises(FileNotFoundError, match="give MATH-Vision's data folder"):
        mathvision.BENCHMARK.questions(folder / "nowhere")


HOSTILE = [
    "{" * 200_000, "}" * 200_000, r"\boxed{" * 100_000, r"\boxed{" + "{" * 1000 + "}" * 1001, r"\boxed{9^9^9^9^9^9}",
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1e999999999}", r"\boxed{(((((1" + ")" * 9 + "}", r"\boxed{1/0}", "a" * 10**6,
    r"\boxed{" + "1" * 10**6 + "}", "is " * 300_000, "the answer is " * 100_000, "\x00\x1b[2J\x7f\u202e\ud800",
    r"\boxed{" + r"\frac" * 5000 + "}", r"\boxed{__import__('os').system('true')}", "\n" * 10**6, "is nan", "is 1e400",
    r"\boxed{" + r"\sqrt{" * 500 + "2" + "}" * 501, "oxed{" + "}oxed{" * 50_000, "(A)" * 300_000, "=" * 10**6,
    r"\boxed{(" + "1," * 500_000 + "1)}", r"\boxed{(" + (r"\sqrt2" * 300 + ",") * 500 + "1)}",
]  # fmt: skip


def test_hostile_text_neither_crashes_nor_hangs_also_in_a_thread(folder):
    rows = [{"id": "1", "sample": i, "response": text} for i, text in enumerate(HOSTILE)]
    found = []
    worker = threading.Thread(target=lambda: found.append(scores(folder, *rows)), daemon=True)
    worker.start()
    worker.join(120)  # seconds; it takes about one
    assert found and found[0]["n"] == len(HOSTILE) and found[0]["correct"] == 0
    for question in (FRUIT, YES_NO, vista("7", kind="integer"), vista("[1]", kind="list")):
        for text in [*HOSTILE, "answer" + " " * 10**6, "the answer is 1 " * 10**5, "1," * 10**6, "**1" * 10**5]:
            answer, _ = mathvista.extract(text, question)
            mathvista.is_right(question, answer)
