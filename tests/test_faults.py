"""Faults from outside, each of them injected: nothing is lost, one line says what to do, the same command goes on."""

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

import export
from tests.test_settings import no_file_over
from tests.test_team import apart, call, children, done, flags, script, tokens
from tests.test_train import SMALL, same
from train_upt import Config, main
from upt import hub
from upt.errors import ShardError, StorageError, UserError
from upt.model.policy import Policy

ROOT = Path(__file__).parent.parent
STEPS = SMALL | {"steps": 3, "questions_per_step": 4, "minibatches": 2, "kl_coef": 0.1, "save_every": 1}
STEPS |= {"reward": "random", "eval_questions": 4, "eval_samples": 2, "lora_rank": 8}


def go(tiny: str, out: Path) -> Path:
    main(Config(model=tiny, out=out, **STEPS))
    return out


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    return go(tiny, tmp_path_factory.mktemp("undisturbed") / "run")


def is_like(run: Path, undisturbed: Path) -> bool:
    """Whether a run has ended as the undisturbed one did: its adapter, its shards, its scores, and no file besides."""
    left = [{str(path.relative_to(of)) for path in of.rglob("*")} for of in (run, undisturbed)]
    scores = [(of / "after.json").read_bytes() for of in (run, undisturbed)]
    samples = [tokens(of / "rollouts") for of in (run, undisturbed)]
    return same(run, undisturbed) and left[0] == left[1] and scores[0] == scores[1] and samples[0] == samples[1]


# ------------------------------------------------------------------------------------------------ the disk


BEGUN = ["fingerprint.json", "rollouts/manifest.json", "manifest.json"]


@pytest.mark.parametrize(("there", "size", "file"), [
    ([], 1500, "fingerprint.json"),
    (BEGUN, 500, r"held-out/images/\w+.png"),
    ([*BEGUN, "held-out/images"], 1500, "before.json"),
    ([*BEGUN, "before.json"], 500, r"rollouts/images/\w+.png"),
    ([*BEGUN, "before.json"], 5000, "rollouts/step-000000.jsonl"),
    ([*BEGUN, "before.json"], 50_000, "checkpoints/.step-000001.partial/adapter"),
    ([*BEGUN, "before.json"], 100_000, "checkpoints/step-000001"),  # of the optimizer's file
])  # fmt: skip
def test_a_disk_that_is_full_in_the_middle_of_a_file(tiny, undisturbed, tmp_path, there, size, file, capsys):
    """Of a run that was killed when these files were there, the next one over `size` bytes is cut off."""
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    for name in there:
        (run / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (undisturbed / name).is_dir() else shutil.copy)(undisturbed / name, run / name)
    with no_file_over(size), pytest.raises(StorageError) as error:
        go(tiny, run)
    said = "no larger files may be written here .ulimit -f.; what was written before is whole: make room and .*same"
    assert re.match(f"{re.escape(str(run))}/{file}: {said}", str(error.value)) and "\n" not in str(error.value)
    assert "page" not in capsys.readouterr().err  # for which there is no room, either
    assert is_like(go(tiny, run), undisturbed)


@pytest.mark.parametrize("known", [True, False])
def test_a_disk_that_is_read_only(tiny, tmp_path, monkeypatch, known):
    """One that says so when asked, and one that says so when it is written to."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **how: not (known and mode & os.W_OK) and real(path, mode, **how)
    )

    def refused(path, *arguments, **how):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(Policy, "load", lambda *_, **how: pytest.fail("a model is loaded"))
    words = "may not be written to; give another --out" if known else "the disk is read-only: give another path"
    with pytest.raises(StorageError, match=f"{re.escape(str(tmp_path))}.*{words}"):
        go(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size, only", [(200, False), (3000, False), (100_000, False), (3000, True)])
def test_a_disk_that_is_full_while_a_model_is_exported(undisturbed, tmp_path, size, only):
    config = export.Config(run=undisturbed, out=tmp_path / "exports" / "mine", dtype="fp32", adapter_only=only)
    with no_file_over(size), pytest.raises(StorageError, match="no larger files may be written here.*same command"):
        export.main(config)
    assert not [*tmp_path.iterdir()]
    export.main(config)
    assert (config.out / "README.md").is_file() and [*config.out.parent.iterdir()] == [config.out]


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(tiny, undisturbed, tmp_path, monkeypatch):
    """Every file that is put to disk for good, one after the other, is the one for which there is no room."""
    real, calls, failing = os.fsync, [], None

    def fsync(handle):
        calls.append(1)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    go(tiny, tmp_path / "all")
    count = len(calls)
    assert count > 20
    page = 2  # the last calls, of report.html and its folder: a run ends well without it (test_report.py)
    for failing in range(1, count + 1 - page):  # noqa: B007 - read by fsync
        calls.clear()
        with pytest.raises(StorageError, match="no space left on the disk"):
            go(tiny, tmp_path / "run")
        calls.clear()
        failing = None
        assert is_like(go(tiny, tmp_path / "run"), undisturbed)
        shutil.rmtree(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ what lies there


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def stopped_after_two(undisturbed: Path, out: Path) -> Path:
    """The undisturbed run as it was when two steps and the rollout of the third were made."""
    shutil.copytree(undisturbed, out, ignore=shutil.ignore_patterns("step-000003", "summary.json", "after.json"))
    shutil.rmtree(out / "adapter")
    return out


@pytest.mark.parametrize("damage", [halved, lambda path: path.write_bytes(b""), lambda path: path.write_text("{}\n")])
def test_a_damaged_shard_is_sampled_again(tiny, undisturbed, tmp_path, damage, capfd):
    run = stopped_after_two(undisturbed, tmp_path / "run")
    shard = run / "rollouts" / "step-000002.jsonl"
    damage(shard)
    capfd.readouterr()
    assert is_like(go(tiny, run), undisturbed)
    assert str(shard) in capfd.readouterr().err


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "adapter/adapter_model.safetensors"])
def test_a_checkpoint_that_is_cut_short_is_named_and_the_one_before_serves(tiny, undisturbed, tmp_path, name):
    run = stopped_after_two(undisturbed, tmp_path / "run")
    latest = run / "checkpoints" / "step-000002"
    halved(latest / name)
    with pytest.raises(UserError, match=re.escape(str(latest))) as error:
        go(tiny, run)
    assert isinstance(error.value, ShardError) or "fetch or make it again" in str(error.value)
    shutil.rmtree(latest)  # as the message says
    assert is_like(go(tiny, run), undisturbed)


@pytest.mark.parametrize("name", ["manifest.json", "before.json", "metrics.jsonl"])
def test_a_damaged_record_is_named(tiny, undisturbed, tmp_path, name):
    run = stopped_after_two(undisturbed, tmp_path / "run")
    lines = (run / name).read_text()
    (run / name).write_text("[" + lines[: len(lines) // 2] + "\n")
    with pytest.raises(UserError, match=re.escape(str(run / name))):
        go(tiny, run)
    (run / name).write_text(lines)
    assert is_like(go(tiny, run), undisturbed)


# ------------------------------------------------------------------------------------------------ the process


def files(run: Path) -> tuple[int, int]:
    """How far a run is: steps in its log, files in its folder."""
    log = run / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0, sum(path.is_file() for path in run.rglob("*"))


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def until(holds, process: subprocess.Popen, seconds: float) -> None:
    """Wait for something, or for the end of a process, no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_at_random_moments(tiny, tmp_path):
    """Two processes with minibatches are killed 50 times, one of them or the one that started them, and go on.

    Every other time it waits for a step to be made first, so that half of the kills fall in training.
    """
    settings, run = STEPS | {"steps": 60}, tmp_path / "run"
    done("train_upt.py", *flags(**settings, model=tiny, out=tmp_path / "undisturbed"), size=2)
    command = script("train_upt.py", *flags(**settings, model=tiny, out=run), size=2)
    draw, killed, spoken, moments = random.Random(0), 0, 0, set()
    while killed < 50:
        before = files(run)[0]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if killed % 2:
            until(lambda before=before: files(run)[0] > before, process, 120)
        time.sleep(draw.uniform(0, 1 if killed % 2 else 12))
        begun = children(process)
        if process.poll() is not None:
            assert process.returncode == 0, process.stdout.read()
            shutil.rmtree(run)  # it had ended: once more from the start
            continue
        moment, rank = files(run), draw.choice([None, *begun])
        os.kill(process.pid if rank is None else begun[rank], signal.SIGKILL)
        killed += 1
        said = process.communicate(timeout=60)[0]
        assert "Traceback" not in said
        if rank is not None and process.returncode:  # who started it lives on and says so
            assert process.returncode == 2, said
            which = f"process {rank} of 2 was ended by SIGKILL"
            assert said.splitlines()[-1] == f"error: {which}, and so the others were; the same command goes on"
            spoken += 1
        deadline = time.monotonic() + 60
        while alive(begun.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(begun.values())
        if moment[0]:
            moments.add(moment)
    print(f"{killed} kills, {len(moments)} at different moments of the training, {spoken} of one process")
    assert len(moments) >= 20 and spoken >= 20
    again = call(command)
    assert again.returncode == 0, again.stderr
    assert tokens(run / "rollouts") == tokens(tmp_path / "undisturbed" / "rollouts")
    assert apart(run, tmp_path / "undisturbed") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_that_were_stopped_go_on_to_the_same_bits(tiny, tmp_path, number):
    settings = STEPS | {"steps": 12}
    done("train_upt.py", *flags(**settings, model=tiny, out=tmp_path / "undisturbed"), size=2)
    run = tmp_path / "run"
    command = script("train_upt.py", *flags(**settings, model=tiny, out=run), size=2)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    until(lambda: files(run)[0] > 1, process, 120)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number, (tmp_path / "log").read_text()
    made = files(run)[0]
    assert 1 < made < 12 and (run / "checkpoints" / f"step-{made:06d}" / "state.json").is_file()
    assert call(command).returncode == 0
    assert tokens(run / "rollouts") == tokens(tmp_path / "undisturbed" / "rollouts")
    assert same(run, tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def silent():
    """The address of a server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("setting", ["model", "data"])
@pytest.mark.parametrize("answers", [False, None])
def test_a_hub_that_does_not_answer(tiny, tmp_path, silent, setting, answers):
    address = silent if answers is None else "http://127.0.0.1:9"  # nobody listens at the second
    given = {"model": tiny, "data": "shapes", "steps": 1} | {setting: "nobody/nothing"}
    env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_ETAG_TIMEOUT": "1"}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "NO_PROXY": "*", "no_proxy": "*"}
    made = call([sys.executable, "train_upt.py", *flags(**given, out=tmp_path / "run")], **env)
    assert made.returncode == 2 and made.stderr.startswith("error: ") and made.stderr.count("\n") == 1, made.stderr
    assert "nobody/nothing" in made.stderr and not (tmp_path / "run").exists()
    assert "HF_HUB_OFFLINE=1 takes what the caches have and HF_HUB_ETAG_TIMEOUT=6 waits longer than 1 s" in made.stderr


def test_a_silent_hub_is_waited_for_once(silent, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    close_session()  # one that is open keeps to the proxy it has found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    begun = time.monotonic()
    assert "the hub does not answer" in hub.why_unreachable("a/b", "dataset")
    assert 1 <= time.monotonic() - begun < 9  # not again and again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable("a/b", "dataset") is None
