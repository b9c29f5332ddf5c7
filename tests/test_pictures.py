"""Pictures of a set: where they lie in a row, what in a text stands for one, and how their files are read."""

import base64
import io
import json
import struct
import time

import datasets
import numpy as np
import pytest
from datafiles import jsonl, only, parquet, picture, plain
from PIL import Image, features

from upt.data import BadRow, DataError, decode, load
from upt.data.marks import take_out

pytestmark = pytest.mark.usefixtures("caches")

BLUE = picture("blue")
BASE64 = base64.b64encode(BLUE).decode()
URL = f"data:image/png;base64,{BASE64}"


@pytest.fixture
def folder(tmp_path):
    """A folder with a blue picture, once more under another name and in a folder."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png", "in/c (1).JPG"):
        (tmp_path / name).write_bytes(BLUE)
    return tmp_path


def is_blue(image) -> bool:
    return image is not None and image.size == (40, 30) and image.getpixel((3, 3)) == (0, 0, 255)


def bad(folder, row: dict) -> str:
    """Why a row is bad, beside one that is good."""
    jsonl(folder / "train.jsonl", [*plain(1), row])
    jsonl(folder / "test.jsonl", plain(1))
    questions = load(folder)
    assert questions.pictures == 0 and "rows that can't be used: 1 × " in questions.describe()
    with pytest.raises(BadRow) as caught:
        questions[1]
    return caught.value.reason


COLUMNS = """
    decoded_image images image img image_path image_paths img_path img_paths image_file image_files image_url img_url
    picture pictures photo image_0 image_1 img1 picture_2 imageUrl Image-Path IMAGE_FILE
"""


@pytest.mark.parametrize("column", [*COLUMNS.split(), "Image URL", "file_name"])
def test_columns(folder, column):
    question = only(folder, {"problem": "What?", column: "a.png"})
    assert is_blue(question.image) and question.question == "What?"
    assert "1 questions, all with a picture" in load(folder).describe()


CELLS = {
    "path": "a.png",
    "paths": ["in/c (1).JPG"],
    "mapping": {"path": "a.png"},
    "mapping of bytes": {"bytes": BASE64, "path": "gone.png"},
    "image": [{"image": "a.png"}],
    "url": [{"url": "b.png"}],
    "part": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "source": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
    "data URL": URL,
    "data URL in capitals": "DATA:image/png;BASE64," + BASE64,
    "data URL with signs escaped": URL.replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png"),
    "base64": BASE64,
    "base64 in lines": "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    "base64 for addresses, bare": BASE64.replace("+", "-").replace("/", "_").rstrip("="),
    "base64 of JPEG": base64.b64encode(picture("blue", kind="JPEG", quality=100)).decode(),  # starts with a slash
    "written list": "['a.png']",
    "written mapping": json.dumps({"path": "a.png"}),
    "file URL": "file://in/c%20(1).JPG",
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_cells(folder, cell):
    image = only(folder, {"problem": "<image>What?", "image": cell}).image
    assert image.size == (40, 30) and image.getpixel((3, 3))[2] > 250 and max(image.getpixel((3, 3))[:2]) < 5


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("https://example.org/a.png", "picture on the web, which is not fetched: https://example.org/a.png: download"),
        ([{"url": "http://example.org/a"}], "picture on the web"),
        ("s3://bucket/a.png", "picture on the web"),
        (URL[:60], "not an image|truncated image|undecodable"),
        ("data:image/png;base64,%%%", "undecodable base64|not an image"),
        (BASE64[:80] + "!" + BASE64[80:], "undecodable base64"),
        (True, "neither image bytes nor a path to a file: 'True'"),
        (12.5, "neither image bytes nor a path"),
        ({"width": 3}, "neither image bytes nor a path to a file: a mapping of width"),
        ([{"image": "a.png"}, {"image": "b.png"}], "several images are not supported: 2"),
        ("gone/a.png", "missing image file: gone/a.png"),
    ],
)
def test_cells_that_hold_no_picture_are_bad_rows(folder, cell, reason):
    if cell == URL[:60]:  # cut off within the header: nothing to open, and known only then
        with pytest.raises(DataError, match=reason):
            only(folder, {"problem": "What?", "image": cell})
        return
    jsonl(folder / "train.jsonl", [*plain(1), {"problem": "What?", "image": cell}])
    jsonl(folder / "test.jsonl", plain(1))
    with pytest.raises(BadRow, match=reason):
        load(folder)[1]


def test_numbered_columns_are_all_pictures_of_a_row(folder):
    assert is_blue(only(folder, {"problem": "What?", "image_1": "a.png", "image_2": None}).image)
    for row in ({"image_0": "a.png", "image_1": "b.png"}, {"image": "a.png", "image_2": "b.png"}):
        assert bad(folder, {"problem": "What?"} | row) == "several images are not supported: 2 in this row"


def test_a_file_name_that_is_no_picture_is_none(folder):
    question = only(folder, {"problem": "What?", "file_name": "chapter.txt"})
    assert question.image is None and load(folder).pictures == 0


MARKS = """
    <image> <Image> <image1> <image_1> <image-1> <image:1> <image/> <|image|> <|image_1|> <img> <|image_pad|> [IMG]
    <|vision_start|><|image_pad|><|vision_end|> <|vision_start|><|image_pad|><|image_pad|><|vision_end|> <picture>
    <images> <image_token> <image_here> {image} {{image}} {image_1} <|begin_of_image|> <|image_start|><|image_end|>
    <image_start><image_end> <|begin_of_image|><|image|><|end_of_image|> <|media_pad|> <figure> ＜image＞ &lt;image&gt;
    <img></img> [image] [Image_1] <ImageHere> <image_placeholder> <start_of_image> <img><IMG_CONTEXT><IMG_CONTEXT></img>
"""


@pytest.mark.parametrize("mark", [*MARKS.split(), "<image 1>", "< image >", "<img alt='x'>", "[image 1]"])
def test_a_mark_is_one_picture_and_no_text(folder, mark):
    assert take_out(f"How long is {mark} AB?")[0] == "How long is AB?"
    asked = only(folder, {"problem": f"{mark}\nWhat?", "image": "a.png"})
    assert asked.question == "What?" and is_blue(asked.image)
    assert bad(folder, {"problem": f"What {mark} ?"}) == "no image where the text announces one"


@pytest.mark.parametrize(
    "text",
    [
        "<img>a.png</img>What?",
        "Picture 1: <img>in/c (1).JPG</img>What?",
        "<image>a.png</image> What?",
        'What?<img src="a.png" width="3">',
        "<IMG width=3 src='in/c (1).JPG'/>What?",
        "<img src=a.png>What?",
        "<figure>\n<img src='a.png'>\n</figure>What?",
        "<image:a.png> What?",
        "[image: a.png] What?",
        "<image src='a.png'/>What?",
        f"<img src='{URL}'>What?",
        "![](a.png) What?",
        "![the figure](in/c%20(1).JPG) What?".replace("%20", " "),
        '![x](a.png "a title")What?',
        r"\includegraphics[width=3cm]{a.png} What?",
    ],
)
def test_a_path_in_a_mark_is_the_picture(folder, text):
    asked = only(folder, {"problem": text})
    assert is_blue(asked.image) and asked.question.removeprefix("Picture 1: ") == "What?"
    assert only(folder, {"problem": text, "image": "b.png"}).question == asked.question  # a column's comes first
    (folder / "a.png").unlink()
    if "a.png" in text:
        assert bad(folder, {"problem": text}).startswith("missing image file: a.png")


@pytest.mark.parametrize(
    "text",
    [
        "x<y",
        "<imagery>",
        "a [1] b",
        "![",
        "5!(n)",
        "[images]",
        "(image)",
        r"\text{image}",
        r"\{image\}",
        "&lt;",
        r"\frac{1}{2}",
        "<p>",
        "img",
    ],
)
def test_what_is_no_mark_stays(text):
    assert take_out(f"Is {text} so?") == (f"Is {text} so?", ((), ()))


def test_a_mark_in_round_brackets_begins_a_line():
    assert take_out("(image 2) What?\nIs it (image)?") == ("What?\nIs it (image)?", (("2",), ()))


@pytest.mark.parametrize(
    ("text", "pictures", "reason"),
    [
        ("<image><image>What?", ["a.png"], "fewer images than the text announces: 1 for 2 marks"),
        ("<image 1> and <image 2>?", ["a.png"], "fewer images than the text announces: 1 for 2 marks"),
        ("<image> and ![](b.png)?", ["a.png"], "fewer images than the text announces: 1 for 2 marks"),
        ("<image><image>What?", [], "no image where the text announces one: 0 for 2 marks"),
        ("<img>a.png</img><img>b.png</img>?", [], "several images are not supported: 2 in this row"),
        ("![](https://example.org/a.png) What?", [], "picture on the web"),
        ("<video>What?", [], "video and audio are not supported: <video>"),
        ("<|video_pad|>What?", ["a.png"], "video and audio are not supported"),
    ],
)
def test_marks_and_pictures_agree(folder, text, pictures, reason):
    assert bad(folder, {"problem": text, "images": pictures}).startswith(reason)


def test_a_picture_named_twice_or_by_no_mark_is_one(folder):
    for text in ("<image 1> shows ABC. In <image 1>, what?", "What?", "<image_01> and <image 1>?"):
        assert is_blue(only(folder, {"problem": text, "image": "a.png"}).image)


LABELLED = {"label": "A", "text": "x", "image": "a.png"}


def test_options_count_too(folder):
    row = {"problem": "<image 1>Which?", "image": "a.png"}
    assert only(folder, row | {"choices": ["<image 1> left", "right"]}).choices == ["left", "right"]
    assert bad(folder, row | {"choices": ["<image 2> left", "right"]}).startswith(
        "fewer images than the text announces"
    )
    for choices in (["<image 1>", "<image 2>"], ["a.png", "b.png"], [URL, URL], ["a.png", "none"], [LABELLED]):
        assert bad(folder, row | {"choices": choices}) == "choices that are pictures are not supported"


@pytest.mark.parametrize(
    "hostile",
    [
        "{image",
        "<image:",
        "(image)",
        "<image_start> ",
        "<image" + 8 * " ",
        "&lt;",
        "[IMG]",
        "![](",
        "<img src=",
        "<img ",
        " ",
        "<image ",
        "\\includegraphics{",
        "<img>a",
    ],
)
def test_marks_are_found_in_bounded_time(hostile):
    start = time.process_time()  # whatever else the machine is busy with
    take_out(hostile * 20_000 + "<image>")
    assert time.process_time() - start < 2


# ---- columns that are not read

UNSEEN = {
    "path": "a.png",
    "path in a folder": "images/2024/fig 1.jpeg",
    "address": "https://example.org/x.webp?size=3",
    "paths": ["a.png", "b.png"],
    "data URL": URL,
    "base64": BASE64,
    "mapping": {"bytes": BASE64, "path": None},
    "part": [{"image_url": {"url": "a.png"}}],
    "written list": '["a.png"]',
    "under names of its own": {"meta": {"media": {"img_path": "a.png"}}},
    "in a list under names of its own": {"extra": {"images": ["a.png"]}},
    "SVG": "x.svg",
    "HEIC": "x.heic",
    "an address of an image": "https://example.org/img?id=1",
    "joined": "a.png|b.png",
    "bytes as Python prints them": repr(BLUE),
}


@pytest.mark.parametrize("cell", UNSEEN.values(), ids=UNSEEN)
@pytest.mark.parametrize("empty", [{}, {"image": None}, {"images": []}])
def test_a_column_that_looks_like_pictures_is_named(folder, cell, empty):
    jsonl(folder / "train.jsonl", [{"problem": f"What is {i}?", "bild": cell if i else None} | empty for i in range(4)])
    with pytest.raises(DataError, match="column 'bild' looks like pictures.* Rename it to image"):
        load(folder)
    # Beside a row that is good, this one is bad.
    rows = [{"problem": "What?", "image": "a.png"}, {"problem": "What?", "bild": cell} | empty]
    jsonl(folder / "train.jsonl", rows)
    jsonl(folder / "test.jsonl", plain(1))
    questions = load(folder)
    assert is_blue(questions[0].image) and questions.pictures == 1
    with pytest.raises(BadRow, match="picture in a column that is not read: bild, rename it to image"):
        questions[1]


OTHER = base64.b64encode(picture("red")).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "path": "/data/set/a.png"},
        {"image": "./a.png", "source": "https://example.org/b.png"},
        {"decoded_image": BASE64, "image": "images/7.jpg"},
        {"image": {"bytes": BASE64, "path": None}, "origin": "images/7.jpg"},
        {"image": "a.png", "img": "a.png"},
    ],
)
def test_another_column_may_name_the_same_picture(folder, row):
    assert is_blue(only(folder, {"problem": "What?"} | row).image)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "second_image": "b.png"}, "picture in a column that is not read: second_image"),
        ({"image": BASE64, "second_image": OTHER}, "picture in a column that is not read: second_image"),
        ({"image": "a.png", "both": "a.png|b.png"}, "picture in a column that is not read: both"),
        ({"image": "a.png", "img": "b.png"}, "several images are not supported: 2"),
        ({"decoded_image": BASE64, "image": OTHER}, "several images are not supported: 2"),
        ({"video_path": "v.mp4"}, "video and audio are not supported"),
        ({"clip": "in/v.mp4"}, "video and audio are not supported: column clip"),
        ({"audio": "v.wav"}, "video and audio are not supported"),
        ({"hint": "<image>\nLook."}, "no image where a column that is not read announces one: hint"),
        ({"prompt": "<image>\nWhat?"}, "no image where a column that is not read announces one: prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no image where a column that is not read"),
        ({"messages": [{"role": "user", "content": [{"image": "a.png"}]}]}, "picture in a column that is not read"),
    ],
)
def test_no_picture_of_a_row_is_passed_over(folder, row, reason):
    jsonl(folder / "train.jsonl", [{"problem": "What?", "image": "a.png"}, {"problem": "What?"} | row])
    jsonl(folder / "test.jsonl", plain(1))
    with pytest.raises(BadRow, match=reason):
        load(folder)[1]


def test_a_solution_may_have_pictures_of_its_own(folder):
    worked = "As in this: ![](https://example.org/b.png)"
    for more in ({}, {"image": "a.png"}):
        assert only(folder, {"problem": "q", "answer": "7", "solution": worked} | more).gold == "7"


def test_a_picture_in_turns_that_are_not_read_is_named(folder):
    jsonl(folder / "train.jsonl", [{"question": "q", "messages": [{"role": "user", "content": [{"image": "a.png"}]}]}])
    with pytest.raises(DataError, match="column 'messages' looks like pictures.* take 'question' out"):
        load(folder)


@pytest.mark.parametrize("column", ["image_link", "imageLink", "photo", "Figure 1"])
def test_an_address_in_a_column_of_pictures_is_no_text(folder, column):
    jsonl(folder / "train.jsonl", [{"problem": "q", column: "https://example.org/q?id=1"}])
    with pytest.raises(DataError, match="looks like pictures|picture on the web"):
        load(folder)
    assert only(folder, {"problem": "q", "source": "https://example.org/about"}).image is None


@pytest.mark.parametrize("stored", ["bytes", "Image", "Images"])
def test_a_column_of_bytes_or_of_the_hubs_type_is_named(tmp_path, stored):
    if stored == "bytes":
        parquet(tmp_path / "train.parquet", [{"problem": f"q{i}", "blob": BLUE} for i in range(3)])
    else:
        cells = {"Image": [{"bytes": BLUE, "path": None}] * 3, "Images": [[{"bytes": BLUE, "path": "x"}]] * 3}[stored]
        kind = datasets.Image() if stored == "Image" else datasets.List(datasets.Image())
        types = datasets.Features({"problem": datasets.Value("string"), "blob": kind})
        datasets.Dataset.from_dict({"problem": [*"abc"], "blob": cells}, types).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="column 'blob' looks like pictures"):
        load(tmp_path)


@pytest.mark.parametrize(
    "cell",
    ["geometry", "see a.png for more\nof it", "1.5", 7, ["x", "y"], {"split": "train", "index": 3}, None, [0.5] * 9],
)
def test_what_does_not_look_like_a_picture_is_left_alone(tmp_path, cell):
    assert only(tmp_path, {"problem": "What?", "about": cell}).image is None


def test_missing_files_are_known_at_the_start(folder):
    rows = [{"problem": f"<image1>q{i}", "image": f"{'a' if i < 2 else i}.png"} for i in range(5)]
    jsonl(folder / "train.jsonl", [*rows, {"problem": "in words"}])
    jsonl(folder / "test.jsonl", plain(1))
    questions = load(folder)
    assert questions.pictures == 2 and not questions.bad
    assert questions.describe().split("; ")[0].endswith("6 questions, 2 with a picture")
    assert "; rows that can't be used: 3 × missing image file;" in questions.describe()


# ---- what is in a file


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "feature"), [("AVIF", "avif"), ("JPEG2000", "jpg_2000")])
def test_newer_formats(tmp_path, kind, feature):
    if not features.check(feature):
        pytest.skip(f"this Pillow is without {kind}")
    content = encoded(Image.new("RGB", (40, 30), (10, 200, 30)), kind)
    assert np.abs(np.asarray(decode("u", content)).astype(int) - (10, 200, 30)).max() < 8
    assert only(tmp_path, {"problem": "q", "image": base64.b64encode(content).decode()}).image.size == (40, 30)


RAMP = np.linspace(0, 1, 256).reshape(16, 16)  # 0, 1/255, …, 1
DEEP = {
    "0 … 1": RAMP.astype(np.float32),
    "0 … 255, floating": (255 * RAMP).astype(np.float32),
    "0 … 255": np.rint(255 * RAMP).astype(np.int32),
    "0 … 65535": np.rint(65535 * RAMP).astype(np.int32),
    "-1 … 1": (2 * RAMP - 1).astype(np.float32),
    "0 … 2^31": np.rint((2**31 - 1) * RAMP).astype(np.int32),
    "without sign": np.rint((2**32 - 1) * RAMP).astype(np.uint32),
}


def tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF of one strip, with a sign (2), floating point (3) or neither (1)."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, width), (257, height), (258, 32), (259, 1), (262, 1), (273, 8 + 2 + 12 * 10 + 4), (277, 1)]
    tags += [(278, height), (279, values.nbytes), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values.tobytes()


@pytest.mark.parametrize("values", DEEP.values(), ids=DEEP)
def test_deep_tiff_is_scaled(values):
    grey = np.asarray(decode("u", tiff(values)))
    assert (grey == np.arange(256).reshape(16, 16, 1)).all()


def test_deep_tiff_of_one_value_and_with_gaps():
    assert np.asarray(decode("u", tiff(np.full((9, 9), 0.5, np.float32)))).mean() == 128
    assert np.asarray(decode("u", tiff(np.full((9, 9), 70_000, np.int32)))).mean() == 255
    assert np.asarray(decode("u", tiff(np.zeros((9, 9), np.float32)))).max() == 0
    gaps = np.array([[0, 1000], [np.nan, np.inf]], np.float32).repeat(4, 0).repeat(4, 1)
    assert [decode("u", tiff(gaps)).getpixel(at)[0] for at in ((0, 0), (7, 0), (0, 7), (7, 7))] == [0, 255, 0, 0]
