"""The loop: what the adapter depends on and what it does not, stopping and going on, and what a run leaves."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import rewards
import rollout
import train_upt
from eval import follow, heldout
from tests.datafiles import jsonl
from train_upt import Config, is_finished, main
from upt import data
from upt.data import shapes
from upt.errors import DataError, Diverged, PolicyError, SettingError, ShardError, Stopped, StorageError, UserError
from upt.groups import manifests, shards, variants
from upt.model import update
from upt.model.policy import Policy
from upt.run import cli, processes, starting
from upt.run.metrics import graded, status
from upt.run.team import Team
from upt.stages import sampling

ROOT = Path(__file__).parent.parent
SMALL = {
    "questions_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 12,
    "lora_rank": 2,
    "lora_alpha": 4,
    "eval_questions": 0,
    "learning_rate": 1e-2,
    "kl_coef": 0.0,  # what has no signal trains nothing
    "reward": "random",  # a random model hardly ever agrees with itself; this gives every step a signal
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    a, b = adapter(one), adapter(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(tiny, out: Path, **settings) -> Path:
    main(Config(model=tiny, out=out, **SMALL | settings))
    return out


@pytest.fixture(scope="module")
def two_steps(tiny, tmp_path_factory) -> Path:
    """An uninterrupted run of two steps, its rollouts in four batches each."""
    return run(tiny, tmp_path_factory.mktemp("runs") / "whole", steps=2, slots=3, update_tokens=150)


# ---------------------------------------------------------------------------------------- what the adapter depends on


def test_training_moves_the_adapter_and_only_seed_and_settings_matter(tiny, two_steps, tmp_path):
    assert any(float(value.abs().max()) > 0 for name, value in adapter(two_steps).items() if "lora_B" in name)
    again = run(tiny, tmp_path / "again", steps=2, slots=3, update_tokens=150)
    assert same(two_steps, again)
    assert not same(two_steps, run(tiny, tmp_path / "seed", steps=2, slots=3, update_tokens=150, seed=1))


def test_the_evaluation_may_be_of_another_set(tiny, tmp_path):
    rows = [{"question": f"What is {i} + 1?"} for i in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"data": str(tmp_path / "own.jsonl"), "steps": 1, "eval_samples": 1} | SMALL
    without = main(Config(model=tiny, out=tmp_path / "a", **own | {"eval_questions": 4}))
    other = main(Config(model=tiny, out=tmp_path / "b", eval_data="shapes", **own | {"eval_questions": 4}))
    assert "greedy" not in without["after"] and other["after"]["graded"] == 4
    assert set(other["after"]["kinds"]) <= set(shapes.KINDS) and same(tmp_path / "a", tmp_path / "b")


def test_stages_give_the_adapter_of_one_online_step(tiny, tmp_path):
    settings = SMALL | {"reward": None, "advantage": None}
    sampling = {name: SMALL[name] for name in ("questions_per_step", "group_size", "max_new_tokens")}
    online = run(tiny, tmp_path / "online", steps=1, reward="random", advantage="mean", seed=3)
    rollout.main(rollout.Config(model=tiny, out=tmp_path / "rollouts", steps=1, seed=3, **sampling))
    rewards.main(
        rewards.Config(rollouts=tmp_path / "rollouts", out=tmp_path / "scored", reward="random", advantage="mean")
    )
    main(Config(from_shards=tmp_path / "scored", out=tmp_path / "staged", **settings))
    assert same(online, tmp_path / "staged")
    name = "step-000000.jsonl"
    assert (online / "rollouts" / name).read_bytes() == (tmp_path / "scored" / name).read_bytes()
    # Rescoring the plain rollouts on the way in is the same again; other rewards are not.
    main(Config(from_shards=tmp_path / "rollouts", out=tmp_path / "a", seed=3, **SMALL | {"advantage": "mean"}))
    assert same(online, tmp_path / "a")
    main(Config(from_shards=tmp_path / "scored", out=tmp_path / "b", seed=3, **SMALL | {"reward": "random(seed=9)"}))
    assert not same(online, tmp_path / "b")


@pytest.mark.parametrize("golds", ["removed", "shuffled"])
def test_label_blind(tiny, tmp_path, monkeypatch, golds):
    # A random model gives no boxed answers; these keys make groups that agree in part.
    monkeypatch.setattr(sampling, "vote_key", lambda text, choices=None: str(len(text) % 3))
    settings = dict(steps=2, reward="frequency")
    plain = run(tiny, tmp_path / "plain", **settings)
    real = data.load

    def blind(*args, **kwargs):
        found = real(*args, **kwargs)
        if golds == "removed":
            return found.without_gold()
        order = [found[i].gold for i in range(len(found))][::-1]
        read = found._read
        found._read = lambda i: replace(data.Question(**vars_of(read(i))), gold=order[i])
        return found

    monkeypatch.setattr(data, "load", blind)
    other = run(tiny, tmp_path / "blind", **settings)
    stored = [g["gold"] for run_ in (plain, other) for g in shards.ShardReader(run_ / "rollouts")]
    half = len(stored) // 2
    assert stored[:half] != stored[half:]
    assert same(plain, other)
    assert any(float(value.abs().max()) > 0 for name, value in adapter(plain).items() if "lora_B" in name)


def vars_of(item) -> dict:
    return {name: getattr(item, name) for name in ("uid", "question", "choices", "image", "gold", "kind")}


def test_the_step_does_not_depend_on_the_micro_batches(tiny, tmp_path):
    settings = dict(steps=1, advantage="mean", kl_every=1)
    whole = run(tiny, tmp_path / "whole", update_tokens=100_000, **settings)
    split = run(tiny, tmp_path / "split", update_tokens=1, **settings)
    logs = [json.loads((path / "metrics.jsonl").read_text()) for path in (whole, split)]
    for name in ("loss", "grad_norm", "ratio"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-6)
    assert logs[0]["grad_norm"] > 0.01
    for name, value in adapter(whole).items():
        torch.testing.assert_close(value, adapter(split)[name], atol=2e-4, rtol=1e-3)


def out_of_memory(monkeypatch, fails) -> None:
    """A device on which a packed pass fails if `fails(policy, tokens)`."""
    real = Policy.packed

    def packed(self, batch):
        if fails(self, sum(map(len, batch))):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none.")
        return real(self, batch)

    monkeypatch.setattr(Policy, "packed", packed)


def second_pass_with_a_gradient():
    """Once, in the middle of a minibatch."""
    found = []
    return lambda policy, _: any(p.grad is not None for p in policy.trainable()) and not found and not found.append(1)


@pytest.mark.parametrize(
    "budget, fits, fails, settings",
    [
        (600, 150, lambda policy, tokens: tokens > 150, {"kl_every": 1, "minibatches": 2}),
        (180, 90, second_pass_with_a_gradient(), {}),
    ],
    ids=["more than fits", "a gradient begun"],
)
def test_out_of_memory_halves_the_budget(tiny, tmp_path, monkeypatch, capfd, budget, fits, fails, settings):
    settings |= {"steps": 2, "advantage": "mean"}
    small = run(tiny, tmp_path / "small", update_tokens=fits, **settings)
    assert "out of memory" not in capfd.readouterr().out
    out_of_memory(monkeypatch, fails)
    assert same(small, run(tiny, tmp_path / "halved", update_tokens=budget, **settings))
    said = [line for line in capfd.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == 1 and f"--update-tokens {budget}: going on with {fits}" in said[0]


def test_out_of_memory_with_a_single_response_says_what_to_change(tiny, tmp_path, monkeypatch):
    out_of_memory(monkeypatch, lambda policy, tokens: True)
    with pytest.raises(PolicyError, match=r"--update-tokens 1\): .*2.00 GiB; shorten --max-new-tokens"):
        run(tiny, tmp_path / "none", steps=1, update_tokens=4)


def test_accumulated_gradient_is_that_of_the_loss(tiny, tmp_path):
    """On policy, the gradient is that of -sum(A logp) / tokens, worked out here one response at a time."""
    config = Config(
        model=tiny, out=tmp_path, **SMALL | {"steps": 1, "advantage": "mean", "update_tokens": 2048}
    ).resolve()
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    policy.add_lora(2, 4)
    questions = data.load("shapes", "train", 0)
    batch = sampling.step_batch(policy, questions, 0, config)
    groups = rewards.score(sampling.rollout(policy, batch, 0, config, tmp_path), "random", "mean", 0)
    update.accumulate(policy, batch.prompts, groups, None, config)
    mine = [p.grad.clone() for p in policy.trainable()]
    policy.model.zero_grad()
    total = sum(len(r["token_ids"]) for g in groups for r in g["responses"])
    for question, group in zip(batch.questions, groups):
        seen = policy.family.image_processor(images=[question.image], return_tensors="pt")
        prompt = batch.prompts[batch.questions.index(question)].ids
        for response in group["responses"]:
            ids = torch.tensor([prompt + response["token_ids"]])
            types = (ids == policy.base.config.image_token_id).int()
            logits = policy.base(input_ids=ids, mm_token_type_ids=types, **seen).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(response["token_ids"])[:, None])
            (-response["advantage"] * logp.sum() / total).backward()
    for ours, parameter in zip(mine, policy.trainable()):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-3)
    assert max(float(g.abs().max()) for g in mine) > 1e-3


def test_minibatches_use_the_log_probabilities_from_before_the_step(tiny, tmp_path):
    out = run(tiny, tmp_path / "r", steps=1, minibatches=2, learning_rate=0.3, warmup_steps=0, advantage="mean")
    row = json.loads((out / "metrics.jsonl").read_text())
    assert row["ratio"] != 1.0 and row["clip_low"] + row["clip_high"] > 0  # the second minibatch is off policy
    one = run(tiny, tmp_path / "one", steps=1, minibatches=1, learning_rate=0.3, warmup_steps=0, advantage="mean")
    assert json.loads((one / "metrics.jsonl").read_text())["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_kl_is_measured_only_when_asked_for(tiny, tmp_path, monkeypatch):
    calls = []
    real = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda self: calls.append(1) or real(self))
    run(tiny, tmp_path / "none", steps=2)
    assert not calls
    out = run(tiny, tmp_path / "log", steps=3, kl_every=2, learning_rate=0.1, warmup_steps=0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["kl" in row for row in rows] == [True, False, True]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 1e-4
    # Measuring changes nothing, a step in which no group carries a signal included.
    monkeypatch.setitem(rewards.REWARDS, "rare", lambda group: [float(i == 0 and group["step"] != 1) for i in range(4)])
    settings = dict(steps=3, reward="rare", learning_rate=0.1, warmup_steps=0)
    assert same(run(tiny, tmp_path / "a", **settings), run(tiny, tmp_path / "b", kl_every=1, **settings))
    assert not same(out, run(tiny, tmp_path / "loss", steps=3, kl_coef=1.0, learning_rate=0.1, warmup_steps=0))


def test_truncated_responses_can_be_masked(tiny, tmp_path):
    config = Config(
        model=tiny, out=tmp_path, mask_truncated=True, **SMALL | {"steps": 1, "update_tokens": 2048}
    ).resolve()
    policy = Policy.load(tiny, dtype="fp32", device="cpu")
    policy.add_lora(2, 4)
    batch = sampling.step_batch(policy, data.load("shapes", "train", 0), 0, config)
    groups = rewards.score(sampling.rollout(policy, batch, 0, config, tmp_path), "random", "mean", 0)
    for group in groups:
        for response in group["responses"]:
            response["finish"] = "length"
    update.accumulate(policy, batch.prompts, groups, None, config)
    assert all(p.grad is None for p in policy.trainable())


def test_a_non_finite_update_is_skipped_counted_and_shown(tiny, tmp_path, monkeypatch, capfd):
    real, calls = update.grpo_loss, []

    def broken(*args, **kwargs):
        loss, stats = real(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 1 else loss), stats

    monkeypatch.setattr(update, "grpo_loss", broken)
    out = run(tiny, tmp_path / "r", steps=2)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite"] for row in rows] == [1, 0] and rows[0]["loss"] is None
    assert all(value.isfinite().all() for value in adapter(out).values())
    assert "NONFINITE 1 update: not made" in capfd.readouterr().out


def test_a_step_without_a_signal_says_so_in_words(tiny, tmp_path, monkeypatch, capfd):
    def odd(group):  # questions of odd numbers have a response that is better than the others
        return [float(i == 0 and group["uid"][-1] in "13579") for i in range(4)]

    monkeypatch.setitem(rewards.REWARDS, "odd", odd)
    out = run(tiny, tmp_path / "r", steps=1, reward="odd", minibatches=4)  # one question each
    row = json.loads((out / "metrics.jsonl").read_text())
    even = sum(group["uid"][-1] in "02468" for group in shards.ShardReader(out / "rollouts"))
    assert 1 < even < 4 and row["no_signal"] == even and type(row["no_signal"]) is int
    assert f"no signal for {even} updates: not made" in capfd.readouterr().out


def test_a_gradient_norm_of_0_clips_nothing_and_is_measured(tiny, tmp_path):
    runs = {norm: run(tiny, tmp_path / str(norm), steps=2, max_grad_norm=norm) for norm in (0, 1e9, 1e-6)}
    norms = {n: json.loads((out / "metrics.jsonl").read_text().split("\n")[0])["grad_norm"] for n, out in runs.items()}
    assert norms[0] == norms[1e9] == norms[1e-6] > 1e-3
    assert same(runs[0], runs[1e9]) and not same(runs[0], runs[1e-6])


# ------------------------------------------------------------------------------------------------ stopping, going on

KILLER = """
import os, sys
import train_upt
from train_upt import Config
from upt.model import slots, update
from upt.run import cli
where, nth, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module, name = where.split(".")
module = {"slots": slots.Slots, "update": update}[module]
real, calls = getattr(module, name), []
def patched(*args, **kwargs):
    calls.append(1)
    if len(calls) == nth:
        os.kill(os.getpid(), number)
    return real(*args, **kwargs)
setattr(module, name, patched)
cli.launch(train_upt.main, Config, sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("where", "nth", "number", "code"),
    [
        ("slots.step", 100, signal.SIGTERM, 143),  # within the second step
        pytest.param("slots.step", 100, signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param("update.grpo_loss", 2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("update.grpo_loss", 5, signal.SIGKILL, -9),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(tiny, two_steps, tmp_path, where, nth, number, code):
    out = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += [
        "--steps=2",
        "--slots=3",
        "--update-tokens=150",
        f"--model={tiny}",
        f"--out={out}",
        "--save-every=1",
    ]
    command = [sys.executable, "-c", KILLER, where, str(nth), str(int(number)), *flags]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == code, stopped.stderr[-2000:]
    assert not (out / "summary.json").exists()
    assert (out / "report.html").exists() == (number == signal.SIGTERM)  # on the step that was made
    if number == signal.SIGTERM:
        assert "goes on from" in stopped.stderr and f"in a browser: {out}/report.html" in stopped.stdout
        # Here by --resume, below by the same command: both ways of going on.
        main(Config(out=out, resume=True))
    else:
        run(tiny, out, steps=2, slots=3, update_tokens=150, save_every=1)
    assert same(out, two_steps)
    for path in shards.list_shards(two_steps / "rollouts"):
        assert (out / "rollouts" / path.name).read_bytes() == path.read_bytes()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]


def test_resume_takes_the_settings_of_the_run(tiny, two_steps, tmp_path):
    with pytest.raises(ValueError, match="no run"):
        main(Config(out=tmp_path / "none", resume=True))
    again = main(Config(out=two_steps, resume=True))
    assert again["config"]["lora_rank"] == 2 and again["config"]["model"] == tiny
    assert again["config"]["update_tokens"] == 150
    with pytest.raises(ValueError, match="a finished run with 2 steps.*--init-adapter .*/adapter --steps 1"):
        main(Config(out=two_steps, resume=True, steps=3))
    with pytest.raises(ValueError, match="lora_rank"):
        run(tiny, two_steps, steps=2, slots=3, update_tokens=150, lora_rank=3)


def test_what_a_run_resumes_with_may_be_none(tiny, two_steps, tmp_path):
    """--quantize none is full weights, which a run has written down as nothing."""
    assert main(Config(out=two_steps, resume=True, quantize="none"))["config"]["quantize"] is None
    out = shutil.copytree(two_steps, tmp_path / "run")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config"]["quantize"] = "nf4"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SettingError, match="--resume takes quantize='nf4' from the run in .*, not 'none'"):
        main(Config(out=out, resume=True, quantize="none"))


def test_a_finished_run_takes_no_model_and_no_other_processes(tiny, tmp_path, monkeypatch, capsys):
    """It says that it is finished, and what it ended with; with another number of processes the same words."""
    out = run(tiny, tmp_path / "r", steps=1, eval_questions=2, eval_samples=1)
    ended = capsys.readouterr().out.partition("held out, after training")[2].partition("\n")[2]
    assert "greedy" in ended and f"adapter in {out}/adapter" in ended and ended.endswith("report.html\n")
    kept = {path: path.read_bytes() for path in out.rglob("*.json*")}
    monkeypatch.setattr(Policy, "load", lambda *_, **how: pytest.fail("a model is loaded"))
    monkeypatch.setattr(processes, "run", lambda *_: pytest.fail("processes are started"))
    for more in ([], ["--gpus=2"]):
        given = ["--resume", f"--out={out}", *more]
        cli.launch(main, Config, given, finished=is_finished)
        assert capsys.readouterr().out == f"the run in {out} is finished: nothing more is trained\n{ended}"
    assert kept == {path: path.read_bytes() for path in out.rglob("*.json*")}
    # Another one is refused by one process, too; without its adapter a run has not ended.
    with pytest.raises(SystemExit):
        cli.launch(main, Config, [*given, "--lora-rank=3"], finished=is_finished)
    assert "lora_rank=2 from the run" in capsys.readouterr().err
    shutil.rmtree(out / "adapter")
    assert not is_finished(Config(out=out))


def test_a_finished_run_in_rounds_is_finished_to_those_who_resume_it(tmp_path):
    """Unless more rounds are asked for, or have been begun."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": [{}, {}]}))

    def finished(begun: int, **settings) -> bool:
        manifests.write(tmp_path, stage="train", config={"rounds": begun}, seed=0, model=None)
        return is_finished(Config(out=tmp_path, **settings))

    assert finished(2, resume=True) and finished(2, rounds=2) and finished(2, resume=True, rounds=2)
    assert not finished(3, resume=True) and not finished(2, resume=True, rounds=3) and not finished(2)


def test_an_error_after_a_step_leaves_a_page(tiny, tmp_path, capsys):
    def stop(row: dict, groups: list[dict]) -> None:
        if row["step"] == 1:
            raise ZeroDivisionError

    config = Config(model=tiny, out=tmp_path / "r", **SMALL | {"steps": 3, "save_every": 1})
    with pytest.raises(ZeroDivisionError):
        main(config, stop)
    assert (tmp_path / "r" / "report.html").is_file() and "in a browser" in capsys.readouterr().out
    # What is refused before another step leaves it as it is.
    drawn = (tmp_path / "r" / "report.html").stat().st_mtime_ns
    (tmp_path / "r" / "checkpoints" / "step-000001" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="its state cannot be read"):
        main(config)
    assert (tmp_path / "r" / "report.html").stat().st_mtime_ns == drawn
    with pytest.raises(ZeroDivisionError):
        main(replace(config, out=tmp_path / "none"), lambda row, groups: 1 / 0)
    assert (tmp_path / "none" / "report.html").is_file()  # its one step is written before anybody is told
    with pytest.raises(DataError):
        main(replace(config, out=tmp_path / "bad", eval_questions=2, max_prompt_tokens=1))
    assert not (tmp_path / "bad" / "report.html").exists()


@pytest.mark.parametrize(
    "error, size, made",
    [
        (ValueError(), 1, True),
        (ValueError(), 2, False),  # the others have gone, and who started them waits for seconds only
        (Stopped(15, "SIGTERM"), 2, True),
        (Diverged(), 2, True),
        (StorageError(), 1, False),
    ],
)
def test_a_page_on_what_ended_early_is_made_where_all_come_to_it_and_there_is_room(monkeypatch, error, size, made):
    shown = []
    monkeypatch.setattr(train_upt, "show", lambda out, since: shown.append(out))
    monkeypatch.setattr(Team, "once", lambda team, work, *arguments: work(*arguments))
    with pytest.raises(type(error)), train_upt.shown_if_stopped(Path("run"), Team(0, size)):
        raise error
    assert shown == [Path("run")] * made


def test_the_start_says_what_is_not_usual(tiny):
    config = Config(model=tiny, quantize="nf4", **SMALL).resolve()
    assert starting.plan(config, None).endswith("4 responses, with 4-bit weights, into runs/train")
    config.gpus = 2
    assert starting.plan(config, None).endswith("4 responses, with 4-bit weights, on 2 processes, into runs/train")
    assert starting.means("none", 1) == starting.means(None, None) == ""


def test_a_checkpoint_that_is_a_pickle_is_not_opened(tiny, two_steps, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    out = shutil.copytree(two_steps, tmp_path / "r", ignore=shutil.ignore_patterns("summary.json"))
    for path in (out / "checkpoints").glob("step-*"):
        (path / "state.json").unlink()
        torch.save({"step": 2, "optimizer": Bomb()}, path / "state.pt")
    with pytest.raises(ShardError, match="state.pt, of an earlier version, is a pickle.*--init-adapter"):
        main(Config(out=out, resume=True))
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_file_is_executed_only_where_it_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'log')!r}, 'a').write('x')\ndef coin(group): return [float(i % 2) for i in range(4)]\n"
    )
    spec = f"{tmp_path / 'mine.py'}:coin"
    out = run(tiny, tmp_path / "r", steps=1, reward=spec)
    # As a stranger's folder would: nothing of it has been imported in this process.
    variants._execute.cache_clear()
    (tmp_path / "log").unlink()
    with pytest.raises(SettingError, match=f"its reward is code in a file, {spec}, which .* repeat it"):
        main(Config(out=out, resume=True))
    assert not (tmp_path / "log").exists()
    rewards.main(rewards.Config(rollouts=out / "rollouts", out=tmp_path / "scored", reward=spec))
    with pytest.raises(SettingError, match=f"scored: its reward is code in a file, {spec}"):
        main(
            Config(from_shards=tmp_path / "scored", out=tmp_path / "s", **SMALL | {"reward": None, "advantage": "mean"})
        )
    assert main(Config(out=out, resume=True, reward=spec))["end"]["steps"] == 1


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_what_a_run_leaves_can_be_opened_without_executing_anything(tiny, tmp_path):
    out = run(tiny, tmp_path / "r", steps=1, eval_questions=2, eval_samples=1)
    kinds = set()
    for path in (path for path in out.rglob("*") if path.is_file()):
        kinds.add(path.suffix)
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())
        elif path.suffix in (".md", ".html"):  # the page's script may ask nothing of anybody: test_report.py
            assert path.read_text("utf-8")
        else:
            lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
            assert path.suffix in (".json", ".jsonl") and all(map(json.loads, lines)), path
    assert kinds == {".html", ".json", ".jsonl", ".md", ".png", ".safetensors"}


def test_what_a_run_leaves(tiny, tmp_path):
    out = run(tiny, tmp_path / "r", steps=2, eval_questions=6, eval_samples=3, reward="frequency", save_every=1, keep=1)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"before", "end", "after", "warmup", "config", "seconds"}
    assert summary["end"] == {"steps": 2, "adapter_step": 2, "alarms": {}}
    for scores in (summary["before"], summary["after"]):
        assert {"greedy", "mean", "maj", "pass", "length", "entropy", "kinds"} <= set(scores)
        for name in ("greedy", "mean", "maj", "pass"):
            assert 0 <= scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"] <= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = "reward_mean majority_share distinct abstention_share entropy clip_low clip_high length cutoff_share"
    assert {*names.split(), "tokens_per_second", "seconds", "peak_memory_gib"} <= set(rows[0])
    assert {"rollout", "update"} <= set(rows[0]["seconds"])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    for group in shards.ShardReader(out / "rollouts"):
        assert all("advantage" in response for response in group["responses"])
    opened = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny), out / "adapter")
    assert any("lora" in name for name, _ in opened.named_parameters())
    # A run that starts from this adapter has it in its reference: nothing has been learnt yet at its first step.
    more = run(tiny, tmp_path / "more", steps=1, adapter=str(out / "adapter"), kl_every=1)
    assert json.loads((more / "metrics.jsonl").read_text())["kl"] == pytest.approx(0, abs=1e-5)
    # Its own adapter names the model it belongs to: the merged start.
    named = json.loads((more / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(more / "start") and (more / "start" / "config.json").is_file()


@pytest.fixture(scope="module")
def watched(tiny, tmp_path_factory) -> Path:
    """A run of four steps that is scored on held-out questions before its third."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    return run(tiny, out, steps=4, save_every=2, keep=9, learning_rate=0.3, **WATCHED)


WATCHED = {"eval_every": 2, "eval_questions": 4, "eval_samples": 2}


def lines(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what depends on the clock."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gib")} for row in rows
    ]


def test_held_out_scores_by_step_are_those_of_the_checkpoint_and_change_nothing(tiny, watched, tmp_path, capfd):
    assert [sorted(row.get("held_out", ())) for row in lines(watched)] == [
        [], [], ["entropy", "greedy", "length", "maj", "mean", "pass"], []
    ]  # fmt: skip
    scores = heldout.main(heldout.Config(run=watched / "checkpoints" / "step-000002", device="cpu"))
    rows = json.loads((watched / "held-out" / "step-000002.json").read_text())["rows"]
    assert [row["responses"] for row in rows] == [row["responses"] for row in scores["rows"]]
    found = lines(watched)[2]["held_out"]
    assert found == {name: scores[name]["value"] for name in found}
    before = json.loads((watched / "before.json").read_text())
    assert found["entropy"] != before["entropy"]["value"]
    plain = run(tiny, tmp_path / "plain", steps=4, save_every=2, keep=9, learning_rate=0.3)
    assert same(watched, plain) and lines(plain) == [
        {k: v for k, v in r.items() if k != "held_out"} for r in lines(watched)
    ]


def test_a_run_that_is_stopped_while_it_is_scored_goes_on_to_the_same_bits(tiny, watched, tmp_path, monkeypatch):
    real, calls = heldout.evaluate, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 2:  # the first is of before.json
            raise Stopped(signal.SIGTERM, "SIGTERM")
        return real(*given)

    monkeypatch.setattr(follow.heldout, "evaluate", stopping)
    settings = dict(steps=4, save_every=4, keep=9, learning_rate=0.3, **WATCHED)
    with pytest.raises(Stopped):
        run(tiny, tmp_path / "r", **settings)
    assert len(lines(tmp_path / "r")) == 2
    run(tiny, tmp_path / "r", **settings)
    assert same(watched, tmp_path / "r") and lines(tmp_path / "r") == lines(watched)
    assert len(calls) == 4  # before.json, twice before the third step, after.json


def test_held_out_scores_stand_in_the_status_line():
    row = {"reward_mean": 0.5, "majority_share": 0.5, "entropy": 0.1, "length": 3.0, "clip_low": 0.0, "clip_high": 0.0}
    row |= {"tokens_per_second": None, "peak_memory_gib": 1.0, "alarms": []}
    assert "held-out" not in status(row) and "held-out" not in status(row | {"held_out": {"entropy": 0.1}})
    assert ", held-out mean 74.9, held-out greedy 85.0, " in status(row | {"held_out": {"greedy": 0.85, "mean": 0.749}})


def test_without_gold_the_metrics_are_label_free(tiny, tmp_path, monkeypatch, capsys):
    real = data.load
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: real(*args, **kwargs).without_gold())
    out = run(tiny, tmp_path / "r", steps=1, eval_questions=4, eval_samples=2, reward="majority")
    before = json.loads((out / "summary.json").read_text())["before"]
    assert "greedy" not in before and {"length", "entropy", "majority_share"} <= set(before)
    assert "label-free metrics only" in capsys.readouterr().out
    with pytest.raises(ValueError, match="supervised needs gold"):
        run(tiny, tmp_path / "s", steps=1, reward="supervised")


def test_a_bad_row_is_told_of_once(tiny, tmp_path, capsys):
    rows = [{"problem": "How many?", "answer": "7"}, {"problem": "How much?", "answer": "8", "image": "gone.png"}]
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    jsonl(tmp_path / "data" / "test.jsonl", rows)
    out = run(tiny, tmp_path / "r", data=str(tmp_path / "data"), steps=2, questions_per_step=2, eval_questions=0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [1, 1]
    assert capsys.readouterr().err.count("left out data/train/000001: missing image file") == 1


def test_accuracy_is_that_of_the_questions_with_gold(tiny, tmp_path):
    """The tiny model says nothing that has an answer; a gold answer that is none either is right for no response."""
    rows = [{"problem": "How many?", "answer": "7"}, {"problem": "How much?", "answer": None}]
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    jsonl(tmp_path / "data" / "test.jsonl", rows)
    out = run(tiny, tmp_path / "r", data=str(tmp_path / "data"), steps=1, questions_per_step=2, eval_questions=0)
    (row,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert (row["accuracy"], row["pass"]) == (0, 0) and row["groups"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 2}, "--gpus 2 is for the command line"),
        ({"judge_prompt": "nosuch"}, "no judge prompt"),
        ({"reward": "judged(base='nonsense')"}, "base"),
        ({"min_share": 0.9, "max_share": 0.2}, "--min-share 0.9 is above --max-share 0.2"),
        ({"reward": "nonsense"}, "nonsense"),
        ({"advantage": "nonsense"}, "nonsense"),
        ({"temperature": 0.0}, "temperature"),
        ({"group_size": 1}, "group size"),
        ({"minibatches": 9}, "minibatches"),
        ({"steps": 0}, "--steps"),
        ({"eval_every": 4}, "--eval-every 4 has nothing to look at: give --eval-questions above 0 or --eval"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tiny, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, tmp_path / "r", **settings)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "mistake",
    [{"data": "no-such-set"}, {"prompt": "typo.md"}, {"eval_samples": 0}, {"save_every": 0}, {"eval_questions": -1}],
)
def test_a_mistake_leaves_no_run_behind(tiny, tmp_path, mistake):
    with pytest.raises(ValueError):
        run(tiny, tmp_path / "r", **{"steps": 1} | mistake)
    run(tiny, tmp_path / "r", steps=1)  # the corrected command is not refused


def test_the_rollouts_of_a_run_are_a_stage_of_their_own(tiny, tmp_path):
    online = run(tiny, tmp_path / "online", steps=1, seed=4, advantage="mean")
    main(Config(from_shards=online / "rollouts", out=tmp_path / "again", **SMALL | {"advantage": "mean"}))
    assert same(online, tmp_path / "again")


def test_the_rollouts_of_a_run_are_its_own(tiny, two_steps, tmp_path):
    """No stage writes into them, and no run takes up what a stage sampled."""
    out, few = two_steps / "rollouts", {"model": tiny, "questions_per_step": 4, "group_size": 4, "max_new_tokens": 12}
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (tmp_path / "link").symlink_to(out)
    for folder in (out, tmp_path / "link"):
        with pytest.raises(ShardError, match=f"{folder} belongs to the training run in {two_steps}; give another"):
            rollout.main(rollout.Config(out=folder, steps=3, **few))
    (tmp_path / "other").mkdir()
    rollout.main(rollout.Config(out=tmp_path / "other" / "rollouts", steps=1, **few))
    with pytest.raises(ShardError, match="other/rollouts holds shards that another command sampled"):
        run(tiny, tmp_path / "other", steps=1)
    rewards.main(rewards.Config(rollouts=out, out=tmp_path / "scored", reward="random"))
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_files_that_are_saved_can_be_read_by_those_who_can_read_the_others(two_steps):
    saved = [path for path in two_steps.rglob("*") if path.suffix in (".safetensors", ".json")]
    kinds = {path.name: path.stat().st_mode & 0o777 for path in saved}
    assert len({*kinds.values()}) == 1 and {"optimizer.safetensors", "adapter_model.safetensors"} <= {*kinds}


def test_shards_of_a_model_that_has_changed_are_refused(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    online = run(str(model), tmp_path / "online", steps=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": "another"}))
    with pytest.raises(ValueError, match="other files of the model"):
        main(Config(from_shards=online / "rollouts", out=tmp_path / "again", **SMALL))


def test_a_step_without_a_usable_question_is_left_out(tiny, tmp_path, monkeypatch, capfd):
    real = sampling.step_batch
    monkeypatch.setattr(
        sampling,
        "step_batch",
        lambda p, q, step, c, rows: (
            sampling.Batch([], [], {q.uids[row]: "bad" for row in rows}) if step == 0 else real(p, q, step, c, rows)
        ),
    )
    out = run(tiny, tmp_path / "r", steps=2, save_every=1)
    first, second = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 0, "groups": 0, "nonfinite_in_a_row": 0, "left_out": 4, "alarms": []}
    assert "left out" in capfd.readouterr().err
    # It has taken its part of the schedule, and its checkpoint is there: going on from it ends the same.
    assert (second["step"], second["learning_rate"]) == (1, pytest.approx(1e-2 * update.learning_rate_factor(1, 3, 2)))
    assert (out / "checkpoints" / "step-000001").is_dir()
    cut = shutil.copytree(
        out, tmp_path / "cut", ignore=shutil.ignore_patterns("step-000002", "adapter", "summary.json")
    )
    shutil.copytree(out / "checkpoints/step-000001/adapter", cut / "checkpoints/step-000001/adapter")
    capfd.readouterr()
    assert same(run(tiny, cut, steps=2, save_every=1), out)
    said = capfd.readouterr().out
    assert "going on after step 1 of 2\nstep 2 had been sampled: the shards are used as they are" in said


def test_the_last_step_of_a_run_may_be_left_out(tiny, tmp_path, monkeypatch):
    real = sampling.step_batch
    monkeypatch.setattr(
        sampling,
        "step_batch",
        lambda p, q, step, c, rows: (
            sampling.Batch([], [], {q.uids[row]: "bad" for row in rows}) if step == 1 else real(p, q, step, c, rows)
        ),
    )
    out = run(tiny, tmp_path / "r", steps=2, select="label-free")
    assert json.loads((out / "summary.json").read_text())["end"] == {"steps": 2, "adapter_step": 2, "alarms": {}}
    assert same(out, out / "checkpoints" / "step-000002")


def test_updates_that_stay_non_finite_end_the_run(tiny, tmp_path, monkeypatch, capfd):
    real, made = update.grpo_loss, []

    def broken(*args, **kwargs):
        loss, stats = real(*args, **kwargs)
        made.append(1)
        return (loss * float("nan") if len(made) in (2, *range(6, 99)) else loss), stats

    monkeypatch.setattr(update, "grpo_loss", broken)
    monkeypatch.setitem(rewards.REWARDS, "even", lambda group: [0.0, 1.0] * 2)  # a signal in every update
    out, settings = tmp_path / "r", dict(steps=9, save_every=1, keep=1, minibatches=2, reward="even", max_new_tokens=4)
    with pytest.raises(
        Diverged, match="stopped at step 5 of 9: the last 5 updates .* --init-adapter .*step-000001/"
    ) as end:
        run(tiny, out, **settings)
    assert ("--dtype" in str(end.value)) == torch.cuda.is_available()  # on a CPU it is fp32 already
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite"] for row in rows] == [1, 0, 1, 2, 2]
    assert [row["nonfinite_in_a_row"] for row in rows] == [1, 0, 1, 3, 5]
    assert [row["alarms"] for row in rows] == [["nonfinite"], [], ["nonfinite"], ["nonfinite"], ["nonfinite"]]
    found = {path.name for path in (out / "checkpoints").iterdir()}
    assert found == {"step-000001", "step-000005"}  # the last healthy one, whatever --keep, and where it stopped
    assert all(value.isfinite().all() for value in adapter(out / "checkpoints" / "step-000005").values())
    # The same command again says the same, and neither samples nor trains.
    calls = len(made)
    assert (out / "report.html").is_file()
    with pytest.raises(Diverged, match="has stopped at step 5 of 9"):
        run(tiny, out, **settings)
    assert len(made) == calls and not (out / "adapter").exists()
    made.clear()
    stop = settings | {"stop_on_collapse": True, "steps": 3}
    main(Config(model=tiny, out=tmp_path / "stop", **SMALL | stop))
    assert "step 1: stopped by --stop-on-collapse, nonfinite" in capfd.readouterr().out


def test_presets_carry_their_recipe(tiny):
    assert (Config(model=tiny).resolve().kl_coef, Config(data="geoqa").resolve().kl_coef) == (0.1, 0.0)
    preset = Config(model=tiny, preset="mm-upt").resolve()
    assert (preset.reward, preset.advantage, preset.clip_low, preset.clip_high) == ("majority", "group-norm", 0.2, 0.3)
    assert (preset.dual_clip, preset.kl_coef, preset.weight_decay, preset.max_grad_norm) == (3.0, 0.01, 0.01, 1.0)
    assert (preset.learning_rate, preset.questions_per_step, preset.minibatches) == (2e-4, 64, 1)
    real = Config(data="geoqa", preset="self-judge", reward="frequency").resolve()
    assert (real.group_size, real.temperature, real.advantage, real.clip_high) == (8, 1.0, "energy", 0.2)
    assert (real.learning_rate, real.questions_per_step, real.minibatches) == (1e-5, 512, 4)
    assert real.max_prompt_tokens == 1024 and real.max_new_tokens == 2048


def test_right_responses_and_groups_with_one_by_hand():
    def group(gold, *keys):
        return {"gold": gold, "choices": ["5", "7"], "responses": [{"key": key} for key in keys]}

    # No option reads 9: it has no key, and an abstention is never right.
    assert graded([group("9", None, None), group("7", "B", None)]) == {"accuracy": 1 / 4, "pass": 1 / 2}
    groups = [group("7", "B", "B", "A", "B"), group("5", "B"), group("5", "A", None, "B")]
    assert graded(groups) == {"accuracy": 4 / 8, "pass": 2 / 3}
    assert graded([]) == {}


def test_a_reward_of_a_notebook_that_changed_is_noticed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda group: [1.0 for _ in group["responses"]])
    first = Config(model=tiny, reward="mine", out=tmp_path).resolve().files()
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda group: [2.0 for _ in group["responses"]])
    assert Config(model=tiny, reward="mine", out=tmp_path).resolve().files() != first
    assert set(first) == {"reward_code"}
    assert not Config(model=tiny, reward="majority", out=tmp_path).resolve().files()
