"""Trackers: what real TensorBoard and wandb have kept of a run, and that a tracker that fails stops nothing."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.extras import extra
from tests.test_shards import make_group
from tests.test_team import ROOT, call, flags, script
from tests.test_train import same
from upt.errors import SettingError
from upt.groups.shards import save_image
from upt.run import tracking
from upt.run.tracking import Trackers, checked, flat, name_of

STEPS = [
    {"step": 0, "entropy": 0.5, "kl": None, "seconds": {"rollout": 2.0}, "alarms": ["kl"], "held_out": {"mean": 0.25}},
    {"step": 1, "entropy": 0.25, "kl": 0.125, "seconds": {"rollout": 3.0}, "alarms": []},
]


@pytest.fixture
def groups(tmp_path):
    picture = save_image(tmp_path / "rollouts", Image.new("RGB", (8, 8), (255, 0, 0)))
    found = [make_group(uid=f"g{i}", keys=("7", "8"), image=picture) for i in range(5)]
    found[0]["question"] = "<script>alert(1)</script>"
    return [*found[:1], make_group(uid="blind", keys=("7",)), *found[1:]]


def track(name: str, tmp_path, groups) -> None:
    trackers = Trackers([name], tmp_path, {"reward": "majority", "steps": 2, "out": tmp_path, "adapter": None})
    for row in STEPS:
        trackers.log(row, row["step"])
    trackers.groups(groups, 1, tmp_path / "rollouts")
    trackers.finish()
    assert [*trackers.trackers] == [name]  # it has not failed


def test_numbers_go_by_their_path():
    assert flat(STEPS[0]) == {"step": 0, "entropy": 0.5, "seconds/rollout": 2.0, "held_out/mean": 0.25}
    assert flat({"a": True, "b": "x", "c": [1]}) == {}


def test_tensorboard_has_all_of_it(tmp_path, groups):
    extra("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path, groups)
    events = EventAccumulator(str(tmp_path / tracking.FOLDER / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("entropy")] == [(0, 0.5), (1, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(1, 0.125)]
    assert [e.value for e in events.Scalars("seconds/rollout")] == [2.0, 3.0]
    assert events.Scalars("held_out/mean")[0].value == 0.25
    (image,) = events.Images("groups/0")
    assert (image.width, image.height, image.step) == (8, 8, 1)
    said = events.Tensors("groups/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    <script>alert(1)</script>" in said and "boxed{8}" in said
    assert "groups/1/text_summary" in events.Tags()["tensors"] and "groups/1" not in events.Tags()["images"]


def test_wandb_offline_has_all_of_it(tmp_path, groups, monkeypatch):
    extra("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "kept"))  # where it keeps what tables hold until it is sent
    track("wandb", tmp_path, groups)
    (run,) = (tmp_path / tracking.FOLDER / "wandb").glob("offline-run-*")
    (kept,) = run.glob("*.wandb")
    deadline = time.monotonic() + 60  # its own process writes it
    while b"seconds/rollout" not in kept.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"entropy" in kept.read_bytes() and b"seconds/rollout" in kept.read_bytes()
    (table,) = run.glob("files/media/table/groups*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == [*tracking.COLUMNS] and [row[0] for row in rows["data"]] == ["g0", "blind", "g1", "g2"]
    assert [row[1] for row in rows["data"]] == ["Image", None, "Image", "Image"]
    pictures = [
        path for path in (tmp_path / "kept").rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"
    ]
    assert np.asarray(Image.open(pictures[0]).convert("RGB"))[0, 0].tolist() == [255, 0, 0]


def test_a_run_goes_on_in_the_same_tensorboard_and_what_is_made_again_counts_once(tmp_path):
    extra("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, [1, 2, 3, 4]), (2, [5, 6, 7])):  # killed after step 3, its last checkpoint before step 2
        (tmp_path / "checkpoints" / f"step-{start:06d}").mkdir(parents=True)
        trackers = Trackers(["tensorboard"], tmp_path, {"reward": "majority"})
        trackers.log({"held_out": {"mean": 0.5}}, 0)
        for step, value in enumerate(values, start):
            trackers.log({"entropy": value}, step)
        trackers.finish()
    events = EventAccumulator(str(tmp_path / tracking.FOLDER / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("entropy")] == [(0, 1), (1, 2), (2, 5), (3, 6), (4, 7)]
    assert [e.step for e in events.Scalars("held_out/mean")] == [0]
    assert len([*(tmp_path / tracking.FOLDER / "tensorboard").rglob("hparams.yml")]) == 1  # settings are told once


def test_a_run_goes_on_in_the_same_wandb_run_and_fails_there_when_it_fails(tmp_path, monkeypatch):
    wandb = extra("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out, found = tmp_path / "runs" / "ablate" / "frequency" / "seed-0", []
    codes, end = [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code=None: codes.append(exit_code) or end(run, exit_code))
    for error in (RuntimeError("enough"), None):
        trackers = Trackers(["wandb"], out, {"reward": "frequency"})
        run = trackers.trackers["wandb"].tracker
        found.append((run.id, run.name))
        trackers.log({"entropy": 1.0}, 0)
        trackers.finish(error)
    assert codes == [1, None] and [*trackers.trackers] == ["wandb"]
    assert found[0] == found[1] and found[0][1] == "ablate/frequency/seed-0"
    for folder in (out / tracking.FOLDER / "wandb").glob("offline-run-*"):
        assert f"-{found[0][0]}" in folder.name


def test_a_tracker_that_is_added_later_is_told_the_scores_before_training(tmp_path, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    told = {"tensorboard": [], "wandb": []}

    def maker(steps: list[int]):
        tracker = SimpleNamespace(log=lambda values, step: steps.append(step), store_init_configuration=lambda of: None)
        return lambda project, **settings: tracker

    for name, steps in told.items():
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, maker(steps))
    for names in (["tensorboard"], ["tensorboard", "wandb"]):
        trackers = Trackers(names, tmp_path, {})
        for step in (0, 1, 2):
            trackers.log({"entropy": 1.0}, step)
        (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True, exist_ok=True)
    assert told == {"tensorboard": [0, 1, 2, 2], "wandb": [0, 1, 2]}


def test_mlflow_goes_on_and_fails_likewise(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    client, stated = mlflow.MlflowClient(), []
    for error in (RuntimeError("enough"), KeyboardInterrupt(), None):
        trackers = Trackers(["mlflow"], tmp_path / "runs" / "x", {"resume": error is None})
        trackers.log({"entropy": 1.0}, len(stated))
        trackers.finish(error)
        (kept,) = json.loads((tmp_path / "runs/x" / tracking.FOLDER / tracking.IDS).read_text()).values()
        stated.append((client.get_run(kept).info.status, kept))
    assert [status for status, _ in stated] == ["FAILED", "KILLED", "FINISHED"] and len({id for _, id in stated}) == 1
    assert [point.step for point in client.get_metric_history(kept, "entropy")] == [0, 1, 2]


def test_a_run_is_called_by_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path, name in (
        ("runs/train", "train"),
        ("runs/ablate/judged/seed-0", "ablate/judged/seed-0"),
        ("/data/runs/old/runs/new/round-01/run", "new/round-01/run"),
        ("/scratch/mine/seed-1", "mine/seed-1"),
        ("/runs", "runs"),
        ("x", f"{tmp_path.name}/x"),
        ("/scratch/mine/round-01/run", "mine/round-01/run"),
        ("runs/../runs/a/../b", "b"),
        ("/x/runs/runs", "runs"),
    ):
        assert name_of(Path(path)) == name


class Fake:
    """A tracker that fails at a call of its choice."""

    def __init__(self, fails: str, calls: list):
        self.fails, self.calls = fails, calls
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def __getattr__(self, name):
        def call(*given, **_):
            if name == self.fails:
                raise ConnectionError("no network")
            self.calls.append((name, *given))

        return call


def fakes(monkeypatch, calls: dict[str, list], fails: str = "") -> None:
    """Fakes in place of accelerate's trackers; the first one fails."""
    import accelerate.tracking

    def maker(name):
        def make(*given, **named):
            if (mine := fails * (name == [*calls][0])) == "make":
                raise ConnectionError("no network")
            calls[name].append(("make", named))
            return Fake(mine, calls[name])

        return make

    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", {name: maker(name) for name in calls})


@pytest.mark.parametrize("fails", ["make", "start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, monkeypatch, capsys, fails):
    calls = {"trackio": [], "mlflow": []}
    fakes(monkeypatch, calls, fails)
    trackers = Trackers([*calls], tmp_path, {"reward": "majority"})
    for row in STEPS:
        trackers.log(row, row["step"])
    trackers.groups([make_group()], 1, tmp_path)
    trackers.finish()
    done = ["make", "start", "store_init_configuration", "log", "log", "finish"]
    assert [name for name, *_ in calls["mlflow"]] == done
    assert capsys.readouterr().err.count("--track trackio has failed, and is left out: no network") == 1
    assert fails not in [name for name, *_ in calls["trackio"]]


def test_what_accelerate_itself_fails_at_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)  # so that it cannot be imported
    trackers = Trackers(["wandb", "mlflow"], tmp_path, {})
    trackers.log(STEPS[0], 0)
    trackers.finish()
    assert capsys.readouterr().err.count("has failed, and is left out: ") == 2
    (tmp_path / "x").write_text("no folder")
    Trackers(["mlflow"], tmp_path / "x", {}).finish()
    assert "--track mlflow has failed" in capsys.readouterr().err


def test_what_each_is_told_to_go_on_by(tmp_path, monkeypatch):
    calls = {name: [] for name in tracking.NAMES}
    fakes(monkeypatch, calls)
    for _ in range(2):
        Trackers([*calls], tmp_path / "runs" / "a", {}).finish()
    told = {name: [rest[0] for did, *rest in made if did == "make"] for name, made in calls.items()}
    first, again = ({name: given[i] for name, given in told.items()} for i in range(2))
    assert first["wandb"] == again["wandb"] and first["wandb"]["resume"] == "allow" and first["wandb"]["name"] == "a"
    assert first["trackio"] == again["trackio"] and first["trackio"]["name"].startswith("a ")
    assert first["mlflow"] == {"run_name": "a", "run_id": None} and again["mlflow"] == {"run_name": "a", "run_id": "r1"}
    assert first["tensorboard"]["purge_step"] is None and again["tensorboard"]["purge_step"] == 0
    for made in calls.values():
        assert [did for did, *_ in made].count("store_init_configuration") == 1


def test_names_are_checked(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    assert checked("wandb") == ["wandb"] and checked(None) == checked("") == []
    with pytest.raises(SettingError, match="--track mlflow is not installed: .*python.* -m pip install mlflow"):
        checked("wandb, mlflow")
    with pytest.raises(SettingError, match="--track wandbb: give .*did you mean 'wandb'"):
        checked("wandbb")


def test_a_run_tells_its_trackers_and_its_caller(tiny, tmp_path, monkeypatch):
    import train_upt

    monkeypatch.setattr(tracking, "checked", lambda names: ["fake"] if names else [])
    calls, seen = [], []

    class Kept:
        def __init__(self, names, out, settings):
            calls.append(("settings", settings["reward"]))

        def __getattr__(self, name):
            return lambda *given: calls.append((name, *given))

    monkeypatch.setattr(tracking, "Trackers", Kept)
    settings = {"steps": 3, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "lora_rank": 2}
    settings |= {"eval_questions": 2, "eval_samples": 2, "reward": "random", "track": "fake", "track_groups_every": 2}
    config = train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", **settings)
    train_upt.main(config, on_step=lambda row, groups: seen.append((row, groups)))
    assert [name for name, *_ in calls] == ["settings", "log", "log", "groups", "log", "log", "groups", "log", "finish"]
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row, _ in seen] == rows and [len(groups) for _, groups in seen] == [2, 2, 2]
    logged = [given for name, *given in calls if name == "log"]
    assert [step for _, step in logged] == [0, 0, 1, 2, 3]
    assert logged[2][0]["entropy"] == rows[1]["entropy"] and "step" not in logged[2][0]
    after = json.loads((tmp_path / "r" / "summary.json").read_text())["after"]
    assert logged[4][0]["held_out"]["mean"] == after["mean"]["value"]


def test_a_caller_is_told_again_of_what_is_made_again_and_of_a_finished_run_nothing(tiny, tmp_path):
    """After an error of the caller's, before the first checkpoint, the run comes out as if nothing had happened."""
    import train_upt

    settings = {"steps": 3, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "lora_rank": 2}
    settings |= {"eval_questions": 0, "reward": "random", "kl_coef": 0.0}

    def run(out, on_step):
        return train_upt.main(
            train_upt.Config(model=tiny, out=tmp_path / out, device="cpu", **settings), on_step=on_step
        )

    seen = []

    def told(row, groups):
        seen.append(row["step"])
        if len(seen) == 3:
            raise RuntimeError("enough")

    run("whole", None)
    with pytest.raises(RuntimeError, match="enough"):
        run("r", told)
    assert run("r", told)["end"] == run("r", told)["end"]
    assert seen == [0, 1, 2, 0, 1, 2] and same(tmp_path / "r", tmp_path / "whole")


def test_a_caller_is_told_of_every_round(tiny, tmp_path):
    import train_upt

    settings = {"rounds": 2, "synthesize": "direct", "filters": "none", "limit": 8, "steps": 2, "eval_questions": 0}
    settings |= {"questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "ask_max_new_tokens": 6, "lora_rank": 2}
    seen = []

    def told(row, groups):
        seen.append(row["step"])
        if len(seen) == 3:  # in the second round
            raise RuntimeError("enough")

    config = train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", reward="random", **settings)
    with pytest.raises(RuntimeError, match="enough"):
        train_upt.main(config, on_step=told)
    summary = train_upt.main(config, on_step=told)
    assert seen == [0, 1, 0, 0, 1] and len(summary["rounds"]) == 2


TOLD = """
import json, sys
import train_upt
from upt.run import cli

def told(row, groups):
    with open(sys.argv[0] + ".told", "a") as file:
        file.write(json.dumps([row["step"], len(groups)]) + chr(10))
    if FAILS and row["step"] == 1:
        raise RuntimeError("enough")

if __name__ == "__main__":
    cli.launch(lambda config: train_upt.main(config, on_step=told), train_upt.Config)
"""


@pytest.mark.slow
def test_of_several_processes_one_tells_and_its_error_ends_all(tiny, tmp_path):
    settings = {"steps": 3, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "lora_rank": 2}
    settings |= {"eval_questions": 0, "reward": "random", "save_every": 1, "model": tiny, "out": tmp_path / "r"}
    path, told = tmp_path / "mine.py", tmp_path / "mine.py.told"
    for fails in (True, False):
        path.write_text(TOLD.replace("FAILS", str(fails)))
        made = call(script(str(path), *flags(**settings), size=2), PYTHONPATH=str(ROOT))
        assert (made.returncode == 0) == (not fails), made.stderr[-2000:]
        assert made.stderr.count("RuntimeError: enough") == fails
    steps = [json.loads(line)[0] for line in told.read_text().splitlines()]
    assert steps == [0, 1, 1, 2] and json.loads(told.read_text().splitlines()[0])[1] == 2


@pytest.mark.parametrize("handled", [False, True])
def test_trackers_are_told_how_a_run_ended(tiny, tmp_path, monkeypatch, handled):
    """By an error, or by itself, though it is called where another error is dealt with."""
    import train_upt

    monkeypatch.setattr(tracking, "checked", lambda names: ["fake"] if names else [])
    ends = []
    monkeypatch.setattr(tracking, "Trackers", lambda *_: SimpleNamespace(log=print, groups=print, finish=ends.append))

    def stop(row, groups):
        raise RuntimeError("enough")

    settings = {"steps": 1, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "lora_rank": 2}
    settings |= {"eval_questions": 0, "reward": "random", "track": "fake"}
    config = train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", **settings)
    try:
        train_upt.main(config, on_step=stop)
    except RuntimeError:
        if handled:
            train_upt.main(config)
    assert str(ends[0]) == "enough" and ends[1:] == [None] * handled


def test_what_on_step_raises_ends_the_run_which_can_go_on(tiny, tmp_path):
    import train_upt

    def stop(row, groups):
        if row["step"] == 1:
            raise RuntimeError("enough")

    settings = {"steps": 3, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 3, "lora_rank": 2}
    settings |= {"eval_questions": 0, "reward": "random", "save_every": 1}
    with pytest.raises(RuntimeError, match="enough"):
        train_upt.main(train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", **settings), on_step=stop)
    train_upt.main(train_upt.Config(model=tiny, out=tmp_path / "r", device="cpu", **settings))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
