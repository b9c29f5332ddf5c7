"""The list of runs: which are found, what is said of each, in which order."""

import fcntl
import json
import os

import pytest

from eval import runs
from upt.errors import SettingError
from upt.groups.shards import SCHEMA


def make(folder, at, steps=4, made=4, seed=0, before=None, after=None, alarms=(), ended=True, reward="majority"):
    folder.mkdir(parents=True)
    config = {"data": "shapes", "model": "m", "reward": reward, "advantage": "mean", "seed": seed, "steps": steps}
    manifest = {"schema": SCHEMA, "stage": "train", "config": config, "seed": seed, "model": None, "adapter": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.utime(folder / "manifest.json", (at, at))
    rows = [{"step": step, "groups": 1, "alarms": [*alarms] if step == 2 else []} for step in range(made)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in (("before", before), ("after", after)):
        if value is not None:
            score = {"value": value, "low": value, "high": value}
            scores = {"mean": score, "greedy": score, "rows": [], "kinds": {}, "graded": 1, "questions": 1}
            (folder / f"{name}.json").write_text(json.dumps(scores))
    if ended:
        (folder / "summary.json").write_text(json.dumps({"seconds": {}}))


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "b", 2000, before=0.5, after=0.75)
    make(tmp_path / "a", 1000, made=3, ended=False, before=0.5, alarms=["majority"])
    make(tmp_path / "ablate" / "frequency" / "seed-1", 3000, seed=1, before=0.25, after=0.6, reward="frequency")
    make(tmp_path / "c", 4000, made=2)
    (tmp_path / "c" / "rollouts").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path


def test_a_line_a_run(folder, capsys):
    found = {row["run"]: row for row in runs.main(runs.Config(folder))}
    assert [*found] == ["a", "b", "ablate/frequency/seed-1", "c"]  # by time
    assert found["b"]["mean"] == [0.5, 0.75] and found["a"]["mean"] == [0.5] and found["c"]["mean"] == []
    assert [row["state"] for row in found.values()] == [
        "stopped at 3 of 4, collapse? at 3", "finished", "finished", "ended at 2 of 4",
    ]  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [*runs.COLUMNS] and "50.0 → 75.0" in shown[2]
    assert len({line.index("shapes") for line in shown[1:]}) == 1


def test_it_is_sorted_by_any_column(folder):
    def order(**settings):
        return [row["run"][0] for row in runs.main(runs.Config(folder, **settings))]

    assert order(sort="mean") == ["c", "a", "a", "b"] and order(sort="mean", reverse=True) == ["b", "a", "a", "c"]
    assert order(sort="reward")[0] == "a" and order(sort="seed")[-1] == "a"


def test_a_run_that_goes_on_is_said_to(folder):
    with open(folder / "a" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (row,) = (row for row in runs.main(runs.Config(folder)) if row["run"] == "a")
        assert row["state"].startswith("running at 3 of 4")
    (row,) = (row for row in runs.main(runs.Config(folder)) if row["run"] == "a")
    assert row["state"].startswith("stopped")


def test_what_cannot_be_read_is_left_out_and_said(folder, capsys):
    (folder / "b" / "metrics.jsonl").write_text("{\n")
    assert len(runs.main(runs.Config(folder))) == 3
    assert "b is left out: " in capsys.readouterr().out
    with pytest.raises(SettingError, match="nowhere: no such folder"):
        runs.main(runs.Config(folder / "nowhere"))
    (folder / "none").mkdir()
    assert runs.main(runs.Config(folder / "none")) == [] and "no runs in" in capsys.readouterr().out
