"""Data that changes under a run: what its fingerprint sees, what it passes over, and what the refusal names."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

import rewards
import rollout
import train_upt
from tests.test_train import SMALL
from upt import data
from upt.data.fingerprint import difference, of_bytes, of_file, of_questions, same_answers
from upt.errors import DataError


def text_set(folder: Path, count: int = 6) -> Path:
    """Questions as JSONL, with a picture each in a file beside it."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"images/{i}.bmp")  # of one size whatever is in it
        rows.append({"problem": f"What is {i} + 1?", "answer": str(i + 1), "images": [f"images/{i}.bmp"]})
    write(folder, rows)
    return folder


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def taken(folder) -> dict:
    return of_questions(data.load(str(folder)))


def change(folder: Path, what: str) -> None:
    rows = rows_of(folder)
    if what == "question":
        rows[3]["problem"] += "?"
    elif what == "picture":
        Image.new("RGB", (8, 8), "blue").save(folder / "images/3.bmp")
    elif what == "path":
        rows[3]["images"] = ["images/4.bmp"]
    elif what == "choices":
        rows[3]["choices"] = ["4", "5"]
    elif what == "row gone":
        del rows[3]
    elif what == "row more":
        rows.append(rows[3])
    elif what == "order":
        rows[3], rows[4] = rows[4], rows[3]
    elif what == "answer":
        rows[3]["answer"] = "9"
    write(folder, rows)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("question", "column 'problem' differs, first in SET/train/000003"),
        ("picture", "column 'images' differs, first in SET/train/000003"),
        ("path", "column 'images' differs, first in SET/train/000003"),
        ("choices", "column 'choices' is new, first in SET/train/000000"),
        ("row gone", "4 rows, there were 5, first in SET/train/000003"),
        ("row more", "6 rows, there were 5, row 6 is SET/train/000006"),
        ("order", "column 'images' differs, column 'problem' differs, first in SET/train/000003"),
        ("answer", None),
    ],
)
def test_what_has_changed_is_named(tmp_path, what, said):
    # Of these six rows one is held out, whose number depends on the set's name only.
    folder = text_set(tmp_path / "mine")
    then = taken(folder)
    change(folder, what)
    now = taken(folder)
    found = difference(then, now)
    assert found == (said and said.replace("SET", "mine"))
    assert same_answers(then, now) == (what not in ("answer", "row gone", "row more", "order"))
    without_rows = {name: then[name] for name in ("count", "columns")}
    assert (difference(without_rows, now) is None) == (said is None)


@pytest.mark.parametrize(
    "named", ["images/3.bmp", "file://images/3.bmp", {"url": "images/3.bmp"}, "['images/3.bmp']", None]
)
def test_a_picture_is_seen_however_it_is_named(tmp_path, named):
    folder = text_set(tmp_path / "mine")
    rows = rows_of(folder)
    rows[3]["images"] = named
    if named is None:
        rows[3]["problem"] += " ![](images/3.bmp)"
    write(folder, rows)
    then = taken(folder)
    change(folder, "picture")
    column = "problem" if named is None else "images"
    assert difference(then, taken(folder)) == f"column {column!r} differs, first in mine/train/000003"


@pytest.mark.parametrize(
    ("column", "one", "another"),
    [
        ("reward_model", {"ground_truth": "4"}, {"ground_truth": "9"}),
        ("completion", [{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "9"}]),
        ("solution", "4", "9"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_answers_are_told_apart_in_each_column_for_them(tmp_path, column, one, another, beside):
    folder, found = text_set(tmp_path / "mine"), []
    rows = rows_of(folder)
    for cell in (one, another):
        write(folder, [row | {column: cell} if beside else {**row, "answer": None, column: cell} for row in rows])
        found.append(taken(folder))
    assert difference(*found) is None and not same_answers(*found) and same_answers(found[0], found[0])


def test_a_cell_that_is_nested_too_deeply_is_seen_as_its_text(tmp_path):
    folder, found = text_set(tmp_path / "mine"), []
    rows = rows_of(folder)
    for end in ("1", "2"):
        deep = "[" * 600 + end + "]" * 600
        lines = [json.dumps(row | {"more": "HERE"}).replace('"HERE"', deep) for row in rows]
        (folder / "train.jsonl").write_text("\n".join(lines))
        found.append(taken(folder))
    assert difference(*found).startswith("column 'more' differs")


def test_a_set_that_was_moved_touched_or_renumbered_is_the_same(tmp_path):
    folder = text_set(tmp_path / "a" / "mine")
    then = taken(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "b" / "mine"))
    for path in moved.rglob("*"):
        path.touch()
    rows = rows_of(moved)
    for i in range(6):
        (moved / f"images/{i}.bmp").rename(moved / f"images/renamed-{i}.bmp")
        rows[i]["images"] = [f"images/renamed-{i}.bmp"]
    write(moved, rows)
    assert taken(moved) == then


def test_pictures_in_parquet_are_seen_without_their_paths(tmp_path):
    def stored(colours: str, path: str) -> dict:
        folder = tmp_path / colours / "set"
        cells = []
        for i, colour in enumerate(colours):
            Image.new("RGB", (6, 6), {"r": "red", "b": "blue"}[colour]).save(tmp_path / "x.bmp")
            cells.append([{"bytes": (tmp_path / "x.bmp").read_bytes(), "path": f"{path}{i}"}])
        columns = {"images": cells, "problem": [f"{i}?" for i in range(len(cells))]}
        features = datasets.Features({"images": [datasets.Image()], "problem": datasets.Value("string")})
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
        return of_questions(data.load(str(folder)))

    red = stored("rrrr", "one")
    assert difference(red, stored("rrrr", "another")) is None
    assert difference(red, stored("rbbr", "one")).startswith("column 'images' differs, first in set/train/")


def test_sets_that_are_drawn_or_mixed(tmp_path):
    folder = text_set(tmp_path / "mine")

    def few(name: str, seed: int = 0) -> dict:
        return of_questions(data.load(name, seed=seed, limit=5))

    shapes, mixed = few("shapes"), few(f"shapes,{folder}")
    assert shapes["count"] == 5 and mixed["count"] == 10 and few("shapes") == shapes
    assert "'picture' differs" in difference(shapes, few("shapes", seed=1))
    assert "'picture' differs" in difference(shapes, few("shapes-hard"))
    change(folder, "question")
    assert difference(mixed, few(f"shapes,{folder}")) == "column 'problem' differs, first in mine/train/000003"


MIB = 2**20


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        (MIB, [0, 300_000, MIB // 2, MIB - 1]),
        # 16 pieces of 64 KiB, whose starts are (16 MiB - 64 KiB) / 15 = 1114112 bytes apart
        (16 * MIB, [0, 65535, 1_114_112, 8 * 1_114_112 + 65535, 16 * MIB - 65536, 16 * MIB - 1]),
    ],
)
def test_cells_are_seen_whole_and_large_ones_in_pieces(tmp_path, size, seen):
    content = bytearray(size)
    (tmp_path / "x").write_bytes(content)
    digest = of_bytes(memoryview(content))
    assert of_file(tmp_path / "x") == digest and digest.startswith(f"{size}:")
    for at in seen:
        content[at] ^= 1
        assert of_bytes(memoryview(content)) != digest
        content[at] ^= 1
    assert of_bytes(memoryview(content)) == digest


@pytest.mark.parametrize("name", ["img/00000003", "p 3.jpeg2000", "Bild Nr. 3", "3"])
def test_a_picture_is_seen_whatever_its_suffix(tmp_path, name):
    folder = text_set(tmp_path / "mine")
    rows = rows_of(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "images/3.bmp").rename(folder / name)
    rows[3]["images"] = [name]
    write(folder, rows)
    then = taken(folder)
    Image.new("RGB", (8, 8), "blue").save(folder / name, format="bmp")
    assert difference(then, taken(folder)) == "column 'images' differs, first in mine/train/000003"


def chat(question: str, reply: str, kind: str):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    if kind == "text":
        return json.dumps(turns)
    if kind == "from":
        return [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    return {name: [turn[name] for turn in turns] for name in turns[0]} if kind == "lists" else turns


@pytest.mark.parametrize("kind", ["turns", "from", "lists", "text"])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_the_last_replies_of_a_chat_are_answers(tmp_path, column, kind):
    folder = tmp_path / "mine"
    folder.mkdir()

    def of(question: str, reply: str) -> dict:
        write(folder, [{column: chat(f"{question} {i}?", reply, kind)} for i in range(6)])
        return taken(folder)

    then = of("Which", "4")
    assert difference(then, of("Which", "9")) is None and not same_answers(then, of("Which", "9"))
    assert difference(then, of("What", "4")).startswith(f"column {column!r} differs") and same_answers(
        then, of("What", "4")
    )


# ---------------------------------------------------------------------------------------------------------- in a run


def train(tiny, out: Path, **settings) -> None:
    few = {"questions_per_step": 2, "group_size": 2, "max_new_tokens": 4, "steps": 1, "update_tokens": 1000}
    train_upt.main(train_upt.Config(model=tiny, out=out, **SMALL | few | settings))


def test_a_run_is_refused_once_its_data_has_changed(tiny, tmp_path, capsys):
    folder, out = text_set(tmp_path / "mine"), tmp_path / "run"
    train(tiny, out, data=str(folder))
    assert json.loads((out / "manifest.json").read_text())["data"]["training data"]["count"] == 5
    change(folder, "answer")
    train(tiny, out, data=str(folder))
    assert "training data: the answers differ from when" in capsys.readouterr().err
    change(folder, "question")
    said = f"{out} was begun with other training data: column 'problem' differs, first in mine/train/000003; bring"
    with pytest.raises(DataError, match=said):
        train(tiny, out, data=str(folder))
    # A run from before there were fingerprints goes on, with a note.
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["data"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    train(tiny, out, data=str(folder))
    assert "whether that has changed is not checked" in capsys.readouterr().err


def test_answers_count_where_they_are_read(tiny, tmp_path):
    folder = text_set(tmp_path / "mine")
    train(tiny, tmp_path / "a", data=str(folder), reward="supervised")
    held_out = dict(data=str(folder), eval_split="train", eval_questions=2, eval_samples=1)
    train(tiny, tmp_path / "b", **held_out)
    change(folder, "answer")
    with pytest.raises(DataError, match="other training data: the answers differ"):
        train(tiny, tmp_path / "a", data=str(folder), reward="supervised")
    with pytest.raises(DataError, match="other held-out data: the answers differ"):
        train(tiny, tmp_path / "b", **held_out)


def test_stages_and_their_shards(tiny, tmp_path):
    folder = text_set(tmp_path / "mine")
    settings = dict(model=tiny, data=str(folder), out=tmp_path / "rollouts", questions_per_step=2, group_size=2,
                    max_new_tokens=4)  # fmt: skip
    rollout.main(rollout.Config(steps=1, **settings))
    rewards.main(rewards.Config(rollouts=tmp_path / "rollouts", out=tmp_path / "scored", reward="random"))
    few = {"from_shards": tmp_path / "scored", "reward": None, "update_tokens": 1000}
    train(tiny, tmp_path / "run", **few)
    change(folder, "row gone")
    with pytest.raises(DataError, match="rollouts was begun with other data: 4 rows, there were 5"):
        rollout.main(rollout.Config(steps=2, **settings))
    shard = tmp_path / "scored" / "step-000000.jsonl"
    shard.write_text(shard.read_text().replace('"gold":"', '"gold":"1'))
    with pytest.raises(DataError, match="other shards: column 'content' differs, first in step-000000.jsonl"):
        train(tiny, tmp_path / "run", **few)
