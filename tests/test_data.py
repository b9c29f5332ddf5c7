"""upt/data: every layout, every split combination and every kind of bad row, with real files and without a network."""

import errno
import io
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datafiles import jsonl, only, parquet, picture, plain
from hubcache import make_hub_dataset
from PIL import Image

from upt.data import BadRow, DataError, Question, load
from upt.data import rows as reading

pytestmark = pytest.mark.usefixtures("caches")
ROOT = Path(__file__).resolve().parents[1]
GEOMETRY_HUB = Path(os.environ.get("UPT_GEOMETRY_HUB", ROOT.parent / "shared/data/geometry_hub"))
needs_geometry = pytest.mark.skipif(
    not GEOMETRY_HUB.is_dir(), reason=f"no folder {GEOMETRY_HUB}: set UPT_GEOMETRY_HUB to a copy of geometry_hub"
)


def noise(kind) -> bytes:
    """A picture that doesn't compress, so that cutting it in half cuts pixels off."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def bomb(width=20_000, height=20_000) -> bytes:
    """A PNG of a few bytes whose header announces a huge picture."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


# ---- what a row says


@pytest.mark.parametrize("question", ["problem", "question", "query", "prompt", "text", "Problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "gold", "label", "final_answer", "ground_truth"])
def test_synonyms_of_question_and_answer(tmp_path, question, answer):
    found = only(tmp_path, {question: "How many?", answer: "7", "level": 3})
    assert (found.question, found.gold, found.image, found.choices) == ("How many?", "7", None, None)


@pytest.mark.parametrize("column", ["image", "images", "image_path", "img", "decoded_image"])
@pytest.mark.parametrize("listed", [False, True])
def test_synonyms_of_image(tmp_path, column, listed):
    (tmp_path / "a.png").write_bytes(picture("blue"))
    found = only(tmp_path, {"problem": "<image>What?", column: ["a.png"] if listed else "a.png"})
    assert found.image.mode == "RGB" and found.image.size == (40, 30) and found.image.getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.parametrize("nothing", [None, "", [], [None], {"bytes": None, "path": None}])
def test_text_only_question(tmp_path, nothing):
    assert only(tmp_path, {"problem": "What?", "image": nothing}).image is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<image>What is AB?", "What is AB?"),
        ("What is AB?\n<image>", "What is AB?"),
        ("<image1>\nWhat?", "What?"),
        ("From home <image 2> to school", "From home to school"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", "What?"),
        ("Is x<y in the <imagery>?", None),
    ],
)
def test_placeholders_are_stripped(tmp_path, text, clean):
    (tmp_path / "a.png").write_bytes(picture())
    assert only(tmp_path, {"problem": text, "image": "a.png"}).question == (clean or text)


@pytest.mark.parametrize(
    ("stored", "gold"),
    [
        ("<answer> 145° </answer>", "145°"),
        ("<answer>5</answer> no, <answer>\n6</answer>", "6"),
        ("B", "B"),
        ("  7 ", "7"),
        (7, "7"),
        (17.5, "17.5"),
        (0, "0"),
        (False, "False"),
        ("", None),
        ("  ", None),
        ("<answer></answer>", None),
        (None, None),
    ],
)
def test_gold(tmp_path, stored, gold):
    assert only(tmp_path / "jsonl", {"problem": "q", "answer": stored}).gold == gold
    parquet(tmp_path / "parquet/train.parquet", [{"problem": "q", "answer": stored}])
    assert load(tmp_path / "parquet")[0].gold == gold


@pytest.mark.parametrize(
    ("stored", "choices"),
    [
        (["1", "2"], ["1", "2"]),
        ([1, 2.5], ["1", "2.5"]),
        ('["1", "2"]', ["1", "2"]),
        ("['1', '2']", ["1", "2"]),
        ('["1", true, null]', ["1", "True"]),
        ({"B": "two", "A": "one"}, ["one", "two"]),
        ("{'B': 'two', 'A': 'one'}", ["one", "two"]),
        ([], None),
        ("[]", None),
        ("", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("column", ["choices", "options"])
def test_choices(tmp_path, stored, choices, column):
    assert only(tmp_path, {"problem": "q", column: stored, "answer": "B"}).choices == choices


def test_pictures_come_out_rgb_upright_and_on_white(tmp_path):
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    clear.putpixel((5, 5), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 30), "green").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("I;16", (30, 30), 32768).save(tmp_path / "deep.png")
    Image.new("CMYK", (30, 30), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    Image.new("RGB", (30, 30), "blue").save(
        tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (30, 30), "red")]
    )
    names = ("clear.png", "turned.jpg", "deep.png", "print.jpg", "phone.jpg")
    jsonl(tmp_path / "train.jsonl", [{"problem": "q", "image": name} for name in names])
    jsonl(tmp_path / "test.jsonl", plain(1))
    clear, turned, deep, printed, phone = (q.image for q in load(tmp_path))
    assert all(image.mode == "RGB" for image in (clear, turned, deep, printed, phone))
    assert clear.getpixel((0, 0)) == (255, 255, 255) and clear.getpixel((5, 5)) == (0, 0, 255)
    assert turned.size == (30, 40)
    assert deep.getpixel((0, 0)) == (128, 128, 128)
    assert min(printed.getpixel((0, 0))) > 250
    assert phone.getpixel((0, 0))[2] > 250  # the first of its two frames


# ---- bad rows

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
BAD_FILES = {
    "truncated image": {"cut.png": noise("PNG")[:4000], "cut.jpg": noise("JPEG")[:1500]},
    "not an image": {
        "text.png": b"this is no picture",
        "empty.png": b"",
        "x.svg": b"<svg xmlns='x'/>",
        "x.eps": EPS,
    },
    "undecodable image": {"damaged.png": noise("PNG")[:60] + b"\xff" * 4000 + noise("PNG")[4060:]},
    "over the pixel limit": {"bomb.png": bomb(), "large.png": bomb(10_000, 5_001)},
    "image shape not supported": {"thin.png": picture(size=(402, 2)), "dot.png": picture(size=(1, 1))},
}
CASES = [(reason, name, content) for reason, files in BAD_FILES.items() for name, content in files.items()]


@pytest.mark.parametrize(("reason", "name", "content"), CASES, ids=[name for _, name, _ in CASES])
def test_bad_picture(tmp_path, reason, name, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(content)
    jsonl(tmp_path / "set/train.jsonl", [*plain(3), {"problem": "q", "image": name}])
    jsonl(tmp_path / "set/test.jsonl", plain(1))
    assert _bad(load(tmp_path / "set"), 3).startswith(reason)
    row = {"problem": "q", "image": {"bytes": content, "path": name}}
    parquet(tmp_path / "hub/train.parquet", [{"problem": "p", "image": None}, row])
    parquet(tmp_path / "hub/test.parquet", plain(1))
    assert _bad(load(tmp_path / "hub"), 1).startswith(reason)


def _bad(questions, i) -> str:
    """Why row i is bad; and that it is raised, recorded, reported, and skipped with all others kept."""
    with pytest.raises(BadRow) as caught:
        questions[i]
    assert caught.value.uid == questions.uids[i]
    assert questions.bad == {questions.uids[i]: caught.value.reason}
    assert questions.uids[i] in questions.report_bad() and caught.value.reason in questions.report_bad()
    assert f"1 of {len(questions)} rows" in questions.report_bad()
    assert [q.uid for q in questions] == [uid for k, uid in enumerate(questions.uids) if k != i]
    return caught.value.reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"problem": "<image>What?"}, "no image where the text announces one"),
        ({"problem": "<image1>What?", "images": []}, "no image where the text announces one"),
        ({"problem": "What?", "images": ["ok.png", "ok.png"]}, "several images are not supported: 2"),
        ({"problem": "What?", "image": "nowhere.png"}, "missing image file: nowhere.png"),
        ({"problem": "What?", "image": "."}, "missing image file: ."),
        ({"problem": "What?", "image": "../outside.png"}, "image path outside the data folder"),
        ({"problem": "What?", "image": "/etc/passwd"}, "image path outside the data folder"),
        ({"problem": "What?", "image": "link.png"}, "image path outside the data folder"),
        ({"problem": "What?", "image": "linked/outside.png"}, "image path outside the data folder"),
        ({"problem": "What?", "image": "circle.png"}, ("unreadable image path", "missing image file")),
        ({"problem": "What?", "image": "x" * 5000}, "unreadable image path"),
        ({"problem": "What?", "image": "a\0b"}, "neither image bytes nor a path"),
        ({"problem": "What?", "image": 7}, "neither image bytes nor a path"),
        ({"problem": ""}, "no question text"),
        ({"problem": "<image> ", "image": "ok.png"}, "no question text"),
        ({"problem": None}, "no question text"),
        ({"problem": [{"role": "assistant", "content": "7"}]}, "no turn of the user among assistant"),
        ({"answer": "7"}, "no question text"),
        ({"problem": "What?", "choices": "one or two"}, "choices are no list"),
        ({"problem": "What?", "choices": 4}, "choices are no list"),
        ('{"problem": "cut off', "not a JSON object: line 2 of train.jsonl"),
        ("[1, 2]", "not a JSON object: line 2 of train.jsonl"),
        ("7", "not a JSON object: line 2 of train.jsonl"),
        ("[]", "not a JSON object: line 2 of train.jsonl"),
        ("{}", "no question text"),
        ("[" * 100_000, "not a JSON object: line 2 of train.jsonl"),
    ],
)
def test_bad_row(tmp_path, row, reason):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(picture())
    (folder / "ok.png").write_bytes(picture())
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    (folder / "circle.png").symlink_to("circle.png")
    jsonl(folder / "train.jsonl", [{"problem": "What?", "image": "ok.png"}, row, *plain(2)])
    jsonl(folder / "test.jsonl", plain(1))
    assert _bad(load(folder), 1).startswith(reason)


def test_a_line_that_is_not_utf8_spoils_no_other(tmp_path):
    good = json.dumps(plain(1)[0]).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + b'{"problem": "\xff"}\r\n' + good)
    (tmp_path / "test.jsonl").write_bytes(good)
    questions = load(tmp_path)
    assert len(questions) == 3  # a blank line is no row
    assert _bad(questions, 1).startswith("not a JSON object: line 3")


def test_text_without_half_characters(tmp_path):
    question = only(tmp_path, r'{"problem": "What \ud83d is this?", "id": "\udc00"}')
    assert question.question.encode() == b"What  is this?"


def test_paths_start_at_the_jsonl_file_and_end_in_the_data_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture())
    row = {"problem": "<image>What?"}
    jsonl(tmp_path / "deep/train.jsonl", [row | {"image": "../pictures/a.png"}])
    assert load(tmp_path)[0].image.size == (40, 30)
    with pytest.raises(DataError, match="image path outside the data folder"):
        load(tmp_path / "deep")
    jsonl(tmp_path / "deep/train.jsonl", [row | {"image": str(tmp_path / "pictures/a.png")}])
    assert load(tmp_path)[0].image.size == (40, 30)


def test_set_without_a_good_row(tmp_path):
    (tmp_path / "text.png").write_bytes(b"no picture")
    rows = [{"problem": "q", "image": name} for name in ("gone.png", "text.png", "gone.png")]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", plain(1))
    with pytest.raises(
        DataError, match=r"none of its 3 rows is good: 2 × missing image file, 1 × not an image"
    ) as caught:
        load(tmp_path)
    assert "000000 (missing image file: gone.png)" in str(caught.value)
    jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match="none of its 0 rows is good"):
        load(tmp_path)


def test_report_names_the_first_few(tmp_path):
    jsonl(tmp_path / "train.jsonl", [*plain(1), *({"problem": ""} for _ in range(5))])
    jsonl(tmp_path / "test.jsonl", plain(1))
    questions = load(tmp_path)
    assert questions.report_bad() is None
    assert len(questions.get(range(6))) == 1 and len(questions.bad) == 5
    assert questions.get([0, 0, -6, 3]) and [q.uid for q in questions.get([3, 0, 0])] == [questions.uids[0]] * 2
    label = tmp_path.name
    assert questions.report_bad() == (
        f"{label}/train: 5 of 6 rows skipped: "
        + "; ".join(f"{label}/train/{i:06d} (no question text)" for i in (1, 2, 3))
        + "; and 2 more"
    )
    with pytest.raises(IndexError):
        questions[6]


def test_no_column_for_the_question(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"aufgabe": "1 + 1?", "answer": "2"}])
    with pytest.raises(DataError, match="among aufgabe, answer. Rename one to any of problem, question, query, prompt"):
        load(tmp_path)
    jsonl(tmp_path / "train.jsonl", ["{", "}"])
    with pytest.raises(DataError, match="2 rows is good: 2 × not a JSON object|1 rows is good: 1 × not a JSON object"):
        load(tmp_path)


# ---- laziness and labels


def test_loading_decodes_no_more_than_one_picture(tmp_path, monkeypatch):
    rows = [{"problem": "<image>q", "images": [{"bytes": picture(), "path": "a.png"}]} for _ in range(30)]
    parquet(tmp_path / "train.parquet", rows)
    decoded = []
    real = reading.decode
    monkeypatch.setattr(reading, "decode", lambda uid, content: decoded.append(uid) or real(uid, content))
    questions = load(tmp_path)
    assert len(questions.uids) == len(questions) == 29 and len(decoded) == 1
    decoded.clear()
    assert [q.uid for q in questions.get([4, 2])] == decoded == [questions.uids[4], questions.uids[2]]


def test_gold_is_nowhere_but_in_gold(tmp_path):
    jsonl(tmp_path / "with/set/train.jsonl", plain(60))
    jsonl(tmp_path / "without/set/train.jsonl", [{"problem": row["problem"]} for row in plain(60)])
    with_gold, without = load(tmp_path / "with/set"), load(tmp_path / "without/set")
    assert with_gold.has_gold and not without.has_gold
    assert with_gold.uids == without.uids
    assert "no gold answers: label-free metrics only" in without.describe()
    assert "gold" not in with_gold.describe()
    blind = with_gold.without_gold()
    assert not blind.has_gold and with_gold.has_gold and blind.uids == with_gold.uids
    assert [(q.uid, q.question, q.gold) for q in blind] == [(q.uid, q.question, q.gold) for q in without]
    assert [q.gold for q in with_gold] == [str(int(q.question.split()[2]) + 1) for q in blind]


def test_bad_rows_are_counted_apart_without_gold(tmp_path):
    jsonl(tmp_path / "train.jsonl", [*plain(1), {"problem": ""}, {"problem": ""}])
    jsonl(tmp_path / "test.jsonl", plain(1))
    questions = load(tmp_path)
    questions.get([1])
    blind = questions.without_gold()
    assert blind.bad == questions.bad
    blind.get([2])
    assert len(blind.bad) == 2 and len(questions.bad) == 1


def test_a_set_with_one_gold_answer_has_gold(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"problem": "q", "answer": a} for a in (None, "", "3")])
    jsonl(tmp_path / "test.jsonl", [{"problem": "q", "answer": None}])
    assert load(tmp_path).has_gold and not load(tmp_path, limit=2).has_gold and not load(tmp_path, "test").has_gold


def test_rows_without_gold_are_bad_where_gold_is_needed(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"problem": "q", "answer": a} for a in ("1", None, "3")])
    jsonl(tmp_path / "test.jsonl", plain(1))
    questions = load(tmp_path)
    labelled = questions.with_gold()
    assert [q.gold for q in labelled.get(range(3))] == ["1", "3"] and len(questions.get(range(3))) == 3
    assert labelled.bad == {questions.uids[1]: "no gold answer"} and not questions.bad


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"


@pytest.mark.parametrize("card", [CARD, None])
def test_folders_of_one_name_and_files_written_anew_are_told_apart(tmp_path, card):
    """`datasets` keeps copies of what it reads: they are neither another folder's rows nor newer ones."""

    def write(run: str, rows) -> set[str]:
        folder = tmp_path / run / "questions"
        parquet(folder / "data/train-00000-of-00001.parquet", rows)
        if card:
            (folder / "README.md").write_text(card)
        return {q.question for split in ("train", "test") for q in load(folder, split)}

    first, second = plain(5), plain(5, start=100)
    assert write("a", first) == {row["problem"] for row in first}
    assert write("b", second) == {row["problem"] for row in second}
    assert write("a", second[:4]) == {row["problem"] for row in second[:4]}


# ---- splits


def rows_of(folder, split) -> Counter:
    return Counter(q.question for q in load(folder, split))


SIZES = {"train": 200, "validation": 100, "test": 60}
COMBINATIONS = ["train", "test", "validation", "train test", "train validation", "validation test"]


@pytest.mark.parametrize("have", [*COMBINATIONS, "train validation test"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_train_shares_no_row_with_the_others(tmp_path, have, kind):
    start, whole = 0, {}
    for split in have.split():
        rows = plain(SIZES[split], start)
        {"jsonl": jsonl, "parquet": parquet}[kind](tmp_path / f"data/{split}-00000-of-00001.{kind}", rows)
        whole[split], start = Counter(row["problem"] for row in rows), start + SIZES[split]
    got = {split: rows_of(tmp_path, split) for split in SIZES}
    uids = {split: set(load(tmp_path, split).uids) for split in SIZES}
    for held_out in ("validation", "test"):
        assert not got["train"] & got[held_out] and not uids["train"] & uids[held_out]
    base = have.split()[0]
    split_up = len(whole) == 1 or base != "train"
    if split_up:
        held_out = base if base != "train" else "test"
        assert got["train"] + got[held_out] == whole[base]
        assert 0 < sum(got[held_out].values()) < 0.1 * SIZES[base]
    else:
        assert got["train"] == whole["train"]
    for split in ("validation", "test"):
        if split in whole and split != base:
            assert got[split] == whole[split]
    if ("validation" in whole) + ("test" in whole) < 2:
        assert got["validation"] == got["test"]


def test_five_percent_by_uid_hash_and_nothing_else(tmp_path):
    jsonl(tmp_path / "a/set/train.jsonl", plain(2000))
    held = load(tmp_path / "a/set", "test", seed=1)
    assert 60 <= len(held) <= 140  # 100 are expected, with a standard deviation of 10
    assert held.uids == load(tmp_path / "a/set", "validation", seed=2).uids
    assert load(tmp_path / "a/set").uids[:40] != [f"set/train/{i:06d}" for i in range(len(held), len(held) + 40)]
    assert "held out of 2000 train rows by uid hash" in held.describe()
    assert f"without {len(held)} rows held out" in load(tmp_path / "a/set").describe()
    # Other pictures, other words and other answers, but the same uids.
    jsonl(tmp_path / "b/set/train.jsonl", plain(2000, start=7))
    assert load(tmp_path / "b/set", "test").uids == held.uids
    # More rows move none across.
    jsonl(tmp_path / "b/set/train.jsonl", plain(2500))
    assert load(tmp_path / "b/set", "test").uids[: len(held)] == held.uids


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_tiny_set_holds_out_at_least_one(tmp_path, n):
    for k in range(5):
        jsonl(tmp_path / f"s{k}/train.jsonl", plain(n))
        train, test = load(tmp_path / f"s{k}"), load(tmp_path / f"s{k}", "test")
        assert len(test) >= 1 and len(train) >= 1 and len(train) + len(test) == n
    jsonl(tmp_path / "one/train.jsonl", plain(1))
    assert len(load(tmp_path / "one")) == 1
    with pytest.raises(DataError, match="two rows are needed"):
        load(tmp_path / "one", "test")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("valid-00000-of-00001.jsonl", "validation"),
        ("testmini.jsonl", "test"),
        ("geo_test.jsonl", "test"),
        ("test/part.jsonl", "test"),
        ("default/test/0000.jsonl", "test"),
        ("TEST.jsonl", "test"),
    ],
)
def test_split_from_file_or_folder_name(tmp_path, name, split):
    jsonl(tmp_path / name, plain(3))
    jsonl(tmp_path / "questions.jsonl", plain(40, start=50))
    assert rows_of(tmp_path, split) == Counter(row["problem"] for row in plain(3))
    assert len(load(tmp_path, "train")) == 40


def test_synonyms_can_be_asked_for_and_nothing_else(tmp_path):
    jsonl(tmp_path / "train.jsonl", plain(9))
    jsonl(tmp_path / "val.jsonl", plain(2, start=20))
    assert (
        load(tmp_path, "dev").uids
        == load(tmp_path, "validation").uids
        == [f"{tmp_path.name}/validation/00000{i}" for i in (0, 1)]
    )
    with pytest.raises(DataError, match="no split 'tset': ask for train, validation, test"):
        load(tmp_path, "tset")


def test_test_comes_before_testmini(tmp_path, caplog):
    jsonl(tmp_path / "test.jsonl", plain(5))
    jsonl(tmp_path / "testmini.jsonl", plain(2))
    jsonl(tmp_path / "train.jsonl", plain(4, start=10))
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, "test")) == 5
    assert "not used: testmini" in caplog.text


def test_limit_keeps_the_first_rows(tmp_path):
    jsonl(tmp_path / "train.jsonl", plain(40))
    assert load(tmp_path, limit=3).uids == load(tmp_path).uids[:3]
    assert len(load(tmp_path, limit=1000)) == len(load(tmp_path))
    with pytest.raises(DataError, match="limit=0"):
        load(tmp_path, limit=0)


# ---- uids


def test_uids_stay_when_the_folder_moves(tmp_path):
    parquet(tmp_path / "a/geo/train.parquet", plain(30))
    before = load(tmp_path / "a/geo"), load(tmp_path / "a/geo", "test")
    shutil.move(tmp_path / "a/geo", tmp_path / "geo")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/geo").symlink_to(tmp_path / "geo")
    for folder in (tmp_path / "geo", f"{tmp_path}/b/geo/", tmp_path / "b/../geo"):
        assert [load(folder).uids, load(folder, "test").uids] == [q.uids for q in before]
    (tmp_path / "alias").symlink_to(tmp_path / "geo")
    assert load(tmp_path / "alias").name == "alias"
    assert set(before[0].uids) | set(before[1].uids) == {f"geo/train/{i:06d}" for i in range(30)}
    assert all(q.uid == uid for q, uid in zip(before[0].get(range(3)), before[0].uids, strict=False))


def test_relative_paths(tmp_path, monkeypatch):
    jsonl(tmp_path / "org/name/train.jsonl", plain(3))
    monkeypatch.chdir(tmp_path / "org/name")
    assert load(".").name == "name" and load("train.jsonl").name == "train"
    monkeypatch.chdir(tmp_path)
    assert load("org/name").uids[0].startswith("name/train/")  # a folder that is there comes before a hub id


@pytest.mark.parametrize("column", ["uid", "id", "pid"])
def test_own_uids(tmp_path, column):
    jsonl(tmp_path / "train.jsonl", [row | {column: i + 100} for i, row in enumerate(plain(3))])
    jsonl(tmp_path / "test.jsonl", [row | {column: "x7"} for row in plain(1)])
    assert load(tmp_path).uids == ["100", "101", "102"] and load(tmp_path, "test").uids == ["x7"]


def test_own_uids_count_only_if_they_are_unique_over_the_splits(tmp_path):
    label = tmp_path.name
    rows = [row | {"id": i} for i, row in enumerate(plain(3))]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", rows[2:])
    assert load(tmp_path).uids == [f"{label}/train/{i:06d}" for i in range(3)]
    jsonl(tmp_path / "test.jsonl", [rows[2] | {"id": None}])
    assert load(tmp_path).uids == ["0", "1", "2"] and load(tmp_path, "test").uids == [f"{label}/test/000000"]


# ---- layouts


@needs_geometry
def test_geometry_hub():
    train, test = load(GEOMETRY_HUB), load(GEOMETRY_HUB, "test")
    assert (len(train), len(test)) == (192, 48) and train.has_gold
    assert train.uids[:2] == ["geometry_hub/train/000000", "geometry_hub/train/000001"]
    assert load(GEOMETRY_HUB, "validation").uids == test.uids
    questions = [*train, *test]
    assert len(questions) == 240 and not train.bad and not test.bad
    assert train[0].gold == "100" and train[0].question.startswith("The Olympic logo is made of $5$ circles")
    assert all(q.image.mode == "RGB" and q.gold and "<image>" not in q.question and not q.choices for q in questions)


def test_single_files(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    mine = jsonl(tmp_path / "mine.jsonl", [{"question": "<image>q", "image": "a.png"} for _ in range(3)])
    assert load(mine)[0].image.size == (40, 30) and load(str(mine)).uids[0].startswith("mine/train/")
    assert len(load(parquet(tmp_path / "test-00000-of-00001.parquet", plain(3)), "test")) == 1


def test_shards_are_joined_in_order_and_hidden_folders_left_out(tmp_path):
    for shard in (1, 0):
        parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", plain(3, start=3 * shard))
    parquet(tmp_path / "data/test-00000-of-00001.parquet", [{"problem": "q"}])  # another schema than train
    parquet(tmp_path / ".cache/train.parquet", plain(5))
    assert [q.question for q in load(tmp_path)] == [row["problem"] for row in plain(6)]


def test_folder_names_are_no_patterns_and_nothing_is_written_there(tmp_path):
    folder = tmp_path / "data [v2] *?"
    parquet(folder / "train.parquet", plain(3))
    before = sorted(folder.rglob("*"))
    folder.chmod(0o555)
    assert len(load(folder)) == 2
    folder.chmod(0o755)
    assert sorted(folder.rglob("*")) == before


def test_paths_in_parquet_start_at_the_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture())
    parquet(tmp_path / "data/train.parquet", [{"problem": "<image>q", "image_path": "images/a.png"}])
    assert load(tmp_path)[0].image.size == (40, 30)


def test_unusable_folders(tmp_path):
    for name, reason in (("empty", "neither .parquet nor .jsonl"), ("both", ".jsonl and .parquet")):
        (tmp_path / name).mkdir()
        if name == "both":
            parquet(tmp_path / name / "train.parquet", plain(2))
            jsonl(tmp_path / name / "train.jsonl", plain(2))
        with pytest.raises(DataError, match=reason):
            load(tmp_path / name)
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer/train.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="unreadable parquet among train.parquet: .*[Pp]arquet.*Fetch it again"):
        load(tmp_path / "pointer")
    damaged = parquet(tmp_path / "damaged/train.parquet", plain(500))
    damaged.write_bytes(damaged.read_bytes()[:10] + b"\xff" * 80 + damaged.read_bytes()[90:])
    with pytest.raises(DataError, match="unreadable parquet") as caught:
        load(tmp_path / "damaged")
    assert "error occurred while generating" not in str(caught.value)  # what `datasets` says, and no more than that
    for name in ("geoqqa", str(tmp_path / "gone"), "gone.jsonl", "a/gone.parquet", "./gone", "a/b/c"):
        with pytest.raises(
            DataError, match="neither shapes, shapes-hard, geoqa, geometry3k, mmr1, nor a hub id.*DATA="
        ):
            load(name)


@pytest.mark.parametrize("card", [False, True])
def test_a_cache_that_cannot_be_written_is_not_the_datas_fault(tmp_path, monkeypatch, card):
    folder = parquet(tmp_path / "set/train.parquet", plain(4)).parent
    if card:  # another way into the library
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
        )
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(DataError) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith(f"the cache {tmp_path}/file/cache cannot be written: a file stands where a folder has to be")
    assert said.endswith("HF_DATASETS_CACHE=DIR before the command puts the cache elsewhere") and "etch" not in said


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(errno.EACCES, "Permission denied", "CACHE/x.lock"), "cannot be written: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "CACHE/x.lock"), "cannot be written: the disk is read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written: no space left on the disk"),
        (OSError("Not enough disk space. Needed: 3 GB (download: 1 GB)"), "Not enough disk space. Needed: 3 GB"),
        (PermissionError(errno.EACCES, "Permission denied", "DATA/train.parquet"), "train.parquet: permission denied"),
    ],
)
def test_what_the_disk_refuses_is_said_of_the_disk(tmp_path, monkeypatch, error, said):
    folder = parquet(tmp_path / "set/train.parquet", plain(4)).parent
    places = {"CACHE": str(datasets.config.HF_DATASETS_CACHE), "DATA": str(folder)}
    if error.filename:
        error.filename = error.filename.replace(*next(pair for pair in places.items() if pair[0] in error.filename))

    def refused(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(DataError, match=said) as caught:
        load(folder)
    assert "unreadable parquet" not in str(caught.value) and "Fetch it again" not in str(caught.value)


def test_what_a_network_refuses_is_not_said_of_the_disk(monkeypatch):
    def refused(*args, **options):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(DataError, match="did not come from the hub: .*Connection refused. Fetch it"):
        load("org/nothing-of-that-name")


def test_shapes():
    pytest.importorskip("shapes")
    questions = load("shapes", "train", seed=3, limit=5)
    assert len(questions) == 5 and questions.has_gold and questions.uids == [q.uid for q in questions]
    assert all(type(q) is Question and q.image.mode == "RGB" and q.gold for q in questions) and not questions.bad
    same, other = load("shapes", seed=3, limit=5), load("shapes", seed=4, limit=5)
    assert [q.image.tobytes() for q in same] == [q.image.tobytes() for q in questions]
    assert [q.image.tobytes() for q in other] != [q.image.tobytes() for q in questions]
    assert all(q.gold is None and q.image for q in questions.without_gold())


# ---- the hub, from its caches only

GEOQA = [
    {"image": picture(), "problem": f"<image>Find angle {i}.", "solution": f"<answer> {i}° </answer>"}
    for i in range(30)
]
LISTED = [{"images": [picture()], "problem": f"<image>Find x{i}.", "answer": str(i)} for i in range(6)]


@pytest.mark.parametrize("card", [True, False])
def test_geoqa_from_the_hub_cache(caches, card):
    make_hub_dataset(caches / "hub", "leonardPKU/GEOQA_R1V_Train_8K", {"train": GEOQA}, card)
    train, test = load("geoqa"), load("geoqa", "test")
    assert len(train) + len(test) == 30 and not set(train.uids) & set(test.uids)
    assert (
        train[0].gold.endswith("°") and train[0].question.startswith("Find angle") and train[0].image.size == (40, 30)
    )
    assert train.name == "geoqa" and train.uids[-1] in {f"geoqa/train/{i:06d}" for i in range(30)}
    assert load("leonardPKU/GEOQA_R1V_Train_8K").uids == train.uids


@pytest.mark.parametrize(
    ("name", "repo", "splits"),
    [
        ("geometry3k", "hiyouga/geometry3k", {"train": 6, "validation": 3, "test": 2}),
        ("mmr1", "MMR1/MMR1-Math-RL-Data-v0", {"train": 6, "validation": 3}),
        ("anyone/else", "anyone/else", {"train": 6, "test": 2}),
    ],
)
def test_other_sets_from_the_hub_cache(caches, name, repo, splits):
    make_hub_dataset(caches / "hub", repo, {split: LISTED[:n] for split, n in splits.items()})
    for split, n in splits.items():
        questions = load(name, split)
        assert [q.gold for q in questions] == [str(i) for i in range(n)]
        assert questions.uids[0] == f"{name.split('/')[-1]}/{split}/000000"
        assert questions[0].image.size == (40, 30) and questions[0].question == "Find x0."
    assert len(load(name, "test")) == splits.get("test", splits.get("validation"))


def test_pictures_beside_the_tables_of_a_snapshot(caches):
    snapshot = make_hub_dataset(
        caches / "hub", "a/b", {"train": [{"problem": "<image>q", "image_path": "images/a.png"}]}
    )
    (snapshot / "images").mkdir()
    (snapshot.parents[1] / "blobs/feed").write_bytes(picture())
    (snapshot / "images/a.png").symlink_to("../../../blobs/feed")
    assert load("a/b")[0].image.size == (40, 30)
    (snapshot / "images/a.png").unlink()
    (caches / "a.png").write_bytes(picture())
    (snapshot / "images/a.png").symlink_to(caches / "a.png")
    with pytest.raises(DataError, match="outside the data folder"):
        load("a/b")


def test_a_copy_fetched_in_part_is_no_copy(caches):
    snapshot = make_hub_dataset(caches / "hub", "a/b", {"train": LISTED, "test": LISTED[:2]})
    (snapshot / "data/test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="the copy in the cache.*is not what its README.md says.*Fetch the rest"):
        load("a/b")
    (snapshot / "README.md").unlink()
    assert len(load("a/b")) + len(load("a/b", "test")) == len(LISTED)


def test_from_the_arrow_cache_of_an_earlier_online_run(caches, tmp_path):
    from datasets.packaged_modules.parquet.parquet import Parquet

    snapshot = make_hub_dataset(tmp_path, "hiyouga/geometry3k", {"train": LISTED, "test": LISTED[:2]})
    files = {split: [str(snapshot / f"data/{split}-00000-of-00001.parquet")] for split in ("train", "test")}
    cache, names = datasets.config.HF_DATASETS_CACHE, {"dataset_name": "geometry3k", "config_name": "default"}
    Parquet(cache_dir=str(cache), data_files=files, hash="0a1b", **names).download_and_prepare()
    (made,) = (cache / "geometry3k").iterdir()  # `default-` and a hash of the file names, plain `default` for a hub id
    made.rename(made.with_name("default"))
    (cache / "geometry3k").rename(cache / "hiyouga___geometry3k")
    readme = (
        make_hub_dataset(caches / "hub", "hiyouga/geometry3k", {}) / "README.md"
    )  # all that such a run leaves there
    assert readme.exists()
    assert [q.gold for q in load("geometry3k")] == [str(i) for i in range(6)] and len(load("geometry3k", "test")) == 2


OFFLINE = """
import sys
from upt import data
from upt.data import rows as reading
try:
    print(len(data.load(sys.argv[1])))
except data.DataError as error:
    print(error)
"""


def test_offline_and_not_cached(tmp_path):
    """In a process of its own, with the variables a user would set, and first without the set and then with it."""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env = {k: v for k, v in env.items() if k not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}

    def run(name):
        command = [sys.executable, "-c", OFFLINE, name]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    said = run("geoqa")
    for part in (
        "leonardPKU/GEOQA_R1V_Train_8K is not in the cache",
        "DATA=/path/to/DIR",
        "any folder of parquet, or of JSONL with image paths",
        "hf download --repo-type dataset leonardPKU/GEOQA_R1V_Train_8K --local-dir DIR",
    ):
        assert part in " ".join(said.split())
    make_hub_dataset(tmp_path / "hub", "leonardPKU/GEOQA_R1V_Train_8K", {"train": GEOQA})
    assert int(run("geoqa")) > 20


def test_gated_or_missing_on_the_hub(monkeypatch):
    def gated(repo):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{repo}' is a gated dataset on the Hub.\nAsk.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    for repo in ("a/b", "a/b--c"):  # the second is no valid id
        with pytest.raises(
            DataError, match=f"{repo} is not in the cache.*'{repo}' is a gated dataset on the Hub. Fetch"
        ):
            load(repo)


def test_a_description_counts_the_questions_that_have_a_picture(tmp_path):
    for name in ("own", "text"):
        jsonl(tmp_path / name / "train.jsonl", plain(2))
    Image.new("RGB", (8, 8)).save(tmp_path / "own/x.png")
    cells = [{"image": "x.png"}, {"image": None}, {}, {"images": []}, {"images": ["x.png"]}, {"image": ""}]
    jsonl(tmp_path / "own/test.jsonl", [{"question": f"q{i}"} | cell for i, cell in enumerate(cells)])
    assert load(tmp_path / "own", "test").describe().startswith("own/test: 6 questions, 2 with a picture")
    for split, count in (("train", 3), ("test", 4)):
        rows = [{"problem": f"q{i}", "images": [{"bytes": picture(), "path": None}] * (i % 2)} for i in range(count)]
        parquet(tmp_path / f"hub/{split}.parquet", rows)
    assert load(tmp_path / "hub", "test").pictures == 2 and load(tmp_path / "hub", limit=1).pictures == 0
    assert "3 questions, all with a picture" in load("shapes", limit=3).describe()
    assert "1 questions, none with a picture" in load(tmp_path / "text", "test").describe()


@pytest.mark.parametrize("name, kind", [("notes.md", "a .md file"), ("NOTES", "a file without an ending")])
def test_a_file_of_another_kind_is_said_to_be_one(tmp_path, name, kind):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=f"{name}: {kind} is not read as data; give .parquet, .jsonl, .csv"):
        load(str(tmp_path / name), "train")
