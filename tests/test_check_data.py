"""What a data set holds: counts by hand, bad rows by reason, the page of examples."""

import json
import weakref

import pytest

import check_data
from check_data import Config
from upt import data
from upt.data import rows, shapes
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
        f"cannot be used: 1, missing image file ({folder.name}/train/000005: gone.png)",
    ):
        assert line in shown
    assert shown.splitlines()[-1] == f"4 of them, to be opened in a browser: {out}"
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 4 and "&lt;b&gt;Which?" in page and "<b>Which" not in page


@pytest.mark.parametrize("content", [None, b"GIF89a and no more"])
def test_a_set_of_which_nothing_can_be_used(folder, content):
    if content:
        (folder / "gone.png").write_bytes(content)
    (folder / "train.jsonl").write_text(json.dumps({"question": "Where?", "answer": "3", "image": "gone.png"}) + "\n")
    with pytest.raises(DataError, match="none of its 1 rows is good: 1 × (missing image file|not an image)"):
        check_data.main(Config(data=str(folder), out=folder / "x.html"))


def test_questions_without_pictures_and_rows_with_several(folder, capsys):
    asked = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    asked += [
        {"question": "Which?", "images": ["0.png", "1.png"]},
        {"question": "Which?", "images": ["0.png", "1.png"]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = check_data.main(Config(data=str(folder), out=folder / "x.html"))
    assert found.sizes == [] and len(found.lengths) == 3
    shown = capsys.readouterr().out
    assert "pictures: 0 of 3 questions have one" in shown and "picture sizes" not in shown
    assert "cannot be used: 2, several images are not supported (" in shown


def test_a_limit_says_of_how_many_rows(folder, tmp_path, capsys):
    found = check_data.main(Config(data=str(folder), limit=2, out=tmp_path / "x.html"))
    assert found.rows == 2 and "the first 2 of 6 rows" in capsys.readouterr().out
    assert "the first 2 of 6 rows" in (tmp_path / "x.html").read_text()
    check_data.main(Config(data="shapes", limit=3, out=tmp_path / "x.html"))
    assert "the first 3 of 4096 rows" in capsys.readouterr().out
    assert "the first" not in data.load(folder, limit=6).describe() + data.load("shapes", limit=4096).describe()


def test_every_data_set_has_its_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    check_data.main(Config(data="shapes", limit=2))
    check_data.main(Config(data=str(folder)))
    pages = {path.name for path in (folder / "runs").iterdir()}
    assert pages == {"data-shapes.html", f"data-{str(folder)[1:].replace('/', '-')}.html"}
    assert check_data.page_path("../geo:3,org/name:1", "train").name == "data-geo-3-org-name-1.html"
    assert check_data.page_path("geoqa", "test").name == "data-geoqa-test.html"
    for here, name in ((".", folder.name), ("..", folder.parent.name)):
        assert check_data.page_path(here, "train").name == f"data-{name}.html"
    assert check_data.page_path("/", "train").name == "data.html"


def test_no_more_than_a_picture_is_held_at_a_time(folder, monkeypatch):
    alive, most = [], []

    def decoded(uid, content):
        image = decode(uid, content)
        alive.append(weakref.ref(image))
        most.append(sum(one() is not None for one in alive))
        return image

    decode = rows.decode
    monkeypatch.setattr(rows, "decode", decoded)
    good = {"question": "How many?", "answer": "3", "image": "0.png"}
    (folder / "train.jsonl").write_text((json.dumps(good) + "\n") * 40)
    check_data.look(data.load(folder))
    assert len(most) > 40 and max(most) <= 2


def test_a_path_that_is_not_there(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError) as caught:
        check_data.main(Config(data=f"{folder.name}/trian"))
    assert str(caught.value).startswith(f"{folder.name}/trian: no such folder or file") and len(str(caught.value)) < 300
    (folder / "train").mkdir()
    with pytest.raises(DataError, match=f"did you mean '{folder.name}/train'"):
        check_data.main(Config(data=f"{folder.name}/trian"))
    with pytest.raises(DataError, match="hf download --repo-type dataset nobody/nothing"):
        data.load("nobody/nothing")


def test_the_embedded_set(tmp_path):
    found = check_data.main(Config(data="shapes", limit=12, out=tmp_path / "x.html"))
    assert (
        len(found.lengths) == 12
        and sum(found.kinds.values()) == 12
        and (tmp_path / "x.html").read_text().count("<img") == 5
    )
