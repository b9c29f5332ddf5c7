"""Several data sets as one: what is named, which questions a step takes, and whose they are."""

import json
from collections import Counter

import pytest

import rollout
from upt import data
from upt.data import mixture
from upt.run import presets
from upt.stages import sampling


def write(folder, count: int, label: str, **more):
    """A set of `count` questions without pictures."""
    folder.mkdir(parents=True)
    rows = [{"question": f"{label} {i}?", "answer": str(i)} | more for i in range(count)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sets(tmp_path):
    """Two sets of 20 and 8 questions, of which 19 and 7 are to be trained on: one of each is held out."""
    return write(tmp_path / "a", 20, "a"), write(tmp_path / "b", 8, "b")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a,b", [("a", None), ("b", None)]),
        ("a:3,org/b:1", [("a", 3.0), ("org/b", 1.0)]),
        ("a:.5, /x/b c:1.25,d:0.25", [("a", 0.5), ("/x/b c", 1.25), ("d", 0.25)]),
        ("a:b,c", [("a:b", None), ("c", None)]),
    ],
)
def test_names_and_weights(name, found):
    assert mixture.parts(name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nobody-here/a,shapes", "'~nobody-here/a' is neither shapes"),
        (f"{'y' * 200},{'x' * 200}", "is neither shapes"),
        ("shapes:3", "a weight needs several sets"),
        ("a,", "missing beside a comma"),
        ("a:3,b", "to every data set"),
        ("a:3,b:0", "above 0"),
        ("a:3,b:-1", "above 0"),
        ("shapes,nowhere", "'nowhere' is neither shapes"),
    ],
)
def test_what_is_no_mixture_is_refused(name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name)


def test_a_folder_with_a_comma_in_its_name_is_one_set(tmp_path):
    folder = write(tmp_path / "a,b", 4, "a")
    assert data.load(folder).name == "a,b" and not mixture.is_mixture(str(folder))


@pytest.mark.parametrize(
    ("per_step", "weights", "counts"),
    [
        (8, [3, 1], [6, 2]),
        (32, [1, 2], [11, 21]),  # 10.67 and 21.33
        (4, [1000, 1], [3, 1]),  # none goes without
        (3, [1, 1, 1], [1, 1, 1]),
        (10, [0.5, 0.3, 0.2], [5, 3, 2]),
    ],
)
def test_parts_of_a_step(per_step, weights, counts):
    assert mixture.quotas(per_step, [(50, weight) for weight in weights]) == counts


def test_a_step_that_cannot_be_mixed_is_refused(sets):
    with pytest.raises(data.DataError, match="takes 8 questions from data set 2 of the mixture, which has 7"):
        sampling.step_rows(data.load(f"{sets[0]}:1,{sets[1]}:1"), 16, 0, 0)
    with pytest.raises(data.DataError, match="--questions-per-step 1 is less than the 2 data sets"):
        sampling.step_rows(data.load(f"{sets[0]}:1,{sets[1]}:1"), 1, 0, 0)


def test_all_questions_of_both_in_order(sets):
    one, two = data.load(sets[0]), data.load(sets[1])
    both = data.load(f"{sets[0]},{sets[1]}")
    assert [q.question for q in both] == [q.question for q in one] + [q.question for q in two]
    assert both.uids == one.uids + two.uids and both[20].gold == two[1].gold and both.has_gold
    assert both.without_gold()[0].gold is None
    assert len(data.load(f"{sets[0]},{sets[1]}", limit=3)) == 6
    assert both.describe() == (
        "a,b/train: 26 questions, none with a picture; "
        "19 of a (without 1 rows held out by uid hash) + 7 of b (without 1 rows held out by "
        "uid hash)"
    )


def test_held_out_questions_are_the_first_sets(sets):
    for split in ("test", "validation"):
        assert data.load(f"{sets[0]}:1,{sets[1]}:1", split).uids == data.load(sets[0], split).uids
    held_out, own = (data.load(name, "test", seed=3, limit=4) for name in (f"shapes,{sets[0]}", "shapes"))
    assert [q.question for q in held_out] == [q.question for q in own] and len(held_out) == 4
    assert [q.question for q in own] != [q.question for q in data.load("shapes", "test", limit=4)]


def test_gold_of_one_set_is_gold_of_the_mixture(tmp_path, sets):
    (tmp_path / "none.jsonl").write_text('{"question": "Why?"}\n' * 4)
    mixed = data.load(f"{tmp_path / 'none.jsonl'}:1,{sets[0]}:1")
    assert mixed.has_gold and mixed[0].gold is None and mixed[5].gold is not None
    for same in (mixed.without_gold(), mixed.with_gold()):
        assert same.weights == mixed.weights == [(3, 1.0), (19, 1.0)]


def test_a_uid_of_both_sets_is_told_apart(tmp_path):
    folders = [write(tmp_path / number / "same", 6, number) for number in "12"]
    mixed = data.load(f"{folders[0]},{folders[1]}")
    own = data.load(folders[0]).uids
    assert mixed.uids == own + [f"2:{uid}" for uid in own] and len({*mixed.uids}) == len(mixed)
    assert mixed[len(own)].uid == f"2:{own[0]}" and mixed[len(own)].question.startswith("2 ")


def test_a_bad_row_is_reported_under_the_mixtures_uid(tmp_path):
    bad = write(tmp_path / "bad", 6, "bad", image="gone.png")
    (bad / "train.jsonl").write_text((bad / "train.jsonl").read_text() + '{"question": "good?"}\n' * 14)
    first = data.load(write(tmp_path / "x" / "bad", 6, "x"))
    mixed = data.load(f"{tmp_path / 'x' / 'bad'},{bad}")
    found, own = mixed.get(range(len(mixed))), data.load(bad)
    assert len(own.get(range(len(own)))) < len(own)
    assert set(mixed.bad) == {uid if uid not in first.uids else f"2:{uid}" for uid in own.bad}
    assert any(uid.startswith("2:") for uid in mixed.bad)
    assert len(found) == len(mixed) - len(own.bad) and "missing image file" in mixed.report_bad()


def test_steps_by_weight_take_every_question_in_turn(sets):
    mixed = data.load(f"{sets[0]}:3,{sets[1]}:1")
    steps = [sampling.step_rows(mixed, 8, 0, step) for step in range(9)]
    for rows in steps:
        assert len({*rows}) == 8 and sum(row < 19 for row in rows) == 6
    # Nineteen questions are three steps of six in each epoch, seven are three of two: no question before its turn.
    for epoch in range(3):
        drawn = Counter(row for rows in steps[3 * epoch : 3 * epoch + 3] for row in rows)
        assert len(drawn) == 24 and {*drawn.values()} == {1}
    assert steps[0] != sorted(steps[0]) and steps == [sampling.step_rows(mixed, 8, 0, step) for step in range(9)]
    assert steps[0] != sampling.step_rows(mixed, 8, 1, 0)
    # A minibatch, a quarter of the step, has of both sooner or later.
    assert len({sum(row < 19 for row in rows[:2]) for rows in steps}) > 1


def test_what_a_step_takes_is_said(sets, capsys):
    mixed = data.load(f"{sets[0]}:100,{sets[1]}:1")
    assert mixture.shares(mixed, 8) == "a step takes 7 of a + 1 of b"


def test_three_sets_by_weight(tmp_path, sets):
    third = write(tmp_path / "c", 12, "c")
    mixed = data.load(f"{sets[0]}:1,{sets[1]}:1,{third}:2")
    for step in range(4):
        asked = Counter(mixed[row].question[0] for row in sampling.step_rows(mixed, 8, 0, step))
        assert asked == {"a": 2, "b": 2, "c": 4}


def test_each_round_has_orders_of_its_own(sets):
    for name in (str(sets[0]), f"{sets[0]}:3,{sets[1]}:1"):
        mixed = data.load(name)
        rounds = [[sampling.step_rows(mixed, 8, 0, step, r) for step in range(2)] for r in range(3)]
        assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
        for steps in rounds:  # an epoch is one in every round
            assert len({row for rows in steps for row in rows}) == 16


def test_steps_without_weights_draw_from_all(sets):
    mixed = data.load(f"{sets[0]},{sets[1]}")
    assert sampling.step_rows(mixed, 8, 0, 5) == sampling.schedule(26, 8, 0, 5)


def test_shapes_in_a_mixture_are_for_the_embedded_model():
    for name in (None, "shapes", "shapes,geoqa", "geoqa:1,shapes:2", "geoqa, shapes", "shapes-hard", "a/b,shapes-hard"):
        config = rollout.Config(data=name)
        presets.fill(config)
        assert config.model == presets.TINY_MODEL
    for name in ("geoqa,myshapes", "shapes-harder", "shapes-hard/mine"):
        config = rollout.Config(data=name)
        presets.fill(config)
        assert config.model == presets.REAL_MODEL
