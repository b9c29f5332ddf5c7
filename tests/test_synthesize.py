"""Self-written questions: the filters by cases, and a data set made by a random model, resumed, loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

import synthesize
from upt import data, prompts
from upt.errors import Stopped
from upt.groups import filters, shards
from upt.groups.filters import Candidate
from upt.stages import asking, sampling

ROOT = Path(__file__).parent.parent
GEOMETRY_HUB = Path(os.environ.get("UPT_GEOMETRY_HUB", ROOT.parent / "shared/data/geometry_hub"))
needs_geometry = pytest.mark.skipif(
    not GEOMETRY_HUB.is_dir(), reason=f"no folder {GEOMETRY_HUB}: set UPT_GEOMETRY_HUB to a copy of geometry_hub"
)
SOURCE = "How many red shapes are there in the picture?"


GOOD = [
    "How long is the side AB?",
    "Find the area of triangle ABC.",
    "If AB = 3, find BC.",
    "In triangle ABC, AB = 4. Find the length of BC.",
    "AB = 1. BC = 2. Find AC.",
    "A circle has radius 5. What is its area?",
    "There are 3 red shapes. How many blue shapes are there?",
    "AB = 5 and BC = 3. What is AC?",
    "Which answer is correct, A or B?",
    "What is the correct answer?",
    "How many blue shapes are there? Round to the nearest ten.",
    "What is x? A. 12° B. 24° C. 36° D. 48°",
    "If EF = 32 and GF = 24, then BE equals:",
    "Then the length of BC is: Choices: (A) 3 (B) 5",
    "How many shapes are red and are larger than the blue one?",
    "What is the area of the first figure?",
    "Which of the two figures is larger?",
    "As shown in Figure 2, what is AB?",
    "图中有几个蓝色的圆？",
]
BAD = {
    "question": [
        "The triangle ABC.",
        "What?",
        "There are 3 red shapes in the picture.",
        "The answer to the question can be seen.",
        "图中有蓝色的圆。",
    ],
    "length": ["How " + "very " * 150 + "long is AB?", "How long is " + "A" * 2000 + "?"],
    "repeat": [
        "how many red shapes are there in the picture",
        "So how many red shapes are there in the picture?",  # 8 of 9 pairs
        "Is there a bird?",
    ],
    "answered": [
        "How long is AB? The answer is 5.",
        r"How long is AB? \boxed{5}",
        "Answer: 5. How long is AB?",
        "How many blue shapes are there? 3",
        "How many blue shapes are there? There are 3.",
        "How many blue shapes are there? A: 3",
        "How many blue shapes are there? Three shapes.",
        "How long is AB? Explanation: it asks for a side.",
        "Given that there are 3 blue shapes, how many blue shapes are there?",
        "AB = 5. What is the length of AB?",
    ],
    "several": [
        "How long is AB? How long is BC?",
        "How long is AB and what is the angle at C?",
        "(a) Find AB. (b) Find BC.",
        "1. Find AB. 2. Find BC.",
        "How many are blue; how many are red.",
        "Is AB parallel to CD and is BC equal to AD?",
    ],
    "second-image": [
        "What changed in the second image?",
        "Compare image 2 with the one shown?",
        "Is it in both pictures?",
        "Is it the same as in the one on the next page?",
    ],
}
KNOWN = (SOURCE, "Is there a bird?")


@pytest.mark.parametrize(
    "text", [*GOOD, "How many blue shapes are there in the picture?", f"{SOURCE[:-1]} or below it?"]
)
def test_a_good_question_passes_every_filter(text):
    assert filters.passes(Candidate(text, KNOWN), filters.NAMES) == dict.fromkeys(filters.TEXT, True)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_bad_question_fails_its_filter(name, text):
    assert filters.passes(Candidate(text, KNOWN), (name,)) == {name: False}


@needs_geometry
def test_questions_that_people_wrote_hardly_ever_fail():
    """240 geometry problems, many of them without a question mark or with choices behind it."""
    found = [question.question for split in ("train", "test") for question in data.load(GEOMETRY_HUB, split)]
    failed = [text for text in found if not all(filters.passes(Candidate(text), filters.NAMES).values())]
    assert len(found) == 240 and len(failed) <= 13


@pytest.mark.parametrize(
    "text", ["is 3 a, " * 1000 + "how many b", "ab = 1 " * 1200 + "find x", "(a) " * 2000 + "b", "a" * 10**6]
)
def test_hostile_texts_cost_no_time(text):
    started = time.process_time()
    assert filters.passes(Candidate(text), ("length", "answered", "several"))["length"] is False
    assert time.process_time() - started < 2


def test_a_question_that_was_cut_off_is_too_long():
    assert filters.passes(Candidate("How long is AB?", (), False), ("length",)) == {"length": False}


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("How long is AB?", "How long is AB?"),
        ("<think>Let me see.</think>\nQuestion: How long\n is AB?", "How long is AB?"),
        ('**New question:** "How long is AB?"', "How long is AB?"),
        ("New Question 1: How long is AB?", "How long is AB?"),
        ("Sure! Here is one. How long is AB?", "How long is AB?"),
        ("Here's a new question: How long is AB?", "How long is AB?"),
        ("Here is a triangle. How long is AB?", "Here is a triangle. How long is AB?"),
        ("Find the length of AA'", "Find the length of AA'"),
        ('What is "AB"', 'What is "AB"'),
        ("“What is AB?”", "What is AB?"),
        ("What is 2**3 + x**2?", "What is 2**3 + x**2?"),
        ("How **long** is **AB**?", "How long is AB?"),
        ("**What is AB?**", "What is AB?"),
        ("**AB** and **CD** are chords. How long is **AB**?", "AB and CD are chords. How long is AB?"),
        ("**Question: What is x?**", "What is x?"),
        ("**Question:** What is x?", "What is x?"),
        ("<image>What does <image> show?", "What does show?"),
        ("<image>", ""),
        ("  ", ""),
    ],
)
def test_the_question_in_a_text(text, question):
    assert asking.question_in(text) == question


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


def test_the_hubs_library_reads_the_set_as_it_is(tmp_path, tiny, monkeypatch):
    """Not from its copy of another folder of the same name, which it takes for this one where a card has `configs`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, limit in (("a", 2), ("b", 4)):
        out = tmp_path / name / "questions"
        summary = synthesize.main(config(str(out), tiny, limit=limit))  # a string, as in a notebook
        rows = datasets.load_dataset(str(out))["train"]
        assert set(rows.column_names) == {"images", "problem", "uid"} and len(rows) == summary["kept"] > 0
        assert {*rows["uid"]} == {row["uid"] for row in provenance(out) if row["kept"]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_where_it_can_go_on(tmp_path, tiny, monkeypatch, capsys, number):
    real = sampling.rollout

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(sampling, "rollout", interrupted)
    with pytest.raises(Stopped) as stopped:
        synthesize.main(config(tmp_path / "q", tiny, limit=2))
    assert stopped.value.signal == number
    assert "the same command goes on from" in capsys.readouterr().err
    monkeypatch.undo()
    assert synthesize.main(config(tmp_path / "q", tiny, limit=2))["asked"] == 2


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
    settings = {"limit": 24, "filters": "agreement", "min_agreement": 0.0, "questions_per_step": 1, "per_image": 1}
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
    assert len(files) > 48 and all((whole / file).read_bytes() == (killed / file).read_bytes() for file in files)
    uids = [row["uid"] for row in provenance(killed)]
    assert uids == [f"{uid}/in-context-0" for uid in data.load("shapes", limit=24).uids]


def test_what_is_there_is_not_sampled_again(tmp_path, tiny, monkeypatch):
    settings = config(tmp_path / "questions", tiny, limit=2)
    first = synthesize.main(settings)
    monkeypatch.setattr(sampling, "rollout", None)
    assert synthesize.main(settings) == first


def asked_groups(*groups) -> list[dict]:
    """Groups of the asking stage from (uid, image, question, choices, texts)."""
    names = ("uid", "image", "question", "choices")
    return [
        dict(zip(names, group, strict=False)) | {"responses": [{"text": t, "finish": "stop"} for t in group[4]]}
        for group in groups
    ]


def test_a_text_that_was_written_before_is_a_repetition(tmp_path, tiny):
    texts = ["How long is AB?", "How wide is the door?", "How long is AB?", ""]
    groups = asked_groups(("a", None, SOURCE, None, texts), ("b", None, SOURCE, None, texts[:1]))
    found = asking.candidates_of(groups, config(tmp_path, tiny, filters="repeat").resolve())
    assert [c["filters"]["repeat"] for c in found] == [True, True, False, True, True]
    assert [asking.is_kept(c) for c in found] == [True, True, False, False, True]  # the fourth is empty


def test_questions_to_the_same_picture_know_each_other(tmp_path, tiny):
    mine, other = "How many green shapes are in it?", "How wide is the door?"
    groups = asked_groups(
        ("a", "images/x.png", SOURCE, None, [mine, other]),
        ("b", "images/x.png", other, None, [mine, SOURCE]),
        ("c", "images/y.png", "Which is it?", ["12°", "24°"], [mine, "Which is it? A. 12° B. 24°"]),
    )
    found = asking.candidates_of(groups, config(tmp_path, tiny, filters="repeat").resolve())
    assert [c["filters"]["repeat"] for c in found] == [True, False, False, False, True, False]


def test_nothing_kept_is_a_warning(tmp_path, tiny, capsys):
    out = tmp_path / "questions"
    (out / "data").mkdir(parents=True)
    (out / "fingerprint.json").write_text("{}")
    (out / "data/train-00000-of-00001.parquet").write_bytes(b"of an earlier run")  # to be written over
    summary = synthesize.main(config(out, tiny, filters="all", limit=2, per_image=3))
    assert summary["kept"] == 0 and "no question was kept" in capsys.readouterr().err
    assert len(provenance(out)) == 6
    with pytest.raises(data.DataError, match="there are no rows, as when synthesize.py kept no question"):
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
    asking.judge_answers([candidate], {"a": group(*keys)}, config(tmp_path, tiny, filters="all").resolve())
    assert (candidate["majority_share"], candidate["abstention_share"]) == (share, silent)
    assert (candidate["filters"]["agreement"], candidate["filters"]["abstention"]) == passed
    assert asking.is_kept(candidate) is all(passed)
    strict = config(tmp_path, tiny, filters="abstention", max_abstentions=0.2).resolve()
    again = {"uid": "a", "question": "?", "filters": {}}
    asking.judge_answers([again], {"a": group(*keys)}, strict)
    assert again["filters"] == {"abstention": silent <= 0.2}


def test_a_question_that_is_too_long_to_be_answered_is_counted_by_itself(tiny, tmp_path):
    settings = config(tmp_path, tiny, filters="agreement").resolve()
    candidate = {"uid": "b", "source": "a", "question": "How?", "filters": {}}
    asking.judge_answers([candidate], {}, settings)
    assert candidate["filters"] == {} and "max-prompt-tokens" in candidate["unanswered"]
    assert not asking.is_kept(candidate)
    summary = asking.counts([candidate | {"kept": False}], 2, settings)
    assert (summary["unanswered"], summary["sources"], summary["asked"], summary["kept"]) == (1, 2, 1, 0)
    assert summary["filters"] == {"agreement": {"seen": 0, "failed": 0}}


class Recorder:
    """Stands for rollout.rollout and keeps what the model was to be shown, with how many samples and tokens."""

    def __init__(self):
        self.real, self.shown = sampling.rollout, []

    def __call__(self, policy, batch, number, config, *args):
        for prompt in batch.prompts:
            text = policy.tokenizer.decode(prompt.ids)
            self.shown.append((text, prompt.features is not None, config.group_size, config.max_new_tokens))
        return self.real(policy, batch, number, config, *args)


@pytest.mark.parametrize("mode", ["in-context", "direct"])
def test_what_the_model_is_shown(tmp_path, tiny, monkeypatch, mode):
    recorder = Recorder()
    monkeypatch.setattr(sampling, "rollout", recorder)
    settings = {"mode": mode, "limit": 3, "filters": "agreement", "min_agreement": 0.0, "ask_max_new_tokens": 4}
    synthesize.main(config(tmp_path / "q", tiny, **settings))
    asked, answered = recorder.shown[:3], recorder.shown[3:]
    sources, prompt = data.load("shapes", limit=3), prompts.asking(mode)
    for source, (text, has_picture, samples, tokens) in zip(sources, asked, strict=True):
        assert has_picture and (samples, tokens) == (2, 4)
        assert prompt.replace("{question}", source.question) in text
        assert (source.question in text) == (mode == "in-context")
    rows = [row for row in provenance(tmp_path / "q") if row["question"]]
    assert len(rows) == len(answered) > 0
    for row, (text, has_picture, samples, tokens) in zip(rows, answered, strict=True):
        assert has_picture and (samples, tokens) == (8, 6)
        assert row["question"] in text and "Reason in <think>" in text


def test_answers_to_other_questions_are_not_taken_for_these(tmp_path, tiny, capsys):
    settings = config(tmp_path / "q", tiny, filters="agreement", min_agreement=0.0, limit=2)
    synthesize.main(settings)
    before = provenance(tmp_path / "q")
    path = tmp_path / "q/answered/step-000000.jsonl"
    groups = [group | {"question": "Another?"} for group in shards.read_shard(path)]
    for group in groups:
        group["responses"] = [response | {"key": "1"} for response in group["responses"]]
    shards.write_shard(path, groups)
    synthesize.main(settings)
    assert "is about other questions: sampled again" in capsys.readouterr().err
    assert provenance(tmp_path / "q") == before


def test_an_unfinished_set_is_no_data_set(tmp_path, tiny, monkeypatch):
    settings = config(tmp_path / "q", tiny, limit=2)
    monkeypatch.setattr(asking, "write", None)
    with pytest.raises(TypeError):
        synthesize.main(settings)
    with pytest.raises(data.DataError, match="has not finished these questions"):
        data.load(tmp_path / "q")


def test_sources_that_cannot_be_asked_about_are_counted(tmp_path, tiny, capsys):
    rows = [{"question": f"What is it {i}?", "image": "x.png" if i % 2 else "gone.png"} for i in range(8)]
    rows += [{"question": "What is one and one?"}] * 2
    data.load("shapes", limit=1)[0].image.save(tmp_path / "x.png")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out" / "q"
    settings = replace(config(out, tiny, limit=None), data=str(tmp_path / "train.jsonl"))
    summary = synthesize.main(settings)
    said = capsys.readouterr().err
    sources = data.load(tmp_path / "train.jsonl")
    good = [q for q in sources if q.image is not None]
    assert (summary["sources"], summary["asked"]) == (len(sources), len(good)) and len(good) < len(sources)
    assert f"{len(sources) - len(good)} of {len(sources)} source questions were left out" in said
    assert "missing image file" in said
    assert f"{len(good)} of {len(sources)} source questions could be used" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "changed", [{"filters": "repeat"}, {"mode": "direct"}, {"temperature": 0.5}, {"min_agreement": 0.1}]
)
def test_other_settings_need_another_folder(tmp_path, tiny, changed):
    synthesize.main(config(tmp_path / "q", tiny, limit=1))
    with pytest.raises(shards.ShardError, match=f"{next(iter(changed))}: .* there, .* now"):
        synthesize.main(config(tmp_path / "q", tiny, limit=1, **changed))


def test_a_prompt_that_has_changed_is_noticed(tmp_path, tiny):
    mine = tmp_path / "mine.md"
    mine.write_text("Ask for something else than {question}")
    synthesize.main(config(tmp_path / "q", tiny, limit=1, ask_prompt=str(mine)))
    mine.write_text("Ask for another than {question}")
    with pytest.raises(shards.ShardError, match="ask_prompt_file: the file has changed"):
        synthesize.main(config(tmp_path / "q", tiny, limit=1, ask_prompt=str(mine)))


def test_each_mode_has_its_prompt(tmp_path, tiny):
    assert "{question}" in prompts.asking("in-context")
    assert "{question}" not in prompts.asking("direct")
    mine = tmp_path / "mine.md"
    mine.write_text("Ask for something else than {question}")
    assert prompts.asking("in-context", str(mine)) == mine.read_text()
    for changed, message in (
        ({"ask_prompt": str(mine), "mode": "direct"}, "shows no {question}"),
        ({"ask_prompt": "ask-direct"}, "needs {question}"),
        ({"ask_prompt": "nowhere"}, "no prompt 'nowhere'"),
        ({"filters": "length,new"}, "'new' is no filter; give all or none by itself, or names among question"),
        ({"filters": "length,,repeat"}, "--filters length,,repeat: '' is no filter"),
        ({"filters": "none,repeat"}, "'none' is no filter; give all or none by itself"),
        ({"per_image": 0}, "--per-image must be at least 1"),
        ({"min_agreement": 0.9, "max_agreement": 0.5}, "--min-agreement 0.9 is above --max-agreement 0.5"),
        ({"ask_max_new_tokens": 0}, "--ask-max-new-tokens must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0 writes the same question again"),
        ({"temperature": 0.0, "per_image": 1, "filters": "all"}, "the filter agreement needs several samples"),
        ({"group_size": 1, "filters": "agreement"}, "the filter agreement needs several samples"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, tiny, **changed).resolve()
