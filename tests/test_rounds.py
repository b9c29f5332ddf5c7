"""Rounds of asking and training: what each round is made from, and that an interruption changes nothing."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import synthesize
import train_upt
from eval import heldout
from tests.test_train import adapter, same
from train_upt import Config
from upt import data
from upt.groups import manifests, shards
from upt.model.policy import Policy
from upt.run import starting
from upt.run.metrics import Clock
from upt.run.team import ALONE
from upt.stages import rounds, sampling

SMALL = {
    "questions_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 12,
    "lora_rank": 2,
    "lora_alpha": 4,
    "learning_rate": 1e-2,
    "reward": "random",
    "steps": 1,
    "eval_questions": 4,
    "eval_samples": 1,
    "limit": 8,
    "filters": "none",
}


def config(tiny: str, out: Path, **settings) -> Config:
    return Config(model=tiny, out=out, **SMALL | {"rounds": 2, "synthesize": "direct"} | settings)


def groups(folder: Path) -> list[dict]:
    return [group for path in shards.list_shards(folder) for group in shards.read_shard(path)]


@pytest.fixture(scope="module")
def evolved(tiny, tmp_path_factory) -> Path:
    """Two whole rounds."""
    out = tmp_path_factory.mktemp("evolve") / "whole"
    train_upt.main(config(tiny, out))
    return out


def test_each_round_asks_with_the_adapter_of_the_last_and_goes_on_training_it(tiny, evolved):
    first, second = evolved / "round-01", evolved / "round-02"
    settings = [manifests.read(folder / "questions")["config"] for folder in (first, second)]
    assert [s["adapter"] for s in settings] == [None, str(first / "run" / "adapter")]
    runs = [manifests.read(folder / "run")["config"] for folder in (first, second)]
    assert [r["init_adapter"] for r in runs] == [None, str(first / "run" / "adapter")]
    assert same(evolved, second / "run") and not same(first / "run", second / "run")
    # One step from the first round's adapter: nothing was merged, and nothing started anew.
    start, end = adapter(first / "run"), adapter(second / "run")
    moved = max(float((end[name] - start[name]).abs().max()) for name in start)
    assert 0 < moved < 0.05 and not (second / "run" / "start").exists()
    Policy.load(tiny, adapter=str(evolved / "adapter"))


def test_all_rounds_have_a_page(evolved):
    assert "round-01" in (text := (evolved / "report.html").read_text()) and "round-02" in text


def test_a_round_trains_on_the_data_and_its_own_questions(evolved):
    summary = json.loads((evolved / "summary.json").read_text())
    for number, done in enumerate(summary["rounds"], start=1):
        folder = evolved / f"round-{number:02d}"
        mixture = manifests.read(folder / "run")["config"]["data"]
        assert mixture == f"shapes,{folder / 'questions'}"
        own = data.load(folder / "questions", limit=8)
        assert len(data.load(mixture, limit=8)) == 8 + len(own) and done["questions"]["kept"] >= len(own) > 0
        lines = (folder / "questions" / "provenance.jsonl").read_text().splitlines()
        written = {c["uid"]: c["question"] for c in map(json.loads, lines)}
        assert all(q.question == written[q.uid] for q in own)
        trained = {g["uid"]: g["question"] for g in groups(folder / "run/rollouts") if g["uid"] in written}
        assert all(question == written[uid] for uid, question in trained.items())
    asked = [{g["responses"][0]["text"] for g in groups(evolved / f"round-0{n}" / "questions/asked")} for n in (1, 2)]
    assert not asked[0] & asked[1]  # other noise, and another adapter
    orders = [[g["uid"] for g in groups(evolved / f"round-0{n}" / "run/rollouts")] for n in (1, 2)]
    assert orders[0] != orders[1]


def test_the_scores_after_a_round_are_those_before_the_next(tiny, evolved):
    first, second = (json.loads((evolved / f"round-0{n}/run/summary.json").read_text()) for n in (1, 2))
    summary = json.loads((evolved / "summary.json").read_text())
    assert second["before"] == first["after"] and summary["before"] == first["before"]
    assert summary["after"] == second["after"] == summary["rounds"][1]["after"]
    # Measured anew, they are the same: noise of the evaluation does not depend on the round.
    (evolved / "round-02/run/before.json").unlink()
    settings = manifests.read(evolved / "round-02/run")["config"]
    own = {field.name for field in fields(Config)} - {"out", "lora_targets"}
    run = Config(**{name: value for name, value in settings.items() if name in own})
    policy = starting.starting_policy(replace(run, out=evolved / "unused"), False, ALONE)
    held_out = data.load("shapes", "test", 0)
    measured = heldout.scored(
        policy,
        held_out,
        "before",
        replace(run, out=evolved / "round-02/run"),
        Clock(),
        lambda *_: None,
        ALONE,
    )
    assert heldout.without_rows(measured) == second["before"]


@pytest.mark.parametrize("lost", ["after the questions", "in the second round", "in the second questions"])
def test_an_interrupted_run_ends_the_same(tiny, evolved, tmp_path, lost, monkeypatch):
    """Stopped in three places by an error, then run again: the same bits, and nothing is asked or trained twice."""
    out, calls = tmp_path / "stopped", []
    stop = {"after the questions": "round-01/run", "in the second round": "round-02/run"}.get(
        lost, "round-02/questions"
    )
    write_shard = shards.write_shard

    def stopping(path, records):
        if stop and stop in str(path):
            raise KeyboardInterrupt
        calls.append(str(path.relative_to(out)))
        return write_shard(path, records)

    monkeypatch.setattr(shards, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_upt.main(config(tiny, out))
    assert not (out / "summary.json").exists() and calls
    stop = None
    train_upt.main(config(tiny, out))
    sampled = [call for call in calls if "rollouts" not in call]
    assert len(sampled) == len({*sampled}) and same(out, evolved)
    for name in ("round-01/questions", "round-02/questions"):
        for file in ("provenance.jsonl", "asked/step-000000.jsonl", "data/train-00000-of-00001.parquet"):
            assert (out / name / file).read_bytes() == (evolved / name / file).read_bytes()
    before = len(calls)
    train_upt.main(config(tiny, out))
    assert len(calls) == before


def test_resume_takes_every_setting_from_the_run(evolved, monkeypatch):
    monkeypatch.setattr(sampling, "rollout", None)  # there is nothing left to do
    summary = train_upt.main(Config(out=evolved, resume=True))
    assert summary["config"]["rounds"] == 2 and summary["after"] == summary["rounds"][1]["after"]


def test_settings_of_another_run_are_refused(tiny, evolved):
    with pytest.raises(shards.ShardError, match="synthesize: 'direct' there, 'in-context' now"):
        train_upt.main(config(tiny, evolved, synthesize="in-context"))


def test_nothing_kept_trains_on_the_data_alone(tiny, tmp_path):
    out = tmp_path / "out"
    train_upt.main(config(tiny, out, rounds=1, filters="all", eval_questions=0))
    assert manifests.read(out / "round-01/run")["config"]["data"] == "shapes"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"][0]["questions"]["kept"] == 0 and "after" not in summary


def test_the_share_of_its_own_questions(tiny, tmp_path, capsys):
    settings = config(tiny, tmp_path, own_share=0.25).resolve()
    own = tmp_path / "own"
    synthesize.main(
        synthesize.Config(data="shapes", model=tiny, out=own, limit=8, mode="direct", filters="none", max_new_tokens=12)
    )
    count = len(data.load(own))
    assert rounds.mixed(settings, own, count) == f"shapes:0.750000,{own}:0.250000"
    assert rounds.mixed(replace(settings, own_share=1.0), own, count) == str(own)
    assert rounds.mixed(replace(settings, own_share=None), own, count) == f"shapes,{own}"
    assert rounds.mixed(settings, own, 0) == "shapes"
    # Ten of sixteen questions are more than there are.
    assert rounds.mixed(replace(settings, own_share=0.625, questions_per_step=16), own, count) == f"shapes,{own}"
    assert f"only {count} questions of its own" in capsys.readouterr().err and count < 10
    assert rounds.mixed(replace(settings, own_share=0.5, limit=1), own, count) == f"shapes,{own}"


def test_a_share_that_cannot_be_is_refused_before_asking(tiny, tmp_path):
    with pytest.raises(data.DataError, match="takes 6 questions from data set 1 of the mixture, which has 4"):
        train_upt.main(config(tiny, tmp_path / "out", own_share=0.25, limit=4, questions_per_step=8))
    assert not (tmp_path / "out").exists()


def test_rounds_are_evaluated_on_the_set_asked_for(tiny, tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    train_upt.main(config(tiny, out, rounds=1, eval_data=str(tmp_path / "held.jsonl")))
    scores = json.loads((out / "summary.json").read_text())["after"]
    assert scores["kinds"] == {} and 0 < scores["graded"] <= 4


def test_a_prompt_that_has_changed_between_rounds_is_noticed(tiny, tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("Ask something.")
    train_upt.main(config(tiny, tmp_path / "out", rounds=1, ask_prompt=str(mine), eval_questions=0))
    mine.write_text("Ask something else.")
    with pytest.raises(shards.ShardError, match="ask_prompt_file: the file has changed"):
        train_upt.main(config(tiny, tmp_path / "out", rounds=2, ask_prompt=str(mine), eval_questions=0))


def test_another_round_may_follow(tiny, evolved, tmp_path):
    out = tmp_path / "out"
    train_upt.main(config(tiny, out, rounds=1))
    train_upt.main(config(tiny, out, rounds=2))
    assert same(out, evolved)
    assert len(train_upt.main(Config(out=out, resume=True))["rounds"]) == 2
    with pytest.raises(ValueError, match="has 2; give as many, or more"):
        train_upt.main(config(tiny, out, rounds=1))


def test_a_mistyped_name_claims_no_folder(tiny, tmp_path):
    for wrong in ({"data": str(tmp_path / "nowhere")}, {"eval_data": str(tmp_path / "nowhere")}):
        with pytest.raises(data.DataError, match="nowhere"):
            train_upt.main(config(tiny, tmp_path / "out", **wrong))
    with pytest.raises(ValueError, match="no model folder"):
        train_upt.main(replace(config(tiny, tmp_path / "out"), model=str(tmp_path / "nowhere"), data="shapes"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_has_changed_is_noticed(tiny, evolved, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(evolved / "adapter", start)
    settings = {"rounds": 0, "synthesize": None, "filters": "all", "init_adapter": str(start), "eval_questions": 0}
    train_upt.main(config(tiny, tmp_path / "out", **settings))
    file = start / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(shards.ShardError, match="init_adapter_file: the file has changed"):
        train_upt.main(config(tiny, tmp_path / "out", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 2}, "--rounds N and --synthesize"),
        ({"synthesize": "direct"}, "--rounds N and --synthesize"),
        ({"own_share": 0.5}, "--own-share is for the questions that --rounds makes"),
        ({"per_image": 2}, "--per-image is for the questions that --rounds makes"),
        ({"adapter": "ADAPTER", "init_adapter": "b"}, "give one of them"),
        ({"init_adapter": "nowhere"}, "--init-adapter nowhere: no PEFT adapter there"),
        ({"rounds": 1, "synthesize": "direct", "own_share": 0.9999999}, "or 1, not 0.9999999"),
        ({"rounds": 1, "synthesize": "direct", "split": "validation"}, "on their train split only"),
        ({"data": "shapes,geoqa", "split": "test"}, "on their train split only"),
        ({"rounds": 1, "synthesize": "direct", "reward": "supervised"}, "makes questions without gold"),
        ({"rounds": 1, "synthesize": "direct", "data": "q:3"}, "--data q:3: a comma or a number"),
        ({"rounds": 1, "synthesize": "direct", "adapter": "ADAPTER"}, "--init-adapter for --adapter"),
        ({"rounds": 1, "synthesize": "direct", "own_share": 0.0}, "must be from 0.001 to 0.999, or 1, not 0.0"),
        ({"rounds": 1, "synthesize": "direct", "data": "shapes:1,geoqa:1"}, "neither weights nor --own-share"),
        ({"rounds": 1, "synthesize": "direct", "data": "shapes,geoqa", "own_share": 0.5}, "neither weights nor"),
        ({"rounds": 1, "synthesize": "direct", "out": Path("runs/a,b")}, "--out runs/a,b/questions: a comma"),
        ({"rounds": 1, "synthesize": "direct", "filters": "new"}, "'new' is no filter"),
    ],
)
def test_what_rounds_cannot_be_is_refused(tiny, tmp_path, settings, message):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    settings = {name: str(tmp_path) if value == "ADAPTER" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        Config(model=tiny, **settings).resolve()


def test_a_table_has_a_line_for_each_round():
    scores = {name: {"value": value} for name, value in (("mean", 0.5), ("greedy", 0.625), ("maj", 0.75), ("pass", 1))}
    done = [{"questions": {"kept": 3, "candidates": 8}, "before": scores, "after": scores | {"mean": {"value": 0.6}}}]
    assert rounds.table(done).splitlines()[2:] == [
        "| 0 |  | 50.0 | 62.5 | 75.0 | 100.0 |",
        "| 1 | 3 of 8 | 60.0 | 62.5 | 75.0 | 100.0 |",
    ]
