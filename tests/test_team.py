"""Several processes: they find what one finds, go on in any number, stop together, and none is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from eval import heldout
from tests.datafiles import jsonl
from tests.test_eval_run import vision_folder
from tests.test_judge import SAID
from tests.test_train import SMALL, adapter
from upt.data import shapes
from upt.errors import Lost, PolicyError, SettingError, Stopped, UserError
from upt.groups import shards
from upt.model import update
from upt.run import processes, progress
from upt.run.locking import holding
from upt.run.metrics import Clock
from upt.run.stopping import stop_on_signal
from upt.run.team import Team, assemble

ROOT = Path(__file__).parent.parent
STEPS = SMALL | {"steps": 2, "questions_per_step": 5, "minibatches": 2, "kl_coef": 0.1, "save_every": 1}
STEPS |= {"reward": "random", "eval_questions": 7, "eval_samples": 2}


def flags(**settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def script(*command: str, size: int) -> list[str]:
    return [sys.executable, *command, f"--gpus={size}", "--device=cpu"]


# Runs a script whose processes note in a file what they sample, judge and update on, by step and tokens. The last of
# them is slow at step 0, and says that it needs much memory; each has another card.
SPY = """
import json, os, runpy, sys, time
if "RANK" in os.environ:
    from upt.model import update
    from upt.run import metrics, resuming
    from upt.stages import judging, sampling
    rank, last = os.environ["RANK"], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    def note(**what):
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps({"rank": int(rank)} | what) + chr(10))
    def sample(policy, prompts, step, *rest, old=sampling.sample_groups):
        note(did="sample", step=step, uids=[prompt.uid for prompt in prompts])
        time.sleep(last and step == 0)
        return old(policy, prompts, step, *rest)
    def judge(policy, prompts, groups, *rest, old=judging.judge):
        note(did="judge", step=groups[0]["step"], tokens=[update.tokens_of(group) for group in groups])
        return old(policy, prompts, groups, *rest)
    def accumulate(policy, prompts, groups, *rest, old=update.accumulate):
        tokens = [update.tokens_of(group) for prompt, group in zip(prompts, groups) if prompt is not None]
        note(did="update", step=groups[0]["step"], minibatch=groups[0]["uid"], tokens=tokens)
        return old(policy, prompts, groups, *rest)
    sampling.sample_groups, judging.judge, update.accumulate = sample, judge, accumulate
    metrics.peak_memory_gib = lambda: 1000 + 1000 * last
    resuming.machine = lambda device: f"card {rank}"
sys.path.insert(0, ".")
runpy.run_path(os.environ["SCRIPT"], run_name="__main__")
"""


def noted(path: Path, did: str) -> dict[tuple, dict[int, dict]]:
    """What the spy has noted of one kind, by step and minibatch, and by rank."""
    found = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if row["did"] == did:
            of = found.setdefault((row["step"], row.get("minibatch")), {})
            assert row["rank"] not in of or row["step"] < 0  # held-out questions are answered twice
            of[row["rank"]] = row
    return found


def check_even(parts: dict[tuple, dict[int, dict]], size: int, groups: int) -> None:
    """Of each step, or minibatch, the tokens are shared as evenly as whole groups can be; each group has one owner."""
    for of in parts.values():
        loads = [sum(of[rank]["tokens"]) if rank in of else 0 for rank in range(size)]
        largest = max(max(row["tokens"], default=0) for row in of.values())
        assert max(loads) - min(loads) <= largest
    assert sum(len(row["tokens"]) for of in parts.values() for row in of.values()) == groups


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | extra


def call(command: list[str], **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(**extra), timeout=300)


def done(*command: str, size: int, **extra: str) -> str:
    """What a script prints that is run as so many processes and has to end well."""
    made = call(script(*command, size=size), **extra)
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


def children(process: subprocess.Popen) -> dict[int, int]:
    """The ids of the processes that this one has started, by their rank; without one that has ended."""
    found, listed = {}, Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in listed.read_text().split() if process.poll() is None else ():
        try:
            own = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(of.removeprefix(b"RANK=")): int(pid) for of in own if of.startswith(b"RANK=")}
    return found


def tokens(folder: Path) -> list:
    """Of every step the uids and the token ids of the responses, in the order of the shard."""
    return [
        [(g["uid"], [r["token_ids"] for r in g["responses"]]) for g in shards.read_shard(path)]
        for path in shards.list_shards(folder)
    ]


def apart(one: Path, two: Path) -> float:
    """How far two adapters are from each other, relative to their size."""
    a, b = (torch.cat([of[name].flatten().double() for name in sorted(of)]) for of in map(adapter, (one, two)))
    return float((a - b).norm() / a.norm())


# ------------------------------------------------------------------------------------------------ the team


def test_costs_are_shared_evenly_and_what_can_stays_at_home():
    team = Team(0, 2)
    # 5 at home in 0, and 4 in 1; then 3 goes where less is, since 5 + 3 is over the fair 7; 2 at home again.
    assert team.even([5, 4, 3, 2], [0, 1, 0, 0]) == [0, 1, 1, 0]
    assert team.even([1, 1, 1, 1], [1, 1, 1, 0]) == [1, 1, 0, 0]
    assert team.even([7.0], [1]) == [0]  # more than half of all: wherever there is least
    assert team.even([], []) == []
    random = np.random.default_rng(0)
    for size in (2, 3, 8):
        costs, homes = random.integers(1000, 9000, 128).tolist(), random.integers(0, size, 128).tolist()
        owners = Team(0, size).even(costs, homes)
        loads = [sum(c for c, owner in zip(costs, owners) if owner == rank) for rank in range(size)]
        assert max(loads) < 1.03 * sum(costs) / size
        assert sum(owner == home for owner, home in zip(owners, homes)) > 90  # few have to move


def test_alone_everything_is_done_here():
    team = Team()
    assert team.first and team.together(lambda: 3) == [3] and team.once(lambda: 4) == 4
    assert team.spread(lambda items: [2 * item for item in items], [1, 2, 3]) == [2, 4, 6]
    gradient = torch.ones(2)
    team.add([gradient])
    assert gradient.tolist() == [1, 1]


TALK = """
import json, time
from upt.errors import DataError, Elsewhere, Stopped
import torch
from upt.run.team import assemble

team = assemble("cpu")
found = {"together": team.together(lambda: team.rank), "once": team.once(lambda: team.rank)}
mine = team.here(lambda: 10 * team.rank)
found["here"] = team.together(lambda: mine)
found["spread"] = team.spread(lambda items: [(item, team.rank) for item in items], "abcde")
found["owned"] = team.spread(lambda items: [(item, team.rank) for item in items], "abc", [2, 0, 2])
mine = team.in_turn(time.monotonic)
found["in turn"] = team.together(lambda: mine)
tensors = [torch.full((2,), float(team.rank)), torch.tensor(1.0)]
team.add(tensors)
found["sums"] = [tensor.tolist() for tensor in tensors]

def fails(kind):
    def work():
        if team.rank == 1:
            raise kind
    return work

for name, work in {
    "parted": lambda: (team.here if team.first else team.once)(str, f"runs/{team.rank}"),
    "short": lambda: team.spread(lambda items: [], "abc"),
}.items():
    try:
        work()
    except Exception as raised:
        found[name] = [type(raised).__name__, str(raised)]

errors = {"data": DataError("a row"), "bug": ZeroDivisionError("by zero"), "stop": Stopped(15, "SIGTERM")}
for name, error in errors.items():
    try:
        team.together(fails(error))
    except (Exception, Stopped) as raised:
        mine = [type(raised).__name__, str(raised)]
    found[name] = team.together(lambda: mine)
if team.first:
    print(json.dumps(found))
"""


def test_a_meeting():
    code = f"from upt.run import processes; processes.run(3, [{sys.executable!r}, '-c', {TALK!r}])"
    made = call([sys.executable, "-c", code])
    found = json.loads(made.stdout)
    assert found["together"] == [0, 1, 2] and found["once"] == 0 and found["here"] == [0, 10, 20]
    assert found["in turn"][0] == min(found["in turn"])
    assert found["spread"] == [["a", 0], ["b", 1], ["c", 2], ["d", 0], ["e", 1]]
    assert found["owned"] == [["a", 2], ["b", 0], ["c", 2]]
    assert found["sums"] == [[3.0, 3.0], 3.0]
    there = ["Elsewhere", "a row (in process 1)"]
    assert found["data"] == [there, ["DataError", "a row"], there]
    assert found["bug"][0] == ["Broken", "ZeroDivisionError: by zero (in process 1)"]
    kind, said = found["parted"]
    assert kind == "RuntimeError" and "process 0 at str(runs/0); process 1 at str(runs/1); process 2 at" in said
    assert found["short"][0] == "ValueError" and "gave 0 results for 1 items" in found["short"][1]
    assert found["stop"] == [["Stopped", "stopped by SIGTERM"]] * 3


LEAVING = """
import glob, sys, time, torch
from contextlib import suppress
from pathlib import Path
from upt.run.team import assemble, leave
def names():
    found = ""
    for path in glob.glob("/proc/self/task/*/comm"):
        with suppress(OSError):
            found += Path(path).read_text()
    return found
team = assemble("cpu")
team.add([torch.ones(2)])
from upt.model.policy import Policy  # as a script does: what it needs is imported after the team is there
Policy.load(sys.argv[1])
leave()
end = time.monotonic() + 10
while any(of in (threads := names()) for of in ("gloo", "store")) and time.monotonic() < end:
    time.sleep(.05)  # one that was joined may be listed for a moment
if team.first:
    print(threads)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_the_team_is_left_when_the_interpreter_ends(tiny):
    """It could hold a tensor, and to let go of one in an interpreter that ends aborts the process."""
    code = f"from upt.run import processes; processes.run(2, [{sys.executable!r}, '-c', {LEAVING!r}, {tiny!r}])"
    made = call([sys.executable, "-c", code])
    assert "python" in made.stdout and not re.search("gloo|store", made.stdout), made.stdout + made.stderr


def test_of_what_a_collective_raises_only_a_closed_connection_is_a_lost_process(monkeypatch):
    def fails(error):
        def work(*args, **options):
            raise error

        monkeypatch.setattr(torch.distributed, "all_reduce", work)
        Team(0, 2).add([torch.ones(1)])

    said = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5516: Connection reset by peer."
    for error in (RuntimeError(said), RuntimeError("Connection closed by peer"), RuntimeError("write: Broken pipe")):
        with pytest.raises(Lost, match="has ended without a word"):
            fails(error)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), torch.distributed.DistBackendError("NCCL error: 3")):
        with pytest.raises(type(error), match=str(error)):
            fails(error)


def test_adapters_that_differ_are_refused():
    class Two(Team):
        def together(self, work, *arguments):
            return [work(*arguments), update.digest(others)]

    ours, others = (SimpleNamespace(trainable=lambda layer=layer: [layer]) for layer in (torch.ones(3), torch.ones(3)))
    update.check_same(ours, 4, Two(0, 2))
    others.trainable()[0][2] += 1e-7
    with pytest.raises(PolicyError, match="after 4 steps process 1 has another adapter than process 0"):
        update.check_same(ours, 4, Two(0, 2))


def test_seconds_are_counted_once():
    ticks = iter([0, 1, 4, 10])
    clock = Clock()
    with patch("upt.run.metrics.time.perf_counter", lambda: next(ticks)), clock("rollout"), clock("data"):
        pass
    assert clock.seconds == {"data": 3, "rollout": 7}  # of 10 seconds 3 inside


def test_a_bar_counts_what_the_others_do():
    bar = SimpleNamespace(n=0, total=7)
    bar.update = lambda count: setattr(bar, "n", bar.n + count)
    for n in (2, 4, 6, 7):  # of the 7 the first has 4
        progress.advance(bar, 1, Team(0, 2))
        assert bar.n == n


@pytest.mark.parametrize(
    "environment, gpus, expected",
    [
        ({}, 1, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, 1),
        ({"RANK": "1"}, 1, 1),  # of nothing
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 2),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, 2),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 4, "--gpus 4 is for the command line"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 4, "--gpus 4, and 2 processes were started: leave it out, or start 4"),
        ({"RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 1, "16 processes were started on several nodes"),
    ],
)
def test_who_is_there_is_told_by_the_environment(monkeypatch, environment, gpus, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(SettingError, match=expected):
            processes.check(gpus)
    else:
        assert processes.check(gpus) == expected == processes.size()
        assert processes.rank() == (expected > 1) and processes.is_started() == (expected > 1)


LATER = """
while not told.exists():
    sleep(.01)
sleep(.5)
os.abort()
"""
# What each of two processes does, and what comes of it: an exit status or an error, and what is printed.
ENDS = {
    "one fails, the first aborts because of it": (LATER, "say('bye'); told.touch(); sys.exit(1)", 1, "bye"),
    "the first has passed it on": ("sys.exit(4)", "say('bye'); sys.exit(1)", 1, ""),
    "both make the same mistake": ("sleep(.3); sys.exit(2)", "say('bye'); sys.exit(2)", 2, ""),
    "one is killed": ("sleep(.3); sys.exit(3)", "os.kill(os.getpid(), 9)", "process 1 of 2 was ended by SIGKILL", ""),
    "one aborts with a message": ("sleep(.3); sys.exit(3)", "say('bye'); os.abort()", "ended by SIGABRT", "bye"),
    "all know but that others are gone": ("sys.exit(3)", "sys.exit(3)", "2 processes of this command lost each", ""),
    "all is well": ("pass", "say('noise')", 0, ""),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_first_to_fail_gives_the_reason(how, capfd, tmp_path):
    *does, expected, said = ENDS[how]
    code = "import os, pathlib, sys; from time import sleep\n"
    code += f"say, told = lambda text: print(text, file=sys.stderr, flush=True), pathlib.Path('{tmp_path}/told')\n"
    code += f"exec({does}[int(os.environ['RANK'])])"
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            processes.run(2, [sys.executable, "-c", code])
    else:
        assert processes.run(2, [sys.executable, "-c", code]) == expected
    assert capfd.readouterr().err.strip() == said


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_where_no_safe_point_is(name):
    number = getattr(signal, name)
    sleeper = "import time; print('up', flush=True); time.sleep(60)"
    code = f"import sys; from upt.run import processes; sys.exit(processes.run(2, [sys.executable, '-c', {sleeper!r}]))"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert [run.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    run.send_signal(number)
    assert run.communicate(timeout=60)[1] == f"stopped by {name}\n" and run.returncode == 128 + number


def test_a_signal_that_is_to_be_ignored_is():
    """As by nohup, when the terminal is closed."""
    work = "import time; print('up', flush=True); time.sleep(2)"
    code = "import signal, sys; from upt.run import processes; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code += f"sys.exit(processes.run(2, [sys.executable, '-c', {work!r}]))"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert [run.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    run.send_signal(signal.SIGHUP)
    assert run.communicate(timeout=60)[1] == "" and run.returncode == 0


def test_a_run_of_one_process_ignores_what_is_to_be_ignored(tmp_path):
    """As the shell has it for Ctrl-C in what it runs in the background of a script."""
    went_on = []
    for number, usual in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        before = signal.signal(number, usual)
        try:
            with suppress(Stopped), stop_on_signal(tmp_path) as check:
                os.kill(os.getpid(), number)
                check()
                went_on.append(number)
        finally:
            signal.signal(number, before)
    assert went_on == [signal.SIGINT]


@pytest.mark.parametrize("usual", ["SIG_DFL", pytest.param("SIG_IGN", marks=pytest.mark.slow)])
def test_processes_end_though_who_started_them_ended_before_they_looked(usual):
    work = f"import signal, time; signal.signal(signal.SIGTERM, signal.{usual})\n"
    work += "print('up', flush=True); time.sleep(2)\n"
    work += "from upt.run import processes; processes.end_with_parent(); time.sleep(60)"
    code = f"import sys; from upt.run import processes; processes.run(2, [sys.executable, '-c', {work!r}])"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, text=True)
    assert [run.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    run.kill()
    run.communicate(timeout=50)  # raises if one still has its end of the pipe


def test_processes_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SettingError, match="--device cuda:1: each of 2 processes has a GPU of its own"):
        assemble.__wrapped__("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingError, match="2 processes and 1 CUDA devices: give --gpus 1, or fewer"):
        assemble.__wrapped__("auto")


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Questions of which every third has no picture."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for i, item in enumerate(shapes.questions("train", 0, 24)):
        item.image.save(folder / f"{i}.png")
        rows.append({"problem": item.question, "answer": item.gold} | ({"image": f"{i}.png"} if i % 3 else {}))
    jsonl(folder / "train.jsonl", rows)
    return jsonl(folder / "test.jsonl", rows[:8]).parent


@pytest.fixture(scope="module")
def run_by(tiny, mixed, tmp_path_factory) -> Callable[[int], Path]:
    """From how many processes to the run that so many have made; the same run each time."""
    root = tmp_path_factory.mktemp("by")

    @cache
    def run(size: int) -> Path:
        notes = {"SCRIPT": "train_upt.py", "NOTES": str(root / f"{size}.notes")}
        done("-c", SPY, *flags(**STEPS, data=mixed, model=tiny, out=root / str(size)), size=size, **notes)
        return root / str(size)

    return run


SEVERAL = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SEVERAL)
def test_a_run_is_the_same_by_several(run_by, size):
    one, several = run_by(1), run_by(size)
    assert tokens(several / "rollouts") == tokens(one / "rollouts") and len(tokens(one / "rollouts")) == 2
    assert apart(one, several) < 1e-6
    for name in ("before.json", "after.json"):
        ours, theirs = (json.loads((run / name).read_text()) for run in (one, several))
        assert [row["uid"] for row in ours["rows"]] == [row["uid"] for row in theirs["rows"]]
        assert ours["mean"] == theirs["mean"] and ours["greedy"] == theirs["greedy"]
    assert json.loads((several / "manifest.json").read_text())["machine"] == "card 0"
    files = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (one, several)]
    assert files[0] == files[1]
    for ours, theirs in zip(
        *(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (one, several))
    ):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "kl", "ratio", "grad_norm", "logprob_gap_mean", "reward_mean", "clip_low", "entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("size", SEVERAL)
def test_the_work_of_a_run_is_shared(run_by, size):
    notes = run_by(size).with_suffix(".notes")
    groups = [group for step in tokens(run_by(size) / "rollouts") for group in step]
    sampled = noted(notes, "sample")
    for (step, _), of in sampled.items():
        counts = [len(of[rank]["uids"]) for rank in range(size)]
        assert max(counts) - min(counts) <= 1
        uids = [uid for row in of.values() for uid in row["uids"]]
        assert len(uids) == len({*uids}) == (5 if step >= 0 else 7)
    assert {step for step, _ in sampled} == {-1, 0, 1}
    check_even(noted(notes, "update"), size, len(groups))


def test_figures_are_those_of_all(run_by):
    first, second = map(json.loads, (run_by(2) / "metrics.jsonl").read_text().splitlines())
    assert first["seconds"]["rollout"] > 0.7 and first["peak_memory_gib"] == second["peak_memory_gib"] == 2000
    length = sum(len(ids) for _, responses in tokens(run_by(2) / "rollouts")[0] for ids in responses)
    assert first["tokens_per_second"] == pytest.approx(length / first["seconds"]["rollout"])


@pytest.mark.parametrize("size, before", [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_number(tiny, mixed, run_by, tmp_path, size, before):
    out, left = tmp_path / "run", run_by(before)
    shutil.copytree(left, out, ignore=shutil.ignore_patterns("step-000002", "adapter", "summary.json", "after.json"))
    shutil.copytree(left / "checkpoints/step-000001/adapter", out / "checkpoints/step-000001/adapter")
    (out / "rollouts" / "step-000001.jsonl").unlink()
    again = ["--resume"] if size == 1 else flags(**STEPS, data=mixed, model=tiny)
    said = done("train_upt.py", *again, f"--out={out}", size=size)
    assert "going on after step 1 of 2" in said
    assert tokens(out / "rollouts") == tokens(run_by(1) / "rollouts") and apart(out, run_by(1)) < 1e-6


class Begun:
    """A run of two processes that is under way."""

    def __init__(self, tiny: str, out: Path):
        self.out, self.log = out, out.with_suffix(".log")
        self.command = script("train_upt.py", *flags(**STEPS | {"steps": 12}, model=tiny, out=out), size=2)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, env=environment())
        deadline = time.monotonic() + 240
        while "step 2/12" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.children = children(self.process)
        assert {*self.children} == {0, 1}

    def ended(self, within: float) -> tuple[int, str]:
        """Its exit status and what it has said, when all of it is gone."""
        status = self.process.wait(timeout=within)
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.children.values())
        return status, self.log.read_text()

    def goes_on(self, whole: Path) -> int:
        """After how many steps the same command goes on, to the end of the run `whole`, which nothing has stopped."""
        again = call(self.command)
        assert again.returncode == 0, again.stderr
        assert tokens(self.out / "rollouts") == tokens(whole / "rollouts") and apart(self.out, whole) < 1e-6
        assert len((self.out / "metrics.jsonl").read_text().splitlines()) == 12
        return int(re.search(r"going on after step (\d+) of 12", again.stdout)[1])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The run of `Begun`, which nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done("train_upt.py", *flags(**STEPS | {"steps": 12}, model=tiny, out=out), size=2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_nothing_is_lost(tiny, tmp_path, whole, rank):
    run = Begun(tiny, tmp_path / "run")
    os.kill(run.children[rank], signal.SIGKILL)
    status, said = run.ended(within=60)
    assert status == 2 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last == f"error: process {rank} of 2 was ended by SIGKILL, and so the others were; the same command goes on"
    before = len((run.out / "metrics.jsonl").read_text().splitlines())
    assert before - 1 <= run.goes_on(whole) <= before


@pytest.mark.slow
def test_a_signal_stops_all_at_a_safe_point(tiny, tmp_path, whole):
    run = Begun(tiny, tmp_path / "run")
    run.process.send_signal(signal.SIGTERM)
    status, said = run.ended(within=60)
    assert status == 143 and f"stopped by SIGTERM; the same command goes on from {run.out}\n" in said
    assert said.endswith(f"to be opened in a browser: {run.out}/report.html\n") and "Traceback" not in said
    made = len((run.out / "metrics.jsonl").read_text().splitlines())
    assert (run.out / "checkpoints" / f"step-{made:06d}" / "state.json").is_file()
    assert run.goes_on(whole) == made


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tiny, tmp_path):
    run = Begun(tiny, tmp_path / "run")
    run.process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in run.children.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in run.children.values())
    assert "goes on from" in run.log.read_text()


BUG = """
from dataclasses import dataclass
from upt.run import cli
from upt.run.team import assemble
@dataclass
class Config:
    where: str = "here"
    gpus: int = 1
def main(config):
    team = assemble("cpu")
    if config.where == "alone" and not team.first:
        {}["a key"]
    team.together(lambda: None if team.first else {}["a key"])
cli.launch(main, Config)
"""


@pytest.mark.parametrize("where", ["together", "alone"])
def test_a_bug_in_one_process_is_told_once_with_its_traceback(tmp_path, where):
    (tmp_path / "bug.py").write_text(BUG)
    made = call([sys.executable, str(tmp_path / "bug.py"), f"--where={where}", "--gpus=2"], PYTHONPATH=str(ROOT))
    assert made.returncode == 1 and made.stderr.count("Traceback") == 1
    assert made.stderr.count("KeyError: 'a key'\n") == 1 and '{}["a key"]' in made.stderr
    assert ("error: KeyError: 'a key' (in process 1)\n" in made.stderr) == (where == "together")


ASTRAY = """
import os, runpy
if os.environ.get("RANK") == "1":
    from upt.model import update
    def add(policy, team, old=update.add_gradients):
        old(policy, team)
        policy.trainable()[0].grad[0] += 1
    update.add_gradients = add
runpy.run_path("train_upt.py", run_name="__main__")
"""


@pytest.mark.slow
def test_no_checkpoint_is_written_of_adapters_that_differ_and_one_process_scores_for_all(tiny, tmp_path):
    mine = tmp_path / "mine.py"
    note = f"open({str(tmp_path / 'scored')!r}, 'a').write(os.environ.get('RANK', '') + ' ' + group['uid'] + chr(10))"
    mine.write_text(
        f"import os\ndef drawn(group):\n    {note}\n    return [len(r['text']) for r in group['responses']]\n"
    )
    settings = STEPS | {"steps": 1, "eval_questions": 0, "reward": f"{mine}:drawn"}
    made = call(script("-c", ASTRAY, *flags(**settings, model=tiny, out=tmp_path / "run"), size=2))
    assert made.returncode == 2 and made.stderr.count("after 1 steps process 1 has another adapter") == 1, made.stderr
    assert not [*(tmp_path / "run").glob("checkpoints/*")]
    scored = [line.split() for line in (tmp_path / "scored").read_text().splitlines() if "shapes/" in line]
    assert len(scored) == 5 and {rank for rank, _ in scored} == {"0"}


def test_mistakes_are_said_once(tiny, tmp_path):
    made = call(script("train_upt.py", *flags(model=tiny, out=tmp_path / "run", reward="nope"), size=2))
    assert made.returncode == 2 and made.stderr.count("no reward is called 'nope'") == 1
    assert made.stderr.count("\n") == 1 and not made.stdout


# ------------------------------------------------------------------------------------------------ the other scripts


@pytest.mark.slow
def test_stages_are_the_same_by_two(tiny, mixed, tmp_path):
    settings = {name: STEPS[name] for name in ("steps", "questions_per_step", "group_size", "max_new_tokens")}
    for size in (1, 2):
        out = tmp_path / f"rollouts-{size}"
        done("rollout.py", *flags(**settings, data=mixed, model=tiny, out=out), size=size)
    assert tokens(tmp_path / "rollouts-1") == tokens(tmp_path / "rollouts-2")
    source = tmp_path / "rollouts-1"
    for path in shards.list_shards(source):  # responses that can be judged
        groups = shards.read_shard(path)
        for i, of in enumerate(groups):
            for response, text in zip(of["responses"], SAID[i % 3 :] + SAID):
                response["text"] = text
        shards.write_shard(path, groups)
    for size in (1, 2):
        settings = flags(rollouts=source, judge_mode="logit", out=tmp_path / f"judged-{size}")
        done("-c", SPY, *settings, size=size, SCRIPT="judge.py", NOTES=str(tmp_path / f"{size}.notes"))
    check_even(noted(tmp_path / "2.notes", "judge"), 2, sum(map(len, tokens(source))))
    ours, theirs = (
        [r["judge"] for path in shards.list_shards(tmp_path / f"judged-{size}") for g in shards.read_shard(path)
         for r in g["responses"]]
        for size in (1, 2)
    )  # fmt: skip
    assert len({verdict["score"] for verdict in ours}) > 5
    assert [v["score"] for v in theirs] == pytest.approx([v["score"] for v in ours], abs=1e-6)


@pytest.mark.slow
def test_asking_is_the_same_by_two(tiny, mixed, tmp_path):
    data = shutil.copytree(mixed, tmp_path / "data")
    (data / "5.png").write_bytes(b"no picture")  # the second of its shard, which the second process meets
    settings = {"limit": 7, "filters": "agreement,abstention", "group_size": 4, "max_new_tokens": 8}
    settings |= {"questions_per_step": 4, "data": data, "model": tiny}
    for size in (1, 2):
        made = call(script("synthesize.py", *flags(**settings, out=tmp_path / str(size)), size=size))
        assert made.returncode == 0 and "questions kept" in made.stdout, made.stderr
        assert len([line for line in made.stderr.splitlines() if "train/000005" in line or "5.png" in line]) == 1
    one, two = (tmp_path / str(size) for size in (1, 2))
    for part in ("asked", "answered"):
        assert tokens(one / part) == tokens(two / part)
    assert (one / "provenance.jsonl").read_bytes() == (two / "provenance.jsonl").read_bytes()


@pytest.mark.slow
def test_rounds_are_the_same_by_two(tiny, tmp_path):
    settings = STEPS | {
        "steps": 1,
        "minibatches": 1,
        "limit": 8,
        "rounds": 1,
        "synthesize": "direct",
        "filters": "none",
    }
    for size in (1, 2):
        done("train_upt.py", *flags(**settings, model=tiny, out=tmp_path / str(size)), size=size)
    one, two = tmp_path / "1", tmp_path / "2"
    for part in ("questions/asked", "run/rollouts"):
        assert tokens(one / "round-01" / part) == tokens(two / "round-01" / part)
    assert apart(one, two) < 1e-6


@pytest.mark.slow
def test_benchmarks_are_the_same_by_two(tiny, tmp_path):
    vision_folder(tmp_path / "vision")
    settings = {"benchmark": "mathvision", "data": tmp_path / "vision", "max_new_tokens": 6, "n": 2, "temperature": 1.0}
    for size in (1, 2):
        done("-m", "eval.run", *flags(**settings, model=tiny, out=tmp_path / str(size)), size=size)
    for name in ("responses.jsonl", "scores.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_a_benchmark_that_is_in_use_is_left_out_by_all_processes(tiny, tmp_path):
    vision_folder(tmp_path / "root/mathvision")
    row = {"question": "?", "answer": "1", "image": "", "answer_type": "float", "subject": "x", "level": "y"}
    (tmp_path / "root/dynamath").mkdir()
    (tmp_path / "root/dynamath/dataset.json").write_text(json.dumps({"1": row, "2": row}))
    out = tmp_path / "out"
    with holding(out / "mathvision"):
        settings = flags(benchmark="all", data=tmp_path / "root", max_new_tokens=6, model=tiny, out=out)
        done("-m", "eval.run", *settings, size=2)
        assert not (out / "mathvision/responses.jsonl").exists()
    found = json.loads((out / "summary.json").read_text())
    assert set(found["benchmarks"]) == {"dynamath"} and "is in use by" in found["missing"]["mathvision"]
    rows = [*map(json.loads, (out / "dynamath/responses.jsonl").read_text().splitlines())]
    assert sorted(row["id"] for row in rows) == ["1", "2"]


@pytest.mark.slow
def test_scores_are_the_same_by_two(tiny, mixed, tmp_path):
    settings = {"eval_questions": 8, "eval_samples": 2, "max_new_tokens": 8}
    done("-m", "eval.heldout", *flags(**settings, data=mixed, model=tiny, out=tmp_path / "two.json"), size=2)
    config = heldout.Config(data=str(mixed), model=tiny, out=tmp_path / "one.json", **settings)
    heldout.main(config)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [row["uid"] for row in one["rows"]] == [row["uid"] for row in two["rows"]] and one["mean"] == two["mean"]
