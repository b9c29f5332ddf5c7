"""Layouts that people have: files, turns of chats, options, and golds as letters, texts and numbers of options."""

import base64
import csv
import json

import datasets
import pytest
from datafiles import jsonl, only, parquet, picture, plain

from upt.data import BadRow, DataError, load
from upt.data.choices import options_of

pytestmark = pytest.mark.usefixtures("caches")

BLUE = picture("blue")
BASE64 = base64.b64encode(BLUE).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
ROW = {"problem": "<image>What?", "image": "a.png", "answer": "7"}
COLOURS = ["red", "blue", "green", "white"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(BLUE)
    return tmp_path


def said(questions) -> list[tuple]:
    """What each question says, and whether it has the blue picture."""
    blue = [q.image is not None and q.image.getpixel((3, 3)) == (0, 0, 255) for q in questions]
    return [(q.question, q.choices, q.gold, b) for q, b in zip(questions, blue, strict=True)]


def table(path, rows, **options):
    """CSV as Python writes it: lists as they print, a field with a sign of its own in quotation marks."""
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, [*rows[0]], **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- files


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "TRAIN.CSV"])
@pytest.mark.parametrize("options", [{}, {"delimiter": ";"}, {"delimiter": "\t"}, {"encoding": "utf-8-sig"}])
def test_csv(folder, name, options):
    rows = [ROW | {"options": COLOURS}]
    rows += [{"problem": 'Two lines,\n"quoted"; so', "image": "", "answer": " ", "options": ""}]
    table(folder / name, rows, **options)
    (folder / "test.csv").write_text("problem\nq\n")
    assert said(load(folder)) == [("What?", COLOURS, "7", True), ('Two lines,\n"quoted"; so', None, None, False)]
    assert load(folder, "test")[0].question == "q" and len(load(folder / name)) == 1


def test_a_picture_in_a_cell_of_csv_and_options_in_columns(tmp_path):
    row = {"index": 1, "image": BASE64, "question": "Which?", "A": "left", "B": "right", "C": "", "answer": "B"}
    table(tmp_path / "train.tsv", [row, row | {"C": "none"}])
    table(tmp_path / "test.tsv", [row])
    assert said(load(tmp_path)) == [("Which?", ["left", "right"] + more, "B", True) for more in ([], ["none"])]
    letters = only(tmp_path / "other", {"question": "q", "option_a": "x", "option_b": "y", "answer": "b"})
    assert letters.choices == ["x", "y"]


def test_csv_with_blank_lines_first_and_bars(tmp_path):
    (tmp_path / "train.csv").write_text("\n\nproblem|answer\nq, r|1\n")
    (tmp_path / "test.csv").write_text("problem|answer\ns|2\n")
    assert [(q.question, q.gold) for q in load(tmp_path)] == [("q, r", "1")]


def test_a_cell_longer_than_csv_takes_by_itself(tmp_path):
    table(tmp_path / "train.csv", [{"problem": "q" * 200_000, "answer": 1}, {"problem": "p", "answer": 2}])
    assert {len(q.question) for split in ("train", "test") for q in load(tmp_path, split)} == {200_000, 1}


def test_a_line_of_csv_with_a_cell_too_many_spoils_no_other(tmp_path):
    (tmp_path / "train.csv").write_text("problem,answer\nq,1\nbad, row,2\n\nr,3\nshort\n")
    (tmp_path / "test.csv").write_text("problem,answer\nq,1\n")
    questions = load(tmp_path)
    assert [q.gold for q in questions] == ["1", "3"] and len(questions) == 4
    assert questions.bad[questions.uids[1]] == "not a row of the table: line 3 of train.csv: 3 cells, the header has 2"
    assert "line 6 of train.csv: 1 cells" in questions.bad[questions.uids[3]]


JSON = {
    "rows": [ROW, ROW],
    "data": {"version": 2, "data": [ROW, ROW], "tags": ["x"]},
    "by key": {"q1": ROW, "q2": ROW},
    "columns": {key: [value] * 2 for key, value in ROW.items()},
    "pandas": {key: {"0": value, "1": value} for key, value in ROW.items()},
    "splits": {"train": [ROW, ROW], "test": [ROW | {"problem": "held out"}]},
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json(folder, content):
    (folder / "set.json").write_text(json.dumps(content, indent=1))
    if "test" not in content:  # one of the two rows is held out
        assert said(load(folder)) == said(load(folder, "test")) == [("What?", None, "7", True)]
    else:
        assert said(load(folder)) == [("What?", None, "7", True)] * 2
        assert [q.question for q in load(folder / "set.json", "test")] == ["held out"]


def test_json_that_is_jsonl(folder):
    jsonl(folder / "train.json", [ROW, "{cut", ROW])
    jsonl(folder / "test.json", [ROW, ROW])
    assert said(load(folder)) == said(load(folder, "test")) == [("What?", None, "7", True)] * 2


@pytest.mark.parametrize("name", ["dataset_info.json", "manifest.json", "summary.json", "fingerprint.json"])
def test_a_file_about_a_set_holds_no_rows_of_it(folder, caplog, name):
    jsonl(folder / "train.json", [ROW, ROW])
    jsonl(folder / "test.json", [ROW, ROW])
    (folder / name).write_text('{"data": {"count": 6}}')
    assert len(load(folder)) == 2 and caplog.text == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "7", "a.json holds a number: expected a list of rows"),
        ("a.json", "[1, 2]", "a.json holds a list of other things than objects: expected a list of rows"),
        ("a.json", '{"a": 1, "b": 2}', "a.json holds an object of a, b: expected a list of rows"),
        ("a.json", '{"problem": "q", "answer": "1"}', "holds an object of problem, answer: expected a list of rows"),
        ("a.json", '[{"problem"', "a.json is no JSON"),
        ("a.json", "", "a.json is no JSON"),
        ("a.json", "[]", "none of its 0 rows is good: .* holds no row of it. Expected are parquet, JSONL, JSON or CSV"),
        ("a.jsonl", "", "none of its 0 rows is good: .* holds no row of it. Expected are"),
        ("a.jsonl", "\n \n", "none of its 0 rows is good: .* holds no row of it"),
        ("a.jsonl", '[{"problem": "q"}]', "1 × not a JSON object.*line 1 of a.jsonl: a list, where an object was exp"),
        ("a.jsonl", '[\n {"problem": "q"}\n]', "a.jsonl is one list of JSON over several lines. Rename it to a.json"),
        ("a.jsonl", "null", "1 × not a JSON object.*line 1 of a.jsonl: null, where an object was expected"),
        ("a.csv", "", "none of its 0 rows is good: .* holds no row of it"),
        ("a.csv", "problem,answer\n", "none of its 0 rows is good"),
        ("a.csv", "problem,answer,answer\nq,1,2\n", "its header names a column twice"),
        ("a.csv", 'problem,answer\n"q,1\n', "a.csv: line 2 is no CSV: unexpected end of data"),
        ("a.csv", b"problem,answer\nGr\xf6\xdfe?,1\n", "a.csv is not UTF-8.*Save it as UTF-8"),
        ("a.csv", "aufgabe;answer\nq;1\n", "no column for the question among aufgabe, answer"),
    ],
)
def test_files_that_are_no_set(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_parquet_without_rows(tmp_path):
    types = datasets.Features({"problem": datasets.Value("string"), "answer": datasets.Value("string")})
    datasets.Dataset.from_dict({"problem": [], "answer": []}, types).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="none of its 0 rows is good|there are no rows"):
        load(tmp_path)


def test_text_files_beside_tables_are_named_and_not_used(folder, caplog):
    jsonl(folder / "train.jsonl", [ROW])
    (folder / "test.csv").write_text("problem\nq\n")
    assert len(load(folder)) == 1 and "not used beside .jsonl files: test.csv" in caplog.text


def test_save_to_disk(tmp_path):
    types = {"image": datasets.Image(), "problem": datasets.Value("string"), "answer": datasets.Value("int64")}
    rows = {"image": [{"bytes": BLUE, "path": None}] * 9, "problem": ["<image>q"] * 9, "answer": [*range(9)]}
    whole = datasets.Dataset.from_dict(rows, datasets.Features(types))
    whole.save_to_disk(tmp_path / "one")
    parts = {"train": whole.select(range(6)), "validation": whole.select([6, 7])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    for name, part in parts.items():
        part.with_format("numpy").save_to_disk(tmp_path / "apart" / name)
    assert len(load(tmp_path / "one")) + len(load(tmp_path / "one", "test")) == 9
    assert load(tmp_path / "one").uids[0].startswith("one/train/")
    for name in ("both", "apart"):
        assert said(load(tmp_path / name)) == [("q", None, str(i), True) for i in range(6)]
        assert [q.gold for q in load(tmp_path / name, "test")] == ["6", "7"]
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="one is no whole folder of save_to_disk.*Save the set again"):
        load(tmp_path / "one")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder(folder, kind):
    for split in ("train", "test"):
        (folder / split).mkdir()
        rows = [{"file_name": "1.png" if split == "train" else "", "question": f"{split}?", "answer": 3}]
        jsonl(folder / split / "metadata.jsonl", rows) if kind == "jsonl" else table(
            folder / split / "metadata.csv", rows
        )
    (folder / "a.png").rename(folder / "train/1.png")
    assert said(load(folder)) == [("train?", None, "3", True)]
    assert said(load(folder, "test")) == [("test?", None, "3", False)]


# ---- turns


def test_verls_parquet(tmp_path):
    def row(i: int, images: list) -> dict:
        turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "<image>What is x?"}]
        about = {"split": "train", "index": i, "answer": "other", "question": "other?"}
        truth = {"style": "rule", "ground_truth": str(i)}
        return {"data_source": "d", "prompt": turns, "images": images, "reward_model": truth, "extra_info": about}

    stored = {"bytes": BLUE, "path": None}
    parquet(tmp_path / "train.parquet", [row(4, [stored]), row(5, []), row(6, [stored, stored])])
    parquet(tmp_path / "test.parquet", [row(7, [stored])])
    questions = load(tmp_path)
    assert said(questions) == [("What is x?", None, "4", True)]
    assert [*questions.bad.values()] == [
        "no image where the text announces one",
        "several images are not supported: 2 in this row",
    ]
    assert "1 with a picture" in questions.describe()


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


PART = {"type": "text", "text": "How long is AB?"}
CHATS = {
    "marks in parts": ([turn("user", [{"type": "image"}, PART])], ["a.png"]),
    "pictures in parts": ([turn("user", [PART, {"type": "image", "image": "a.png"}])], None),
    "urls in parts": ([turn("user", [PART, {"type": "image_url", "image_url": {"url": "a.png"}}])], None),
    "pictures by path": ([turn("user", [PART, {"type": "picture", "path": "a.png"}])], None),
    "pictures by kind": ([turn("user", [PART, {"type": "img", "img": "a.png"}])], None),
    "pictures without a kind": ([turn("user", [{"image": "a.png"}, {"text": "How long is AB?"}])], None),
    "files": ([turn("user", [PART, {"type": "file", "file": {"file_data": DATA_URL}}])], None),
    "pictures beside the content": ([turn("user", "<image>How long is AB?") | {"images": ["a.png"]}], None),
    "a picture beside the content": ([turn("user", "How long is AB?") | {"image": "a.png"}], None),
    "nulls in parts": ([turn("user", [PART | {"image": None}, {"type": "image", "text": None}])], ["a.png"]),
    "llama-factory": ([{"from": "human", "value": "<image>How long is AB?"}], ["a.png"]),
    "earlier": (
        [turn("user", "<image>Hello"), turn("assistant", "Hi <image>"), turn("user", "How long is AB?")],
        ["a.png"],
    ),
    "written": (json.dumps([turn("user", "<image>How long is AB?")]), "a.png"),
    "fields": ({"role": ["system", "user"], "content": ["Think.", "<image>How long is AB?"]}, "a.png"),
}


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize(("chat", "images"), CHATS.values(), ids=CHATS)
def test_the_last_turn_of_the_user_is_the_question(folder, column, chat, images):
    jsonl(folder / "train.jsonl", [{column: chat, "images": images}])
    questions = load(folder)
    assert said(questions) == [("How long is AB?", None, None, True)]
    assert ("last of several questions in a chat, and asked alone: 1" in questions.describe()) == (len(chat) == 3)


@pytest.mark.parametrize(
    ("reply", "gold"),
    [
        ("<think>5?</think> It is \\boxed{6}.", "6"),
        ("<answer> 7 </answer>", "7"),
        ("<think>long</think>\n8 cm", "8 cm"),
        ([{"type": "text", "text": "9"}], "9"),
        ("", None),
    ],
)
def test_the_turn_after_it_is_the_answer_where_no_column_is(tmp_path, reply, gold):
    chat = [turn("user", "2 + 4?"), turn("assistant", reply)]
    assert only(tmp_path, {"messages": chat}).gold == gold
    assert only(tmp_path, {"messages": chat, "answer": "5"}).gold == "5"
    completion = {"prompt": chat[:1], "completion": chat[1:]}
    assert only(tmp_path, completion).gold == gold


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [turn("system", "x"), turn("assistant", "y")]}, "no turn of the user among system, assistant"),
        ({"messages": [turn("user", [{"type": "image"}])], "image": "a.png"}, "no question text"),
        ({"messages": [turn("user", [{"type": "image"}, PART])]}, "no image where the text announces one"),
        ({"messages": [turn("user", [{"type": "image"}] * 2 + [PART])], "image": "a.png"}, "fewer images"),
        ({"messages": [turn("user", [{"type": "video", "video": "a.mp4"}, PART])]}, "video is not supported"),
        (
            {"messages": [turn("user", [PART, {"type": "file", "file": {"id": 7}}])]},
            "neither text nor a picture: part of",
        ),
        ({"messages": [turn("user", [PART, {"audio": "a.wav"}])]}, "video and audio are not supported"),
        ({"messages": [turn("user", "q") | {"images": ["a.png"]}], "image": "b.png"}, "several images"),
        ({"messages": []}, "no question text"),
        ({"messages": [{"speaker": "user", "content": "q"}]}, "no question text"),
    ],
)
def test_chats_that_ask_nothing(folder, row, reason):
    jsonl(folder / "train.jsonl", [{"messages": [turn("user", "q")]}, row])
    jsonl(folder / "test.jsonl", [{"messages": [turn("user", "q")]}])
    with pytest.raises(BadRow, match=reason):
        load(folder)[1]


# ---- options

LAYOUTS = {
    "labels and texts": {"label": ["A", "B"], "text": ["5", "6"]},
    "pairs": [{"label": "A", "text": "5"}, {"label": "B", "text": "6"}],
    "pairs by other names": [{"id": "a", "content": 5}, {"id": "b", "content": 6}],
    "one letter each": [{"A": "5"}, {"B": "6"}],
    "by letter": {"B": "6", "A": "5"},
    "by letter, with a gap at the end": {"A": "5", "B": "6", "C": None},
    "written by letter": '{"A": "5", "B": "6"}',
    "written in Python": "[{'label': 'A', 'text': '5'}, {'label': 'B', 'text': '6'}]",
    "lines": "A. 5\nB. 6",
    "lines with a lead": "Choices:\nA: 5\nB: 6\n",
    "lines in brackets": "(A) 5\n(B) 6",
    "lines of small letters": "a) 5\nb) 6",
    "lines in Chinese": "选项：A、5\nB、6",
    "a line": "A. 5; B. 6",
    "a line in brackets": "(A) 5 (B) 6",
    "a list of one text": ["A. 5 B. 6"],
    "numpy's": "['5' '6']",
    "numpy's numbers": "[5 6]",
    "a null at the end": ["5", "6", None],
}


@pytest.mark.parametrize("cell", LAYOUTS.values(), ids=LAYOUTS)
def test_options(tmp_path, cell):
    question = only(tmp_path, {"problem": "q", "choices": cell, "answer": "B"})
    assert (question.choices, question.gold) == (["5", "6"], "B")


@pytest.mark.parametrize(
    "names", ["optionA optionB", "Option A,Option B", "a b", "option1 option2", "choice_1 choice_2"]
)
def test_options_in_columns(tmp_path, names):
    first, second = names.split("," if "," in names else None)
    question = only(tmp_path, {"problem": "q", first: "5", second: "6", "answer": "B"})
    assert (question.choices, question.gold) == (["5", "6"], "B")


def test_options_in_parquet(tmp_path):
    cells = {"by letter": {"A": "5", "B": "6", "C": None}, "columns": {"label": ["A", "B"], "text": ["5", "6"]}}
    for name, cell in cells.items():
        parquet(tmp_path / name / "train.parquet", [{"problem": "q", "choices": cell, "answer": "B"}] * 2)
        assert [q.choices for q in load(tmp_path / name)] == [["5", "6"]]


@pytest.mark.parametrize(
    ("cell", "texts", "labels"),
    [
        ("1. 5\n2. 6", ["5", "6"], ["1", "2"]),
        ("A. 5\nB. 6\nD. 7", ["5", "6", "7"], ["A", "B", "D"]),
        (
            {str(i): str(i * i) for i in range(1, 12)},
            [str(i * i) for i in range(1, 12)],
            [str(i) for i in range(1, 12)],
        ),
        ("A. two\nlines\nB. one", ["two\nlines", "one"], None),
        (["1.5", "2.5"], ["1.5", "2.5"], None),
    ],
)
def test_labels_of_their_own(cell, texts, labels):
    assert options_of("u", cell)[:2] == (texts, labels)


@pytest.mark.parametrize(
    "cell",
    [
        "5\n6",
        "red|blue",
        "1.5\n2.5",
        {"label": ["A", "B"], "text": ["5"]},
        [{"label": "A", "image": "x"}],
        [["5"], ["6"]],
    ]
    + [["5", None, "7"], ["5"], "['5']"]
    + [4, "A. 5", [str(i) for i in range(27)], "A. 5\nA. 6"],
)
def test_what_is_no_list_of_options_is_a_bad_row(cell):
    with pytest.raises(BadRow, match="choices"):
        options_of("u", cell)


@pytest.mark.parametrize("column", ["image", "choices", "answer", "messages", "else"])
def test_a_cell_nested_without_end_spoils_no_other_row(tmp_path, column):
    nested = "[" * 600 + "]" * 600
    jsonl(tmp_path / "train.jsonl", [*plain(2), f'{{"problem": "q", "{column}": {nested}}}'])
    jsonl(tmp_path / "test.jsonl", plain(1))
    assert len([*load(tmp_path)]) >= 2


def test_another_split_may_have_other_columns(tmp_path):
    jsonl(tmp_path / "train.jsonl", plain(2))
    jsonl(tmp_path / "test.jsonl", [{"aufgabe": "q", "choices": COLOURS, "answer": "A"}])
    assert len(load(tmp_path)) == 2


# ---- golds


def golds(tmp_path, *pairs, **files) -> list:
    """The golds of questions with these (options, answer), in order; `test` are those of a test split."""
    rows = [{"problem": "q", "choices": choices, "answer": answer} for choices, answer in pairs]
    jsonl(tmp_path / "train.jsonl", rows)
    held_out = [{"problem": "q", "choices": choices, "answer": answer} for choices, answer in files.get("test", ())]
    jsonl(tmp_path / "test.jsonl", held_out or plain(1))
    return [q.gold for q in load(tmp_path)]


@pytest.mark.parametrize("kind", [int, str, float, "({})".format, "{}.".format, "Option {}".format])
@pytest.mark.parametrize("base", [0, 1])
def test_golds_as_numbers_of_options(tmp_path, kind, base):
    pairs = [(COLOURS, kind(i + base)) for i in (1, 3, 0, 2)]
    assert golds(tmp_path, *pairs) == ["B", "D", "A", "C"]
    assert f"golds are numbers of options, counted from {base}" in load(tmp_path).describe()
    # One split alone does not show it; another of the same set does.
    assert golds(tmp_path, (COLOURS, kind(1 + base)), test=[(COLOURS, kind(4 * base))] * 2) == ["B"]


def test_an_option_that_is_a_number_is_a_text(tmp_path):
    numbers = ["4", "2", "3", "1"]
    assert golds(tmp_path, (numbers, "3"), (numbers, 1)) == ["3", "1"]
    assert "numbers of options" not in load(tmp_path).describe()
    assert "golds that are whole numbers are read as texts of options: 2" in load(tmp_path).describe()
    # But where most golds are no texts, one that happens to be is a number, too.
    words = [(COLOURS, i) for i in (0, 1, 2, 3)]
    assert golds(tmp_path, *words, (numbers, 1)) == ["A", "B", "C", "D", "B"]
    # And among texts, a number that is none is an answer that cannot be met.
    assert golds(tmp_path, *[(numbers, "2")] * 12, (["4", "2", "3", "5"], "1")) == ["2"] * 12 + ["1"]
    assert "1 of 13 golds can never be met, such as '1' names none of its 4 options" in load(tmp_path).describe()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ((1, 2, 3), "numbers of options, such as 1 of .*/train/000000, with neither 0 nor the number of options"),
        ((0, 4), "with both 0 .*/train/000000. and the number of options .*/train/000001.: from 0 or from 1?"),
        (("A", "B", 1, 2), "2 of 4 golds with options are numbers that are no option's text, such as 1 of .*/000002"),
    ],
)
def test_golds_that_can_be_read_in_several_ways_are_an_error(tmp_path, answers, message):
    with pytest.raises(DataError, match=message + ".*Write golds as letters"):
        golds(tmp_path, *[(COLOURS, answer) for answer in answers])


def test_golds_in_lists_labels_and_classes(tmp_path):
    assert golds(tmp_path, (COLOURS, ["B"]), (COLOURS, '["C"]'), (COLOURS, ["A", "A"])) == ["B", "C", "A"]
    own = {"1": "5", "2": "6"}
    assert golds(tmp_path, (own, "2"), (own, 1), (own, "(2)")) == ["B", "A", "B"]
    skipped = "A. 5\nB. 6\nD. 7"
    assert golds(tmp_path, (skipped, "D"), (skipped, "C"), (skipped, "7")) == ["C", None, "7"]
    types = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=[*"ABCD"])}
    types |= {"choices": datasets.List(datasets.Value("string"))}
    rows = {"question": [*"qrs"], "choices": [COLOURS] * 3, "answer": [1, 3, 2]}
    datasets.Dataset.from_dict(rows, datasets.Features(types)).save_to_disk(tmp_path / "classes")
    found = [*load(tmp_path / "classes"), *load(tmp_path / "classes", "test")]
    assert {q.question: q.gold for q in found} == {"q": "B", "r": "D", "s": "C"}


def test_golds_that_cannot_be_read_or_met_are_counted(tmp_path):
    assert golds(tmp_path, (COLOURS, ["A", "B"]), (COLOURS, {"x": 1}), (COLOURS, "B"), (None, "  ")) == [
        None,
        None,
        "B",
        None,
    ]
    assert "answers that are several or no text: 2, as of " in load(tmp_path).describe()
    golds(tmp_path, (COLOURS, "E"), (COLOURS, "purple"), (COLOURS, "red"), (None, "..."), (None, "[1, 2]"))
    assert "3 of 5 golds can never be met, such as 'E' names none of its 4 options (" in load(tmp_path).describe()
    assert golds(tmp_path, (COLOURS, "A"), (None, "5")) == ["A", "5"] and "never" not in load(tmp_path).describe()


def test_golds_that_can_hardly_be_met_are_counted(tmp_path):
    solution = "First we add 2 and 2.\n2+2=4\n#### 4"
    sentence = "First we add. The answer is 12."
    assert golds(tmp_path, (None, solution), (None, sentence), (None, "C"), (None, "two red cars")) == [
        "4",
        sentence,
        "C",
        "two red cars",
    ]
    note = "golds that can hardly be met: 1 × whole sentences, 1 × letters without options"
    assert note in load(tmp_path).describe()
    turns = [turn("user", "q"), turn("assistant", solution)]
    assert only(tmp_path / "chat", {"messages": turns}).gold == "4"


def test_verls_ground_truth(tmp_path):
    for truth in ({"ground_truth": 34}, {"ground_truth": ["34"]}, {"ground_truth": '["34"]', "style": "rule"}):
        for cell in (truth, json.dumps(truth)):
            assert only(tmp_path, {"prompt": "q", "reward_model": cell}).gold == "34"
