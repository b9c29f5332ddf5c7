"""The embedded data set: deterministic, right, and without a picture that two splits share."""

import random
from collections import Counter
from hashlib import blake2b

import pytest

from upt import data
from upt.data import names, shapes

SETS = pytest.mark.parametrize("name", shapes.LEVELS)


def digest(item) -> bytes:
    return item.image.tobytes()


@SETS
def test_the_same_seed_gives_the_same_pictures(name):
    one, two = shapes.questions("test", 3, 40, name), shapes.questions("test", 3, 40, name)
    assert [(digest(i), i.question, i.gold) for i in one] == [(digest(i), i.question, i.gold) for i in two]
    assert [digest(i) for i in shapes.questions("test", 4, 40, name)] != [digest(i) for i in one]
    assert [i.question for i in shapes.questions("test", 3, 60, name)][:40] == [i.question for i in one]


def test_the_pictures_and_questions_of_shapes_stay_what_they_are():
    """Models have been warmed up on them, and runs compare themselves with them."""
    found = blake2b(digest_size=16)
    for item in shapes.questions("train", 0, 200):
        found.update(repr((item.uid, item.scene, item.question, item.gold)).encode() + digest(item))
    assert found.hexdigest() == "c29dd95c8f0b275120f8eb03c5542984"


def test_no_picture_is_shared_by_splits_or_sets_or_occurs_twice():
    splits = [(name, split) for name in shapes.LEVELS for split in shapes.SIZES]
    splits.remove(("shapes-hard", "warmup"))
    sets = {(*of, seed): shapes.questions(of[1], seed, 400, of[0]) for of in splits for seed in (0, 1)}
    pictures = {of: {digest(item) for item in items} for of, items in sets.items()}
    assert all(len(found) == 400 for found in pictures.values())
    for of, found in pictures.items():
        for other, more in pictures.items():
            if of[:2] != other[:2]:
                assert not found & more, f"{of} and {other}"


def test_hard_pictures_are_none_that_shapes_could_draw():
    """By kind, the difference that each single picture shows; and grids have larger counts."""
    hard = shapes.questions("train", 0, 600, "shapes-hard")
    for item in hard:
        what, *parts = item.scene
        if what == "grid":  # no cell of `shapes` is off its middle, and half of its grids hold fewer shapes
            cells = [cell for cell in parts if cell]
            assert len(cells) >= 6 and all({*map(abs, cell[2:])} == {2} for cell in cells)
        elif what == "bars":  # up to 2 pixels off the middle in `shapes`
            assert {abs(shift) for _, _, shift in parts} <= {3, 4}
        else:  # the third row and the second in `shapes`
            assert parts[4] in {"triangle": (0, 1), "segment": (0, 2)}[what]
    counts = [
        sum(sum(item.facts) for item in items if item.kind == "sum") / sum(item.kind == "sum" for item in items)
        for items in (shapes.questions("train", 0, 600), hard)
    ]
    # Of nine cells .6 are filled, two thirds of these in two colours of three; 5.4 against about 7.3 shapes.
    assert counts[0] == pytest.approx(4.0, abs=0.4) and counts[1] > 1.2 * counts[0]


def test_hard_pictures_have_both_numbers_in_their_row_and_a_line_in_another():
    for item in shapes.questions("test", 0, 200, "shapes-hard"):
        if item.kind in ("angle", "length"):
            row = item.scene[5]
            drawn = {
                cell
                for cell in range(9)
                for x, y in [(28 * (cell % 3), 28 * (cell // 3))]
                if len(item.image.crop((x, y, x + 28, y + 28)).getcolors()) > 1
            }
            lines = drawn - {3 * row, 3 * row + 2}
            assert len(drawn) == 5 and len(lines) == 3 and len({cell // 3 for cell in lines}) == 1
            if item.kind == "length":  # in `shapes` it is in the last
                assert lines == {3, 4, 5}


@SETS
def test_golds_are_right(name):
    """Golds worked out again from what is drawn."""
    for item in shapes.questions("validation", 0, 300, name):
        what, *parts = item.scene
        if item.kind == "angle":
            expected = 180 - parts[0] - parts[1]
        elif item.kind == "length":
            expected = parts[0] + parts[1]
        elif item.kind == "bars":
            expected = sum(height for colour, height, _ in parts if colour in item.question)
        else:
            number = Counter(cell[1] for cell in parts if cell is not None)
            asked = sorted((word for word in item.question.split() if word in shapes.COLOURS), key=item.question.index)
            counts = [number[colour] for colour in asked]
            expected = {"count": counts[0], "sum": sum(counts), "difference": counts[0] - counts[-1]}[item.kind]
        assert int(item.gold) == expected >= 0
        reasoning, answer = shapes.worked(item.kind, item.names, item.facts)
        end = f"{expected} {item.names[0]}" if item.kind == "count" else f"={expected}"
        assert answer == expected and reasoning.replace("= ", "=").endswith(end)


@SETS
def test_pictures_show_what_is_asked_about(name):
    """Pixels of each colour agree with the count: a shape covers 280 to 650 of them."""
    for item in (i for i in shapes.questions("test", 0, 120, name) if i.scene[0] == "grid"):
        seen = Counter(item.image.getdata())
        for colour in item.names:
            count = sum(cell is not None and cell[1] == colour for cell in item.scene[1:])
            assert 280 * count <= seen[shapes.COLOURS[colour]] <= 650 * count


@SETS
def test_every_kind_is_there_and_through_load(name):
    questions = data.load(name, "test", seed=1)
    assert len(questions) == 512 and questions.has_gold
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == set(shapes.KINDS) and min(kinds.values()) > 50
    first = questions[0]
    assert first.uid == f"{name}/test/000000" and first.image.size == (84, 84) and first.gold is not None
    assert questions.without_gold()[0].gold is None


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="no split"):
        shapes.questions("dev")
    with pytest.raises(ValueError, match="6000"):
        shapes.questions("test", 0, 10_000)
    with pytest.raises(ValueError, match="shapes-hard has no split 'warmup': ask for one of train, validation, test"):
        data.load("shapes-hard", "warmup")
    for typed in ("shapes-hrd", "shapes_hard", "shape-hard"):
        with pytest.raises(ValueError, match="did you mean 'shapes-hard'?"):
            data.load(typed)


def test_every_set_has_a_name_that_goes_with_others():
    assert tuple(shapes.LEVELS) == names.EMBEDDED
    both = data.load("shapes:1,shapes-hard:1", limit=2)
    assert both.uids == [f"{name}/train/00000{i}" for name in names.EMBEDDED for i in (0, 1)]
    assert both[3].image.tobytes() == shapes.questions("train", 0, 2, "shapes-hard")[1].image.tobytes()


GRID = ("grid", ("circle", "red"), ("square", "red"), ("circle", "blue"), *[None] * 6)
BARS = ("bars", ("red", 4, 0), ("green", 1, 0), ("blue", 2, 0))


@pytest.mark.parametrize(
    ("scene", "question", "found"),
    [
        (GRID, "How many red shapes are there?", ("count", ("red",), (2,))),
        (GRID, " How many yellow shapes are there? ", ("count", ("yellow",), (0,))),
        (GRID, "How many blue and red shapes are there?", ("sum", ("blue", "red"), (1, 2))),
        (GRID, "How many more red than blue shapes are there?", ("difference", ("red", "blue"), (2, 1))),
        (GRID, "How many more blue than red shapes are there?", None),  # there are fewer
        (GRID, "How many red and red shapes are there?", None),
        (GRID, "How many pink shapes are there?", None),
        (GRID, "How many red shapes are there", None),
        (GRID, "How many red shapes are there? How many blue?", None),
        (GRID, "How long is the whole segment?", None),
        (GRID, "", None),
        (BARS, "What is the sum of the red and blue bars?", ("bars", ("red", "blue"), (4, 2))),
        (BARS, "What is the sum of the red and yellow bars?", None),  # no such bar
        (BARS, "How many red shapes are there?", None),
        (("triangle", 30, 40, 20, 1), "What is the third angle, in degrees?", ("angle", (), (30, 40))),
        (("segment", 3, 5, 40, -1), "How long is the whole segment?", ("length", (), (3, 5))),
        (("segment", 3, 5, 40, -1), "What is the third angle, in degrees?", None),
    ],
)
def test_questions_in_anyones_words(scene, question, found):
    assert shapes.understand(scene, question) == found


@SETS
def test_the_sets_own_questions_are_understood(name):
    for item in shapes.questions("train", 5, 300, name):
        assert shapes.understand(item.scene, item.question) == (item.kind, item.names, item.facts)


@SETS
def test_another_question_asks_for_something_else_of_the_same_picture(name):
    rng, kinds = random.Random(0), Counter()
    for item in shapes.questions("train", 0, 400, name):
        other = shapes.ask_else(item, rng)
        assert (other is None) == (item.kind in ("angle", "length"))
        if other:
            kind, names, _ = shapes.understand(item.scene, other)
            assert (kind, {*names}) != (item.kind, {*item.names})
            kinds[kind] += 1
    assert set(kinds) == {"count", "sum", "difference", "bars"} and min(kinds.values()) > 30
