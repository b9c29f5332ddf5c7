"""The embedded data set: deterministic, right, and without a picture that two splits share."""

import random
from collections import Counter

import pytest

from upt import data
from upt.data import shapes


def digest(item) -> bytes:
    return item.image.tobytes()


def test_the_same_seed_gives_the_same_pictures():
    one, two = shapes.questions("test", 3, 40), shapes.questions("test", 3, 40)
    assert [(digest(i), i.question, i.gold) for i in one] == [(digest(i), i.question, i.gold) for i in two]
    assert [digest(i) for i in shapes.questions("test", 4, 40)] != [digest(i) for i in one]
    assert [i.question for i in shapes.questions("test", 3, 60)][:40] == [i.question for i in one]


def test_no_picture_is_shared_by_splits_or_occurs_twice():
    sets = {(split, seed): shapes.questions(split, seed, 400) for split in shapes.SIZES for seed in (0, 1)}
    pictures = {name: {digest(item) for item in items} for name, items in sets.items()}
    assert all(len(found) == 400 for found in pictures.values())
    for (split, seed), found in pictures.items():
        for (other, other_seed), more in pictures.items():
            if split != other:
                assert not found & more, f"{split} {seed} and {other} {other_seed}"


def test_golds_are_right():
    """Golds worked out again from what is drawn."""
    for item in shapes.questions("validation", 0, 300):
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


def test_pictures_show_what_is_asked_about():
    """Pixels of each colour agree with the count: a shape covers 280 to 650 of them."""
    for item in (i for i in shapes.questions("test", 0, 120) if i.scene[0] == "grid"):
        seen = Counter(item.image.getdata())
        for name in item.names:
            count = sum(cell is not None and cell[1] == name for cell in item.scene[1:])
            assert 280 * count <= seen[shapes.COLOURS[name]] <= 650 * count


def test_every_kind_is_there_and_through_load():
    questions = data.load("shapes", "test", seed=1)
    assert len(questions) == 512 and questions.has_gold
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == set(shapes.KINDS) and min(kinds.values()) > 50
    first = questions[0]
    assert first.uid == "shapes/test/000000" and first.image.size == (84, 84) and first.gold is not None
    assert questions.without_gold()[0].gold is None


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="no split"):
        shapes.questions("dev")
    with pytest.raises(ValueError, match="6000"):
        shapes.questions("test", 0, 10_000)


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


def test_the_sets_own_questions_are_understood():
    for item in shapes.questions("train", 5, 300):
        assert shapes.understand(item.scene, item.question) == (item.kind, item.names, item.facts)


def test_another_question_asks_for_something_else_of_the_same_picture():
    rng, kinds = random.Random(0), Counter()
    for item in shapes.questions("train", 0, 400):
        other = shapes.ask_else(item, rng)
        assert (other is None) == (item.kind in ("angle", "length"))
        if other:
            kind, names, _ = shapes.understand(item.scene, other)
            assert (kind, {*names}) != (item.kind, {*item.names})
            kinds[kind] += 1
    assert set(kinds) == {"count", "sum", "difference", "bars"} and min(kinds.values()) > 30
