"""What a data set holds: counts by hand, bad rows by reason, the page of examples."""

import json

import pytest

import check_data
from check_data import Config
from upt.data import shapes
from upt.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Six rows: four good ones, of which two are alike, one without question, one whose picture is not there."""
    for i, question in enumerate(shapes.questions("test", 0, 3)):
        question.image.resize((40 + 20 * i, 40)).save(tmp_path / f"{i}.png")
    rows = [
        {"question": "How many?", "answer": "3", "image": "0.png"},
        {"question": "<b>Which?</b>", "answer": "B", "image": "1.png", "choices": ["one", "two", "three"]},
        {"question": "How many?", "answer": "3", "image": "0.png"},
        {"question": "How far is it?", "answer": "7", "image": "2.png"},
        {"question": "", "answer": "3", "image": "0.png"},
        {"question": "Where?", "answer": "3", "image": "gone.png"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")  # else some rows would be held out
    return tmp_path


def test_rows_pictures_gold_and_what_cannot_be_used(folder, tmp_path, capsys):
    out = tmp_path / "pages" / "data.html"
    found = check_data.main(Config(data=str(folder), out=out))
    assert (found.rows, len(found.lengths), found.gold, found.repeated) == (6, 4, 4, 1)
    assert found.sizes == [(40, 40), (60, 40), (40, 40), (80, 40)] and found.lengths == [9, 13, 9, 14]
    assert found.options == {0: 3, 3: 1} and len(found.bad) == 2
    shown = capsys.readouterr().out
    for line in (
        "rows: 6, of which 4 can be used",
        "picture sizes: 40 to 80, median 50 pixels wide, 40 to 40, median 40 high",
        "question lengths: 9 to 14, median 11 characters",
        "options: 3 questions with none, 1 questions with 3",
        "repeated: 1 questions",
        "cannot be used: 1, ",
    ):
        assert line in shown
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 4 and "&lt;b&gt;Which?" in page and "<b>Which" not in page


def test_a_set_of_which_nothing_can_be_used(folder):
    (folder / "train.jsonl").write_text(json.dumps({"question": "Where?", "answer": "3", "image": "gone.png"}) + "\n")
    with pytest.raises(DataError, match="none of its 1 rows is good"):
        check_data.main(Config(data=str(folder), out=folder / "x.html"))


def test_the_embedded_set(tmp_path):
    found = check_data.main(Config(data="shapes", limit=12, out=tmp_path / "x.html"))
    assert (
        len(found.lengths) == 12
        and sum(found.kinds.values()) == 12
        and (tmp_path / "x.html").read_text().count("<img") == 5
    )
