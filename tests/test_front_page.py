"""The README's pictures: which question is shown, what of model text is drawn, and both pictures of a small run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_upt
from bench import front_page
from eval import heldout
from upt import data
from upt.errors import SettingError


def row(uid: str, greedy: float, maj: float = 1.0) -> dict:
    return {"uid": uid, "greedy": greedy, "maj": maj}


def right(key: str) -> str:
    return f"<think>…</think>\\boxed{{{key}}}"


@pytest.fixture
def found() -> front_page.Example:
    (question,) = data.load("shapes", "test", 0).get([0])
    question = replace(question, gold="3")
    samples = [right(key) for key in "34335363"]
    return front_page.Example(
        question, samples, right("4"), right("3"), steps=48, looked_at=9, satisfy=2, better=5, worse=1
    )


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of the random tiny model, which gets nothing right."""
    folder = tmp_path_factory.mktemp("front") / "run"
    settings = {"steps": 2, "questions_per_step": 2, "group_size": 4, "max_new_tokens": 6}
    train_upt.main(
        train_upt.Config(model=tiny, out=folder, seed=0, eval_questions=4, eval_samples=2, device="cpu", **settings)
    )
    return folder


def test_the_rule_takes_questions_in_order_that_turn_right_and_whose_vote_is_right():
    before = [row("turns back", 1), row("tied vote", 0, 0.5), row("first", 0), row("wrong vote", 0, 0), row("stays", 0)]
    before += [row("second", 0), row("not asked after", 0), {"uid": "no gold"}]
    after = [row(uid, 1) for uid in ("second", "first", "tied vote", "wrong vote")] + [row("turns back", 0)]
    after += [row("stays", 0), {"uid": "no gold"}]
    assert front_page.satisfying(before, after) == ["first", "second"]


def test_hostile_text_becomes_one_line_of_printable_characters():
    assert front_page.shown("$x$ \\boxed{7}", 20) == "$x$ \\boxed{7}"
    assert front_page.shown("a\n\x1b[31m\u202e角\ud800", 60) == r"a\n\x1b[31m\u202e\u89d2\ud800"
    for width in (4, 5, 46):
        text = front_page.shown("<think>" + "\n" * 400 + "\\boxed{12}", width)
        assert len(text) == width and text[0] == "<" and "…" in text and text[-1] == "}"


def test_the_example_shows_every_sample_with_its_reward_and_the_votes(found):
    page = front_page.example_page(found)
    texts = [text.get_text() for text in page.axes[0].texts]
    samples = [text for text in texts if text.startswith("<think>")]
    assert samples == [front_page.shown(text, 46) for text in [*found.samples, found.before, found.after]]
    beside = [texts[texts.index("reward") + 1 :][3 * i + 1 : 3 * i + 3] for i in range(8)]
    assert beside == [[key, "1" if key == "3" else "0"] for key in "34335363"]
    at = texts.index("The vote") + 2
    assert texts[at : at + 8] == ["3", "5", "4", "1", "5", "1", "6", "1"]
    assert texts.index("✗ wrong") < texts.index("after 48 steps") < texts.index("✓ right")
    # The picture is the question's, each of its pixels a square of four by four.
    (shown,) = page.axes[0].images
    small = np.asarray(found.question.image)
    np.testing.assert_array_equal(np.asarray(shown.get_array())[..., :3], small.repeat(4, 0).repeat(4, 1))


def test_a_tie_earns_nothing(found):
    page = front_page.example_page(replace(found, samples=[right(key) for key in "3344"] + ["no box"]))
    texts = [text.get_text() for text in page.axes[0].texts]
    rewards = [texts[texts.index("reward") + 3 * i + 3] for i in range(5)]
    assert rewards == ["0"] * 5 and "A tie: all earn 0." in texts and "no answer: 1" in texts


def test_a_run_in_which_no_question_turned_right(run, tmp_path):
    with pytest.raises(SettingError, match="none of the 4 held-out questions of .* satisfies the rule"):
        front_page.main(front_page.Config(run=(run,), out=tmp_path))


def changed(run, folder, **rows) -> Path:
    """The run with fields of its third held-out question changed, {"before": {…}, "after": {…}}."""
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).symlink_to(path)
    for name, fields in rows.items():
        scores = json.loads((run / f"{name}.json").read_text())
        scores["rows"][2] |= fields
        (folder / f"{name}.json").unlink()
        (folder / f"{name}.json").write_text(json.dumps(scores))
    return folder


def test_the_example_is_of_the_majority_only(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    summary["config"]["reward"] = "supervised"
    copy = changed(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    (copy / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SettingError, match="shows the reward 'majority', and this run has 'supervised'"):
        front_page.main(front_page.Config(run=(copy,), out=tmp_path))


def test_a_folder_without_a_finished_run(tmp_path):
    with pytest.raises(SettingError, match=r"no finished run .*summary.json, metrics.jsonl, before.json"):
        front_page.main(front_page.Config(run=(tmp_path,), out=tmp_path))


def test_both_pictures_of_a_run(run, tmp_path, capsys):
    copy = changed(run, tmp_path / "run", before={"greedy": 0.0, "maj": 1.0}, after={"greedy": 1.0, "maj": 1.0})
    found = front_page.main(front_page.Config(run=(copy, run), out=tmp_path / "docs"))
    assert f"{found.question.uid}\n{front_page.rule(found)}\n{front_page.overall(found)}" in capsys.readouterr().out
    assert (found.looked_at, found.satisfy, found.better, found.worse, found.steps) == (4, 1, 1, 0, 2)
    assert found.question.uid == "shapes/test/000002" and len(found.samples) == 2
    (question,) = data.load("shapes", "test", 0).get([2])
    assert (found.question.question, found.question.gold) == (question.question, question.gold)
    assert found.question.image.tobytes() == question.image.tobytes()
    # The greedy answers are those that the model gives again.
    for state in ("before", "after"):
        adapter = str(run / "adapter") if state == "after" else None
        manifest = json.loads((run / "manifest.json").read_text())["config"]
        same = {name: manifest[name] for name in ("model", "seed", "max_new_tokens", "device")}
        rows = heldout.main(heldout.Config(adapter=adapter, eval_questions=4, eval_samples=2, **same))["rows"]
        assert rows[2]["responses"][0]["text"] == getattr(found, state)
        assert state == "after" or [r["text"] for r in rows[2]["responses"][1:]] == found.samples

    for name, size in (("example", (1600, 840)), ("training", (1600, 560))):
        path = tmp_path / "docs" / f"{name}.png"
        assert Image.open(path).size == size and path.stat().st_size < 150_000
        assert np.asarray(Image.open(path).convert("RGB"))[0, 0].tolist() == [255, 255, 255]


def test_curves_of_one_run_and_of_two(run):
    rows, summary = front_page.curves(run)
    (left, right_panel) = front_page.training_page({"a": (rows, summary)}).axes
    share, accuracy, *marks = (line.get_xydata().tolist() for line in left.lines)
    assert share == [[row["step"], 100 * row["majority_share"]] for row in rows]
    assert accuracy == [[row["step"], 100 * row["accuracy"]] for row in rows]
    assert marks == [[[step, 100 * summary[name]["mean"]["value"]]] for step, name in ((0, "before"), (2, "after"))]
    assert right_panel.lines[0].get_ydata().tolist() == [row["entropy"] for row in rows]
    blind = [{name: value for name, value in row.items() if name != "accuracy"} for row in rows]
    left, right_panel = front_page.training_page({"a": (rows, summary), "$b": (blind, summary)}).axes
    assert len(left.lines) == 4 + 3 and [text.get_text() for text in right_panel.get_legend().texts] == ["a", "$b"]
