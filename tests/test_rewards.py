import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time

import pytest
from PIL import Image

import answers
import rewards
import shards
from rewards import Config, advantage, main, reward, score, summary
from tests.test_shards import make_group


def group_of(keys, **fields):
    return make_group(keys=tuple(keys), **fields)


def test_votes_count_keys_and_leave_abstentions_out():
    group = group_of(["b", None, "a", "b", None])
    assert rewards.counts(group) == {"b": 2, "a": 1} and list(rewards.counts(group)) == ["b", "a"]
    assert rewards.majority_key(group) == "b"
    assert rewards.majority_share(group) == 2 / 5
    assert rewards.distinct(group) == 2
    assert rewards.abstentions(group) == 2
    assert rewards.majority_key(["x", "y", "x"]) == "x"  # keys alone do as well


def test_a_tie_or_silence_has_no_majority():
    assert rewards.majority_key(["a", "b", "b", "a", None]) is None
    assert rewards.majority_key(["a", "b", "b", "a", None], ties="first") == "a"
    assert rewards.majority_share(["a", "b", "b", "a", None]) == 2 / 5
    for ties in ("none", "first"):
        assert rewards.majority_key([None, None, None], ties=ties) is None
    assert rewards.majority_share([None, None]) == 0 and rewards.distinct([None, None]) == 0
    assert rewards.majority_key([None, None, "a"]) == "a"  # two abstentions do not outvote one answer
    with pytest.raises(ValueError, match="ties"):
        rewards.majority_key(["a"], ties="last")


CASES = [
    # keys, variant, rewards
    ("aab.", "majority", [1, 1, 0, 0]),
    ("a...", "majority", [1, 0, 0, 0]),
    ("abab.", "majority", [0, 0, 0, 0, 0]),
    ("babac", "majority(ties='first')", [1, 0, 1, 0, 0]),
    ("....", "majority", [0, 0, 0, 0]),
    ("....", "majority(ties='first')", [0, 0, 0, 0]),
    ("aab.", "frequency", [0.5, 0.5, 0.25, 0]),
    ("abab.", "frequency", [0.4, 0.4, 0.4, 0.4, 0]),
    ("....", "frequency", [0, 0, 0, 0]),
    ("a", "frequency", [1]),
    ("aaaaaaaaab", "gated-frequency", [1] * 9 + [0]),  # p(m) = .9 > .85: the gate is open
    ("aaaaaaaabb", "gated-frequency", [0.8] * 8 + [0.2] * 2),
    ("a" * 17 + "bbb", "gated-frequency", [0.85] * 17 + [0.15] * 3),  # p(m) = .85 is not above it
    ("aaaaaaaaa.", "gated-frequency", [1] * 9 + [0]),
    ("aaaaaa....", "gated-frequency", [0.6] * 6 + [0] * 4),  # abstentions stay in the denominator
    ("aaab", "gated-frequency(threshold=.7)", [1, 1, 1, 0]),
    ("aabb.", "gated-frequency(threshold=.3)", [0.4, 0.4, 0.4, 0.4, 0]),  # above, but no unique m
    ("....", "gated-frequency", [0, 0, 0, 0]),
]


@pytest.mark.parametrize("keys, variant, expected", CASES)
def test_rewards_by_hand(keys, variant, expected):
    group = group_of(None if key == "." else key for key in keys)
    got = reward(group, variant)
    assert got == pytest.approx(expected, abs=1e-15)
    assert all(type(r_i) is float for r_i in got)


@pytest.mark.parametrize("variant", ["majority", "frequency", "gated-frequency"])
def test_count_rewards_see_keys_alone_and_no_order(variant):
    keys = ["a", "b", "a", None, "c", "a"]
    blind = group_of(keys, gold=None)
    for response in blind["responses"]:
        response["text"] = "\\boxed{b}"
    expected = dict(zip(keys, reward(blind, variant), strict=True))
    for order in itertools.islice(itertools.permutations(keys), 0, 720, 37):
        assert reward(group_of(order, gold="b"), variant) == [expected[key] for key in order]


def test_supervised_grades_the_text_against_gold(monkeypatch):
    group = group_of(["7", "8", None, "7"])
    assert reward(group, "supervised") == [1, 0, 0, 1]
    asked = []
    monkeypatch.setattr(answers, "is_correct", lambda *arguments: asked.append(arguments) or True)
    reward(group_of(["B"], gold="B", choices=["1", "2"]), "supervised")
    assert asked == [("<think>hm</think>\\boxed{B}", "B", ["1", "2"])]
    with pytest.raises(ValueError, match="shapes/train/000009: no gold"):
        reward(group_of(["7"], gold=None, uid="shapes/train/000009"), "supervised")


def test_random_is_a_fair_coin_keyed_by_seed_step_uid_and_index():
    def coins(seed=0, step=0, uid="u", n=2000):
        return reward(group_of(["a"] * n, step=step, uid=uid), "random", seed=seed)

    base = coins()
    assert set(base) == {0.0, 1.0} and coins() == base
    for n in (1, 7):
        assert coins(n=n) == base[:n]  # the coin of a response does not depend on the size of its group
    for other in (coins(seed=1), coins(step=1), coins(uid="v")):
        agree = sum(a == b for a, b in zip(base, other, strict=True))
        assert abs(agree - 1000) < 4 * math.sqrt(500)  # sd of 2000 fair coins is sqrt(500)
        assert abs(sum(other) - 1000) < 4 * math.sqrt(500)
    assert coins(step=1, uid="1") != coins(step=11, uid="")  # the parts of the key cannot run together


def test_random_is_the_same_in_another_process():
    group = group_of(["a"] * 64, step=3)
    code = "import json, sys, rewards; print(json.dumps(rewards.reward(json.load(sys.stdin), 'random(seed=5)')))"
    environment = os.environ | {"PYTHONHASHSEED": "99"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(group),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert json.loads(done.stdout) == reward(group, "random", seed=5)


def test_the_format_penalty_is_subtracted_once_from_any_variant():
    group = group_of(["7", "7", None])
    group["responses"][1]["text"] = "\\boxed{7}"  # no <think>: not well-formed, like the abstention
    assert reward(group, "majority", lam_fmt=0.5) == [1, 0.5, -0.5]
    for variant in rewards.REWARDS:
        plain, fined = reward(group, variant), reward(group, f"{variant}(lam_fmt=.25)")
        assert [a - b for a, b in zip(plain, fined, strict=True)] == [0, 0.25, 0.25]


CLOSED = [
    # mean .5, deviations +-.5, sample variance 4 * .25 / 3 = 1/3
    ("group-norm", [1, 0, 0, 1], [s * 0.5 / (math.sqrt(1 / 3) + 1e-6) for s in (1, -1, -1, 1)]),
    ("group-norm(eps=.5)", [1, 0, 0, 1], [s * 0.5 / (math.sqrt(1 / 3) + 0.5) for s in (1, -1, -1, 1)]),
    ("mean", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
    ("rloo", [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # 1 - (0 + 0 + 1) / 3
    ("rloo", [3, 0], [3, -3]),
    ("energy", [1, 0, 0, 1], [x - math.log(2 * math.e + 2) for x in (1, 0, 0, 1)]),
    ("energy(beta=2)", [1, 0, 0, 1], [x - math.log(2 * math.exp(2) + 2) for x in (2, 0, 0, 2)]),
    ("energy-centred", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
    ("energy-centred(beta=3)", [1, 0, 0, 1], [1.5, -1.5, -1.5, 1.5]),
    ("energy", [0.1] * 5, [-math.log(5)] * 5),  # no signal, and yet not 0, as printed
    ("energy", [1000, 0], [0, -1000]),  # exp(1000) overflows, its log-sum-exp does not
    ("energy", [-1000, -1000], [-math.log(2)] * 2),
]


@pytest.mark.parametrize("estimator, r, expected", CLOSED)
def test_advantages_in_closed_form(estimator, r, expected):
    assert advantage(r, estimator) == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_a_group_of_one_has_no_advantage(estimator):
    assert advantage([0.7], estimator) == [0.0]
    assert advantage([], estimator) == []


@pytest.mark.parametrize("estimator", ["group-norm", "mean", "rloo", "energy-centred"])
def test_equal_rewards_give_exactly_zero(estimator):
    for value, n in itertools.product((0.1, 1 / 3, 0.7, 1e-9), range(2, 17)):
        assert advantage([value] * n, estimator) == [0.0] * n


@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_the_order_of_the_responses_changes_no_bit(estimator):
    draw = random.Random(1)
    r = [draw.random() for _ in range(10)]
    expected = dict(zip(r, advantage(r, estimator), strict=True))
    for _ in range(20):
        draw.shuffle(r)
        assert advantage(r, estimator) == [expected[r_i] for r_i in r]


def test_energy_is_a_log_probability_and_centring_takes_it_to_energy_centred():
    r = [0.9, 0.1, 0.4, 0.4]
    printed = advantage(r, "energy", beta=2)
    assert max(printed) < 0 and math.fsum(map(math.exp, printed)) == pytest.approx(1, rel=1e-14)
    mu = math.fsum(printed) / 4
    assert [a - mu for a in printed] == pytest.approx(advantage(r, "energy-centred", beta=2), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", rewards.ADVANTAGES)
def test_rewards_that_are_not_finite_are_refused(estimator, bad):
    with pytest.raises(ValueError, match="finite"):
        advantage([0.0, bad], estimator)


def test_inline_settings():
    parse = rewards.parse_variant
    assert parse("majority") == ("majority", {}) and parse(" majority ( ) ") == ("majority", {})
    parsed = parse("gated-frequency(threshold=.9, lam_fmt=-5e-1,)")
    assert parsed == ("gated-frequency", {"threshold": 0.9, "lam_fmt": -0.5})
    assert parse("x(a='),(', b=[1, None], c=True)") == ("x", {"a": "),(", "b": [1, None], "c": True})


@pytest.mark.parametrize(
    "spec",
    ["", "(a=1)", "x(1)", "x(a)", "x(a=)", "x(a=b)", "x(a=1", "x a=1", "x(a=1)(b=2)", "x(a=1, a=2)", "x(**{})",
     "x(a=__import__('os'))", "x(a=1) + y(b=2)", "x(a=1).y(b=2)", "x(a={[]: 1})"],
)  # fmt: skip
def test_what_is_no_variant_is_a_clear_error(spec):
    with pytest.raises(ValueError, match="setting|literal|number"):
        rewards.parse_variant(spec)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reward(group_of("a"), "majorty"), "'majorty'.*majority, frequency, gated-frequency"),
        (lambda: reward(group_of("a"), "majority(tie='first')"), "'tie'; it has: lam_fmt, ties"),
        (lambda: reward(group_of("a"), "majority", seed=1), "'seed'; it has: lam_fmt, ties"),
        (lambda: reward(group_of("a"), "majority(ties='last')"), "'none' or 'first'"),
        (lambda: reward(group_of("a"), "majority(ties=1)"), "ties is 1"),
        (lambda: reward(group_of("a"), "majority(lam_fmt='big')"), "lam_fmt is 'big'"),
        (lambda: reward(group_of("a"), "gated-frequency(threshold=1e999)"), "threshold is inf"),
        (lambda: reward(group_of("a"), "majority(lam_fmt=1)", lam_fmt=2), "lam_fmt given inline and"),
        (lambda: advantage([1, 2], "grpo"), "'grpo'.*group-norm, mean, rloo, energy, energy-centred"),
        (lambda: advantage([1, 2], "mean(beta=1)"), "'beta'; it has: none"),
        (lambda: advantage([1, 2], "energy(beta=True)"), "beta is True"),
    ],
)
def test_unknown_names_and_settings_list_what_there_is(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_new_variant_works_by_name_everywhere(tmp_path, monkeypatch):
    def shortness(group, *, scale: float = 1.0):
        return [scale / len(response["token_ids"]) for response in group["responses"]]

    monkeypatch.setitem(rewards.REWARDS, "shortness", shortness)
    monkeypatch.setitem(rewards.ADVANTAGES, "raw", lambda r: r)

    group = group_of(["7", None])
    assert reward(group, "shortness") == reward(group, "shortness", scale=1) == [1 / 3, 1 / 3]
    assert reward(group, "shortness(scale=3, lam_fmt=.5)") == [1, 0.5]
    [scored] = score([group], "shortness(scale=6)", "raw", seed=0)
    assert [response["advantage"] for response in scored["responses"]] == [2, 2]
    write_rollouts(tmp_path / "in", steps=1)
    main(Config(rollouts=tmp_path / "in", out=tmp_path / "out", reward="shortness(scale=3)", advantage="raw"))
    assert {r["advantage"] for g in shards.ShardReader(tmp_path / "out") for r in g["responses"]} == {1.0}


def test_a_variant_that_answers_wrongly_is_caught(monkeypatch):
    for wrong in ([1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        monkeypatch.setitem(rewards.REWARDS, "mine", lambda group, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="reward 'mine' of shapes/train/000001: .*expected 2 finite"):
            reward(group_of("ab"), "mine")


def test_score_adds_two_fields_and_touches_nothing_else():
    groups = [group_of(["a", "a", "b", None]), group_of(["c"], uid="v", extra=[1])]
    groups[0]["responses"][0]["judge"] = {"score": 0.5, "parsed": True}
    before = copy.deepcopy(groups)
    scored = score(iter(groups), "majority", "mean", 0)
    assert groups == before
    assert [[r["reward"] for r in g["responses"]] for g in scored] == [[1, 1, 0, 0], [1]]
    assert [[r["advantage"] for r in g["responses"]] for g in scored] == [[0.5, 0.5, -0.5, -0.5], [0]]
    for group in scored:
        shards.validate(group, "scored")
        for response in group["responses"]:
            del response["reward"], response["advantage"]
    assert scored == before


def test_the_seed_of_the_run_reaches_variants_that_draw_unless_one_is_given():
    groups = [group_of(["a"] * 32)]

    def coins(variant, seed):
        return [r["reward"] for r in score(groups, variant, "mean", seed)[0]["responses"]]

    assert coins("random", 3) == reward(groups[0], "random", seed=3) != coins("random", 4)
    assert coins("random(seed=3)", 4) == coins("random", 3)
    assert coins("majority", 3) == coins("majority", 4)


def test_summary_by_hand():
    groups = [group_of(["a", "a", "b", None]), group_of(["a", "b", "c", "d"]), group_of(["a", "a", "a", "a"])]
    totals = summary(iter(score(groups, "majority", "group-norm", 0)))
    assert totals == pytest.approx({
        "groups": 3, "responses": 12, "signal": 1 / 3, "majority_share": (0.5 + 0.25 + 1) / 3,
        "distinct": (2 + 4 + 1) / 3, "abstention_share": 1 / 12, "reward_mean": 0.5, "reward_std": 0.5,
    })  # fmt: skip
    assert totals == summary(score([group | {"gold": None} for group in groups], "majority", "group-norm", 0))
    with pytest.raises(ValueError, match="no groups"):
        summary([])


def test_scoring_ten_thousand_groups_takes_seconds():
    draw = random.Random(0)
    groups = [group_of([draw.choice("abcd") for _ in range(8)], uid=f"u/{i}") for i in range(10_000)]
    start = time.process_time()
    score(groups, "gated-frequency", "group-norm", 0)
    assert time.process_time() - start < 5


def write_rollouts(folder, steps=2, seed=11, per_shard=4, group_size=8):
    draw = random.Random(0)
    for step in range(steps):
        groups = []
        for i in range(per_shard):
            name = shards.save_image(folder, Image.new("RGB", (4, 4), (step, i, 0)))
            keys = [draw.choice(["1", "2", None]) for _ in range(8)]
            groups.append(group_of(keys, step=step, uid=f"u/{step}/{i}", image=name))
        shards.write_shard(shards.shard_path(folder, step), groups)
    if seed is not None:
        config = {"group_size": group_size, "steps": steps, "out": folder}
        shards.write_manifest(folder, stage="rollout", config=config, seed=seed, model="org/model")


def stage(tmp_path, **settings):
    return main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "scored", **settings))


def test_the_command_scores_a_folder(tmp_path):
    source, out = tmp_path / "rollouts", tmp_path / "scored"
    write_rollouts(source)
    command = [sys.executable, rewards.__file__, "--rollouts", source, "--out", out, "--reward", "random"]
    done = subprocess.run([*command, "--advantage", "energy(beta=2)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = dict(line.split() for line in done.stdout.splitlines()[1:])
    assert table["groups"] == "8" and table["responses"] == "64"

    rollouts, scored = list(shards.ShardReader(source)), list(shards.ShardReader(out))
    assert [path.name for path in shards.list_shards(out)] == ["step-000000.jsonl", "step-000001.jsonl"]
    assert scored == score(rollouts, "random", "energy(beta=2)", seed=11)  # the seed of the rollouts' manifest
    assert float(table["reward_mean"]) == pytest.approx(summary(scored)["reward_mean"], abs=1e-4)
    assert (out / "images").is_symlink()
    assert shards.open_image(out, scored[5]["image"]).getpixel((0, 0)) == (1, 1, 0)
    manifest = shards.read_manifest(out)
    assert manifest["stage"] == "rewards" and manifest["seed"] == 11 and manifest["config"]["reward"] == "random"
    assert manifest["model"] == {"name": "org/model", "fingerprint": "hub:org/model"} and manifest["adapter"] is None


def test_the_seed_given_goes_before_the_manifest_and_without_any_it_is_said(tmp_path, capsys):
    write_rollouts(tmp_path / "rollouts", seed=None)
    stage(tmp_path, reward="random")
    assert "no seed" in capsys.readouterr().err
    groups = list(shards.ShardReader(tmp_path / "rollouts"))
    assert list(shards.ShardReader(tmp_path / "scored")) == score(groups, "random", "group-norm", seed=0)
    main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "b", reward="random", seed=5))
    assert list(shards.ShardReader(tmp_path / "b")) == score(groups, "random", "group-norm", seed=5)


def test_resuming_keeps_whole_shards_and_regenerates_the_rest(tmp_path, monkeypatch):
    write_rollouts(tmp_path / "rollouts", steps=4)
    first = stage(tmp_path)
    whole = {path: path.read_bytes() for path in shards.list_shards(tmp_path / "scored")}
    paths = list(whole)
    paths[1].unlink()
    paths[2].write_bytes(whole[paths[2]][:-9])
    os.utime(tmp_path / "rollouts" / paths[3].name, ns=(2**62, 2**62))  # regenerated after it was scored
    written, write = [], shards.write_shard
    monkeypatch.setattr(shards, "write_shard", lambda path, groups: (written.append(path), write(path, groups)))
    assert stage(tmp_path) == first
    assert written == paths[1:]
    assert {path: path.read_bytes() for path in paths} == whole


def test_a_folder_takes_one_config(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    stage(tmp_path)
    with pytest.raises(shards.ShardError, match="reward: 'majority' there, 'frequency' now"):
        stage(tmp_path, reward="frequency")
    with pytest.raises(shards.ShardError, match="seed: 11 there, 12 now"):
        stage(tmp_path, seed=12)
    for other in ({"seed": 12}, {"group_size": 10}):  # other rollouts under the same path
        write_rollouts(tmp_path / "rollouts", **other)
        with pytest.raises(shards.ShardError, match="rollouts_manifest"):
            stage(tmp_path, seed=11)
    (tmp_path / "rollouts").rename(tmp_path / "moved")
    write_rollouts(tmp_path / "moved", steps=3)
    totals = main(Config(rollouts=tmp_path / "moved", out=tmp_path / "scored"))  # the same elsewhere, and a step more
    assert totals["groups"] == 12
    assert (tmp_path / "scored" / "images").resolve() == tmp_path / "moved" / "images"  # the link had come to dangle


def test_what_cannot_work_fails_before_anything_is_written(tmp_path):
    write_rollouts(tmp_path / "rollouts")
    with pytest.raises(ValueError, match="--out is --rollouts"):
        main(Config(rollouts=tmp_path / "rollouts", out=tmp_path / "x" / ".." / "rollouts"))
    for settings in ({"reward": "majorty"}, {"advantage": "energy(b=1)"}):
        with pytest.raises(ValueError):
            stage(tmp_path, **settings)
    with pytest.raises(shards.ShardError, match="no shards"):
        main(Config(rollouts=tmp_path / "nowhere", out=tmp_path / "scored"))
    assert not (tmp_path / "scored").exists()


def test_importing_needs_no_torch():
    code = "import sys, rewards, shards; assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
