"""The list of runs: which are found, what is said of each, in which order, how it fits a terminal."""

import fcntl
import json
import os
import time
from datetime import datetime, timedelta, timezone

import pytest

from eval import runs
from upt.errors import SettingError
from upt.groups.shards import SCHEMA

THEN = time.mktime((2024, 3, 1, 12, 0, 0, 0, 0, -1))


def scores(value: float) -> dict:
    return {name: {"value": value, "low": value, "high": value} for name in ("mean", "greedy")}


def make(folder, at, steps=4, made=4, before=None, after=None, alarms=(), ended=True, last=(), **settings):
    """A run as train_upt.py leaves it, in another time zone; the rows of its held-out scores are no JSON, so that
    nobody reads them."""
    folder.mkdir(parents=True)
    config = {"data": "shapes", "model": "m", "reward": "majority", "advantage": "mean", "seed": 0, "steps": steps}
    begun = datetime.fromtimestamp(at, timezone(timedelta(hours=9))).isoformat(timespec="seconds")
    manifest = {"schema": SCHEMA, "stage": "train", "begun": begun, "config": config | settings, "seed": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"model": None, "adapter": None}))
    rows = [{"step": step, "groups": 1, "alarms": [*alarms] if step == 2 else []} for step in range(made)]
    rows[-1:] = [row | dict(last) for row in rows[-1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "cut o')
    measured = {name: scores(value) for name, value in (("before", before), ("after", after)) if value is not None}
    for name, found in measured.items():
        text = json.dumps(found | {"kinds": {"a": scores(0.125)}, "graded": 1, "questions": 1, "rows": []})
        (folder / f"{name}.json").write_text(text[:-2] + "no JSON")
    if ended:
        end = {"steps": made, "adapter_step": made, "alarms": {"2": [*alarms]} if alarms else {}}
        (folder / "summary.json").write_text(json.dumps({"seconds": {}, "end": end} | measured))


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "b", THEN + 2000, before=0.5, after=0.75)
    make(tmp_path / "a", THEN + 1000, made=3, ended=False, before=0.5, alarms=["gap", "majority"])
    make(tmp_path / "ablate" / "frequency" / "seed-1", THEN + 3000, before=0.25, after=0.6, seed=1, reward="frequency")
    make(tmp_path / "c", THEN + 4000, made=2)
    (tmp_path / "c" / "rollouts").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path


def states(folder) -> dict[str, str]:
    return {row["run"]: row["state"] for row in runs.main(runs.Config(folder))}


def test_a_line_a_run(folder, capsys):
    found = {row["run"]: row for row in runs.main(runs.Config(folder))}
    assert [*found] == ["a", "b", "ablate/frequency/seed-1", "c"]  # by time
    assert found["b"]["mean"] == [0.5, 0.75] and found["a"]["mean"] == [0.5] and found["c"]["mean"] == []
    assert [row["state"] for row in found.values()] == [
        "stopped at 3 of 4, collapse? at 3: majority", "finished", "finished", "ended at 2 of 4",
    ]  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [*runs.COLUMNS] and "50.0 → 75.0" in shown[2] and shown[1].startswith("2024-03-01  a")
    assert len({line.index("shapes") for line in shown[1:]}) == 1
    assert [row["run"] for row in runs.main(runs.Config(folder / "b"))] == ["b"]


def test_a_run_that_does_not_say_when_it_was_begun_has_the_time_of_its_file(folder):
    path = folder / "b" / "manifest.json"
    path.write_text(json.dumps({name: of for name, of in json.loads(path.read_text()).items() if name != "begun"}))
    os.utime(path, (THEN + 5000, THEN + 5000))
    *_, last = runs.main(runs.Config(folder))
    assert (last["run"], last["when"]) == ("b", THEN + 5000)


def test_a_run_in_the_making_has_its_last_evaluation(folder):
    last = {"held_out": {"mean": 0.625, "greedy": 0.5}, "nonfinite_in_a_row": 5}
    make(folder / "d", THEN, made=3, before=0.25, ended=False, last=last)
    (row,) = (row for row in runs.main(runs.Config(folder)) if row["run"] == "d")
    assert row["mean"] == [0.25, 0.625] and row["greedy"] == [0.25, 0.5] and row["state"] == "diverged at 3 of 4"
    make(folder / "e", THEN, made=0, ended=False)
    assert states(folder)["e"] == "stopped at 0 of 4"


def test_how_a_model_was_loaded(folder, capsys):
    make(folder / "d", THEN, quantize="nf4", gpus=4)
    make(folder / "e", THEN, quantize=None, gpus=1)
    found = {row["run"]: row["model"] for row in runs.main(runs.Config(folder))}
    assert found["d"] == "m (nf4, 4 processes)" and found["e"] == found["b"] == "m"


def test_it_is_sorted_by_any_column(folder):
    for seed in (10, 2):
        make(folder / f"seed-{seed}", THEN + seed, seed=seed, made=seed, steps=seed, before=0.05, after=0.0625)

    def order(**settings):
        return [row["run"].removesuffix("/frequency/seed-1") for row in runs.main(runs.Config(folder, **settings))]

    assert (
        order(sort="seed")[-3:] == ["ablate", "seed-2", "seed-10"] and order(sort="seed", reverse=True)[0][-2:] == "10"
    )
    assert order(sort="steps") == ["c", "seed-2", "a", "ablate", "b", "seed-10"]
    assert order(sort="run") == ["a", "ablate", "b", "c", "seed-2", "seed-10"]
    assert order(sort="mean") == ["seed-10", "seed-2", "a", "ablate", "b", "c"]  # what has none comes last,
    assert order(sort="mean", reverse=True) == ["b", "ablate", "a", "seed-10", "seed-2", "c"]  # either way
    assert order(sort="reward")[0] == "ablate"


def test_a_run_that_goes_on_is_said_to(folder):
    with open(folder / "a" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert states(folder)["a"].startswith("running at 3 of 4")
    assert states(folder)["a"].startswith("stopped")


def test_what_cannot_be_read_is_said_in_its_row(folder, capsys):
    (folder / "b" / "summary.json").write_text("{\n")
    (folder / "a" / "metrics.jsonl").write_text("{\n")
    (folder / "c" / "manifest.json").write_text("{")
    make(folder / "d", THEN)
    (folder / "d" / "summary.json").write_text('{"end": {"alarms": []}}')
    found = {row["run"]: row for row in runs.main(runs.Config(folder))}
    assert len(found) == 5 and found["ablate/frequency/seed-1"]["state"] == "finished"
    assert found["b"]["state"].startswith("unreadable: summary.json: not JSON") and found["b"]["data"] == "shapes"
    assert found["a"]["state"].startswith("unreadable: metrics.jsonl: ") and found["d"]["state"].startswith(
        "unreadable: "
    )
    assert found["c"]["state"].startswith("unreadable: manifest.json: not JSON") and found["c"]["data"] is None
    (folder / "other" / "manifest.json").write_text("{}")  # of something else
    assert len(runs.main(runs.Config(folder))) == 5


def test_rounds_are_listed_one_by_one(tmp_path):
    make(tmp_path / "r", THEN)
    assert [*states(tmp_path)] == ["r"]
    make(tmp_path / "r" / "round-01" / "run", THEN)
    make(tmp_path / "r" / "round-02" / "run", THEN + 1)
    assert [*states(tmp_path)] == ["r/round-01/run", "r/round-02/run"]


def test_folders_that_are_linked_are_looked_into_once(folder, tmp_path_factory):
    far = tmp_path_factory.mktemp("far")
    make(far / "x", THEN)
    (folder / "far").symlink_to(far)
    (far / "back").symlink_to(folder)
    assert sorted(states(folder)) == ["a", "ablate/frequency/seed-1", "b", "c", "far/x"]


def test_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="nowhere: no such folder"):
        runs.main(runs.Config(tmp_path / "nowhere"))
    assert runs.main(runs.Config(tmp_path)) == runs.main(runs.Config()) == []  # of a fresh clone there is no runs/
    assert capsys.readouterr().out.count(": make train begins one in runs/train") == 2


def test_a_line_fits_a_terminal(folder, monkeypatch, capsys):
    name = "ablate/" + "judged(lam_pos=.4,t_h=.9)" * 4
    make(folder / name / "seed-1", THEN, model="/a/long/path/" * 9 + "tiny", before=0.5, after=0.75, alarms=["kl"] * 9)
    monkeypatch.setenv("COLUMNS", "110")
    runs.main(runs.Config(folder))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "all: data shapes, advantage mean" and max(map(len, lines)) == 110
    assert any(line.split()[1].startswith("abl") and "…" in line and "50.0 → 75.0" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "1000")
    runs.main(runs.Config(folder))
    assert f"{name}/seed-1" in capsys.readouterr().out
    assert runs.shorter("0123456789", 6) == "012…89" and runs.shorter("012345", 6) == "012345"


def test_hundreds_are_listed_at_once(tmp_path, monkeypatch):
    """A finished run's log and its answers, which may be large, are not opened."""
    make(tmp_path / "a", THEN, before=0.5, after=0.75)
    for name in ("metrics.jsonl", "before.json", "after.json"):
        (tmp_path / "a" / name).chmod(0)
    opened, real = [], open
    monkeypatch.setattr("io.open", lambda path, *rest, **named: opened.append(str(path)) or real(path, *rest, **named))
    (row,) = runs.main(runs.Config(tmp_path))
    assert row["mean"] == [0.5, 0.75]
    assert {path.rpartition("/")[2] for path in opened} == {"manifest.json", "summary.json"}
