"""Trackers: what real TensorBoard and wandb have kept of a run, and that a tracker that fails stops nothing."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from tests.test_shards import make_group
from upt.errors import SettingError
from upt.groups.shards import save_image
from upt.run import tracking
from upt.run.tracking import Trackers, checked, flat

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
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: make test-extras")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path, groups)
    events = EventAccumulator(str(tmp_path / tracking.FOLDER / tmp_path.name))
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
    pytest.importorskip("wandb", reason="wandb is not installed: make test-extras")
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


class Fake:
    """A tracker that fails at a call of its choice."""

    name, requires_logging_directory = "fake", False

    def __init__(self, project, fails="", calls=None, **_):
        self.fails, self.calls = fails, calls

    def __getattr__(self, name):
        def call(*given, **_):
            if name == self.fails:
                raise ConnectionError("no network")
            self.calls.append((name, *given))

        return call


@pytest.mark.parametrize("fails", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, monkeypatch, capsys, fails):
    import accelerate.tracking

    calls = {"wandb": [], "mlflow": []}
    made = {
        "wandb": lambda *given, **_: Fake("upt", fails, calls["wandb"]),
        "mlflow": lambda *given, **_: Fake("upt", "", calls["mlflow"]),
    }
    for make in made.values():
        make.requires_logging_directory = False
    monkeypatch.setattr(accelerate.tracking, "LOGGER_TYPE_TO_CLASS", made)
    trackers = Trackers(["wandb", "mlflow"], tmp_path, {"reward": "majority"})
    for row in STEPS:
        trackers.log(row, row["step"])
    trackers.groups([make_group()], 1, tmp_path)
    trackers.finish()
    assert [name for name, *_ in calls["mlflow"]] == ["start", "store_init_configuration", "log", "log", "finish"]
    assert capsys.readouterr().err.count("--track wandb has failed, and is left out: no network") == 1
    assert fails not in [name for name, *_ in calls["wandb"]]


def test_names_are_checked(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    assert checked("wandb") == ["wandb"] and checked(None) == checked("") == []
    with pytest.raises(SettingError, match="--track mlflow is not installed: pip install mlflow"):
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
