"""One process a folder: who is refused, what a killed process leaves behind, and scripts one after the other."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ablate
import judge
import rewards
import rollout
import synthesize
import train_upt
import warmup
from eval import run as eval_run
from upt.errors import FolderInUse, SettingError, ShardError
from upt.groups import manifests
from upt.model.policy import Policy
from upt.run import locking
from upt.run.locking import holding

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from upt.run.locking import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_is_refused_until_the_first_is_gone(tmp_path, number):
    out = tmp_path / "run"
    process = holder(out)
    try:
        pid = process.pid
        said = rf"{out} is in use by process {pid} on this machine \(.*\) since \d{{4}}-.*stop it \(kill {pid}\)"
        with pytest.raises(FolderInUse, match=said), holding(out):
            pytest.fail("both have it")
        with holding(tmp_path / "another"):
            pass
    finally:
        process.send_signal(number)
        process.wait()
    assert (out / ".lock").exists()  # a killed process leaves the file, not the lock
    with holding(out):
        assert json.loads((out / ".lock").read_text())["host"] == socket.gethostname()


def test_a_folder_is_let_go_after_an_error_and_nothing_is_left(tmp_path):
    out = tmp_path / "a" / "b"
    for _ in range(2):
        with pytest.raises(KeyError), holding(out):
            assert out.is_dir()
            raise KeyError
        assert not (tmp_path / "a").exists()
    with holding(out):
        (out / "kept").write_text("")
    assert [path.name for path in out.iterdir()] == ["kept"]
    (tmp_path / "mine").mkdir()
    with holding(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_several_folders_and_calls_within_a_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with holding(two):
        with pytest.raises(FolderInUse, match="this very process"), holding(one, two):
            pytest.fail("it is held")
        with holding(one):  # it was let go when the second could not be had
            pass
        found = []

        def elsewhere():
            try:
                with holding(two):
                    found.append("held")
            except FolderInUse as error:
                found.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert isinstance(found[0], FolderInUse)


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder may let go and remove it: the lock is then on nothing."""
    real, calls = locking.fcntl.flock, []

    def late(file, how):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        real(file, how)

    monkeypatch.setattr(locking.fcntl, "flock", late)
    with holding(tmp_path):
        assert len(calls) == 2
        with pytest.raises(FolderInUse), holding(tmp_path):
            pytest.fail("both have it")


def test_a_folder_that_somebody_looks_at_can_be_had(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    look = open(tmp_path / ".lock")
    locking.fcntl.flock(look, locking.fcntl.LOCK_SH)  # as `is_held` does, which lets go at once
    monkeypatch.setattr(locking.time, "sleep", lambda seconds: look.close())
    with holding(tmp_path):
        assert look.closed


@pytest.mark.parametrize("after", ["mkdir", "open"])
def test_a_folder_that_another_removes_meanwhile_is_made_again(tmp_path, monkeypatch, after):
    """Whoever made it removes it when leaving, also between another's making it and opening the lock in it."""
    out, real, calls = tmp_path / "run", Path.mkdir, []

    def removed(path, *args, **kwargs):
        real(path, *args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            path.rmdir()
            if after == "mkdir":
                raise FileExistsError(17, "File exists", str(path))

    out.mkdir()
    monkeypatch.setattr(Path, "mkdir", removed)
    with holding(out):
        assert len(calls) == 2
        with pytest.raises(FolderInUse), holding(out):
            pytest.fail("both have it")
    assert not out.exists()


def test_without_locks_the_work_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locking.fcntl, "flock", no_locks)
    with holding(tmp_path / "run"):
        (tmp_path / "run" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
    assert "no lock here (Operation not supported)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- whose a folder is


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory) -> Path:
    """The shards of one step."""
    out, few = tmp_path_factory.mktemp("sampled") / "rollouts", dict(questions_per_step=2, group_size=2)
    rollout.main(rollout.Config(model=tiny, out=out, steps=1, max_new_tokens=4, **few))
    return out


WRITERS = {
    "train": lambda out, tiny, shards: train_upt.main(train_upt.Config(model=tiny, out=out, reward="random")),
    "rollout": lambda out, tiny, shards: rollout.main(rollout.Config(model=tiny, out=out)),
    "judge": lambda out, tiny, shards: judge.main(judge.Config(rollouts=shards, out=out)),
    "rewards": lambda out, tiny, shards: rewards.main(rewards.Config(rollouts=shards, out=out)),
    "synthesize": lambda out, tiny, shards: synthesize.main(synthesize.Config(model=tiny, out=out)),
    "ablate": lambda out, tiny, shards: ablate.main(ablate.Config(rollouts=shards, out=out)),
    "online": lambda out, tiny, shards: ablate.main(ablate.Config(model=tiny, out=out)),
    "eval": lambda out, tiny, shards: eval_run.main(eval_run.Config(model=tiny, data=str(shards), out=out)),
    "warmup": lambda out, tiny, shards: warmup.main(warmup.Config(out=out)),
}


@pytest.mark.parametrize("stage", WRITERS)
def test_nothing_is_written_into_the_folder_of_somebody_else(stage, tiny, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **how: pytest.fail("a model is loaded"))
    docs = tmp_path / "docs"
    for name in ("README.md", "a/b/c.txt", ".git/config", "one.png", "two.png", "manifest.md"):
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).touch()
    before = sorted(docs.rglob("*"))
    said = rf"docs holds README.md, a/, manifest.md and 2 more, which no \w+ stage has left.*--out {docs}-2$"
    with pytest.raises(ShardError, match=said) as error:
        WRITERS[stage](docs, tiny, sampled)
    assert "rm -r" not in str(error.value) and sorted(docs.rglob("*")) == before


@pytest.mark.parametrize("stage", ["ablate", "online", "warmup"])
def test_what_writes_no_manifest_leaves_the_folder_of_another_stage_alone(stage, tiny, sampled, tmp_path):
    """Not that of a run either, whose manifest says that something has begun there."""
    run = tmp_path / "run"
    manifests.write(run, stage="train", config={}, seed=0, model=None)
    (run / "round-01").mkdir()
    before = sorted(run.rglob("*"))
    with pytest.raises(ShardError, match=r"run holds the output of the stage train, not of \w+: use another --out"):
        WRITERS[stage](run, tiny, sampled)
    assert sorted(run.rglob("*")) == before


def test_the_folder_that_is_advised_is_not_there(tmp_path, monkeypatch):
    """Beside a stranger's, and inside of one that holds runs."""

    def advised(folder) -> str:
        with pytest.raises(ShardError) as error:
            manifests.check_own(folder, "train")
        return str(error.value).partition("such as --out ")[2]

    mine, runs = tmp_path / "mine", tmp_path / "runs"
    for folder in (mine, tmp_path / "mine-2"):
        folder.mkdir()
        (folder / "notes.md").touch()
    (tmp_path / "mine-3").symlink_to(tmp_path / "gone")
    manifests.write(runs / "a", stage="train", config={}, seed=0, model=None)
    assert advised(mine) == f"{mine}-4" and advised(runs) == f"{runs}/new"
    (runs / "new").mkdir()
    assert advised(runs) == f"{runs}/new-2"
    monkeypatch.chdir(mine)
    assert advised(Path()) == f"{mine}-4" and advised(Path("../mine")) == "../mine-4"


def test_folders_in_which_a_stage_may_begin(tmp_path):
    def holds(name: str, *files: str, **stages: str) -> Path:
        folder = tmp_path / name
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        for inside, stage in stages.items():
            manifests.write(folder / inside, stage=stage, config={}, seed=0, model=None)
        return folder

    (tmp_path / "empty" / "rollouts").mkdir(parents=True)  # as a run leaves it that was killed early
    hidden = holds(
        "hidden", ".DS_Store", ".lock", ".start.partial/model.safetensors", "mathvision/.lock", "log.txt", "slurm-7.out"
    )
    stages = holds("stages", rollouts="rollout", scored="rewards")
    for folder in (tmp_path / "none", tmp_path / "empty", hidden, stages):
        for stage in ("train", "rollout", "judge", "rewards", "synthesize", "eval", "ablate", "warmup"):
            manifests.check_own(folder, stage)
    # Begun, but without a manifest so far, or where there is none ever; notes of the user's beside it.
    for stage, file in (
        ("train", "fingerprint.json"),
        ("train", "before.json"),
        ("train", "start/base.json"),
        ("ablate", "majority/seed-0/log.txt"),
        ("ablate", "table.md"),
        ("ablate", "variants.md"),
        ("eval", "wemath/responses.jsonl"),
        ("warmup", "warmup.json"),
    ):
        folder = holds(f"{stage}-{file.replace('/', '-')}", file, "notes.md")
        manifests.check_own(folder, stage)
        with pytest.raises(ShardError, match="give a new folder"):
            manifests.check_own(folder, "judge")
    # Where runs lie is no place for one.
    for folder in (holds("runs", train="train", rollouts="rollout"), holds("more", "ablate/majority/seed-0/log.txt")):
        with pytest.raises(ShardError, match=r"holds (train|ablate)/, which no train stage"):
            manifests.check_own(folder, "train")


def test_all_benchmarks_leave_the_summary_of_a_run_alone(tiny, tmp_path):
    manifests.write(tmp_path / "run", stage="train", config={}, seed=0, model=None)
    with pytest.raises(ShardError, match="holds the output of the stage train, not of eval"):
        eval_run.main(eval_run.Config(model=tiny, data=str(tmp_path), out=tmp_path / "run"))


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (train_upt.main, lambda out: train_upt.Config(out=out)),
        (rollout.main, lambda out: rollout.Config(out=out)),
        (judge.main, lambda out: judge.Config(out=out)),
        (rewards.main, lambda out: rewards.Config(rollouts=out / "rollouts", out=out)),
        (synthesize.main, lambda out: synthesize.Config(out=out)),
        (warmup.main, lambda out: warmup.Config(out=out)),
        (ablate.main, lambda out: ablate.Config(out=out)),
        (eval_run.main, lambda out: eval_run.Config(out=out, data=str(out))),
    ],
)
def test_every_script_that_writes_a_folder_holds_it(tmp_path, main, config):
    with holding(tmp_path):
        with pytest.raises(FolderInUse, match=f"{tmp_path} is in use"):
            main(config(tmp_path))


def test_a_mistake_leaves_no_folder(tiny, tmp_path):
    for _ in range(2):
        with pytest.raises(SettingError):
            train_upt.main(train_upt.Config(model=tiny, out=tmp_path / "runs" / "x", reward="nonsense"))
        assert not (tmp_path / "runs").exists()
