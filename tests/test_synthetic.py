"""Diagnostics of self-written questions: what the scene of a picture says of them."""

import json

import pytest

import synthesize
from eval import synthetic
from upt.data import shapes
from upt.groups import manifests, shards

SCENE = ("grid", ("circle", "red"), ("square", "red"), ("circle", "blue"), *[None] * 6)
ITEM = shapes.Item("a", "count", SCENE, "How many red shapes are there?", ("red",), (2,))


def group(*keys) -> dict:
    return {"responses": [{"key": key} for key in keys]}


@pytest.mark.parametrize(
    ("question", "keys", "found"),
    [
        ("How many blue and red shapes are there?", ("3", "3", "4", None), ("sum", True, 0.5, True)),
        ("How many blue shapes are there?", ("3", "3", "1", None), ("count", True, 0.25, False)),
        ("How many blue shapes are there?", ("1", "3", None), ("count", True, 1 / 3, None)),  # no majority
        ("How many red shapes are there?", ("2",), ("count", False, 1.0, True)),  # its source again
        ("How many blue shapes are there?", None, ("count", True, None, None)),
        ("How many pink shapes are there?", ("1", "1"), (None, None, None, None)),
    ],
)
def test_of_one_question(question, keys, found):
    candidate = {"kept": True, "question": question}
    said = synthetic.diagnose(candidate, ITEM, keys and group(*keys))
    assert tuple(said[name] for name in ("kind", "new", "accuracy", "label")) == found
    assert said["valid"] is (found[0] is not None) and said["kept"]


def test_a_row_leaves_out_what_has_no_figure():
    found = [
        {"valid": True, "new": True, "accuracy": 0.25, "label": True},
        {"valid": True, "new": False, "accuracy": 0.5, "label": None},
        {"valid": False, "new": None, "accuracy": None, "label": None},
    ]
    assert synthetic.row("x", found) == ("x", "3", "66.7", "50.0", "37.5", "100.0")
    assert synthetic.row("x", []) == ("x", "0", "", "", "", "")


@pytest.mark.parametrize("name", shapes.LEVELS)
def test_of_a_folder(name, tmp_path, tiny, capsys):
    """Questions and answers of a random model, of which two are written by hand."""
    settings = {"model": tiny, "limit": 6, "mode": "direct", "filters": "agreement", "min_agreement": 0.0}
    settings |= {"split": "val", "seed": 3}
    out = tmp_path / "questions"
    synthesize.main(synthesize.Config(data=name, out=out, max_new_tokens=6, questions_per_step=4, **settings))
    items = shapes.questions("validation", 3, 6, name)
    rows = [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]
    for i in (0, 1):
        rows[i] |= {"question": items[i].question, "uid": f"{items[i].uid}/direct-0"}
    for i, row in enumerate(rows):
        row["kept"] = i in (1, 2, 3)
    (out / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = shards.list_shards(out / "answered")
    answered = [group for path in paths for group in shards.read_shard(path)]
    for i in (0, 1):
        mine = answered[0] | {"uid": rows[i]["uid"]}
        mine["responses"] = [r | {"key": items[i].gold if n < 3 else None} for n, r in enumerate(mine["responses"])]
        answered = [g for g in answered if g["uid"] != mine["uid"]] + [mine]
    shards.write_shard(paths[0], answered[-2:])
    found = synthetic.main(synthetic.Config(questions=out))
    assert [f["valid"] for f in found] == [True, True, False, False, False, False]
    assert [f["accuracy"] for f in found[:2]] == [3 / 8] * 2 and [f["label"] for f in found[:2]] == [True] * 2
    table = capsys.readouterr().out
    assert "| candidates | 6 | 33.3 | 0.0 | 37.5 | 100.0 |" in table and "| kept | 3 | 33.3 | 0.0 |" in table
    assert f"| kept, {items[1].kind} | 1 | 100.0 |" in table


def test_only_pictures_of_shapes_have_a_scene(tmp_path):
    with pytest.raises(shards.ShardError, match="manifest"):
        synthetic.main(synthetic.Config(questions=tmp_path))
    manifests.write(tmp_path, stage="synthesize", config={"data": "geoqa"}, seed=0, model="m", adapter=None)
    with pytest.raises(
        ValueError, match="is about geoqa; only the pictures of shapes and shapes-hard have known scenes"
    ):
        synthetic.main(synthetic.Config(questions=tmp_path))
