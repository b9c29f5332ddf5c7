"""The Makefile's variables, and whole runs on the hub's data sets from an offline cache."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.hubcache import make_hub_dataset
from upt.data import shapes
from upt.groups import shards
from upt.run.cli import BY_MAKE

ROOT = Path(__file__).parent.parent
VARIABLES = re.findall(r"^(\w+)\s*\?=", (ROOT / "Makefile").read_text(), re.M)


def make(*arguments: str, **extra: str) -> subprocess.CompletedProcess:
    """Run it with nothing in its environment that it would take a variable from, but what is given as `extra`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in VARIABLES}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=own | extra)


def commands(*arguments: str, **extra: str) -> str:
    """What make would run, on one line."""
    done = make("-n", "--no-print-directory", "-o", ".venv/.ready-torch--2.13.0", *arguments, **extra)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").split())


ALL = "MODEL=a/b REWARD=r ADVANTAGE=v STEPS=3 SEED=5 REWARDS=r SEEDS=2 OUT=o RUN=u GPUS=2 ARGS=--x".split()
GIVEN = {target: [given for given in ALL if given.split("=")[0] in of.split()] for target, of in {
    "train": "MODEL REWARD ADVANTAGE STEPS SEED OUT GPUS ARGS", "rollout": "MODEL STEPS SEED OUT GPUS ARGS",
    "judge": "MODEL OUT GPUS ARGS", "score": "REWARD ADVANTAGE SEED OUT ARGS", "eval": "MODEL SEED OUT RUN GPUS ARGS",
    "synth": "MODEL SEED OUT GPUS ARGS", "ablate": "MODEL REWARDS ADVANTAGE STEPS SEEDS OUT GPUS ARGS",
    "export": "RUN OUT ARGS", "warmup": "SEED ARGS",
    "report": "RUN OUT ARGS", "runs": "ARGS", "ask": "RUN MODEL ARGS", "check-data": "SEED OUT ARGS",
}.items()}  # fmt: skip


@pytest.mark.parametrize("target", GIVEN)
def test_what_make_prints_is_as_one_would_type_it(target):
    """One blank between two words, whatever is given, and the name of nothing that is not."""
    for given in ([], *([one] for one in GIVEN[target]), GIVEN[target]):
        done = make("-n", "--no-print-directory", "-o", ".venv/.ready-torch--2.13.0", "-o", "models/tiny/warmup.json",
                    target, *given)  # fmt: skip
        line = done.stdout.replace("\\\n\t", "\\\n").replace(" \\\n  ", " ").strip("\n")
        assert "  " not in line and line == line.strip() and '""' not in line, line


@pytest.mark.parametrize("target", ["train", "ablate", "export", "warmup"])
def test_a_script_knows_which_variables_its_target_takes(target, tmp_path):
    more = tmp_path / "more.mk"
    more.write_text(f"override PY := echo $${BY_MAKE}; true\n{more}: ;\n")
    done = make("-s", "-f", "Makefile", "-f", str(more), "-o", ".venv/.ready-torch--2.13.0",
                "-o", "models/tiny/warmup.json", target)  # fmt: skip
    taken = [given.split("=")[0] for given in GIVEN[target]]
    assert {name for name in done.stdout.split() if name in {given.split("=")[0] for given in ALL}} == {*taken}


def test_help_is_the_default_and_lists_every_target():
    text = make().stdout
    for target in "help setup warmup train rollout judge score eval synth ablate results test lint bench clean".split():
        assert any(line.split()[0] == target and len(line.split()) > 2 for line in text.splitlines()[1:]), target


def test_variables_are_flags():
    shown = commands(
        "train", "DATA=geoqa", "MODEL=a/b", "REWARD=random(seed=1)", "ADVANTAGE=mean", "STEPS=3", "SEED=5",
        "OUT=runs/z", "ARGS=--top-k 7",
    )  # fmt: skip
    expected = (
        'train_upt.py --data "geoqa" --model "a/b" --seed "5" --reward "random(seed=1)" --advantage "mean" --steps "3" '
        '--out "runs/z" --top-k 7'
    )
    assert expected in shown and "warmup.py" not in shown
    assert "warmup.py --out models/tiny" in commands("train", "-B")
    assert "warmup.py" not in commands("train", "-B", "DATA=geoqa") and "warmup.py" in commands(
        "train", "-B", "DATA=geoqa", "MODEL=models/tiny"
    )
    for mixture in ("shapes,runs/q", "geoqa:3,shapes:1", "shapes-hard", "geoqa,shapes-hard", "geoqa:3,shapes-hard:1"):
        shown = commands("train", "-B", f"DATA={mixture}")
        assert "warmup.py" in shown and f'train_upt.py --data "{mixture}" --out' in shown
    assert "warmup.py" not in commands("train", "-B", "DATA=geoqa,runs/shapes")
    assert "warmup.py" not in commands("train", "-B", "DATA=runs/shapes-hard")
    assert '--out "runs/benchmarks"' in commands("eval", "BENCH=all", "DATA=d")
    asked = commands("synth", "DATA=d", "ARGS=--mode direct")
    assert 'synthesize.py --data "d" --out "runs/questions" --mode direct' in asked
    assert 'judge.py --rollouts runs/rollouts --model "a/b" --out "runs/j" --judge-mode text' in commands(
        "judge", "MODEL=a/b", "OUT=runs/j", "ARGS=--judge-mode text"
    )
    assert 'rewards.py --rollouts runs/rollouts --reward "frequency"' in commands("score", "REWARD=frequency")
    assert '-m eval.heldout --data "shapes" --adapter x' in commands("eval", "ARGS=--adapter x")
    shown = commands("eval", "-B", "RUN=runs/t")  # which brings its own model and data
    assert shown.endswith('-m eval.heldout --run "runs/t"') and "warmup.py" not in shown
    shown = commands("eval", "RUN=runs/t", "DATA=geoqa", "SEED=2", "OUT=x.json")
    assert shown.endswith('-m eval.heldout --run "runs/t" --data "geoqa" --seed "2" --out "x.json"')
    assert (
        '-m eval.run --benchmark "wemath" --data "d" --run "runs/t" --out "runs/t/benchmarks/wemath" --n 2'
        in commands("eval", "BENCH=wemath", "DATA=d", "RUN=runs/t", "ARGS=--n 2")
    )
    shown = commands(
        "ablate", "DATA=geoqa", "MODEL=a/b", "REWARDS=majority judged(t_h=.9)@rloo", "ADVANTAGE=mean", "STEPS=3",
        "SEEDS=2", "OUT=runs/z", "ARGS=--learning-rate 2e-4",
    )  # fmt: skip
    assert (
        'ablate.py --data "geoqa" --model "a/b" --rewards "majority judged(t_h=.9)@rloo" --advantage "mean" '
        '--steps "3" --seeds "2" --out "runs/z" --learning-rate 2e-4'
    ) in shown
    assert "warmup.py" in commands("ablate", "-B") and "warmup.py" not in commands("ablate", "-B", "ARGS=--rollouts x")


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "train REWARDS=frequency",
            "make train does not use REWARDS (did you mean REWARD?); it takes ADVANTAGE ARGS",
        ),
        ("train reward=frequency", "make train does not use reward (did you mean REWARD?)"),
        ("ablate REWARD=frequency", "make ablate does not use REWARD (did you mean REWARDS?);"),
        ("score DATA=geoqa", "make score does not use DATA;"),
        ("judge STEPS=3 BENCH=all", "does not use"),
        ("train STEP=4", "make train does not use STEP (did you mean STEPS?)"),
        ("clean OUT=x", "make clean does not use OUT; it takes no variables"),
        ("SEEDS=3", "make help does not use SEEDS"),
    ],
)
def test_a_variable_that_the_target_does_not_use_is_refused(words, said):
    done = make("-n", *words.split(" "))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().split("\n")) == 1


def test_a_target_that_is_none_is_refused():
    done = make("trian")
    assert done.returncode == 2 and done.stderr.split("\n")[0] == "error: there is no target trian; make lists them"


def test_variables_of_several_targets_and_of_the_environment_are_no_mistake():
    shown = commands("rollout", "score", "DATA=shapes", "REWARD=frequency", REWARDS="of something else")
    assert "rewards.py" in shown


def test_lint_leaves_files_of_the_users_own_alone():
    words = commands("lint").split("ruff check ")[1].split()
    assert "." not in words and "mine.py" not in words and {"train_upt.py", "upt", "tests"} <= {*words}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert all(path.split("/")[0] in words for path in tracked)


@pytest.mark.parametrize("target", ["train", "rollout", "judge", "synth", "eval", "ablate"])
def test_gpus_are_handed_on(target):
    assert '--gpus "2"' in commands(target, "GPUS=2") and "--gpus" not in commands(target, "GPUS=1")


def picture(n: int) -> bytes:
    buffer = io.BytesIO()
    shapes.questions("train", 0, n + 1)[n].image.resize((120, 90)).save(buffer, "PNG")
    return buffer.getvalue()


HUB = {
    "geoqa": (
        "leonardPKU/GEOQA_R1V_Train_8K",
        {
            "train": [
                {"image": picture(n), "problem": f"Find x{n}.", "solution": f"<answer> {n}° </answer>"}
                for n in range(9)
            ]
        },
    ),
    "geometry3k": (
        "hiyouga/geometry3k",
        {
            split: [{"images": [picture(n)], "problem": f"<image>Find x{n}.", "answer": str(n)} for n in range(6)]
            for split in ("train", "validation", "test")
        },
    ),
    "mmr1": (
        "MMR1/MMR1-Math-RL-Data-v0",
        {
            split: [{"images": [picture(n)], "problem": f"<image>Find x{n}.", "answer": str(n)} for n in range(6)]
            for split in ("train", "validation")
        },
    ),
}


@pytest.mark.parametrize(
    "name", ["geoqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("geometry3k", "mmr1"))]
)
def test_a_run_on_a_hub_set_from_an_offline_cache(name, tiny, tmp_path):
    make_hub_dataset(tmp_path / "hf" / "hub", *HUB[name])
    out = tmp_path / "run"
    flags = ["--data", name, "--model", tiny, "--steps", "2", "--out", str(out)]
    flags += "--questions-per-step 3 --group-size 2 --max-new-tokens 8 --eval-questions 4 --eval-samples 2".split()
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [sys.executable, "train_upt.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    groups = list(shards.ShardReader(out / "rollouts"))
    assert len(groups) == 6 and all(group["uid"].startswith(f"{name}/train/") for group in groups)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["greedy"]["value"] >= 0 and summary["config"]["data"] == name
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny), out / "adapter")
