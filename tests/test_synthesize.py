"""Self-written questions: the filters by cases, and a data set made by a random model, resumed, loaded."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import filters
import shards
import synthesize
from filters import Candidate

ROOT = Path(__file__).parent.parent
SOURCE = "How many red shapes are there in the picture?"


@pytest.mark.parametrize(
    ("name", "text", "passes"),
    [
        ("question", "How long is the side AB?", True),
        ("question", "Find the area of triangle ABC.", True),
        ("question", "The triangle ABC.", False),
        ("question", "What?", False),
        ("length", "How long is AB?", True),
        ("length", "How " + "very " * 80 + "long is AB?", False),
        ("repeat", "How many blue shapes are there in the picture?", True),
        ("repeat", "how many red shapes are there in the picture", False),
        (
            "repeat",
            "So how many red shapes are there in the picture?",
            False,
        ),  # 8 of 9 pairs: under the tenth it may miss
        ("repeat", "How many red shapes are there in the picture, and how many of them are round?", True),
        ("repeat", "Is there a bird?", False),  # written before
        ("answered", "What is the sum of 3 and 4?", True),
        ("answered", "How long is AB? The answer is 5.", False),
        ("answered", r"How long is AB? \boxed{5}", False),
        ("answered", "Answer: 5. How long is AB?", False),
        ("several", "How long is AB?", True),
        ("several", "How long is AB? How long is BC?", False),
        ("several", "How long is AB and what is the angle at C?", False),
        ("several", "(a) Find AB. (b) Find BC.", False),
        ("second-image", "How far is A from B in the picture?", True),
        ("second-image", "What changed in the second image?", False),
        ("second-image", "Compare figure 2 with the one shown?", False),
    ],
)
def test_filters_by_cases(name, text, passes):
    assert filters.TEXT[name](Candidate(text, SOURCE, ("Is there a bird?",), True)) is passes


def test_a_question_that_was_cut_off_is_too_long():
    assert not filters.TEXT["length"](Candidate("How long is", SOURCE, (), False))


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("How long is AB?", "How long is AB?"),
        ("<think>Let me see.</think>\nQuestion: How long\n is AB?", "How long is AB?"),
        ('**New question:** "How long is AB?"', "How long is AB?"),
        ("  ", ""),
    ],
)
def test_the_question_in_a_text(text, question):
    assert synthesize.written(text) == question


def config(out, tiny, **changed) -> synthesize.Config:
    given = {
        "limit": 5,
        "per_image": 2,
        "questions_per_step": 2,
        "max_new_tokens": 6,
        "device": "cpu",
        "filters": "none",
    }
    return synthesize.Config(data="shapes", model=tiny, out=out, **given | changed)


def provenance(out) -> list[dict]:
    return [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]


def test_a_set_is_written_and_loads_without_gold(tmp_path, tiny, capsys):
    out = tmp_path / "questions"
    summary = synthesize.main(config(out, tiny))
    rows, source = provenance(out), data.load("shapes", limit=5)
    assert [row["uid"] for row in rows] == [f"{uid}/in-context-{k}" for uid in source.uids for k in range(2)]
    assert summary["candidates"] == 10 and summary["kept"] == sum(row["question"] != "" for row in rows) > 0
    assert {row["source_question"] for row in rows} == {question.question for question in source}
    made = data.load(str(out), "train")
    everything = {q.uid: q for split in ("train", "test") for q in data.load(str(out), split)}
    kept = {row["uid"]: row for row in rows if row["kept"]}
    assert set(everything) == set(kept) and not made.has_gold
    pictures = dict(zip(source.uids, (question.image for question in source), strict=True))
    for uid, question in everything.items():
        assert question.gold is None and question.question == kept[uid]["question"]
        assert question.image.tobytes() == pictures[kept[uid]["source"]].convert("RGB").tobytes()
    assert all(group["gold"] is None for path in shards.list_shards(out / "asked") for group in shards.read_shard(path))
    assert f"{summary['kept']} of 10 questions kept" in capsys.readouterr().out
    assert f"{summary['kept']} questions to the pictures of `shapes`" in (out / "README.md").read_text()


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, tiny):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    synthesize.main(config(whole, tiny, filters="agreement", min_agreement=0.0))
    synthesize.main(config(stopped, tiny, filters="agreement", min_agreement=0.0))
    for name in ("asked/step-000001.jsonl", "answered/step-000000.jsonl", "provenance.jsonl"):
        (stopped / name).unlink()
    synthesize.main(config(stopped, tiny, filters="agreement", min_agreement=0.0))
    for file in whole.rglob("*"):
        if file.suffix in (".jsonl", ".parquet", ".png"):
            assert file.read_bytes() == (stopped / file.relative_to(whole)).read_bytes(), file
    with pytest.raises(shards.ShardError, match="per_image: 2 there, 3 now"):
        synthesize.main(config(stopped, tiny, filters="agreement", min_agreement=0.0, per_image=3))


@pytest.mark.parametrize("stage", ["asked", "answered"])
def test_a_killed_run_loses_and_repeats_nothing(tmp_path, tiny, stage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"limit": 8, "filters": "agreement", "min_agreement": 0.0, "questions_per_step": 1, "per_image": 1}
    synthesize.main(config(whole, tiny, **settings))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "synthesize.py", "--data=shapes", f"--model={tiny}", f"--out={killed}", *flags]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=6", "--device=cpu"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / stage / "step-000001.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (killed / "provenance.jsonl").exists()
    done = {path: path.stat().st_ino for path in killed.rglob("step-*.jsonl")}
    synthesize.main(config(killed, tiny, **settings))
    assert done and all(path.stat().st_ino == inode for path, inode in done.items())
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".jsonl", ".parquet", ".png")}
    assert len(files) > 16 and all((whole / file).read_bytes() == (killed / file).read_bytes() for file in files)
    uids = [row["uid"] for row in provenance(killed)]
    assert uids == [f"{uid}/in-context-0" for uid in data.load("shapes", limit=8).uids]


def test_what_is_there_is_not_sampled_again(tmp_path, tiny, monkeypatch):
    settings = config(tmp_path / "questions", tiny, limit=2)
    first = synthesize.main(settings)
    monkeypatch.setattr(synthesize.rollout, "rollout", None)
    assert synthesize.main(settings) == first


def test_a_text_that_was_written_before_is_a_repetition(tmp_path, tiny):
    texts = ["How long is AB?", "How wide is the door?", "How long is AB?", ""]
    responses = [{"text": text, "finish": "stop"} for text in texts]
    source = {"uid": "a", "question": SOURCE, "image": None, "responses": responses}
    found = synthesize.judged([source], config(tmp_path, tiny, filters="repeat").resolve())
    assert [c["filters"]["repeat"] for c in found] == [True, True, False, True]
    assert [synthesize.is_kept(c) for c in found] == [True, True, False, False]  # the last is empty


def test_nothing_kept_is_a_warning(tmp_path, tiny, capsys):
    out = tmp_path / "questions"
    (out / "data").mkdir(parents=True)
    (out / "data/train-00000-of-00001.parquet").write_bytes(b"of an earlier run")  # to be written over
    summary = synthesize.main(config(out, tiny, filters="all", limit=2, per_image=3))
    assert summary["kept"] == 0 and "no question was kept" in capsys.readouterr().err
    assert len(provenance(out)) == 6
    with pytest.raises(data.DataError, match="questions has no rows, as when synthesize.py kept no question"):
        data.load(out)
    assert summary["filters"]["question"] == {"seen": 6, "failed": 6} and summary["filters"]["agreement"]["seen"] == 0


def group(*keys) -> dict:
    return {"responses": [{"key": key} for key in keys]}


@pytest.mark.parametrize(
    ("keys", "share", "silent", "passed"),
    [
        (("5", "5", "7", None), 0.5, 0.25, (True, True)),
        (("5", "5", "5", "5"), 1.0, 0.0, (False, True)),  # unanimous
        (("1", "2", "3", "4", "5"), 0.2, 0.0, (False, True)),  # chaotic
        (("5", "5", None, None, None), 0.4, 0.6, (True, False)),
    ],
)
def test_what_responses_say_of_a_question(tiny, tmp_path, keys, share, silent, passed):
    candidate = {"uid": "a", "question": "?", "filters": {}}
    synthesize.tried([candidate], {"a": group(*keys)}, config(tmp_path, tiny, filters="all").resolve())
    assert (candidate["majority_share"], candidate["abstention_share"]) == (share, silent)
    assert (candidate["filters"]["agreement"], candidate["filters"]["abstention"]) == passed
    assert synthesize.is_kept(candidate) is all(passed)
    unanswered = {"uid": "b", "question": "?", "filters": {}}
    synthesize.tried([unanswered], {}, config(tmp_path, tiny, filters="agreement").resolve())
    assert unanswered["filters"] == {"agreement": False}


def test_each_mode_has_its_prompt(tmp_path, tiny):
    assert "{question}" in synthesize.asking("in-context")
    assert "{question}" not in synthesize.asking("direct")
    mine = tmp_path / "mine.md"
    mine.write_text("Ask for something else than {question}")
    assert synthesize.asking("in-context", str(mine)) == mine.read_text()
    for changed, message in (
        ({"ask_prompt": str(mine), "mode": "direct"}, "shows no {question}"),
        ({"ask_prompt": "ask-direct"}, "needs {question}"),
        ({"ask_prompt": "nowhere"}, "no prompt 'nowhere'"),
        ({"filters": "length,new"}, "--filters 'new': give all, none, or some of"),
        ({"per_image": 0}, "--per-image must be at least 1"),
        ({"min_agreement": 0.9, "max_agreement": 0.5}, "shares go from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, tiny, **changed).resolve()
