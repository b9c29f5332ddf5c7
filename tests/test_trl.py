"""Rewards in TRL: groups out of gathered completions, whatever process they lie on; what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

import rewards
from tests.datafiles import jsonl
from upt import prompts
from upt.answers import vote_key
from upt.data import Question
from upt.errors import DataError, SettingError
from upt.groups.votes import majority_share
from upt.model.policy import Policy
from upt.trl import label_free

ROOT = Path(__file__).parents[1]
trl = pytest.mark.skipif(find_spec("trl") is None, reason="make test-trl installs it")
FIRST = ["\\boxed{3}", "so \\boxed{3}", "\\boxed{4}", "no idea"]
SECOND = ["\\boxed{7}", "\\boxed{8}", "\\boxed{8.0}", "\\boxed{8}"]


def asked(*texts: str, times: int = 4) -> list:
    """Prompts as TRL hands them over: each of them as often as it is answered."""
    return [[{"role": "user", "content": text}] for text in texts for _ in range(times)]


def said(texts: list[str]) -> list:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_completions_of_a_prompt_vote():
    assert label_free("majority", 4)(asked("a", "b"), said(FIRST + SECOND)) == [1, 1, 0, 0, 0, 1, 1, 1]
    assert label_free("frequency", 4)(["a"] * 4 + ["b"] * 4, FIRST + SECOND) == [
        0.5,
        0.5,
        0.25,
        0,
        0.25,
        0.75,
        0.75,
        0.75,
    ]
    assert label_free("majority", 4).__name__ == "majority"
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in FIRST]
    assert label_free("majority", 4)(asked("a"), parts) == [1, 1, 0, 0]
    assert label_free("majority(ties='first')", 2)(["a", "a"], FIRST[1:3]) == [1, 0]


def test_a_skipped_group_earns_nothing():
    assert label_free("confident-majority(tau=.6)", 4)(asked("a", "b"), said(FIRST + SECOND)) == [0] * 4 + [0, 1, 1, 1]


def test_a_letter_and_its_option_are_one_vote():
    answers = ["\\boxed{B}", "\\boxed{two}", "\\boxed{A}", "\\boxed{A}"]
    options = {"choices": [["one", "two"]] * 4}
    assert label_free("frequency", 4)(asked("a"), answers, **options) == [0.5] * 4
    assert label_free("frequency", 4)(asked("a"), answers) == [0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("column", ["solution", "answer"])
def test_gold_is_read_by_supervised_alone(column):
    gold = {column: ["4"] * 4}
    assert label_free("supervised", 4)(asked("a"), said(FIRST), **gold) == [0, 0, 1, 0]
    assert label_free("majority", 4)(asked("a"), said(FIRST), **gold) == [1, 1, 0, 0]
    with pytest.raises(DataError, match="no gold answer"):
        label_free("supervised", 4)(asked("a"), said(FIRST))


def test_scores_of_a_judge_of_ones_own():
    judged = []

    def judge(group):
        judged.append(group)
        return [1.0, 0.0, True, None]

    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    columns = {"solution": ["3"] * 8, "image": [red] * 4 + [blue] * 4}
    earned = label_free("judged(lam_fmt=0)", 4, judge=judge)(asked("how many?", "b"), said(FIRST * 2), **columns)
    assert [group["question"] for group in judged] == ["how many?", "b"]
    assert not any("gold" in group for group in judged)
    assert judged[0]["image"] is red and judged[1]["image"] is blue
    assert earned == 2 * [0.5 * rewards.g(1.0), 0.5 * rewards.g(0.0), 0.25 * rewards.g(1.0), 0]
    label_free("judge-only", 4, judge=judge)(asked("a"), said(FIRST), images=[[blue, red]] * 4)
    label_free("judge-only", 4, judge=judge)(asked("a"), said(FIRST), image=[None] * 4)
    assert judged[2]["image"] is blue and judged[3]["image"] is None


@pytest.mark.parametrize("scores", [[2.0] * 4, [0.5] * 3, None, [0.5, 0.5, 0.5, "1"], [float("nan")] * 4, [-0.1] * 4])
def test_scores_that_are_none_are_refused(scores):
    with pytest.raises(SettingError, match="the judge (gives|fails on)"):
        label_free("judge-only", 4, judge=lambda group: scores)(asked("a"), said(FIRST))


def test_a_reward_of_ones_own_gets_the_tokens(tmp_path):
    (tmp_path / "mine.py").write_text("def long(group): return [len(r['token_ids']) for r in group['responses']]\n")
    reward = label_free(f"{tmp_path}/mine.py:long", 4)
    assert reward(asked("a"), said(FIRST), completion_ids=[[5], [5, 6], [7] * 3, []]) == [1, 2, 3, 0]


def test_means_over_groups_are_logged():
    logged = {}
    label_free("majority", 4)(asked("a", "b"), said(FIRST + SECOND), log_metric=logged.__setitem__)
    assert logged == {"majority_share": (0.5 + 0.75) / 2, "distinct_answers": 2, "abstention_share": 1 / 8}


def test_a_coin_falls_by_seed_step_and_prompt():
    def coins(step=3, **settings):
        return label_free("random", 4, **settings)(
            asked("a", "b"), said(FIRST * 2), trainer_state=SimpleNamespace(global_step=step)
        )

    identity = json.dumps(asked("a")[0], sort_keys=True).encode()
    group = {"uid": blake2b(identity, digest_size=8).hexdigest(), "step": 3, "responses": FIRST}
    assert coins()[:4] == rewards.random(group) and coins() == coins(seed=0)
    assert len({tuple(coins(seed=seed)) for seed in range(9)}) > 6
    assert len({tuple(coins(step)) for step in range(9)}) > 6
    assert sum(coins(step)[:4] != coins(step)[4:] for step in range(9)) > 6


@pytest.mark.parametrize(("reward", "words"), [
    ("self-certainty", "reads the sampling distribution.*take 'majority'"),
    ("negative-entropy", "reads the sampling distribution"),
    ("scrl(tau_low=.2)", "reads the sampling distribution"),
    ("two-view", "two views of a picture"),
    ("judged(t_h=.9)", "judge=.*'frequency'"),
    ("majorty", "did you mean 'majority'"),
    ("frequency(gama=2)", "gama"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused(reward, words):
    with pytest.raises(SettingError, match=words):
        label_free(reward, 4)


def test_what_is_no_group_is_refused():
    for size in (1, 4.0, True, "4"):
        with pytest.raises(SettingError, match=f"group_size={size!r}: .*give num_generations"):
            label_free("majority", size)
    with pytest.raises(DataError, match="completions 0 to 7 of 8 are no 8 answers to one prompt.*num_generations"):
        label_free("majority", 8)(asked("a", "b"), said(FIRST + SECOND))
    with pytest.raises(DataError, match="completions 3 to 3 of 4 are no 3 answers"):
        label_free("majority", 3)(asked("a"), said(FIRST))
    with pytest.raises(DataError, match="completion 1 is neither a text nor a chat"):
        label_free("majority", 4)(asked("a"), [FIRST[0], 7, *FIRST[2:]])


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"], ["a", "b", "a"]])
def test_votes_among_parts_of_a_group_are_refused(prompts):
    with pytest.raises(DataError, match="every prompt has 8 completions here.*num_generations_eval the same"):
        label_free("majority", 4)(asked(*prompts, times=8), said(FIRST * 2 * len(prompts)))


def test_a_question_that_the_data_has_twice_is_two_groups():
    earned = label_free("majority", 4)(asked("a", "b", "b"), said(FIRST + SECOND + FIRST))
    assert earned == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_the_same_words_about_another_picture_are_another_prompt():
    def about(colour, size=(4, 4)):
        picture = Image.new("RGB", size, colour)
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]

    assert label_free("majority", 2)([about("red"), about("red")], FIRST[:2]) == [1, 1]
    with pytest.raises(DataError, match="no 2 answers to one prompt"):
        label_free("majority", 2)([about("red"), about("blue")], FIRST[:2])
    with pytest.raises(DataError, match="no 2 answers to one prompt"):  # of the same bytes
        label_free("majority", 2)([about("red", (8, 2)), about("red")], FIRST[:2])


PROCESS = """
import json, sys
from accelerate import PartialState
from upt.trl import label_free
state, out, told = PartialState(cpu=True), sys.argv[2], []

for how, texts, shares in json.loads(sys.argv[1]):
    start, logged, judged = sum(shares[: state.process_index]), {}, []
    mine = slice(start, start + shares[state.process_index])
    prompts = [f"prompt {i // 4}" for i in range(len(texts))][mine]
    columns = {"image": [f"picture {i}" for i in range(len(texts))][mine], "log_metric": logged.__setitem__}

    def judge(group):
        judged.append([group["question"], group["image"]])
        return [1 / 0] if how == "fails" and state.process_index else [(1 + state.process_index) / 4] * 4

    if how == "broken" and state.process_index:
        columns["choices"] = [[]]
    try:
        reward = label_free("judge-only", 4, judge=judge) if how in ("judges", "fails") else label_free("frequency", 4)
        said = reward(prompts, texts[mine], **columns)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    told.append([said, logged, judged])
state.destroy_process_group()
open(f"{out}/said-{state.process_index}", "w").write(json.dumps(told))
"""
CASES = [(how, FIRST + SECOND, shares) for how, shares in (("votes", [3, 5]), ("judges", [3, 5]), ("fails", [4, 4]))]
CASES += [("broken", FIRST + SECOND, [4, 4]), ("no text", [*FIRST, 7, *SECOND[1:]], [4, 4])]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, list]:
    """What each of two processes says in each case: [rewards or error, what is logged, what is judged]."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "process.py"), json.dumps(CASES), str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("said-*"))]
    return {how: [of[i] for of in told] for i, (how, _, _) in enumerate(CASES)}


def test_groups_that_lie_on_several_processes(two):
    """Eight completions of two prompts, of which the first process has three."""
    logged = {"majority_share": 0.625, "distinct_answers": 2, "abstention_share": 0.125}
    assert two["votes"] == [[[0.5, 0.5, 0.25], logged, []], [[0, 0.25, 0.75, 0.75, 0.75], logged, []]]


def test_a_group_is_judged_once_where_it_begins(two):
    (earned, _, judged), (others, _, judged_there) = two["judges"]
    assert earned == [0.25] * 3 and judged == [["prompt 0", "picture 0"]]
    assert others == [0.25] + [0.5] * 4 and judged_there == [["prompt 1", "picture 4"]]


@pytest.mark.parametrize(("how", "words"), [
    ("fails", "the judge fails on .*: ZeroDivisionError: division by zero"),
    ("broken", "ValueError: zip"),
])  # fmt: skip
def test_what_fails_in_one_process_is_an_error_in_all(two, how, words):
    (here, _, _), (there, _, _) = two[how]
    assert re.match(f"Elsewhere: {words}.* [(]in process 1[)]$", here) and re.search(words, there)


def test_all_processes_refuse_together(two):
    said = "DataError: completion 4 is neither a text nor a chat whose last message has one"
    assert [error for error, _, _ in two["no text"]] == [said, said]


def test_a_question_reads_as_in_the_loop(tiny):
    policy = Policy.load(tiny)
    asked = Question("u", "Is it <|im_<|image_pad|>start|> <|image_pad|> or not?", ["1", "<|vision_end|>2"], None, None)
    tokens = policy.tokenizer.all_special_tokens
    said = prompts.without(prompts.with_options(asked.question, asked.choices), [*tokens, "<|image_pad|>"])
    assert said == policy.ask(asked) == "Is it   or not?\nA. 1\nB. 2"


def example(tiny: str, out: Path, processes: int = 1, **settings) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The example by so many processes, with three groups of 4 a step; what its reward got and gave, by process."""
    flags = {"model": tiny, "data": "shapes", "reward": "frequency", "prompt": "think-boxed", "output_dir": out}
    flags |= {"min_pixels": 3136, "max_pixels": 78400, "lora_rank": 2, "num_generations": 4, "max_steps": 2}
    flags |= {"per_device_train_batch_size": 6 // processes, "gradient_accumulation_steps": 2}
    flags |= {"steps_per_generation": 2, "max_completion_length": 8, "learning_rate": 0.01, "report_to": "none"}
    flags |= {"save_steps": 1, "use_cpu": True, "model_init_kwargs": '{"dtype": "float32"}'}
    flags |= dict.fromkeys(("bf16", "gradient_checkpointing", "use_vllm"), False) | settings
    record = out.with_name(out.name + "-record")
    shutil.rmtree(record, ignore_errors=True)
    record.mkdir()
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    command = [sys.executable, *start, "tests/trl_example.py", *(f"--{name}={value}" for name, value in flags.items())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RECORD": str(record)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    return done, [[*map(json.loads, path.read_text().splitlines())] for path in sorted(record.glob("*.jsonl"))]


def history(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


@trl
@pytest.mark.parametrize("processes", [1, 2])
def test_in_trl_rewards_are_those_of_rewards_py(tiny, tmp_path, processes):
    """With two processes each has 6 of 12 completions, so that the second of three groups lies on both."""
    done, calls = example(tiny, tmp_path / "run", processes, max_steps=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [len(of) for of in calls] == [1] * processes
    assert [len(call["texts"]) for (call,) in calls] == [12 // processes] * processes
    texts, earned, prompts = (
        [one for (call,) in calls for one in call[name]] for name in ("texts", "rewards", "prompts")
    )
    assert [len({*prompts[i : i + 4]}) for i in (0, 4, 8)] == [1, 1, 1] and len({*prompts}) == 3
    keys = [vote_key(text) for text in texts]
    groups = [{"responses": [{"key": key} for key in keys[i : i + 4]]} for i in (0, 4, 8)]
    assert earned == [r for group in groups for r in rewards.reward(group, "frequency")]
    assert len({*earned}) > 1  # else any grouping would do
    logged = history(tmp_path / "run" / "checkpoint-1")[0]
    assert logged["rewards/frequency/mean"] == pytest.approx(sum(earned) / 12)
    assert logged["majority_share"] == pytest.approx(sum(map(majority_share, groups)) / 3)
    assert logged["abstention_share"] == 0 and logged["distinct_answers"] > 1


@trl
def test_the_example_trains_and_goes_on_from_a_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    done, ((first, second),) = example(tiny, out)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(out / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in weights) and len(weights) == 2 * 21
    assert any(float(value.abs().max()) > 0 for name, value in weights.items() if "lora_B" in name)
    assert (first["step"], second["step"]) == (0, 1)
    shutil.rmtree(out / "checkpoint-2")
    (out / "adapter_model.safetensors").unlink()
    done, ((again,),) = example(tiny, out, resume_from_checkpoint=out / "checkpoint-1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert again == second  # the second step alone, and the same
    for name, value in load_file(out / "adapter_model.safetensors").items():
        assert (value - weights[name]).abs().max() < 1e-6, name


@trl
def test_the_example_refuses_data_that_trl_does_not_take(tiny, tmp_path):
    rows = [{"problem": f"{i}?"} | ({"image": "a.png"} if i % 2 else {}) for i in range(40)]
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    done, _ = example(tiny, tmp_path / "run", data=jsonl(tmp_path / "mine.jsonl", rows))
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith("error: --data "), done.stderr[-3000:]
    assert error.endswith(" has no picture; give questions that all have one")
    with_weights, _ = example(tiny, tmp_path / "weights", data="shapes:1,shapes-hard:1")
    assert "TRL draws all questions alike; leave the weights out" in with_weights.stderr
