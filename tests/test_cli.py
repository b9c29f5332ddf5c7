"""What a user sees at a shell and in a notebook: one line for a mistake, its exit status, the settings in groups."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import ablate
from upt.errors import RunsFailed, SettingError, Stopped, UserError, suggest, suggest_path
from upt.groups import manifests
from upt.run import cli, presets, resuming
from upt.run.settings import Data, Typed, hidden

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "scipy", "matplotlib"}
SCRIPTS = [*(f"{name}.py" for name in "train_upt rollout judge rewards synthesize warmup ablate".split())]
SCRIPTS += [f"eval/{name}.py" for name in "run score compare heldout synthetic".split()]


@pytest.fixture
def shell(tmp_path):
    """A command in an empty folder."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        words = [str(ROOT / word) if word in SCRIPTS else word for word in words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=environment)

    return run


MISTAKES = [  # command, what its one line says; TINY is a model that is there
    ("train_upt.py --reward majorty --model TINY", "no reward is called 'majorty'; did you mean 'majority'?"),
    ("train_upt.py --reward judged(lam_pso=1) --model TINY", "no setting 'lam_pso'; did you mean 'lam_pos'?"),
    ("train_upt.py --reward nothing.py:mine --model TINY", "nothing.py: no such file"),
    ("train_upt.py --advantage group-nrm --model TINY", "did you mean 'group-norm'?"),
    ("train_upt.py --stpes 4", "--stpes is no setting; did you mean '--steps'?"),
    ("train_upt.py --lr 1e-4", "--lr is no setting; it is called --learning-rate here"),
    ("train_upt.py --num-generations 4", "it is called --group-size here"),
    ("train_upt.py --model .", ". holds no model (config.json is missing)"),
    ("train_upt.py --steps four", "--steps four: expected a whole number"),
    ("train_upt.py --steps", "--steps needs a value: a whole number"),
    ("train_upt.py --temperature=warm", "--temperature warm: expected a number"),
    ("train_upt.py --preset mmupt", "expected one of mm-upt, self-judge, self-judge-code; did you mean 'mm-upt'?"),
    ("train_upt.py four", "four: settings are written --name value"),
    ("train_upt.py --steps 0", "--steps must be at least 1, not 0"),
    ("train_upt.py --split trian --model TINY", "did you mean 'train'?"),
    ("train_upt.py --data geoqua", "did you mean 'geoqa'?"),
    ("train_upt.py --data shapes-hrad", "did you mean 'shapes-hard'?"),
    ("train_upt.py --data shapes-hard --split warmup --model TINY", "shapes-hard has no split 'warmup'"),
    ("train_upt.py --data ./nothing.jsonl", "'./nothing.jsonl' is neither shapes"),
    ("train_upt.py --model models/nothing", "there is no model folder models/nothing"),
    ("train_upt.py --model nothing", "there is no model folder nothing: check the path, or give a hub id, org/name"),
    ("train_upt.py --learning-rate nan", "--learning-rate must be a finite number, not nan"),
    ("train_upt.py --kl-coef -.5", "--kl-coef must be at least 0, not -0.5"),
    ("train_upt.py --eval-split tset --model TINY", "shapes has no split 'tset'"),
    ("train_upt.py --lora-targets 7.self_attn.q_proj --model TINY", "--lora-targets 7.self_attn.q_proj: there is no"),
    ("ablate.py --max-grad-norm -1 --model TINY", "--max-grad-norm must be at least 0, not -1.0"),
    ("train_upt.py --adapter nothing", "--adapter nothing: no PEFT adapter there"),
    ("train_upt.py --init-adapter nothing --model TINY", "--init-adapter nothing: no PEFT adapter there"),
    ("train_upt.py --prompt think-boxd", "did you mean 'think-boxed'?"),
    ("train_upt.py --from-shards nothing", "nothing: no shards"),
    ("train_upt.py --eval mathvison=x --eval-every 1 --model TINY", "did you mean 'mathvision'?"),
    ("rollout.py --group-size 0", "--group-size must be at least 1, not 0"),
    ("judge.py --judge-mode tekst", "did you mean 'text'?"),
    ("judge.py --rollouts nothing", "nothing: no shards"),
    ("rewards.py --out x", "--rollouts is missing"),
    ("rewards.py --rollouts nothing --out x", "nothing: no shards"),
    ("synthesize.py --filters agrement --model TINY", "did you mean 'agreement'?"),
    ("synthesize.py --mode indirect", "--mode indirect: expected one of in-context, direct; did you mean 'direct'?"),
    ("warmup.py --batch 0", "at least 1"),
    ("ablate.py --rewards majorty", "did you mean 'majority'?"),
    ("ablate.py --learnig-rate 3", "--learnig-rate is no setting; did you mean '--learning-rate'?"),
    ("ablate.py --rollouts nothing", "nothing: no shards"),
    ("ablate.py --train 'x", "--train 'x: No closing quotation; close the quote"),
    ("-m eval.compare", "give a and b; --help says what they are"),
    ("train_upt.py --device mps --model TINY", "no such kind of device; give auto, cpu, cuda or cuda:N"),
    ("-m eval.run --benchmark mathvison --data x", "did you mean 'mathvision'?"),
    ("-m eval.run --benchmark mathvision --data nothing", "there is no folder nothing"),
    ("-m eval.score --benchmark mathvision --data nothing --responses x --out y", "there is no folder nothing"),
    ("-m eval.compare nothing nothing", "nothing: expected a score file"),
    ("-m eval.heldout --eval-samples 0 --model TINY", "--eval-samples must be at least 1, not 0"),
    ("-m eval.synthetic --questions nothing", "nothing/manifest.json: no such file"),
]


@pytest.mark.parametrize("command, said", MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(shell, tiny, command, said):
    done = shell(*command.replace("TINY", tiny).split(" "), HF_HUB_OFFLINE="1")
    *before, last = done.stderr.strip().split("\n")
    assert done.returncode == 2 and last.startswith("error: ") and said in last, done.stderr
    assert not any(line.startswith(("error", "Traceback")) for line in before)


def test_a_device_that_is_not_there(shell, tiny, tmp_path):
    for device, said in (("cuda:99", "--device cuda:99"), ("gpu", "no such kind of device; give auto, cpu, cuda")):
        done = shell("train_upt.py", "--model", tiny, "--device", device, "--out", "unused")
        assert done.returncode == 2 and said in done.stderr.split("\n")[-2] and "error: " in done.stderr
    assert not (tmp_path / "unused").exists()


def damaged(tiny: str, folder: Path, name: str, content: bytes) -> str:
    shutil.copytree(tiny, folder)
    (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    "name, content",
    [("model.safetensors", b"cut"), ("tokenizer.json", b"{"), ("config.json", b"{"), ("config.json", b"\xff")],
)
def test_a_model_that_cannot_be_loaded(tiny, tmp_path, name, content):
    from upt.model import Policy

    with pytest.raises(UserError, match=str(tmp_path)):
        Policy.load(damaged(tiny, tmp_path / "model", name, content))


@pytest.mark.parametrize("name, content", [("adapter_config.json", b"{"), ("adapter_model.safetensors", b"cut")])
def test_an_adapter_that_cannot_be_loaded(tiny, tmp_path, name, content):
    from upt.model import Policy

    policy = Policy.load(tiny)
    policy.add_lora(2, 4)
    policy.save(tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/adapter cannot be loaded"):
        Policy.load(tiny, adapter=str(tmp_path / "adapter"))


def test_files_of_a_run_that_are_damaged(tiny, tmp_path):
    import train_upt

    small = dict(questions_per_step=2, group_size=2, max_new_tokens=4, lora_rank=2, reward="random", save_every=1)
    small |= dict(model=tiny, steps=1, eval_questions=2, eval_samples=2)
    train_upt.main(train_upt.Config(out=tmp_path / "run", **small))
    for name, said in (
        ("before.json", "before.json: not JSON"),
        ("metrics.jsonl", "a line is no record of a step"),
        ("checkpoints/step-000001/state.json", "its state cannot be read"),
        ("checkpoints/step-000001/optimizer.safetensors", "its state cannot be read"),
        ("manifest.json", "manifest.json: no usable 'stage' in it"),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / name, ignore=shutil.ignore_patterns("summary.json"))
        (tmp_path / name / name).write_text('{"schema": "upt.group/1"}\n' if name == "manifest.json" else "{\n")
        with pytest.raises(UserError, match=said):
            train_upt.main(train_upt.Config(out=tmp_path / name, **small))


def test_a_prompt_that_is_no_text(tmp_path):
    from upt import prompts

    (tmp_path / "p.md").write_bytes(b"\xff{question}")
    with pytest.raises(UserError, match="p.md: not UTF-8 text"):
        prompts.template(str(tmp_path / "p.md"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"algorithm": "sfft"}, "algorithm is 'sfft': expected grpo or sft; did you mean 'sft'"),
        ({"preset": "mmupt"}, "did you mean 'mm-upt'"),
        ({"steps": "1"}, "steps is '1': expected a whole number or None"),
        ({"steps": 1.5}, "steps is 1.5: expected a whole number"),
        ({"steps": True}, "steps is True: expected a whole number"),
        ({"reward": len}, "expected a text or None"),
        ({"lora_targets": "q_proj"}, "lora_targets is 'q_proj': expected a list"),
        ({"out": None}, "out is None: expected a path"),
    ],
)
def test_a_notebooks_settings_are_of_their_types(settings, said):
    import train_upt

    with pytest.raises(SettingError, match=said):
        train_upt.Config(**settings)


def test_what_a_notebook_writes_naturally():
    import train_upt

    config = train_upt.Config(model=Path("a/b"), data=Path("c"), temperature=1, lora_targets=["q_proj"], out="x")
    assert (config.model, config.data, config.temperature, config.lora_targets) == ("a/b", "c", 1, ("q_proj",))
    assert ablate.Config(rewards=["majority", "frequency@mean"]).rewards == "majority frequency@mean"


def test_debug_shows_the_traceback_and_a_notebook_the_error(shell, tiny):
    done = shell("train_upt.py", "--model", tiny, "--reward", "majorty", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "SettingError: no reward is called" in done.stderr
    with pytest.raises(SettingError, match="did you mean 'majority'"):
        ablate.main(ablate.Config(rewards="majorty"))


def test_a_file_that_cannot_be_written_is_one_line(shell, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = shell("rollout.py", "--model", tiny, "--steps", "1", "--out", str(tmp_path / "file" / "below"))
    assert done.returncode == 2 and f"error: --out {tmp_path}/file/below: {tmp_path}/file is no folder" in done.stderr


def test_ends_that_are_no_mistake():
    def ends(error):
        def main(config):
            raise error

        with pytest.raises(SystemExit) as end:
            cli.launch(main, Plain, [])
        return end.value.code

    assert ends(Stopped(15, "SIGTERM")) == 143 and ends(KeyboardInterrupt()) == 130
    assert ends(RunsFailed("1 of 2 runs failed")) == 1 and ends(UserError("x")) == 2
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up
        cli.launch(lambda config: 1 / 0, Plain, [])
    assert issubclass(Stopped, KeyboardInterrupt)  # what a notebook knows how to show


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--help", "--nonsense"])
def test_help_and_refusals_wait_for_nothing_heavy(shell, script, flag):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, {flag!r}]
try:
    runpy.run_module({script.removesuffix(".py").replace("/", ".")!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("ended", end.code, sorted({HEAVY!r} & sys.modules.keys()))
"""
    done = shell("-c", code)
    assert done.stdout.split("\n")[-2] == f"ended {2 * (flag == '--nonsense')} []", done.stdout + done.stderr


def test_a_wrong_reward_waits_for_nothing_heavy(shell):
    code = f"""
import sys, train_upt
try:
    train_upt.main(train_upt.Config(reward="majorty"))
except ValueError:
    print(sorted({HEAVY!r} & sys.modules.keys()))
"""
    assert shell("-c", code).stdout == "[]\n"


def test_help_is_in_groups_with_the_defaults_that_hold(shell):
    text = shell("train_upt.py", "--help", COLUMNS="100", NO_COLOR="1").stdout
    titles = re.findall(r"─ ([\w-]+) options ─", text)
    assert titles[:5] == ["data", "model", "sampling", "reward", "judge"]
    assert titles[5:] == ["asking", "rounds", "update", "evaluation", "tracking", "run"]
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    assert f"{presets.TINY['steps']} with the tiny model, {presets.REAL['steps']} with others" in flat
    assert "the k likeliest tokens; 0 keeps all (default: 0)" in flat and "--round " not in flat
    assert "responses to each question, G (default: 8)" in flat  # the same for both, so said once
    assert "the snapshot's own with the tiny model, 262144 with others" in flat


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_threads_give_way_unless_the_user_says_otherwise(shell, own):
    code = "import os, upt; print({n: os.environ.get(n) for n in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')})"
    kept = {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": None} | ({"GOMP_SPINCOUNT": "1000"} if not own else own)
    removed = "import os; [os.environ.pop(n, 0) for n in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')]; "
    given = f"os.environ.update({own!r}); "
    assert shell("-c", removed + given + code).stdout == f"{kept}\n"
    # In time: it is read when torch is loaded, which a script does later.
    assert shell("-c", "import train_upt, sys; print('torch' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}])
def test_a_gpus_memory_is_had_in_segments_that_grow_unless_the_user_says_otherwise(shell, own):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"import os; [os.environ.pop(n, 0) for n in {names}]; os.environ.update({own!r}); import upt; "
    found = shell("-c", code + f"print([os.environ.get(n) for n in {names}])").stdout
    assert found == f"{[(own or {names[0]: 'expandable_segments:True'}).get(name) for name in names]}\n"


@dataclass
class Plain(Data, Typed):
    """A Config of a few fields."""

    out: Path | None = None
    """where to"""
    kind: Literal["one", "two"] = "one"
    """which"""
    names: tuple[str, ...] = ()
    """several"""
    secret: int = hidden(7)


def test_flags_become_a_config_and_strings_paths(tmp_path):
    config = cli.parse(Plain, ["--data", "a,b", "--out", str(tmp_path), "--kind", "two", "--names", "x", "y"])
    assert config == Plain(data="a,b", out=tmp_path, kind="two", names=("x", "y")) and config.secret == 7
    assert Plain(out="a/b").out == Path("a/b") and Plain(out="~/x").out == Path("~/x").expanduser()
    assert cli.parse(Plain, []) == Plain()
    with pytest.raises(UserError, match="--secret is no setting"):
        cli.parse(Plain, ["--secret", "3"])


def test_every_config_takes_strings_for_paths():
    import importlib

    for script in SCRIPTS:
        config = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config
        assert issubclass(config, Typed), script


def test_errors_name_the_variables_of_make_where_it_gave_the_command(shell, tmp_path, monkeypatch):
    from eval import heldout

    monkeypatch.delenv(cli.BY_MAKE, raising=False)
    assert cli.of_make("--run x", heldout.Config) == ""
    monkeypatch.setenv(cli.BY_MAKE, "DATA RUN OUT ARGS")
    for text, said in (
        ("--run x: give its --out, or --run y", " (make: RUN is --run, OUT is --out)"),
        ("--temperature 3", " (make: others go into ARGS)"),
        ("--top-p, --out a--run", " (make: OUT is --out, others go into ARGS)"),
        ("--seed 3, which the target has no variable for", " (make: others go into ARGS)"),
        ("hf download --repo-type dataset --local-dir DIR, and --rewards of another script", ""),
        ("no flag - in -- it, and --help is none of the settings", ""),
    ):
        assert cli.of_make(text, heldout.Config) == said
    done = shell("-m", "eval.heldout", "--run", str(tmp_path))
    assert done.stderr.endswith("that was its --out (make: RUN is --run, OUT is --out)\n")


def test_near_names():
    assert suggest("Majority", ["majority"]) == "; did you mean 'majority'?" and suggest("xyz", ["majority"]) == ""


def test_near_paths(tmp_path):
    (tmp_path / "train").mkdir()
    assert suggest_path(tmp_path / "trian") == f"; did you mean {str(tmp_path / 'train')!r}?"
    assert suggest_path(tmp_path / "no" / "x") == suggest_path("~nobody-here/x") == ""


@pytest.mark.parametrize(
    "given, passed",
    [
        (["--train", "--top-k 8"], ["--train=--top-k 8"]),
        (["--train=--top-k 8"], ["--train=--top-k 8"]),
        (["--seeds", "2", "--top-k", "8", "--data", "x"], ["--seeds", "2", "--data", "x", "--train=--top-k 8"]),
        (["--top-k=8", "--train", "--prompt 'a b'"], ["--train=--top-k=8 --prompt 'a b'"]),
        (["--rewards", "a b", "--", "--top-k", "8"], ["--rewards", "a b", "--train=--top-k 8"]),
    ],
)
def test_what_ablate_does_not_know_is_for_training(given, passed):
    assert ablate.sorted_out(given) == passed
    assert cli.parse(ablate.Config, passed).train == passed[-1].removeprefix("--train=")


def test_a_finished_run_says_how_to_go_on(tiny, tmp_path):
    import train_upt

    small = dict(questions_per_step=2, group_size=2, max_new_tokens=4, lora_rank=2, eval_questions=0, reward="random")
    out = tmp_path / "run"
    train_upt.main(train_upt.Config(model=tiny, steps=1, out=str(out), **small))
    with pytest.raises(
        SettingError, match=rf"a finished run with 1 steps.*--init-adapter {out}/adapter --steps 2 --out"
    ):
        train_upt.main(train_upt.Config(model=tiny, steps=3, out=out, **small))
    with pytest.raises(
        SettingError, match=rf"a finished run with 1 steps.*--init-adapter {out}/adapter --steps 5 --out"
    ) as refused:
        train_upt.main(train_upt.Config(out=out, resume=True, steps=6))
    # As it says, word for word: the adapter that was trained goes on, in a run of its own.
    command = str(refused.value).partition("on other questions: ")[2]
    assert command.endswith(f"--init-adapter {out}/adapter --steps 5 --out {out}-further")
    given = shlex.split(command)
    assert given[:2] == ["python", "train_upt.py"]
    config = cli.parse(train_upt.Config, given[2:])
    assert {name: getattr(config, name) for name in small} == small and (config.model, config.seed) == (tiny, 1)
    assert train_upt.main(config)["end"]["steps"] == 5


def test_the_command_that_trains_further_has_what_was_set(tmp_path):
    """Without what a preset, or the model, brings by itself; after --adapter the model is the merged one."""
    import train_upt

    mine = dict(data="a:2,b:1", preset="mm-upt", eval=("mathvision=x y",), mask_truncated=True, group_size=5)
    config = train_upt.Config(model="org/vlm", steps=4, out=tmp_path / "run", adapter="mine", **mine)
    presets.fill(config)
    manifests.write(config.out, stage="train", config=resuming.jsonable(config), seed=0, model="org/vlm")
    assert resuming.further(config, 2) == (
        f"python train_upt.py --data a:2,b:1 --model {tmp_path}/run/start --group-size 5 --preset mm-upt "
        f"--seed 1 --mask-truncated --eval 'mathvision=x y' --init-adapter {tmp_path}/run/adapter --steps 2 "
        f"--out {tmp_path}/run-further"
    )


OWN = """
def nothing_of_a_group(group):
    return [response.key for response in group.responses]

def as_elsewhere(completions, **more):
    return [1.0 for _ in completions]

def of_a_picture(group):
    return [1.0 if open(group["image"]) else 0.0 for _ in group["responses"]]
"""


def test_a_reward_of_ones_own_that_cannot_work_is_refused_before_a_model_is_loaded(tiny, tmp_path):
    import train_upt

    (tmp_path / "own.py").write_text(OWN)
    for name, said in (
        (
            "nothing_of_a_group",
            r"fails on a trial group of 4 responses: AttributeError: .*it takes one group, a dict: group\['responses'",
        ),
        ("as_elsewhere", "expected 4 finite numbers"),
    ):
        with pytest.raises(SettingError, match=said):
            train_upt.Config(model=tiny, reward=f"{tmp_path}/own.py:{name}").resolve()
    train_upt.Config(model=tiny, reward=f"{tmp_path}/own.py:of_a_picture").resolve()  # it may work on real groups


def test_a_run_that_made_no_step_says_that_it_can_go_and_loses_nothing(tiny, tmp_path, capsys):
    import train_upt

    small = dict(questions_per_step=2, group_size=2, max_new_tokens=4, lora_rank=2, eval_questions=0, reward="random")

    def config(seed: int) -> train_upt.Config:
        return train_upt.Config(model=tiny, steps=1, out=tmp_path / "run", seed=seed, **small)

    train_upt.claim(train_upt.prepare(config(1)), {})  # as far as a run got that failed at its first step
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(UserError, match=rf"seed: 1 there, 2 now.*has not made a step.*rm -r {tmp_path}/run"):
        train_upt.main(config(2))
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest
    train_upt.main(config(1))
    with pytest.raises(UserError, match="seed: 1 there, 2 now") as refused:
        train_upt.main(config(2))
    assert "rm -r" not in str(refused.value)
    capsys.readouterr()
    train_upt.main(config(1))
    assert f"the run in {tmp_path}/run is finished: nothing more is trained" in capsys.readouterr().out


def test_a_run_stands_for_its_rollouts_and_says_what_it_does(tiny, tmp_path, capsys):
    import rewards
    import train_upt

    small = dict(questions_per_step=2, group_size=2, max_new_tokens=4, lora_rank=2, eval_questions=0)
    train_upt.main(train_upt.Config(model=tiny, steps=1, out=tmp_path / "run", reward="random", **small))
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("training ")]
    assert said == [
        f"training {tiny} on shapes/train: 4096 questions, all with a picture; seed 0: reward random, advantage "
        f"group-norm, 1 steps of 2 questions x 2 responses, into {tmp_path}/run"
    ]
    rewards.main(rewards.Config(rollouts=tmp_path / "run", out=tmp_path / "scored"))
    assert f"its shards are in {tmp_path}/run/rollouts" in capsys.readouterr().err
    train_upt.main(train_upt.Config(from_shards=tmp_path / "run", out=tmp_path / "again", **small))
    assert json.loads((tmp_path / "again/summary.json").read_text())["config"]["from_shards"].endswith("run/rollouts")


def test_a_notebook_elsewhere_on_disk(tiny, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from train_upt import Config, main
main(Config(model={tiny!r}, steps=1, questions_per_step=2, group_size=2, max_new_tokens=4, lora_rank=2,
            eval_questions=2, eval_samples=2, reward="random", out="run"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    lines = done.stdout.strip().split("\n")  # no bar: a line for what it does, the step, and each evaluation
    assert sum(line.startswith("step ") for line in lines) == 1 and "\r" not in done.stdout
